"""What single tricks earn, each against the plain way, in turns. Some are in the code, some were left out of
it.

    python -m benchmarks.tricks [--rounds 9] [--processes 3] [--quick]

Gram matrices       half of each kept, in strips (`utils.norms`), or all of it
sums over images    of each image's C (`--keep top`), or one product that never forms C
memory of a loop    left alone, or tuned: glibc told to keep what is freed (`utils.runtime.memory`)
matplotlib          what a process pays that imports it

Sizes are those of ViT-B-32 and batches of 16 images. Numbers are random; the loop reads photos with two
worker processes, and every loop and every import is a process of its own.
"""

import importlib
import os
import time

import torch

from benchmarks.common import (
    Table,
    alone,
    bench_parser,
    interleaved,
    kilobytes,
    median,
    memory_of,
    ratio,
    row,
    run,
    write_photos,
)
from utils.data.images import Loader, load_images
from utils.model.clip import load_clip
from utils.norms import CentredNorms, blocks_of, quadratic
from utils.prs import Directions, SecondOrder, fold_layers, second_order
from utils.runtime import memory
from utils.runtime.passes import pieces_of

L, H, E, D, T = 12, 12, 64, 512, 50  # ViT-B-32: layers, heads, head width, output width, tokens
BATCH, WORKERS = 16, 2
EARLY, LATE = 0, 8  # layers of many heads and of few


def heads_after(layer):
    return (L - 1 - layer) * H


# each image's quadratic forms with Gram matrices, in strips or whole


def random_norms(layer, N):
    """The norms of a layer, with strips."""
    K = heads_after(layer)
    directions = Directions(layer, torch.randn(K, N, E) / E, torch.randn(K, E, D) / D**0.5, None)
    return CentredNorms(directions, (torch.randn(K, N), torch.zeros(D)))


def gram_functions(layer, N):
    """{name: function} for a batch of a layer."""
    norms = random_norms(layer, N)
    phi = SecondOrder(torch.randn(BATCH, heads_after(layer), N), torch.randn(BATCH, D), norms.directions)
    blocks = [(n, phi.C[:, :, n] - norms.origin[:, n]) for n in blocks_of(N)]
    whole = torch.cat([(B_n := norms.directions.B(n)) @ B_n.mT for n, _ in blocks])  # [N, K, K]
    return {
        "strips": lambda: torch.cat(
            [quadratic(x, [strip[n] for strip in norms.strips]) for n, x in blocks], dim=1
        ),
        "whole": lambda: torch.cat([whole_quadratic(x, whole[n]) for n, x in blocks], dim=1),
        "norms": lambda: norms(phi),
    }


def whole_quadratic(x, G):
    """x^T G x: x [B, K, n], G [n, K, K] -> [B, n]."""
    B, K, n = x.shape
    x = x.view(B * K, n).T.contiguous().view(n, B, K)
    return (torch.bmm(x, G) * x).sum(dim=-1).T


def gram_bytes(layer, N):
    """Bytes of a layer's Gram matrices, {form: bytes}."""
    return {
        "strips": sum(strip.nbytes for strip in random_norms(layer, N).strips),
        "whole": 4 * N * heads_after(layer) ** 2,
    }


def gram_rows(seconds, sizes):
    rows = []
    for layer, times in seconds.items():
        strips, whole, norms = (1000 * median(times[name]) for name in ("strips", "whole", "norms"))
        note = (
            f"a batch takes {whole:.0f} ms, and {strips:.0f} ms with strips; all of the norms {norms:.0f} ms"
        )
        name = f"whole Gram matrices, layer {layer} (K = {heads_after(layer)})"
        rows.append(row(name, ratio(times["whole"], times["strips"]), "x strips", note=note))
    strips, whole = (sum(size[form] for size in sizes) / 1e9 for form in ("strips", "whole"))
    rows.append(row("whole Gram matrices of all layers, memory", whole, "GB", note="N K² numbers each"))
    return [
        *rows,
        row("strips of all layers, memory", strips, "GB", note=f"{strips / whole:.2f} of the whole"),
    ]


# sums of C over a batch, with or without each image's C


def sum_functions(layers, N):
    """{name: function} for a batch of some layers."""
    a, p = ([torch.randn(BATCH, *shape) for shape in shapes] for shapes in shapes_of(layers, N))
    return {
        "C.sum": lambda: [torch.bmm(a_l, p_l).sum(dim=0) for a_l, p_l in zip(a, p, strict=True)],
        "product": lambda: [
            a_l.transpose(0, 1).flatten(1) @ p_l.flatten(0, 1) for a_l, p_l in zip(a, p, strict=True)
        ],
    }


def shapes_of(layers, N):
    """Shapes of the attention rows [K, T] and of the activations [T, N], for every layer."""
    return [(heads_after(layer), T) for layer in layers], [(T, N)] * len(layers)


def first_pass(layers):
    """What the first pass of `--keep top` does with a batch, as a function."""
    vit = load_clip("ViT-B-32", "random", "cpu", image_only=True).vit
    images, directions = torch.randn(BATCH, 3, 224, 224), fold_layers(vit, layers)
    return lambda: [phi.C.sum(dim=0) for phi in second_order(vit, images, directions)[1]]


