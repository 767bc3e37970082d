"""Find the neurons that bring a score about, and prove it by taking them away. Beyond the paper.

    s = coefficient <rep/|rep|, v>          v [D]: a unit text vector, or the difference of two

The contribution of neuron n of MLP m is what s loses, to first order, when the neuron acts as on average:

    contribution[m, n] = sum_i (p_m[i, n] - mean_m[i, n]) <g_m[i], w_n>          g_m[i] = ds/dz_m[i]

z_m is the residual stream after block m, so that one backward pass gives g of all layers; where a LayerNorm
stands between the neurons and the stream, z_m is what it is given. Second-order effects along v have the same
form, with attention and LayerNorms held fixed: g then is what later heads read,

    g_m[i] = coefficient / (|rep| sigma_post) sum_k a_k[i] / sigma_l[i] u_k       <B[k, n], v> = <w_n, u_k>

A deletion is true: activations are put at their means and the model runs on. Other units (`utils.units`) have
their own p and w, and z is the stream after what their site adds; their second-order effects are centred.
Letters as in `utils.prs`.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import einsum
from torch.nn.functional import normalize

from utils.prs import COEFFICIENT

TOGETHER = 16  # changed images in one forward pass


class Decision(NamedTuple):
    """A Decision is a batch of images on the way to a score."""

    representation: torch.Tensor  # [B, D], not normalised
    p: dict  # {layer: [B, T, N]}, activations less their means
    size: dict  # {layer: [B, N]}, sum of |activations| over tokens
    g: dict  # {layer: [B, T, d]}, ds/dz
    rows: dict  # activations of `HookedViT.names_from`, with attention rows


class Contributions:
    """A `Contributions` finds what every neuron of some layers adds to a score.

    vit: HookedViT.
    means: {layer: [T, N]}, activations that a neuron has where it is taken away.
    v: [D].
    units: of `utils.units`, in place of the neurons of the one layer that there is in `means`.
    """

    def __init__(self, vit, means, v, units=None):
        self.vit = vit
        self.means = means
        self.units = units
        with torch.inference_mode(False):
            self.v = v.clone()  # so that a gradient can go through it
        self.layers = list(means)
        of_neurons = units is None
        self.w = {  # [N, d]
            l: (vit.mlp_weights(l)[0] if of_neurons else units.vectors).to(mean) for l, mean in means.items()
        }
        self.u = read_along(vit, v, vit.later(self.layers[0]), centred=not of_neurons)
        if vit.post_norm:
            self.gamma = {l: vit.norm_weights(l, l + 1)[0].to(mean) for l, mean in means.items()}
        self.names = {l: f"blocks.{l}.mlp.post" for l in self.layers}
        self.added = {l: f"blocks.{l}.mlp.sum" if of_neurons else units.added for l in self.layers}
        self.recorded = list(self.names.values()) if of_neurons else units.recorded

    def score(self, representation):
        """Return s [B] of representations [B, D]."""
        return COEFFICIENT * normalize(representation, dim=-1) @ self.v.to(representation)

    def __call__(self, pixels):
        """Return the `Decision` about images [B, 3, side, side]: one forward and one backward pass."""
        z = {}
        changes = {name: partial(_keep, z, l) for l, name in self.added.items()}
        wanted = dict.fromkeys([*self.recorded, *self.vit.names_from(self.layers[0] + 1)])
        with torch.inference_mode(False), torch.enable_grad(), self.vit.class_token_last():
            with self.vit.record(*wanted) as cache, self.vit.edit(changes):
                representation = self.vit(pixels.clone())
            s = self.score(representation).sum()
            # what neurons add to the stream has the gradient of the stream after it
            g = dict(zip(z, torch.autograd.grad(s, list(z.values())), strict=True))
        self.vit.read_rows(cache)
        p = self._activations(cache)
        size = {l: of.abs().sum(dim=1) for l, of in p.items()}
        for l, mean in self.means.items():
            p[l] = p[l] - mean
        return Decision(representation.detach(), p, size, g, cache)

    @torch.no_grad()
    def _activations(self, cache):
        """Return the activations of every layer, {layer: [B, T, N]}."""
        if self.units is not None:
            return {self.layers[0]: self.units.activations(cache)}
        return {l: cache.pop(name) for l, name in self.names.items()}

    def values(self, decision):
        """Return {source: [B, layers, N]}, by which neurons can be chosen."""
        return {
            "contribution": self.contributions(decision),
            "second_order": self.second_order(decision),
            "activation_norm": self.activation_norm(decision),
        }

    def contributions(self, decision):
        """Return the contributions of all neurons, [B, layers, N]."""
        return self._along(decision.p, decision.g)

    def second_order(self, decision):
        """Return the second-order effects along v, about those at the means, [B, layers, N]."""
        return self._along(decision.p, self.read_by_attention(decision))

    def activation_norm(self, decision):
        """Return activations, summed over tokens, times the norms of what neurons write, [B, layers, N]."""
        return torch.stack([decision.size[l] * self.w[l].norm(dim=1) for l in self.layers], dim=1)

    def _along(self, p, g):
        """Return sum_i p[i, n] <g[i], w_n> for all neurons, layer by layer: [B, layers, N]."""
        found = [(p[l] * (g[l] @ self.w[l].T)).sum(dim=1) for l in self.layers]
        return torch.stack(found, dim=1)

    def read_by_attention(self, decision):
        """Return g with attention and LayerNorms held fixed, {layer: [B, T, d]}."""
        total = 0
        found = {}
        for l in reversed(self.vit.later(self.layers[0])):
            total = total + einsum("bht,hd->btd", self._rows(decision, l), self.u[l])
            found[l - 1] = total
        last = max(found)  # behind a pooling attention every layer is read by it alone
        found = {l: found[l] if l in found else found[last] for l in self.layers}
        return {l: self._through_post(decision, l, g) for l, g in found.items()}

    def _rows(self, decision, l):
        """Return coefficient / (|rep| sigma_post) a / sigma of attention l, [B, H, T]."""
        rows = decision.rows
        scale = COEFFICIENT / (decision.representation.norm(dim=-1) * rows["ln_post.std"])
        a = self.vit.row(rows, l)
        if not self.vit.post_norm:
            a = a / self.vit.token_statistics(rows, l - 1, l)[1][:, None]
        return scale[:, None, None] * a

    def _through_post(self, decision, l, g):
        """Return g of what the neurons of MLP l add to, from that of the residual stream, [B, T, d]."""
        if not self.vit.post_norm:
            return g
        _, std = self.vit.token_statistics(decision.rows, l, l + 1)
        return g * self.gamma[l] / std[..., None]

    def of_heads(self, decision, layer, neuron):
        """Return the second-order effect of a neuron through every head, {l: [B, H]}: C[k, n] <B[k, n], v>.

        l = L is a pooling attention.
        """
        p = decision.p[layer][..., neuron]
        w = self.w[layer][neuron]
        if self.vit.post_norm:
            w = w * self.gamma[layer]
            p = p / self.vit.token_statistics(decision.rows, layer, layer + 1)[1]
        found = {}
        for l in self.vit.later(layer):
            found[l] = einsum("bht,bt->bh", self._rows(decision, l), p) * (self.u[l] @ w)
        return found

    def of_tokens(self, decision, layer, neuron):
        """Return a neuron's contribution by token, [B, T]."""
        return decision.p[layer][..., neuron] * (decision.g[layer] @ self.w[layer][neuron])

    @torch.inference_mode()
    def without(self, pixels, taken):
        """Return the representations [B, D] of images with neurons taken away in the running model.

        pixels: [B, 3, side, side].
        taken: bool [B, layers, N], the neurons that are put at their means. To keep only some, take the rest.
        """
        found = []
        for some, of in zip(pixels.split(TOGETHER), taken.split(TOGETHER), strict=True):
            if self.units is not None:
                found.append(self._without_units(some, of[:, 0]))
                continue
            places = [place for place in range(len(self.layers)) if of[:, place].any()]
            layers = {self.layers[place]: of[:, place] for place in places}
            changes = {self.names[l]: partial(_put, self.means[l], mask) for l, mask in layers.items()}
            with self.vit.edit(changes), self.vit.class_token_last():
                found.append(self.vit(some))
        return torch.cat(found)

    def _without_units(self, pixels, mask):
        """Return `without` of units: only the blocks after them run again. mask: bool [B, N]."""
        [layer] = self.layers
        with self.vit.record(*self.units.names_of_sum()) as cache:
            self.vit(pixels)
        change = (self.means[layer] - self.units.activations(cache)) * mask[:, None]
        moved = self.units.moved(self.vit, cache, layer, slice(None), change @ self.w[layer])
        with self.vit.class_token_last():
            return self.vit.after(layer, moved)


def _keep(z, layer, added):
    """Keep what an MLP adds to the residual stream, as a tensor that has a gradient."""
    z[layer] = added if added.requires_grad else added.requires_grad_()
    return z[layer]


def _put(mean, mask, p):
    """Return activations [B, T, N] that are at the mean [T, N] where a mask [B, N] says so."""
    return torch.where(mask[:, None], mean.to(p.dtype), p)


def read_along(vit, v, attentions, centred=False):
    """Return what the heads of some attentions read from the residual stream along v, {l: u [H, d]}.

    <B[k, n], v> = <w_n, u_k>, so that no direction of `utils.prs.fold` is needed.

    centred: for units that are centred at every LayerNorm.
    """
    P, gamma_post, _ = vit.output_weights(centred=centred)
    read = gamma_post * (P @ v.to(P))
    found = {}
    for l in attentions:
        W_V, _, W_O, _ = vit.head_weights(l, centred=centred)
        # a Post2 is another one for each layer of neurons, and passed later
        gamma = 1.0 if vit.post_norm else vit.norm_weights(l - 1, l)[0]
        u = gamma * einsum("hed,heo,o->hd", W_V, W_O, read)
        found[l] = (u - u.mean(dim=1, keepdim=True) if centred else u).to(v)
    return found
