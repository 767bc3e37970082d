"""Every command that a stage prints can be typed as it stands: for a missing file, and as the next step."""

import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.launcher import run_stage_of_user
from tests.photos import discs, write_mat, write_photos
from utils.runtime import flags
from utils.runtime.artifacts import ARTIFACTS
from utils.runtime.results import Results

NAMES = {
    "dataset": "folder",
    "split": "val",
    "layer": [1, 2],
    "k": 5,
    "texts": "words",
    "components": 8,
    "alpha": 0.5,
}
NAMES |= {
    "normalise": "text",
    "train_dataset": "imagenet",
    "subsample": 3,
    "train_subsample": 2,
    "train_data_path": "my train",
}
NAMES |= {"truth": ["a train.npy", "a val.npy"], "held_out": 0.3, "class_names": "my names.txt"}
NAMES |= {"order": "total"}
FIELDS = {"layer": "mlp_layer", "k": "top_k_pca", "texts": "text_descriptions", "alpha": "transform_alpha"}


@pytest.fixture
def parse(monkeypatch):
    """Parse a printed command with the parser of its own script: words -> (script, arguments)."""

    def parsed(command):
        python, script, *words = shlex.split(command)
        assert python == "python"
        found = []
        monkeypatch.setattr(flags, "run", lambda main, parser, **_: found.append(parser))
        monkeypatch.setattr(sys, "argv", [script])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        found[0].error = lambda message: pytest.fail(f"{command}: {message}")
        return script, found[0].parse_args(words)

    return parsed


@pytest.mark.parametrize("kind", ARTIFACTS)
def test_the_command_of_every_artifact_is_understood_by_its_script_and_says_what_is_meant(parse, kind):
    known = {"data_path": "/my photos/й", "descriptions_dir": "my texts"}
    known |= {"unit_set": "my units/a b.pt", "site": "mlp.out"}
    results = Results("my results/of today", "my models/tiny.json", "my weights/a b.pt", **known)
    script, args = parse(results.command(kind, **NAMES))
    assert script == ARTIFACTS[kind].maker[0]
    said = {
        "output_dir": "my results/of today",
        "model": "my models/tiny.json",
        "pretrained": "my weights/a b.pt",
    }
    fields = [field for field in ARTIFACTS[kind].maker[1].values() if isinstance(field, str)]
    said |= {
        FIELDS.get(field, field): {**NAMES, **known}[field]
        for field in fields
        if FIELDS.get(field, field) in vars(args)
    }
    for name, value in said.items():
        found = getattr(args, name)
        if isinstance(found, list) and not isinstance(value, list):
            value = [value]  # a flag that takes several
        assert found == ([str(item) for item in value] if isinstance(value, list) else value), name
    parse(
        Results("out", "ViT-B-32", "openai").command(kind, dataset="imagenet")
    )  # also where little is known


class World:
    """Photos, texts and masks in folders with spaces, a tiny model, and nothing computed yet."""

    def __init__(self, root, model):
        self.root, self.inputs, self.outputs = root, root / "in put", root / "out put"
        for folder in (self.inputs, self.outputs, root / "logs", root / "my texts"):
            folder.mkdir(parents=True)
        self.photos = write_photos(root / "my photos", classes=("a cat", "a dog"), per_class=4, side=40)
        (root / "my texts" / "words.txt").write_text("a\nthe sea\nred\nflowers\nsky\nroof\npetals\nnight\n")
        self.mat = write_mat(root / "my masks.mat", *discs(3))
        self.model = ["--model", model, "--pretrained", "random"]

    def run(self, script, *words, check=True):
        return run_stage_of_user(script, *words, folder=self.root / "logs", check=check)

    def stages(self):
        """The stages that read results of earlier ones, from `inputs`, into `outputs`."""
        where = [*self.model, "--input_dir", self.inputs, "--output_dir", self.outputs]
        data = ["--dataset", "folder", "--data_path", self.photos, "--split", "val", "--num_workers", 0]
        layers, texts = (
            ["--mlp_layer", 1, 2, "--top_k_pca", 5],
            ["--text_descriptions", "words", "--components", 4],
        )
        texts += ["--descriptions_dir", self.root / "my texts"]
        masks = [
            "--data_path",
            self.mat,
            "--mlp_layers",
            1,
            2,
            "--top_k_pca",
            5,
            "--dataset",
            "folder",
            "--top_neurons",
            9,
        ]
        words = [
            "--text_model",
            "template",
            "--similarity_model",
            "clip",
            "--cosim_similarity",
            2,
            "--batch_size",
            1,
        ]
        words += ["--dataset_path", self.outputs]
        words += [
            "--image_model",
            "demo.world:draw_description",
            "--class_0",
            "a cat",
            "--class_1",
            "a dog",
            "--overall_words",
            3,
        ]
        return {
            "grades": ["evaluate_descriptions.py", *where, *data, *layers, *texts],
            "gallery": ["make_gallery.py", *where, *data, *layers, *texts],
            "ablations": ["compute_ablations.py", *where, *data, *layers],
            "evaluation": ["compute_sparse_decomposition.py", *where, *data, *layers, *texts, "--evaluate"],
            "segmentation": ["compute_segmentation.py", *where, *masks, "--num_workers", 0],
            "attack": [
                "generate_adversarial_images.py",
                *where,
                "--dataset",
                "folder",
                "--mlp_layers",
                1,
                2,
                "--top_k_pca",
                5,
            ]
            + [*texts, *words],
        }


@pytest.mark.parametrize("name", ["ablations", "evaluation", "segmentation", "attack", "grades", "gallery"])
def test_following_the_advice_makes_the_missing_file_and_in_the_end_the_result(
    tmp_path, tiny_model, parse, name
):
    """From nothing: the command of each message is typed as it stands, but for DATA_PATH, until the stage has
    all it needs.
    """
    world, steps = World(tmp_path, tiny_model), itertools.count()

    def follow(words):
        """Run a command; when a file is missing follow the advice, which must make this file, and run it
        again.
        """
        while (done := world.run(*words, check=False)).returncode:
            assert next(steps) < 20
            path, command = re.search(r"error: (.*?) is missing.*?; make it with: (.*)", done.stderr).groups()
            assert not Path(path).exists()
            parse(command)
            advised = [
                str(world.photos) if word == "DATA_PATH" else word for word in shlex.split(command)[1:]
            ]
            follow(advised)
            assert Path(path).is_file(), command
        for line in re.findall(r"next: .*?(python .*)", done.stdout):
            parse(line.replace("--dataset DATASET", "--dataset folder"))
            assert "DATA_PATH" in line or "--data_path" not in line or str(world.photos) in shlex.split(line)
        return done

    follow([str(word) for word in world.stages()[name]])
    assert list(world.outputs.rglob("*.json"))
