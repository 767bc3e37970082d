"""Grades of descriptions against scipy, scikit-learn, and dense effects of the float64 definition."""

import csv
import json
import re
import shutil
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import softmax
from scipy.stats import pearsonr
from sklearn.decomposition import SparseCoder
from sklearn.metrics import average_precision_score

from tests import definition
from tests.launcher import GRADED, contents, run_stage_of_user, shared_world, the_line
from utils import grading
from utils.data.images import load_images
from utils.evaluation import directions_of
from utils.omp import orthogonal_matching_pursuit
from utils.prs import fold_layers, second_order

LAYER = 3


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tensor(array):
    return torch.from_numpy(np.asarray(array, np.float32))


# measures


def test_correlation_is_scipys(rng):
    predicted, effects = rng.standard_normal((3, 50, 4)), rng.standard_normal((50, 4))
    predicted[1, :, 2] = 7  # constant
    found = grading.correlation(torch.from_numpy(predicted), torch.from_numpy(effects))
    for r in range(3):
        for n in range(4):
            expected = 0 if (r, n) == (1, 2) else pearsonr(predicted[r, :, n], effects[:, n]).statistic
            assert float(found[r, n]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("levels", [3, 1, 10_000])
def test_average_precision_is_scikit_learns_with_many_or_no_equal_predictions(rng, levels):
    predicted = rng.integers(0, levels, (2, 80, 5)).astype(np.float32)
    positive = rng.random((80, 5)) < 0.2
    positive[0] = True
    found = grading.average_precision(torch.from_numpy(predicted), torch.from_numpy(positive))
    expected = [
        [average_precision_score(positive[:, n], predicted[r, :, n]) for n in range(5)] for r in range(2)
    ]
    assert_allclose(found.numpy(), expected, atol=1e-12)


def test_the_images_a_neuron_acts_on_are_those_of_its_largest_effects(rng):
    effects = rng.standard_normal((40, 3))
    found = grading.most_active(torch.from_numpy(effects), 0.1).numpy()
    for n in range(3):
        assert set(np.flatnonzero(found[:, n])) == set(np.argsort(effects[:, n])[-4:])
    assert grading.most_active(torch.from_numpy(effects), 1e-9).sum(dim=0).tolist() == [1, 1, 1]


# what neurons fire on


@pytest.mark.parametrize("truth", [False, True])
def test_what_neurons_fire_on_is_scikit_learns_pursuit_on_standardised_presences(rng, truth):
    """Over images, as it is defined; ours works in a basis of the features."""
    images, texts, components = 200, 90, 6
    if truth:
        features, vectors = (rng.random((images, texts)) < 0.3).astype(float), np.eye(texts)
        features[:, 4] = 1  # true of every image: tells nothing
    else:
        features, vectors = rng.standard_normal((images, 24)) + 2, rng.standard_normal((texts, 24))
        vectors[7] = vectors[3]
    effects = rng.standard_normal((images, 12)) + features @ vectors[:5].T @ rng.standard_normal((5, 12))
    presences = features @ vectors.T
    centred = presences - presences.mean(axis=0)
    spread = np.linalg.norm(centred, axis=0)
    standardised = np.divide(centred, spread, where=spread > 1e-9, out=np.zeros_like(centred))
    target = effects - effects.mean(axis=0)
    target /= np.linalg.norm(target, axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        coder = SparseCoder(standardised.T, transform_algorithm="omp", transform_n_nonzero_coefs=components)
        expected = coder.transform(target.T)  # [N, T]

    judge = grading.Judge(torch.from_numpy(features), torch.from_numpy(vectors))
    support, coefficients = orthogonal_matching_pursuit(
        judge.atoms, judge.targets(torch.from_numpy(effects)), components
    )
    found = np.zeros_like(expected)
    for n in range(12):
        found[n, support[n]] = coefficients[n]
    if not truth:
        for matrix in (found, expected):  # of equal texts either may be chosen
            matrix[:, 3] += matrix[:, 7]
            matrix[:, 7] = 0
    assert_allclose(found, expected, atol=2e-5)
    predicted = features @ judge.direction(scipy.sparse.csr_matrix(expected)).double().numpy().T
    reference = expected @ standardised.T
    assert_allclose(predicted - predicted.mean(axis=0), reference.T - reference.T.mean(axis=0), atol=1e-5)


def test_soft_wpmi_is_its_definition(rng):
    images, texts, N = 130, 20, 6
    representations, vectors = rng.standard_normal((images, 8)), rng.standard_normal((texts, 8))
    effects = rng.standard_normal((images, N))
    cosine = (representations / np.linalg.norm(representations, axis=1, keepdims=True)) @ (
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ).T
    probability = softmax(10 * cosine, axis=1)
    log_p = np.zeros((N, texts))
    for n in range(N):
        for rank, image in enumerate(np.argsort(-effects[:, n])[:100]):
            p = 0.998 - rank / 100 * (0.998 - 0.97)
            log_p[n] += np.log(1 + p * (probability[image] - 1) + 1e-7)
    expected = log_p - np.log(np.exp(log_p - log_p.max()).mean(axis=0)) - log_p.max()
    label = grading.SoftWPMI(tensor(representations), tensor(vectors), tensor(effects))
    found = (
        torch.cat([label(slice(first, first + 7)) for first in range(0, texts, 7)], dim=1).double().numpy()
    )
    shift = found - expected  # a constant tells nothing
    assert_allclose(shift, np.broadcast_to(shift.mean(), shift.shape), atol=2e-3)
    assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))


