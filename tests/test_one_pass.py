"""`--keep top` in one pass and a look at a few images leaves, byte for byte, what two passes leave."""

import functools
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from tests.launcher import (
    COMMITS,
    assert_same_files,
    contents,
    finish,
    finished_pieces,
    hold,
    kill,
    shared_world,
    start_ranks,
    wait_until_held,
)
from tests.test_top_effects import LAYERS, K, dense, largest, read
from utils.data.splits import Split
from utils.effects import about_norms
from utils.figures import plot_neuron
from utils.prs import Directions, SecondOrder
from utils.runtime.passes import walk
from utils.runtime.records import load_record
from utils.runtime.sums import Look, Sums
from utils.top_effects import (
    AGAIN,
    CERTAIN,
    Strides,
    TopK,
    move,
    settle,
    settle_again,
    start_of,
    strides_of,
)

FEW = {"utils.top_effects.FEW": 7}  # a look at every 9th of the 63 photos; every 4th is of the first part


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    return shared_world(tmp_path_factory, tiny_model)


@pytest.fixture(scope="module")
def once(world):
    """What one pass leaves, and what it printed."""
    output = world.root / "once"
    return output, world.run("top", output, constants=FEW)


@pytest.fixture(scope="module")
def twice(world):
    output = world.root / "two_passes"
    world.run("top", output, "--passes", 2, constants=FEW)
    return output


def differing(folder, expected):
    found, wanted = contents(folder), contents(expected)
    assert found.keys() == wanted.keys()
    return sorted(name for name in found if found[name] != wanted[name])


def of_norms(suffixes):
    return sorted(f"folder_train_mlps_tiny_random_{m}_image_norms.{end}" for m in LAYERS for end in suffixes)


