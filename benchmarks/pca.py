"""Compare compute_pcas.py, on a store of the paper's size, with numpy's SVD on the dense effects.

    python -m benchmarks.pca [--images 5124] [--heads 24] [--neurons 3072] [--sample 8] [--tmp FOLDER] \\
        [--quick]

A synthetic factorised store (1.5 GB) is streamed to a temporary folder and removed afterwards. The comparison
takes a sample of neurons: their dense effects in memory, mean, norms, and numpy's SVD, of the top images'
rows and of all rows.
"""

import time

import numpy as np

from benchmarks.common import Table, bench_parser, median, row, run, stage
from utils.runtime.results import Results

LAYER, TOP, D = 9, 100, 512


def store_path(results, kind):
    return results.path(kind, dataset="imagenet", split="train", layer=LAYER)


def write_store(results, sizes):
    """Write a store with random directions and random coefficients.

    The coefficients have a common mean and an uneven spread over the heads.

    sizes: {letter: size} of images, K, N, e and D.
    """
    images, K, N, e, D = (sizes[letter] for letter in ("images", "K", "N", "e", "D"))
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    np.save(store_path(results, "values"), normal(K, N, e) / e)
    np.save(store_path(results, "outputs"), normal(K, e, D) / D**0.5)
    np.save(store_path(results, "bias"), 1e-4 * normal(images, D))
    mean = normal(K, N)
    spread = (1 / np.arange(1, K + 1, dtype=np.float32))[:, None]
    with open(store_path(results, "coefficients"), "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (images, K, N)}
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(images):
            file.write((mean + spread * normal(K, N) * np.abs(normal(1, N))).data)


def dense_effects(results, neuron):
    """Return the effects of one neuron, [images, D]."""
    kinds = ("coefficients", "values", "outputs", "bias")
    C, values, outputs, bias = (np.load(store_path(results, kind), mmap_mode="r") for kind in kinds)
    return C[:, :, neuron] @ np.einsum("ke,keo->ko", values[:, neuron], outputs) + bias


def numpy_pca(effects, all_rows=False):
    """Compute the first right singular vector [D] and the TOP largest norms, ascending, with numpy.

    effects: [images, D].
    """
    centred = effects - effects.mean(axis=0)
    norms = np.linalg.norm(centred, axis=1)
    top = np.argsort(norms)[-TOP:]
    r = np.linalg.svd(centred if all_rows else centred[top], full_matrices=False)[2][0]
    positive = (centred[top] @ r > 0).sum() * 2 > TOP
    return (r if positive else -r), norms[top]


def set_up(args, folder):
    results = Results(folder, "ViT-B-32", "random")
    write_store(results, {"images": args.images, "K": args.heads, "N": args.neurons, "e": 64, "D": D})
    return results


def measure(args, results):
    """Return compute_pcas' `Process`, the bytes of the store, numpy's times, and how far it is from ours.

    times: {all rows or not: [seconds of each neuron]}.
    agreement: [(cosine, relative difference of the norms) of each neuron].
    """
    flags = ["--model", "ViT-B-32", "--pretrained", "random", "--mlp_layer", LAYER, "--top_k_pca", TOP]
    flags += ["--device", args.device, "--output_dir", results.directory]
    process = stage("compute_pcas", *flags)
    names = {"dataset": "imagenet", "layer": LAYER, "k": TOP}
    pcas, norms = (np.load(results.path(kind, **names)) for kind in ("pca", "norm"))
    times = {False: [], True: []}
    agreement = []
    for neuron in np.linspace(0, args.neurons - 1, args.sample).astype(int):
        effects = dense_effects(results, neuron)
        for all_rows in times:
            start = time.perf_counter()
            r, top = numpy_pca(effects, all_rows)
            times[all_rows].append(time.perf_counter() - start)
            if not all_rows:
                agreement.append((pcas[neuron] @ r, np.abs(norms[neuron] / top - 1).max()))
    return process, store_path(results, "coefficients").stat().st_size, times, agreement


def table(args, found):
    process, store, times, agreement = found
    cosines, differences = zip(*agreement, strict=True)
    whole = "compute_pcas.py, the whole process"
    rows = [
        row(whole, process.seconds, "s", at_most=60, note=f"{store / 1e9:.2f} GB store"),
        row("compute_pcas.py, peak memory", process.peak / 1e9, "GB", at_most=3),
    ]
    dense = args.images * args.neurons * D * 4
    for all_rows, name in ((False, f"numpy, SVD of the {TOP} top rows"), (True, "numpy, SVD of all rows")):
        total = median(times[all_rows]) * args.neurons
        note = f"extrapolated from {args.sample} neurons to {total:.0f} s"
        note += f"; their {dense / 1e9:.0f} GB already in memory"
        rows.append(row(name, total / process.seconds, "x ours", note=note))
    rows.append(row("smallest cosine with numpy's direction, sign included", min(cosines), at_least=0.9999))
    rows.append(row("largest relative difference of the norms", max(differences), at_most=1e-4))
    sizes = f"{args.images:,} images x {args.heads} heads x {args.neurons:,} neurons x {D}"
    return Table("pca", f"Principal components, {sizes}", rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--images", type=int, default=5124)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--neurons", type=int, default=3072)
    parser.add_argument("--sample", type=int, default=8, help="neurons that go through numpy")
    run(parser, set_up, measure, table, quick={"images": 300, "neurons": 64, "sample": 2})