# rows of the table


def test_directions_of_the_rows(rng):
    vectors, N = rng.standard_normal((7, 5)), 3
    written = scipy.sparse.csr_matrix(
        np.array([[0, 2, 0, -3, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0.5], [0, 0, 0, 0, 0.2, 0.1, 0]])
    )
    fired = scipy.sparse.csr_matrix(
        np.array([[1, 0, 0, 0, 0, -1, 0], [0, -2, 0, 0, 1, 0, 0], [0, 0, 3, 0, 0, 0, 1.0]])
    )
    judge = grading.Judge(torch.from_numpy(rng.standard_normal((40, 5))), torch.from_numpy(vectors))
    found = directions_of(
        judge,
        written,
        fired,
        first=np.array([5, 4, 2]),
        component=torch.ones(N, 5),
        labels=np.array([6, 0, 1], np.int32),
    )
    assert list(found) == [row for row in grading.ROWS if not row.startswith("rotated")]
    assert_allclose(found["writes"], written @ vectors, atol=1e-6)
    assert_allclose(found["one_written"], np.stack([-vectors[3], vectors[0], vectors[4]]), atol=1e-6)
    assert_allclose(found["one_fired_on"], np.stack([-vectors[5], vectors[4], vectors[2]]), atol=1e-6)
    assert_allclose(found["wpmi"], vectors[[6, 0, 1]], atol=1e-6)
    assert_array_equal(found["direction"], np.ones((N, 5)))
    for row in ("writes", "fires_on"):
        assert_array_equal(found[f"null_{row}"], found[row][[2, 0, 1]])


def test_a_neuron_without_any_text_has_no_direction(rng):
    """The pursuit takes no text for an effect that is the same on all images."""
    empty = scipy.sparse.csr_matrix((2, 7))
    judge = grading.Judge(
        torch.from_numpy(rng.standard_normal((40, 5))), torch.from_numpy(rng.standard_normal((7, 5)))
    )
    found = directions_of(judge, empty, empty, first=np.array([-1, -1]))
    assert all(not of.any() for of in found.values())
    assert grading.as_matrix([[], []], 7).nnz == 0


# what a grade must notice


@pytest.fixture(scope="module")
def known():
    """Images with 40 independent labels, and neurons that act on five of them."""
    rng = np.random.default_rng(1)
    presences = (rng.random((4000, 40)) < 0.3).astype(np.float64)
    right = np.zeros((30, 40))
    for n in range(30):
        right[n, rng.choice(40, 5, replace=False)] = rng.uniform(0.5, 1.5, 5) * rng.choice([1, 1, -1], 5)
    effects = presences @ right.T + 0.2 * rng.standard_normal((4000, 30))
    return presences, right, effects


