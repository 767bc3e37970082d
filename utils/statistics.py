"""Read what ablations and grades need: statistics of effects, their images, and the zero-shot classifier."""

from typing import NamedTuple

import numpy as np
import torch

from utils.data.images import load_images, train_set_of
from utils.effects import mean_effects
from utils.runtime.errors import UserError
from utils.runtime.files import digest
from utils.runtime.records import agrees, load_record


class Statistics(NamedTuple):
    """Statistics are those of one layer's effects, as `compute_pcas.py` has computed them."""

    mean: torch.Tensor  # [N, D]        mean effects
    pcas: torch.Tensor  # [N, D]        first components
    thresholds: torch.Tensor  # [N]     the k-th largest centred norms; above, an effect is significant

    def digest(self):
        """Return twelve hex digits of the content."""
        return digest(*self)


def load_statistics(results, dataset, layers, k):
    """Read {layer: Statistics} to the model's device.

    results: `Results` of a loaded model, with the coefficient that they must have been made with.
    dataset, layers, k: in the files' names.

    Raises UserError, with the command, for what is missing or wrong.
    """
    found = {}
    for layer in layers:
        names = {"dataset": dataset, "split": "train", "layer": layer, "k": k}
        norms = results.load("norm", **names)
        pcas = results.load("pca", **names)
        mean = mean_effects(results, **names)
        thresholds = np.ascontiguousarray(norms[:, 0])
        arrays = (torch.from_numpy(array).to(results.loaded.device) for array in (mean, pcas, thresholds))
        found[layer] = Statistics(*arrays)
    return found


def load_training_images(args, results, layers, names, transform):
    """Load the `Images` that the components of some layers are of.

    They lie in --train_data_path, in --data_path, or, for ImageNet-R, where they lay for the components.

    args: the flags dataset, data_path, train_data_path, train_subsample.
    results: `Results` of the folder that has the components.
    names: of the components' files.
    transform: PIL image -> [3, side, side].

    Raises UserError where the components are of other images, or of a single one.
    """
    paths = [results.find("pca", **{**names, "layer": layer}) for layer in layers]
    records = {path: load_record(path) for path in paths}
    dataset = names["dataset"]
    where = args.data_path
    if dataset != args.dataset or where is None:
        where = records[paths[0]].get("data_path", where)
    where = args.train_data_path or where
    if not where:
        raise UserError(f"{paths[0]} does not say where its images lie; add --train_data_path")
    images = load_images(dataset, where, "train", transform, args.train_subsample)
    data = images.record["data"]
    for path, record in records.items():
        if not agrees(record.get("data", data), data):
            what = f"{path} is of other training images than the {len(images)} in {where}"
            fix = "give --train_data_path and --train_subsample as for compute_second_order_neuron_prs.py"
            raise UserError(f"{what}; {fix}")
    if len(images) < 2:
        fix = "give a smaller --train_subsample" if args.train_subsample else "add some"
        what = f"there is {len(images)} training image in {where}"
        raise UserError(f"{what}, and texts are fitted to several; {fix}")
    return images


def load_classifier(results, images):
    """Read the zero-shot classifier [D, classes] of a data set, and find the images' labels, its columns.

    A label is a class, not a position: the images' class folders are looked up among those that the
    classifier was made of. A classifier of the published code does not know them, and must have as many
    classes.

    results: `Results` of a loaded model. images: `Images`.

    Returns the classifier, on the model's device, and labels [images]. Raises UserError, with the classes,
    where a class has no column.
    """
    dataset = train_set_of(images.dataset)
    classifier = results.load("classifier", dataset=dataset)
    path = results.find("classifier", dataset=dataset)
    again = f"make it again with: {results.command('classifier', dataset=dataset)} --overwrite"
    folders = load_record(path).get("folders")
    count = classifier.shape[1]
    if folders is None:
        if count != len(images.folders):
            both = f"{count} classes and the images have {len(images.folders)}"
            raise UserError(f"{path} has {both}; {again}")
        labels = images.labels
    else:
        if len(folders) != count:
            both = f"{count} columns and its record {len(folders)} classes"
            raise UserError(f"{path} has {both}; {again}")
        labels = columns_of(images, folders, path, again)
    return torch.from_numpy(classifier).to(results.loaded.device), labels


def columns_of(images, folders, path, again):
    """Return the column of every image's class [images]. folders: of the classifier's columns."""
    column = {folder: i for i, folder in enumerate(folders)}
    unknown = [images.folders[i] for i in np.unique(images.labels) if images.folders[i] not in column]
    if unknown:
        names = f"{', '.join(unknown[:8])}{', ...' if len(unknown) > 8 else ''}"
        raise UserError(f"{path} has no class for {len(unknown)} folders of the images ({names}); {again}")
    return np.array([column.get(folder, -1) for folder in images.folders])[images.labels]
