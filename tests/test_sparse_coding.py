"""Orthogonal matching pursuit against scikit-learn."""

import json
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from numpy.testing import assert_allclose
from sklearn.decomposition import SparseCoder

from utils.descriptions import load_support, save_descriptions
from utils.omp import make_atoms, orthogonal_matching_pursuit, rebuilt_from
from utils.runtime.errors import UserError


def vectors(texts, D, seed=0):
    """Made-up text vectors: with a common part and a falling spectrum, as real ones."""
    rng = np.random.default_rng(seed)
    raw = (
        rng.standard_normal((texts, D))
        * np.linspace(2, 0.1, D)
        @ np.linalg.qr(rng.standard_normal((D, D)))[0]
        + 1.0
    )
    return torch.from_numpy(100 * raw / np.linalg.norm(raw, axis=1, keepdims=True)).float()


def code(atoms, targets, n_nonzero, **options):
    support, coefficients = orthogonal_matching_pursuit(atoms, targets, n_nonzero, **options)
    dense = np.zeros((len(targets), len(atoms)))
    for n in range(len(targets)):
        for index, value in zip(support[n].tolist(), coefficients[n].tolist(), strict=True):
            if index >= 0:
                assert dense[n, index] == 0
                dense[n, index] = value
    return support.numpy(), dense


def sklearn_code(atoms, targets, n_nonzero, dtype=np.float64):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        coder = SparseCoder(
            atoms.numpy().astype(dtype), transform_algorithm="omp", transform_n_nonzero_coefs=n_nonzero
        )
        return coder.transform(targets.numpy().astype(dtype))


def unit_targets(n, D, seed=1):
    targets = np.random.default_rng(seed).standard_normal((n, D))
    return torch.from_numpy(targets / np.linalg.norm(targets, axis=1, keepdims=True)).float()


@pytest.mark.parametrize("normalise", ["axis", "text"])
@pytest.mark.parametrize(
    ("texts", "D", "n_nonzero"), [(400, 48, 1), (400, 48, 16), (1500, 64, 40), (30, 48, 12)]
)
def test_supports_coefficients_and_residuals_are_scikit_learns(texts, D, n_nonzero, normalise):
    atoms = make_atoms(vectors(texts, D), normalise)
    targets = unit_targets(20, D)
    support, ours = code(atoms, targets, n_nonzero, block=7)
    theirs = sklearn_code(atoms, targets, n_nonzero)
    same = 0
    for n in range(len(targets)):
        residuals = [
            np.linalg.norm(targets[n].double().numpy() - x[n] @ atoms.double().numpy())
            for x in (ours, theirs)
        ]
        assert residuals[0] <= residuals[1] * 1.01 + 1e-6
        if set(np.flatnonzero(ours[n])) == set(np.flatnonzero(theirs[n])):
            same += 1
            assert_allclose(ours[n], theirs[n], atol=1e-4 * np.abs(theirs[n]).max())
    assert same >= 19  # float32 may swap near-ties


def test_the_residual_is_orthogonal_to_the_chosen_atoms():
    atoms, targets = make_atoms(vectors(500, 64)), unit_targets(10, 64)
    support, ours = code(atoms, targets, 24)
    residual = targets.numpy() - ours @ atoms.numpy()
    for n in range(10):
        chosen = atoms.numpy()[support[n]]
        assert np.abs(chosen @ residual[n]).max() < 1e-4 * np.linalg.norm(chosen, axis=1).max()


def test_a_pursuit_of_more_atoms_than_dimensions_stops_when_the_target_is_reached():
    atoms, targets = make_atoms(vectors(300, 20), "text"), unit_targets(6, 20)
    support, ours = code(atoms, targets, 60)
    theirs = sklearn_code(atoms, targets, 60, np.float32)
    assert_allclose(ours @ atoms.numpy(), targets.numpy(), atol=1e-4)
    taken = [(support[n] >= 0).sum() for n in range(6)]
    assert all(20 <= count <= 22 for count in taken)
    assert all(abs(count - (theirs[n] != 0).sum()) <= 2 for n, count in enumerate(taken))
    for row in support:  # empty after the stop
        assert (row[(row >= 0).sum() :] == -1).all()


def test_of_equal_atoms_only_the_first_is_taken():
    atoms = make_atoms(vectors(60, 24), "text")
    doubled = torch.cat([atoms, atoms, atoms[:5]])
    targets = unit_targets(10, 24)
    support, ours = code(doubled, targets, 10)
    assert support.max() < 60
    _, single = code(atoms, targets, 10)
    assert_allclose(ours[:, :60], single, atol=1e-6)
    theirs = sklearn_code(doubled, targets, 10)
    folded = theirs[:, :60] + theirs[:, 60:120]
    folded[:, :5] += theirs[:, 120:]
    assert_allclose(ours[:, :60], folded, atol=1e-5 * np.abs(folded).max())