def graded(known, description):
    presences, _, effects = known
    return grading.grades(
        torch.from_numpy(presences), torch.from_numpy(description)[None], torch.from_numpy(effects), 0.05
    )


@pytest.mark.parametrize("measure", ["pearson", "auprc"])
def test_missing_and_foreign_labels_cost(known, measure):
    """The tests that a metric of descriptions has to pass: recall fails the first, AUC the second."""
    rng, (_, right, _) = np.random.default_rng(2), known
    missing, foreign = right.copy(), right.copy()
    for n in range(len(right)):
        missing[n, rng.choice(np.flatnonzero(right[n]), 2, replace=False)] = 0
        foreign[n, rng.choice(np.flatnonzero(right[n] == 0), 5, replace=False)] = rng.choice([-1, 1], 5)
    best, less, more = (graded(known, of)[measure][0].numpy() for of in (right, missing, foreign))
    assert (less < best - 0.01).all() and (more < best - 0.01).all()


def test_a_random_description_scores_0_within_its_interval(known):
    rng, (_, right, _) = np.random.default_rng(3), known
    scores = []
    for _ in range(20):
        description = np.zeros_like(right)
        for n in range(len(right)):
            description[n, rng.choice(40, 5, replace=False)] = rng.choice([-1.0, 1.0], 5)
        scores.append(graded(known, description)["pearson"][0].numpy())
    scores = np.concatenate(scores)
    assert abs(scores.mean()) < 2.6 * scores.std() / np.sqrt(len(scores))


def test_a_summary_counts_neurons_above_the_null(rng):
    values = np.zeros((200, 2, 1))
    values[:, 1, 0] = rng.standard_normal(200)  # the null
    values[:, 0, 0] = np.where(np.arange(200) < 60, 10, -10)
    found = grading.summary(values, ["writes", "null_writes"], ["pearson"])
    assert found["writes"]["pearson"]["above_null"] == pytest.approx(0.3)
    assert found["writes"]["pearson"]["mean"] == pytest.approx(-4)
    assert found["null_writes"]["pearson"]["error"] == pytest.approx(
        values[:, 1].std(ddof=1) / np.sqrt(200), rel=1e-3
    )


# effects along directions, and the whole stage


def test_effects_along_directions_are_those_of_dense_effects(visual, vit, images):
    directions, rng = fold_layers(vit, [1])[0], np.random.default_rng(0)
    rows = {
        "a": tensor(rng.standard_normal((vit.N, vit.D))),
        "b": tensor(rng.standard_normal((vit.N, vit.D))),
    }
    with torch.inference_mode():
        _, effects = second_order(vit, images[:2], [directions])
        found = grading.Along(directions, rows)(next(effects)).numpy()
    exact = random_tower_in_float64(visual)
    for b in range(2):
        phi = definition.effects(exact, images[b].double(), 1).numpy()
        for r, row in enumerate(rows.values()):
            expected = (phi * row.double().numpy()).sum(axis=1)
            assert_allclose(found[b, r], expected, atol=2e-5 * np.abs(expected).max())


def random_tower_in_float64(visual):
    import copy

    return copy.deepcopy(visual).double()


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    return shared_world(tmp_path_factory, tiny_model)


@pytest.fixture(scope="module")
def dense(world):
    """Effects of one layer on all validation images by the definition, [images, N, D], and unit
    representations.
    """
    from utils.model.clip import load_clip

    clip = load_clip(world.model[1], "random", "cpu")
    model = create_model_like(world.model[1], clip)
    images = load_images("folder", world.photos, "val", clip.transform)
    pixels = [images[i][0].double() for i in range(len(images))]
    phi = np.stack([definition.effects(model, image, LAYER).numpy() for image in pixels])
    representations = np.stack([model(image[None])[0].numpy() for image in pixels])
    return phi, 100 * representations / np.linalg.norm(representations, axis=1, keepdims=True)


def create_model_like(config, clip):
    """open_clip's image tower of a config, with the weights of a loaded CLIP, in float64."""
    from open_clip import CLIP

    model = CLIP(**json.loads(open(config).read())).eval().requires_grad_(False)
    model.load_state_dict(clip.text.state_dict())
    return model.visual.double()


