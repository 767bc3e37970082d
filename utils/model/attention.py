"""Compute attention and LayerNorms from their weights and inputs. Letters as in `utils.prs`."""

import torch
from timm.layers import apply_rot_embed_cat
from torch import einsum, nn
from torch.nn.functional import linear, scaled_dot_product_attention


def wide(x):
    """Return a tensor in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


# What hooks record: functions of a module, its input z and its output x


def module_input(module, z, x):
    """Return the input, in float32."""
    return wide(z)


def module_output(module, z, x):
    """Return the output, in float32."""
    return wide(x)


def input_mean(norm, z, x):
    """Return the mean that a LayerNorm subtracts: z [..., d] -> [...]."""
    return wide(z).mean(dim=-1)


def input_std(norm, z, x):
    """Return the standard deviation that a LayerNorm divides by: z [..., d] -> [...]."""
    return norm_std(wide(z), norm.eps)


def norm_std(z, eps):
    """Return sqrt(biased variance + eps) of z [..., d] -> [...]."""
    # on a CPU, var() takes twenty times longer
    _, _, rstd = torch.native_layer_norm(z, z.shape[-1:], None, None, eps)
    return 1 / rstd[..., 0]


# Attention


class Attention(nn.Module):
    """An Attention is one that nn.MultiheadAttention cannot be, under the names of that.

    rope: module of timm whose get_embed() turns the queries and keys of patches; None.
    prefix: number of tokens before the patches, which are not turned.
    half: whether the two halves of a head are turned, and not its pairs of neighbours.
    bias: module of timm whose get_bias() [1, H, T, T] is added to the scores; None.
    inner: LayerNorm of all heads together, before the output projection; None.
    """

    def __init__(self, width, heads, rope=None, prefix=0, half=False, bias=None, inner=None):
        super().__init__()
        self.embed_dim = width
        self.num_heads = heads
        self.rope = rope
        self.prefix = prefix
        self.half = half
        self.bias = bias
        self.inner = inner
        self.register_parameter("in_proj_weight", None)  # there are q_proj_weight and so on, or this

    def forward(self, x, *_, **__):
        return attend(self, x)

    def turned(self, x):
        """Return queries or keys [B, H, T, e], turned."""
        if self.rope is None:
            return x
        patches = apply_rot_embed_cat(x[:, :, self.prefix :], self.rope.get_embed(), half=self.half)
        return torch.cat([x[:, :, : self.prefix], patches], dim=2).type_as(x)


def bias_of(attn):
    """Return what an attention adds to its scores, [1, H, T, T]; None for nothing."""
    bias = getattr(attn, "bias", None)
    return None if bias is None else bias.get_bias()


def attend(attn, x, keep=None):
    """Return what the forward of a block's attention returns: its output [B, T, d], and None.

    x: its input, [B, T, d].
    keep: called with the attention, (queries,) and keys, each [B, H, T, e], as a forward hook is.
    """
    q, k, v = in_heads(attn, x)
    if keep is not None:
        keep(attn, (q,), k)
    return joined(attn, scaled_dot_product_attention(q, k, v, attn_mask=bias_of(attn))), None


def in_heads(attn, x, first=0, last=2):
    """Return some of queries, keys and values (0, 1 and 2) of x [B, T, d], each [B, H, T, e]."""
    if attn.in_proj_weight is not None:
        rows = slice(first * attn.embed_dim, (last + 1) * attn.embed_dim)
        joint = linear(x, attn.in_proj_weight[rows], attn.in_proj_bias[rows])
        found = joint.unflatten(-1, (last + 1 - first, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    else:
        parts = list(zip(*projections(attn), strict=True))[first : last + 1]
        heads = (attn.num_heads, -1)
        found = [linear(x, W, b).unflatten(-1, heads).transpose(1, 2) for W, b in parts]
    if not isinstance(attn, Attention):
        return found
    return [part if place == 2 else attn.turned(part) for place, part in enumerate(found, first)]


def joined(attn, mixed):
    """Return the output of an attention [B, T, d] from what its heads make, [B, H, T, e]."""
    mixed = mixed.transpose(1, 2).flatten(2)
    inner = getattr(attn, "inner", None)
    return attn.out_proj(mixed if inner is None else inner(mixed))


def projections(attn):
    """Return the weights W_Q, W_K, W_V [width, d] and biases [width] of an attention."""
    biases = attn.in_proj_bias.chunk(3)
    if attn.in_proj_weight is not None:
        return attn.in_proj_weight.chunk(3), biases
    return (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight), biases


def class_attention(attn, x):
    """Return the class token's attention probabilities in every head, [B, H, T].

    attn: the block's nn.MultiheadAttention. No key is made.
    x: its input, the output of LN1 [B, T, d].
    """
    return _of_query(attn, x[:, 0], x, "bhd,btd->bht")


def class_token_output(attn, x):
    """Return the class token's output of a block's attention, [B, 1, d].

    attn: the block's attention. Of an nn.MultiheadAttention no key and no value is made.
    x: its input, [B, T, d].
    """
    if isinstance(attn, Attention):
        return attn(x)[0][:, :1]
    (_, _, W_V), (_, _, b_V) = projections(attn)
    W_V, b_V = (part.unflatten(0, (attn.num_heads, -1)) for part in (W_V, b_V))
    mixed = class_attention(attn, x).to(x.dtype) @ x  # [B, H, d]
    return joined(attn, (einsum("bhd,hed->bhe", mixed, W_V) + b_V)[:, :, None])


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
    return torch.softmax(wide(einsum(products, q, x)), dim=-1)


def attention_pattern(attn, x):
    """Return the attention probabilities in every head, from all tokens to all, [B, H, T, T].

    attn: the block's attention.
    x: its input, [B, T, d].
    """
    q, k = in_heads(attn, x, last=1)
    return probabilities(q, k, bias_of(attn))


def probabilities(q, k, bias=None):
    """Return the attention probabilities [B, H, T, T] of queries and keys [B, H, T, e].

    bias: added to the scores, [1, H, T, T].
    """
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    return torch.softmax(wide(scores if bias is None else scores + bias), dim=-1)


class Shifted:
    """A Shifted is a pre-norm block's attention on residual streams shifted along one direction each.

    LN1 of x = z + c w, with a number c for each token, is a sum of what it makes of z and of w, but for the
    deviation of x. So do the queries, keys and values: no x is multiplied with their weights.

    block: the block, with an nn.MultiheadAttention.
    z: the streams before it, [B, T, d].
    """

    def __init__(self, block, z):
        self.norm, self.attn = block.ln_1, block.attn
        self.of_z = self._joint(z)
        self.bias = linear(self.norm.bias, self.attn.in_proj_weight, self.attn.in_proj_bias)

    def _joint(self, z):
        centred = (z - z.mean(dim=-1, keepdim=True)) * self.norm.weight
        return linear(centred, self.attn.in_proj_weight)  # [..., 3 d]

    def __call__(self, x, b, c, w):
        """Return the output of the attention, [n, T, d].

        x: the shifted streams, [n, T, d]. b: of which z each is, [n]. c: [n, T]. w: [n, d].
        """
        joint = self.of_z[b].addcmul_(c[..., None], self._joint(w)[:, None])
        joint.div_(norm_std(x, self.norm.eps)[..., None]).add_(self.bias)
        q, k, v = joint.unflatten(-1, (3, self.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return joined(self.attn, scaled_dot_product_attention(q, k, v))


class KeptQueries:
    """A KeptQueries hands the queries and keys of a block's attention to a function until it is removed.

    To compute them a second time would cost a sixth of the block.

    attn: the block's attention.
    keep: called in each forward pass, as `attend` says.
    """

    def __init__(self, attn, keep):
        self.attn = attn
        self.keep = keep
        self.before = attn.__dict__.get("forward")
        attn.forward = self._forward

    def _forward(self, x, *_, **__):
        return attend(self.attn, x, self.keep)

    def remove(self):
        """Give the attention its forward back. Of several on one attention, remove the latest first."""
        del self.attn.forward
        if self.before is not None:
            self.attn.forward = self.before


def attention_output(attn, change, x):
    """Return the output of a block's attention [B, T, d] with changed probabilities.

    attn: the block's attention.
    change: function of the probabilities [B, H, T, T] that returns those to use.
    x: the input of the attention, [B, T, d].
    """
    [values] = in_heads(attn, x, first=2)
    A = change(attention_pattern(attn, x))
    return joined(attn, A.to(values.dtype) @ values)


def double(x):
    """Return a tensor in float64, on the CPU where its device has none (MPS)."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)
