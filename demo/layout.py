"""Say what the demo runs with, and where its results are.

Imports no model, so that run_demo.py can answer at once.
"""

import json
from pathlib import Path

from utils.data.segmentation_row import Row
from utils.runtime.results import Results

HERE = Path(__file__).parent
ROOT = HERE.parent
MODEL = str(HERE / "symbols-vit.json")
WEIGHTS = str(HERE / "symbols-vit.safetensors")
LAYERS = [0, 1, 2, 3, 4]  # the MLP layers of the small CLIP that have attention after them
GRADED = LAYERS[-1]  # the layer whose descriptions are graded; `make paper` grades all
COMPONENTS = 8  # texts that describe a neuron
NAMES = {"dataset": "folder", "k": 100, "components": COMPONENTS, "alpha": 1}  # in the names of all results

SCENES = {"single": LAYERS[1:], "two": LAYERS[3:]}  # segmentation sets, and layers whose neurons segment them
TOP_NEURONS = 50  # that segment an image
SEGMENTERS = {  # rows of the segmentation tables, and their settings that are not the default
    "positive": {"neuron_sign": "positive"},
    "both": {},
    "random": {"method": "random"},
    "attention": {"method": "attention"},
    "rollout": {"method": "rollout"},
}

OPACITY = 0.25  # of the symbols in adversarial pictures: pale, so that the rest of the picture counts
ATTACK_LAYERS = LAYERS[2:]
ATTACK_TEXTS = "grounds"  # a symbol's own names would come first, and are not to be used
ATTACK = {
    "neurons_num": 100,
    "overall_words": 3,
    "results_per_generation": 6,
    "batch_size": 17,  # 102 pictures
    "components": COMPONENTS,
    "cosim_similarity": 2,  # only words that name class_0 are dropped
}
ATTACKS = 2  # pairs of classes that are attacked by command line; attack_table.py takes more
ATTACK_SOURCES = ("second_order", "random_words")  # of their words
TABLE_SOURCES = ("second_order", "weighted", "random", "similar", "random_words", "planted")  # of the table


def results_of(out, tree):
    """Return the `Results` of one tree of class folders, symbols or pairs, or of the segmentations."""
    return Results(out / tree, MODEL, WEIGHTS)


def gallery(out):
    """Return the page of all neurons."""
    return out / "gallery/index.html"


def segmentation_row(out, scenes, segmenter):
    """Return the `Row` of one of SEGMENTERS on a set. In "two", the classes of the images are given."""
    classes = str(out / "world/segmentation_two_classes.npy") if scenes == "two" else Row.class_source
    return Row(
        layers=tuple(SCENES[scenes]),
        top_neurons=TOP_NEURONS,
        train_dataset=NAMES["dataset"],
        class_source=classes,
        top_k_pca=NAMES["k"],
        **SEGMENTERS[segmenter],
    )


def segmentation_result(out, scenes, segmenter):
    """Return the path of the scores of one of SEGMENTERS on a set."""
    row = segmentation_row(out, scenes, segmenter)
    return results_of(out, "segmentation").path("segmentation", file=f"segmentation_{scenes}", row=row.name)


def attack_pairs(world):
    """Return [(class_0 that is to be seen, class_1 that is drawn), ...].

    Symbols with a background habit are paired, by name, with the symbols without.
    """
    known = json.loads((world / "habits.json").read_text())
    symbols = sorted(known["symbols"])
    with_habit = [symbol for symbol in symbols if "background" in known["habits"].get(symbol, {})]
    without = [symbol for symbol in symbols if symbol not in with_habit]
    return list(zip(with_habit, without, strict=False))


def attack_result(out, class_0, class_1, source):
    """Return the path of the rates of one attack by command line."""
    return out / "adversarial" / f"{class_0}_{class_1}_{source}_seed0" / "results.json"
