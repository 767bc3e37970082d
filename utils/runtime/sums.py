"""Add up numbers in the state of a `Pass`: neither the order of batches nor the number of processes matters.

Sums are int64 multiples of 1/FIXED, or of another step: the addition of integers is exact.
"""

import numpy as np
import torch

FIXED = 2.0**32
SAMPLE = 128  # images whose effects a `Look` keeps, at most
AT_ONCE = 32  # of them, that are read at a time


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
    names: before the names in the state. The last are added to, and means are of all.
    """

    def __init__(self, work, coefficient, images, *names):
        self.work = work
        self.coefficient = coefficient
        self.scale = FIXED / coefficient
        self.images = images
        self.names = names

    def add(self, phi):
        """Add the effects of a batch, a `SecondOrder`."""
        for name, values in (("C", phi.C.mT), ("kappa", phi.kappa)):
            self.work.state[f"{self.names[-1]}{name}{phi.directions.layer}"] += fixed(values, self.scale)

    def means(self, layers):
        """Return {layer: (C [K, N], kappa [D])}, means over all images, once all processes are here."""
        parts = [f"{part}{layer}" for layer in layers for part in ("C", "kappa")]
        gathered = self.work.gather([f"{name}{part}" for name in self.names for part in parts])
        means = {}
        for part in parts:
            sums = [each for name in self.names for each in gathered[f"{name}{part}"]]
            means[part] = torch.from_numpy(mean_of(sums, self.images, self.scale))
        return {layer: (means[f"C{layer}"].T, means[f"kappa{layer}"]) for layer in layers}


class Look(Sums):
    """A Look is the sums of a few images, and keeps the coefficients of some of them, evenly spread.

    They are where candidates will be later: in the scratch of a layer [N, c, K], as [c or SAMPLE, N, K].
    """

    def add(self, phi, rows):
        """Add the effects of a batch, a `SecondOrder` of some images (a slice)."""
        super().add(phi)
        scratch = self.work.scratch[f"top{phi.directions.layer}"]
        sample = _sample_of(scratch.array)
        step = rows.step or 1
        every = -(-self.images // len(sample))
        for C, image in zip(phi.C, range(rows.start, rows.stop, step), strict=True):
            place, rest = divmod(image // step, every)
            if rest == 0:
                sample[place] = C.mT.cpu()
        scratch.release()

    def sample(self, layer):
        """Yield blocks [images, K, N] of what was kept by all processes, once all are here."""
        for start in range(0, SAMPLE, AT_ONCE):
            for every in self.work.gather_scratch(f"top{layer}"):  # mapped again, as pages once read count
                block = _sample_of(every)[start : start + AT_ONCE]
                own = block[block.any(axis=(1, 2))]  # the others are of other processes
                if len(own):
                    yield torch.from_numpy(own).mT


def _sample_of(candidates):
    N, c, K = candidates.shape
    return candidates.reshape(c, N, K)[:SAMPLE]
