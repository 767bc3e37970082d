"""Watch or change an image tower while it runs, and leave no trace. Letters as in `utils.prs`."""

import fnmatch
from contextlib import contextmanager
from functools import partial

import torch

from utils.model import branches, weights
from utils.model.attention import (
    Attention,
    KeptQueries,
    Shifted,
    attention_output,
    module_input,
    module_output,
    wide,
)
from utils.model.pooling import pooling_of
from utils.model.towers import Gated, in_open_clips_form, output_of, projected

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}

SUM = "the last module before a Post2"

# What can be recorded of every block, as blocks.{l}.NAME: (module, function of it, its input and its output).
# Statistics of LayerNorms, such as ln1.mean, are those of `branches.statistics`
RECORDED = {
    "resid.pre": ("ln_1", module_input),  # [B, T, d], the residual stream before the block
    "ln1.out": ("ln_1", module_output),  # [B, T, d], the input of `attention_pattern`
    "attn.out": ("ls_1", module_output),  # [B, T, d], what the attention adds to the residual stream
    "mlp.in": ("ln_2", module_output),  # [B, T, d], the input of the MLP
    "mlp.post": ("mlp.gelu", module_output),  # [B, T, N], post-GELU activations: what c_proj is given
    "mlp.sum": (SUM, module_output),  # [B, T, d], what neurons write together: mlp.out, before a Post2
    "mlp.out": ("ls_2", module_output),  # [B, T, d], what the MLP adds to the residual stream
}


def _change_output(change, module, inputs, output):
    return change(output)


def _change_pattern(change, attn, inputs, output):
    return attention_output(attn, change, inputs[0]), None


# What can be changed in every block, as blocks.{l}.NAME: (module, forward hook after its first argument)
CHANGED = {
    "attn.pattern": ("attn", _change_pattern),  # [B, H, T, T]
    "attn.out": ("ls_1", _change_output),
    "mlp.post": ("mlp.gelu", _change_output),
    "mlp.sum": (SUM, _change_output),
    "mlp.out": ("ls_2", _change_output),
}


