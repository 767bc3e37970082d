"""Measure the gain of single tricks, each against the plain way, in turns.

    python -m benchmarks.tricks [--rounds 9] [--processes 3] [--quick]

Gram matrices       half of each kept, in strips (`utils.norms`), or all of it
matplotlib          time and memory of a process that imports it

Sizes are those of ViT-B-32 and batches of 16 images. Numbers are random, and every import is a process of
its own. results/tricks.md also has two tricks that were given up for their figures: sums over images as one
product, and glibc told to keep freed memory.
"""

import importlib
import os
import time

import torch

from benchmarks.common import Table, alone, bench_parser, interleaved, kilobytes, median, ratio, row, run
from utils.norms import CentredNorms, blocks_of
from utils.prs import Directions, SecondOrder

L, H, E, D = 12, 12, 64, 512  # ViT-B-32: layers, heads, head width, output width
BATCH = 16
EARLY, LATE = 0, 8  # layers of many heads and of few


def heads_after(layer):
    return (L - 1 - layer) * H


# each image's quadratic forms with Gram matrices, in strips or whole


def random_norms(layer, N):
    """Return the norms of a layer, with strips."""
    K = heads_after(layer)
    values = torch.randn(K, N, E) / E
    outputs = torch.randn(K, E, D) / D**0.5
    mean = (torch.randn(K, N), torch.zeros(D))
    return CentredNorms(Directions(layer, values, outputs, None), mean)


def gram_functions(layer, N):
    """Return {name: function} for a batch of a layer."""
    norms = random_norms(layer, N)
    phi = SecondOrder(torch.randn(BATCH, heads_after(layer), N), torch.randn(BATCH, D), norms.directions)
    blocks = [(n, phi.C[:, :, n] - norms.origin[:, n]) for n in blocks_of(N)]
    directions = [norms.directions.B(n) for n, _ in blocks]
    whole = torch.cat([B @ B.mT for B in directions])  # [N, K, K]

    def with_strips():
        return torch.cat([norms.along(by_neuron(x), n).T for n, x in blocks], dim=1)

    def with_whole():
        return torch.cat([whole_quadratic(x, whole[n]) for n, x in blocks], dim=1)

    return {"strips": with_strips, "whole": with_whole, "norms": lambda: norms(phi)}


def by_neuron(x):
    """Return a copy of x [B, K, n] as [n, B, K]."""
    B, K, n = x.shape
    return x.view(B * K, n).T.contiguous().view(n, B, K)


def whole_quadratic(x, G):
    """Return x^T G x: x [B, K, n], G [n, K, K] -> [B, n]."""
    x = by_neuron(x)
    return (torch.bmm(x, G) * x).sum(dim=-1).T


def gram_bytes(layer, N):
    """Return the bytes of a layer's Gram matrices, {form: bytes}."""
    strips = sum(strip.nbytes for strip in random_norms(layer, N).strips)
    return {"strips": strips, "whole": 4 * N * heads_after(layer) ** 2}


def gram_rows(seconds, sizes):
    rows = []
    for layer, times in seconds.items():
        strips, whole, norms = (1000 * median(times[name]) for name in ("strips", "whole", "norms"))
        note = f"a batch takes {whole:.0f} ms, and {strips:.0f} ms with strips; the norms {norms:.0f} ms"
        name = f"whole Gram matrices, layer {layer} (K = {heads_after(layer)})"
        rows.append(row(name, ratio(times["whole"], times["strips"]), "x strips", note=note))
    strips, whole = (sum(size[form] for size in sizes) / 1e9 for form in ("strips", "whole"))
    rows.append(row("whole Gram matrices of all layers, memory", whole, "GB", note="N K² numbers each"))
    note = f"{strips / whole:.2f} of the whole"
    rows.append(row("strips of all layers, memory", strips, "GB", note=note))
    return rows


# importing matplotlib


def import_matplotlib():
    """Import it after the imports of a stage. Returns seconds, and bytes of resident memory."""
    importlib.import_module("utils.model.clip")
    start = time.perf_counter()
    before = kilobytes(os.getpid(), "status", "VmRSS")
    importlib.import_module("matplotlib.pyplot")
    memory = 1024 * (kilobytes(os.getpid(), "status", "VmRSS") - before)
    return {"seconds": time.perf_counter() - start, "memory": memory}


def import_rows(imports):
    seconds, memory = (median(found[key] for found in imports) for key in ("seconds", "memory"))
    note = f"median of {len(imports)} processes, after torch and open_clip"
    named = [("memory", memory / 1e6, "MB"), ("time", seconds, "s")]
    return [row(f"import matplotlib, {what}", value, unit, note=note) for what, value, unit in named]


# both of them


def set_up(args, folder):
    """Return the functions that take turns, {layer: {way: function}}."""
    torch.manual_seed(0)
    grams = {layer: gram_functions(layer, args.neurons) for layer in (EARLY, LATE)}
    for ways in grams.values():
        torch.testing.assert_close(ways["strips"](), ways["whole"]())
    return grams


@torch.inference_mode()
def measure(args, grams):
    seconds = {layer: interleaved(ways, args.rounds) for layer, ways in grams.items()}
    sizes = [gram_bytes(layer, args.neurons) for layer in range(L - 1)]
    imports = [alone(import_matplotlib)[0] for _ in range(args.processes)]
    return seconds, sizes, imports


def table(args, found):
    seconds, sizes, imports = found
    rows = gram_rows(seconds, sizes) + import_rows(imports)
    return Table("tricks", f"Tricks, ViT-B-32, batches of {BATCH} images", rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__, device=False)
    parser.add_argument("--neurons", type=int, default=3072)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processes", type=int, default=3, help="imports")
    run(parser, set_up, measure, table, quick={"neurons": 64, "rounds": 1, "processes": 1})
