"""Load images: sub-sampled ImageNet, ImageNet-R, CIFAR, any tree of class folders, any folder of pictures.

The last have no classes, and their bytes decide which of them are held out.
"""

import hashlib
import os
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from tqdm import tqdm

from utils.data.folders import BESIDE, entries, find_pictures, is_folder, is_picture, reading, tell
from utils.data.text_sets import read_texts
from utils.model.preprocessing import Preprocessing, describe, on_white
from utils.runtime.distributed import is_rank_zero
from utils.runtime.errors import UserError
from utils.runtime.files import one_line
from utils.runtime.records import Digest, digests_of_files

WNIDS = ImageNetInfo("imagenet-1k").label_names()  # ImageNet's 1,000 folders, in the order of the classes
# Every n-th image is taken: the paper's 5,124 of train, and 5,000 of val
STRIDES = {("imagenet", "train"): 250, ("imagenet", "val"): 10, ("imagenet_r", "val"): 10}
IMAGENET = {"imagenet": ("train", "val"), "imagenet_r": ("val",)}  # splits of sets with ImageNet's classes
CIFAR = {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100}
UNSORTED = "images"  # a folder of pictures without classes and splits
HELD_OUT = 0.2  # the share of them that is held out
FEWEST = 50  # different pictures that it needs


@dataclass
class Images(Dataset):
    """`Images` is a list of labelled images in a fixed order.

    Item i is (transformed image [3, side, side], label), or the UserError that says what is wrong with it.

    samples: list of (path or PIL image, label); label -1 where there are no classes.
    folders: the folder of every label; empty where there are no classes.
    class_names: the name of every label.
    transform, dataset, split, data_path, held_out: as in `load_images`.
    contents: {path: text that tells it from others}, where the bytes have been read already.
    """

    samples: list
    folders: list
    class_names: list
    transform: object
    dataset: str = ""
    split: str = ""
    data_path: str = ""
    held_out: float | None = None
    contents: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        try:
            return self.transform(self.picture(index)), self.samples[index][1]
        except UserError as error:
            return error

    def picture(self, index):
        """Return an image in RGB, before the transform. Raises UserError for a file that cannot be read."""
        image, _ = self.samples[index]
        if not isinstance(image, str):
            return image
        try:
            opened = Image.open(image)
            if isinstance(self.transform, Preprocessing) and self.transform.record["transparent"] == "white":
                opened = on_white(opened)
            return to_rgb(opened)
        except Exception as error:  # what a damaged file raises depends on its format
            what = f"the image {image} cannot be read ({one_line(error)[:100]})"
            raise UserError(f"{what}; fix or remove it, and run the same command again") from error

    @cached_property
    def labels(self):
        """labels is int64 [images]."""
        return np.array([label for _, label in self.samples], dtype=np.int64)

    @cached_property
    def digests(self):
        """Return a digest of each image: 16 hex digits over all its bytes, its name and its label.

        Raises UserError for a file that cannot be read.
        """
        files = read_all([image for image, _ in self.samples if isinstance(image, str)])
        digests = []
        for image, label in self.samples:
            content = self.contents[image] if self.contents else _content(image, files)
            item = f"{content} {label}".encode("utf-8", "surrogateescape")
            digests.append(hashlib.sha256(item).hexdigest()[:16])
        return digests

    @cached_property
    def record(self):
        """Return what the records of results say about the images and how they are read.

        `data` changes when images come, go, or change name or bytes. It does not change with their root,
        which is noted as `data_path`.
        """
        data = hashlib.sha256("".join(self.digests).encode()).hexdigest()[:16]
        record = {"dataset": self.dataset, "split": self.split}
        if self.dataset == UNSORTED:
            record |= {"data": data, "held_out": self.held_out}
        else:
            record["data"] = Digest(data, self._earlier())
        if isinstance(self.transform, Preprocessing):
            record["preprocessing"] = self.transform.digest
        if self.data_path:
            record["data_path"] = os.path.abspath(self.data_path)
        return record

    def _earlier(self):
        """Return the digest of earlier versions, which looked at sizes only."""
        earlier = hashlib.sha256()
        for image, label in self.samples:
            earlier.update(f"{_size(image)} {label}\n".encode())
        return earlier.hexdigest()[:12]

    @property
    def classes(self):
        """classes is the folder and the name of every label: records hold them, to match labels by."""
        return {"folders": self.folders, "class_names": self.class_names}

    def summary(self):
        """Return lines that show whether these are the images that were meant, and how they are read."""
        modes = Counter(mode_of(image) for image, _ in self.samples)
        modes.pop("RGB", None)
        other = ", ".join(f"{count} of mode {mode} are converted" for mode, count in sorted(modes.items()))
        lines = f"images of {self.dataset} {self.split}: {len(self)} "
        if self.folders:
            lines += f"of {pairing(**self.classes)}"
        else:
            lines += f"without classes; {100 * self.held_out:g} % of all are held out, by their bytes"
        if other:
            lines += f"; {other}"
        if isinstance(self.transform, Preprocessing):
            lines += f"\n{describe(self.transform)}"
        return lines


