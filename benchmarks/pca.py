"""compute_pcas.py on a store of the paper's size, against numpy's SVD on the dense effects.

    python benchmarks/pca.py [--images 5124] [--heads 24] [--neurons 3072] [--sample 8] [--tmp FOLDER] [--quick]

A synthetic factorised store (1.5 GB) is streamed to a temporary folder and removed afterwards. The comparison takes a sample of
neurons: their dense effects in memory, mean, norms, and numpy's SVD, of the top images' rows and of all rows.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, bench_parser, measured, median, row, save_table

from utils.artifacts import Names

LAYER = 9


def write_store(names, images, K, N, e, D, rng):
    """A store with random directions and coefficients that have a common mean and an uneven spread over the heads."""

    def effects(part):
        return names.effects("imagenet", "train", LAYER, part)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    np.save(effects("values"), normal(K, N, e) / e)
    np.save(effects("outputs"), normal(K, e, D) / D**0.5)
    np.save(effects("bias"), 1e-4 * normal(images, D))
    mean, spread = normal(K, N), (1 / np.arange(1, K + 1, dtype=np.float32))[:, None]
    with open(effects("coefficients"), "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (images, K, N)}
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(images):
            file.write((mean + spread * normal(K, N) * np.abs(normal(1, N))).data)


def dense_effects(names, neuron):
    """Effects of one neuron, [images, D]."""
    C, values, outputs, bias = (
        np.load(names.effects("imagenet", "train", LAYER, part), mmap_mode="r")
        for part in ("coefficients", "values", "outputs", "bias")
    )
    return C[:, :, neuron] @ np.einsum("ke,keo->ko", values[:, neuron], outputs) + bias


def numpy_pca(effects, k, all_rows=False):
    """The definition with numpy: effects [images, D] -> first right singular vector [D], its k largest norms, ascending."""
    centred = effects - effects.mean(axis=0)
    norms = np.linalg.norm(centred, axis=1)
    top = np.argsort(norms)[-k:]
    r = np.linalg.svd(centred if all_rows else centred[top], full_matrices=False)[2][0]
    positive = (centred[top] @ r > 0).sum() * 2 > k
    return (r if positive else -r), norms[top]


def main(args):
    if args.quick:
        args.images, args.neurons, args.sample = 300, 64, 2
    e, D, k = 64, 512, 100
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        names = Names(folder, "ViT-B-32", "random")
        write_store(names, args.images, args.heads, args.neurons, e, D, np.random.default_rng(0))
        flags = ["--model", "ViT-B-32", "--pretrained", "random", "--mlp_layer", LAYER, "--top_k_pca", k]
        script = [sys.executable, ROOT / "compute_pcas.py", *flags, "--device", args.device, "--output_dir", folder]
        _, seconds, peak, _ = measured(script)
        store = sum(file.stat().st_size for file in Path(folder).glob("*_coefficients.npy"))
        pcas = np.load(names.statistics("imagenet", LAYER, f"{k}_pca"))
        norms = np.load(names.statistics("imagenet", LAYER, f"{k}_norm"))

        times, cosines, differences = {False: [], True: []}, [], []
        for neuron in np.linspace(0, args.neurons - 1, args.sample).astype(int):
            effects = dense_effects(names, neuron)
            for all_rows in times:
                start = time.perf_counter()
                r, top = numpy_pca(effects, k, all_rows)
                times[all_rows].append(time.perf_counter() - start)
                if not all_rows:
                    cosines.append(float(pcas[neuron] @ r))
                    differences.append(float(np.abs(norms[neuron] / top - 1).max()))

    dense = args.images * args.neurons * D * 4
    rows = [
        row("compute_pcas.py, the whole process", seconds, "s", 60, f"{store / 1e9:.2f} GB store"),
        row("compute_pcas.py, peak memory", peak / 1e9, "GB", 3),
    ]
    for all_rows, name in ((False, f"numpy, SVD of the {k} top rows"), (True, "numpy, SVD of all rows")):
        total = median(times[all_rows]) * args.neurons
        note = f"extrapolated from {args.sample} neurons to {total:.0f} s; their {dense / 1e9:.0f} GB already in memory"
        rows.append(row(name, total / seconds, "x ours", None, note))
    rows.append(row("smallest cosine with numpy's direction, sign included", min(cosines), "", (0.9999,)))
    rows.append(row("largest relative difference of the norms", max(differences), "", 1e-4))
    title = f"Principal components, {args.images:,} images x {args.heads} heads x {args.neurons:,} neurons x {D}"
    save_table("pca", title, rows, args, args.device)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--images", type=int, default=5124)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--neurons", type=int, default=3072)
    parser.add_argument("--sample", type=int, default=8, help="neurons that go through numpy")
    parser.add_argument("--tmp", help="where the store is put for the time of the run; default: the system's temporary folder")
    parser.add_argument("--device", default="cpu")
    main(parser.parse_args())
