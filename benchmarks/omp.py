"""Orthogonal matching pursuit: ours against scikit-learn's, SPAMS and orthogonal-matching-pursuit-gpu, the
last two if installed.

    python -m benchmarks.omp [--texts 30000] [--atoms 128] [--neurons 512] [--device cpu] [--quick]

Every measurement is a process of its own, so that its peak memory is its own; ours and scikit-learn's take
turns. Times are for a
neuron once the dictionary is ready: the texts x texts Gram matrix that scikit-learn and the GPU package need
is made before, its cost is in the note (SPAMS makes its own inside). scikit-learn's copy of it takes 11 GB at
30,000 texts. SPAMS chooses its atoms
otherwise: it divides a correlation by what is left of the atom beside those chosen before (order-recursive
    pursuit).
"""

import importlib
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import orthogonal_mp_gram

from benchmarks.common import Table, alone, bench_parser, median, row, run
from utils.omp import make_atoms, orthogonal_matching_pursuit


def ours(atoms, targets, S, gram):
    return [
        array.cpu().numpy() for array in orthogonal_matching_pursuit(atoms, targets, S)
    ]  # waits for the device


def scikit_learn(atoms, targets, S, gram):
    atoms, targets, gram = atoms.numpy(), targets.numpy(), gram.numpy()
    return np.concatenate([orthogonal_mp_gram(gram, atoms @ t, n_nonzero_coefs=S)[None] for t in targets])


def spams(atoms, targets, S, gram):
    package = importlib.import_module("spams")
    return package.omp(
        np.asfortranarray(targets.numpy().T), np.asfortranarray(atoms.numpy().T), L=S
    ).T.toarray()


def gpu_package(atoms, targets, S, gram):
    package = importlib.import_module("orthogonal_matching_pursuit_gpu")
    support, coefficients, _ = package.omp_v0(atoms.T, targets, gram, n_nonzero_coefs=S)
    return support.cpu().numpy(), coefficients[..., 0].cpu().numpy()


class Method(NamedTuple):
    """A matching pursuit.

    pursue: function of atoms [texts, D], targets [n, D], their number S and the Gram matrix; returns support
        and coefficients [n, S], or all coefficients [n, texts].
    package: that it needs.
    gram: whether it needs the Gram matrix.
    unit: whether it is written for atoms of norm 1.
    most: targets at a time; the GPU package holds atoms x texts numbers for each of them.
    """

    pursue: Any
    package: str = "torch"
    gram: bool = False
    unit: bool = False
    most: int = 10**9


METHODS = {
    "ours": Method(ours),
    "scikit-learn": Method(scikit_learn, "sklearn", gram=True),
    "SPAMS": Method(spams, "spams", unit=True),
    "orthogonal-matching-pursuit-gpu": Method(
        gpu_package, "orthogonal_matching_pursuit_gpu", gram=True, unit=True, most=64
    ),
}


def text_like(texts, targets, D=512, seed=0):
    """Vectors that look like text vectors: unit, with a common mean and a decaying spectrum; and unit targets
    in their span.
    """
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((D, D), dtype=np.float32))[0]
    spread = (np.arange(1, D + 1, dtype=np.float32) ** -0.5)[:, None] * rotation

    def draw(n, mean):
        vectors = rng.standard_normal((n, D), dtype=np.float32) @ spread + mean
        return torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    mean = rng.standard_normal(D, dtype=np.float32) / D**0.5
    return draw(texts, 3 * mean), draw(targets, 0)


def problem(texts, targets, unit):
    """Atoms of norm 1, or as the stage has them; and targets."""
    vectors, targets = text_like(texts, targets)
    return make_atoms(vectors, "text") / 100 if unit else make_atoms(vectors), targets


@torch.no_grad()
def solve(method, texts, atoms, neurons, unit, device, file):
    """One method on one problem, in this process. Saves the code; returns seconds for a neuron and for the
    Gram matrix.
    """
    how, S = METHODS[method], atoms
    atoms, targets = (tensor.to(device) for tensor in problem(texts, neurons, unit))
    start = time.perf_counter()
    gram = atoms @ atoms.T if how.gram else None
    if how.gram:
        gram[0, 0].item()  # waits for the device
    gram_seconds = time.perf_counter() - start
    code = how.pursue(atoms, targets, S, gram)
    seconds = time.perf_counter() - start - gram_seconds
    if isinstance(code, np.ndarray):
        support = np.argsort(-np.abs(code), axis=1)[:, :S]
        code = support, np.take_along_axis(code, support, axis=1)
    np.savez(file, support=code[0], coefficients=code[1])
    return {"seconds": seconds / neurons, "gram": gram_seconds}


def pursue(method, texts, atoms, neurons, unit=False, device="cpu"):
    """`solve` in a process of its own: {seconds, gram, peak, support, coefficients}."""
    with tempfile.TemporaryDirectory() as folder:
        file, sizes = str(Path(folder) / "code.npz"), {"texts": texts, "atoms": atoms, "neurons": neurons}
        found, process = alone(solve, method=method, **sizes, unit=unit, device=device, file=file)
        return {**found, "peak": process.peak, **np.load(file)}