def _content(image, digests):
    """Return the text that tells an image from others. digests: iterator over the digests of files."""
    if not isinstance(image, str):
        return f"{image.mode} {image.size} {hashlib.sha256(image.tobytes()).hexdigest()}"
    return f"{Path(image).parts[-2:]} {next(digests)}"


def read_all(paths):
    """Yield `digest_of_file` of every picture, in order. Raises UserError for one that cannot be read."""
    found = digests_of_files(paths)
    bar = tqdm(found, "bytes of images", len(paths), unit="image", delay=5, disable=not is_rank_zero())
    try:
        yield from bar
    except OSError as error:
        what = f"the image {error.filename} cannot be read ({error.strerror})"
        raise UserError(f"{what}; fix or remove it, and run the same command again") from error


def _size(image):
    """Return the text that told an image from others in earlier versions."""
    if isinstance(image, str):
        return f"{Path(image).parts[-2:]} {os.stat(image).st_size}"
    return str(image.size)


def pairing(folders, class_names):
    """Say how many classes there are, and which name the first and the last folder have."""
    first, last = (f"{folders[i]} = {class_names[i]}" for i in (0, -1))
    return f"{len(folders)} classes ({first}, ..., {last})"


def mode_of(image):
    """Return the mode of an image, from its header.

    For one that cannot be opened this is RGB; the error is reported when the image is read.
    """
    if not isinstance(image, str):
        return image.mode
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are counted when the image is read
            with Image.open(image) as opened:
                return opened.mode
    except Exception:  # as in `picture`
        return "RGB"


def to_rgb(image):
    """Return a PIL image in 8-bit RGB.

    Raises ValueError where the range of its values is not known (32-bit integers, floats).
    """
    from_png = image.mode == "I" and image.format == "PNG"  # a PNG has 16 bits at most
    if from_png or image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(np.round(levels).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}, whose range of values is not known: convert it to 8 bits")
    return image.convert("RGB")


def to_pictures(pixels, transform, size):
    """Return the images that the model saw as pictures to look at, [B, *size, 3] in [0, 1].

    pixels: [B, 3, side, side].
    transform: the `Preprocessing` that made them.
    size: (rows, columns) of the pictures.
    """
    normalise = transform.transforms[-1]
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (normalise.mean, normalise.std))
    options = {"mode": "bilinear", "antialias": True}
    pictures = torch.nn.functional.interpolate(pixels * std + mean, size=size, **options)
    return pictures.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def train_set_of(dataset):
    """Return the data set whose training split, components, descriptions and classifier a data set takes.

    ImageNet-R has no training split: all these are ImageNet's.
    """
    return "imagenet" if dataset == "imagenet_r" else dataset


