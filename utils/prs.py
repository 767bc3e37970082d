"""The projected residual stream: second-order effects of MLP neurons on the representation (section 3 of the paper).

The second-order effect phi_n(I) of neuron n of layer m is what the neuron adds to the representation by flowing through the
attention of every later layer straight to the output, with attention probabilities and LayerNorm statistics held fixed. It
factorises into numbers of the image and directions of the weights,

    phi_n(I) = sum_k C[k, n](I) B[k, n] + kappa(I),      k = (l, h), all heads of all layers l > m,
    B[k, n]  = values[k, n] @ outputs[k],

so an image costs a forward pass and a small product. Shapes use the letters of `utils.hooked_vit`; K = (L - 1 - m) H.
"""

from dataclasses import dataclass

import torch

from utils import memory
from utils.errors import UserError

COEFFICIENT = 100.0  # representations are scaled to this norm; effects are parts of that
BLOCK = 256  # neurons that are worked on together where what is formed on the way would be large
STRIP = 16  # columns of a Gram matrix that are multiplied together


@dataclass
class Directions:
    """All that second-order effects of one MLP layer take from the weights. Made by `fold`.

    values  [K, N, e]   (w_n * gamma_l) W_V of head k: neuron n written into the head
    outputs [K, e, D]   (W_O * gamma_post) P of head k: the head written into the representation
    shares  [2K+3, D]   the directions of kappa: K that go with s, K with t, then 1/sigma_post, mu_post/sigma_post and 1
    """

    layer: int
    values: torch.Tensor
    outputs: torch.Tensor
    shares: torch.Tensor


def parse_layers(layers, vit):
    """The MLP layers that `--mlp_layer` names, ascending.

    layers: a list of numbers as strings or ints, or ["all"]. Raises UserError for a layer that does not exist or has no
    attention after it.
    """
    last = vit.L - 2
    if last < 0:
        raise UserError("this model has one layer, and no attention comes after its MLP; there are no second-order effects")
    if [str(l) for l in layers] == ["all"]:
        return list(range(last + 1))
    for l in layers:
        if not str(l).isdecimal() or int(l) > last:
            reason = " has no attention after it, so it" if str(l) == str(vit.L - 1) else ""
            raise UserError(
                f"--mlp_layer {l}:{reason} has no second-order effects; this model's layers with effects are 0 to {last} "
                "(or 'all')"
            )
    return sorted({int(l) for l in layers})


