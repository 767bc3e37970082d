"""Mine words from neurons or take them from the text set, and drop those too close to class_0."""

import json
import random
import re
from pathlib import Path

import numpy as np

from utils.concepts import load_fires_on, word_scores
from utils.data.text_sets import as_text, load_texts
from utils.descriptions import load_descriptions
from utils.runtime.errors import UserError
from utils.runtime.files import ROOT, digest, read_json
from utils.runtime.records import Digest
from utils.statistics import load_statistics

COMPARED = 256  # words compared with class_0 at a time
BLOCK_LIST = ROOT / "text_descriptions" / "block_list.json"
PLURALS = (("", "(?:s|es|'s)?"), ("y", "ies"), ("fe", "ves"), ("f", "ves"), ("man", "men"))  # of word ends


def names_class(text, name, inside=False):
    """Return whether a text names a class, singular or plural.

    inside: also look within longer words ("horseback"), for names from four letters on.
    """
    stem = r"[\s_-]+".join(re.escape(part) for part in name.lower().split())
    forms = [stem.removesuffix(end) + plural for end, plural in PLURALS if stem.endswith(end)]
    pattern = "|".join(forms)
    if not inside or len(name) < 4:
        pattern = rf"(?<![^\W_])(?:{pattern})(?![^\W_])"
    return re.search(pattern, text.lower()) is not None


def banned(text, class_0, blocked):
    """Return why a word or description must not be used; None if it may be.

    It must not name class_0 or a word of the block list.
    """
    if names_class(text, class_0, inside=True):
        return f"names {class_0}"
    for name in blocked:
        if names_class(text, name):
            return f"names {name}, which is on the block list"
    return None


def check_classes(class_0, class_1, blocked):
    """Raise UserError if the classes are equal, or if every description of class_1 is banned."""
    if class_0 == class_1:
        raise UserError(f"--class_0 and --class_1 are both {class_0}; choose two different classes")
    if reason := banned(class_1, class_0, blocked):
        raise UserError(f"every description of {class_1} {reason}; choose another --class_0 or --block_list")


def load_block_list(path, class_0):
    """Return the words that a json {class: [words]} has for class_0; none if it has no entry."""
    if not Path(path).is_file():
        raise UserError(f"--block_list {path} cannot be read: there is no such file")
    fix = 'give a json such as {"horse": ["pony", "mare"]}'
    content = read_json(path, "--block_list", fix)
    if not isinstance(content, dict) or not all(isinstance(words, list) for words in content.values()):
        raise UserError(f"--block_list {path} does not have a list of words for every class; {fix}")
    entries = [words for name, words in content.items() if name.lower() == class_0.lower()]
    return [str(word) for words in entries for word in words]


def read_words(path):
    """Return the [[word, score], ...] of a json. Raise UserError when it is something else."""
    fix = 'give a json such as [["meadow", 0.7], ["fence", 0.4]]'
    if path is None or not Path(path).is_file():
        raise UserError(f"--words {path} cannot be read: there is no such file; {fix}")
    content = read_json(path, "--words", fix)
    try:
        return [[str(word), float(score)] for word, score in content]
    except (TypeError, ValueError) as error:
        raise UserError(f"--words {path} does not hold words and scores; {fix}") from error


