"""A model gets the pixels that its own preprocessing gives, whatever way it came in, or is refused."""

import json
import pickle
import re
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from numpy.testing import assert_allclose
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import TINY
from tests.photos import write_mat
from utils.data.images import load_images, to_pictures
from utils.data.segmentation_set import SegmentationSet
from utils.model.clip import load_clip
from utils.model.preprocessing import PROCESSORS, choose, describe, record_of
from utils.runtime.errors import UserError

SIDE = 24  # of the towers here
SIZES = ((50, 73), (71, 50), (24, 24), (13, 40), (25, 31), (9, 11), (27, 24), (52, 51))  # (rows, columns)
CROP = {"do_center_crop": True, "crop_size": SIDE}
SQUARE = {"height": SIDE, "width": SIDE}
GEOMETRIES = {
    "shortest edge, crop": {"size": {"shortest_edge": SIDE}, **CROP},
    "larger edge, crop": {"size": {"shortest_edge": 31}, "do_center_crop": True, "crop_size": SQUARE},
    "smaller edge, padding": {"size": {"shortest_edge": 15}, **CROP},
    "a number and crop": {"size": 29, **CROP},
    "no resizing": {"do_resize": False, **CROP},
    "null resizing": {"do_resize": None, **CROP},
    "squash": {"size": SQUARE, "do_center_crop": False},
    "squash, crop of the same size": {"size": SQUARE, **CROP},
    "two numbers and crop": {"size": [40, 27], **CROP},
    "squash and padding": {"size": {"height": 40, "width": 17}, **CROP},
}
VALUES = (
    {},
    {"do_normalize": False},
    {"do_rescale": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5, "image_mean": 0.9, "image_std": [0.3, 0.4, 1.1]},
    {"do_rescale": False, "image_mean": [123.7, 116.3, 103.5], "image_std": [58.4, 57.1, 57.4]},
    {"image_mean": [0, 0, 0], "image_std": 1, "do_convert_rgb": False},
)
KINDS = [*GEOMETRIES.values(), *({**GEOMETRIES["smaller edge, padding"], **values} for values in VALUES)]


def tower(size=SIDE):
    """What `choose` looks at of an image tower."""
    return SimpleNamespace(image_size=size, preprocess_cfg=asdict(PreprocessCfg(size=size)))


def of_fields(folder, fields, file="preprocessor_config.json", size=SIDE):
    """The preprocessing of a folder with the config of an image processor."""
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(fields))
    return choose(f"local-dir:{folder}", "ignored", tower(size), folder)


def beside(folder, fields, model="ViT-B-32", size=SIDE):
    """The preprocessing of weights by path, with open_clip's fields in the config beside them."""
    (folder / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": fields}))
    return choose(model, f"{folder}/weights.pt", tower(size))


def open_clips(size=SIDE, **fields):
    return image_transform_v2(PreprocessCfg(size=size, **fields), is_train=False)


def pictures(modes=("RGB",)):
    """Pictures of several sizes and modes, some with transparent pixels."""
    rng = np.random.default_rng(0)
    found = []
    for size in SIZES:
        noise = Image.fromarray(rng.integers(0, 256, (*size, 4), dtype=np.uint8))
        found += [noise.convert(mode) for mode in modes]
    for image in found[::2]:
        if image.mode == "P":
            image.info["transparency"] = 3
    return found


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(library, "CLIPImageProcessorPil"):
        pytest.skip("this version of transformers has no processors that name Pillow")
    return library


# The transformers library


def assert_same_pixels(transform, processor, images):
    for image in images:
        expected = processor(image)["pixel_values"][0]
        found = transform(image)
        assert found.dtype == torch.float32
        tolerance = 1e-5 * max(1, np.abs(expected).max())
        assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_pixels_are_those_of_the_folders_image_processor(transformers, tmp_path, kind, geometry):
    modes = ("RGB", "L", "LA", "P", "RGBA")
    if kind == "ViTImageProcessor":
        modes = ("RGB",)  # it takes no others
    images = pictures(modes)
    for values in VALUES:
        fields = {"image_processor_type": kind, **GEOMETRIES[geometry], **values}
        transform = of_fields(tmp_path, fields)
        processor = getattr(transformers, f"{kind}Pil").from_pretrained(tmp_path)
        assert_same_pixels(transform, processor, images if values.get("do_convert_rgb", True) else pictures())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_pictures_of_a_data_set_get_there_with_their_transparency(transformers, tmp_path, mode):
    """A folder's image processor puts them on white; open_clip drops what is transparent."""
    (tmp_path / "photos/val/a").mkdir(parents=True)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 60, 4), dtype=np.uint8), "RGBA")
    image = image.quantize(32) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "photos/val/a/0.png")
    fields = GEOMETRIES["shortest edge, crop"]
    transform = of_fields(tmp_path / "model", fields)
    processor = transformers.CLIPImageProcessorPil(**fields)
    loaded = Image.open(tmp_path / "photos/val/a/0.png")
    found, _ = load_images("folder", tmp_path / "photos", "val", transform)[0]
    assert_allclose(found, processor(loaded, return_tensors="pt")["pixel_values"][0], atol=1e-5)
    plain, _ = load_images("folder", tmp_path / "photos", "val", beside(tmp_path, {}))[0]
    assert_allclose(plain, open_clips()(loaded.convert("RGB")), atol=1e-5)


