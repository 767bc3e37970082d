"""The page of other units than neurons: its files against numpy and the model, and in a browser."""

import base64
import json
import re
import shlex

import nbformat
import numpy as np
import pyarrow.parquet
import pytest
import torch
from nbclient import NotebookClient
from numpy.testing import assert_allclose
from PIL import Image
from torch.nn.functional import normalize

from applications.gallery.write import Predicted
from tests.browser import browser_binaries, checked_page, received
from tests.conftest import ROOT
from tests.launcher import World, run_stage_of_user
from tests.test_unit_stages import RARE, acting_on, training_images
from utils.data.images import load_images
from utils.grading import Judge
from utils.model.clip import load_clip
from utils.model.dictionary_files import save_dictionary
from utils.runtime.settings import load_settings

U = 96 + RARE
BESIDE_HEADINGS = """
return [...document.querySelectorAll("h3")].map((h) => [h.textContent, h.nextSibling.tagName]);
"""
FEW = (19, 12, 5, 1, 0, 0)  # training images on which the last units act
PAIRED = (2, 3)  # layers whose pairs are shown
WITH_UNITS = [
    "compute_second_order_neuron_prs.py",
    "compute_pcas.py",
    "compute_sparse_decomposition.py",
    "evaluate_descriptions.py",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    """A folder with the pages of a dictionary's units and of pairs."""
    root = tmp_path_factory.mktemp("pages")
    made = World(root, tiny_model, per_class=12)
    made.mine = acting_on(FEW, *training_images(made, tiny_model))
    save_dictionary(root / "mine.safetensors", made.mine)
    made.out = root / "out"
    flags = [*made.model, *made.val, "--text_descriptions", root / "words.txt", "--components", 2]
    flags += ["--picture_size", 16, "--output_dir", made.out]
    made.flags = {
        "mine": [*flags, "--units", root / "mine.safetensors"],
        "pairs": [*flags, "--units", "pairs", "--mlp_layer", *PAIRED],
    }
    made.printed = {}
    for name, words in made.flags.items():
        made.printed[name] = run_stage_of_user("make_gallery.py", *words, folder=root).stdout
        (made.out / "make_gallery.json").rename(root / f"{name}.json")
    return made


@pytest.fixture(scope="module")
def recorded(world, tiny_model):
    """Activations of the model on all training images, {name: float64 [images, T, ...]}."""
    clip = load_clip(tiny_model, "random", "cpu", image_only=True)
    images = load_images("folder", world.photos, "train", clip.transform)
    names = ["blocks.2.resid.pre", *(f"blocks.{layer}.mlp.post" for layer in PAIRED)]
    with torch.inference_mode(), clip.vit.record(*names) as cache:
        clip.vit(torch.stack([image for image, _ in images]))
    return {name: cache[name].double().numpy() for name in names}


def array(world, ending):
    return np.load(world.out / f"folder_train_mlps_tiny_random_{ending}.npy")


def details(world, name, layer, count):
    """Everything about the units of a layer."""
    files = range(-(-count // 64))
    folder = world.out / f"gallery_{name}"
    return [unit for i in files for unit in received(folder, f"{layer}/neurons_{i}")["neurons"]]


def assert_maps(shown, activations):
    """The maps of a unit's top pictures are its activations [images, patches], scaled together."""
    pictures = [picture for sign in ("positive", "negative") for picture in shown["top"]["train"][sign]]
    expected = np.stack([activations[row] for row, _, _ in pictures]).clip(0)
    found = np.stack([np.frombuffer(base64.b64decode(map), np.uint8) for _, _, map in pictures])
    assert np.abs(found - 255 * expected / max(expected.max(), 1e-30)).max() <= 0.6


def test_one_command_runs_the_stages_with_these_units(world):
    for name in ("mine", "pairs"):
        units = str(world.root / "mine.safetensors") if name == "mine" else "pairs"
        printed = re.findall(r"^\$ python (.*)$", world.printed[name], re.MULTILINE)
        commands = [shlex.split(line) for line in printed]
        assert [script for script, *_ in commands if script in WITH_UNITS] == WITH_UNITS
        for script, *words in commands:
            given = "--units" in words and words[words.index("--units") + 1] == units
            assert given == (script in WITH_UNITS)
    assert "102 units of mine each" in world.printed["mine"]
    assert "768 neuron-head pairs, 384 neuron-head pairs each" in world.printed["pairs"]
    assert world.printed["mine"].splitlines()[-1].endswith(f"open {world.out}/gallery_mine/index.html")


def test_a_second_run_keeps_everything(world):
    for words in world.flags.values():
        printed = run_stage_of_user("make_gallery.py", *words, folder=world.root).stdout
        assert "\n$ " not in printed and printed.splitlines()[-1].startswith("kept ")


def test_the_page_says_what_its_units_are(world):
    about = received(world.out / "gallery_mine", "about")
    assert about["units"] == {
        "kind": "units of mine",
        "least": 20,
        "site": {"1": "resid.post"},
        "heads": {},
        "paired": 96,
    }
    assert about["neurons"] == U and about["layers"] == [1]
    assert "another unit's texts that it writes" in about["rows"].values()
    heads = received(world.out / "gallery_pairs", "about")["units"]["heads"]
    assert heads == {"2": [[l, h] for l in (3, 4) for h in range(4)], "3": [[4, h] for h in range(4)]}


def test_numbers_and_maps_of_a_dictionary_s_units_are_the_arrays(world, recorded):
    grid = received(world.out / "gallery_mine", "1/layer")
    acts = array(world, "1_mine_acts")
    assert grid["acts"] == acts.tolist() and sorted(acts)[RARE] >= 20
    assert_allclose(grid["norm"], array(world, "1_mine_4_norm").mean(axis=1), rtol=6e-3, atol=1e-6)
    d = world.mine
    x = recorded["blocks.2.resid.pre"][:, 1:]
    f = np.maximum(x @ d.encoder.double().numpy().T + d.encoder_bias.double().numpy(), 0)
    y = array(world, "1_mine_4_projections")
    for n in range(0, U - RARE, 7):
        shown = details(world, "mine", 1, U)[n]
        assert_maps(shown, f[..., n])
        rows = [row for row, _, _ in shown["top"]["train"]["positive"]]
        assert_allclose(y[rows, n], [y for y in np.sort(y[:, n])[::-1][:8] if y > 0])
        assert {layer for layer, _, _ in shown["heads"]} <= {2, 3, 4} and shown["without"]


def test_units_that_act_on_few_images_are_not_graded(world):
    grid = received(world.out / "gallery_mine", "1/layer")
    found = details(world, "mine", 1, U)
    for n, unit in enumerate(found):
        rare = n >= U - RARE
        assert rare == (unit["grades"] == {}) == (unit["by_length"] == {})
        assert not (rare and (unit["without"] or unit["shown"]["writes"] or unit["shown"]["fires_on"]))
    for side in ("fires_on", "writes"):
        judged = grid[side]["judged"]
        assert judged["better"] <= sum(
            any(better for _, _, better in unit["by_length"][side]) for unit in found[:-RARE]
        )
        shown = np.reshape(grid[side]["texts"], (U, -1))
        assert (shown[-RARE:] == -1).all()
        for name in ("grade", "control") if "grade" in grid[side] else ():
            assert [value is None for value in grid[side][name]] == [False] * (U - RARE) + [True] * RARE
    table = pyarrow.parquet.read_table(world.out / "gallery_mine/units.parquet").to_pydict()
    assert table["unit"] == list(range(U)) and "neuron" not in table
    assert table["images"] == array(world, "1_mine_acts").tolist()
    of_grades = [name for name in table if "pearson" in name and "better" not in name]
    assert len(of_grades) > 6
    for name in of_grades:
        assert np.isfinite(table[name][:-RARE]).all() and np.isnan(table[name][-RARE:]).all()


def test_pairs_carry_their_neuron_and_head(world, recorded):
    table = pyarrow.parquet.read_table(world.out / "gallery_pairs/units.parquet").to_pydict()
    unit, layer = np.array(table["unit"]), np.array(table["layer"])
    assert (np.array(table["neuron"]) == unit % 96).all()
    assert (np.array(table["head"]) == unit // 96 % 4).all()
    assert (np.array(table["head_layer"]) == layer + 1 + unit // 96 // 4).all()
    pcas = np.concatenate([array(world, f"{l}_pairs_4_pca") for l in PAIRED])
    names = list(zip(layer.tolist(), unit.tolist(), strict=True))
    for l, count in ((2, 768), (3, 384)):
        f = recorded[f"blocks.{l}.mlp.post"][:, 1:]
        every = details(world, "pairs", l, count)
        for n in range(0, count, 59):
            assert_maps(every[n], f[..., n % 96])
            [(head_layer, head, share)] = every[n]["heads"]
            assert (head_layer, head) == (l + 1 + n // 384, n // 96 % 4)
            assert share == pytest.approx(1, abs=0.01) and every[n]["without"] is None
            cosines = pcas @ pcas[names.index((l, n))]
            others = np.sort(np.abs(np.delete(cosines, names.index((l, n)))))[::-1][:8]
            assert_allclose([abs(cosine) for _, _, cosine in every[n]["nearest"]], others, atol=6e-3)
            for other, m, cosine in every[n]["nearest"]:
                assert cosine == pytest.approx(cosines[names.index((other, m))], abs=6e-3)


def test_the_settings_say_which_units(world, tmp_path):
    for name, units in (("mine", str(world.root / "mine.safetensors")), ("pairs", "pairs")):
        (tmp_path / "make_gallery.json").write_text((world.root / f"{name}.json").read_text())
        assert load_settings(tmp_path).unit_set == units
    found = json.loads((world.root / "pairs.json").read_text())
    del found["unit_set"], found["site"]  # of an earlier version
    (tmp_path / "make_gallery.json").write_text(json.dumps(found))
    assert load_settings(tmp_path).unit_set is None


@pytest.mark.parametrize("units, one", [("mine", "unit 3 of mine"), ("pairs", "pair 3: neuron 3 through")])
def test_the_notebooks_look_at_what_the_page_was_made_of(world, monkeypatch, units, one):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (world.out / "make_gallery.json").write_text((world.root / f"{units}.json").read_text())
    for name in ("visualize_neurons.ipynb", "concept_discovery.ipynb"):
        notebook = nbformat.read(ROOT / name, as_version=4)
        cell = notebook.cells[1]
        cell.source = cell.source.replace("demo/output/symbols", str(world.out)).replace(
            "NEURON = None", "NEURON = 3"
        )
        titles = "[axes.get_title() for axes in globals().get('panels', ())]"
        notebook.cells.append(nbformat.v4.new_code_cell(f"print(neurons.name(3), {titles})"))
        where = {"metadata": {"path": str(ROOT)}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
        outputs = [part for cell in notebook.cells for part in cell.get("outputs", ())]
        assert sum("image/png" in part.get("data", {}) for part in outputs) >= 3
        said = "".join(part.get("text", "") for part in outputs)
        word = "unit" if units == "mine" else "pair"
        assert name[0] == "v" or f"'texts that active {word}s write'" in said
        assert one in said and ("102 units of mine" if units == "mine" else "384 neuron-head pairs") in said


def explain(world, *flags, check=True):
    """Run explain_image.py on a held-out picture; return the stage, the picture, and the pages."""
    picture = min((world.photos / "val").rglob("*.JPEG"))
    output = world.root / f"explained{len(list(world.root.glob('explained*')))}"
    words = [picture, "--text", "a dog", "--against", "a cat", *world.model, "--dataset", "folder"]
    words += ["--input_dir", world.out, "--output_dir", output, "--num_workers", 0, "--top_k_pca", 4]
    words += ["--text_descriptions", "words", "--components", 2]
    done = run_stage_of_user("explain_image.py", *words, *flags, folder=world.root, check=check)
    return done, picture, sorted(output.glob("*"))


def test_a_decision_is_explained_by_units_that_are_truly_taken_away(world, tiny_model):
    done, picture, (html, path) = explain(world, "--units", world.root / "mine.safetensors")
    content = json.loads(path.read_text())
    [answer] = content["answers"]
    assert content["unit_set"] == world.mine.digest() and answer["one"] == "unit"
    assert "102 units of mine of layer 1" in html.read_text() and "layer/unit" in done.stdout
    assert not re.search(">[^<{]*neuron", html.read_text())
    clip = load_clip(tiny_model, "random", "cpu")
    with torch.inference_mode():
        vectors = normalize(clip.text.encode_text(clip.tokenizer(["a dog", "a cat"])), dim=-1)
        pixels = clip.transform(Image.open(picture).convert("RGB"))[None]
        with clip.vit.record("blocks.2.resid.pre") as cache:
            before = clip.vit(pixels)
        d = world.mine
        f = torch.relu(cache["blocks.2.resid.pre"] @ d.encoder.T + d.encoder_bias)
        change = torch.from_numpy(array(world, "1_mine_activations")) - f  # [1, T, U]

        def lost(units):
            more = change[..., units] @ d.decoder[units]
            with clip.vit.edit({"blocks.1.mlp.out": lambda x: x + more}):
                after = clip.vit(pixels)
            return float(100 * (normalize(before) - normalize(after)) @ (vectors[0] - vectors[1]))

        for item in (*answer["neurons"], *answer["against"]):
            assert item["deleted"] == pytest.approx(lost([item["neuron"]]), abs=2e-3)
            assert set(item["known"]) == {"writes", "fires_on"} and item["heads"]
        sign = -1 if answer["score"] < 0 else 1
        first = [item["neuron"] for item in answer["neurons"][:2]]
        row = answer["proof"]["delete"]["contribution"][1]
        assert row["count"] == 2 and sign * answer["neurons"][0]["contribution"] > 0
        assert row["score"] == pytest.approx(answer["score"] - lost(first), abs=2e-3)


def test_pairs_are_refused_by_name_where_they_would_be_taken_away(world):
    done, _, files = explain(world, "--units", "pairs", check=False)
    assert done.returncode == 1 and files == [] and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --units pairs: a neuron cannot be taken away for one head alone")


def test_the_index_of_texts_holds_any_number():
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((20, 5)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    effects = rng.standard_normal((20, 2**16 + 9)).astype(np.float32)
    effects[:, -5:] = unit  # the last ones are what the texts say
    index = Predicted(Judge(torch.from_numpy(unit), torch.eye(5)), effects).index()
    found = np.frombuffer(base64.b64decode(index["neurons"]), "<u4").reshape(5, index["count"])
    assert found[:, 0].tolist() == list(range(2**16 + 4, 2**16 + 9))


# in a browser


@pytest.fixture
def page(browser, world):
    browser_binaries()
    yield from checked_page(browser, world.out / "gallery_mine")


@pytest.fixture
def page_of_pairs(browser, world):
    browser_binaries()
    yield from checked_page(browser, world.out / "gallery_pairs")


def test_a_reader_sees_which_units_they_are_and_which_are_rare(page):
    assert "one of the units of mine, which write resid.post of layer 1" in page.find("main").text
    assert f"{RARE} of {U} units act on fewer than 20 training images" in page.find(".claim").text
    assert f"of {U - RARE} graded units" in page.find(".claim").text
    page.choose("acts")
    acts = received(page.folder, "1/layer")["acts"]
    assert page.neurons()[:16] == sorted(range(U), key=lambda n: (-acts[n], n))[:16]
    page.open(f"#1?q={U - 1}")
    card = page.find(".card").text
    assert f"Unit {U - 1}" in card and "acts on 0 training images" in card and "not graded" in card
    assert page.find("#about").text.startswith(f"tiny (random), {U} units of mine; ")
    page.open(f"#1/{U - 1}")
    assert page.title() == f"Layer 1, unit {U - 1}"
    assert "Not graded: it acts on 0 training images, so it has no direction" in page.find("main").text
    assert page.script("return document.querySelectorAll('section, button').length") == 0
    assert page.script("return document.querySelectorAll('table').length") == 0
    page.open("#1/0")
    assert page.script("return document.querySelectorAll('table').length") > 0
    assert "neuron" not in page.find("main").text.lower()


def test_a_page_of_a_rare_unit_shows_only_images_on_which_it_acts(page, world):
    y = array(world, "1_mine_4_projections")
    for n, count in enumerate(FEW[:-2], start=U - RARE):
        page.open(f"#1?q={n}")
        assert "false" not in page.find(".card").text
        page.open(f"#1/{n}")
        said = page.find("main").text
        assert f"Not graded: it acts on {count} training image{'s' if count > 1 else ''}, and fewer" in said
        assert "false" not in said and page.script("return document.querySelectorAll('table').length") == 0
        rests = min(y[:, n]) == np.sort(y[:, n])[7]  # the images on which it does not act have one effect
        shown = page.script(BESIDE_HEADINGS)
        assert ["train, negative effects", "P" if rests else "UL"] in shown
        assert ["train, positive effects", "UL"] in shown
        assert rests == ("on every image on which it does not act" in said)
    assert rests  # those of the unit that acts on one image


def test_a_pair_is_named_by_its_neuron_and_head_and_found_by_its_neuron(page_of_pairs):
    page = page_of_pairs
    page.open("#2/400")
    assert page.title() == "Layer 2, pair 400: neuron 16 through layer 4, head 0"
    page.open("#2?q=16&sort=number")
    assert page.neurons() == list(range(16, 768, 96))
    page.open("#3/383")
    assert page.title().endswith("neuron 95 through layer 4, head 3")
    page.open("#3/384")
    assert page.title() == "Not found"
