"""Read the output of an image tower from its tokens: one class for each kind. Letters as in `utils.prs`.

A neuron acts on the output through the attentions that come after its MLP. A pooling attention counts as that
of layer L, and effects go through it alone.
"""

from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import einsum
from torch.nn.functional import pad

from utils.model.attention import (
    Attention,
    bias_of,
    class_attention,
    class_token_output,
    input_mean,
    input_std,
    module_input,
    norm_std,
    probabilities,
    query_attention,
    wide,
)
from utils.model.resnets import ResNetTower


class Pooling:
    """A Pooling answers every question whose answer depends on how a tower's output is read.

    visual: a supported image tower.

    Attributes:
    name: the kind, in words.
    has_first_order: whether heads and MLPs add to the output without any attention after them.
    leaves_out_mlp: whether an MLP after the pooling makes a part of the output, which no effect covers.
    prefix: number of tokens before the patches.
    last_attention: number of the last attention that the output reads.
    heads, head_width: of each attention through which neurons act.
    summands: contributors of the sum that the last LayerNorm normalises, for each of the sum before it.
    row: name of the activation from which blocks.{l}.attn.row comes.
    extra: names of the other activations that `read` and `read_rows` need.
    one_layer: why there is a single layer of neurons; "" where there are more.
    """

    name = ""
    has_first_order = True
    leaves_out_mlp = False
    row = "attn.row"
    extra = ()
    one_layer = ""

    def __init__(self, visual):
        self.visual = visual
        self.blocks = visual.transformer.resblocks
        self.prefix = int(hasattr(visual, "class_embedding"))
        self.last_attention = len(self.blocks) - 1
        attn = self.attention
        self.heads = attn.num_heads
        self.head_width = attn.embed_dim // attn.num_heads
        self.summands = self.groups(len(self.blocks)) * self.heads

    @property
    def attention(self):
        """The attention is the first of those through which neurons act."""
        return self.blocks[0].attn

    def groups(self, l):
        """Return how many groups of N contributors make the sum that attention l reads.

        They are the embedding, and each attention and each MLP before.
        """
        return 1 + 2 * l

    def later(self, layer):
        """Return the numbers of the attentions through which the neurons of MLP `layer` act on the output."""
        return range(layer + 1, len(self.blocks))

    def activations(self):
        """Return the activations that can be recorded besides `hooks.RECORDED`: {name: (module, function)}.

        The function gets the module, its input and its output. Of an attention, it gets queries and keys
        [B, H, T, e] instead.
        """
        norm = self.visual.ln_post
        rows = {f"blocks.{l}.{self.row}": self.row_of(block) for l, block in enumerate(self.blocks)}
        return {**rows, "ln_post.mean": (norm, self.mean), "ln_post.std": (norm, self.std)}

    def row_of(self, block):
        """Return the module and the function that record `row` of a block."""
        raise NotImplementedError

    def mean(self, norm, z, x):
        """Return the mean of the last LayerNorm's input as the output has it, [B]; z [B, T, d] or [B, d]."""
        return input_mean(norm, _first(z), x)

    def std(self, norm, z, x):
        """Return the number that the last LayerNorm divides the output by, [B]; z [B, T, d] or [B, d]."""
        return input_std(norm, _first(z), x)

    def read_rows(self, cache):
        """Add blocks.{l}.attn.row [B, H, T] to a cache, where it could not be recorded."""

    def read(self, x, cache=None):
        """Return what the output reads of the tokens, [B, d] of x [B, T, d], if it `has_first_order`.

        cache: with the activations `extra`.
        """
        raise NotImplementedError

    def token_weights(self, x):
        """Return uniform weights [T] of the tokens that the output reads, if it `has_first_order`.

        x: [B, T, ...].
        """
        raise NotImplementedError

    def class_token_last(self):
        """Return a context in which the last MLP computes the class token alone, if nothing else is read."""
        return nullcontext()

    def last_block(self, z):
        """Return what the output reads of the last block's output: all tokens [B, T, d], or the first one."""
        return self.blocks[-1](z)


