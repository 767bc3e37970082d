"""Images and masks of ImageNet-Segmentation, and the class of every image."""

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

from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.files import one_line, read_array
from utils.runtime.records import Digest, digest_of_file

IGNORED = -1  # mask pixels that do not count
IGNORED_VALUES = (-1, 255)  # what says so in a file
LARGEST = 255  # of the values that may name an object or class
SHOWN = 8  # values in a note, at most
FEW = 0.2  # share of masks that may have unknown pixels and no object without a note
MANY = 64  # values of one mask; more are no classes
UNREADABLE = (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError)  # what h5py raises


class SegmentationSet(Dataset):
    """Images and masks of a MATLAB v7.3 file like gtsegs_ijcv.mat.

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

    Attribute: record, what results say about the set: its name, and a digest of the file.
    """

    def __init__(
        self, path, transform, geometry="paper", size=(224, 224), ignored=IGNORED_VALUES, images=True
    ):
        path = Path(path)
        self.path = path / "gtsegs_ijcv.mat" if path.is_dir() else path
        self.transform, self.ignored = transform if images else None, tuple(ignored)
        geometric = (Resize, ResizeKeepRatio, CenterCrop, CenterCropOrPad)
        steps = [
            deepcopy(step)
            for step in transform.transforms
            if geometry == "aligned" and isinstance(step, geometric)
        ]
        for step in steps:
            step.interpolation, step.fill = InterpolationMode.NEAREST, IGNORED % 256
        self.mask_transform = Compose([*steps, Resize(size, InterpolationMode.NEAREST)])
        if not self.path.is_file():
            raise UserError(
                f"--data_path {self.path}: there is no such file; give gtsegs_ijcv.mat or one with its layout"
            )
        try:
            with h5py.File(self.path) as file:
                shapes = [
                    file[name].shape
                    for name in ("value/img", "value/gt")
                    if h5py.check_ref_dtype(file[name].dtype)
                ]
        except OSError as error:
            raise UserError(
                f"--data_path {self.path} is not a MATLAB v7.3 file ({one_line(error)[:100]})"
            ) from error
        except (KeyError, AttributeError):
            shapes = []
        if len(shapes) != 2 or shapes[0] != shapes[1] or shapes[0][1:] != (1,) or not shapes[0][0]:
            layout = "references to images in /value/img and to masks in /value/gt, [images, 1] each"
            raise UserError(f"--data_path {self.path} does not have the layout of gtsegs_ijcv.mat: {layout}")
        self.images = shapes[0][0]

    @cached_property
    def record(self):
        """What results say about the set. Earlier versions looked at the file's size and number of images."""
        earlier = hashlib.sha256(f"{self.images} {self.path.stat().st_size}".encode()).hexdigest()[:12]
        return {"dataset": self.path.stem, "data": Digest(digest_of_file(self.path), earlier)}

    def __len__(self):
        return self.images

    def __getitem__(self, index):
        try:
            with h5py.File(
                self.path
            ) as file:  # opened for each item: another process could not use the handle
                image = file[file["value/img"][index, 0]][()]  # [3, W, H]
                mask = _mask_in(file, index)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape != (3, *mask.shape):
                raise ValueError(
                    f"image {image.dtype} {image.shape}, mask {mask.shape}; uint8 (3, W, H) and (W, H) are needed"
                )
        except UNREADABLE as error:
            return self._unreadable(index, error)
        unknown = np.isin(mask, self.ignored) | np.isnan(mask)
        mask = np.where(unknown, IGNORED, mask != 0).astype(np.int8).view(np.uint8)
        image, mask = (Image.fromarray(np.ascontiguousarray(array.T)) for array in (image, mask))
        pixels = self.transform(image) if self.transform else torch.empty(0)
        return pixels, torch.from_numpy(np.array(self.mask_transform(mask)).view(np.int8))

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
            fix = "give masks with 0 on the background"
            raise UserError(
                f"masks of {self.path} hold {_listed(held, ' and ')} alone, so no pixel is background; {fix}"
            )
        hidden = [value for value in held if value > 0 and value in self.ignored]
        if objects[-1] > 1:
            shown = objects if len(objects) <= SHOWN else [*objects[: SHOWN - 1], "...", objects[-1]]
            others = f", and {_listed(hidden)} as unknown" if hidden else ""
            print(f"note: masks of {self.path} hold {_listed(shown)}; each of these counts as object{others}")
        without = sum(bool({*hidden} & {*each}) and {*objects}.isdisjoint(each) for each in values)
        if without > FEW * len(self):
            what = f"note: {without} of {len(self)} masks of {self.path} hold {_listed(hidden)} and no object"
            print(f"{what}; {_listed(hidden)} counts as unknown, and as object without it in --ignore_index")

    def _values(self, index):
        """The values of a mask. Raises UserError for one that is not ignored and no class either."""
        try:
            with h5py.File(self.path) as file:
                values = [_plain(value) for value in np.unique(_mask_in(file, index)).tolist()]
        except UNREADABLE as error:
            raise self._unreadable(index, error) from error
        if len(values) > MANY:
            what = f"the mask of image {index} holds {len(values)} values, as soft edges or a picture do"
            raise UserError(
                f"{self.path}: {what}; give masks of classes, 0 on the background and 1 on the object"
            )
        for value in values:
            of_class = isinstance(value, int) and 0 <= value <= LARGEST
            if of_class or value in self.ignored or math.isnan(value):
                continue
            fix = f"if it marks unknown pixels, add it: --ignore_index {_listed([*self.ignored, value], ' ')}"
            if isinstance(value, float):
                fix = (
                    "give whole numbers: 0 on the background, 1 on the object, -1 (--ignore_index) if unknown"
                )
            wrong = f"the mask of image {index} holds {value}, which is no class from 0 to {LARGEST}"
            raise UserError(f"{self.path}: {wrong}; {fix}")
        return values

    def _without_object(self, held):
        """What is said of masks without any object. held: their values, without NaN."""
        hold = f"hold {_listed(held, ' and ') or 'NaN'} alone"
        hidden = [value for value in held if value > 0]
        if not hidden:
            return f"{hold}, so no pixel is on an object; give masks with 1 on the object"
        rest = [value for value in self.ignored if value not in hidden] or [IGNORED]
        counts = f"{_listed(hidden, ' and ')} {'counts' if len(hidden) == 1 else 'count'} as unknown"
        fix = f"if {_listed(hidden, ' or ')} is the object, add --ignore_index {_listed(rest, ' ')}"
        return f"{hold}, and {counts}; {fix}"


