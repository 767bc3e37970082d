"""Whole stages as a user runs them, on photos: seconds an image, peak memory, disk.

    python benchmarks/stages.py [--model ViT-B-32] [--images 256] [--mlp_layer 9] [--rounds 3] [--quick]

Every stage runs in its own process, in turn with the plain pass (compute_representations.py), once over all images and once over
an eighth of them; the difference of the two is the cost of the images, the rest is start-up. Ratios are for 5,124 images.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from common import ROOT, bench_parser, measured, median, row, save_table

from tests.photos import SYNSETS, write_photos
from utils.artifacts import Names
from utils.clip import load_clip

IMAGES = 5124  # the paper's training images
FEW = 8  # one in so many images makes the short run


def main(args):
    if args.quick:
        args.images, args.rounds = 16, 1
    args.images -= args.images % len(SYNSETS)
    k = min(100, args.images)
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(Path(folder) / "photos", per_class=args.images // len(SYNSETS))
        names = Names(Path(folder) / "out", args.model, args.pretrained)
        names.directory.mkdir()
        output = ["--output_dir", names.directory, "--model", args.model, "--pretrained", args.pretrained]
        device = ["--device", args.device]
        data = [*device, "--data_path", photos, "--overwrite"]
        layers = ["--mlp_layer", *args.mlp_layer]
        statistics = ["--top_k_pca", k]
        visual = load_clip(args.model, args.pretrained, "cpu").model.visual
        classifier = np.random.default_rng(0).standard_normal((visual.output_dim, 1000), dtype=np.float32)
        np.save(names.classifier("imagenet"), classifier / np.linalg.norm(classifier, axis=0))

        def stage(script, *flags):
            _, seconds, peak, _ = measured([sys.executable, ROOT / f"{script}.py", *output, *flags])
            return seconds, peak

        plain, effects, ablations = "compute_representations", "compute_second_order_neuron_prs", "compute_ablations"
        passes = {plain: ["--split", "val"], effects: [*layers, "--split", "train"]}
        passes[ablations] = [*layers, *statistics, "--split", "val"]
        first = stage(effects, *passes[effects], *data, "--subsample", 1)
        pca_seconds, pca_peak = stage("compute_pcas", *layers, *statistics, *device)

        each, start, peaks = {}, {}, {effects: [first[1]]}
        for _ in range(args.rounds):
            for script, flags in passes.items():
                short, _ = stage(script, *flags, *data, "--subsample", FEW)
                full, peak = stage(script, *flags, *data, "--subsample", 1)
                cost = (full - short) / (args.images - args.images // FEW)
                each.setdefault(script, []).append(cost)
                start.setdefault(script, []).append(full - cost * args.images)
                peaks.setdefault(script, []).append(peak)

        def size(part):
            return sum(names.effects("imagenet", "train", layer, part).stat().st_size for layer in args.mlp_layer)

        disk = (size("coefficients") + size("bias")) * IMAGES / args.images + size("values") + size("outputs")

    rows = []

    def whole(script, turn):
        return start[script][turn] + IMAGES * each[script][turn]

    for script in passes:
        rate = 1 / median(each[script])
        note = f"{rate:.1f} images a second, {median(start[script]):.0f} s of start-up"
        ratio = median(whole(script, turn) / whole(plain, turn) for turn in range(args.rounds))
        rows.append(row(script, ratio, "x plain", 1.3 if script == ablations else None, note))
    for script, values in peaks.items():
        rows.append(row(f"{script}, peak memory", max(values) / 1e9, "GB", 2.5, "with its workers"))
    rows.append(row("compute_pcas", pca_seconds, "s", None, f"{args.images} images, {k} for each neuron"))
    rows.append(row("compute_pcas, peak memory", pca_peak / 1e9, "GB", 2.5))
    one_layer = len(args.mlp_layer) == 1 and args.model == "ViT-B-32"
    rows.append(row(f"effects of {IMAGES:,} images on disk", disk / 1e9, "GB", 1.6 if one_layer else None, "float32"))
    title = f"Stages, {args.model}, layer {' '.join(args.mlp_layer)}, {args.images} photos"
    name = "stages" if args.model == "ViT-B-32" else f"stages_{args.model}"
    save_table(name, title, rows, args, args.device)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pretrained", default="random")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--mlp_layer", nargs="+", default=["9"])
    parser.add_argument("--rounds", type=int, default=3)
    main(parser.parse_args())
