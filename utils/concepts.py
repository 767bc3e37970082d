"""Discover concepts, the texts that an image stands for: by active neurons, or by its representation alone.

A neuron is active on an image if its centred norm there is larger than its k-th largest over the data set.
The forms of an image's concepts are
    fires_on   texts that its active neurons fire on: coefficient * standardised effect, summed over them
    writes     texts that its active neurons write: coefficient * norm, summed over them (appendix A.5)
    nearest    texts nearest to its representation: no neurons at all, the baseline
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from utils.descriptions import load_descriptions

FORMS = {
    "fires_on": "texts that active neurons fire on",
    "writes": "texts that active neurons write",
    "nearest": "texts nearest to the representation, no neurons",
}
AT_ONCE = 256  # neurons whose effects on all images are worked on together


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


# scores of words


class Words:
    """`Words` are some neurons' descriptions as arrays, from which scores of words are added up.

    descriptions: list over neurons, as `load_descriptions` returns it.
    """

    def __init__(self, descriptions):
        self.words = sorted({text for entries in descriptions for *_, text in entries})
        place = {word: i for i, word in enumerate(self.words)}
        self.first = np.cumsum([0, *map(len, descriptions)])  # entry of every neuron
        self.places = np.array([place[text] for entries in descriptions for *_, text in entries], np.int64)
        self.coefficients = np.array([c for entries in descriptions for _, c, _ in entries], np.float64)

    def scores(self, neurons, weights, count=None):
        """Add up coefficient * weight for every word of some neurons.

        neurons: int [n]. weights: [n].
        count: how many words, at most; None for all.

        Returns [(word, score), ...] by falling score, then by word.
        """
        counts = self.first[neurons + 1] - self.first[neurons]
        before = np.cumsum(counts) - counts
        entries = np.arange(counts.sum()) + np.repeat(self.first[neurons] - before, counts)
        places = self.places[entries]
        scored = self.coefficients[entries] * np.repeat(weights.astype(np.float64), counts)
        total = np.bincount(places, scored, len(self.words))
        there = np.flatnonzero(np.bincount(places, minlength=len(self.words)))
        if count is not None and count < len(there):  # without a sort of all
            there = there[total[there] >= np.partition(total[there], -count)[-count]]
        chosen = there[np.argsort(-total[there], kind="stable")[:count]]
        return [(self.words[i], score) for i, score in zip(chosen, total[chosen].tolist(), strict=True)]


def word_scores(descriptions, weights):
    """Add up coefficient * weight for every word of some neurons' descriptions.

    descriptions: list over neurons, as `load_descriptions` returns it.
    weights: {neuron: weight}.

    Returns [(word, score), ...] by falling score, then by word.
    """
    neurons, of_neurons = np.array(list(weights), np.int64), np.array(list(weights.values()), np.float64)
    return Words(descriptions).scores(neurons, of_neurons)


def sums(scored):
    """Add up the scores of every word.

    scored: (word, score) in any order, such as the words of an image's `Concepts` in several layers.

    Returns [(word, score), ...] by falling score, then by word.
    """
    total = defaultdict(float)
    for word, score in scored:
        total[word] += score
    return _by_score(total)


def _by_score(scores):
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


# what neurons fire on


class FiresOn(NamedTuple):
    """`FiresOn` holds the texts that a layer's neurons fire on, and how strong their effects usually are."""

    descriptions: list  # over neurons, as `load_descriptions` returns it
    mean: torch.Tensor  # [N]        of the effects along the components, over the training images
    deviation: torch.Tensor  # [N]   of the same


def load_fires_on(results, statistics, **names):
    """Read the `FiresOn` of a layer, which evaluate_descriptions.py has written.

    results: `Results` of a loaded model.
    statistics: `Statistics` of the layer.
    names: dataset, layer, k, texts, components: fields of the file names.

    Raises UserError, with the command, for what is missing, damaged, or of other effects.
    """
    expected = {"statistics": statistics.digest()}
    described = load_descriptions(results, (), expected, "fires_on", **names)
    projections = results.load("projections", (), expected, **names)
    mean, deviation = spread(projections)
    return FiresOn(described, torch.from_numpy(mean), torch.from_numpy(deviation))


