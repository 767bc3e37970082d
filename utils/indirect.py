"""Indirect effects: what the representation loses when neurons act as they do on average (section 3.2 of the
paper).

A neuron's activations are replaced by their mean for each token, over a data set, and the model runs on: no
attention and no LayerNorm is held fixed. Letters as in `utils.prs`.
"""

import torch

from utils.prs import COEFFICIENT

TOGETHER = 64  # changed images in one forward pass of the later blocks


def replaced(mean):
    """The change that puts the mean activations [T, N] in place of those of every image, for
    `HookedViT.edit`.
    """
    return lambda p: mean[: p.shape[1]].to(p.dtype).expand_as(p)


class IndirectEffects:
    """Indirect effects of single neurons of one layer. Only the blocks after it run again, once for each
    image and neuron.

    vit, layer: HookedViT; MLP layer.
    mean: [T, N], mean activations over a data set.
    neurons: list of the neurons.
    """

    def __init__(self, vit, layer, mean, neurons):
        self.vit, self.layer, self.neurons = vit, layer, list(neurons)
        self.mean = mean[:, self.neurons]  # [T, n]
        self.w = vit.mlp_weights(layer)[0][self.neurons].to(mean)  # [n, d]
        self.activations = [f"blocks.{layer}.mlp.post", f"blocks.{layer + 1}.resid.pre"]

    @torch.inference_mode()
    def __call__(self, cache, representation, coefficient=COEFFICIENT):
        """What the representation loses, in units of second-order effects: [B, n, D].

        cache: what was recorded. representation: [B, D], as the model gives it.
        """
        p, z = (cache[name] for name in self.activations)  # [B, T, N], [B, T, d]
        scale, found = coefficient / representation.norm(dim=-1), []
        for b in range(len(z)):
            lost = []
            for part in torch.arange(len(self.neurons)).split(TOGETHER):
                change = (self.mean[:, part] - p[b][:, self.neurons][:, part]).T[..., None] * self.w[part][
                    :, None
                ]  # [n, T, d]
                lost.append(representation[b] - self.vit.after(self.layer, z[b] + change))
            found.append(scale[b] * torch.cat(lost))
        return torch.stack(found)
