"""The whole method on the embedded world, in README order, through the ordinary command lines of the stages.

    python demo/run_demo.py [--output_dir demo/output]

Draws the world, runs every stage on it with the small CLIP of this folder, compares the results with the truth, and prints one
table. Each command is printed; one whose result is there is not run again. Results: DIR/results.json, DIR/results.md, pictures
in DIR/figures.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
LAYERS = ["0", "1", "2", "3", "4"]  # the MLP layers of the small CLIP that have attention after them
CLIP = "symbols-vit_symbols-vit"  # model and weights in file names
COMPONENTS = 32  # texts per neuron
OPACITY = 0.3  # of the symbols in adversarial pictures: pale, so that the rest of the picture counts
ATTACKS = [("heart", "pawn"), ("gear", "sun")]  # class_0 that is to be seen, class_1 that is drawn
ATTACK_FLAGS = ["--mlp_layers", *LAYERS[2:], "--text_descriptions", "words", "--components", str(COMPONENTS)]
ATTACK_FLAGS += ["--text_model", "template", "--similarity_model", "clip", "--cosim_similarity", "2"]  # 2: only names are dropped
ATTACK_FLAGS += ["--image_model", "demo.world:draw_description", "--image_options", f'{{"opacity": {OPACITY}}}']


def commands(out):
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
        yield result, effects
        result = out / tree / f"folder_train_mlps_{CLIP}_4_100_explained.npy"
        yield result, [*python, "compute_pcas.py", *model, "--dataset", "folder", *layers, *where]
        result = out / tree / f"folder_val_ablations_{CLIP}_{'-'.join(LAYERS)}_100.json"
        yield result, [*python, "compute_ablations.py", *model, *images, *layers, *where]
        result = out / tree / f"words_{CLIP}.npy"
        yield result, [*python, "compute_text_set_projection.py", *model, "--text_descriptions", world / "words.txt", *where]
        result = out / tree / f"folder_mlps_{CLIP}_{'-'.join(LAYERS)}_words_decomposition_omp_1_{COMPONENTS}_evaluation.json"
        decompose = ["--text_descriptions", "words", "--components", COMPONENTS, "--evaluate"]
        yield result, [*python, "compute_sparse_decomposition.py", *model, *images, *layers, *decompose, *where]
    yield from segmentations(out, world, model, python)
    yield from attacks(out, model, python)
    yield out / "results.json", [*python, HERE / "measure.py", "--output_dir", out]


def segmentations(out, world, model, python):
    """A row of each table of methods per command: one symbol on a background, and two with the class of each in turn."""
    read = ["--input_dir", out / "symbols", "--train_dataset", "folder", "--output_dir", out / "segmentation"]
    tables = {
        "single": ["--mlp_layers", *LAYERS[1:], "--top_neurons", "200"],
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
    layers, top = ("-".join(LAYERS[1:]), 200) if scenes == "single" else ("-".join(LAYERS[3:]), 50)
    source = "" if scenes == "single" else "_segmentation_two_classes"
    rows = {
        "positive": f"second_order_{layers}_{top}_positive{source}",
        "both": f"second_order_{layers}_{top}{source}",
        "random": f"random_{layers}_{top}",
        "attention": "attention",
        "rollout": "rollout",
    }
    return out / "segmentation" / f"segmentation_{scenes}_segmentation_{CLIP}_{rows[name]}.json"


def attacks(out, model, python, pairs=ATTACKS, seeds=(0,)):
    """Pictures of class_1 with words of class_0's neurons, and with random words."""
    for class_0, class_1 in pairs:
        for source in ("second_order", "random"):
            for seed in seeds:
                command = [*python, "generate_adversarial_images.py", *model, "--dataset", "folder", *ATTACK_FLAGS]
                command += ["--class_0", class_0, "--class_1", class_1, "--word_source", source, "--seed", str(seed)]
                command += ["--input_dir", out / "symbols", "--output_dir", out / "adversarial"]
                yield attack_result(out, class_0, class_1, source, seed), command


def attack_result(out, class_0, class_1, source, seed):
    return out / "adversarial" / f"{class_0}_{class_1}_{source}_seed{seed}" / "results.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "output")
    out = parser.parse_args().output_dir
    began = time.time()
    for result, command in commands(out):
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
