"""Read the LayerNorms that stand inside the branches of blocks. Letters as in `utils.prs`.

    z += Post1( Inner( heads ) W_O + b_O )    Inner: of all heads together, as in EVA-02
    z += Post2( sum_n p_n w_n + b_out )       Post1, Post2: where no LN1, LN2 stand before, as in EVA-02 E

Each is linear while its statistics are held fixed, as LN1 is. Post2 takes the place of the later LN1s: "the
LayerNorm that tokens pass" is one or the other. Inner and Post1 are read at the class token.

Each function takes a `HookedViT` and is also a method of it.
"""

import torch
from torch import nn

from utils.model.attention import input_mean, input_std


def is_norm(module):
    """Return whether a module is a LayerNorm."""
    return isinstance(module, nn.LayerNorm)


def inside(block):
    """Return the LayerNorms of a block's attention that the class token passes, {name: module}."""
    attn = getattr(block, "attn", None)
    found = {"inner": getattr(attn, "inner", None), "post1": getattr(block, "ls_1", None)}
    return {name: module for name, module in found.items() if is_norm(module)}


def statistics(block):
    """Return the statistics of a block that can be recorded, {name: (module, function)}."""
    found = {}
    of_tokens = {"ln1": getattr(block, "ln_1", None), "post2": block.ls_2}
    for name, norm in of_tokens.items():
        if is_norm(norm):
            found |= {f"{name}.mean": (norm, input_mean), f"{name}.std": (norm, input_std)}  # [B, T]
    for name, norm in inside(block).items():
        found |= {f"{name}.mean": (norm, _first_mean), f"{name}.std": (norm, _first_std)}  # [B]
    return found


def _first_mean(norm, z, x):
    return input_mean(norm, z[:, 0], x)


def _first_std(norm, z, x):
    return input_std(norm, z[:, 0], x)


def names_before(vit, attentions):
    """Return the names of the statistics of the LayerNorms before and in some attentions.

    Of Post2 they are those of all MLPs, so that direct effects find theirs.
    """
    before = [f"blocks.{l}.ln1" for l in attentions]
    if vit.post_norm:
        before = [f"blocks.{layer}.post2" for layer in range(vit.L)]
    own = [f"blocks.{l}.{name}" for l in attentions if l < vit.L for name in inside(vit.blocks[l])]
    return [f"{norm}.{name}" for norm in (*before, *own) for name in ("mean", "std")]


def passed(vit, layer, l):
    """Return the name of the LayerNorm that tokens pass between MLP `layer` and attention l."""
    return f"blocks.{layer}.post2" if vit.post_norm else f"blocks.{l}.ln1"


def token_statistics(vit, cache, layer, l):
    """Return mean and deviation [B, T] of the LayerNorm that tokens pass, from a cache of `names_from`."""
    name = vit.passed(layer, l)
    return cache[f"{name}.mean"], cache[f"{name}.std"]


def row(vit, cache, l):
    """Return the row of attention l that the output reads, over Inner's and Post1's deviations, [B, H, T]."""
    found = cache[f"blocks.{l}.attn.row"]
    numbers = vit.inside_numbers(cache, l)
    return found if numbers is None else found * numbers[:, :1, None]


def has_inside(vit, l):
    """Return whether there are LayerNorms inside attention l."""
    return l < vit.L and bool(inside(vit.blocks[l]))


def inside_numbers(vit, cache, l):
    """Return what the image makes of Inner and Post1 of attention l, [B, 4]; None where there are none.

    They are 1 / (sigma_in sigma_p1), and what weighs the `inside_weights`: 1 / sigma_p1, mu_in / (sigma_in
    sigma_p1) and mu_p1 / sigma_p1.
    """
    if not vit.has_inside(l):
        return None
    norms = inside(vit.blocks[l])
    one = torch.ones_like(cache["ln_post.std"])
    mean = {"inner": 0 * one, "post1": 0 * one}
    std = {"inner": one, "post1": one}
    for name in norms:
        mean[name] = cache[f"blocks.{l}.{name}.mean"]
        std[name] = cache[f"blocks.{l}.{name}.std"]
    both = 1 / (std["inner"] * std["post1"])
    own = [1 / std["post1"], mean["inner"] * both, mean["post1"] / std["post1"]]
    return torch.stack([both, *own], dim=1)
