"""Make the paper's page on the embedded world: run `reproduce_paper.py all` with its small CLIP and pictures.

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
NOTE = (
    "This is the embedded world, drawn symbols and a CLIP of 6 layers: a rehearsal. "
    "The paper's numbers do not apply to it."
)


def command(out, items):
    """Return the words of the command."""
    world = out / "world"
    symbols = world / "symbols"
    words = ["reproduce_paper.py", *items, "--model", MODEL, "--pretrained", WEIGHTS]
    words += ["--output_dir", out / "paper", "--dataset", "folder", "--data_path", symbols]
    words += ["--class_names", symbols / "class_names.txt"]
    words += ["--batch_size", 64, "--mlp_layer", LAYERS[-1], "--mlp_layers", *ATTACK_LAYERS, "--note", NOTE]
    words += ["--text_descriptions", world / "words.txt", world / "atoms.txt"]
    words += ["--components", 32, "--counts", 1, 2, 4, 8, 16, 32]
    words += ["--drawn_neurons", 50, "--drawn_images", 200, "--top_neurons", TOP_NEURONS]
    words += ["--segmentation", world / "segmentation_single.mat"]
    words += ["--tasks", *(f"{class_1}:{class_0}" for class_0, class_1 in attack_pairs(world)[:TASKS])]
    words += ["--attack_texts", world / "grounds.txt", "--attack_components", layout.COMPONENTS]
    words += ["--pictures", layout.ATTACK["batch_size"]]
    for name in ("neurons_num", "overall_words", "results_per_generation", "cosim_similarity"):
        words += [f"--{name}", layout.ATTACK[name]]
    words += ["--text_model", "template", "--similarity_model", "clip"]
    words += ["--image_model", "demo.world:draw_description"]
    words += ["--image_options", json.dumps({"opacity": OPACITY})]
    return list(map(str, words))


def main():
    """Draw the world where it is missing, then run the command."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    help = "as for reproduce_paper.py; default: all"
    parser.add_argument("items", nargs="*", default=["all"], metavar="ITEM", help=help)
    help = "also where run_demo.py has drawn the world"
    parser.add_argument("--output_dir", type=Path, default=HERE / "output", help=help)
    args = parser.parse_args()
    out = args.output_dir.resolve()
    if not (out / "world" / "habits.json").is_file():
        code = run(["-m", "demo.make_world", "--output_dir", str(out / "world")])
        if code:
            sys.exit(code)
    run_here(command(out, args.items))


if __name__ == "__main__":
    main()
