"""A folder of pictures without classes and splits, and small data: which are held out, how many count."""

import hashlib
import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.launcher import run_stage_of_user, the_line
from tests.photos import discs, write_mat
from utils.data.images import classes_of, load_images
from utils.model.clip import load_clip
from utils.neurons import NeuronLayer
from utils.runtime.artifacts import ARTIFACTS
from utils.runtime.errors import UserError
from utils.runtime.results import Results
from utils.statistics import choose_k, find_k

NAMES = ["猫", "café", "кот", "a b", "#1%", "<b>", "'quoted'", "é", "قطة", "x" * 200]


def picture(seed, side=16):
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def write_pictures(root, count=60, nested=True, first=0):
    """Write pictures below a folder; if `nested`, a third of them deeper. Returns the folder."""
    for seed in range(first, first + count):
        name = NAMES[seed % len(NAMES)]
        place = root / NAMES[seed % 7] / "sub" if nested and seed % 3 == 0 else root
        place.mkdir(parents=True, exist_ok=True)
        picture(seed).save(place / f"{name}{seed}.png")
    return root


def in_order(root):
    """The pictures below a folder, by folder and name."""
    return sorted(root.rglob("*.png"), key=lambda path: os.path.split(str(path)))


def is_held_out(path, share=0.2):
    """Whether the bytes of a file, as a number in [0, 1) that SHA-256 makes of them, lie below the share."""
    return int(hashlib.sha256(Path(path).read_bytes()).hexdigest(), 16) / 2**256 < share


def found(root, split, **options):
    """The paths below the folder of the pictures of a side, in their order."""
    return [os.path.relpath(path, root) for path, _ in load_images("images", root, split, **options).samples]


def one_line_of(call, *arguments, **options):
    """The text of the UserError that a call raises."""
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images") / "pictures")


# Sides


@pytest.mark.parametrize("share", [None, 0.05, 0.2, 0.5, 0.9])
def test_the_bytes_of_a_picture_say_whether_it_is_held_out(pictures, share):
    sides = {split: found(pictures, split, held_out=share) for split in ("train", "val")}
    every = in_order(pictures)
    for split, paths in sides.items():
        truth = [path for path in every if is_held_out(path, share or 0.2) == (split == "val")]
        assert paths == [os.path.relpath(path, pictures) for path in truth], split
    assert len(every) == 60


def test_about_one_in_five_of_a_thousand_in_one_folder_is_held_out(tmp_path):
    for i in range(1000):
        (tmp_path / f"{i}.jpg").write_bytes(i.to_bytes(2, "big"))
    numbers = [len(found(tmp_path, split)) for split in ("train", "val")]
    assert sum(numbers) == 1000
    assert abs(numbers[1] - 200) < 4 * np.sqrt(1000 * 0.2 * 0.8)


def test_a_picture_stays_on_its_side_whatever_its_name_and_folder_and_whoever_comes(pictures, tmp_path):
    held = {hashlib.sha256((pictures / path).read_bytes()).digest() for path in found(pictures, "val")}
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(pictures.rglob("*.png"), reverse=True)):
        (flat / f"{i}.png").write_bytes(path.read_bytes())
        (flat / f"{i} copy.png").write_bytes(path.read_bytes())
    write_pictures(flat, count=40, nested=False, first=500)
    sides = {split: {flat / path for path in found(flat, split)} for split in ("train", "val")}
    assert len(sides["train"]) + len(sides["val"]) == 160
    for split, paths in sides.items():
        for path in paths - set(flat.glob("*5[0-4][0-9].png")):
            assert (hashlib.sha256(path.read_bytes()).digest() in held) == (split == "val")
        copies = {path for path in paths if "copy" in path.name}
        assert {path.with_name(path.name.replace(" copy", "")) for path in copies} <= paths


def test_a_larger_share_holds_out_the_same_pictures_and_more(pictures):
    held = [set(found(pictures, "val", held_out=share)) for share in (0.1, 0.2, 0.4, 0.8)]
    assert all(less < more for less, more in zip(held, held[1:], strict=False))