def result(world, ending):
    [path] = (world.whole / "evaluation").glob(f"*{ending}")
    return path


def described(path, texts):
    matrix = np.zeros((96, texts))
    for n, entries in json.loads(path.read_text()).items():
        for i, c, _ in entries:
            matrix[int(n), i] = c
    return matrix


def test_the_stage_s_grades_are_scipys_and_scikit_learns_of_dense_effects(world, dense):
    phi, features = dense
    pcas, mean = (
        np.load(world.base / f"folder_train_mlps_tiny_random_{LAYER}_{name}.npy")
        for name in ("5_pca", "mean")
    )
    effects = ((phi - mean) * pcas).sum(axis=2)  # [images, N]
    stored = np.load(result(world, f"val_mlps_tiny_random_{LAYER}_5_projections.npy"))
    assert_allclose(stored, effects, atol=1e-4 * np.abs(effects).max())

    vectors = np.load(world.base / "words_tiny_random.npy").astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    written = described(
        world.base / f"folder_mlps_tiny_random_{LAYER}_words_decomposition_omp_1.0_8.json", len(vectors)
    )
    fired = described(result(world, f"{LAYER}_words_fires_on_omp_8.json"), len(vectors))
    train = np.load(result(world, "train_representations_tiny_random.npy")).astype(np.float64)
    spread = np.linalg.norm((train - train.mean(axis=0)) @ vectors.T, axis=0)
    directions = {
        "writes": written @ vectors,
        "fires_on": (fired / spread) @ vectors,
        "direction": pcas.astype(np.float64),
    }
    labels = np.load(result(world, f"{LAYER}_words_fires_on_omp_8_wpmi.npy"))
    directions |= {"wpmi": vectors[labels], "null_writes": np.roll(written @ vectors, 1, axis=0)}
    directions["one_written"] = np.stack(
        [np.sign(row[i]) * vectors[i] for row in written for i in [np.abs(row).argmax()]]
    )

    path = result(world, f"val_grades_tiny_random_{LAYER}_words_8.npy")
    grades, rows = np.load(path), json.loads(path.with_suffix(".meta.json").read_text())["rows"]
    count = round(5 / 63 * len(effects))
    for row, direction in directions.items():
        found = grades[:, rows.index(row)]
        for n in range(0, 96, 7):
            own = phi[:, n] @ direction[n]
            acts = np.zeros(len(effects), bool)
            acts[np.argsort(-effects[:, n])[:count]] = True
            expected = []
            for predicted in (features @ direction[n], features @ direction[n] - own):
                expected += [
                    pearsonr(predicted, effects[:, n]).statistic,
                    average_precision_score(acts, predicted),
                ]
            expected.append((own[acts] - mean[n] @ direction[n]).mean() / np.linalg.norm(direction[n]))
            assert_allclose(found[n], expected, atol=2e-3, err_msg=f"{row} of neuron {n}")


def test_the_table_of_neurons_says_what_the_arrays_say(world):
    path = result(world, f"val_grades_tiny_random_{LAYER}_words_8.npy")
    grades, rows = np.load(path), json.loads(path.with_suffix(".meta.json").read_text())["rows"]
    with open(path.with_suffix(".csv"), newline="") as file:
        table = list(csv.DictReader(file))
    fires_on = json.loads(result(world, f"{LAYER}_words_fires_on_omp_8.json").read_text())
    for n, line in enumerate(table):
        assert float(line["fires_on auprc"]) == pytest.approx(grades[n, rows.index("fires_on"), 1], abs=1e-4)
        assert [text for text, _ in json.loads(line["fires_on"])] == [text for _, _, text in fires_on[str(n)]]
    layers = "-".join(map(str, GRADED))
    summary = json.loads(result(world, f"{layers}_words_8_summary.json").read_text())
    found = summary["neurons"][str(LAYER)]["fires_on"]["pearson_without"]["mean"]
    assert found == pytest.approx(grades[:, rows.index("fires_on"), 2].mean(), abs=1e-6)


