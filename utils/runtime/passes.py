"""Go over images or neurons in a long pass: shared by processes, resumed when interrupted, whole files only.

    with Pass({path: ((len(images), vit.D), "float32")}, record, Split(images)) as work:
        for rows, pixels in work:
            work[path][rows] = vit(pixels)

A piece (a batch of images, a block of neurons) is done when its turn of the loop has ended and its rows are
written. Arrays grow as X.npy.TAG.partial. TAG stands for everything that the pass is made from. Beside the
first array lies X.npy.TAG.progress.RANK: the pieces that this process has done, and its `work.state`. When
all pieces are done, the arrays get their names and records. An array that is there with an equal record is
kept. A pass whose arrays are all there has nothing left to do. While a pass runs, X.npy.lock keeps others
from making the same arrays.
"""

import contextlib
import hashlib
import itertools
import json
import re
import shutil
import time
from copy import copy
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.runtime import distributed
from utils.runtime.arrays import ArrayFile, Scratch, Writer, bytes_of
from utils.runtime.errors import UserError
from utils.runtime.files import save_atomic, sync_file, writing
from utils.runtime.locks import Lock, is_locked
from utils.runtime.records import NOTES, complete, is_made

TOLD = 1e7  # bytes from which on a pass says what it will write
COMMIT_SECONDS = 5  # at least, between two times that progress is saved
COMMIT_SHARE = 0.01  # of the time, at most, that saving the state may take
# the name of a file beside an array
TEMPORARY = re.compile(r"(?P<array>.+)\.(?P<tag>[0-9a-f]{12})\.(?P<rest>.+)", re.DOTALL)


class Pieces(list):
    """Pieces are the slices of rows that a pass goes over. A slice may have a step.

    digests: 16 hex digits for each row, of everything it is made from; None where that is not known. An
        interrupted pass is resumed although rows have changed since, if none of them is in a finished piece.
    load: a function from a list of pieces to an iterator with one item for each; None for no items.
    title, unit: of the progress bar.
    rounds: how often a pass goes over them. The attribute is the list of the rounds, each a list of slices,
        which may be others than these.
    settings: {name: value}, such as the batch size; an interrupted pass with other settings is not resumed.
    """

    def __init__(self, slices, digests=None, load=None, title="images", unit="image", rounds=1, **settings):
        super().__init__(slices)
        self.rounds = [slices] * rounds
        self.digests = digests
        self.load = load
        self.title = title
        self.unit = unit
        self.settings = settings


class Totals(dict):
    """Totals are a state of a `Pass`, {name: (shape, dtype)}, that the loop only adds to.

    Processes that resume the pass take over what others have added up.
    """


def pieces_of(rows, size, **options):
    """Divide rows into `Pieces` of `size` rows.

    rows: how many there are, or a data set, whose `digests` then say what each row is made from.
    options: as for `Pieces`.
    """
    count = rows if isinstance(rows, int) else len(rows)
    slices = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return Pieces(slices, getattr(rows, "digests", None), **options)


def size_of(piece):
    """Return the number of rows of a slice."""
    return len(range(piece.start, piece.stop, piece.step or 1))


def without_images(pieces):
    """Return the `Pieces` of images for a `Pass` that goes over what is stored of them."""
    found = copy(pieces)
    found.load, found.title = iter, "stored images"
    return found


def walk(pieces, load=None, title="images", unit="image"):
    """Yield (piece, item), with a progress bar of rows. Parameters: as in `Pieces`."""
    if not pieces:  # no processes that read images
        return
    items = load(pieces) if load else [None] * len(pieces)
    count = sum(map(size_of, pieces))
    with tqdm(total=count, desc=title, unit=unit, disable=not distributed.is_rank_zero()) as bar:
        for piece, item in zip(pieces, items, strict=True):
            yield piece, item
            bar.update(size_of(piece))