def test_the_order_in_which_a_disk_lists_a_folder_does_not_matter(pictures, monkeypatch):
    images = load_images("images", pictures, "train")
    listed = os.scandir

    class Reversed:
        def __init__(self, folder):
            self.entries = list(listed(folder))

        def __enter__(self):
            return reversed(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    again = load_images("images", pictures, "train")
    assert again.samples == images.samples and again.record == images.record


def test_the_record_names_pictures_below_the_folder_wherever_that_lies(tmp_path, monkeypatch):
    def record(folder, split="train", **options):
        found = load_images("images", folder, split, **options).record
        found.pop("data_path")  # a note
        return found

    root = write_pictures(tmp_path / "one" / "pictures", nested=False)
    before = record(root)
    assert before.keys() == {"dataset", "split", "data", "held_out"} and before["held_out"] == 0.2
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(root)
    for way in (tmp_path / "link", f"{root}/", ".", f"{root}/../pictures"):
        assert record(way) == before, way
    moved = root.rename(tmp_path / "other name")
    assert record(moved) == before
    assert record(moved, held_out=0.3)["held_out"] == 0.3
    assert len({json.dumps(record(moved, split)) for split in ("train", "val")}) == 2
    first = moved / found(moved, "train")[0]
    first.rename(first.with_name("renamed.png"))
    assert record(moved)["data"] != before["data"]
    first.with_name("renamed.png").rename(first)
    assert record(moved) == before
    first.write_bytes(first.read_bytes() + b"x")  # other bytes of the same pixels
    assert record(moved)["data"] != before["data"]


def test_links_rubbish_and_other_files_are_as_in_class_folders(pictures, tmp_path, tiny_model, capsys):
    folder = write_pictures(tmp_path / "folder", nested=False)
    (folder / "more").symlink_to(pictures)
    (folder / "again").symlink_to(folder)
    (pictures / "back").symlink_to(folder)
    (folder / "@eaDir").mkdir()
    picture(1).save(folder / "@eaDir" / "thumb.png")
    (folder / "list.csv").write_text("x")
    for name in ("1.mp4", "2.mp4"):
        (folder / name).write_bytes(b"x")
    transform = load_clip(tiny_model, "random", "cpu", image_only=True).transform
    try:
        images = [load_images("images", folder, split, transform) for split in ("train", "val")]
    finally:
        (pictures / "back").unlink()
    assert sum(map(len, images)) == 120
    [one, other] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    kinds = "3 files that Pillow does not read (.mp4 2, .csv 1); 2 links to a folder that is there already"
    assert one == other == f"left out: {kinds}"


def test_what_is_printed_says_what_is_held_out(pictures, tiny_model, capsys):
    transform = load_clip(tiny_model, "random", "cpu", image_only=True).transform
    images = load_images("images", pictures, "val", transform, held_out=0.25)
    first = capsys.readouterr().out.splitlines()[0]
    rest = "without classes; 25 % of all are held out, by their bytes"
    assert first == f"images of images val: {len(images)} {rest}"
    assert images.classes == {"folders": [], "class_names": []} and set(images.labels) == {-1}


# Too few, and other mistakes


def test_fifty_different_pictures_are_needed(tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures", count=49)
    said = one_line_of(load_images, "images", folder, "train")
    of_these = "10 are held out to grade texts, and components are those of 4, a tenth of the others"
    needs = f"--dataset images needs 50: of these, {of_these}; add some"
    assert said == f"{folder} has 49 different pictures, and {needs}"
    for i in range(30):
        picture(0).save(folder / f"copy {i}.png")
    assert "49 different pictures (79 with copies)" in one_line_of(load_images, "images", folder, "val")
    picture(49).save(folder / "one more.png")
    assert len(found(folder, "train")) + len(found(folder, "val")) == 80
    empty = tmp_path / "empty"
    empty.mkdir()
    capsys.readouterr()
    assert "has 0 different pictures, and" in one_line_of(load_images, "images", empty, "val")
    assert capsys.readouterr().out == ""
    (empty / "1.heic").write_bytes(b"x")
    (empty / "2.HEIC").write_bytes(b"x")
    assert "has 0 different pictures, and" in one_line_of(load_images, "images", empty, "val")
    assert capsys.readouterr().out == "left out: 2 files that Pillow does not read (.heic 2)\n"


def test_paths_splits_and_shares_that_cannot_be_are_refused(pictures):
    file = next(pictures.rglob("*.png"))
    nowhere = pictures / "nowhere"
    said = one_line_of(load_images, "images", nowhere, "val")
    assert said == f"--data_path {nowhere}: there is no such folder"
    said = one_line_of(load_images, "images", file, "val")
    assert said == f"--data_path {file}: this is a file; give the folder that holds the pictures"
    assert "--split test: images has train, and val" in one_line_of(load_images, "images", pictures, "test")
    said = one_line_of(load_images, "images", pictures, "val", held_out=1e-9)
    assert "--held_out 1e-09 of the 60 pictures" in said and "leaves none to --split val" in said
    said = one_line_of(load_images, "images", pictures, "train", held_out=1 - 1e-9)
    assert "leaves none to --split train; give another share" in said
    for dataset in ("folder", "imagenet", "CIFAR10"):
        said = one_line_of(load_images, dataset, pictures, "train", held_out=0.2)
        assert said == f"--held_out goes with --dataset images; {dataset} has splits of its own"


def test_a_picture_that_cannot_be_read_is_named(pictures, tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "pictures", nested=False)
    missing = sorted(folder.iterdir())[3]

    def refuse(path, *arguments, **options):
        if path == str(missing):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *arguments, **options)

    opened = open
    monkeypatch.setattr("builtins.open", refuse)
    said = one_line_of(load_images, "images", folder, "val")
    assert said.startswith(f"the image {missing} cannot be read (Permission denied); fix or remove it")


def test_pictures_have_no_classes_but_may_be_given_names(tmp_path):
    said = one_line_of(classes_of, "images", tmp_path, "val")
    assert "have no classes; name some with --class_names FILE, a text file with a class a line" in said
    (tmp_path / "names.txt").write_text("dog\nold house\n")
    names = ["dog", "old house"]
    found = classes_of("images", class_names=tmp_path / "names.txt")
    assert found == {"folders": names, "class_names": names}


# How many of a neuron's effects a component is of


@pytest.mark.parametrize(
    ("dataset", "images", "k"),
    [
        *[("folder", 5, 1), ("folder", 19, 1), ("folder", 40, 4), ("images", 999, 99), ("images", 1000, 100)],
        *[("CIFAR10", 50_000, 100), ("imagenet", 12, 100), ("imagenet_r", 12, 100), ("imagenet", 5124, 100)],
    ],
)
def test_k_is_a_tenth_of_the_images_and_at_most_100_and_100_on_imagenet(dataset, images, k, capsys):
    assert choose_k(None, dataset, {9: images}) == k
    said = f"--top_k_pca {k}: the smaller of 100 and a tenth of {images} training images\n"
    assert capsys.readouterr().out == ("" if dataset.startswith("imagenet") else said)
    assert choose_k(7, dataset, {9: images}) == 7
    assert capsys.readouterr().out == ""


STORED = {  # what may be left of a layer, and which of it counts
    "all": (["image_norms", "bias", "coefficients"], 41),
    "the effects are deleted": (["image_norms"], 41),
    "before compute_pcas.py": (["bias", "coefficients"], 52),
    "published": (["merged"], 74),
}
COUNTS = {"image_norms": 41, "bias": 52, "coefficients": 63, "merged": 74}


def store(results, layer, kinds, counts=COUNTS):
    """Write arrays that have a row for each training image."""
    shapes = {"image_norms": (6,), "bias": (4,), "coefficients": (2, 6), "merged": (6, 4)}
    for kind in kinds:
        path = results.path(kind, dataset="folder", layer=layer)
        np.save(path, np.zeros((counts[kind], *shapes[kind]), np.float32))


@pytest.mark.parametrize("case", STORED)
@pytest.mark.parametrize("layers", [[1], ["1"], ["all"], [1, 2]])
def test_later_stages_count_the_images_in_what_earlier_ones_left(tmp_path, case, layers):
    kinds, images = STORED[case]
    results = Results(tmp_path, "M", "P")
    store(results, 1, kinds)
    assert find_k(None, results, "folder", layers) == images // 10
    assert find_k(3, results, "folder", layers) == 3
    assert find_k(None, results, "imagenet", layers) == 100  # nothing of it is there


def test_where_the_number_of_images_is_not_one_or_not_known_a_line_says_so(tmp_path):
    results = Results(tmp_path, "M", "P")
    said = one_line_of(find_k, None, results, "folder", [2, 1])
    missing = f"{tmp_path}/folder_train_mlps_M_P_1_image_norms.npy is missing, and without it --top_k_pca"
    command = "python compute_pcas.py --dataset folder --mlp_layer 1 2 --model M --pretrained P"
    assert said.startswith(missing) and f"; make it with: {command} --output_dir {tmp_path}" in said
    assert "image_norms" in one_line_of(find_k, None, results, "folder", ["all"])
    store(results, 1, ["image_norms"])
    store(results, 2, ["image_norms"], {"image_norms": 45})
    assert find_k(None, results, "folder", [1, 2]) == 4
    store(results, 2, ["image_norms"], {"image_norms": 52})
    said = one_line_of(find_k, None, results, "folder", ["all"])
    assert "of different numbers of training images (layer 1 of 41, layer 2 of 52); give --top_k_pca" in said


# Every stage


class World:
    """Pictures, a tiny model, words, and every stage that needs no classes; no command has --top_k_pca."""

    def __init__(self, root, model, pictures):
        self.root, self.out, self.pictures = root, root / "out", pictures
        self.logs = root / "logs"
        for folder in (self.out, self.logs, root / "texts"):
            folder.mkdir(parents=True)
        (root / "texts" / "words.txt").write_text("a\nthe sea\nred\nflowers\nsky\nroof\npetals\nnight\n")
        (root / "names.txt").write_text("a house\na flower\n")
        self.mat = write_mat(root / "discs.mat", *discs(2))
        self.model = ["--model", model, "--pretrained", "random"]
        self.data = ["--dataset", "images", "--data_path", pictures, "--num_workers", 0]
        layers = ["--mlp_layer", 1, 3]
        texts = ["--text_descriptions", "words", "--descriptions_dir", root / "texts"]
        described = [*self.data, *texts, "--components", 4]
        graded = [*described, "--mlp_layer", 3]
        little = ["--controls", 0, "--rotated_units", 0, "--delete", 0]
        self.stages = {
            "representations": ["compute_representations.py", *self.data, "--split", "val"],
            "effects": ["compute_second_order_neuron_prs.py", *self.data, *layers],
            "pcas": ["compute_pcas.py", "--dataset", "images", *layers],
            "texts": ["compute_text_set_projection.py", *texts],
            "decomposition": ["compute_sparse_decomposition.py", *described, *layers],
            "grades": ["evaluate_descriptions.py", *graded, *little],
            "gallery": ["make_gallery.py", *graded],
            "explanation": ["explain_image.py", pictures, "--text", "sky", "--dataset", "images", *layers],
        }
        self.train = [path for path in pictures.rglob("*.png") if not is_held_out(path)]
        self.k = len(self.train) // 10
        self.done = {}

    def run(self, name, *more, out=None, code=0, script=None):
        """Run a stage; return what it printed, or the line on stderr where it fails."""
        words = [*(script or self.stages[name]), *self.model, "--output_dir", out or self.out, *more]
        ended = run_stage_of_user(*words, folder=self.logs, check=not code)
        assert ended.returncode == code
        return the_line(ended.stderr) if code else ended.stdout

    def run_all(self):
        for name in self.stages:
            self.done[name] = self.run(name)
        return self


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model, pictures):
    return World(tmp_path_factory.mktemp("world"), tiny_model, pictures).run_all()


