"""Segment images without training (section 5.2), by where the neurons that matter for their class fire.

A method makes maps over the patches of images. They are enlarged to the size of the masks, scaled to [0, 1],
and scored. Letters as in `utils.prs`. M is the number of MLP layers whose neurons are taken together.

The methods below speak of the class token's row of the attention. Where the output averages the patches, that
is the average of their rows. It is weighted as the output weighs the patches in `AttentionMaps` and
`FirstOrderMaps`, and uniform in the others; the two differ only where each patch is normalised before the
average. Where the tokens are pooled by attention, it is the query's row in `AttentionMaps`. The other methods
that look at attention are not defined there, and `choose_method` refuses them.
"""

from dataclasses import fields

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from utils.data.images import train_set_of
from utils.data.segmentation_row import OF_NEURONS, OF_UNITS, Row
from utils.data.segmentation_set import IGNORED, read_classes
from utils.data.splits import Loader
from utils.first_order import FirstOrder
from utils.model.attention import attention_pattern
from utils.prs import fold
from utils.runtime.errors import UserError
from utils.runtime.files import digest, save_json
from utils.runtime.layers import parse_layers
from utils.runtime.passes import walk
from utils.runtime.records import complete, save_array
from utils.statistics import find_k

SCORES = ("pixel_accuracy", "mIoU", "mAP", "IoU_background", "IoU_object")
RANKED = 256  # classes whose neurons are ranked at a time
# thresholds of the precision/recall curve: a power of two, so that each float32 score has its exact bin
BINS = 65536


def neurons_of_classes(pcas, classifier, top, sign="both"):
    """Find the neurons whose first components matter most for each class.

    pcas: [M N, D], first components r_n of all layers.
    classifier: [D, classes].
    top: neurons per class.
    sign: 'both' takes the largest |<r_n, class>| (the paper's rule); 'positive' the largest <r_n, class>, and
        only those above 0.

    Returns neurons [classes, top] and weights [classes, top], which sum to 1 (to 0 where no neuron is
    positive).
    """
    best = []
    for columns in classifier.split(RANKED, dim=1):
        products = columns.T @ pcas.T  # [block, M N]
        best.append((products.abs() if sign == "both" else products).topk(top, dim=1))
    values, neurons = (torch.cat(parts) for parts in zip(*best, strict=True))
    taken = torch.ones_like(values) if sign == "both" else (values > 0).to(values.dtype)
    return neurons, taken / taken.sum(dim=1, keepdim=True).clamp_min(1)


def random_neurons(images, total, top, seed):
    """Draw `top` of `total` neurons for every image, by the seed and the image's index.

    Returns neurons [images, top] and weights [images, top], which sum to 1.
    """
    chosen = [np.random.default_rng((seed, i)).choice(total, top, replace=False) for i in range(images)]
    return torch.from_numpy(np.stack(chosen)), torch.full((images, top), 1 / top)


def row_of_image(rows):
    """Look up each image's row by its index.

    rows: [images], rows of some table.

    Returns a function (representation [B, D], index of the first image) -> [B].
    """
    return lambda representation, image: rows[image : image + len(representation)]


def predicted_class(classifier):
    """Find the class with the largest score.

    classifier: [D, classes].

    Returns a function (representation [B, D], index of the first image) -> [B].
    """
    return lambda representation, image: (representation @ classifier).argmax(dim=-1)


class _Method:
    """A method is a function from images to maps. `run` gives every token a value, and `patches` selects."""

    def __call__(self, pixels, image):
        """Return maps over patches [B, patches].

        pixels: [B, 3, side, side].
        image: index of the first of these images.
        """
        return self.patches(self.run(pixels, image))

    def patches(self, x):
        """Return the patches' part of x [..., T], which begins after the class token, if there is one."""
        return x[..., self.vit.prefix :]