def agreement(mine, theirs, atoms, targets):
    """Share of common atoms, and the largest relative difference of the residuals' norms, over the first
    targets.
    """
    n = len(theirs["support"])

    def residuals(code):
        chosen = atoms[torch.from_numpy(code["support"][:n].clip(0)).long()]
        return (
            targets[:n]
            - torch.einsum("ns,nsd->nd", torch.from_numpy(code["coefficients"][:n]).float(), chosen)
        ).norm(dim=1)

    common = [
        len(np.intersect1d(a, b)) / len(b) for a, b in zip(mine["support"], theirs["support"], strict=False)
    ]
    return np.mean(common), float((residuals(mine) / residuals(theirs) - 1).abs().max())


def set_up(args, folder):
    """The methods whose packages are installed, besides ours."""
    return [
        name
        for name, method in METHODS.items()
        if name != "ours" and importlib.util.find_spec(method.package)
    ]


def measure(args, methods):
    """{method: (runs of ours, runs of the method)}, and the curve: list of (texts, atoms, ours,
    scikit-learn's).
    """
    sizes = {"texts": args.texts, "atoms": args.atoms, "device": args.device}
    mine, theirs = [], []
    for _ in range(args.rounds):
        mine.append(pursue("ours", neurons=args.neurons, **sizes))
        theirs.append(pursue("scikit-learn", neurons=args.targets, **sizes))
    runs = {"scikit-learn": (mine, theirs)}
    for name in methods:
        if METHODS[name].unit:  # another dictionary, so ours once more
            many = min(args.neurons, METHODS[name].most)
            pair = [("ours", args.neurons), (name, many)]
            runs[name] = tuple(
                [pursue(method, neurons=neurons, unit=True, **sizes)] for method, neurons in pair
            )
    return runs, [measure_point(args, *point) for point in points(args)]


def points(args):
    """Sizes (texts, atoms) of the curve."""
    if args.quick:
        return [(300, 8), (600, 4)]
    curve = [(texts, args.atoms) for texts in (1000, 3000, 10000, 30000)]
    return list(dict.fromkeys(curve + [(args.texts, atoms) for atoms in (4, 8, 16, 32, 64, 128)]))


def measure_point(args, texts, atoms):
    sizes = {"texts": texts, "atoms": atoms, "device": args.device}
    mine = pursue("ours", neurons=min(args.neurons, 256), **sizes)
    return texts, atoms, mine, pursue("scikit-learn", neurons=min(args.targets, 2), **sizes)


def table(args, found):
    runs, curve = found
    mine, peak_bar = runs["scikit-learn"][0], 1.5 if args.device == "cpu" else None
    seconds, peak = median(result["seconds"] for result in mine), max(result["peak"] for result in mine)
    rows = [
        row("ours, a neuron", 1000 * seconds, "ms", note=f"{args.neurons} neurons"),
        row("ours, peak memory", peak / 1e9, "GB", at_most=peak_bar),
    ]
    rows += [method_row(args, name, *pair) for name, pair in runs.items()] + [
        curve_row(*point) for point in curve
    ]
    return Table("omp", f"Orthogonal matching pursuit, {args.texts:,} texts x 512, {args.atoms} atoms", rows)


def method_row(args, name, mine, theirs):
    unit, last = METHODS[name].unit, theirs[0]
    seconds = [median(result["seconds"] for result in results) for results in (theirs, mine)]
    common, difference = agreement(mine[0], last, *problem(args.texts, args.neurons, unit))
    note = f"{seconds[0]:.3g} s a neuron ({len(last['support'])}), {last['peak'] / 1e9:.1f} GB, "
    note += f"Gram {last['gram']:.0f} s before; " if METHODS[name].gram else ""
    note += f"{100 * common:.1f} % common atoms, residuals within {difference:.0e}"
    return row(
        f"{name}, a neuron", seconds[0] / seconds[1], "x ours", at_least=None if unit else 25, note=note
    )


def curve_row(texts, atoms, mine, theirs):
    note = f"{1000 * mine['seconds']:.3g} ms, {mine['peak'] / 1e9:.2f} GB; "
    note += f"theirs {1000 * theirs['seconds']:.3g} ms, {theirs['peak'] / 1e9:.1f} GB"
    return row(
        f"scikit-learn, {texts:,} texts, {atoms} atoms",
        theirs["seconds"] / mine["seconds"],
        "x ours",
        note=note,
    )


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--texts", type=int, default=30000)
    parser.add_argument("--atoms", type=int, default=128)
    parser.add_argument("--neurons", type=int, default=512, help="for ours")
    parser.add_argument("--targets", type=int, default=4, help="for scikit-learn, which is slow")
    parser.add_argument("--rounds", type=int, default=2)
    run(
        parser,
        set_up,
        measure,
        table,
        quick={"texts": 600, "atoms": 8, "neurons": 8, "targets": 2, "rounds": 1},
    )
