"""Zero-shot segmentation: where the neurons that matter for an image's class fire, and how well it fits the
object (section 5.2).

A method makes maps over the patches of images. They are enlarged to the size of the masks, scaled to [0, 1],
and scored. Letters as in `utils.prs`. M is the number of MLP layers whose neurons are taken together.

The methods below speak of the class token's row of the attention. Where the output averages the patches, that
is the average of their rows. It is weighted as the output weighs the patches in `AttentionMaps` and
`FirstOrderMaps`, and uniform in the others; the two differ only where each patch is normalised before the
average. Where the tokens are pooled by attention, it is the query's row in `AttentionMaps`. The other methods
that look at attention are not defined there, and `choose_method` refuses them.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from utils.data.images import train_set_of
from utils.data.segmentation_set import IGNORED, IGNORED_VALUES, read_classes
from utils.first_order import FirstOrder
from utils.model.attention import attention_pattern
from utils.runtime.errors import UserError
from utils.runtime.files import digest, save_json
from utils.runtime.records import complete, save_array

SCORES = ("pixel_accuracy", "mIoU", "mAP", "IoU_background", "IoU_object")
BLOCK = 256  # classes whose neurons are ranked at a time
# thresholds of the precision/recall curve: a power of two, so that each float32 score has its exact bin
BINS = 65536


def neurons_of_classes(pcas, classifier, top, sign="both"):
    """The neurons whose first components matter most for each class.

    pcas: [M N, D], first components r_n of all layers.
    classifier: [D, classes].
    top: neurons per class.
    sign: 'both' takes the largest |<r_n, class>| (the paper's rule); 'positive' the largest <r_n, class>, and
        only those above 0.

    Returns neurons [classes, top] and weights [classes, top], which sum to 1 (to 0 where no neuron is
    positive).
    """
    products = (columns.T @ pcas.T for columns in classifier.split(BLOCK, dim=1))  # each [block, M N]
    best = [(block.abs() if sign == "both" else block).topk(top, dim=1) for block in products]
    values, neurons = (torch.cat(parts) for parts in zip(*best, strict=True))
    taken = torch.ones_like(values) if sign == "both" else (values > 0).to(values.dtype)
    return neurons, taken / taken.sum(dim=1, keepdim=True).clamp_min(1)


def random_neurons(images, total, top, seed):
    """`top` of `total` neurons for every image, by seed and number of the image: the same two as above,
    [images, top].
    """
    chosen = [np.random.default_rng((seed, i)).choice(total, top, replace=False) for i in range(images)]
    return torch.from_numpy(np.stack(chosen)), torch.full((images, top), 1 / top)


def given(rows):
    """The rows [images] of some table that belong to the images, as a function (representation [B, D], first
    image) -> [B].
    """
    return lambda representation, image: rows[image : image + len(representation)]


def predicted(classifier):
    """The same: the class that the model predicts. classifier: [D, classes]."""
    return lambda representation, image: (representation @ classifier).argmax(dim=-1)


class _Method:
    """What all methods share: `run` gives every token a value, [B, T], and a map has those of the patches."""

    def __call__(self, pixels, image):
        """Maps over patches [B, patches] of images [B, 3, side, side]. image: number of the first of them."""
        return self.patches(self.run(pixels, image))

    def patches(self, x):
        """The patches' part of x [..., T], which begins after the class token where the tower has one."""
        return x[..., self.vit.prefix :]


class _RecordedMaps(_Method):
    """A method that needs recorded activations alone. `of_tokens` makes [B, T] of them."""

    def __init__(self, vit, activations):
        self.vit, self.activations = vit, activations

    def run(self, pixels, image):
        """As `_Method`."""
        with self.vit.record(*self.activations) as cache:
            representation = self.vit(pixels)
        return self.of_tokens(cache, representation, image)


class NeuronMaps(_RecordedMaps):
    """Method: the mean post-GELU activation of some neurons at every patch.

    vit, layers: HookedViT; M MLP layers.
    neurons: [rows, top], as indices into M N.
    weights: [rows, top], of the neurons in the mean.
    row_of: each image's row of the above, as `given` or `predicted` says.
    """

    def __init__(self, vit, layers, neurons, weights, row_of):
        super().__init__(vit, [f"blocks.{layer}.mlp.post" for layer in layers])
        self.neurons, self.weights, self.row_of = neurons, weights, row_of

    def of_tokens(self, cache, representation, image):
        rows = self.row_of(representation, image)
        mean = representation.new_zeros(len(rows), len(self.activations) * self.vit.N)
        mean = mean.scatter_(1, self.neurons[rows], self.weights[rows])
        layers = zip(
            self.activations, mean.split(self.vit.N, dim=1), strict=True
        )  # weights [B, N] of each layer
        return sum(torch.einsum("btn,bn->bt", cache[name], weights) for name, weights in layers)


class AttentionMaps(_RecordedMaps):
    """Method: the class token's attention to every patch in the last layer, averaged over heads."""

    def __init__(self, vit):
        super().__init__(vit, vit.path(vit.last_attention))

    def of_tokens(self, cache, representation, image):
        self.vit.read_rows(cache)
        return cache[f"blocks.{self.vit.last_attention}.attn.row"].mean(dim=1)


class RolloutMaps(_RecordedMaps):
    """Method: attention rollout (Abnar and Zuidema, 2020), the class token's row of the product over all
    layers of (A + 1) / 2, with A averaged over heads. Only the row is carried, from the last layer down: one
    layer's A exists at a time."""

    def __init__(self, vit):
        super().__init__(vit, [f"blocks.{l}.ln1.out" for l in range(vit.L)])

    def of_tokens(self, cache, representation, image):
        x = cache[self.activations[0]]
        reached = self.vit.token_weights(x).expand(len(x), -1)  # [B, T]
        for block, name in zip(reversed(self.vit.blocks), reversed(self.activations), strict=True):
            A = attention_pattern(block.attn, cache[name]).mean(dim=1)  # [B, T, T]
            reached = (reached + torch.einsum("bi,bij->bj", reached, A)) / 2
        return reached


class FirstOrderMaps(_RecordedMaps):
    """Method: what all heads take from a patch along the class (TextSpan: Gandelsman, Efros and Steinhardt,
    2024).

    vit, classifier, row_of: HookedViT; [D, classes]; each image's class, as `given` or `predicted` says.
    """

    def __init__(self, vit, classifier, row_of):
        self.first_order, self.classifier, self.row_of = FirstOrder(vit), classifier, row_of
        super().__init__(vit, self.first_order.of_heads)

    def of_tokens(self, cache, representation, image):
        direction = self.classifier.T[self.row_of(representation, image)]  # [B, D]
        return self.first_order.tokens(cache, representation, direction).sum(dim=(1, 2))


class _GradientMaps(_Method):
    """A method that needs the gradient of the class score (the cosine with the class) by the attention
    probabilities. `of_tokens` makes [B, T] of both.

    vit, classifier, row_of: as in `FirstOrderMaps`.
    layers: whose attention.
    """

    def __init__(self, vit, classifier, row_of, layers):
        self.vit, self.classifier, self.row_of, self.layers = vit, classifier, row_of, layers

    def run(self, pixels, image):
        """As `_Method`."""
        patterns = []  # A of each layer, [B, H, T, T]

        def keep(A):
            patterns.append(A if A.requires_grad else A.requires_grad_())
            return patterns[-1]

        with torch.inference_mode(False), torch.enable_grad():
            with self.vit.edit({f"blocks.{l}.attn.pattern": keep for l in self.layers}):
                representation = self.vit(pixels.clone())
            direction = self.classifier.T[self.row_of(representation.detach(), image)]
            score = torch.nn.functional.cosine_similarity(representation, direction).sum()
            gradients = torch.autograd.grad(score, patterns)
        return self.of_tokens([A.detach() for A in patterns], gradients)


class GradCAMMaps(_GradientMaps):
    """Method: GradCAM of the last attention: the class token's attention to every patch, each head weighted
    by its mean gradient; what speaks against the class becomes 0."""

    def __init__(self, vit, classifier, row_of):
        super().__init__(vit, classifier, row_of, [vit.L - 1])

    def of_tokens(self, patterns, gradients):
        weights = self.vit.token_weights(patterns[0][:, 0])
        A = torch.einsum("bhij,i->bhj", patterns[0], weights)  # [B, H, T]
        gradient = torch.einsum("bhij,i->bhj", gradients[0], weights)
        of_heads = self.patches(gradient).mean(dim=-1, keepdim=True)
        return (of_heads * A).mean(dim=1).clamp_min(0)


class CheferMaps(_GradientMaps):
    """Method: gradient-weighted attention (Chefer, Gur and Wolf, 2021), the class token's row of the product
    over all layers of 1 + A', with A' the mean over heads of the positive part of gradient * A."""

    def __init__(self, vit, classifier, row_of):
        super().__init__(vit, classifier, row_of, range(vit.L))

    def of_tokens(self, patterns, gradients):
        reached = self.vit.token_weights(patterns[0][:, 0]).expand(len(patterns[0]), -1)  # [B, T]
        for A, gradient in zip(reversed(patterns), reversed(gradients), strict=True):
            reached = reached + torch.einsum("bi,bij->bj", reached, (gradient * A).clamp_min(0).mean(dim=1))
        return reached


TOWARDS_CLASS = {"first_order": FirstOrderMaps, "gradcam": GradCAMMaps, "chefer": CheferMaps}
METHODS = ("second_order", "random", "attention", "rollout", *TOWARDS_CLASS)


def settings_of(args, layers):
    """What maps and scores depend on, for all methods and for this one. args: of compute_segmentation.py.
    layers: MLP layers.
    """
    settings = {
        name: getattr(args, name)
        for name in ("method", "geometry", "image_size", "mask_thr", "thr", "ignore_index")
    }
    if args.method in ("second_order", "random"):
        settings |= {"layers": layers, "top_neurons": args.top_neurons}
    if args.method == "second_order" or args.method in TOWARDS_CLASS:
        settings["train_dataset"] = train_set_of(args.dataset)
    own = {"second_order": ("neuron_sign", "class_source", "top_k_pca"), "random": ("seed",)}
    own |= dict.fromkeys(TOWARDS_CLASS, ("class_source",))
    return settings | {name: getattr(args, name) for name in own.get(args.method, ())}


def choose_method(settings, clip, results, classifiers, images):
    """The method that makes the maps, and {"inputs": digest of the results it uses}. Raises UserError for
    missing results.

    settings: as compute_segmentation.py records them.
    clip: the loaded `Clip`.
    results, classifiers: `Results` of the folders with the first components and with the classifier.
    images: number of images.
    """
    vit, name = clip.vit, settings["method"]
    if vit.pooling == "attention" and name not in ("second_order", "random", "attention"):
        raise UserError(
            f"--method {name} is not for towers that pool their tokens by attention; use second_order, random or attention"
        )
    if name in ("attention", "rollout"):
        return {"attention": AttentionMaps, "rollout": RolloutMaps}[name](vit), {}
    layers, top = settings.get("layers", ()), settings.get("top_neurons", 0)
    if top > (total := len(layers) * vit.N):
        raise UserError(
            f"--top_neurons {top}: the --mlp_layers have {total} neurons; take fewer neurons, or more layers"
        )
    if name == "random":
        if settings["seed"] < 0:
            raise UserError(f"--seed {settings['seed']} is negative; give 0 or more")
        neurons, weights = (
            table.to(clip.device) for table in random_neurons(images, total, top, settings["seed"])
        )
        return NeuronMaps(vit, layers, neurons, weights, row_of=given(torch.arange(images))), {}
    read = {
        "sizes": vit.sizes,
        "expected": {"fingerprint": clip.fingerprint},
        "dataset": settings["train_dataset"],
    }
    classifier = torch.from_numpy(classifiers.load("classifier", **read)).to(clip.device, torch.float32)
    row_of, used = predicted(classifier), [classifier]
    if settings["class_source"] != "predicted":
        rows = torch.from_numpy(read_classes(settings["class_source"], images, classifier.shape[1])).to(
            clip.device
        )
        row_of, used = given(rows), [classifier, rows]
    if name in TOWARDS_CLASS:
        return TOWARDS_CLASS[name](vit, classifier, row_of), {"inputs": digest(*used)}
    read["expected"] = clip.expected
    pcas = np.concatenate(
        [results.load("pca", layer=layer, k=settings["top_k_pca"], **read) for layer in layers]
    )
    pcas = torch.from_numpy(pcas).to(clip.device, torch.float32)
    neurons, weights = neurons_of_classes(pcas, classifier, top, settings["neuron_sign"])
    return NeuronMaps(vit, layers, neurons, weights, row_of=row_of), {
        "inputs": digest(neurons, weights, *used)
    }


def enlarge(maps, grid, size):
    """Enlarge each map bilinearly, then scale it to [0, 1] over its pixels: maps over patches [B, patches] ->
    [B, *size]. A constant map becomes 0.

    In float64 inside: pixels beyond the outermost patch centres are equal then, and are not ranked by
        rounding.
    """
    large = torch.nn.functional.interpolate(
        maps.double().unflatten(1, grid)[:, None], size=size, mode="bilinear"
    )[:, 0]
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    constant = high - low <= 4 * torch.finfo(maps.dtype).eps * torch.maximum(
        high.abs(), low.abs()
    )  # up to rounding
    return torch.where(constant, 0, (large - low) / torch.where(constant, 1, high - low)).float()


class Scores:
    """Scores of maps against masks, added up image by image.

    mask_thr: pixels above it, in [0, 1), are predicted as object.
    thr: in [0, 1); scores below it count as it in the precision/recall curve (a clamp of the published code).

    Pixel accuracy and the IoU of both classes come from counts over all images; a class that neither exists
    nor is predicted has IoU 0. mAP is the mean over images of scikit-learn's average precision of the two
    maps (1 - map, map) together against the one-hot mask; 0 for an image with ignored pixels only. The
    precision/recall curve comes from a histogram of all pixels'
    scores: it is exact at the thresholds 0, 1/65536, ..., 1.
    """

    def __init__(self, mask_thr=0.5, thr=0.0):
        for flag, value in (("--mask_thr", mask_thr), ("--thr", thr)):
            if not 0 <= value < 1:
                raise UserError(
                    f"{flag} {value} is out of range; maps go from 0 to 1: give at least 0 and less than 1"
                )
        self.mask_thr, self.thr, self.images, self.precision_sum = mask_thr, np.float32(thr), 0, 0.0
        self.counts = np.zeros((2, 2), np.int64)  # [in the mask, predicted]
        self.histogram = np.zeros((2, BINS + 1), np.int64)  # [in the mask, score]

    def add(self, maps, masks):
        """maps [B, ...], float32 in [0, 1]; masks [B, ...] of 0, 1 and IGNORED; both numpy arrays."""
        for scores, mask in zip(maps, masks, strict=True):
            known = mask != IGNORED
            scores, inside = scores[known], mask[known] == 1
            self.images += 1
            self.counts += np.bincount(2 * inside + (scores > self.mask_thr), minlength=4).reshape(2, 2)
            bins = (np.maximum(scores, self.thr) * BINS).astype(np.int64)
            self.histogram += [
                np.bincount(bins[~inside], minlength=BINS + 1),
                np.bincount(bins[inside], minlength=BINS + 1),
            ]
            if len(scores):
                one_hot = np.concatenate([~inside, inside])
                self.precision_sum += average_precision_score(one_hot, np.concatenate([1 - scores, scores]))

    def result(self):
        """The scores in per cent."""
        right = self.counts.diagonal()
        union = self.counts.sum(axis=0) + self.counts.sum(axis=1) - right
        iou = 100 * right / np.maximum(union, 1)
        accuracy, mAP = (
            100 * right.sum() / max(self.counts.sum(), 1),
            100 * self.precision_sum / max(self.images, 1),
        )
        return dict(zip(SCORES, map(float, (accuracy, iou.mean(), mAP, *iou)), strict=True))

    def precision_recall(self):
        """Precision and recall of score >= threshold, [BINS + 2] each, by rising threshold; at the end (1,
        0), for no pixel.
        """
        wrong, right = np.cumsum(self.histogram[:, ::-1], axis=1)[:, ::-1]
        found = wrong + right
        precision = np.where(found > 0, right / np.maximum(found, 1), 1.0)
        recall = right / right[0] if right[0] else np.ones(BINS + 1)
        return np.append(precision, 1.0), np.append(recall, 0.0)


def row_name(settings):
    """A row's name in the table and in file names: the method, and all settings that are not the default."""
    layers, source = settings.get("layers"), settings.get("class_source", "predicted")
    parts = (
        settings["method"],
        layers and f"{'-'.join(map(str, layers))}_{settings['top_neurons']}",
        settings.get("seed") and f"seed{settings['seed']}",
        settings.get("neuron_sign") == "positive" and "positive",
        source != "predicted" and Path(source).stem,
        settings["geometry"] == "aligned" and "aligned",
        settings["mask_thr"] != 0.5 and f"mask{settings['mask_thr']:g}",
        settings["thr"] and f"thr{settings['thr']:g}",
        settings["image_size"] and f"{settings['image_size']}px",
        tuple(settings["ignore_index"]) != IGNORED_VALUES
        and f"ignore{'_'.join(map(str, settings['ignore_index']))}",
    )
    return "_".join(part for part in parts if part)


def save_scores(path, scores, record):
    """Write precision and recall beside `path`, then the scores to `path`. Returns (scores, precision,
    recall).
    """
    result, curve = scores.result(), scores.precision_recall()
    for name, values in zip(("precision", "recall"), curve, strict=True):
        save_array(path.with_name(f"{path.stem}_{name}.npy"), values, record)
    save_json(path, {**complete(record), "images": scores.images, "scores": result})
    return result, *curve
