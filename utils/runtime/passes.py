"""Long passes over images or neurons: shared by all processes, resumed after an interruption, whole files only.

    with Pass({path: ((len(images), vit.D), "float32")}, record, pieces_of(len(images), 16)) as work:
        for rows, pixels in work.over(loader):
            work[path][rows] = vit(pixels)

A piece of the work (a batch of images, a block of neurons) counts as done when its turn of the loop has ended and its rows are
written. Arrays grow as X.npy.TAG.partial, where TAG stands for what the pass is made from. Beside the first array lies
X.npy.TAG.progress.RANK: which pieces this process has done, and the arrays of `work.state`. When all pieces of all processes are
done, the arrays get their names and records. A pass whose arrays are there with the same record has nothing left to do.
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
from zipfile import BadZipFile

import numpy as np
import torch
from tqdm import tqdm

from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.files import save_atomic, writing
from utils.runtime.results import complete, is_made, publish

COMMIT_SECONDS = 5  # at least, between two times that progress is saved
COMMIT_SHARE = 0.01  # of the time, at most, that saving the state may take
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
    with tqdm(total=count, desc=description, unit=unit, disable=not distributed.is_rank_zero()) as bar:
        for piece, item in zip(pieces, items, strict=True):
            yield piece, item
            bar.update(piece.stop - piece.start)


def require_space(arrays, scratch=0, overwrite=False):
    """Say how much will be written, and refuse what cannot fit, before any work is done.

    arrays: {path: (shape, dtype)} in one folder; what is there already needs no more room, unless it is to be overwritten.
    scratch: bytes of other files.

    Raises UserError when the disk is too small.
    """
    folder = next(iter(arrays)).parent
    needed = scratch + sum(_bytes(*spec) for path, spec in arrays.items() if overwrite or not path.is_file())
    partials = [partial for path in arrays for partial in folder.glob(f"{path.name}.*.partial")]
    free = shutil.disk_usage(folder).free
    if needed - sum(partial.stat().st_blocks * 512 for partial in partials) > free:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free and this run writes {needed / 1e9:.2f} GB; make room, choose another "
            "--output_dir, or write less (--store_dtype float16, fewer layers, a larger --subsample)"
        )
    print(f"{needed / 1e9:.2f} GB go to {folder}, which has {free / 1e9:.0f} GB free", flush=True)


class Pass:
    """The loop over pieces that can be interrupted.

    Parameters
    arrays: {path: (shape, dtype)} of the results. Inside the `with`, work[path][rows] = block and work[path][:, columns] = block
        write them; a thread does it while the loop goes on, so a block must not be changed afterwards.
    record: what the arrays are made from. It becomes their record.
    pieces: slices.
    settings: what else an interrupted pass must agree with to be resumed (batch size, layers).
    state: {name: array} that the loop changes in place (`work.state`), saved with the progress. Each process has its own, so the
        pass is resumed by as many processes. scratch: {name: (shape, dtype)}, the same for arrays too large for memory.
    overwrite: discard finished results and earlier progress.

    Raises UserError when results are there that were made from something else, when an unfinished pass with other settings has
    written into the first array, and when the disk is too small.
    """

    def __init__(self, arrays, record, pieces, settings=None, state=None, scratch=None, overwrite=False):
        self.pieces, self.overwrite = pieces, overwrite
        self.state = {name: array.copy() for name, array in (state or {}).items()}
        self.records = {Path(path): complete(record, *spec) for path, spec in arrays.items()}
        identity = {**complete(record), **(settings or {})}
        identity["arrays"] = {path.name: [made["shape"], made["dtype"]] for path, made in self.records.items()}
        identity["division into pieces"] = _hash([[piece.start, piece.stop] for piece in pieces])
        if state:
            identity["number of processes"] = distributed.world_size()
        self.identity = json.loads(json.dumps(identity))
        self.tag, self.first = _hash(self.identity)[:8], next(iter(self.records))
        self.files = {path: ArrayFile(path, self.records[path], self.tag, self._queue) for path in self.records}
        self._scratch_specs, self.scratch = scratch or {}, {}
        self._done, self._in_turn, self._error = np.zeros(len(pieces), bool), False, None
        self._thread, self._blocks, self._saving, self._turns = ThreadPoolExecutor(1), deque(), None, None
        self._saved, self._cost = time.monotonic(), 0.0

    def __getitem__(self, path):
        return self.files[Path(path)]

    def progress(self, rank=None):
        """Progress file of a process."""
        rank = distributed.rank() if rank is None else rank
        return self.first.with_name(f"{self.first.name}.{self.tag}.progress.{rank}")

    def scratch_path(self, name, rank=None):
        """Scratch file of a process."""
        rank = distributed.rank() if rank is None else rank
        return self.first.with_name(f"{self.first.name}.{self.tag}.{name}.{rank}.partial")

    # start

    def __enter__(self):
        made = [is_made(path, record, self.overwrite) for path, record in self.records.items()]
        self.finished = all(made)
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
        self._elsewhere = np.zeros(len(self.pieces), bool)  # done, by an earlier run or another process
        for path in self._progress_files():
            saved = read_progress(path)
            if saved is not None:
                self._elsewhere |= saved["done"]
                if path == self.progress():
                    self._done |= saved["done"]
                    self.state |= {name: saved[name] for name in self.state}
        for name, (shape, dtype) in self._scratch_specs.items():
            self.scratch[name] = Scratch(self.scratch_path(name), shape, dtype, resumed=self._done.any())
        distributed.barrier()  # every process has read the progress before one of them saves new one
        return self

    def _prepare(self):
        """Create the files, or check those of an interrupted run."""
        leftovers = [] if self.overwrite else self._progress_files("*")
        for path in leftovers:
            saved = read_progress(path)
            started = saved and json.loads(str(saved["identity"]))
            if started and started != self.identity:
                differing = [key for key in self.identity if started.get(key) != self.identity[key]]
                raise UserError(
                    f"{path} belongs to a run with other {', '.join(differing) or 'settings'}; repeat that run to finish it, or "
                    "add --overwrite to start from scratch"
                )
        resumed = bool(leftovers) and all(file.partial.is_file() or file.is_published() for file in self.files.values())
        arrays = {path: (file.shape, file.dtype) for path, file in self.files.items()}
        scratch = distributed.world_size() * sum(_bytes(*spec) for spec in self._scratch_specs.values())
        require_space(arrays, scratch, self.overwrite)
        if resumed:
            return
        self._clean(every_tag=self.overwrite)
        try:
            for file in self.files.values():
                file.create()
            self._save(self._done, self.state)
        except BaseException:
            self._clean()
            raise

    # loop

    def over(self, load=None, part=slice(None), description="images", unit="image"):
        """Yield (piece, item) for this process's share of what is not done; load, description, unit as in `walk`.

        part: a slice of the pieces, for passes that go over the images more than once.
        """
        todo = []
        if not self.finished:
            numbers = range(len(self.pieces))[part]
            done = self._done | self._elsewhere
            if self.state:  # a process resumes its own pieces, which its state goes with
                todo = [i for i in distributed.shard(numbers) if not done[i]]
            else:
                todo = distributed.shard([i for i in numbers if not done[i]])
        self._turns = walk([self.pieces[i] for i in todo], load, description, unit)
        for i, (piece, item) in zip(todo, self._turns, strict=True):
            self._in_turn = True
            yield piece, item
            self._in_turn = False
            self._end_turn(i)

    def _end_turn(self, i):
        """Piece i is done when the thread gets here: what the turn has written is before it in the queue."""
        self._submit(lambda: self._done.__setitem__(i, True))
        self._wait()
        saving = self._saving is not None and not self._saving.done()
        if not saving and time.monotonic() - self._saved > max(COMMIT_SECONDS, self._cost / COMMIT_SHARE):
            self.commit(wait=False)

    def commit(self, wait=True):
        """Save the progress: first the rows reach the disk, then the record of them, so that a machine may die in between."""
        state = {name: array.copy() for name, array in self.state.items()}
        self._saved = time.monotonic()
        self._saving = self._submit(lambda: self._sync_and_save(state))
        if wait:
            self._wait(self._saving)

    def gather(self, names):
        """Arrays of the state of all processes, {name: list by rank}, once every process is here."""
        self.commit()
        distributed.barrier()
        gathered = {name: [] for name in names}
        for rank in range(distributed.world_size()):
            with np.load(self.progress(rank), allow_pickle=False) as file:
                for name in names:
                    gathered[name].append(file[name])
        distributed.barrier()
        return gathered

    def gather_scratch(self, name):
        """The same of a scratch array, as read-only memory maps. To be called after `gather`."""
        shape, dtype = self._scratch_specs[name]
        paths = [self.scratch_path(name, rank) for rank in range(distributed.world_size())]
        return [np.memmap(path, dtype, "r", shape=shape) for path in paths]

    def _submit(self, task):
        """Queue a task for the writing thread. After the first error nothing more is done there."""

        def guarded():
            if self._error is None:
                try:
                    task()
                except BaseException as error:
                    self._error = error

        return self._thread.submit(guarded)

    def _queue(self, write, size):
        """Queue the writing of a block of `size` bytes; wait while more than QUEUE are waiting."""
        self._blocks.append((self._submit(write), size))
        while sum(waiting for _, waiting in self._blocks) > QUEUE or self._blocks and self._blocks[0][0].done():
            self._wait(self._blocks.popleft()[0])

    def _wait(self, future=None):
        """Wait for a task of the writing thread, and raise here what has gone wrong there."""
        if future is not None:
            future.result()
        if self._error is not None:
            raise self._error

    def _sync_and_save(self, state):
        began = time.monotonic()
        for file in [*self.files.values(), *self.scratch.values()]:
            file.sync()
        synced = time.monotonic()
        self._save(self._done, state)
        if state:
            self._cost = time.monotonic() - (began if self.scratch else synced)

    def _save(self, done, state):
        content = {"identity": json.dumps(self.identity), "done": done, **state}
        with writing(self.first):
            save_atomic(self.progress(), lambda file: (np.savez(file, **content), file.flush(), _sync(file)))

    # end

    def __exit__(self, kind, error, trace):
        if self._turns is not None:
            self._turns.close()  # ends the progress bar's line
        if self.finished:
            self._thread.shutdown()
            return
        try:
            if kind is None:
                self.commit()
        finally:
            self._thread.shutdown()  # what is queued gets done
            failed = kind is not None or self._error is not None
            # a turn that was interrupted may have changed the state, and one that was not written is in it
            if failed and not (self.state and (self._in_turn or self._error)):
                with contextlib.suppress(OSError, UserError):  # a full disk says so a second time
                    self._sync_and_save(self.state)
            for file in [*self.files.values(), *self.scratch.values()]:
                with contextlib.suppress(OSError):
                    file.close()
        if kind is not None:
            if distributed.world_size() == 1 and not self._done.any():
                self._clean()
            return
        distributed.barrier()
        if distributed.is_rank_zero() and self._all_done():
            for file in self.files.values():
                file.publish()
            self._clean()
        distributed.barrier()

    def _all_done(self):
        done = self._done | self._elsewhere
        for path in self._progress_files():
            done |= read_progress(path)["done"]
        return done.all()

    def _progress_files(self, tag=None):
        files = self.first.parent.glob(f"{self.first.name}.{tag or self.tag}.progress.*")
        return sorted(path for path in files if path.suffix[1:].isdecimal())

    def _clean(self, every_tag=False):
        """Remove what is not a result; with `every_tag` also what other interrupted passes have left for these arrays."""
        tag = "*" if every_tag else self.tag
        for path in self.files:
            for leftover in path.parent.glob(f"{path.name}.{tag}.*partial"):
                leftover.unlink()
        for leftover in self.first.parent.glob(f"{self.first.name}.{tag}.progress.*"):
            leftover.unlink()


class ArrayFile:
    """An .npy that is written piece by piece. The room for all of it is taken at the start."""

    def __init__(self, path, record, tag, queue):
        self.path, self.record, self.shape, self.dtype = path, record, tuple(record["shape"]), np.dtype(record["dtype"])
        self.partial = path.with_name(f"{path.name}.{tag}.partial")
        self.size, self._queue, self._file = _bytes(self.shape, self.dtype), queue, None

    def is_published(self):
        """Whether an interrupted run has already given it its name."""
        return is_made(self.path, self.record)

    def create(self):
        """Make the file, with room for the whole array."""
        with writing(self.partial), open(self.partial, "wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            reserve(file, file.tell() + self.size)

    def open(self):
        """Open it for writing; a published file needs none."""
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
        if self._file is not None:
            self._queue(lambda: self._write(index, block), block.nbytes)

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
        """Close the file; an error of the disk has been told before."""
        if self._file is not None:
            self._file.close()

    def publish(self):
        """Give the file its name."""
        if self.partial.is_file():
            with writing(self.path):
                publish(self.partial, self.path, self.record)


class Scratch:
    """An array of one process that lies in a file mapped into memory."""

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

    def close(self):
        """Let go of the array; the map goes with its last view."""
        self.array = None


def read_progress(path):
    """Arrays of a progress file; None when it is not there or damaged."""
    with contextlib.suppress(ValueError, EOFError, OSError, KeyError, BadZipFile), np.load(path, allow_pickle=False) as file:
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
