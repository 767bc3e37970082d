"""Zero-shot segmentation: where the neurons that speak for an image's class fire, and how well that is the object (section 5).

A method gives a map over the patches of an image. It is scaled to [0, 1], enlarged to the size of the mask, and scored.
Letters as in `utils.hooked_vit`; M is the number of MLP layers whose neurons are taken together.
"""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import h5py
import numpy as np
import torch
from open_clip.transform import CenterCropOrPad, ResizeKeepRatio
from PIL import Image
from sklearn.metrics import average_precision_score
from torch.utils.data import Dataset
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from utils.artifacts import load_array, one_line, read_texts, save_array, save_json
from utils.errors import UserError
from utils.hooked_vit import attention_pattern

METHODS = ("second_order", "random", "attention", "rollout")
IGNORED = -1  # mask pixels that count nowhere
BINS = 65536  # thresholds of the precision/recall curve; a power of two, so that a float32 score falls exactly into its bin


class SegmentationSet(Dataset):
    """Images and masks of a MATLAB v7.3 file like gtsegs_ijcv.mat, read one by one.

    `/value/img` [images, 1] refers to uint8 arrays [3, W, H]; `/value/gt` [images, 1] to cells that refer to masks [W, H], which
    are 0 on the background, -1 where nobody knows, anything else on the object.

    Item i is (transformed image [3, side, side], int8 mask [size] of 0, 1 and IGNORED), or the UserError that says what is wrong.

    Parameters
    path: the file, or the folder with gtsegs_ijcv.mat. transform: of the images. mask_transform: see `mask_transform`.
    """

    def __init__(self, path, transform=None, mask_transform=None):
        path = Path(path)
        self.path = path / "gtsegs_ijcv.mat" if path.is_dir() else path
        self.transform, self.mask_transform = transform, mask_transform
        self.reads_images = True  # else item i has nothing in the image's place, when only masks are needed
        if not self.path.is_file():
            raise UserError(f"--dataset_path {self.path}: there is no such file; give gtsegs_ijcv.mat or one of its layout")
        try:
            with h5py.File(self.path) as file:
                shapes = [file[name].shape for name in ("value/img", "value/gt") if h5py.check_ref_dtype(file[name].dtype)]
        except OSError as error:
            raise UserError(f"--dataset_path {self.path} is not a MATLAB v7.3 file ({one_line(error)[:100]})") from error
        except (KeyError, AttributeError):
            shapes = []
        if len(shapes) != 2 or shapes[0] != shapes[1] or shapes[0][1:] != (1,) or not shapes[0][0]:
            raise UserError(
                f"--dataset_path {self.path} is not laid out like gtsegs_ijcv.mat, with references to images in /value/img and "
                "to masks in /value/gt, [images, 1] each"
            )
        self.images = shapes[0][0]

    def __len__(self):
        return self.images

    def fingerprint(self):
        """Twelve hex digits that change when the number of images or the size of the file does."""
        return hashlib.sha256(f"{self.images} {self.path.stat().st_size}".encode()).hexdigest()[:12]

    def __getitem__(self, index):
        try:
            image, mask = self.read(index)
        except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            return UserError(f"{self.path}: image {index} (of 0 to {len(self) - 1}) cannot be read ({one_line(error)[:120]})")
        pixels = self.transform(image) if self.reads_images else torch.empty(0)
        return pixels, torch.from_numpy(np.array(self.mask_transform(mask)).view(np.int8))

    def read(self, index):
        """Image and mask as they are in the file, as PIL images; the mask is 0, 1, and 255 where it is to be ignored."""
        with h5py.File(self.path) as file:  # opened anew, because a handle is of no use in another process
            image = file[file["value/img"][index, 0]][()]  # [3, W, H]
            mask = file[file[file["value/gt"][index, 0]][0, 0]][()]  # [W, H]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.shape[1:] != mask.shape:
            raise ValueError(f"image {image.dtype} {image.shape}, mask {mask.shape}; uint8 (3, W, H) and (W, H) are needed")
        mask = np.where(mask == IGNORED, IGNORED, mask != 0).astype(np.int8).view(np.uint8)
        return Image.fromarray(np.ascontiguousarray(image.transpose(2, 1, 0))), Image.fromarray(np.ascontiguousarray(mask.T))


