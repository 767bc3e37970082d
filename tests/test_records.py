"""A result is kept only if nothing that it was made from has changed; results of earlier versions are read as
they were then.
"""

import copy
import hashlib
import json
import os
import shutil

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TINY
from tests.launcher import World, contents, finish, release, run, the_line
from utils.data.images import load_images
from utils.model.clip import load_clip
from utils.runtime.records import Digest, agrees, digest_of_file, digest_of_parts, like_json, was

NEW = ("preprocessing", "effects")  # keys that earlier versions did not write


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The stages up to the ablations, with weights in a file."""
    root = tmp_path_factory.mktemp("records")
    (root / "tiny.json").write_text(json.dumps(TINY))
    torch.manual_seed(3)
    save_file(open_clip.CLIP(**TINY).state_dict(), root / "weights.safetensors")
    world = World(root, str(root / "tiny.json"), per_class=4)
    world.model = ["--model", root / "tiny.json", "--pretrained", root / "weights.safetensors"]
    world.base.mkdir()
    for name in ("classifier", "representations", "full", "pcas", "ablations"):
        world.run(name, world.base)
    return world


@pytest.fixture
def changed(world):
    """A copy of the world, whose inputs a test may change."""
    number = len(list(world.root.glob("copy*")))
    other = World.__new__(World)
    other.graded = world.graded
    other.root = world.root / f"copy{number}"
    other.base, other.whole, other.photos = other.root / "base", other.root / "whole", other.root / "photos"
    shutil.copytree(world.photos, other.photos)
    shutil.copytree(world.base, other.base)
    for name in ("tiny.json", "weights.safetensors", "words.txt", "mine.safetensors"):
        shutil.copy(world.root / name, other.root / name)
    other.model = ["--model", other.root / "tiny.json", "--pretrained", other.root / "weights.safetensors"]
    other.data = ["--dataset", "folder", "--data_path", other.photos, "--num_workers", 0, "--batch_size", 4]
    other.train, other.val = [*other.data, "--split", "train"], [*other.data, "--split", "val"]
    return other


# digests


def test_every_byte_of_the_weights_counts(world):
    """One entry of one tensor, wherever it is, is enough."""
    original, rng = load_file(world.root / "weights.safetensors"), np.random.default_rng(0)
    path, found = world.root / "edited.safetensors", set()
    names = sorted(original)
    for _ in range(20):
        edited = {name: value.clone() for name, value in original.items()}
        flat = edited[names[rng.integers(len(names))]].view(-1)
        flat[rng.integers(len(flat))] += 1e-3
        save_file(edited, path)
        found.add(load_clip(str(world.root / "tiny.json"), str(path), "cpu").fingerprint)
    found.add(
        load_clip(str(world.root / "tiny.json"), str(world.root / "weights.safetensors"), "cpu").fingerprint
    )
    assert len(found) == 21 and all(len(fingerprint) == 16 for fingerprint in found)


def test_digests_are_those_of_hashlib(tmp_path):
    content = np.random.default_rng(0).bytes(40_000_000)  # more than is read at a time
    (tmp_path / "file").write_bytes(content)
    whole = hashlib.sha256(content).hexdigest()
    assert digest_of_file(tmp_path / "file") == whole[:16]
    assert digest_of_parts([content]) == hashlib.sha256(whole.encode()).hexdigest()[:16]
    assert digest_of_parts([b"ab", b"c"]) != digest_of_parts([b"a", b"bc"])


OPTIONS = {
    "quick_gelu": lambda config: config.update(quick_gelu=True),
    "heads": lambda config: config["vision_cfg"].update(head_width=24),
    "heads of texts": lambda config: config["text_cfg"].update(heads=4),
    "eps": lambda config: config["vision_cfg"].update(norm_kwargs={"eps": 1e-3}),
    "activation": lambda config: config["text_cfg"].update(act_kwargs={"approximate": "tanh"}),
    "pooling": lambda config: config["vision_cfg"].update(pool_type="avg"),
    "causal": lambda config: config["text_cfg"].update(no_causal_mask=True),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_what_a_config_says_counts_where_no_weight_does(world, tmp_path, option):
    """The same file of weights computes something else."""
    weights, config = str(world.root / "weights.safetensors"), copy.deepcopy(TINY)
    OPTIONS[option](config)
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    clips = [load_clip(str(folder / "tiny.json"), weights, "cpu") for folder in (world.root, tmp_path)]
    images, tokens = (
        torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        clips[0].tokenizer(["a cat", "two"]),
    )
    with torch.inference_mode():
        found = [
            torch.cat([clip.vit(images).flatten(), clip.text.encode_text(tokens).flatten()]) for clip in clips
        ]
    assert not torch.allclose(*found, atol=1e-6)
    assert clips[0].fingerprint != clips[1].fingerprint


def data_of(root, **options):
    return load_images("folder", str(root), "val", **options).record["data"]


def test_images_that_were_copied_elsewhere_are_the_same(world, tmp_path):
    shutil.copytree(
        world.photos / "val", tmp_path / "moved/val", copy_function=shutil.copyfile
    )  # with other times
    assert data_of(tmp_path / "moved") == data_of(world.photos)


@pytest.mark.parametrize("what", ["one bit", "swapped", "renamed", "removed"])
def test_every_byte_of_the_images_counts(world, tmp_path, what):
    shutil.copytree(world.photos, tmp_path / "photos")
    first, second, *_ = sorted((tmp_path / "photos/val").rglob("*.JPEG"))
    content, times = bytearray(first.read_bytes()), (first.stat().st_atime, first.stat().st_mtime)
    if what == "one bit":
        content[len(content) // 2] ^= 1
        first.write_bytes(content)
        os.utime(first, times)  # neither its size nor its time says so
    elif what == "swapped":
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    elif what == "renamed":
        first.rename(first.with_name("0.JPEG"))
    else:
        first.unlink()
    assert data_of(tmp_path / "photos") != data_of(world.photos)


def test_values_of_earlier_versions_agree_at_any_depth():
    now = {"weights": Digest("new", "old"), "images": {"train": [Digest("b", "a")]}, "k": 5}
    assert like_json(now) == {"weights": "new", "images": {"train": ["b"]}, "k": 5}
    stored = [
        {"weights": w, "images": {"train": [x]}, "k": 5}
        for w, x in (("new", "b"), ("old", "b"), ("old", "a"))
    ]
    assert [agrees(found, like_json(now)) for found in stored] == [True] * 3
    assert [was(found, like_json(now)) for found in stored] == [False, True, True]
    assert not agrees({**stored[0], "k": 6}, like_json(now)) and not agrees(
        {"weights": "new"}, like_json(now)
    )
    assert (
        agrees(None, Digest("new", None))
        and not agrees(None, "new")
        and not agrees("other", Digest("new", None))
    )


# stages


def edit_weights(world):
    """What one neuron of one layer writes."""
    path = world.root / "weights.safetensors"
    state = {name: value.clone() for name, value in load_file(path).items()}
    state["visual.transformer.resblocks.2.mlp.c_proj.weight"][:, 7] = 0
    save_file(state, path)


def edit_image(world):
    image = sorted((world.photos / "train").rglob("*.JPEG"))[5]
    content = bytearray(image.read_bytes())
    content[-20] ^= 1
    image.write_bytes(content)


def edit_effects(world):
    """One number of one layer's coefficients, by hand."""
    [path] = world.base.glob("*_2_coefficients.npy")
    array = np.load(path, mmap_mode="r+")
    array[3, 1, 4] += 1
    array.flush()


