"""The files of the gallery: what they say is what the arrays, the model and the float64 definition say."""

import base64
import csv
import json
import re
import shlex
import shutil

import numpy as np
import pyarrow.parquet
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from open_clip import CLIP
from PIL import Image
from scipy.stats import pearsonr

from tests import definition
from tests.browser import received
from tests.launcher import GRADED, assert_same_files, run_stage_of_user, shared_world, the_line
from utils.data.images import load_images
from utils.model.clip import load_clip

LAYER, TOP, N = 3, 8, 96
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    return shared_world(tmp_path_factory, tiny_model)


@pytest.fixture(scope="module")
def folder(world):
    return world.whole / "gallery/gallery"


@pytest.fixture(scope="module")
def about(folder):
    return received(folder, "about")


@pytest.fixture(scope="module")
def details(folder):
    """Everything about the neurons of the layer."""
    return [neuron for i in range(2) for neuron in received(folder, f"{LAYER}/neurons_{i}")["neurons"]]


@pytest.fixture(scope="module")
def runs(world):
    """Every training image through the tower of the definition, and its effects [N, D]."""
    clip = load_clip(world.model[1], "random", "cpu")
    model = CLIP(**json.loads(open(world.model[1]).read())).eval().requires_grad_(False)
    model.load_state_dict(clip.text.state_dict())
    visual, images = model.visual.double(), load_images("folder", world.photos, "train", clip.transform)
    pixels = [images[i][0].double() for i in range(len(images))]
    return [
        (definition.run(visual, image), definition.effects(visual, image, LAYER).numpy()) for image in pixels
    ]


def array(world, ending):
    """An array of the earlier stages."""
    [path] = world.base.glob(f"*{ending}.npy")
    return np.load(path)


