"""Write and compare records, the json of provenance beside every result, also those of earlier versions.

A record says what a result was made from. Where a later version computes a value in another way, a `Digest`
carries both values, so that results of the earlier version are still recognised.
"""

import functools
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from utils.runtime.errors import UserError
from utils.runtime.files import read_array, read_json, save_atomic, save_json

HASHED = 2**24  # bytes hashed at a time
THREADS = min(8, os.cpu_count() or 1)  # hashlib lets them run side by side
METHOD = 1  # raise it when other mathematics changes results: those of another number are made again
NOTES = ("data_path",)  # keys of records that say where something lay, and not what it was made from
ADDED = ("preprocessing", "tokenizer")  # keys that records of earlier versions do not have
NEURONS = "neurons"  # the unit_set of results without --units
UNSAID = {"unit_set": NEURONS, "sign": "majority"}  # what a record means that does not have these keys


class Digest(str):
    """A Digest is a value of a record, with the value that earlier versions wrote in its place.

    earlier: None where they wrote nothing.
    """

    def __new__(cls, value, earlier):
        digest = super().__new__(cls, value)
        digest.earlier = earlier
        return digest

    def __getnewargs__(self):  # for copies in other processes
        return str(self), self.earlier


def to_json(record):
    """Return a record as it is written: the values of earlier versions stand under "earlier"."""
    earlier = {key: value.earlier for key, value in record.items() if isinstance(value, Digest)}
    return {**record, "earlier": earlier} if earlier else record


def from_json(content):
    """Return a record as it was before `to_json`."""
    earlier = content.pop("earlier", None)
    known = earlier if isinstance(earlier, dict) else {}
    digests = {key for key, value in content.items() if key in known and isinstance(value, str)}
    return {key: Digest(value, known[key]) if key in digests else value for key, value in content.items()}


def like_json(value):
    """Return a value as it is after json, but with every `Digest` unchanged."""
    if isinstance(value, Digest):
        return value
    if isinstance(value, dict):
        return {str(key): like_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [like_json(item) for item in value]
    return json.loads(json.dumps(value))


def agrees(found, wanted):
    """Return whether a stored value is the wanted one, or the one of an earlier version."""
    return found == wanted or was(found, wanted)


def was(found, wanted):
    """Return whether a stored value differs from the wanted one, but is that of an earlier version."""
    if isinstance(wanted, Digest):
        return found != wanted and found == wanted.earlier
    if isinstance(wanted, dict) and isinstance(found, dict) and found.keys() == wanted.keys():
        pairs = [(found[key], wanted[key]) for key in wanted]
    elif isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
        pairs = list(zip(found, wanted, strict=True))
    else:
        return False
    return all(agrees(*pair) for pair in pairs) and any(was(*pair) for pair in pairs)


@functools.cache
def tell_earlier(folder):
    """Say once for a folder that its results are of an earlier version."""
    how = "which looked at samples of the weights and at the sizes of images"
    then = "they are compared as they were then, and --overwrite makes them again"
    print(f"note: results in {folder} were made by an earlier version, {how}; {then}")


def digest_of_parts(parts):
    """Return sixteen hex digits of all bytes of some buffers, in order. They are hashed side by side."""
    with ThreadPoolExecutor(THREADS) as pool:
        return hashlib.sha256("".join(pool.map(_sha256, parts)).encode()).hexdigest()[:16]


def _sha256(part):
    return hashlib.sha256(part).hexdigest()


def digest_of_file(path):
    """Return sixteen hex digits of all bytes of a file."""
    content = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(HASHED):
            content.update(block)
    return content.hexdigest()[:16]


def digests_of_files(paths):
    """Yield `digest_of_file` of every path, in order; several are read side by side."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(digest_of_file, paths)


def record_path(path):
    """Return the path of the record of a result."""
    return Path(path).with_suffix(".meta.json")


def load_record(path):
    """Read the record of a result; {} where there is none. Raise UserError when it is damaged."""
    fix = f"remove it together with {path} and make both again"
    try:
        record = read_json(record_path(path), "", fix)
    except FileNotFoundError:
        return {}
    if not isinstance(record, dict):
        raise UserError(f"{record_path(path)} is damaged (it is no record); {fix}")
    return from_json(record)


def complete(record, shape=None, dtype=None):
    """Return a record as it is written: with the method's number and, for an array, shape and dtype."""
    described = {} if shape is None else {"shape": list(shape), "dtype": str(np.dtype(dtype))}
    return like_json({**record, "method_number": METHOD, **described})


def is_made(path, record, overwrite=False):
    """Return whether a result is there with this very record, so that it need not be made again.

    record: as `complete` returns it.

    Raises UserError when it is there with another record: nothing is replaced without --overwrite.
    """
    path = Path(path)
    if overwrite or not path.is_file():
        return False
    if path.suffix == ".npy":
        try:
            read_array(path, mmap=True)
        except ValueError:
            return False  # cut off or damaged
    found = load_record(path)
    compared = [key for key in record if key not in NOTES]
    if found and "method_number" not in found:  # of a version whose records had fewer keys
        compared = [key for key in compared if key in found or key == "method_number"]
    differing = [key for key in compared if not agrees(found.get(key), record[key])]
    if differing == ["method_number"] and found.get("method_number", 0) < METHOD:
        return False  # of older mathematics
    if differing and not path.is_file():
        return False  # another run has just removed it
    if differing:
        how = f"with other {', '.join(differing)}" if found else "by another program, without a record"
        fix = "choose another --output_dir, or add --overwrite to replace it"
        raise UserError(f"{path} is there, made {how}; {fix}")
    if any(was(found.get(key), record[key]) for key in compared):
        tell_earlier(path.parent)
    return True


def has_record(path, record):
    """Return whether a result is there with this very record. record: as `complete` returns it."""
    found = load_record(path) if Path(path).is_file() else {}
    return bool(found) and all(agrees(found.get(key), record[key]) for key in record if key not in NOTES)


def publish(partial, path, record):
    """Give a finished file its name, and write its record: at no time beside the record of another one."""
    Path(path).unlink(missing_ok=True)
    save_json(record_path(path), to_json(record))
    os.replace(partial, path)


def save_array(path, array, record):
    """Write an array and its record. Raises UserError when it is not finite."""
    if not np.isfinite(array).all():
        raise UserError(f"{path} would hold NaN or infinity; it is not written: look at what it is made from")
    record = complete(record, array.shape, array.dtype)

    def write(file):
        np.save(file, array, allow_pickle=False)

    save_atomic(path, write, lambda new, path: publish(new, path, record))
