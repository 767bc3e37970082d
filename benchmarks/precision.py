"""What `--precision` and `--store_dtype` cost in accuracy, against float32, and what they save in time.

    python benchmarks/precision.py [--device cpu] [--quick]

The accuracy is that of the demo's trained CLIP on its world: effects, components and ablation figures of all layers, through the
stages' command lines. The time is that of ViT-B-32's forward pass with the effects of all layers, against its own float32.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import ROOT, bench_parser, interleaved, measured, ratio, row, save_table

from utils.artifacts import Names
from utils.clip import load_clip
from utils.prs import fold, second_order

DEMO = ROOT / "demo"
LAYERS, K = range(5), 100


def effects_of(names, layer, images):
    """The effects [images, N, D] of some images, float64."""
    C, values, outputs, bias = (
        np.load(names.effects("folder", "train", layer, part), mmap_mode="r")
        for part in ("coefficients", "values", "outputs", "bias")
    )
    heads = np.einsum("ikn,kne->inke", C[:images].astype(float), values.astype(float))
    return np.einsum("inke,keo->ino", heads, outputs) + bias[:images, None]


def main(args):
    gpu = torch.device(args.device).type == "cuda"
    settings = {name: ["--precision", name] for name in ("float32", *(("tf32",) if gpu else ()), "bfloat16", "float16")}
    settings["float32, stored as float16"] = ["--store_dtype", "float16"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        measured([sys.executable, DEMO / "make_world.py", "--output_dir", folder / "world"])
        pairs = folder / "world/pairs"
        clip = ["--model", DEMO / "symbols-vit.json", "--pretrained", DEMO / "symbols-vit.safetensors"]
        images = [*clip, "--device", args.device, "--dataset", "folder", "--data_path", pairs, "--batch_size", 64]
        if args.quick:
            images += ["--subsample", 6]
        classes = [*clip, "--dataset", "folder", "--data_path", pairs, "--class_names", pairs / "class_names.txt"]
        names, accuracies = {}, {}
        measured([sys.executable, ROOT / "compute_classifier_projection.py", *classes, "--output_dir", folder / "classifier"])
        layers = ["--mlp_layer", "all", "--output_dir"]
        for setting, flags in settings.items():
            out = folder / setting
            names[setting] = Names(out, str(clip[1]), str(clip[3]))
            out.mkdir()
            for file in (folder / "classifier").iterdir():
                (out / file.name).symlink_to(file)
            precision = flags if flags[0] == "--precision" else []
            effects = [*images, *flags, "--split", "train", "--keep", "full", *layers, out]
            measured([sys.executable, ROOT / "compute_second_order_neuron_prs.py", *effects])
            measured([sys.executable, ROOT / "compute_pcas.py", *clip, "--dataset", "folder", "--top_k_pca", K, *layers, out])
            measured([sys.executable, ROOT / "compute_ablations.py", *images, *precision, "--top_k_pca", K, *layers, out])
            file = next(file for file in out.glob("*_ablations_*.json") if "predictions" not in file.name)
            accuracies[setting] = json.loads(file.read_text())["accuracy"]

        exact = names.pop("float32")
        for setting, found in names.items():
            differences, cosines, changes = [], [], []
            for layer in LAYERS:
                a, b = (effects_of(where, layer, 64) for where in (exact, found))
                differences.append(np.abs(a - b).max() / np.abs(a).max())
                a, b = (np.load(where.statistics("folder", layer, f"{K}_pca")).astype(float) for where in (exact, found))
                cosines.append((a * b).sum(axis=1))
                table = [accuracies[of][str(layer)] for of in ("float32", setting)]
                changes += [abs(table[0][what] - table[1][what]) for what in table[0]]
            cosines = np.concatenate(cosines)
            note = "largest difference of an effect, of the largest one of its layer; all layers, 64 images"
            rows.append(row(f"{setting}: effects", max(differences), "", None, note))
            note = f"one minus the cosine of first components, 99th percentile; median {1 - np.median(cosines):.1e}"
            rows.append(row(f"{setting}: directions", 1 - np.percentile(cosines, 1), "", None, note))
            note = f"points, the largest change of the {len(changes)} accuracies; mean {np.mean(changes):.2f}"
            rows.append(row(f"{setting}: ablation figures", max(changes), "", None, note))

    images = torch.randn(2 if args.quick else 16, 3, 224, 224, device=args.device)
    functions = {}
    for precision in ("float32", *(name for name in settings if name in ("tf32", "bfloat16", "float16"))):

        def effects(precision=precision):
            clip = clips[precision]
            for _ in second_order(clip.hooked_vit(), images, directions)[1]:
                pass

        functions[precision] = effects
    clips = {name: load_clip("ViT-B-32", "random", args.device, precision=name, image_only=True) for name in functions}
    directions = [fold(clips["float32"].hooked_vit(), layer) for layer in range(11)]
    seconds = interleaved(functions, 1 if args.quick else 5, args.device)
    for name, times in list(seconds.items())[1:]:
        rows.append(row(f"{name}: time, ViT-B-32", ratio(times, seconds["float32"]), "x float32", None, "effects of all layers"))
    save_table("precision", "Precision of the forward pass and of the store, against float32", rows, args, args.device)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--device", default="cpu")
    main(parser.parse_args())