class _RecordedMaps(_Method):
    """A method that needs recorded activations alone is one of these. `of_tokens` makes [B, T] of them."""

    def __init__(self, vit, activations):
        self.vit = vit
        self.activations = activations

    def run(self, pixels, image):
        """Return a value of every token, [B, T]."""
        with self.vit.record(*self.activations) as cache:
            representation = self.vit(pixels)
        return self.of_tokens(cache, representation, image)


class NeuronMaps(_RecordedMaps):
    """NeuronMaps is the mean post-GELU activation of some neurons at every patch; of gated ones, its size.

    vit: HookedViT.
    layers: M MLP layers.
    neurons: [rows, top], as indices into M N.
    weights: [rows, top], of the neurons in the mean.
    row_of: finds each image's row of the two tables, as `row_of_image` or `predicted_class`.
    """

    def __init__(self, vit, layers, neurons, weights, row_of):
        super().__init__(vit, [f"blocks.{layer}.mlp.post" for layer in layers])
        self.neurons = neurons
        self.weights = weights
        self.row_of = row_of

    def of_tokens(self, cache, representation, image):
        """Return the mean over the neurons at every token, [B, T]."""
        rows = self.row_of(representation, image)
        mean = representation.new_zeros(len(rows), len(self.activations) * self.vit.N)
        mean = mean.scatter_(1, self.neurons[rows], self.weights[rows])
        of_layers = mean.split(self.vit.N, dim=1)  # weights [B, N] of each layer
        layers = zip(self.activations, of_layers, strict=True)
        fire = self.vit.firing
        return sum(torch.einsum("btn,bn->bt", fire(cache[name]), weights) for name, weights in layers)


class AttentionMaps(_RecordedMaps):
    """AttentionMaps is the class token's attention to every patch in the last layer, averaged over heads."""

    def __init__(self, vit):
        super().__init__(vit, vit.names_from(vit.last_attention))

    def of_tokens(self, cache, representation, image):
        """Return the attention to every token, [B, T]."""
        self.vit.read_rows(cache)
        return cache[f"blocks.{self.vit.last_attention}.attn.row"].mean(dim=1)


class RolloutMaps(_RecordedMaps):
    """RolloutMaps is attention rollout (Abnar and Zuidema, 2020).

    It is the class token's row of the product over all layers of (A + 1) / 2, with A averaged over heads.
    Only the row is carried, from the last layer down: one layer's A exists at a time.
    """

    def __init__(self, vit):
        super().__init__(vit, [f"blocks.{l}.ln1.out" for l in range(vit.L)])

    def of_tokens(self, cache, representation, image):
        """Return the row of the product, [B, T]."""
        x = cache[self.activations[0]]
        reached = self.vit.token_weights(x).expand(len(x), -1)  # [B, T]
        for block, name in zip(reversed(self.vit.blocks), reversed(self.activations), strict=True):
            A = attention_pattern(block.attn, cache[name]).mean(dim=1)  # [B, T, T]
            reached = (reached + torch.einsum("bi,bij->bj", reached, A)) / 2
        return reached


class FirstOrderMaps(_RecordedMaps):
    """FirstOrderMaps is what all heads take from a patch along the class (TextSpan: Gandelsman et al., 2024).

    vit: HookedViT.
    classifier: [D, classes].
    class_of: finds each image's class, as `row_of_image` or `predicted_class`.
    """

    def __init__(self, vit, classifier, class_of):
        self.first_order = FirstOrder(vit)
        self.classifier = classifier
        self.class_of = class_of
        super().__init__(vit, self.first_order.of_heads)

    def of_tokens(self, cache, representation, image):
        """Return the sum over layers and heads of every token, [B, T]."""
        direction = self.classifier.T[self.class_of(representation, image)]  # [B, D]
        return self.first_order.tokens(cache, representation, direction).sum(dim=(1, 2))


