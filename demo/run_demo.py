"""Run the whole method on the embedded world, in README order, through the command lines of the stages.

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
from demo.layout import ATTACK_LAYERS, COMPONENTS, HERE, LAYERS, NAMES, OPACITY, ROOT

SPLITS = {"symbols": ("train", "val", "val_broken"), "pairs": ("val",)}
TEXTS = {"symbols": ("words", "grounds", "atoms"), "pairs": ("words",)}


class Step(NamedTuple):
    """A Step is some commands of the demo.

    title: what it does.
    seconds: about how long it takes on one core.
    commands: a function that yields (result, command).
    """

    title: str
    seconds: int
    commands: Callable

    def missing(self):
        """Return the commands whose results are not there."""
        return [[str(word) for word in words] for result, words in self.commands() if not result.exists()]


def steps(out, pairs):
    """Return the steps of the demo in order; those in one list do not need each other.

    pairs: how many are in the table of attacks.
    """
    drawing = [(out / "world/segmentation_two.mat", ["-m", "demo.make_world", "--output_dir", out / "world"])]
    of_pairs = "pairs of a colour and a symbol"
    measuring = [(out / "results.json", ["-m", "demo.measure", "--output_dir", out])]
    return [
        [Step("draw the world, 8,000 pictures of known truth", 10, lambda: drawing)],
        [
            Step("all stages on symbols, 32 classes", 90, partial(stages, out, "symbols")),
            Step(f"all stages on {of_pairs}, 320 classes", 95, partial(stages, out, "pairs")),
        ],
        [
            Step("segmentation, five methods on two sets", 75, partial(segmentations, out)),
            Step(f"adversarial pictures of {pairs} pairs of classes", 60, partial(attacks, out, pairs)),
            Step("grade what neurons write and fire on, gallery of all neurons", 90, partial(looks, out)),
        ],
        [Step("compare with the truth, draw figures", 10, lambda: measuring)],
    ]


def stage(script, *flags):
    """Return the command of a stage script with the small CLIP, as words after `python`."""
    return [script, "--model", layout.MODEL, "--pretrained", layout.WEIGHTS, *flags]


def stages(out, tree):
    """Yield the commands from representations to descriptions."""
    path = partial(layout.results_of(out, tree).path, **NAMES)
    world = out / "world" / tree
    last = LAYERS[-1]
    where = ["--output_dir", out / tree]
    layers = ["--mlp_layer", *LAYERS, "--top_k_pca", NAMES["k"]]
    folder = ["--dataset", "folder", "--data_path", world]
    images = [*folder, "--batch_size", 64]
    for split in SPLITS[tree]:
        command = stage("compute_representations.py", *images, "--split", split, *where)
        yield path("representations", split=split), command
    names = ["--class_names", world / "class_names.txt"]
    yield path("classifier"), stage("compute_classifier_projection.py", *folder, *names, *where)
    full = ["--split", "train", *layers, *where, "--keep", "full"]  # measure.py looks at all effects
    yield path("outputs", layer=last), stage("compute_second_order_neuron_prs.py", *images, *full)
    command = stage("compute_pcas.py", "--dataset", "folder", *layers, *where)
    yield path("image_norms", layer=last), command
    command = stage("compute_ablations.py", *images, *layers, *where)
    yield path("ablations", split="val", layer=LAYERS), command
    for texts in TEXTS[tree]:
        file = out / "world" / f"{texts}.txt"
        command = stage("compute_text_set_projection.py", "--text_descriptions", file, *where)
        yield path("texts", texts=texts), command
        result = path("decomposition", texts=texts, layer=last)
        flags = [*images, *layers, "--text_descriptions", texts, "--components", COMPONENTS]
        if texts == "words":
            result = path("evaluation", texts=texts, layer=LAYERS)
            flags.append("--evaluate")
        yield result, stage("compute_sparse_decomposition.py", *flags, *where)


def segmentations(out):
    """Yield a command for each row of the segmentation tables.

    The sets show one symbol on a background, and two with the class of each in turn.
    """
    where = ["--input_dir", out / "symbols", "--output_dir", out / "segmentation"]
    reading = ["--batch_size", 64, "--num_workers", 0]
    for scenes in layout.SCENES:
        images = ["--data_path", out / f"world/segmentation_{scenes}.mat"]
        for segmenter in layout.SEGMENTERS:
            row = layout.segmentation_row(out, scenes, segmenter)
            flags = [*images, *row.flags(), *where, *reading]
            if segmenter == "positive":  # the one that the figures show
                flags.append("--save_img")
            command = stage("compute_segmentation.py", *flags)
            yield layout.segmentation_result(out, scenes, segmenter), command


def looks(out):
    """Yield the commands that grade descriptions, by the CLIP and by the truth, and that write the page."""
    path = partial(layout.results_of(out, "symbols").path, **NAMES)
    world = out / "world/symbols"
    flags = ["--dataset", "folder", "--data_path", world, "--batch_size", 64, "--num_workers", 0]
    flags += ["--mlp_layer", layout.GRADED, "--components", COMPONENTS, "--output_dir", out / "symbols"]
    flags += ["--top_k_pca", NAMES["k"]]
    truth = [world / f"words_{split}.npy" for split in ("train", "val")]
    yield truth[-1], ["-m", "demo.truth", "--world", out / "world"]
    graded = partial(path, "graded", split="val", layer=[layout.GRADED])
    texts = ["--text_descriptions", "words", "atoms"]
    yield graded(texts="atoms"), stage("evaluate_descriptions.py", *flags, *texts)
    judged = ["--text_descriptions", "words", "--truth", *truth]
    yield graded(texts="words", judge="_truth"), stage("evaluate_descriptions.py", *flags, *judged)
    page = ["--text_descriptions", "words", "--gallery", layout.gallery(out).parent]
    yield layout.gallery(out), stage("make_gallery.py", *flags, *page)


def attacks(out, pairs):
    """Yield the commands that draw class_1 with words of class_0, and the one for the table of many pairs.

    The words are of class_0's neurons, and random ones.
    """
    flags = ["--dataset", "folder", "--mlp_layers", *ATTACK_LAYERS, "--top_k_pca", NAMES["k"]]
    flags += ["--text_descriptions", layout.ATTACK_TEXTS]
    for name, value in layout.ATTACK.items():
        flags += [f"--{name}", value]
    flags += ["--text_model", "template", "--similarity_model", "clip"]
    flags += ["--image_model", "demo.world:draw_description"]
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
    """Run the commands of a step whose results are not there. Returns an exit code."""
    for words in step.missing():
        print(f"\n$ {readable('python', *words)}", flush=True)
        code = run(words)
        if code:
            return code
    return 0


def announce(groups):
    """Print what will run. groups: lists of steps that run together."""
    seconds = sum(max(step.seconds for step in group) for group in groups)
    print(f"This takes about {seconds} seconds on two CPU cores:")
    for group in groups:
        for step in group:
            more = "" if step is group[-1] else ", together with"
            print(f"{step.seconds:5} s  {step.title}{more}", flush=True)


def readable(*words):
    """Return a command as a user in the root folder would type it."""
    return shlex.join(word.removeprefix(f"{ROOT}/") for word in words)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "output")
    help = "pairs of classes in the table of attacks, at most 16"
    parser.add_argument("--attack_pairs", type=int, default=6, help=help)
    args = parser.parse_args()
    began = time.time()
    out = args.output_dir.resolve()
    new = not (out / "world/habits.json").exists()
    todo = []
    for group in steps(out, args.attack_pairs):
        if left := [step for step in group if new or step.missing()]:
            todo.append(left)
    if todo:
        announce(todo)
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
