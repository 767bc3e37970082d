"""The whole method on the embedded world, in README order, through the ordinary command lines of the stages.

    python -m demo.run_demo [--output_dir demo/output]

Draws the world, runs every stage on it with the small CLIP of this folder, compares the results with the
truth, and prints the tables. Says first what it will do. Prints each command as one would type it; skips one
whose result is there. Results: DIR/results.json, DIR/results.md, pictures in DIR/figures, a page of all
    neurons in DIR/gallery.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from demo import layout
from demo.launch import load_everything, run, run_together
from demo.layout import ATTACK_LAYERS, COMPONENTS, HERE, LAYERS, NAMES, OPACITY, ROOT, TOP_NEURONS

SPLITS = {"symbols": ("train", "val", "val_broken"), "pairs": ("val",)}
TEXTS = {"symbols": ("words", "grounds"), "pairs": ("words",)}


class Step(NamedTuple):
    """title: what it does. seconds: about how long it takes on one core. commands: () -> (result, command),
    ...
    """

    title: str
    seconds: int
    commands: Callable

    def missing(self):
        """The commands whose results are not there."""
        return [[str(word) for word in words] for result, words in self.commands() if not result.exists()]


def steps(out, pairs):
    """The steps of the demo in order; those in one list do not need each other. pairs: how many are in the
    table of attacks.
    """
    drawing = [(out / "world/segmentation_two.mat", ["-m", "demo.make_world", "--output_dir", out / "world"])]
    measuring = [(out / "results.json", ["-m", "demo.measure", "--output_dir", out])]
    return [
        [Step("draw the world, 8,000 pictures of known truth", 15, lambda: drawing)],
        [
            Step("all stages on symbols, 32 classes", 45, partial(stages, out, "symbols")),
            Step(
                "all stages on pairs of a colour and a symbol, 320 classes", 50, partial(stages, out, "pairs")
            ),
        ],
        [
            Step("segmentation, five methods on two sets", 50, partial(segmentations, out)),
            Step(f"adversarial pictures of {pairs} pairs of classes", 30, partial(attacks, out, pairs)),
            Step("grade what neurons write and fire on, gallery of all neurons", 60, partial(looks, out)),
        ],
        [Step("compare with the truth, draw figures", 25, lambda: measuring)],
    ]


def stage(script, *flags):
    """Arguments of a stage script with the small CLIP."""
    return [script, "--model", layout.MODEL, "--pretrained", layout.WEIGHTS, *flags]


def stages(out, tree):
    """From representations to descriptions."""
    path = partial(layout.results_of(out, tree).path, **NAMES)
    folder, where = ["--dataset", "folder", "--data_path", out / "world" / tree], ["--output_dir", out / tree]
    images, layers = [*folder, "--batch_size", 64], ["--mlp_layer", *LAYERS]
    for split in SPLITS[tree]:
        yield (
            path("representations", split=split),
            stage("compute_representations.py", *images, "--split", split, *where),
        )
    names = ["--class_names", out / "world" / tree / "class_names.txt"]
    yield path("classifier"), stage("compute_classifier_projection.py", *folder, *names, *where)
    full = ["--split", "train", *layers, *where, "--keep", "full"]  # measure.py looks at all effects
    yield path("outputs", layer=LAYERS[-1]), stage("compute_second_order_neuron_prs.py", *images, *full)
    yield (
        path("image_norms", layer=LAYERS[-1]),
        stage("compute_pcas.py", "--dataset", "folder", *layers, *where),
    )
    yield (
        path("ablations", split="val", layer=LAYERS),
        stage("compute_ablations.py", *images, *layers, *where),
    )
    for texts in TEXTS[tree]:
        file = out / "world" / f"{texts}.txt"
        yield (
            path("texts", texts=texts),
            stage("compute_text_set_projection.py", "--text_descriptions", file, *where),
        )
        flags = [*images, *layers, "--text_descriptions", texts, "--components", COMPONENTS]
        result = path("decomposition", texts=texts, layer=LAYERS[-1])
        if texts == "words":
            flags, result = [*flags, "--evaluate"], path("evaluation", texts=texts, layer=LAYERS)
        yield result, stage("compute_sparse_decomposition.py", *flags, *where)


def segmentations(out):
    """A row of each table of methods per command: one symbol on a background, and two with the class of each
    in turn.
    """
    read = ["--input_dir", out / "symbols", "--dataset", "folder", "--output_dir", out / "segmentation"]
    for scenes, layers in layout.SCENES.items():
        neurons = ["--mlp_layers", *layers, "--top_neurons", TOP_NEURONS]
        if scenes == "two":
            neurons += ["--class_source", out / "world/segmentation_two_classes.npy"]
        for row, (flags, _) in layout.SEGMENTERS.items():
            command = stage(
                "compute_segmentation.py", "--data_path", out / f"world/segmentation_{scenes}.mat", *neurons
            )
            more = [*flags, *read, "--batch_size", 64, "--num_workers", 0]
            yield layout.segmentation_result(out, scenes, row), [*command, *more]


def looks(out):
    """Descriptions graded, by the CLIP's similarities and by the truth; then the page of all neurons."""
    path, world = partial(layout.results_of(out, "symbols").path, **NAMES), out / "world/symbols"
    flags = [
        "--dataset",
        "folder",
        "--data_path",
        world,
        "--batch_size",
        64,
        "--num_workers",
        0,
        "--mlp_layer",
        *LAYERS,
    ]
    flags += ["--text_descriptions", "words", "--components", COMPONENTS, "--output_dir", out / "symbols"]
    truth = [world / f"words_{split}.npy" for split in ("train", "val")]
    yield truth[-1], ["-m", "demo.truth", "--world", out / "world"]
    for judge, more in {"": [], "_truth": ["--truth", *truth]}.items():
        result = path("graded", split="val", layer=LAYERS, texts="words", judge=judge)
        yield result, stage("evaluate_descriptions.py", *flags, *more)
    yield layout.gallery(out), stage("make_gallery.py", *flags, "--gallery", layout.gallery(out).parent)


