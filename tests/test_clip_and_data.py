"""Loading of models and images."""

import copy
import gc
import json
import logging
import multiprocessing
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from tests.conftest import ROOT, TINY
from tests.photos import SYNSETS, write_photos
from utils.data.images import CIFAR, classes_of, load_images
from utils.data.splits import Loader
from utils.data.text_sets import find_texts, read_texts, text_set
from utils.model.clip import load_clip, weights_fingerprint
from utils.model.texts import causal_tower, text_vectors, too_long, zero_shot_classifier
from utils.runtime.errors import UserError
from utils.runtime.records import save_array
from utils.runtime.results import Results
from utils.statistics import load_classifier


@pytest.fixture(scope="module")
def clip(tiny_model):
    return load_clip(tiny_model, "random", "cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), per_class=3, side=48)


def test_random_weights_come_from_a_seed(tiny_model, clip):
    again, other = load_clip(tiny_model, "random", "cpu"), load_clip(tiny_model, "random", "cpu", seed=1)
    assert again.fingerprint == clip.fingerprint != other.fingerprint
    assert not clip.text.training and next(clip.text.parameters()).dtype == torch.float32


def test_a_fingerprint_notices_one_changed_tensor(clip):
    changed = copy.deepcopy(clip.text)
    changed.visual.ln_post.bias.data += 1e-3
    assert weights_fingerprint(changed) != clip.fingerprint


def test_the_image_tower_alone_is_the_same_tower_of_the_same_weights(tiny_model, clip):
    alone = load_clip(tiny_model, "random", "cpu", image_only=True)
    assert alone.fingerprint == clip.fingerprint and alone.text is None
    assert all(
        torch.equal(a, b)
        for a, b in zip(alone.vit.visual.parameters(), clip.vit.visual.parameters(), strict=True)
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_local_checkpoint_is_loaded(tiny_model, tmp_path, suffix):
    state = load_clip(tiny_model, "random", "cpu", seed=7).text.state_dict()
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    loaded = load_clip(tiny_model, str(path), "cpu").text.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_a_local_directory_is_loaded_and_one_without_weights_refused(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": TINY, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}})
    )
    with pytest.raises(UserError, match="could not be loaded"):
        load_clip(f"local-dir:{tmp_path}", "openai", "cpu")
    model = open_clip.create_model("ViT-B-32", **TINY)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    clip = load_clip(f"local-dir:{tmp_path}", "openai", "cpu")
    assert torch.equal(clip.vit.visual.proj, model.visual.proj)
    assert tuple(clip.transform.transforms[-1].mean) == (0.1, 0.2, 0.3)


def test_the_activation_is_that_of_the_tag_in_both_towers(monkeypatch):
    def from_memory(cfg, *arguments, **options):  # stands for the download of the weights
        return checkpoint

    checkpoint = "somewhere.pt"
    monkeypatch.setattr(open_clip.factory, "download_pretrained", from_memory)
    monkeypatch.setattr(open_clip.factory, "load_checkpoint", lambda *arguments, **options: {})
    for tag, activation in (("openai", "QuickGELU"), ("laion2b_s34b_b79k", "GELU")):
        model = load_clip("ViT-B-32", tag, "cpu").text
        for tower in (model.visual.transformer, model.transformer):
            assert type(tower.resblocks[0].mlp.gelu).__name__ == activation


@pytest.mark.parametrize(
    ("model", "pretrained", "words"),
    [
        ("ViT-B-23", "openai", "ViT-B-32"),
        ("ViT-B-32", "opeani", "did you mean openai"),
        ("ViT-B-32", "nowhere/weights.pt", "no such file"),
        ("nowhere.json", "random", "no such file"),
        ("ViT-M-16", "openai", "no tag of ViT-M-16; it has no tags"),
        ("local-dir:nowhere", "openai", "could not be loaded"),
    ],
)
def test_unknown_models_and_missing_files_are_refused(model, pretrained, words):
    with pytest.raises(UserError, match=words) as error:
        load_clip(model, pretrained, "cpu")
    assert "\n" not in str(error.value)


def test_files_that_are_not_checkpoints_or_do_not_fit_are_refused(tiny_model, tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        load_clip(tiny_model, str(tmp_path / "junk.safetensors"), "cpu")
    torch.save({"state_dict": print}, tmp_path / "code.pt")  # an object that only unpickling could load
    with pytest.raises(UserError, match="holds a print, and nothing but tensors"):
        load_clip(tiny_model, str(tmp_path / "code.pt"), "cpu")
    state = load_clip(tiny_model, "random", "cpu").text.state_dict()
    state["visual.proj"] = state["visual.proj"][:, :-1].contiguous()
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not fit.*visual.proj"):
        load_clip(tiny_model, str(tmp_path / "other.safetensors"), "cpu")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="embed_dim"):
        load_clip(str(tmp_path / "list.json"), "random", "cpu")


def test_the_classifier_is_the_mean_of_eighty_templates(clip):
    names = ["tench", "goldfish", "great white shark"]
    ours = zero_shot_classifier(clip, names, 160)
    for column, name in zip(ours.T, names, strict=True):
        texts = [template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
        vectors = clip.text.encode_text(clip.tokenizer(texts)).double()
        mean = (vectors / vectors.norm(dim=1, keepdim=True)).mean(dim=0)
        assert_allclose(column, (mean / mean.norm()).numpy(), atol=1e-6)
    legacy = open_clip.build_zero_shot_classifier_legacy(
        clip.text, clip.tokenizer, names, open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    assert_allclose(ours, legacy.numpy(), atol=1e-6)
    assert ours.shape == (24, 3) and ours.dtype == np.float32


def test_text_vectors_are_unit_and_without_a_template(clip):
    texts = ["a dog", "the sea", "x"]
    ours = text_vectors(clip, texts, 2)
    truth = clip.text.encode_text(clip.tokenizer(texts)).double()
    assert_allclose(ours, (truth / truth.norm(dim=1, keepdim=True)).numpy(), atol=1e-6)


TOWERS = {  # what is changed in the config, and whether nothing after the end token matters
    "plain": ({}, True),
    "custom text": ({"custom_text": True}, True),
    "read at a given end token": (
        {"custom_text": True, "text_cfg": {"pool_type": "eos", "eos_id": 49407}},
        True,
    ),
    "linear projection": ({"custom_text": True, "text_cfg": {"proj_bias": True}}, True),
    "not causal": ({"custom_text": True, "text_cfg": {"no_causal_mask": True}}, False),
    "read at the last place": ({"custom_text": True, "text_cfg": {"pool_type": "last"}}, False),
    "a class token behind the text": (
        {"custom_text": True, "text_cfg": {"embed_cls": True, "pool_type": "last"}},
        False,
    ),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_texts_of_all_lengths_have_the_vectors_of_encode_text(tmp_path, kind):
    """Sorted and cut where that is exact, else as they are; in the order in which they were given."""
    changes, exact = TOWERS[kind]
    config = {**TINY, **changes, "text_cfg": {**TINY["text_cfg"], **changes.get("text_cfg", {})}}
    (tmp_path / "tower.json").write_text(json.dumps(config))
    clip = load_clip(str(tmp_path / "tower.json"), "random", "cpu")
    assert (causal_tower(clip.text) is not None) == exact
    texts = ["a photo of a dog", "x", "sea " * 90, "the old house by the sea", "", "dog", "a " * 74, "x"]
    with torch.inference_mode():
        truth = torch.nn.functional.normalize(clip.text.encode_text(clip.tokenizer(texts)), dim=-1)
    for batch_size in (1, 3, 100):
        assert_allclose(text_vectors(clip, texts, batch_size), truth, atol=1e-6)
    assert np.unique(truth.numpy().round(4), axis=0).shape[0] == 7  # "x" comes twice


def test_imagenet_is_sub_sampled_in_the_order_of_its_folders(photos):
    images = load_images("imagenet", photos, "val", subsample=5)
    taken = [path.split("/")[-2:] for path, _ in images.samples]
    assert taken == [[SYNSETS[0], "0000.JPEG"], [SYNSETS[1], "0002.JPEG"]]  # 12 images: two whole strides
    assert images.labels.tolist() == [0, 1] and images.labels.dtype == np.int64
    assert (
        images.class_names[:4] == ["tench", "goldfish", "great white shark", "tiger shark"]
        and len(images.class_names) == 1000
    )
    assert len(load_images("imagenet", photos, "val")) == 1  # every 10th
    with pytest.raises(
        UserError, match="has 12 images of train, and every 250-th is taken; lower --subsample"
    ):
        load_images("imagenet", photos, "train")


@pytest.mark.parametrize(
    ("count", "stride"), [(1, 1), (9, 2), (10, 3), (11, 3), (12, 3), (12, 12), (23, 12), (24, 12)]
)
def test_as_many_images_are_taken_as_whole_strides_fit(tmp_path, count, stride):
    write_photos(tmp_path, splits=("val",), classes=("a",), per_class=count, side=32)
    images = load_images("folder", tmp_path, "val", subsample=stride)
    assert [Path(path).stem for path, _ in images.samples] == [
        f"{i * stride:04d}" for i in range(count // stride)
    ]


def test_labels_are_imagenets_when_folders_are_missing(tmp_path):
    write_photos(tmp_path, splits=("val",), classes=("n01443537", "n07873807"), per_class=1, side=32)
    assert load_images("imagenet", tmp_path, "val", subsample=1).labels.tolist() == [1, 963]


def test_imagenet_r_has_the_labels_of_imagenet(tmp_path):
    write_photos(tmp_path, splits=(".",), classes=("n01443537", "n07873807"), per_class=2, side=32)
    images = load_images("imagenet_r", tmp_path, "val", subsample=1)
    assert images.labels.tolist() == [1, 1, 963, 963] and len(images.class_names) == 1000
    with pytest.raises(UserError, match="imagenet_r has val"):
        load_images("imagenet_r", tmp_path, "train")


def test_classes_of_folders_and_files(tmp_path):
    write_photos(tmp_path, splits=("val",), classes=("golden_retriever", "sea"), per_class=1, side=32)
    folders = ["golden_retriever", "sea"]
    assert classes_of("folder", tmp_path, "val") == {
        "folders": folders,
        "class_names": ["golden retriever", "sea"],
    }
    (tmp_path / "names.txt").write_text("dog\nocean\n")
    assert classes_of("folder", tmp_path, "val", tmp_path / "names.txt") == {
        "folders": folders,
        "class_names": ["dog", "ocean"],
    }
    assert classes_of("imagenet")["class_names"][:2] == ["tench", "goldfish"]
    assert classes_of("imagenet")["folders"][:2] == ["n01440764", "n01443537"]
    (tmp_path / "names.txt").write_text("dog\n")
    with pytest.raises(UserError, match="1 names, and the data set has 2"):
        load_images("folder", tmp_path, "val", class_names=tmp_path / "names.txt")
    with pytest.raises(UserError, match="1 names, and the data set has 2"):
        classes_of("folder", tmp_path, "val", tmp_path / "names.txt")
    with pytest.raises(UserError, match="--data_path"):
        classes_of("CIFAR10")
    with pytest.raises(UserError, match="goes with --dataset folder"):
        classes_of("imagenet", class_names=tmp_path / "names.txt")


def test_folders_that_are_numbers_are_sorted_by_value_and_hidden_ones_do_not_exist(tmp_path):
    write_photos(
        tmp_path / "plain", splits=("val",), classes=[str(i) for i in range(12)], per_class=1, side=32
    )
    write_photos(
        tmp_path / "more", splits=("val",), classes=[str(i) for i in range(12)], per_class=1, side=32
    )
    more = tmp_path / "more" / "val"
    for hidden in (".ipynb_checkpoints", "__MACOSX/3"):
        (more / hidden).mkdir(parents=True)
        (more / hidden / "0000.JPEG").write_bytes(b"no picture")
    (more / ".empty").mkdir()
    (more / "3" / "._0000.JPEG").write_bytes(b"no picture")
    (more / "4" / ".thumbs").mkdir()
    (more / "4" / ".thumbs" / "0000.JPEG").write_bytes(b"no picture")
    plain, same = (load_images("folder", tmp_path / name, "val") for name in ("plain", "more"))
    assert plain.folders == [str(i) for i in range(12)] and plain.labels.tolist() == list(range(12))
    assert [path.split("/")[-2] for path, _ in plain.samples] == plain.folders
    assert same.record["data"] == plain.record["data"] and same.classes == plain.classes
    write_photos(tmp_path / "mixed", splits=("val",), classes=("10", "9", "x"), per_class=1, side=32)
    assert load_images("folder", tmp_path / "mixed", "val").folders == ["10", "9", "x"]


def test_labels_are_matched_by_folder_and_not_by_position(tmp_path, clip, tiny_model):
    """The classifier of other folders: in another order, with more of them, with others, and without a
    record.
    """
    write_photos(tmp_path, splits=("val",), classes=("b", "c", "d"), per_class=2, side=32)
    images = load_images("folder", tmp_path, "val", clip.transform)
    results = Results(tmp_path / "out", tiny_model, "random", clip=clip)
    results.directory.mkdir()
    path, columns = results.path("classifier", dataset="folder"), np.eye(24, 4, dtype=np.float32)
    for folders, expected in (
        (["d", "a", "b", "c"], [2, 2, 3, 3, 0, 0]),
        (["a", "b", "c", "d"], [1, 1, 2, 2, 3, 3]),
    ):
        save_array(path, columns, {"folders": folders, "class_names": folders})
        found, labels = load_classifier(results, images)
        assert labels.tolist() == expected and found.shape == (24, 4)
    save_array(path, columns, {"folders": ["a", "b", "x", "y"]})
    with pytest.raises(
        UserError,
        match=r"no class for 2 folders of the images \(c, d\); make it again with: .*--dataset folder",
    ):
        load_classifier(results, images)
    save_array(path, columns[:, :3], {})
    assert load_classifier(results, images)[1].tolist() == [0, 0, 1, 1, 2, 2]
    save_array(path, columns, {})
    with pytest.raises(UserError, match="has 4 classes and the images have 3"):
        load_classifier(results, images)


def test_the_line_about_images_says_what_was_read(tmp_path, clip, capsys):
    write_photos(tmp_path, splits=("val",), classes=("a_cat", "sea"), per_class=2, side=32)
    Image.new("L", (40, 40), 200).save(tmp_path / "val" / "sea" / "grey.png")
    load_images("folder", tmp_path, "val", clip.transform)
    assert capsys.readouterr().out == (
        "images of folder val: 5 of 2 classes (a_cat = a cat, ..., sea = sea); 1 of mode L are converted\n"
        "preprocessing: shortest edge to 32 (bicubic), crop 32 x 32, mean 0.481 0.458 0.408, "
        "std 0.269 0.261 0.276; from open_clip's default (random weights)\n"
    )


def test_pictures_of_other_modes_look_like_their_8_bit_version(tmp_path, clip):
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    grey = np.asarray(load_sample_images().images[0])[:200, :200].mean(axis=2).astype(np.uint8)
    plain = Image.fromarray(grey)
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "1.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "2.tif")
    plain.convert("LA").save(folder / "3.png")
    plain.convert("P").save(folder / "4.png")
    plain.convert("RGB").convert("CMYK").save(folder / "5.tif")
    plain.save(folder / "6.webp", lossless=True, save_all=True, append_images=[plain])
    plain.save(folder / "0.png")
    images = load_images("folder", tmp_path, "val", clip.transform)
    with torch.inference_mode():
        vectors = torch.nn.functional.normalize(
            clip.vit(torch.stack([pixels for pixels, _ in images])), dim=-1
        )
    assert (vectors @ vectors[0] > 0.999).all(), vectors @ vectors[0]
    assert len(images) == 7
    Image.fromarray(grey.astype(np.float32) / 255).save(folder / "7.tif")
    [*_, wrong] = load_images("folder", tmp_path, "val", clip.transform)
    assert "7.tif cannot be read (mode F, whose range of values is not known: convert it to 8 bits)" in str(
        wrong
    )


@pytest.mark.parametrize(
    ("dataset", "path", "split", "words"),
    [
        ("imagenet", "nowhere", "val", "there is no such folder"),
        ("imagenet", ".", "test", "imagenet has train and val"),
        ("folder", ".", "test", "no folder for --split test; it has train, val"),
        ("folder", "train", SYNSETS[0], "must hold a folder of images for every class"),
        ("CIFAR10", ".", "test2", "train and val"),
    ],
)
def test_missing_data_is_refused(photos, dataset, path, split, words):
    with pytest.raises(UserError, match=words):
        load_images(dataset, photos / path, split)


def test_class_folders_that_are_not_of_imagenet_are_refused(tmp_path):
    write_photos(tmp_path, splits=("val",), classes=("dogs",), per_class=1, side=32)
    with pytest.raises(UserError, match="dogs is no folder of ImageNet.*--dataset folder"):
        load_images("imagenet", tmp_path, "val")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_may_start_later(photos, clip, workers):
    images = load_images("folder", photos, "val", clip.transform)
    all_pixels = torch.stack([images[i][0] for i in range(12)])
    loader, pieces = Loader(images, num_workers=workers), [slice(4, 8), slice(8, 11)]
    assert [len(pixels) for pixels in loader(pieces)] == [4, 3] and list(loader([])) == []
    assert torch.equal(torch.cat(list(loader(pieces))), all_pixels[4:11])
    pixels, labels = zip(*loader.with_targets(pieces), strict=True)
    assert (
        torch.equal(torch.cat(pixels), all_pixels[4:11])
        and torch.cat(labels).tolist() == images.labels[4:11].tolist()
    )


def process_state():
    """What library code must leave unchanged."""
    return {
        "random numbers": torch.random.get_rng_state().tolist(),
        "numpy's random numbers": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "logging": [
            logging.getLogger().level,
            logging.root.manager.disable,
            len(logging.getLogger().handlers),
        ],
        "matmul": [
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
        ],
        "autograd": [
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
        ],
        "defaults": [torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()],
        "garbage": [gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()],
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_a_model_and_its_batches_leave_the_state_of_the_process_alone(tiny_model, photos, workers):
    torch.manual_seed(3)
    before = process_state()
    for precision in ("float32", "bfloat16"):
        clip = load_clip(tiny_model, "random", "cpu", precision=precision)
        images = load_images("folder", photos, "val", clip.transform)
        for pixels in Loader(images, num_workers=workers)([slice(0, 5), slice(5, 12)]):
            clip.vit(pixels)
        text_vectors(clip, ["a dog"], 1)
    after = process_state()
    assert [name for name in before if before[name] != after[name]] == []


@pytest.mark.parametrize("workers", [0, 2])
def test_warnings_of_image_libraries_are_counted_and_told_once(tmp_path, clip, workers, capsys):
    write_photos(tmp_path, splits=("val",), classes=("a",), per_class=3, side=32)
    for i in range(3):
        picture = Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32), "P")
        picture.putpalette(bytes(range(256)) * 3)
        picture.save(tmp_path / "val" / "a" / f"palette{i}.png", transparency=bytes(range(256)))
    images = load_images("folder", tmp_path, "val", clip.transform)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none comes through
        assert (
            sum(len(pixels) for pixels in Loader(images, num_workers=workers)([slice(0, 4), slice(4, 6)]))
            == 6
        )
    said = capsys.readouterr()
    assert (
        said.out.count("note: 3 warnings while images were read, such as: Palette images with Transparency")
        == 1
    )
    assert "Palette" not in said.err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named(tmp_path, clip, workers):
    write_photos(tmp_path, splits=("val",), classes=("a", "b"), per_class=2, side=32)
    damaged = tmp_path / "val" / "b" / "0001.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:200])
    images = load_images("folder", tmp_path, "val", clip.transform)
    with pytest.raises(UserError, match="b/0001.JPEG cannot be read"):
        list(Loader(images, num_workers=workers)([slice(0, 2), slice(2, 4)]))


def test_a_loader_process_that_is_killed_is_one_line(tmp_path, clip):
    write_photos(tmp_path, splits=("val",), classes=("a", "b"), per_class=20, side=32)
    images = load_images("folder", tmp_path, "val", clip.transform)
    others = set(multiprocessing.active_children())
    batches = Loader(images, num_workers=1)([slice(i, i + 1) for i in range(40)])
    next(batches)
    [worker] = set(multiprocessing.active_children()) - others
    worker.kill()
    with pytest.raises(UserError, match="a process that loads images has ended.*--num_workers.*resume"):
        list(batches)


def test_images_are_converted_to_rgb(tmp_path, clip):
    (tmp_path / "val" / "a").mkdir(parents=True)
    Image.new("L", (40, 40), 200).save(tmp_path / "val" / "a" / "grey.png")
    Image.new("RGBA", (40, 40), (200, 200, 200, 0)).save(tmp_path / "val" / "a" / "transparent.png")
    grey, transparent = (pixels for pixels, _ in load_images("folder", tmp_path, "val", clip.transform))
    assert grey.shape == (3, 32, 32) and torch.equal(grey, transparent)


def test_the_fingerprint_of_images_changes_with_their_files_and_not_when_they_move(tmp_path):
    first = write_photos(tmp_path / "one", splits=("val",), classes=("a",), per_class=2, side=32)
    second = write_photos(tmp_path / "two", splits=("val",), classes=("a",), per_class=2, side=32)
    before, moved = (load_images("folder", root, "val").record for root in (first, second))
    assert (before.pop("data_path"), moved.pop("data_path")) == (
        str(first),
        str(second),
    )  # a note, which nothing compares
    assert before.keys() == {"dataset", "split", "data"} and (before["dataset"], before["split"]) == (
        "folder",
        "val",
    )
    assert before == moved
    (second / "val" / "a" / "0001.JPEG").write_bytes(b"other")
    assert before["data"] != load_images("folder", second, "val").record["data"]


def test_cifar_is_read_by_torchvision(tmp_path, monkeypatch, clip):
    class Fake:
        def __init__(self, root, train, download):
            if not root:
                raise RuntimeError("Dataset not found")
            self.data, self.targets, self.classes = (
                np.full((7, 32, 32, 3), 9, np.uint8),
                [0, 1, 2, 0, 1, 2, 0],
                ["x", "y", "z"],
            )

    monkeypatch.setitem(CIFAR, "CIFAR10", Fake)
    images = load_images("CIFAR10", tmp_path, "val", clip.transform, subsample=2)
    assert (
        images.labels.tolist() == [0, 2, 1]
        and images.class_names == ["x", "y", "z"]
        and images[0][0].shape == (3, 32, 32)
    )
    with pytest.raises(UserError, match="could it be fetched"):
        load_images("CIFAR10", "", "val")


def test_a_text_set_is_found_by_name_file_and_path_from_any_folder(tmp_path, monkeypatch):
    sets, sub = tmp_path / "sets", tmp_path / "sets" / "sub"
    sub.mkdir(parents=True)
    for path in (sets / "a.txt", sub / "b.txt"):
        path.write_text("x\n")
    monkeypatch.chdir(tmp_path)
    for given, path in (
        ("a", "sets/a.txt"),
        ("a.txt", "sets/a.txt"),
        ("sub/b", "sets/sub/b.txt"),
        (sub / "b.txt", sub / "b.txt"),
    ):
        assert find_texts(given, "sets") == Path(path) and text_set(given) == Path(path).stem
    assert (
        find_texts("30k", "text_descriptions").resolve() == ROOT / "text_descriptions" / "30k.txt"
    )  # beside the scripts
    results = Results("out", "M", "P")
    assert {results.path("texts", texts=name).name for name in ("b", "b.txt", "sub/b", sub / "b.txt")} == {
        "b_M_P.npy"
    }
    with pytest.raises(UserError, match="sets/none.txt cannot be read: No such file"):
        read_texts(find_texts("none", "sets"))


def test_texts_that_the_context_cuts_off_are_found(clip):
    long = "word " * 80
    assert too_long(clip, ["a", "word " * 75, long, "word " * 76]) == [long, "word " * 76]


def test_text_files_are_checked(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("één\n\n  two words \n".encode())
    assert read_texts(path) == ["één", "two words"]
    path.write_bytes(b"\xef\xbb\xbfcat\r\nold\x0bsea\x1cside\r\rone\xe2\x80\xa8line\xc2\x85\n")
    assert read_texts(path) == ["cat", "old\x0bsea\x1cside", "one\u2028line"]
    path.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(UserError, match="not UTF-8"):
        read_texts(path)
    path.write_text("\n \n")
    with pytest.raises(UserError, match="holds no text"):
        read_texts(path)
    with pytest.raises(UserError, match="No such file"):
        read_texts(tmp_path / "none.txt")


def test_the_word_list_is_what_its_command_makes():
    from text_descriptions.make_words import common_words

    words = read_texts("text_descriptions/30k.txt")
    assert len(words) == len(set(words)) == 30_000
    assert words[:2000] == common_words(2000)
