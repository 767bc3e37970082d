"""Rehearse at real size: time, memory and disk of every stage in README order, with random weights.

The paper's sizes, and a larger model:

    python -m benchmarks.rehearsal --mlp_layer all --images 5124 --val_images 5000 --texts 30000
    python -m benchmarks.rehearsal --model ViT-L-14 --mlp_layer all --images 200 --val_images 200 \\
        --keep top --project 5124 5000

Texts are given random unit vectors, which the matching pursuit does not notice; the text encoder has its own
benchmark.
"""

import time
from typing import NamedTuple

from benchmarks.common import (
    Process,
    Table,
    bars,
    bench_parser,
    looping,
    real_size_inputs,
    row,
    run,
    stage,
    stage_of_few,
)
from utils.top_effects import strides_of

EFFECTS, ABLATIONS = "compute_second_order_neuron_prs", "compute_ablations"
BARS = {"full": 1.3, "top": 1.6}  # times the plain pass, all layers of ViT-B-32
HOURS = {EFFECTS: 2.2, ABLATIONS: 1.4}  # projected, all layers of ViT-L-14


class Step(NamedTuple):
    """A `Step` is a stage of the rehearsal. keep: the form of the effects that it writes or reads."""

    script: str
    flags: list
    keep: str = ""

    @property
    def name(self):
        after = {EFFECTS: " --keep ", "compute_pcas": ", after --keep "}.get(self.script, "")
        return f"{self.script}{after}{self.keep}"


class Done(NamedTuple):
    """`Done` is a step that was run. written: bytes."""

    step: Step
    process: Process
    written: int


def set_up(args, folder):
    """Make photos, a classifier and text vectors. Returns the `Results` and the steps."""
    photos, results = real_size_inputs(args, folder, [f"word {i}" for i in range(args.texts)])
    return results, steps(args, photos, results)


def steps(args, photos, results):
    """List the stages in README order.

    They overwrite, because every form of the effects has its components, of one name.
    """
    model = ["--model", args.model, "--pretrained", "random", "--device", args.device]
    model += ["--output_dir", results.directory, "--overwrite"]
    images = [*model, "--data_path", photos, "--subsample", 1, "--batch_size", args.batch_size]
    layers = ["--mlp_layer", *args.mlp_layer]
    k = ["--top_k_pca", min(100, args.images)]
    memory = ["--memory", args.memory] if args.memory else []
    found = [Step("compute_representations", [*images, "--split", "train"])]
    for keep in args.keep:
        form = ["--keep", keep, *(k if keep == "top" else ["--store_dtype", "float16"])]
        found.append(Step(EFFECTS, [*images, *layers, *memory, "--split", "train", *form], keep))
        found.append(Step("compute_pcas", [*model, *layers, *k], keep))
    found.append(Step(ABLATIONS, [*images, *layers, *memory, *k]))
    words = ["--mlp_layer", *args.describe, "--text_descriptions", "words", "--components", args.components]
    return [*found, Step("compute_sparse_decomposition", [*model, *words, *k])]


def measure(args, case):
    results, steps = case
    return [run_step(args, step, results) for step in steps]


def few_of(args):
    """Return how many images at least the preliminary mean is of where others are projected."""
    return max(1, args.images // 10)


def run_step(args, step, results):
    """Run a step, and remove the effects once their components are there."""
    before = time.time()
    if args.project and step.script == EFFECTS and step.keep == "top":
        process = stage_of_few(few_of(args), step.script, *step.flags)
    else:
        process = stage(step.script, *step.flags)
    files = [file.stat() for file in results.directory.iterdir()]
    written = sum(file.st_size for file in files if file.st_mtime >= before)
    print(f"{step.name}: {process.seconds:.0f} s, {process.peak / 1e9:.2f} GB", flush=True)
    if step.script == "compute_pcas":
        for path in results.directory.glob("*_coefficients.npy"):
            path.unlink()
    return Done(step, process, written)


def table(args, found):
    title = f"Rehearsal, {args.model}, random weights, layer {' '.join(args.mlp_layer)}"
    title += f", {args.images} + {args.val_images} photos, {args.texts} texts"
    title += f", {args.components} of them for each neuron of layer {' '.join(args.describe)}"
    title += f", --keep {' '.join(args.keep)}"
    if args.project:
        title += f", projected to {args.project[0]} + {args.project[1]} photos"
    name = f"rehearsal_{args.model}" + ("" if len(args.keep) > 1 else f"_{args.keep[0]}")
    return Table(name, title, [step_row(args, done) for done in found] + judged_rows(args, found))


def step_row(args, done):
    """Return the time, memory and disk of a step; with --project also the time for other images."""
    seconds = done.process.seconds
    note = f"peak {done.process.peak / 1e9:.2f} GB, {done.written / 1e9:,.2f} GB written"
    if args.project:
        note += (
            f"; {looping(done.process.errors)} s of it over images, projected {project(args, done):,.0f} s"
        )
    return row(done.step.name, seconds, "s", note=note)


def project(args, done):
    """Return the seconds that a step would take for the images of --project. Only its loops grow."""
    held_out = done.step.script == ABLATIONS
    loop = looping(done.process.errors)
    few = sum(bars(done.process.errors, "means")) if done.step.keep == "top" else 0
    grown = (loop - few) * args.project[held_out] / (args.images, args.val_images)[held_out]
    images = args.project[0]
    if few:
        measured_on = len(range(0, args.images, args.images // few_of(args)))
        grown += few * len(range(0, images, strides_of(images).look)) / measured_on
    return done.process.seconds - loop + grown


def judged_rows(args, found):
    """Return the rows that have a bar: the effects against the plain pass, their disk, the memory."""
    barred = args.model == "ViT-B-32" and args.mlp_layer == ["all"]
    gigabytes = 3 if barred else None
    rows = []
    for done in found:
        if args.project and done.step.script in HOURS:
            bar = HOURS[done.step.script] if args.model == "ViT-L-14" and args.mlp_layer == ["all"] else None
            rows.append(row(f"{done.step.name}, projected", project(args, done) / 3600, "hours", at_most=bar))
        if done.step.script == EFFECTS:
            keep = done.step.keep
            times = done.process.seconds / found[0].process.seconds
            bar = BARS[keep] if barred else None
            what = f"effects, --keep {keep}"
            rows.append(row(what, times, "x plain", at_most=bar, note="the whole processes"))
            if keep == "top":
                rows.append(row(f"{what}, on disk", done.written / 1e9, "GB", at_most=gigabytes))
    peak = max(done.process.peak for done in found) / 1e9
    note = "with their workers"
    return [*rows, row("peak memory of all stages", peak, "GB", at_most=gigabytes, note=note)]


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--images", type=int, default=200, help="photos of the train split, a multiple of 4")
    parser.add_argument("--val_images", type=int, default=200, help="those of the val split, a multiple of 4")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--mlp_layer", nargs="+", default=["9"])
    parser.add_argument("--describe", nargs="+", default=["9"], help="the layers that are decomposed")
    help = "in this order: the full store fills the system's cache"
    parser.add_argument("--keep", nargs="+", choices=("top", "full"), default=["top", "full"], help=help)
    parser.add_argument("--memory", type=float, help="--memory of the stages; default: theirs")
    help = "say what so many photos would take"
    parser.add_argument("--project", nargs=2, type=int, metavar=("IMAGES", "VAL"), help=help)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--components", type=int, default=64)
    run(parser, set_up, measure, table, quick={"images": 8, "val_images": 8, "texts": 20, "components": 4})
