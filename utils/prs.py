"""Compute second-order effects, the projected residual stream of MLP neurons (eq. 5 and 11 of the paper).

phi_n(I) is what neuron n of MLP layer m adds to the representation of image I through the attention of later
layers, straight to the output, with attention probabilities and LayerNorm statistics held fixed (eq. 5). It
is linear in the activations p[i, n], so it factorises into numbers of the image and of the weights (eq. 11):

    phi_n(I) = sum_k C[k, n](I) B[k, n] + kappa(I)    k = (l, h): K = (L - 1 - m) H heads of layers l > m

    C[k, n] = coefficient / (|rep| sigma_post)  sum_i  a_k[i] / sigma_l[i]  p[i, n]
    B[k, n] = ((w_n * gamma_l) W_V W_O * gamma_post) P
    kappa   = the neurons' equal shares of all LayerNorm means and biases

`effect` computes C, `fold` B and `constant` kappa. LayerNorms inside branches are further factors of a and of
w and W_O (`utils.model.branches`). Other units (`utils.units`) have their own p and w, and kappa is 0.

Letters: B images, T tokens (0: class token), L layers, H heads, N neurons, widths d, e = d/H and D (output).
"""

from typing import NamedTuple

import torch
from torch import Tensor, cat, einsum

COEFFICIENT = 100.0  # representations are scaled to this norm, and effects with them


class Directions(NamedTuple):
    """Directions are the weights' part of the effects of one layer: B[k, n] = values[k, n] @ outputs[k]."""

    layer: int
    values: Tensor  # [K, N, e]      (w_n * gamma_l) W_V: neuron n written into head k
    outputs: Tensor  # [K, e, D]     (W_O * gamma_post) P: head k written into the representation
    constants: Tensor | None  # [2K+3, D] (and 4 for each attention with norms inside), weighed by `constant`
    units: object = None  # of `utils.units`; None for neurons

    @property
    def recorded(self):
        """The names of the activations from which p is known."""
        return self.units.recorded if self.units is not None else [f"blocks.{self.layer}.mlp.post"]

    def B(self, neurons=slice(None)):
        """Return the directions of some neurons, [n, K, D]."""
        return einsum("kne,keo->nko", self.values[:, neurons], self.outputs)


class SecondOrder(NamedTuple):
    """A SecondOrder is the second-order effects of one layer on a batch of images, factorised."""

    C: Tensor  # [B, K, N]
    kappa: Tensor  # [B, D]
    directions: Directions
    p: Tensor | None = None  # [B, T, N], the activations

    def dense(self):
        """Return the effects themselves, phi [B, N, D] (eq. 11)."""
        C = self.C.permute(2, 0, 1).contiguous()  # BLAS needs a unit stride; without, it is 100 times slower
        return torch.bmm(C, self.directions.B()).transpose(0, 1) + self.kappa[:, None]

    def sum(self):
        """Return sum_n phi_n [B, D], without forming phi."""
        heads = einsum("bkn,kne->bke", self.C, self.directions.values)
        return einsum("bke,keo->bo", heads, self.directions.outputs) + self.C.shape[-1] * self.kappa


@torch.inference_mode()
def second_order(vit, images, directions, coefficient=COEFFICIENT):
    """Run one forward pass; return the representations, and the second-order effects of some layers.

    vit: HookedViT. images: [B, 3, side, side], transformed. directions: a list of `Directions`.
    coefficient: norm of a representation, in whose units the effects are.
    Returns representation [B, D], not normalised, and an iterator over the `SecondOrder` of each layer, which
    computes them when they are asked for, so that one layer's are in memory at a time.
    """
    first = min(item.layer for item in directions)
    activations = [name for item in directions for name in item.recorded]
    with vit.record(*vit.names_from(first + 1), *activations) as cache, vit.class_token_last():
        representation = vit(images)
    vit.read_rows(cache)
    scale = coefficient / representation.norm(dim=-1)  # [B]
    return representation, (effect(vit, cache, item, scale) for item in directions)


