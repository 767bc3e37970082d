"""The README's code blocks run: with a small model for ViT-B-32, in a folder that has the paths they name."""

import json
import re
import runpy
import shlex
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from tests.launcher import run_stage_of_user
from tests.photos import discs, write_mat, write_photos
from tests.test_published import STAND_INS, cache_of
from utils.runtime import flags

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?m)^```(bash|python)\n(.*?)^```$", README, re.DOTALL)
BASH = [block for language, block in BLOCKS if language == "bash"]
[PYTHON] = [block for language, block in BLOCKS if language == "python"]
[OWN] = [block for block in BASH if "PICTURES" in block]
[STAGES] = [block for block in BASH if "compute_ablations.py" in block]
MODEL = {  # in place of ViT-B-32: as deep, and its text vectors have room for 128 words
    "embed_dim": 144,
    "vision_cfg": {
        "image_size": 64,
        "patch_size": 32,
        "layers": 12,
        "width": 32,
        "head_width": 16,
        "mlp_ratio": 4.0,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 144, "heads": 2, "layers": 1},
}
N, D = 128, 144  # its neurons, 4 x 32, and outputs
ELSEWHERE = {  # too slow to run for every block: the other one has them, and test_paper.py the last
    "evaluate_descriptions.py",
    "make_gallery.py",
    "reproduce_paper.py",
}
SHELL = r"""
set -eu
python() { printf '%s\0' "$@"; printf '\n'; }
pip() { :; }
"""


def no_workers(parser):
    """Let a stage read images itself: processes that do it take longer to start than these few pictures."""
    parser.add_argument("--num_workers", type=int, default=0)


def commands(block, **variables):
    """Return the words of every `python ...` of a block, as bash understands it."""
    environment = {"PATH": "/usr/bin:/bin", **{name: str(value) for name, value in variables.items()}}
    ran = ["bash", "-c", SHELL + block]
    done = subprocess.run(ran, env=environment, capture_output=True, text=True, check=True)
    return [line.rstrip("\0").split("\0") for line in done.stdout.splitlines()]


def parser_of(script, monkeypatch):
    """Return the argparse parser of a script."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(flags, "run", lambda main, parser, **_: found.append(parser))
        patch.setattr(sys, "argv", [script])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    [parser] = found
    return parser


class Folder:
    """A folder with what the README's blocks name: weights, pictures, words, masks; and a place for logs."""

    def __init__(self, root):
        self.root = root
        self.out = root / "output_dir"
        self.logs = root / "logs"
        self.logs.mkdir()
        write_photos(root / "PICTURES", splits=("train",), per_class=26, side=48)
        write_photos(root / "PICTURES", splits=("val",), per_class=3, side=48)
        first = min((root / "PICTURES").rglob("*.JPEG"))
        Image.open(first).save(root / "picture.jpg")
        (root / "path" / "to").mkdir(parents=True)
        torch.manual_seed(0)
        torch.save(open_clip.CLIP(**MODEL).state_dict(), root / "path" / "to" / "weights.pt")
        words = (ROOT / "text_descriptions" / "30k.txt").read_text().split()[:30_000:150]
        (root / "text_descriptions").mkdir()
        pool = (ROOT / "text_descriptions" / "concepts.txt").read_text().splitlines()[::12]
        (root / "text_descriptions" / "concepts.txt").write_text("\n".join(pool))
        (root / "text_descriptions" / "30k.txt").write_text("\n".join(words))
        write_mat(root / "gtsegs_ijcv.mat", *discs(3))

    def run(self, script, *words, constants=()):
        """Run a stage here, on the small model."""
        configs = {"open_clip.factory._MODEL_CONFIGS": {"ViT-B-32": MODEL}, "templates": 1}
        configs["utils.runtime.flags.add_workers"] = no_workers
        constants = {"folder": str(self.root), **configs, **dict(constants)}
        return run_stage_of_user(script, *words, folder=self.logs, constants=constants)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("readme"))


def test_the_readme_is_short_and_begins_with_the_readers_own_clip():
    assert len(README.split()) <= 2000
    before = README[: README.index(PYTHON) + len(PYTHON)]
    assert README.index("make demo") < README.index(OWN) < README.index(PYTHON)
    assert before.count("\n") < 60


