"""Mean-ablation of second-order effects (section 4.2 of the paper)."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from utils.artifacts import digest, load_array
from utils.datasets import batches
from utils.errors import UserError
from utils.prs import CentredNorms, blocks_of, fold_layers, second_order, sum_of_effects
from utils.rows import RowWriter, row_pieces

ABLATIONS = (
    "baseline",
    "without all effects",
    "without significant effects",
    "without insignificant effects",
    "reconstructed from PC",
)


@dataclass
class Statistics:
    """What `compute_pcas.py` found for one layer: mean effects [N, D], first components [N, D], thresholds [N]."""

    mean: torch.Tensor
    pcas: torch.Tensor
    thresholds: torch.Tensor

    def digest(self):
        return digest(self.mean, self.pcas, self.thresholds)


class Rebuilt:
    """Effects replaced by their projections on one vector per neuron: base + sum_n <c_n, r_n> r_n with c_n = phi_n - mean_n,
    where base has every effect at its mean.

    Parameters
    directions: `Directions` of the layer. mean [N, D]: mean effects of the train split. vectors [N, D]: first components, or
    what a sparse decomposition makes of them; the product is not divided by |r_n|^2.
    """

    names = ("reconstructed",)

    def __init__(self, directions, mean, vectors):
        self.directions, self.mean_sum, self.vectors = directions, mean.sum(dim=0), vectors
        heads = torch.einsum("keo,no->kne", directions.outputs, vectors)
        self.along = (directions.values * heads).sum(dim=-1)  # [K, N], <B_n, r_n>
        self.mean_along = (mean * vectors).sum(dim=-1)

    def base(self, representation, C, kappa):
        """All effects at their means: representation of norm 100 [B, D], C [B, K, N], kappa [B, D] -> [B, D]."""
        return representation - sum_of_effects(C, kappa, self.directions) + self.mean_sum

    def projections(self, C, kappa):
        """<c_n, r_n>: C [B, K, N], kappa [B, D] -> [B, N]."""
        along = [(C[:, :, n] * self.along[:, n]).sum(dim=1) for n in blocks_of(C.shape[2])]
        return torch.cat(along, dim=1) + kappa @ self.vectors.T - self.mean_along

    def projected(self, C, kappa):
        """sum_n <c_n, r_n> r_n: C [B, K, N], kappa [B, D] -> [B, D]."""
        return self.projections(C, kappa) @ self.vectors

    def __call__(self, representation, C, kappa):
        """[B, 1, D], the one representation in a row, as `Ablations` gives its five."""
        return (self.base(representation, C, kappa) + self.projected(C, kappa))[:, None]


class Ablations:
    """The five representations that the paper compares, for one layer.

    Parameters
    directions: `Directions`. statistics: `Statistics` of the train split; an effect is significant where |c_n| is above the
    threshold, the neuron's k-th largest norm in training.
    """

    names = ABLATIONS

    def __init__(self, directions, statistics):
        self.directions, self.thresholds = directions, statistics.thresholds
        self.rebuilt = Rebuilt(directions, statistics.mean, statistics.pcas)
        self.norms = CentredNorms(directions, statistics.mean)

    def __call__(self, representation, C, kappa):
        """Representation of norm 100 [B, D], C [B, K, N], kappa [B, D] -> [B, 5, D] in the order of ABLATIONS."""
        base = self.rebuilt.base(representation, C, kappa)
        pc = base + self.rebuilt.projected(C, kappa)
        small = (self.norms(C, kappa) <= self.thresholds).to(C.dtype)  # [B, N]
        # sum of the small c_n; base plus all c_n is the representation again, so leaving them out needs no second sum
        heads = 0
        for n in blocks_of(C.shape[2]):
            x = (C[:, :, n] - self.norms.origin[:, n]) * small[:, None, n]
            heads = heads + torch.einsum("bkn,kne->bke", x, self.directions.values[:, n])
        small_effects = torch.einsum("bke,keo->bo", heads, self.directions.outputs)
        small_effects = small_effects + small.sum(-1, keepdim=True) * kappa - small @ self.norms.rest
        return torch.stack([representation, base, base + small_effects, representation - small_effects, pc], dim=1)


def load_statistics(names, dataset, layer, k, clip, flags, coefficient):
    """Read `Statistics` of one layer to the model's device. Raises UserError, naming the command, for what is missing or wrong.

    clip: the loaded `Clip`, whose weights the statistics have to be of, and with the same coefficient. flags: the model's flags,
    for the message.
    """
    vit = clip.hooked_vit()
    command = f"python compute_pcas.py --mlp_layer {layer} --top_k_pca {k} --dataset {dataset} {flags}"

    expected = {"fingerprint": clip.fingerprint, "coefficient": coefficient}

    def read(part, *shape):
        path = names.statistics(dataset, layer, part)
        return torch.from_numpy(load_array(path, command, shape, **expected)).to(clip.device)

    norms = read(f"{k}_norm", vit.N, k)
    return Statistics(read("mean", vit.N, vit.D), read(f"{k}_pca", vit.N, vit.D), norms[:, 0].contiguous())


def load_classifier(names, dataset, clip, images, flags):
    """Read the zero-shot classifier [D, classes] to the model's device; it has to cover the labels of `images`."""
    command = f"python compute_classifier_projection.py --dataset {dataset} {flags}"
    shape = (clip.hooked_vit().D, None)
    classifier = load_array(names.classifier(dataset), command, shape, fingerprint=clip.fingerprint)
    partial = dataset == "imagenet" and len(images.class_names) < classifier.shape[1]  # some of the 1,000 folders are there
    if classifier.shape[1] != len(images.class_names) and not partial:
        raise UserError(
            f"{names.classifier(dataset)} has {classifier.shape[1]} classes and the images have {len(images.class_names)}; "
            f"make it again with: {command}"
        )
    if partial:
        print(
            f"note: only {len(images.class_names)} of ImageNet's folders are there, so labels (the index among them) do not "
            "match the classifier's 1,000 classes, and accuracies mean nothing; --dataset folder has classes of its own"
        )
    return torch.from_numpy(classifier).to(clip.device)


