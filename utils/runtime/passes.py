"""Long passes over images or neurons: shared by all processes, resumed after an interruption, whole files
only.

    with Pass({path: ((len(images), vit.D), "float32")}, record, pieces_of(len(images), 16)) as work:
        for rows, pixels in work.over(loader):
            work[path][rows] = vit(pixels)

A piece (a batch of images, a block of neurons) is done when its turn of the loop has ended and its rows are
written. Arrays grow as X.npy.TAG.partial; TAG stands for what the pass is made from. Beside the first lies
X.npy.TAG.progress.RANK: the pieces that this process has done, and its `work.state`. When all pieces are
done, the arrays get their names and records. An array that is there with the same record is kept; a pass
whose arrays are all there has nothing left to do. While a pass runs, X.npy.lock keeps others from making the
same arrays.
"""

import contextlib
import hashlib
import json
import mmap
import re
import shutil
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.runtime import distributed, memory
from utils.runtime.errors import UserError
from utils.runtime.files import reserve, save_atomic, sync_file, writing
from utils.runtime.locks import Lock, is_locked
from utils.runtime.records import NOTES, complete, is_made, publish

COMMIT_SECONDS = 5  # at least, between two times that progress is saved
COMMIT_SHARE = 0.01  # of the time, at most, that saving the state may take
TRIM = 32  # turns after which free memory is given back
QUEUE = 2**27  # bytes that may wait for the writing thread
OPEN = 64  # files that are open at a time; some systems allow 256
TEMPORARY = re.compile(
    r"(?P<array>.+)\.(?P<tag>[0-9a-f]{12})\.(?P<rest>.+)", re.DOTALL
)  # the name of a file beside an array


class Pieces(list):
    """Slices of rows.

    digests: what each row is made from, one string of hex digits for each; None where that is not known. An
        interrupted pass is resumed although some rows have changed since, as long as none of their pieces is
        done.
    """

    def __init__(self, slices, digests=None):
        super().__init__(slices)
        self.digests = digests

    def __mul__(self, times):
        return Pieces(list(self) * times, self.digests)


def pieces_of(rows, size):
    """`Pieces` of `size` rows. rows: how many there are, or a data set, whose `digests` then say what each is
    made from.
    """
    count = rows if isinstance(rows, int) else len(rows)
    slices = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return Pieces(slices, getattr(rows, "digests", None))


def walk(pieces, load=None, description="images", unit="image"):
    """Yield (piece, what `load` gives for it), with a progress bar of rows.

    load: a function from the list of pieces to an iterator with one item for each; None for no items.
    """
    items = load(pieces) if load else [None] * len(pieces)
    count = sum(piece.stop - piece.start for piece in pieces)
    with (
        memory.steady(),
        tqdm(total=count, desc=description, unit=unit, disable=not distributed.is_rank_zero()) as bar,
    ):
        for turn, (piece, item) in enumerate(zip(pieces, items, strict=True)):
            yield piece, item
            bar.update(piece.stop - piece.start)
            if turn % TRIM == TRIM - 1:
                memory.trim()


def _temporary(arrays, tag=None):
    """The files that passes have left beside some arrays, which lie in one folder: those of one tag, or of
    all.
    """
    names, found = {path.name for path in arrays}, []
    for file in next(iter(arrays)).parent.iterdir():
        parts = TEMPORARY.fullmatch(file.name)
        if parts and parts["array"] in names and tag in (None, parts["tag"]):
            found.append(file)
    return sorted(found)


