"""Several processes leave the files of one, on one machine or on two, and the death of one of them ends all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.launcher import (
    COMMITS,
    SLOW,
    STAGES,
    assert_same_files,
    finish,
    finished_pieces,
    free_port,
    shared_world,
    start_ranks,
    the_line,
    wait_for,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    return shared_world(tmp_path_factory, tiny_model)


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_leave_the_files_of_one(world, size):
    for name in STAGES:
        output = world.root / f"by_{size}" / name
        printed = world.run(name, output, size=size)
        assert_same_files(output, world.whole / name)
        assert "next: " in printed or "layer " in printed or "wrote" in printed


def test_only_the_first_process_reports(world):
    arguments, _ = world.command("representations", world.root / "reports")
    first, second = start_ranks(2, *arguments, log=world.root / "reports.log")
    first.join(60), second.join(60)
    assert first.exitcode == second.exitcode == 0
    assert "next: python" in first.log.read_text() and second.log.read_text() == ""


def test_more_processes_than_pieces(world):
    output = world.root / "many"
    world.run("segmentation", output, size=6)  # 9 images in 5 batches
    assert_same_files(output, world.whole / "segmentation")
    for size in (1, 3):
        world.run("top", world.root / f"few_{size}", "--batch_size", 32, size=size)  # 63 images in 2 batches
    assert_same_files(world.root / "few_3", world.root / "few_1")


@pytest.mark.parametrize(("begun_by", "finished_by"), [(2, 3), (3, 1), (1, 2)])
def test_a_pass_may_be_finished_by_another_number_of_processes(world, begun_by, finished_by):
    output = world.root / f"from_{begun_by}_to_{finished_by}"
    break_off(world, "full", output, begun_by)
    begun = finished_pieces(output)
    assert begun
    world.run("full", output, size=finished_by)
    assert_same_files(output, world.whole / "full")


def test_what_processes_keep_for_themselves_is_gone_on_with_by_as_many(world):
    output = world.root / "top_of_2"
    break_off(world, "top", output, 2)
    line = the_line(world.run("top", output, code=1))
    assert "belongs to a run with other settings" in line and "--overwrite" in line
    again = shutil.copytree(output, world.root / "top_of_2_again")
    world.run("top", output, size=2)
    assert_same_files(output, world.whole / "top")
    world.run("top", again, "--overwrite")  # also what the second process has kept goes
    assert_same_files(again, world.whole / "top")


def break_off(world, name, output, size):
    """kill -9 of all processes in the middle of a stage."""
    arguments, _ = world.command(name, output)
    processes = start_ranks(size, *arguments, log=world.root / f"{output.name}.log", constants=SLOW)
    assert wait_for(lambda: finished_pieces(output) >= 1, processes[0]), processes[0].log.read_text()
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def test_who_waits_for_a_process_that_died_says_so(world):
    """On another machine, where no torchrun ends it."""
    arguments, _ = world.command("full", world.root / "waiting")
    first, second = start_ranks(2, *arguments, log=world.root / "waiting.log", constants=SLOW)
    assert wait_for(lambda: finished_pieces(world.root / "waiting") >= 2, first), first.log.read_text()
    second.kill()
    line = the_line(finish(first, code=1, seconds=30))
    assert "another process of this run has ended" in line and "run the same command again" in line
    world.run("full", world.root / "waiting", size=2)
    assert_same_files(world.root / "waiting", world.whole / "full")


def torchrun(*options, arguments, constants, log):
    """Begin a stage by torchrun, as a user does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    stage = ["-m", "tests.launcher", json.dumps(constants), *map(str, arguments)]
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, options), *stage]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
    process.log = log
    return process


def process_of_rank(torchrun, rank):
    """The id of a worker: a child of torchrun that has RANK in its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == torchrun.pid and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:  # it has ended
            continue


def test_the_death_of_a_process_ends_all_and_the_same_command_completes_the_work(world):
    output, log = world.root / "death", world.root / "death.log"
    arguments, _ = world.command("full", output)
    run = torchrun("--nproc_per_node=2", f"--master_port={free_port()}", arguments=arguments, constants=SLOW, log=log)
    assert wait_for(lambda: finished_pieces(output) >= 2, run), log.read_text()
    os.kill(process_of_rank(run, 1), signal.SIGKILL)
    died = time.monotonic()
    assert run.wait(30) != 0 and time.monotonic() - died < 15
    assert "SIGKILL" in log.read_text() or "Signal 9" in log.read_text()
    assert not list(output.glob("*.npy"))  # nothing has its final name
    begun = finished_pieces(output)
    assert 2 <= begun < 16
    world.run("full", output, size=2)
    assert_same_files(output, world.whole / "full")


def test_an_image_that_one_process_cannot_read_is_one_line_and_ends_all(world):
    """The process that reads it is the second one; mended, the same command goes on."""
    output, log = world.root / "unreadable", world.root / "unreadable.log"
    image = sorted((world.photos / "train").rglob("*.JPEG"))[-2]
    whole = image.read_bytes()
    image.write_bytes(bytes(len(whole)))
    arguments, _ = world.command("representations", output)
    try:
        run = torchrun("--nproc_per_node=2", f"--master_port={free_port()}", arguments=arguments, constants=COMMITS, log=log)
        assert run.wait(90) != 0
    finally:
        image.write_bytes(whole)
    said = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and image.name in said[0] and 'Traceback (most recent call last):\n  File "/' not in said[0]
    assert finished_pieces(output) == 15  # all but the last one
    world.run("representations", output, size=2)
    assert_same_files(output, world.whole / "representations")


def test_two_machines_leave_the_files_of_one(world):
    output, port = world.root / "machines", free_port()
    arguments, _ = world.command("top", output)
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    logs = [world.root / f"node{node}.log" for node in (0, 1)]
    runs = [torchrun(*nodes, f"--node_rank={i}", arguments=arguments, constants={}, log=log) for i, log in enumerate(logs)]
    for run, log in zip(runs, logs, strict=True):
        assert run.wait(120) == 0, log.read_text()[-3000:]
    assert_same_files(output, world.whole / "top")
