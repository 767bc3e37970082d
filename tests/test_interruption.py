"""kill -9, full disks, read-only folders, damaged and changed inputs: a line says what is wrong, and nothing
finished is lost.

KILLS in the environment (10 for the figures of README.md) says how often each stage is killed.
"""

import os
import resource
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import run_script
from tests.launcher import (
    COMMITS,
    assert_same_files,
    contents,
    finish,
    finished_pieces,
    progress_files,
    release,
    shared_world,
    the_line,
    wait_for,
)
from utils.runtime.errors import UserError
from utils.runtime.passes import Scratch

KILLS = int(os.environ.get("KILLS", 0))
LONG = {
    "top": 10,
    "full": 3,
    "representations": 2,
    "pcas": 3,
    "ablations": 2,
    "decomposition": 3,
    "evaluation": 3,
    "gallery": 2,
}
LONG |= {"segmentation": 2, "units_top": 3, "units_full": 1, "units_evaluation": 2}
LAST = {
    "top": 4,
    "full": 1,
    "representations": 1,
    "pcas": 1,
    "ablations": 1,
    "decomposition": 2,
    "evaluation": 1,
    "gallery": 1,
}
LAST |= {"segmentation": 1, "units_top": 2, "units_full": 1, "units_evaluation": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    return shared_world(tmp_path_factory, tiny_model)


@pytest.fixture(scope="module")
def started(world):
    """The second-order stage, killed when 2 of its 16 pieces were finished; tests work on copies. The lock of
    a process that has
    ended is no part of its work: who comes next removes it."""
    output = world.interrupt("full", world.root / "started")
    [lock] = output.glob("*.lock")
    lock.unlink()
    return output


def copy(folder, name):
    return Path(shutil.copytree(folder, folder.with_name(name)))


@contextmanager
def small_disk(folder, size):
    """A file system of `size` bytes at a folder."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system of its own can only be mounted as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def read_only(folder):
    """A folder turned read-only: by its mode, or for root, who may write all the same, by a mount."""
    if os.geteuid():
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)
        return
    bind = ["mount", "--bind", str(folder), str(folder)]
    if subprocess.run(bind, capture_output=True).returncode:
        pytest.skip("modes do not bind root, and there is no right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# kill -9


@pytest.mark.parametrize("name", LONG)
def test_kill_9_at_random_moments_changes_nothing(world, name):
    """Killed anywhere between its start and its end; when it finishes before the last kill, it starts again
    elsewhere.
    """
    kills, rng, moments = KILLS or LONG[name], np.random.default_rng(len(name)), []
    small = {**COMMITS, "utils.omp.PURSUED": 16}
    output = world.root / f"killed_{name}"
    started = time.monotonic()
    whole = world.root / f"timed_{name}"
    process = world.start(name, whole, constants=small)
    wait_for(lambda: progress_files(whole), process)
    before = time.monotonic() - started
    finish(process)
    during = time.monotonic() - started - before
    assert_same_files(whole, world.whole / name)  # counting pieces at once changes nothing
    rounds = 0
    while len(moments) < kills:
        process = world.start(name, output, constants=small)
        if rng.random() < 0.2:
            time.sleep(rng.random() * before)
        else:
            seen = times(output)
            wait_for(lambda output=output, seen=seen: times(output) - seen, process)
            time.sleep(rng.random() * during * 0.6)
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster
            assert_same_files(output, whole)
            rounds += 1
            output = world.root / f"killed_{name}_{rounds}"
            continue
        moments.append(state(output))
    world.run(name, output, constants=small)
    assert_same_files(output, whole)
    print(f"{name}: {rounds + 1} runs to the end, killed {', '.join(moments)}")


def times(output):
    """Changes when progress is saved."""
    found = set()
    for path in progress_files(output):
        with suppress(FileNotFoundError):  # the pass has just finished
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def state(output):
    """Where a killed stage was."""
    if not output.is_dir():
        return "before its folder was there"
    if progress_files(output):
        return f"after {finished_pieces(output)} pieces"
    return "while saving its results" if list(output.iterdir()) else "before its first record"


@pytest.mark.parametrize("name", LONG)
def test_kill_9_between_two_files(world, name):
    """Before a file gets its name or is removed, which random moments seldom meet: all of them with KILLS,
    else the last ones.
    """
    printed = world.run(name, world.root / f"counted_{name}", constants={**COMMITS, "die": 0})
    count = int(printed.split(" names and removals")[0].split()[-1])
    for i in range(1 if KILLS else count - LAST[name] + 1, count + 1):
        output = world.root / f"dies_{name}_{i}"
        process = world.start(name, output, constants={**COMMITS, "die": i})
        finish(process, code=-signal.SIGKILL)
        world.run(name, output)
        assert_same_files(output, world.whole / name)
        shutil.rmtree(output)
    print(f"{name}: killed before any of {count} names and removals")


def test_a_plain_process_leaves_the_same_files(world, tmp_path):
    """What is compared here is what `python compute_... ` leaves."""
    arguments, _ = world.command("top", tmp_path)
    run_script(*arguments)
    assert_same_files(tmp_path, world.whole / "top")


# disks and folders


@pytest.mark.parametrize("name", ["full", "top", "ablations", "decomposition", "evaluation", "segmentation"])
def test_a_disk_that_fills_up_in_the_middle(world, name):
    """From the first finished piece on, no file may grow to its end, as if a quota were met."""
    output = world.root / f"quota_{name}"
    process = world.start_held(name, output, pieces=1)
    limit = int(0.9 * max(path.stat().st_size for path in output.glob("*.npy.*.partial")))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    release(process)
    line = the_line(finish(process, code=1))
    assert (
        ".npy cannot be written (File too large); "
        "what is finished is kept: fix this, then run the same command again" in line
    )
    assert finished_pieces(output) >= 1 and not list(output.glob("*.npy"))
    world.run(name, output)
    assert_same_files(output, world.whole / name)


@pytest.mark.parametrize("name", ["full", "top"])
def test_a_disk_that_another_fills_up_in_the_middle(world, name):
    """The room that was there at the start is gone: no space is left on a file system of 4 MB."""
    with small_disk(world.root / f"disk_{name}", 4_000_000) as output:
        process = world.start_held(name, output)
        filler = output / "filler"
        with open(filler, "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
        release(process)
        line = the_line(finish(process, code=1))
        assert "No space left on device" in line
        finished = finished_pieces(output)
        filler.unlink()
        world.run(name, output)
        assert finished >= 2
        assert_same_files(output, world.whole / name)


@pytest.mark.parametrize("name", ["full", "top", "pcas"])
def test_a_disk_that_is_too_small_is_refused_before_any_work(world, name):
    with small_disk(world.root / f"small_{name}", 65536) as output:
        line = the_line(world.run(name, output, code=1))
        assert (
            "has 0.00 GB free and this run writes" in line
            and "make room, choose another --output_dir" in line
        )
        assert not list(output.iterdir())


def test_a_folder_that_turns_read_only_in_the_middle(world):
    output = world.root / "read_only"
    process = world.start_held("full", output)
    with read_only(output):
        release(process)
        line = the_line(finish(process, code=1))
        assert "Read-only file system" in line or "Permission denied" in line
        refused = the_line(world.run("full", output, code=1))
        assert f"{output} cannot be written to; choose another --output_dir" in refused
    assert finished_pieces(output) >= 2
    world.run("full", output)
    assert_same_files(output, world.whole / "full")


# images


@contextmanager
def damaged(image, content):
    whole = image.read_bytes()
    image.write_bytes(content)
    try:
        yield
    finally:
        image.write_bytes(whole)


@pytest.mark.parametrize("name", ["representations", "full", "top"])
def test_a_damaged_image_in_the_middle(world, name):
    """Of the size that it has once it is fixed, for instance by copying it again."""
    output, image = world.root / f"damaged_{name}", sorted((world.photos / "train").rglob("*.JPEG"))[30]
    with damaged(image, bytes(image.stat().st_size)):
        line = the_line(world.run(name, output, constants=COMMITS, code=1))
        assert f"the image {image} cannot be read" in line and "run the same command again" in line
    assert finished_pieces(output) == 7  # the batches before the image's
    world.run(name, output)
    assert_same_files(output, world.whole / name)


def test_a_cut_off_image_that_is_fixed_costs_no_other_image(world):
    """It is another data set now, but what was made from the other images stays."""
    output, image = world.root / "cut_off", sorted((world.photos / "train").rglob("*.JPEG"))[30]
    with damaged(image, image.read_bytes()[:500]):
        line = the_line(world.run("full", output, constants=COMMITS, code=1))
        assert f"the image {image} cannot be read" in line
    assert finished_pieces(output) == 7  # the batches before the image's
    printed = world.run("full", output)
    assert f"0/{63 - 7 * 4}" in printed  # the others alone
    assert_same_files(output, world.whole / "full")


# what an interrupted pass is not resumed with


def test_images_that_changed_since(world, started):
    output, image = copy(started, "started_images"), sorted((world.photos / "train").rglob("*.JPEG"))[0]
    with damaged(image, sorted((world.photos / "train").rglob("*.JPEG"))[1].read_bytes()):
        line = the_line(world.run("full", output, code=1))
    assert (
        "belongs to a run with other data; "
        "repeat that run to finish it, or add --overwrite to start from scratch" in line
    )
    assert finished_pieces(output) == finished_pieces(started)
    world.run("full", output)
    assert_same_files(output, world.whole / "full")


OTHER_FLAGS = {
    "coefficient": ["--coefficient", 50],
    "batch_size": ["--batch_size", 8],
    "precision": ["--precision", "bfloat16"],
    "arrays": ["--store_dtype", "float16"],
    "data": ["--subsample", 2],
    "layers, arrays": ["--mlp_layer", 0, 1],
}


@pytest.mark.parametrize("differing", OTHER_FLAGS)
def test_other_flags(world, started, differing):
    output = copy(started, f"started_{differing.replace(', ', '_')}")
    line = the_line(world.run("full", output, *OTHER_FLAGS[differing], code=1))
    assert f"belongs to a run with other {differing}" in line and "--overwrite to start from scratch" in line
    assert contents(output) == contents(started)


def test_other_flags_of_two_passes(world):
    output = world.interrupt("top", world.root / "started_top")
    for flags in (["--top_k_pca", 4], ["--batch_size", 8], ["--mlp_layer", 0, 1]):
        line = the_line(world.run("top", output, *flags, code=1))
        assert "belongs to a run with other" in line and "--overwrite to start from scratch" in line
    world.run("top", output)
    assert_same_files(output, world.whole / "top")


def test_overwriting_starts_from_scratch(world, started):
    output = copy(started, "started_overwritten")
    world.run("full", output, "--overwrite", constants={"utils.runtime.passes.COMMIT_SECONDS": 60})
    assert_same_files(output, world.whole / "full")


def test_another_models_weights(world, tmp_path):
    """The file of a checkpoint keeps its name and gets other weights."""
    output, weights = world.root / "started_weights", tmp_path / "weights.pt"
    save_weights(world, weights)
    flags = ["--pretrained", weights]
    world.interrupt("representations", output, *flags)
    save_weights(world, weights, scale=1.5)
    line = the_line(world.run("representations", output, *flags, code=1))
    assert "belongs to a run with other fingerprint" in line


def save_weights(world, path, scale=1.0, value=None):
    from utils.model.clip import load_clip

    weights = load_clip(world.model[1], "random", "cpu").text.state_dict()
    weights["visual.proj"] = weights["visual.proj"] * scale
    if value is not None:
        weights["visual.proj"][3, 3] = value
    torch.save(weights, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(world, tmp_path, value):
    save_weights(world, tmp_path / "bad.pt", value=value)
    line = the_line(world.run("full", tmp_path / "out", "--pretrained", tmp_path / "bad.pt", code=1))
    assert "hold NaN or infinity; use another checkpoint" in line
    assert not list((tmp_path / "out").iterdir())


# inputs of later stages


def base_with(world, name, changes):
    """A copy of what later stages read. changes: {end of a file's name: what happens to it}."""
    base = copy(world.base, f"base_{name}")
    for ending, change in changes.items():
        [path] = base.glob(f"*{ending}")
        change(path)
    return base


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


def other_values(path):
    """Of which sums tell nothing."""
    np.save(path, np.load(path)[::-1])


@pytest.mark.parametrize(
    ("name", "ending", "made_by"),
    [
        ("pcas", "_1_coefficients.npy", "compute_second_order_neuron_prs.py"),
        ("pcas", "_1_values.npy", "compute_second_order_neuron_prs.py"),
        ("ablations", "_1_5_pca.npy", "compute_pcas.py"),
        ("ablations", "_1_mean.npy", "compute_pcas.py"),
        ("ablations", "classifier_tiny_random.npy", "compute_classifier_projection.py"),
        ("decomposition", "words_tiny_random.npy", "compute_text_set_projection.py"),
        ("decomposition", "_1_5_pca.npy", "compute_pcas.py"),
        ("segmentation", "_1_5_pca.npy", "compute_pcas.py"),
        ("evaluation", "_1_5_pca.npy", "compute_pcas.py"),
        ("evaluation", "words_tiny_random.npy", "compute_text_set_projection.py"),
        ("gallery", "train_mlps_tiny_random_1_5_projections.npy", "evaluate_descriptions.py"),
        ("gallery", "grades_tiny_random_1_words_8.npy", "evaluate_descriptions.py"),
    ],
)
def test_a_cut_off_input(world, name, ending, made_by):
    what = f"{name}{ending}".removesuffix(".npy")
    base = base_with(world, what, {ending: cut_off})
    output = world.root / f"of_{what}"
    line = the_line(world.run(name, output, "--input_dir", base, code=1))
    assert f"{ending} cannot be read" in line and f"make it again with: python {made_by}" in line
    assert not list(output.iterdir())
    shutil.rmtree(base)


@pytest.mark.parametrize(
    ("name", "ending", "differing"),
    [
        ("ablations", "_1_5_pca.npy", "statistics"),
        ("ablations", "classifier_tiny_random.npy", "classifier"),
        ("decomposition", "words_tiny_random.npy", "atoms"),
        ("decomposition", "_0_5_pca.npy", "targets"),  # of the layer that was interrupted
        ("segmentation", "_1_5_pca.npy", ""),
        ("segmentation", "classifier_tiny_random.npy", ""),
    ],
)
def test_an_input_that_changed_while_a_stage_was_interrupted(world, name, ending, differing):
    output = world.interrupt(name, world.root / f"changed_{name}{ending}")
    base = base_with(world, f"changed_{name}{ending}", {ending: other_values})
    line = the_line(world.run(name, output, "--input_dir", base, code=1))
    assert f"belongs to a run with other {differing}" in line and "--overwrite to start from scratch" in line
    world.run(name, output)
    assert_same_files(output, world.whole / name)
    shutil.rmtree(base)


def test_effects_that_were_made_again_of_other_images(world):
    """Statistics are started with the effects of some images, and would be finished with those of others."""
    base, output = copy(world.base, "base_again"), world.root / "again"
    world.interrupt("pcas", output, "--input_dir", base)
    line = the_line(world.run("full", base, "--subsample", 2, code=1))
    assert "is there, made with other data" in line and "add --overwrite to replace it" in line
    world.run("full", base, "--subsample", 2, "--overwrite")
    line = the_line(world.run("pcas", output, "--input_dir", base, code=1))
    assert "belongs to a run with other data" in line and "--overwrite" in line
    shutil.rmtree(base)


def test_parts_of_effects_that_do_not_belong_together(world):
    """A second pass over other images is killed when some of its files have their names, and others have
    those of the first.
    """
    base = copy(world.whole / "top", "mixed")
    world.run("top", world.root / "mixed_other", "--subsample", 2)
    for path in (world.root / "mixed_other").glob("*_1_top_coefficients.*"):
        shutil.copy(path, base)
    line = the_line(world.run("pcas", world.root / "mixed_out", "--input_dir", base, code=1))
    assert (
        "was made with data" in line
        and "make it again with: python compute_second_order_neuron_prs.py" in line
    )


# what `--keep top` keeps for itself


@pytest.mark.parametrize("pieces", [4, 20])  # of the first pass, of the second
def test_files_of_an_interrupted_run_that_are_cut_off(world, pieces):
    """As a machine that loses its power may leave them: made again where they can be, else refused by a
    line.
    """
    started = world.interrupt("top", world.root / f"started_cut_off_{pieces}", pieces=pieces)
    for bytes_left in (0, 200):
        output = copy(started, f"cut_off_{pieces}_{bytes_left}")
        [path] = progress_files(output)
        os.truncate(path, bytes_left)
        world.run("top", output)
        assert_same_files(output, world.whole / "top")
    output = copy(started, f"cut_off_coefficients_{pieces}")
    os.truncate(next(output.glob("*.top2.0")), 4096)
    line = the_line(world.run("top", output, code=1))
    assert ".top2.0 of an interrupted run is missing or cut off; add --overwrite" in line
    world.run("top", output, "--overwrite")
    assert_same_files(output, world.whole / "top")


def test_keeping_all_of_a_layer_in_between(world):
    """It makes files that the interrupted pass is making, too."""
    output = world.interrupt("top", world.root / "in_between", pieces=20)
    world.run("full", output, "--mlp_layer", 1)
    world.run("top", output)
    expected = world.root / "in_between_expected"
    for name, flags in (("full", ["--mlp_layer", 1]), ("top", [])):
        world.run(name, expected, *flags)
    assert_same_files(output, expected)


def test_what_is_kept_has_its_room_from_the_start(tmp_path):
    """A map into a file without it ends the process by a signal when the disk is full, and no line is
    printed.
    """
    scratch = Scratch(tmp_path / "x.partial", (10, 100, 20), "float32", resumed=False)
    assert (tmp_path / "x.partial").stat().st_blocks * 512 >= 80_000 and not scratch.array.any()
    with (
        small_disk(tmp_path / "disk", 65536) as disk,
        pytest.raises(UserError, match="x.partial cannot be written"),
    ):
        Scratch(disk / "x.partial", (10, 100, 20), "float32", resumed=False)


def test_rows_that_wait_are_there_after_a_sync_and_of_one_place_the_latest(tmp_path):
    path = tmp_path / "x.partial"
    scratch = Scratch(path, (6, 3), "float32", resumed=False)
    rows = np.arange(15, dtype=np.float32).reshape(5, 3)
    scratch.put(np.array([4, 1]), rows[:2])
    scratch.put(np.array([1, 5, 0]), rows[2:])
    scratch.sync()
    expected = np.zeros((6, 3), np.float32)
    expected[[4, 1, 5, 0]] = rows[[0, 2, 3, 4]]
    assert np.array_equal(np.fromfile(path, np.float32).reshape(6, 3), expected)
