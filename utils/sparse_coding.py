"""Sparse text descriptions: atoms from text vectors, and batched orthogonal matching pursuit (section 4.3 of the paper)."""

import hashlib
import json

import numpy as np
import scipy.sparse
import torch
from tqdm import tqdm

from utils import distributed
from utils.artifacts import digest, load_array, load_meta, meta_path, read_texts, save_atomic, save_json
from utils.errors import UserError
from utils.rows import RowWriter, row_pieces

BLOCK = 256  # targets that are pursued at a time


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


def decomposition_matrix(support, coefficients, texts):
    """Support and coefficients [N, S] as the pursuit finds them -> csc matrix [N, texts]."""
    chosen = support >= 0
    shape = (len(support), texts)
    return scipy.sparse.coo_matrix((coefficients[chosen], (chosen.nonzero()[0], support[chosen])), shape=shape).tocsc()


def save_decomposition(path, support, coefficients, texts, meta):
    """Write the .json {neuron: [[text index, coefficient, text], ...]} by falling |coefficient|, and the .npz beside it.

    support, coefficients [N, S], numpy arrays. meta: what they are made from, for the record beside.
    """
    order = np.argsort(-np.abs(coefficients), axis=1, kind="stable")
    support, coefficients = np.take_along_axis(support, order, 1), np.take_along_axis(coefficients, order, 1)
    chosen = support >= 0
    lines = []
    for n in range(len(support)):
        entries = zip(support[n][chosen[n]].tolist(), coefficients[n][chosen[n]].tolist(), strict=True)
        lines.append(f'"{n}": ' + json.dumps([[i, c, texts[i]] for i, c in entries], ensure_ascii=False))
    save_atomic(path, lambda file: file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode()))
    matrix = decomposition_matrix(support, coefficients, len(texts))
    save_atomic(path.with_suffix(".npz"), lambda file: scipy.sparse.save_npz(file, matrix))
    save_json(meta_path(path), {**meta, "shape": list(matrix.shape)})


def make_atoms(text_vectors, normalise="axis"):
    """The dictionary of the decomposition: text vectors [texts, D], centred, and scaled to norm 100.

    normalise: 'axis' divides by the norm over the texts, so every embedding dimension has norm 100 (the published behaviour);
    'text' gives every atom norm 100.
    """
    centred = text_vectors - text_vectors.mean(dim=0)
    norms = centred.norm(dim=0) if normalise == "axis" else centred.norm(dim=1, keepdim=True)
    return 100 * centred / norms.clamp_min(torch.finfo(centred.dtype).tiny)


def orthogonal_matching_pursuit(atoms, targets, n_nonzero, block=BLOCK):
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
    pursue = Pursuit(atoms, n_nonzero)
    support, coefficients = zip(*(pursue(part) for part in targets.split(block)), strict=True)
    return torch.cat(support), torch.cat(coefficients)


class Pursuit:
    """`orthogonal_matching_pursuit` of one block of targets [b, D] at a time, over the same atoms."""

    def __init__(self, atoms, n_nonzero):
        if not 1 <= n_nonzero <= len(atoms):
            raise UserError(f"--components {n_nonzero} cannot be chosen from {len(atoms)} texts; give 1 to {len(atoms)}")
        self.first, self.distinct = _first_of_equal(atoms)
        self.n_nonzero = n_nonzero

    def __call__(self, targets):
        support, coefficients = _pursue(self.distinct, targets, min(self.n_nonzero, len(self.distinct)), self.n_nonzero)
        chosen = support >= 0
        support[chosen] = self.first[support[chosen]]
        return support, coefficients


def decompose(atoms, targets, n_nonzero, path, meta, overwrite=False):
    """The pursuit of all targets, BLOCK at a time, by all processes; a broken run goes on where it stopped.

    Parameters
    atoms [texts, D], targets [n, D]. path: of the result, beside which the finished blocks are kept. meta: what it is made from.

    Returns support and coefficients [n, n_nonzero], numpy arrays.
    """
    pursue = Pursuit(atoms, n_nonzero)
    paths = [path.with_name(f"{path.stem}_{part}.npy") for part in ("support", "coefficients")]
    shape = (len(targets), n_nonzero)
    arrays = dict(zip(paths, ((shape, "int32"), (shape, "float32")), strict=True))
    sums = {"atoms": digest(atoms), "targets": digest(targets)}
    with RowWriter(arrays, {**meta, **sums}, row_pieces(len(targets), BLOCK), overwrite) as writer:
        for number, (start, stop) in tqdm(writer.todo, desc="OMP", unit="block", disable=not distributed.first()):
            found = pursue(targets[start:stop])
            writer.write(number, start, {path: part.cpu().numpy() for path, part in zip(paths, found, strict=True)})
    support, coefficients = (np.load(path, allow_pickle=False) for path in paths)
    distributed.barrier()  # every process has read what the first one now removes: the result will hold it
    if distributed.first():
        for path in paths:
            path.unlink()
            meta_path(path).unlink()
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
