"""Compare the factorisation with the definition, computed for every token, neuron and head.

    python -m benchmarks.naive [--model ViT-B-32] [--layer 9] [--quick]

`naive_effects` uses nothing of `utils.prs`: the forward pass and every share of means and biases are written
out from the definition, with tensors over tokens and neurons, in float32. Prints the largest difference from
the factorised effects.
"""

import torch

from benchmarks.common import Table, bench_parser, row, run
from utils.model.clip import load_clip
from utils.prs import fold, second_order


def statistics(z, norm):
    """Return the mean and standard deviation of a LayerNorm's input: z [..., d] -> two of [..., 1]."""
    return z.mean(-1, keepdim=True), (z.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()


def forward(visual, image, layer):
    """Run the forward pass of one image [1, 3, side, side], with the attention written out.

    Returns the representation [D], the neurons' activations [T, N] of `layer`, for each later layer (mean,
    std, attention) with shapes [T, 1], [T, 1], [H, T], and the statistics of the last LayerNorm.
    """
    z = visual.conv1(image).flatten(2)[0].T
    z = visual.ln_pre(torch.cat([visual.class_embedding[None], z]) + visual.positional_embedding)  # [T, d]
    later = {}
    for l, block in enumerate(visual.transformer.resblocks):
        attn = block.attn
        H = attn.num_heads
        e = attn.head_dim
        qkv = block.ln_1(z) @ attn.in_proj_weight.T + attn.in_proj_bias
        q, k, v = qkv.view(len(z), 3, H, e).permute(1, 2, 0, 3)
        A = torch.softmax(q @ k.mT / e**0.5, dim=-1)  # [H, T, T]
        if l > layer:
            later[l] = (*statistics(z, block.ln_1), A[:, 0])
        z = z + block.ls_1(attn.out_proj((A @ v).transpose(0, 1).flatten(1)))
        p = block.mlp.gelu(block.mlp.c_fc(block.ln_2(z)))
        if l == layer:
            activations = p
        z = z + block.ls_2(block.mlp.c_proj(p))
    return visual.ln_post(z[0]) @ visual.proj, activations, later, statistics(z[0], visual.ln_post)


@torch.inference_mode()
def naive_effects(visual, image, layer, sum_early=False, coefficient=100.0):
    """Return the second-order effects of every neuron of `layer` on one image, [N, D].

    sum_early: sum a head's values over the tokens at once, where they are weighted by the attention;
    otherwise every token goes all the way to the output, as the definition is written, and the sum is the
    last step.
    """
    blocks = visual.transformer.resblocks
    representation, p, later, (mu_post, sigma_post) = forward(visual, image, layer)
    mlp = blocks[layer].mlp.c_proj
    post = visual.ln_post
    L = len(blocks)
    N = p.shape[1]
    d = mlp.out_features
    H = blocks[layer].attn.num_heads
    e = d // H
    written = p[:, :, None] * mlp.weight.T + mlp.bias / N  # [T, N, d]
    effects = torch.zeros(N, visual.proj.shape[1], device=p.device)
    for l, (mu, sigma, A) in later.items():
        attn = blocks[l].attn
        norm = blocks[l].ln_1
        c = (1 + 2 * l) * N
        c_post = c * (1 + 2 * L) * H
        x = norm.weight * (written - mu[:, None] / c) / sigma[:, None] + norm.bias / c  # [T, N, d]
        for h in range(H):
            head = slice(h * e, (h + 1) * e)
            W_V = attn.in_proj_weight[2 * d :][head]
            b_V = attn.in_proj_bias[2 * d :][head]
            v = x @ W_V.T + b_V / c  # [T, N, e]
            if sum_early:
                v = torch.einsum("t,tne->ne", A[h], v)[None]  # [1, N, e]
            o = v @ attn.out_proj.weight[:, head].T + attn.out_proj.bias / (c * H)
            y = post.weight * (o - mu_post / c_post) / sigma_post + post.bias / c_post
            y = y @ visual.proj  # [T or 1, N, D]
            effects += y[0] if sum_early else torch.einsum("t,tno->no", A[h], y)
    return coefficient / representation.norm() * effects


def set_up(args, folder):
    """Return the tower, with every bias and gamma made to count, an image, and the layer's directions."""
    vit = load_clip(args.model, args.pretrained, args.device, image_only=True).vit
    layer = vit.L - 2 if args.quick else vit.L - 3 if args.layer is None else args.layer
    torch.manual_seed(0)
    image = torch.randn(1, 3, *vit.visual.image_size, device=args.device)
    # Random weights have empty biases and equal gammas
    for parameter in vit.visual.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return vit, image, fold(vit, layer)


def measure(args, case):
    """Return the layer, and the largest difference of either form of the definition, of its largest entry."""
    vit, image, directions = case
    _, [phi] = second_order(vit, image, [directions])
    ours = phi.dense()[0]
    differences = {}
    for name, sum_early in (("definition as written", False), ("tokens summed at the attention", True)):
        naive = naive_effects(vit.visual, image, directions.layer, sum_early)
        differences[name] = (ours - naive).abs().max() / naive.abs().max()
    return directions.layer, differences


def table(args, found):
    layer, differences = found
    note = "largest difference from the factorised effects, of the largest entry"
    rows = [row(name, difference, at_most=1e-5, note=note) for name, difference in differences.items()]
    return Table("naive", f"Agreement with the definition, {args.model}, layer {layer}, float32", rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pretrained", default="random")
    parser.add_argument("--layer", type=int, help="default: the third last")
    run(parser, set_up, measure, table, quick={})
