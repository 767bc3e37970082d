"""Measure what the effects of a dictionary's units cost, beside the plain forward pass.

    python -m benchmarks.units        # ViT-B-32, random weights; 1,000, 16,384 and 49,152 random units

A pass computes the activations of all units, their coefficients, and the norms of the centred effects: all
that an image takes in the effects stage. The units are the random control of a dictionary, of which 32 act on
a token. Each size runs in a process of its own, whose memory counts. Then the whole stage runs on photos,
with the most units, between two plain passes (compute_representations.py).
"""

from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.common import (
    Table,
    alone,
    bench_parser,
    interleaved,
    of_model,
    ratio,
    row,
    run,
    stage,
    write_photos,
)
from benchmarks.layers import EFFECTS, PLAIN, Turn
from utils.model.clip import load_clip
from utils.model.dictionaries import Dictionary
from utils.model.dictionary_files import save_dictionary
from utils.norms import CentredNorms
from utils.prs import second_order
from utils.units import fold_units, look_at


def set_up(args, folder):
    """Write photos; return their folder, which dictionaries are written to, too."""
    return write_photos(folder, args.images, ["train"])


def save_random(path, units, d, layer):
    """Save a dictionary whose random control has so many units of width d."""
    encoder = torch.zeros(units, d)  # of the original, which the control does not look at
    biases = (torch.zeros(units), torch.zeros(d))
    save_dictionary(
        path, Dictionary(encoder, biases[0], torch.ones(units, d), biases[1], "resid.post", layer)
    )


def cost(model, units, layer, batch_size, rounds, folder):
    """Return the ratio of a pass with effects and norms to a plain one, and seconds of that."""
    clip = load_clip(model, "random", "cpu", image_only=True)
    path = Path(folder) / "random.safetensors"
    save_random(path, units, clip.vit.d, layer)
    look_at(clip, f"random:{path}", layer)
    directions = fold_units(clip, [layer])
    side = clip.vit.visual.image_size[0]
    images = torch.randn(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        _, [phi] = second_order(clip.vit, images, directions)
        norms = CentredNorms(directions[0], (phi.C.mean(dim=0), phi.kappa.mean(dim=0)))
        del phi

        def effects():
            norms(next(second_order(clip.vit, images, directions)[1]))

        seconds = interleaved({"plain": partial(clip.vit, images), "effects": effects}, rounds)
    return [ratio(seconds["effects"], seconds["plain"]), median(seconds["plain"])]


def whole_stage(args, folder):
    """Run the effects stage on photos, with the most units; return its `Turn`."""
    model = ["--model", args.model, "--pretrained", "random", "--output_dir", folder / "out", "--overwrite"]
    images = [*model, "--data_path", folder, "--split", "train", "--subsample", 1]
    path = folder / "random.safetensors"  # of the last size
    units = ["--units", f"random:{path}", "--keep", "top", "--top_k_pca", min(100, args.images)]
    before = stage(PLAIN, *images).seconds
    process = stage(EFFECTS, *images, *units)
    return Turn(before, process, stage(PLAIN, *images).seconds)


def measure(args, folder):
    """Return {units: (ratio, seconds of a plain pass, bytes)}, and the `Turn` of the whole stage."""
    found = {}
    same = {"model": args.model, "layer": args.layer, "batch_size": args.batch_size, "rounds": args.rounds}
    for units in args.units:
        (times, plain), process = alone(cost, units=units, folder=str(folder), **same)
        found[units] = (times, plain, process.peak)
        print(f"{units} units: {times:.2f} times a plain pass, {process.peak / 1e9:.2f} GB", flush=True)
    return found, whole_stage(args, folder)


def table(args, found):
    """Return the table, with the bars of the largest size."""
    found, turn = found
    rows = []
    for units, (times, plain, peak) in found.items():
        largest = units == max(found)
        note = f"plain {1000 * plain / args.batch_size:.0f} ms an image"
        what = f"effects and norms of {units:,} units"
        rows.append(row(what, times, "x plain", at_most=2 if largest else None, note=note))
        rows.append(row(f"{what}, memory", peak / 1e9, "GB", at_most=3 if largest else None))
    what = f"the stage, {max(found):,} units, --keep top, {args.images:,} photos"
    note = f"{turn.stage.seconds:.0f} s, and the plain pass {turn.before:.0f} and {turn.after:.0f} s"
    note += "".join(f"; {line}" for line in turn.stage.output.splitlines() if line.startswith("one pass has"))
    rows.append(row(what, turn.ratio(), "x plain", at_most=2, note=note))
    rows.append(row(f"{what}, memory", turn.stage.peak / 1e9, "GB", at_most=3))
    title = f"Units of a dictionary, {args.model}, layer {args.layer}, batches of {args.batch_size}"
    return Table(of_model("units", args.model), title, rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__, device=False)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--layer", type=int, default=9)
    parser.add_argument("--units", type=int, nargs="+", default=[1000, 16384, 49152])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--images", type=int, default=5124, help="photos of the stage, a multiple of 4")
    parser.add_argument("--rounds", type=int, default=5)
    run(parser, set_up, measure, table, quick={"units": [100], "images": 8, "batch_size": 2, "rounds": 1})
