"""Let one run at a time make a set of files: a lock that dies with its process.

    with Lock(path, files):
        ...

Beside `path` lies PATH.lock, which says which process of which machine works on which files, and since when.
The operating system locks the file as well, and gives that up when the process ends, however it ends: a lock
that was left by a killed process, or before a restart, is taken over. Where the file is of another machine,
whose processes cannot be seen from here, the message says how to go on.
"""

import contextlib
import errno
import json
import os
import re
import socket
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: every lock that is there counts, until a person removes it
    fcntl = None

from utils.runtime import distributed
from utils.runtime.errors import UserError

HELD = (errno.EAGAIN, errno.EACCES)  # what the system answers where another process holds a lock
TRIES = 20  # a lock that is being taken, or looked at, is free again in a moment
PAUSE = 0.05  # seconds between them
_ours = set()  # the locks of this process: the system gives one up when any open file of it is closed


class Lock:
    """A Lock is the right to make some files.

    path: the file, or the first of the files, that names the lock.
    files: all files that it covers, in the folder of `path`; default: `path` alone. Another lock of the
        folder that covers one of them counts as well.
    rank: which of torchrun's processes takes it; for the others nothing happens. Rank 0 takes it for all. The
        locks of other ranks, taken after it, say whether one of them still runs when rank 0 has died.

    Raises UserError, on entering, when another process has it.
    """

    def __init__(self, path, files=None, rank=0):
        self.target = Path(path).absolute()
        self.rank = rank
        self.path = _lock_of(self.target, rank)
        self.files = sorted({Path(file).name for file in files or [path]})
        self.run = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
        self._file = None

    def __enter__(self):
        return self.take()

    def __exit__(self, *_):
        self.release()

    def take(self):
        """Take the lock, until `release`. Nothing happens if this process has it."""
        if distributed.rank() != self.rank or self.path in _ours:
            return self
        if self.rank:
            self.run = _read(_lock_of(self.target)).get("run", self.run)
        for turn in range(TRIES):
            reason = self._take(patient=turn < TRIES / 2) or self._overlap()
            if reason is None:
                return self
            self.release()
            time.sleep(PAUSE)
        raise UserError(reason)

    def release(self):
        """Remove the lock, if this process has it."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a disk that has turned read-only
                self.path.unlink()
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
            _ours.discard(self.path)

    def _take(self, patient):
        """Take the lock file. Return None, or the message that says why it cannot be taken.

        patient: whether an empty file may still be filled in by its owner.
        """
        ours = True
        file = None
        try:
            file = open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "r+b", buffering=0)
        except FileExistsError:
            ours = False
        except OSError as error:
            raise self._cannot(error) from error
        try:
            file = file or open(self.path, "r+b", buffering=0)
            reason = self._reason(file, ours, patient)
            if reason is None:
                self._fill(file)
                self._file = file
                _ours.add(self.path)
            return reason
        except FileNotFoundError:
            if self.path.is_symlink():
                what = f"{self.path} is a link to nothing"
                raise UserError(f"{what}; remove it, and run the same command again") from None
            return _message(self.path, {}, known=True)  # it has just been released
        except IsADirectoryError:
            raise UserError(f"{self.path} is a folder; remove it, and run the same command again") from None
        except PermissionError:
            return _message(self.path, _read(self.path), known=False)
        finally:
            if file is not None and self._file is not file:
                file.close()

    def _reason(self, file, ours, patient):
        """Return the message that says why an opened lock file cannot be taken; None if it can."""
        held = _held(file)
        content = _parsed(file.read())
        if held:
            return _message(self.path, content, known=True)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
            # it was released, and taken by another, since it was opened
            return _message(self.path, content, known=True)
        if ours or _is_over(content, held):
            return None
        if not content and not patient:  # its owner had no time to fill it in
            return None
        return _message(self.path, content, known=False)

    def _fill(self, file):
        """Write into the file who has the lock."""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        script = Path(sys.argv[0]).name or "python"
        content = {**_here(), "since": since, "script": script, "run": self.run, "files": self.files}
        try:
            file.seek(0)
            file.truncate()
            file.write(json.dumps(content).encode())
        except OSError as error:  # a full disk
            self.path.unlink(missing_ok=True)
            raise self._cannot(error) from error

    def _cannot(self, error):
        fix = "what is finished is kept: fix this, then run the same command again"
        return UserError(f"{self.target} cannot be written ({error.strerror}); {fix}")

    def _overlap(self):
        """Return the message about another lock of the folder that covers one of our files, or None."""
        for path in sorted(self.path.parent.glob("*.lock")):
            if path in _ours:  # to open it once more would give it up
                continue
            content = _read(path)
            if set(content.get("files", ())).isdisjoint(self.files) or content.get("run") == self.run:
                continue
            try:
                with open(path, "r+b", buffering=0) as file:
                    held = _held(file)
                    if not held and _is_over(content, held):
                        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                            path.unlink()
                        continue
            except FileNotFoundError:
                continue
            except PermissionError:
                held = None
            return _message(path, content, known=bool(held))
        return None


def _lock_of(path, rank=0):
    return path.with_name(f"{path.name}.{rank}.lock" if rank else f"{path.name}.lock")


def _target_of(lock):
    """Return the file that names a lock."""
    return re.sub(r"(\.\d+)?\.lock$", "", str(lock))


def is_locked(paths):
    """Return whether one of some files of one folder has a lock, even of a process that has ended."""
    names = {Path(path).name for path in paths}
    folder = Path(next(iter(paths))).parent
    return any(Path(_target_of(lock)).name in names for lock in folder.glob("*.lock"))


def open_alone(path):
    """Open an empty file for writing and reading. Wait while another process writes it."""
    while True:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        with contextlib.suppress(OSError):  # a disk without locks
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):  # the other has given it its name
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate()
                return file
        file.close()


def _here():
    """Return which process this is, on which machine, since which start of the machine."""
    boot = _first_line("/proc/sys/kernel/random/boot_id")  # of containers, whose names change, the machine's
    machine = f"{socket.gethostname()} {_first_line('/etc/machine-id')}".strip()
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")  # numbers of processes are those of a container
    process = os.getpid()
    started = _started(process)
    return {"machine": machine, "boot": boot, "namespace": namespace, "process": process, "started": started}


def _first_line(path):
    """Return the first line of a file; "" where there is none."""
    with contextlib.suppress(OSError, UnicodeDecodeError, IndexError):
        return Path(path).read_text().splitlines()[0]
    return ""


def _started(process):
    """Return when a process started, which tells it from a later one of its number.

    "" if that is unknown, None if there is no such process.
    """
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except (OSError, OverflowError):
        pass
    return ""


def _held(file):
    """Return whether another process holds the system's lock of a file; if none does, it becomes ours.

    None if the system cannot say.
    """
    if fcntl is None:
        return None
    try:
        # not flock: processes that load images would inherit it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in HELD else None
    return False


def _is_over(content, held):
    """Return whether the process that wrote a lock is known to have ended. held: as `_held` returns it."""
    here = _here()
    same_boot = here["boot"] != "" and content.get("boot") == here["boot"]
    if not same_boot and content.get("machine") != here["machine"]:
        return False
    if held is False:
        return True
    if here["boot"] and not same_boot:
        return True  # the machine was restarted
    if fcntl is None or content.get("namespace") != here["namespace"]:
        return False
    return _started(content.get("process")) != content.get("started")


def _parsed(text):
    """Return the content of a lock; {} for anything else."""
    try:
        content = json.loads(text)
        files = content["files"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}
    return content if isinstance(files, list) and all(isinstance(file, str) for file in files) else {}


def _read(path):
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return {}


def _message(path, content, known):
    """Return the line for the user. known: whether the system says that the process is running."""
    who = "another process"
    if content:
        machine = str(content.get("machine")).partition(" ")[0]
        which = f"(process {content.get('process')} on {machine})"
        who = f"{content.get('script')} {which} since {content.get('since')}"
    end = "wait until it has ended, or end it, then run the same command again"
    if not known:
        end = f"wait until it has ended, or if it is not running any more, remove {path} "
        end += "and run the same command again"
    return f"{_target_of(path)} is being made by {who}; {end}"
