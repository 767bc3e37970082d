"""Measure indirect effects: the change of the representation when neurons act as on average (section 3.2).

A neuron's activations are replaced by their mean for each token, over a data set, and the model runs on: no
attention and no LayerNorm is held fixed. Letters as in `utils.prs`.
"""

import torch

from utils.prs import COEFFICIENT

TOGETHER = 64  # changed images in one forward pass of the later blocks


def replaced(mean):
    """Return a change for `HookedViT.edit`: every image gets the mean activations [T, N]."""
    return lambda p: mean[: p.shape[1]].to(p.dtype).expand_as(p)


class IndirectEffects:
    """An `IndirectEffects` measures the indirect effects of single neurons of one layer.

    Only the blocks after the layer run again, once for each image and neuron.

    vit: HookedViT.
    layer: MLP layer.
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
        """Return the loss of the representation, in units of second-order effects, [B, n, D].

        cache: the recorded activations.
        representation: [B, D], the model's own, not scaled.
        coefficient: the norm that a representation is scaled to.
        """
        p, z = (cache[name] for name in self.activations)  # [B, T, N], [B, T, d]
        scale = coefficient / representation.norm(dim=-1)
        effects = []
        for b in range(len(z)):
            change = self.mean - p[b][:, self.neurons]  # [T, n]
            lost = []
            for part in torch.arange(len(self.neurons)).split(TOGETHER):
                written = change.T[part, :, None] * self.w[part, None]  # [n, T, d]
                lost.append(representation[b] - self.vit.after(self.layer, z[b] + written))
            effects.append(scale[b] * torch.cat(lost))
        return torch.stack(effects)