@pytest.mark.parametrize("resample", range(6))
def test_every_filter_is_pillows_by_its_number_and_by_its_name(transformers, tmp_path, resample):
    name = Image.Resampling(resample).name.lower()
    fields = {"size": 31, "crop_size": SIDE}
    processor = transformers.CLIPImageProcessorPil(**fields, resample=resample)
    for given in (resample, name):
        assert_same_pixels(of_fields(tmp_path, {**fields, "resample": given}), processor, pictures())


@pytest.mark.parametrize("kind", PROCESSORS)
def test_what_a_config_leaves_out_is_the_default_of_its_class(transformers, tmp_path, kind):
    transform = of_fields(tmp_path, {"image_processor_type": kind}, size=224)
    assert_same_pixels(transform, getattr(transformers, f"{kind}Pil")(), pictures())


@pytest.mark.parametrize("kind", ["CLIPFeatureExtractor", "CLIPImageProcessorFast", None])
def test_a_class_is_known_by_its_earlier_names_and_is_clips_without_one(transformers, tmp_path, kind):
    fields = {"size": 30, "crop_size": SIDE, "_valid_processor_keys": ["images"], "processor_class": "P"}
    named = {"feature_extractor_type" if "Feature" in (kind or "") else "image_processor_type": kind}
    transform = of_fields(tmp_path, {**fields, **named})
    assert_same_pixels(transform, transformers.CLIPImageProcessorPil(size=30, crop_size=SIDE), pictures())


def test_a_config_nested_in_that_of_a_processor_goes_before_the_other(transformers, tmp_path):
    processor = transformers.CLIPImageProcessorPil(size=SIDE, crop_size=SIDE, image_mean=[0.1, 0.2, 0.3])
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    tokenizer = transformers.CLIPTokenizer(vocab=words, merges=[])
    transformers.CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(tmp_path)
    assert "image_processor" in json.loads((tmp_path / "processor_config.json").read_text())
    transform = of_fields(tmp_path, {"size": SIDE, "crop_size": SIDE})
    assert_same_pixels(transform, processor, pictures())
    assert describe(transform).endswith(f"from {tmp_path}/processor_config.json")
    of_fields(tmp_path, {"processor_class": "CLIPProcessor"}, "processor_config.json")  # of earlier versions
    again = choose(f"local-dir:{tmp_path}/", "x", tower(), tmp_path)
    assert again.source == f"{tmp_path}/preprocessor_config.json"