def test_a_look_is_at_256_images_or_a_twentieth():
    for images in (1, 5, 63, 511):
        assert strides_of(images) == (1, 1)
    for images in (512, 1000, 2048, 5124, 100_000, 1_281_167):
        look, part = (len(range(0, images, stride)) for stride in strides_of(images))
        assert max(256, images // 20) <= look <= images // 2
        assert part == images if images < 2048 else part >= 2 * look - 2
    assert len(range(0, 5124, strides_of(5124).look)) == 257


@pytest.mark.parametrize("images, stride", [(63, 1), (63, 4), (7, 4), (3, 4)])
def test_every_image_is_in_the_first_part_or_another(images, stride):
    look, part, others, again = Strides(5, stride).rounds()
    every = [i for rows in part + others for i in range(images)[rows]]
    assert sorted(every) == list(range(images)) and again == part + others
    assert [range(images)[rows] for rows in look] == [range(0, images, 5)]
    assert [range(images)[rows] for rows in part] == [range(0, images, stride)]


def test_a_round_goes_over_batches_of_slices():
    split = Split([(torch.tensor(i), 0) for i in range(10)], batch_size=2)
    pieces = split.rounds([slice(None, None, 3)], [slice(1, None, 4), slice(3, None, 4)], [slice(None)])
    every_third, two, all_of_them = pieces.rounds
    assert every_third == [slice(0, 6, 3), slice(6, 10, 3)] and all_of_them == list(split.pieces)
    read = [(rows, images.tolist()) for rows, images in walk(every_third, pieces.load)]
    assert read == [(slice(0, 6, 3), [0, 3]), (slice(6, 10, 3), [6, 9])]
    assert [images.tolist() for _, images in walk(two, pieces.load)] == [[1, 5], [9], [3, 7]]


def test_one_pass_leaves_the_bytes_of_two_but_for_norms(world, once, twice):
    output, printed = once
    assert differing(output, twice) == of_norms(("npy", "meta.json"))
    assert "one pass has found the largest effects of" in printed


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_one_pass_leaves_the_bytes_of_two_in_half_precision(world, precision):
    output = world.root / f"once_{precision}"
    twice = world.root / f"twice_{precision}"
    world.run("top", output, "--precision", precision, constants=FEW)
    world.run("top", twice, "--precision", precision, "--passes", 2, constants=FEW)
    assert differing(output, twice) == of_norms(("npy", "meta.json"))
    for layer in LAYERS:
        found, exact = (read(folder, layer, "top_mean") for folder in (output, world.whole / "top"))
        assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def test_two_passes_leave_the_bytes_of_few_images(world):
    """63 photos are too few for a preliminary mean, so without other constants there are two passes."""
    output = world.root / "two_passes_over_few"
    world.run("top", output, "--passes", 2)
    assert differing(output, world.whole / "top") == []


@pytest.mark.parametrize("layer", LAYERS)
def test_norms_are_off_by_what_their_record_says(world, once, twice, layer):
    output, _ = once
    found = read(output, layer, "image_norms")
    phi = dense(world.whole / "full", layer)
    exact = np.linalg.norm(phi - phi.mean(axis=0), axis=-1)
    record = load_record(output / f"folder_train_mlps_tiny_random_{layer}_image_norms.npy")
    off = np.abs(found - exact)
    assert 1e-3 * exact.max() < off.max() <= record["norms_off_by"] * (1 + 1e-6) + 1e-6 * exact.max()
    assert record["norms_about"] == "the mean of 7 images, or of 16" and record["norms_exact"] == K
    images = read(output, layer, "top_images")
    assert_allclose(
        np.take_along_axis(found, images.T, axis=0), np.take_along_axis(exact, images.T, axis=0), rtol=2e-5
    )
    assert np.array_equal(images, largest(found, K))
    assert not any(
        key.startswith("norms") and value
        for key, value in load_record(
            twice / f"folder_train_mlps_tiny_random_{layer}_image_norms.npy"
        ).items()
    )


def test_exact_norms_do_for_one_pass_and_not_the_other_way_round(world, once, twice):
    output, _ = once
    assert "kept" in world.run("top", twice, constants=FEW)
    printed = world.run("top", output, "--passes", 2, constants=FEW, code=1)
    assert "image_norms.npy is there, made with other norms_about" in printed and "--overwrite" in printed


def test_components_are_those_of_two_passes_and_the_norms_are_told(world, once, twice):
    folders = {}
    for name, effects in (("once", once[0]), ("twice", twice)):
        folders[name] = world.root / f"pcas_of_{name}"
        printed = world.run("pcas", folders[name], "--input_dir", effects)
        notes = [line for line in printed.splitlines() if line.startswith("note: ")]
        assert len(notes) == (len(LAYERS) if name == "once" else 0)
        assert all("holds norms about the mean of 7 images, or of 16, off by " in note for note in notes)
    names = differing(folders["once"], folders["twice"])
    assert [name for name in names if name.endswith(".npy")] == of_norms(["npy"])
    path = folders["once"] / of_norms(["npy"])[0]
    assert about_norms(path).endswith(" at most, but for the 5 largest of a neuron")
    assert about_norms(folders["twice"] / path.name) == ""


def test_the_card_of_a_neuron_says_what_its_norms_are_about():
    pictures, maps = np.zeros((1, 4, 4, 3)), np.zeros((1, 2, 2))
    figure = plot_neuron("x", pictures, maps, {}, np.arange(9.0), 5, norms_are="about something")
    assert [axes.get_xlabel() for axes in figure.axes if "norm" in axes.get_title()] == ["about something"]


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_leave_the_files_of_one(world, once, size):
    output = world.root / f"once_by_{size}"
    world.run("top", output, constants=FEW, size=size)
    assert_same_files(output, once[0])


@pytest.fixture(scope="module")
def units(world):
    """What one pass leaves of a dictionary's units, many of which seldom act."""
    output = world.root / "units_once"
    world.run("units_top", output, constants=FEW)
    return output


def test_one_pass_over_units_leaves_the_bytes_of_two_but_for_norms(world, units):
    twice = world.root / "units_twice"
    world.run("units_top", twice, "--passes", 2, constants=FEW)
    assert {name.split("_image_norms")[-1] for name in differing(units, twice)} == {".npy", ".meta.json"}
    [path] = units.glob("*_top_coefficients.npy")
    idle = ~np.load(path).any(axis=2)
    assert idle.any() and not idle.all()


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_leave_the_units_of_one(world, units, size):
    output = world.root / f"units_by_{size}"
    world.run("units_top", output, constants=FEW, size=size)
    assert_same_files(output, units)


def kill_and_resume(world, stage, output, pieces, constants):
    """Kill a stage after some pieces, and run it again."""
    log = world.root / f"{output.name}.log"
    process = world.start(stage, output, constants={**constants, **hold(pieces, log)})
    process.marker = Path(f"{log}.held.0")
    wait_until_held(process)
    kill(process)
    assert finished_pieces(output) == pieces
    world.run(stage, output, constants=constants)


@pytest.mark.parametrize("pieces", [3, 10, 16])
def test_a_pass_over_units_that_was_killed_is_resumed(world, units, pieces):
    output = world.root / f"units_killed_{pieces}"
    kill_and_resume(world, "units_top", output, pieces, FEW)
    assert_same_files(output, units)


# neurons that one pass leaves in doubt

FAR = {"utils.top_effects.FEW": 1, "utils.top_effects.SHARE": 1000, "utils.top_effects.CANDIDATES": 2}


@pytest.fixture(scope="module")
def far(world):
    """What is left, and printed, where the preliminary mean is far from the mean."""
    output = world.root / "far"
    return output, world.run("top", output, constants=FAR)


def counts(printed):
    """The neurons that are certain, of how many, and the others."""
    [line] = [line for line in printed.splitlines() if "gone over again" in line]
    return [int(word) for word in line.split() if word.isdecimal()]


def test_doubted_neurons_are_counted_and_made_right(far, twice):
    output, printed = far
    certain, every, doubted = counts(printed)
    assert certain + doubted == every == len(LAYERS) * len(read(output, 0, "top_images"))
    assert doubted > every / 2
    assert differing(output, twice) == of_norms(("npy", "meta.json"))
    for layer in LAYERS:
        assert np.array_equal(
            read(output, layer, "top_images"), largest(read(output, layer, "image_norms"), K)
        )


@pytest.mark.parametrize("size", [2, 3])
def test_doubted_neurons_are_made_right_by_several_processes(world, far, size):
    output = world.root / f"far_by_{size}"
    world.run("top", output, constants=FAR, size=size)
    assert_same_files(output, far[0])


@pytest.mark.parametrize("pieces", [1, 3, 5, 6, 12, 17, 18, 25, 33])  # of 1, then 4, 12, 16
def test_a_pass_that_was_killed_is_resumed(world, far, pieces):
    output = world.root / f"far_killed_{pieces}"
    kill_and_resume(world, "top", output, pieces, FAR)
    assert_same_files(output, far[0])


@pytest.mark.parametrize("pieces", [1, 2, 4, 9, 12, 17])  # of the second: of 1, then 2, 6, 8
def test_a_pass_of_two_processes_that_was_killed_is_resumed(world, far, pieces):
    output = world.root / f"far_of_2_killed_{pieces}"
    arguments, _ = world.command("top", output)
    log = world.root / f"{output.name}.log"
    processes = start_ranks(2, *arguments, log=log, constants={**FAR, **hold(pieces, log)})
    for rank, process in enumerate(processes):
        process.marker = Path(f"{log}.held.{rank}")
    wait_until_held(processes[1])
    kill(*processes)
    world.run("top", output, constants=FAR, size=2)
    assert_same_files(output, far[0])


# a few of them, beside others in a block that are certain

# a look at every other photo
NEAR = {
    f"utils.top_effects.{name}": value
    for name, value in (("FEW", 31), ("SHARE", 1000), ("CANDIDATES", 3), ("MARGIN", 0))
}
MANY = ["--top_k_pca", 8, "--batch_size", 2]
EARLIER_OF = {1: (16, 32), 2: (8, 16), 3: (6, 11)}  # batches of the last process in both rounds before


@pytest.fixture(scope="module")
def near(world):
    """What is left, and printed, where few neurons are in doubt."""
    output = world.root / "near"
    return output, world.run("top", output, *MANY, constants=NEAR)


def test_a_few_doubted_neurons_are_made_right(world, near):
    output, printed = near
    certain, every, doubted = counts(printed)
    assert certain + doubted == every and 0 < doubted < every / 20
    twice = world.root / "near_by_two_passes"
    world.run("top", twice, "--passes", 2, *MANY)
    assert differing(output, twice) == of_norms(("npy", "meta.json"))
    for layer in LAYERS:
        assert np.array_equal(
            read(output, layer, "top_images"), largest(read(output, layer, "image_norms"), 8)
        )


def assert_no_more_doubted(printed, by_one):
    """Each of several processes keeps as many candidates as one does, so fewer neurons are in doubt."""
    certain, every, doubted = counts(printed)
    assert certain + doubted == every and 0 < doubted <= counts(by_one)[2]


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_make_a_few_right(world, near, size):
    output = world.root / f"near_by_{size}"
    assert_no_more_doubted(world.run("top", output, *MANY, constants=NEAR, size=size), near[1])
    assert_same_files(output, near[0])


@pytest.mark.parametrize("size, pieces", [(1, 1), (1, 30), (2, 1), (3, 1)])
def test_a_pass_over_a_few_again_is_resumed(world, near, size, pieces):
    output = world.root / f"near_of_{size}_killed_{pieces}"
    arguments, _ = world.command("top", output, *MANY)
    log = world.root / f"{output.name}.log"
    held = hold(sum(EARLIER_OF[size]) + pieces, log)
    processes = start_ranks(size, *arguments, log=log, constants={**NEAR, **held})
    for rank, process in enumerate(processes):
        process.marker = Path(f"{log}.held.{rank}")
    wait_until_held(processes[-1])
    kill(*processes)
    printed = world.run("top", output, *MANY, constants=NEAR, size=size)
    assert_no_more_doubted(printed, near[1])
    assert_same_files(output, near[0])


@pytest.mark.parametrize("last", range(6))
def test_kill_9_between_two_files(world, far, last):
    """Before one of the last files gets its name or is removed."""
    output = world.root / f"far_dies_{last}"
    count = far_names(world)
    process = world.start("top", output, constants={**COMMITS, **FAR, "die": count - last * 9})
    finish(process, code=-signal.SIGKILL)
    world.run("top", output, constants=FAR)
    assert_same_files(output, far[0])


@functools.cache
def far_names(world):
    printed = world.run("top", world.root / "far_counted", constants={**COMMITS, **FAR, "die": 0})
    return int(printed.split(" names and removals")[0].split()[-1])


# numbers, against sorting


class Work:
    """One process's `Pass` in memory: state, scratch and results of a layer of N neurons."""

    def __init__(self, images, part, shapes, state, scratch):
        self.state = {name: np.zeros(*spec) for name, spec in state.items()}
        self.scratch = {name: InMemory(*spec) for name, spec in scratch.items()}
        self.results = {kind: Result(np.zeros(shape, dtype)) for kind, (shape, dtype) in shapes.items()}
        _, *self.rounds, self.again = [
            [batch for rows in each for batch in in_threes(range(images)[rows])]
            for each in Strides(1, part).rounds()
        ]

    def __getitem__(self, path):
        return self.results[path]

    def gather(self, names):
        return {name: [self.state[name].copy()] for name in names}

    def gather_scratch(self, name):
        return [self.scratch[name].array]

    def skip(self, number):
        assert number == AGAIN
        self.again = []

    def commit(self):
        pass


def in_threes(images):
    """The slices of a range of images, three in each."""
    batches = [images[start : start + 3] for start in range(0, len(images), 3)]
    return [slice(batch.start, batch.stop, batch.step) for batch in batches]


class InMemory:
    def __init__(self, shape, dtype):
        self.array = np.zeros(shape, dtype)

    def put(self, places, rows):
        self.array.reshape(-1, rows.shape[1])[places] = rows

    def release(self):
        pass


class Result:
    def __init__(self, array):
        self.array = array
        self.shape = array.shape
        self.record = {}

    def __setitem__(self, index, block):
        self.array[index] = block

    def read(self):
        return self.array


def kept_by(directions, C, kappa, k, few, part=1):
    """The largest effects, kept after the mean of `few` images; of every `part`-th first.

    Returns the results, the count of doubted neurons, and the record of norms.
    """
    images, heads, N = C.shape
    D = kappa.shape[1]
    of_layer = SimpleNamespace(sizes=lambda layer: {"K": heads, "N": N, "D": D})
    shapes = {"bias": ((images, D), "f4"), "image_norms": ((images, N), "f4"), "top_images": ((N, k), "i4")}
    shapes |= dict.fromkeys(["values", "outputs"], ((), "f4"))
    shapes |= {"top_coefficients": ((N, k, heads), "f4"), "top_mean": ((N, D), "f4")}
    work = Work(images, part, shapes, *start_of(of_layer, [0], k, images, units=bool(directions.units)))
    work.results["values"].array = directions.values.numpy()
    paths = SimpleNamespace(path=lambda kind, layer: kind)
    look, every = Look(work, 1.0, few, "few_"), Sums(work, 1.0, images, "part_", "")
    for rows in (slice(0, 2), slice(2, few)):
        look.add(SecondOrder(C[rows], kappa[rows], directions), rows)
    tops = TopK.of_layers(work, [directions], look, part, paths, {})
    first = Sums(work, 1.0, len(range(0, images, part)), "part_")
    for round, sums in zip(work.rounds, (first, every), strict=True):
        for rows in round:
            tops[0].add(SecondOrder(C[rows], kappa[rows], directions), rows, sums)
        if sums is first:
            move(work, tops, first)
    doubted = settle(work, tops, every)
    count = int((tops[0].known != CERTAIN).sum())
    assert bool(doubted) == bool(count) == bool(work.again)
    for rows in work.again:
        doubted[0].add(SecondOrder(C[rows], kappa[rows], directions), rows)
    settle_again(work, doubted)
    results = {kind: result.array for kind, result in work.results.items()}
    return results, count, work["image_norms"].record


def drawn(rng):
    """Numbers of a layer: images that differ, a few that are alike, and sometimes outliers at the start."""
    images, heads, N, e, D = rng.integers(24, 60), rng.integers(1, 5), rng.integers(1, 4), 2, 6
    values, outputs = rng.standard_normal((heads, N, e)), rng.standard_normal((heads, e, D))
    C = rng.standard_normal((images, heads, N)) + 3 * rng.standard_normal((heads, N))
    kappa = rng.choice([0.01, 1]) * rng.standard_normal((images, D)) + rng.standard_normal(D)
    C[: rng.integers(1, 4)] += rng.choice([0, 0, 0.3, 5]) * rng.standard_normal((heads, N))
    if rng.random() < 0.5:
        again = rng.integers(0, images, images // 3)  # copies: their norms are equal
        C[again], kappa[again] = C[again[0]], kappa[again[0]]
    directions = Directions(0, *(torch.from_numpy(x.astype("f4")) for x in (values, outputs)), None)
    return directions, torch.from_numpy(C.astype("f4")), torch.from_numpy(kappa.astype("f4"))


def rarely_acting(rng):
    """Numbers of a dictionary's units, most of which act on few images: all other effects are 0."""
    directions, C, kappa = drawn(rng)
    acts = rng.random((len(C), 1, C.shape[2])) < rng.choice([0, 0.05, 0.2, 1], C.shape[2])
    return directions._replace(units="a dictionary"), C * torch.from_numpy(acts), 0 * kappa


def check_against_sorting(seed, directions, C, kappa, k, few, part):
    """In float64, of equal norms the earlier image first. Returns the count of doubted neurons."""
    found, doubted, record = kept_by(directions, C, kappa, k, few, part)
    B = directions.B().double()
    phi = (torch.einsum("ikn,nko->ino", C.double(), B) + kappa.double()[:, None]).numpy()
    norms = np.linalg.norm(phi - phi.mean(axis=0), axis=-1)
    top = largest(norms, k)
    kept = found["top_images"]
    places = np.arange(len(top))[:, None]
    assert all(len(set(row)) == k for row in kept.tolist()), seed
    assert_allclose(norms[kept, places], norms[top, places], rtol=1e-5, err_msg=str(seed))
    equal = np.array(
        [
            [np.array_equal(*phi[pair, n]) for pair in zip(kept[n], top[n], strict=True)]
            for n in range(len(top))
        ]
    )
    assert (kept[equal] == top[equal]).all(), seed
    off = np.abs(found["image_norms"] - norms).max()
    assert off <= record["norms_off_by"] + 1e-5 * norms.max(), seed
    assert_allclose(found["top_mean"], phi.mean(axis=0), atol=1e-5 * np.abs(phi).max())
    two, *_ = kept_by(directions, C, kappa, k, len(C), part)
    for kind in ("top_images", "top_coefficients", "top_mean", "bias"):
        assert np.array_equal(found[kind], two[kind]), (seed, kind)
    return doubted


def test_a_thousand_sets_of_numbers_against_sorting(capsys):
    """What one pass found, and what was doubted."""
    certain = all_neurons = 0
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        directions, C, kappa = drawn(rng)
        k, few = int(rng.integers(1, 6)), int(rng.integers(2, len(C) // 2))
        part = int(rng.choice([1, 1, 2, 4]))
        certain += C.shape[2] - check_against_sorting(seed, directions, C, kappa, k, few, part)
        all_neurons += C.shape[2]
    assert 0.2 < certain / all_neurons < 0.9  # both ways are tried
    capsys.readouterr()


def test_fewer_candidates_than_are_kept_against_sorting(capsys):
    """Where nearly all images are kept, and where the look was at larger effects than there are elsewhere."""
    doubted = {"all": 0, "larger": 0}
    for seed in range(300):
        rng = np.random.default_rng(seed)
        directions, C, kappa = drawn(rng)
        images, few = len(C), int(rng.integers(2, len(C) // 2))
        part = int(rng.choice([1, 4]))
        case = str(rng.choice(list(doubted)))
        if case == "all":
            k = images - int(rng.integers(0, 3))
        else:
            k = int(rng.integers(1, images // 4))
            C[:few] *= 5
        doubted[case] += check_against_sorting(seed, directions, C, kappa, k, few, part)
    assert doubted["all"] == 0 < doubted["larger"]
    capsys.readouterr()


def test_units_that_rarely_act_against_sorting(capsys):
    """Of images on which a unit does not act the earliest count, and need no pass of their own."""
    doubted_units = {"rare": 0, "other": 0}
    for seed in range(300):
        rng = np.random.default_rng(seed)
        directions, C, kappa = rarely_acting(rng)
        k, few = int(rng.integers(1, 6)), int(rng.integers(2, len(C) // 2))
        part = int(rng.choice([1, 1, 2, 4]))  # the images are not gone over in order then
        doubted = check_against_sorting(seed, directions, C, kappa, k, few, part)
        rare = C.any(dim=1).sum(dim=0).max() <= 3 * k and part == 1
        doubted_units["rare" if rare else "other"] += doubted
    assert doubted_units["rare"] == 0 < doubted_units["other"]
    capsys.readouterr()
