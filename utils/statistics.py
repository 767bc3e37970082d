"""Read what ablations and grades need: statistics of effects, their images, and the zero-shot classifier."""

from typing import NamedTuple

import numpy as np
import torch

from utils.data.images import IMAGENET, load_images, require_classes, train_set_of
from utils.effects import mean_effects
from utils.runtime.errors import UserError
from utils.runtime.files import digest
from utils.runtime.layers import stored_layers
from utils.runtime.records import agrees, load_record

TOP_K = 100  # the paper's number of a neuron's largest effects, behind its component
OF_IMAGES = ("image_norms", "bias", "coefficients", "merged")  # results with a row for each training image


class Statistics(NamedTuple):
    """Statistics are those of one layer's effects, as `compute_pcas.py` has computed them."""

    mean: torch.Tensor  # [N, D]        mean effects
    pcas: torch.Tensor  # [N, D]        first components
    thresholds: torch.Tensor  # [N]     the k-th largest centred norms; above, an effect is significant

    def digest(self):
        """Return twelve hex digits of the content."""
        return digest(*self)


def choose_k(given, dataset, images):
    """Return how many of a neuron's effects its component is of.

    Where it is not given, this is a tenth of the training images, and at most 100; the number is printed. On
    ImageNet it is 100, as published.

    given: --top_k_pca, or None.
    dataset: of the training images.
    images: {layer: how many training images there are}.

    Raises UserError where one number does not fit all layers.
    """
    if given or dataset in IMAGENET:
        return given or TOP_K
    tenths = {max(1, min(TOP_K, count // 10)) for count in images.values()}
    if len(tenths) > 1:
        each = ", ".join(f"layer {layer} of {count}" for layer, count in images.items())
        raise UserError(f"the effects are of different numbers of training images ({each}); give --top_k_pca")
    [k] = tenths
    print(f"--top_k_pca {k}: the smaller of {TOP_K} and a tenth of {min(images.values())} training images")
    return k


def find_k(given, results, dataset, layers):
    """Return `choose_k` for the components of some layers; the results say how many images they are of.

    results: `Results` of the folder that has the components.
    layers: MLP layers, or ["all"].

    Raises UserError, with the command, where the number of images is not known.
    """
    known = given or dataset in IMAGENET
    return choose_k(given, dataset, {} if known else count_images(results, dataset, layers))


def count_images(results, dataset, layers):
    """Return how many training images the effects of some layers are of, {layer: count}.

    A layer without results is left out. Raises UserError, with the command, where none has any.
    """
    layers = stored_layers(results, OF_IMAGES, list(map(str, layers)), dataset=dataset, split="train")
    found = {}
    for layer in layers:
        names = {"dataset": dataset, "layer": layer}
        stored = [kind for kind in OF_IMAGES if results.find(kind, **names).is_file()]
        if stored:
            found[layer] = len(results.load(stored[0], mmap=True, **names))
    if not found:
        path = results.find("image_norms", dataset=dataset, layer=layers[0])
        command = results.command("image_norms", dataset=dataset, layer=layers)
        what = f"{path} is missing, and without it --top_k_pca is not known"
        raise UserError(f"{what}; make it with: {command}")
    return found


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

    args: the flags dataset, data_path, held_out, train_data_path, train_subsample.
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
    options = {"subsample": args.train_subsample, "held_out": args.held_out}
    images = load_images(dataset, where, "train", transform, **options)
    data = images.record["data"]
    for path, record in records.items():
        share = record.get("held_out", images.held_out)
        if share != images.held_out:
            what = f"{path} is of pictures of which {100 * share:g} % are held out"
            raise UserError(f"{what}; add --held_out {share:g}")
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

    Returns the classifier, on the model's device, and labels [images]. Raises UserError where the images have
    no classes, and, with the classes, where a class has no column.
    """
    require_classes(images.dataset)
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