def test_a_folder_without_a_config_gets_clips_default_at_the_models_size_and_a_note(transformers, tmp_path):
    transform = choose("hf:some/clip", "ignored", tower(), tmp_path)
    assert_same_pixels(transform, transformers.CLIPImageProcessorPil(size=SIDE, crop_size=SIDE), pictures())
    line, note = describe(transform).split("\n")
    assert line.endswith("from CLIPImageProcessor's default")
    assert note.startswith("note: hf:some/clip has no preprocessor_config.json")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"do_pad": True}, "do_pad is True"),
        ({"do_thumbnail": True}, "do_thumbnail is True"),
        ({"crop_pct": 0.9}, "crop_pct is 0.9"),
        ({"rescale_offset": True}, "rescale_offset is True"),
        ({"image_processor_type": "BlipImageProcessor"}, "image_processor_type is BlipImageProcessor"),
        ({"size": {"longest_edge": 24}}, "size is {'longest_edge': 24}"),
        ({"size": {"shortest_edge": 24, "longest_edge": 30}}, "size is .*longest_edge"),
        ({"size": {"max_height": 24, "max_width": 24}}, "size is .*max_height"),
        ({"size": {"shortest_edge": -24}}, "size is {'shortest_edge': -24}"),
        ({"size": "24"}, "size"),
        ({"crop_size": {"shortest_edge": 24}}, "crop_size is {'shortest_edge': 24}"),
        ({"crop_size": 32}, "crop_size 32 x 32 does not bring every picture to 24 x 24"),
        ({"do_center_crop": False}, "size 24 does not bring every picture to 24 x 24"),
        ({"do_center_crop": False, "size": [24, 32]}, "size 24 x 32 does not bring"),
        ({"do_center_crop": False, "do_resize": False}, "do_resize False does not bring"),
        ({"resample": 6}, "resample is 6"),
        ({"resample": "BICUBIC"}, "resample is 'BICUBIC'"),  # transformers refuses it, too
        ({"rescale_factor": 0}, "rescale_factor is 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'"),
        ({"image_mean": [0.5]}, "image_mean is .0.5."),
        ({"image_mean": None}, "image_mean is None"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std is .* a positive number"),
    ],
)
def test_a_field_that_cannot_be_done_is_refused_by_its_name(tmp_path, fields, said):
    with pytest.raises(UserError, match=f"preprocessor_config.json: .*{said}") as error:
        of_fields(tmp_path, {"size": SIDE, "crop_size": SIDE, **fields})
    assert "\n" not in str(error.value)


def test_fields_that_are_off_or_have_no_effect_are_let_pass(tmp_path):
    plain = {"size": SIDE, "crop_size": SIDE}
    more = {"do_pad": False, "crop_pct": None, "do_reduce_labels": False, "data_format": "channels_first"}
    assert of_fields(tmp_path, {**plain, **more}).record == of_fields(tmp_path, plain).record


def test_a_loaded_folder_has_its_own_preprocessing_and_says_from_where(transformers, tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**shape, "image_size": SIDE, "patch_size": 8}
    text = {**shape, "vocab_size": 49408, "max_position_embeddings": 20, "eos_token_id": 49407}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessorPil(size=SQUARE, do_center_crop=False, resample=2)
    processor.save_pretrained(tmp_path)
    transform = load_clip(f"local-dir:{tmp_path}", "ignored", "cpu", image_only=True).transform
    assert_same_pixels(transform, processor, pictures())
    assert describe(transform) == (
        "preprocessing: resize to 24 x 24 (bilinear), mean 0.481 0.458 0.408, std 0.269 0.261 0.276; "
        f"from {tmp_path}/preprocessor_config.json"
    )


# open_clip


