"""PCA and ablations against plain numpy on the dense effects."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from sklearn.datasets import load_sample_images

import compute_pcas
from tests.conftest import run_script
from utils.ablation import ABLATIONS, Ablations, Rebuilt, accuracies
from utils.effects import FORMS, open_effects
from utils.norms import CentredNorms
from utils.pca import principal_directions
from utils.prs import Directions, SecondOrder, fold, second_order
from utils.runtime.errors import UserError
from utils.runtime.layers import stored_layers
from utils.runtime.records import save_array
from utils.runtime.results import Results
from utils.statistics import Statistics

LAYER, K = 1, 7


@pytest.fixture(scope="module")
def many(vit):
    """Effects of 40 images: representation, the factorised effects, and the dense ones in float64."""
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    representation, [phi] = second_order(vit, images, [fold(vit, LAYER)])
    return representation, phi, in_double(phi).dense().numpy()


def in_double(phi):
    directions = Directions(LAYER, phi.directions.values.double(), phi.directions.outputs.double(), None)
    return SecondOrder(phi.C.double(), phi.kappa.double(), directions)


@pytest.fixture
def store(many, tmp_path):
    """The effects in both forms, in two folders: Results of the factorised and of the dense one."""
    _, phi, dense = many
    factorised, merged = (Results(tmp_path / kind, "tiny", "random") for kind in ("factorised", "merged"))
    for results in (factorised, merged):
        results.directory.mkdir()
    parts = {
        "coefficients": phi.C,
        "bias": phi.kappa,
        "values": phi.directions.values,
        "outputs": phi.directions.outputs,
    }
    for part, tensor in parts.items():
        save_array(factorised.path(part, dataset="folder", layer=LAYER), tensor.numpy(), {})
    np.save(
        merged.path("merged", dataset="folder", layer=LAYER), dense.astype(np.float32)
    )  # as the published code leaves it
    return factorised, merged


def compute(store, folder, k, memory=0.25):
    """Run compute_pcas.py in this process; returns a reader of what it wrote."""
    where = {
        "input_dir": str(store.directory),
        "output_dir": str(folder),
        "model": "tiny",
        "pretrained": "random",
    }
    asked = {
        "dataset": "folder",
        "mlp_layer": [str(LAYER)],
        "top_k_pca": k,
        "memory": memory,
        "device": "cpu",
        "overwrite": False,
    }
    compute_pcas.main(Namespace(**where, **asked))
    results = Results(folder, "tiny", "random")
    return lambda kind: np.load(results.path(kind, dataset="folder", layer=LAYER, k=k))


def numpy_statistics(phi, k):
    """Plain numpy: mean [N, D], first components [N, D], ascending norms [N, k], all norms [images, N]."""
    mean = phi.mean(axis=0)
    norms = np.linalg.norm(phi - mean, axis=-1)
    pcas, top_norms = [], []
    for n in range(phi.shape[1]):
        top = np.argsort(norms[:, n])[-k:]
        rows = (phi - mean)[top, n]
        r = np.linalg.svd(rows, full_matrices=False)[2][0]
        positive = (rows @ r > 0).sum()
        pcas.append(r if positive > k / 2 else -r)
        top_norms.append(np.sort(norms[top, n]))
    return mean, np.stack(pcas), np.stack(top_norms), norms


@pytest.mark.parametrize("memory", [1, 4e-5])  # all neurons at once, a few at a time
@pytest.mark.parametrize("form", [0, 1], ids=["factorised", "dense"])
def test_statistics_equal_numpys_svd_on_the_dense_effects(many, store, tmp_path, form, memory):
    phi = many[-1]
    read = compute(store[form], tmp_path, K, memory)
    mean, pcas, top_norms, norms = numpy_statistics(phi, K)
    assert_allclose(read("mean"), mean, atol=1e-5 * np.abs(phi).max())
    assert_allclose(read("norm"), top_norms, rtol=1e-4)
    assert_allclose(read("image_norms"), norms, rtol=1e-3, atol=1e-5 * norms.max())
    assert_allclose(np.abs((read("pca") * pcas).sum(axis=1)), 1, atol=1e-5)
    assert_allclose(read("pca"), pcas, atol=2e-3)  # the sign rule included: K is odd, so there are no ties
    assert (read("explained") > 0).all() and (read("explained") <= 1).all()
    assert {read(kind).dtype for kind in ("mean", "pca", "norm", "image_norms", "explained")} == {
        np.dtype("f4")
    }


def test_the_sign_makes_more_than_half_of_the_rows_positive():
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.standard_normal((50, 9, 12)) + 0.3)
    r, explained = principal_directions(rows)
    projections = torch.einsum("nkd,nd->nk", rows.float(), r)
    assert ((projections > 0).sum(dim=1) > 4.5).all()
    singular = np.linalg.svd(rows.numpy(), compute_uv=False)
    assert_allclose(explained.numpy(), singular[:, 0] ** 2 / (singular**2).sum(axis=1), rtol=1e-5)


def test_norms_are_right_where_there_are_more_heads_than_dimensions():
    generator = torch.Generator().manual_seed(0)
    values, outputs = torch.randn(40, 6, 3, generator=generator), torch.randn(40, 3, 8, generator=generator)
    C, kappa = torch.randn(9, 40, 6, generator=generator), torch.randn(9, 8, generator=generator)
    directions = Directions(0, values, outputs, None)
    phi = in_double(SecondOrder(C, kappa, directions)).dense()
    mean = phi.mean(dim=0)
    norms = CentredNorms(directions, mean.float())(SecondOrder(C, kappa, directions))
    assert_allclose(norms, (phi - mean).norm(dim=-1), rtol=1e-4)


def test_a_tie_of_signs_is_broken_by_the_sum():
    rows = torch.tensor([[[3.0, 0.0], [-1.0, 0.1]], [[-3.0, 0.0], [1.0, 0.1]]])
    r, _ = principal_directions(rows)
    assert r[0, 0] > 0.99 and r[1, 0] < -0.99


@pytest.mark.parametrize(("k", "D"), [(4, 30), (30, 4)])
def test_directions_agree_with_numpy_whichever_side_is_longer(k, D):
    rows = np.random.default_rng(1).standard_normal((5, k, D))
    r, _ = principal_directions(torch.from_numpy(rows))
    for mine, row in zip(r.numpy(), rows, strict=True):
        assert abs(mine @ np.linalg.svd(row)[2][0]) > 1 - 1e-6


def test_a_neuron_without_effects_has_no_direction_and_no_nan():
    r, explained = principal_directions(torch.zeros(2, 5, 8))
    assert torch.isfinite(r).all() and torch.isfinite(explained).all()


@pytest.mark.parametrize("keep", ["full", "top"])
def test_copies_of_one_picture_leave_zeros_as_one_picture_does(tmp_path, tiny_model, keep):
    """What is left of their effects is rounding, whose directions would be described."""
    folder, output = tmp_path / "photos/train/a", tmp_path / "out"
    folder.mkdir(parents=True)
    for i in range(12):
        Image.fromarray(load_sample_images().images[0]).resize((40, 40)).save(folder / f"{i:02d}.png")
    model = ["--model", tiny_model, "--pretrained", "random", "--output_dir", output, "--device", "cpu"]
    layer = ["--dataset", "folder", "--mlp_layer", 1, "--top_k_pca", 5]
    images = [
        "--data_path",
        tmp_path / "photos",
        "--num_workers",
        0,
        "--batch_size",
        5,
    ]  # the last batch is smaller
    run_script("compute_second_order_neuron_prs.py", *model, *layer, *images, "--keep", keep)
    printed = run_script("compute_pcas.py", *model, *layer).stdout
    assert "the first component explains 0.0 %" in printed
    found = {
        kind: np.load(next(output.glob(f"*_1_{kind}.npy")))
        for kind in ("5_pca", "5_norm", "5_explained", "mean")
    }
    assert not found["5_pca"].any() and not found["5_norm"].any() and not found["5_explained"].any()
    assert (np.linalg.norm(found["mean"], axis=1) > 0).all()


def test_too_few_images_for_the_components_are_refused(store, tmp_path):
    with pytest.raises(UserError, match="40 images"):
        compute(store[0], tmp_path, 41)
    assert not list(tmp_path.glob("*.npy*"))


def test_parts_of_a_store_that_do_not_belong_together_are_refused(store):
    path = store[0].path("bias", dataset="folder", layer=LAYER)
    np.save(path, np.load(path)[:-1])
    with pytest.raises(UserError, match="bias.npy has the shape 39 x 24 where 40 x 24"):
        open_effects(store[0], "folder", "train", LAYER)


def test_all_layers_are_found_by_their_files(store):
    def found(results, dataset="folder"):
        return stored_layers(results, FORMS, ["all"], dataset=dataset)

    assert found(store[0]) == [LAYER] == found(store[1])
    other = Results(store[0].directory, "tiny", "random_7")  # weights whose name begins alike are others
    save_array(other.path("merged", dataset="folder", layer=2), np.zeros(1), {})
    assert found(store[0]) == [LAYER]
    with pytest.raises(
        UserError, match="make them with: python compute_second_order_neuron_prs.py .*--mlp_layer all"
    ):
        found(store[0], "imagenet")


def test_ablations_equal_plain_numpy_on_the_dense_effects(many):
    representation, factorised, phi = many
    mean, pcas, top_norms, _ = numpy_statistics(
        phi[:25], K
    )  # the statistics are of other images than the last 15
    statistics = Statistics(*(torch.from_numpy(a).float() for a in (mean, pcas, top_norms[:, 0])))
    unit = 100 * representation / representation.norm(dim=-1, keepdim=True)
    directions = factorised.directions
    held_out = SecondOrder(factorised.C[25:], factorised.kappa[25:], directions)
    ours = Ablations(directions, statistics)(unit[25:], held_out).numpy()

    held_out, unit = phi[25:], unit[25:].double().numpy()
    c = held_out - mean
    base = unit - held_out.sum(axis=1) + mean.sum(axis=0)
    large = np.linalg.norm(c, axis=-1) > top_norms[:, 0]
    assert 0.02 < large.mean() < 0.98
    truth = {
        "baseline": unit,
        "without all effects": base,
        "without significant effects": base + (c * ~large[..., None]).sum(axis=1),
        "without insignificant effects": base + (c * large[..., None]).sum(axis=1),
        "reconstructed from PC": base + np.einsum("ind,nd,ne->ie", c, pcas, pcas),
    }
    classifier = np.random.default_rng(2).standard_normal((24, 50))
    for i, name in enumerate(ABLATIONS):
        assert_allclose(
            ours[:, i] @ classifier,
            truth[name] @ classifier,
            atol=2e-4 * np.abs(truth[name] @ classifier).max(),
        )
    assert np.abs(truth["without all effects"] - unit).max() > 0.1  # there was something to ablate


def test_rebuilding_does_not_divide_by_the_vectors_norm(many):
    _, factorised, phi = many
    mean = torch.from_numpy(phi.mean(axis=0)).float()
    vectors = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))  # far from unit
    ours = Rebuilt(factorised.directions, mean, vectors).projected(factorised).double().numpy()
    c, v = phi - phi.mean(axis=0), vectors.double().numpy()
    truth = np.einsum("ind,nd,ne->ie", c, v, v)
    assert_allclose(ours, truth, atol=1e-4 * np.abs(truth).max())


def test_accuracies_count_each_layer_and_ablation_alone():
    predictions = np.array(
        [[[1, 2], [0, 0]], [[1, 1], [3, 0]], [[0, 3], [3, 3]], [[1, 2], [3, 1]]]
    )  # 4 images, 2 layers, 2 each
    assert accuracies(predictions, np.array([1, 1, 0, 2])) == [[75.0, 50.0], [0.0, 0.0]]


@pytest.mark.parametrize("size", [0.0, 0.01, 1.0])  # of kappa beside that of the effects
def test_insignificant_effects_are_those_at_most_at_the_threshold(size):
    """The norms are those of the dense effects in float64; kappa decides some of them, few, or none."""
    generator = torch.Generator().manual_seed(3)
    values, outputs = torch.randn(4, 300, 3, generator=generator), torch.randn(4, 3, 20, generator=generator)
    C = torch.randn(40, 4, 300, generator=generator) + 2
    kappa = size * (torch.randn(40, 20, generator=generator) + 1)
    directions = Directions(0, values, outputs, None)
    phi = SecondOrder(C, kappa, directions)
    dense = in_double(phi).dense()
    mean = dense.mean(dim=0)
    norms = (dense - mean).norm(dim=-1)
    thresholds = norms.quantile(0.8, dim=0)
    found = Ablations(directions, Statistics(mean.float(), mean.float(), thresholds.float())).are_small(phi)
    decided = (norms / thresholds - 1).abs() > 1e-5
    assert decided.double().mean() > 0.99
    assert torch.equal(found[decided], (norms <= thresholds)[decided])