def _temporary(arrays, tag=None):
    """List the files that passes have left beside some arrays of one folder: those of one tag, or of all."""
    names = {path.name for path in arrays}
    found = []
    for file in next(iter(arrays)).parent.iterdir():
        parts = TEMPORARY.fullmatch(file.name)
        if parts and parts["array"] in names and tag in (None, parts["tag"]):
            found.append(file)
    return sorted(found)


def _taken(file):
    """Return the bytes that a file takes on the disk; 0 where another run has just given it its name."""
    try:
        return file.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def require_space(arrays, scratch=0, overwrite=False):
    """Print how much will be written, if it is much. Raise UserError when the disk is too small for it.

    arrays: {path: (shape, dtype)} in one folder. Finished ones need no room, unless they are overwritten.
    scratch: bytes of other files.
    """
    folder = next(iter(arrays)).parent
    needed = scratch + sum(
        bytes_of(*spec) for path, spec in arrays.items() if overwrite or not path.is_file()
    )
    started = sum(_taken(file) for file in _temporary(arrays) if file.name.endswith(".partial"))
    total, _, free = shutil.disk_usage(folder)
    if needed - started > free and total > 0:  # some network disks do not know their size
        has = f"{folder} has {free / 1e9:.2f} GB free and this run writes {needed / 1e9:.2f} GB"
        less = "--store_dtype float16, fewer layers, a larger --subsample"
        raise UserError(f"{has}; make room, choose another --output_dir, or write less ({less})")
    if needed >= TOLD:
        print(f"{needed / 1e9:.2f} GB go to {folder}, which has {free / 1e9:.0f} GB free", flush=True)


