"""`--keep top` leaves what `--keep full` does, to rounding, and the largest effects are the largest."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from tests import definition
from tests.launcher import assert_same_files, contents, shared_world, the_line
from utils.data.images import load_images
from utils.model.clip import load_clip
from utils.prs import SecondOrder, fold, second_order
from utils.runtime.largest import enter, image_of, key_of, taken_of
from utils.runtime.sums import FIXED, Sums

K, LAYERS = 5, (0, 1, 2, 3)
PCAS = ["--dataset", "folder", "--mlp_layer", "all"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    return shared_world(tmp_path_factory, tiny_model)


@pytest.fixture(scope="module")
def statistics(world):
    """The folder of compute_pcas.py's results from what `--keep top` left in another folder."""
    output = world.root / "pcas_of_top"
    world.run("pcas", output, "--input_dir", world.whole / "top")
    return output


def read(folder, layer, part):
    return np.load(folder / f"folder_train_mlps_tiny_random_{layer}_{part}.npy")


def dense(folder, layer):
    """The effects [images, N, D] in float64, from the parts of the full store."""
    C, bias, values, outputs = (
        read(folder, layer, part).astype(float) for part in ("coefficients", "bias", "values", "outputs")
    )
    return np.einsum("ikn,kne,keo->ino", C, values, outputs) + bias[:, None]


def largest(norms, k):
    """The k largest of every column, by falling norm, of equal ones the earlier: norms [images, N] -> [N,
    k].
    """
    return np.stack([sorted(range(len(column)), key=lambda i: (-column[i], i))[:k] for column in norms.T])


def test_mean_activations_are_those_of_the_definition(world):
    clip = load_clip(*world.model[1::2], "cpu")
    images = load_images("folder", world.photos, "train", clip.transform)
    visual = clip.vit.visual.double()
    runs = [definition.run(visual, images[i][0].double()) for i in range(len(images))]
    for layer in LAYERS:
        expected = torch.stack([run.p[layer] for run in runs]).mean(dim=0).numpy()
        found = read(world.whole / "top", layer, "activations")
        assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max() + 1e-7)
        assert np.array_equal(found, read(world.whole / "full", layer, "activations"))


def test_the_largest_effects_are_those_of_the_definition(world):
    """All from float64 loops over the definition; the stage works in float32."""
    layer, whole = 2, world.whole / "top"
    clip = load_clip(*world.model[1::2], "cpu")
    images = load_images("folder", world.photos, "train", clip.transform)
    visual = clip.vit.visual.double()
    phi = torch.stack(
        [definition.effects(visual, images[i][0].double(), layer) for i in range(len(images))]
    ).numpy()
    mean = phi.mean(axis=0)
    norms = np.linalg.norm(phi - mean, axis=-1)
    top = largest(norms, K)
    found = read(whole, layer, "top_images")
    assert (found == top).mean() > 0.99  # two norms may be equal to 7 digits
    columns = np.arange(len(found))[:, None]
    assert_allclose(norms[found, columns], norms[top, columns], rtol=1e-5)
    assert_allclose(read(whole, layer, "top_mean"), mean, atol=1e-6 * np.abs(phi).max())
    assert_allclose(read(whole, layer, "image_norms"), norms, rtol=1e-4, atol=1e-6 * norms.max())
    x, values, outputs, bias = (
        read(whole, layer, part).astype(float) for part in ("top_coefficients", "values", "outputs", "bias")
    )
    centred = np.einsum("njk,kne,keo->njo", x, values, outputs) + (bias - bias.mean(axis=0))[found]
    assert_allclose(centred, (phi - mean)[found, columns], atol=1e-5 * norms.max())


@pytest.mark.parametrize("layer", LAYERS)
def test_the_largest_effects_are_those_of_the_full_store(world, layer):
    phi = dense(world.whole / "full", layer)
    norms = np.linalg.norm(phi - phi.mean(axis=0), axis=-1)
    top, found = largest(norms, K), read(world.whole / "top", layer, "top_images")
    assert (found == top).mean() > 0.99
    assert found.dtype == np.int32 and all(len(set(row)) == K for row in found.tolist())


@pytest.mark.parametrize("layer", LAYERS)
def test_statistics_equal_those_of_the_full_store_to_rounding(world, statistics, layer):
    def both(part):
        return read(statistics, layer, part), read(world.whole / "pcas", layer, part)

    scale = np.abs(both("image_norms")[1]).max()
    for part, tolerance in (("mean", 2e-6), ("image_norms", 2e-6), ("5_norm", 2e-6)):
        assert_allclose(*both(part), atol=tolerance * scale, rtol=2e-5)
    assert_allclose(*both("5_explained"), atol=2e-5)
    found, expected = both("5_pca")
    assert_allclose((found * expected).sum(axis=1), 1, atol=1e-5)  # the sign included


def test_the_same_files_also_in_another_folder(world, statistics):
    names = {path.name for path in statistics.iterdir()}
    assert names == {path.name for path in (world.whole / "pcas").iterdir()}
    assert {f"folder_train_mlps_tiny_random_{m}_image_norms.npy" for m in LAYERS} <= names


def test_fewer_images_than_were_kept_and_not_more(world):
    output, full = world.root / "pcas_of_3", world.root / "pcas_of_3_full"
    world.run("pcas", output, "--input_dir", world.whole / "top", "--top_k_pca", 3)
    world.run("pcas", full, "--top_k_pca", 3)
    for layer in LAYERS:
        assert_allclose(read(output, layer, "3_norm"), read(full, layer, "3_norm"), rtol=2e-5)
        assert_allclose((read(output, layer, "3_pca") * read(full, layer, "3_pca")).sum(axis=1), 1, atol=1e-5)
    line = the_line(
        world.run("pcas", world.root / "of_6", "--input_dir", world.whole / "top", "--top_k_pca", 6, code=1)
    )
    assert (
        "has 5 images for a neuron, and --top_k_pca 6 needs 6" in line
        and "--keep top, a larger --top_k_pca" in line
    )
    assert not list((world.root / "of_6").iterdir())


