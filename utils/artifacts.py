"""The files that stages pass to each other: their names, how they are written, how they are checked when read.

Every array is a plain .npy in one directory. Beside `X.npy` lies `X.meta.json` with its shape, what made it and from what; the
next stage compares it. Files without one (made by the published code) are taken as they are, after a look at their shape.
"""

import contextlib
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


def save_json(path, content):
    save_atomic(path, lambda file: file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()))


def save_array(path, array, meta):
    """Write an array and its record, each in one step."""
    save_atomic(path, lambda file: np.save(file, array, allow_pickle=False))
    save_json(meta_path(path), {**meta, "shape": list(array.shape), "dtype": str(array.dtype)})


class RowWriter:
    """Arrays [rows, ...] written to disk while the rows arrive; a broken run goes on where it stopped.

    The rows are written to `X.npy.partial`; a small json beside the first array counts the finished ones. `X.npy` appears when
    all rows are there. Nothing is held in memory, and the disk is asked before the first row.

    Parameters
    arrays: {path: (shape, dtype)}, the first size of each shape is the number of rows.
    meta: what the rows are made from. A started file with another meta is refused, with `overwrite` it is dropped.

    Use as a context manager: `start` is the number of rows that an earlier run finished.
    """

    def __init__(self, arrays, meta, overwrite=False):
        self.arrays = {Path(path): (tuple(shape), np.dtype(dtype)) for path, (shape, dtype) in arrays.items()}
        self.meta = meta
        described = {path.name: [list(shape), str(dtype)] for path, (shape, dtype) in self.arrays.items()}
        self.identity = json.loads(json.dumps({**meta, "arrays": described}))  # what a started pass has to agree with
        self.rows = next(iter(self.arrays.values()))[0][0]
        first = next(iter(self.arrays))
        self.record = first.with_name(first.name + ".progress.json")
        self.partials = {path: path.with_name(path.name + ".partial") for path in self.arrays}
        self.start = self._earlier_rows(overwrite)
        self.done = self.start
        self._files = {}

    def _earlier_rows(self, overwrite):
        if overwrite or not self.record.is_file() or not all(path.is_file() for path in self.partials.values()):
            return 0
        try:
            record = json.loads(self.record.read_text())
        except ValueError:
            return 0
        if record["identity"] != self.identity:
            differing = [key for key in self.identity if record["identity"].get(key) != self.identity[key]]
            raise UserError(
                f"{self.record} belongs to a run with other {', '.join(differing) or 'settings'}; "
                "repeat that run to finish it, or add --overwrite to start afresh"
            )
        return record["done"]

    def __enter__(self):
        self._require_space()
        if not self.start:
            self._drop_records_of_these_files()
        try:
            for path, (shape, dtype) in self.arrays.items():
                partial = self.partials[path]
                file = self._files[path] = open(partial, "r+b" if self.start else "w+b")
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            self._offsets = {path: file.tell() for path, file in self._files.items()}
        except BaseException:
            self._close(remove=not self.start)
            raise
        return self

    def _drop_records_of_these_files(self):
        """Files that are begun anew no longer hold what a broken pass over other layers counts as finished there."""
        for record in self.record.parent.glob("*.progress.json"):
            with contextlib.suppress(ValueError, KeyError):
                if json.loads(record.read_text())["identity"]["arrays"].keys() & self.identity["arrays"].keys():
                    record.unlink()

    def _require_space(self):
        """Refuse what cannot fit, before any work is done."""
        directory = next(iter(self.arrays)).parent
        needed = sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in self.arrays.values())
        there = sum(path.stat().st_blocks * 512 for path in self.partials.values() if path.is_file())
        free = shutil.disk_usage(directory).free
        if needed - there > free:
            raise UserError(
                f"{directory} has {free / 1e9:.2f} GB free and this run writes {needed / 1e9:.2f} GB; make room, choose another "
                "--output_dir, or write less (--store_dtype float16, fewer layers, a larger --subsample)"
            )

    def write(self, row, blocks):
        """Write rows from number `row` on: blocks {path: array [n, ...]}. Converts to the dtype of the file."""
        for path, block in blocks.items():
            shape, dtype = self.arrays[Path(path)]
            row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
            file = self._files[Path(path)]
            try:
                file.seek(self._offsets[Path(path)] + row * row_bytes)
                file.write(np.ascontiguousarray(block, dtype=dtype).data)
                file.flush()
            except OSError as error:
                raise UserError(
                    f"{path} cannot be written ({error.strerror}); {self.done} of {self.rows} rows are kept, and the same "
                    "command goes on from there when there is room"
                ) from error
        self.done = row + len(block)
        self.record.write_text(json.dumps({"identity": self.identity, "done": self.done}))

    def __exit__(self, kind, error, trace):
        if kind is not None or self.done < self.rows:
            self._close(remove=self.done == 0)
            return
        self._close(remove=False)
        for path, (shape, dtype) in self.arrays.items():
            os.replace(self.partials[path], path)
            save_json(meta_path(path), {**self.meta, "shape": list(shape), "dtype": str(dtype)})
        self.record.unlink(missing_ok=True)

    def _close(self, remove):
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk says so once more
                file.close()
        if remove:
            self.record.unlink(missing_ok=True)
            for partial in self.partials.values():
                partial.unlink(missing_ok=True)


class ColumnWriter:
    """One float32 array [rows, columns] written to disk by blocks of columns; it appears under its name when all are there."""

    def __init__(self, path, shape, meta):
        self.path, self.shape, self.meta = Path(path), shape, meta
        self.partial = self.path.with_name(self.path.name + ".partial")

    def __enter__(self):
        self._file = open(self.partial, "wb")
        np.lib.format.write_array_header_1_0(self._file, {"descr": "<f4", "fortran_order": False, "shape": self.shape})
        self._offset = self._file.tell()
        return self

    def write(self, column, block):
        """Write columns from number `column` on: block [rows, n]."""
        for row, values in enumerate(np.ascontiguousarray(block, dtype="<f4")):
            self._file.seek(self._offset + 4 * (row * self.shape[1] + column))
            self._file.write(values.data)

    def __exit__(self, kind, error, trace):
        try:
            self._file.close()
        finally:
            if kind is not None:
                self.partial.unlink(missing_ok=True)
        if kind is None:
            os.replace(self.partial, self.path)
            save_json(meta_path(self.path), {**self.meta, "shape": list(self.shape), "dtype": "float32"})
