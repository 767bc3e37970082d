"""Orthogonal matching pursuit: ours against scikit-learn's, SPAMS and orthogonal-matching-pursuit-gpu, the last two if installed.

    python benchmarks/omp.py [--texts 30000] [--atoms 128] [--neurons 512] [--device cpu] [--quick]

Every measurement is a process of its own, so that its peak memory is its own; ours and scikit-learn's take turns. Times are for a
neuron once the dictionary is ready: the texts x texts Gram matrix that scikit-learn and the GPU package need is made before, its
cost is in the note (SPAMS makes its own inside). scikit-learn's copy of it takes 11 GB at 30,000 texts. SPAMS chooses its atoms
otherwise: it divides a correlation by what is left of the atom beside those chosen before (order-recursive pursuit).
"""

import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import bench_parser, measured, median, row, save_table
from sklearn.linear_model import orthogonal_mp_gram

from utils.sparse_coding import make_atoms, orthogonal_matching_pursuit

METHODS = {
    "scikit-learn": "sklearn",
    "SPAMS": "spams",
    "orthogonal-matching-pursuit-gpu": "orthogonal_matching_pursuit_gpu",
}
UNIT_ATOMS = ("SPAMS", "orthogonal-matching-pursuit-gpu")  # they are written for atoms of norm 1


def text_like(texts, targets, D=512, seed=0):
    """Vectors that look like text vectors: unit, with a common mean and a decaying spectrum; and unit targets in their span."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((D, D), dtype=np.float32))[0]
    spread = (np.arange(1, D + 1, dtype=np.float32) ** -0.5)[:, None] * rotation

    def draw(n, mean):
        vectors = rng.standard_normal((n, D), dtype=np.float32) @ spread + mean
        return torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    mean = rng.standard_normal(D, dtype=np.float32) / D**0.5
    return draw(texts, 3 * mean), draw(targets, 0)


def solve(args):
    """One method on one problem, in this process. Prints json: seconds a neuron, seconds for the Gram matrix; saves the code."""
    torch.set_grad_enabled(False)
    vectors, targets = text_like(args.texts, args.neurons)
    atoms = make_atoms(vectors, "text" if args.unit else "axis")
    if args.unit:
        atoms /= 100
    del vectors
    S, gram_seconds = args.atoms, 0.0
    start = time.perf_counter()
    if args.method == "ours":
        atoms, targets = atoms.to(args.device), targets.to(args.device)
        support, coefficients = orthogonal_matching_pursuit(atoms, targets, S)
        support, coefficients = support.cpu().numpy(), coefficients.cpu().numpy()  # waits for the device
    elif args.method == "SPAMS":
        import spams

        code = spams.omp(np.asfortranarray(targets.numpy().T), np.asfortranarray(atoms.numpy().T), L=S).T.toarray()
    elif args.method == "scikit-learn":
        atoms, targets = atoms.numpy(), targets.numpy()
        gram = atoms @ atoms.T
        gram_seconds = time.perf_counter() - start
        code = np.concatenate([orthogonal_mp_gram(gram, atoms @ t, n_nonzero_coefs=S)[None] for t in targets])
    else:
        from orthogonal_matching_pursuit_gpu import omp_v0

        atoms, targets = atoms.to(args.device), targets.to(args.device)
        gram = atoms @ atoms.T
        gram.sum().item()  # waits for the device
        gram_seconds = time.perf_counter() - start
        support, coefficients, _ = omp_v0(atoms.T, targets, gram, n_nonzero_coefs=S)
        support, coefficients = support.cpu().numpy(), coefficients[..., 0].cpu().numpy()
    seconds = time.perf_counter() - start - gram_seconds
    if args.method in ("scikit-learn", "SPAMS"):
        support = np.argsort(-np.abs(code), axis=1)[:, :S]
        coefficients = np.take_along_axis(code, support, axis=1)
    np.savez(args.save, support=support, coefficients=coefficients)
    print(json.dumps({"seconds": seconds / args.neurons, "gram": gram_seconds}))


def run(method, texts, atoms, neurons, args, unit=False):
    """`solve` in a process of its own: {seconds, gram, peak, support, coefficients}."""
    with tempfile.TemporaryDirectory() as folder:
        save = Path(folder) / "code.npz"
        command = [sys.executable, __file__, "--method", method, "--texts", texts, "--atoms", atoms, "--neurons", neurons]
        output, _, peak, _ = measured([*command, "--device", args.device, "--save", save, *(["--unit"] if unit else [])])
        code = dict(np.load(save))
    return {**json.loads(output.splitlines()[-1]), "peak": peak, **code}


def agreement(ours, theirs, texts, neurons, unit):
    """Share of common atoms, and the largest relative difference of the residuals' norms, over the first targets."""
    vectors, targets = text_like(texts, neurons)
    atoms = make_atoms(vectors, "text" if unit else "axis") / (100 if unit else 1)
    n = len(theirs["support"])

    def residuals(code):
        chosen = atoms[torch.from_numpy(code["support"][:n].clip(0)).long()]
        return (targets[:n] - torch.einsum("ns,nsd->nd", torch.from_numpy(code["coefficients"][:n]).float(), chosen)).norm(dim=1)

    common = [len(np.intersect1d(a, b)) / len(b) for a, b in zip(ours["support"], theirs["support"], strict=False)]
    return np.mean(common), float((residuals(ours) / residuals(theirs) - 1).abs().max())


