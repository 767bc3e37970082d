"""Read the weights that effects are folded from, in float64. Letters as in `utils.prs`.

Each function takes a `HookedViT` and is also a method of it.
"""

import torch

from utils.model.attention import double, projections


def mlp_weights(vit, layer):
    """Return the weights of all neurons of an MLP: w_n [N, d], and b_out [d]."""
    block = vit.blocks[layer]
    scale = layer_scale(block.ls_2)
    c_proj = block.mlp.c_proj
    return double(c_proj.weight).T * scale, double(c_proj.bias) * scale


def head_weights(vit, l):
    """Return the weights of the heads of attention l; l = L is the pooling attention.

    Returns gamma, beta [d] of the LayerNorm before it, W_V [H, e, d], b_V [H, e], W_O [H, e, d'], b_O [d'],
    with d' the width of the attention's output.
    """
    part = vit.visual.attn_pool if l == vit.L else vit.blocks[l]
    norm = part.ln_k if l == vit.L else part.ln_1
    scale = 1.0 if l == vit.L else layer_scale(part.ls_1)
    attn = part.attn
    (_, _, W_V), (_, _, b_V) = projections(attn)
    heads = (attn.num_heads, -1)
    W_V = double(W_V).unflatten(0, heads)
    b_V = double(b_V).unflatten(0, heads)
    W_O = (double(attn.out_proj.weight).T * scale).unflatten(0, heads)
    b_O = double(attn.out_proj.bias) * scale
    return double(norm.weight), double(norm.bias), W_V, b_V, W_O, b_O


def output_weights(vit):
    """Return the weights between the pooled vector and the representation: P, gamma and a constant.

    P [d', D] is the projection and gamma [d'] belongs to the last LayerNorm; both are neutral where the tower
    has none. The constant [D] is beta P, plus the projection's bias if it has one.
    """
    visual = vit.visual
    P = visual.proj
    if P is None:
        P = torch.eye(vit.D, device=vit.device)
    if visual.ln_post is None:
        gamma = torch.ones_like(P[:, 0])
        beta = torch.zeros_like(P[:, 0])
    else:
        gamma = visual.ln_post.weight
        beta = visual.ln_post.bias
    constant = double(beta) @ double(P)
    bias = getattr(visual, "bias", None)
    if bias is not None:
        constant = constant + double(bias)
    return double(P), double(gamma), constant


def layer_scale(module):
    """Return the factor of a LayerScale [d]; 1 where the model has none."""
    return double(module.gamma) if hasattr(module, "gamma") else 1.0
