"""Concept discovery agrees with the definition in plain numpy."""

import json

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from utils.concepts import concepts_of_images, word_scores
from utils.descriptions import load_descriptions
from utils.norms import CentredNorms
from utils.prs import fold, second_order
from utils.runtime.errors import UserError
from utils.runtime.results import Results

WORDS = ["violin", "guitar", "chords", "cranes", "faceted", "sea", "sky"]


def random_descriptions(neurons, seed=0, texts=3):
    rng = np.random.default_rng(seed)
    described = []
    for _ in range(neurons):
        chosen = rng.choice(len(WORDS), texts, replace=False)
        values = sorted(rng.normal(size=texts).tolist(), key=lambda c: -abs(c))
        described.append([(int(i), c, WORDS[i]) for i, c in zip(chosen, values, strict=True)])
    return described


def slow_scores(norms_of_all, norms, k, descriptions):
    """{word: score} of an image's norms [N], and its active neurons: where it is above the k-th largest of
    [images, N].
    """
    scores, active = {}, []
    for n in range(len(norms)):
        threshold = np.sort(norms_of_all[:, n])[-k]
        if norms[n] > threshold:
            active.append(n)
            for _, coefficient, word in descriptions[n]:
                scores[word] = scores.get(word, 0) + coefficient * float(norms[n])
    return scores, active


def assert_same(found, scores, active, norms):
    assert sorted(found.neurons) == active
    assert_allclose(found.norms, sorted(norms[active], reverse=True), rtol=1e-4)
    assert dict(found.words).keys() == scores.keys()
    for word, score in found.words:
        assert_allclose(score, scores[word], rtol=1e-4, atol=1e-4 * max(map(abs, scores.values())))
    values = [score for _, score in found.words]
    assert values == sorted(values, reverse=True)


def concepts_of_rows(norms, rows, k, descriptions):
    """`concepts_of_images` for some images of a data set with known norms [images, N]."""
    thresholds = torch.from_numpy(np.sort(norms, axis=0)[-k])  # [N], the smallest of the k largest
    return concepts_of_images(None, lambda phi: torch.from_numpy(norms[rows]), thresholds, descriptions)


@pytest.mark.parametrize("images", [7, 1100])
def test_an_image_of_the_data_set_has_the_concepts_of_the_definition(images):
    norms = np.random.default_rng(1).gamma(2, size=(images, 12)).astype(np.float32)
    descriptions, k, rows = random_descriptions(12), images // 5 + 1, [0, images // 2, images - 1]
    for row, found in zip(rows, concepts_of_rows(norms, rows, k, descriptions), strict=True):
        scores, active = slow_scores(norms, norms[row], k, descriptions)
        assert_same(found, scores, active, norms[row])


def test_every_neuron_is_active_on_k_less_one_images_of_the_data_set():
    norms = np.random.default_rng(2).gamma(2, size=(40, 9)).astype(np.float32)
    counts = np.zeros(9, int)
    for found in concepts_of_rows(norms, range(40), 6, random_descriptions(9)):
        counts[found.neurons] += 1
    assert_array_equal(counts, 5)  # the 6th gives the threshold


def test_an_image_without_active_neurons_has_no_concepts():
    norms = np.random.default_rng(2).gamma(2, size=(40, 9)).astype(np.float32)
    [found] = concepts_of_images(
        None, lambda phi: torch.zeros(1, 9), torch.from_numpy(norms.max(axis=0)), random_descriptions(9)
    )
    assert found.neurons == found.norms == found.words == []


def test_new_images_have_the_concepts_of_their_dense_effects(vit):
    """On images outside the data set, against effects formed in full and centred in numpy."""
    layer, k = 2, 4
    generator = torch.Generator().manual_seed(3)
    known, new = (torch.randn(count, 3, 32, 32, generator=generator) for count in (20, 5))
    directions = fold(vit, layer)
    effects = []
    for images in (known, new):
        _, [phi] = second_order(vit, images, [directions])
        effects.append(phi.dense().numpy().astype(np.float64))  # [images, N, D]
    mean = effects[0].mean(axis=0)
    norms_known, norms_new = (np.linalg.norm(phi - mean, axis=-1) for phi in effects)
    descriptions = random_descriptions(vit.N)

    centred_norms = CentredNorms(directions, torch.from_numpy(mean).float())
    thresholds = torch.from_numpy(
        np.sort(norms_known, axis=0)[-k]
    ).float()  # [N], the smallest of the k largest
    found = concepts_of_images(phi, centred_norms, thresholds, descriptions)
    assert len(found) == 5 and any(item.neurons for item in found)
    for item, norms in zip(found, norms_new, strict=True):
        assert_same(item, *slow_scores(norms_known, norms, k, descriptions), norms)


def test_the_scores_of_a_word_add_up_over_neurons():
    descriptions = [[(0, 3.0, "sea"), (1, -2.0, "sky")], [(1, 1.0, "sky"), (0, 0.5, "sea")]]
    assert word_scores(descriptions, {0: 2.0, 1: 1.0}) == [("sea", 6.5), ("sky", -3.0)]


def test_descriptions_are_checked_when_they_are_read(tmp_path):
    results = Results(tmp_path, "ViT-B-32", "openai")
    names = {"dataset": "imagenet", "layer": 9, "texts": "30k", "alpha": 1.0, "components": 4}

    def load(neurons=2, **expected):
        return load_descriptions(results, {"N": neurons}, expected, **names)

    path = results.path("decomposition", **names)
    make = "is missing; make it with: python compute_sparse_decomposition.py --dataset imagenet --mlp_layer 9"
    with pytest.raises(UserError, match=make):
        load()
    path.write_text(json.dumps({"0": [[5, 0.5, "sea"]], "1": [[6, -1, "sky"], [5, 0.1, "sea"]]}))
    assert load() == [[(5, 0.5, "sea")], [(6, -1.0, "sky"), (5, 0.1, "sea")]]
    with pytest.raises(UserError, match="describes 2 neurons, and the layer has 3"):
        load(3)
    path.with_suffix(".meta.json").write_text('{"fingerprint": "abc", "top_k_pca": null}')
    assert load(fingerprint="abc", top_k_pca=5) == load()  # null stands for unknown
    with pytest.raises(UserError, match="made with fingerprint 'abc'"):
        load(fingerprint="def")
    for damaged in ("{", "[1, 2]", '{"a": []}', '{"0": [[1, 2]], "1": []}'):
        path.write_text(damaged)
        with pytest.raises(UserError, match="damaged"):
            load()
