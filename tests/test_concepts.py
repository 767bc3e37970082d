"""Concept discovery, in its three forms, agrees with the definition in plain numpy."""

import json

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.neighbors import NearestNeighbors

from utils.ablation import Rebuilt
from utils.concepts import (
    FiresOn,
    LayerConcepts,
    concepts_of_images,
    load_fires_on,
    nearest_texts,
    spread,
    sums,
    word_scores,
)
from utils.descriptions import load_descriptions, save_descriptions
from utils.model.clip import load_clip
from utils.norms import CentredNorms
from utils.prs import fold, second_order
from utils.runtime.errors import UserError
from utils.runtime.records import save_array
from utils.runtime.results import Results
from utils.statistics import Statistics

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


def test_words_of_several_layers_add_up():
    layers = [[("sea", 2.0), ("sky", 1.0)], [("sky", 3.0), ("violin", 4.0), ("sea", -2.5)]]
    found = sums(item for words in layers for item in words)
    assert found == [("sky", 4.0), ("violin", 4.0), ("sea", -0.5)]


class Seen:
    """Twenty known and five new images of a tower, and the definition of their concepts in float64.

    The mean effects are not the known images' own, so that effects along components have a mean. The effects
    of two neurons along theirs do not vary over the known images.
    """

    layer, k, still = 2, 4, (0, 5)

    def __init__(self, vit):
        generator = torch.Generator().manual_seed(3)
        known, new = (torch.randn(count, 3, 32, 32, generator=generator) for count in (20, 5))
        self.directions = fold(vit, self.layer)
        effects = []
        for images in (known, new):
            _, [self.phi] = second_order(vit, images, [self.directions])
            effects.append(self.phi.dense().numpy().astype(np.float64))  # [images, N, D]
        rng = np.random.default_rng(5)
        mean = effects[0].mean(axis=0)
        mean = mean + 0.3 * rng.normal(size=mean.shape) * effects[0].std(axis=0)
        r = rng.normal(size=mean.shape)
        self.along = [np.einsum("ind,nd->in", phi - mean, r) for phi in effects]
        self.along[0][:, list(self.still)] = 0.5
        self.norms = [np.linalg.norm(phi - mean, axis=-1) for phi in effects]
        self.mean, self.r = (torch.from_numpy(array).float() for array in (mean, r))
        self.thresholds = torch.from_numpy(np.sort(self.norms[0], axis=0)[-self.k]).float()
        self.written, self.fired_on = random_descriptions(vit.N, 0), random_descriptions(vit.N, 1)

    def concepts(self, fires_on=True, count=None):
        norms = CentredNorms(self.directions, self.mean)
        rebuilt = Rebuilt(self.directions, self.mean, self.r)
        moments = map(torch.from_numpy, spread(self.along[0].astype(np.float32)))
        given = (rebuilt, FiresOn(self.fired_on, *moments)) if fires_on else ()
        return LayerConcepts(norms, self.thresholds, self.written, *given)(self.phi, count)


@pytest.fixture(scope="module")
def seen(vit):
    return Seen(vit)


def test_texts_that_neurons_fire_on_count_by_their_standardised_effects(seen):
    found = seen.concepts()
    assert list(found) == ["fires_on", "writes"]
    known, new = seen.along
    moved = 0
    for i, concepts in enumerate(found["fires_on"]):
        scores = {}
        active = [n for n in range(len(new[i])) if seen.norms[1][i, n] > float(seen.thresholds[n])]
        assert sorted(concepts.neurons) == active
        for n in active:
            z = 0.0 if n in seen.still else (new[i, n] - known[:, n].mean()) / known[:, n].std()
            moved += abs(known[:, n].mean()) > 0.1 * known[:, n].std()
            for _, coefficient, word in seen.fired_on[n]:
                scores[word] = scores.get(word, 0) + coefficient * z
        assert_same(concepts, scores, active, seen.norms[1][i])
    active = {n for concepts in found["fires_on"] for n in concepts.neurons}
    assert moved > 10 and set(seen.still) & active and len(active) > 20


def test_texts_that_neurons_write_stand_beside_and_alone_where_nothing_else_is_known(seen):
    beside, alone = (seen.concepts(fires_on) for fires_on in (True, False))
    assert list(alone) == ["writes"] and alone["writes"] == beside["writes"]
    for concepts, norms in zip(alone["writes"], seen.norms[1], strict=True):
        assert_same(concepts, *slow_scores(seen.norms[0], norms, seen.k, seen.written), norms)


