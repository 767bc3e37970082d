"""First-order effects: what heads, MLPs and neurons write straight into the representation (section 3.2 of
the paper, eq. 3).

The representation is what the last LayerNorm and the projection make of a sum: the class token's embedding,
and what every attention and every MLP adds to the class token (or the average of the patches, where the
output is read from these). With its standard deviation held fixed that LayerNorm is linear, so that

    rep  = J(embedding) + sum_l [ sum_h sum_i J(head_lh(i)) + J(mlp_l) ] + beta_post P
    J(c) = ((c - mean c) * gamma_post / sigma_post) P

    head_lh(i) = a_lh[0, i] ((x_l[i] W_V + b_V) W_O + b_O / H)     what head h of layer l takes from token i of its input x_l
    mlp_l      = sum_n p_l[0, n] w_n + b_out                       what its neurons write; J(p w_n) is a direct effect (eq. 3)

Letters as in `utils.prs`; everything is scaled by coefficient / |rep|, as second-order effects are.
"""

from typing import NamedTuple

import torch
from torch import Tensor, einsum

from utils.prs import COEFFICIENT, Directions, SecondOrder
from utils.runtime.errors import UserError


class ToOutput(NamedTuple):
    """J of a batch of images: the last LayerNorm, with its statistics held fixed, and the projection."""

    weights: Tensor  # [d, D]   gamma_post P, its columns centred, so that no mean has to be taken off
    scale: Tensor  # [B]      coefficient / (|rep| sigma_post)

    def __call__(self, c):
        """c [B, ..., d] -> [B, ..., D]."""
        return (c @ self.weights) * self.scale.view(-1, *[1] * (c.ndim - 1))

    def pull(self, v):
        """The direction of the residual stream that v [B, D] is read from: <J(c), v> = <c, pull(v)>. [B,
        d].
        """
        return self.scale[:, None] * (v @ self.weights.T)


class Parts(NamedTuple):
    """The representation, of norm `coefficient`, as a sum."""

    embedding: Tensor  # [B, D]     of the class token
    heads: Tensor  # [B, L, H, D]
    mlps: Tensor  # [B, L, D]
    constant: Tensor  # [B, D]     beta_post P

    def sum(self):
        """[B, D]."""
        return self.embedding + self.heads.sum(dim=(1, 2)) + self.mlps.sum(dim=1) + self.constant


class FirstOrder:
    """The first-order decomposition of a tower's representations.

    Attribute: activations, what has to be recorded for it.
    """

    def __init__(self, vit):
        if vit.pooling == "attention":
            raise UserError(
                "this model pools its tokens by attention, so nothing but that reaches the output: no first order"
            )
        self.vit, self.weights = vit, centred_output(vit)
        self.constant = vit.output_weights()[2].to(self.weights)
        self.heads = [
            [part.to(self.weights) for part in vit.head_weights(l)[2:]] for l in range(vit.L)
        ]  # W_V, b_V, W_O, b_O
        self.of_heads = [*vit.path(0), *(f"blocks.{l}.ln1.out" for l in range(vit.L))]
        self.activations = [
            *self.of_heads,
            *(f"blocks.{l}.mlp.out" for l in range(vit.L)),
            "blocks.0.resid.pre",
        ]

    def to_output(self, cache, representation, coefficient=COEFFICIENT):
        """`ToOutput` of a batch. cache: what was recorded. representation: [B, D], as the model gives it."""
        self.vit.read_rows(cache)
        return ToOutput(self.weights, coefficient / (representation.norm(dim=-1) * cache["ln_post.std"]))

    def parts(self, cache, representation, coefficient=COEFFICIENT):
        """`Parts` of a batch."""
        J, heads = self.to_output(cache, representation, coefficient), []
        for l, (W_V, b_V, W_O, b_O) in enumerate(self.heads):
            x = einsum(
                "bht,btd->bhd", cache[f"blocks.{l}.attn.row"], cache[f"blocks.{l}.ln1.out"]
            )  # rows sum to 1
            heads.append(einsum("bhe,heo->bho", einsum("bhd,hed->bhe", x, W_V) + b_V, W_O) + b_O / len(W_O))
        mlps = torch.stack(
            [self.vit.pool(cache[f"blocks.{l}.mlp.out"], cache) for l in range(len(self.heads))], dim=1
        )  # [B, L, d]
        constant = coefficient / representation.norm(dim=-1, keepdim=True) * self.constant
        return Parts(
            J(self.vit.pool(cache["blocks.0.resid.pre"], cache)),
            J(torch.stack(heads, dim=1)),
            J(mlps),
            constant,
        )

    def tokens(self, cache, representation, direction, coefficient=COEFFICIENT):
        """What every head takes from every token along a direction: <J(head_lh(i)), direction>, [B, L, H, T].

        direction: [B, D], such as an image's class, or the difference of two classes.
        """
        g, found = self.to_output(cache, representation, coefficient).pull(direction), []
        for l, (W_V, b_V, W_O, b_O) in enumerate(self.heads):
            read = einsum("heo,bo->bhe", W_O, g)  # what the output reads from a head
            fixed = einsum("he,bhe->bh", b_V, read) + (g @ b_O)[:, None] / len(W_O)
            along = einsum("btd,bhd->bht", cache[f"blocks.{l}.ln1.out"], einsum("bhe,hed->bhd", read, W_V))
            found.append(cache[f"blocks.{l}.attn.row"] * (along + fixed[..., None]))
        return torch.stack(found, dim=1)


def centred_output(vit):
    """gamma_post P with the LayerNorm's centring in it, float32 [d, D]: c @ it = ((c - mean c) gamma_post)
    P.
    """
    P, gamma, _ = vit.output_weights()
    weights = gamma[:, None] * P
    return (weights - weights.mean(dim=0)).to(vit.device, torch.float32)


@torch.no_grad()
def fold_direct(vit, layer):
    """The weights' part of the direct effects of one layer's neurons, as `Directions` with K = 1: B[n] =
    J(w_n), sigma_post left out. `constants` [1, D]: each neuron's share of J(b_out)."""
    w, b_out = vit.mlp_weights(layer)
    outputs = centred_output(vit)
    share = (b_out.to(outputs) @ outputs) / vit.N
    return Directions(layer, w.to(outputs)[None], outputs[None], share[None])


def direct_effects(vit, cache, directions, scale):
    """Direct effects of one layer on a batch, a `SecondOrder` with K = 1, whose sum over neurons is J(mlp).

    cache: with blocks.LAYER.mlp.post and `HookedViT.path` of the last layer. scale: coefficient / |rep| [B].
    """
    scale = (scale / cache["ln_post.std"])[:, None]  # [B, 1]
    C = scale * vit.pool(cache[f"blocks.{directions.layer}.mlp.post"], cache)  # [B, N]
    return SecondOrder(C[:, None], scale * directions.constants, directions)
