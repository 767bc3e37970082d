"""HookedViT: watch an open_clip ViT while it runs, and leave no trace.

Letters as in `utils.prs`.
"""

from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

from utils.runtime.errors import UserError

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class HookedViT:
    """An open_clip image tower whose activations can be recorded.

    The tower itself is used as it is: no weights are copied and its fused attention stays in place.

    Parameters
    visual: the tower.
    precision: of the forward pass: float32, tf32 (CUDA), bfloat16 or float16. What is recorded is computed in float32.

    Attributes: `L`, `H`, `N`, `d`, `D` (sizes), `sizes` {letter: size}, `T` (tokens at the trained resolution), `grid` (rows and
    columns of patches), `blocks`.

    Activations that `record` knows, for block l:
        blocks.{l}.ln1.mean, blocks.{l}.ln1.std   [B, T]      statistics of the LayerNorm before the attention
        blocks.{l}.ln1.out                        [B, T, d]   its output, from which `attention_pattern` gives all probabilities
        blocks.{l}.attn.row                       [B, H, T]   attention probabilities of the class token
        blocks.{l}.mlp.post                       [B, T, N]   post-GELU activations of the MLP's neurons
        ln_post.mean, ln_post.std                 [B]         statistics of the last LayerNorm at the class token
    A std is sqrt(biased variance + eps), the number that the LayerNorm divides by.

    Raises UserError for a tower that the method does not cover.
    """

    def __init__(self, visual, precision="float32"):
        check_supported(visual)
        self.visual, self.precision = visual, precision
        self.blocks = visual.transformer.resblocks
        first = self.blocks[0]
        self.L, self.H = len(self.blocks), first.attn.num_heads
        self.N, self.d = first.mlp.c_fc.out_features, first.mlp.c_fc.in_features
        self.D = visual.proj.shape[1]
        self.sizes = {"N": self.N, "D": self.D, "e": self.d // self.H}
        self.grid = visual.grid_size
        self.T = self.grid[0] * self.grid[1] + 1

    def K(self, layer):
        """Number of attention heads after MLP `layer`."""
        return (self.L - 1 - layer) * self.H

    @property
    def names(self):
        """Every activation that can be recorded."""
        per_block = ("ln1.mean", "ln1.std", "ln1.out", "attn.row", "mlp.post")
        return [f"blocks.{l}.{name}" for l in range(self.L) for name in per_block] + ["ln_post.mean", "ln_post.std"]

    def __call__(self, images):
        """Representations [B, D], not normalised, of images [B, 3, side, side]."""
        dtype = AUTOCAST.get(self.precision)
        with tf32(self.precision == "tf32"), torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            output = self.visual(images)
        output = output[0] if isinstance(output, tuple) else output  # towers with output_tokens return both
        return output.float()

    @contextmanager
    def record(self, *patterns):
        """Record activations of the forward passes inside the `with`; yields a dict, name -> tensor of the last pass.

        patterns: names from `names`, or shell patterns of them (`record("blocks.*.mlp.post")`).

        Raises KeyError for a pattern that fits no activation. Hooks are removed on leaving, also after an exception.
        """
        wanted = set()
        for pattern in patterns:
            fitting = [name for name in self.names if fnmatchcase(name, pattern)]
            if not fitting:
                raise KeyError(f"no activation is called {pattern!r}; there are {', '.join(self.names)}")
            wanted.update(fitting)
        cache, handles = {}, []
        try:
            for l, block in enumerate(self.blocks):
                if f"blocks.{l}.mlp.post" in wanted:
                    handles.append(block.mlp.gelu.register_forward_hook(_keep_output(cache, f"blocks.{l}.mlp.post")))
                if wanted & {f"blocks.{l}.{name}" for name in ("ln1.mean", "ln1.std", "ln1.out", "attn.row")}:
                    handles.append(block.ln_1.register_forward_hook(_keep_attention(cache, wanted, f"blocks.{l}", block.attn)))
            if wanted & {"ln_post.mean", "ln_post.std"}:
                handles.append(self.visual.ln_post.register_forward_hook(_keep_last_norm(cache)))
            yield cache
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def class_token_last(self):
        """Inside the `with`, the last MLP works on the class token alone and its post-GELU activations are [B, 1, N]: nothing of
        the other tokens reaches the representation."""
        hook = self.blocks[-1].ln_2.register_forward_pre_hook(lambda norm, inputs: (inputs[0][:, :1],))
        try:
            yield
        finally:
            hook.remove()


def _keep_output(cache, name):
    """Forward hook that stores a module's output."""

    def hook(module, inputs, output):
        cache[name] = output.detach().float()

    return hook


def _keep_attention(cache, wanted, block, attn):
    """Forward hook on the LayerNorm before an attention: its statistics, its output, the class token's attention."""

    def hook(norm, inputs, output):
        z, x = inputs[0].detach().float(), output.detach().float()
        with tf32(False), torch.autocast(x.device.type, enabled=False):
            if f"{block}.ln1.mean" in wanted:
                cache[f"{block}.ln1.mean"] = z.mean(dim=-1)
            if f"{block}.ln1.std" in wanted:
                cache[f"{block}.ln1.std"] = norm_std(z, norm.eps)
            if f"{block}.ln1.out" in wanted:
                cache[f"{block}.ln1.out"] = x
            if f"{block}.attn.row" in wanted:
                cache[f"{block}.attn.row"] = class_attention(attn, x)

    return hook


def _keep_last_norm(cache):
    """Forward hook on the last LayerNorm: its statistics at the class token."""

    def hook(norm, inputs, output):
        z = inputs[0].detach().float()
        z = z[:, 0] if z.ndim == 3 else z  # all tokens [B, T, d]; the class token [B, d] when the norm comes after pooling
        cache["ln_post.mean"], cache["ln_post.std"] = z.mean(dim=-1), norm_std(z, norm.eps)

    return hook


@contextmanager
def tf32(allowed):
    """Inside the `with`, whether CUDA may compute float32 products in TF32."""
    modes = ((torch.backends.cuda.matmul, allowed), (torch.backends.cudnn, allowed))
    before = [backend.allow_tf32 for backend, _ in modes]
    try:
        for backend, mode in modes:
            backend.allow_tf32 = mode
        yield
    finally:
        for (backend, _), mode in zip(modes, before, strict=True):
            backend.allow_tf32 = mode


def norm_std(z, eps):
    """What a LayerNorm divides by, sqrt(biased variance + eps): z [..., d] -> [...]."""
    _, _, rstd = torch.native_layer_norm(z, z.shape[-1:], None, None, eps)  # on a CPU var() takes twenty times longer
    return 1 / rstd[..., 0]


def class_attention(attn, x):
    """The class token's attention probabilities of every head, [B, H, T]; rows sum to 1.

    attn: the block's nn.MultiheadAttention.
    x: its input, the output of LN1 [B, T, d].

    The score of token i is q.(W_K x_i + b_K). It is taken as (q W_K).x_i, so that no key is ever computed: b_K adds the
    same number to all tokens, which the softmax does not see.
    """
    d, H = attn.embed_dim, attn.num_heads
    W_Q, W_K, _ = attn.in_proj_weight.view(3, H, d // H, d)  # each [H, e, d]
    b_Q = attn.in_proj_bias.view(3, H, d // H)[0]
    q = torch.einsum("bd,hed->bhe", x[:, 0], W_Q) + b_Q  # [B, H, e]
    q = torch.einsum("bhe,hed->bhd", q, W_K) * (d // H) ** -0.5  # [B, H, d]: the query, seen from the residual stream
    return torch.softmax(torch.einsum("bhd,btd->bht", q, x).float(), dim=-1)


def attention_pattern(attn, x):
    """The attention probabilities of every head, from all tokens to all: attn as above, x [B, T, d] -> [B, H, T, T]."""
    e = attn.embed_dim // attn.num_heads
    query_key = torch.nn.functional.linear(x, attn.in_proj_weight[: -attn.embed_dim], attn.in_proj_bias[: -attn.embed_dim])
    q, k = query_key.unflatten(-1, (2, attn.num_heads, e)).unbind(dim=2)  # [B, T, H, e] each
    return torch.softmax(torch.einsum("bihe,bjhe->bhij", q * e**-0.5, k).float(), dim=-1)


def check_supported(visual):
    """Raise UserError, naming the reason, unless the second-order effects of this image tower are defined exactly."""
    if not isinstance(visual, VisionTransformer):
        raise UserError(
            f"this model's image tower is a {type(visual).__name__}, and second-order effects are defined for open_clip's "
            "own VisionTransformer; choose a plain ViT such as --model ViT-B-32 or --model ViT-L-14"
        )
    if visual.attn_pool is not None:
        raise UserError(
            "this model pools its tokens by attention (attentional_pool), so the class token is not what reaches the output; "
            "choose a plain ViT such as --model ViT-B-32"
        )
    if visual.pool_type != "tok":
        raise UserError(
            f"this model's output is pooled by '{visual.pool_type}' and not taken from the class token, from which "
            "second-order effects are defined; choose a plain ViT such as --model ViT-B-32"
        )
    block = visual.transformer.resblocks[0]
    if type(block) is not ResidualAttentionBlock or visual.proj is None:
        raise UserError(
            f"this model has {type(block).__name__} blocks or no output projection; second-order effects are defined for "
            "plain pre-norm blocks, such as those of --model ViT-B-32"
        )
