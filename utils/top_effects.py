"""Second-order effects of many layers without storing all of them: only each neuron's largest ones stay
(`--keep top`).

`compute_pcas.py` needs every neuron's mean effect, the centred norm of every effect, and the k largest
centred effects. Two passes over the images give these. The first sums the coefficients. The second takes the
norms about the mean (`utils.norms`) and keeps the coefficients of the k largest. Shapes as in `utils.prs`; k
images per neuron.
"""

import numpy as np
import torch

from utils.norms import CentredNorms
from utils.prs import SecondOrder
from utils.runtime.distributed import is_rank_zero
from utils.runtime.errors import UserError

FULL = ("bias", "values", "outputs")  # written with --keep full, besides the large arrays
TOP = (
    "bias",
    "image_norms",
    "top_coefficients",
    "top_images",
    "top_mean",
    "values",
    "outputs",
)  # written with --keep top
FIXED = (
    2.0**32
)  # sums are int64 multiples of 1/FIXED: integer addition is exact, so batch order and process count do not matter
ENTERING = 8192  # effects that are copied into the kept ones at a time
MERGED = 64  # neurons whose kept effects are merged at a time
LAST_IMAGE = 2**32 - 1


def start_of(vit, layers, k, images):
    """State (sums and keys) and scratch (kept coefficients) of the pass, as `Pass` takes them.

    Raises UserError when there are fewer images than k.
    """
    if images < k:
        raise UserError(f"there are {images} images, and --top_k_pca {k} needs {k}; lower it, or --subsample")
    state, scratch = {}, {}
    for layer in layers:
        state[f"C{layer}"], state[f"kappa{layer}"] = ((vit.K(layer), vit.N), "int64"), ((vit.D,), "int64")
        state[f"keys{layer}"] = ((vit.N, k), "uint64")
        scratch[f"top{layer}"] = ((vit.N, k, vit.K(layer)), "float32")
    return state, scratch


def of_batch(a, p, kappa, directions):
    """The effects summed over a batch, as those of one image: one product for all images, and no C of
    each.
    """
    return SecondOrder(
        (a.transpose(0, 1).flatten(1) @ p.flatten(0, 1))[None], kappa.sum(dim=0, keepdim=True), directions
    )


class Sums:
    """Sums of C and kappa over images, in the state of a `Pass`. coefficient: as in `second_order`."""

    def __init__(self, work, coefficient):
        self.work, self.scale = work, FIXED / coefficient

    def add(self, phi):
        """Add the effects of a batch, a `SecondOrder`, of each image or by `of_batch`."""
        for name, values in (("C", phi.C), ("kappa", phi.kappa)):
            total = values.sum(dim=0).cpu().double().mul_(self.scale).round_().to(torch.int64)
            self.work.state[f"{name}{phi.directions.layer}"] += total.numpy()

    def means(self, layers, images):
        """Means over all `images` of all processes, {layer: (C [K, N], kappa [D])}, once every process is
        here.
        """
        names = {layer: (f"C{layer}", f"kappa{layer}") for layer in layers}
        gathered = self.work.gather([name for pair in names.values() for name in pair])
        mean = {
            name: (sum(parts) / (images * self.scale)).astype(np.float32) for name, parts in gathered.items()
        }
        return {layer: tuple(torch.from_numpy(mean[name]) for name in pair) for layer, pair in names.items()}