def require_classes(dataset):
    """Raise UserError where the images of a data set have no classes."""
    if dataset == UNSORTED:
        what = f"the pictures of --dataset {dataset} have no classes, and this needs them"
        raise UserError(f"{what}; sort the pictures into class folders, and give --dataset folder")


def load_images(dataset, data_path, split, transform=None, subsample=None, class_names=None, held_out=None):
    """Return every `subsample`-th image of a data set, in the order of its sorted folders, as `Images`.

    With a transform, print also what was found and what was left out.

    dataset: imagenet (ROOT/train/n01440764/*.JPEG), imagenet_r (ROOT/n01443537/*.jpg), CIFAR10, CIFAR100,
        folder (ROOT/SPLIT/CLASS/image), or images (any pictures in and below ROOT).
    data_path: ROOT.
    split: train or val; for `folder`, the name of a folder.
    transform: PIL image -> [3, side, side].
    subsample: stride, None for the paper's. There are floor(images / subsample) images.
    class_names: for `folder`, a text file with a name a line, as in `names_for`.
    held_out: for `images`, the share of the pictures that `val` has; None for a fifth.

    Labels count the sorted folders (for ImageNet and ImageNet-R all 1,000, whichever are there).

    Raises UserError for missing or empty folders, an unknown split, names that do not fit the folders, or
    fewer images than the stride.
    """
    contents = {}
    if dataset == UNSORTED:
        held_out = HELD_OUT if held_out is None else held_out
        contents, left_out = _side(data_path, split, held_out)
        samples = [(path, -1) for path in contents]
        folders = names = ()
    elif held_out is not None:
        raise UserError(f"--held_out goes with --dataset {UNSORTED}; {dataset} has splits of its own")
    else:
        samples, folders, names, left_out = _labelled(dataset, data_path, split, class_names)
    taken = _every_nth(samples, subsample or STRIDES.get((dataset, split), 1), data_path, split)
    where = (dataset, split, str(data_path), held_out, contents)
    images = Images(taken, list(folders), list(names), transform, *where)
    if transform is not None:
        print(images.summary())
        tell(left_out)
    return images


def _labelled(dataset, data_path, split, class_names):
    """List the samples of a data set with classes, the classes' folders and names, and what is left out."""
    if dataset in CIFAR:
        samples, folders = _cifar(dataset, data_path, split)
        return samples, folders, folders, Counter()
    if dataset in IMAGENET:
        samples, left_out = _imagenet(dataset, data_path, split)
        return samples, WNIDS, IMAGENET_CLASSNAMES, left_out
    samples, folders, left_out = _class_folders(Path(data_path) / split, data_path, split)
    return samples, folders, names_for(folders, class_names), left_out


def _every_nth(samples, stride, data_path, split):
    """Return every n-th sample, as many as whole strides fit. Raises UserError where none does."""
    count = len(samples) // stride
    if count == 0:
        counts = f"{len(samples)} images of {split}, and every {stride}-th is taken"
        raise UserError(f"{data_path} has {counts}; lower --subsample")
    return samples[: count * stride : stride]


def classes_of(dataset, data_path=None, split="val", class_names=None):
    """Return the folders and the names of a data set's classes, in the order of its labels.

    Pictures without classes can be classified all the same, by any names; these stand for the folders, too.

    Parameters are those of `load_images`. Raises UserError where the names cannot be known.
    """
    if dataset == UNSORTED:
        if class_names is None:
            what = f"the pictures of --dataset {UNSORTED} have no classes"
            raise UserError(f"{what}; name some with --class_names FILE, a text file with a class a line")
        names = read_texts(class_names)
        return {"folders": names, "class_names": names}
    if class_names and dataset != "folder":
        which = f"goes with --dataset folder and {UNSORTED}"
        raise UserError(f"--class_names {which}; {dataset} has class names of its own")
    if dataset in IMAGENET:
        return {"folders": WNIDS, "class_names": list(IMAGENET_CLASSNAMES)}
    if data_path is None:
        raise UserError(f"the class names of {dataset} are in its data; add --data_path")
    return load_images(dataset, data_path, split, class_names=class_names).classes


