"""Every stage and notebook on the world's second checkpoint, which pools by attention: figures that mean
something.
"""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT, run_script
from tests.launcher import run_stage_of_user
from utils.ablation import ABLATIONS

MODEL = ["--model", "demo/symbols-pool.json", "--pretrained", "demo/symbols-pool.safetensors"]
K = ["--top_k_pca", 100]  # as in the notebooks, of fewer images than this is a tenth of
LAYERS = [*K, "--mlp_layer", 4, 5]  # the last one, too: the pooling attention comes after it
OPACITY = json.dumps({"opacity": 0.25})


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder with the world, and what every stage leaves."""
    out = tmp_path_factory.mktemp("pool")
    small = [
        "--train_per_class",
        24,
        "--val_per_class",
        10,
        "--pairs_per_class",
        1,
        "--segmentation_scenes",
        40,
    ]
    run_script("-m", "demo.make_world", "--output_dir", out / "world", *small)
    world, where = out / "world", ["--output_dir", out / "results"]
    names = ["--dataset", "folder", "--data_path", world / "symbols"]
    data = [*names, "--batch_size", 64, "--num_workers", 0]

    def described(texts):
        return ["--text_descriptions", texts, "--components", 8]

    masks = [
        "--data_path",
        world / "segmentation_single.mat",
        "--mlp_layers",
        3,
        4,
        5,
        "--top_neurons",
        50,
        "--num_workers",
        0,
    ]
    masks += ["--dataset", "folder", "--batch_size", 40, *K]
    attack = [
        "--dataset",
        "folder",
        "--mlp_layers",
        4,
        5,
        *described("grounds"),
        "--image_model",
        "demo.world:draw_description",
    ]
    attack += [
        "--image_options",
        OPACITY,
        "--text_model",
        "template",
        "--similarity_model",
        "clip",
        "--cosim_similarity",
        2,
    ]
    attack += [
        *K,
        "--overall_words",
        3,
        "--results_per_generation",
        6,
        "--batch_size",
        17,
        "--neurons_num",
        100,
    ]
    attack += ["--class_0", "cat", "--class_1", "anchor", "--dataset_path", out / "adversarial"]
    for script, *flags in (
        ["compute_representations.py", *data, "--split", "val"],
        ["compute_classifier_projection.py", *names, "--class_names", world / "symbols/class_names.txt"],
        [
            "compute_second_order_neuron_prs.py",
            *data,
            "--split",
            "train",
            "--mlp_layer",
            3,
            4,
            5,
            "--keep",
            "top",
            *K,
        ],
        ["compute_pcas.py", "--dataset", "folder", "--mlp_layer", 3, 4, 5, *K],
        ["compute_ablations.py", *data, *LAYERS],
        ["compute_text_set_projection.py", "--text_descriptions", world / "words.txt"],
        ["compute_text_set_projection.py", "--text_descriptions", world / "grounds.txt"],
        ["compute_sparse_decomposition.py", *data, *LAYERS, *described("words"), "--evaluate"],
        ["compute_sparse_decomposition.py", *data, *LAYERS, *described("grounds")],
        ["evaluate_descriptions.py", *data, *LAYERS, *described("words")],
        ["make_gallery.py", *data, *LAYERS, *described("words")],
        ["compute_segmentation.py", *masks, "--neuron_sign", "positive"],
        ["compute_segmentation.py", *masks, "--method", "random"],
        ["generate_adversarial_images.py", *attack],
        ["generate_adversarial_images.py", *attack, "--word_source", "random_words"],
    ):
        run_stage_of_user(script, *MODEL, *where, *flags, folder=out)
    return out


def result(out, pattern):
    """One json of the stages."""
    [path] = (path for path in (out / "results").glob(pattern) if not path.name.endswith(".meta.json"))
    return json.loads(path.read_text())


def test_the_clip_knows_the_world_and_one_direction_keeps_what_ablation_loses(out):
    for layer, table in result(out, "*_ablations_*.json")["accuracy"].items():
        baseline, without, _, rebuilt = (
            table[name] for name in ("baseline", "without all effects", ABLATIONS[2], "reconstructed from PC")
        )
        assert baseline >= 92
        assert rebuilt >= baseline - 3, layer
    assert table["baseline"] - without >= 4  # of the last layer


def test_descriptions_are_graded(out):
    for table in result(out, "*_summary.json")["neurons"].values():
        means = {row: measured["pearson_without"]["mean"] for row, measured in table.items()}
        assert means["fires_on"] >= 0.5 and means["fires_on"] >= means["one_fired_on"] + 0.1
        assert means["writes"] >= 0.05 and all(
            abs(means[f"null_{side}"]) < 0.04 for side in ("writes", "fires_on")
        )


def test_neurons_segment_better_than_random_ones(out):
    ours, random = (
        result(out, f"*_{name}_3-4-5_50*.json")["scores"]["mIoU"] for name in ("second_order", "random")
    )
    assert ours >= random + 8


def test_words_of_neurons_fool_the_clip_more_often_than_random_words(out):
    rates = []
    for source in ("second_order", "random_words"):
        rates.append(
            json.loads((out / f"adversarial/cat_anchor_{source}_seed0/results.json").read_text())[
                "binary_rate"
            ]
        )
    assert rates[0] >= rates[1] + 10


def test_the_gallery_has_the_heads_of_the_pooling_attention(out):
    text = (out / "results/gallery/data/5/neurons_0.js").read_text()
    details = json.loads(text[text.index(",") + 1 : text.rindex(")")])["neurons"]
    for detail in details:
        assert {layer for layer, _, _ in detail["heads"]} == {-1}  # nothing else comes after the last MLP
        assert sum(share for _, _, share in detail["heads"]) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ["visualize_neurons.ipynb", "concept_discovery.ipynb"])
def test_a_notebook_runs(out, name, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / name, as_version=4)
    source = notebook.cells[1].source
    notebook.cells[1].source = source.replace("demo/output/symbols", str(out / "results"))
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    assert (
        sum(
            "image/png" in part.get("data", {}) for cell in notebook.cells for part in cell.get("outputs", ())
        )
        >= 3
    )


def test_the_checkpoint_is_small():
    assert Path(ROOT / "demo/symbols-pool.safetensors").stat().st_size <= 4e6
