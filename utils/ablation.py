"""Mean-ablation of second-order effects (section 4.2 of the paper)."""

import torch

from utils.norms import CentredNorms, blocks_of
from utils.prs import second_order
from utils.runtime.errors import UserError

ABLATIONS = (
    "baseline",
    "without all effects",
    "without significant effects",
    "without insignificant effects",
    "reconstructed from PC",
)


class Rebuilt:
    """Effects projected on one vector per neuron: base + sum_n <c_n, r_n> r_n, with c_n = phi_n - mean_n and
    all means in base.

    directions, mean: of the layer; [N, D], mean effects of the train split.
    vectors: [N, D], first components, or what a sparse decomposition makes of them; nothing is divided by
        |r_n|^2.
    """

    def __init__(self, directions, mean, vectors):
        self.directions, self.mean_sum, self.vectors = directions, mean.sum(dim=0), vectors
        self.along = (directions.values * torch.einsum("keo,no->kne", directions.outputs, vectors)).sum(
            dim=-1
        )  # [K, N]
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

    An effect is significant where |c_n| is above the threshold, the neuron's k-th largest norm in the train
    split.
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
        # of the sum of the small c_n; base plus all c_n is the representation: leaving them out needs no
        # second sum
        heads = 0
        for n in blocks_of(phi.C.shape[2]):
            x = (phi.C[:, :, n] - self.norms.origin[:, n]) * small[:, None, n]
            heads = heads + torch.einsum("bkn,kne->bke", x, self.directions.values[:, n])
        small_effects = torch.einsum("bke,keo->bo", heads, self.directions.outputs)
        small_effects = small_effects + small.sum(-1, keepdim=True) * phi.kappa - small @ self.norms.rest
        return torch.stack(
            [representation, base, base + small_effects, representation - small_effects, pc], dim=1
        )


@torch.inference_mode()
def classify(vit, images, ablations, classifier, coefficient):
    """Predicted classes, int64 [B, layers, V], of the V ablated representations of every layer.

    vit, images, coefficient: as in `second_order`.
    ablations: list of `Ablations` or `Rebuilt`, one for each layer, ascending.
    classifier: [D, classes].

    Raises UserError where the class scores are not finite.
    """
    representation, effects = second_order(
        vit, images, [ablate.directions for ablate in ablations], coefficient
    )
    representation = coefficient * torch.nn.functional.normalize(representation, dim=-1)
    ablated = [
        ablate(representation, next(effects)) for ablate in ablations
    ]  # one layer's effects are in memory at a time
    return predicted_classes(torch.stack(ablated, dim=1), classifier)


def predicted_classes(representations, classifier):
    """Classes of the largest scores, int64 [...]: representations [..., D], classifier [D, classes]. Raises
    UserError where the scores are not finite."""
    scores = representations @ classifier
    if not scores.isfinite().all():  # argmax would name a class all the same
        raise UserError(
            "class scores are NaN or infinite; with --precision float16 repeat the command without it"
        )
    return scores.argmax(dim=-1)


def accuracies(predictions, labels):
    """Accuracies in per cent, a list of V for each layer. predictions: [images, layers, V]. labels:
    [images].
    """
    return (100 * (predictions == labels[:, None, None]).mean(axis=0)).tolist()
