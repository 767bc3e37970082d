"""Measure what the effects of a dictionary's units cost, beside the plain forward pass.

    python -m benchmarks.units        # ViT-B-32, random weights; 1,000, 16,384 and 49,152 random units

A pass computes the activations of all units, their coefficients, and the norms of the centred effects: all
that an image takes in the effects stage. The units are the random control of a dictionary, of which 32 act on
a token. Each size runs in a process of its own, whose memory counts.
"""

from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.common import Table, alone, bench_parser, interleaved, of_model, ratio, row, run
from utils.model.clip import load_clip
from utils.model.dictionaries import Dictionary
from utils.model.dictionary_files import save_dictionary
from utils.norms import CentredNorms
from utils.prs import second_order
from utils.units import fold_units, look_at


def set_up(args, folder):
    """Return the folder that dictionaries are written to."""
    return folder


def cost(model, units, layer, batch_size, rounds, folder):
    """Return the ratio of a pass with effects and norms to a plain one, and seconds of that."""
    clip = load_clip(model, "random", "cpu", image_only=True)
    path = Path(folder) / "random.safetensors"
    encoder = torch.zeros(units, clip.vit.d)  # of the original, which the control does not look at
    decoder = torch.ones(units, clip.vit.d)
    biases = (torch.zeros(units), torch.zeros(clip.vit.d))
    save_dictionary(path, Dictionary(encoder, biases[0], decoder, biases[1], "resid.post", layer))
    del encoder, decoder
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


def measure(args, folder):
    """Return {units: (ratio, seconds of a plain pass, bytes)}."""
    found = {}
    same = {"model": args.model, "layer": args.layer, "batch_size": args.batch_size, "rounds": args.rounds}
    for units in args.units:
        (times, plain), process = alone(cost, units=units, folder=str(folder), **same)
        found[units] = (times, plain, process.peak)
        print(f"{units} units: {times:.2f} times a plain pass, {process.peak / 1e9:.2f} GB", flush=True)
    return found


def table(args, found):
    """Return the table, with the bars of the largest size."""
    rows = []
    for units, (times, plain, peak) in found.items():
        largest = units == max(found)
        note = f"plain {1000 * plain / args.batch_size:.0f} ms an image"
        what = f"effects and norms of {units:,} units"
        rows.append(row(what, times, "x plain", at_most=2 if largest else None, note=note))
        rows.append(row(f"{what}, memory", peak / 1e9, "GB", at_most=3 if largest else None))
    title = f"Units of a dictionary, {args.model}, layer {args.layer}, batches of {args.batch_size}"
    return Table(of_model("units", args.model), title, rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__, device=False)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--layer", type=int, default=9)
    parser.add_argument("--units", type=int, nargs="+", default=[1000, 16384, 49152])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    run(parser, set_up, measure, table, quick={"units": [100], "batch_size": 2, "rounds": 1})
