"""Keep only each neuron's largest effects, of many layers, without storing all of them.

This is `--keep top`. `compute_pcas.py` needs every neuron's mean effect, the centred norm of every effect,
and the k largest centred effects. Two passes over the images give these. The first sums the coefficients. The
second takes the norms about the mean (`utils.norms`) and keeps the coefficients of the k largest.

Letters as in `utils.prs`, and k images per neuron.
"""

import numpy as np
import torch

from utils.norms import CentredNorms
from utils.prs import second_order
from utils.runtime.distributed import is_rank_zero
from utils.runtime.errors import UserError
from utils.runtime.passes import Totals

WEIGHT_PARTS = ("values", "outputs")
FULL = ("bias", *WEIGHT_PARTS)  # written with --keep full, besides the large arrays
TOP = ("bias", "image_norms", "top_coefficients", "top_images", "top_mean", *WEIGHT_PARTS)  # with --keep top
# Sums are int64 multiples of 1/FIXED: integer addition is exact, so the order of batches and the number of
# processes do not matter.
FIXED = 2.0**32
ENTERING = 8192  # effects that are copied into the kept ones at a time
MERGED_AT_ONCE = 64  # neurons whose kept effects are merged at a time
LAST_IMAGE = 2**32 - 1


class Activations:
    """Activations are the mean post-GELU activations of some layers at every token, [T, N] each.

    Of a dictionary's units they are the mean activations of these, and on how many images each acts. They are
    summed in a `Pass`: an `Activations` is made before it, for its `sums` and `arrays`.

    clip: `Clip`. Pairs have no activations of their own.
    layers: MLP layers.
    results, names: `Results`, and the fields of file names besides the layer.
    """

    def __init__(self, clip, layers, results, names):
        self.vit = clip.vit
        layers = layers if clip.units is None or clip.units.act else []
        kinds = ["activations"] if clip.units is None else ["activations", "acts"]
        self.arrays = results.arrays(kinds, layers=layers, **names)
        self.paths = {layer: [results.path(kind, layer=layer, **names) for kind in kinds] for layer in layers}
        self.names = {layer: [f"{kind}{layer}" for kind in kinds] for layer in layers}
        self.sums = Totals()
        for layer in layers:
            for name, path in zip(self.names[layer], self.paths[layer], strict=True):
                self.sums[name] = (self.arrays[path][0], "int64")

    def second_order(self, work, pixels, directions, coefficient):
        """Run `utils.prs.second_order` on a batch, and add its activations to the sums of a `Pass`.

        Returns what `utils.prs.second_order` returns.
        """
        representation, effects = second_order(self.vit, pixels, directions, coefficient)

        def added():
            for _ in directions:
                yield self._add(work, next(effects))

        return representation, added()

    def _add(self, work, phi):
        """Add the activations of a layer to the sums; return its effects without them."""
        mean, *acts = self.names.get(phi.directions.layer, [None])
        if mean:
            work.state[mean] += fixed(phi.p, FIXED)
        for name in acts:
            work.state[name] += (phi.p != 0).any(dim=1).sum(dim=0).cpu().numpy()
        return phi._replace(p=None)

    def write(self, work, images):
        """Write the means over all `images`, once all processes are here."""
        if work.finished:
            return
        gathered = work.gather(list(self.sums))
        for layer, names in self.names.items() if is_rank_zero() else ():
            mean, *acts = (sum(gathered[name]) for name in names)
            path, *others = self.paths[layer]
            work[path][:] = (mean / (images * FIXED)).astype(np.float32)
            for path, count in zip(others, acts, strict=True):
                work[path][:] = count.astype(np.int32)


def fixed(values, scale):
    """Return the sum over the first axis as int64 multiples of 1/scale, an array."""
    return values.sum(dim=0).cpu().double().mul_(scale).round_().to(torch.int64).numpy()


def start_of(results, layers, k, images):
    """Return the state (sums and keys) and scratch (kept coefficients) of the pass, as `Pass` takes them.

    results: `Results` of a loaded model.

    Raises UserError when there are fewer images than k.
    """
    if images < k:
        raise UserError(f"there are {images} images, and --top_k_pca {k} needs {k}; lower it, or --subsample")
    state = {}
    scratch = {}
    for layer in layers:
        N, K, D = (results.sizes(layer)[letter] for letter in "NKD")
        state[f"C{layer}"] = ((K, N), "int64")
        state[f"kappa{layer}"] = ((D,), "int64")
        state[f"keys{layer}"] = ((N, k), "uint64")
        scratch[f"top{layer}"] = ((N, k, K), "float32")
    return state, scratch


class Sums:
    """Sums are those of C and kappa over images, in the state of a `Pass`.

    work: `Pass`.
    coefficient: as in `second_order`.
    """

    def __init__(self, work, coefficient):
        self.work = work
        self.scale = FIXED / coefficient

    def add(self, phi):
        """Add the effects of a batch, a `SecondOrder`."""
        for name, values in (("C", phi.C), ("kappa", phi.kappa)):
            self.work.state[f"{name}{phi.directions.layer}"] += fixed(values, self.scale)

    def means(self, layers, images):
        """Return {layer: (C [K, N], kappa [D])}, means over all `images`, once all processes are here."""
        names = {layer: (f"C{layer}", f"kappa{layer}") for layer in layers}
        gathered = self.work.gather([name for pair in names.values() for name in pair])
        means = {}
        for name, parts in gathered.items():
            mean = sum(parts) / (images * self.scale)
            means[name] = torch.from_numpy(mean.astype(np.float32))
        return {layer: tuple(means[name] for name in pair) for layer, pair in names.items()}


