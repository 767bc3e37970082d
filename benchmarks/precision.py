"""Measure the cost of `--precision` and `--store_dtype` in accuracy, and their gain in time.

    python -m benchmarks.precision [--device cpu] [--quick]

The accuracy is that of the demo's trained CLIP on its world: effects, components and ablation figures of all
layers, through the stages' command lines. The time is that of ViT-B-32's forward pass with the effects of all
layers, against its own float32.
"""

import json
import shutil
from functools import partial

import numpy as np
import torch

from benchmarks.common import ROOT, Table, bench_parser, interleaved, measured, ratio, row, run, stage
from utils.model.clip import load_clip
from utils.prs import fold_layers, second_order
from utils.runtime.results import Results

MODEL = str(ROOT / "demo/symbols-vit.json")
WEIGHTS = str(ROOT / "demo/symbols-vit.safetensors")
CLIP = ["--model", MODEL, "--pretrained", WEIGHTS, "--dataset", "folder"]
STORED = "float32, stored as float16"
LAYERS = list(range(5))
TOP = 100


def set_up(args, folder):
    """Make the demo's world and its classifier."""
    measured("-m", "demo.make_world", "--output_dir", folder / "world")
    pairs = folder / "world/pairs"
    names = ["--data_path", pairs, "--class_names", pairs / "class_names.txt"]
    stage("compute_classifier_projection", *CLIP, *names, "--output_dir", folder / "classifier")
    return folder


def measure(args, folder):
    """Return {setting: what `compare` returns}, and the seconds of the forward pass at every precision."""
    precisions = ["float32", "bfloat16", "float16"]
    if torch.device(args.device).type == "cuda":
        precisions.insert(1, "tf32")
    settings = {name: (["--precision", name], []) for name in precisions}
    settings[STORED] = ([], ["--store_dtype", "float16"])
    through = {name: through_stages(args, folder, name, flags) for name, flags in settings.items()}
    exact = through.pop("float32")
    differences = {name: compare(exact, found) for name, found in through.items()}
    return differences, forward_seconds(args, precisions)


def through_stages(args, folder, name, flags):
    """Run the stages and return their `Results`. flags: those of the precision, and those of the store."""
    precision, store = flags
    out = folder / name
    shutil.copytree(folder / "classifier", out)
    images = ["--device", args.device, "--data_path", folder / "world/pairs", "--batch_size", 64, *precision]
    if args.quick:
        images += ["--subsample", 6]
    layers = [*CLIP, "--output_dir", out, "--mlp_layer", "all"]
    k = ["--top_k_pca", TOP]
    stage("compute_second_order_neuron_prs", *layers, *images, *store, "--split", "train", "--keep", "full")
    stage("compute_pcas", *layers, *k)
    stage("compute_ablations", *layers, *images, *k)
    return Results(out, MODEL, WEIGHTS)


def compare(exact, found):
    """Return how far two `Results` are apart.

    The largest difference of an effect for each layer, as a share of its largest effect; one minus the
    cosines of all components; changes of the accuracies.
    """
    differences = []
    cosines = []
    for layer in LAYERS:
        a, b = (effects_of(results, layer, 64) for results in (exact, found))
        differences.append(np.abs(a - b).max() / np.abs(a).max())
        names = {"dataset": "folder", "layer": layer, "k": TOP}
        a, b = (np.load(results.path("pca", **names)).astype(float) for results in (exact, found))
        cosines.append((a * b).sum(axis=1))
    names = {"dataset": "folder", "split": "val", "layer": LAYERS, "k": TOP}
    paths = [results.path("ablations", **names) for results in (exact, found)]
    before, after = (json.loads(path.read_text())["accuracy"] for path in paths)
    changes = [abs(before[layer][what] - after[layer][what]) for layer in before for what in before[layer]]
    return differences, 1 - np.concatenate(cosines), changes


def effects_of(results, layer, images):
    """Return the effects [images, N, D] of the first images, float64."""
    names = {"dataset": "folder", "split": "train", "layer": layer}
    kinds = ("coefficients", "values", "outputs", "bias")
    C, values, outputs, bias = (results.load(kind, mmap=True, **names) for kind in kinds)
    heads = np.einsum("ikn,kne->inke", C[:images].astype(float), values.astype(float))
    return np.einsum("inke,keo->ino", heads, outputs) + bias[:images, None]


def forward_seconds(args, precisions):
    """Time ViT-B-32's pass with the effects of all layers, {precision: [seconds]}."""
    images = torch.randn(2 if args.quick else 16, 3, 224, 224, device=args.device)
    options = {"device": args.device, "image_only": True}
    vits = {name: load_clip("ViT-B-32", "random", precision=name, **options).vit for name in precisions}
    directions = fold_layers(vits["float32"], range(11))

    def effects(vit):
        for _ in second_order(vit, images, directions)[1]:
            pass

    functions = {name: partial(effects, vit) for name, vit in vits.items()}
    return interleaved(functions, args.rounds, args.device)


def table(args, found):
    differences, seconds = found
    rows = []
    for name, (effects, cosines, changes) in differences.items():
        note = "largest difference of an effect, of the largest one of its layer; all layers, 64 images"
        rows.append(row(f"{name}: effects", max(effects), note=note))
        note = f"one minus the cosine of first components, 99th percentile; median {np.median(cosines):.1e}"
        rows.append(row(f"{name}: directions", np.percentile(cosines, 99), note=note))
        note = f"points, the largest change of the {len(changes)} accuracies; mean {np.mean(changes):.2f}"
        rows.append(row(f"{name}: ablation figures", max(changes), note=note))
    for name, times in list(seconds.items())[1:]:
        times = ratio(times, seconds["float32"])
        rows.append(row(f"{name}: time, ViT-B-32", times, "x float32", note="effects of all layers"))
    return Table("precision", "Precision of the forward pass and of the store, against float32", rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    run(parser, set_up, measure, table, quick={"rounds": 1})