def main(args):
    if args.quick:
        args.texts, args.atoms, args.neurons, args.targets, args.rounds = 600, 8, 8, 2, 1
    methods = [name for name, module in METHODS.items() if importlib.util.find_spec(module)]
    rows, runs = [], {}
    for _ in range(args.rounds):
        for method in ("ours", "scikit-learn"):
            neurons = args.neurons if method == "ours" else args.targets
            runs.setdefault(method, []).append(run(method, args.texts, args.atoms, neurons, args))
    ours = median(result["seconds"] for result in runs["ours"])
    peak = max(result["peak"] for result in runs["ours"])
    rows.append(row("ours, a neuron", 1000 * ours, "ms", None, f"{args.neurons} neurons"))
    rows.append(row("ours, peak memory", peak / 1e9, "GB", 1.5 if args.device == "cpu" else None))
    for method in methods:
        unit = method in UNIT_ATOMS
        mine, theirs = runs["ours"], runs.get(method)
        if unit:  # another dictionary, so ours once more
            # the GPU package holds atoms x texts numbers for each target of its batch
            many = min(args.neurons, 64) if "gpu" in method else args.neurons
            mine = [run("ours", args.texts, args.atoms, args.neurons, args, unit)]
            theirs = [run(method, args.texts, args.atoms, many, args, unit)]
        seconds = [median(result["seconds"] for result in results) for results in (theirs, mine)]
        common, difference = agreement(mine[0], theirs[0], args.texts, args.neurons, unit)
        note = f"{seconds[0]:.3g} s a neuron ({len(theirs[0]['support'])}), {theirs[0]['peak'] / 1e9:.1f} GB, "
        note += f"Gram {theirs[0]['gram']:.0f} s before; " if theirs[0]["gram"] else ""
        note += f"{100 * common:.1f} % common atoms, residuals within {difference:.0e}"
        rows.append(row(f"{method}, a neuron", seconds[0] / seconds[1], "x ours", None if unit else (25,), note))

    curve = [(texts, args.atoms) for texts in (1000, 3000, 10000, 30000)]
    curve += [(args.texts, atoms) for atoms in (4, 8, 16, 32, 64, 128)]
    for texts, atoms in dict.fromkeys(curve) if not args.quick else [(300, 8), (600, 4)]:
        mine = run("ours", texts, atoms, min(args.neurons, 256), args)
        theirs = run("scikit-learn", texts, atoms, min(args.targets, 2), args)
        note = f"{1000 * mine['seconds']:.3g} ms, {mine['peak'] / 1e9:.2f} GB; "
        note += f"theirs {1000 * theirs['seconds']:.3g} ms, {theirs['peak'] / 1e9:.1f} GB"
        ratio = theirs["seconds"] / mine["seconds"]
        rows.append(row(f"scikit-learn, {texts:,} texts, {atoms} atoms", ratio, "x ours", None, note))
    title = f"Orthogonal matching pursuit, {args.texts:,} texts x 512, {args.atoms} atoms"
    save_table("omp", title, rows, args, args.device)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--texts", type=int, default=30000)
    parser.add_argument("--atoms", type=int, default=128)
    parser.add_argument("--neurons", type=int, default=512, help="for ours")
    parser.add_argument("--targets", type=int, default=4, help="for scikit-learn, which is slow")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    group = parser.add_argument_group("one measurement, used by the script itself")
    group.add_argument("--method", choices=["ours", *METHODS])
    group.add_argument("--unit", action="store_true", help="atoms of norm 1")
    group.add_argument("--save", help="file of the code")
    args = parser.parse_args()
    solve(args) if args.method else main(args)