def _first(z):
    """Return the first token, [B, d]; a z of that shape is pooled already."""
    return z[:, 0] if z.ndim == 3 else z


class ClassToken(Pooling):
    """A ClassToken is the pooling of a tower whose output is read from the class token."""

    name = "class token"

    def row_of(self, block):
        if isinstance(block.attn, Attention):  # its keys may be turned, so they are needed
            return block.attn, _first_row
        return block.ln_1, partial(_class_row, block.attn)

    def read(self, x, cache=None):
        return x[:, 0]

    def token_weights(self, x):
        return _one_at(slice(0, 1), x)

    @contextmanager
    def class_token_last(self):
        norm = self.blocks[-1].ln_2
        hook = norm.register_forward_pre_hook(lambda norm, inputs: (inputs[0][:, :1],))
        try:
            yield
        finally:
            hook.remove()

    def last_block(self, z):
        block = self.blocks[-1]
        z = z[:, :1] + block.ls_1(class_token_output(block.attn, block.ln_1(z)))
        return z + block.ls_2(block.mlp(block.ln_2(z)))


def _class_row(attn, norm, z, x):
    return class_attention(attn, wide(x))


def _first_row(attn, q, k):
    bias = bias_of(attn)
    bias = None if bias is None else bias[:, :, :1]
    return probabilities(wide(q[:, :, :1]), wide(k), bias)[:, :, 0]


def _one_at(tokens, x):
    """Return weights [T] for x [B, T, ...] that are equal at some tokens and 0 elsewhere; their sum is 1."""
    weights = torch.zeros_like(x[0, :, 0])
    weights[tokens] = 1
    return weights / weights.sum()


class MeanOfPatches(Pooling):
    """A MeanOfPatches is the pooling of a tower that averages its patches before the last LayerNorm."""

    name = "average"

    def row_of(self, block):
        return block.attn, self._mean_row

    def _mean_row(self, attn, q, k):
        return probabilities(wide(q), wide(k), bias_of(attn))[:, :, self.prefix :].mean(dim=2)

    def read(self, x, cache=None):
        return x[:, self.prefix :].mean(dim=1)

    def token_weights(self, x):
        return _one_at(slice(self.prefix, None), x)


class MeanOfNormedPatches(MeanOfPatches):
    """A MeanOfNormedPatches is the pooling of a tower that averages its patches after the last LayerNorm.

    The mean over patches of x_q / sigma_q is sum_q w_q x_q / sigma, with 1 / sigma the mean of all 1 /
    sigma_q, and w_q proportional to 1 / sigma_q. So the weights of the tokens depend on the image.
    """

    name = "average of norms"
    row = "attn.queries"  # the rows are known after the last block, when w is
    extra = ("pool.weights",)

    def activations(self):
        """Return those of `Pooling`, and w."""
        return super().activations() | {"pool.weights": (self.visual.ln_post, self.weights)}

    def row_of(self, block):
        return block.attn, _queries

    def weights(self, norm, z, x):
        """Return w of all tokens, [B, T]."""
        rstd = self._rstd(norm, z)
        return pad(rstd / rstd.sum(dim=1, keepdim=True), (self.prefix, 0))

    def mean(self, norm, z, x):
        """Return the weighted mean over patches of their means, [B]."""
        weights = self.weights(norm, z, x)[:, self.prefix :]
        return (weights * input_mean(norm, z[:, self.prefix :], x)).sum(dim=1)

    def std(self, norm, z, x):
        """Return sigma, [B]."""
        return 1 / self._rstd(norm, z).mean(dim=1)

    def _rstd(self, norm, z):
        return 1 / norm_std(wide(z[:, self.prefix :]), norm.eps)  # [B, patches]

    def read_rows(self, cache):
        """Replace queries, keys and bias by the weighted mean of their attention rows, [B, H, T]."""
        for name in [name for name in cache if name.endswith(".attn.queries")]:
            pattern = probabilities(*cache.pop(name))
            row = einsum("bq,bhqt->bht", cache["pool.weights"], pattern)
            cache[name.replace("queries", "row")] = row

    def read(self, x, cache=None):
        return einsum("bt,btd->bd", cache["pool.weights"], x)