def test_the_block_for_ones_own_clip_runs_as_it_stands(folder):
    [[script, *words]] = commands(OWN)
    done = folder.run(script, *words)
    [named, layer] = re.findall(r"# output_dir/(\S+\.html): the page above, of layer (\d+)", OWN)[0]
    assert (folder.out / named).is_file()
    assert f"layer {layer} of 12, {N} neurons each; text set concepts" in done.stdout
    [described] = folder.out.glob(f"images_mlps_*_{layer}_concepts_decomposition_omp_1.0_128.json")
    assert len(json.loads(described.read_text())) == N


def test_the_block_of_python_runs_as_it_stands(folder, monkeypatch):
    monkeypatch.chdir(folder.root)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", MODEL)
    names = {}
    exec(PYTHON, names)
    dense = eval(PYTHON.splitlines()[-1], names)
    assert dense.shape == (1, N, D)
    total = names["phi"].sum()
    assert total.shape == (1, D) and total.norm() > 0.1
    assert (dense.sum(dim=1) - total).abs().max() < 1e-4 * total.abs().max()


def test_the_shape_that_the_block_of_python_names_is_that_of_the_model():
    [shape] = re.findall(r"phi\.dense\(\) +# \[(.+?)\]", PYTHON)
    config = open_clip.get_model_config("ViT-B-32")
    neurons = config["vision_cfg"]["width"] * 4  # mlp_ratio
    assert [int(size) for size in shape.split(",")] == [1, neurons, config["embed_dim"]]


def test_the_stages_run_as_they_stand(tmp_path_factory):
    """On folders of ImageNet of which every picture is taken, and stand-ins for the models of the attack."""
    folder = Folder(tmp_path_factory.mktemp("stages"))
    imagenet = write_photos(tmp_path_factory.mktemp("imagenet"), per_class=26, side=48)
    every = {("imagenet", "train"): 1, ("imagenet", "val"): 5}
    hub = cache_of(tmp_path_factory.mktemp("hf"), MODEL) / "hub"
    more = {"huggingface_hub.constants.HF_HUB_CACHE": str(hub), "utils.data.images.STRIDES": every}
    ran = commands(STAGES, IMAGENET=imagenet)
    assert len(ran) == 13
    for script, *words in ran:
        if script == "compute_segmentation.py" and "8" in words:  # "stages 2, 3 and 5 again"
            for again in ran[2], ran[3], ran[6]:
                where = again.index("9")
                layers = [*again[:where], "8", "9", "10", *again[where + 1 :]]
                folder.run(*layers, constants=more)
        if script not in ELSEWHERE:
            folder.run(script, *words, constants={**more, **STAND_INS})
    made = {path.name for path in folder.out.iterdir()}
    base = "ViT-B-32_openai"
    assert f"imagenet_val_ablations_{base}_9_100.json" in made
    assert f"imagenet_mlps_{base}_9_30k_decomposition_omp_1.0_128_evaluation.json" in made
    assert f"gtsegs_ijcv_segmentation_{base}_second_order_8-9-10_200.json" in made
    assert np.load(folder.out / f"imagenet_train_mlps_{base}_9_100_pca.npy").shape == (N, D)


def test_every_command_is_understood_by_its_script(monkeypatch):
    ran = [words for block in (OWN, STAGES) for words in commands(block, IMAGENET="imagenet")]
    assert len(ran) == README.count("\npython ")
    for script, *words in ran:
        parser = parser_of(script, monkeypatch)
        said = f"{script} {shlex.join(words)}"
        parser.error = lambda message, said=said: pytest.fail(f"{said}: {message}")
        parser.parse_args(words)


def test_every_target_of_make_and_every_file_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert {"demo", "paper", "test", "setup"} <= targets
    assert [target for target in targets if f"\n{target}:" not in makefile] == []
    links = re.findall(r"\]\(([^)#: ]+)(?:#[\w-]+)?\)", README.replace("[k, n](image)", ""))
    named = re.findall(r"(?:-r|-f) ([\w-]+\.(?:txt|yml))", README)
    assert len(links) > 10 and len(named) == 2
    assert [name for name in (*links, *named) if not (ROOT / name).exists()] == []
