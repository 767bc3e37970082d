"""Compare our OMP with scikit-learn's, and with SPAMS and orthogonal-matching-pursuit-gpu if installed.

    python -m benchmarks.omp [--texts 30000] [--atoms 128] [--neurons 512] [--device cpu] [--quick]

Every measurement is a process of its own, so that its peak memory is its own; ours and scikit-learn's take
turns. Times are for a neuron once the dictionary is ready. scikit-learn and the GPU package need the texts x
texts Gram matrix; it is made before, and its cost is in the note (SPAMS makes its own inside). scikit-learn's
copy of it takes 11 GB at 30,000 texts. SPAMS chooses its atoms otherwise: it divides a correlation by the
norm of the atom beyond those chosen before (order-recursive pursuit).
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
    code = orthogonal_matching_pursuit(atoms, targets, S)
    return [array.cpu().numpy() for array in code]  # waits for the device


def scikit_learn(atoms, targets, S, gram):
    atoms, targets, gram = (array.numpy() for array in (atoms, targets, gram))
    return np.stack([orthogonal_mp_gram(gram, atoms @ target, n_nonzero_coefs=S) for target in targets])


def spams(atoms, targets, S, gram):
    package = importlib.import_module("spams")
    X, D = (np.asfortranarray(array.numpy().T) for array in (targets, atoms))
    return package.omp(X, D, L=S).T.toarray()


def gpu_package(atoms, targets, S, gram):
    package = importlib.import_module("orthogonal_matching_pursuit_gpu")
    support, coefficients, _ = package.omp_v0(atoms.T, targets, gram, n_nonzero_coefs=S)
    return support.cpu().numpy(), coefficients[..., 0].cpu().numpy()


class Method(NamedTuple):
    """A `Method` is an implementation of OMP.

    pursue: function of atoms [texts, D], targets [n, D], atoms per target S and the Gram matrix. It returns
        support and coefficients [n, S], or all coefficients [n, texts].
    package: the package that it needs.
    gram: whether it needs the Gram matrix.
    unit: whether it is written for atoms of norm 1.
    most: targets at a time; the GPU package holds atoms x texts numbers for each of them.
    """

    pursue: Any
    package: str = "torch"
    gram: bool = False
    unit: bool = False
    most: int = 10**9


GPU = Method(gpu_package, "orthogonal_matching_pursuit_gpu", gram=True, unit=True, most=64)
METHODS = {
    "ours": Method(ours),
    "scikit-learn": Method(scikit_learn, "sklearn", gram=True),
    "SPAMS": Method(spams, "spams", unit=True),
    "orthogonal-matching-pursuit-gpu": GPU,
}


def text_like(texts, targets, D=512, seed=0):
    """Return vectors that look like text vectors, and unit targets in their span.

    Text vectors are unit, with a common mean and a decaying spectrum.
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
    """Return atoms, of norm 1 or as the stage has them, and targets."""
    vectors, targets = text_like(texts, targets)
    return make_atoms(vectors, "text") / 100 if unit else make_atoms(vectors), targets


@torch.no_grad()
def solve(method, texts, atoms, neurons, unit, device, file):
    """Solve one problem by one method, in this process, and save the code.

    Returns seconds for a neuron and for the Gram matrix.
    """
    how = METHODS[method]
    S = atoms
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
    """Call `solve` in a process of its own. Returns {seconds, gram, peak, support, coefficients}."""
    sizes = {"texts": texts, "atoms": atoms, "neurons": neurons}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "code.npz")
        found, process = alone(solve, method=method, **sizes, unit=unit, device=device, file=file)
        return {**found, "peak": process.peak, **np.load(file)}