PUBLISHED = [name for name in open_clip.list_models() if open_clip.list_pretrained_tags_by_model(name)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_by_path_have_the_preprocessing_on_which_the_names_tags_agree(name):
    tags = open_clip.list_pretrained_tags_by_model(name)
    published = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    fields = ("mean", "std", "interpolation", "resize_mode")
    kinds = [open_clips(**{field: config[field] for field in fields}) for config in published]
    records = [record_of(kind.transforms) for kind in kinds]
    transform = choose(name, "some/weights.safetensors", tower())
    image = pictures()[0]
    if all(record == records[0] for record in records):
        assert torch.equal(transform(image), kinds[0](image))
        assert transform.note == "" and describe(transform).endswith(f"; from {name}'s published tags")
    else:
        assert name in DIFFERING and transform.note


DIFFERING = {  # how many tags have what is taken, and those of the others
    "ViT-L-14": ("that of 11 of 12", ["laion2b_s32b_b82k"], "most of ViT-L-14's published tags"),
    "ViT-H-14": ("that of 3 of 4", ["dfn5b"], "most of ViT-H-14's published tags"),
    "ViT-H-14-quickgelu": (
        "open_clip's default",
        ["dfn5b"],
        "open_clip's default (ViT-H-14-quickgelu's published tags differ)",
    ),
}


@pytest.mark.parametrize("name", DIFFERING)
def test_where_tags_differ_a_note_says_which_is_taken_and_what_to_write_for_another(tmp_path, name):
    which, others, source = DIFFERING[name]
    transform = choose(name, f"{tmp_path}/weights.pt", tower())
    image = pictures()[0]
    assert torch.equal(transform(image), open_clips()(image))
    line, note = describe(transform).split("\n")
    assert line.endswith(f"; from {source}") and f"; {which} is taken" in note
    [(written, tags)] = re.findall(r"({.*}) \((.*)\)", note)
    assert tags.split(", ") == others
    (tmp_path / "open_clip_config.json").write_text(written)
    chosen = choose(name, f"{tmp_path}/weights.pt", tower())
    published = open_clip.get_pretrained_cfg(name, others[0])
    fields = {field: published[field] for field in ("mean", "std", "interpolation", "resize_mode")}
    assert torch.equal(chosen(image), open_clips(**fields)(image))
    assert not torch.equal(chosen(image), transform(image))
    assert describe(chosen).endswith(f"; from {tmp_path}/open_clip_config.json")


def test_names_without_tags_random_weights_and_tags_have_open_clips_preprocessing():
    expected = open_clips()
    for model, pretrained, source in (
        ("ViT-M-16", "a/b.pt", "open_clip's default (ViT-M-16 has no published tags)"),
        ("ViT-L-14", "random", "open_clip's default (random weights)"),
        ("ViT-L-14", "openai", "open_clip's tag openai"),
        ("hf-hub:some/clip", "ignored", "hf-hub:some/clip/open_clip_config.json"),
        ("local-dir:some/clip/", "ignored", "some/clip/open_clip_config.json"),
    ):
        transform = choose(model, pretrained, tower())
        assert torch.equal(transform(pictures()[0]), expected(pictures()[0]))
        assert describe(transform) == (
            "preprocessing: shortest edge to 24 (bicubic), crop 24 x 24, "
            "mean 0.481 0.458 0.408, std 0.269 0.261 0.276; "
            f"from {source}"
        )


FIELDS = (
    {},
    {"size": SIDE, "mode": "RGB", "mean": None, "std": 0.4},
    {"size": [SIDE, SIDE], "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear"},
    {"size": [SIDE], "resize_mode": "longest", "fill_color": 77},
    {"resize_mode": "squash", "interpolation": "random"},
)


@pytest.mark.parametrize("fields", FIELDS)
def test_a_config_beside_the_weights_or_as_the_model_is_used_whole(tmp_path, fields):
    given = {field: value for field, value in fields.items() if field != "size" and value is not None}
    expected = open_clips(**given)
    transform = beside(tmp_path, fields, "ViT-B-16-SigLIP")
    model = str(tmp_path / "open_clip_config.json")
    as_model = [choose(model, pretrained, tower()) for pretrained in ("elsewhere/weights.pt", "random")]
    for found in (transform, *as_model):
        assert all(torch.equal(found(image), expected(image)) for image in pictures())
        assert describe(found).endswith(f"; from {tmp_path}/open_clip_config.json") and not found.note
    with_key = choose("ViT-B-16-SigLIP", f"{tmp_path}/weights.pt::ema", tower())
    assert with_key.source == f"{tmp_path}/open_clip_config.json"


def test_an_image_that_is_not_square_gets_what_open_clip_gives(tmp_path):
    for mode in ("shortest", "longest", "squash"):
        fields = {"size": (32, 24), "resize_mode": mode, "interpolation": "bilinear"}
        expected = open_clips(**fields)
        found = beside(tmp_path, fields, size=(32, 24))
        assert all(torch.equal(found(image), expected(image)) for image in pictures())
        interpolation = "bicubic" if mode == "shortest" else "bilinear"  # it forgets that of the first
        edge = "resize" if mode == "squash" else f"{mode} edge"
        assert f"{edge} to 32 x 24 ({interpolation})" in describe(found)


def test_configs_beside_weights_go_before_the_model_and_open_clips_before_the_other(transformers, tmp_path):
    fields = {"size": 30, "crop_size": SIDE}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    of_processor = choose("ViT-B-16-SigLIP", f"{tmp_path}/weights.pt", tower())
    assert_same_pixels(of_processor, transformers.CLIPImageProcessorPil(**fields), pictures())
    (tmp_path / "model.json").write_text(json.dumps({"preprocess_cfg": {"mean": 0.25}}))
    assert choose(f"{tmp_path}/model.json", f"{tmp_path}/weights.pt", tower()).record == of_processor.record
    assert beside(tmp_path, {"mean": 0.5}).record["mean"] == [0.5] * 3
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}))
    assert choose("ViT-B-32", f"{tmp_path}/weights.pt", tower()).record == of_processor.record


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": 32}, "size is 32, and the model takes 24 x 24"),
        ({"size": [24, 32]}, r"size is \[24, 32\], and the model takes 24 x 24"),
        ({"mode": "L"}, "mode is 'L'"),
        ({"mean": [0.5, 0.5]}, "mean is "),
        ({"mean": "0.5"}, "mean is '0.5'"),
        ({"mean": [0.5, float("nan"), 0.5]}, "mean is .*nan"),
        ({"std": [0.5, 0.5, -0.5]}, "std is .* a positive number"),
        ({"interpolation": "lanczos"}, "interpolation is 'lanczos'"),
        ({"resize_mode": "crop"}, "resize_mode is 'crop'"),
        ({"fill_color": 256}, "fill_color is 256"),
        ({"fill_color": [1, 2, 3]}, "fill_color is "),
        ({"crop_pct": 0.9}, "preprocess_cfg has crop_pct"),
        ([0.5], "preprocess_cfg is "),
    ],
)
def test_a_field_of_open_clip_with_a_bad_value_is_refused_by_its_name(tmp_path, fields, said):
    with pytest.raises(UserError, match=f"open_clip_config.json: {said}") as error:
        beside(tmp_path, fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["open_clip", "preprocessor", "processor"])
