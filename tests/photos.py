"""Class-folder trees of real photographs: crops of the two photos that scikit-learn ships."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SYNSETS = ("n01440764", "n01443537", "n01484850", "n01491361")  # the first classes of ImageNet


def write_photos(root, splits=("train", "val"), classes=SYNSETS, per_class=8, side=256, seed=0):
    """Write ROOT/SPLIT/CLASS/0000.JPEG, ...: crops of random place, size and mirroring, `side` pixels on the shorter edge."""
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