def names_for(folders, file=None):
    """Name every folder: by itself without underscores, or by its line in a text file.

    Where the lines are the names of the folders, each folder gets its own line, whatever their order. Else
    they name the folders in order.

    Raises UserError where there are more or fewer lines than folders, or a folder's name stands at another
    folder's place.
    """
    if file is None:
        return [folder.replace("_", " ") for folder in folders]
    lines = read_texts(file)
    if len(lines) != len(folders):
        counts = f"{len(lines)} names, and the data set has {len(folders)} class folders"
        raise UserError(f"--class_names {file} has {counts}")
    own = _lines_of(folders, lines)
    if all(len(places) == 1 for places in own):
        names = [lines[place] for [place] in own]
        return [name.strip("\"'").rstrip("/") or name for name in names]  # ls -Q and ls -p add quotes and /
    first_words = [re.split(r"[\s:;,=]", line, maxsplit=1)[0] for line in lines]  # of "n01440764 tench"
    for place, folder in enumerate(folders):
        if folder in first_words and first_words[place] != folder and not own[place]:
            own[place] = [first_words.index(folder)]
    for place, places in enumerate(own):
        if places and place not in places:
            other = places[0]
            what = f"name {other + 1}, {lines[other]}, is that of folder {folders[place]}"
            why = f"{what} and stands at the place of folder {folders[other]}"
            fix = "list the names in the order of the sorted folders, or use the name of every folder"
            raise UserError(f"--class_names {file}: {why}; {fix}")
    return lines


def _lines_of(folders, lines):
    """List for each folder the places of its name among the lines.

    A line is a folder's if it equals its name, or if it is alike and no other folder's name is.
    """
    exact = defaultdict(list)
    near = defaultdict(list)
    for i, line in enumerate(lines):
        exact[line].append(i)
        near[_plain(line)].append(i)
    alike = Counter(map(_plain, folders))
    return [exact[name] or (near[_plain(name)] if alike[_plain(name)] == 1 else []) for name in folders]


def _plain(name):
    """Return the letters and digits of a name, small, with composed accents, without a number before it."""
    letters = "".join(letter for letter in unicodedata.normalize("NFC", name.casefold()) if letter.isalnum())
    return re.sub(r"^\d+(?=\D)", "", letters) or letters or name


def _side(data_path, split, share):
    """Return {path: text that tells it from others} of the pictures of one side, and count what is left out.

    A picture is held out by a hash of its bytes. So equal files are on one side, on every machine, and no
    picture changes sides when others come or go. Its pixels would depend on the version of the decoder.

    Raises UserError for a missing folder, and for too few pictures.
    """
    if split not in ("train", "val"):
        raise UserError(f"--split {split}: {UNSORTED} has train, and val (the pictures that are held out)")
    if not os.path.isdir(data_path):
        what = "this is a file; give the folder that holds the pictures"
        if not os.path.exists(data_path):
            what = "there is no such folder"
        raise UserError(f"--data_path {data_path}: {what}")
    left_out = Counter()
    [paths] = find_pictures(str(data_path), [str(data_path)], left_out)
    digests = dict(zip(paths, read_all(paths), strict=True))
    if len(set(digests.values())) < FEWEST:
        tell(left_out)
        raise UserError(_too_few(data_path, digests))
    chosen = [path for path in paths if is_held_out(digests[path], share) == (split == "val")]
    if not chosen:
        what = f"--held_out {share:g} of the {len(paths)} pictures in {data_path}"
        raise UserError(f"{what} leaves none to --split {split}; give another share")
    names = {path: Path(path).relative_to(data_path).as_posix() for path in chosen}
    return {path: f"{names[path]} {digests[path]}" for path in chosen}, left_out