def _queries(attn, q, k):
    return wide(q), wide(k), bias_of(attn)


class AttentionPool(Pooling):
    """An AttentionPool is the pooling of a tower whose output is made by an attention with one query."""

    name = "attention"
    has_first_order = False

    def __init__(self, visual):
        super().__init__(visual)
        self.leaves_out_mlp = visual.ln_post is None
        self.last_attention = len(self.blocks)
        self.summands = self.heads

    @property
    def attention(self):
        return self.visual.attn_pool.attn

    def later(self, layer):
        return [self.last_attention]

    def activations(self):
        pool = self.visual.attn_pool
        norm = self.visual.ln_post
        attention = f"blocks.{self.last_attention}"
        found = {
            f"{attention}.resid.pre": (pool.ln_k, module_input),  # [B, T, d]
            f"{attention}.ln1.mean": (pool.ln_k, input_mean),  # [B, T]
            f"{attention}.ln1.std": (pool.ln_k, input_std),  # [B, T]
            f"{attention}.attn.row": (pool.ln_k, partial(_query_row, pool)),  # [B, H, T]
            "pool.out": (pool, _first_output),  # [B, d']
        }
        if norm is None:
            return found | {"ln_post.mean": (pool, _zeros), "ln_post.std": (pool, _ones)}
        return found | {"ln_post.mean": (norm, self.mean), "ln_post.std": (norm, self.std)}


class AttentionOfMap(AttentionPool):
    """An AttentionOfMap is the pooling of a ResNet (`utils.model.resnets`)."""

    name = "attention of the last map"
    one_layer = "a ResNet counts as one layer"

    def __init__(self, visual):
        super().__init__(visual)
        self.leaves_out_mlp = False

    def groups(self, l):
        """Return 2: the channels, and as many of the positions."""
        return 2

    def activations(self):
        pool = self.visual.attn_pool
        found = super().activations()
        attention = f"blocks.{self.last_attention}"
        found[f"{attention}.attn.row"] = (pool.ln_k, partial(_map_row, pool))  # [B, H, T]
        found[f"{attention}.ln1.mean"] = (pool.ln_k, _zeros_of_tokens)  # there is no LayerNorm
        found[f"{attention}.ln1.std"] = (pool.ln_k, _ones_of_tokens)
        return found


def _map_row(pool, norm, z, x):
    """Return the row of the places, which holds what they add to the mean token, [B, H, T]."""
    row = class_attention(pool.attn, pool.tokens(wide(x)))
    return row[:, :, 1:] + row[:, :, :1] / x.shape[1]


def _zeros_of_tokens(norm, z, x):
    return torch.zeros_like(wide(x[:, :, 0]))


def _ones_of_tokens(norm, z, x):
    return torch.ones_like(wide(x[:, :, 0]))


def _query_row(pool, norm, z, x):
    return query_attention(pool, wide(x))


def _first_output(pool, z, x):
    return wide(x[:, 0])


def _zeros(pool, z, x):
    return torch.zeros_like(x[:, 0, 0])


def _ones(pool, z, x):
    return torch.ones_like(x[:, 0, 0])


def pooling_of(visual):
    """Return the `Pooling` of a supported image tower."""
    if isinstance(visual, ResNetTower):
        return AttentionOfMap(visual)
    if visual.attn_pool is not None:
        return AttentionPool(visual)
    if visual.pool_type == "tok":
        return ClassToken(visual)
    return MeanOfPatches(visual) if visual.final_ln_after_pool else MeanOfNormedPatches(visual)