class HookedViT:
    """A HookedViT runs an image tower, and records and changes its activations.

    visual: the tower, used as it is: no weights are copied and its fused attention stays in place.
    precision: of the forward pass: float32, tf32 (CUDA), bfloat16 or float16. Activations are recorded in
        float32.

    Attributes:
    L, H, N, d, D: sizes, in the letters of the paper. H heads are in a block, 0 in that of a ResNet.
    sizes: {letter: size} of N, D, T and e, the width of the heads through which neurons act.
    grid: rows and columns of patches.
    prefix: tokens before the patches.
    T: tokens at the trained resolution.
    blocks: the tower's blocks.
    pooling: the `Pooling` that says how the output is read.
    last: number of the last MLP with effects.
    last_attention: number of the last attention that the output reads.
    summands: contributors of the sum that the last LayerNorm normalises, for each of the sum before it.
    post_norm: whether every branch ends with a LayerNorm, and none begins with one.
    gated: whether activations are products of two numbers. A neuron and its weights may then change sign
        together, and the model is the same: an activation has no sign of its own.

    Raises UserError for a tower that the method does not cover.
    """

    mlp_weights = weights.mlp_weights
    head_weights = weights.head_weights
    output_weights = weights.output_weights
    norm_weights = weights.norm_weights
    inside_weights = weights.inside_weights
    passed = branches.passed
    token_statistics = branches.token_statistics
    row = branches.row
    has_inside = branches.has_inside
    inside_numbers = branches.inside_numbers

    def __init__(self, visual, precision="float32"):
        visual = in_open_clips_form(visual)
        self.visual = visual
        self.precision = precision
        self.blocks = visual.transformer.resblocks
        self.pooling = pooling_of(visual)
        first = self.blocks[0]
        self.L = len(self.blocks)
        self.N = first.mlp.c_proj.in_features
        self.d = first.mlp.c_proj.out_features
        self.post_norm = branches.is_norm(first.ls_2)
        self.gated = isinstance(first.mlp, Gated)
        self.D = visual.output_dim if visual.proj is None else visual.proj.shape[1]
        self.grid = visual.grid_size
        self.prefix = self.pooling.prefix
        self.T = self.grid[0] * self.grid[1] + self.prefix
        self.sizes = {"N": self.N, "D": self.D, "e": self.pooling.head_width, "T": self.T}
        self.last_attention = self.pooling.last_attention
        self.last = self.last_attention - 1
        self.H = first.attn.num_heads if hasattr(first, "attn") else 0
        self.summands = self.pooling.summands
        self._activations = self.pooling.activations()
        for l, block in enumerate(self.blocks):
            for name, module, compute in _parts(block, RECORDED):
                self._activations[f"blocks.{l}.{name}"] = (module, compute)
            for name, found in branches.statistics(block).items():
                self._activations[f"blocks.{l}.{name}"] = found

    @property
    def device(self):
        """The device is where the weights are."""
        return next(self.visual.parameters()).device

    @property
    def dtype(self):
        """The dtype is that of the weights."""
        return next(self.visual.parameters()).dtype

    @property
    def names(self):
        """The names are those of all activations that can be recorded."""
        return list(self._activations)

    def later(self, layer):
        """Return the numbers of the attentions through which the neurons of MLP `layer` act on the output."""
        return self.pooling.later(layer)

    def K(self, layer):
        """Return the number of heads through which the neurons of MLP `layer` act on the output."""
        return len(self.later(layer)) * self.pooling.heads

    def contributors(self, l):
        """Return the number of contributors, each neuron being one, of the sum that attention l reads."""
        return self.pooling.groups(l) * self.N

    def names_from(self, layer):
        """Return the names of the activations between layer `layer` and the output.

        They are attention rows and LayerNorm statistics. Call `read_rows` on what was recorded.
        """
        later = self.later(layer - 1)
        rows = [f"blocks.{l}.{self.pooling.row}" for l in later]
        statistics = branches.names_before(self, later)
        return [*rows, *statistics, "ln_post.mean", "ln_post.std", *self.pooling.extra]

    def read_rows(self, cache):
        """Add blocks.{l}.attn.row to a cache of `names_from`, where it could not be recorded."""
        self.pooling.read_rows(cache)

    def pool(self, x, cache=None):
        """Return what the output reads of the tokens, [B, d] of x [B, T, d]. cache: of `names_from`."""
        return self.pooling.read(x, cache)

    def token_weights(self, x):
        """Return uniform weights [T] of the tokens that the output reads: x [B, T, ...]."""
        return self.pooling.token_weights(x)

    def firing(self, p):
        """Return how much neurons fire, from activations p of any shape: of `gated` ones the size."""
        return p.abs() if self.gated else p

    def class_token_last(self):
        """Return a context in which the last MLP computes the class token alone, if nothing else is read.

        Its post-GELU activations are [B, 1, N] then.
        """
        return self.pooling.class_token_last()

    def __call__(self, images):
        """Return the representations [B, D], not normalised, of images [B, 3, side, side]."""
        with self._precision(images.device.type):
            output = self.visual(images)
        if isinstance(output, tuple):  # towers with output_tokens return the tokens, too
            output = output[0]
        return wide(output)

    @contextmanager
    def record(self, *patterns):
        """Record activations of the forward passes inside the `with`.

        patterns: names from `names`, or shell patterns of them (`record("blocks.*.mlp.post")`).

        Yields a dict, name -> tensor of the last pass. Hooks are removed on leaving, also after an exception.
        Raises KeyError for a pattern that fits no activation.
        """
        wanted = _fitting(patterns, self.names)
        cache = {}
        handles = []
        try:
            for name in wanted:
                module, compute = self._activations[name]
                keep = partial(_keep, cache, name, compute)
                if isinstance(module, torch.nn.MultiheadAttention | Attention):
                    handles.append(KeptQueries(module, keep))
                else:
                    handles.append(module.register_forward_hook(keep))
            yield cache
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def edit(self, changes):
        """Change activations of the forward passes inside the `with`: interventions on the running model.

        changes: {name: function}, with names blocks.{l}.NAME of CHANGED or shell patterns of them. A function
            gets the activation and returns the one that the model uses in its place. What is recorded inside
            the `with` comes after the change.

        Hooks are removed on leaving, also after an exception.
        Raises KeyError for a pattern that fits nothing.
        """
        hooks = {}
        for l, block in enumerate(self.blocks):
            for name, module, hook in _parts(block, CHANGED):
                hooks[f"blocks.{l}.{name}"] = (module, hook)
        handles = []
        try:
            for pattern, change in changes.items():
                for name in _fitting([pattern], hooks):
                    module, hook = hooks[name]
                    handles.append(module.register_forward_hook(partial(hook, change)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def names_of_sum(self, layer):
        """Return the names of an MLP's activations and of what `moved` needs, the activations first."""
        names = [f"blocks.{layer}.mlp.post", f"blocks.{layer + 1}.resid.pre"]
        return [*names, f"blocks.{layer}.mlp.sum"] if self.post_norm else names

    def moved(self, cache, layer, b, written):
        """Return the residual streams after block `layer` if its neurons write more, [n, T, d].

        cache: of `names_of_sum`.
        b: of which images of it, an index or [n].
        written: [n, T, d], what neurons write more, by their weights of `mlp_weights`.
        """
        z = cache[f"blocks.{layer + 1}.resid.pre"][b]
        if not self.post_norm:
            return z + written
        norm = self.blocks[layer].ls_2
        before = cache[f"blocks.{layer}.mlp.sum"][b]
        return z + norm(before + written) - norm(before)

    def mlp(self, layer, z):
        """Return what the MLP of a pre-norm block adds to z [B, T, d], the stream after its attention."""
        block = self.blocks[layer]
        with self._precision(z.device.type):
            return wide(block.ls_2(block.mlp(block.ln_2(z))))

    def after(self, layer, z):
        """Run only the blocks after `layer`: representations [B, D] from its residual stream z [B, T, d]."""
        with self._precision(z.device.type):
            for l in range(layer + 1, self.L):
                z = self.blocks[l](z) if l < self.L - 1 else self.pooling.last_block(z)
            return wide(output_of(self.visual, z))

    def after_shift(self, cache, layer, b, c, w):
        """Run the blocks after `layer` as `after` does, if its neurons write c w more: [n, D].

        cache: of `names_of_sum`.
        b: of which images of it, [n].
        c: a number for each token, [n, T].
        w: the direction in which neurons write, by their weights of `mlp_weights`, [n, d].
        """
        z = self.moved(cache, layer, b, c[..., None] * w[:, None])
        # the last block is cheap already
        if layer + 2 >= self.L or self.post_norm or isinstance(self.blocks[layer + 1].attn, Attention):
            return self.after(layer, z)
        images, place = b.unique(return_inverse=True)
        block = self.blocks[layer + 1]
        with self._precision(z.device.type):
            attend = Shifted(block, cache[f"blocks.{layer + 1}.resid.pre"][images])
            z = z + block.ls_1(attend(z, place, c, w))
            z = z + block.ls_2(block.mlp(block.ln_2(z)))
        return self.after(layer + 1, z)

    @torch.inference_mode()
    def left_out(self, images):
        """Return the share of the representations that the MLP after a pooling attention makes, [B].

        The share is |MLP(LN(o))| / |rep|, with o the output of the attention; no effect covers it. None for a
        tower without such an MLP.
        """
        if not self.pooling.leaves_out_mlp:
            return None
        with self.record("pool.out") as cache:
            representation = self(images)
        through_attention = projected(self.visual, cache["pool.out"])
        return (representation - through_attention).norm(dim=-1) / representation.norm(dim=-1)

    @contextmanager
    def _precision(self, device):
        dtype = AUTOCAST.get(self.precision)
        with tf32(self.precision == "tf32"), torch.autocast(device, dtype, enabled=dtype is not None):
            yield


def left_out_note(vit, images):
    """Return the line for the user about the `left_out` of a batch; None where nothing is left out.

    images: [B, 3, side, side].
    """
    share = vit.left_out(images)
    if share is None:
        return None
    what = "the MLP after the pooling attention, which effects leave out, makes"
    percent = f"{100 * float(share.mean()):.0f} %"
    return f"note: {what} {percent} of the representation (first {len(images)} images)"


def _parts(block, table):
    """Yield (name, module, function) for what a block has of RECORDED or CHANGED."""
    last = "mlp" if branches.is_norm(block.ls_2) else "ls_2"
    for name, (part, function) in table.items():
        path = last if part == SUM else part
        if hasattr(block, path.split(".")[0]):
            yield name, block.get_submodule(path), function


def _fitting(patterns, names):
    """Return the names that fit some patterns. Raises KeyError for a pattern that fits none."""
    fitting = {}
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise KeyError(f"no activation is called {pattern!r}; there are {', '.join(names)}")
        fitting |= dict.fromkeys(found)
    return list(fitting)


def _keep(cache, name, compute, module, inputs, output):
    """Store an activation, computed in float32, in a cache: a forward hook."""
    with tf32(False), torch.autocast(output.device.type, enabled=False):
        cache[name] = compute(module, inputs[0].detach(), output.detach())


@contextmanager
def tf32(allowed):
    """Set whether CUDA may compute float32 products in TF32, inside the `with`."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, mode in zip(backends, before, strict=True):
            backend.allow_tf32 = mode
