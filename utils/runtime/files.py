"""Write files that appear whole or not at all, and read files of others."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from utils.runtime.errors import UserError
from utils.runtime.locks import Lock, open_alone

ZEROS = 2**23  # bytes of zeros that are written at a time
# answers of a disk that cannot do what is asked of it
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
ADVICE = {  # about errors of the system that are none of the disk
    errno.EMFILE: "let this shell open more of them: ulimit -n 4096; then run the same command again",
    errno.ENAMETOOLONG: "rename the files of --model, --pretrained or the texts, "
    "or take fewer layers at a time",
}
ROOT = Path(__file__).resolve().parent.parent.parent  # where the scripts and text_descriptions are


@contextlib.contextmanager
def writing(path):
    """Turn an OSError while writing `path` into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        fix = ADVICE.get(error.errno, "fix this, then run the same command again")
        what = f"{path} cannot be written ({error.strerror})"
        raise UserError(f"{what}; what is finished is kept: {fix}") from error


def save_atomic(path, write, rename=os.replace):
    """Call write(file) on a temporary file beside `path`, then move it there in one step.

    rename: a function (from, to) that moves it.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open_alone(partial) as file:
        try:
            write(file)
            file.flush()
            rename(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def reserve(file, size):
    """Make a file that is open for reading and writing `size` bytes long, and take room on the disk for it.

    Rows in holes are eight times slower, and a full disk would end a process that maps them.
    """
    file.flush()
    start = file.seek(0, os.SEEK_END)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
    zeros = memoryview(bytes(ZEROS))
    for place in range(start, size, ZEROS):
        file.write(zeros[: size - place])
    file.flush()


def sync_file(file):
    """Wait until the disk has what was written to an open file, where it can say so."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in UNSUPPORTED:  # pipes, devices and some network disks cannot
            raise


def save_json(path, content):
    """Write a json file in one step."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    save_atomic(path, lambda file: file.write(text.encode()))


def save_table(path, table):
    """Write a table {row: {column: number}} as .csv."""
    lines = [["layer", *next(iter(table.values()))]]
    lines += [[name, *row.values()] for name, row in table.items()]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    save_atomic(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def whole_folder(path):
    """Yield a folder that appears as `path`, in place of an earlier one, once all its files are written.

    For None it yields None.
    """
    if path is None:
        yield None
        return
    partial = path.with_name(path.name + ".partial")
    with Lock(path):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            shutil.rmtree(path, ignore_errors=True)
            os.replace(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def read_json(path, what, fix):
    """Read a json file.

    what: what it is, such as a flag.
    fix: the end of the message about a damaged file.

    Raises FileNotFoundError when it is not there and UserError when it is damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{what} {path} is damaged ({one_line(error)[:100]}); {fix}".strip()) from error


def read_array(path, mmap=False):
    """Read the array of an .npy file.

    mmap: return a read-only memory map of it. Where the disk cannot be mapped, the array is read.

    Raises ValueError for anything else, whatever numpy raises.
    """
    try:
        if mmap:
            with contextlib.suppress(OSError):
                # private: some network disks map nothing else
                array = np.load(path, mmap_mode="c", allow_pickle=False)
                array.flags.writeable = False
                return array
        return np.load(path, allow_pickle=False)
    except Exception as error:  # a damaged header is parsed as Python, which has errors of its own
        raise ValueError(one_line(error)[:200]) from error


def one_line(error):
    """Return the message of an exception on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def digest(*items):
    """Return twelve hex digits of the content of tensors, arrays and digests (strings of hex digits).

    A resumed run compares them with those of its inputs.
    """
    content = hashlib.sha256()
    for item in items:
        if isinstance(item, str):
            content.update(bytes.fromhex(item))
        else:
            array = item.cpu().numpy() if hasattr(item, "cpu") else item
            content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()[:12]


def sampled_digest(array, samples=4096):
    """Return twelve hex digits of the shape and `samples` even entries of an array too large to read."""
    flat = array.ravel(order="K")  # a view, whatever the order in memory
    return digest(np.array(array.shape), np.array(flat[:: max(1, flat.size // samples)]))
