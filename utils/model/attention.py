"""Compute attention and LayerNorms from their weights and inputs. Letters as in `utils.prs`."""

import torch
from torch import einsum
from torch.nn.functional import linear, scaled_dot_product_attention

# What hooks record: functions of a module, its input z and its output x


def module_input(module, z, x):
    """Return the input, in float32."""
    return z.float()


def module_output(module, z, x):
    """Return the output, in float32."""
    return x.float()


def input_mean(norm, z, x):
    """Return the mean that a LayerNorm subtracts: z [..., d] -> [...]."""
    return z.float().mean(dim=-1)


def input_std(norm, z, x):
    """Return the standard deviation that a LayerNorm divides by: z [..., d] -> [...]."""
    return norm_std(z.float(), norm.eps)


def norm_std(z, eps):
    """Return sqrt(biased variance + eps) of z [..., d] -> [...]."""
    # on a CPU, var() takes twenty times longer
    _, _, rstd = torch.native_layer_norm(z, z.shape[-1:], None, None, eps)
    return 1 / rstd[..., 0]


# Attention


def projections(attn):
    """Return the weights W_Q, W_K, W_V [width, d] and biases [width] of an nn.MultiheadAttention."""
    biases = attn.in_proj_bias.chunk(3)
    if attn.in_proj_weight is not None:
        return attn.in_proj_weight.chunk(3), biases
    return (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight), biases


def class_attention(attn, x):
    """Return the class token's attention probabilities in every head, [B, H, T].

    attn: the block's nn.MultiheadAttention.
    x: its input, the output of LN1 [B, T, d].
    """
    return _of_query(attn, x[:, 0], x, "bhd,btd->bht")


def query_attention(pool, x):
    """Return the attention probabilities of the first learned query of a pooling attention, [B, H, T].

    x: its normalised tokens, [B, T, d].
    """
    return _of_query(pool.attn, pool.ln_q(pool.query)[0], x, "hd,btd->bht")


def _of_query(attn, source, x, products):
    """Return the attention probabilities [B, H, T] of the query that is made of `source` [..., d].

    The score of token i is q.(W_K x_i + b_K). It is computed as (q W_K).x_i, without any key, because b_K
    adds one number to the scores of all tokens.
    """
    (W_Q, W_K, _), (b_Q, _, _) = projections(attn)
    q = linear(source, W_Q, b_Q).unflatten(-1, (attn.num_heads, -1))  # [..., H, e]
    W_K = W_K.unflatten(0, (attn.num_heads, -1))
    q = einsum("...he,hed->...hd", q, W_K) * q.shape[-1] ** -0.5  # as seen from the residual stream
    return torch.softmax(einsum(products, q, x).float(), dim=-1)


def attention_pattern(attn, x):
    """Return the attention probabilities in every head, from all tokens to all, [B, H, T, T].

    attn: the block's nn.MultiheadAttention.
    x: its input, [B, T, d].
    """
    W = attn.in_proj_weight[: -attn.embed_dim]
    b = attn.in_proj_bias[: -attn.embed_dim]
    q, k = _by_head(attn, linear(x, W, b), parts=2)
    return probabilities(q, k)


def probabilities(q, k):
    """Return the attention probabilities [B, H, T, T] of queries and keys [B, H, T, e]."""
    return torch.softmax((q * q.shape[-1] ** -0.5 @ k.mT).float(), dim=-1)


def _by_head(attn, joint, parts):
    """Split a joint projection [B, T, parts * d] into its parts, each [B, H, T, e]."""
    return joint.unflatten(-1, (parts, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)


class KeptQueries:
    """A KeptQueries hands the queries and keys of a block's attention to a function until it is removed.

    To compute them a second time would cost a sixth of the block.

    attn: the block's nn.MultiheadAttention.
    keep: called in each forward pass, as a forward hook is: keep(attn, (queries,), keys), each [B, H, T, e].
    """

    def __init__(self, attn, keep):
        self.attn = attn
        self.keep = keep
        self.before = attn.__dict__.get("forward")
        attn.forward = self._forward

    def _forward(self, x, *_, **__):
        joint = linear(x, self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = _by_head(self.attn, joint, parts=3)
        self.keep(self.attn, (q,), k)
        out = scaled_dot_product_attention(q, k, v)
        return self.attn.out_proj(out.transpose(1, 2).flatten(2)), None

    def remove(self):
        """Give the attention its forward back. Of several on one attention, remove the latest first."""
        del self.attn.forward
        if self.before is not None:
            self.attn.forward = self.before


def attention_output(attn, change, x):
    """Return the output of a block's attention [B, T, d] with changed probabilities.

    attn: the block's nn.MultiheadAttention.
    change: function of the probabilities [B, H, T, T] that returns those to use.
    x: the input of the attention, [B, T, d].
    """
    W_V = attn.in_proj_weight[2 * attn.embed_dim :]
    b_V = attn.in_proj_bias[2 * attn.embed_dim :]
    values = linear(x, W_V, b_V).unflatten(-1, (attn.num_heads, -1))  # [B, T, H, e]
    A = change(attention_pattern(attn, x))
    return attn.out_proj(einsum("bhij,bjhe->bihe", A.to(values.dtype), values).flatten(2))


def double(x):
    """Return a tensor in float64, on the CPU where its device has none (MPS)."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)
