"""Second-order effects in float64 from the modules of a timm tower itself: the definition, once more.

One image runs through the tower. Every LayerNorm then becomes the affine map that it was, and every attention
has the probabilities that it had; both are seen in what the modules hand on, and no weight is read here.
Each affine map of a path gives its constant in equal shares to the contributors of the sum that it is applied
to.
"""

from contextlib import contextmanager

import torch
from timm.models.eva import EvaBlockPostNorm
from torch import nn

LARGE = 2.0**40  # of what is small beside the constant of a map, nothing is lost so


def share(f, x, part):
    """An affine map's linear part of x, and a part of its constant."""
    constant = f(torch.zeros_like(x))
    return (f(LARGE * x) - constant) / LARGE + part * constant


def last_layer(mlp):
    return mlp.w2 if hasattr(mlp, "w2") else mlp.fc2


@contextmanager
def attending(function):
    """Every attention hands (queries, keys, values, bias) to a function, and uses what it returns."""
    before = nn.functional.scaled_dot_product_attention

    def instead(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        assert dropout_p == 0 and not is_causal
        return function(q, k, v, attn_mask)

    nn.functional.scaled_dot_product_attention = instead
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = before


class Frozen:
    """One image's run through a timm tower in float64, held fixed.

    model: TimmModel in float64. image: [3, side, side].

    z: residual streams before each block and at the end, [T, d]. p: activations [T, N] of each MLP. rep: [D].
    """

    def __init__(self, model, image):
        self.model = model
        self.trunk = trunk = model.trunk
        self.statistics, self.A, self.z, self.p = {}, [], [], []
        self.added = []  # of attention and MLP of every block, [T, d]
        handles = []
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                handles.append(module.register_forward_pre_hook(self._keep_statistics))
        for block in trunk.blocks:
            handles.append(block.register_forward_pre_hook(lambda _, given: self.z.append(given[0][0])))
            last = last_layer(block.mlp)
            handles.append(last.register_forward_pre_hook(lambda _, given: self.p.append(given[0][0])))
        last = trunk.blocks[-1]
        handles.append(last.register_forward_hook(lambda _, given, out: self.z.append(out[0])))
        with attending(self._attend):
            self.rep = model(image[None])[0]
        for handle in handles:
            handle.remove()
        self.L, self.N = len(trunk.blocks), self.p[0].shape[1]
        self.post = isinstance(trunk.blocks[0], EvaBlockPostNorm)

    def _keep_statistics(self, norm, given):
        x = given[0][0]
        mu = x.mean(dim=-1, keepdim=True)
        self.statistics[norm] = mu, ((x - mu).square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()

    def _attend(self, q, k, v, bias):
        scores = q @ k.mT / q.shape[-1] ** 0.5
        self.A.append(torch.softmax(scores if bias is None else scores + bias, dim=-1))
        return self.A[-1] @ v

    def norm(self, module, tokens=slice(None)):
        """A LayerNorm as an affine map of x [..., T, d]; other modules as they are."""
        if not isinstance(module, nn.LayerNorm):
            return module
        mu, sigma = (part[tokens] for part in self.statistics[module])
        return lambda x: (x - mu) / sigma * module.weight + module.bias

    def written(self, m, p, count):
        """What MLP m adds to the stream for activations p [..., T, N] of `count` of its neurons."""
        block = self.trunk.blocks[m]
        x = share(last_layer(block.mlp), p, count / self.N)
        return share(self.norm(block.norm2), x, count / self.N) if self.post else scaled(block, 2, x)

    def through(self, l, x, count):
        """What attention l adds to the stream for a part x [..., T, d] of what it reads.

        count: how many of the (1 + 2 l) N contributors the part is.
        """
        block, attn = self.trunk.blocks[l], self.trunk.blocks[l].attn
        part = count / ((1 + 2 * l) * self.N)
        if not self.post:
            x = share(self.norm(block.norm1), x, part)
        flat = x.reshape(-1, *x.shape[-2:])
        rope = self.trunk.rope.get_embed() if getattr(self.trunk, "rope", None) is not None else None
        mixed = self.A[l] @ share(lambda x: values(attn, x, rope), flat, part)
        mixed = mixed.transpose(1, 2).flatten(2).reshape(x.shape)
        inner = self.norm(getattr(attn, "norm", nn.Identity()))
        x = share(attn.proj, share(inner, mixed, part), part)
        return share(self.norm(block.norm1), x, part) if self.post else scaled(block, 1, x)

    def to_output(self, x, part):
        """What the output makes of a part x [..., T, d] of the last stream."""
        trunk = self.trunk
        x = share(self.norm(trunk.norm), x, part)
        first = trunk.num_prefix_tokens
        x = x[..., 0, :] if trunk.global_pool == "token" else x[..., first:, :].mean(dim=-2)
        x = share(self.norm(trunk.fc_norm, 0), x, part)
        return share(nn.Sequential(trunk.head, *self.model.head), x, part)

    def through_pool(self, x, count):
        """What the output takes through the pooling attention of a part x [..., T, d] of the last stream."""
        trunk, pool = self.trunk, self.trunk.attn_pool
        part = count / ((1 + 2 * self.L) * self.N)
        x = share(self.norm(trunk.norm), x, part)
        mixed = self.A[self.L] @ share(lambda x: values(pool, x), x.reshape(-1, *x.shape[-2:]), part)
        o = share(pool.proj, mixed.transpose(1, 2).flatten(2)[:, 0], part)
        return share(nn.Sequential(trunk.head, *self.model.head), o, part).reshape(*x.shape[:-2], -1)

    def left_out(self):
        """What the MLP after the pooling attention adds to the representation, [D]."""
        return self.rep - self.through_pool(self.z[-1], (1 + 2 * self.L) * self.N)

    def effects(self, m, p, count=1):
        """100 / |rep| times what MLP m adds to the representation through attentions, for activations p."""
        x = self.written(m, p, count)
        scale = 100 / self.rep.norm()
        if self.trunk.global_pool == "map":
            return scale * self.through_pool(x, count)
        total = 0
        for l in range(m + 1, self.L):
            part = count / ((1 + 2 * l) * (1 + 2 * self.L) * self.N)
            total = total + self.to_output(self.through(l, x, count), part)
        return scale * total

    def of_neurons(self, m, neurons):
        """phi [n, D] of some neurons of MLP m, and kappa [D]."""
        alone = torch.zeros(len(neurons), *self.p[m].shape, dtype=torch.float64)
        for place, n in enumerate(neurons):
            alone[place, :, n] = self.p[m][:, n]
        return self.effects(m, alone), self.effects(m, torch.zeros_like(self.p[m]))

    def summands(self):
        """What the stream is the sum of, [1 + 2 L, T, d]: the first one, then each attention and each MLP."""
        found = [self.z[0]]
        for l in range(self.L):
            added = self.through(l, self.z[l], (1 + 2 * l) * self.N)
            found += [added, self.z[l + 1] - self.z[l] - added]
        return found


def scaled(block, branch, x):
    """A branch's output after the layer scale."""
    gamma = getattr(block, f"gamma_{branch}", None)
    if gamma is not None:
        return gamma * x
    return getattr(block, f"ls{branch}", nn.Identity())(x)


def values(attn, x, rope=None):
    """The values [B, H, T, e] that an attention makes of x [B, T, d], by its own forward."""
    seen = []

    def keep(q, k, v, bias):
        seen.append(v)
        return torch.zeros_like(q)

    with attending(keep):
        attn(x, rope=rope) if rope is not None else attn(x)
    return seen[0]
