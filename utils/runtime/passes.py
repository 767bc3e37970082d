"""Long passes over images or neurons: shared by all processes, resumed after an interruption, whole files only.

    with Pass({path: ((len(images), vit.D), "float32")}, record, pieces_of(len(images), 16)) as work:
        for rows, pixels in work.over(loader):
            work[path][rows] = vit(pixels)

A piece (a batch of images, a block of neurons) is done when its turn of the loop has ended and its rows are written. Arrays grow
as X.npy.TAG.partial; TAG stands for what the pass is made from. Beside the first lies X.npy.TAG.progress.RANK: the pieces that
this process has done, and its `work.state`. When all pieces are done, the arrays get their names and records. An array that is
there with the same record is kept; a pass whose arrays are all there has nothing left to do.
"""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import shutil
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.runtime import distributed, memory
from utils.runtime.errors import UserError
from utils.runtime.files import save_atomic, writing
from utils.runtime.results import NOTES, complete, is_made, publish

COMMIT_SECONDS = 5  # at least, between two times that progress is saved
COMMIT_SHARE = 0.01  # of the time, at most, that saving the state may take
TRIM = 32  # turns after which free memory is given back
QUEUE = 2**27  # bytes that may wait for the writing thread


def pieces_of(rows, size):
    """Slices of `rows` rows, `size` at a time."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def walk(pieces, load=None, description="images", unit="image"):
    """Yield (piece, what `load` gives for it), with a progress bar of rows.

    load: a function from the list of pieces to an iterator with one item for each; None for no items.
    """
    items = load(pieces) if load else [None] * len(pieces)
    count = sum(piece.stop - piece.start for piece in pieces)
    with memory.steady(), tqdm(total=count, desc=description, unit=unit, disable=not distributed.is_rank_zero()) as bar:
        for turn, (piece, item) in enumerate(zip(pieces, items, strict=True)):
            yield piece, item
            bar.update(piece.stop - piece.start)
            if turn % TRIM == TRIM - 1:
                memory.trim()


def require_space(arrays, scratch=0, overwrite=False):
    """Say how much will be written. Raises UserError, before any work is done, when the disk is too small.

    arrays: {path: (shape, dtype)} in one folder. Finished ones need no more room, unless they are to be overwritten.
    scratch: bytes of other files.
    """
    folder = next(iter(arrays)).parent
    needed = scratch + sum(_bytes(*spec) for path, spec in arrays.items() if overwrite or not path.is_file())
    started = sum(file.stat().st_blocks * 512 for path in arrays for file in folder.glob(f"{path.name}.*.partial"))
    free = shutil.disk_usage(folder).free
    if needed - started > free:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free and this run writes {needed / 1e9:.2f} GB; make room, choose another "
            "--output_dir, or write less (--store_dtype float16, fewer layers, a larger --subsample)"
        )
    print(f"{needed / 1e9:.2f} GB go to {folder}, which has {free / 1e9:.0f} GB free", flush=True)


class Pass:
    """The loop over pieces that can be interrupted.

    Parameters
    arrays: {path: (shape, dtype)} of the results, or (shape, dtype, what this one alone is made from besides). Inside the `with`,
        work[path][rows] = block and work[path][:, columns] = block write them; a thread does it while the loop goes on, so a
        block must not be changed afterwards.
    record: what the arrays are made from. It becomes their record.
    pieces: slices.
    settings: what else an interrupted pass must agree with to be resumed (batch size, layers).
    state: {name: (shape, dtype)} of arrays, zero at first, that the loop changes in place (`work.state`). They are saved with the
        progress. Each process has its own, so as many processes must resume the pass.
    scratch: the same for arrays too large for memory (`work.scratch`).
    overwrite: discard finished results and earlier progress.

    Raises UserError when results made from something else are there, when an unfinished pass with other settings has written into
    the first array, and when the disk is too small.
    """

    def __init__(self, arrays, record, pieces, settings=None, state=None, scratch=None, overwrite=False):
        self.arrays, self.pieces, self.overwrite = {Path(path): spec[:2] for path, spec in arrays.items()}, pieces, overwrite
        alone = {Path(path): spec[2] for path, spec in arrays.items() if len(spec) > 2}
        self.state, self.scratch = {name: np.zeros(*spec) for name, spec in (state or {}).items()}, dict(scratch or {})
        identity = {key: value for key, value in complete(record).items() if key not in NOTES} | (settings or {})
        identity["arrays"] = {path.name: [list(shape), str(dtype)] for path, (shape, dtype) in self.arrays.items()}
        identity |= {"inputs": {path.name: made_of for path, made_of in alone.items()}} if alone else {}
        identity["division into pieces"] = _hash([[piece.start, piece.stop] for piece in pieces])
        if state:
            identity["number of processes"] = distributed.world_size()
        self.identity, self.tag = json.loads(json.dumps(identity)), _hash(identity)
        self.first = next(iter(self.arrays))
        self.files = {
            path: ArrayFile(path, complete(record | alone.get(path, {}), *spec), self) for path, spec in self.arrays.items()
        }
        self._done = np.zeros(len(pieces), bool)  # by this process
        self._elsewhere = np.zeros(len(pieces), bool)  # by an earlier run or another process
        self._thread, self._blocks, self._error = ThreadPoolExecutor(1), deque(), None
        self._saving, self._saved, self._cost = None, time.monotonic(), 0.0
        self._turns, self._in_turn = None, False

    def __getitem__(self, path):
        return self.files[Path(path)]

    def beside(self, name, rank=None):
        """A file of one process, such as its progress."""
        rank = distributed.rank() if rank is None else rank
        return self.first.with_name(f"{self.first.name}.{self.tag}.{name}.{rank}")

    def __enter__(self):
        self.finished = all([is_made(file.path, file.record, self.overwrite) for file in self.files.values()])
        distributed.barrier()  # every process has looked before one of them changes anything
        if distributed.is_rank_zero():
            if self.finished:
                print(f"kept {self.first.name}: made from the same inputs with the same flags (--overwrite makes it again)")
                self._clean()
            else:
                self._prepare()
        distributed.barrier()
        if self.finished:
            return self
        for file in self.files.values():
            file.open()
        for path in self._progress_files():
            saved = read_progress(path)
            if saved is not None:
                self._elsewhere |= saved["done"]
                if path == self.beside("progress"):
                    self._done |= saved["done"]
                    self.state = {name: saved[name] for name in self.state}
        for name, (shape, dtype) in self.scratch.items():
            self.scratch[name] = Scratch(self.beside(name), shape, dtype, resumed=self._done.any())
        distributed.barrier()  # every process has read the progress before one of them saves more
        return self

    def _prepare(self):
        """Create the files, or check those of an interrupted run."""
        earlier = [] if self.overwrite else self._progress_files("*")
        for path in earlier:
            saved = read_progress(path)
            started = self.identity if saved is None else json.loads(str(saved["identity"]))
            differing = [key for key in self.identity if started.get(key) != self.identity[key]]
            if differing:
                raise UserError(
                    f"{path} belongs to a run with other {', '.join(differing)}; repeat that run to finish it, or add "
                    "--overwrite to start from scratch"
                )
        scratch = distributed.world_size() * sum(_bytes(*spec) for spec in self.scratch.values())
        require_space(self.arrays, scratch, self.overwrite)
        if earlier and all(file.partial.is_file() or is_made(file.path, file.record) for file in self.files.values()):
            return
        self._clean("*" if self.overwrite else self.tag)
        try:
            for file in self.files.values():
                if not is_made(file.path, file.record, self.overwrite):  # else it stays as it is
                    file.create()
            self._save()
        except BaseException:
            self._clean()
            raise

    def over(self, load=None, part=slice(None), description="images", unit="image"):
        """Yield (piece, item) for this process's share of what is not done; load, description, unit as in `walk`.

        part: a slice of the pieces, for passes that go over the images more than once.
        """
        numbers, done = range(len(self.pieces))[part], self._done | self._elsewhere | self.finished
        if self.state:  # a process resumes its own pieces, which its state goes with
            todo = [i for i in distributed.shard(numbers) if not done[i]]
        else:
            todo = distributed.shard([i for i in numbers if not done[i]])
        self._turns = walk([self.pieces[i] for i in todo], load, description, unit)
        for i, (piece, item) in zip(todo, self._turns, strict=True):
            self._in_turn = True
            yield piece, item
            self._in_turn = False
            self._submit(lambda i=i: self._done.__setitem__(i, True))  # after what the turn has queued
            self._wait()
            saving = self._saving is not None and not self._saving.done()
            if not saving and time.monotonic() - self._saved > max(COMMIT_SECONDS, self._cost / COMMIT_SHARE):
                self.commit(wait=bool(self.state))  # the loop would change it meanwhile
            self._end_turn()

    def _end_turn(self):
        """Called after every turn; tests stop here."""

    def commit(self, wait=True):
        """Save the progress: first the rows reach the disk, then the record of them, so that a machine may die in between."""
        self._saved, self._saving = time.monotonic(), self._submit(self._save)
        if wait:
            self._wait(self._saving)

    def gather(self, names):
        """Arrays of the state of all processes, {name: list by rank}, once every process is here."""
        self.commit()
        distributed.barrier()
        gathered = {name: [] for name in names}
        for rank in range(distributed.world_size()):
            with np.load(self.beside("progress", rank), allow_pickle=False) as file:
                for name in names:
                    gathered[name].append(file[name])
        distributed.barrier()
        return gathered

    def gather_scratch(self, name):
        """The same of a scratch array, as read-only memory maps. To be called after `gather`."""
        ranks, own = range(distributed.world_size()), self.scratch[name].array
        return [np.memmap(self.beside(name, rank), own.dtype, "r", shape=own.shape) for rank in ranks]

    def _submit(self, task):
        """Queue a task for the writing thread. After the first error nothing more is done there."""

        def guarded():
            if self._error is None:
                try:
                    task()
                except BaseException as error:
                    self._error = error

        return self._thread.submit(guarded)

    def write(self, task, size):
        """Queue the writing of a block of `size` bytes; wait while more than QUEUE bytes are waiting."""
        self._blocks.append((self._submit(task), size))
        while sum(waiting for _, waiting in self._blocks) > QUEUE or self._blocks and self._blocks[0][0].done():
            self._wait(self._blocks.popleft()[0])

    def _wait(self, future=None):
        """Wait for a task of the writing thread, and raise here what has gone wrong there."""
        if future is not None:
            future.result()
        if self._error is not None:
            raise self._error

    def _save(self):
        began = time.monotonic()
        for file in [*self.files.values(), *(item for item in self.scratch.values() if isinstance(item, Scratch))]:
            file.sync()
        content = {"identity": json.dumps(self.identity), "done": self._done, **self.state}
        with writing(self.first):
            save_atomic(self.beside("progress"), lambda file: (np.savez(file, **content), file.flush(), _sync(file)))
        self._cost = time.monotonic() - began if self.state else 0.0

    def __exit__(self, kind, error, trace):
        if self._turns is not None:
            self._turns.close()  # ends the progress bar's line
        try:
            if kind is None and not self.finished:
                self.commit()
        finally:
            self._thread.shutdown()  # what is queued gets done
            failed = kind is not None or self._error is not None
            # a turn that was interrupted may have changed the state, and one that was not written is in it
            if failed and not self.finished and not (self.state and (self._in_turn or self._error)):
                with contextlib.suppress(OSError, UserError):  # a full disk says so a second time
                    self._save()
            for file in self.files.values():
                file.close()
            if failed and distributed.world_size() == 1 and not self._done.any():
                self._clean()
        if kind is not None or self.finished:
            return
        distributed.barrier()
        if distributed.is_rank_zero() and np.any([read_progress(path)["done"] for path in self._progress_files()], axis=0).all():
            for file in self.files.values():
                file.publish()
            self._clean()
        distributed.barrier()

    def _progress_files(self, tag=None):
        files = self.first.parent.glob(f"{self.first.name}.{tag or self.tag}.progress.*")
        return sorted(path for path in files if path.suffix[1:].isdecimal())

    def _clean(self, tag=None):
        """Remove what is no result; for the tag "*" also what other interrupted passes have left for these arrays."""
        for path in self.files:
            for leftover in path.parent.glob(f"{path.name}.{tag or self.tag}.*"):
                leftover.unlink()


class ArrayFile:
    """An .npy of a `Pass`, written piece by piece. The room for all of it is taken at the start. It never holds NaN or infinity.

    path: of the result. record: of the finished array. work: the `Pass`.
    """

    def __init__(self, path, record, work):
        self.path, self.record, self.work, self._file = path, record, work, None
        self.shape, self.dtype = tuple(record["shape"]), np.dtype(record["dtype"])
        self.partial = path.with_name(f"{path.name}.{work.tag}.partial")

    def create(self):
        """Make the file, with room for the whole array."""
        with writing(self.partial), open(self.partial, "wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            reserve(file, file.tell() + _bytes(self.shape, self.dtype))

    def open(self):
        """Open it for writing, unless it is there already."""
        if self.partial.is_file():
            self._file = open(self.partial, "r+b", buffering=0)
            np.lib.format.read_magic(self._file)
            np.lib.format.read_array_header_1_0(self._file)
            self._start = self._file.tell()

    def __setitem__(self, index, block):
        """file[rows] = block, or file[:, columns] = block: a tensor or array, copied to the host here, written by the thread."""
        if isinstance(block, torch.Tensor):  # converted on its device: numpy is slow at half precision
            block = block.detach().to(getattr(torch, self.dtype.name)).cpu().numpy()
        block = np.ascontiguousarray(block, self.dtype)
        if self.dtype.kind == "f" and not torch.from_numpy(block).sum(dtype=torch.float32).isfinite():  # quicker than each alone
            raise UserError(
                f"{self.path} would hold NaN or infinity; look at its inputs, or repeat the command without float16 "
                "(--precision, --store_dtype)"
            )
        if self._file is not None:
            self.work.write(lambda: self._write(index, block), block.nbytes)

    def _write(self, index, block):
        with writing(self.path):
            if isinstance(index, slice):
                self._write_at((index.start or 0) * int(np.prod(self.shape[1:], dtype=np.int64)), block)
            else:
                for i, values in enumerate(block):
                    self._write_at(i * self.shape[1] + index[1].start, values)

    def _write_at(self, entry, values):
        """Write values from a flat index of the array on."""
        rest = memoryview(values.reshape(-1)).cast("B")
        self._file.seek(self._start + entry * self.dtype.itemsize)
        while rest:  # one call writes 2 GB at most
            rest = rest[self._file.write(rest) :]

    def sync(self):
        """Wait until the disk has what was written."""
        if self._file is not None:
            with writing(self.path):
                _sync(self._file)

    def close(self):
        """Close the file; errors of the disk have been raised before."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def publish(self):
        """Give the file its name."""
        if self.partial.is_file():
            with writing(self.path):
                publish(self.partial, self.path, self.record)


class Scratch:
    """An array of one process in a file that is mapped into memory."""

    def __init__(self, path, shape, dtype, resumed):
        size = _bytes(shape, dtype)
        if not resumed:
            with writing(path), open(path, "wb") as file:
                reserve(file, size)  # a full disk would end the process by a signal, without a message
        if not path.is_file() or path.stat().st_size != size:  # a map would fill with zeros what is cut off
            raise UserError(f"{path} of an interrupted run is missing or cut off; add --overwrite to start from scratch")
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self.array = np.frombuffer(self._map, dtype).reshape(shape)

    def release(self):
        """Let go of the pages in memory, which would count as this process's; the file keeps them."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def sync(self):
        """Wait until the disk has what was written."""
        self._map.flush()


def read_progress(path):
    """Arrays of a progress file; None when it is not there or damaged."""
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:  # numpy raises many
        return {name: file[name] for name in file.files}
    return None


def reserve(file, size):
    """Make an open file `size` bytes long and take room on the disk for all of it; rows in holes are eight times slower."""
    file.truncate(size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


def _sync(file):
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno != errno.EINVAL:  # pipes and devices cannot
            raise


def _hash(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _bytes(shape, dtype):
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
