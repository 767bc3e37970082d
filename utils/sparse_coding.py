"""Sparse text descriptions: atoms from text vectors, and batched orthogonal matching pursuit (section 4.3 of the paper)."""

import hashlib
import io
import json
import zipfile

import numpy as np
import scipy.sparse
import torch

from utils.runtime.distributed import barrier, is_rank_zero
from utils.runtime.errors import UserError
from utils.runtime.files import digest_of_texts, find_texts, one_line, read_texts, save_atomic, save_json
from utils.runtime.locks import Lock
from utils.runtime.passes import Pass, pieces_of
from utils.runtime.records import to_json
from utils.runtime.results import complete, is_made, load_record, record_path
from utils.texts import text_vectors

BLOCK = 256  # targets that are pursued at a time
LENGTHS = (1e-6, 1e6)  # of text vectors, which are 100 long; others would vanish or overflow
SAMPLES = 16  # texts that are embedded to see whether a file of vectors is theirs


def load_texts(results, name, descriptions_dir, load_clip):
    """A text set that compute_text_set_projection.py embedded: the texts, their vectors [texts, D], and the fingerprint of the
    weights (None when it is unknown).

    results, name: `Results` of the folder with the vectors; the set, as a user names it.
    descriptions_dir: where NAME.txt is when the texts do not lie beside the vectors (vectors of the published code).
    load_clip: () -> the `Clip`. It is called for vectors without texts beside, to see whether NAME.txt is what they were made of.

    Raises UserError when something is missing, or when the vectors are not those of the texts.
    """
    path, vectors = results.find("texts", texts=name), results.load("texts", texts=name)
    file = path.with_suffix(".txt") if path.with_suffix(".txt").is_file() else find_texts(name, descriptions_dir)
    texts = read_texts(file)
    if len(texts) != len(vectors):
        counts, command = f"{len(texts)} texts and {path} {len(vectors)} vectors", results.command("texts", texts=name)
        raise UserError(f"{file} has {counts}; make the vectors again with: {command} --overwrite")
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    odd = np.flatnonzero((lengths < LENGTHS[0]) | (lengths > LENGTHS[1]))
    if len(odd):
        what = f"a vector of length {lengths[odd[0]]:.2g} for text {odd[0]}, where 100 is usual"
        raise UserError(f"{path} holds {what}; make it again with: {results.command('texts', texts=name)} --overwrite")
    record = load_record(path)
    if record.get("content", digest_of_texts(texts)) != digest_of_texts(texts):
        command = results.command("texts", texts=name)
        raise UserError(f"{file} does not hold the texts that {path} was made of; make both again with: {command} --overwrite")
    if file != path.with_suffix(".txt") and "content" not in record:
        check_texts(load_clip(), file, texts, path, vectors)
    return texts, vectors, record.get("fingerprint")


def check_texts(clip, file, texts, path, vectors):
    """Raise UserError unless the vectors in `path` are those of the texts in `file`: of a sample, the model's own vector has to
    be nearest to the one at the same place. Not of all, because the published code uses another activation in its text tower."""
    some = np.linspace(0, len(texts) - 1, min(SAMPLES, len(texts))).astype(int)
    own, given = text_vectors(clip, [texts[i] for i in some], SAMPLES), np.asarray(vectors[some], np.float32)
    given = given / np.maximum(np.linalg.norm(given, axis=1, keepdims=True), 1e-30)
    found = int(((own @ given.T).argmax(axis=1) == np.arange(len(some))).sum())
    if found < 0.75 * len(some):
        raise UserError(
            f"{path} does not hold the vectors of {file}: {len(some) - found} of {len(some)} texts differ; lay the texts that "
            f"it was made of beside it as {path.with_suffix('.txt').name}, or give their folder with --descriptions_dir"
        )


def decomposition_matrix(support, coefficients, texts):
    """Support and coefficients [N, S] as the pursuit finds them -> csc matrix [N, texts]."""
    chosen = support >= 0
    shape = (len(support), texts)
    return scipy.sparse.coo_matrix((coefficients[chosen], (chosen.nonzero()[0], support[chosen])), shape=shape).tocsc()


