"""Compute first-order effects: what heads, MLPs and neurons write straight into the representation.

Section 3.2 and eq. 3 of the paper. The representation is the last LayerNorm and the projection of a sum: the
class token's embedding, and what every attention and every MLP adds to the class token (or to the average of
the patches, where the output is read from these). With its standard deviation held fixed that LayerNorm is
linear, so that

    rep  = J(embedding) + sum_l [ sum_h sum_i J(head_lh(i)) + J(mlp_l) ] + beta_post P
    J(c) = ((c - mean c) * gamma_post / sigma_post) P

    head_lh(i) = a_lh[0, i] ((x_l[i] W_V + b_V) W_O + b_O / H)
    mlp_l      = sum_n p_l[0, n] w_n + b_out

head_lh(i) is what head h of layer l takes from token i of its input x_l. J(p w_n) is a direct effect (eq. 3).

Letters as in `utils.prs`; everything is scaled by coefficient / |rep|, as second-order effects are.
"""

from typing import NamedTuple

import torch
from torch import Tensor, einsum

from utils.prs import COEFFICIENT, Directions, SecondOrder
from utils.runtime.errors import UserError


class ToOutput(NamedTuple):
    """`ToOutput` is J of a batch: the last LayerNorm, with its statistics held fixed, and the projection.

    weights: [d, D], gamma_post P, its columns centred, so that no mean has to be taken off.
    scale: [B], coefficient / (|rep| sigma_post).
    """

    weights: Tensor
    scale: Tensor

    def __call__(self, c):
        """Return J(c): c [B, ..., d] -> [B, ..., D]."""
        return (c @ self.weights) * self.scale.view(-1, *[1] * (c.ndim - 1))

    def pull(self, v):
        """Return the direction of the residual stream that v [B, D] is read from, [B, d].

        <J(c), v> = <c, pull(v)>.
        """
        return self.scale[:, None] * (v @ self.weights.T)


class Parts(NamedTuple):
    """`Parts` are the terms of a sum, the representation of norm `coefficient`."""

    embedding: Tensor  # [B, D], of the class token
    heads: Tensor  # [B, L, H, D]
    mlps: Tensor  # [B, L, D]
    constant: Tensor  # [B, D], beta_post P

    def sum(self):
        """Return the representation, [B, D]."""
        return self.embedding + self.heads.sum(dim=(1, 2)) + self.mlps.sum(dim=1) + self.constant