@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_config_is_refused(tmp_path, kind, content):
    file = f"{kind}_config.json"
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=f"{file} is damaged"):
        choose("ViT-B-32", f"{tmp_path}/weights.pt", tower())


def test_weights_load_with_a_config_beside_them_that_has_preprocessing_alone(tiny_model, tmp_path):
    state = load_clip(tiny_model, "random", "cpu").text.state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": {"resize_mode": "squash"}}))
    clip = load_clip(tiny_model, f"{tmp_path}/weights.safetensors", "cpu")
    image = pictures()[0]
    assert torch.equal(clip.transform(image), open_clips(size=32, resize_mode="squash")(image))


# What is made of it


def everything(folder):
    """A preprocessing of every kind."""
    yield from (of_fields(folder, fields) for fields in KINDS)
    yield from (beside(folder, fields) for fields in FIELDS)


def test_a_transform_is_the_same_in_another_process(tmp_path):
    for transform in everything(tmp_path):
        again = pickle.loads(pickle.dumps(transform))
        assert torch.equal(again(pictures()[0]), transform(pictures()[0]))
        assert describe(again) == describe(transform) and again.earlier_record == transform.earlier_record


def test_pictures_to_look_at_are_what_went_in(tmp_path):
    rng = np.random.default_rng(1)
    levels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    for transform in everything(tmp_path):
        if transform.record.get("size", [SIDE] * 2) == [SIDE, SIDE]:
            found = to_pictures(transform(Image.fromarray(levels))[None], transform, (SIDE, SIDE))
            assert_allclose(found[0], levels / 255, atol=2e-6)
    padded = of_fields(tmp_path, {"do_resize": False, "do_rescale": False, **CROP})
    found = to_pictures(padded(Image.fromarray(levels[:10, :12]))[None], padded, (SIDE, SIDE))[0]
    assert_allclose(found[7:17, 6:18], levels[:10, :12] / 255, atol=2e-6)
    assert np.count_nonzero(found) == np.count_nonzero(levels[:10, :12])


