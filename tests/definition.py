"""Second-order effects in float64, written straight from their definition; nothing here comes from `utils`.

The image tower is run by hand, with its attention probabilities in full, and every token of every head is
walked in a loop.
"""

import math
from dataclasses import dataclass

import torch


@dataclass
class Run:
    """One image through the tower, everything in float64."""

    z: list  # L+1 of [T, d]: the residual stream before each block, and at the end
    middle: list  # L of [T, d]: after the attention of each block
    A: list  # L of [H, T, T]: attention probabilities
    p: list  # L of [T, N]: post-GELU activations
    mlp: list  # L of [T, d]: outputs of the MLPs
    rep: torch.Tensor  # [D]


def mean_and_sigma(x, norm):
    mu = x.mean(dim=-1)
    return mu, torch.sqrt(((x - mu[..., None]) ** 2).mean(dim=-1) + norm.eps)


def scale_of(module):
    return module.gamma if hasattr(module, "gamma") else 1.0


def heads(attn):
    """W_Q, W_K, W_V [H, d, e], b_Q, b_K, b_V [H, e], W_O [H, e, d]."""
    d, H = attn.embed_dim, attn.num_heads
    e = d // H
    W, b = attn.in_proj_weight, attn.in_proj_bias
    weights = [torch.stack([W[j * d + h * e : j * d + (h + 1) * e].T for h in range(H)]) for j in range(3)]
    biases = [torch.stack([b[j * d + h * e : j * d + (h + 1) * e] for h in range(H)]) for j in range(3)]
    W_O = torch.stack([attn.out_proj.weight[:, h * e : (h + 1) * e].T for h in range(H)])
    return *weights, *biases, W_O


def run(visual, image):
    """visual: an open_clip VisionTransformer in float64. image: [3, side, side] in float64."""
    z = visual._embeds(image[None])[0]
    result = Run([z], [], [], [], [], None)
    for block in visual.transformer.resblocks:
        W_Q, W_K, W_V, b_Q, b_K, b_V, W_O = heads(block.attn)
        mu, sigma = mean_and_sigma(z, block.ln_1)
        x = (z - mu[:, None]) / sigma[:, None] * block.ln_1.weight + block.ln_1.bias
        out = block.attn.out_proj.bias.clone()
        A = []
        for h in range(len(W_Q)):
            q, k, v = x @ W_Q[h] + b_Q[h], x @ W_K[h] + b_K[h], x @ W_V[h] + b_V[h]
            A.append(torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=-1))
            out = out + A[-1] @ v @ W_O[h]
        z = z + scale_of(block.ls_1) * out
        result.middle.append(z)
        mu, sigma = mean_and_sigma(z, block.ln_2)
        x = (z - mu[:, None]) / sigma[:, None] * block.ln_2.weight + block.ln_2.bias
        result.p.append(block.mlp.gelu(x @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias))
        result.mlp.append(
            scale_of(block.ls_2) * (result.p[-1] @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias)
        )
        z = z + result.mlp[-1]
        result.A.append(torch.stack(A))
        result.z.append(z)
    result.rep = sum(w * straight(visual, z[q], mu, sigma) for q, w, mu, sigma in reads(visual, z))
    return result


def reads(visual, z):
    """Which tokens the output reads: [(token, its weight, mean and deviation of the last LayerNorm for it)],
    z [T, d].

    Of an average that is normalised afterwards every token has the statistics of the average.
    """
    if visual.pool_type == "tok":
        return [(0, 1.0, *mean_and_sigma(z[0], visual.ln_post))]
    first = int(hasattr(visual, "class_embedding"))
    count = len(z) - first
    if visual.final_ln_after_pool:
        return [
            (q, 1 / count, *mean_and_sigma(z[first:].mean(dim=0), visual.ln_post))
            for q in range(first, len(z))
        ]
    return [(q, 1 / count, *mean_and_sigma(z[q], visual.ln_post)) for q in range(first, len(z))]


def straight(visual, x, mu, sigma, share=1.0):
    """x [..., d] through the last LayerNorm with given statistics, and the projection; with a share of its
    constants.
    """
    out = (visual.ln_post.weight * (x - mu * share) / sigma + visual.ln_post.bias * share) @ visual.proj
    return out if getattr(visual, "bias", None) is None else out + visual.bias * share


