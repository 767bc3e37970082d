"""Measure what the paper has besides second-order effects: direct and indirect effects, first-order parts.

Letters as in `utils.prs`. Each pass is resumed or skipped as every other pass. A tower that is pooled by
attention has no first-order parts and no direct effects; they are 0 here.
"""

import numpy as np
import torch

from utils.ablation import Rebuilt, predicted_classes
from utils.first_order import FirstOrder, direct_effects, fold_direct
from utils.indirect import IndirectEffects, replaced
from utils.model.hooks import HookedViT
from utils.prs import COEFFICIENT, SecondOrder, fold, second_order
from utils.runtime.files import digest, read_array
from utils.runtime.passes import Pass

KINDS = ("direct", "second-order", "indirect", "deleted")  # of drawn neurons, in this order


def scaled(representation):
    """Scale representations to the norm COEFFICIENT."""
    return COEFFICIENT * torch.nn.functional.normalize(representation, dim=-1)


def first_order_of(vit):
    """Return the `FirstOrder` of a tower, or None where it has no first order."""
    return FirstOrder(vit) if vit.pooling.has_first_order else None


@torch.inference_mode()
def means(clip, split, paths, overwrite=False):
    """Compute means over images, two float32 tensors on the model's device.

    The first are post-GELU activations of every layer and token [L, T, N]. The second are first-order parts
    [2, L, D]: what all heads of a layer write together, and what its MLP writes.

    clip: the loaded `Clip`.
    split: `Split` of the images.
    paths: of the two arrays.
    """
    vit = clip.vit
    order = first_order_of(vit)
    activations = order.activations if order else []
    shapes = {"p": (vit.L, vit.T, vit.N), "parts": (2, vit.L, vit.D)}
    arrays = {path: (shape, "float32") for path, shape in zip(paths, shapes.values(), strict=True)}
    state = {name: (shape, "float64") for name, shape in shapes.items()}
    record = {**clip.record, **split.record, "coefficient": COEFFICIENT}
    with Pass(arrays, record, split, state=state, overwrite=overwrite) as work:
        for _, pixels in work.round(0, "means"):
            with vit.record("*.mlp.post", *activations) as cache:
                representation = vit(pixels)
            if order:
                parts = order.parts(cache, representation)
                both = torch.stack([parts.heads.sum(dim=2), parts.mlps])  # [2, B, L, D]
                work.state["parts"] += both.sum(dim=1, dtype=torch.float64).cpu().numpy()
            for l in range(vit.L):
                p = cache[f"blocks.{l}.mlp.post"]
                work.state["p"][l] += p.sum(dim=0, dtype=torch.float64).cpu().numpy()
        if not work.finished:
            for path, sums in zip(paths, work.gather(list(shapes)).values(), strict=True):
                work[path][:] = (sum(sums) / len(split)).astype(np.float32)
    return [torch.from_numpy(np.load(path)).to(clip.device) for path in paths]


def first_order_names(vit):
    """Return the names of `first_order_ablations`, in order."""
    names = ["baseline"]
    if vit.pooling.has_first_order:
        for kind in ("attention", "mlp"):
            names += [f"{kind} {l}" for l in range(vit.L)]
            names += [f"{kind} up to {l}" for l in range(vit.L)]
    return names


@torch.inference_mode()
def first_order_ablations(clip, split, path, averages, indirect, classifier, overwrite=False):
    """Predict classes while first-order parts, or the activations of whole layers, are at their means.

    clip: the loaded `Clip`.
    split: `Split` of the images.
    path: of the array of predictions.
    averages: the two results of `means` for the train split.
    indirect: MLP layers whose activations are replaced in the running model.
    classifier: [D, classes].

    Returns {name: [images]}, by `first_order_names`, and "indirect LAYER".
    """
    vit = clip.vit
    order = first_order_of(vit)
    activations = order.activations if order else []
    mean_p, mean_parts = averages
    names = [*first_order_names(vit), *(f"indirect {layer}" for layer in indirect)]
    record = {**clip.record, **split.record, "names": names, "classifier": digest(classifier)}
    record["averages"] = digest(mean_p, mean_parts)
    arrays = {path: ((len(split), len(names)), "int32")}
    with Pass(arrays, record, split, overwrite=overwrite) as work:
        for rows, pixels in work.round(0, "first order"):
            with vit.record(*activations) as cache:
                representation = vit(pixels)
            ablated = [scaled(representation)[:, None]]
            if order:
                ablated += without_parts(order.parts(cache, representation), mean_parts, ablated[0])
            for layer in indirect:
                with vit.edit({f"blocks.{layer}.mlp.post": replaced(mean_p[layer])}):
                    ablated.append(scaled(vit(pixels))[:, None])
            work[path][rows] = predicted_classes(torch.cat(ablated, dim=1), classifier)
    return dict(zip(names, np.load(path).T, strict=True))