def predict(vit, groups, make, images, classifier, coefficient, path_of, meta, batch_size, passing, overwrite):
    """Classify held-out images by ablated representations, in one pass for every group of layers.

    Parameters
    groups: lists of layers, of `groups_of_layers`. make: a layer's `Directions` -> what maps (representation, C, kappa) to
    [B, V, D]. images: `Images`. classifier [D, classes]. path_of: group -> the path of its predictions [images, layers, V].
    meta: what they are made from. passing: the keyword arguments num_workers and device of `batches`. overwrite: drop what a
    broken run left.

    Returns accuracies in per cent, {layer: a list of V}.
    """
    meta = {**meta, "batch_size": batch_size, "coefficient": coefficient, "classifier": digest(classifier)}
    pieces, table = row_pieces(len(images), batch_size), {}
    with torch.inference_mode(), ExitStack() as stack:  # all appear together, so that a broken run goes on at its group
        directions = fold_layers(vit, groups[0])
        ablations = [make(item) for item in directions]
        writers = []
        for group in groups:
            arrays = {path_of(group): ((len(images), len(group), len(ablations[0].names)), "int32")}
            writers.append(stack.enter_context(RowWriter(arrays, {**meta, "layers": group}, pieces, overwrite)))
        for turn, (group, writer) in enumerate(zip(groups, writers, strict=True)):
            if turn:
                directions = ablations = None  # room for the next ones
                directions = fold_layers(vit, group)
                ablations = [make(item) for item in directions]
            for number, row, pixels, _ in batches(images, writer.todo, **passing):
                representation, effects = second_order(vit, pixels, directions, coefficient)
                representation = coefficient * torch.nn.functional.normalize(representation, dim=-1)
                ablated = [ablate(representation, *next(effects)) for ablate in ablations]  # one layer's at a time
                logits = torch.stack(ablated, dim=1) @ classifier  # [B, layers, V, classes]
                writer.write(number, row, {path_of(group): logits.argmax(dim=-1).cpu().numpy()})
    for group in groups:
        predictions = load_array(path_of(group), "the same command", (len(images), len(group), None))
        right = 100 * (predictions == images.labels[:, None, None]).mean(axis=0)
        table |= dict(zip(group, right.tolist(), strict=True))
    return table