def test_every_stage_without_classes_runs_and_all_take_the_same_k(world):
    assert world.k == 4 or world.k == 5  # of 60 pictures
    names = {path.name for path in world.out.rglob("*")}
    base = "images_train_mlps_tiny_random"
    assert {f"{base}_{layer}_{world.k}_{kind}.npy" for layer in (1, 3) for kind in ("pca", "norm")} <= names
    assert not [name for name in names if re.search(r"_100_|classes\.npy", name)]
    line = f"--top_k_pca {world.k}: the smaller of 100 and a tenth of {len(world.train)} training images\n"
    for name in ("effects", "pcas", "decomposition", "grades", "gallery"):
        assert world.done[name].count(line) >= 1, name
    record = json.loads(next(world.out.glob("*_1_words_decomposition_*.meta.json")).read_text())
    assert record["top_k_pca"] == world.k
    effects = json.loads((world.out / f"{base}_1_bias.meta.json").read_text())
    assert effects["held_out"] == 0.2 and effects["shape"][0] == len(world.train)
    assert (world.out / "gallery" / "index.html").is_file()


def test_the_page_has_no_classes_and_every_picture(world):
    about = (world.out / "gallery" / "data" / "about.js").read_text()
    about = json.loads(about[about.index(",") + 1 : about.rindex(")")])
    assert about["class_names"] == [] and about["classifier"] is False and about["k"] == world.k
    counts = {split: of["count"] for split, of in about["splits"].items()}
    assert counts == {"train": len(world.train), "val": 60 - len(world.train)}
    assert all(set(of["labels"]) == {-1} for of in about["splits"].values())


