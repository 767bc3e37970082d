"""What the demo runs with, and where its results are. Needs no torch, so that run_demo.py can answer at
once.
"""

import json
from pathlib import Path

from utils.runtime.results import Results

HERE = Path(__file__).parent
ROOT = HERE.parent
MODEL, WEIGHTS = str(HERE / "symbols-vit.json"), str(HERE / "symbols-vit.safetensors")
LAYERS = [0, 1, 2, 3, 4]  # the MLP layers of the small CLIP that have attention after them
COMPONENTS = 8  # texts that describe a neuron
NAMES = {"dataset": "folder", "k": 100, "components": COMPONENTS, "alpha": 1}  # in the names of all results

SCENES = {
    "single": LAYERS[1:],
    "two": LAYERS[3:],
}  # the segmentation sets, and the layers whose neurons segment them
TOP_NEURONS = 50  # that segment an image
SEGMENTERS = {  # rows of the segmentation tables: (flags, what the results are called)
    "positive": (["--neuron_sign", "positive", "--save_img"], "second_order_{neurons}_positive{classes}"),
    "both": ([], "second_order_{neurons}{classes}"),
    "random": (["--method", "random"], "random_{neurons}"),
    "attention": (["--method", "attention"], "attention"),
    "rollout": (["--method", "rollout"], "rollout"),
}

OPACITY = 0.25  # of the symbols in adversarial pictures: pale, so that the rest of the picture counts
ATTACK_LAYERS = LAYERS[2:]
ATTACK_TEXTS = "grounds"  # a symbol's own names would come first, and are not to be used
ATTACK = {
    "neurons_num": 100,
    "overall_words": 3,
    "results_per_generation": 6,
    "batch_size": 17,
}  # 102 pictures
ATTACK |= {"components": COMPONENTS, "cosim_similarity": 2}  # 2: only words that name class_0 are dropped
ATTACKS = 2  # pairs of classes that are attacked by command line; attack_table.py takes more
ATTACK_SOURCES = ("second_order", "random_words")  # of their words
TABLE_SOURCES = ("second_order", "weighted", "random", "similar", "random_words", "planted")  # of the table


def results_of(out, tree):
    """`Results` of one tree of class folders, symbols or pairs."""
    return Results(out / tree, MODEL, WEIGHTS)


def gallery(out):
    """The page of all neurons."""
    return out / "gallery/index.html"


def segmentation_result(out, scenes, row):
    """The scores of one row of a segmentation table. In "two", the classes of the images are given."""
    neurons = f"{'-'.join(map(str, SCENES[scenes]))}_{TOP_NEURONS}"
    classes = "_segmentation_two_classes" if scenes == "two" else ""
    name = SEGMENTERS[row][1].format(neurons=neurons, classes=classes)
    return results_of(out, "segmentation").path("segmentation", file=f"segmentation_{scenes}", row=name)


def attack_pairs(world):
    """[(class_0 that is to be seen, class_1 that is drawn), ...]: the symbols with a background habit by
    name, each with the one at its place among the symbols without."""
    known = json.loads((world / "habits.json").read_text())
    with_habit = [
        symbol for symbol in sorted(known["symbols"]) if "background" in known["habits"].get(symbol, {})
    ]
    without = [symbol for symbol in sorted(known["symbols"]) if symbol not in with_habit]
    return list(zip(with_habit, without, strict=False))


def attack_result(out, class_0, class_1, source):
    """The rates of one attack by command line."""
    return out / "adversarial" / f"{class_0}_{class_1}_{source}_seed0" / "results.json"