class TopK:
    """TopK is the k largest centred effects of every neuron of a layer, in the state and scratch of a `Pass`.

    The state has keys, uint64 [N, k]: `key_of` the kept effects, 0 where none is kept yet. The scratch has
    their centred coefficients, float32 [N, k, K].

    work: `Pass`.
    directions: `Directions` of the layer.
    mean: C [K, N] and kappa [D] of the mean effects.
    """

    def __init__(self, work, directions, mean):
        device = directions.values.device
        self.directions = directions
        self.keys = work.state[f"keys{directions.layer}"]
        self.scratch = work.scratch[f"top{directions.layer}"]
        self.mean_C, self.mean_kappa = (part.to(device) for part in mean)
        self.mean_rows = self.mean_C.T.contiguous()  # [N, K]
        self.norms = CentredNorms(directions, (self.mean_C, self.mean_kappa))

    @classmethod
    def of_layers(cls, work, directions, sums, images):
        """Return a `TopK` for each of some `Directions`, about the means of all `images`. sums: `Sums`."""
        means = sums.means([item.layer for item in directions], images)
        return [cls(work, item, means[item.layer]) for item in directions]

    def mean(self):
        """Return the mean effects [N, D]."""
        heads = torch.einsum("kn,kne->nke", self.mean_C, self.directions.values)
        return torch.einsum("nke,keo->no", heads, self.directions.outputs) + self.mean_kappa

    def add(self, phi, first):
        """Let the effects of a batch take the places of smaller ones. first: index of its first image.

        Returns kappa [B, D] and norms [B, N].
        """
        norms = self.norms(phi).cpu().numpy()
        new = key_of(norms.T, np.arange(first, first + len(norms)))
        n, places, images = enter(self.keys, new)
        kept = torch.from_numpy(self.scratch.array)  # shares the memory; torch writes with several threads
        for part in np.array_split(np.arange(len(n)), len(n) // ENTERING + 1):
            m, b = (torch.from_numpy(index[part]).to(phi.C.device) for index in (n, images))
            centred = phi.C[b, :, m] - self.mean_rows[m]  # [entering, K]
            kept[torch.from_numpy(n[part]), torch.from_numpy(places[part])] = centred.cpu()
            self.scratch.release()
        return phi.kappa, norms


def enter(keys, new):
    """Replace keys [N, k] in place by larger ones of new [N, B].

    Returns neuron, place and column of each that enters.
    """
    k = keys.shape[1]
    neurons = np.flatnonzero(new.max(axis=1) > keys.min(axis=1))
    both = np.concatenate([keys[neurons], new[neurons]], axis=1)  # [n, k + B]
    leaving = both.argpartition(new.shape[1], axis=1)[:, : new.shape[1]]
    leaves = np.zeros(both.shape, bool)
    np.put_along_axis(leaves, leaving, True, axis=1)
    n, places = leaves[:, :k].nonzero()  # for each neuron as many leave as enter
    _, columns = (~leaves[:, k:]).nonzero()
    keys[neurons[n], places] = new[neurons[n], columns]
    return neurons[n], places, columns


def key_of(norms, images):
    """Return sort keys, uint64: larger norms first, and of equal norms the earlier image.

    The norm (float32) is in the high 32 bits, the reversed image index in the low 32.
    """
    bits = np.ascontiguousarray(np.abs(norms)).view(np.uint32)  # bits of non-negative floats rise with them
    return bits.astype(np.uint64) << np.uint64(32) | (LAST_IMAGE - images).astype(np.uint64)


def image_of(keys):
    """Return the images of `key_of`, int32."""
    return (LAST_IMAGE - (keys & np.uint64(LAST_IMAGE)).astype(np.int64)).astype(np.int32)


def write_top(work, tops, results, names):
    """Merge the processes' candidates into the results: per neuron the k largest, largest first.

    work: `Pass`.
    tops: a list of `TopK`.
    results, names: `Results`, and the fields of file names besides the layer.
    """
    if not tops:  # all is there
        return
    gathered = work.gather([f"keys{top.directions.layer}" for top in tops])
    if is_rank_zero():
        for top in tops:
            layer = top.directions.layer
            keys = np.concatenate(gathered[f"keys{layer}"], axis=1)  # [N, processes k]
            order = keys.argsort(axis=1)[:, ::-1][:, : top.keys.shape[1]]
            paths = {kind: results.path(kind, layer=layer, **names) for kind in TOP}
            work[paths["top_images"]][:] = image_of(np.take_along_axis(keys, order, axis=1))
            work[paths["top_mean"]][:] = top.mean()
            for start in range(0, len(order), MERGED_AT_ONCE):
                n = slice(start, start + MERGED_AT_ONCE)
                # mapped again each time: pages once read would count as this process's
                kept = work.gather_scratch(f"top{layer}")
                every = np.concatenate([file[n] for file in kept], axis=1)  # [n, processes k, K]
                work[paths["top_coefficients"]][n] = np.take_along_axis(every, order[n, :, None], axis=1)
    write_weights(work, [top.directions for top in tops], results, names)


def write_weights(work, directions, results, names):
    """Write the weights' part of the effects of some layers. Parameters: as in `write_top`.

    directions: a list of `Directions`.
    """
    if is_rank_zero():
        for item in directions:
            for kind in WEIGHT_PARTS:
                work[results.path(kind, layer=item.layer, **names)][:] = getattr(item, kind)
