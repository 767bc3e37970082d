"""What the paper measures besides its second-order effects: direct and indirect effects, and first-order
parts by layer.

Letters as in `utils.prs`. Each pass leaves its arrays in the folder paper_MODEL_PRETRAINED, and is resumed or
skipped as every other pass. A tower that is pooled by attention has no first-order parts and no direct
effects; they are 0 here.
"""

from typing import NamedTuple

import numpy as np
import torch

from utils.ablation import Rebuilt, predicted_classes
from utils.first_order import FirstOrder, direct_effects, fold_direct
from utils.indirect import IndirectEffects, replaced
from utils.model.hooks import HookedViT
from utils.prs import COEFFICIENT, SecondOrder, fold, second_order
from utils.runtime.files import digest, read_array
from utils.runtime.passes import Pass, pieces_of

EFFECTS = ("direct", "second-order", "indirect", "deleted")  # of drawn neurons, in this order


class Images(NamedTuple):
    """Images to go over. images: `Images` of `utils.data.images`; loader: `Loader`; batch_size; name: in the
    names of files.
    """

    images: object
    loader: object
    batch_size: int
    name: str

    @property
    def pieces(self):
        return pieces_of(self.images, self.batch_size)


def scaled(representation):
    """Of norm COEFFICIENT."""
    return COEFFICIENT * torch.nn.functional.normalize(representation, dim=-1)


@torch.inference_mode()
def means(clip, data, folder, overwrite=False):
    """Means over images: post-GELU activations of every layer and token [L, T, N]; and the first-order parts
    [2, L, D] that all heads of a layer write together, and its MLP.

    clip, data: the loaded `Clip`; `Images`. folder: where the arrays lie.
    """
    vit, order = clip.vit, first_order_of(clip.vit)
    paths = [folder / f"{data.name}_{kind}.npy" for kind in ("mean_activations", "mean_parts")]
    arrays = {paths[0]: ((vit.L, vit.T, vit.N), "float32"), paths[1]: ((2, vit.L, vit.D), "float32")}
    state = {"p": ((vit.L, vit.T, vit.N), "float64"), "parts": ((2, vit.L, vit.D), "float64")}
    record = {**clip.record, **data.images.record, "coefficient": COEFFICIENT}
    with Pass(
        arrays, record, data.pieces, {"batch_size": data.batch_size}, state=state, overwrite=overwrite
    ) as work:
        for _, pixels in work.over(data.loader, description="means"):
            with vit.record("*.mlp.post", *(order.activations if order else ())) as cache:
                representation = vit(pixels)
            if order:
                parts = order.parts(cache, representation)
                both = torch.stack([parts.heads.sum(dim=2), parts.mlps])  # [2, B, L, D]
                work.state["parts"] += both.sum(dim=1, dtype=torch.float64).cpu().numpy()
            for l in range(vit.L):
                work.state["p"][l] += (
                    cache[f"blocks.{l}.mlp.post"].sum(dim=0, dtype=torch.float64).cpu().numpy()
                )
        if not work.finished:
            sums = work.gather(["p", "parts"])
            work[paths[0]][:], work[paths[1]][:] = (
                (sum(sums[name]) / len(data.images)).astype(np.float32) for name in sums
            )
    return [torch.from_numpy(np.load(path)).to(clip.device) for path in paths]


def first_order_of(vit):
    """`FirstOrder`, or None for a tower that has no first order."""
    return None if vit.pooling == "attention" else FirstOrder(vit)


def first_order_names(vit):
    """The names of `first_order_ablations`, in order."""
    if vit.pooling == "attention":
        return ["baseline"]
    kinds = [
        f"{kind} {how}{l}" for kind in ("attention", "mlp") for how in ("", "up to ") for l in range(vit.L)
    ]
    return ["baseline", *kinds]