def test_of_few_words_they_are_those_of_the_largest_scores(seen):
    every, few = seen.concepts(), seen.concepts(count=2)
    for form, concepts in every.items():
        assert [of.words[:2] for of in concepts] == [of.words for of in few[form]]
        assert any(len(of.words) > 2 for of in concepts)


def test_the_spread_of_effects_is_that_of_numpy_and_0_where_nothing_varies():
    rng = np.random.default_rng(0)
    effects = (50 + rng.normal(size=(33, 600)) * rng.gamma(1, size=600)).astype(np.float32)
    effects[:, 400] = 0.1
    mean, deviation = spread(effects)
    wide = effects.astype(np.float64)
    assert mean.dtype == deviation.dtype == np.float32 and deviation[400] == 0
    assert_allclose(mean, wide.sum(axis=0) / 33, rtol=1e-6)
    assert_allclose(deviation, np.sqrt(((wide - wide.mean(axis=0)) ** 2).sum(axis=0) / 33), rtol=1e-5)


def test_the_nearest_texts_are_those_of_scikit_learn_and_a_text_counts_once():
    rng = np.random.default_rng(0)
    vectors, points = rng.normal(size=(40, 8)) * rng.gamma(1, size=(40, 1)), 7 * rng.normal(size=(6, 8))
    vectors[31] = 2 * vectors[30]
    texts = [f"text {i:02}" for i in range(40)]
    texts[31] = texts[30]
    found = nearest_texts(torch.from_numpy(points), texts, vectors, 39)
    distances, rows = NearestNeighbors(n_neighbors=40, metric="cosine").fit(vectors).kneighbors(points)
    for words, distance, row in zip(found, distances, rows, strict=True):
        first = {}
        for x, i in zip(distance, row, strict=True):
            first.setdefault(texts[i], 1 - x)
        assert [text for text, _ in words] == list(first) and len(words) == 39
        assert_allclose([cosine for _, cosine in words], list(first.values()), atol=1e-9)
    few = nearest_texts(torch.from_numpy(points), texts, vectors, 5)
    assert few == [words[:5] for words in found]


def test_what_neurons_fire_on_is_read_with_its_spread_and_belongs_to_the_components(tmp_path, tiny_model):
    clip = load_clip(tiny_model, "random", "cpu")
    results = Results(tmp_path, tiny_model, "random", clip=clip)
    names = {"dataset": "imagenet", "layer": 2, "k": 5, "texts": "30k", "components": 3}
    N = clip.vit.N
    statistics, others = (Statistics(*torch.randn(3, N, 24)) for _ in range(2))
    make = (
        "is missing; make it with: python evaluate_descriptions.py --dataset imagenet --data_path DATA_PATH"
    )
    make += " --mlp_layer 2 --top_k_pca 5 --text_descriptions 30k --components 3 "
    with pytest.raises(UserError, match=make):
        load_fires_on(results, statistics, **names)
    record = {"fingerprint": clip.fingerprint, "statistics": statistics.digest()}
    support = np.tile(np.arange(3), (N, 1))
    path = results.path("fires_on", **names)
    save_descriptions(path, support, np.ones((N, 3)), texts=WORDS, record=record)
    with pytest.raises(UserError, match=f"projections.npy {make}"):
        load_fires_on(results, statistics, **names)
    effects = np.random.default_rng(0).normal(3, size=(20, N)).astype(np.float32)
    save_array(results.path("projections", **names), effects, record)
    found = load_fires_on(results, statistics, **names)
    assert found.descriptions == [[(i, 1.0, WORDS[i]) for i in range(3)]] * N
    assert_allclose(found.mean, effects.mean(axis=0), rtol=1e-5)
    assert_allclose(found.deviation, effects.std(axis=0), rtol=1e-5)
    with pytest.raises(UserError, match="was made with statistics .*evaluate_descriptions.py.* --overwrite"):
        load_fires_on(results, others, **names)
    effects[3, 4] = np.nan
    np.save(results.path("projections", **names), effects)
    with pytest.raises(UserError, match=r"NaN or infinity, first at \[3, 4\].*evaluate_descriptions.py"):
        load_fires_on(results, statistics, **names)


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
