"""Taking neurons away, against a plain open_clip model whose weights or activations are edited."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import pearsonr

from tests import definition
from tests.launcher import run_stage_of_user, shared_world, the_line
from tests.test_controls import drawn_by_hand, pursued, unit
from utils.data.images import load_images
from utils.indirect import Acting, Deletions, agreement
from utils.model.clip import load_clip

LAYER = 3
LENGTHS = [1, 2, 4, 8]


def test_a_deletion_is_a_model_with_edited_weights(visual, vit, images):
    """Where the mean is one number for all tokens, a neuron at its mean is a bias of the MLP."""
    mean = torch.zeros(vit.T, vit.N)
    neurons = torch.tensor([3, 3, 17])
    mean[:, 3], mean[:, 17] = 0.3, -0.2
    found = Deletions(vit, 1, mean)(images[:2], torch.tensor([0, 1, 1]), neurons)
    with torch.inference_mode():
        before = torch.nn.functional.normalize(visual(images[:2]), dim=-1)
        for pair, (image, n) in enumerate(((0, 3), (1, 3), (1, 17))):
            edited = copy.deepcopy(visual)
            mlp = edited.transformer.resblocks[1].mlp
            mlp.c_proj.bias += mean[0, n] * mlp.c_proj.weight[:, n]
            mlp.c_proj.weight[:, n] = 0
            after = torch.nn.functional.normalize(edited(images[image : image + 1]), dim=-1)[0]
            expected = (100 * (before[image] - after)).numpy()
            assert_allclose(found[pair], expected, atol=1e-5 * 100)
            assert np.abs(expected).max() > 1e-3


def test_a_neuron_is_taken_away_where_it_acts_most():
    norms = np.array([[1.0, 5], [3, 5], [2, 1], [3, 4]])
    acting = Acting(norms, 2)
    pairs = sorted(zip(acting.images.tolist(), acting.places.tolist(), strict=True))
    assert pairs == [(0, 1), (1, 0), (1, 1), (3, 0)]  # of equal ones the earlier
    found = [acting.of(slice(first, first + 2)) for first in (0, 2)]
    assert [images.tolist() for images, _ in found] == [[0, 1, 1], [1]]
    assert Acting(norms, 24).count == 4


def test_agreement_is_scipys_correlation_over_texts():
    rng = np.random.default_rng(0)
    texts = rng.standard_normal((40, 8)) + 1
    lost, said = rng.standard_normal((5, 8)), rng.standard_normal((3, 5, 8))
    found = agreement(*map(torch.from_numpy, (lost, said, texts)))
    for m in range(3):
        for n in range(5):
            expected = pearsonr(texts @ lost[n], texts @ said[m, n]).statistic
            assert float(found[m, n]) == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    return shared_world(tmp_path_factory, tiny_model)


def result(world, ending):
    [path] = (world.whole / "evaluation").glob(f"*_{LAYER}_{ending}")
    return path


@pytest.fixture(scope="module")
def lost(world):
    """What deleting neurons costs, {split: {neuron: [D]}}, by hooks on the plain model, in float64."""
    clip = load_clip(*world.model[1::2], "cpu")
    visual = clip.vit.visual.double()
    splits = {s: load_images("folder", world.photos, s, clip.transform) for s in ("train", "val")}
    pixels = {s: [images[i][0].double() for i in range(len(images))] for s, images in splits.items()}
    mean = torch.stack([definition.run(visual, image).p[LAYER] for image in pixels["train"]]).mean(dim=0)
    effects = {
        split: np.stack([definition.effects(visual, image, LAYER).numpy() for image in of])
        for split, of in pixels.items()
    }
    norms = {s: np.linalg.norm(of - effects["train"].mean(axis=0), axis=2) for s, of in effects.items()}
    gelu = visual.transformer.resblocks[LAYER].mlp.gelu
    found = {"train": {}, "val": {}}
    for split, n in itertools.product(found, (0, 41, 95)):
        changes = []
        for i in np.argsort(-norms[split][:, n], kind="stable")[:24]:

            def at_mean(module, inputs, output, n=n):
                output[..., n] = mean[:, n]
                return output

            before = unit(visual(pixels[split][i][None])[0].numpy())
            handle = gelu.register_forward_hook(at_mean)
            after = unit(visual(pixels[split][i][None])[0].numpy())
            handle.remove()
            changes.append(100 * (before - after))
        found[split][n] = np.mean(changes, axis=0)
    return found


@pytest.fixture(scope="module")
def total(world, tmp_path_factory):
    """The folder of what both stages make with the total order."""
    folder = tmp_path_factory.mktemp("total")
    for name, also in (("decomposition", ["--order", "total"]), ("evaluation", ["--controls", 2])):
        script, flags, _ = world.stages()[name]
        flags = [flag for flag in flags if flag != "--evaluate"]
        flags[flags.index("--mlp_layer") + 1] = LAYER
        also += ["--output_dir", folder / "out"]
        run_stage_of_user(script, *world.model, *flags, *also, folder=folder)
    return folder / "out"


def test_the_stage_s_deletions_are_those_of_the_plain_model(world, lost):
    path = result(world, "5_deletions.npy")
    found, record = np.load(path), json.loads(path.with_suffix(".meta.json").read_text())
    assert record["neurons"] == list(range(96)) and record["images"] == 24
    for n, expected in lost["val"].items():
        assert_allclose(found[n], expected, atol=2e-3 * np.abs(expected).max())


def test_the_total_order_describes_deletions_on_training_images(world, lost, total):
    found = np.load(total / f"folder_train_mlps_tiny_random_{LAYER}_deletions.npy")
    for n, expected in lost["train"].items():
        assert_allclose(found[n], expected, atol=2e-3 * np.abs(expected).max())
    path = total / f"folder_mlps_tiny_random_{LAYER}_words_decomposition_omp_1.0_8_total.json"
    described = json.loads(path.read_text())
    texts = np.load(world.base / "words_tiny_random.npy").astype(np.float64)
    atoms = 100 * (texts - texts.mean(axis=0))
    atoms = 100 * atoms / np.linalg.norm(atoms, axis=0)
    same = []
    for n in range(0, 96, 9):
        chosen, x = pursued(atoms, unit(found[n].astype(np.float64)), 8)
        expected = dict(zip(chosen.tolist(), x.tolist(), strict=True))
        entries = {i: c for i, c, _ in described[str(n)]}
        same.append(
            entries.keys() == expected.keys() and entries == pytest.approx(expected, rel=1e-2, abs=1e-5)
        )
    assert np.mean(same) > 0.8, "but for near ties"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_total_order_is_graded_beside_second_order(world, total):
    lost = np.load(total / f"folder_val_mlps_tiny_random_{LAYER}_5_deletions.npy").astype(np.float64)
    of_train = np.load(total / f"folder_train_mlps_tiny_random_{LAYER}_deletions.npy").astype(np.float64)
    texts = unit(np.load(world.base / "words_tiny_random.npy").astype(np.float64))
    graded = total / f"folder_val_grades_tiny_random_{LAYER}_words_8"
    found = np.load(f"{graded}_total_deletion.npy")
    assert found.shape == (3, 96, 4)
    close = []
    for number, dictionary in enumerate((texts, drawn_by_hand(texts, 0))):
        atoms = 100 * (dictionary - dictionary.mean(axis=0))
        atoms = 100 * atoms / np.linalg.norm(atoms, axis=0)
        for n in range(0, 96, 9):
            for j, m in enumerate(LENGTHS):
                chosen, x = pursued(atoms, unit(of_train[n]), m)
                expected = pearsonr(texts @ lost[n], texts @ (x @ atoms[chosen])).statistic
                close.append(abs(found[number, n, j] - expected) < 2e-3)
    assert np.mean(close) > 0.98, "but for near ties"
    [path] = total.glob("*_words_8_summary.json")
    summary = json.loads(path.read_text())["deletion"][str(LAYER)]
    each = [pearsonr(texts @ d, texts @ v).statistic for d, v in zip(lost, of_train, strict=True)]
    assert summary["rows"]["total"]["mean"] == pytest.approx(np.mean(each), abs=1e-4)
    assert summary["total"]["grade"] == pytest.approx(found[0].mean(axis=0), abs=1e-5)
    table = (total / f"{graded.name}.csv").read_text().splitlines()[0]
    assert "deletion total 8 texts" in table and "deletion writes 8 texts" in table


def test_the_total_order_needs_images_to_delete_on(world, tmp_path):
    script, flags, _ = world.stages()["decomposition"]
    also = ["--order", "total", "--delete", 0, "--output_dir", tmp_path]
    done = run_stage_of_user(script, *world.model, *flags, *also, folder=tmp_path, check=False)
    assert done.returncode == 1 and the_line(done.stderr).startswith("error: --delete 0 takes no neuron away")
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_texts_and_controls_are_graded_by_deletion_as_by_scikit_learn(world):
    found = np.load(result(world, "words_8_deletion.npy")).astype(np.float64)
    lost = np.load(result(world, "5_deletions.npy")).astype(np.float64)
    r = np.load(world.base / f"folder_train_mlps_tiny_random_{LAYER}_5_pca.npy").astype(np.float64)
    texts = unit(np.load(world.base / "words_tiny_random.npy").astype(np.float64))
    close = []
    for number, dictionary in enumerate((texts, drawn_by_hand(texts, 0))):
        atoms = 100 * (dictionary - dictionary.mean(axis=0))
        atoms = 100 * atoms / np.linalg.norm(atoms, axis=0)
        for n in range(0, 96, 9):
            for j, m in enumerate(LENGTHS):
                chosen, x = pursued(atoms, r[n], m)
                expected = pearsonr(texts @ lost[n], texts @ (x @ atoms[chosen])).statistic
                close.append(abs(found[number, n, j] - expected) < 2e-3)
    assert np.mean(close) > 0.98, "but for near ties"


def test_the_summary_has_what_is_said_of_deletions(world):
    [path] = (world.whole / "evaluation").glob("*_words_8_summary.json")
    found = json.loads(path.read_text())["deletion"][str(LAYER)]
    lost = torch.from_numpy(np.load(result(world, "5_deletions.npy")))
    r = torch.from_numpy(np.load(world.base / f"folder_train_mlps_tiny_random_{LAYER}_5_pca.npy"))
    texts = unit(np.load(world.base / "words_tiny_random.npy").astype(np.float64))
    each = [pearsonr(texts @ d, texts @ v).statistic for d, v in zip(lost.numpy(), r.numpy(), strict=True)]
    assert found["rows"]["component"]["mean"] == pytest.approx(np.mean(each), abs=1e-4)
    assert found["neurons"] == 96 and set(found["rows"]) == {"component", "fires_on", "direct", "null"}
    assert_array_equal(found["writes"]["texts"], LENGTHS)


def test_without_mean_activations_one_line_says_how_to_get_them(world, tmp_path):
    inputs = tmp_path / "in"
    inputs.mkdir()
    for path in world.base.iterdir():
        if "activations" not in path.name:
            (inputs / path.name).symlink_to(path)
    script, flags, _ = world.stages()["evaluation"]
    flags = [str(flag) for flag in flags]
    flags[flags.index("--mlp_layer") + 1] = str(LAYER)
    flags[flags.index("--input_dir") + 1] = inputs
    done = run_stage_of_user(script, *world.model, *flags, "--output_dir", tmp_path / "out", folder=tmp_path)
    notes = [line for line in done.stdout.splitlines() if line.startswith("note: the mean activations")]
    assert len(notes) == 1 and "compute_second_order_neuron_prs.py" in notes[0]
    assert not list((tmp_path / "out").glob("*deletion*"))
