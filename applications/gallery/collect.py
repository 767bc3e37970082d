"""What the gallery needs from the images: small pictures, where neurons fire on their top images, which
neurons are active on an image and what they stand for, and the heads through which neurons act. Letters as in
`utils.prs`."""

import numpy as np
import torch

from utils.ablation import Rebuilt
from utils.concepts import concepts_of_images
from utils.figures import to_pictures
from utils.norms import CentredNorms
from utils.prs import second_order

TOP = 8  # images of each sign that a neuron shows
ACTIVE, WORDS = 24, 12  # neurons and words that an image shows


def top_rows(projections, count=TOP):
    """The images of every neuron's largest effects along its component, and of its most negative ones: two
    int [N, count], the most extreme first, of equal ones the earlier image.

    projections: [images, N].
    """
    order = np.argsort(-projections, axis=0, kind="stable")[:count]
    last = np.argsort(projections, axis=0, kind="stable")[:count]
    return order.T, last.T


class Pairs:
    """The (neuron, image) pairs whose maps are shown, in the order of the images: those of a batch lie
    together on disk.

    top: (positive, negative) of `top_rows`. images: their number.

    Attributes: top; neurons [pairs], images [pairs]; place [2, N, count], where the pair of a neuron's j-th
        picture is.
    """

    def __init__(self, top, images):
        self.top, rows = top, np.stack(top)  # [2, N, count]
        neurons = np.broadcast_to(np.arange(rows.shape[1])[None, :, None], rows.shape)
        order = np.argsort(rows, axis=None, kind="stable")
        self.images, self.neurons = rows.reshape(-1)[order], neurons.reshape(-1)[order]
        self.place = np.empty(rows.size, np.int64)
        self.place[order] = np.arange(rows.size)
        self.place = self.place.reshape(rows.shape)
        self.first = np.searchsorted(self.images, np.arange(images + 1))

    def of(self, rows):
        """The pairs of a slice of the images: their slice, images counted from its start, and neurons."""
        found = slice(int(self.first[rows.start]), int(self.first[rows.stop]))
        return found, self.images[found] - rows.start, self.neurons[found]


class Collector:
    """Looks at batches of images for one layer.

    directions, statistics: `Directions`; `utils.ablation.Statistics`.
    descriptions: of what neurons write, as `load_descriptions` gives them; text_ids: {text: its place in the
        pool}.
    pairs: `Pairs` of the split.
    """

    def __init__(self, directions, statistics, descriptions, text_ids, pairs):
        self.directions, self.statistics, self.pairs = directions, statistics, pairs
        self.descriptions, self.text_ids = descriptions, text_ids
        self.centred_norms = CentredNorms(directions, statistics.mean)
        self.rebuilt = Rebuilt(directions, statistics.mean, statistics.pcas)

    def maps(self, rows, p, prefix):
        """Post-GELU activations on the patches of the pairs of some images: their slice, and [pairs,
        patches]. p: [B, T, N].
        """
        found, images, neurons = self.pairs.of(rows)
        return found, p[torch.from_numpy(images), prefix:, torch.from_numpy(neurons)]

    def concepts(self, phi):
        """The most active neurons of every image with their norms, and its strongest words with their scores:
        four arrays [B, ACTIVE], [B, ACTIVE], [B, WORDS], [B, WORDS], -1 and 0 where there are fewer."""
        found = concepts_of_images(phi, self.centred_norms, self.statistics.thresholds, self.descriptions)
        neurons, words = (
            np.full((len(found), ACTIVE), -1, np.int32),
            np.full((len(found), WORDS), -1, np.int32),
        )
        norms, scores = np.zeros(neurons.shape, np.float32), np.zeros(words.shape, np.float32)
        for b, concepts in enumerate(found):
            count = min(ACTIVE, len(concepts.neurons))
            neurons[b, :count], norms[b, :count] = concepts.neurons[:count], concepts.norms[:count]
            for j, (word, score) in enumerate(concepts.words[:WORDS]):
                words[b, j], scores[b, j] = self.text_ids[word], score
        return neurons, norms, words, scores

    def through_heads(self, phi):
        """sum_b y_k y [K, N], with y the effects along the components, and y_k the part that goes through
        head k.
        """
        y = self.rebuilt.projections(phi)
        return torch.einsum("bkn,bn->kn", phi.C, y) * self.rebuilt.along


def thumbnails(pixels, transform, size):
    """What the model saw, uint8 [B, size, size, 3]. pixels, transform: as in `to_pictures`."""
    return np.round(255 * to_pictures(pixels, transform, (size, size))).astype(np.uint8)


def collect(vit, layers, collectors, pixels):
    """Run a batch: yields (layer's `Collector`, activations p [B, T, N], `SecondOrder`) of every layer.

    vit, layers: HookedViT; list. collectors: one for each. pixels: [B, 3, side, side].
    """
    names = [f"blocks.{layer}.mlp.post" for layer in layers]
    with vit.record(*names) as cache:
        _, effects = second_order(vit, pixels, [collector.directions for collector in collectors])
        for name, collector in zip(names, collectors, strict=True):
            yield collector, cache.pop(name), next(effects)