def test_the_rows_of_results_are_the_pictures_of_their_side(world, tiny_model):
    clip = load_clip(tiny_model, "random", "cpu", image_only=True)
    stored = np.load(world.out / "images_val_representations_tiny_random.npy")
    held_out = [path for path in in_order(world.pictures) if is_held_out(path)]
    assert len(stored) == len(held_out)
    for i in (0, len(held_out) - 1):
        pixels = clip.transform(Image.open(held_out[i]).convert("RGB"))[None]
        own = clip.vit(pixels)[0].detach().numpy()
        assert np.abs(stored[i] - 100 * own / np.linalg.norm(own)).max() < 1e-4


def test_the_notebooks_neurons_are_of_the_same_k_and_pictures(world, tiny_model):
    clip = load_clip(tiny_model, "random", "cpu", image_only=True)
    images = load_images("images", world.pictures, "train", clip.transform)
    described = {"texts": "words", "components": 4}
    neurons = NeuronLayer(clip, Results(world.out, tiny_model, "random"), images, 3, described)
    assert neurons.norms.shape == (96, world.k) and len(neurons.fires_on) == 96
    norms = np.load(world.out / "images_train_mlps_tiny_random_3_image_norms.npy")
    assert norms.shape == (len(world.train), 96)
    assert list(neurons.top_images(7, world.k, by="norm")) == list(np.argsort(-norms[:, 7])[: world.k])


