"""Hold a dictionary of units that somebody has trained: a sparse autoencoder, a transcoder or directions.

    f = activation((norm(x) - b_in) W_enc + b_enc)        x^ = denorm(f W_dec + b_dec)

x is what a site of a tower adds to the residual stream (or, for a transcoder, what an MLP reads), and x^ what
the units rebuild of the site. `utils.model.dictionary_files` reads the formats of several libraries.
Letters: U units, d width of the tower, d_in width of what is read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.runtime.errors import UserError
from utils.runtime.records import digest_of_parts

SITES = ("mlp.out", "attn.out", "resid.post")  # what a unit may write: of block m
READS = ("same", "mlp.in")  # what its activation may be of
TOKENS = ("all", "class", "patches")  # where it may act
ACTIVATIONS = ("relu", "gelu", "quickgelu", "topk", "signed_topk", "jumprelu", "gated", "identity")
NORMS = ("none", "layer_norm", "constant_norm_rescale")
EPSILON = 1e-5  # of layer_norm, added to the deviation
TOGETHER = 1024  # units that are encoded together: their weights stay in the cache, which is twice as fast


@dataclass(eq=False)
class Dictionary:
    """A Dictionary is U units with an encoder, as a file has them.

    encoder [U, d_in], encoder_bias [U]. decoder [U, d], decoder_bias [d].
    site, layer: what the units write: SITES of block `layer`. None where the file does not say.
    reads: of READS.
    activation: of ACTIVATIONS. A batch top-k counts as jumprelu, by its threshold.
    k: units that act on a token, for top-k.
    threshold: [U] or [], for jumprelu.
    input_bias: b_in, [d_in]; None for 0.
    gate: of a gated one, b_gate, r_mag and b_mag, [U] each; the encoder's bias is 0 then.
    norm: of NORMS, what is done to x; it is undone in x^.
    tokens: of TOKENS.
    fingerprint: of the weights of the model that it was trained on; "" where the file does not say.
    rebuilds: whether the units are meant to add up to the site. Plain directions are not.
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    site: str | None = None
    layer: int | None = None
    reads: str = "same"
    activation: str = "relu"
    k: int | None = None
    threshold: Tensor | None = None
    input_bias: Tensor | None = None
    gate: tuple | None = None
    norm: str = "none"
    tokens: str = "all"
    fingerprint: str = ""
    rebuilds: bool = True

    def tensors(self):
        """List the tensors that are there."""
        gate = self.gate or ()
        found = (self.encoder, self.encoder_bias, self.decoder, self.decoder_bias, self.threshold)
        return [tensor for tensor in (*found, self.input_bias, *gate) if tensor is not None]

    def settings(self):
        """Return everything but the tensors, {name: value}."""
        names = ("site", "layer", "reads", "activation", "k", "norm", "tokens", "rebuilds")
        return {name: getattr(self, name) for name in names}

    def digest(self):
        """Return sixteen hex digits of the content."""
        parts = [tensor.float().contiguous().numpy() for tensor in self.tensors()]
        return digest_of_parts([*parts, repr(sorted(self.settings().items())).encode()])

    def to(self, device, dtype=torch.float32):
        """Move the tensors to a device; return the dictionary."""
        names = ("encoder", "encoder_bias", "decoder", "decoder_bias", "threshold", "input_bias")
        for name in names:
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).to(device, dtype))
        self.gate = self.gate and tuple(part.to(device, dtype) for part in self.gate)
        return self

    def check(self, path):
        """Raise UserError, which begins with the path, for weights that do not fit together."""
        for name, matrix in (("encoder", self.encoder), ("decoder", self.decoder)):
            if matrix.ndim != 2 or not matrix.numel():
                has = " x ".join(map(str, matrix.shape)) or "a number"
                what = f"{path}: the {name} is {has}, and a matrix of units x width is needed"
                raise UserError(f"{what}; give the weights as the library saved them")
        U, d_in = self.encoder.shape
        shapes = {
            "encoder bias": (self.encoder_bias, (U,)),
            "decoder": (self.decoder, (U, self.decoder.shape[-1])),
            "decoder bias": (self.decoder_bias, (self.decoder.shape[-1],)),
            "input bias": (self.input_bias, (d_in,)),
            **{f"gate {i}": (part, (U,)) for i, part in enumerate(self.gate or ())},
        }
        for name, (tensor, shape) in shapes.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                has = " x ".join(map(str, tensor.shape)) or "a number"
                needed = " x ".join(map(str, shape))
                what = f"{path}: the {name} is {has}, and {needed} fits the encoder, {U} x {d_in}"
                raise UserError(f"{what}; give the weights as the library saved them")
        if self.threshold is not None and self.threshold.numel() not in (1, U):
            raise UserError(f"{path} has {self.threshold.numel()} thresholds for {U} units; save it again")
        for tensor in self.tensors():
            if not tensor.isfinite().all():
                raise UserError(f"{path} holds NaN or infinity; use another checkpoint")
        empty = int((self.decoder.norm(dim=1) == 0).sum())
        if empty:
            what = f"{path} has {empty} of {U} units whose decoder vectors are 0, and these write nothing"
            raise UserError(f"{what}; take them out of the file")
        if self.activation in ("topk", "signed_topk") and not 0 < (self.k or 0) <= U:
            raise UserError(f"{path} is a top-k dictionary with k {self.k} of {U} units; give its k")

    def factor(self, x):
        """Return what the norm divides x [..., d_in] by, and x^ is multiplied with, [..., 1]; None for 1."""
        if self.norm == "layer_norm":
            return x.std(dim=-1, keepdim=True)
        if self.norm == "constant_norm_rescale":
            return x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return None

    def encode(self, x):
        """Return the activations f, [..., U] of x [..., d_in], as the library that saved them computes it."""
        if self.norm == "layer_norm":
            x = x - x.mean(dim=-1, keepdim=True)
            x = x / (x.std(dim=-1, keepdim=True) + EPSILON)
        elif self.norm == "constant_norm_rescale":
            x = x / self.factor(x)
        if self.input_bias is not None:
            x = x - self.input_bias
        before = x.new_empty(*x.shape[:-1], len(self.encoder))
        for own, weights in zip(before.split(TOGETHER, -1), self.encoder.split(TOGETHER), strict=True):
            own.copy_(torch.nn.functional.linear(x, weights))
        if self.gate is not None:
            gate, r_mag, b_mag = self.gate
            return torch.relu(before * r_mag.exp() + b_mag) * (before + gate > 0)
        return self.activate(before.add_(self.encoder_bias))

    def activate(self, before):
        """Return the activations of what the encoder computes, [..., U]; it may change that in place."""
        if self.activation == "relu":
            return before.relu_()
        if self.activation == "gelu":
            return torch.nn.functional.gelu(before)
        if self.activation == "quickgelu":
            return before * torch.sigmoid(1.702 * before)
        if self.activation == "jumprelu":
            return before.mul_(before > self.threshold).relu_()
        if self.activation == "identity":
            return before
        values, places = before.topk(self.k, dim=-1, sorted=False)
        if self.activation == "topk":
            values = values.relu_()
        return before.zero_().scatter_(-1, places, values)

    def decode(self, f):
        """Return what the units and the decoder's bias make, before the norm is undone: f [..., U]."""
        return f @ self.decoder + self.decoder_bias

    def rebuild(self, x):
        """Return x^, [..., d] of x [..., d_in]."""
        found = self.decode(self.encode(x))
        factor = self.factor(x)
        if factor is not None:
            found = found * factor
        return found + x.mean(dim=-1, keepdim=True) if self.norm == "layer_norm" else found


def random_dictionary(dictionary, k=32, seed=0):
    """Return a dictionary of as many random unit vectors, the control of a trained one.

    Each reads the direction that it writes; k of them act on a token, as many as in a top-k original.
    """
    U, d = dictionary.decoder.shape
    drawn = torch.randn(U, d, generator=torch.Generator().manual_seed(seed))
    drawn = torch.nn.functional.normalize(drawn, dim=1)
    bias = dictionary.decoder_bias
    found = Dictionary(drawn, torch.zeros(U), drawn, bias, dictionary.site, dictionary.layer)
    found.activation = "topk"
    found.k = min(dictionary.k or k, U)
    found.input_bias = bias
    found.tokens = dictionary.tokens
    found.rebuilds = False
    return found