class NeuronWords:
    """`NeuronWords` mines words from the texts that neurons write, or from those that they fire on.

    pcas: {layer: components [N, D]}.
    descriptions: {layer: list over neurons, as `load_descriptions` returns it}.
    deviations: {layer: standard deviations [N] of the effects along the components}, by which neurons are
        weighted where descriptions are of what they fire on; None where they are of what they write.
    """

    def __init__(self, pcas, descriptions, deviations=None):
        self.pcas = pcas
        self.descriptions = descriptions
        self.deviations = deviations

    @classmethod
    def load(cls, results, layers, **names):
        """Read the components and descriptions of some layers.

        results: `Results` of a loaded model.
        names: dataset, texts, components, alpha, k: fields of the file names.
        """
        pcas = {layer: results.load("pca", layer=layer, **names) for layer in layers}
        described = {}
        for layer in layers:
            expected = {"top_k_pca": names["k"], "targets": digest(pcas[layer])}
            described[layer] = load_descriptions(results, expected=expected, layer=layer, **names)
        return cls(pcas, described)

    @classmethod
    def load_fires_on(cls, results, layers, **names):
        """Read the components of some layers, and the texts that their neurons fire on.

        Parameters: as in `load`. Raises UserError, with the command, for what is missing.
        """
        statistics = load_statistics(results, names["dataset"], layers, names["k"])
        pcas = {}
        described = {}
        deviations = {}
        for layer, of_layer in statistics.items():
            found = load_fires_on(results, of_layer, layer=layer, **names)
            pcas[layer] = of_layer.pcas.cpu().numpy()
            described[layer] = found.descriptions
            deviations[layer] = found.deviation.numpy()
        return cls(pcas, described, deviations)

    def digest(self):
        """Return twelve hex digits of all components, descriptions and deviations."""
        content = json.dumps(list(self.descriptions.items())).encode()
        arrays = [*self.pcas.values(), np.frombuffer(content, np.uint8)]
        if self.deviations is not None:
            arrays += self.deviations.values()
        return Digest(digest(*arrays), earlier=None)

    def along(self, v):
        """Return the weights of all neurons, [[layer, neuron, <r_n, v>], ...].

        For the texts that neurons fire on, a weight is multiplied by the neuron's deviation.

        v: [D].
        """
        found = []
        for layer, r in self.pcas.items():
            weights = r @ v
            if self.deviations is not None:
                weights = weights * self.deviations[layer]
            found += [[layer, n, float(x)] for n, x in enumerate(weights)]
        return found

    def mine(self, v, neurons_num, seed=None):
        """Score the words of some neurons: add up coefficient * weight over the neurons (eq. 6).

        The weight is <r_n, v>, for what neurons fire on deviation * <r_n, v>.

        v: [D], the difference of the classes' text vectors.
        neurons_num: how many neurons to take, from all layers together.
        seed: of the random choice of neurons; None takes those with the largest |weight|.

        Returns {"neurons": [[layer, neuron, weight], ...], "words": [[word, score], ...]}, with the positive
        scores only, largest first.
        """
        along = self.along(v)
        if seed is None:
            along.sort(key=lambda item: -abs(item[2]))
        else:
            random.Random(f"neurons {seed}").shuffle(along)
        neurons = along[:neurons_num]
        descriptions = [self.descriptions[layer][n] for layer, n, _ in neurons]
        weights = {i: x for i, (_, _, x) in enumerate(neurons)}
        scores = word_scores(descriptions, weights)
        return {"neurons": neurons, "words": [[word, score] for word, score in scores if score > 0]}


class PoolWords:
    """`PoolWords` takes words from the whole text set, for two baselines without neurons.

    results: `Results` of a loaded model.
    texts: the text set, as a user names it.
    descriptions_dir: as in `load_texts`.
    """

    def __init__(self, results, texts, descriptions_dir):
        self.texts, self.vectors, _ = load_texts(results, texts, descriptions_dir, lambda: results.loaded)

    def digest(self):
        """Return twelve hex digits of all texts and their vectors."""
        texts = np.frombuffer(as_text(self.texts), np.uint8)
        return Digest(digest(self.vectors, texts), earlier=None)

    def similar(self, v):
        """Sort all texts by the cosine of their vectors with v.

        v: [D], the difference of the classes' text vectors.

        Returns {"words": [[text, cosine], ...]}, largest first.
        """
        norms = np.linalg.norm(self.vectors, axis=1)
        cosines = self.vectors @ (v / np.linalg.norm(v)) / np.maximum(norms, np.finfo(norms.dtype).tiny)
        scores = dict(zip(self.texts, cosines.tolist(), strict=True))  # duplicates count once
        words = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        return {"words": [list(item) for item in words]}

    def random(self, seed):
        """Return {"words": [[text, None], ...]}: all texts in a random order, without scores."""
        texts = sorted(set(self.texts))
        random.Random(f"words {seed}").shuffle(texts)
        return {"words": [[text, None] for text in texts]}


def filter_words(candidates, class_0, count, encode, threshold, blocked):
    """Take the first words that are not banned and not too close to class_0.

    candidates: [[word, score], ...], best first.
    count: how many words to take.
    encode: texts -> unit vectors.
    threshold: the largest cosine with class_0 that a word may have.
    blocked: words that are banned besides class_0.

    Returns {"words": [{"word", "score", "cosine"}, ...], "dropped": [{..., "reason"}, ...]}. Raises UserError
    if no word is left.
    """
    taken = []
    dropped = []
    of_class = encode([class_0])[0]
    for start in range(0, len(candidates), COMPARED):
        block = candidates[start : start + COMPARED]
        cosines = (encode([word for word, _ in block]) @ of_class).tolist()
        for (word, score), cosine in zip(block, cosines, strict=True):
            entry = {"word": word, "score": score, "cosine": round(cosine, 4)}
            reason = banned(word, class_0, blocked)
            if reason is None and cosine > threshold:
                reason = f"cosine with {class_0} above {threshold}"
            if reason is not None:
                dropped.append(entry | {"reason": reason})
                continue
            taken.append(entry)
            if len(taken) == count:
                return {"words": taken, "dropped": dropped}
    if not taken:
        fix = f"raise --cosim_similarity (now {threshold}) or --neurons_num, or shorten the block list"
        raise UserError(f"none of {len(candidates)} words is left for {class_0}; {fix}")
    return {"words": taken, "dropped": dropped}
