"""Measure whole stages as a user runs them, on photos: seconds an image, peak memory, disk.

    python -m benchmarks.stages [--model ViT-B-32] [--images 256] [--mlp_layer 9] [--rounds 3] [--quick]

Every stage runs in its own process, in turn with the plain pass (compute_representations.py), once over all
images and once over an eighth of them; the difference of the two is the cost of the images, the rest is
start-up. Ratios are for 5,124 images.
"""

from typing import NamedTuple

from benchmarks.common import (
    Table,
    bench_parser,
    median,
    of_model,
    row,
    run,
    save_unit_vectors,
    stage,
    write_photos,
)
from utils.model.clip import load_clip
from utils.runtime.results import Results

IMAGES = 5124  # the paper's training images
FEW = 8  # one in so many images makes the short run
PLAIN, EFFECTS, ABLATIONS = "compute_representations", "compute_second_order_neuron_prs", "compute_ablations"


class Case(NamedTuple):
    """A `Case` is the input of the stages. passes: {script: flags}. pca: flags of compute_pcas.py."""

    results: Results
    passes: dict
    pca: list


class Cost(NamedTuple):
    """A `Cost` is that of one turn of a stage."""

    each: float  # seconds an image
    start: float  # seconds of start-up
    peak: float  # memory, bytes

    def whole(self):
        """Return the seconds for all of the paper's images."""
        return self.start + IMAGES * self.each


def set_up(args, folder):
    photos = write_photos(folder / "photos", args.images)
    results = Results(folder / "out", args.model, args.pretrained)
    results.directory.mkdir()
    width = load_clip(args.model, args.pretrained, "cpu", image_only=True).vit.D
    save_unit_vectors(results.path("classifier", dataset="imagenet"), 1000, width, columns=True)
    model = ["--model", args.model, "--pretrained", args.pretrained, "--device", args.device]
    model += ["--output_dir", results.directory]
    data = [*model, "--overwrite", "--data_path", photos]
    layers = ["--mlp_layer", *args.mlp_layer]
    k = ["--top_k_pca", min(100, args.images)]
    passes = {PLAIN: [*data, "--split", "val"], EFFECTS: [*data, "--split", "train", *layers]}
    passes[ABLATIONS] = [*data, "--split", "val", *layers, *k]
    return Case(results, passes, [*model, *layers, *k])


def measure(args, case):
    """Return {script: list of `Cost`}, the peak of the first effects, compute_pcas' `Process`, and sizes.

    sizes: {part of the effects: bytes}.
    """
    first = stage(EFFECTS, *case.passes[EFFECTS], "--subsample", 1)
    pca = stage("compute_pcas", *case.pca)
    costs = {script: [] for script in case.passes}
    for _ in range(args.rounds):
        for script, flags in case.passes.items():
            short = stage(script, *flags, "--subsample", FEW)
            full = stage(script, *flags, "--subsample", 1)
            each = (full.seconds - short.seconds) / (args.images - args.images // FEW)
            costs[script].append(Cost(each, full.seconds - each * args.images, full.peak))
    kinds = ("coefficients", "bias", "values", "outputs")
    return costs, first.peak, pca, {kind: size_of(args, case.results, kind) for kind in kinds}


def size_of(args, results, kind):
    """Return the bytes of a part of all layers' effects."""
    paths = [results.path(kind, dataset="imagenet", split="train", layer=layer) for layer in args.mlp_layer]
    return sum(path.stat().st_size for path in paths)


def table(args, found):
    costs, first_peak, pca, sizes = found
    rows = []
    for script, turns in costs.items():
        rate = 1 / median(turn.each for turn in turns)
        start = median(turn.start for turn in turns)
        note = f"{rate:.1f} images a second, {start:.0f} s of start-up"
        times = median(turn.whole() / plain.whole() for turn, plain in zip(turns, costs[PLAIN], strict=True))
        rows.append(row(script, times, "x plain", at_most=1.3 if script == ABLATIONS else None, note=note))
    for script, turns in costs.items():
        peak = max([turn.peak for turn in turns] + ([first_peak] if script == EFFECTS else []))
        rows.append(row(f"{script}, peak memory", peak / 1e9, "GB", at_most=2.5, note="with its workers"))
    k = min(100, args.images)
    rows.append(row("compute_pcas", pca.seconds, "s", note=f"{args.images} images, {k} for each neuron"))
    rows.append(row("compute_pcas, peak memory", pca.peak / 1e9, "GB", at_most=2.5))
    disk = (sizes["coefficients"] + sizes["bias"]) * IMAGES / args.images + sizes["values"] + sizes["outputs"]
    bar = 1.6 if len(args.mlp_layer) == 1 and args.model == "ViT-B-32" else None
    rows.append(row(f"effects of {IMAGES:,} images on disk", disk / 1e9, "GB", at_most=bar, note="float32"))
    title = f"Stages, {args.model}, layer {' '.join(args.mlp_layer)}, {args.images} photos"
    return Table(of_model("stages", args.model), title, rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pretrained", default="random")
    parser.add_argument("--images", type=int, default=256, help="photos of either split, a multiple of 4")
    parser.add_argument("--mlp_layer", nargs="+", default=["9"])
    parser.add_argument("--rounds", type=int, default=3)
    run(parser, set_up, measure, table, quick={"images": 16, "rounds": 1})