def test_stages_that_need_classes_say_what_to_do(world):
    layers = ["--mlp_layer", 1]
    refused = "have no classes, and this needs them; sort the pictures into class folders, and give "
    refused += "--dataset folder"
    ablations = ["compute_ablations.py", *world.data, *layers]
    assert refused in world.run("ablations", script=ablations, code=1)
    assert refused in world.run("decomposition", "--evaluate", code=1)
    paper = ["reproduce_paper.py", "table1", *world.data]
    assert refused in world.run("paper", script=paper, code=1)
    classifier = ["compute_classifier_projection.py", *world.data[:4]]
    assert "name some with --class_names FILE" in world.run("classifier", script=classifier, code=1)
    masks = ["--data_path", world.mat, "--mlp_layers", 1, 3, "--top_neurons", 9, "--dataset", "images"]
    segmentation = ["compute_segmentation.py", *masks, "--num_workers", 0]
    line = world.run("segmentation", script=segmentation, code=1)
    command = "compute_classifier_projection.py --dataset images --class_names CLASS_NAMES"
    assert f"is missing; make it with: python {command}" in line
    typed = line.split("make it with: python ")[1].replace("CLASS_NAMES", str(world.root / "names.txt"))
    words = shlex.split(typed)
    run_stage_of_user(*words, folder=world.logs, constants={"templates": 1})
    assert "second_order_1-3_9" in world.run("segmentation", script=segmentation)
    assert "classifier_tiny_random.npy" in " ".join(path.name for path in world.out.glob("images_*"))


