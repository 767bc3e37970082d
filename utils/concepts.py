"""Concept discovery: which words the active neurons of an image stand for (section 5.3 of the paper).

A neuron is active on an image if its centred norm is among its own k largest over the data set; a word's score is the sum, over
the active neurons that have it in their description, of coefficient * norm.
"""

import json
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from utils.artifacts import load_meta, one_line
from utils.errors import UserError
from utils.prs import second_order

ROWS = 512  # images of a memory map that are compared at a time


@dataclass
class Concepts:
    """What was found in one image: the active neurons and their norms, by falling norm, and (word, score) by falling score."""

    neurons: list
    norms: list
    words: list


def load_descriptions(names, dataset, layer, name, alpha, components, neurons, flags, **expected):
    """The descriptions of a layer's neurons: a list over neurons of [[text index, coefficient, text], ...].

    Parameters
    names: Names of the input. name: the text set. alpha, components: as in the name of the file. neurons: how many there have to
    be. flags: the model's flags, for the message. expected: facts that the record beside has to agree with where it has them
    (fingerprint of the weights, top_k_pca).

    Raises UserError, naming the command, when the file is missing, damaged, or of another model.
    """
    path = names.decomposition(dataset, layer, name, alpha, components)
    command = (
        f"python compute_sparse_decomposition.py --mlp_layer {layer} --dataset {dataset} --text_descriptions {name} "
        f"--components {components} {flags}"
    )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        descriptions = [[(int(i), float(c), str(text)) for i, c, text in content[str(n)]] for n in range(len(content))]
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; make it with: {command}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); make it again with: {command}") from error
    if len(descriptions) != neurons:
        raise UserError(
            f"{path} describes {len(descriptions)} neurons, and the layer has {neurons}; make it again with: {command}"
        )
    meta = load_meta(path)
    for key, value in expected.items():
        if meta.get(key) not in (None, value):
            raise UserError(f"{path} was made with {key} {meta[key]!r}, and here it is {value!r}; make it again with: {command}")
    return descriptions


def word_scores(descriptions, weights, texts=None):
    """Add up coefficient * weight for every word of some neurons' descriptions.

    Parameters
    descriptions: a list over neurons, as `load_descriptions` returns it. weights: {neuron: weight}. texts: how many of a neuron's
    words count, None for all; they stand by falling |coefficient|.

    Returns [(word, score), ...] by falling score, then by word.
    """
    scores = defaultdict(float)
    for neuron, weight in weights.items():
        for _, coefficient, text in descriptions[neuron][:texts]:
            scores[text] += coefficient * weight
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def concepts_of_row(image_norms, row, k, descriptions):
    """Concepts of an image of the data set.

    Parameters
    image_norms: [images, N], the centred norms of compute_pcas.py, best as a memory map. row: the image. k: images per neuron
    on which it counts as active. descriptions: a list over neurons.
    """
    if not 0 <= row < len(image_norms):
        raise UserError(f"there is no image {row}; the data set has {len(image_norms)}, from 0 on")
    norms = np.asarray(image_norms[row])
    larger = np.zeros(len(norms), dtype=np.int64)  # [N], images with a larger effect of the neuron
    for start in range(0, len(image_norms), ROWS):
        larger += (np.asarray(image_norms[start : start + ROWS]) > norms).sum(axis=0)
    return _concepts(norms, larger < k, descriptions)


@torch.inference_mode()
def concepts_of_images(vit, images, directions, centred_norms, thresholds, descriptions, coefficient):
    """Concepts of new images, one `Concepts` for each.

    Parameters
    vit: HookedViT. images: [B, 3, side, side], transformed. directions: `Directions` of the layer. centred_norms: `CentredNorms`
    about the mean effects of the data set. thresholds: [N], the smallest of every neuron's k largest norms (the first column of
    K_norm.npy). descriptions: a list over neurons. coefficient: as the data set's effects were made with.
    """
    _, [(C, kappa)] = second_order(vit, images, [directions], coefficient)
    norms = centred_norms(C, kappa)  # [B, N]
    active = norms >= thresholds
    return [_concepts(row, chosen, descriptions) for row, chosen in zip(norms.cpu().numpy(), active.cpu().numpy(), strict=True)]


def _concepts(norms, active, descriptions):
    neurons = np.flatnonzero(active)
    neurons = neurons[np.argsort(-norms[neurons], kind="stable")]
    weights = {int(n): float(norms[n]) for n in neurons}
    return Concepts(list(weights), list(weights.values()), word_scores(descriptions, weights))
