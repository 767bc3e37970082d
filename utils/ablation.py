"""Ablate second-order effects: put them at their means, and see what is left (section 4.2 of the paper)."""

import argparse
from dataclasses import dataclass

import numpy as np
import torch

from utils.data.splits import Split
from utils.model.clip import Clip
from utils.norms import NEURONS, CentredNorms, blocks_of
from utils.prs import COEFFICIENT, second_order
from utils.runtime.distributed import is_rank_zero
from utils.runtime.errors import UserError
from utils.runtime.passes import Pass
from utils.runtime.results import Results
from utils.units import fold_units, groups_of

ABLATIONS = (
    "baseline",
    "without all effects",
    "without significant effects",
    "without insignificant effects",
    "reconstructed from PC",
)


class Rebuilt:
    """Rebuilt effects are projected on one vector per neuron: base + sum_n <c_n, r_n> r_n.

    c_n = phi_n - mean_n are centred effects; the base has all means. Nothing is divided by |r_n|^2.

    directions: `Directions` of the layer.
    mean: [N, D], mean effects of the train split.
    vectors: r, [N, D], first components, or sparse decompositions of them.
    """

    def __init__(self, directions, mean, vectors):
        self.directions = directions
        self.mean_sum = mean.sum(dim=0)
        self.vectors = vectors
        self.along = torch.empty_like(directions.values[..., 0])  # <B[k, n], r_n>, [K, N]
        for n in blocks_of(len(vectors)):
            heads = torch.einsum("keo,no->kne", directions.outputs, vectors[n])
            self.along[:, n] = (directions.values[:, n] * heads).sum(dim=-1)
        self.mean_along = (mean * vectors).sum(dim=-1)

    def base(self, representation, phi):
        """Return the representation with all effects at their means, [B, D].

        representation: of norm 100 [B, D]. phi: `SecondOrder`.
        """
        return representation - phi.sum() + self.mean_sum

    def projections(self, phi):
        """Return <c_n, r_n>, [B, N]."""
        C = phi.C.contiguous()  # so that sums of stored effects have the same order
        along = [(C[:, :, n] * self.along[:, n]).sum(dim=1) for n in blocks_of(C.shape[2])]
        return torch.cat(along, dim=1) + phi.kappa @ self.vectors.T - self.mean_along

    def projected(self, phi):
        """Return sum_n <c_n, r_n> r_n, [B, D]."""
        return self.projections(phi) @ self.vectors

    def __call__(self, representation, phi):
        """Return the rebuilt representation [B, 1, D]. Parameters: as in `base`."""
        return (self.base(representation, phi) + self.projected(phi))[:, None]


class Ablations:
    """Ablations are the five representations that the paper compares, for one layer.

    An effect is significant where |c_n| is above the threshold, the neuron's k-th largest norm in the train
    split.

    directions: `Directions` of the layer.
    statistics: `Statistics` of the layer.
    """

    def __init__(self, directions, statistics):
        self.directions = directions
        self.thresholds = statistics.thresholds
        self.rebuilt = Rebuilt(directions, statistics.mean, statistics.pcas)
        self.norms = CentredNorms(directions, statistics.mean)

    def __call__(self, representation, phi):
        """Return [B, 5, D] in the order of ABLATIONS. Parameters: as in `Rebuilt.base`."""
        phi = phi._replace(C=phi.C.contiguous())
        base = self.rebuilt.base(representation, phi)
        pc = base + self.rebuilt.projected(phi)
        # base plus all c_n is the representation, so leaving out the small ones needs no second sum
        small = self.small_effects(phi)
        return torch.stack([representation, base, base + small, representation - small, pc], dim=1)

    def small_effects(self, phi):
        """Return the sum of the insignificant centred effects, [B, D]."""
        small = self.are_small(phi).to(phi.C.dtype)  # [B, N]
        heads = 0
        for n in blocks_of(phi.C.shape[2]):
            x = (phi.C[:, :, n] - self.norms.origin[:, n]) * small[:, None, n]
            heads = heads + torch.einsum("bkn,kne->bke", x, self.directions.values[:, n])
        found = torch.einsum("bke,keo->bo", heads, self.directions.outputs)
        return found + small.sum(-1, keepdim=True) * phi.kappa - small @ self.norms.rest

    def are_small(self, phi):
        """Return whether effects are insignificant, bool [B, N].

        With x the centred coefficients, |c_n| differs from |x B_n| by |kappa - rest| at most. Only where this
        can decide is |c_n| computed: that is half of the work.
        """
        squares = self.norms.squares(phi.C)
        beside = self.norms.beside(phi.kappa).clamp_min(0)
        norms = squares.clamp_min(0).sqrt()
        image, neuron = ((norms - self.thresholds).abs() <= beside.sqrt()).nonzero(as_tuple=True)
        heads = torch.einsum("bo,keo->bke", phi.kappa, self.directions.outputs)
        squares += beside
        for b, n in zip(image.split(NEURONS), neuron.split(NEURONS), strict=True):
            x = phi.C[b, :, n] - self.norms.origin[:, n].T  # [pairs, K]
            B_kappa = torch.einsum("pke,kpe->pk", heads[b], self.directions.values[:, n])
            norms[b, n] = (squares[b, n] + 2 * (B_kappa * x).sum(dim=-1)).clamp_min(0).sqrt()
        return norms <= self.thresholds


