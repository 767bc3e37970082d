"""The whole method on the embedded world, in README order, through the ordinary command lines of the stages.

    python demo/run_demo.py [--output_dir demo/output]

Draws the world, runs every stage on it with the small CLIP of this folder, compares the results with the truth, and prints one
table. Each command is printed; one whose result is there is not run again. Results: DIR/results.json, DIR/results.md, pictures
in DIR/figures.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
LAYERS = ["0", "1", "2", "3", "4"]  # the MLP layers of the small CLIP that have attention after them
CLIP = "symbols-vit_symbols-vit"  # model and weights in file names
COMPONENTS = 8  # texts that describe a neuron
OPACITY = 0.25  # of the symbols in adversarial pictures: pale, so that the rest of the picture counts
ATTACK_LAYERS = LAYERS[2:]
ATTACK_NUMBERS = {"neurons_num": 100, "overall_words": 3, "results_per_generation": 50, "images": 100}
ATTACK_TEXTS = "grounds"  # a symbol's own names would be found first, and are not to be used
ATTACK_NUMBERS |= {"components": COMPONENTS, "cosim_similarity": 2}  # 2: only words that name class_0 are dropped
ATTACKS = 2  # pairs of classes that are attacked by command line; attack_table.py takes more
TABLE_FLAGS = ["--sources", "second_order", "similar", "random", "planted", "--opacities", str(OPACITY)]


def commands(out, table_pairs):
    """(result, command) in README order; a command is run when its result is missing."""
    world = out / "world"
    python = [sys.executable]
    model = ["--model", HERE / "symbols-vit.json", "--pretrained", HERE / "symbols-vit.safetensors"]
    yield world / "words.txt", [*python, HERE / "make_world.py", "--output_dir", world]
    for tree in ("symbols", "pairs"):
        where = ["--output_dir", out / tree]
        folder = ["--dataset", "folder", "--data_path", world / tree]
        images = [*folder, "--batch_size", "64"]
        layers = ["--mlp_layer", *LAYERS]
        splits = ["train", "val", "val_broken"] if tree == "symbols" else ["val"]
        for split in splits:
            result = out / tree / f"folder_{split}_representations_{CLIP}.npy"
            yield result, [*python, "compute_representations.py", *model, *images, "--split", split, *where]
        names = ["--class_names", world / tree / "class_names.txt"]
        result = out / tree / f"folder_classifier_{CLIP}.npy"
        yield result, [*python, "compute_classifier_projection.py", *model, *folder, *names, *where]
        result = out / tree / f"folder_train_mlps_{CLIP}_4_outputs.npy"
        effects = [*python, "compute_second_order_neuron_prs.py", *model, *images, "--split", "train", *layers, *where]
        yield result, [*effects, "--keep", "full"]  # measure.py looks at all effects
        result = out / tree / f"folder_train_mlps_{CLIP}_4_100_explained.npy"
        yield result, [*python, "compute_pcas.py", *model, "--dataset", "folder", *layers, *where]
        result = out / tree / f"folder_val_ablations_{CLIP}_{'-'.join(LAYERS)}_100.json"
        yield result, [*python, "compute_ablations.py", *model, *images, *layers, *where]
        for texts in ["words", "grounds"] if tree == "symbols" else ["words"]:
            result = out / tree / f"{texts}_{CLIP}.npy"
            file = world / f"{texts}.txt"
            yield result, [*python, "compute_text_set_projection.py", *model, "--text_descriptions", file, *where]
            decompose = ["--text_descriptions", texts, "--components", COMPONENTS, *(["--evaluate"] if texts == "words" else [])]
            result = evaluation_result(out, tree) if texts == "words" else out / tree / decomposition_name(LAYERS[-1], texts)
            yield result, [*python, "compute_sparse_decomposition.py", *model, *images, *layers, *decompose, *where]
    yield from segmentations(out, world, model, python)
    yield from attacks(out, model, python)
    table = ["--output_dir", out, "--pairs", table_pairs, *TABLE_FLAGS]
    yield out / "attack_table.json", [*python, HERE / "attack_table.py", *table]
    yield out / "results.json", [*python, HERE / "measure.py", "--output_dir", out]


def decomposition_name(layer, texts):
    """A layer's descriptions, as compute_sparse_decomposition.py names them."""
    return f"folder_mlps_{CLIP}_{layer}_{texts}_decomposition_omp_1_{COMPONENTS}.npz"