def is_held_out(digest, share):
    """Tell whether a picture is held out. digest: hex digits of its bytes. share: of all pictures."""
    return int(digest, 16) < share * 16 ** len(digest)


def _too_few(data_path, digests):
    """Return the message about a folder with too few pictures. digests: {path: of its bytes}."""
    different = len(set(digests.values()))
    copies = f" ({len(digests)} with copies)" if len(digests) > different else ""
    has = f"{data_path} has {different} different pictures{copies}"
    of_each = "10 are held out to grade texts, and components are those of 4, a tenth of the others"
    return f"{has}, and --dataset {UNSORTED} needs {FEWEST}: of these, {of_each}; add some"


def _class_folders(root, data_path, split):
    """List the samples and the names of the class folders, and count what is left out.

    Raises UserError for a missing or empty folder.
    """
    with reading(data_path):
        if not Path(data_path).is_dir():
            raise UserError(f"--data_path {data_path}: there is no such folder")
        if not root.is_dir():
            folders = sorted(path.name for path in Path(data_path).iterdir() if path.is_dir())
            there = ", ".join(folders[:8]) or "no folders"
            raise UserError(f"--data_path {data_path} has no folder for --split {split}; it has {there}")
    names, left_out = _class_names(root)
    found = find_pictures(root, [os.path.join(root, name) for name in names], left_out)
    empty = [name for name, paths in zip(names, found, strict=True) if not paths]
    if empty or not names:
        what = f"there are none in {', '.join(empty)}"[:140] if names else "it has no folders"
        raise UserError(f"{root} must hold a folder of images for every class: {what}")
    return [(path, label) for label, paths in enumerate(found) for path in paths], names, left_out


def _class_names(root):
    """List the class folders and count the pictures beside them.

    Folders are sorted by name, or by value if all are whole numbers. Raises UserError for a broken link.
    """
    there = entries(root)
    names = [entry.name for entry in there if is_folder(entry)]
    for entry in there:
        if not os.path.exists(entry.path):
            raise UserError(f"{entry.path} is a link to nothing; fix or remove it")
    for name in names:
        if name != name.encode("utf-8", "replace").decode():
            what = f"{root} has a class folder whose name is not valid text, {ascii(name)[:100]}"
            raise UserError(f"{what}; rename it")
    if all(name.isdecimal() for name in names):
        names.sort(key=lambda name: (int(name), name))
    return names, Counter(BESIDE for entry in there if is_picture(entry.name) and not is_folder(entry))


def _imagenet(dataset, data_path, split):
    """List the samples, labelled by ImageNet's 1,000 classes, and count what is left out."""
    if split not in IMAGENET[dataset]:
        raise UserError(f"--split {split}: {dataset} has {' and '.join(IMAGENET[dataset])}")
    root = Path(data_path) if dataset == "imagenet_r" else Path(data_path) / split
    samples, wnids, left_out = _class_folders(root, data_path, split)
    index = {wnid: i for i, wnid in enumerate(WNIDS)}
    unknown = [wnid for wnid in wnids if wnid not in index]
    if unknown:
        what = f"{unknown[0]} is no folder of ImageNet (n01440764, ...)"
        raise UserError(f"{what}; for other class folders use --dataset folder")
    return [(path, index[wnids[label]]) for path, label in samples], left_out


def _cifar(dataset, data_path, split):
    """List the samples and the names of the classes; torchvision fetches the files if they are missing."""
    if split not in ("train", "val", "test"):
        raise UserError(f"--split {split}: {dataset} has train and val (its test images)")
    try:  # torchvision compares the files with the published checksums before it opens them
        images = CIFAR[dataset](data_path, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        why = f"{dataset} is neither in --data_path {data_path} nor could it be fetched"
        raise UserError(f"{why}: {one_line(error)[:140]}") from error
    pictures = map(Image.fromarray, images.data)
    return list(zip(pictures, images.targets, strict=True)), images.classes