def sum_rows(seconds):
    rows = []
    for name, times in seconds.items():
        plain, product = (1000 * median(times[form]) for form in ("C.sum", "product"))
        note = f"a batch takes {product:.1f} ms, and {plain:.1f} ms with C.sum(dim=0)"
        times_plain = ratio(times["product"], times["C.sum"])
        rows.append(row(f"sum over images as one product, {name}", times_plain, "x C.sum", note=note))
    plain, product, whole = (seconds["all layers"][form] for form in ("C.sum", "product", "pass"))
    saved = median((a - b) / c for a, b, c in zip(plain, product, whole, strict=True))
    note = f"a batch of that pass takes {1000 * median(whole):.0f} ms"
    return [*rows, row("the same, saved of the first of two passes", 100 * saved, "%", note=note)]


# memory of a loop over batches, left alone or tuned


def loop(photos, layers, tuned):
    """The effects of some layers on photos, in this process: median seconds of a batch, and memory half
    way.
    """
    clip = load_clip("ViT-B-32", "random", "cpu", image_only=True)
    images = load_images("imagenet", photos, "train", clip.transform, subsample=1)
    pieces, seconds, half_way = pieces_of(len(images), BATCH), [], 0
    if tuned:
        memory.manage()
    directions = fold_layers(clip.vit, layers)
    with memory.steady():  # does nothing where memory is left alone
        start = time.perf_counter()
        for pixels in Loader(images, num_workers=WORKERS)(pieces):
            for _ in second_order(clip.vit, pixels, directions)[1]:
                pass
            seconds.append(time.perf_counter() - start)
            if len(seconds) == len(pieces) // 2:
                half_way = memory_of(os.getpid())
            start = time.perf_counter()
    return {"seconds": median(seconds[1:]), "memory": half_way}  # the workers start within the first


def loop_rows(runs):
    """runs: {name: [(tuned, plain) of every round]}, each {seconds, memory, peak}."""
    rows, whats = [], {"seconds": ("time of a batch", 1000, "ms"), "peak": ("peak memory", 1e-9, "GB")}
    whats["memory"] = ("memory half way", 1e-9, "GB")
    for name, pairs in runs.items():
        for key, (what, factor, unit) in whats.items():
            tuned, plain = ([run[key] for run in way] for way in zip(*pairs, strict=True))
            ratios = [a / b for a, b in zip(tuned, plain, strict=True)]
            note = f"{factor * median(tuned):.4g} {unit}, and {factor * median(plain):.4g} left alone; "
            note += f"ratios {min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} pairs of processes"
            rows.append(row(f"tuned memory, {name}: {what}", ratio(tuned, plain), "x left alone", note=note))
    return rows


# importing matplotlib


def import_matplotlib():
    """Import it after what a stage has imported: seconds and bytes of resident memory."""
    start, before = time.perf_counter(), kilobytes(os.getpid(), "status", "VmRSS")
    importlib.import_module("matplotlib.pyplot")
    return {
        "seconds": time.perf_counter() - start,
        "memory": 1024 * (kilobytes(os.getpid(), "status", "VmRSS") - before),
    }


def import_rows(imports):
    seconds, memory = (median(found[key] for found in imports) for key in ("seconds", "memory"))
    note = f"median of {len(imports)} processes, after torch and open_clip"
    named = [("memory", memory / 1e6, "MB"), ("time", seconds, "s")]
    return [row(f"import matplotlib, {what}", value, unit, note=note) for what, value, unit in named]


# all of them


def set_up(args, folder):
    """What takes turns in this process, {trick: {name: {way: function}}}; and the photos of the loops."""
    torch.manual_seed(0)
    grams = {layer: gram_functions(layer, args.neurons) for layer in (EARLY, LATE)}
    for ways in grams.values():
        torch.testing.assert_close(ways["strips"](), ways["whole"]())
    sums = {f"layer {layer}": sum_functions([layer], args.neurons) for layer in (EARLY, LATE)}
    sums["all layers"] = {**sum_functions(args.layers, args.neurons), "pass": first_pass(args.layers)}
    return {"grams": grams, "sums": sums}, write_photos(folder, args.images, ("train",))


@torch.inference_mode()
def measure(args, case):
    functions, photos = case
    found = {}
    for trick, turns in functions.items():
        found[trick] = {name: interleaved(ways, args.rounds) for name, ways in turns.items()}
    found["sizes"] = [gram_bytes(layer, args.neurons) for layer in range(L - 1)]
    loops = {"layer 9": [9], "all layers": args.layers}
    found["loops"] = {
        name: [loop_pair(photos, layers) for _ in range(args.processes)] for name, layers in loops.items()
    }
    found["imports"] = [alone(import_matplotlib)[0] for _ in range(args.processes)]
    return found


def loop_pair(photos, layers):
    """A tuned loop and one that is left alone."""
    found = []
    for tuned in (True, False):
        result, process = alone(loop, photos=str(photos), layers=layers, tuned=tuned)
        found.append({**result, "peak": process.peak})
    return found


def table(args, found):
    rows = gram_rows(found["grams"], found["sizes"]) + sum_rows(found["sums"])
    rows += loop_rows(found["loops"]) + import_rows(found["imports"])
    return Table("tricks", f"Tricks, ViT-B-32, batches of {BATCH} images", rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__, device=False)
    parser.add_argument("--neurons", type=int, default=3072)
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(L - 1)))
    parser.add_argument("--images", type=int, default=160, help="photos of a loop, a multiple of 4")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processes", type=int, default=3, help="pairs of loops, and imports")
    quick = {"neurons": 64, "layers": [9, 10], "images": 32, "rounds": 1, "processes": 1}
    run(parser, set_up, measure, table, quick=quick)
