"""What later stages read of earlier ones: statistics of a layer's effects, and the zero-shot classifier."""

from typing import NamedTuple

import numpy as np
import torch

from utils.data.images import train_set_of
from utils.effects import mean_effects
from utils.runtime.errors import UserError
from utils.runtime.files import digest
from utils.runtime.records import load_record


class Statistics(NamedTuple):
    """What `compute_pcas.py` found for one layer."""

    mean: torch.Tensor  # [N, D]        mean effects
    pcas: torch.Tensor  # [N, D]        first components
    thresholds: torch.Tensor  # [N]

    def digest(self):
        """Twelve hex digits of the content."""
        return digest(*self)


def load_statistics(results, dataset, layers, k, clip, coefficient):
    """Read {layer: Statistics} to the model's device.

    results, dataset, layers, k: the folder's `Results`, and what is in the files' names.
    clip, coefficient: what they must have been made with.

    Raises UserError, with the command, for what is missing or wrong.
    """
    expected, found = {**clip.expected, "coefficient": coefficient}, {}
    for layer in layers:
        names = {"dataset": dataset, "layer": layer, "k": k}
        norms, pcas = (results.load(kind, clip.vit.sizes, expected, **names) for kind in ("norm", "pca"))
        arrays = (mean_effects(results, clip.vit.sizes, expected, **names), pcas, norms)
        mean, pcas, norms = (torch.from_numpy(array).to(clip.device) for array in arrays)
        found[layer] = Statistics(mean, pcas, norms[:, 0].contiguous())
    return found


def load_classifier(results, clip, images):
    """The zero-shot classifier [D, classes] of a data set, on the model's device, and the images' labels
    [images], its columns.

    A label is a class, not a position: the images' class folders are looked up among those that the
    classifier was made of. A classifier of the published code does not know them, and must have as many
    classes.

    Raises UserError, with the classes, where that cannot be done.
    """
    dataset = train_set_of(images.dataset)
    classifier = results.load(
        "classifier", clip.vit.sizes, {"fingerprint": clip.fingerprint}, dataset=dataset
    )
    path, command = (
        results.find("classifier", dataset=dataset),
        results.command("classifier", dataset=dataset),
    )
    folders, labels = load_record(path).get("folders"), images.labels
    again = f"make it again with: {command} --overwrite"
    if folders is None and classifier.shape[1] != len(images.folders):
        raise UserError(
            f"{path} has {classifier.shape[1]} classes and the images have {len(images.folders)}; {again}"
        )
    if folders is not None:
        if len(folders) != classifier.shape[1]:
            raise UserError(
                f"{path} has {classifier.shape[1]} columns and its record {len(folders)} classes; {again}"
            )
        column = {folder: i for i, folder in enumerate(folders)}
        unknown = [
            images.folders[label] for label in np.unique(labels) if images.folders[label] not in column
        ]
        if unknown:
            names = f"{', '.join(unknown[:8])}{', ...' if len(unknown) > 8 else ''}"
            raise UserError(
                f"{path} has no class for {len(unknown)} folders of the images ({names}); {again}"
            )
        labels = np.array([column.get(folder, -1) for folder in images.folders])[labels]
    return torch.from_numpy(classifier).to(clip.device), labels
