"""The files that stages pass to each other: their names, how they are written, how they are checked when read.

Every array is a plain .npy in one directory. Beside `X.npy` lies `X.meta.json` with its shape, what made it and from what; the
next stage compares it. Files without one (made by the published code) are taken as they are, after a look at their shape.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from utils.errors import UserError

CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def model_name(model):
    """`--model` as it stands in file names: a path's stem, a hub id with dashes, else the name itself."""
    if model.startswith("hf-hub:"):
        return model.removeprefix("hf-hub:").replace("/", "-")
    if model.startswith("local-dir:"):
        return Path(model.removeprefix("local-dir:")).resolve().name
    return Path(model).stem if model.endswith(".json") else model.replace("/", "-")


def pretrained_name(model, pretrained):
    """`--pretrained` as it stands in file names: a path's stem, else the tag; the scheme where the model names its weights."""
    if ":" in model and model.split(":")[0] in ("hf-hub", "local-dir"):
        return model.split(":")[0]
    return Path(pretrained).stem if is_checkpoint_path(pretrained) else pretrained


def is_checkpoint_path(pretrained):
    return pretrained.endswith(CHECKPOINT_SUFFIXES) or os.sep in pretrained


class Names:
    """The path of every artifact of one model in one directory (the table of README.md)."""

    def __init__(self, directory, model, pretrained):
        self.directory = Path(directory)
        self.clip = f"{model_name(model)}_{pretrained_name(model, pretrained)}"

    def representations(self, dataset, split):
        return self.directory / f"{dataset}_{split}_representations_{self.clip}.npy"

    def classes(self, dataset, split):
        return self.directory / f"{dataset}_{split}_classes.npy"

    def classifier(self, dataset):
        return self.directory / f"{dataset}_classifier_{self.clip}.npy"

    def effects(self, dataset, split, layer, part):
        """part: coefficients, bias, values, outputs, or merged (the dense array of the published code)."""
        return self.directory / f"{dataset}_{split}_mlps_{self.clip}_{layer}_{part}.npy"

    def statistics(self, dataset, layer, part):
        """part: mean, image_norms, and with the number of images before it {k}_pca, {k}_norm, {k}_explained."""
        return self.directory / f"{dataset}_train_mlps_{self.clip}_{layer}_{part}.npy"

    def ablations(self, dataset, split, train_dataset, layers, top_k_pca):
        source = "" if train_dataset == dataset else f"_{train_dataset}"
        return self.directory / f"{dataset}_{split}_ablations{source}_{self.clip}_{'-'.join(map(str, layers))}_{top_k_pca}.json"

    def texts(self, name):
        return self.directory / f"{name}_{self.clip}.npy"

    def decomposition(self, dataset, layer, name, alpha, atoms):
        alpha = int(alpha) if float(alpha).is_integer() else alpha
        return self.directory / f"{dataset}_mlps_{self.clip}_{layer}_{name}_decomposition_omp_{alpha}_{atoms}.json"


def meta_path(path):
    return Path(path).with_suffix(".meta.json")


def load_meta(path):
    """What is known of how an array was made; {} for a file that came without it."""
    try:
        return json.loads(meta_path(path).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{meta_path(path)} is damaged; remove it together with {path} and make both again") from error


def load_array(path, made_by, shape=None, mmap=False, **expected):
    """Read an array of an earlier stage, or say which command makes it.

    Parameters
    path: the .npy. made_by: the command that writes it, for the message. shape: sizes, None for any.
    mmap: open as a read-only memory map. expected: facts that the array's record has to agree with where it has them
    (fingerprint of the weights, dataset, ...); None means that nothing is known and nothing is compared.

    Raises UserError when the file is missing, damaged, of another shape, or of other weights or data.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing; make it with: {made_by}")
    try:
        array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); make it again with: {made_by}") from error
    if shape is not None and not (
        array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    ):
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        raise UserError(
            f"{path} has the shape {' x '.join(map(str, array.shape))} where {wanted} is needed: it is of another model, layer "
            f"or data set; make it again with: {made_by}"
        )
    meta = load_meta(path)
    for key, value in expected.items():
        if value is not None and meta.get(key, value) != value:
            raise UserError(f"{path} was made with {key} {meta[key]!r}, and here it is {value!r}; make it again with: {made_by}")
    return array


def read_texts(path):
    """The texts of a text file, one a line, empty lines dropped. Raises UserError when it is missing, empty or not UTF-8."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({one_line(error)}); convert it, for example with iconv") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"{path} holds no text; it needs one text a line")
    return texts


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def digest(*arrays):
    """Twelve hex digits of the content of tensors or arrays: they tell a broken run whether its inputs are the same."""
    content = hashlib.sha256()
    for array in arrays:
        array = array.cpu().numpy() if hasattr(array, "cpu") else array
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()[:12]


def save_atomic(path, write):
    """Call write(file) on a temporary file beside `path`, then put it there in one step."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def copy_array(source, path):
    """An array and its record in another directory; nothing where both are one."""
    if Path(source).resolve() != Path(path).resolve():
        for old, new in ((source, path), (meta_path(source), meta_path(path))):
            with open(old, "rb") as content:
                save_atomic(new, lambda file, content=content: shutil.copyfileobj(content, file))


def save_json(path, content):
    save_atomic(path, lambda file: file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()))


def save_table(path, table):
    """A table {row: {column: number}} as .csv."""
    lines = [["layer", *next(iter(table.values()))], *([name, *row.values()] for name, row in table.items())]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    save_atomic(path, lambda file: file.write(text.encode()))


def save_array(path, array, meta):
    """Write an array and its record, each in one step."""
    save_atomic(path, lambda file: np.save(file, array, allow_pickle=False))
    save_json(meta_path(path), {**meta, "shape": list(array.shape), "dtype": str(array.dtype)})
