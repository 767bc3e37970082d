"""What `--precision` and `--store_dtype` cost in accuracy, against float32, and what they save in time.

    python -m benchmarks.precision [--device cpu] [--quick]

The accuracy is that of the demo's trained CLIP on its world: effects, components and ablation figures of all
layers, through the stages' command lines. The time is that of ViT-B-32's forward pass with the effects of all
layers, against its own float32.
"""

import json
import shutil

import numpy as np
import torch

from benchmarks.common import ROOT, Table, bench_parser, interleaved, measured, ratio, row, run, stage
from utils.model.clip import load_clip
from utils.prs import fold_layers, second_order
from utils.runtime.results import Results

MODEL, WEIGHTS = str(ROOT / "demo/symbols-vit.json"), str(ROOT / "demo/symbols-vit.safetensors")
CLIP = ["--model", MODEL, "--pretrained", WEIGHTS, "--dataset", "folder"]
STORED = "float32, stored as float16"
LAYERS, TOP = list(range(5)), 100


def set_up(args, folder):
    """The demo's world and its classifier."""
    measured("-m", "demo.make_world", "--output_dir", folder / "world")
    pairs = folder / "world/pairs"
    names = ["--data_path", pairs, "--class_names", pairs / "class_names.txt"]
    stage("compute_classifier_projection", *CLIP, *names, "--output_dir", folder / "classifier")
    return folder


def measure(args, folder):
    """{setting: (largest differences of effects by layer, one minus cosines of components, changes of
    accuracies)}; and the seconds of the forward pass at every precision."""
    precisions = [
        "float32",
        *(["tf32"] if torch.device(args.device).type == "cuda" else []),
        "bfloat16",
        "float16",
    ]
    settings = {name: (["--precision", name], []) for name in precisions}
    settings[STORED] = ([], ["--store_dtype", "float16"])
    through = {name: through_stages(args, folder, name, flags) for name, flags in settings.items()}
    differences = {
        name: compare(through["float32"], found) for name, found in through.items() if name != "float32"
    }
    return differences, forward_seconds(args, precisions)


def through_stages(args, folder, name, flags):
    """Run the stages. flags: those of the precision, and those of the store. Returns their `Results`."""
    precision, store = flags
    out = folder / name
    shutil.copytree(folder / "classifier", out)
    images = ["--device", args.device, "--data_path", folder / "world/pairs", "--batch_size", 64, *precision]
    images += ["--subsample", 6] if args.quick else []
    layers, k = [*CLIP, "--output_dir", out, "--mlp_layer", "all"], ["--top_k_pca", TOP]
    stage("compute_second_order_neuron_prs", *layers, *images, *store, "--split", "train", "--keep", "full")
    stage("compute_pcas", *layers, *k)
    stage("compute_ablations", *layers, *images, *k)
    return Results(out, MODEL, WEIGHTS)


def compare(exact, found):
    """Largest difference of an effect for each layer, of its largest effect; one minus the cosines of all
    components; changes of the accuracies."""
    differences, cosines = [], []
    for layer in LAYERS:
        a, b = (effects_of(results, layer, 64) for results in (exact, found))
        differences.append(np.abs(a - b).max() / np.abs(a).max())
        names = {"dataset": "folder", "layer": layer, "k": TOP}
        a, b = (np.load(results.path("pca", **names)).astype(float) for results in (exact, found))
        cosines.append((a * b).sum(axis=1))
    names = {"dataset": "folder", "split": "val", "layer": LAYERS, "k": TOP}
    before, after = (
        json.loads(results.path("ablations", **names).read_text())["accuracy"] for results in (exact, found)
    )
    changes = [abs(before[layer][what] - after[layer][what]) for layer in before for what in before[layer]]
    return differences, 1 - np.concatenate(cosines), changes


def effects_of(results, layer, images):
    """The effects [images, N, D] of the first images, float64."""
    names = {"dataset": "folder", "split": "train", "layer": layer}
    parts = (results.load(kind, mmap=True, **names) for kind in ("coefficients", "values", "outputs", "bias"))
    C, values, outputs, bias = parts
    heads = np.einsum("ikn,kne->inke", C[:images].astype(float), values.astype(float))
    return np.einsum("inke,keo->ino", heads, outputs) + bias[:images, None]


def forward_seconds(args, precisions):
    """ViT-B-32's pass with the effects of all layers, {precision: [seconds]}."""
    images = torch.randn(2 if args.quick else 16, 3, 224, 224, device=args.device)
    vits = {
        name: load_clip("ViT-B-32", "random", args.device, precision=name, image_only=True).vit
        for name in precisions
    }
    directions = fold_layers(vits["float32"], range(11))

    def effects(vit):
        for _ in second_order(vit, images, directions)[1]:
            pass

    return interleaved(
        {name: lambda vit=vit: effects(vit) for name, vit in vits.items()}, args.rounds, args.device
    )


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
        rows.append(
            row(
                f"{name}: time, ViT-B-32",
                ratio(times, seconds["float32"]),
                "x float32",
                note="effects of all layers",
            )
        )
    return Table("precision", "Precision of the forward pass and of the store, against float32", rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    run(parser, set_up, measure, table, quick={"rounds": 1})
