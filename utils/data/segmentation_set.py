"""Read the images and masks of ImageNet-Segmentation, and the class of every image."""

import hashlib
import json
import math
from copy import deepcopy
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
import torch
from open_clip.transform import CenterCropOrPad, ResizeKeepRatio
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from tqdm import tqdm

from utils.data.segmentation_row import Row
from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.files import one_line, read_array
from utils.runtime.records import Digest, digest_of_file

IGNORED = -1  # mask pixels that do not count
LARGEST = 255  # value of an object or class
VALUES_SHOWN = 8  # values in a note, at most
FEW = 0.2  # share of masks that may have unknown pixels and no object without a note
MANY = 64  # different values in one mask; more are no classes
UNREADABLE = (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError)  # what h5py raises


class SegmentationSet(Dataset):
    """A SegmentationSet is the images and masks of a MATLAB v7.3 file like gtsegs_ijcv.mat.

    Item i is read when it is asked for: (transformed image [3, side, side], int8 mask [size] of 0, 1 and
    IGNORED), or the UserError that says what is wrong. In the file, `/value/img` [images, 1] refers to uint8
    arrays [3, W, H], and `/value/gt` [images, 1] to cells that refer to masks [W, H]: 0 on the background,
    -1, 255 or NaN where it is unknown, else on the object.

    path: the file, or the folder with gtsegs_ijcv.mat.
    transform: open_clip's validation transform of the images.
    geometry: of masks: 'paper' squashes the whole mask to `size`, whatever is cropped from the image (the
        published behaviour); 'aligned' resizes and crops the mask as the image, and ignores what the image is
        padded with.
    size: (rows, columns) of the masks.
    ignored: values of mask pixels that do not count; NaN never does.
    images: False leaves the images' place empty, when only masks are needed.

    Raises UserError for a file that is missing or has another layout.
    """

    def __init__(
        self,
        path,
        transform,
        geometry=Row.geometry,
        size=(224, 224),
        ignored=Row.ignore_index,
        images=True,
    ):
        self.path = file_of(path)
        self.transform = transform if images else None
        self.size = size
        self.ignored = tuple(ignored)
        steps = _geometry_of(transform) if geometry == "aligned" else []
        self.mask_transform = Compose([*steps, Resize(size, InterpolationMode.NEAREST)])
        self.count = _count_images(self.path)

    @cached_property
    def record(self):
        """record is the name of the set and a digest of its file, for the records of results."""
        # earlier versions looked at the file's size and number of images
        earlier = hashlib.sha256(f"{self.count} {self.path.stat().st_size}".encode()).hexdigest()[:12]
        return {"dataset": self.path.stem, "data": Digest(digest_of_file(self.path), earlier)}

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        try:
            image, mask = self._arrays(index)
        except UNREADABLE as error:
            return self._unreadable(index, error)
        unknown = np.isin(mask, self.ignored) | np.isnan(mask)
        mask = np.where(unknown, IGNORED, mask != 0).astype(np.int8).view(np.uint8)
        mask = self.mask_transform(_picture(mask))
        pixels = self.transform(_picture(image)) if self.transform else torch.empty(0)
        return pixels, torch.from_numpy(np.array(mask).view(np.int8))

    def _arrays(self, index):
        """Return the image [3, W, H] and the mask [W, H] of the file. Raise ValueError for other shapes."""
        with h5py.File(self.path) as file:  # opened for each item: another process could not use the handle
            image = file[file["value/img"][index, 0]][()]
            mask = _mask_in(file, index)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape != (3, *mask.shape):
            found = f"image {image.dtype} {image.shape}, mask {mask.shape}"
            raise ValueError(f"{found}; uint8 (3, W, H) and (W, H) are needed")
        return image, mask

    def _unreadable(self, index, error):
        why = one_line(error)[:120]
        return UserError(f"{self.path}: image {index} (of 0 to {len(self) - 1}) cannot be read ({why})")

    def check_masks(self):
        """Read all masks once and look at their values. Print what counts as what where it may be a surprise.

        Raises UserError for an unreadable mask, for a value without a meaning, and if no mask has an object.
        """
        bar = {"desc": "masks", "unit": "mask", "delay": 1, "disable": not distributed.is_rank_zero()}
        values = [self._values(index) for index in tqdm(range(len(self)), **bar)]
        if without := sum(any(map(math.isnan, each)) for each in values):
            print(f"note: {without} masks of {self.path} hold NaN, which counts as unknown")
        held = sorted({value for each in values for value in each if not math.isnan(value)})
        objects = [value for value in held if value != 0 and value not in self.ignored]
        if not objects:
            raise UserError(f"masks of {self.path} {self._without_object(held)}")
        if 0 not in held:
            what = f"masks of {self.path} hold {_listed(held, ' and ')} alone, so no pixel is background"
            raise UserError(f"{what}; give masks with 0 on the background")
        hidden = [value for value in held if value > 0 and value in self.ignored]
        self._tell_objects(objects, hidden)
        self._tell_hidden(values, objects, hidden)

    def _tell_objects(self, objects, hidden):
        """Print a note where objects have other values than 1. hidden: values above 0 that are unknown."""
        if objects[-1] <= 1:
            return
        shown = (
            objects if len(objects) <= VALUES_SHOWN else [*objects[: VALUES_SHOWN - 1], "...", objects[-1]]
        )
        others = f", and {_listed(hidden)} as unknown" if hidden else ""
        print(f"note: masks of {self.path} hold {_listed(shown)}; each of these counts as object{others}")

    def _tell_hidden(self, values, objects, hidden):
        """Print a note where many masks have unknown pixels and no object. values: those of every mask."""
        without = 0
        for each in values:
            has_hidden = not {*hidden}.isdisjoint(each)
            without += has_hidden and {*objects}.isdisjoint(each)
        if without > FEW * len(self):
            what = f"note: {without} of {len(self)} masks of {self.path} hold {_listed(hidden)} and no object"
            print(f"{what}; {_listed(hidden)} counts as unknown, and as object without it in --ignore_index")

    def _values(self, index):
        """Return the values of a mask. Raise UserError for one that is not ignored and no class either."""
        try:
            with h5py.File(self.path) as file:
                values = [_plain(value) for value in np.unique(_mask_in(file, index)).tolist()]
        except UNREADABLE as error:
            raise self._unreadable(index, error) from error
        where = f"{self.path}: the mask of image {index} holds"
        if len(values) > MANY:
            fix = "give masks of classes, 0 on the background and 1 on the object"
            raise UserError(f"{where} {len(values)} values, as soft edges or a picture do; {fix}")
        for value in values:
            of_class = isinstance(value, int) and 0 <= value <= LARGEST
            if of_class or value in self.ignored or math.isnan(value):
                continue
            ignored = _listed([*self.ignored, value], " ")
            fix = f"if it marks unknown pixels, add it: --ignore_index {ignored}"
            if isinstance(value, float):
                meant = "0 on the background, 1 on the object, -1 (--ignore_index) if unknown"
                fix = f"give whole numbers: {meant}"
            raise UserError(f"{where} {value}, which is no class from 0 to {LARGEST}; {fix}")
        return values

    def _without_object(self, held):
        """Return what is wrong with masks without any object. held: their values, without NaN."""
        hold = f"hold {_listed(held, ' and ') or 'NaN'} alone"
        hidden = [value for value in held if value > 0]
        if not hidden:
            return f"{hold}, so no pixel is on an object; give masks with 1 on the object"
        rest = [value for value in self.ignored if value not in hidden] or [IGNORED]
        counts = f"{_listed(hidden, ' and ')} {'counts' if len(hidden) == 1 else 'count'} as unknown"
        fix = f"if {_listed(hidden, ' or ')} is the object, add --ignore_index {_listed(rest, ' ')}"
        return f"{hold}, and {counts}; {fix}"


