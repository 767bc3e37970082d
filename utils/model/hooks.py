"""HookedViT: watch or change an open_clip ViT while it runs, and leave no trace. Letters as in `utils.prs`.

The output reads the class token, an average of the patches (the last LayerNorm after it or before), or what
one query of a pooling attention takes from the tokens. A pooling attention counts as that of layer L; effects
go through it alone.
"""

import fnmatch
from contextlib import contextmanager
from functools import partial

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

from utils.model.attention import (
    KeptQueries,
    attention_output,
    class_attention,
    double,
    last_statistics,
    layer_scale,
    norm_std,
    probabilities,
    projections,
    query_attention,
)
from utils.model.towers import PooledTower, TokenTower, in_open_clips_form
from utils.runtime.errors import UserError

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# What can be recorded: activation: (module, function of the block or tower, the module's input z and its
# output x). A std is sqrt(biased variance + eps), the number that the LayerNorm divides by.
OF_BLOCK = {  # as blocks.{l}.NAME
    "resid.pre": ("ln_1", lambda block, z, x: z.float()),  # [B, T, d], the residual stream before the block
    "ln1.mean": (
        "ln_1",
        lambda block, z, x: z.float().mean(dim=-1),
    ),  # [B, T], of the LayerNorm before the attention
    "ln1.std": ("ln_1", lambda block, z, x: norm_std(z.float(), block.ln_1.eps)),  # [B, T]
    "ln1.out": (
        "ln_1",
        lambda block, z, x: x.float(),
    ),  # [B, T, d], from which `attention_pattern` gives all probabilities
    "attn.out": (
        "ls_1",
        lambda block, z, x: x.float(),
    ),  # [B, T, d], what the attention adds to the residual stream
    "mlp.post": (
        "mlp.gelu",
        lambda block, z, x: x.float(),
    ),  # [B, T, N], post-GELU activations of the neurons
    "mlp.out": ("ls_2", lambda block, z, x: x.float()),  # [B, T, d], what the MLP adds to the residual stream
}
OF_TOWER = {  # of the last LayerNorm, where the output is read
    "ln_post.mean": ("ln_post", lambda visual, z, x: last_statistics(visual, z.float())[0]),  # [B]
    "ln_post.std": ("ln_post", lambda visual, z, x: last_statistics(visual, z.float())[1]),  # [B]
    "pool.weights": (
        "ln_post",
        lambda visual, z, x: last_statistics(visual, z.float())[2],
    ),  # [B, T], of tokens in the output
}
WITHOUT_LAST_NORM = {
    "ln_post.mean": ("attn_pool", lambda visual, z, x: torch.zeros_like(x[:, 0, 0])),
    "ln_post.std": ("attn_pool", lambda visual, z, x: torch.ones_like(x[:, 0, 0])),
}
ROWS = {  # of the attention that the output reads, as blocks.{l}.NAME, by how the tower is pooled
    "class token": (
        "attn.row",
        "ln_1",
        lambda block, z, x: class_attention(block.attn, x.float()),
    ),  # [B, H, T]
    "average": (
        "attn.row",
        "attn",
        lambda prefix, q, k: probabilities(q, k)[:, :, prefix:].mean(dim=2),
    ),  # [B, H, T]
    "average of norms": (
        "attn.queries",
        "attn",
        lambda prefix, q, k: (q, k),
    ),  # [B, H, T, e] each: rows when weights are known
}
OF_POOL = {  # of a pooling attention, as blocks.{L}.NAME
    "ln1.mean": ("ln_k", lambda pool, z, x: z.float().mean(dim=-1)),  # [B, T]
    "ln1.std": ("ln_k", lambda pool, z, x: norm_std(z.float(), pool.ln_k.eps)),  # [B, T]
    "attn.row": ("ln_k", lambda pool, z, x: query_attention(pool, x.float())),  # [B, H, T]
    "resid.pre": ("ln_k", lambda pool, z, x: z.float()),  # [B, T, d]
}


# What can be changed, as blocks.{l}.NAME: (module, function of the change, the module's inputs and its output
# -> new output)
CHANGES = {
    "attn.pattern": (
        "attn",
        lambda attn, change, x, output: (attention_output(attn, change, x), None),
    ),  # [B, H, T, T]
    "attn.out": ("ls_1", lambda _, change, x, output: change(output)),
    "mlp.post": ("mlp.gelu", lambda _, change, x, output: change(output)),
    "mlp.out": ("ls_2", lambda _, change, x, output: change(output)),
}


