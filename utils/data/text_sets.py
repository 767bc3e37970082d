"""Text sets: the lists of texts from which neurons are described, and their vectors."""

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
    """A text set that compute_text_set_projection.py embedded: the texts, their vectors [texts, D], and the
    fingerprint of the weights (None when it is unknown).

    results, name: `Results` of the folder with the vectors; the set, as a user names it.
    descriptions_dir: where NAME.txt is when the texts do not lie beside the vectors (vectors of the published
        code).
    load_clip: () -> the `Clip`. It is called for vectors without texts beside, to see whether NAME.txt is
        what they were made of.

    Raises UserError when something is missing, or when the vectors are not those of the texts.
    """
    path, vectors = results.find("texts", texts=name), results.load("texts", texts=name)
    file = (
        path.with_suffix(".txt") if path.with_suffix(".txt").is_file() else find_texts(name, descriptions_dir)
    )
    texts = read_texts(file)
    if len(texts) != len(vectors):
        counts, command = (
            f"{len(texts)} texts and {path} {len(vectors)} vectors",
            results.command("texts", texts=name),
        )
        raise UserError(f"{file} has {counts}; make the vectors again with: {command} --overwrite")
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    odd = np.flatnonzero((lengths < LENGTHS[0]) | (lengths > LENGTHS[1]))
    if len(odd):
        what = f"a vector of length {lengths[odd[0]]:.2g} for text {odd[0]}, where 100 is usual"
        raise UserError(
            f"{path} holds {what}; make it again with: {results.command('texts', texts=name)} --overwrite"
        )
    record = load_record(path)
    if record.get("content", digest_of_texts(texts)) != digest_of_texts(texts):
        command = results.command("texts", texts=name)
        raise UserError(
            f"{file} does not hold the texts that {path} was made of; make both again with: {command} --overwrite"
        )
    if file != path.with_suffix(".txt") and "content" not in record:
        check_texts(load_clip(), file, texts, path, vectors)
    return texts, vectors, record.get("fingerprint")


def check_texts(clip, file, texts, path, vectors):
    """Raise UserError unless the vectors in `path` are those of the texts in `file`: of a sample, the model's
    own vector has to be nearest to the one at the same place. Not of all, because the published code uses
    another activation in its text tower."""
    some = np.linspace(0, len(texts) - 1, min(SAMPLES, len(texts))).astype(int)
    own, given = text_vectors(clip, [texts[i] for i in some], SAMPLES), np.asarray(vectors[some], np.float32)
    given = given / np.maximum(np.linalg.norm(given, axis=1, keepdims=True), 1e-30)
    found = int(((own @ given.T).argmax(axis=1) == np.arange(len(some))).sum())
    if found < 0.75 * len(some):
        raise UserError(
            f"{path} does not hold the vectors of {file}: {len(some) - found} of {len(some)} texts differ; lay the texts that "
            f"it was made of beside it as {path.with_suffix('.txt').name}, or give their folder with --descriptions_dir"
        )


def find_texts(given, directory):
    """The file of a text set: as it is given, or in a directory, with or without .txt; both also beside the
    scripts.
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

    Raises UserError when it is missing, empty, not UTF-8, or a json.
    """
    try:
        content = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 ({one_line(error)}); convert it, for example with iconv"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    texts = [line.strip() for line in content.replace("\r", "\n").split("\n") if line.strip()]
    if not texts:
        raise UserError(f"{path} holds no text; it needs one text a line")
    if what := _other_than_texts(content, texts):
        raise UserError(f"{path} is {what}, and one text a line is needed; write its texts to a text file")
    return texts


def _other_than_texts(content, texts):
    """What a file is that does not hold one text a line, "" if it may. texts: its lines."""
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
    """Whether a text is a list or an object in json. A line in brackets, such as [laughter], is neither."""
    try:
        return isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


def as_text(texts):
    """The bytes of a file of texts, one a line."""
    return ("\n".join(texts) + "\n").encode()


def digest_of_texts(texts):
    """Twelve hex digits of the content of a file of texts."""
    return digest(np.frombuffer(as_text(texts), np.uint8))