@torch.inference_mode()
def first_order_ablations(clip, data, folder, averages, indirect, classifier, overwrite=False):
    """Predicted classes when first-order parts, and the activations of whole layers, are at their means.

    averages: what `means` gives for the train split. indirect: MLP layers whose activations are replaced in
        the running model.
    classifier: [D, classes].

    Returns {name: [images]}, by `first_order_names`, and "indirect LAYER".
    """
    (mean_p, mean_parts), vit, order = averages, clip.vit, first_order_of(clip.vit)
    names = [*first_order_names(vit), *(f"indirect {layer}" for layer in indirect)]
    path = folder / f"{data.name}_{'-'.join(map(str, indirect))}_first_order_predictions.npy"
    record = {**clip.record, **data.images.record, "names": names, "classifier": digest(classifier)}
    record["averages"] = digest(mean_p, mean_parts)
    arrays = {path: ((len(data.images), len(names)), "int32")}
    with Pass(arrays, record, data.pieces, {"batch_size": data.batch_size}, overwrite=overwrite) as work:
        for rows, pixels in work.over(data.loader, description="first order"):
            with vit.record(*(order.activations if order else ())) as cache:
                representation = vit(pixels)
            unit = scaled(representation)
            ablated = [unit[:, None]]
            if order:
                parts = order.parts(cache, representation)
                for own, mean in zip((parts.heads.sum(dim=2), parts.mlps), mean_parts, strict=True):
                    change = mean - own  # [B, L, D]
                    ablated += [unit[:, None] + change, unit[:, None] + change.cumsum(dim=1)]
            for layer in indirect:
                with vit.edit({f"blocks.{layer}.mlp.post": replaced(mean_p[layer])}):
                    ablated.append(scaled(vit(pixels))[:, None])
            work[path][rows] = predicted_classes(torch.cat(ablated, dim=1), classifier)
    return dict(zip(names, np.load(path).T, strict=True))


def drawn(total, count, seed=0):
    """`count` of `total` neurons or images, ascending, by seed."""
    return np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))


@torch.inference_mode()
def drawn_effects(clip, data, folder, layer, mean_p, neurons, overwrite=False):
    """Effects of drawn neurons of a layer in three ways, and what deleting them does: float32 [images, 4, n,
    D], by EFFECTS.

    "deleted" is what the representation loses when the neuron's activations become 0 in the running model;
    "indirect" when they become their mean. The forward passes are in float32, whatever the precision of
    others: one neuron is less than bfloat16's
    rounding. mean_p: [T, N] of the layer. neurons: which.
    """
    vit, path = HookedViT(clip.vit.visual), folder / f"{data.name}_{layer}_{len(neurons)}_drawn.npy"
    arrays = {path: ((len(data.images), len(EFFECTS), len(neurons), vit.D), "float32")}
    record = {key: value for key, value in clip.record.items() if key != "precision"}
    record |= {
        **data.images.record,
        "layer": layer,
        "neurons": [int(n) for n in neurons],
        "average": digest(mean_p),
    }
    with Pass(arrays, record, data.pieces, {"batch_size": data.batch_size}, overwrite=overwrite) as work:
        if not work.finished:
            second, direct = fold(vit, layer), None if vit.pooling == "attention" else fold_direct(vit, layer)
            changes = [
                IndirectEffects(vit, layer, mean, neurons) for mean in (mean_p, torch.zeros_like(mean_p))
            ]
        for rows, pixels in work.over(data.loader, description=f"layer {layer}"):
            representation, [phi] = second_order(vit, pixels, [second])
            with vit.record(*changes[0].activations, *vit.path(vit.L)) as cache:
                vit(pixels)
            found = [of_neurons(phi, neurons), *(change(cache, representation) for change in changes)]
            if direct is None:
                found.insert(0, torch.zeros_like(found[0]))
            else:
                own = direct_effects(vit, cache, direct, scale=COEFFICIENT / representation.norm(dim=-1))
                found.insert(0, of_neurons(own, neurons))
            work[path][rows] = torch.stack(found, dim=1)
    return read_array(path, mmap=True)


def of_neurons(phi, neurons):
    """The effects of some neurons of a `SecondOrder`, [B, n, D]."""
    directions = phi.directions._replace(values=phi.directions.values[:, neurons])
    return SecondOrder(phi.C[:, :, neurons], phi.kappa, directions).dense()


def explained(effects, k=None):
    """Share of the squared norm of one neuron's centred effects along their first component.

    effects: [images, D]. k: only the k largest, not centred again; None for all.
    """
    centred = effects - effects.mean(axis=0)
    if k is not None:
        centred = centred[np.argsort(-np.linalg.norm(centred, axis=1), kind="stable")[:k]]
    squares = np.linalg.svd(centred, compute_uv=False) ** 2
    return float(squares[0] / max(squares.sum(), 1e-300))


def agreement(effects, truth):
    """Pearson correlation of one neuron's effects with what happens, over all images and output dimensions,
    both centred over
    images: [images, D] each."""
    a, b = ((x - x.mean(axis=0)).ravel().astype(np.float64) for x in (effects, truth))
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300))


class ManyRebuilt:
    """`Rebuilt` with several sets of vectors: [B, V, D]. directions, mean: of the layer. vectors: list of [N,
    D].
    """

    def __init__(self, directions, mean, vectors):
        self.directions, self.each = directions, [Rebuilt(directions, mean, item) for item in vectors]

    def __call__(self, representation, phi):
        base = self.each[0].base(representation, phi)
        return torch.stack([base + item.projected(phi) for item in self.each], dim=1)
