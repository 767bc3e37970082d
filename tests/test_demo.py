"""The main job on a smaller drawing of the world: its figures mean something, and the notebooks show them."""

import csv
import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import scipy.sparse
from nbclient import NotebookClient
from PIL import Image

from applications.attack.judging import rates
from demo import attack_table, layout, measure
from demo.world import SYMBOLS, plant_habits, text_pool
from tests.browser import VISIT_ALL, checked_page
from tests.conftest import ROOT, run_script

NOTEBOOKS = ["visualize_neurons.ipynb", "concept_discovery.ipynb"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The output directory of the demo, and what the second call printed."""
    out = tmp_path_factory.mktemp("demo")
    small = [
        "--train_per_class",
        24,
        "--val_per_class",
        10,
        "--pairs_per_class",
        2,
        "--segmentation_scenes",
        20,
    ]
    run_script("-m", "demo.make_world", "--output_dir", out / "world", *small)
    first = run_script("-m", "demo.run_demo", "--output_dir", out, *["--attack_pairs", 2])
    second = run_script("-m", "demo.run_demo", "--output_dir", out)
    return out, first.stdout, second.stdout


@pytest.fixture(scope="module")
def results(demo):
    return json.loads((demo[0] / "results.json").read_text())


def test_the_steps_are_announced_before_they_run(demo):
    announced, _, ran = demo[1].partition("\n$ python ")
    assert announced.startswith("This takes about ") and "all stages on symbols" in announced
    assert "draw the world" not in announced and "make_world" not in ran  # it is there


def test_a_command_leaves_the_same_bytes_as_when_it_is_typed(demo, tmp_path):
    line = next(
        line
        for line in demo[1].splitlines()
        if "compute_representations.py" in line and "--split val " in line
    )
    script, *flags = shlex.split(line)[2:]
    run_script(script, *flags, "--output_dir", tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (demo[0] / "symbols" / path.name).read_bytes()
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_the_table_is_printed_and_a_second_call_runs_nothing(demo):
    out, first, second = demo
    assert "$ python compute_pcas.py" in first and "$" not in second
    table = (out / "results.md").read_text()
    assert table in first and table in second
    pictures = {path.name for path in (out / "figures").glob("*.png")}
    assert {"ablations_pairs.png", "segmentation.png", "concepts.png", "adversarial.png"} < pictures
    assert len([name for name in pictures if name.startswith("neuron_4_")]) == 8


def test_the_clip_knows_the_world(results):
    accuracy = {what: value for what, (value, chance) in results["zero_shot"].items()}
    assert accuracy["symbol, one symbol"] >= 95  # a few points below what the demo prints on more pictures
    assert accuracy["symbol, habits broken"] >= 85
    assert accuracy["background colour"] >= 98
    assert accuracy["colour and symbol of the larger of two"] >= 90


def test_ablating_the_last_layer_costs_accuracy_and_the_first_component_wins_most_of_it_back(demo, results):
    table, summary = results["ablations_pairs"], results["won_back"]
    row = table["4"]
    assert row["baseline"] - row["without all effects"] >= 15
    for layer in ("0", "4"):  # those whose ablation costs much
        row = table[layer]
        loss, regained = (
            row[name] - row["without all effects"] for name in ("baseline", "reconstructed from PC")
        )
        assert regained >= 0.7 * loss
        assert summary[layer]["loss"][0] == pytest.approx(loss)
        assert summary[layer]["won back"] == pytest.approx(100 * regained / loss)
    assert all(
        table[layer]["reconstructed from PC"] >= table[layer]["baseline"] - 3 for layer in ("2", "3", "4")
    )
    predictions = np.load(next((demo[0] / "pairs").glob("*_ablations_*_predictions.npy")))
    right = 100.0 * (
        predictions == np.repeat(np.arange(320), 2)[:, None, None]
    )  # two pictures of each class, in its order
    for i, row in enumerate(summary.values()):
        for name, other in (("loss", 1), ("short", 4)):
            difference = right[:, i, 0] - right[:, i, other]
            assert row[name] == pytest.approx((difference.mean(), difference.std() / len(difference) ** 0.5))
        loss = right[:, i, 0] - right[:, i, 1]
        assert (row["won back"] is None) == (loss.mean() <= 2 * loss.std() / len(loss) ** 0.5)


def test_descriptions_are_true_more_often_than_random_texts(results):
    share, chance, ratio = results["descriptions"]["4"]
    assert ratio >= 4 and share > chance


def test_discovered_words_are_true_more_often_than_random_texts_and_less_than_the_nearest(results):
    found = results["concepts"]
    assert list(found) == ["nearest", "fires_on", "writes"] and list(found["nearest"]) == [""]
    assert list(found["writes"]) == ["0", "1", "2", "3", "4", "2 to 4 together"]
    assert "4" in found["fires_on"] and set(found["fires_on"]) <= set(found["writes"])
    for rows in found.values():
        for share, chance, ratio in rows.values():
            assert 0 <= share <= 1 and 0.005 < chance < 0.05 and ratio == pytest.approx(share / chance)
    assert found["writes"]["4"][2] >= 3
    # on the whole world 0.86, 0.42 and 0.19
    assert found["nearest"][""][0] >= 0.8 and 0.25 <= found["fires_on"]["4"][0] <= 0.6
    assert found["fires_on"]["4"][0] >= 1.5 * found["writes"]["4"][0]


def test_the_table_of_discovered_words_leaves_out_what_is_not_described():
    shares = {"nearest": {"": (0.9, 0.01, 90)}, "fires_on": {4: (0.4, 0.01, 40)}}
    lines = measure.table_of_concepts(shares | {"writes": {4: (0.2, 0.01, 20), "2 to 4 together": (0, 1, 0)}})
    assert lines[2:] == [
        "| nearest to the representation, no neurons | 0.900 | 0.010 | 90.0 |",
        "| active neurons fire on, layer 4 | 0.400 | 0.010 | 40.0 |",
        "| active neurons write, layer 4 | 0.200 | 0.010 | 20.0 |",
        "| active neurons write, layers 2 to 4 together | 0.000 | 1.000 | 0.0 |",
    ]


def test_habits_are_ranked_among_all_of_their_kind_with_chance_beside(results):
    assert results["habits"]["grounds"]["texture and background"]["auc"] >= 0.9
    habits = results["habits"]["words"]
    expected = {
        "background": (16, 10),
        "texture": (16, 5),
        "texture and background": (16, 50),
        "companion": (6, 31),
    }
    assert {kind: (len(row["symbols"]), row["of"]) for kind, row in habits.items()} == expected
    for row in habits.values():
        ranks = [rank for _, rank in row["symbols"].values()]
        assert all(1 <= rank <= row["of"] for rank in ranks)
        below = np.mean(
            [(row["of"] - rank) / (row["of"] - 1) for rank in ranks]
        )  # share of the others that rank below
        assert row["auc"] == pytest.approx(below) and row["mean_rank"] == pytest.approx(np.mean(ranks))
        assert row["chance_rank"] == (row["of"] + 1) / 2 and 0 <= row["auc_without"] <= 1
    assert (
        habits["background"]["symbols"]["cat"][0] == "green"
        and habits["companion"]["symbols"]["anchor"][0] == "castle"
    )


@pytest.mark.parametrize("sign, auc", [(1, 1.0), (-1, 0.0)])
def test_the_rank_of_a_habit_that_the_neurons_words_name(tmp_path, sign, auc):
    habits, texts = plant_habits(), text_pool()
    (tmp_path / "habits.json").write_text(json.dumps({"habits": habits, "symbols": SYMBOLS}))
    vectors, names = np.zeros((len(texts), len(SYMBOLS))), np.zeros((len(SYMBOLS), len(texts)))
    for i, symbol in enumerate(SYMBOLS):  # a neuron for each symbol, whose one text is the symbol's habit
        vectors[texts.index(symbol), i] = 1
        habit = habits.get(symbol)
        if habit:
            companion = habit.get("companion")
            said = (
                f"with a {companion}" if companion else f"{habit['texture']} {habit['background']} background"
            )
            names[i, texts.index(said)] = sign
    files = {"pca": np.eye(len(SYMBOLS))}
    results = SimpleNamespace(
        world=tmp_path,
        texts=texts,
        text_vectors=vectors,
        statistic=lambda layer, kind: files[kind],
        decomposition=lambda layer: scipy.sparse.csc_matrix(names),
    )
    rows = measure.habits(results, results, layers=("4",))
    assert {kind: row["auc"] for kind, row in rows.items()} == dict.fromkeys(rows, auc)
    assert all(sign * (row["auc"] - row["auc_without"]) > 0.3 for row in rows.values())


def test_the_attack_table_has_its_baselines(demo, results):
    table = results["attack_table"]
    habits = json.loads((demo[0] / "world/habits.json").read_text())["habits"]
    assert len(table["pairs"]) == 2 and table["seeds"] == 3 and table["images"] == 102
    assert all("background" in habits[pair["class_0"]] for pair in table["pairs"])
    assert not any("background" in habits.get(pair["class_1"], {}) for pair in table["pairs"])
    for found in [*table["pairs"], *table["overall"].values()]:
        assert all(0 <= found[source][0] <= 100 for source in layout.TABLE_SOURCES)
    taken = {source: mean for source, (mean, _) in table["overall"]["argmax_rate"].items()}
    assert (
        taken["planted"] > taken["second_order"] >= 3 * taken["random_words"] and taken["random_words"] <= 5
    )
    assert "similar %" in (demo[0] / "results.md").read_text()


@pytest.mark.parametrize("source", layout.ATTACK_SOURCES)
def test_the_attack_table_draws_and_classifies_as_the_command_line_does(demo, source):
    out = demo[0]
    attacks = attack_table.Attacks(out)
    class_0, class_1 = attack_table.attack_pairs(out / "world")[0]
    folder = out / "adversarial" / f"{class_0}_{class_1}_{source}_seed0"
    words = attacks.words(source, class_0, class_1, seed=0)
    assert words == [entry["word"] for entry in json.loads((folder / "words.json").read_text())["words"]]
    plan = attacks.plan(words, class_0, class_1, seed=0, images=102)
    drawn = json.loads((folder / "images.json").read_text())
    assert plan == [(item["description"], item["seed"]) for item in drawn["images"]]
    pictures = attacks.pictures(plan, drawn["settings"]["image_options"]["opacity"])
    for picture, item in zip(pictures[::10], drawn["images"][::10], strict=True):
        difference = np.asarray(picture, int) - np.asarray(Image.open(folder / item["file"]), int)
        assert abs(difference).max() <= 1 and (difference != 0).mean() < 0.001  # rounding to 8 bits
    columns = attacks.judge(pictures, class_0, class_1)
    with open(folder / "files.csv") as file:
        rows = list(csv.DictReader(file))
    assert sum(name == row["predicted"] for name, row in zip(columns["predicted"], rows, strict=True)) >= 100
    found = json.loads((folder / "results.json").read_text())
    for name, rate in rates(columns, class_1).items():
        assert rate == pytest.approx(found[name], abs=2)


def test_the_attack_study_finds_what_neurons_fire_on_first(demo):
    """A second run, and the table by the sources of the same name, use what is there."""
    out = demo[0]
    few = ["--output_dir", out, "--pairs", 1, "--seeds", 1, "--images", 6]
    said = [run_script("-m", "demo.attack_study", *few).stdout for _ in range(2)]
    assert "--mlp_layer 2 3 4 --text_descriptions grounds" in said[0].splitlines()[0]
    assert "evaluate_descriptions.py" not in said[1] and said[0].endswith(
        said[1][said[1].index("| words (") :]
    )
    rows = json.loads((out / "attack_study.json").read_text())
    attacks = attack_table.Attacks(out)
    [pair] = attack_table.attack_pairs(out / "world")[:1]
    v = attacks.difference(*pair)
    mined = {}
    for source, which in (("fires_on", "100 neurons"), ("random_fires_on", "100 random neurons")):
        assert 0 <= rows[f"{which}, texts that they fire on"]["argmax_rate"][0] <= 100
        drawn = 0 if source == "random_fires_on" else None
        mined[source] = attacks.mine(source, v, 0)
        assert mined[source] == attacks.fired_on.mine(v, 100, drawn)["words"]
    assert mined["fires_on"] != mined["random_fires_on"] != attacks.mine("random", v, 0)


def test_the_attack_table_sums_up_its_rows():
    found = {
        ("a", "second_order"): (6, 9),
        ("a", "random"): (1, 3),
        ("b", "second_order"): (0, 0),
        ("b", "random"): (1, 1),
    }
    rows = [
        {
            "class_0": name,
            "class_1": "c",
            "source": source,
            "seed": seed,
            "opacity": opacity,
            "argmax_rate": rate,
            "binary_rate": 2 * rate,
            "class_1_rate": 50,
        }
        for (name, source), of_seeds in found.items()
        for opacity, factor in ((0.3, 1), (0.5, 0))
        for seed, rate in enumerate(factor * np.array(of_seeds))
    ]
    content = {"rows": rows, "sources": ["second_order", "random"], "opacity": 0.3, "opacities": [0.3, 0.5]}
    content |= {
        "images": 100,
        "seeds": 2,
        "pairs": [["a", "c", "striped red background"], ["b", "c", "noisy blue background"]],
    }
    lines = attack_table.markdown(attack_table.summary(content))
    assert lines[2] == "| c, a | striped red background | 7.5 ± 2.1 | 2.0 ± 1.4 |"
    assert lines[3] == "| c, b | noisy blue background | 0.0 ± 0.0 | 1.0 ± 0.0 |"
    assert lines[4] == "| all 2 pairs: taken for class_0 | | 3.8 ± 1.1 | 1.5 ± 0.7 |"
    assert lines[5] == "| all 2 pairs: nearer to class_0 | | 7.5 ± 2.1 | 3.0 ± 1.4 |"
    assert lines[8].endswith("by number of pairs: second-order 1, random 1.")
    assert "| 0.5 | 0.0 ± 0.0 | 0.0 ± 0.0 |" in lines and "| 0.5 | 50.0 ± 0.0 | 50.0 ± 0.0 |" in lines


def test_both_sides_of_descriptions_are_graded_beside_noise(results):
    """Bars for layer 4 on the whole world; this one is smaller, so a little less is asked for."""
    similarity, truth = (
        results["grades"][name]["neurons"] for name in ("words", "words, judged by the truth")
    )
    assert similarity["fires_on"]["pearson"]["mean"] >= 0.55 and truth["fires_on"]["pearson"]["mean"] >= 0.6
    assert similarity["writes"]["pearson"]["mean"] >= 0.1 and truth["writes"]["pearson"]["mean"] >= 0.05
    for judged in (similarity, truth):
        assert all(abs(judged[f"null_{side}"]["pearson"]["mean"]) < 0.03 for side in ("writes", "fires_on"))
        assert judged["fires_on"]["pearson"]["mean"] > judged["one_fired_on"]["pearson"]["mean"] + 0.1
    assert similarity["rotated_fires_on"]["auprc"]["mean"] < similarity["fires_on"]["auprc"]["mean"] - 0.1
    atoms = results["grades"]["atoms"]["over_noise"]
    assert atoms["fires_on"]["pearson"]["better"][0] >= 0.5 and atoms["writes"]["share"]["better"][2] >= 0.5


@pytest.fixture
def gallery(browser, demo):
    """The page of all neurons in a browser."""
    yield from checked_page(browser, demo[0] / "gallery")


def test_the_address_of_every_neuron_of_the_gallery_opens(gallery):
    addresses = [f"#4/{n}" for n in range(512)]
    titles = gallery.driver.execute_async_script(VISIT_ALL, addresses)
    assert titles == [f"Layer 4, neuron {n}" for n in range(512)]


def test_the_search_finds_the_neurons_of_planted_habits(demo, gallery):
    """The neuron of a habit is the one whose effect on held-out pictures goes most with the truth about
    it.
    """
    truth = [json.loads(line) for line in (demo[0] / "world/symbols/val.jsonl").read_text().splitlines()]
    effects = np.load(next((demo[0] / "symbols").glob("folder_val_mlps_*_4_100_projections.npy")))
    effects = (effects - effects.mean(axis=0)) / effects.std(axis=0)
    found = {}
    for habit in plant_habits().values():
        if "background" in habit:
            there = np.array(
                [(p["texture"], p["background"]) == (habit["texture"], habit["background"]) for p in truth],
                float,
            )
            best = int(((there - there.mean()) @ effects).argmax())
            query = f"{habit['texture']} {habit['background']} background"
            gallery.open("#4")
            gallery.type(query)
            found[query] = best in gallery.neurons()[:5]
    assert len(found) == 16 and sum(found.values()) >= 12, found


def run_notebook(name, results):
    """Run a notebook on a folder of results; return it, with its outputs."""
    notebook = nbformat.read(ROOT / name, as_version=4)
    parameters = notebook.cells[1]
    parameters.source = parameters.source.replace("demo/output/symbols", str(results))  # one line
    where = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    return notebook


def test_the_concepts_of_a_notebook_do_without_what_neurons_fire_on(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for path in (demo[0] / "symbols").iterdir():
        if not re.search("fires_on|projections|grades", path.name):
            (tmp_path / path.name).symlink_to(path)
    notebook = run_notebook("concept_discovery.ipynb", tmp_path)
    outputs = [part for cell in notebook.cells for part in cell.get("outputs", ())]
    said = "".join(part["text"] for part in outputs if part.get("name") == "stdout")
    assert "make it with: python evaluate_descriptions.py --dataset folder --data_path" in said
    assert f"--output_dir {tmp_path}" in said and "what each writes" in said
    assert sum("image/png" in part.get("data", {}) for part in outputs) >= 3


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_on_the_worlds_output_and_every_plotting_cell_shows_a_picture(
    demo, name, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = run_notebook(name, demo[0] / "symbols")
    plotting = [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and re.search(r"plt\.show|\.card\(", cell.source)
    ]
    assert len(plotting) >= 3
    for cell in plotting:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_stored_notebook_has_its_pictures_and_no_path_of_a_machine(name):
    text = Path(name).read_text()
    notebook = nbformat.reads(text, as_version=4)
    assert text.count('"image/png"') >= 3
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    home = os.path.expanduser("~")
    assert str(ROOT) + "/" not in text and (home == "/" or home + "/" not in text)


def test_the_truth_of_texts_is_what_a_person_would_say():
    anchor = {"symbol": "anchor", "colour": "red", "companion": "star", "companion_colour": "blue"}
    picture = anchor | {"background": "green", "texture": "striped"}
    alone = picture | {"companion": None, "companion_colour": None}
    truth = {
        "anchor": (1, 1),
        "star": (1, 0),
        "red anchor": (1, 1),
        "blue anchor": (0, 0),
        "blue star": (1, 0),
        "red": (1, 1),
        "blue": (1, 0),
        "green": (1, 1),
        "green background": (1, 1),
        "red background": (0, 0),
        "striped": (1, 1),
        "noisy background": (0, 0),
        "an anchor on a green background": (1, 1),
        "a heart on a green background": (0, 0),
    }
    table = measure.true_of(list(truth), [picture, alone])
    assert np.array_equal(table, np.array(list(truth.values()), dtype=bool))
