"""Several processes leave the files of one, on one machine or on two, and the death of one of them ends
all.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.launcher import (
    COMMITS,
    HANGS,
    STAGES,
    UNIT_STAGES,
    assert_same_files,
    finish,
    finished_pieces,
    free_port,
    hold,
    kill,
    release,
    shared_world,
    start_ranks,
    the_line,
    wait_for,
    wait_until_held,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    return shared_world(tmp_path_factory, tiny_model)


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_leave_the_files_of_one(world, size):
    for name in (*STAGES, *UNIT_STAGES):
        output = world.root / f"by_{size}" / name
        printed = world.run(name, output, size=size)
        assert_same_files(output, world.whole / name)
        assert "next: " in printed or "layer " in printed or "wrote" in printed


def test_only_rank_0_reports(world):
    arguments, _ = world.command("representations", world.root / "reports")
    first, second = start_ranks(2, *arguments, log=world.root / "reports.log")
    printed = [finish(process) for process in (first, second)]
    assert "next: python" in printed[0] and printed[1] == ""


def test_more_processes_than_pieces(world):
    output = world.root / "many"
    world.run("segmentation", output, size=6)  # 9 images in 5 batches
    assert_same_files(output, world.whole / "segmentation")
    for size in (1, 3):
        world.run("top", world.root / f"few_{size}", "--batch_size", 32, size=size)  # 63 images in 2 batches
    assert_same_files(world.root / "few_3", world.root / "few_1")


@pytest.mark.parametrize("name", ["full", "units_full"])
@pytest.mark.parametrize(("started_by", "finished_by"), [(2, 3), (3, 1), (1, 2)])
def test_a_pass_may_be_finished_by_another_number_of_processes(world, name, started_by, finished_by):
    output = world.root / f"{name}_from_{started_by}_to_{finished_by}"
    interrupt(world, name, output, started_by)
    assert finished_pieces(output) == 2 * started_by
    world.run(name, output, size=finished_by)
    assert_same_files(output, world.whole / name)


@pytest.mark.parametrize("size, pieces", [(2, 2), (2, 7), (3, 4)])  # of one pass after the other
def test_grades_of_units_are_resumed_by_as_many_processes(world, size, pieces):
    output = world.root / f"units_graded_by_{size}_{pieces}"
    arguments, constants = world.command("units_evaluation", output)
    log = world.root / f"{output.name}.log"
    held = {**constants, **hold(pieces, log)}
    processes = start_ranks(size, *arguments, log=log, constants=held)
    processes[-1].marker = Path(f"{log}.held.{size - 1}")
    wait_until_held(processes[-1])  # the others may wait for it
    kill(*processes)
    assert finished_pieces(output) >= 1 and not list(output.glob("*grades*.npy"))
    world.run("units_evaluation", output, size=size)
    assert_same_files(output, world.whole / "units_evaluation")


def test_sums_that_another_process_took_over_count_once(world):
    """Two processes, killed; one, which takes over what they have, killed; two again."""
    output = world.root / "taken_over"
    interrupt(world, "full", output, 2)
    interrupt(world, "full", output, 1)
    assert finished_pieces(output) == 6 + 2  # of the one, who has those of both, and what the second has left
    world.run("full", output, size=2)
    assert_same_files(output, world.whole / "full")


@pytest.mark.parametrize("name", ["top", "units_top"])
@pytest.mark.parametrize("size, pieces", [(2, 2), (2, 10), (3, 7)])  # of the first pass, or of the second
def test_what_processes_keep_for_themselves_is_resumed_by_as_many(world, name, size, pieces):
    output = world.root / f"{name}_of_{size}_{pieces}"
    interrupt(world, name, output, size, pieces)
    line = the_line(world.run(name, output, code=1))
    assert "belongs to a run with other number of processes" in line and "--overwrite" in line
    again = shutil.copytree(output, world.root / f"{output.name}_again")
    world.run(name, output, size=size)
    assert_same_files(output, world.whole / name)
    world.run(name, again, "--overwrite")  # also what the second process has kept goes
    assert_same_files(again, world.whole / name)


def start_held(world, name, output, size, pieces=2):
    """Processes of a stage that have stopped after `pieces` pieces each."""
    arguments, _ = world.command(name, output)
    log = world.root / f"{output.name}.log"
    processes = start_ranks(size, *arguments, log=log, constants=hold(pieces, log))
    for rank, process in enumerate(processes):
        process.marker = Path(f"{log}.held.{rank}")
        wait_until_held(process)
    return processes


def interrupt(world, name, output, size, pieces=2):
    """kill -9 of all processes in the middle of a stage."""
    kill(*start_held(world, name, output, size, pieces))


def test_who_waits_for_a_process_that_died_says_so(world):
    """On another machine, where no torchrun ends it."""
    first, second = start_held(world, "full", world.root / "waiting", 2)
    kill(second)
    release(first)
    line = the_line(finish(first, code=1))
    assert "another process of this run has ended" in line and "run the same command again" in line
    world.run("full", world.root / "waiting", size=2)
    assert_same_files(world.root / "waiting", world.whole / "full")


def test_a_process_that_outlives_rank_0_keeps_others_from_its_files(world):
    """It would write into the files of the next run, where a state is kept, with other content."""
    output = world.root / "outlives"
    first, second = start_held(world, "top", output, 2)
    kill(first)
    for size in (1, 2):
        line = the_line(world.run("top", output, size=size, code=1) if size == 1 else refused(world, output))
        assert f"is being made by compute_second_order_neuron_prs.py (process {second.pid} on " in line
    kill(second)
    world.run("top", output, size=2)
    assert_same_files(output, world.whole / "top")


def refused(world, output):
    """What the first of two processes says that are refused."""
    arguments, constants = world.command("top", output)
    first, second = start_ranks(2, *arguments, log=world.root / "refused.log", constants=constants)
    said = finish(first, code=1)
    kill(second)
    return said


def torchrun(*options, arguments, constants, log):
    """Start a stage by torchrun, as a user does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    stage = ["-m", "tests.launcher", json.dumps(constants), *map(str, arguments)]
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, options), *stage]
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    process.log, process.marker = log, Path(f"{log}.held.0")
    return process


