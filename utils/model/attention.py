"""What attention and LayerNorms compute, from their weights and inputs. Letters as in `utils.prs`."""

import torch


def last_statistics(visual, z):
    """Mean and deviation [B] of the last LayerNorm as the output has them, z [B, T, d] or, pooled before, [B,
    d]; and the weights of the tokens [B, T], None where they are the same for all images.

    Where each patch is normalised before the average, the mean over patches of x_q / sigma_q is sum_q w_q x_q
    / sigma, with 1 / sigma the mean of all 1 / sigma_q and w_q proportional to them.
    """
    if z.ndim == 2 or visual.pool_type == "tok":
        z = z[:, 0] if z.ndim == 3 else z
        return z.mean(dim=-1), norm_std(z, visual.ln_post.eps), None
    prefix = int(hasattr(visual, "class_embedding"))
    rstd = 1 / norm_std(z[:, prefix:], visual.ln_post.eps)  # [B, patches]
    weights = rstd / rstd.sum(dim=1, keepdim=True)
    mean = (weights * z[:, prefix:].mean(dim=-1)).sum(dim=1)
    return mean, 1 / rstd.mean(dim=1), torch.nn.functional.pad(weights, (prefix, 0))


def norm_std(z, eps):
    """What a LayerNorm divides by, sqrt(biased variance + eps): z [..., d] -> [...]."""
    _, _, rstd = torch.native_layer_norm(
        z, z.shape[-1:], None, None, eps
    )  # on a CPU var() takes twenty times longer
    return 1 / rstd[..., 0]


def projections(attn):
    """Weights W_Q, W_K, W_V [width, d] and biases [width] of an nn.MultiheadAttention."""
    if attn.in_proj_weight is not None:
        return attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    return (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight), attn.in_proj_bias.chunk(3)


def class_attention(attn, x):
    """The class token's attention probabilities of every head, [B, H, T]; rows sum to 1.

    attn: the block's nn.MultiheadAttention.
    x: its input, the output of LN1 [B, T, d].

    The score of token i is q.(W_K x_i + b_K). It is computed as (q W_K).x_i, without any key: b_K adds the
    same to all tokens.
    """
    (W_Q, W_K, _), (b_Q, _, _) = projections(attn)
    q = torch.nn.functional.linear(x[:, 0], W_Q, b_Q).unflatten(-1, (attn.num_heads, -1))  # [B, H, e]
    q = (
        torch.einsum("bhe,hed->bhd", q, W_K.unflatten(0, (attn.num_heads, -1))) * q.shape[-1] ** -0.5
    )  # seen from the stream
    return torch.softmax(torch.einsum("bhd,btd->bht", q, x).float(), dim=-1)


def query_attention(pool, x):
    """The same of the first learned query of a pooling attention: x [B, T, d], its normalised tokens."""
    (W_Q, W_K, _), (b_Q, _, _) = projections(pool.attn)
    q = torch.nn.functional.linear(pool.ln_q(pool.query)[0], W_Q, b_Q).unflatten(
        0, (pool.attn.num_heads, -1)
    )  # [H, e]
    q = torch.einsum("he,hed->hd", q, W_K.unflatten(0, (pool.attn.num_heads, -1))) * q.shape[-1] ** -0.5
    return torch.softmax(torch.einsum("hd,btd->bht", q, x).float(), dim=-1)


def attention_pattern(attn, x):
    """The attention probabilities of every head, from all tokens to all: attn as above, x [B, T, d] -> [B, H,
    T, T].
    """
    query_key = torch.nn.functional.linear(
        x, attn.in_proj_weight[: -attn.embed_dim], attn.in_proj_bias[: -attn.embed_dim]
    )
    q, k = query_key.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, T, e] each
    return probabilities(q, k)


def probabilities(q, k):
    """Attention probabilities [B, H, T, T] of queries and keys [B, H, T, e]."""
    return torch.softmax((q * q.shape[-1] ** -0.5 @ k.mT).float(), dim=-1)


class KeptQueries:
    """Lets a block's nn.MultiheadAttention hand its queries and keys [B, H, T, e] to `keep` in each forward
    pass, until `remove`: to compute them once more would cost a sixth of the block."""

    def __init__(self, attn, keep):
        self.attn, self.keep, self.before = attn, keep, attn.__dict__.get("forward")
        attn.forward = self._forward

    def _forward(self, x, *_, **__):
        joint = torch.nn.functional.linear(x, self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = joint.unflatten(-1, (3, self.attn.num_heads, -1)).permute(
            2, 0, 3, 1, 4
        )  # [B, H, T, e] each
        self.keep(q, k)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.attn.out_proj(out.transpose(1, 2).flatten(2)), None

    def remove(self):
        """Undo it, the latest first."""
        del self.attn.forward
        if self.before is not None:
            self.attn.forward = self.before


def attention_output(attn, change, x):
    """What a block's attention gives when its probabilities are changed: change(A [B, H, T, T]) -> A. attn,
    x: as above.
    """
    W_V, b_V = attn.in_proj_weight[2 * attn.embed_dim :], attn.in_proj_bias[2 * attn.embed_dim :]
    values = torch.nn.functional.linear(x, W_V, b_V).unflatten(-1, (attn.num_heads, -1))  # [B, T, H, e]
    A = change(attention_pattern(attn, x))
    return attn.out_proj(torch.einsum("bhij,bjhe->bihe", A.to(values.dtype), values).flatten(2))


def layer_scale(module):
    """Factor of a LayerScale [d]; 1 where the model has none."""
    return double(module.gamma) if hasattr(module, "gamma") else 1.0


def double(x):
    """In float64; on the CPU where the device has none (MPS)."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)