def test_tiny_atoms_and_zero_targets_get_no_support():
    atoms = make_atoms(vectors(50, 16), "text") * 1e-7
    targets = torch.cat([unit_targets(3, 16), torch.zeros(1, 16)])
    support, ours = code(atoms, targets, 5)
    assert (support == -1).all() and not ours.any()
    assert not sklearn_code(atoms, targets, 5, np.float32).any()
    mixed = torch.cat([atoms[:10], make_atoms(vectors(50, 16), "text")[10:]])  # some tiny, some not
    support, ours = code(mixed, targets, 5)
    assert (support[:3] >= 10).all() and (support[3] == -1).all()
    assert_allclose(ours, sklearn_code(mixed, targets, 5), atol=1e-5)


def test_a_target_that_stops_early_does_not_change_the_others():
    atoms = make_atoms(vectors(200, 32), "text")
    targets = unit_targets(4, 32)
    reachable = 0.5 * atoms[3] - 0.25 * atoms[9]  # two atoms are enough
    _, alone = code(atoms, targets, 12)
    support, together = code(atoms, torch.cat([targets, reachable[None]]), 12)
    assert_allclose(together[:4], alone, atol=1e-6)
    assert_allclose(together[4] @ atoms.numpy(), reachable.numpy(), atol=1e-4)


@pytest.mark.parametrize("n_nonzero", [0, 11])
def test_more_components_than_texts_are_refused(n_nonzero):
    with pytest.raises(UserError, match="--components"):
        orthogonal_matching_pursuit(torch.randn(10, 4), torch.randn(2, 4), n_nonzero)


def test_atoms_are_centred_and_scaled_as_published():
    t = vectors(40, 12)
    wide = t.double().numpy()
    centred = wide - wide.mean(axis=0)
    assert_allclose(make_atoms(t), 100 * centred / np.linalg.norm(centred, axis=0), rtol=1e-3, atol=1e-4)
    assert_allclose(np.linalg.norm(make_atoms(t, "axis"), axis=0), 100, rtol=1e-5)
    assert_allclose(np.linalg.norm(make_atoms(t, "text"), axis=1), 100, rtol=1e-5)


def test_descriptions_are_sorted_and_the_two_files_agree(tmp_path):
    support = torch.tensor([[4, 0, 2], [1, 3, -1], [-1, -1, -1]])
    coefficients = torch.tensor([[0.1, -0.9, 0.5], [0.2, 0.3, 0.0], [0.0, 0.0, 0.0]])
    texts = ["zero", 'a "quoted" one', "zwei", "trois", "četiri"]
    save_descriptions(tmp_path / "d.json", support.numpy(), coefficients.numpy(), texts=texts, record={})
    content = json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))
    assert [[i, text] for i, _, text in content["0"]] == [[0, "zero"], [2, "zwei"], [4, "četiri"]]
    assert [i for i, *_ in content["1"]] == [3, 1] and content["2"] == []
    stored = scipy.sparse.load_npz(tmp_path / "d.npz")
    assert stored.format == "csc" and stored.shape == (3, 5) and stored.nnz == 5
    for n, entries in content.items():
        for i, c, _ in entries:
            assert stored[int(n), i] == pytest.approx(c)


def test_one_pursuit_holds_all_shorter_ones(tmp_path):
    """The order of choice is kept beside the descriptions, and its first texts fit as a pursuit of so many
    texts does.
    """
    rng = np.random.default_rng(4)
    atoms = torch.from_numpy(rng.standard_normal((300, 24)).astype(np.float32))
    targets = torch.from_numpy(rng.standard_normal((50, 24)).astype(np.float32))
    support, coefficients = orthogonal_matching_pursuit(atoms, targets, 16)
    texts = [f"text {i}" for i in range(300)]
    save_descriptions(tmp_path / "d.json", support.numpy(), coefficients.numpy(), texts, {})
    kept = load_support(tmp_path / "d.npz")
    assert (kept == support.numpy()).all()
    matrix = scipy.sparse.load_npz(tmp_path / "d.npz")
    np.testing.assert_allclose(matrix @ atoms.numpy(), rebuilt_from(kept, atoms, targets), atol=1e-4)
    for m in (1, 4, 9):
        coder = SparseCoder(atoms.double().numpy(), transform_algorithm="omp", transform_n_nonzero_coefs=m)
        alone = coder.transform(targets.double().numpy()) @ atoms.double().numpy()
        np.testing.assert_allclose(rebuilt_from(kept[:, :m], atoms, targets), alone, atol=1e-4)
    scipy.sparse.save_npz(tmp_path / "published.npz", matrix)
    with pytest.raises(UserError, match="does not have the order"):
        load_support(tmp_path / "published.npz")