def test_aligned_masks_have_the_geometry_of_the_images(tmp_path):
    rng = np.random.default_rng(2)
    masks = [(rng.random(size) < 0.4).astype(np.int16) for size in SIZES]
    painted = [np.where(mask[..., None] == 1, 255, 128).astype(np.uint8).repeat(3, axis=2) for mask in masks]
    path = write_mat(tmp_path / "set.mat", painted, masks)
    values = ({}, {"do_rescale": False, "do_normalize": False})
    padded = GEOMETRIES["smaller edge, padding"]
    for fields in [*GEOMETRIES.values(), *({**padded, **value} for value in values)]:
        transform = of_fields(tmp_path, {**fields, "resample": 0})  # the nearest pixel, as of masks
        data = SegmentationSet(path, transform, "aligned", (SIDE, SIDE))
        for pixels, found in (data[i] for i in range(len(SIZES))):
            seen = to_pictures(pixels[None], transform, (SIDE, SIDE))[0, ..., 0].round(1)  # 0: padding
            assert_allclose(found, np.select([seen == 1, seen == 0], [1, -1], 0))


def test_records_are_equal_for_equal_pixels_wherever_they_are_from(tmp_path):
    published = choose("ViT-B-16-SigLIP", "some/weights.pt", tower())
    written = beside(tmp_path, {"mean": 0.5, "std": 0.5, "resize_mode": "squash"})
    assert published.record == written.record == json.loads(json.dumps(written.record))
    named = of_fields(tmp_path, {"size": SIDE, "crop_size": SIDE, "do_normalize": False})
    other_words = {"crop_size": [SIDE, SIDE], "image_mean": 0, "image_std": 1, "resample": "bicubic"}
    same = of_fields(tmp_path, {"size": SIDE, **other_words})
    assert named.record == same.record


def test_records_differ_where_pixels_do(tmp_path):
    image = pictures(("RGBA",))[0]
    found = {}
    for transform in everything(tmp_path):
        found.setdefault(json.dumps(transform.record), []).append(transform(image))
    assert len(found) > 12
    for same in found.values():
        assert all(torch.allclose(each, same[0], atol=1e-6) for each in same)
    everywhere = [same[0] for same in found.values()]
    for i, one in enumerate(everywhere):
        assert not any(torch.equal(one, other) for other in everywhere[:i])


def test_the_earlier_record_is_what_earlier_versions_took(tmp_path):
    default = record_of(open_clips().transforms)
    assert choose("ViT-B-16-SigLIP", "some/weights.pt", tower()).earlier_record == default
    assert choose("ViT-L-14", "openai", tower()).earlier_record == default
    squash = {"mean": [0.4] * 3, "resize_mode": "squash", "fill_color": 9}
    assert beside(tmp_path, squash).earlier_record == default  # without model_cfg it was refused
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": squash}))
    found = choose("ViT-B-32", f"{tmp_path}/weights.pt", tower())
    expected = open_clips(mean=[0.4] * 3, resize_mode="squash")
    assert found.earlier_record == found.record == record_of(expected.transforms)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {}}))
    fields = {"size": SIDE, "crop_size": SIDE, "image_std": [0.1, 0.2, 0.3]}
    for resample, interpolation in ((2, "bilinear"), (3, "bicubic"), (0, "bicubic")):
        expected = open_clips(std=(0.1, 0.2, 0.3), interpolation=interpolation)
        found = of_fields(tmp_path, {**fields, "resample": resample})
        assert found.earlier_record == record_of(expected.transforms) != found.record
