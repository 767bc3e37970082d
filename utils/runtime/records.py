"""Values of records, and how they compare with those of earlier versions.

A record says what a result was made from. Where a later version computes a value in another way, a `Digest` carries both
values, so that results of the earlier version are still recognised.
"""

import functools
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

BLOCK = 2**24  # bytes hashed at a time
THREADS = min(8, os.cpu_count() or 1)  # hashlib lets them run side by side
ADDED = ("preprocessing", "tokenizer")  # keys that records of earlier versions do not have


class Digest(str):
    """A value of a record, with the value that earlier versions wrote for the same thing.

    earlier: None where they wrote nothing.
    """

    def __new__(cls, value, earlier):
        digest = super().__new__(cls, value)
        digest.earlier = earlier
        return digest

    def __getnewargs__(self):  # for copies in other processes
        return str(self), self.earlier


def to_json(record):
    """A record as it is written: the values of earlier versions stand under "earlier"."""
    earlier = {key: value.earlier for key, value in record.items() if isinstance(value, Digest)}
    return {**record, "earlier": earlier} if earlier else record


def from_json(content):
    """A record as it was before `to_json`."""
    earlier = content.pop("earlier", None)
    known = earlier if isinstance(earlier, dict) else {}
    digests = {key for key, value in content.items() if key in known and isinstance(value, str)}
    return {key: Digest(value, known[key]) if key in digests else value for key, value in content.items()}


def like_json(value):
    """A value as json gives it back, in which a `Digest` stays what it is."""
    if isinstance(value, Digest):
        return value
    if isinstance(value, dict):
        return {str(key): like_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [like_json(item) for item in value]
    return json.loads(json.dumps(value))


def agrees(found, wanted):
    """Whether a value of a stored record is the wanted one, or the one that an earlier version wrote in its place."""
    return found == wanted or was(found, wanted)


def was(found, wanted):
    """Whether a stored value differs from the wanted one, but is what an earlier version wrote in its place."""
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
    print(
        f"note: results in {folder} were made by an earlier version, which looked at samples of the weights and at the "
        "sizes of images; they are compared as they were then, and --overwrite makes them again"
    )


def digest_of_parts(parts):
    """Sixteen hex digits of a list of buffers, in this order: all their bytes. The buffers are hashed side by side."""
    with ThreadPoolExecutor(THREADS) as pool:
        return hashlib.sha256("".join(pool.map(_sha256, parts)).encode()).hexdigest()[:16]


def _sha256(part):
    return hashlib.sha256(part).hexdigest()


def digest_of_file(path):
    """Sixteen hex digits of all bytes of a file."""
    content = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            content.update(block)
    return content.hexdigest()[:16]


def digests_of_files(paths):
    """Yield `digest_of_file` of every path, in order; several are read side by side."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(digest_of_file, paths)