def test_no_image_is_looked_at_where_effects_and_representations_are_stored(world, tmp_path):
    passed = contents(world.whole / "evaluation")  # made without stored representations
    world.run("representations", tmp_path)
    said = world.run("evaluation", tmp_path)
    assert len(re.findall("stored images: 100%", said)) == 1  # only of the training images
    assert len(re.findall("(?<!stored )images: 100%", said)) == 1
    found = contents(tmp_path)
    effects = [name for name in passed if "projections.npy" in name and "_train_" in name]
    assert len(effects) == 2 * len(GRADED)  # neurons and rotated units
    assert [name for name in effects if found[name] != passed[name]] == []
    # effects that another coefficient made are left alone
    other = tmp_path / "other"
    shutil.copytree(world.base, other)
    record = other / "folder_train_mlps_tiny_random_3_coefficients.meta.json"
    record.write_text(record.read_text().replace('"coefficient": 100.0', '"coefficient": 50.0'))
    world.run("representations", other)
    assert "stored images" not in world.run("evaluation", other, "--input_dir", other)


def test_the_effects_stage_writes_the_representations_too(world, tmp_path):
    for keep in ("full", "top"):
        world.run(keep, tmp_path / keep, "--representations")
        name = "folder_train_representations_tiny_random.npy"
        found, expected = (np.load(of / name) for of in (tmp_path / keep, world.whole / "representations"))
        assert_allclose(found, expected, atol=1e-4)  # of norm 100


def test_known_truth_judges_in_place_of_similarities(world, tmp_path, rng):
    """Texts that are true of images by chance; one of them is what the first neuron acts on."""
    effects = {
        s: np.load(result(world, f"{s}_mlps_tiny_random_{LAYER}_5_projections.npy")) for s in ("train", "val")
    }
    for split, of in effects.items():
        truth = rng.random((len(of), 60)) < 0.3
        truth[:, 11] = of[:, 0] > np.median(effects["train"][:, 0])
        np.save(tmp_path / f"{split}.npy", truth)
    flags = [*world.model, *world.val, "--mlp_layer", LAYER, "--top_k_pca", 5, "--text_descriptions", "words"]
    flags += ["--components", 4, "--input_dir", world.base, "--output_dir", tmp_path / "out"]
    run_stage_of_user(
        "compute_sparse_decomposition.py",
        *world.model,
        *[
            "--dataset",
            "folder",
            "--mlp_layer",
            LAYER,
            "--top_k_pca",
            5,
            "--text_descriptions",
            "words",
            "--components",
            4,
        ],
        *["--input_dir", world.base, "--output_dir", tmp_path / "out"],
        folder=tmp_path,
    )
    truths = ["--truth", tmp_path / "train.npy", tmp_path / "val.npy"]
    run_stage_of_user("evaluate_descriptions.py", *flags, *truths, folder=tmp_path)
    [path] = (tmp_path / "out").glob(f"*_{LAYER}_words_fires_on*truth.json")
    assert json.loads(path.read_text())["0"][0][0] == 11
    [path] = (tmp_path / "out").glob(f"*grades*_{LAYER}_words*truth.npy")
    rows = json.loads(path.with_suffix(".meta.json").read_text())["rows"]
    truth = np.load(tmp_path / "val.npy")
    expected = pearsonr(truth[:, 11], effects["val"][:, 0]).statistic
    assert np.load(path)[0, rows.index("one_fired_on"), 0] == pytest.approx(expected, abs=1e-5)
    np.save(tmp_path / "val.npy", truth[:, 1:])
    done = run_stage_of_user(
        "evaluate_descriptions.py", *flags, *truths, "--overwrite", folder=tmp_path, check=False
    )
    assert done.returncode == 1 and "63 val images x 60 texts, are needed" in the_line(done.stderr)


def test_training_images_are_not_graded_on(world, tmp_path):
    script, flags, _ = world.stages()["evaluation"]
    done = run_stage_of_user(
        script,
        *world.model,
        *flags,
        "--split",
        "train",
        "--output_dir",
        tmp_path,
        folder=tmp_path,
        check=False,
    )
    assert done.returncode == 1 and "give the split of the held-out images, such as val" in the_line(
        done.stderr
    )