def effects(visual, image, m, coefficient=100.0):
    """phi [N, D] of MLP layer m on one image, all shares of means and biases included."""
    clean = run(visual, image)
    blocks = visual.transformer.resblocks
    L, H = len(blocks), blocks[0].attn.num_heads
    T, N = clean.p[m].shape
    mlp = blocks[m].mlp
    w = (mlp.c_proj.weight * torch.as_tensor(scale_of(blocks[m].ls_2)).reshape(-1, 1)).T  # [N, d]
    b_out = mlp.c_proj.bias * scale_of(blocks[m].ls_2)
    phi = torch.zeros(N, visual.proj.shape[1], dtype=torch.float64)
    for l in range(m + 1, L):
        _, _, W_V, _, _, b_V, W_O = heads(blocks[l].attn)
        mu, sigma = mean_and_sigma(clean.z[l], blocks[l].ln_1)
        gamma, beta = blocks[l].ln_1.weight, blocks[l].ln_1.bias
        c = (1 + 2 * l) * N
        c_post = (1 + 2 * l) * (1 + 2 * L) * H * N
        for h in range(H):
            written = []  # by head h, from each token
            for i in range(T):
                x = clean.p[m][i][:, None] * w + b_out / N
                x = gamma * (x - mu[i] / c) / sigma[i] + beta / c
                written.append((x @ W_V[h] + b_V[h] / c) @ W_O[h])
            for q, weight, mu_post, sigma_post in reads(visual, clean.z[L]):
                o = sum(clean.A[l][h][q, i] * written[i] for i in range(T))
                o = scale_of(blocks[l].ls_1) * (o + blocks[l].attn.out_proj.bias / (c * H))
                phi = phi + weight * straight(visual, o, mu_post, sigma_post, 1 / c_post)
    return coefficient / clean.rep.norm() * phi


def representation_with_changed_mlp(visual, image, m, change):
    """The representation when MLP m's output moves by `change` [T, d] and only the later attentions see it,
    all else frozen.

    Attention probabilities, LayerNorm statistics and the outputs of all other blocks are those of the clean
    run.
    """
    clean = run(visual, image)
    blocks = visual.transformer.resblocks
    z = clean.z[-1].clone()  # what the attentions add to it moves with the change
    for l in range(m + 1, len(blocks)):
        _, _, W_V, _, _, b_V, W_O = heads(blocks[l].attn)
        mu, sigma = mean_and_sigma(clean.z[l], blocks[l].ln_1)
        added = []
        for stream in (clean.z[l], clean.z[l] + change):
            x = (stream - mu[:, None]) / sigma[:, None] * blocks[l].ln_1.weight + blocks[l].ln_1.bias
            added.append(sum(clean.A[l][h] @ (x @ W_V[h] + b_V[h]) @ W_O[h] for h in range(len(W_V))))
        z = z + scale_of(blocks[l].ls_1) * (added[1] - added[0])
    return sum(
        weight * straight(visual, z[q], mu, sigma) for q, weight, mu, sigma in reads(visual, clean.z[-1])
    )


