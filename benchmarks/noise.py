"""Measure what control dictionaries cost, and what they say of a model with random weights, at full size.

    python -m benchmarks.noise        # ViT-B-32, 800 + 200 photos, 30,000 words and the visual concepts

Descriptions of a model with random weights mean nothing, however high their grades are: at no number of texts
may more than 8 % of its neurons have one better than noise. Times are of one layer: the pursuit of both
descriptions by the text set alone, and what the controls add.
"""

import json
from typing import NamedTuple

from benchmarks.common import Table, bench_parser, of_model, row, run, stage, write_photos
from utils.controls import CHANCE
from utils.runtime.results import Results

SIDES = {"fires_on": "pearson", "writes": "share"}


class Found(NamedTuple):
    """`Found` is all that was measured."""

    alone: dict  # {components: seconds of fitting and grading by the text set alone, both sides}
    controlled: dict  # {components: `Process` that adds the controls}
    noise: dict  # {text set: summary of what is over noise}


def set_up(args, folder):
    """Write photos, and run the stages up to the text vectors. Returns the results and flags of stages."""
    photos = write_photos(folder / "photos", args.images, ("train",))
    write_photos(photos, args.val_images, ("val",), seed=1)
    results = Results(folder / "out", args.model, "random")
    model = ["--model", args.model, "--pretrained", "random", "--device", args.device]
    model += ["--output_dir", results.directory]
    images = ["--data_path", photos, "--subsample", 1, "--batch_size", args.batch_size]
    layer = ["--mlp_layer", args.mlp_layer, "--top_k_pca", min(100, args.images)]
    stage("compute_second_order_neuron_prs", *model, *images, *layer, "--split", "train", "--keep", "top")
    stage("compute_pcas", *model, *layer)
    for texts in args.texts:
        stage("compute_text_set_projection", *model, "--text_descriptions", texts)
    return results, [*model, *layer], [*model, *images, *layer, "--train_subsample", 1]


def measure(args, case):
    """Time both pursuits by the texts alone, then with controls, for each number of texts."""
    results, model, flags = case
    alone = {}
    controlled = {}
    for components in args.components:
        own = ["--text_descriptions", args.texts[0], "--components", components]
        if not alone:  # the passes over the images are not counted
            stage(
                "compute_sparse_decomposition",
                *model,
                "--text_descriptions",
                args.texts[0],
                "--components",
                1,
            )
            first = ["--text_descriptions", args.texts[0], "--components", 1]
            start = stage("evaluate_descriptions", *flags, *first, "--controls", 0)
        written = stage("compute_sparse_decomposition", *model, *own)
        fitted = stage("evaluate_descriptions", *flags, *own, "--controls", 0, "--rotated_units", 0)
        for path in results.directory.glob(f"*_{components}_controls.*"):
            path.unlink()
        alone[components] = written.seconds + fitted.seconds
        controlled[components] = stage("evaluate_descriptions", *flags, *own)
        took = f"{alone[components]:.0f} s alone, {controlled[components].seconds:.0f} s of controls"
        print(f"{components} texts: {took}; {start.seconds:.0f} s", flush=True)
    for texts in args.texts[1:]:
        own = ["--text_descriptions", texts, "--components", max(args.components)]
        stage("compute_sparse_decomposition", *model, *own)
        stage("evaluate_descriptions", *flags, *own)
    return Found(alone, controlled, {texts: summary(results, texts, args) for texts in args.texts})


def summary(results, texts, args):
    """Read what is over noise of the largest number of texts."""
    components = max(args.components)
    [path] = results.directory.glob(f"*_{texts}_{components}_summary.json")
    return json.loads(path.read_text())["over_noise"][str(args.mlp_layer)]


def table(args, found):
    """Return the table, with bars where the full sizes were measured."""
    full = args.model == "ViT-B-32" and args.images >= 800

    def bar(value):
        return value if full else None

    rows = []
    for components, process in found.controlled.items():
        alone = found.alone[components]
        ratio = (alone + process.seconds) / alone
        least = bar(6) if components == 32 else None
        most = bar(180) if components == 8 else None
        own = f"{components} texts, both sides"
        rows.append(row(f"{own}: fitted and graded alone", alone, "s", note="two commands, with their start"))
        note = "5 controls, all lengths, soft-WPMI, 512 rotated units, both passes; with its start"
        rows.append(row(f"{own}: and controls", process.seconds, "s", at_most=most, note=note))
        rows.append(row(f"{own}: together", ratio, "x alone", at_most=least))
    peak = max(process.peak for process in found.controlled.values()) / 1e9
    rows.append(row("peak memory", peak, "GB", at_most=bar(3)))
    for texts, of in found.noise.items():
        for side, measure in SIDES.items():
            rows += rows_of_noise(texts, side, of[side][measure], bar(CHANCE))
    title = f"Controls, {args.model}, random weights, layer {args.mlp_layer}"
    title += f", {args.images} + {args.val_images} photos"
    return Table(of_model("noise", args.model), title, rows)


def rows_of_noise(texts, side, columns, most):
    """Return the rows about one side by one text set: mean grades, and neurons better than noise."""
    rows = []
    for j, m in enumerate(columns["texts"]):
        note = f"grade {columns['grade'][j]:.2f}, control {columns['control'][j]:.2f}"
        note += f", skill {columns['skill'][j]:.2f}"
        what = f"{texts}, {side.replace('_', ' ')}, {m}: neurons better than noise"
        rows.append(row(what, columns["better"][j], at_most=most, note=note))
    return rows


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--mlp_layer", type=int, default=9)
    parser.add_argument("--images", type=int, default=800, help="training photos")
    parser.add_argument("--val_images", type=int, default=200, help="held-out photos")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--components", type=int, nargs="+", default=[8, 32], help="texts for a neuron")
    help = "text sets; the first is timed"
    parser.add_argument("--texts", nargs="+", default=["30k", "concepts"], help=help)
    tiny = {"texts": ["concepts"], "images": 40, "val_images": 40, "components": [2], "mlp_layer": 10}
    run(parser, set_up, measure, table, tiny)
