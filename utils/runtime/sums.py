"""Add up numbers in the state of a `Pass`: neither the order of batches nor the number of processes matters.

Sums are int64 multiples of 1/FIXED, or of another step: the addition of integers is exact.
"""

import numpy as np
import torch

FIXED = 2.0**32


def fixed(values, scale=FIXED):
    """Return the sum over the first axis as int64 multiples of 1/scale, an array."""
    return values.sum(dim=0).cpu().double().mul_(scale).round_().to(torch.int64).numpy()


def mean_of(parts, count, scale=FIXED):
    """Return the mean of `count` things from the sums of all processes, float32."""
    return (sum(parts) / (count * scale)).astype(np.float32)


class Sums:
    """Sums are those of C and kappa over images, in the state of a `Pass`.

    work: `Pass`.
    coefficient: as in `second_order`.
    images: how many there are.
    name: before the names in the state.
    """

    def __init__(self, work, coefficient, images, name=""):
        self.work = work
        self.scale = FIXED / coefficient
        self.images = images
        self.name = name

    def add(self, phi):
        """Add the effects of a batch, a `SecondOrder`."""
        for name, values in (("C", phi.C), ("kappa", phi.kappa)):
            self.work.state[f"{self.name}{name}{phi.directions.layer}"] += fixed(values, self.scale)

    def means(self, layers):
        """Return {layer: (C [K, N], kappa [D])}, means over all images, once all processes are here."""
        names = {layer: [f"{self.name}{part}{layer}" for part in ("C", "kappa")] for layer in layers}
        gathered = self.work.gather([name for pair in names.values() for name in pair])
        means = {name: mean_of(parts, self.images, self.scale) for name, parts in gathered.items()}
        return {layer: tuple(torch.from_numpy(means[name]) for name in pair) for layer, pair in names.items()}