class HookedViT:
    """An open_clip image tower whose activations can be recorded and changed.

    visual: the tower, used as it is: no weights are copied and its fused attention stays in place.
    precision: of the forward pass: float32, tf32 (CUDA), bfloat16 or float16. What is recorded is computed in
        float32 from what the pass has.

    Attributes: `L`, `H`, `N`, `d`, `D` (sizes), `sizes` {letter: size}, `T` (tokens at the trained
    resolution), `prefix` (tokens before the patches), `grid` (rows and columns of patches), `blocks`, `last`
    (the last MLP with effects), `pooling` ("class token", "average" of the patches, "average of norms", where
    the last LayerNorm comes before it, or "attention").

    Raises UserError for a tower that the method does not cover.
    """

    def __init__(self, visual, precision="float32"):
        visual = in_open_clips_form(visual)
        check_supported(visual)
        self.visual, self.precision, self.blocks = visual, precision, visual.transformer.resblocks
        first, self.pooling, pool = self.blocks[0], pooling_of(visual), visual.attn_pool
        self.L, self.H = len(self.blocks), first.attn.num_heads
        self.N, self.d = first.mlp.c_fc.out_features, first.mlp.c_fc.in_features
        self.D = visual.output_dim if visual.proj is None else visual.proj.shape[1]
        self.grid, self.prefix = visual.grid_size, int(hasattr(visual, "class_embedding"))
        self.T = self.grid[0] * self.grid[1] + self.prefix
        later = first.attn if pool is None else pool.attn
        self.sizes = {"N": self.N, "D": self.D, "e": later.embed_dim // later.num_heads}
        # contributors of the sum that the last LayerNorm normalises, for each of the sum before
        self.summands = (1 + 2 * self.L) * self.H if pool is None else later.num_heads
        self.last, self.last_attention = (self.L - 2, self.L - 1) if pool is None else (self.L - 1, self.L)
        self._row, *row = ROWS.get(self.pooling, (None,))
        of_block = OF_BLOCK | ({self._row: tuple(row)} if row else {})
        parts = [(f"blocks.{l}.", block, of_block) for l, block in enumerate(self.blocks)]
        parts += [("", visual, WITHOUT_LAST_NORM if visual.ln_post is None else OF_TOWER)]
        parts += [] if pool is None else [(f"blocks.{self.L}.", pool, OF_POOL)]
        self._activations = {
            prefix + name: (part, *table[name]) for prefix, part, table in parts for name in table
        }

    def later(self, layer):
        """The attentions through which the neurons of MLP `layer` act on the output: those of later layers,
        or the pooling's.
        """
        return range(layer + 1, self.L) if self.pooling != "attention" else [self.L]

    def K(self, layer):
        """Number of attention heads after MLP `layer`."""
        return (
            (self.L - 1 - layer) * self.H
            if self.pooling != "attention"
            else self.visual.attn_pool.attn.num_heads
        )

    @property
    def device(self):
        """Where the weights are."""
        return self.blocks[0].mlp.c_fc.weight.device

    @property
    def names(self):
        """Every activation that can be recorded."""
        return list(self._activations)

    def path(self, first):
        """What to record of the way from layer `first` to the output: statistics, and what `pool` and
        `read_rows` need.
        """
        row = self._row or "attn.row"  # of the pooling's own attention
        of_layers = [
            f"blocks.{l}.{name}" for l in self.later(first - 1) for name in (row, "ln1.mean", "ln1.std")
        ]
        return [
            *of_layers,
            "ln_post.mean",
            "ln_post.std",
            *["pool.weights"] * (self.pooling == "average of norms"),
        ]

    def read_rows(self, cache):
        """Add blocks.{l}.attn.row to a cache of `path` where it could not be recorded: the last LayerNorm
        weighs the tokens.
        """
        for name in [name for name in cache if name.endswith(".attn.queries")]:
            pattern = probabilities(*cache.pop(name))
            cache[name.replace("queries", "row")] = torch.einsum(
                "bq,bhqt->bht", cache["pool.weights"], pattern
            )

    def pool(self, x, cache=None):
        """What the output reads of the tokens, [B, d] of x [B, T, d]; cache: with pool.weights, for an
        average of norms.
        """
        if self.pooling == "average of norms":
            return torch.einsum("bt,btd->bd", cache["pool.weights"], x)
        return x[:, 0] if self.pooling == "class token" else x[:, self.prefix :].mean(dim=1)

    def token_weights(self, x):
        """How the output weighs the tokens, [T], where no image is looked at: x [B, T, ...]."""
        weights = torch.zeros_like(x[0, :, 0])
        weights[0 if self.pooling == "class token" else slice(self.prefix, None)] = 1
        return weights / weights.sum()

    def __call__(self, images):
        """Representations [B, D], not normalised, of images [B, 3, side, side]."""
        with self._precision(images.device.type):
            output = self.visual(images)
        output = output[0] if isinstance(output, tuple) else output  # towers with output_tokens return both
        return output.float()

    @contextmanager
    def record(self, *patterns):
        """Record activations of the forward passes inside the `with`; yields a dict, name -> tensor of the
        last pass.

        patterns: names from `names`, or shell patterns of them (`record("blocks.*.mlp.post")`).

        Raises KeyError for a pattern that fits no activation. Hooks are removed on leaving, also after an
        exception.
        """
        wanted = {name for pattern in patterns for name in self._fitting(pattern, self.names)}
        cache, handles = {}, []
        try:
            for name in wanted:
                part, module, compute = self._activations[name]
                if module == "attn":
                    handles.append(
                        KeptQueries(
                            part.attn, partial(_keep_queries, cache, name, partial(compute, self.prefix))
                        )
                    )
                    continue
                hook = partial(_keep, cache, name, partial(compute, part))
                handles.append(part.get_submodule(module).register_forward_hook(hook))
            yield cache
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def edit(self, changes):
        """Change activations of the forward passes inside the `with`: causal interventions on the running
        model.

        changes: {name: function}, as blocks.{l}.NAME of CHANGES or shell patterns of them. A function gets
            the activation and returns what the model uses in its place. What is recorded inside is what comes
            after the change.

        Raises KeyError for a pattern that fits nothing. Hooks are removed on leaving, also after an
        exception.
        """
        names = {
            f"blocks.{l}.{name}": (block, *CHANGES[name])
            for l, block in enumerate(self.blocks)
            for name in CHANGES
        }
        handles = []
        try:
            for pattern, change in changes.items():
                for name in self._fitting(pattern, names):
                    block, module, compute = names[name]
                    hook = partial(_change, compute, change)
                    handles.append(block.get_submodule(module).register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def after(self, layer, z):
        """Representations [B, D] from the residual stream after block `layer`, z [B, T, d]: only the later
        blocks are run.
        """
        with self._precision(z.device.type):
            for block in self.blocks[layer + 1 :]:
                z = block(z)
            pooled, _ = self.visual._pool(z)
            out = pooled if self.visual.proj is None else pooled @ self.visual.proj
            bias = getattr(self.visual, "bias", None)
            return (out if bias is None else out + bias).float()

    @staticmethod
    def _fitting(pattern, names):
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            raise KeyError(f"no activation is called {pattern!r}; there are {', '.join(names)}")
        return fitting

    @contextmanager
    def _precision(self, device):
        dtype = AUTOCAST.get(self.precision)
        with tf32(self.precision == "tf32"), torch.autocast(device, dtype, enabled=dtype is not None):
            yield

    def mlp_weights(self, layer):
        """w_n of all neurons [N, d] and b_out [d], in float64."""
        block = self.blocks[layer]
        scale = layer_scale(block.ls_2)
        return double(block.mlp.c_proj.weight).T * scale, double(block.mlp.c_proj.bias) * scale

    def head_weights(self, l):
        """Heads of attention l in float64: gamma, beta [d] of the LayerNorm before it, W_V [H, e, d], b_V [H,
        e], W_O [H, e, d'], b_O [d'], with d' the width of what it writes into."""
        part = self.visual.attn_pool if l == self.L else self.blocks[l]
        norm, attn, scale = (
            (part.ln_k, part.attn, 1.0) if l == self.L else (part.ln_1, part.attn, layer_scale(part.ls_1))
        )
        (_, _, W_V), (_, _, b_V) = projections(attn)
        W_V, b_V = (double(x).unflatten(0, (attn.num_heads, -1)) for x in (W_V, b_V))
        W_O = (double(attn.out_proj.weight).T * scale).unflatten(0, (attn.num_heads, -1))
        return double(norm.weight), double(norm.bias), W_V, b_V, W_O, double(attn.out_proj.bias) * scale

    def output_weights(self):
        """P [d', D] of the projection and gamma [d'] of the last LayerNorm, neutral where there is none; the
        constant of both, beta P and perhaps a bias [D]. In float64."""
        norm, P = self.visual.ln_post, self.visual.proj
        P = torch.eye(self.D, device=self.device) if P is None else P
        gamma, beta = (
            (torch.ones_like(P[:, 0]), torch.zeros_like(P[:, 0]))
            if norm is None
            else (norm.weight, norm.bias)
        )
        bias = getattr(self.visual, "bias", None)
        constant = double(beta) @ double(P) + (0 if bias is None else double(bias))
        return double(P), double(gamma), constant

    @torch.inference_mode()
    def left_out(self, images):
        """Share of the representations [B] that a pooling head's MLP makes, |MLP(LN(o))| / |rep|, not in any
        effect; or None.
        """
        if self.pooling != "attention" or self.visual.ln_post is not None:
            return None
        kept = {}
        handle = self.visual.attn_pool.register_forward_hook(
            lambda module, inputs, output: kept.update(o=output[:, 0].float())
        )
        try:
            representation = self(images)
        finally:
            handle.remove()
        return (representation - kept["o"]).norm(dim=-1) / representation.norm(dim=-1)

    def tell_left_out(self, loader, pieces):
        """Print the mean of `left_out` over some images. loader, pieces: as in `Pass.over`."""
        for pixels in loader(pieces) if self.pooling == "attention" else ():
            if (share := self.left_out(pixels)) is not None:
                what = "the MLP after the pooling attention, which effects leave out, makes"
                print(
                    f"note: {what} {100 * float(share.mean()):.0f} % of the representation (first {len(pixels)} images)"
                )

    @contextmanager
    def class_token_last(self):
        """Inside the `with`, the last MLP works on the class token alone and its post-GELU activations are
        [B, 1, N]: nothing of the other tokens reaches the representation. Towers that average the patches are
        left alone."""
        if self.pooling != "class token":
            yield
            return
        hook = self.blocks[-1].ln_2.register_forward_pre_hook(lambda norm, inputs: (inputs[0][:, :1],))
        try:
            yield
        finally:
            hook.remove()


def _keep(cache, name, compute, module, inputs, output):
    """Forward hook that stores an activation, computed in float32."""
    with tf32(False), torch.autocast(output.device.type, enabled=False):
        cache[name] = compute(inputs[0].detach(), output.detach())


def _keep_queries(cache, name, compute, q, k):
    """Store what is computed, in float32, from the queries and keys of an attention."""
    with tf32(False), torch.autocast(q.device.type, enabled=False):
        cache[name] = compute(q.detach().float(), k.detach().float())


def _change(compute, change, module, inputs, output):
    """Forward hook that replaces a module's output."""
    return compute(module, change, inputs[0], output)


@contextmanager
def tf32(allowed):
    """Inside the `with`, whether CUDA may compute float32 products in TF32."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, mode in zip(backends, before, strict=True):
            backend.allow_tf32 = mode


def pooling_of(visual):
    """How a supported tower is pooled, as in `HookedViT.pooling`."""
    if visual.attn_pool is not None:
        return "attention"
    average = "average" if visual.final_ln_after_pool else "average of norms"
    return "class token" if visual.pool_type == "tok" else average


def check_supported(visual):
    """Raise UserError, naming the reason, unless the second-order effects of this image tower are defined
    exactly.
    """
    plain = "choose a plain ViT such as --model ViT-B-32"
    if isinstance(visual, PooledTower | TokenTower):
        return
    if not isinstance(visual, VisionTransformer):
        kind = type(visual).__name__
        raise UserError(
            f"this model's image tower is a {kind} and not open_clip's own VisionTransformer; {plain} or ViT-L-14"
        )
    if visual.attn_pool is not None and (
        visual.attn_pool_contrastive is not None or visual.pool_type != "tok"
    ):
        raise UserError(
            f"this model pools its tokens by attention with several queries that all count; {plain}"
        )
    if visual.pool_type not in ("tok", "avg"):
        raise UserError(
            f"this model's output is pooled by '{visual.pool_type}': neither the class token nor an average; {plain}"
        )
    kind = type(visual.transformer.resblocks[0])
    if kind is not ResidualAttentionBlock or visual.proj is None:
        raise UserError(
            f"this model has {kind.__name__} blocks, which are not plain pre-norm, or no output projection; {plain}"
        )
