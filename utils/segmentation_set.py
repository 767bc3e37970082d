"""Images and masks of ImageNet-Segmentation, and the class of every image."""

import hashlib
import json
from copy import deepcopy
from pathlib import Path

import h5py
import numpy as np
import torch
from open_clip.transform import CenterCropOrPad, ResizeKeepRatio
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from utils.runtime.errors import UserError
from utils.runtime.files import one_line, read_array

IGNORED = -1  # mask pixels that do not count
IGNORED_VALUES = (-1, 255)  # what says so in a file


class SegmentationSet(Dataset):
    """Images and masks of a MATLAB v7.3 file like gtsegs_ijcv.mat.

    Item i is read when it is asked for: (transformed image [3, side, side], int8 mask [size] of 0, 1 and IGNORED), or the
    UserError that says what is wrong. In the file, `/value/img` [images, 1] refers to uint8 arrays [3, W, H], and `/value/gt`
    [images, 1] to cells that refer to masks [W, H]: 0 on the background, -1 or 255 where it is unknown, else on the object.

    path: the file, or the folder with gtsegs_ijcv.mat.
    transform: open_clip's validation transform of the images.
    geometry: of masks: 'paper' squashes the whole mask to `size`, whatever is cropped from the image (the published behaviour);
        'aligned' resizes and crops the mask as the image, and ignores what the image is padded with.
    size: (rows, columns) of the masks.
    ignored: values of mask pixels that do not count.
    images: False leaves the images' place empty, when only masks are needed.

    Attribute: record, what results say about the set: its name, and a fingerprint of the number of images and the file's size.
    """

    def __init__(self, path, transform, geometry="paper", size=(224, 224), ignored=IGNORED_VALUES, images=True):
        path = Path(path)
        self.path = path / "gtsegs_ijcv.mat" if path.is_dir() else path
        self.transform, self.ignored = transform if images else None, tuple(ignored)
        geometric = (Resize, ResizeKeepRatio, CenterCrop, CenterCropOrPad)
        steps = [deepcopy(step) for step in transform.transforms if geometry == "aligned" and isinstance(step, geometric)]
        for step in steps:
            step.interpolation, step.fill = InterpolationMode.NEAREST, IGNORED % 256
        self.mask_transform = Compose([*steps, Resize(size, InterpolationMode.NEAREST)])
        if not self.path.is_file():
            raise UserError(f"--data_path {self.path}: there is no such file; give gtsegs_ijcv.mat or one with its layout")
        try:
            with h5py.File(self.path) as file:
                shapes = [file[name].shape for name in ("value/img", "value/gt") if h5py.check_ref_dtype(file[name].dtype)]
        except OSError as error:
            raise UserError(f"--data_path {self.path} is not a MATLAB v7.3 file ({one_line(error)[:100]})") from error
        except (KeyError, AttributeError):
            shapes = []
        if len(shapes) != 2 or shapes[0] != shapes[1] or shapes[0][1:] != (1,) or not shapes[0][0]:
            layout = "references to images in /value/img and to masks in /value/gt, [images, 1] each"
            raise UserError(f"--data_path {self.path} does not have the layout of gtsegs_ijcv.mat: {layout}")
        self.images = shapes[0][0]
        data = hashlib.sha256(f"{self.images} {self.path.stat().st_size}".encode()).hexdigest()[:12]
        self.record = {"dataset": self.path.stem, "data": data}

    def __len__(self):
        return self.images

    def __getitem__(self, index):
        try:
            with h5py.File(self.path) as file:  # opened for each item: another process could not use the handle
                image = file[file["value/img"][index, 0]][()]  # [3, W, H]
                mask = file[file[file["value/gt"][index, 0]][0, 0]][()]  # [W, H]
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape != (3, *mask.shape):
                raise ValueError(f"image {image.dtype} {image.shape}, mask {mask.shape}; uint8 (3, W, H) and (W, H) are needed")
        except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            return UserError(f"{self.path}: image {index} (of 0 to {len(self) - 1}) cannot be read ({one_line(error)[:120]})")
        mask = np.where(np.isin(mask, self.ignored), IGNORED, mask != 0).astype(np.int8).view(np.uint8)
        image, mask = (Image.fromarray(np.ascontiguousarray(array.T)) for array in (image, mask))
        pixels = self.transform(image) if self.transform else torch.empty(0)
        return pixels, torch.from_numpy(np.array(self.mask_transform(mask)).view(np.int8))


def read_classes(path, images, classes):
    """The class of every image, int64 [images] in 0 to classes - 1, from .npy, .json (a list), or text (one index a line)."""
    path = Path(path)
    try:
        if path.suffix == ".npy":
            found = read_array(path)
        else:
            text = path.read_text(encoding="utf-8")
            found = np.array(json.loads(text) if path.suffix == ".json" else [int(line) for line in text.split()])
    except (OSError, EOFError, ValueError) as error:
        raise UserError(
            f"--class_source {path} cannot be read ({one_line(error)[:120]}); give one class index per image"
        ) from error
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise UserError(f"--class_source {path} does not hold whole numbers; give one class index per image")
    if len(found) != images:
        raise UserError(f"--class_source {path} has {len(found)} classes and the segmentation set has {images} images")
    wrong = np.flatnonzero((found < 0) | (found >= classes))
    if len(wrong):
        i = wrong[0]
        raise UserError(f"--class_source {path}: image {i} has the class {found[i]}, and the classifier has 0 to {classes - 1}")
    return found.astype(np.int64)
