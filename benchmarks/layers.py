"""Measure the stages on all layers of ViT-B-32, in turn with the plain pass over as many photos.

    python -m benchmarks.layers [--images 5124] [--rounds 1] [--only top ablations full] [--quick]

A round is plain, --keep top, plain, ablations, plain, --keep full, plain: each stage is divided by the mean
of the plain passes (compute_representations.py) before and after it. Seconds are those of whole processes.
compute_pcas.py, which the ablations need, is not in the time.
"""

from typing import NamedTuple

from benchmarks.common import Table, bench_parser, median, real_size_inputs, row, run, stage

PLAIN, EFFECTS, ABLATIONS = "compute_representations", "compute_second_order_neuron_prs", "compute_ablations"
BARS = {"top": 1.6, "ablations": 2.0, "full": 1.3}  # times the plain pass
TITLES = {"top": "effects, --keep top", "ablations": "ablations", "full": "effects, --keep full, in float16"}


class Turn(NamedTuple):
    """A `Turn` is a stage that was run once. before, after: seconds of the plain passes around it."""

    before: float
    stage: object
    after: float

    def ratio(self):
        """Return how many plain passes the stage took."""
        return 2 * self.stage.seconds / (self.before + self.after)


def set_up(args, folder):
    """Make photos, a classifier, and what the ablations need. Returns {stage: words} and the folder."""
    args.val_images = args.images
    photos, results = real_size_inputs(args, folder, ["word"])
    model = ["--model", args.model, "--pretrained", "random", "--device", args.device]
    model += ["--output_dir", results.directory, "--overwrite"]
    images = [*model, "--data_path", photos, "--subsample", 1]
    layers = ["--mlp_layer", "all", "--top_k_pca", min(100, args.images)]
    train = [EFFECTS, *images, *layers, "--split", "train"]
    words = {"plain": [PLAIN, *images, "--split", "train"], "top": [*train, "--keep", "top"]}
    words["full"] = [*train, "--keep", "full", "--store_dtype", "float16"]
    words["ablations"] = [ABLATIONS, *images, *layers]
    words["pcas"] = ["compute_pcas", *model, *layers]
    if "ablations" in args.only and args.only[0] != "top":
        stage(*words["top"])
    return words, results.directory


def measure(args, case):
    """Return {stage: list of `Turn`}, and what the stages say of certain effects."""
    words, out = case
    found = {name: [] for name in args.only}
    said = []
    before = stage(*words["plain"]).seconds
    for _ in range(args.rounds):
        for name in args.only:
            if name == "ablations":
                stage(*words["pcas"])
            process = stage(*words[name])
            said += [line for line in process.output.splitlines() if line.startswith("one pass has found")]
            print(f"{name}: {process.seconds:.0f} s, {process.peak / 1e9:.2f} GB", flush=True)
            if name == "full":  # it takes much room; what others leave is read again
                for path in out.glob("*_coefficients.npy"):
                    path.unlink()
            after = stage(*words["plain"]).seconds
            print(f"plain: {before:.0f} s before, {after:.0f} s after", flush=True)
            found[name].append(Turn(before, process, after))
            before = after
    return found, said


def table(args, found):
    turns, said = found
    barred = args.model == "ViT-B-32"
    rows = []
    for name, of_stage in turns.items():
        plain = median((turn.before + turn.after) / 2 for turn in of_stage)
        seconds = median(turn.stage.seconds for turn in of_stage)
        note = f"{seconds:.0f} s, and the plain pass {plain:.0f} s"
        bar = BARS[name] if barred else None
        rows.append(row(TITLES[name], median(map(Turn.ratio, of_stage)), "x plain", at_most=bar, note=note))
        peak = max(turn.stage.peak for turn in of_stage) / 1e9
        rows.append(row(f"{TITLES[name]}, peak memory", peak, "GB", at_most=3 if barred else None))
    if said:
        rows[0]["note"] += f"; {said[-1]}"
    title = f"All layers, {args.model}, random weights, {args.images} photos"
    return Table(f"layers_{args.model}", title, rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--images", type=int, default=5124, help="photos of either split, a multiple of 4")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=tuple(BARS), default=["top", "ablations", "full"])
    run(parser, set_up, measure, table, quick={"images": 16})
