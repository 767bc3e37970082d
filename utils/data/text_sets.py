"""Read text sets, the lists of candidate texts from which neurons are described, and their vectors."""

import json
import re
from pathlib import Path

import numpy as np

from utils.model.texts import text_vectors
from utils.runtime.errors import UserError
from utils.runtime.files import ROOT, digest, one_line
from utils.runtime.records import load_record
from utils.runtime.results import text_set

LENGTHS = (1e-6, 1e6)  # of text vectors, which are 100 long; others would vanish or overflow
SAMPLES = 16  # texts that are embedded to see whether a file of vectors is theirs


def load_texts(results, name, descriptions_dir, load_clip):
    """Load a text set that compute_text_set_projection.py embedded.

    Returns the texts, their vectors [texts, D], and the fingerprint of the weights, None where it is unknown.

    results: `Results` of the folder with the vectors.
    name: the text set, as a user names it.
    descriptions_dir: folder of NAME.txt, for vectors without texts beside them (those of the published code).
    load_clip: () -> the `Clip`. It is called for such vectors, to see whether they are those of NAME.txt.

    Raises UserError when something is missing, or when the vectors are not those of the texts.
    """
    path = results.find("texts", texts=name)
    vectors = results.load("texts", texts=name)
    again = f"with: {results.command('texts', texts=name)} --overwrite"
    beside = path.with_suffix(".txt")
    file = beside if beside.is_file() else find_texts(name, descriptions_dir)
    texts = read_texts(file)
    if len(texts) != len(vectors):
        counts = f"{len(texts)} texts and {path} {len(vectors)} vectors"
        raise UserError(f"{file} has {counts}; make the vectors again {again}")
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    odd = np.flatnonzero((lengths < LENGTHS[0]) | (lengths > LENGTHS[1]))
    if len(odd):
        what = f"a vector of length {lengths[odd[0]]:.2g} for text {odd[0]}, where 100 is usual"
        raise UserError(f"{path} holds {what}; make it again {again}")
    record = load_record(path)
    content = digest_of_texts(texts)
    if record.get("content", content) != content:
        raise UserError(f"{file} does not hold the texts that {path} was made of; make both again {again}")
    if file != beside and "content" not in record:
        check_texts(load_clip(), file, texts, path, vectors)
    return texts, vectors, record.get("fingerprint")


def check_texts(clip, file, texts, path, vectors):
    """Raise UserError unless the vectors in `path` are those of the texts in `file`.

    Up to 16 texts are embedded again. For three quarters of them the stored vector of that text must be the
    nearest. Not for all: the published code uses another activation in its text tower.
    """
    rows = np.linspace(0, len(texts) - 1, min(SAMPLES, len(texts))).astype(int)
    embedded = text_vectors(clip, [texts[i] for i in rows], SAMPLES)
    stored = np.asarray(vectors[rows], np.float32)
    stored = stored / np.maximum(np.linalg.norm(stored, axis=1, keepdims=True), 1e-30)
    nearest = (embedded @ stored.T).argmax(axis=1)
    differ = int((nearest != np.arange(len(rows))).sum())
    if len(rows) - differ < 0.75 * len(rows):
        what = f"{path} does not hold the vectors of {file}: {differ} of {len(rows)} texts differ"
        beside = f"lay the texts that it was made of beside it as {path.with_suffix('.txt').name}"
        raise UserError(f"{what}; {beside}, or give their folder with --descriptions_dir")


def find_texts(given, directory):
    """Return the path of a text set's file: as given, or in a directory, with or without .txt.

    Both places are also looked for beside the scripts.
    """
    places = (
        folder / place / f"{given}{end}"
        for folder in (Path(), ROOT)
        for place in ("", directory)
        for end in ("", ".txt")
    )
    return next((path for path in places if path.is_file()), Path(directory) / f"{text_set(given)}.txt")


def read_texts(path):
    """Read the texts of a file, one a line, without empty lines; only line ends divide them.

    Raises UserError when the file is missing, empty, not UTF-8, or a json.
    """
    try:
        content = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"{path} is not UTF-8 ({one_line(error)})"
        raise UserError(f"{what}; convert it, for example with iconv") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    texts = [line.strip() for line in content.replace("\r", "\n").split("\n") if line.strip()]
    if not texts:
        raise UserError(f"{path} holds no text; it needs one text a line")
    if what := _other_than_texts(content, texts):
        raise UserError(f"{path} is {what}, and one text a line is needed; write its texts to a text file")
    return texts


def _other_than_texts(content, texts):
    """Say what a file is that does not hold one text a line, "" if it may. texts: its lines."""
    if texts[0].startswith("version https://git-lfs"):
        return "a Git LFS pointer (git lfs pull fetches the file itself)"
    if re.match(r"\s*<(!doctype|html|\?xml)", content, re.IGNORECASE):
        return "a web page"
    if re.search("[\0-\x08\x0e-\x1b]", content):
        return "no plain text in UTF-8"
    cut_off = re.match(r"""[\[{]\s*(["'{\[]|$)""", texts[0]) and not _is_json(texts[0])
    if cut_off or _is_json(content) or all(map(_is_json, texts)):
        return "a json"
    return ""


def _is_json(text):
    """Tell whether a text is a list or an object in json. A line in brackets, as [laughter], is neither."""
    try:
        return isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


def as_text(texts):
    """Return the bytes of a file of texts, one a line."""
    return ("\n".join(texts) + "\n").encode()


def digest_of_texts(texts):
    """Return a digest of the content of a file of texts, 12 hex digits."""
    return digest(np.frombuffer(as_text(texts), np.uint8))
