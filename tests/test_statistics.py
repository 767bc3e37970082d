"""PCA and ablations against plain numpy on the dense effects."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from utils.ablation import ABLATIONS, Ablations, Rebuilt, Statistics
from utils.artifacts import Names, save_array
from utils.effects import open_effects, stored_layers
from utils.errors import UserError
from utils.pca import principal_directions, write_statistics
from utils.prs import CentredNorms, Directions, dense, fold, second_order

LAYER, K = 1, 7


@pytest.fixture(scope="module")
def many(vit):
    """Effects of 40 images: representation, C, kappa, directions, and the dense effects in float64."""
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    directions = fold(vit, LAYER)
    representation, [(C, kappa)] = second_order(vit, images, [directions])
    wide = type(directions)(LAYER, directions.values.double(), directions.outputs.double(), None)
    return representation, C, kappa, directions, dense(C.double(), kappa.double(), wide).numpy()


@pytest.fixture
def store(many, tmp_path):
    """The effects in both forms, in two directories: Names of the factorised and of the dense one."""
    _, C, kappa, directions, phi = many
    factorised, merged = (Names(tmp_path / kind, "tiny", "random") for kind in ("factorised", "merged"))
    for names in (factorised, merged):
        names.directory.mkdir()
    parts = {"coefficients": C, "bias": kappa, "values": directions.values, "outputs": directions.outputs}
    for part, tensor in parts.items():
        save_array(factorised.effects("folder", "train", LAYER, part), tensor.numpy(), {})
    np.save(merged.effects("folder", "train", LAYER, "merged"), phi.astype(np.float32))  # as the published code leaves it
    return factorised, merged


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


@pytest.mark.parametrize("memory", [1e9, 4e4])  # all neurons at once, a few at a time
@pytest.mark.parametrize("form", [0, 1], ids=["factorised", "dense"])
def test_statistics_equal_numpys_svd_on_the_dense_effects(many, store, tmp_path, form, memory):
    phi = many[-1]
    results = Names(tmp_path, "tiny", "random")
    share = write_statistics(store[form], results, "folder", [LAYER], K, memory)[LAYER]
    mean, pcas, top_norms, norms = numpy_statistics(phi, K)

    def read(part):
        return np.load(results.statistics("folder", LAYER, part))

    assert_allclose(read("mean"), mean, atol=1e-5 * np.abs(phi).max())
    assert_allclose(read(f"{K}_norm"), top_norms, rtol=1e-4)
    assert_allclose(read("image_norms"), norms, rtol=1e-3, atol=1e-5 * norms.max())
    assert_allclose(np.abs((read(f"{K}_pca") * pcas).sum(axis=1)), 1, atol=1e-5)
    assert_allclose(read(f"{K}_pca"), pcas, atol=2e-3)  # the sign rule included: K is odd, so there are no ties
    assert 0 < share <= 1 and {read(part).dtype for part in ("mean", f"{K}_pca", f"{K}_norm", "image_norms")} == {np.dtype("f4")}


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
    wide = Directions(0, values.double(), outputs.double(), None)
    phi = dense(C.double(), kappa.double(), wide)
    mean = phi.mean(dim=0)
    norms = CentredNorms(directions, mean.float())(C, kappa)
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


def test_too_few_images_for_the_components_are_refused(store, tmp_path):
    with pytest.raises(UserError, match="40 images"):
        write_statistics(store[0], Names(tmp_path, "tiny", "random"), "folder", [LAYER], 41, 1e9)
    assert not list(tmp_path.glob("*.npy*"))


def test_parts_of_a_store_that_do_not_belong_together_are_refused(store):
    names = store[0]
    path = names.effects("folder", "train", LAYER, "bias")
    np.save(path, np.load(path)[:-1])
    with pytest.raises(UserError, match="bias.npy has the shape 39 x 24 where 40 x 24"):
        open_effects(names, "folder", "train", LAYER)


def test_all_layers_are_found_by_their_files(store):
    parts = ("coefficients", "merged")
    assert (
        stored_layers(store[0], "folder", ["all"], parts, "compute_second_order_neuron_prs.py")
        == [LAYER]
        == stored_layers(store[1], "folder", ["all"], parts, "compute_second_order_neuron_prs.py")
    )
    save_array(Names(store[0].directory, "tiny", "random_7").effects("folder", "train", 2, "merged"), np.zeros(1), {})
    assert stored_layers(store[0], "folder", ["all"], parts, "compute_second_order_neuron_prs.py") == [
        LAYER
    ]  # weights whose name begins alike are others
    with pytest.raises(UserError, match="compute_second_order_neuron_prs.py"):
        stored_layers(store[0], "imagenet", ["all"], parts, "compute_second_order_neuron_prs.py")


def test_ablations_equal_plain_numpy_on_the_dense_effects(many):
    representation, C, kappa, directions, phi = many
    mean, pcas, top_norms, _ = numpy_statistics(phi[:25], K)  # the statistics are of other images than the last 15
    statistics = Statistics(*(torch.from_numpy(a).float() for a in (mean, pcas, top_norms[:, 0])))
    unit = 100 * representation / representation.norm(dim=-1, keepdim=True)
    ours = Ablations(directions, statistics)(unit[25:], C[25:], kappa[25:]).numpy()

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
        assert_allclose(ours[:, i] @ classifier, truth[name] @ classifier, atol=2e-4 * np.abs(truth[name] @ classifier).max())
    assert np.abs(truth["without all effects"] - unit).max() > 0.1  # there was something to ablate


def test_rebuilding_does_not_divide_by_the_vectors_norm(many):
    representation, C, kappa, directions, phi = many
    mean = torch.from_numpy(phi.mean(axis=0)).float()
    vectors = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))  # far from unit
    ours = Rebuilt(directions, mean, vectors).projected(C, kappa).double().numpy()
    c, v = phi - phi.mean(axis=0), vectors.double().numpy()
    truth = np.einsum("ind,nd,ne->ie", c, v, v)
    assert_allclose(ours, truth, atol=1e-4 * np.abs(truth).max())
