"""Find the pictures in a tree of folders: each one once, and nothing that systems leave behind."""

import contextlib
import functools
import os
from collections import deque
from pathlib import Path

from PIL import Image

from utils.runtime.errors import UserError

# Names that systems and storage boxes leave in folders; hidden ones (.DS_Store, ._x.jpg) are not listed
RUBBISH = {
    *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
    *("thevolumesettingsfolder", "thefindbycontentfolder"),
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini"),  # Windows
    *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000", "dfsrprivate"),
    "_gsdata_",  # GoodSync
    *("@eadir", "@tmp", "@appstore", "#recycle", "#snapshot"),  # Synology
    *("@recycle", "@recently-snapshot", "~snapshot"),  # QNAP, NetApp
    *("lost+found", "__pycache__", "cvs"),
}
STREAMS = (":zone.identifier", ":encryptable", "@synoeastream", "@synoresource")  # of a file, copied as files

# Formats that Pillow does not decode by itself: it needs Ghostscript (EPS), Windows (WMF) or other libraries,
# so that results would differ between machines. Of a film (MPEG) it reads the size alone.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# Kinds of what is left out, beside the endings of files
NO_ENDING = "without ending"
BROKEN = "broken link"
AGAIN = "link to a folder that is there already"
BESIDE = "picture beside the class folders"


@functools.cache
def endings():
    """Return the endings of the files that the installed Pillow decodes by itself, in small letters."""
    Image.preinit()  # first, as in `Image.open`: formats are tried in the order in which they are loaded
    known = Image.registered_extensions()
    formats = {*Image.OPEN, "MPO"} - NOT_DECODED  # JPEG's reader opens MPO
    return frozenset(ending for ending, name in known.items() if name in formats)


def is_picture(name):
    """Tell whether a file of this name is a picture, by its ending."""
    return os.path.splitext(name)[1].lower() in endings()


def is_rubbish(name):
    """Tell whether a file or folder of this name is hidden or left behind by a system."""
    name = name.lower()
    return name.startswith(".") or name in RUBBISH or name.endswith(STREAMS)


@contextlib.contextmanager
def reading(folder):
    """Turn an OSError while reading `folder` into a UserError that names it."""
    try:
        yield
    except OSError as error:
        what = f"the folder {folder} cannot be read ({error.strerror})"
        raise UserError(f"{what}; make it readable, or remove it") from error


def entries(folder):
    """List the entries of a folder by name, without rubbish. Raises UserError where it cannot be read."""
    with reading(folder), os.scandir(folder) as there:
        os.stat(os.path.join(folder, "."))  # needs the permission to search the folder, not only to list it
        kept = [entry for entry in there if not is_rubbish(entry.name)]
    return sorted(kept, key=lambda entry: entry.name)


def is_folder(entry):
    """Tell whether an entry is a folder or a link to one."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def find_pictures(root, folders, left_out):
    """List the pictures in and below each of some folders of `root`, sorted by folder and then by name.

    A folder counts once, where it lies: links to folders are followed last. One that leads up adds nothing.

    root: the folder that holds the others, or is the only one.
    folders: paths of the folders.
    left_out: Counter of the files and links that are left out, by kind; it is added to.

    Raises UserError for a folder that cannot be read, a broken link to a picture, and two equal folders.
    """
    places = _places(root, folders)
    pictures = {folder: [] for folder in folders}
    queue = deque((folder, folder) for folder in folders)
    links = deque()
    while queue or links:
        folder, place = (queue or links).popleft()
        if places.setdefault(_identity(place), place) != place:
            left_out[AGAIN] += 1
            continue
        for entry in entries(place):
            if not is_folder(entry):
                pictures[folder] += _pictures(entry, left_out)
            elif not entry.is_symlink():
                queue.append((folder, entry.path))
            elif _leads_up(entry.path, root):
                left_out[AGAIN] += 1
            else:
                links.append((folder, entry.path))
    return [sorted(paths, key=os.path.split) for paths in pictures.values()]


def tell(left_out):
    """Print one line about what is left out, if there is anything."""
    files = [(kind, count) for kind, count in left_out.most_common() if kind not in (AGAIN, BESIDE)]
    kinds = [f"{kind} {count}" for kind, count in files]
    if len(kinds) > 8:
        kinds[8:] = [f"{len(kinds) - 8} other endings"]
    parts = [_count(left_out[kind], kind) for kind in (AGAIN, BESIDE) if left_out[kind]]
    if files:
        number = sum(count for _, count in files)
        parts.insert(0, f"{_count(number, 'file')} that Pillow does not read ({', '.join(kinds)})")
    if parts:
        print("left out:", "; ".join(parts))


def _count(count, words):
    """Count things in words: 1 link to a folder, 2 links to a folder."""
    first, *rest = words.split(" ")
    return " ".join([f"{count} {first}{'s' if count != 1 else ''}", *rest])


def _pictures(entry, left_out):
    """List the path of a file if it is a picture; else count the file as left out."""
    is_file = entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path)
    if is_picture(entry.name):
        if not is_file:
            raise UserError(f"the image {entry.path} is a link to nothing; fix or remove it")
        return [entry.path]
    ending = repr(os.path.splitext(entry.name)[1].lower())[1:-1]  # a name may hold what cannot be printed
    left_out[(ending or NO_ENDING) if is_file else BROKEN] += 1
    return []


def _places(root, folders):
    """Return {identity: folder}. Raises UserError where two folders are one, or one leads up."""
    places = {}
    for folder in folders:
        if folder != root and os.path.islink(folder) and _leads_up(folder, root):
            raise UserError(f"the class folder {folder} is a link to a folder above it; remove the link")
        other = places.setdefault(_identity(folder), folder)
        if other != folder:
            raise UserError(f"the class folders {other} and {folder} are the same folder; remove the link")
    return places


def _identity(folder):
    """Return what tells a folder from others, whatever path leads to it."""
    with reading(folder):
        status = os.stat(folder)
    return status.st_dev, status.st_ino or os.path.realpath(folder)  # some network disks number nothing


def _leads_up(link, root):
    """Tell whether a link leads to a folder that holds it, or that holds `root`."""
    target = Path(link).resolve()
    below = (Path(link).parent.resolve(), Path(root).resolve())
    return any(place.is_relative_to(target) for place in below)
