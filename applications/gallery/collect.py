"""Look at batches of images for the gallery.

Collected are small pictures, the places where neurons fire on their top images, the neurons that are active
on an image, its concepts, and the heads through which neurons act. Letters as in `utils.prs`.
"""

import numpy as np
import torch

from utils.ablation import Rebuilt
from utils.concepts import FORMS, FiresOn, LayerConcepts, spread
from utils.data.images import to_pictures
from utils.norms import CentredNorms
from utils.prs import second_order
from utils.units import fires_at

TOP_PICTURES = 8  # images of each sign that a neuron shows
ACTIVE = 24  # neurons that an image shows
IMAGE_WORDS = 8  # words that an image shows in each form of its concepts
CONCEPTS = ("neurons", "norms", "words", "scores")  # names of arrays that hold them


AT_ONCE = 1024  # neurons whose images are sorted together


def top_rows(projections, count=TOP_PICTURES):
    """Return the images of every neuron's largest and most negative effects along its component.

    projections: [images, N].

    Returns two int [N, count], the most extreme effect first, of equal ones the earlier image.
    """
    N = projections.shape[1]
    found = []
    for sign in (-1, 1):
        blocks = (sign * projections[:, n : n + AT_ONCE] for n in range(0, N, AT_ONCE))
        found.append(np.concatenate([np.argsort(of, axis=0, kind="stable")[:count].T for of in blocks]))
    return tuple(found)


class Pairs:
    """Pairs are the (neuron, image) pairs whose maps are shown, in the order of the images.

    So the maps of a batch of images lie together on disk.

    top: (positive, negative) images, as `top_rows` returns them.
    count: number of images.

    Attributes
    neurons, images: of every pair, [pairs].
    place: the pair of a neuron's j-th picture, [2, N, count].
    """

    def __init__(self, top, count):
        self.top = top
        rows = np.stack(top)  # [2, N, count]
        neurons = np.broadcast_to(np.arange(rows.shape[1])[None, :, None], rows.shape)
        order = np.argsort(rows, axis=None, kind="stable")
        self.images = rows.reshape(-1)[order]
        self.neurons = neurons.reshape(-1)[order]
        place = np.empty(rows.size, np.int64)
        place[order] = np.arange(rows.size)
        self.place = place.reshape(rows.shape)
        self._first = np.searchsorted(self.images, np.arange(count + 1))

    def of(self, rows):
        """Return the pairs of a slice of the images: their slice, images counted from its start, neurons."""
        found = slice(int(self._first[rows.start]), int(self._first[rows.stop]))
        return found, self.images[found] - rows.start, self.neurons[found]


class Collector:
    """A Collector looks at batches of images for one layer.

    sources: `Sources`.
    split: name of the split of the images.
    directions: `Directions` of the layer.
    """

    def __init__(self, sources, split, directions):
        self.directions = directions
        self.vit = sources.clip.vit
        layer = directions.layer
        statistics = sources.statistics[layer]
        self.text_ids = sources.text_ids
        self.distinct = torch.tensor(sorted(self.text_ids.values()))  # of equal texts the first
        self.vectors = sources.vectors[self.distinct].to(statistics.mean)
        self.pairs = sources.pairs[layer, split]
        self.paths = sources.paths(split, layer)
        self.rebuilt = Rebuilt(directions, statistics.mean, statistics.pcas)
        sides = sources.sides(sources.neurons(layer), sources.inputs)
        usual = map(torch.from_numpy, spread(sources.projections(layer, "train")))
        self.find_concepts = LayerConcepts(
            CentredNorms(directions, statistics.mean),
            statistics.thresholds,
            sides["writes"],
            self.rebuilt,
            FiresOn(sides["fires_on"], *usual),
        )

    def blocks(self, rows, phi, representation):
        """Yield (path of an array, its rows, block) for everything that is kept of a batch.

        rows: slice of the images.
        phi: `SecondOrder`, with its activations.
        representation: [B, D].
        """
        pairs, *which = self.pairs.of(rows)
        yield self.paths["maps"], pairs, fires_at(self.vit, phi, *map(torch.from_numpy, which))
        for name, block in self.concepts(phi, representation).items():
            yield self.paths[name], rows, block

    def concepts(self, phi, representation):
        """Return the most active neurons of every image, and its concepts in all forms.

        neurons, norms: [B, ACTIVE]. words, scores: [B, forms, IMAGE_WORDS], text indices and their scores, in
        the order of `FORMS`. Where there are fewer, they are -1 and 0.
        """
        by_form = self.find_concepts(phi, IMAGE_WORDS)
        neurons = np.full((len(representation), ACTIVE), -1, np.int32)
        words = np.full((len(representation), len(FORMS), IMAGE_WORDS), -1, np.int32)
        norms = np.zeros(neurons.shape, np.float32)
        scores = np.zeros(words.shape, np.float32)
        for b, concepts in enumerate(by_form["writes"]):
            count = min(ACTIVE, len(concepts.neurons))
            neurons[b, :count] = concepts.neurons[:count]
            norms[b, :count] = concepts.norms[:count]
        for f, form in enumerate(FORMS):
            for b, concepts in enumerate(by_form.get(form, ())):
                for j, (word, score) in enumerate(concepts.words):
                    words[b, f, j] = self.text_ids[word]
                    scores[b, f, j] = score
        f = list(FORMS).index("nearest")
        ids, cosines = self.nearest(representation)
        words[:, f, : ids.shape[1]] = ids
        scores[:, f, : ids.shape[1]] = cosines
        return {"neurons": neurons, "norms": norms, "words": words, "scores": scores}

    def nearest(self, representation):
        """Return the texts nearest to every representation, and their cosines, [B, IMAGE_WORDS] each.

        They are those of `nearest_texts`, without a sort of the whole text set for every image.
        """
        unit = torch.nn.functional.normalize(representation.to(self.vectors), dim=1)
        cosines = unit @ self.vectors.T
        values, places = cosines.topk(min(IMAGE_WORDS, cosines.shape[1]), dim=1)
        return self.distinct[places.cpu()].numpy(), values.cpu().numpy()

    def through_heads(self, phi):
        """Return sum_b y_k y, float64 [K, N].

        y: effects along the components. y_k: the part that goes through head k.
        """
        y = self.rebuilt.projections(phi)
        found = torch.einsum("bkn,bn->kn", phi.C, y) * self.rebuilt.along
        return found.cpu().double().numpy()


def thumbnails(pixels, transform, size):
    """Return small pictures of the images that the model saw, uint8 [B, size, size, 3].

    pixels, transform: as in `to_pictures`.
    """
    return np.round(255 * to_pictures(pixels, transform, (size, size))).astype(np.uint8)


def collect(vit, collectors, pixels):
    """Run a batch, and yield (`Collector`, `SecondOrder`, representations [B, D]) of every layer.

    collectors: one for each layer, ascending.
    pixels: [B, 3, side, side].
    """
    directions = [collector.directions for collector in collectors]
    representation, effects = second_order(vit, pixels, directions)
    for collector in collectors:
        yield collector, next(effects), representation