class Pass:
    """A Pass is a loop over pieces that can be interrupted.

    `for rows, pixels in work` goes over pieces and their items, `for n in work` over pieces without items.
    work[path][rows] = block and work[path][:, columns] = block write them. A thread does it while the loop
    goes on, so a block must not be changed afterwards.

    Parameters
    arrays: {path: (shape, dtype)} of the results, in one folder. `Arrays` may have settings, as `Pieces` do.
    record: {key: value}, everything the arrays are made from. It becomes their record.
    over: `Pieces`, or a data set with `pieces`, such as a `Split`. Of several rounds, `work.round(i)` is one.
    alone: {path: {key: value}}, for arrays that are made from something more.
    state: {name: (shape, dtype)} of arrays, zero at first, that the loop changes in place (`work.state`).
        They are saved with the progress. Each process has its own, so as many processes must resume the pass.
        Of `Totals` any number may resume it.
    scratch: {name: (shape, dtype)} of such arrays that are too large for memory (`work.scratch`).
    overwrite: discard finished results and earlier progress.

    Attribute: finished, whether the results are there already.

    Raises UserError when results made from something else are there, when an unfinished pass with other
    settings has written into the first array, and when the disk is too small.
    """

    def __init__(self, arrays, record, over, alone=(), state=(), scratch=(), overwrite=False):
        self.arrays = {Path(path): spec for path, spec in arrays.items()}
        self.first = next(iter(self.arrays))
        self.pieces = getattr(over, "pieces", over)
        self._every = [piece for each in self.pieces.rounds for piece in each]
        self.overwrite = overwrite
        self.state = {name: np.zeros(*spec) for name, spec in dict(state).items()}
        self.adds_up = not state or isinstance(state, Totals)
        self.scratch = dict(scratch)
        self.finished = False
        alone = {str(path): made_of for path, made_of in dict(alone).items()}
        settings = {**getattr(arrays, "settings", {}), **self.pieces.settings}
        self._rows = _as_numbers(self.pieces.digests or [])
        self.identity = self._identity(record, settings, alone)
        by_rows = ("data",) if len(self._rows) else ()  # compared row by row
        self.tag = _hash({key: value for key, value in self.identity.items() if key not in by_rows})
        self.writer = Writer()
        self.files = {}
        for path, spec in self.arrays.items():
            own = complete(record | alone.get(str(path), {}), *spec)
            self.files[path] = ArrayFile(path, own, self.tag, self.writer)
        self._done = np.zeros(len(self._every), bool)  # by this process
        self._elsewhere = self._done.copy()  # by an earlier run or another process
        self._lock = self._turns = self._saving = None
        self._saved = time.monotonic()
        self._cost = 0.0  # seconds that saving took
        self._in_turn = False

    def _identity(self, record, settings, alone):
        """Return everything that an interrupted pass must agree with to be resumed, as json."""
        found = {key: value for key, value in complete(record).items() if key not in NOTES} | settings
        found["arrays"] = {
            path.name: [list(shape), str(dtype)] for path, (shape, dtype) in self.arrays.items()
        }
        if alone:
            found["inputs"] = {Path(path).name: made_of for path, made_of in alone.items()}
        found["division into pieces"] = _hash([_bounds(piece) for piece in self._every])
        if not self.adds_up:
            found["number of processes"] = distributed.world_size()
            found["state"] = {name: values.shape for name, values in self.state.items()}  # of this version
        return json.loads(json.dumps(found))

    def __getitem__(self, path):
        return self.files[Path(path)]

    def beside(self, name, rank=None):
        """Return the path of a file of one process, such as its progress."""
        rank = distributed.rank() if rank is None else rank
        return self.first.with_name(f"{self.first.name}.{self.tag}.{name}.{rank}")

    def prepare(self, function, *arguments):
        """Return function(*arguments), such as folded weights; an empty list where nothing is left to do."""
        return [] if self.finished else function(*arguments)

    # the beginning

    def __enter__(self):
        self.finished = self._is_made()
        distributed.barrier()  # every process has looked before one of them changes anything
        try:
            if distributed.is_rank_zero():
                self._set_up()
            distributed.barrier()
            self.finished = self.finished or self._is_made()  # by another run, meanwhile
            if not self.finished:
                self._lock = self._lock or self._take_lock()
                self._resume()
        except BaseException:
            self.writer.finish()
            self._unlock()
            raise
        return self

    def _to_make(self):
        """List the files that are not there. Raise UserError when one is there, made from something else."""
        return [file for file in self.files.values() if not is_made(file.path, file.record, self.overwrite)]

    def _is_made(self):
        return not self._to_make()

    def _take_lock(self):
        """Take the lock of the arrays that are not there yet."""
        paths = [file.path for file in self._to_make()] or [self.first]
        return Lock(paths[0], paths, distributed.rank()).take()

    def _unlock(self):
        if self._lock is not None:
            self._lock.release()

    def _set_up(self):
        """Take the lock, and create the files or check those of an interrupted run."""
        if not self.finished:
            scratch = distributed.world_size() * sum(bytes_of(*spec) for spec in self.scratch.values())
            require_space(self.arrays, scratch, self.overwrite)
            self._lock = self._take_lock()
            self.finished = self._is_made()
        if self.finished:
            self._keep()
        elif not self._may_resume():
            self._create()

    def _keep(self):
        """Say that all is there, and remove leftovers of a run that ended while files got their names."""
        how = "made from the same inputs with the same flags (--overwrite makes it again)"
        print(f"kept {self.first.name}: {how}")
        if _temporary(self.arrays, self.tag) or is_locked(self.arrays):
            with contextlib.suppress(UserError):  # another run makes them again
                self._lock = self._lock or Lock(self.first, self.arrays).take()
                self._clean()
        self._unlock()

    def _may_resume(self):
        """Return whether an interrupted run can be resumed. Raise UserError when it was another one."""
        earlier = [] if self.overwrite else self._progress_files(every_tag=True)
        for path in earlier:
            self._check_progress(path)
        to_make = [file for file in self.files.values() if not file.partial.is_file()]
        return bool(earlier) and all(is_made(file.path, file.record) for file in to_make)

    def _create(self):
        """Make the files that are not there."""
        self._clean(every_tag=self.overwrite)
        try:
            for file in self._to_make():
                file.create()
            self._save()
        except BaseException:
            self._clean()
            raise

    def _check_progress(self, path):
        """Raise UserError when an unfinished run of something else has written into the first array."""
        saved = read_progress(path)
        started = self.identity if saved is None else json.loads(str(saved["identity"]))
        keys = dict.fromkeys([*self.identity, *started])  # an earlier version may have had others
        differing = [key for key in keys if started.get(key) != self.identity.get(key)]
        if differing == ["data"] and self._same_rows(saved):
            return
        if differing:
            fix = "repeat that run to finish it, or add --overwrite to start from scratch"
            raise UserError(f"{path} belongs to a run with other {', '.join(differing)}; {fix}")

    def _same_rows(self, saved):
        """Return whether all rows that changed since some progress was saved are of pieces not done."""
        if not len(self._rows) or np.shape(saved.get("rows")) != self._rows.shape:
            return False
        changed = saved["rows"] != self._rows
        return not any(changed[piece].any() for piece in itertools.compress(self._every, saved["done"]))

    def _resume(self):
        """Open the files, and read the progress of all processes."""
        for file in self.files.values():
            file.open()
        for path, saved in self._progress():
            self._elsewhere |= saved["done"]
            rank = int(path.name.rpartition(".")[2])
            if rank == distributed.rank() or (
                self.adds_up and rank % distributed.world_size() == distributed.rank()
            ):
                self._done |= saved["done"]
                for name, values in self.state.items():
                    self.state[name] = values + saved[name]
        for name, (shape, dtype) in self.scratch.items():
            self.scratch[name] = Scratch(self.beside(name), shape, dtype, resumed=self._done.any())
        distributed.barrier()  # every process has read the progress before one of them saves more

    # the loop

    def __iter__(self):
        return self.round(0)

    def round(self, number, title=None):
        """Go over this process's share of the pieces that are not done in one round.

        number: of the round. title: of the progress bar; None for that of the pieces.
        """
        todo = self._todo(number)
        pieces = [self._every[i] for i in todo]
        load = self.pieces.load
        self._turns = walk(pieces, load, title or self.pieces.title, self.pieces.unit)
        for i, (piece, item) in zip(todo, self._turns, strict=True):
            self._in_turn = True
            yield piece if load is None else (piece, item)
            self._in_turn = False
            self._end_turn(i)

    def _todo(self, number):
        """List the numbers of this process's pieces of a round that are not done."""
        numbers = self._numbers(number)
        done = self._done | self._elsewhere | self.finished
        if not self.adds_up:  # a process resumes its own pieces, which its state goes with
            return [i for i in distributed.shard(numbers) if not done[i]]
        return distributed.shard([i for i in numbers if not done[i]])

    def _numbers(self, number):
        """Return the numbers of the pieces of a round."""
        start = sum(map(len, self.pieces.rounds[:number]))
        return range(start, start + len(self.pieces.rounds[number]))

    def skip(self, number):
        """Count a round as done, by all processes."""
        self._done[self._numbers(number)] = True

    def _end_turn(self, i):
        """Count a piece as done, after what its turn has queued; save the progress now and then."""
        self.writer.submit(lambda: self._done.__setitem__(i, True))
        self.writer.wait()
        saving = self._saving is not None and not self._saving.done()
        if not saving and time.monotonic() - self._saved > max(COMMIT_SECONDS, self._cost / COMMIT_SHARE):
            self.commit(wait=bool(self.state))  # the loop would change it meanwhile

    def commit(self, wait=True):
        """Save the progress. First the rows reach the disk, so that the machine may die in between."""
        self._saved = time.monotonic()
        self._saving = self.writer.submit(self._save)
        if wait:
            self.writer.wait(self._saving)

    def _save(self):
        began = time.monotonic()
        for file in [*self.files.values(), *self._scratch()]:
            file.sync()
        content = {
            "identity": json.dumps(self.identity),
            "done": self._done,
            "rows": self._rows,
            **self.state,
        }

        def write(file):
            np.savez(file, **content)
            file.flush()
            sync_file(file)

        with writing(self.first):
            save_atomic(self.beside("progress"), write)
        self._cost = time.monotonic() - began if self.state else 0.0

    def gather(self, names):
        """Return arrays of the state of all processes, {name: list by rank}, once every process is here.

        Files and scratch can be read then. The arrays may be the state itself.
        """
        if distributed.world_size() == 1:
            self.writer.wait(self.writer.submit(self._flush))
            return {name: [self.state[name]] for name in names}
        self.commit()
        distributed.barrier()
        gathered = {name: [] for name in names}
        for rank in range(distributed.world_size()):
            with np.load(self.beside("progress", rank), allow_pickle=False) as file:
                for name in names:
                    gathered[name].append(file[name])
        distributed.barrier()
        return gathered

    def _scratch(self):
        """List the scratch arrays that are open."""
        return [item for item in self.scratch.values() if isinstance(item, Scratch)]

    def _flush(self):
        for scratch in self._scratch():
            scratch.flush()

    def gather_scratch(self, name):
        """Return a scratch array of all processes, read-only maps by rank. Call it after `gather`."""
        return [
            self.scratch[name].of_file(self.beside(name, rank)) for rank in range(distributed.world_size())
        ]

    # the end

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
            self.writer.finish()
            failed = failed or self.writer.error is not None
            # After an interrupted turn the state is half updated; after a failed write it counts rows that
            # are not on disk. Keep the last saved progress.
            spoilt = self.state and (self._in_turn or self.writer.error)
            if failed and not self.finished and not spoilt:
                with contextlib.suppress(OSError, UserError):  # a full disk says so a second time
                    self._save()
            self.writer.close_files()
            if failed and distributed.world_size() == 1 and not self._done.any() and not self.finished:
                self._clean()

    def _publish(self):
        """Give the arrays their names. Raise UserError when pieces are missing."""
        progress = [read_progress(path) for path in self._progress_files()]
        saved = [found["done"] for found in progress if found is not None]
        if not saved or not np.any(saved, axis=0).all():
            raise UserError(f"{self.first} is not complete; run the same command again")
        for file in self.files.values():
            file.publish()
        self._clean()

    def _progress(self):
        """List the progress of all processes, (path, arrays), by rank.

        One whose pieces are all in that of others before is left out: these have taken it over.
        """
        found = []
        done = np.zeros_like(self._done)
        for path in sorted(self._progress_files(), key=lambda path: int(path.name.rpartition(".")[2])):
            saved = read_progress(path)
            if saved is not None and (saved["done"] & ~done).any():
                done |= saved["done"]
                found.append((path, saved))
        return found

    def _progress_files(self, every_tag=False):
        files = _temporary([self.first], None if every_tag else self.tag)
        return [path for path in files if re.search(r"\.progress\.\d+\Z", path.name)]

    def _clean(self, every_tag=False):
        """Remove what is no result; on demand also the leftovers of other passes for these arrays."""
        for leftover in _temporary(self.arrays, None if every_tag else self.tag):
            leftover.unlink(missing_ok=True)


def read_progress(path):
    """Read the arrays of a progress file; None when it is not there or damaged."""
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:  # numpy raises many
        return {name: file[name] for name in file.files}
    return None


def _bounds(piece):
    return [piece.start, piece.stop] + ([] if piece.step is None else [piece.step])


def _as_numbers(digests):
    """Return the first 16 hex digits of strings as an array of uint64."""
    return np.array([int(digest[:16], 16) for digest in digests], np.uint64)


def _hash(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
