"""Discover concepts: the words that the active neurons of an image stand for (appendix A.5 of the paper).

A neuron is active on an image if its centred norm there is larger than its k-th largest over the data set. A
word's score is the sum of coefficient * norm over the active neurons whose descriptions have it.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Concepts:
    """`Concepts` are found in one image.

    neurons: the active neurons, by falling norm.
    norms: their norms.
    words: [(word, score), ...] by falling score.
    """

    neurons: list
    norms: list
    words: list


def word_scores(descriptions, weights):
    """Add up coefficient * weight for every word of some neurons' descriptions.

    descriptions: list over neurons, as `load_descriptions` returns it.
    weights: {neuron: weight}.

    Returns [(word, score), ...] by falling score, then by word.
    """
    scores = defaultdict(float)
    for neuron, weight in weights.items():
        for _, coefficient, text in descriptions[neuron]:
            scores[text] += coefficient * weight
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


@torch.inference_mode()
def concepts_of_images(phi, centred_norms, thresholds, descriptions):
    """Return the `Concepts` of each image of a batch.

    phi: `SecondOrder` of the images.
    centred_norms: `CentredNorms` about the mean effects of the data set.
    thresholds: [N], the smallest of every neuron's k largest norms (the first column of norm.npy).
    descriptions: list over neurons.
    """
    norms = centred_norms(phi)  # [B, N]
    active = norms > thresholds
    found = []
    for row, chosen in zip(norms.cpu().numpy(), active.cpu().numpy(), strict=True):
        neurons = np.flatnonzero(chosen)
        neurons = neurons[np.argsort(-row[neurons], kind="stable")]
        weights = {int(n): float(row[n]) for n in neurons}
        found.append(Concepts(list(weights), list(weights.values()), word_scores(descriptions, weights)))
    return found