@pytest.mark.parametrize(
    ("edit", "name", "differing"),
    [
        (edit_weights, "representations", "fingerprint"),
        (edit_weights, "full", "fingerprint"),
        (edit_weights, "ablations", "fingerprint"),
        (edit_image, "representations", "data"),
        (edit_image, "full", "data"),
        (edit_effects, "pcas", "effects"),
    ],
)
def test_what_is_made_from_something_that_changed_is_not_kept(changed, edit, name, differing):
    world = changed
    edit(world)
    before = contents(world.base)
    line = world.run(name, world.base, code=1).splitlines()[-1]
    assert line.startswith("error: ")
    assert f"made with other {differing}" in line or f"was made with {differing} " in line
    assert contents(world.base) == before


def test_nothing_changes_where_nothing_has_changed(world):
    before = contents(world.base)
    for name in ("classifier", "representations", "full", "pcas", "ablations"):
        assert "kept" in world.run(name, world.base)
    assert contents(world.base) == before


def test_effects_of_two_settings_do_not_pass_for_one(changed):
    """--keep top replaces the bias and the directions beside the coefficients of --keep full."""
    top = ["--mlp_layer", 2, "--keep", "top", "--top_k_pca", 5, "--coefficient", 10, "--overwrite"]
    run(*changed.command("full", changed.base, *top)[0], log=changed.root / "top.log")
    line = changed.run("pcas", changed.base, "--overwrite", code=1).splitlines()[-1]
    assert (
        "was made with coefficient 10.0, and here it is 100.0" in line and "remove what is not meant" in line
    )