def spread(projections):
    """Return the mean and the standard deviation of effects over images, float32 [N] each.

    projections: [images, N].
    """
    mean = np.empty(projections.shape[1], np.float32)
    deviation = np.empty_like(mean)
    for start in range(0, len(mean), AT_ONCE):
        n = slice(start, start + AT_ONCE)
        some = projections[:, n].astype(np.float64)
        mean[n] = some.mean(axis=0)
        deviation[n] = some.std(axis=0)
    return mean, deviation


class Standardised:
    """`Standardised` effects along components have mean 0 and deviation 1 over the training images.

    rebuilt: `Rebuilt` of the components.
    mean, deviation: of the effects along them, [N] each. Neurons of deviation 0 have effects 0.
    """

    def __init__(self, rebuilt, mean, deviation):
        self.rebuilt = rebuilt
        self.mean = mean.to(rebuilt.mean_along)
        deviation = deviation.to(rebuilt.mean_along)
        self.scale = torch.where(deviation > 0, 1 / deviation, 0)

    def __call__(self, phi):
        """Return the standardised effects [B, N] of a `SecondOrder`."""
        return (self.rebuilt.projections(phi) - self.mean) * self.scale


# the three forms


@torch.inference_mode()
def concepts_of_images(phi, centred_norms, thresholds, descriptions, weigh=None):
    """Return the `Concepts` of each image of a batch, in one of the two forms that have neurons.

    phi: `SecondOrder` of the images.
    centred_norms: `CentredNorms` about the mean effects of the data set.
    thresholds: [N], the smallest of every neuron's k largest norms (the first column of norm.npy).
    descriptions: list over neurons, the texts that they fire on or write.
    weigh: a function from `SecondOrder` to what multiplies the coefficients of a neuron's texts, [B, N].
        `Standardised` for the texts that neurons fire on; None, the norms, for those they write.
    """
    norms = centred_norms(phi)  # [B, N]
    return _concepts(norms, norms > thresholds, norms if weigh is None else weigh(phi), Words(descriptions))


def _concepts(norms, active, weights, words, count=None):
    """Return the `Concepts` of each image. norms, active, weights: [B, N]. words: `Words`."""
    found = []
    for row, chosen, weight in zip(*(of.cpu().numpy() for of in (norms, active, weights)), strict=True):
        neurons = np.flatnonzero(chosen)
        neurons = neurons[np.argsort(-row[neurons], kind="stable")]
        scores = words.scores(neurons, weight[neurons], count)
        found.append(Concepts(neurons.tolist(), row[neurons].tolist(), scores))
    return found


class LayerConcepts:
    """`LayerConcepts` finds the concepts of images by one layer's active neurons, in both forms.

    centred_norms, thresholds: as in `concepts_of_images`.
    written: the texts that neurons write, as `load_descriptions` returns them.
    fires_on: `FiresOn`, with `rebuilt`, the `Rebuilt` of the components; None where there is none.
    """

    def __init__(self, centred_norms, thresholds, written, rebuilt=None, fires_on=None):
        self.centred_norms = centred_norms
        self.thresholds = thresholds
        self.forms = {}
        if fires_on is not None:
            weigh = Standardised(rebuilt, fires_on.mean, fires_on.deviation)
            self.forms["fires_on"] = (Words(fires_on.descriptions), weigh)
        self.forms["writes"] = (Words(written), None)

    @torch.inference_mode()
    def __call__(self, phi, count=None):
        """Return {form: `Concepts` of each image}; "fires_on" comes first, where it is known.

        phi: `SecondOrder` of the images.
        count: how many words of an image, at most; None for all.
        """
        norms = self.centred_norms(phi)
        active = norms > self.thresholds
        found = {}
        for form, (words, weigh) in self.forms.items():
            found[form] = _concepts(norms, active, norms if weigh is None else weigh(phi), words, count)
        return found


def nearest_texts(representations, texts, vectors, count):
    """Return the texts nearest to each representation, [[(text, cosine), ...], ...] by falling cosine.

    representations: [B, D], of any length.
    texts: list; one that stands there twice counts once.
    vectors: of the texts [texts, D], of any length.
    count: how many texts.
    """
    unit = torch.nn.functional.normalize
    vectors = torch.as_tensor(vectors).to(representations)
    cosines = unit(representations, dim=-1) @ unit(vectors, dim=-1).T
    return [_by_score(dict(zip(texts, row, strict=True)))[:count] for row in cosines.tolist()]