def process_of_rank(torchrun, rank):
    """The id of a worker: a child of torchrun that has RANK in its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == torchrun.pid and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(
                b"\0"
            ):
                return int(folder.name)
        except OSError:  # it has ended
            continue


def test_the_death_of_a_process_ends_all_and_the_same_command_completes_the_work(world):
    output, log = world.root / "death", world.root / "death.log"
    arguments, _ = world.command("full", output)
    constants = hold(2, log)
    run = torchrun(
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
        arguments=arguments,
        constants=constants,
        log=log,
    )
    wait_until_held(run)
    assert wait_for(Path(f"{log}.held.1").exists, run)
    survivor = process_of_rank(run, 0)
    os.kill(process_of_rank(run, 1), signal.SIGKILL)
    assert run.wait(HANGS) != 0  # without waiting for rank 0, which is held
    assert not Path(f"/proc/{survivor}").exists()
    assert "SIGKILL" in log.read_text() or "Signal 9" in log.read_text()
    assert not list(output.glob("*.npy"))  # nothing has its final name
    assert finished_pieces(output) == 4  # of 16
    world.run("full", output, size=2)
    assert_same_files(output, world.whole / "full")


def test_an_image_that_one_process_cannot_read_is_one_line_and_ends_all(world):
    """Rank 1 reads it. When the image is fixed, the same command resumes."""
    output, log = world.root / "unreadable", world.root / "unreadable.log"
    image = sorted((world.photos / "train").rglob("*.JPEG"))[-2]
    whole = image.read_bytes()
    image.write_bytes(bytes(len(whole)))
    arguments, _ = world.command("representations", output)
    try:
        run = torchrun(
            "--nproc_per_node=2",
            f"--master_port={free_port()}",
            arguments=arguments,
            constants=COMMITS,
            log=log,
        )
        assert run.wait(HANGS) != 0
    finally:
        image.write_bytes(whole)
    said = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert (
        len(said) == 1
        and image.name in said[0]
        and 'Traceback (most recent call last):\n  File "/' not in said[0]
    )
    assert finished_pieces(output) == 15  # all but the last one
    world.run("representations", output, size=2)
    assert_same_files(output, world.whole / "representations")


def test_two_machines_leave_the_files_of_one(world):
    output, port = world.root / "machines", free_port()
    arguments, _ = world.command("top", output)
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    logs = [world.root / f"node{node}.log" for node in (0, 1)]
    runs = [
        torchrun(*nodes, f"--node_rank={i}", arguments=arguments, constants={}, log=log)
        for i, log in enumerate(logs)
    ]
    for run, log in zip(runs, logs, strict=True):
        assert run.wait(HANGS) == 0, log.read_text()[-3000:]
    assert_same_files(output, world.whole / "top")
