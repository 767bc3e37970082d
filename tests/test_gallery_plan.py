"""make_gallery.py from a CLIP and a folder of pictures: the stages it runs, what it says, how it resumes."""

import json
import re
import shlex

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from tests.browser import received
from tests.conftest import ROOT
from tests.launcher import COMMITS, contents, kill, run_stage_of_user, start, the_line, wait_for
from utils.runtime.errors import UserError
from utils.runtime.settings import load_settings

STAGES = [
    "compute_second_order_neuron_prs.py",
    "compute_pcas.py",
    "compute_text_set_projection.py",
    "compute_sparse_decomposition.py",
    "evaluate_descriptions.py",
]
COUNT = 60


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of noise pictures, nested, without classes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        place = folder / ("sommer" if i % 3 else "")
        place.mkdir(exist_ok=True)
        pixels = rng.integers(0, 255, (5, 5, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((40, 44), Image.BICUBIC).save(place / f"bild {i}.png")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "pool.txt"
    path.write_text("\n".join(f"word{i}" for i in range(40)))
    return path


@pytest.fixture(scope="module")
def flags(tiny_model, pictures, texts):
    words = ["--model", tiny_model, "--pretrained", "random", "--dataset", "images", "--data_path", pictures]
    words += ["--text_descriptions", texts, "--components", 4, "--num_workers", 0, "--picture_size", 16]
    return [*words, "--batch_size", 8]


def commands(printed):
    """The commands that were run, as one types them, without `python`."""
    return [shlex.split(line)[1:] for line in re.findall(r"^\$ (.*)$", printed, re.MULTILINE)]


@pytest.fixture(scope="module")
def first(tmp_path_factory, flags):
    """The first run, and its folder."""
    folder = tmp_path_factory.mktemp("first")
    done = run_stage_of_user("make_gallery.py", *flags, "--output_dir", folder / "out", folder=folder)
    return done.stdout, folder / "out"


def test_one_command_leads_from_a_folder_to_the_page(first):
    printed, output = first
    assert [command[0] for command in commands(printed)] == STAGES
    plan, _, _ = printed.partition("\n$ ")
    train, held_out = map(int, re.search(r"(\d+) for components and texts, (\d+) held out", plan).groups())
    assert train + held_out == COUNT and f"{COUNT} images of" in plan
    assert plan.count("images of images ") == 2 and plan.count("preprocessing: ") == 1  # of both splits
    for title in ("effects of layer", "components", "vectors of 40 texts", "writes", "grades", "the page"):
        assert re.search(rf"^  .*{title}.*about [\d,]+ (s|min) +[\d,]+ MB$", plan, re.MULTILINE), title
    about = received(output / "gallery", "about")
    assert about["splits"]["train"]["count"] == train and about["splits"]["val"]["count"] == held_out
    assert about["k"] == train // 10 and about["text_set"] == "pool"
    assert printed.splitlines()[-1].endswith(f"open {output}/gallery/index.html")


def test_the_layer_is_the_last_but_two(first, tiny_model):
    _, output = first
    layers = json.loads(open(tiny_model).read())["vision_cfg"]["layers"]
    assert received(output / "gallery", "about")["layers"] == [layers - 3]


def test_a_second_run_keeps_everything(first, flags, tmp_path):
    _, output = first
    before = contents(output)
    done = run_stage_of_user("make_gallery.py", *flags, "--output_dir", output, folder=tmp_path)
    assert commands(done.stdout) == [] and "kept" in done.stdout
    assert contents(output) == before


def test_the_printed_commands_make_the_same(first, flags, tmp_path):
    printed, output = first
    out = tmp_path / "out"
    for script, *words in commands(printed):
        words = [out if word == str(output) else word for word in words]
        run_stage_of_user(script, *words, folder=tmp_path)
    done = run_stage_of_user("make_gallery.py", *flags, "--output_dir", out, folder=tmp_path)
    assert commands(done.stdout) == []
    assert contents(out) == contents(output)


def test_killed_it_resumes_where_it_was(first, flags, tmp_path):
    _, output = first
    out = tmp_path / "out"
    words = ["make_gallery.py", *flags, "--output_dir", out]
    process = start(*words, log=tmp_path / "log", constants=COMMITS)
    assert wait_for(lambda: list(out.glob("*decomposition*.json")), process)
    kill(process)
    made = {path: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    done = run_stage_of_user(*words, folder=tmp_path)
    assert commands(done.stdout)[0][0] in STAGES[3:]
    assert all(path.stat().st_mtime_ns == time for path, time in made.items() if path.exists())
    assert contents(out) == contents(output)


def test_what_cannot_be_is_said_before_any_pass(flags, tmp_path):
    words = [*flags, "--output_dir", tmp_path / "out"]
    words[words.index("--components") + 1] = 41
    done = run_stage_of_user("make_gallery.py", *words, folder=tmp_path, check=False)
    assert done.returncode == 1 and commands(done.stdout) == []
    assert the_line(done.stderr) == "error: --components 41 cannot be chosen from 40 texts; give 1 to 40"


def test_a_broken_picture_ends_the_stage_that_reads_it(flags, pictures, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, path in enumerate(sorted(pictures.rglob("*.png"))):
        (folder / f"{i}.png").write_bytes(path.read_bytes()[: 400 if i == 30 else None])
    words = [*flags, "--output_dir", tmp_path / "out"]
    words[words.index("--data_path") + 1] = folder
    done = run_stage_of_user("make_gallery.py", *words, folder=tmp_path, check=False)
    line = the_line(done.stderr)
    assert done.returncode == 1 and line.startswith("error: compute_second_order_neuron_prs.py: ")
    assert "30.png" in line
    (folder / "30.png").unlink()
    again = run_stage_of_user("make_gallery.py", *words, folder=tmp_path, check=False)
    assert "add --overwrite to start from scratch" in the_line(again.stderr)  # they are other pictures
    run_stage_of_user("make_gallery.py", *words, "--overwrite", folder=tmp_path)


def test_names_of_classes_give_a_classifier(flags, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("a dog\na cat\n")
    words = [*flags, "--class_names", names, "--output_dir", tmp_path / "out"]
    done = run_stage_of_user("make_gallery.py", *words, folder=tmp_path)
    assert commands(done.stdout)[0][0] == "compute_classifier_projection.py"
    about = received(tmp_path / "out/gallery", "about")
    assert about["classifier"] and about["class_names"] == ["a dog", "a cat"]


def test_the_notebooks_know_what_the_page_was_made_of(first, flags, pictures, texts, monkeypatch):
    """A folder of pictures, its layer and its k: only the folder of results is to be told."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    _, output = first
    found = load_settings(output)
    about = received(output / "gallery", "about")
    assert (found.dataset, found.data_path, found.text_descriptions) == ("images", str(pictures), str(texts))
    assert (found.layer, found.top_k_pca, found.components) == (about["layers"][-1], about["k"], 4)
    for name in ("visualize_neurons.ipynb", "concept_discovery.ipynb"):
        notebook = nbformat.read(ROOT / name, as_version=4)
        notebook.cells[1].source = notebook.cells[1].source.replace("demo/output/symbols", str(output))
        where = {"metadata": {"path": str(ROOT)}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
        shown = [part for cell in notebook.cells for part in cell.get("outputs", ())]
        assert sum("image/png" in part.get("data", {}) for part in shown) >= 3


def test_settings_that_are_missing_or_damaged_are_told(tmp_path):
    with pytest.raises(UserError, match="has no make_gallery.json; run make_gallery.py"):
        load_settings(tmp_path)
    for content in ("{", "[]", "{}"):
        (tmp_path / "make_gallery.json").write_text(content)
        with pytest.raises(UserError, match="damaged|does not say"):
            load_settings(tmp_path)
