"""Class-folder trees of real photographs: crops of the two photos that scikit-learn ships."""

from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SIZES = ((40, 40), (64, 40), (40, 72), (32, 32), (33, 47))  # rows, columns of `discs`
SYNSETS = ("n01440764", "n01443537", "n01484850", "n01491361")  # the first classes of ImageNet


def write_photos(root, splits=("train", "val"), classes=SYNSETS, per_class=8, side=256, seed=0):
    """Write ROOT/SPLIT/CLASS/0000.JPEG, ...: crops of random place, size and mirroring, `side` pixels on the
    shorter edge.
    """
    photos = load_sample_images().images  # two of [427, 640, 3]
    rng = np.random.default_rng(seed)
    for split in splits:
        for c, name in enumerate(classes):
            folder = Path(root) / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(per_class):
                photo = photos[c % 2]
                size = int(rng.integers(120, 420))
                top, left = int(rng.integers(0, 427 - size + 1)), int(rng.integers(0, 640 - size + 1))
                crop = photo[top : top + size, left : left + size]
                if rng.random() < 0.5:
                    crop = crop[:, ::-1]
                Image.fromarray(crop).resize((side, side + 16 * (i % 3)), Image.BICUBIC).save(
                    folder / f"{i:04d}.JPEG", quality=90
                )
    return Path(root)


def write_mat(path, images, masks):
    """Images [rows, columns, 3] and masks [rows, columns] in the layout of gtsegs_ijcv.mat, which is
    transposed.
    """
    with h5py.File(path, "w") as file:
        img = file.create_dataset("value/img", (len(images), 1), dtype=h5py.ref_dtype)
        gt = file.create_dataset("value/gt", (len(images), 1), dtype=h5py.ref_dtype)
        for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
            img[i, 0] = file.create_dataset(f"refs/img{i}", data=image.transpose(2, 1, 0)).ref
            cell = file.create_dataset(f"refs/cell{i}", (1, 1), dtype=h5py.ref_dtype)
            cell[0, 0] = file.create_dataset(f"refs/mask{i}", data=mask.T).ref
            gt[i, 0] = cell.ref
    return path


def discs(n, seed=0):
    """Images of several aspect ratios with a disc each, and its mask; -1 on some of its rim, and one without
    any object.
    """
    rng = np.random.default_rng(seed)
    images, masks = [], []
    for i in range(n):
        rows, columns = SIZES[i % len(SIZES)]
        y, x = np.mgrid[:rows, :columns]
        distance = np.hypot(y - rng.uniform(0.3, 0.7) * rows, x - rng.uniform(0.3, 0.7) * columns)
        radius = 0 if i == 3 else rng.uniform(6, 14)
        mask = (distance < radius).astype(np.int16)
        image = np.where(
            mask[..., None] == 1, rng.integers(150, 255, 3), rng.integers(0, 100, 3)
        ) + rng.integers(-20, 20, (rows, columns, 3))
        mask[(distance >= radius) & (distance < radius + 1.5)] = -1
        images.append(image.clip(0, 255).astype(np.uint8))
        masks.append(mask)
    return images, masks