def test_effects_that_are_replaced_while_they_are_read_are_noticed(changed):
    process = changed.start_held("pcas", changed.root / "new", "--input_dir", changed.base, pieces=1)
    changed.run("full", changed.base, "--coefficient", 10, "--overwrite")
    release(process)
    line = finish(process, code=1).splitlines()[-1]
    assert "have changed while they were read; run the same command again" in line
    assert not list((changed.root / "new").glob("*_pca.npy"))


# results of earlier versions


def earlier_fingerprint(state):
    """As commit 9d325f4 computed it: 1,024 evenly spaced entries of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1)[:: max(1, tensor.numel() // 1024)].float().numpy().tobytes())
    return digest.hexdigest()[:12]


def earlier_data(root):
    """As commit 9d325f4 computed it: names and sizes."""
    digest, folders = hashlib.sha256(), sorted(path for path in root.iterdir())
    for label, folder in enumerate(folders):
        for image in sorted(folder.iterdir()):
            digest.update(f"{image.parts[-2:]} {image.stat().st_size} {label}\n".encode())
    return digest.hexdigest()[:12]


def make_earlier(world):
    """Turn all records into those that commit 9d325f4 wrote."""
    fingerprint = earlier_fingerprint(load_file(world.root / "weights.safetensors"))
    data = {split: earlier_data(world.photos / split) for split in ("train", "val")}
    count = 0
    for path in world.base.glob("*.meta.json"):
        record = {key: value for key, value in json.loads(path.read_text()).items() if key not in NEW}
        record |= {"fingerprint": fingerprint} if "fingerprint" in record else {}
        record |= {"data": data[record["split"]]} if "data" in record else {}
        path.write_text(json.dumps(record))
        count += 1
    assert count > 10


def test_results_of_an_earlier_version_are_kept_and_a_line_says_so(changed):
    make_earlier(changed)
    before = contents(changed.base)
    for name in ("representations", "full", "pcas", "ablations"):
        printed = changed.run(name, changed.base)
        assert "kept" in printed and printed.count("were made by an earlier version") == (
            name != "full" or 1
        ), name
    after = contents(changed.base)
    assert [name for name in before if name.endswith(".npy") and after[name] != before[name]] == []


def test_results_of_an_earlier_version_are_compared_as_they_were_then(changed):
    make_earlier(changed)
    image = sorted((changed.photos / "train").rglob("*.JPEG"))[5]
    image.write_bytes(image.read_bytes() + b"\0")  # another size, which it saw
    line = the_line(changed.run("full", changed.base, code=1))
    assert "made with other data; choose another --output_dir, or add --overwrite" in line


def test_results_of_a_version_with_fewer_keys_are_compared_by_those_it_has(changed):
    """Records of commit 91c760d have no number of the method, no classes and no content of texts."""
    make_earlier(changed)
    arrays = {name: content for name, content in contents(changed.base).items() if name.endswith(".npy")}
    for path in changed.base.glob("*.meta.json"):
        record = json.loads(path.read_text())
        kept = {key: record[key] for key in record if key not in ("method_number", "folders", "class_names")}
        path.write_text(json.dumps(kept))
    for name in ("representations", "classifier", "pcas", "full", "pcas", "ablations"):
        changed.run(name, changed.base)
    after = contents(changed.base)
    assert [name for name in arrays if after[name] != arrays[name]] == []


def test_statistics_of_an_earlier_version_are_kept_beside_effects_that_were_made_again(changed):
    """The new effects' records say what the earlier version would have written."""
    make_earlier(changed)
    changed.run("full", changed.base, "--overwrite")
    printed = changed.run("pcas", changed.base)
    assert printed.count("kept") == 4 and "made by an earlier version" in printed


def test_later_stages_read_results_of_an_earlier_version(changed):
    make_earlier(changed)
    for path in [
        *changed.base.glob("*_pca.*"),
        *changed.base.glob("*_ablations*"),
        *changed.base.glob("*_norm.*"),
    ]:
        path.unlink()
    assert "kept" not in changed.run("pcas", changed.base)
    assert "wrote" in changed.run("ablations", changed.base)
