"""Arrays that are written to disk piece by piece, by one process or by several, and gone on with after an interruption."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from utils import distributed
from utils.artifacts import meta_path, save_json
from utils.errors import UserError

COMMIT_SECONDS = 5  # between two times that finished pieces reach the disk and are counted


def row_pieces(rows, size):
    """The pieces [start, stop] of a pass over rows, `size` at a time."""
    return [[start, min(start + size, rows)] for start in range(0, rows, size)]


class RowWriter:
    """Arrays written to disk while their rows are computed; a broken run goes on where it stopped.

    The work is a list of pieces (batches of images, blocks of neurons). Rows go to `X.npy.partial`; `X.npy.progress` beside the
    first array says which pieces are finished. `X.npy` appears when all are. One piece at most is held in memory, while a thread
    writes it; the disk is asked before the first row, and under torchrun every process writes its own pieces into the same files.

    Parameters
    arrays: {path: (shape, dtype)}. meta: what they are made from. pieces: a list of what json can hold.
    overwrite: drop what a broken run left. columns: the paths of arrays that are written by columns, not by rows.
    besides: bytes that the pass writes elsewhere in the same directory.

    Use as a context manager; inside, `todo` lists what this process has to do: [number, piece], the pieces that no earlier run
    finished. A started file with another meta, shape or division into pieces is refused by a UserError.
    """

    def __init__(self, arrays, meta, pieces, overwrite=False, columns=(), besides=0):
        self.arrays = {Path(path): (tuple(shape), np.dtype(dtype)) for path, (shape, dtype) in arrays.items()}
        self.meta, self.pieces, self.overwrite = meta, pieces, overwrite
        self.besides = besides
        self.columns = {Path(path) for path in columns}
        described = {path.name: [list(shape), str(dtype)] for path, (shape, dtype) in self.arrays.items()}
        division = hashlib.sha256(json.dumps(pieces).encode()).hexdigest()[:12]
        self.identity = json.loads(json.dumps({**meta, "arrays": described, "division into pieces": division}))
        first = next(iter(self.arrays))
        self.progress = first.with_name(first.name + ".progress")
        self.partials = {path: path.with_name(path.name + ".partial") for path in self.arrays}
        self._files, self._finished, self._committed = {}, [], time.monotonic()
        # one thread writes, one waits for the disk and counts
        self._threads, self._writing, self._counting = ThreadPoolExecutor(2), None, None

    def __enter__(self):
        if distributed.first():
            self._prepare()
        distributed.barrier()
        flags = self._flags()
        for path, partial in self.partials.items():
            file = self._files[path] = open(partial, "r+b", buffering=0)
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
        self._offsets = {path: file.tell() for path, file in self._files.items()}
        self.unfinished = {i for i in range(len(self.pieces)) if not flags[i]}  # of all processes
        self.todo = distributed.share([[i, piece] for i, piece in enumerate(self.pieces) if not flags[i]])
        distributed.barrier()  # every rank has read the flags before one sets new ones
        return self

    def _prepare(self):
        """Make the files, or see that those of an earlier run are of the same work."""
        started = None if self.overwrite else read_identity(self.progress)
        if started == self.identity and self._flags().all():  # it broke while the files got their names
            for path, partial in self.partials.items():
                if path.is_file() and not partial.is_file():
                    os.replace(path, partial)
        if started is not None and not all(path.is_file() for path in self.partials.values()):
            started = None
        if started is not None and started != self.identity:
            differing = [key for key in self.identity if started.get(key) != self.identity[key]]
            raise UserError(
                f"{self.progress} belongs to a run with other {', '.join(differing) or 'settings'}; "
                "repeat that run to finish it, or add --overwrite to start afresh"
            )
        self._require_space()
        if started is not None:
            return
        self._drop_progress_of_these_files()
        try:
            for path, (shape, dtype) in self.arrays.items():
                with telling(path), open(self.partials[path], "wb") as file:
                    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    file.flush()
                    reserve(file, file.tell() + _size(shape, dtype))
            part = self.progress.with_name(self.progress.name + ".partial")
            part.write_bytes(json.dumps(self.identity).encode() + b"\n" + bytes(len(self.pieces)))
            os.replace(part, self.progress)
        except BaseException:
            self._remove()
            raise

    def _flags(self):
        """bool [pieces]: which are finished."""
        header, flags = self.progress.read_bytes().split(b"\n", 1)
        self._flag_offset = len(header) + 1
        return np.frombuffer(flags, np.uint8).astype(bool)

    def _drop_progress_of_these_files(self):
        """Files that are begun anew no longer hold what a broken pass over other layers counts as finished there."""
        for progress in self.progress.parent.glob("*.progress"):
            identity = read_identity(progress) or {}
            if identity.get("arrays", {}).keys() & self.identity["arrays"].keys():
                progress.unlink()

    def _require_space(self):
        """Say what will be written, and refuse what cannot fit, before any work is done."""
        directory = self.progress.parent
        needed = self.besides + sum(_size(shape, dtype) for shape, dtype in self.arrays.values())
        there = sum(path.stat().st_blocks * 512 for path in self.partials.values() if path.is_file())
        free = shutil.disk_usage(directory).free
        if needed - there > free:
            raise UserError(
                f"{directory} has {free / 1e9:.2f} GB free and this run writes {needed / 1e9:.2f} GB; make room, choose another "
                "--output_dir, or write less (--store_dtype float16, fewer layers, a larger --subsample)"
            )
        print(f"{needed / 1e9:.2f} GB go to {directory}, which has {free / 1e9:.0f} GB free", flush=True)

    def write(self, number, row, blocks):
        """Write piece `number` in a thread, after the piece before, whose error is raised here.

        blocks: {path: array [n, ...]}, whose first rows (or columns) are number `row` of their arrays. They are not to be changed
        any more.
        """
        self._settle()
        self._writing = number, self._threads.submit(self._write, row, blocks)
        waiting = self._counting is not None and not self._counting.done()
        if time.monotonic() - self._committed > COMMIT_SECONDS and not waiting:
            self._wait()
            self._counting = self._threads.submit(self._count, self._finished)  # the pass goes on while the disk works
            self._finished, self._committed = [], time.monotonic()

    def _write(self, row, blocks):
        for path, block in blocks.items():
            path = Path(path)
            shape, dtype = self.arrays[path]
            block = np.ascontiguousarray(block, dtype=dtype)
            with telling(path):
                if path in self.columns:
                    for i, values in enumerate(block):
                        self._write_at(path, i * shape[1] + row, values)
                else:
                    self._write_at(path, row * (_size(shape[1:], 1)), block)

    def _write_at(self, path, entry, values):
        """Write values from the flat index `entry` of an array on."""
        file = self._files[path]
        rest = memoryview(values.reshape(-1)).cast("B")
        file.seek(self._offsets[path] + entry * values.itemsize)
        while rest:  # one call writes 2 GB at most
            rest = rest[file.write(rest) :]

    def commit(self):
        """Count the finished pieces now, and wait until the disk has them."""
        try:
            self._settle()
        finally:  # those before a piece that could not be written count
            self._wait()
            self._count(self._finished)
            self._finished, self._committed = [], time.monotonic()

    def _settle(self):
        """Wait for the piece that is being written, whose error is raised here."""
        if self._writing is not None:
            (number, writing), self._writing = self._writing, None
            writing.result()
            self._finished.append(number)

    def _wait(self):
        """For the counting that is under way, whose error is raised here."""
        counting, self._counting = self._counting, None
        if counting is not None:
            counting.result()

    def _count(self, numbers):
        """Set the flags of pieces, after their rows have reached the disk, so that a machine may die."""
        for path, file in self._files.items():
            with telling(path):
                _sync(file)
        with telling(self.progress), open(self.progress, "r+b", buffering=0) as file:
            for number in numbers:
                file.seek(self._flag_offset + number)
                file.write(b"\1")
            _sync(file)

    def __exit__(self, kind, error, trace):
        try:
            self.commit()
        finally:
            self._threads.shutdown()
            for file in self._files.values():
                with contextlib.suppress(OSError):  # a full disk says so once more
                    file.close()
        if kind is not None:
            if distributed.size() == 1 and not self._flags().any():
                self._remove()
            return
        distributed.barrier()
        if distributed.first() and self._flags().all():
            for path, (shape, dtype) in self.arrays.items():
                os.replace(self.partials[path], path)
                save_json(meta_path(path), {**self.meta, "shape": list(shape), "dtype": str(dtype)})
            self.progress.unlink()
        distributed.barrier()

    def _remove(self):
        for path in (*self.partials.values(), self.progress, self.progress.with_name(self.progress.name + ".partial")):
            path.unlink(missing_ok=True)


def reserve(file, size):
    """Make an open file `size` bytes long, with room on the disk for all: rows in holes of a file cost eight times the time."""
    file.truncate(size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


def _sync(file):
    """Wait until the disk has what was written."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno != errno.EINVAL:  # pipes and devices cannot
            raise


def read_identity(progress):
    """What a progress file belongs to; None where there is none, or a damaged one."""
    try:
        with open(progress, "rb") as file:
            return json.loads(file.readline())
    except (FileNotFoundError, ValueError):
        return None


@contextlib.contextmanager
def telling(path):
    """A full disk, or one that is not to be written, in words that name the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); what is finished is kept, and the same command goes on from there "
            "when that is mended"
        ) from error


def _size(shape, dtype):
    """Bytes of an array; entries where dtype is 1."""
    return int(np.prod(shape, dtype=np.int64)) * (dtype if dtype == 1 else np.dtype(dtype).itemsize)