def _mask_in(file, index):
    """The mask [W, H] of an image, as an open file has it. Raises ValueError when it holds no numbers."""
    mask = file[file[file["value/gt"][index, 0]][0, 0]][()]
    if mask.dtype.kind not in "biuf":
        raise ValueError(f"mask {mask.dtype}; numbers are needed")
    return mask


def _plain(value):
    """A number, as an int where it is whole and a float holds it exactly."""
    return int(value) if abs(value) < 2**53 and value == int(value) else value


def _listed(values, between=", "):
    return between.join(map(str, values))


def read_classes(path, images, classes):
    """The class of every image, int64 [images] in 0 to classes - 1, from .npy, .json (a list), or text (one
    index a line).
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            found = read_array(path)
        else:
            text = path.read_text(encoding="utf-8")
            found = np.array(
                json.loads(text) if path.suffix == ".json" else [int(line) for line in text.split()]
            )
    except (OSError, EOFError, ValueError) as error:
        raise UserError(
            f"--class_source {path} cannot be read ({one_line(error)[:120]}); give one class index per image"
        ) from error
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise UserError(f"--class_source {path} does not hold whole numbers; give one class index per image")
    if len(found) != images:
        raise UserError(
            f"--class_source {path} has {len(found)} classes and the segmentation set has {images} images"
        )
    wrong = np.flatnonzero((found < 0) | (found >= classes))
    if len(wrong):
        i = wrong[0]
        raise UserError(
            f"--class_source {path}: image {i} has the class {found[i]}, and the classifier has 0 to {classes - 1}"
        )
    return found.astype(np.int64)