def mask_transform(transform, geometry, size):
    """What masks go through, always by nearest neighbour.

    transform: open_clip's validation transform of the images. size: (rows, columns) that the scores are taken at.
    geometry: 'paper' squashes the whole mask to `size`, whatever is cropped from the image (the published behaviour);
    'aligned' resizes and crops the mask as the image. What an image is padded with is to be ignored.
    """
    steps = []
    if geometry == "aligned":
        geometric = (Resize, ResizeKeepRatio, CenterCrop, CenterCropOrPad)
        steps = [deepcopy(step) for step in transform.transforms if isinstance(step, geometric)]
        for step in steps:
            step.interpolation, step.fill = InterpolationMode.NEAREST, IGNORED % 256
    return Compose([*steps, Resize(size, InterpolationMode.NEAREST)])


def read_classes(path, images, classes):
    """The class of every image, int64 [images], from a file: .npy, .json (a list), or text (one index a line).

    Raises UserError when it cannot be read, has another number of classes than `images`, or one that is not in 0 to classes - 1.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        elif path.suffix == ".json":
            found = np.array(json.loads(path.read_text()))
        else:
            found = np.array([int(line) for line in read_texts(path)])
    except (OSError, EOFError, ValueError) as error:
        raise UserError(
            f"--class_source {path} cannot be read ({one_line(error)[:120]}); give a class index per image"
        ) from error
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise UserError(f"--class_source {path} holds something else than whole numbers; give one class index per image")
    if len(found) != images:
        raise UserError(f"--class_source {path} has {len(found)} classes and the segmentation set has {images} images")
    wrong = np.flatnonzero((found < 0) | (found >= classes))
    if len(wrong):
        raise UserError(
            f"--class_source {path}: image {wrong[0]} has the class {found[wrong[0]]}, and the classifier has 0 to {classes - 1}"
        )
    return found.astype(np.int64)


def neurons_of_classes(pcas, classifier, top, sign="both", block=256):
    """The neurons whose first components matter most for each class.

    Parameters
    pcas [M N, D]: first components r_n of all layers. classifier [D, classes]. top: neurons per class. sign: 'both' takes the
    largest |<r_n, class>| (the paper's rule), 'positive' the largest <r_n, class>, and of those only the ones above 0.

    Returns
    neurons [classes, top], and their weights [classes, top] in the mean: they sum to 1 (to 0 where no neuron is positive).
    """
    neurons, weights = [], []
    for columns in classifier.split(block, dim=1):
        products = columns.T @ pcas.T  # [classes, M N]
        values, chosen = (products.abs() if sign == "both" else products).topk(top, dim=1)
        taken = torch.ones_like(values) if sign == "both" else (values > 0).to(values.dtype)
        neurons.append(chosen)
        weights.append(taken / taken.sum(dim=1, keepdim=True).clamp_min(1))
    return torch.cat(neurons), torch.cat(weights)


class NeuronMaps:
    """The mean post-GELU activation of chosen neurons, at every patch.

    choose(row, representation [B, D]) gives neurons [B, top], as indices into M N, and their weights [B, top].
    """

    def __init__(self, layers, choose):
        self.activations, self.choose = [f"blocks.{layer}.mlp.post" for layer in layers], choose

    def __call__(self, cache, row, representation):
        neurons, weights = self.choose(row, representation)
        B, N = len(representation), cache[self.activations[0]].shape[-1]
        mean = representation.new_zeros(B, len(self.activations) * N).scatter_(1, neurons, weights)
        layers = zip(self.activations, mean.split(N, dim=1), strict=True)  # weights [B, N] of each layer
        return sum(torch.einsum("btn,bn->bt", cache[name][:, 1:], chosen) for name, chosen in layers)


class NeuronsOfTheClass:
    """Chooses the neurons of each image's class: the one that `classifier` [D, classes] predicts, or of `classes` [images]."""

    def __init__(self, neurons, weights, classifier, classes=None):
        self.neurons, self.weights, self.classifier, self.classes = neurons, weights, classifier, classes

    def __call__(self, row, representation):
        if self.classes is None:
            classes = (representation @ self.classifier).argmax(dim=-1)
        else:
            classes = torch.from_numpy(self.classes[row : row + len(representation)]).to(self.neurons.device)
        return self.neurons[classes], self.weights[classes]


def load_neurons(names, classifiers, clip, vit, images, settings, flags):
    """The `NeuronsOfTheClass` of the settings, from the first components of their layers and the classifier.

    names, classifiers: `Names` of the two folders. images: how many there are. flags: the model's flags, for messages.
    Raises UserError, naming the command, for what is missing or wrong.
    """
    dataset, k, layers, top = (settings[key] for key in ("train_dataset", "top_k_pca", "layers", "top_neurons"))
    check_top(top, len(layers) * vit.N)

    def read(path, script, shape):
        command = f"python {script} --dataset {dataset} {flags} --output_dir {path.parent}"
        return torch.from_numpy(load_array(path, command, shape, fingerprint=clip.fingerprint)).to(clip.device, torch.float32)

    classifier = read(classifiers.classifier(dataset), "compute_classifier_projection.py", (vit.D, None))
    classes = None
    if settings["class_source"] != "predicted":
        classes = read_classes(settings["class_source"], images, classifier.shape[1])
    pcas = [
        read(names.statistics(dataset, layer, f"{k}_pca"), f"compute_pcas.py --mlp_layer {layer} --top_k_pca {k}", (vit.N, vit.D))
        for layer in layers
    ]
    neurons, weights = neurons_of_classes(torch.cat(pcas), classifier, top, settings["neuron_sign"])
    return NeuronsOfTheClass(neurons, weights, classifier, classes)


def check_top(top, total):
    if top > total:
        raise UserError(f"--top_neurons {top}: the --mlp_layers have {total} neurons; give fewer, or more layers")


class RandomNeurons:
    """Chooses `top` of `total` neurons anew for every image; which ones depends on the seed and the image's number alone."""

    def __init__(self, total, top, seed):
        check_top(top, total)
        if seed < 0:
            raise UserError(f"--seed {seed} is negative; give 0 or more")
        self.total, self.top, self.seed = total, top, seed

    def __call__(self, row, representation):
        rows = range(row, row + len(representation))
        chosen = [np.random.default_rng((self.seed, i)).choice(self.total, self.top, replace=False) for i in rows]
        neurons = torch.from_numpy(np.stack(chosen)).to(representation.device)
        return neurons, representation.new_full(neurons.shape, 1 / self.top)


class AttentionMaps:
    """The class token's attention to every patch in the last layer, averaged over heads."""

    def __init__(self, vit):
        self.activations = [f"blocks.{vit.L - 1}.attn.row"]

    def __call__(self, cache, row, representation):
        return cache[self.activations[0]][:, :, 1:].mean(dim=1)


class RolloutMaps:
    """Attention rollout (Abnar and Zuidema, 2020): the class token's row of the product over all layers of (A + 1) / 2, A being
    the attention averaged over heads. Only the row is carried, from the last layer down, so one layer's A exists at a time."""

    def __init__(self, vit):
        self.vit, self.activations = vit, [f"blocks.{l}.ln1.out" for l in range(vit.L)]

    def __call__(self, cache, row, representation):
        x = cache[self.activations[-1]]  # [B, T, d]
        reached = torch.zeros_like(x[:, :, 0])
        reached[:, 0] = 1
        for block, name in zip(reversed(self.vit.blocks), reversed(self.activations), strict=True):
            A = attention_pattern(block.attn, cache[name]).mean(dim=1)  # [B, T, T]
            reached = (reached + torch.einsum("bi,bij->bj", reached, A)) / 2
        return reached[:, 1:]


def patch_maps(vit, method, images, row):
    """One forward pass: images [B, 3, side, side], the first being number `row` -> maps over patches [B, T-1]."""
    with vit.record(*method.activations) as cache:
        representation = vit(images)
    return method(cache, row, representation)


def enlarge(maps, grid, size):
    """Maps over patches [B, T-1] -> [B, *size]: each scaled to [0, 1], then bilinear. One that is constant becomes 0.

    In float64 inside: pixels beyond the outermost patch centres are equal then, and not ranked by their rounding.
    """
    low, high = maps.amin(dim=1, keepdim=True), maps.amax(dim=1, keepdim=True)
    constant = high - low <= 4 * torch.finfo(maps.dtype).eps * torch.maximum(high.abs(), low.abs())  # nothing but rounding
    span = torch.where(constant, 1, high.double() - low)
    scaled = torch.where(constant, 0, (maps.double() - low) / span).unflatten(1, grid)
    return torch.nn.functional.interpolate(scaled[:, None], size=size, mode="bilinear")[:, 0].clamp(0, 1).float()


class Scores:
    """Scores of maps against masks, summed up image by image; what is held does not grow with them.

    Pixels above `thr` are predicted as object. Pixel accuracy and the IoU of both classes are from counts summed over all images;
    a class that is neither there nor predicted has IoU 0. mAP is the mean over images of scikit-learn's average precision of the
    two maps (1 - map, map) together against the one-hot mask; 0 for an image of which every pixel is ignored.
    The precision/recall curve is from a histogram of all pixels' scores: exact, at the thresholds 0, 1/65536, ..., 1.
    """

    def __init__(self, thr):
        self.thr, self.images, self.precision_sum = thr, 0, 0.0
        self.counts = np.zeros((2, 2), np.int64)  # [in the mask, predicted]
        self.histogram = np.zeros((2, BINS + 1), np.int64)  # [in the mask, score]

    def add(self, maps, masks):
        """maps [B, ...], float32 in [0, 1]; masks [B, ...] of 0, 1 and IGNORED, numpy arrays both."""
        for scores, mask in zip(maps, masks, strict=True):
            known = mask != IGNORED
            scores, inside = scores[known], mask[known] == 1
            self.images += 1
            self.counts += np.bincount(2 * inside + (scores > self.thr), minlength=4).reshape(2, 2)
            bins = (scores * BINS).astype(np.int64)
            self.histogram += [np.bincount(bins[~inside], minlength=BINS + 1), np.bincount(bins[inside], minlength=BINS + 1)]
            if len(scores):
                one_hot = np.concatenate([~inside, inside])
                self.precision_sum += average_precision_score(one_hot, np.concatenate([1 - scores, scores]))

    def result(self):
        """The scores in per cent."""
        right = self.counts.diagonal()
        union = self.counts.sum(axis=0) + self.counts.sum(axis=1) - right
        iou = 100 * right / np.maximum(union, 1)
        return {
            "pixel_accuracy": float(100 * right.sum() / max(self.counts.sum(), 1)),
            "mIoU": float(iou.mean()),
            "mAP": float(100 * self.precision_sum / max(self.images, 1)),
            "IoU_background": float(iou[0]),
            "IoU_object": float(iou[1]),
        }

    def precision_recall(self):
        """Precision and recall of score >= threshold, [BINS + 2] each by rising threshold; the last pair is (1, 0), for none."""
        wrong, right = np.cumsum(self.histogram[:, ::-1], axis=1)[:, ::-1]
        found = wrong + right
        precision = np.where(found > 0, right / np.maximum(found, 1), 1.0)
        recall = right / right[0] if right[0] else np.ones(BINS + 1)
        return np.append(precision, 1.0), np.append(recall, 0.0)


def check_settings(settings):
    """Raise UserError for settings that no map can meet."""
    if not 0 <= settings["thr"] < 1:
        raise UserError(f"--thr {settings['thr']} is not met by maps, which go from 0 to 1; give at least 0 and less than 1")


def row_name(settings):
    """What a row of the table is called, in print and in file names: the method and what is not a default."""
    parts = [settings["method"]]
    if "layers" in settings:
        parts += ["-".join(map(str, settings["layers"])), str(settings["top_neurons"])]
    if settings.get("seed"):
        parts.append(f"seed{settings['seed']}")
    if settings.get("neuron_sign") == "positive":
        parts.append("positive")
    if settings.get("class_source", "predicted") != "predicted":
        parts.append(Path(settings["class_source"]).stem)
    if settings["geometry"] == "aligned":
        parts.append("aligned")
    if settings["thr"] != 0.5:
        parts.append(f"thr{settings['thr']:g}")
    if settings["image_size"]:
        parts.append(f"{settings['image_size']}px")
    return "_".join(parts)


def save_scores(path, scores, meta):
    """Write precision and recall beside `path`, and last the scores to `path` itself. Returns (scores, precision, recall)."""
    result = scores.result()
    precision, recall = scores.precision_recall()
    save_array(path.with_name(path.stem + "_precision.npy"), precision, meta)
    save_array(path.with_name(path.stem + "_recall.npy"), recall, meta)
    save_json(path, {**meta, "images": scores.images, "scores": result})
    return result, precision, recall


@contextmanager
def whole_folder(path):
    """A folder that appears as `path`, in place of an earlier one, when all files are in it; None makes none."""
    if path is None:
        yield None
        return
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
