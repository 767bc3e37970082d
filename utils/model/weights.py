"""Read the weights that effects are folded from, in float64. Letters as in `utils.prs`.

Each function takes a `HookedViT` and is also a method of it.
"""

import torch

from utils.model.attention import double, projections
from utils.model.branches import inside, is_norm
from utils.model.resnets import Channels


def mlp_weights(vit, layer):
    """Return the weights of all neurons of an MLP: w_n [N, d], and b_out [d], before its Post2."""
    block = vit.blocks[layer]
    scale = layer_scale(block.ls_2)
    c_proj = block.mlp.c_proj
    if isinstance(c_proj, Channels):
        w = double(torch.eye(vit.N, device=vit.device))
        return w, torch.zeros_like(w[0])
    return double(c_proj.weight).T * scale, double(c_proj.bias) * scale


def norm_weights(vit, layer, l):
    """Return gamma, beta [d] of the LayerNorm that tokens pass between MLP `layer` and attention l.

    They are 1 and 0 where there is none. Returns also the number of contributors of the sum that it
    normalises.
    """
    if vit.post_norm:
        norm = vit.blocks[layer].ls_2
        return double(norm.weight), double(norm.bias), vit.N
    norm = vit.visual.attn_pool.ln_k if l == vit.L else vit.blocks[l].ln_1
    contributors = vit.contributors(l)
    if not is_norm(norm):
        one = double(torch.ones(vit.d, device=vit.device))
        return one, torch.zeros_like(one), contributors
    return double(norm.weight), double(norm.bias), contributors


def head_weights(vit, l, centred=False):
    """Return the weights of the heads of attention l; l = L is the pooling attention.

    Returns W_V [H, e, d], b_V [H, e], W_O [H, e, d'], b_O [d'], with d' the width of the attention's output.
    W_O has gamma of Inner and Post1 in it. b_O is what is added on every image alike: beta of Post1, if there
    is one.

    centred: put what Inner and Post1 subtract into W_O, so that each head is centred itself.
    """
    attn, scale, gamma_in, gamma_p1 = _parts(vit, l)
    (_, _, W_V), (_, _, b_V) = projections(attn)
    heads = (attn.num_heads, -1)
    W_V = double(W_V).unflatten(0, heads)
    b_V = double(b_V).unflatten(0, heads)
    norms = {} if l == vit.L else inside(vit.blocks[l])
    W_O = double(attn.out_proj.weight).T * gamma_in
    if centred and "inner" in norms:
        W_O = W_O - W_O.mean(dim=0)
    W_O = W_O * scale
    if centred and "post1" in norms:
        W_O = W_O - W_O.mean(dim=1, keepdim=True)
    W_O = (W_O * gamma_p1).unflatten(0, heads)
    post = norms.get("post1")
    b_O = double(attn.out_proj.bias) * scale if post is None else double(post.bias)
    return W_V, b_V, W_O, b_O


def inside_weights(vit, l):
    """Return the constants of Inner and Post1 of attention l that depend on the image, [3, H, d'].

    Each head has its own slice of Inner, and an equal share of b_O and Post1. `inside_numbers` weighs them.
    """
    attn, scale, gamma_in, gamma_p1 = _parts(vit, l)
    norms = inside(vit.blocks[l])
    W_O = double(attn.out_proj.weight).T * scale * gamma_p1
    of_inner = torch.zeros_like(W_O).unflatten(0, (attn.num_heads, -1)).sum(dim=1)  # [H, d']
    found = of_inner.expand(3, -1, -1).clone()
    if "inner" in norms:
        beta = double(norms["inner"].bias)[:, None]
        for place, vector in enumerate((beta, -gamma_in)):
            found[place] = (vector * W_O).unflatten(0, (attn.num_heads, -1)).sum(dim=1)
    if "post1" in norms:
        found[0] += double(attn.out_proj.bias) * gamma_p1 / attn.num_heads
        found[2] -= gamma_p1 / attn.num_heads
    return found


def _parts(vit, l):
    """Return attention l, its layer scale, and gamma of Inner [d, 1] and Post1 [d], 1 where there is none."""
    if l == vit.L:
        return vit.visual.attn_pool.attn, 1.0, 1.0, 1.0
    block = vit.blocks[l]
    norms = inside(block)
    gamma_in = double(norms["inner"].weight)[:, None] if "inner" in norms else 1.0
    gamma_p1 = double(norms["post1"].weight) if "post1" in norms else 1.0
    return block.attn, layer_scale(block.ls_1), gamma_in, gamma_p1


def output_weights(vit, centred=False):
    """Return the weights between the pooled vector and the representation: P, gamma and a constant.

    P [d', D] is the projection and gamma [d'] belongs to the last LayerNorm; both are neutral where the tower
    has none. The constant [D] is beta P, plus the projection's bias if it has one.

    centred: put gamma and what the last LayerNorm subtracts into P; gamma is neutral then.
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
    P = double(P)
    gamma = double(gamma)
    if centred:
        P = gamma[:, None] * P
        gamma = torch.ones_like(gamma)
        if visual.ln_post is not None:
            P = P - P.mean(dim=0)
    return P, gamma, constant


def layer_scale(module):
    """Return the factor of a LayerScale [d]; 1 where the model has none."""
    return double(module.gamma) if hasattr(module, "gamma") else 1.0
