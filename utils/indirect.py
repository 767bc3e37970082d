"""Measure indirect effects: the change of the representation when neurons act as on average (section 3.2).

A neuron's activations are replaced by their mean for each token, over a data set, and the model runs on: no
attention and no LayerNorm is held fixed. Letters as in `utils.prs`.
"""

import numpy as np
import torch

from utils.prs import COEFFICIENT, second_order
from utils.runtime.distributed import is_rank_zero
from utils.runtime.passes import Totals
from utils.runtime.sums import fixed, mean_of

TOGETHER = 64  # changed images in one forward pass of the later blocks


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
            work.state[mean] += fixed(phi.p)
        for name in acts:
            work.state[name] += phi.p.any(dim=1).sum(dim=0).cpu().numpy()
        return phi._replace(p=None)

    def write(self, work, images):
        """Write the means over all `images`, once all processes are here."""
        if work.finished:
            return
        gathered = work.gather(list(self.sums))
        for layer, names in self.names.items() if is_rank_zero() else ():
            mean, *acts = (gathered[name] for name in names)
            path, *others = self.paths[layer]
            work[path][:] = mean_of(mean, images)
            for path, counts in zip(others, acts, strict=True):
                work[path][:] = sum(counts).astype(np.int32)


def replaced(mean):
    """Return a change for `HookedViT.edit`: every image gets the mean activations [T, N]."""
    return lambda p: mean[: p.shape[1]].to(p.dtype).expand_as(p)


class IndirectEffects:
    """An `IndirectEffects` measures the indirect effects of single neurons of one layer.

    Only the blocks after the layer run again, once for each image and neuron.

    vit: HookedViT.
    layer: MLP layer.
    mean: [T, N], mean activations over a data set.
    neurons: list of the neurons.
    """

    def __init__(self, vit, layer, mean, neurons):
        self.vit, self.layer, self.neurons = vit, layer, list(neurons)
        self.mean = mean[:, self.neurons]  # [T, n]
        self.w = vit.mlp_weights(layer)[0][self.neurons].to(mean)  # [n, d]
        self.activations = vit.names_of_sum(layer)

    @torch.inference_mode()
    def __call__(self, cache, representation, coefficient=COEFFICIENT):
        """Return the loss of the representation, in units of second-order effects, [B, n, D].

        cache: the recorded activations.
        representation: [B, D], the model's own, not scaled.
        coefficient: the norm that a representation is scaled to.
        """
        p = cache[self.activations[0]]  # [B, T, N]
        scale = coefficient / representation.norm(dim=-1)
        effects = []
        for b in range(len(p)):
            change = self.mean - p[b][:, self.neurons]  # [T, n]
            lost = []
            for c, w in zip(change.T.split(TOGETHER), self.w.split(TOGETHER), strict=True):
                images = torch.full((len(w),), b, device=w.device)
                lost.append(representation[b] - self.vit.after_shift(cache, self.layer, images, c, w))
            effects.append(scale[b] * torch.cat(lost))
        return torch.stack(effects)


class Deletions:
    """`Deletions` takes neurons of one layer away, each on its own images, in the running model.

    A deleted neuron acts as on average: its activations are put at their means. Only the blocks after the
    layer run again.

    vit: HookedViT.
    layer: MLP layer.
    mean: [T, N], mean activations over the training images.
    units: of `utils.units`, which are taken away in place of neurons.
    """

    def __init__(self, vit, layer, mean, units=None):
        self.vit = vit
        self.layer = layer
        self.mean = mean
        self.units = units
        self.w = (vit.mlp_weights(layer)[0] if units is None else units.vectors).to(mean)  # [N, d]
        self.activations = vit.names_of_sum(layer) if units is None else units.names_of_sum()

    @torch.inference_mode()
    def __call__(self, pixels, images, neurons, coefficient=COEFFICIENT):
        """Return what the unit representations lose, coefficient (rep/|rep| - rep'/|rep'|), [pairs, D].

        pixels: [B, 3, side, side].
        images, neurons: int64 [pairs], which neuron is taken away on which image of the batch.
        """
        with self.vit.record(*self.activations) as cache:
            unit = torch.nn.functional.normalize(self.vit(pixels), dim=-1)
        p = cache[self.activations[0]] if self.units is None else self.units.activations(cache)  # [B, T, N]
        after = self.vit.after_shift if self.units is None else self._after_units
        lost = []
        for b, n in zip(images.split(TOGETHER), neurons.split(TOGETHER), strict=True):
            change = self.mean.T[n] - p[b, :, n]  # [pairs, T]
            without = after(cache, self.layer, b, change, self.w[n])
            lost.append(unit[b] - torch.nn.functional.normalize(without, dim=-1))
        return coefficient * torch.cat(lost)

    def _after_units(self, cache, layer, b, c, w):
        """Return what `HookedViT.after_shift` does, if units write more: they may stand before an MLP."""
        written = c[..., None] * w[:, None]  # [pairs, T, d]
        return self.vit.after(layer, self.units.moved(self.vit, cache, layer, b, written))


class Acting:
    """Acting are the (neuron, image) pairs of drawn neurons and the images on which each acts most.

    norms: centred norms of the effects on all images, [images, n].
    count: images for a neuron.

    Attributes: images, places (of the neuron among the drawn ones) of every pair, in the order of the images.
    """

    def __init__(self, norms, count):
        top = np.argsort(-norms, axis=0, kind="stable")[:count]  # [count, n], of equal ones the earlier image
        places = np.broadcast_to(np.arange(norms.shape[1]), top.shape)
        order = np.argsort(top, axis=None, kind="stable")
        self.count = len(top)
        self.images = top.reshape(-1)[order]
        self.places = places.reshape(-1)[order]

    def of(self, rows):
        """Return the pairs of a slice of the images: images counted from its start, places; int64 tensors."""
        first, last = np.searchsorted(self.images, [rows.start, rows.stop])
        images = torch.from_numpy(self.images[first:last] - rows.start)
        return images, torch.from_numpy(self.places[first:last])


def agreement(lost, vectors, texts):
    """Return how well vectors say what deletions do: the correlation over texts of both, [..., n].

    lost: the mean loss of the representation by every deletion, [n, D].
    vectors: what is said of it, [..., n, D].
    texts: [T, D], text vectors.
    """
    wide = texts.double() - texts.double().mean(dim=0)
    gram = wide.T @ wide  # centred over texts, so correlations are cosines by this form
    lost, vectors = lost.double(), vectors.double()
    own = (lost @ gram * lost).sum(dim=-1) * (vectors @ gram * vectors).sum(dim=-1)
    return ((lost @ gram * vectors).sum(dim=-1) / own.clamp_min(1e-300).sqrt()).float()