@torch.inference_mode()
def classify(vit, images, ablations, classifier, coefficient=COEFFICIENT):
    """Predict classes, int64 [B, layers, V], from the V ablated representations of every layer.

    vit, images, coefficient: as in `second_order`.
    ablations: a list of `Ablations` or `Rebuilt`, one for each layer, ascending.
    classifier: [D, classes].

    Raises UserError where the class scores are not finite.
    """
    directions = [ablate.directions for ablate in ablations]
    representation, effects = second_order(vit, images, directions, coefficient)
    representation = coefficient * torch.nn.functional.normalize(representation, dim=-1)
    # one layer's effects are in memory at a time
    ablated = [ablate(representation, next(effects)) for ablate in ablations]
    return predicted_classes(torch.stack(ablated, dim=1), classifier)


def predicted_classes(representations, classifier):
    """Return the classes of the largest scores, int64 [...].

    representations: [..., D]. classifier: [D, classes].

    Raises UserError where the scores are not finite.
    """
    scores = representations @ classifier
    if not scores.isfinite().all():  # argmax would name a class all the same
        fix = "with --precision float16 repeat the command without it"
        raise UserError(f"class scores are NaN or infinite; {fix}")
    return scores.argmax(dim=-1)


def accuracies(predictions, labels):
    """Return accuracies in per cent, a list of V for each layer.

    predictions: [images, layers, V]. labels: [images].
    """
    return (100 * (predictions == labels[:, None, None]).mean(axis=0)).tolist()


@dataclass
class Trial:
    """A Trial asks a zero-shot classifier about the ablated representations of a split.

    args: the flags coefficient, memory and overwrite.
    clip: the loaded `Clip`.
    results: `Results` of the folder that is written.
    split: `Split` of the images.
    classifier, labels: as `utils.statistics.load_classifier` returns them.
    """

    args: argparse.Namespace
    clip: Clip
    results: Results
    split: Split
    classifier: torch.Tensor
    labels: np.ndarray

    def run(self, kind, layers, ablate, record, names):
        """Predict the classes, and return {layer: V accuracies in per cent}; {} where this is not rank 0.

        kind: of the array of predicted classes.
        layers: MLP layers, divided into groups that share one pass.
        ablate: a function from `Directions` to `Ablations` or `Rebuilt`.
        record: everything that the predictions are made from.
        names: fields of file names, besides the layers.
        """
        table = {}
        for group in groups_of(self.clip, layers, self.args.memory * 1e9):
            predictions = self._predict(kind, group, ablate, record, names)
            if is_rank_zero():
                found = accuracies(np.load(predictions), self.labels)
                table |= dict(zip(map(str, group), found, strict=True))
        return table

    @torch.inference_mode()
    def _predict(self, kind, layers, ablate, record, names):
        """Predict the classes for some layers, in one pass; return the path of the array."""
        sizes = {"images": len(self.split), "layers": len(layers)}
        arrays = self.results.arrays([kind], sizes, layer=layers, **names)
        [path] = arrays
        vit = self.clip.vit
        with Pass(arrays, record, self.split, overwrite=self.args.overwrite) as work:
            ablations = [ablate(item) for item in work.prepare(fold_units, self.clip, layers)]
            for rows, pixels in work:
                work[path][rows] = classify(vit, pixels, ablations, self.classifier, self.args.coefficient)
        return path
