"""Write the arrays of a `Pass` in pieces, by a thread: whole or not at all, without NaN or infinity."""

import contextlib
import mmap
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from utils.runtime.errors import UserError
from utils.runtime.files import read_array, reserve, sync_file, writing
from utils.runtime.records import publish

QUEUE = 2**27  # bytes that may wait for the writing thread
WAITING = 8  # times as many rows as a `Scratch` has along its first axis wait to be written
MAPPED = 4096  # rows that are written before their pages are let go of
OPEN = 64  # files that are open at a time; some systems allow 256


def bytes_of(shape, dtype):
    """Return the size of an array in bytes."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


class Writer:
    """A Writer is the one thread that does queued tasks in order. After the first error it does nothing more.

    Attribute: error, the first exception of a task, or None.
    """

    def __init__(self):
        self.error = None
        self._thread = ThreadPoolExecutor(1)
        self._blocks = deque()
        self._files = OrderedDict()  # the latest used last

    def submit(self, task):
        """Queue a task; return its future."""

        def guarded():
            if self.error is None:
                try:
                    task()
                except BaseException as error:
                    self.error = error

        return self._thread.submit(guarded)

    def write(self, task, size):
        """Queue the writing of a block of `size` bytes; wait while more than QUEUE bytes are queued."""
        self._blocks.append((self.submit(task), size))
        while self._blocks and (self._blocks[0][0].done() or self._waiting() > QUEUE):
            future, _ = self._blocks.popleft()
            self.wait(future)

    def _waiting(self):
        return sum(size for _, size in self._blocks)

    def wait(self, future=None):
        """Wait for a task, and raise here what has gone wrong in the thread."""
        if future is not None:
            future.result()
        if self.error is not None:
            raise self.error

    def finish(self):
        """Do what is queued, then end the thread."""
        self._thread.shutdown()

    def file(self, path):
        """Return the file at `path`, open for writing; close others where too many would be open."""
        if path not in self._files:
            self.close_files(keep=OPEN - 1)
            self._files[path] = open(path, "r+b", buffering=0)
        self._files.move_to_end(path)
        return self._files[path]

    def close_files(self, keep=0):
        """Close open files, those that were not used for longest first, until `keep` are left."""
        while len(self._files) > keep:
            _, file = self._files.popitem(last=False)
            with contextlib.suppress(OSError):  # errors of the disk have been raised before
                file.close()


class ArrayFile:
    """An ArrayFile is an .npy that grows piece by piece. Its room on the disk is taken at the start.

    path: of the result.
    record: of the finished array, as `complete` returns it.
    tag: hex digits in the name of the unfinished file.
    writer: the `Writer` that writes the blocks.
    """

    def __init__(self, path, record, tag, writer):
        self.path = path
        self.record = record
        self.writer = writer
        self.shape = tuple(record["shape"])
        self.dtype = np.dtype(record["dtype"])
        self.partial = path.with_name(f"{path.name}.{tag}.partial")
        self._start = None  # of the rows in the file; None where none are to be written
        self._unsynced = False

    def create(self):
        """Make the file, with room for the whole array."""
        with writing(self.partial), open(self.partial, "w+b") as file:
            descr = np.lib.format.dtype_to_descr(self.dtype)
            header = {"descr": descr, "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            reserve(file, file.tell() + bytes_of(self.shape, self.dtype))

    def open(self):
        """Find out where the rows begin, unless the array is there already."""
        if self.partial.is_file():
            with open(self.partial, "rb") as file:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                self._start = file.tell()

    def __setitem__(self, index, block):
        """Write file[rows], file[number, rows] or, of two dimensions, file[:, columns] = block.

        The block is copied to the host here.

        block: a tensor or array. It must not be changed afterwards.

        Raises ValueError when the block has another shape than these rows, or holds another kind of numbers.
        """
        if isinstance(block, torch.Tensor):
            block = self._converted(block)
        block = np.asarray(block)
        self._check(index, block)
        block = np.ascontiguousarray(block, self.dtype)
        # the sum is quicker than a look at each number
        if self.dtype.kind == "f" and not torch.from_numpy(block).sum(dtype=torch.float32).isfinite():
            fix = "look at its inputs, or repeat the command without float16 (--precision, --store_dtype)"
            raise UserError(f"{self.path} would hold NaN or infinity; {fix}")
        if self._start is not None:
            self.writer.write(lambda: self._write(index, block), block.nbytes)

    def _converted(self, block):
        """Return a tensor as an array. It is converted on its device: numpy is slow at half precision and at
        reordering.
        """
        block = block.detach()
        if block.dtype.is_floating_point and self.dtype.kind == "f":
            block = block.to(getattr(torch, self.dtype.name))
        elif block.dtype == torch.bfloat16:
            block = block.float()  # numpy has none
        return block.contiguous().cpu().numpy()

    def _check(self, index, block):
        """Raise ValueError unless a block fits the rows that it is to be written to."""
        whole = np.broadcast_to(np.empty((), self.dtype), self.shape)  # takes no memory
        wanted = whole[index].shape
        if block.shape != wanted:
            raise ValueError(f"{self.path}[{index}] has the shape {wanted}, and the block {block.shape}")
        if not np.can_cast(block.dtype, self.dtype, "same_kind"):
            raise ValueError(f"{self.path} holds {self.dtype}, and the block {block.dtype}")

    def _write(self, index, block):
        with writing(self.path):
            if isinstance(index, slice):
                row = int(np.prod(self.shape[1:], dtype=np.int64))
                if index.step in (None, 1):
                    self._write_at((index.start or 0) * row, block)
                else:
                    for i, values in zip(range(self.shape[0])[index], block, strict=True):
                        self._write_at(i * row, values)
            elif isinstance(index[0], int):
                number, rows = index
                row = int(np.prod(self.shape[2:], dtype=np.int64))
                self._write_at((number * self.shape[1] + rows.start) * row, block)
            else:
                for i, values in enumerate(block):
                    self._write_at(i * self.shape[1] + index[1].start, values)

    def _write_at(self, entry, values):
        """Write values from a flat index of the array on."""
        rest = memoryview(values.reshape(-1)).cast("B")
        file = self.writer.file(self.partial)
        file.seek(self._start + entry * self.dtype.itemsize)
        self._unsynced = True
        while rest:  # one call writes 2 GB at most
            rest = rest[file.write(rest) :]

    def read(self):
        """Return what was written, of all processes after a `Pass.gather`, as a read-only map."""
        return read_array(self.path if self._start is None else self.partial, mmap=True)

    def sync(self):
        """Wait until the disk has what was written."""
        if self._unsynced:
            with writing(self.path):
                sync_file(self.writer.file(self.partial))
            self._unsynced = False

    def publish(self):
        """Give the file its name."""
        if self.partial.is_file():
            with writing(self.path):
                publish(self.partial, self.path, self.record)


class Scratch:
    """A Scratch is one process's array in a file that is mapped into memory, or read where it cannot be.

    path, shape, dtype: of the file and its array.
    resumed: whether the file of an interrupted run is used.

    Attribute: array.

    Raises UserError when the file of an interrupted run is missing or cut off.
    """

    def __init__(self, path, shape, dtype, resumed):
        self.path = path
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._map = None
        self._waiting = []
        size = bytes_of(shape, dtype)
        if not resumed:
            with writing(path), open(path, "w+b") as file:
                reserve(file, size)  # a full disk would end the process by a signal, without a message
        if not path.is_file() or path.stat().st_size != size:  # a map would fill with zeros what is cut off
            fix = "add --overwrite to start from scratch"
            raise UserError(f"{path} of an interrupted run is missing or cut off; {fix}")
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        if self._map is None:
            self.array = np.fromfile(path, self.dtype).reshape(shape)
        else:
            self.array = np.frombuffer(self._map, self.dtype).reshape(shape)

    def of_file(self, path):
        """Return the array in the file of another process, to be read."""
        if self._map is None:
            return np.fromfile(path, self.dtype).reshape(self.shape)
        return np.memmap(path, self.dtype, "r", shape=self.shape)

    def put(self, places, rows):
        """Write array.reshape(-1, K)[places] = rows, now or by `flush`, then let go of the pages.

        places: int64 [m], of the array without its last axis K. rows: [m, K].
        """
        self._waiting.append((places, rows))
        if sum(len(rows) for _, rows in self._waiting) > WAITING * self.shape[0]:
            self._write_waiting()

    def flush(self):
        """Write what waits, for those that read the file."""
        self._write_waiting()
        if self._map is None:
            with writing(self.path), open(self.path, "r+b") as file:
                self.array.tofile(file)

    def _write_waiting(self):
        """Write what waits in the order of the file, which touches a page once for many rows."""
        if self._waiting:
            places, rows = (np.concatenate(part[::-1]) for part in zip(*self._waiting, strict=True))
            self._waiting = []
            places, latest = np.unique(places, return_index=True)
            array = torch.from_numpy(self.array.reshape(-1, self.shape[-1]))  # torch has several threads
            for part in np.array_split(np.arange(len(places)), len(places) // MAPPED + 1):
                array[torch.from_numpy(places[part])] = torch.from_numpy(rows[latest[part]])
                self.release()

    def release(self):
        """Let go of the pages in memory, which would count as this process's; the file keeps them."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def sync(self):
        """Wait until the disk has what was written."""
        self.flush()
        with writing(self.path):
            if self._map is not None:
                self._map.flush()
                return
            with open(self.path, "r+b") as file:
                sync_file(file)
