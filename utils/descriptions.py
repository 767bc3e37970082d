"""Make, write and read sparse text descriptions of neurons (section 4.3 of the paper)."""

import functools
import io
import json
import zipfile

import numpy as np
import scipy.sparse

from utils import omp
from utils.runtime.distributed import barrier, is_rank_zero
from utils.runtime.errors import UserError
from utils.runtime.files import one_line, save_atomic, save_json
from utils.runtime.locks import Lock
from utils.runtime.passes import Pass, pieces_of
from utils.runtime.records import complete, is_made, record_path, to_json


def describe(path, texts, atoms, targets, record, overwrite=False):
    """Pursue the targets of all neurons of a layer, by all processes, and write their descriptions.

    path: of the json; while the pursuit goes on, its blocks lie beside.
    texts: the text set.
    atoms: [texts, D].
    targets: [N, D], such as first components.
    record: everything the descriptions are made from, the number of texts (`components`) included.
    overwrite: discard finished descriptions and earlier progress.
    """
    omp.check_components(record["components"], len(texts))
    with Lock(path):
        barrier()  # nobody looks before the lock is taken
        made = is_made(path, complete(record), overwrite) and path.with_suffix(".npz").is_file()
        barrier()  # every process has looked before one of them writes
        parts = [path.with_name(f"{path.stem}_{part}.npy") for part in ("support", "coefficients")]
        if not made:
            pursue(parts, atoms, targets, record, overwrite)
        if is_rank_zero():
            if not made:
                save_descriptions(path, *map(np.load, parts), texts=texts, record=record)
            for file in (*parts, *map(record_path, parts)):
                file.unlink(missing_ok=True)  # the descriptions hold them
        barrier()


def pursue(paths, atoms, targets, record, overwrite):
    """Write the supports and coefficients of all targets at two paths. Parameters: as in `describe`."""
    support, coefficients = paths
    shape = (len(targets), record["components"])
    arrays = {support: (shape, "int32"), coefficients: (shape, "float32")}
    pieces = pieces_of(len(targets), omp.PURSUED, title="OMP", unit="neuron")
    with Pass(arrays, record, pieces, overwrite=overwrite) as work:
        for n in work:
            found = omp.orthogonal_matching_pursuit(atoms, targets[n], record["components"])
            work[support][n], work[coefficients][n] = found


def save_descriptions(path, support, coefficients, texts, record):
    """Write the .json {neuron: [[text index, coefficient, text], ...]}, and the .npz beside it.

    The texts of a neuron stand by falling |coefficient|. The .npz has the matrix, and the order of choice.

    path: of the json.
    support, coefficients: [N, S], numpy arrays, in the order of choice.
    texts: the text set.
    record: everything the descriptions are made from.
    """
    order = np.argsort(-np.abs(coefficients), axis=1, kind="stable")
    by_size = np.take_along_axis(support, order, 1)
    coefficients = np.take_along_axis(coefficients, order, 1)
    chosen = by_size >= 0
    lines = []
    for n in range(len(support)):
        entries = zip(by_size[n][chosen[n]].tolist(), coefficients[n][chosen[n]].tolist(), strict=True)
        described = [[i, c, texts[i]] for i, c in entries]
        lines.append(f'"{n}": {json.dumps(described, ensure_ascii=False)}')
    matrix = decomposition_matrix(by_size, coefficients, len(texts))
    path.unlink(missing_ok=True)  # the json comes last: where it is, all of it is there
    save_atomic(path.with_suffix(".npz"), lambda file: file.write(matrix_and_order(matrix, support)))
    save_json(record_path(path), to_json({**complete(record), "shape": list(matrix.shape)}))
    save_atomic(path, lambda file: file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode()))


def decomposition_matrix(support, coefficients, texts):
    """Return the csc matrix [N, texts] of a support and coefficients [N, S], -1 where there is no text."""
    chosen = support >= 0
    entries = (coefficients[chosen], (chosen.nonzero()[0], support[chosen]))
    return scipy.sparse.coo_matrix(entries, shape=(len(support), texts)).tocsc()


def matrix_and_order(matrix, support):
    """Return the bytes of an .npz that scipy reads as a matrix, and which has `support` besides."""
    content = io.BytesIO()
    scipy.sparse.save_npz(content, matrix)
    with zipfile.ZipFile(content, "a") as archive, archive.open("support.npy", "w") as entry:
        np.lib.format.write_array(entry, support.astype(np.int32), allow_pickle=False)
    return content.getvalue()


def load_support(path, descriptions=None):
    """Read the texts of every neuron in the order of choice, int64 [N, S], -1 where fewer were taken.

    path: of the descriptions' .npz.
    descriptions: of the .json beside it, as `load_descriptions` returns them, which must have the same texts.

    Raises UserError for descriptions of the published code, or of an earlier version, which do not have it,
    and for a damaged file.
    """
    again = "make it again with --overwrite"
    try:
        with np.load(path, allow_pickle=False) as content:
            support = content["support"]
    except KeyError as error:
        raise UserError(f"{path} does not have the order in which texts were chosen; {again}") from error
    except Exception as error:  # a damaged archive has errors of zipfile, zlib and numpy
        raise UserError(f"{path} cannot be read ({one_line(error)[:100]}); {again}") from error
    if support.ndim != 2 or support.dtype.kind != "i":
        raise UserError(f"{path} does not have the order in which texts were chosen; {again}")
    if descriptions is not None:
        described = [sorted(i for i, _, _ in entries) for entries in descriptions]
        if [sorted(i for i in of if i >= 0) for of in support.tolist()] != described:
            raise UserError(f"{path} is of other texts than the .json beside it; make both again")
    return support.astype(np.int64)


@functools.lru_cache(maxsize=2)  # both sides of a layer, which are asked for again and again
def _entries(path, version):
    """Read (text index, coefficient, text) of every neuron. version: what tells a file from later ones."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return [[(int(i), float(c), str(text)) for i, c, text in content[str(n)]] for n in range(len(content))]


def load_descriptions(results, sizes=(), expected=(), kind="decomposition", **names):
    """Read the descriptions of a layer: for every neuron a list of (text index, coefficient, text).

    results: `Results` of the folder.
    sizes: {"N": number of neurons}, unless the results are of a loaded model.
    expected: {key: value} that the record must agree with where it has the key, besides the model's.
    kind: 'decomposition' for the texts that neurons write, 'fires_on' for those they fire on.
    names: dataset, layer, texts, components, alpha, normalise in the file's name.

    The lists must not be changed: who asks again gets the same.

    Raises UserError, with the command, when the file is missing, damaged, or of another model.
    """
    path = results.find(kind, **names)
    command = results.command(kind, **names)
    again = f"make it again with: {command} --overwrite"
    try:
        status = path.stat()
        found = _entries(path, (status.st_ino, status.st_size, status.st_mtime_ns))
    except FileNotFoundError as error:
        raise UserError(results.missing(path, command)) from error
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); {again}") from error
    if not np.isfinite([c for entries in found for _, c, _ in entries]).all():
        raise UserError(f"{path} holds NaN or infinity; {again}")
    neurons = {**results.sizes(), **dict(sizes)}["N"]
    if len(found) != neurons:
        raise UserError(f"{path} describes {len(found)} neurons, and the layer has {neurons}; {again}")
    results.check_record(path, {**results.expected(kind), **dict(expected)}, again)
    return found
