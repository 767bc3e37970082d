"""Mean-ablation of second-order effects (section 4.2 of the paper)."""

from typing import NamedTuple

import numpy as np
import torch

from utils.datasets import train_set_of
from utils.effects import mean_effects
from utils.norms import CentredNorms, blocks_of
from utils.prs import second_order
from utils.runtime.errors import UserError
from utils.runtime.files import digest
from utils.runtime.results import load_record

ABLATIONS = (
    "baseline",
    "without all effects",
    "without significant effects",
    "without insignificant effects",
    "reconstructed from PC",
)


class Statistics(NamedTuple):
    """What `compute_pcas.py` found for one layer."""

    mean: torch.Tensor  # [N, D]        mean effects
    pcas: torch.Tensor  # [N, D]        first components
    thresholds: torch.Tensor  # [N]

    def digest(self):
        """Twelve hex digits of the content."""
        return digest(*self)


class Rebuilt:
    """Effects projected on one vector per neuron: base + sum_n <c_n, r_n> r_n, with c_n = phi_n - mean_n and all means in base.

    directions, mean: of the layer; [N, D], mean effects of the train split.
    vectors: [N, D], first components, or what a sparse decomposition makes of them; nothing is divided by |r_n|^2.
    """

    def __init__(self, directions, mean, vectors):
        self.directions, self.mean_sum, self.vectors = directions, mean.sum(dim=0), vectors
        self.along = (directions.values * torch.einsum("keo,no->kne", directions.outputs, vectors)).sum(dim=-1)  # [K, N]
        self.mean_along = (mean * vectors).sum(dim=-1)

    def base(self, representation, phi):
        """All effects at their means [B, D]. representation: of norm 100 [B, D]. phi: `SecondOrder`."""
        return representation - phi.sum() + self.mean_sum

    def projections(self, phi):
        """<c_n, r_n> [B, N]."""
        along = [(phi.C[:, :, n] * self.along[:, n]).sum(dim=1) for n in blocks_of(phi.C.shape[2])]
        return torch.cat(along, dim=1) + phi.kappa @ self.vectors.T - self.mean_along

    def projected(self, phi):
        """sum_n <c_n, r_n> r_n [B, D]."""
        return self.projections(phi) @ self.vectors

    def __call__(self, representation, phi):
        """[B, 1, D], as `Ablations` gives its five."""
        return (self.base(representation, phi) + self.projected(phi))[:, None]


class Ablations:
    """The five representations that the paper compares, for one layer.

    An effect is significant where |c_n| is above the threshold, the neuron's k-th largest norm in the train split.
    """

    def __init__(self, directions, statistics):
        self.directions, self.thresholds = directions, statistics.thresholds
        self.rebuilt = Rebuilt(directions, statistics.mean, statistics.pcas)
        self.norms = CentredNorms(directions, statistics.mean)

    def __call__(self, representation, phi):
        """[B, 5, D] in the order of ABLATIONS. representation: of norm 100 [B, D]. phi: `SecondOrder`."""
        base = self.rebuilt.base(representation, phi)
        pc = base + self.rebuilt.projected(phi)
        small = (self.norms(phi) <= self.thresholds).to(phi.C.dtype)  # [B, N]
        heads = 0  # of the sum of the small c_n; base plus all c_n is the representation: leaving them out needs no second sum
        for n in blocks_of(phi.C.shape[2]):
            x = (phi.C[:, :, n] - self.norms.origin[:, n]) * small[:, None, n]
            heads = heads + torch.einsum("bkn,kne->bke", x, self.directions.values[:, n])
        small_effects = torch.einsum("bke,keo->bo", heads, self.directions.outputs)
        small_effects = small_effects + small.sum(-1, keepdim=True) * phi.kappa - small @ self.norms.rest
        return torch.stack([representation, base, base + small_effects, representation - small_effects, pc], dim=1)


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
    """The zero-shot classifier [D, classes] of a data set, on the model's device, and the images' labels [images], its columns.

    A label is a class, not a position: the images' class folders are looked up among those that the classifier was made of. A
    classifier of the published code does not know them, and must have as many classes.

    Raises UserError, with the classes, where that cannot be done.
    """
    dataset = train_set_of(images.dataset)
    classifier = results.load("classifier", clip.vit.sizes, {"fingerprint": clip.fingerprint}, dataset=dataset)
    path, command = results.find("classifier", dataset=dataset), results.command("classifier", dataset=dataset)
    folders, labels = load_record(path).get("folders"), images.labels
    again = f"make it again with: {command} --overwrite"
    if folders is None and classifier.shape[1] != len(images.folders):
        raise UserError(f"{path} has {classifier.shape[1]} classes and the images have {len(images.folders)}; {again}")
    if folders is not None:
        if len(folders) != classifier.shape[1]:
            raise UserError(f"{path} has {classifier.shape[1]} columns and its record {len(folders)} classes; {again}")
        column = {folder: i for i, folder in enumerate(folders)}
        unknown = [images.folders[label] for label in np.unique(labels) if images.folders[label] not in column]
        if unknown:
            names = f"{', '.join(unknown[:8])}{', ...' if len(unknown) > 8 else ''}"
            raise UserError(f"{path} has no class for {len(unknown)} folders of the images ({names}); {again}")
        labels = np.array([column.get(folder, -1) for folder in images.folders])[labels]
    return torch.from_numpy(classifier).to(clip.device), labels


@torch.inference_mode()
def classify(vit, images, ablations, classifier, coefficient):
    """Predicted classes, int64 [B, layers, V], of the V ablated representations of every layer.

    vit, images, coefficient: as in `second_order`.
    ablations: list of `Ablations` or `Rebuilt`, one for each layer, ascending.
    classifier: [D, classes].

    Raises UserError where the class scores are not finite.
    """
    representation, effects = second_order(vit, images, [ablate.directions for ablate in ablations], coefficient)
    representation = coefficient * torch.nn.functional.normalize(representation, dim=-1)
    ablated = [ablate(representation, next(effects)) for ablate in ablations]  # one layer's effects are in memory at a time
    return predicted_classes(torch.stack(ablated, dim=1), classifier)


def predicted_classes(representations, classifier):
    """Classes of the largest scores, int64 [...]: representations [..., D], classifier [D, classes]. Raises UserError where the
    scores are not finite."""
    scores = representations @ classifier
    if not scores.isfinite().all():  # argmax would name a class all the same
        raise UserError("class scores are NaN or infinite; with --precision float16 repeat the command without it")
    return scores.argmax(dim=-1)


def accuracies(predictions, labels):
    """Accuracies in per cent, a list of V for each layer. predictions: [images, layers, V]. labels: [images]."""
    return (100 * (predictions == labels[:, None, None]).mean(axis=0)).tolist()