def _taken(file):
    """Bytes that a file takes on the disk; 0 where another run has just given it its name."""
    try:
        return file.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def require_space(arrays, scratch=0, overwrite=False):
    """Say how much will be written. Raises UserError, before any work is done, when the disk is too small.

    arrays: {path: (shape, dtype)} in one folder. Finished ones need no more room, unless they are to be
        overwritten.
    scratch: bytes of other files.
    """
    folder = next(iter(arrays)).parent
    needed = scratch + sum(_bytes(*spec) for path, spec in arrays.items() if overwrite or not path.is_file())
    started = sum(_taken(file) for file in _temporary(arrays) if file.name.endswith(".partial"))
    total, _, free = shutil.disk_usage(folder)
    if needed - started > free and total > 0:  # some network disks do not know their size
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free and this run writes {needed / 1e9:.2f} GB; make room, choose another "
            "--output_dir, or write less (--store_dtype float16, fewer layers, a larger --subsample)"
        )
    print(f"{needed / 1e9:.2f} GB go to {folder}, which has {free / 1e9:.0f} GB free", flush=True)


class Pass:
    """The loop over pieces that can be interrupted.

    Parameters
    arrays: {path: (shape, dtype)} of the results, or (shape, dtype, what this one alone is made from
        besides). Inside the `with`, work[path][rows] = block and work[path][:, columns] = block write them; a
        thread does it while the loop goes on, so a block must not be changed afterwards.
    record: what the arrays are made from. It becomes their record.
    pieces: slices.
    settings: what else an interrupted pass must agree with to be resumed (batch size, layers).
    state: {name: (shape, dtype)} of arrays, zero at first, that the loop changes in place (`work.state`).
        They are saved with the progress. Each process has its own, so as many processes must resume the pass.
    scratch: the same for arrays too large for memory (`work.scratch`).
    overwrite: discard finished results and earlier progress.

    Raises UserError when results made from something else are there, when an unfinished pass with other
    settings has written into the first array, and when the disk is too small.
    """

    def __init__(self, arrays, record, pieces, settings=None, state=None, scratch=None, overwrite=False):
        self.arrays = {Path(path): spec[:2] for path, spec in arrays.items()}
        self.pieces, self.overwrite = pieces, overwrite
        alone = {Path(path): spec[2] for path, spec in arrays.items() if len(spec) > 2}
        self.state = {name: np.zeros(*spec) for name, spec in (state or {}).items()}
        self.scratch = dict(scratch or {})
        identity = {key: value for key, value in complete(record).items() if key not in NOTES} | (
            settings or {}
        )
        identity["arrays"] = {
            path.name: [list(shape), str(dtype)] for path, (shape, dtype) in self.arrays.items()
        }
        identity |= {"inputs": {path.name: made_of for path, made_of in alone.items()}} if alone else {}
        identity["division into pieces"] = _hash([[piece.start, piece.stop] for piece in pieces])
        if state:
            identity["number of processes"] = distributed.world_size()
        self.identity = json.loads(json.dumps(identity))
        self._rows = _as_numbers(getattr(pieces, "digests", None) or [])
        by_rows = ("data",) if len(self._rows) else ()  # compared row by row
        self.tag = _hash({key: value for key, value in identity.items() if key not in by_rows})
        self.first = next(iter(self.arrays))
        self.files = {
            path: ArrayFile(path, complete(record | alone.get(path, {}), *spec), self)
            for path, spec in self.arrays.items()
        }
        self.open_files = OrderedDict()  # the latest used last
        self.finished, self._lock = False, None
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
        self.finished = self._is_made()
        distributed.barrier()  # every process has looked before one of them changes anything
        try:
            if distributed.is_rank_zero():
                self._prepare()
            distributed.barrier()
            self.finished = self.finished or self._is_made()  # by another run, meanwhile
            if not self.finished:
                self._lock = self._lock or self._take_lock()
                self._resume()
        except BaseException:
            self._thread.shutdown()
            self._unlock()
            raise
        return self

    def _is_made(self):
        """Whether all arrays are there. Raises UserError when one is there that was made from something
        else.
        """
        return all(
            [is_made(file.path, file.record, self.overwrite) for file in self.files.values()]
        )  # looks at each

    def _take_lock(self):
        """Take the lock of the arrays that are not there yet."""
        to_make = [
            file.path for file in self.files.values() if not is_made(file.path, file.record, self.overwrite)
        ]
        return Lock((to_make or [self.first])[0], to_make, distributed.rank()).take()

    def _prepare(self):
        """Take the lock, and create the files or check those of an interrupted run."""
        if not self.finished:
            scratch = distributed.world_size() * sum(_bytes(*spec) for spec in self.scratch.values())
            require_space(self.arrays, scratch, self.overwrite)
            self._lock = self._take_lock()
            self.finished = self._is_made()
        if self.finished:
            print(
                f"kept {self.first.name}: made from the same inputs with the same flags (--overwrite makes it again)"
            )
            if _temporary(self.arrays, self.tag) or is_locked(self.arrays):
                with contextlib.suppress(UserError):  # another run makes them again
                    self._lock = self._lock or Lock(self.first, self.arrays).take()
                    self._clean()
            self._unlock()
            return
        earlier = [] if self.overwrite else self._progress_files(every_tag=True)
        for path in earlier:
            self._check_progress(path)
        if earlier and all(
            file.partial.is_file() or is_made(file.path, file.record) for file in self.files.values()
        ):
            return
        self._clean(every_tag=self.overwrite)
        try:
            for file in self.files.values():
                if not is_made(file.path, file.record, self.overwrite):  # else it stays as it is
                    file.create()
            self._save()
        except BaseException:
            self._clean()
            raise

    def _check_progress(self, path):
        """Raise UserError when an unfinished run has written into the first array that this one does not
        resume.
        """
        saved = read_progress(path)
        started = self.identity if saved is None else json.loads(str(saved["identity"]))
        differing = [key for key in self.identity if started.get(key) != self.identity[key]]
        if differing == ["data"] and self._same_rows(saved):
            return
        if differing:
            raise UserError(
                f"{path} belongs to a run with other {', '.join(differing)}; repeat that run to finish it, or add "
                "--overwrite to start from scratch"
            )

    def _same_rows(self, saved):
        """Whether the rows that have changed since some progress was saved are all of pieces that are not
        done.
        """
        if not len(self._rows) or np.shape(saved.get("rows")) != self._rows.shape:
            return False
        changed = saved["rows"] != self._rows
        return not any(
            changed[piece].any() for piece, done in zip(self.pieces, saved["done"], strict=True) if done
        )

    def _resume(self):
        """Open the files, and read the progress of all processes."""
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

    def _unlock(self):
        if self._lock is not None:
            self._lock.release()

    def over(self, load=None, part=slice(None), description="images", unit="image"):
        """Yield (piece, item) for this process's share of what is not done; load, description, unit as in
        `walk`.

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
        """Save the progress: first the rows reach the disk, then the record of them, so that a machine may
        die in between.
        """
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
        return [
            self.scratch[name].of_file(self.beside(name, rank)) for rank in range(distributed.world_size())
        ]

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
        while (
            sum(waiting for _, waiting in self._blocks) > QUEUE or self._blocks and self._blocks[0][0].done()
        ):
            self._wait(self._blocks.popleft()[0])

    def _wait(self, future=None):
        """Wait for a task of the writing thread, and raise here what has gone wrong there."""
        if future is not None:
            future.result()
        if self._error is not None:
            raise self._error

    def _save(self):
        began = time.monotonic()
        for file in [
            *self.files.values(),
            *(item for item in self.scratch.values() if isinstance(item, Scratch)),
        ]:
            file.sync()
        content = {
            "identity": json.dumps(self.identity),
            "done": self._done,
            "rows": self._rows,
            **self.state,
        }
        with writing(self.first):
            save_atomic(
                self.beside("progress"),
                lambda file: (np.savez(file, **content), file.flush(), sync_file(file)),
            )
        self._cost = time.monotonic() - began if self.state else 0.0

    def __exit__(self, kind, error, trace):
        if self._turns is not None:
            self._turns.close()  # ends the progress bar's line
        try:
            self._end(failed=kind is not None)
            if kind is None and not self.finished:
                distributed.barrier()
                if distributed.is_rank_zero():
                    self._publish()
                distributed.barrier()
        finally:
            self._unlock()

    def _end(self, failed):
        """Wait for what is queued, save the progress, and close the files."""
        try:
            if not failed and not self.finished:
                self.commit()
        finally:
            self._thread.shutdown()  # what is queued gets done
            failed = failed or self._error is not None
            # a turn that was interrupted may have changed the state, and one that was not written is in it
            if failed and not self.finished and not (self.state and (self._in_turn or self._error)):
                with contextlib.suppress(OSError, UserError):  # a full disk says so a second time
                    self._save()
            self.close_files()
            if failed and distributed.world_size() == 1 and not self._done.any() and not self.finished:
                self._clean()

    def _publish(self):
        """Give the arrays their names. Raises UserError when pieces are missing."""
        saved = [
            progress["done"]
            for path in self._progress_files()
            if (progress := read_progress(path)) is not None
        ]
        if not saved or not np.any(saved, axis=0).all():
            raise UserError(f"{self.first} is not complete; run the same command again")
        for file in self.files.values():
            file.publish()
        self._clean()

    def _progress_files(self, every_tag=False):
        files = _temporary([self.first], None if every_tag else self.tag)
        return [path for path in files if re.search(r"\.progress\.\d+\Z", path.name)]

    def _clean(self, every_tag=False):
        """Remove what is no result; on demand also what other interrupted passes have left for these
        arrays.
        """
        for leftover in _temporary(self.arrays, None if every_tag else self.tag):
            leftover.unlink(missing_ok=True)

    def close_files(self, keep=0):
        """Close open array files, those that were not used for longest first, until `keep` are left."""
        while len(self.open_files) > keep:
            _, file = self.open_files.popitem(last=False)
            with contextlib.suppress(OSError):  # errors of the disk have been raised before
                file.close()


class ArrayFile:
    """An .npy of a `Pass`, written piece by piece. The room for all of it is taken at the start. It never
    holds NaN or infinity.

    path: of the result. record: of the finished array. work: the `Pass`.
    """

    def __init__(self, path, record, work):
        self.path, self.record, self.work = path, record, work
        self.shape, self.dtype = tuple(record["shape"]), np.dtype(record["dtype"])
        self.partial = path.with_name(f"{path.name}.{work.tag}.partial")
        self._start = None  # of the rows in the file; None where none are to be written
        self._unsynced = False

    def create(self):
        """Make the file, with room for the whole array."""
        with writing(self.partial), open(self.partial, "w+b") as file:
            header = {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": self.shape,
            }
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            reserve(file, file.tell() + _bytes(self.shape, self.dtype))

    def open(self):
        """Find out where its rows begin, unless the array is there already."""
        if self.partial.is_file():
            with open(self.partial, "rb") as file:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                self._start = file.tell()

    def __setitem__(self, index, block):
        """file[rows] = block, or file[:, columns] = block: a tensor or array, copied to the host here,
        written by the thread.

        Raises ValueError when the block is of another shape than these rows, or of another kind of numbers.
        """
        if isinstance(block, torch.Tensor):
            block = self._converted(block)
        block = np.asarray(block)
        self._check(index, block)
        block = np.ascontiguousarray(block, self.dtype)
        if (
            self.dtype.kind == "f" and not torch.from_numpy(block).sum(dtype=torch.float32).isfinite()
        ):  # quicker than each alone
            raise UserError(
                f"{self.path} would hold NaN or infinity; look at its inputs, or repeat the command without float16 "
                "(--precision, --store_dtype)"
            )
        if self._start is not None:
            self.work.write(lambda: self._write(index, block), block.nbytes)

    def _converted(self, block):
        """A tensor as an array, converted on its device where it is of the right kind: numpy is slow at half
        precision.
        """
        block = block.detach()
        floats = block.dtype.is_floating_point
        if floats and self.dtype.kind == "f":
            block = block.to(getattr(torch, self.dtype.name))
        elif block.dtype == torch.bfloat16:
            block = block.float()  # numpy has none
        return block.cpu().numpy()

    def _check(self, index, block):
        """Raise ValueError unless a block fits the rows it is to be written to."""
        wanted = np.broadcast_to(np.empty((), self.dtype), self.shape)[index].shape  # takes no memory
        if block.shape != wanted:
            raise ValueError(f"{self.path}[{index}] has the shape {wanted}, and the block {block.shape}")
        if not np.can_cast(block.dtype, self.dtype, "same_kind"):
            raise ValueError(f"{self.path} holds {self.dtype}, and the block {block.dtype}")

    def _write(self, index, block):
        with writing(self.path):
            if isinstance(index, slice):
                self._write_at((index.start or 0) * int(np.prod(self.shape[1:], dtype=np.int64)), block)
            else:
                for i, values in enumerate(block):
                    self._write_at(i * self.shape[1] + index[1].start, values)

    def _write_at(self, entry, values):
        """Write values from a flat index of the array on."""
        rest, file = memoryview(values.reshape(-1)).cast("B"), self._file()
        file.seek(self._start + entry * self.dtype.itemsize)
        self._unsynced = True
        while rest:  # one call writes 2 GB at most
            rest = rest[file.write(rest) :]

    def _file(self):
        """The open file. Others of the pass are closed where too many would be open."""
        files = self.work.open_files
        if self.path not in files:
            self.work.close_files(keep=OPEN - 1)
            files[self.path] = open(self.partial, "r+b", buffering=0)
        files.move_to_end(self.path)
        return files[self.path]

    def sync(self):
        """Wait until the disk has what was written."""
        if self._unsynced:
            with writing(self.path):
                sync_file(self._file())
            self._unsynced = False

    def publish(self):
        """Give the file its name."""
        if self.partial.is_file():
            with writing(self.path):
                publish(self.partial, self.path, self.record)


class Scratch:
    """An array of one process in a file that is mapped into memory. Where the disk cannot be mapped, all of
    it is in memory.
    """

    def __init__(self, path, shape, dtype, resumed):
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        size = _bytes(shape, dtype)
        if not resumed:
            with writing(path), open(path, "w+b") as file:
                reserve(file, size)  # a full disk would end the process by a signal, without a message
        if not path.is_file() or path.stat().st_size != size:  # a map would fill with zeros what is cut off
            raise UserError(
                f"{path} of an interrupted run is missing or cut off; add --overwrite to start from scratch"
            )
        self._map = None
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        if self._map is None:
            self.array = np.fromfile(path, self.dtype).reshape(shape)
        else:
            self.array = np.frombuffer(self._map, self.dtype).reshape(shape)

    def of_file(self, path):
        """The array in the file of another process, to be read."""
        if self._map is None:
            return np.fromfile(path, self.dtype).reshape(self.shape)
        return np.memmap(path, self.dtype, "r", shape=self.shape)

    def release(self):
        """Let go of the pages in memory, which would count as this process's; the file keeps them."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def sync(self):
        """Wait until the disk has what was written."""
        with writing(self.path):
            if self._map is not None:
                self._map.flush()
                return
            with open(self.path, "r+b") as file:
                self.array.tofile(file)
                sync_file(file)


def read_progress(path):
    """Arrays of a progress file; None when it is not there or damaged."""
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:  # numpy raises many
        return {name: file[name] for name in file.files}
    return None


def _as_numbers(digests):
    """The first 16 hex digits of strings as an array of uint64."""
    return np.array([int(digest[:16], 16) for digest in digests], np.uint64)


def _hash(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _bytes(shape, dtype):
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
