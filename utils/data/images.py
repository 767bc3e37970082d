"""Images with labels: sub-sampled ImageNet, ImageNet-R, CIFAR, and any tree of class folders."""

import gc
import hashlib
import os
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from tqdm import tqdm

from utils.data.folders import BESIDE, entries, find_pictures, is_folder, is_picture, reading, tell
from utils.data.text_sets import read_texts
from utils.model.preprocessing import Preprocessing, describe, on_white
from utils.runtime import memory
from utils.runtime.distributed import is_rank_zero
from utils.runtime.errors import UserError
from utils.runtime.files import one_line
from utils.runtime.records import Digest, digests_of_files

WNIDS = ImageNetInfo("imagenet-1k").label_names()  # ImageNet's 1,000 folders, in the order of the classes
STRIDES = {
    ("imagenet", "train"): 250,
    ("imagenet", "val"): 10,
    ("imagenet_r", "val"): 10,
}  # the paper's 5,124 and 5,000 images
IMAGENET = {
    "imagenet": ("train", "val"),
    "imagenet_r": ("val",),
}  # data sets with ImageNet's class names, and their splits
CIFAR = {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100}


@dataclass
class Images(Dataset):
    """Images in a fixed order. Item i is (transformed image [3, side, side], label), or the UserError that
    says what is wrong.

    samples, folders, class_names: list of (path or PIL image, label); the folder and the name of every label.
    transform, dataset, split, data_path: as in `load_images`.
    """

    samples: list
    folders: list
    class_names: list
    transform: object
    dataset: str = ""
    split: str = ""
    data_path: str = ""

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        try:
            return self.transform(self.picture(index)), self.samples[index][1]
        except UserError as error:
            return error

    def picture(self, index):
        """An image as it is, in RGB. Raises UserError for one that cannot be read."""
        image, _ = self.samples[index]
        if not isinstance(image, str):
            return image
        try:
            opened = Image.open(image)
            white = (
                isinstance(self.transform, Preprocessing) and self.transform.record["transparent"] == "white"
            )
            return to_rgb(on_white(opened) if white else opened)
        except Exception as error:  # what a damaged file raises depends on its format
            what = f"the image {image} cannot be read ({one_line(error)[:100]})"
            raise UserError(f"{what}; fix or remove it, and run the same command again") from error

    @property
    def labels(self):
        """int64 [images]."""
        return torch.tensor([label for _, label in self.samples], dtype=torch.int64).numpy()

    @cached_property
    def digests(self):
        """What tells each image from others: 16 hex digits over all its bytes, its name and its label.

        Raises UserError for a file that cannot be read.
        """
        files = digests_of_files([image for image, _ in self.samples if isinstance(image, str)])
        found = []
        for image, label in tqdm(
            self.samples, "bytes of images", unit="image", delay=5, disable=not is_rank_zero()
        ):
            if not isinstance(image, str):
                item = f"{image.mode} {image.size} {hashlib.sha256(image.tobytes()).hexdigest()}"
            else:
                try:
                    item = f"{Path(image).parts[-2:]} {next(files)}"
                except OSError as error:
                    what = f"the image {error.filename} cannot be read ({error.strerror})"
                    raise UserError(f"{what}; fix or remove it, and run the same command again") from error
            found.append(
                hashlib.sha256(f"{item} {label}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
            )
        return found

    @cached_property
    def record(self):
        """What results say about the images and how they are read. `data` changes when images come, go, or
        change name or bytes; not with the root, which is noted as `data_path`."""
        earlier = hashlib.sha256()  # as versions did that looked at sizes
        for image, label in self.samples:
            size = (
                f"{Path(image).parts[-2:]} {os.stat(image).st_size}"
                if isinstance(image, str)
                else str(image.size)
            )
            earlier.update(f"{size} {label}\n".encode())
        now = hashlib.sha256("".join(self.digests).encode())
        data = Digest(now.hexdigest()[:16], earlier.hexdigest()[:12])
        where = {"data_path": os.path.abspath(self.data_path)} if self.data_path else {}
        how = {"preprocessing": self.transform.digest} if isinstance(self.transform, Preprocessing) else {}
        return {"dataset": self.dataset, "split": self.split, "data": data, **how, **where}

    @property
    def classes(self):
        """What results say about labels: the folder and the name of every label. Labels of other results are
        matched by these.
        """
        return {"folders": self.folders, "class_names": self.class_names}

    def summary(self):
        """Lines to see at a glance whether these are the images that were meant, and what the model gets of
        them.
        """
        modes = Counter(mode_of(image) for image, _ in self.samples)
        other = ", ".join(
            f"{count} of mode {mode} are converted" for mode, count in sorted(modes.items()) if mode != "RGB"
        )
        counts = f"{len(self)} of {pairing(**self.classes)}"
        how = f"\n{describe(self.transform)}" if isinstance(self.transform, Preprocessing) else ""
        return f"images of {self.dataset} {self.split}: {counts}{'; ' + other if other else ''}{how}"


def pairing(folders, class_names):
    """How many classes there are, and which name the first and the last folder have."""
    first, last = (f"{folders[i]} = {class_names[i]}" for i in (0, -1))
    return f"{len(folders)} classes ({first}, ..., {last})"


def mode_of(image):
    """Mode of a picture, from its header; RGB for one that cannot be opened, which is reported when it is
    read.
    """
    if not isinstance(image, str):
        return image.mode
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are counted when the picture is read
            with Image.open(image) as opened:
                return opened.mode
    except Exception:  # as in `picture`
        return "RGB"


def to_rgb(image):
    """A PIL image in 8-bit RGB. Raises ValueError where the range of its values is not known (32-bit
    integers, floats).
    """
    if image.mode.startswith("I;16") or (
        image.mode == "I" and image.format == "PNG"
    ):  # a PNG has 16 bits at most
        image = Image.fromarray(np.round(np.asarray(image).astype(np.float64) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}, whose range of values is not known: convert it to 8 bits")
    return image.convert("RGB")


@dataclass
class Loader:
    """Reads pieces (slices) of a data set: loader(pieces) yields images [B, 3, side, side] on `device`.

    Warnings of the libraries that read images are counted, and told once at the end. Raises UserError for an
    image that cannot be read.
    """

    images: Dataset
    device: torch.device = "cpu"
    num_workers: int = 0

    def __call__(self, pieces):
        return (pixels for pixels, _ in self.with_targets(pieces))

    def with_targets(self, pieces):
        """Yield (images, labels [B] or masks [B, ...])."""
        on_gpu = torch.device(self.device).type == "cuda"
        rows = [range(piece.start, piece.stop) for piece in pieces]
        options = {
            "num_workers": self.num_workers,
            "pin_memory": on_gpu,
            "collate_fn": _as_it_is,
            "worker_init_fn": _start_worker,
        }
        options["generator"] = torch.Generator()  # else it would draw from the process's random numbers
        batches, warned = iter(DataLoader(_Batches(self.images), batch_sampler=rows, **options)), Counter()
        while (found := _next(batches)) is not None:
            batch, told = found
            warned.update(told)
            if isinstance(batch, UserError):
                raise batch
            yield batch[0].to(self.device, non_blocking=on_gpu), batch[1]
        if warned:
            [(text, _)] = warned.most_common(1)
            tqdm.write(f"note: {warned.total()} warnings while images were read, such as: {text}")


def _next(batches):
    """The next batch, None after the last. Raises UserError when a process that loads images has ended."""
    try:
        return next(batches, None)
    except (
        RuntimeError,
        OSError,
        EOFError,
    ) as error:  # the last two, when it dies while it hands a batch over
        if isinstance(error, RuntimeError) and not re.search("DataLoader worker|shared memory", str(error)):
            raise
        why = "a process that loads images has ended, for want of memory or of shared memory (/dev/shm)"
        raise UserError(
            f"{why}; use a smaller --num_workers and run the same command again to resume"
        ) from error


def _start_worker(_):
    # a collection would write to the pages that a loader process shares with its parent, and so copy them
    gc.freeze()


@dataclass
class _Batches(Dataset):
    """Whole batches of a data set, each with the warnings that came up while it was read."""

    images: Dataset

    def __getitems__(self, rows):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            items = [self.images[row] for row in rows]
        if torch.utils.data.get_worker_info():
            memory.trim()  # a loader process would grow with every batch
        errors = [item for item in items if isinstance(item, UserError)]
        return errors[0] if errors else torch.utils.data.default_collate(items), [
            one_line(each.message) for each in caught
        ]


def _as_it_is(batch):
    return batch


def train_set_of(dataset):
    """The data set whose train split, components, descriptions and classifier a data set takes: ImageNet's
    for ImageNet-R.
    """
    return "imagenet" if dataset == "imagenet_r" else dataset


def load_images(dataset, data_path, split, transform=None, subsample=None, class_names=None):
    """floor(images / subsample) of a data set's images, each `subsample`-th, in the order of its sorted
    folders.

    dataset: imagenet (ROOT/train/n01440764/*.JPEG), imagenet_r (ROOT/n01443537/*.jpg), CIFAR10, CIFAR100, or
        folder (ROOT/SPLIT/CLASS/image).
    data_path, split: ROOT; train or val, for `folder` the name of a folder.
    transform: PIL image -> [3, side, side].
    subsample: stride, None for the paper's.
    class_names: a text file for `folder`, a name a line, as in `names_for`.

    Labels count the sorted folders (for ImageNet and ImageNet-R all 1,000, whichever are there). With a
    transform, prints what was found and what was left out. Raises UserError for missing or empty folders, an
    unknown split, names that do not fit the folders, or fewer images than the stride.
    """
    left_out = Counter()
    if dataset in CIFAR:
        samples, folders = _cifar(dataset, data_path, split)
        names = folders
    elif dataset in IMAGENET:
        samples, left_out = _imagenet(dataset, data_path, split)
        folders, names = WNIDS, list(IMAGENET_CLASSNAMES)
    else:
        samples, folders, left_out = _class_folders(Path(data_path) / split, data_path, split)
        names = names_for(folders, class_names)
    stride = subsample or STRIDES.get((dataset, split), 1)
    count = len(samples) // stride
    if count == 0:
        raise UserError(
            f"{data_path} has {len(samples)} images of {split}, and every {stride}-th is taken; lower --subsample"
        )
    taken, where = (
        samples[: count * stride : stride],
        {"dataset": dataset, "split": split, "data_path": str(data_path)},
    )
    images = Images(taken, list(folders), names, transform, **where)
    if transform is not None:
        print(images.summary())
        tell(left_out)
    return images


def classes_of(dataset, data_path=None, split="val", class_names=None):
    """The folders and the names of a data set's classes, in the order of its labels. Parameters as in
    `load_images`.
    """
    if class_names and dataset != "folder":
        raise UserError(f"--class_names goes with --dataset folder; {dataset} has class names of its own")
    if dataset in IMAGENET:
        return {"folders": WNIDS, "class_names": list(IMAGENET_CLASSNAMES)}
    if data_path is None:
        raise UserError(f"the class names of {dataset} are in its data; add --data_path")
    return load_images(dataset, data_path, split, class_names=class_names).classes


def names_for(folders, file=None):
    """Name every folder: by itself without underscores, or by its line in a text file.

    Where the lines are the names of the folders, each folder gets its own line, whatever their order. Else
    they name the folders in order. Raises UserError where there are more or fewer lines than folders, or a
    folder's name stands at another folder's place.
    """
    if file is None:
        return [folder.replace("_", " ") for folder in folders]
    lines = read_texts(file)
    if len(lines) != len(folders):
        counts = f"{len(lines)} names, and the data set has {len(folders)} class folders"
        raise UserError(f"--class_names {file} has {counts}")
    own = _lines_of(folders, lines)
    if all(len(each) == 1 for each in own):
        return [
            lines[i].strip("\"'").rstrip("/") or lines[i] for [i] in own
        ]  # as ls -Q and ls -p list folders
    first_words = [
        re.split(r"[\s:;,=]", line, maxsplit=1)[0] for line in lines
    ]  # of lines such as "n01440764 tench"
    for place, folder in enumerate(folders):
        if folder in first_words and first_words[place] != folder and not own[place]:
            own[place] = [first_words.index(folder)]
    for place, each in enumerate(own):
        if each and place not in each:
            what = f"name {each[0] + 1}, {lines[each[0]]}, is that of folder {folders[place]}"
            why = f"{what} and stands at the place of folder {folders[each[0]]}"
            fix = "list the names in the order of the sorted folders, or use the name of every folder"
            raise UserError(f"--class_names {file}: {why}; {fix}")
    return lines


def _lines_of(folders, lines):
    """List for each folder the places of its name among the lines: the same name, or else one that is alike,
    unless another folder's name is so too."""
    exact = defaultdict(list)
    near = defaultdict(list)
    for i, line in enumerate(lines):
        exact[line].append(i)
        near[_plain(line)].append(i)
    alike = Counter(map(_plain, folders))
    return [exact[name] or (near[_plain(name)] if alike[_plain(name)] == 1 else []) for name in folders]


def _plain(name):
    """The letters and digits of a name, small, with composed accents; a number before the name does not
    count.
    """
    letters = "".join(letter for letter in unicodedata.normalize("NFC", name.casefold()) if letter.isalnum())
    return re.sub(r"^\d+(?=\D)", "", letters) or letters or name


def _class_folders(root, data_path, split):
    """List the samples and the names of the class folders; count what is left out."""
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
    """List the class folders, by name, or by value if all are whole numbers; count the pictures beside
    them.
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
    if split not in IMAGENET[dataset]:
        raise UserError(f"--split {split}: {dataset} has {' and '.join(IMAGENET[dataset])}")
    root = Path(data_path) if dataset == "imagenet_r" else Path(data_path) / split
    samples, wnids, left_out = _class_folders(root, data_path, split)
    index = {wnid: i for i, wnid in enumerate(WNIDS)}
    unknown = [wnid for wnid in wnids if wnid not in index]
    if unknown:
        raise UserError(
            f"{unknown[0]} is no folder of ImageNet (n01440764, ...); for other class folders use --dataset folder"
        )
    return [(path, index[wnids[label]]) for path, label in samples], left_out


def _cifar(dataset, data_path, split):
    if split not in ("train", "val", "test"):
        raise UserError(f"--split {split}: {dataset} has train and val (its test images)")
    try:  # torchvision compares the files with the published checksums before it opens them
        images = CIFAR[dataset](data_path, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        why = f"{dataset} is neither in --data_path {data_path} nor could it be fetched: {one_line(error)[:140]}"
        raise UserError(why) from error
    return [
        (Image.fromarray(array), label) for array, label in zip(images.data, images.targets, strict=True)
    ], images.classes