def file_of(path):
    """Return the file of a segmentation set: the path itself, or gtsegs_ijcv.mat in a folder."""
    path = Path(path)
    return path / "gtsegs_ijcv.mat" if path.is_dir() else path


def _geometry_of(transform):
    """Return the steps of a transform that resize and crop, for masks."""
    kinds = (Resize, ResizeKeepRatio, CenterCrop, CenterCropOrPad)
    steps = [deepcopy(step) for step in transform.transforms if isinstance(step, kinds)]
    for step in steps:
        step.interpolation = InterpolationMode.NEAREST
        step.fill = IGNORED % 256
    return steps


def _count_images(path):
    """Count the images of a file. Raise UserError when it is missing or has another layout."""
    what = f"--data_path {path}"
    if not path.is_file():
        raise UserError(f"{what}: there is no such file; give gtsegs_ijcv.mat or one with its layout")
    try:
        with h5py.File(path) as file:
            arrays = [file["value/img"], file["value/gt"]]
            shapes = [array.shape for array in arrays if h5py.check_ref_dtype(array.dtype)]
    except OSError as error:
        raise UserError(f"{what} is not a MATLAB v7.3 file ({one_line(error)[:100]})") from error
    except (KeyError, AttributeError):
        shapes = []
    if len(shapes) != 2 or shapes[0] != shapes[1] or shapes[0][1:] != (1,) or not shapes[0][0]:
        layout = "references to images in /value/img and to masks in /value/gt, [images, 1] each"
        raise UserError(f"{what} does not have the layout of gtsegs_ijcv.mat: {layout}")
    return shapes[0][0]


def _mask_in(file, index):
    """Return the mask [W, H] of an image in an open file. Raise ValueError when it holds no numbers."""
    mask = file[file[file["value/gt"][index, 0]][0, 0]][()]
    if mask.dtype.kind not in "biuf":
        raise ValueError(f"mask {mask.dtype}; numbers are needed")
    return mask


def _picture(array):
    """Return an array of the file, [W, H] or [3, W, H], as a picture."""
    return Image.fromarray(np.ascontiguousarray(array.T))


def _plain(value):
    """Return a number as an int where it is whole and a float holds it exactly."""
    return int(value) if abs(value) < 2**53 and value == int(value) else value


def _listed(values, between=", "):
    return between.join(map(str, values))


def read_classes(path, images, classes):
    """Read the class of every image, int64 [images] in 0 to classes - 1.

    path: an .npy, a .json with a list, or a text file with one index a line.

    Raises UserError for a file that does not hold one class for each image.
    """
    path = Path(path)
    what = f"--class_source {path}"
    try:
        found = _numbers_in(path)
    except (OSError, EOFError, ValueError) as error:
        why = f"{what} cannot be read ({one_line(error)[:120]})"
        raise UserError(f"{why}; give one class index per image") from error
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise UserError(f"{what} does not hold whole numbers; give one class index per image")
    if len(found) != images:
        raise UserError(f"{what} has {len(found)} classes and the segmentation set has {images} images")
    wrong = np.flatnonzero((found < 0) | (found >= classes))
    if len(wrong):
        i = wrong[0]
        has = f"image {i} has the class {found[i]}, and the classifier has 0 to {classes - 1}"
        raise UserError(f"{what}: {has}")
    return found.astype(np.int64)


def _numbers_in(path):
    """Return the array of an .npy, of a list in .json, or of a text file with one number a line."""
    if path.suffix == ".npy":
        return read_array(path)
    text = path.read_text(encoding="utf-8")
    return np.array(json.loads(text) if path.suffix == ".json" else [int(line) for line in text.split()])