def save_descriptions(path, support, coefficients, texts, record):
    """Write the .json {neuron: [[text index, coefficient, text], ...]} by falling |coefficient|, and the .npz beside it: the same
    as a matrix, and the texts in the order of choice.

    path, texts, record: of the json; of the pool; what the descriptions are made from.
    support, coefficients: [N, S], numpy arrays, in the order of choice.
    """
    chosen_first = support
    order = np.argsort(-np.abs(coefficients), axis=1, kind="stable")
    support, coefficients = np.take_along_axis(support, order, 1), np.take_along_axis(coefficients, order, 1)
    chosen = support >= 0
    lines = []
    for n in range(len(support)):
        entries = zip(support[n][chosen[n]].tolist(), coefficients[n][chosen[n]].tolist(), strict=True)
        lines.append(f'"{n}": ' + json.dumps([[i, c, texts[i]] for i, c in entries], ensure_ascii=False))
    matrix = decomposition_matrix(support, coefficients, len(texts))
    path.unlink(missing_ok=True)  # the json comes last: where it is, all of it is there
    save_atomic(path.with_suffix(".npz"), lambda file: file.write(matrix_and_order(matrix, chosen_first)))
    save_json(record_path(path), to_json({**complete(record), "shape": list(matrix.shape)}))
    save_atomic(path, lambda file: file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode()))


def matrix_and_order(matrix, support):
    """The bytes of an .npz that scipy reads as a matrix, and which has `support` besides."""
    content = io.BytesIO()
    scipy.sparse.save_npz(content, matrix)
    with zipfile.ZipFile(content, "a") as archive, archive.open("support.npy", "w") as entry:
        np.lib.format.write_array(entry, support.astype(np.int32), allow_pickle=False)
    return content.getvalue()


