"""Sparse text descriptions of neurons: how they are made, written and read."""

import io
import json
import zipfile

import numpy as np
import scipy.sparse

from utils import omp
from utils.omp import check_components, orthogonal_matching_pursuit
from utils.runtime.distributed import barrier, is_rank_zero
from utils.runtime.errors import UserError
from utils.runtime.files import one_line, save_atomic, save_json
from utils.runtime.locks import Lock
from utils.runtime.passes import Pass, pieces_of
from utils.runtime.records import complete, is_made, record_path, to_json


def decomposition_matrix(support, coefficients, texts):
    """Support and coefficients [N, S] as the pursuit finds them -> csc matrix [N, texts]."""
    chosen = support >= 0
    shape = (len(support), texts)
    return scipy.sparse.coo_matrix(
        (coefficients[chosen], (chosen.nonzero()[0], support[chosen])), shape=shape
    ).tocsc()


def save_descriptions(path, support, coefficients, texts, record):
    """Write the .json {neuron: [[text index, coefficient, text], ...]} by falling |coefficient|, and the .npz
    beside it: the same as a matrix, and the texts in the order of choice.

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
    """The texts of every neuron in the order of choice, int64 [N, S], -1 where fewer were taken. path: of the
    descriptions' .npz.

    Raises UserError for descriptions of the published code, or of an earlier version, which do not have it.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            return content["support"].astype(np.int64)
    except KeyError as error:
        raise UserError(
            f"{path} does not have the order in which texts were chosen; make it again with --overwrite"
        ) from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)[:100]}); make it again with --overwrite"
        ) from error


def load_descriptions(results, sizes, expected=(), kind="decomposition", **names):
    """The descriptions of a layer's neurons: a list over neurons of [(text index, coefficient, text), ...].

    results, names: `Results` of the folder; dataset, layer, texts, components, alpha, normalise in the file's
        name.
    sizes: {"N": number of neurons}.
    expected: {key: value} that the record beside must agree with where it has the key.
    kind: 'decomposition', what neurons write, or 'fires_on'.

    Raises UserError, with the command, when the file is missing, damaged, or of another model.
    """
    path, command = results.find(kind, **names), results.command(kind, **names)
    again = f"make it again with: {command} --overwrite"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        descriptions = [
            [(int(i), float(c), str(text)) for i, c, text in content[str(n)]] for n in range(len(content))
        ]
    except FileNotFoundError as error:
        raise UserError(results.missing(path, command)) from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); {again}") from error
    if not np.isfinite([c for entries in descriptions for _, c, _ in entries]).all():
        raise UserError(f"{path} holds NaN or infinity; {again}")
    if len(descriptions) != sizes["N"]:
        raise UserError(
            f"{path} describes {len(descriptions)} neurons, and the layer has {sizes['N']}; {again}"
        )
    results.check_record(path, dict(expected), again)
    return descriptions


def describe(path, texts, atoms, targets, record, overwrite=False):
    """Pursue the first components of a layer, BLOCK at a time, by all processes, and write their
    descriptions.

    path: of the json; while the pursuit goes on, its blocks lie beside.
    texts, atoms: the pool, [texts, D]. targets: [N, D]. record: what the descriptions are made from,
        components included.
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
        arrays = {
            support: ((len(targets), components), "int32"),
            weights: ((len(targets), components), "float32"),
        }
        with Pass(arrays, record, pieces_of(len(targets), omp.BLOCK), overwrite=overwrite) as work:
            for n, _ in work.over(description="OMP", unit="neuron"):
                work[support][n], work[weights][n] = orthogonal_matching_pursuit(
                    atoms, targets[n], components
                )
    if is_rank_zero():
        if not made:
            save_descriptions(path, np.load(support), np.load(weights), texts=texts, record=record)
        for file in (support, weights, record_path(support), record_path(weights)):
            file.unlink(missing_ok=True)  # the descriptions hold them