class FirstOrder:
    """A `FirstOrder` decomposes the representations of a tower. Raises UserError for a pooling attention.

    activations: names of the activations that have to be recorded.
    """

    def __init__(self, vit):
        if not vit.pooling.has_first_order:
            what = "this model pools its tokens by attention, so nothing but that reaches the output"
            raise UserError(f"{what}: no first order")
        self.vit = vit
        self.weights = centred_output(vit)
        self.constant = vit.output_weights()[2].to(self.weights)
        # W_V, b_V, W_O, b_O of every layer
        self.heads = [[part.to(self.weights) for part in vit.head_weights(l)] for l in range(vit.L)]
        layers = [l for l in range(vit.L) if vit.has_inside(l)]
        self.inside = {l: vit.inside_weights(l).to(self.weights) for l in layers}  # [3, H, d]
        self.of_heads = [*vit.names_from(0), *(f"blocks.{l}.ln1.out" for l in range(vit.L))]
        of_mlps = [f"blocks.{l}.mlp.out" for l in range(vit.L)]
        self.activations = [*self.of_heads, *of_mlps, "blocks.0.resid.pre"]

    def to_output(self, cache, representation, coefficient=COEFFICIENT):
        """Return the `ToOutput` of a batch.

        cache: the recorded activations.
        representation: [B, D], the model's own, not scaled.
        coefficient: the norm that a representation is scaled to.
        """
        self.vit.read_rows(cache)
        return ToOutput(self.weights, coefficient / (representation.norm(dim=-1) * cache["ln_post.std"]))

    def parts(self, cache, representation, coefficient=COEFFICIENT):
        """Return the `Parts` of a batch. Parameters as in `to_output`."""
        J = self.to_output(cache, representation, coefficient)
        embedding = self.vit.pool(cache["blocks.0.resid.pre"], cache)
        heads = []
        mlps = []
        for l, (W_V, b_V, W_O, b_O) in enumerate(self.heads):
            row = cache[f"blocks.{l}.attn.row"]  # sums to 1
            x = einsum("bht,btd->bhd", row, cache[f"blocks.{l}.ln1.out"])
            values = einsum("bhd,hed->bhe", x, W_V) + b_V
            numbers = self.vit.inside_numbers(cache, l)
            if numbers is not None:
                values = values * numbers[:, :1, None]
            heads.append(einsum("bhe,heo->bho", values, W_O) + self.own(l, b_O, numbers))
            mlps.append(self.vit.pool(cache[f"blocks.{l}.mlp.out"], cache))
        constant = coefficient / representation.norm(dim=-1, keepdim=True) * self.constant
        return Parts(J(embedding), J(torch.stack(heads, dim=1)), J(torch.stack(mlps, dim=1)), constant)

    def own(self, l, b_O, numbers):
        """Return what the heads of attention l write whatever they read, [B, H, d] or [d] for each of them.

        b_O: [d]. numbers: `HookedViT.inside_numbers`.
        """
        own = b_O / self.vit.H
        if numbers is None:
            return own
        return own + einsum("br,rho->bho", numbers[:, 1:], self.inside[l])

    def tokens(self, cache, representation, direction, coefficient=COEFFICIENT):
        """Return <J(head_lh(i)), direction>, what every head takes from every token along it, [B, L, H, T].

        direction: [B, D], such as an image's class, or the difference of two classes.
        """
        g = self.to_output(cache, representation, coefficient).pull(direction)
        shares = []
        for l, (W_V, b_V, W_O, b_O) in enumerate(self.heads):
            read = einsum("heo,bo->bhe", W_O, g)  # the direction of a head's values that the output reads
            numbers = self.vit.inside_numbers(cache, l)
            if numbers is None:
                own = (g @ b_O)[:, None] / len(W_O)
            else:
                read = read * numbers[:, :1, None]
                own = einsum("bo,bho->bh", g, self.own(l, b_O, numbers))
            fixed = einsum("he,bhe->bh", b_V, read) + own
            read = einsum("bhe,hed->bhd", read, W_V)  # and that of its input
            along = einsum("btd,bhd->bht", cache[f"blocks.{l}.ln1.out"], read)
            shares.append(cache[f"blocks.{l}.attn.row"] * (along + fixed[..., None]))
        return torch.stack(shares, dim=1)


def centred_output(vit):
    """Return gamma_post P with the LayerNorm's centring in it, as A, float32 [d, D].

    c A = ((c - mean c) gamma_post) P.
    """
    P, gamma, _ = vit.output_weights()
    weights = gamma[:, None] * P
    return (weights - weights.mean(dim=0)).to(vit.device, vit.dtype)


@torch.no_grad()
def fold_direct(vit, layer):
    """Return the weights' part of one layer's direct effects, as `Directions` with K = 1.

    B[n] is J(w_n) with sigma_post left out; `constants` [1, D] is each neuron's share of J(b_out). Behind a
    Post2 they are [3, D]: what 1 / sigma_2, mu_2 / sigma_2 and 1 weigh.
    """
    w, b_out = vit.mlp_weights(layer)
    outputs = centred_output(vit)
    if not vit.post_norm:
        share = (b_out.to(outputs) @ outputs) / vit.N
        return Directions(layer, w.to(outputs)[None], outputs[None], share[None])
    gamma, beta, N = vit.norm_weights(layer, layer + 1)
    own = torch.stack([b_out * gamma, -gamma, beta]) / N
    return Directions(layer, (w * gamma).to(outputs)[None], outputs[None], own.to(outputs) @ outputs)


def direct_effects(vit, cache, directions, scale):
    """Return the direct effects of one layer on a batch, a `SecondOrder` with K = 1.

    Their sum over neurons is J(mlp).

    cache: activations, with blocks.LAYER.mlp.post and `HookedViT.names_from` of the last layer.
    directions: of `fold_direct`.
    scale: [B], coefficient / |rep|.
    """
    scale = (scale / cache["ln_post.std"])[:, None]  # [B, 1]
    p = vit.pool(cache[f"blocks.{directions.layer}.mlp.post"], cache)  # [B, N]
    if not vit.post_norm:
        return SecondOrder((scale * p)[:, None], scale * directions.constants, directions)
    mean, std = vit.token_statistics(cache, directions.layer, directions.layer + 1)
    rstd = 1 / std[:, :1]
    numbers = torch.cat([rstd, mean[:, :1] * rstd, torch.ones_like(rstd)], dim=1)
    return SecondOrder((scale * rstd * p)[:, None], scale * (numbers @ directions.constants), directions)