class TopK:
    """The k largest centred effects of every neuron of a layer, in the state and scratch of a `Pass`.

    The state has keys, uint64 [N, k]: `key_of` the kept effects, 0 where none is kept yet. The scratch has
    their centred coefficients, float32 [N, k, K].

    work: `Pass`.
    directions: `Directions` of the layer.
    mean: C [K, N] and kappa [D] of the mean effects.
    """

    def __init__(self, work, directions, mean):
        layer, device = directions.layer, directions.values.device
        self.directions, self.keys, self.scratch = (
            directions,
            work.state[f"keys{layer}"],
            work.scratch[f"top{layer}"],
        )
        self.mean_C, self.mean_kappa = (part.to(device) for part in mean)
        self.mean_rows = self.mean_C.T.contiguous()  # [N, K]
        self.norms = CentredNorms(directions, (self.mean_C, self.mean_kappa))

    def mean(self):
        """Mean effects [N, D]."""
        heads = torch.einsum("kn,kne->nke", self.mean_C, self.directions.values)
        return torch.einsum("nke,keo->no", heads, self.directions.outputs) + self.mean_kappa

    def add(self, phi, first):
        """Let the effects of a batch take the places of smaller ones. first: number of its first image.

        Returns kappa [B, D] and norms [B, N].
        """
        norms = self.norms(phi).cpu().numpy()
        n, places, images = enter(self.keys, key_of(norms.T, np.arange(first, first + len(norms))))
        kept = torch.from_numpy(self.scratch.array)  # the same memory; torch writes with several threads
        for part in np.array_split(np.arange(len(n)), len(n) // ENTERING + 1):
            m, b = (torch.from_numpy(index[part]).to(phi.C.device) for index in (n, images))
            centred = phi.C[b, :, m] - self.mean_rows[m]  # [entering, K]
            kept[torch.from_numpy(n[part]), torch.from_numpy(places[part])] = centred.cpu()
            self.scratch.release()
        return phi.kappa, norms


def enter(keys, new):
    """Replace keys [N, k] in place by larger ones of new [N, B]; returns neuron, place and column of each
    that enters.
    """
    k, B = keys.shape[1], new.shape[1]
    neurons = np.flatnonzero(new.max(axis=1) > keys.min(axis=1))
    both = np.concatenate([keys[neurons], new[neurons]], axis=1)  # [n, k + B]
    leaves = np.zeros(both.shape, bool)
    np.put_along_axis(leaves, both.argpartition(B, axis=1)[:, :B], True, axis=1)
    n, places = leaves[:, :k].nonzero()  # for each neuron as many leave as enter
    _, columns = (~leaves[:, k:]).nonzero()
    keys[neurons[n], places] = new[neurons[n], columns]
    return neurons[n], places, columns


def key_of(norms, images):
    """Sort keys, uint64: the norm (float32) in the high 32 bits, the reversed image index in the low 32, so
    that ties go to the earlier image."""
    bits = np.ascontiguousarray(np.abs(norms)).view(
        np.uint32
    )  # bits of floats that are not negative rise with them
    return bits.astype(np.uint64) << np.uint64(32) | (LAST_IMAGE - images).astype(np.uint64)


def image_of(keys):
    """Images of `key_of`, int32."""
    return (LAST_IMAGE - (keys & np.uint64(LAST_IMAGE)).astype(np.int64)).astype(np.int32)


def write_top(work, tops, path):
    """Merge the processes' candidates into the results: per neuron the k largest, descending, ties to the
    earlier image.

    work: `Pass`. tops: list of `TopK`. path: function (kind, layer=...) -> path of a result.
    """
    gathered = work.gather([f"keys{top.directions.layer}" for top in tops])
    for top in tops if is_rank_zero() else ():
        layer, k = top.directions.layer, top.keys.shape[1]
        keys = np.concatenate(gathered[f"keys{layer}"], axis=1)  # [N, processes k]
        order = keys.argsort(axis=1)[:, ::-1][:, :k]
        work[path("top_images", layer=layer)][:] = image_of(np.take_along_axis(keys, order, axis=1))
        for start in range(0, len(order), MERGED):
            n = slice(start, start + MERGED)
            kept = work.gather_scratch(
                f"top{layer}"
            )  # mapped again each time: pages once read would count as ours
            every = np.concatenate([file[n] for file in kept], axis=1)  # [n, processes k, K]
            work[path("top_coefficients", layer=layer)][n] = np.take_along_axis(
                every, order[n, :, None], axis=1
            )
        work[path("top_mean", layer=layer)][:] = top.mean()
    write_weights(work, [top.directions for top in tops], path)


def write_weights(work, directions, path):
    """Write the weights' part of the effects of some layers, a list of `Directions`; the rest as in
    `write_top`.
    """
    for item in directions if is_rank_zero() else ():
        for part in ("values", "outputs"):
            work[path(part, layer=item.layer)][:] = getattr(item, part)
