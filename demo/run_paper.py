"""The paper's page on the embedded world: `reproduce_paper.py all`, with its small CLIP and its own pictures
and texts.

    python -m demo.run_paper [ITEM ...] [--output_dir demo/output]

Draws the world where it is missing. Writes DIR/paper/paper_.../paper.html, .md and .json. What needs another
model is left out.
"""

import argparse
import json
import sys
from pathlib import Path

from demo import layout
from demo.launch import run, run_here
from demo.layout import ATTACK_LAYERS, HERE, LAYERS, MODEL, OPACITY, TOP_NEURONS, WEIGHTS, attack_pairs

TASKS = 5  # pairs of classes, as many as in the paper
NOTE = "This is the embedded world, drawn symbols and a CLIP of 6 layers: a rehearsal. The paper's numbers do not apply to it."


def command(out, items):
    """The words of the command."""
    world = out / "world"
    words = [
        "reproduce_paper.py",
        *items,
        "--model",
        MODEL,
        "--pretrained",
        WEIGHTS,
        "--output_dir",
        out / "paper",
    ]
    words += [
        "--dataset",
        "folder",
        "--data_path",
        world / "symbols",
        "--class_names",
        world / "symbols" / "class_names.txt",
    ]
    words += ["--batch_size", 64, "--mlp_layer", LAYERS[-1], "--mlp_layers", *ATTACK_LAYERS, "--note", NOTE]
    words += ["--text_descriptions", world / "words.txt", "--components", 32, "--counts", 1, 2, 4, 8, 16, 32]
    words += ["--drawn_neurons", 50, "--drawn_images", 200, "--top_neurons", TOP_NEURONS]
    words += ["--segmentation", world / "segmentation_single.mat"]
    words += ["--tasks", *(f"{class_1}:{class_0}" for class_0, class_1 in attack_pairs(world)[:TASKS])]
    words += [
        "--attack_texts",
        world / "grounds.txt",
        "--attack_components",
        layout.COMPONENTS,
        "--pictures",
        layout.ATTACK["batch_size"],
    ]
    words += [part for name in ("neurons_num", "overall_words", "results_per_generation", "cosim_similarity")
              for part in (f"--{name}", layout.ATTACK[name])]  # fmt: skip
    words += [
        "--text_model",
        "template",
        "--similarity_model",
        "clip",
        "--image_model",
        "demo.world:draw_description",
    ]
    return [str(word) for word in [*words, "--image_options", json.dumps({"opacity": OPACITY})]]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "items", nargs="*", default=["all"], metavar="ITEM", help="as for reproduce_paper.py; default: all"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=HERE / "output", help="also where run_demo.py has drawn the world"
    )
    args = parser.parse_args()
    out = args.output_dir.resolve()
    if not (out / "world" / "habits.json").is_file() and (
        code := run(["-m", "demo.make_world", "--output_dir", str(out / "world")])
    ):
        sys.exit(code)
    run_here(command(out, args.items))


if __name__ == "__main__":
    main()