def groups_of_layers(vit, layers, memory):
    """Divide layers into lists that are worked on in one pass over the images.

    memory: bytes that the folded weights [K, N, e] and the Gram matrices (half of [N, K, K]) of a list may take; it has one
    layer at least.
    """
    groups, used = [], memory
    for layer in layers:
        K = (vit.L - 1 - layer) * vit.H
        needed = 4 * vit.N * K * (vit.d // vit.H + (K + STRIP) // 2)
        if used + needed > memory:
            groups.append([])
            used = 0
        groups[-1].append(layer)
        used += needed
    return groups


@torch.no_grad()
def fold(vit, layer):
    """Fold the weights of every path from MLP `layer` to the output into `Directions` (float64 inside, float32 out).

    A LayerNorm's constants and the biases are divided equally among the contributors of the sum that it normalises
    (appendix of the paper): c = (1 + 2l) N of them before the attention of layer l, c' = (1 + 2l)(1 + 2L) H N at the end.
    """
    visual, H, N, L, d = vit.visual, vit.H, vit.N, vit.L, vit.d
    e = d // H
    home = visual.proj.device
    device = "cpu" if home.type == "mps" else home  # MPS has no float64

    def get(parameter):
        return parameter.to(device, torch.float64)

    def layer_scale(module):
        return get(module.gamma)[:, None] if hasattr(module, "gamma") else 1  # [d, 1], where the model has one

    mlp = vit.blocks[layer]
    W_out = (get(mlp.mlp.c_proj.weight) * layer_scale(mlp.ls_2)).T  # [N, d], row n is w_n
    b_out = (get(mlp.mlp.c_proj.bias)[:, None] * layer_scale(mlp.ls_2))[:, 0]  # [d]
    P, gamma_post, beta_post = get(visual.proj), get(visual.ln_post.weight), get(visual.ln_post.bias)

    values, outputs, with_s, with_t = [], [], [], []
    constant = torch.zeros_like(P[0])
    mean_share = torch.zeros_like(P[0])
    offset_share = torch.zeros_like(P[0])
    for l in range(layer + 1, L):
        block = vit.blocks[l]
        gamma, beta = get(block.ln_1.weight), get(block.ln_1.bias)
        W_V = get(block.attn.in_proj_weight)[2 * d :].view(H, e, d)
        b_V = get(block.attn.in_proj_bias)[2 * d :].view(H, e)
        W_O = (get(block.attn.out_proj.weight) * layer_scale(block.ls_1)).T.reshape(H, e, d)
        b_O = (get(block.attn.out_proj.bias)[:, None] * layer_scale(block.ls_1))[:, 0]
        c, c_post = (1 + 2 * l) * N, (1 + 2 * l) * (1 + 2 * L) * H * N

        out = (W_O * gamma_post) @ P  # [H, e, D]
        values.append(torch.einsum("nd,hed->hne", W_out * gamma, W_V).float())
        outputs.append(out)
        with_s.append(torch.einsum("d,hed,heo->ho", gamma * b_out / N, W_V, out))
        with_t.append(torch.einsum("d,hed,heo->ho", -gamma / c, W_V, out))
        constant += torch.einsum("he,heo->o", torch.einsum("d,hed->he", beta / c, W_V) + b_V / c, out)
        constant += (b_O * gamma_post) @ P / c  # b_O / (c H) for each of the H heads
        mean_share -= gamma_post @ P * H / c_post
        offset_share += beta_post @ P * H / c_post

    shares = torch.cat([*with_s, *with_t, torch.stack([constant, mean_share, offset_share])])
    return Directions(layer, *(x.to(home, torch.float32) for x in (torch.cat(values), torch.cat(outputs), shares)))


def fold_layers(vit, layers):
    """`fold` of several layers, ascending; the outputs of heads that come after more than one of them are there once."""
    memory.own_pages()  # what comes and goes here is as large as what stays
    folded = []
    for layer in layers:
        item = fold(vit, layer)
        if folded:
            item.outputs = folded[0].outputs[-len(item.outputs) :]
        folded.append(item)
    return folded


@torch.inference_mode()
def second_order(vit, images, directions, coefficient=COEFFICIENT, summed=False):
    """One forward pass: the representation, and the factorised second-order effects of one or several MLP layers.

    vit: HookedViT. images: [B, 3, side, side], transformed. directions: list of `Directions`, one for each layer. summed: give
    effects summed over the images, C [K, N] and kappa [D], without forming those of each.

    Returns
    representation [B, D], not normalised; and an iterator that gives (C [B, K, N], kappa [B, D]) of each layer when it is asked
    for, so that one layer's are in memory at a time, with phi[b, n] = sum_k C[b, k, n] values[k, n] @ outputs[k] + kappa[b], in
    units where |representation| is `coefficient`.
    """
    first = min(item.layer for item in directions)
    attention = [f"blocks.{l}.{name}" for l in range(first + 1, vit.L) for name in ("attn.row", "ln1.mean", "ln1.std")]
    posts = [f"blocks.{item.layer}.mlp.post" for item in directions]
    with vit.record("ln_post.*", *attention, *posts) as cache, vit.class_token_last():
        representation = vit(images)
    scale = coefficient / representation.norm(dim=-1)  # [B]
    return representation, _effects(vit, cache, directions, scale, summed)


def _effects(vit, cache, directions, scale, summed):
    """The effects of each layer from what one forward pass has recorded."""
    rstd_post = 1 / cache["ln_post.std"]
    for item in directions:
        later = range(item.layer + 1, vit.L)
        rows = {l: cache[f"blocks.{l}.attn.row"] / cache[f"blocks.{l}.ln1.std"][:, None] for l in later}  # [B, H, T], a / sigma
        row = torch.cat([rows[l] for l in later], dim=1)  # [B, K, T]
        scaled = row * (scale * rstd_post)[:, None, None]
        s = row.sum(dim=-1)  # [B, K]
        t = torch.cat([torch.einsum("bht,bt->bh", rows[l], cache[f"blocks.{l}.ln1.mean"]) for l in later], dim=1)
        one = torch.ones_like(rstd_post)[:, None]
        weights = torch.cat([torch.cat([s, t, one, cache["ln_post.mean"][:, None]], 1) * rstd_post[:, None], one], 1)
        kappa = scale[:, None] * (weights @ item.shares)  # [B, D]
        post = f"blocks.{item.layer}.mlp.post"  # [B, T, N]; neither it nor the effects have a name, so that both go when used
        if summed:
            yield scaled.transpose(0, 1).flatten(1) @ cache.pop(post).flatten(0, 1), kappa.sum(dim=0)
        else:
            yield torch.bmm(scaled, cache.pop(post)), kappa


def dense(C, kappa, directions):
    """The effects themselves: C [B, K, N], kappa [B, D] -> phi [B, N, D]."""
    B_n = torch.einsum("kne,keo->nko", directions.values, directions.outputs)  # [N, K, D]
    # [N, B, K] is made contiguous: BLAS takes no matrix without a unit stride, and the fallback is a hundred times slower
    return torch.bmm(C.permute(2, 0, 1).contiguous(), B_n).transpose(0, 1) + kappa[:, None]


def sum_of_effects(C, kappa, directions):
    """sum_n phi_n without the effects themselves: C [B, K, N], kappa [B, D] -> [B, D]."""
    heads = torch.einsum("bkn,kne->bke", C, directions.values)
    return torch.einsum("bke,keo->bo", heads, directions.outputs) + C.shape[-1] * kappa


def blocks_of(neurons):
    """Slices of a number of neurons that are worked on together."""
    return [slice(start, start + BLOCK) for start in range(0, neurons, BLOCK)]


class CentredNorms:
    """|phi_n(I) - mean_n| for all neurons of a layer, without forming the effects.

    An effect is a combination of the K directions B_n plus kappa, so its norm is a quadratic form in the coefficients with the
    Gram matrix G_n = B_n B_n^T. The origin is moved to the mean first, so that nothing cancels when effects vary little about a
    large mean. G is symmetric, so strips of its columns are kept from the diagonal on, [N, K - first column, STRIP], what comes
    below it doubled.

    Parameters
    directions: `Directions` of the neurons. mean: what effects are centred on, [N, D], or as factors, (C [K, N], kappa [D]).

    Attributes: mean_n = origin[:, n] B_n + shift + rest[n], with origin [K, N]. Factors of a mean are its origin and shift [D],
    and leave no rest; of a mean [N, D] the origin is found by least squares, the rest [N, D] being orthogonal to the directions.
    """

    def __init__(self, directions, mean):
        self.directions = directions
        K, N, _ = directions.values.shape
        factors = isinstance(mean, tuple)
        new = directions.values.new_empty
        if factors:
            (self.origin, self.shift), self.rest = mean, None
        else:
            self.origin, self.shift, self.rest = new(K, N), 0, new(mean.shape)
        firsts = range(0, K, STRIP)
        self.strips = [new(N, K - first, min(STRIP, K - first)) for first in firsts]
        for n in blocks_of(N):
            B_n = torch.einsum("kne,keo->nko", directions.values[:, n], directions.outputs)  # [n, K, D]
            if not factors:
                x = _least_squares(B_n, mean[n])  # [n, K]
                self.origin[:, n], self.rest[n] = x.T, mean[n] - torch.einsum("nk,nko->no", x, B_n)
            G = B_n @ B_n.mT
            for first, strip in zip(firsts, self.strips, strict=True):
                width = strip.shape[2]
                strip[n] = G[:, first:, first : first + width]
                strip[n, width:] *= 2

    def __call__(self, C, kappa):
        """C [B, K, N], kappa [B, D] -> norms [B, N]."""
        kappa = kappa - self.shift
        heads = torch.einsum("bo,keo->kbe", kappa, self.directions.outputs)
        size = kappa.square().sum(dim=-1, keepdim=True)
        norms = torch.empty_like(C[:, 0])
        for n in blocks_of(norms.shape[1]):  # what is formed on the way is as large as C
            x = C[:, :, n] - self.origin[:, n]  # phi - mean = x B_n + kappa - rest, and B_n rest = 0
            B_kappa = torch.bmm(heads, self.directions.values[:, n].mT).transpose(0, 1)  # [B, K, n]
            squares = _quadratic(x, [strip[n] for strip in self.strips]) + 2 * B_kappa.mul_(x).sum(dim=1) + size
            if self.rest is not None:
                rest = self.rest[n]
                squares += rest.square().sum(dim=-1) - 2 * kappa @ rest.T
            norms[:, n] = squares.clamp_min(0).sqrt()
        return norms


def _quadratic(x, strips):
    """x^T G x, with G in strips as in `CentredNorms`: x [B, K, n] -> [B, n]."""
    B, K, n = x.shape
    x = x.view(B * K, n).T.contiguous().view(n, B, K)
    total = torch.zeros_like(x[:, :, 0])  # [n, B]
    for first, strip in zip(range(0, K, STRIP), strips, strict=True):
        after = x[:, :, first:]
        total += (torch.bmm(after, strip) * after[:, :, : strip.shape[2]]).sum(dim=-1)
    return total.T


def _least_squares(B_n, mean):
    """The combination of directions next to the mean: B_n [n, K, D], mean [n, D] -> [n, K], found in float64."""
    wide = B_n.to("cpu" if B_n.device.type == "mps" else B_n.device, torch.float64)  # MPS has no float64
    G = wide @ wide.mT
    ridge = 1e-9 * G.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30)  # directions may be dependent
    ridge = ridge[:, None, None] * torch.eye(G.shape[1], dtype=G.dtype, device=G.device)
    B_mean = torch.einsum("nko,no->nk", wide, mean.to(wide))
    return torch.cholesky_solve(B_mean[..., None], torch.linalg.cholesky(G + ridge))[..., 0].to(B_n)