def effect(vit, cache, directions, scale):
    """Return the `SecondOrder` of one layer: C = a p, summed over tokens (eq. 5; factors of eq. 11 in a).

    cache: recorded activations; those of this layer are dropped. scale: coefficient / |rep| [B].
    """
    units = directions.units
    own = {name: cache.pop(name) for name in directions.recorded}
    p = units.activations(own) if units is not None else own.popitem()[1]  # [B, T, N]
    rows, means, inside = [], [], []  # a/sigma [B, H, T]; of LN1 [B, T]; of LayerNorms in the branch [B, 4]
    for l in vit.later(directions.layer):
        mean, std = vit.token_statistics(cache, directions.layer, l)
        rows.append(vit.row(cache, l) / std[:, None])
        means.append(mean)
        if vit.has_inside(l):
            inside.append(vit.inside_numbers(cache, l))
    post = (1 / cache["ln_post.std"], cache["ln_post.mean"])  # [B]
    kappa = scale.new_zeros(len(scale), directions.outputs.shape[-1])
    if units is None:
        kappa = scale[:, None] * constant(rows, means, inside, *post, directions.constants)
    a = cat(rows, dim=1) * (scale * post[0])[:, None, None]  # [B, K, T]
    C = torch.bmm(p.mT, a.mT).mT  # a neuron's K coefficients lie together in memory
    return SecondOrder(C if units is None else units.arranged(C), kappa, directions, p)


def constant(rows, means, inside, rstd_post, mu_post, constants):
    """Return kappa / scale [B, D], which no neuron owns alone: all means and biases of eq. 11.

    [sum_i a/sigma, sum_i a mu/sigma, inside, 1, mu_post] / sigma_post, and 1, weigh the rows of `constants`.
    """
    s = cat(rows, dim=1).sum(dim=-1)  # [B, K]
    t = cat([einsum("bht,bt->bh", *pair) for pair in zip(rows, means, strict=True)], dim=1)  # [B, K]
    one = torch.ones_like(mu_post)[:, None]
    weights = cat([s, t, *inside, one, mu_post[:, None]], dim=1) * rstd_post[:, None]
    return cat([weights, one], dim=1) @ constants


@torch.no_grad()
def fold(vit, layer, units=None):
    """Fold every path from MLP `layer` to the output into `Directions` (float64 inside, float32 out).

    Constants of LayerNorms and biases are divided equally among the contributors of the sum that they are
    applied to (eq. 11): c = (1 + 2 l) N before attention l, N behind an MLP, c H behind attention l, and
    c (1 + 2 L) H at the output. A pooling attention counts as l = L, and c H contribute to the output.
    Units are centred themselves at every LayerNorm, and have no share of constants.
    """
    w, b_out = vit.mlp_weights(layer) if units is None else (units.centred(), 0)
    P, gamma_post, constant_post = vit.output_weights(centred=units is not None)
    values, outputs, with_s, with_t, with_inside = [], [], [], [], []
    rest = torch.zeros(3, vit.D).to(P)
    for l in vit.later(layer):
        gamma, beta, c_norm = vit.norm_weights(layer, l)
        W_V, b_V, W_O, b_O = vit.head_weights(l, centred=units is not None)
        out = (W_O * gamma_post) @ P  # [H, e, D]
        outputs.append(out)
        values.append(einsum("nd,hed->hne", w * gamma, W_V).to(vit.dtype))
        c = vit.contributors(l)  # to the sum that attention l reads
        c_post = c * vit.summands  # and to the sum that the last LayerNorm normalises
        with_s.append(einsum("d,hed,heo->ho", gamma * b_out / vit.N, W_V, out))
        with_t.append(einsum("d,hed,heo->ho", -gamma / c_norm, W_V, out))
        fixed = einsum("he,heo->o", einsum("d,hed->he", beta / c_norm, W_V) + b_V / c, out)
        if vit.has_inside(l):
            own = vit.inside_weights(l).sum(dim=1) / c  # [3, d']
            with_inside.append(cat([fixed[None], (own * gamma_post) @ P]))
        else:
            rest[0] += fixed
        rest[0] += (b_O * gamma_post) @ P / c  # b_O / (c H) for each of the H heads
        rest[1] -= gamma_post @ P * len(W_V) / c_post
        rest[2] += constant_post * len(W_V) / c_post
    folded = (cat(values), cat(outputs), cat([*with_s, *with_t, *with_inside, rest]))
    values, outputs, constants = (x.to(vit.device, vit.dtype) for x in folded)
    return Directions(layer, values, outputs, constants if units is None else None, units)


def fold_layers(vit, layers):
    """Fold several layers, ascending. They share the `outputs` of common heads as views."""
    folded = [fold(vit, layer) for layer in layers]
    outputs = folded[0].outputs
    return [item._replace(outputs=outputs[-len(item.outputs) :]) for item in folded]