def agreement(mine, theirs, atoms, targets):
    """Return the share of common atoms, and the largest relative difference of the residuals' norms.

    Both are over the targets that theirs has.
    """
    n = len(theirs["support"])

    def residuals(code):
        chosen = atoms[torch.from_numpy(code["support"][:n].clip(0)).long()]
        coefficients = torch.from_numpy(code["coefficients"][:n]).float()
        return (targets[:n] - torch.einsum("ns,nsd->nd", coefficients, chosen)).norm(dim=1)

    pairs = zip(mine["support"], theirs["support"], strict=False)
    common = [len(np.intersect1d(a, b)) / len(b) for a, b in pairs]
    return np.mean(common), float((residuals(mine) / residuals(theirs) - 1).abs().max())


def set_up(args, folder):
    """List the methods whose packages are installed, besides ours."""
    others = [name for name in METHODS if name != "ours"]
    return [name for name in others if importlib.util.find_spec(METHODS[name].package)]


def measure(args, methods):
    """Return {method: (runs of ours, runs of the method)}, and the curve.

    The curve is a list of (texts, atoms, ours, scikit-learn's).
    """
    sizes = {"texts": args.texts, "atoms": args.atoms, "device": args.device}
    mine = []
    theirs = []
    for _ in range(args.rounds):
        mine.append(pursue("ours", neurons=args.neurons, **sizes))
        theirs.append(pursue("scikit-learn", neurons=args.targets, **sizes))
    runs = {"scikit-learn": (mine, theirs)}
    for name in methods:
        if METHODS[name].unit:  # another dictionary, so ours once more
            of_ours = pursue("ours", neurons=args.neurons, unit=True, **sizes)
            many = min(args.neurons, METHODS[name].most)
            runs[name] = ([of_ours], [pursue(name, neurons=many, unit=True, **sizes)])
    return runs, [measure_point(args, *point) for point in points(args)]


def points(args):
    """Return the sizes (texts, atoms) of the curve."""
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
    mine, _ = runs["scikit-learn"]
    seconds = median(result["seconds"] for result in mine)
    peak = max(result["peak"] for result in mine)
    peak_bar = 1.5 if args.device == "cpu" else None
    rows = [
        row("ours, a neuron", 1000 * seconds, "ms", note=f"{args.neurons} neurons"),
        row("ours, peak memory", peak / 1e9, "GB", at_most=peak_bar),
    ]
    rows += [method_row(args, name, *pair) for name, pair in runs.items()]
    rows += [curve_row(*point) for point in curve]
    return Table("omp", f"Orthogonal matching pursuit, {args.texts:,} texts x 512, {args.atoms} atoms", rows)


def method_row(args, name, mine, theirs):
    unit = METHODS[name].unit
    last = theirs[0]
    seconds = [median(result["seconds"] for result in results) for results in (theirs, mine)]
    common, difference = agreement(mine[0], last, *problem(args.texts, args.neurons, unit))
    note = f"{seconds[0]:.3g} s a neuron ({len(last['support'])}), {last['peak'] / 1e9:.1f} GB, "
    note += f"Gram {last['gram']:.0f} s before; " if METHODS[name].gram else ""
    note += f"{100 * common:.1f} % common atoms, residuals within {difference:.0e}"
    bar = None if unit else 25
    return row(f"{name}, a neuron", seconds[0] / seconds[1], "x ours", at_least=bar, note=note)


def curve_row(texts, atoms, mine, theirs):
    note = f"{1000 * mine['seconds']:.3g} ms, {mine['peak'] / 1e9:.2f} GB; "
    note += f"theirs {1000 * theirs['seconds']:.3g} ms, {theirs['peak'] / 1e9:.1f} GB"
    what = f"scikit-learn, {texts:,} texts, {atoms} atoms"
    return row(what, theirs["seconds"] / mine["seconds"], "x ours", note=note)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--texts", type=int, default=30000)
    parser.add_argument("--atoms", type=int, default=128)
    parser.add_argument("--neurons", type=int, default=512, help="for ours")
    parser.add_argument("--targets", type=int, default=4, help="for scikit-learn, which is slow")
    parser.add_argument("--rounds", type=int, default=2)
    quick = {"texts": 600, "atoms": 8, "neurons": 8, "targets": 2, "rounds": 1}
    run(parser, set_up, measure, table, quick=quick)