def sum_of_effects(visual, image, m, coefficient=100.0):
    """sum_n phi_n by another route: the MLP's whole output through whole attentions, with the shares of N
    contributors.
    """
    clean = run(visual, image)
    blocks = visual.transformer.resblocks
    L, H, d = len(blocks), blocks[0].attn.num_heads, clean.z[0].shape[1]
    total = torch.zeros(visual.proj.shape[1], dtype=torch.float64)
    for l in range(m + 1, L):
        attn, share = blocks[l].attn, 1 / (1 + 2 * l)  # all N neurons together are one of the 1 + 2l summands
        mu, sigma = mean_and_sigma(clean.z[l], blocks[l].ln_1)
        x = (
            blocks[l].ln_1.weight * (clean.mlp[m] - mu[:, None] * share) / sigma[:, None]
            + blocks[l].ln_1.bias * share
        )
        v = (
            x @ attn.in_proj_weight[2 * d :].T + attn.in_proj_bias[2 * d :] * share
        )  # [T, d], heads side by side
        for q, weight, mu_post, sigma_post in reads(visual, clean.z[L]):
            mixed = torch.cat([clean.A[l][h][q] @ v[:, h * (d // H) : (h + 1) * (d // H)] for h in range(H)])
            o = scale_of(blocks[l].ls_1) * (attn.out_proj.weight @ mixed + attn.out_proj.bias * share)
            total = total + weight * straight(visual, o, mu_post, sigma_post, share / (1 + 2 * L))
    return coefficient / clean.rep.norm() * total


def pooled_effects(parts, p, z, rep, coefficient=100.0):
    """phi [N, D] of an MLP through a pooling attention, token by token.

    parts: w [N, d], b_out [d]; norm, the LayerNorm before the attention; q [H, e], the query; W_K, W_V [H, e,
        d], b_K, b_V [H, e], W_O [H, e, d'], b_O [d']; share, the contributors of the sum that `norm`
        normalises; out, what the output makes of what a head writes, a function ([N, d'], how many share its
        constants).
    p, z, rep: [T, N], [T, d], [D].
    """
    mu, sigma = mean_and_sigma(z, parts["norm"])
    x = (z - mu[:, None]) / sigma[:, None] * parts["norm"].weight + parts["norm"].bias
    c, H, phi = parts["share"], len(parts["q"]), 0
    for h in range(H):
        k = x @ parts["W_K"][h].T + parts["b_K"][h]
        a = torch.softmax(k @ parts["q"][h] / math.sqrt(k.shape[1]), dim=0)
        o = 0
        for i in range(len(z)):
            own = p[i][:, None] * parts["w"] + parts["b_out"] / len(parts["w"])
            own = parts["norm"].weight * (own - mu[i] / c) / sigma[i] + parts["norm"].bias / c
            o = o + a[i] * ((own @ parts["W_V"][h].T + parts["b_V"][h] / c) @ parts["W_O"][h])
        phi = phi + parts["out"](o + parts["b_O"] / (c * H), c * H)
    return coefficient / rep.norm() * phi


def unit_effects(visual, image, m, f, w, coefficient=100.0):
    """Effects [U, D] of units that act with f [T, U] and write w [U, d] at any site of block m.

    Each is a contribution of its own to every LayerNorm: its own mean is taken off, and no constant is added.
    """
    clean = run(visual, image)
    blocks = visual.transformer.resblocks
    phi = torch.zeros(len(w), visual.proj.shape[1], dtype=torch.float64)
    for l in range(m + 1, len(blocks)):
        _, _, W_V, _, _, _, W_O = heads(blocks[l].attn)
        _, sigma = mean_and_sigma(clean.z[l], blocks[l].ln_1)
        for h in range(len(W_V)):
            written = []  # by head h, from each token
            for i in range(len(f)):
                x = f[i][:, None] * w
                x = blocks[l].ln_1.weight * (x - x.mean(dim=1, keepdim=True)) / sigma[i]
                written.append(x @ W_V[h] @ W_O[h])
            for q, weight, _, sigma_post in reads(visual, clean.z[-1]):
                o = sum(clean.A[l][h][q, i] * written[i] for i in range(len(f)))
                o = scale_of(blocks[l].ls_1) * o
                o = visual.ln_post.weight * (o - o.mean(dim=1, keepdim=True)) / sigma_post
                phi = phi + weight * o @ visual.proj
    return coefficient / clean.rep.norm() * phi


def pooled_unit_effects(parts, f, w, z, rep, coefficient=100.0):
    """Effects [U, D] of units through a pooling attention. parts, z, rep: as in `pooled_effects`.

    parts also has "bare_out": what the output makes of what a head writes, without any constant.
    """
    mu, sigma = mean_and_sigma(z, parts["norm"])
    x = (z - mu[:, None]) / sigma[:, None] * parts["norm"].weight + parts["norm"].bias
    phi = 0
    for h in range(len(parts["q"])):
        k = x @ parts["W_K"][h].T + parts["b_K"][h]
        a = torch.softmax(k @ parts["q"][h] / math.sqrt(k.shape[1]), dim=0)
        o = 0
        for i in range(len(z)):
            own = f[i][:, None] * w
            own = parts["norm"].weight * (own - own.mean(dim=1, keepdim=True)) / sigma[i]
            o = o + a[i] * (own @ parts["W_V"][h].T @ parts["W_O"][h])
        phi = phi + parts["bare_out"](o)
    return coefficient / rep.norm() * phi