def evaluation_result(out, tree):
    """The accuracies with effects rebuilt from the descriptions."""
    return out / tree / decomposition_name("-".join(LAYERS), "words").replace(".npz", "_evaluation.json")


def segmentations(out, world, model, python):
    """A row of each table of methods per command: one symbol on a background, and two with the class of each in turn."""
    read = ["--input_dir", out / "symbols", "--train_dataset", "folder", "--output_dir", out / "segmentation"]
    tables = {
        "single": ["--mlp_layers", *LAYERS[1:], "--top_neurons", "50"],
        "two": ["--mlp_layers", *LAYERS[3:], "--top_neurons", "50", "--class_source", world / "segmentation_two_classes.npy"],
    }
    for scenes, neurons in tables.items():
        for name, flags in {
            "positive": ["--neuron_sign", "positive", "--save_img"],
            "both": [],
            "random": ["--method", "random"],
            "attention": ["--method", "attention"],
            "rollout": ["--method", "rollout"],
        }.items():
            path = world / f"segmentation_{scenes}.mat"
            command = [*python, "compute_segmentation.py", *model, "--dataset_path", path, *neurons, *flags, *read]
            yield segmentation_result(out, scenes, name), [*command, "--batch_size", "64", "--num_workers", "0"]


def segmentation_result(out, scenes, name):
    """The scores' file of one row, as compute_segmentation.py names it."""
    layers, top = "-".join(LAYERS[1:] if scenes == "single" else LAYERS[3:]), 50
    source = "" if scenes == "single" else "_segmentation_two_classes"
    rows = {
        "positive": f"second_order_{layers}_{top}_positive{source}",
        "both": f"second_order_{layers}_{top}{source}",
        "random": f"random_{layers}_{top}",
        "attention": "attention",
        "rollout": "rollout",
    }
    return out / "segmentation" / f"segmentation_{scenes}_segmentation_{CLIP}_{rows[name]}.json"


def attacks(out, model, python):
    """Pictures of class_1 with words of class_0's neurons, and with random words."""
    for class_0, class_1 in attack_pairs(out / "world")[:ATTACKS]:
        for source in ("second_order", "random"):
            command = [*python, "generate_adversarial_images.py", *model, "--dataset", "folder", "--mlp_layers", *ATTACK_LAYERS]
            command += [part for name, value in ATTACK_NUMBERS.items() for part in (f"--{name}", value)]
            command += ["--text_descriptions", ATTACK_TEXTS, "--text_model", "template", "--similarity_model", "clip"]
            command += ["--image_model", "demo.world:draw_description", "--image_options", json.dumps({"opacity": OPACITY})]
            command += ["--class_0", class_0, "--class_1", class_1, "--word_source", source]
            command += ["--input_dir", out / "symbols", "--output_dir", out / "adversarial"]
            yield attack_result(out, class_0, class_1, source), command


def attack_pairs(world):
    """[(class_0 that is to be seen, class_1 that is drawn), ...]: the symbols with a background habit by name, each with the one
    at its place among the symbols without."""
    known = json.loads((world / "habits.json").read_text())
    with_habit = [symbol for symbol in sorted(known["symbols"]) if "background" in known["habits"].get(symbol, {})]
    without = [symbol for symbol in sorted(known["symbols"]) if symbol not in with_habit]
    return list(zip(with_habit, without, strict=False))


def attack_result(out, class_0, class_1, source):
    return out / "adversarial" / f"{class_0}_{class_1}_{source}_seed0" / "results.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "output")
    parser.add_argument("--attack_pairs", type=int, default=6, help="pairs of classes in the table of attacks, at most 16")
    args = parser.parse_args()
    out = args.output_dir
    began = time.time()
    for result, command in commands(out, args.attack_pairs):
        if result.exists():
            continue
        print("\n$ " + shlex.join(readable(part) for part in command), flush=True)
        code = subprocess.run([str(part) for part in command], cwd=ROOT).returncode
        if code:
            sys.exit(code)
    print("\n" + (out / "results.md").read_text())
    print(f"{time.time() - began:.0f} seconds; pictures in {readable(out / 'figures')}")


def readable(part):
    """A part of a command as a user in the root folder would type it."""
    text = "python" if part == sys.executable else str(part)
    return text.removeprefix(f"{ROOT}/")


if __name__ == "__main__":
    main()
