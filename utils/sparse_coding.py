"""Sparse text descriptions: atoms from text vectors, and batched orthogonal matching pursuit (section 4.3 of the paper)."""

import hashlib
import json

import scipy.sparse
import torch
from tqdm import tqdm

from utils.artifacts import load_array, load_meta, meta_path, read_texts, save_atomic, save_json
from utils.errors import UserError


def load_texts(names, name, descriptions_dir, flags):
    """A text set that compute_text_set_projection.py embedded: its texts, vectors [texts, D], and the weights' fingerprint.

    The texts lie beside the vectors; for vectors of the published code they are DESCRIPTIONS_DIR/NAME.txt.
    """
    path = names.texts(name)
    vectors = load_array(path, f"python compute_text_set_projection.py --text_descriptions {name} {flags}", (None, None))
    beside = path.with_suffix(".txt")
    file = beside if beside.is_file() else f"{descriptions_dir}/{name}.txt"
    texts = read_texts(file)
    if len(texts) != len(vectors):
        raise UserError(f"{file} has {len(texts)} texts and {path} {len(vectors)} vectors; make the vectors again")
    return texts, vectors, load_meta(path).get("fingerprint")


def save_decomposition(path, support, coefficients, texts, meta):
    """Write the .json {neuron: [[text index, coefficient, text], ...]} by falling |coefficient|, and the .npz beside it.

    support, coefficients [N, S] as `orthogonal_matching_pursuit` returns them. meta: what they are made from, for the record
    beside. Returns the csc matrix [N, texts] of the .npz.
    """
    order = coefficients.abs().argsort(dim=1, descending=True, stable=True)
    support, coefficients = support.gather(1, order).cpu().numpy(), coefficients.gather(1, order).cpu().numpy()
    chosen = support >= 0
    lines = []
    for n in range(len(support)):
        entries = zip(support[n][chosen[n]].tolist(), coefficients[n][chosen[n]].tolist(), strict=True)
        lines.append(f'"{n}": ' + json.dumps([[i, c, texts[i]] for i, c in entries], ensure_ascii=False))
    save_atomic(path, lambda file: file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode()))
    rows = chosen.nonzero()[0]
    shape = (len(support), len(texts))
    matrix = scipy.sparse.coo_matrix((coefficients[chosen], (rows, support[chosen])), shape=shape).tocsc()
    save_atomic(path.with_suffix(".npz"), lambda file: scipy.sparse.save_npz(file, matrix))
    save_json(meta_path(path), {**meta, "shape": list(shape)})
    return matrix


def make_atoms(text_vectors, normalise="axis"):
    """The dictionary of the decomposition: text vectors [texts, D], centred, and scaled to norm 100.

    normalise: 'axis' divides by the norm over the texts, so every embedding dimension has norm 100 (the published behaviour);
    'text' gives every atom norm 100.
    """
    centred = text_vectors - text_vectors.mean(dim=0)
    norms = centred.norm(dim=0) if normalise == "axis" else centred.norm(dim=1, keepdim=True)
    return 100 * centred / norms.clamp_min(torch.finfo(centred.dtype).tiny)


def orthogonal_matching_pursuit(atoms, targets, n_nonzero, block=256, progress=False):
    """Orthogonal matching pursuit of many targets at once; what scikit-learn's SparseCoder("omp") computes, one by one.

    Each step takes the atom with the largest |<residual, atom>| (not divided by the atom's norm) and fits all chosen atoms anew
    by least squares. Correlations of a block of targets are one matrix product; the fit is a QR decomposition that grows by a
    column (Gram-Schmidt, orthogonalised twice), solved once at the end. No texts x texts matrix is formed.

    Parameters
    atoms [texts, D], targets [n, D]: float32 on one device. n_nonzero: atoms per target. block: targets at a time.

    Returns
    support [n, n_nonzero], int64 indices in the order of choice, -1 where a target stopped early; and coefficients
    [n, n_nonzero], 0 there. A target stops as in scikit-learn: when the largest squared correlation is below the dtype's eps,
    when an atom would be taken twice, or when it depends on those already taken. Of equal atoms the first one is taken.

    Raises UserError when more atoms are asked for than there are.
    """
    if not 1 <= n_nonzero <= len(atoms):
        raise UserError(f"--components {n_nonzero} cannot be chosen from {len(atoms)} texts; give 1 to {len(atoms)}")
    first, distinct = _first_of_equal(atoms)
    support = torch.full((len(targets), n_nonzero), -1, dtype=torch.int64, device=atoms.device)
    coefficients = torch.zeros(len(targets), n_nonzero, dtype=atoms.dtype, device=atoms.device)
    starts = range(0, len(targets), block)
    for start in tqdm(starts, desc="OMP", unit="block", disable=not progress):
        rows = slice(start, start + block)
        support[rows], coefficients[rows] = _pursue(distinct, targets[rows], min(n_nonzero, len(distinct)), n_nonzero)
    chosen = support >= 0
    support[chosen] = first[support[chosen]]
    return support, coefficients


def _first_of_equal(atoms):
    """Drop exact duplicates, which would win or lose by rounding: indices of the first ones, and those atoms."""
    seen = {}
    for index, row in enumerate(atoms.cpu().numpy()):
        seen.setdefault(hashlib.sha1(row.tobytes()).digest(), index)
    first = torch.tensor(list(seen.values()), device=atoms.device)
    return first, atoms if len(first) == len(atoms) else atoms[first]


def _pursue(atoms, targets, steps, width):
    """OMP of one block: targets [b, D] -> support [b, width], coefficients [b, width]."""
    b, D = targets.shape
    eps = torch.finfo(atoms.dtype).eps
    rows = torch.arange(b, device=atoms.device)
    support = torch.full((b, width), -1, dtype=torch.int64, device=atoms.device)
    Q = atoms.new_zeros(b, width, D)  # orthonormal rows spanning the chosen atoms
    R = torch.eye(width, dtype=atoms.dtype, device=atoms.device).repeat(b, 1, 1)  # chosen atoms = R^T Q
    z = atoms.new_zeros(b, width)  # targets in the basis Q
    residual = targets.clone()
    running = torch.ones(b, dtype=torch.bool, device=atoms.device)
    for step in range(min(steps, width)):
        correlation = (residual @ atoms.T).abs_()  # [b, texts]
        best = correlation.argmax(dim=1)
        running &= correlation[rows, best].square() >= eps
        running &= (support[:, :step] != best[:, None]).all(dim=1)
        atom = atoms[best]  # [b, D]
        known = Q[:, :step]
        along = torch.bmm(known, atom[..., None])
        atom = atom - torch.bmm(known.mT, along)[..., 0]
        again = torch.bmm(known, atom[..., None])  # a second pass keeps Q orthogonal to rounding
        atom = atom - torch.bmm(known.mT, again)[..., 0]
        pivot = atom.square().sum(dim=1)
        running &= pivot > eps
        if not running.any():
            break
        length = torch.where(running, pivot.sqrt(), 1)
        q = torch.where(running[:, None], atom / length[:, None], 0)
        support[:, step] = torch.where(running, best, -1)
        Q[:, step] = q
        R[:, :step, step] = torch.where(running[:, None], (along + again)[..., 0], 0)
        R[:, step, step] = length
        z[:, step] = (q * residual).sum(dim=1)
        residual -= z[:, step, None] * q
    coefficients = torch.linalg.solve_triangular(R, z[..., None], upper=True)[..., 0]
    return support, coefficients