def unpacked(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


def test_top_pictures_histograms_and_numbers_are_the_arrays(world, folder, about, details):
    grid = received(folder, f"{LAYER}/layer")
    norms = array(world, f"train_mlps_tiny_random_{LAYER}_5_norm")
    assert_allclose(grid["norm"], norms.mean(axis=1), rtol=6e-3)
    assert_allclose(grid["explained"], array(world, f"train_mlps_tiny_random_{LAYER}_5_explained"), rtol=6e-3)
    y = {
        split: array(world, f"folder_{split}_mlps_tiny_random_{LAYER}_5_projections")
        for split in ("train", "val")
    }
    for n, detail in enumerate(details):
        for split, effects in y.items():
            found = {
                sign: [row for row, _, _ in detail["top"][split][sign]] for sign in ("positive", "negative")
            }
            ascending = np.sort(effects[:, n])
            assert_array_equal(effects[found["positive"], n], [y for y in ascending[::-1][:TOP] if y > 0])
            assert_array_equal(effects[found["negative"], n], [y for y in ascending[:TOP] if y < 0])
            values = [value for _, value, _ in detail["top"][split]["positive"]]
            assert_allclose(values, effects[found["positive"], n], rtol=6e-3)
            counts = np.histogram(
                effects[:, n],
                40,
                (min(x[:, n].min() for x in y.values()), max(x[:, n].max() for x in y.values())),
            )[0]
            assert detail["histogram"][split] == counts.tolist()
        four = [row for row, _, _ in detail["top"]["train"]["positive"][:4]]
        assert grid["pictures"]["rows"][4 * n : 4 * n + 4] == (four + [-1] * 4)[:4]
        assert detail["threshold"] == pytest.approx(np.sort(np.abs(y["train"][:, n]))[-5], rel=6e-3)
        share = (
            round(5 / 63 * 63) / 63
        )  # the 5 images of largest effect, of as many held-out as training images
        assert detail["auprc_chance"] == pytest.approx(share, abs=1e-4)
    assert about["splits"]["train"]["count"] == len(y["train"]) and about["layers"] == list(GRADED)


def test_maps_show_where_neurons_fire(details, runs):
    for n in range(0, N, 9):
        pictures = [
            picture for sign in ("positive", "negative") for picture in details[n]["top"]["train"][sign]
        ]
        activations = np.stack([runs[row][0].p[LAYER][1:, n].numpy().clip(0) for row, _, _ in pictures])
        found = np.stack([unpacked(levels, np.uint8) for _, _, levels in pictures])
        assert np.abs(found - 255 * activations / max(activations.max(), 1e-30)).max() <= 0.6


def test_shares_of_the_heads_are_those_of_effects_split_by_head(world, details):
    """From the stored effects: sum_b y_k y / sum_b y^2, y_k what head k adds to the effect y along the
    component.
    """
    C, values, outputs, pcas, mean = (
        array(world, f"train_mlps_tiny_random_{LAYER}_{name}").astype(np.float64)
        for name in ("coefficients", "values", "outputs", "5_pca", "mean")
    )
    by_head = np.einsum("bkn,kne,ked,nd->bkn", C, values, outputs, pcas)
    bias = array(world, f"train_mlps_tiny_random_{LAYER}_bias").astype(np.float64)
    y = by_head.sum(axis=1) + bias @ pcas.T - (mean * pcas).sum(axis=1)
    shares = np.einsum("bkn,bn->kn", by_head, y) / (y**2).sum(axis=0)
    for n, detail in enumerate(details):
        assert [layer for layer, _, _ in detail["heads"]] == [4] * 4  # of one later layer
        for _, head, share in detail["heads"]:
            assert share == pytest.approx(shares[head, n], abs=6e-3 * max(1, np.abs(shares[:, n]).max()))


def test_what_happens_without_a_neuron(world, details):
    lost = np.load(next((world.base).glob(f"folder_val_mlps_tiny_random_{LAYER}_5_deletions.npy")))
    pcas = array(world, f"train_mlps_tiny_random_{LAYER}_5_pca")
    vectors = array(world, "words_tiny_random").astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nulls = [pearsonr(vectors @ lost[n], vectors @ pcas[n - 1]).statistic for n in range(N)]
    for n, detail in enumerate(details):
        found = detail["without"]
        falls = (vectors - vectors.mean(axis=0)) @ lost[n]
        expected = pearsonr(vectors @ lost[n], vectors @ pcas[n]).statistic
        assert found["agreement"] == pytest.approx(expected, abs=6e-3)
        assert found["null"] == pytest.approx(np.mean(nulls), abs=6e-3)
        for name, sign in (("falls", 1), ("rises", -1)):
            assert [i for i, _ in found[name]] == np.argsort(-sign * falls)[:4].tolist()
            assert_allclose([x for _, x in found[name]], sign * np.sort(falls)[::-sign][:4], rtol=6e-3)


def test_classes_and_nearest_neurons(world, folder, about, details):
    classifier, pcas = array(world, "classifier_tiny_random"), {}
    for layer in about["layers"]:
        pcas[layer] = array(world, f"train_mlps_tiny_random_{layer}_5_pca")
    scores = pcas[LAYER] @ classifier
    table = received(folder, f"{LAYER}/classes")
    found = unpacked(table["values"], np.int8).reshape(-1, N) * np.array(table["scale"])[:, None] / 127
    assert np.abs(found - scores.T).max() <= 0.006 * np.abs(scores).max()
    every, places = np.concatenate(list(pcas.values())), [(layer, n) for layer in pcas for n in range(N)]
    for n, detail in enumerate(details):
        assert [c for c, _ in detail["for"]] == [c for c in np.argsort(-scores[n]) if scores[n, c] > 0]
        assert [c for c, _ in detail["against"]] == [c for c in np.argsort(scores[n]) if scores[n, c] < 0]
        cosines = dict(zip(places, every @ pcas[LAYER][n], strict=True))
        del cosines[LAYER, n]
        largest = sorted(np.abs(list(cosines.values())))[::-1][:8]
        assert_allclose([abs(cosine) for _, _, cosine in detail["nearest"]], largest, atol=6e-3)
        for layer, other, cosine in detail["nearest"]:
            assert cosine == pytest.approx(cosines[layer, other], abs=6e-3)


def test_texts_and_grades_are_those_of_the_stages(world, folder, about, details):
    grades = array(world, f"val_grades_tiny_random_{LAYER}_words_8")
    [path] = world.base.glob(f"*val_grades_tiny_random_{LAYER}_words_8.meta.json")
    rows = json.loads(path.read_text())["rows"]
    measures = ("pearson", "auprc", "pearson_without", "auprc_without", "drop")
    for side, name in (("writes", "decomposition_omp_1.0_8"), ("fires_on", "fires_on_omp_8")):
        described = json.loads(
            (world.base / f"folder_mlps_tiny_random_{LAYER}_words_{name}.json").read_text()
        )
        for n, detail in enumerate(details):
            assert [i for i, _ in detail[side]] == [i for i, _, _ in described[str(n)]]
            assert_allclose([c for _, c in detail[side]], [c for _, c, _ in described[str(n)]], rtol=6e-3)
            assert [about["texts"][i] for i, _ in detail[side]] == [text for _, _, text in described[str(n)]]
            for r, row in enumerate(rows):
                assert_allclose(
                    [detail["grades"][row][m] for m in measures], grades[n, r], rtol=6e-3, atol=1e-6
                )


def test_the_search_knows_the_neurons_whose_effects_a_text_predicts(world, folder):
    representations, vectors = (
        array(world, "train_representations_tiny_random"),
        array(world, "words_tiny_random"),
    )
    effects = array(world, f"folder_train_mlps_tiny_random_{LAYER}_5_projections")
    correlations = np.corrcoef((representations @ vectors.T).T, effects.T)[: len(vectors), len(vectors) :]
    index = received(folder, f"{LAYER}/texts")
    neurons = unpacked(index["neurons"], "<u2").reshape(len(vectors), -1)
    values = unpacked(index["correlations"], np.int8).reshape(neurons.shape) / 127
    assert_allclose(values, np.take_along_axis(correlations, neurons.astype(int), 1), atol=5e-3)
    assert_allclose(values, -np.sort(-correlations, axis=1)[:, : index["count"]], atol=5e-3)


def test_an_image_s_neurons_and_concepts_are_those_of_the_definition(world, folder, about, runs):
    mean, norms = (array(world, f"train_mlps_tiny_random_{LAYER}_{name}") for name in ("mean", "5_norm"))
    pcas = array(world, f"train_mlps_tiny_random_{LAYER}_5_pca")
    y = array(world, f"folder_train_mlps_tiny_random_{LAYER}_5_projections").astype(np.float64)
    representations = array(world, "train_representations_tiny_random")
    vectors = array(world, "words_tiny_random")
    described = {}
    for side, name in (("writes", "decomposition_omp_1.0_8"), ("fires_on", "fires_on_omp_8")):
        path = world.base / f"folder_mlps_tiny_random_{LAYER}_words_{name}.json"
        described[side] = json.loads(path.read_text())
    images = received(folder, f"{LAYER}/images_train_0")["images"]
    for (_, phi), representation, image in zip(runs, representations, images, strict=True):
        size = np.linalg.norm(phi - mean, axis=1)
        shown, thresholds = [n for n, _ in image["neurons"]], norms.min(axis=1)
        near = np.abs(size / thresholds - 1) < 1e-4  # the image that gives the threshold is not above it
        active = {int(n) for n in np.flatnonzero((size > thresholds) & ~near)}
        assert all(n in active or near[n] for n in shown)
        left = [size[n] for n in active - set(shown)]
        assert not left or (len(shown) == 24 and max(left) <= size[shown[-1]] * (1 + 1e-4))
        assert_allclose([value for _, value in image["neurons"]], size[shown], rtol=6e-3)
        along = ((phi - mean) * pcas).sum(axis=1)
        weights = {"writes": size, "fires_on": (along - y.mean(axis=0)) / y.std(axis=0)}
        for side, weight in weights.items():
            scores = {}
            for n in shown:
                for _, c, text in described[side][str(n)]:
                    scores[text] = scores.get(text, 0) + c * weight[n]
            if len(shown) < 24:
                assert len(image[side]) == min(8, len(scores))
                for i, score in image[side]:
                    assert score == pytest.approx(scores[about["texts"][i]], rel=1e-2, abs=2e-3)
        cosines = vectors @ representation / np.linalg.norm(vectors, axis=1) / np.linalg.norm(representation)
        assert_allclose([value for _, value in image["nearest"]], np.sort(cosines)[::-1][:8], atol=6e-3)
        assert_allclose([cosines[i] for i, _ in image["nearest"]], np.sort(cosines)[::-1][:8], atol=1e-5)


def test_sheets_hold_what_the_model_saw(world, folder, about):
    clip = load_clip(world.model[1], "random", "cpu")
    images, size = load_images("folder", world.photos, "val", clip.transform), about["sheet"]["size"]
    assert size == 24
    for row in (0, 17, 62):
        seen = images.picture(row).resize(
            (1, 1)
        )  # the crop keeps the mean colour of these photos' middles, roughly
        place = row % 64
        sheet = np.asarray(Image.open(folder / f"pictures/val_{row // 64}.jpg"), float)
        tile = sheet[place // 8 * size :, place % 8 * size :][:size, :size]
        pixels = (
            images[row][0].permute(1, 2, 0).numpy() * clip.transform.transforms[-1].std
            + clip.transform.transforms[-1].mean
        )
        shown = np.asarray(
            Image.fromarray(np.uint8(pixels.clip(0, 1) * 255)).resize((size, size), Image.BILINEAR), float
        )
        assert np.abs(tile - shown).mean() < 12, seen


def test_parquet_says_the_same(world, folder, about, details):
    table = pyarrow.parquet.read_table(folder / "neurons.parquet").to_pylist()
    assert [(row["layer"], row["neuron"]) for row in table] == [
        (layer, n) for layer in about["layers"] for n in range(N)
    ]
    [graded] = world.base.glob(f"*val_grades_tiny_random_{LAYER}_words_8_deletion.npy")
    by_deletion = np.load(graded)
    with open(graded.with_name(graded.name.replace("_deletion.npy", ".csv")), newline="") as file:
        of_stage = list(csv.DictReader(file))
    of_layer = table[GRADED.index(LAYER) * N :]
    for n, (row, detail) in enumerate(zip(of_layer, details, strict=True)):
        assert row["deletion writes 8 texts"] == pytest.approx(by_deletion[0, n, 3])
        assert row["deletion writes 8 texts, control"] == pytest.approx(by_deletion[1:, n, 3].mean())
        assert_allclose(
            detail["without"]["texts"], [8, by_deletion[0, n, 3], by_deletion[1:, n, 3].mean()], rtol=6e-3
        )
        for name in ("component", "fires_on", "direct", "null"):
            assert row[f"deletion {name}"] == pytest.approx(float(of_stage[n][f"deletion {name}"]), abs=6e-5)
        for side in ("writes", "fires_on"):
            assert [entry["text"] for entry in row[side]] == [about["texts"][i] for i, _ in detail[side]]
            assert_allclose(
                [entry["coefficient"] for entry in row[side]], [c for _, c in detail[side]], rtol=6e-3
            )
        assert row["train_positive"] == [image for image, _, _ in detail["top"]["train"]["positive"]]
        assert row["fires_on_pearson"] == pytest.approx(detail["grades"]["fires_on"]["pearson"], rel=6e-3)
        for j, m in enumerate(("1 text", "2 texts", "4 texts", "8 texts")):
            for side, measure in (("fires_on", "pearson"), ("writes", "share")):
                name = f"{side} {measure} {m}"
                found = [row[name], row[f"{name}, control"], row[f"{name}, better than noise"]]
                assert_allclose(np.array(found, float), detail["by_length"][side][j], rtol=6e-3, atol=1e-6)


def with_controls(world, folder, over):
    """A copy of the results whose controls are set by hand: every third neuron's grades lie over noise.

    It has fewer rotated units than neurons, as wide layers have.

    over: {"fires_on", "writes": number of texts of the largest skill}; 0 where the layer is no better.
    """
    base = shutil.copytree(world.base, folder)
    [path] = base.glob(f"*val_grades_tiny_random_{LAYER}_words_8_controls.npy")
    slots = json.loads(path.with_suffix(".meta.json").read_text())["slots"]
    values = np.full((6, N, len(slots)), 0.3, np.float32)
    values[1:] += np.linspace(-0.01, 0.01, 5, dtype=np.float32)[:, None, None]
    for i, (side, _, m) in enumerate(slots):
        if over.get(side):
            values[0, ::3, i] = 0.8 if m == over[side] else 0.4
    np.save(path, values)
    for path in base.glob(f"*val_grades_tiny_random_{LAYER}_rotated_*.npy"):
        rotated = np.load(path)
        np.save(path, rotated[:, :10] if path.name.endswith("controls.npy") else rotated[:10])
    return base


def page_of(world, output, base):
    """The columns and the details of the layer, of a gallery made from some results."""
    make(world, output, "--input_dir", base, "--mlp_layer", LAYER)
    details = [n for i in range(2) for n in received(output / "gallery", f"{LAYER}/neurons_{i}")["neurons"]]
    return received(output / "gallery", f"{LAYER}/layer"), details


def fitted(atoms, target, chosen):
    """Coefficients of the least squares fit by some atoms."""
    return np.linalg.lstsq(atoms[chosen].T.astype(np.float64), target, rcond=None)[0]


def test_texts_over_noise_are_the_first_that_were_chosen_fitted_again(world, tmp_path):
    base = with_controls(world, tmp_path / "base", {"fires_on": 4, "writes": 2})
    grid, details = page_of(world, tmp_path / "out", base)
    vectors = array(world, "words_tiny_random").astype(np.float64)
    representations = array(world, "train_representations_tiny_random")
    y = array(world, f"folder_train_mlps_tiny_random_{LAYER}_5_projections").astype(np.float64)
    presences = vectors / 100 @ (representations - representations.mean(axis=0)).T.astype(np.float64)
    centred = vectors - vectors.mean(axis=0)
    fits = {  # atoms, targets
        "fires_on": (
            presences / np.linalg.norm(presences, axis=1, keepdims=True),
            ((y - y.mean(axis=0)) / np.linalg.norm(y - y.mean(axis=0), axis=0)).T,
        ),
        "writes": (
            100 * centred / np.linalg.norm(centred, axis=0),
            array(world, f"train_mlps_tiny_random_{LAYER}_5_pca"),
        ),
    }
    for side, name, m in (("fires_on", "fires_on_omp_8", 4), ("writes", "decomposition_omp_1.0_8", 2)):
        judged = {"lengths": [1, 2, 4, 8], "justified": m, "better": N // 3, "chance": 0, "controls": 5}
        assert grid[side]["judged"] == judged and grid[side]["shown"] == m
        assert grid[side]["better"] == [1, 0, 0] * (N // 3)
        assert_allclose(grid[side]["grade"], np.where(np.arange(N) % 3, 0.3, 0.8))
        assert_allclose(grid[side]["control"], 0.3, rtol=1e-3)
        support = np.load(base / f"folder_mlps_tiny_random_{LAYER}_words_{name}.npz")["support"]
        texts = np.reshape(grid[side]["texts"], (N, m))
        values = np.reshape(grid[side]["coefficients"], (N, m))
        for n, detail in enumerate(details):
            if n % 3:
                assert detail["shown"][side] == [] and (texts[n] == -1).all()
                continue
            assert detail["shown"][side] == [list(pair) for pair in zip(texts[n], values[n], strict=True)]
            chosen = support[n, :m]
            atoms, targets = fits[side]
            expected = dict(zip(chosen, fitted(atoms, targets[n], chosen), strict=True))
            sizes = np.abs(values[n])
            assert set(texts[n]) == set(expected) and (sizes == np.sort(sizes)[::-1]).all()
            assert_allclose(values[n], [expected[i] for i in texts[n]], rtol=1e-2)
    by_deletion = np.load(base / f"folder_val_grades_tiny_random_{LAYER}_words_8_deletion.npy")
    for n, detail in enumerate(details):
        expected = [2, by_deletion[0, n, 1], by_deletion[1:, n, 1].mean()]
        assert_allclose(detail["without"]["texts"], expected, rtol=6e-3, atol=1e-6)


def test_an_order_of_choice_of_other_texts_is_refused(world, tmp_path):
    base = with_controls(world, tmp_path / "base", {"writes": 2})
    [path] = base.glob(f"*tiny_random_{LAYER}_words_decomposition_omp_1.0_8.npz")
    content = dict(np.load(path))
    content["support"] = np.roll(content["support"], 1, axis=0)
    np.savez(path, **content)
    done = make(world, tmp_path / "out", "--input_dir", base, "--mlp_layer", LAYER, check=False)
    line = the_line(done.stderr)
    assert done.returncode == 1 and "is of other texts than the .json beside it" in line
    assert "make both again with: python compute_sparse_decomposition.py" in line


def test_a_layer_no_better_than_noise_shows_no_text(world, tmp_path):
    grid, details = page_of(world, tmp_path / "out", with_controls(world, tmp_path / "base", {}))
    for side in ("fires_on", "writes"):
        assert grid[side]["judged"]["justified"] == grid[side]["shown"] == 0
        assert grid[side]["texts"] == [] and "grade" not in grid[side]
        assert all(detail["shown"][side] == [] and len(detail[side]) > 0 for detail in details)


def test_results_without_controls_are_not_graded(world, tmp_path):
    """Of one layer; the others still are."""
    base = shutil.copytree(world.base, tmp_path / "base")
    for path in {*base.glob(f"*_{LAYER}_*_controls.*"), *base.glob(f"*_{LAYER}_rotated_*")}:
        path.unlink()
    make(world, tmp_path / "out", "--input_dir", base)
    folder = tmp_path / "out/gallery"
    grid, other = (received(folder, f"{layer}/layer") for layer in (LAYER, GRADED[0]))
    details = received(folder, f"{LAYER}/neurons_0")["neurons"]
    for side in ("fires_on", "writes"):
        assert set(grid[side]) == {"shown", "texts", "coefficients"} and grid[side]["shown"] == 8
        assert grid[side]["texts"][:8] == [i for i, _ in details[0][side]]
        assert "judged" in other[side]
    assert all(detail["shown"] == detail["by_length"] == {} for detail in details)
    assert grid["rotated"] == grid["rotated_by_length"] == grid["blind"] == {}
    column = pyarrow.parquet.read_table(folder / "neurons.parquet")["writes share 2 texts, better than noise"]
    assert [value is None for value in column.to_pylist()] == [False] * N + [True] * N


def test_a_single_control_dictionary_shows_no_spread_and_is_not_graded(world, tmp_path):
    base = shutil.copytree(world.base, tmp_path / "base")
    for path in base.glob(f"*val_grades_tiny_random_{LAYER}_words_8_controls.npy"):
        np.save(path, np.load(path)[:2])
    grid, _ = page_of(world, tmp_path / "out", base)
    assert "judged" not in grid["fires_on"] and "judged" not in grid["writes"]


def test_grades_by_length_and_of_rotated_units_are_those_of_the_stage(world, folder, details):
    grades = {}
    for units in ("", "rotated_"):
        [path] = world.base.glob(f"*val_grades_tiny_random_{LAYER}_{units}words_8_controls.npy")
        slots = json.loads(path.with_suffix(".meta.json").read_text())["slots"]
        grades[units] = slots, np.load(path)
    grid = received(folder, f"{LAYER}/layer")
    for side, measure in (("fires_on", "pearson"), ("writes", "share"), ("wpmi", "pearson")):
        found = {}
        for units, (slots, values) in grades.items():
            found[units] = values[..., [i for i, slot in enumerate(slots) if slot[:2] == [side, measure]]]
        own = np.array([detail["by_length"][side] for detail in details])
        assert_allclose(own[..., 0], found[""][0], rtol=6e-3, atol=1e-6)
        assert_allclose(own[..., 1], found[""][1:].mean(axis=0), rtol=6e-3, atol=1e-6)
        if side != "wpmi":
            means = found["rotated_"][0].mean(axis=0)
            assert_allclose(grid["rotated_by_length"][side], means, rtol=6e-3)
    rotated = array(world, f"val_grades_tiny_random_{LAYER}_rotated_words_8").mean(axis=0)
    assert grid["rotated"]["rotated_writes"]["pearson"] == pytest.approx(rotated[0, 0], rel=6e-3, abs=1e-4)


def make(world, output, *more, check=True):
    """Make a gallery in a process of its own."""
    script, flags, _ = world.stages()["gallery"]
    words = [script, *world.model, *flags, "--output_dir", output, *more]
    return run_stage_of_user(*words, folder=output.parent, check=check)


def test_a_second_run_leaves_the_same_bytes_and_other_results_are_not_replaced_by_chance(world, tmp_path):
    output = tmp_path / "out"
    make(world, output)
    assert_same_files(output, world.whole / "gallery")
    kept = shutil.copytree(output, tmp_path / "kept")
    make(world, output, "--overwrite")
    assert_same_files(output, kept)
    done = make(world, output, "--picture_size", 16, check=False)
    assert (
        done.returncode == 1
        and "made with other size; choose another --output_dir, or add --overwrite" in the_line(done.stderr)
    )
    assert_same_files(output, kept)


def test_a_folder_that_is_no_gallery_is_left_alone(world, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    done = make(world, tmp_path / "out", "--gallery", tmp_path / "mine", check=False)
    assert done.returncode == 1 and "is there and is no gallery; choose another --gallery" in the_line(
        done.stderr
    )
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_what_others_have_put_into_a_gallery_is_kept_and_nothing_else_is_touched(world, tmp_path):
    """A domain name and a history, as web hosts want them; a folder that is called like the one of the parts;
    a file.
    """
    output = shutil.copytree(world.whole / "gallery", tmp_path / "out")
    (output / "gallery/CNAME").write_text("neurons.example.org")
    (output / "gallery/.git").mkdir()
    (output / "gallery/.git/HEAD").write_text("ref: refs/heads/main")
    make(world, output, "--picture_size", 16, "--overwrite")
    assert received(output / "gallery", "about")["sheet"]["size"] == 16
    assert (output / "gallery/CNAME").read_text() == "neurons.example.org" and (
        output / "gallery/.git/HEAD"
    ).is_file()
    (output / "mine.parts").mkdir()
    (output / "mine.parts/thesis.tex").write_text("years of work")
    for gallery, said in (
        (output / "mine", "mine.parts is there"),
        (output / "gallery/CNAME", "is a file"),
        ("/", "root"),
    ):
        done = make(world, output, "--gallery", gallery, check=False)
        assert done.returncode == 1 and said in the_line(done.stderr)
    assert (output / "mine.parts/thesis.tex").read_text() == "years of work"


def test_descriptions_of_earlier_components_are_refused(world, tmp_path):
    base = shutil.copytree(world.base, tmp_path / "base")
    [path] = base.glob(f"*train_mlps_tiny_random_{LAYER}_5_pca.npy")
    np.save(path, np.roll(np.load(path), 1, axis=0))
    for stage in ("evaluation", "gallery"):
        script, flags, _ = world.stages()[stage]
        words = [script, *world.model, *flags, "--input_dir", base, "--output_dir", tmp_path / "out"]
        done = run_stage_of_user(*words, folder=tmp_path, check=False)
        line = the_line(done.stderr)
        assert done.returncode == 1 and "decomposition_omp" in line and "was made with targets" in line


def test_grades_of_other_descriptions_are_refused(world, tmp_path):
    """The decomposition was made again, with other texts, after the grades."""
    base = shutil.copytree(world.base, tmp_path / "base")
    path = base / f"folder_mlps_tiny_random_{LAYER}_words_decomposition_omp_1.0_8.json"
    content = json.loads(path.read_text())
    content["5"] = content["5"][:3]
    path.write_text(json.dumps(content))
    done = make(world, tmp_path / "out", "--input_dir", base, check=False)
    assert (
        done.returncode == 1
        and "val_grades" in the_line(done.stderr)
        and "was made with descriptions" in the_line(done.stderr)
    )


def test_training_images_are_those_of_the_components(world, tmp_path):
    done = make(world, tmp_path / "out", "--train_subsample", 2, check=False)
    line = the_line(done.stderr)
    assert (
        done.returncode == 1
        and "is of other training images than the 31 in" in line
        and "--train_subsample" in line
    )


def test_what_is_missing_is_made_by_the_command_that_is_printed(world, tmp_path):
    """Although the grades that the projections were made for are there."""
    output = tmp_path / "out"
    shutil.copytree(world.base, output)
    [lost] = output.glob(f"*val_mlps_tiny_random_{LAYER}_5_projections.npy")
    kept = lost.read_bytes()
    lost.unlink()
    script, flags, _ = world.stages()["gallery"]
    flags = [str(word) for word in flags]
    at = flags.index("--input_dir")
    words = [script, *world.model, *flags[:at], *flags[at + 2 :], "--output_dir", output]
    done = run_stage_of_user(*words, folder=tmp_path)
    assert lost.read_bytes() == kept
    [typed] = re.findall(r"^\$ (.*)$", done.stdout, re.MULTILINE)
    script, *flags = shlex.split(typed)[1:]
    assert script == "evaluate_descriptions.py"
    lost.unlink()
    run_stage_of_user(script, *flags, folder=tmp_path)
    assert lost.read_bytes() == kept
    done = run_stage_of_user(*words, folder=tmp_path)
    assert "kept" in done.stdout and "\n$ " not in done.stdout


def test_without_pictures_nothing_of_an_image_is_written(world, tmp_path):
    make(world, tmp_path / "out", "--no_pictures")
    folder = tmp_path / "out/gallery"
    assert received(folder, "about")["sheet"] is None
    assert not [
        path for path in folder.rglob("*") if path.suffix in (".jpg", ".png") or path.name == "pictures"
    ]
    assert "0003.JPEG" not in (folder / "data/about.js").read_text()


def test_foreign_names_stay_text_from_the_class_names_to_the_page(world, browser, tmp_path):
    """Class names and texts that are markup, through all stages that hand them on."""
    from tests.browser import checked_page

    out, texts = tmp_path / "out", tmp_path / "words.txt"
    shutil.copytree(
        world.base, out, ignore=shutil.ignore_patterns("*classifier*", "words*", "*_words_*", "*grades*")
    )
    names = [HOSTILE, "</script><script>alert(1)</script>", '" onload="alert(1)', "it's &amp; more"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    texts.write_text("\n".join([HOSTILE, "</script><b>", *(f"text {i}" for i in range(30))]))
    data = ["--dataset", "folder", "--data_path", world.photos]
    same = [*world.model, *data, "--output_dir", out]
    described = ["--mlp_layer", LAYER, "--top_k_pca", 5, "--text_descriptions", texts, "--components", 8]
    for words in (
        ["compute_classifier_projection.py", *same, "--class_names", tmp_path / "names.txt"],
        ["compute_text_set_projection.py", *world.model, "--text_descriptions", texts, "--output_dir", out],
        ["compute_sparse_decomposition.py", *same, *described],
        ["evaluate_descriptions.py", *same, *described, "--num_workers", 0],
        ["make_gallery.py", *same, *described, "--num_workers", 0],
    ):
        if words[0] == "make_gallery.py":
            for path in out.glob("*_controls.npy"):
                path.unlink()  # not graded: nothing is over noise here, and the search would find no text
        run_stage_of_user(*words, folder=tmp_path)
    folder = out / "gallery"
    assert received(folder, "about")["class_names"] == names
    for page in checked_page(browser, folder):
        for address in ("#3?sort=for&class=0", "#image/train/0", "#3/5", "#3?q=%3C%2Fscript%3E"):
            page.open(address)
            assert (
                page.script("return document.querySelectorAll('main img, main b, main script').length") == 0
            )
        assert page.script("return document.querySelectorAll('mark').length") > 0
        page.open("#image/train/0")
        assert page.title() == f"Image 0 of train: {HOSTILE}"