class PairMaps(_RecordedMaps):
    """PairMaps is what some neuron-head pairs take from a patch along the class (beyond the paper).

    It is the sum over pairs (k, n) of a_k[i] p[i, n] <B[k, n], class>, over those of each layer with the
    largest <B[k, n], class>. Weights and class names alone choose them.

    vit: HookedViT.
    row: `Row`, with the layers, and the number of pairs of each.
    classifier, class_of: as in `FirstOrderMaps`.

    Raises UserError where a layer has fewer pairs.
    """

    def __init__(self, vit, row, classifier, class_of):
        names = [f"blocks.{layer}.mlp.post" for layer in row.layers]
        super().__init__(vit, [*vit.names_from(min(row.layers) + 1), *names])
        self.layers = row.layers
        self.class_of = class_of
        total = min(vit.K(layer) * vit.N for layer in row.layers)
        if row.top_neurons > total:
            raise UserError(f"--top_neurons {row.top_neurons}: a layer has {total} pairs; take fewer")
        self.chosen = {}  # pairs [classes, top] of each layer, and their weights
        for layer in row.layers:
            self.chosen[layer] = pairs_of_classes(fold(vit, layer), classifier, row.top_neurons)

    def of_tokens(self, cache, representation, image):
        """Return the sum over the pairs at every token, [B, T]."""
        self.vit.read_rows(cache)
        classes = self.class_of(representation, image)
        each = torch.arange(len(classes), device=classes.device)[:, None]
        found = 0
        for layer, (pairs, weights) in self.chosen.items():
            p = cache[f"blocks.{layer}.mlp.post"].mT  # [B, N, T]
            a = torch.cat([self.vit.row(cache, l) for l in self.vit.later(layer)], dim=1)  # [B, K, T]
            of_image = pairs[classes]
            taken = a[each, of_image // p.shape[1]] * p[each, of_image % p.shape[1]]  # [B, top, T]
            found = found + torch.einsum("bjt,bj->bt", taken, weights[classes])
        return found


def pairs_of_classes(directions, classifier, top):
    """Find the neuron-head pairs of a layer whose directions lie most along each class.

    directions: `Directions` of the layer's neurons.
    classifier: [D, classes].

    Returns pairs [classes, top], as k N + n, and <B[k, n], class> [classes, top].
    """
    found = []
    for columns in classifier.split(16, dim=1):  # K N products for each
        heads = torch.einsum("keo,oc->kec", directions.outputs, columns)
        products = torch.einsum("kne,kec->ckn", directions.values, heads)
        found.append(products.flatten(1).topk(top, dim=1))
    values, pairs = (torch.cat(parts) for parts in zip(*found, strict=True))
    return pairs, values


class _GradientMaps(_Method):
    """A method that needs the gradient of the class score by the attention probabilities is one of these.

    The class score is the cosine with the class. `of_tokens` makes [B, T] of probabilities and gradient.

    vit, classifier, class_of: as in `FirstOrderMaps`.
    layers: whose attention.
    """

    def __init__(self, vit, classifier, class_of, layers):
        self.vit = vit
        self.classifier = classifier
        self.class_of = class_of
        self.layers = layers

    def run(self, pixels, image):
        """Return a value of every token, [B, T]."""
        patterns = []  # A of each layer, [B, H, T, T]

        def keep(A):
            patterns.append(A if A.requires_grad else A.requires_grad_())
            return patterns[-1]

        with torch.inference_mode(False), torch.enable_grad():
            with self.vit.edit({f"blocks.{l}.attn.pattern": keep for l in self.layers}):
                representation = self.vit(pixels.clone())
            direction = self.classifier.T[self.class_of(representation.detach(), image)]
            score = torch.nn.functional.cosine_similarity(representation, direction).sum()
            gradients = torch.autograd.grad(score, patterns)
        return self.of_tokens([A.detach() for A in patterns], gradients)


class GradCAMMaps(_GradientMaps):
    """GradCAMMaps is GradCAM of the last attention.

    It is the class token's attention to every patch, each head weighted by its mean gradient; what speaks
    against the class becomes 0.
    """

    def __init__(self, vit, classifier, class_of):
        super().__init__(vit, classifier, class_of, [vit.L - 1])

    def of_tokens(self, patterns, gradients):
        """Return the weighted attention to every token, [B, T]. patterns, gradients: [B, H, T, T] a layer."""
        weights = self.vit.token_weights(patterns[0][:, 0])
        A = torch.einsum("bhij,i->bhj", patterns[0], weights)  # [B, H, T]
        gradient = torch.einsum("bhij,i->bhj", gradients[0], weights)
        of_heads = self.patches(gradient).mean(dim=-1, keepdim=True)
        return (of_heads * A).mean(dim=1).clamp_min(0)


class CheferMaps(_GradientMaps):
    """CheferMaps is gradient-weighted attention (Chefer, Gur and Wolf, 2021).

    It is the class token's row of the product over all layers of 1 + A', with A' the mean over heads of the
    positive part of gradient * A.
    """

    def __init__(self, vit, classifier, class_of):
        super().__init__(vit, classifier, class_of, range(vit.L))

    def of_tokens(self, patterns, gradients):
        """Return the row of the product, [B, T]. patterns, gradients: [B, H, T, T] of every layer."""
        reached = self.vit.token_weights(patterns[0][:, 0]).expand(len(patterns[0]), -1)  # [B, T]
        for A, gradient in zip(reversed(patterns), reversed(gradients), strict=True):
            positive = (gradient * A).clamp_min(0).mean(dim=1)  # [B, T, T]
            reached = reached + torch.einsum("bi,bij->bj", reached, positive)
        return reached


OF_ATTENTION = {"attention": AttentionMaps, "rollout": RolloutMaps}
TOWARDS_CLASS = {"first_order": FirstOrderMaps, "gradcam": GradCAMMaps, "chefer": CheferMaps}
METHODS = (*OF_UNITS, *OF_ATTENTION, *TOWARDS_CLASS)


def methods_of(vit):
    """Return the methods that are defined for a tower."""
    return METHODS if vit.pooling.has_first_order else ("second_order", "random", "attention")


def check_method(method, vit):
    """Raise UserError for a method that a tower does not have."""
    if method not in methods_of(vit):
        what = f"--method {method} is not for towers that pool their tokens by attention"
        raise UserError(f"{what}; use second_order, random or attention")


def row_of(args, vit, results):
    """Return the `Row` that the flags of compute_segmentation.py ask for.

    results: `Results` of the folder with the first components, which say how many images they are of.

    Raises UserError for a layer that does not exist or has no second-order effects, and as `check_method`.
    """
    named = {field.name: getattr(args, field.name, None) for field in fields(Row)}
    named = {name: value for name, value in named.items() if value is not None}
    check_method(args.method, vit)
    named["train_dataset"] = train_set_of(args.dataset)
    named["ignore_index"] = tuple(args.ignore_index)
    if args.method in OF_UNITS:
        named["layers"] = tuple(parse_layers(args.mlp_layers, vit))
    if args.method == "second_order":
        named["top_k_pca"] = find_k(args.top_k_pca, results, named["train_dataset"], named["layers"])
    return Row(**named)


def choose_method(row, clip, results, classifiers, images):
    """Choose the method that makes the maps of a row.

    row: `Row`.
    clip: the loaded `Clip`.
    results: `Results` of the folder with the first components.
    classifiers: `Results` of the folder with the classifier.
    images: number of images.

    Returns the method, and {"inputs": digest of the results that it uses}, empty where it uses none. Raises
    UserError for missing results, and for a method that the tower does not have.
    """
    vit = clip.vit
    check_method(row.method, vit)
    if row.method in OF_ATTENTION:
        return OF_ATTENTION[row.method](vit), {}
    if row.method in OF_NEURONS:
        _check_number(row, vit)
    if row.method == "random":
        return _maps_of_random_neurons(row, clip, images), {}
    classifier, class_of, used = _load_classes(row, clip, classifiers, images)
    if row.method == "pairs":
        return PairMaps(vit, row, classifier, class_of), {"inputs": digest(*used)}
    if row.method in TOWARDS_CLASS:
        return TOWARDS_CLASS[row.method](vit, classifier, class_of), {"inputs": digest(*used)}
    names = {"dataset": row.train_dataset, "k": row.top_k_pca}
    pcas = np.concatenate([results.load("pca", layer=layer, **names) for layer in row.layers])
    pcas = torch.from_numpy(pcas).to(clip.device, torch.float32)
    neurons, weights = neurons_of_classes(pcas, classifier, row.top_neurons, row.neuron_sign)
    made_of = {"inputs": digest(neurons, weights, *used)}
    return NeuronMaps(vit, row.layers, neurons, weights, class_of), made_of


def _check_number(row, vit):
    """Raise UserError when a row takes more neurons than its layers have."""
    total = len(row.layers) * vit.N
    if row.top_neurons > total:
        what = f"--top_neurons {row.top_neurons}: the --mlp_layers have {total} neurons"
        raise UserError(f"{what}; take fewer neurons, or more layers")


def _maps_of_random_neurons(row, clip, images):
    if row.seed < 0:
        raise UserError(f"--seed {row.seed} is negative; give 0 or more")
    total = len(row.layers) * clip.vit.N
    neurons, weights = random_neurons(images, total, row.top_neurons, row.seed)
    row_of_each = row_of_image(torch.arange(images))
    return NeuronMaps(clip.vit, row.layers, neurons.to(clip.device), weights.to(clip.device), row_of_each)


def _load_classes(row, clip, classifiers, images):
    """Return the classifier [D, classes], the function that finds each image's class, and the arrays used."""
    classifier = classifiers.load("classifier", dataset=row.train_dataset)
    classifier = torch.from_numpy(classifier).to(clip.device, torch.float32)
    if row.class_source == "predicted":
        return classifier, predicted_class(classifier), [classifier]
    classes = read_classes(row.class_source, images, classifier.shape[1])
    classes = torch.from_numpy(classes).to(clip.device)
    return classifier, row_of_image(classes), [classifier, classes]


def enlarge(maps, grid, size):
    """Enlarge each map bilinearly, then scale it to [0, 1] over its pixels. A constant map becomes 0.

    In float64 inside: pixels beyond the outermost patch centres are equal then, and are not ranked by
    rounding.

    maps: over patches, [B, patches].
    grid: (rows, columns) of patches.
    size: (rows, columns) of the result.

    Returns [B, *size].
    """
    maps_2d = maps.double().unflatten(1, grid)[:, None]
    large = torch.nn.functional.interpolate(maps_2d, size=size, mode="bilinear")[:, 0]
    low = large.amin(dim=(1, 2), keepdim=True)
    high = large.amax(dim=(1, 2), keepdim=True)
    rounding = 4 * torch.finfo(maps.dtype).eps * torch.maximum(high.abs(), low.abs())
    constant = high - low <= rounding
    return torch.where(constant, 0, (large - low) / torch.where(constant, 1, high - low)).float()


def walk_enlarged(maps, split, grid):
    """Yield (rows, pixels, masks [B, *size], maps enlarged to the same size) of every batch.

    maps: of all images, over patches, [images, patches].
    split: `Split` of a `SegmentationSet`.
    grid: (rows, columns) of patches.
    """
    load = Loader(split.images, num_workers=split.num_workers).with_targets
    for rows, (pixels, masks) in walk(split.pieces, load, "scores"):
        heats = enlarge(torch.tensor(maps[rows]), grid, split.images.size)
        yield rows, pixels, masks.numpy(), heats.numpy()


class Scores:
    """Scores is a count of how well maps fit masks, added up image by image.

    mask_thr: pixels above it, in [0, 1), are predicted as object.
    thr: in [0, 1); scores below it are raised to it for the precision/recall curve (a clamp of the published
        code).

    Pixel accuracy and the IoU of both classes come from counts over all images; a class that neither exists
    nor is predicted has IoU 0. mAP is the mean over images of scikit-learn's average precision of the two
    maps (1 - map, map) together against the one-hot mask; 0 for an image with ignored pixels only. The
    precision/recall curve comes from a histogram of the scores of all pixels: it is exact at the thresholds
    0, 1/65536, ..., 1.

    Raises UserError for a threshold outside [0, 1).
    """

    def __init__(self, mask_thr=0.5, thr=0.0):
        for flag, value in (("--mask_thr", mask_thr), ("--thr", thr)):
            if not 0 <= value < 1:
                fix = "maps go from 0 to 1: give at least 0 and less than 1"
                raise UserError(f"{flag} {value} is out of range; {fix}")
        self.mask_thr = mask_thr
        self.thr = np.float32(thr)
        self.images = 0
        self.precision_sum = 0.0
        self.counts = np.zeros((2, 2), np.int64)  # [in the mask, predicted]
        self.histogram = np.zeros((2, BINS + 1), np.int64)  # [in the mask, score]

    def add(self, maps, masks):
        """Add images: maps [B, ...], float32 in [0, 1], and masks [B, ...] of 0, 1 and IGNORED, as numpy."""
        for heat, mask in zip(maps, masks, strict=True):
            known = mask != IGNORED
            self.add_image(heat[known], mask[known] == 1)

    def add_image(self, scores, inside):
        """Add the known pixels of an image. scores: float32 in [0, 1]. inside: whether the mask has them."""
        self.images += 1
        self.counts += np.bincount(2 * inside + (scores > self.mask_thr), minlength=4).reshape(2, 2)
        bins = (np.maximum(scores, self.thr) * BINS).astype(np.int64)
        self.histogram += [np.bincount(bins[part], minlength=BINS + 1) for part in (~inside, inside)]
        if len(scores):
            one_hot = np.concatenate([~inside, inside])
            both = np.concatenate([1 - scores, scores])
            self.precision_sum += average_precision_score(one_hot, both)

    def result(self):
        """Return the scores in per cent, {name: score}."""
        right = self.counts.diagonal()
        union = self.counts.sum(axis=0) + self.counts.sum(axis=1) - right
        iou = 100 * right / np.maximum(union, 1)
        accuracy = 100 * right.sum() / max(self.counts.sum(), 1)
        mAP = 100 * self.precision_sum / max(self.images, 1)
        return dict(zip(SCORES, map(float, (accuracy, iou.mean(), mAP, *iou)), strict=True))

    def precision_recall(self):
        """Return precision and recall of score >= threshold, [BINS + 2] each, by rising threshold.

        The last entry is (1, 0), for no pixel.
        """
        wrong, right = np.cumsum(self.histogram[:, ::-1], axis=1)[:, ::-1]
        found = wrong + right
        precision = np.where(found > 0, right / np.maximum(found, 1), 1.0)
        recall = right / right[0] if right[0] else np.ones(BINS + 1)
        return np.append(precision, 1.0), np.append(recall, 0.0)


def save_scores(path, scores, record):
    """Write precision and recall beside `path`, then the scores to `path`.

    Returns scores, precision and recall.
    """
    result = scores.result()
    precision, recall = scores.precision_recall()
    save_array(path.with_name(f"{path.stem}_precision.npy"), precision, record)
    save_array(path.with_name(f"{path.stem}_recall.npy"), recall, record)
    save_json(path, {**complete(record), "images": scores.images, "scores": result})
    return result, precision, recall
