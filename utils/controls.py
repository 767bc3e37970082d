"""Control descriptions by noise: random directions in place of texts, and units that nobody trained.

Beyond the paper. A sparse signed sum of texts is a regression, and any dictionary of that size does well. So
a description counts for what its grade has over that of a control: a dictionary of as many random directions
with the mean and covariance of the text vectors, pursued, fitted and graded as the texts are. Rotated units,
rows of a random orthogonal matrix in place of neurons, are the other null. Letters as in `utils.prs`; C
control dictionaries, m texts of a description.
"""

from typing import NamedTuple

import numpy as np
import torch

from utils.prs import SecondOrder

CONTROLS = 5  # dictionaries
DEVIATIONS = 2  # that a grade must be above the mean of its controls
CHANCE = 0.08  # share of neurons up to which a layer is no better than noise; controls come to 0.03 to 0.05
ROTATED = 512  # units of a layer


def control_dictionary(vectors, seed):
    """Draw a control dictionary, float32 [distinct texts, F], on the CPU.

    Its unit vectors are as many as the text set has different ones, drawn from a normal distribution with the
    mean and covariance of these. Nothing but the text vectors and the seed goes in.

    vectors: of the texts, [T, F].
    seed: 0, 1, ...
    """
    wide = torch.nn.functional.normalize(vectors.detach().cpu().double(), dim=1).numpy()
    wide = np.unique(wide, axis=0)
    mean = wide.mean(axis=0)
    squares, V = np.linalg.eigh(np.cov(wide.T, bias=True).reshape(len(mean), len(mean)))
    root = V * np.sqrt(np.maximum(squares, 0)) @ V.T  # the symmetric root: the same on every machine
    drawn = mean + np.random.default_rng(seed).standard_normal(wide.shape) @ root
    return torch.nn.functional.normalize(torch.from_numpy(drawn), dim=1).float()


def lengths_of(components):
    """Return the numbers of texts that are graded: 1, 2, 4, ... and all of a description."""
    return sorted({2**i for i in range(components.bit_length())} | {components})


class Rotation:
    """A Rotation is a number of units of a random orthogonal basis of a layer's neurons.

    A unit u acts at token i with sum_n R[u, n] p[i, n] and writes sum_n R[u, n] w_n, so that all N of them
    would write what the neurons write. The rows of R are orthonormal, drawn by the layer's number.

    neurons: `Directions` of the layer's neurons.
    count: how many units.

    Attributes: R [U, N], directions (`Directions` of the units).
    """

    def __init__(self, neurons, count):
        N = neurons.values.shape[1]
        drawn = np.random.default_rng(neurons.layer).standard_normal((N, min(count, N)))
        Q, triangle = np.linalg.qr(drawn)
        rows = (Q * np.sign(np.diag(triangle))).T  # so that the machine does not choose the signs
        self.R = torch.from_numpy(rows).to(neurons.values)
        values = torch.einsum("un,kne->kue", self.R, neurons.values)
        self.directions = neurons._replace(values=values)

    def __call__(self, phi):
        """Return the `SecondOrder` of the units. phi: that of the neurons."""
        return SecondOrder(phi.C @ self.R.T, phi.kappa, self.directions)


class Compared(NamedTuple):
    """Compared are the grades of a layer's descriptions by number of texts, beside those of the controls."""

    measure: str  # "pearson", "auprc", "share" or "deletion"
    lengths: list  # of m
    texts: np.ndarray  # [N, lengths]
    controls: np.ndarray  # [C, N, lengths]

    def only(self, kept):
        """Return the grades of some neurons. kept: bool [N]."""
        return self._replace(texts=self.texts[kept], controls=self.controls[:, kept])

    def mean(self):
        """Return the mean grade over neurons at every length, of the texts and of the controls."""
        return self.texts.mean(axis=0), self.controls.mean(axis=(0, 1))

    def skill(self):
        """Return the share of what noise leaves open that the texts explain, at every length; 0 is noise.

        (mean r^2 - mean r_control^2) / (1 - mean r_control^2), r held-out correlations; a share is a square.
        """
        texts, controls = self.texts.astype(np.float64), self.controls.astype(np.float64)
        if self.measure in ("pearson", "deletion"):
            texts, controls = texts**2, controls**2
        noise = controls.mean(axis=(0, 1))
        return (texts.mean(axis=0) - noise) / np.maximum(1 - noise, 1e-30)

    def better(self):
        """Return whether every description is better than noise, bool [N, lengths]."""
        return above(self.texts, self.controls)

    def by_chance(self):
        """Return the share of neurons that pass at every length with a control in the texts' place."""
        others = range(len(self.controls))
        passing = [above(self.controls[c], np.delete(self.controls, c, axis=0)) for c in others]
        return np.mean(passing, axis=(0, 1))

    def over_noise(self):
        """Return which lengths have more neurons better than noise than chance lets pass, bool [lengths]."""
        return self.better().mean(axis=0) > CHANCE

    def justified(self):
        """Return the place of the length of largest skill; None where the layer is no better than noise."""
        skill = np.where(self.over_noise(), self.skill(), -np.inf)
        place = int(skill.argmax())
        return place if skill[place] > 0 else None


def above(grades, controls):
    """Return whether grades are DEVIATIONS above the mean of their controls, bool [N, lengths].

    The deviation is that of the controls about their own neuron's mean, pooled over the layer's neurons.

    grades: [N, lengths].
    controls: [C, N, lengths], two of them at least.
    """
    wide = controls.astype(np.float64)
    deviation = np.sqrt(wide.var(axis=0, ddof=1).mean(axis=0))  # [lengths]
    return grades > wide.mean(axis=0) + DEVIATIONS * deviation
