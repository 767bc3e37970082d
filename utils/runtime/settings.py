"""Keep what make_gallery.py was given beside its results: a notebook is told the folder alone."""

import os
from pathlib import Path
from types import SimpleNamespace

from utils.runtime.errors import UserError
from utils.runtime.files import read_json, save_json
from utils.runtime.results import PAIRS, RANDOM

FILE = "make_gallery.json"
# besides these, the training images' data set and root, and the layers
FLAGS = ("model", "pretrained", "split", "held_out", "top_k_pca", "text_descriptions", "descriptions_dir")
FLAGS += ("components", "transform_alpha", "normalise", "coefficient")
UNITS = ("unit_set", "site")  # None for neurons


def save_settings(folder, args, train, layers):
    """Write what the gallery of a folder was made of.

    args: the flags of make_gallery.py.
    train: {"dataset", "data_path", "subsample"} of the training images.
    layers: MLP layers.
    """
    found = {name: getattr(args, name) for name in FLAGS + UNITS} | train | {"layers": layers}
    for name in ("model", "pretrained", "data_path", "text_descriptions", "descriptions_dir"):
        if found[name] and os.path.exists(found[name]):  # so that it can be read from any folder
            found[name] = os.path.abspath(found[name])
    units = found["unit_set"] or ""
    path = units.removeprefix(RANDOM)
    if path != PAIRS and os.path.exists(path):
        found["unit_set"] = units.removesuffix(path) + os.path.abspath(path)
    save_json(Path(folder) / FILE, found)


def load_settings(folder):
    """Return what the gallery of a folder was made of, as a namespace; `layer` is the last of its layers.

    Raises UserError where there is none, or where it is damaged.
    """
    path = Path(folder) / FILE
    fix = "run make_gallery.py with this --output_dir, or give the values one by one"
    try:
        found = read_json(path, "the record of the gallery", fix)
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {FILE}; {fix}") from error
    names = {*FLAGS, "dataset", "data_path", "subsample", "layers"}
    if not isinstance(found, dict) or names - set(found) or not found["layers"]:
        raise UserError(f"{path} does not say all that a gallery is made of; {fix}")
    return SimpleNamespace(**{**dict.fromkeys(UNITS), **found}, layer=found["layers"][-1])