def load_support(path):
    """The texts of every neuron in the order of choice, int64 [N, S], -1 where fewer were taken. path: of the descriptions' .npz.

    Raises UserError for descriptions of the published code, or of an earlier version, which do not have it.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            return content["support"].astype(np.int64)
    except KeyError as error:
        raise UserError(f"{path} does not have the order in which texts were chosen; make it again with --overwrite") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)[:100]}); make it again with --overwrite") from error


def rebuilt_from(support, atoms, targets, block=BLOCK):
    """Every target as the best combination of its chosen atoms, [N, D], by least squares in float64.

    The pursuit is nested: the first m columns of a support are what it chooses when it is asked for m.

    support: int64 [N, m], -1 for none. atoms, targets: [texts, D], [N, D].
    """
    wide, found = torch.as_tensor(atoms).cpu().double(), []
    for rows in torch.arange(len(support)).split(block):
        chosen = torch.as_tensor(support)[rows]
        A = (wide[chosen.clamp_min(0)] * (chosen >= 0)[..., None]).mT  # [n, D, m]
        solution = torch.linalg.lstsq(A, torch.as_tensor(targets)[rows].cpu().double()[..., None], driver="gelsd").solution
        found.append((A @ solution)[..., 0])
    return torch.cat(found).float()


def load_descriptions(results, sizes, expected=(), kind="decomposition", **names):
    """The descriptions of a layer's neurons: a list over neurons of [(text index, coefficient, text), ...].

    results, names: `Results` of the folder; dataset, layer, texts, components, alpha, normalise in the file's name.
    sizes: {"N": number of neurons}.
    expected: {key: value} that the record beside must agree with where it has the key.
    kind: 'decomposition', what neurons write, or 'fires_on'.

    Raises UserError, with the command, when the file is missing, damaged, or of another model.
    """
    path, command = results.find(kind, **names), results.command(kind, **names)
    again = f"make it again with: {command} --overwrite"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        descriptions = [[(int(i), float(c), str(text)) for i, c, text in content[str(n)]] for n in range(len(content))]
    except FileNotFoundError as error:
        raise UserError(results.missing(path, command)) from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); {again}") from error
    if not np.isfinite([c for entries in descriptions for _, c, _ in entries]).all():
        raise UserError(f"{path} holds NaN or infinity; {again}")
    if len(descriptions) != sizes["N"]:
        raise UserError(f"{path} describes {len(descriptions)} neurons, and the layer has {sizes['N']}; {again}")
    results.check_record(path, dict(expected), again)
    return descriptions


def make_atoms(text_vectors, normalise="axis"):
    """The dictionary of the decomposition: text vectors [texts, D], centred, and scaled to norm 100.

    normalise: 'axis' divides by the norm over the texts, so every embedding dimension has norm 100 (the published behaviour);
    'text' gives every atom norm 100.
    """
    centred = text_vectors - text_vectors.mean(dim=0)
    norms = centred.norm(dim=0) if normalise == "axis" else centred.norm(dim=1, keepdim=True)
    return 100 * centred / norms.clamp_min(torch.finfo(centred.dtype).tiny)


def check_components(components, texts):
    """Raise UserError when so many cannot be chosen from so many texts."""
    if not 1 <= components <= texts:
        raise UserError(f"--components {components} cannot be chosen from {texts} texts; give 1 to {texts}")


def orthogonal_matching_pursuit(atoms, targets, n_nonzero, block=BLOCK):
    """Orthogonal matching pursuit of many targets at once: what scikit-learn's SparseCoder("omp") computes one by one.

    Each step takes the atom with the largest |<residual, atom>| (not divided by the atom's norm) and fits all chosen atoms again
    by least squares. Correlations of a block of targets are one matrix product; the fit is a QR decomposition that grows by a
    column (Gram-Schmidt, orthogonalised twice), solved once at the end. No texts x texts matrix is formed.

    atoms, targets: [texts, D] and [n, D], float32 on the same device.
    n_nonzero, block: atoms per target, targets at a time.

    Returns support [n, n_nonzero], int64 indices in the order of choice, -1 where a target stopped early, and coefficients
    [n, n_nonzero], 0 there. A target stops as in scikit-learn: when the largest squared correlation is below the dtype's eps,
    when an atom would be taken twice, or when it depends on those already taken. Of equal atoms the earliest is taken.

    Raises UserError when more atoms are asked for than there are.
    """
    check_components(n_nonzero, len(atoms))
    first, distinct = _first_of_equal(atoms)
    found = [_pursue(distinct, part, min(n_nonzero, len(distinct)), n_nonzero) for part in targets.split(block)]
    support, coefficients = (torch.cat(parts) for parts in zip(*found, strict=True))
    return torch.where(support >= 0, first[support], support), coefficients


def describe(path, texts, atoms, targets, record, overwrite=False):
    """Pursue the first components of a layer, BLOCK at a time, by all processes, and write their descriptions.

    path: of the json; while the pursuit goes on, its blocks lie beside.
    texts, atoms: the pool, [texts, D]. targets: [N, D]. record: what the descriptions are made from, components included.
    overwrite: discard finished descriptions and earlier progress.
    """
    check_components(record["components"], len(texts))
    with Lock(path):
        barrier()  # nobody looks before the lock is taken
        made = is_made(path, complete(record), overwrite) and path.with_suffix(".npz").is_file()
        barrier()  # every process has looked before one of them writes
        _describe(path, texts, atoms, targets, record=record, overwrite=overwrite, made=made)
        barrier()


def _describe(path, texts, atoms, targets, record, overwrite, made):
    """The part of `describe` that the lock is for. made: whether the descriptions are there."""
    components = record["components"]
    support, weights = (path.with_name(f"{path.stem}_{part}.npy") for part in ("support", "coefficients"))
    if not made:
        arrays = {support: ((len(targets), components), "int32"), weights: ((len(targets), components), "float32")}
        with Pass(arrays, record, pieces_of(len(targets), BLOCK), overwrite=overwrite) as work:
            for n, _ in work.over(description="OMP", unit="neuron"):
                work[support][n], work[weights][n] = orthogonal_matching_pursuit(atoms, targets[n], components)
    if is_rank_zero():
        if not made:
            save_descriptions(path, np.load(support), np.load(weights), texts=texts, record=record)
        for file in (support, weights, record_path(support), record_path(weights)):
            file.unlink(missing_ok=True)  # the descriptions hold them


def _first_of_equal(atoms):
    """Drop exact duplicates, which would win or lose by rounding: indices of the earliest ones, and those atoms."""
    seen = {}
    for index, row in enumerate(atoms.cpu().numpy()):
        seen.setdefault(hashlib.sha1(row.tobytes()).digest(), index)
    first = torch.tensor(list(seen.values()), device=atoms.device)
    return first, atoms if len(first) == len(atoms) else atoms[first]


def _pursue(atoms, targets, steps, width):
    """OMP of one block: targets [b, D] -> support [b, width], coefficients [b, width]."""
    (b, D), eps = targets.shape, torch.finfo(atoms.dtype).eps
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
        atom, known = atoms[best], Q[:, :step]  # [b, D], [b, step, D]
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