def test_results_of_another_share_are_never_mixed(world, tmp_path):
    other = ["--held_out", 0.4]
    differ = "made with other data, held_out, shape; choose another --output_dir"
    assert differ in world.run("representations", *other, code=1)
    assert differ in world.run("effects", *other, code=1)
    fits = "is of pictures of which 20 % are held out; add --held_out 0.2"
    assert fits in world.run("grades", *other, code=1)
    assert fits in world.run("gallery", *other, code=1)
    out = tmp_path / "out"
    assert "next: " in world.run("effects", *other, out=out)
    [bias] = out.glob("*_1_bias.npy")
    assert len(np.load(bias)) == sum(not is_held_out(path, 0.4) for path in world.pictures.rglob("*.png"))


def test_what_comes_next_fits_what_was_run_and_leaves_open_what_is_not_known(world):
    def after(printed):
        return [shlex.split(line) for line in re.findall(r"^next: (.*)$", printed, re.MULTILINE)]

    model = [*map(str, world.model), "--output_dir", str(world.out)]
    [words] = after(world.done["representations"])
    data = ["--dataset", "images", "--data_path", str(world.pictures), "--split", "train"]
    assert words == ["python", "compute_second_order_neuron_prs.py", *data, "--mlp_layer", "LAYER", *model]
    [words] = after(world.done["effects"])
    layers = ["--mlp_layer", "1", "3", "--top_k_pca", str(world.k)]
    assert words == ["python", "compute_pcas.py", "--dataset", "images", *layers, *model]
    [words] = after(world.done["pcas"])
    assert words == ["python", "compute_text_set_projection.py", *model]
    [words] = after(world.done["texts"])
    unknown = ["--dataset", "DATASET", "--mlp_layer", "LAYER"]
    assert words[:6] == ["python", "compute_sparse_decomposition.py", *unknown]
    [words] = after(world.done["grades"])
    assert words[1] == "make_gallery.py" and words[words.index("--dataset") + 1] == "images"
    assert words[words.index("--top_k_pca") + 1] == str(world.k) and "--held_out" not in words
    known = SimpleNamespace(**{"dataset": "images", "held_out": 0.3, "data_path": "P"})
    for kind in ("grades", "gallery", "coefficients", "representations"):
        assert "--held_out 0.3" in Results("out", "M", "P", **vars(known)).command(kind), kind
    assert all("--held_out" not in ARTIFACTS[kind].maker[1] for kind in ("pca", "texts", "classifier"))


def test_of_held_out_effects_no_components_come_next(world, tmp_path):
    printed = world.run("effects", "--split", "val", "--keep", "full", out=tmp_path / "out")
    assert "wrote the effects" in printed and "next:" not in printed


@pytest.mark.parametrize("text", ["0", "1", "-0.1", "nan", "20", "x"])
def test_a_share_lies_between_0_and_1(world, text):
    words = [*world.stages["representations"], *world.model, f"--held_out={text}"]
    ended = run_stage_of_user(*words, folder=world.logs, check=False)
    assert ended.returncode == 2 and "argument --held_out: " in ended.stderr