def test_as_many_as_there_are_images_and_not_more(world):
    output = world.root / "top_of_all"
    world.run("top", output, "--mlp_layer", 3, "--top_k_pca", 63)
    assert (np.sort(read(output, 3, "top_images"), axis=1) == np.arange(63)).all()
    line = the_line(world.run("top", world.root / "top_of_64", "--top_k_pca", 64, code=1))
    assert "there are 63 images, and --top_k_pca 64 needs 64; lower it" in line


def test_what_is_kept_by_default(world):
    """All effects of one layer; the largest ones of several; and what is asked for."""
    cases = {("1",): False, ("1", "3"): True, ("1", "3", "--merged"): False, ("1", "--keep", "top"): True}
    for i, (flags, top) in enumerate(cases.items()):
        output = world.root / f"default_{i}"
        world.run("default", output, "--mlp_layer", *flags)
        names = {path.name.split("random_")[1] for path in output.glob("*.npy")}
        assert ("1_top_coefficients.npy" in names) == top and ("1_coefficients.npy" in names) != top


@pytest.mark.parametrize("size", [1, 2])
def test_layers_in_several_groups_leave_the_same_arrays(world, size):
    """Where memory is short, layers are worked on one after the other."""
    output = world.root / f"groups_{size}"
    world.run("top", output, "--memory", 1e-6, size=size)
    found, expected = contents(output), contents(world.whole / "top")
    assert found.keys() == expected.keys()
    assert [name for name in found if name.endswith(".npy") and found[name] != expected[name]] == []


# of equal norms the earlier image's effect is kept


def kept(norms, k, split):
    """What is kept of norms [images, N] that come in batches: images [N, k] by falling norm."""
    N = norms.shape[1]
    keys, kept_images, floor = np.zeros((N, k), np.uint64), np.full((N, k), -1), np.ones(N, np.uint64)
    for rows in np.split(np.arange(len(norms)), split):
        n, places, columns = enter(keys, taken_of(keys), key_of(norms[rows].T, rows), floor)
        kept_images[n, places] = rows[columns]
    assert (image_of(keys) == kept_images).all()
    order = np.lexsort((kept_images, -np.take_along_axis(norms.T, kept_images, axis=1)), axis=1)
    return np.take_along_axis(kept_images, order, axis=1)


@pytest.mark.parametrize("k", [1, 4, 7])
def test_of_equal_norms_the_earlier_ones_are_kept(k):
    norms = np.random.default_rng(k).integers(1, 6, (40, 50)).astype(np.float32)
    assert (kept(norms, k, [3, 10, 11, 30]) == largest(norms, k)).all()


def test_of_images_that_are_there_twice_the_first_is_kept_by_one_process_and_by_two(world):
    """Each at the same place of its batch, so that both give the same bits."""
    photos, shown = world.root / "twice", sorted((world.photos / "train").rglob("*.JPEG"))[:12]
    for copy in "abc":
        (photos / "train" / copy).mkdir(parents=True)
        for i, image in enumerate(shown):
            shutil.copy(image, photos / "train" / copy / f"{i:02d}.JPEG")
    flags = ["--data_path", photos, "--top_k_pca", 7]
    for size in (1, 2, 3):
        world.run("top", world.root / f"twice_by_{size}", *flags, size=size)
    for layer in LAYERS:
        norms = read(world.root / "twice_by_1", layer, "image_norms")
        assert (norms[:12] == norms[12:24]).all() and (norms[:12] == norms[24:]).all()
        assert (read(world.root / "twice_by_1", layer, "top_images") == largest(norms, 7)).all()
    assert_same_files(world.root / "twice_by_2", world.root / "twice_by_1")
    assert_same_files(world.root / "twice_by_3", world.root / "twice_by_1")


def test_sums_do_not_depend_on_batches_or_processes(vit, images):
    """Of two processes together, in batches of any size, they are those of all images in float64, to the step
    of the integers.
    """
    directions = fold(vit, 2)
    _, [whole] = second_order(vit, images, [directions])
    sums = []
    for split in ([slice(0, 6)], [slice(0, 1), slice(1, 6)], [slice(2, 4), slice(4, 6), slice(0, 2)]):
        work = SimpleNamespace(
            state={"C2": np.zeros((vit.N, vit.K(2)), np.int64), "kappa2": np.zeros(vit.D, np.int64)}
        )
        total = Sums(work, 100.0, 12, "")
        for rows in split:
            total.add(SecondOrder(whole.C[rows], whole.kappa[rows], directions))
        sums.append(work.state)
    exact = whole.C.double().sum(dim=0).numpy()
    for state in sums:
        assert np.abs(state["C2"].T * 100.0 / FIXED - exact).max() < 1e-6 * np.abs(exact).max()
    work = SimpleNamespace(gather=lambda names: {name: [state[name] for state in sums[:2]] for name in names})
    mean_C, mean_kappa = Sums(work, 100.0, 12, "").means([2])[2]
    assert_allclose(mean_C, whole.C.double().mean(dim=0), atol=1e-6 * np.abs(exact).max())
    assert_allclose(mean_kappa, whole.kappa.double().mean(dim=0), atol=1e-6 * float(whole.kappa.abs().max()))