def without_parts(parts, means, unit):
    """Return representations with the parts of a layer, and of all layers up to it, at their means.

    parts: `Parts` of a batch.
    means: [2, L, D].
    unit: the representations as they are [B, 1, D].

    Returns four tensors [B, L, D]: attentions alone and accumulated, MLPs alone and accumulated.
    """
    found = []
    for own, mean in zip((parts.heads.sum(dim=2), parts.mlps), means, strict=True):
        change = mean - own  # [B, L, D]
        found += [unit + change, unit + change.cumsum(dim=1)]
    return found


def drawn(total, count, seed=0):
    """Draw `count` of `total` neurons or images by a seed; return their numbers, ascending."""
    return np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))


@torch.inference_mode()
def drawn_effects(clip, split, path, layer, mean_p, neurons, overwrite=False):
    """Compute the effects of drawn neurons of a layer, float32 [images, 4, n, D], by KINDS.

    The forward passes are always in float32: the effect of one neuron is smaller than bfloat16 rounding.

    clip: the loaded `Clip`.
    split: `Split` of the images.
    path: of the array.
    mean_p: mean activations of the layer [T, N].
    neurons: the drawn neurons.
    """
    vit = HookedViT(clip.vit.visual)
    record = {key: value for key, value in clip.record.items() if key != "precision"}
    record |= {**split.record, "layer": layer, "neurons": [int(n) for n in neurons]}
    record["average"] = digest(mean_p)
    arrays = {path: ((len(split), len(KINDS), len(neurons), vit.D), "float32")}
    with Pass(arrays, record, split, overwrite=overwrite) as work:
        effects = work.prepare(DrawnEffects, vit, layer, mean_p, neurons)
        for rows, pixels in work.round(0, f"layer {layer}"):
            work[path][rows] = effects(pixels)
    return read_array(path, mmap=True)


class DrawnEffects:
    """`DrawnEffects` measures the effects of drawn neurons of a layer in every way of KINDS.

    "deleted" is what the representation loses when the neuron's activations become 0 in the running model;
    "indirect" when they become their mean.

    vit: HookedViT.
    layer: MLP layer.
    mean_p: mean activations of the layer [T, N].
    neurons: the drawn neurons.
    """

    def __init__(self, vit, layer, mean_p, neurons):
        self.vit = vit
        self.neurons = neurons
        self.second = fold(vit, layer)
        self.direct = fold_direct(vit, layer) if vit.pooling.has_first_order else None
        self.indirect = IndirectEffects(vit, layer, mean_p, neurons)
        self.deleted = IndirectEffects(vit, layer, torch.zeros_like(mean_p), neurons)

    def __call__(self, pixels):
        """Return the effects on a batch of images, [B, 4, n, D]."""
        representation, [phi] = second_order(self.vit, pixels, [self.second])
        with self.vit.record(*self.indirect.activations, *self.vit.names_from(self.vit.L)) as cache:
            self.vit(pixels)
        second = of_neurons(phi, self.neurons)
        direct = torch.zeros_like(second)
        if self.direct is not None:
            scale = COEFFICIENT / representation.norm(dim=-1)
            direct = of_neurons(direct_effects(self.vit, cache, self.direct, scale), self.neurons)
        changed = [change(cache, representation) for change in (self.indirect, self.deleted)]
        return torch.stack([direct, second, *changed], dim=1)


def of_neurons(phi, neurons):
    """Return the effects of some neurons of a `SecondOrder`, [B, n, D]."""
    directions = phi.directions._replace(values=phi.directions.values[:, neurons])
    return SecondOrder(phi.C[:, :, neurons], phi.kappa, directions).dense()


def explained(effects, k=None):
    """Return the share of the squared norm of one neuron's centred effects along their first component.

    effects: [images, D].
    k: take only the k largest, not centred again; None for all.
    """
    centred = effects - effects.mean(axis=0)
    if k is not None:
        centred = centred[np.argsort(-np.linalg.norm(centred, axis=1), kind="stable")[:k]]
    squares = np.linalg.svd(centred, compute_uv=False) ** 2
    return float(squares[0] / max(squares.sum(), 1e-300))


def agreement(effects, truth):
    """Return the Pearson correlation of one neuron's effects with what happens, both [images, D].

    It is taken over all images and output dimensions, both centred over images.
    """
    a, b = ((x - x.mean(axis=0)).ravel().astype(np.float64) for x in (effects, truth))
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300))


class ManyRebuilt:
    """`ManyRebuilt` is `Rebuilt` with several sets of vectors.

    directions, mean: as for `Rebuilt`.
    vectors: list of [N, D].
    """

    def __init__(self, directions, mean, vectors):
        self.directions = directions
        self.each = [Rebuilt(directions, mean, item) for item in vectors]

    def __call__(self, representation, phi):
        """Return the rebuilt representations [B, V, D]. Parameters: as in `Rebuilt.base`."""
        base = self.each[0].base(representation, phi)
        return torch.stack([base + item.projected(phi) for item in self.each], dim=1)