def attacks(out, pairs):
    """Pictures of class_1 with words of class_0's neurons, and with random words; then the table of many
    pairs.
    """
    flags = [
        "--dataset",
        "folder",
        "--mlp_layers",
        *ATTACK_LAYERS,
        "--text_descriptions",
        layout.ATTACK_TEXTS,
    ]
    flags += [part for name, value in layout.ATTACK.items() for part in (f"--{name}", value)]
    flags += [
        "--text_model",
        "template",
        "--similarity_model",
        "clip",
        "--image_model",
        "demo.world:draw_description",
    ]
    flags += ["--image_options", json.dumps({"opacity": OPACITY})]
    flags += ["--input_dir", out / "symbols", "--dataset_path", out / "adversarial"]
    for class_0, class_1 in layout.attack_pairs(out / "world")[: layout.ATTACKS]:
        for source in layout.ATTACK_SOURCES:
            classes = ["--class_0", class_0, "--class_1", class_1, "--word_source", source]
            result = layout.attack_result(out, class_0, class_1, source)
            yield result, stage("generate_adversarial_images.py", *flags, *classes)
    table = ["--pairs", pairs, "--sources", *layout.TABLE_SOURCES, "--opacities", OPACITY]
    yield out / "attack_table.json", ["-m", "demo.attack_table", "--output_dir", out, *table]


def run_step(step):
    """Run the commands of a step whose results are not there; returns an exit code."""
    for words in step.missing():
        print(f"\n$ {readable('python', *words)}", flush=True)
        code = run(words)
        if code:
            return code
    return 0


def readable(*words):
    """A command as a user in the root folder would type it."""
    return shlex.join(word.removeprefix(f"{ROOT}/") for word in words)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=HERE / "output")
    parser.add_argument(
        "--attack_pairs", type=int, default=6, help="pairs of classes in the table of attacks, at most 16"
    )
    args = parser.parse_args()
    out, began = args.output_dir.resolve(), time.time()
    groups, new = steps(out, args.attack_pairs), not (out / "world/habits.json").exists()
    todo = [left for group in groups if (left := [step for step in group if new or step.missing()])]
    if todo:
        print(
            f"This takes about {sum(max(step.seconds for step in group) for group in todo)} seconds on two CPU cores:"
        )
        for step, more in ((step, step is not group[-1]) for group in todo for step in group):
            print(f"{step.seconds:5} s  {step.title}{', together with' if more else ''}", flush=True)
        load_everything()
    for group in todo:
        code = run_together(run_step, group)
        if code:
            sys.exit(code)
    print("\n" + (out / "results.md").read_text())
    print(f"{time.time() - began:.0f} seconds; pictures in {readable(str(out / 'figures'))}")
    print(f"all neurons on a page, open it in a browser: {layout.gallery(out).as_uri()}")


if __name__ == "__main__":
    main()
