"""Zero-shot segmentation: where the neurons that speak for an image's class fire, and how well that is the object (section 5.2).

A method gives a map over the patches of an image. It is scaled to [0, 1], enlarged to the size of the mask, and scored.
Letters as in `utils.prs`; M is the number of MLP layers whose neurons are taken together.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from utils.hooked_vit import attention_pattern
from utils.runtime.errors import UserError
from utils.runtime.files import digest, save_json
from utils.runtime.results import complete, save_array
from utils.segmentation_set import IGNORED, read_classes

METHODS = ("second_order", "random", "attention", "rollout")
BINS = 65536  # thresholds of the precision/recall curve; a power of two, so that a float32 score falls exactly into its bin


def neurons_of_classes(pcas, classifier, top, sign="both", block=256):
    """The neurons whose first components matter most for each class.

    pcas: [M N, D], first components r_n of all layers.
    classifier: [D, classes].
    top: neurons per class.
    sign: 'both' takes the largest |<r_n, class>| (the paper's rule), 'positive' the largest <r_n, class>, and only those above 0.
    block: classes at a time.

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


class RandomNeurons:
    """Chooses `top` of `total` neurons for every image; which ones depends on the seed and the image's number alone."""

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

    Raises UserError for a `thr` outside [0, 1).
    """

    def __init__(self, thr):
        if not 0 <= thr < 1:
            raise UserError(f"--thr {thr} cannot be used: maps go from 0 to 1; give at least 0 and less than 1")
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


def check_top(top, total):
    """Raise UserError for more neurons than there are."""
    if top > total:
        raise UserError(f"--top_neurons {top}: the --mlp_layers have {total} neurons; give fewer, or more layers")


def choose_method(settings, clip, results, classifiers, images):
    """What makes the maps, and a digest of the results that it was made from ("" for none).

    settings: method, and for neurons layers, top_neurons; for random ones seed; for those of the class neuron_sign, class_source,
        train_dataset, top_k_pca.
    clip: `Clip`.
    results, classifiers: `Results` of the folders with the first components and with the classifier.
    images: how many there are.

    Raises UserError, with the command, for what is missing or wrong.
    """
    vit, method = clip.vit, settings["method"]
    if method in ("attention", "rollout"):
        return {"attention": AttentionMaps, "rollout": RolloutMaps}[method](vit), ""
    layers, top = settings["layers"], settings["top_neurons"]
    if method == "random":
        return NeuronMaps(layers, RandomNeurons(len(layers) * vit.N, top, settings["seed"])), ""
    check_top(top, len(layers) * vit.N)
    dataset, expected = settings["train_dataset"], {"fingerprint": clip.fingerprint}

    def read(results, kind, **names):
        array = results.load(kind, vit.sizes, expected, dataset=dataset, **names)
        return torch.from_numpy(array).to(clip.device, torch.float32)

    classifier = read(classifiers, "classifier")
    classes = None
    if settings["class_source"] != "predicted":
        classes = read_classes(settings["class_source"], images, classifier.shape[1])
    pcas = torch.cat([read(results, "pca", layer=layer, k=settings["top_k_pca"]) for layer in layers])
    neurons, weights = neurons_of_classes(pcas, classifier, top, settings["neuron_sign"])
    inputs = digest(neurons, weights, classifier, *([] if classes is None else [classes]))
    return NeuronMaps(layers, NeuronsOfTheClass(neurons, weights, classifier, classes)), inputs


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


def save_scores(path, scores, record):
    """Write precision and recall beside `path`, and last the scores to `path` itself. Returns (scores, precision, recall)."""
    result = scores.result()
    precision, recall = scores.precision_recall()
    save_array(path.with_name(path.stem + "_precision.npy"), precision, record)
    save_array(path.with_name(path.stem + "_recall.npy"), recall, record)
    save_json(path, {**complete(record), "images": scores.images, "scores": result})
    return result, precision, recall
