"""Two runs for the same files: one makes them, the other refuses in a line; a lock dies with its process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.launcher import (
    COMMITS,
    STAGES,
    assert_same_files,
    contents,
    finish,
    fork,
    kill,
    release,
    run,
    shared_world,
    start,
    the_line,
)
from utils.runtime import locks
from utils.runtime.errors import UserError
from utils.runtime.files import save_atomic
from utils.runtime.locks import Lock

HOLDER = """
import sys, time
from utils.runtime.locks import Lock
with Lock(sys.argv[1], sys.argv[2:]):
    print("held", flush=True)
    time.sleep(600)
"""
WITH_STATE = ("top", "evaluation", "gallery")
PAIRS = 30


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    return shared_world(tmp_path_factory, tiny_model)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a.npy, which is also about b.npy."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "a.npy"), "a.npy", "b.npy"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def content_of(path):
    return json.loads(path.with_name(f"{path.name}.lock").read_text())


@pytest.mark.parametrize(("name", "files"), [("a.npy", None), ("b.npy", None), ("c.npy", ["c.npy", "b.npy"])])
def test_who_makes_one_of_the_files_is_named(tmp_path, holder, name, files):
    with pytest.raises(UserError) as error, Lock(tmp_path / name, files):
        pass
    said = str(error.value)
    assert f"is being made by -c (process {holder.pid} on " in said and "\n" not in said
    assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d; wait until it has ended, or end it", said)
    assert {path.name for path in tmp_path.iterdir()} == {"a.npy.lock"}


def test_other_files_are_free(tmp_path, holder):
    with Lock(tmp_path / "c.npy"), Lock(tmp_path / "c.npy"):  # twice in one process is once
        assert (tmp_path / "c.npy.lock").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a.npy.lock"}


@pytest.mark.parametrize(("name", "files"), [("a.npy", None), ("b.npy", None), ("c.npy", ["c.npy", "b.npy"])])
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder, name, files):
    holder.kill()
    holder.wait()
    with Lock(tmp_path / name, files):
        assert content_of(tmp_path / name)["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("system", ["locks", "no locks"])
@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, False),  # a process that runs
        ({"boot": "of an earlier start"}, True),
        ({"boot": "of another machine", "machine": "node17 9f"}, False),
        ({"machine": "a container's earlier name", "started": "1"}, True),
        ({"process": 2**22 + 1}, True),
        ({"started": "1"}, True),  # another process has its number now
    ],
)
def test_whose_end_is_known(tmp_path, monkeypatch, system, changes, free):
    """By the system where the disk has locks, else by the number and the start of the process."""
    if system == "no locks":
        monkeypatch.setattr(locks, "_held", lambda file: None)
    elif not changes:
        pytest.skip("the system would say that nobody holds it")
    path = tmp_path / "a.npy"
    here = {**locks._here(), "since": "2026-01-01 00:00:00", "script": "stage.py", "files": ["a.npy"]}
    path.with_name("a.npy.lock").write_text(json.dumps(here | changes))
    if free:
        with Lock(path):
            pass
        assert not list(tmp_path.iterdir())
        return
    with (
        pytest.raises(UserError, match=r"stage.py .*remove \S+a.npy.lock and run the same command again"),
        Lock(path),
    ):
        pass
    assert content_of(path) == here | changes


def test_a_lock_that_was_never_filled_in_is_taken_over(tmp_path):
    (tmp_path / "a.npy.lock").touch()
    with Lock(tmp_path / "a.npy"):
        assert content_of(tmp_path / "a.npy")["process"] == os.getpid()


@pytest.mark.parametrize(
    "content", ['{"files": null}', "5", '[["a.npy"]]', '{"files": ["a.npy", 3]}', "[" * 100_000, "é\0"]
)
def test_other_programs_locks_do_not_count(tmp_path, content):
    (tmp_path / "conda.lock").write_text(content)
    with Lock(tmp_path / "a.npy"):
        assert content_of(tmp_path / "a.npy")["process"] == os.getpid()
    assert (tmp_path / "conda.lock").read_text() == content


@pytest.mark.parametrize("what", ["a folder", "a link to nothing"])
def test_what_cannot_be_a_lock_is_to_be_removed(tmp_path, what):
    lock = tmp_path / "a.npy.lock"
    lock.mkdir() if what == "a folder" else lock.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"a.npy.lock is {what}; remove it"), Lock(tmp_path / "a.npy"):
        pass


def test_a_lock_on_a_disk_without_room_leaves_nothing(tmp_path):
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of its own can only be mounted as root")
    try:
        (folder / "filler").write_bytes(bytes(4096))
        with pytest.raises(UserError, match="a.npy cannot be written .No space left"), Lock(folder / "a.npy"):
            pass
        assert {path.name for path in folder.iterdir()} == {"filler"}
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _take_turns(path, number):
    """Add 1 to a number in a file, many times, each time under the lock."""
    for _ in range(20):
        while True:
            try:
                with Lock(path):
                    value = int(Path(number).read_text())
                    time.sleep(0.001)
                    Path(number).write_text(str(value + 1))
                break
            except UserError:
                pass


def test_one_at_a_time_has_the_lock(tmp_path):
    (tmp_path / "number").write_text("0")
    processes = [fork(_take_turns, tmp_path / "a.npy", tmp_path / "number") for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "number").read_text() == "80"


def _save(path, letter):
    for _ in range(100):
        save_atomic(path, lambda file: [file.write(letter * 1000) for _ in range(50)])


def test_a_file_that_two_processes_save_at_once_is_whole_at_every_moment(tmp_path):
    path = tmp_path / "table.json"
    processes = [fork(_save, path, letter) for letter in (b"a", b"b")]
    for process in processes:
        process.start()
    seen = set()
    while any(process.is_alive() for process in processes):
        if path.exists():
            seen.add(path.read_bytes())
    assert [process.exitcode for process in processes] == [0, 0]
    assert seen <= {b"a" * 50000, b"b" * 50000} and [file.name for file in tmp_path.iterdir()] == [
        "table.json"
    ]


# stages


@pytest.mark.parametrize("name", STAGES)
def test_a_second_start_refuses_and_the_first_is_not_disturbed(world, name):
    if name == "classifier":
        pytest.skip("has a class, and so a piece, less than it takes to hold it")
    output = world.root / f"second_{name}"
    first = world.start_held(name, output, pieces=1)
    before = contents(output)
    arguments, constants = world.command(name, output)
    line = the_line(run(*arguments, log=world.root / f"second_{name}.log", code=1, constants=constants))
    assert re.search(
        rf"is being made by \S+ \(process {first.pid} on \S+\) since [\d: -]+; wait until it has ended", line
    )
    assert contents(output) == before
    release(first)
    finish(first)
    assert_same_files(output, world.whole / name)


@pytest.mark.parametrize("name", ["representations", "full", "top"])
def test_two_models_in_one_folder_do_not_disturb_each_other(world, tiny_model, name):
    """Their arrays have different names; the labels are those of both."""
    output, other = world.root / f"two_{name}", world.root / "other.json"
    other.write_text(Path(tiny_model).read_text())
    (script, *flags), constants = world.command(name, output)
    flags[flags.index(tiny_model)] = str(other)
    commands = [world.command(name, output)[0], [script, *flags]]
    logs = [world.root / f"two_{name}_{i}.log" for i in range(2)]
    processes = [start(*each, log=log, constants=constants) for each, log in zip(commands, logs, strict=True)]
    for process in processes:
        finish(process)
    whole, found = contents(world.whole / name), contents(output)
    assert [key for key in whole if found[key] != whole[key]] == []
    arrays = [key for key in whole if key.endswith(".npy") and "tiny" in key]
    assert arrays and [key for key in arrays if found[key.replace("tiny", "other")] != whole[key]] == []
    assert not [key for key in found if is_temporary(key)]


def is_temporary(name):
    return any(part in name for part in (".partial", ".progress.", ".lock", ".parts/")) or re.search(
        r"\.[0-9a-f]{12}\.", name
    )


@pytest.mark.parametrize("seed", range(PAIRS))
def test_random_pairs_of_starts_publish_what_one_run_does_or_nothing(world, seed):
    rng = np.random.default_rng(seed)
    name = WITH_STATE[seed % 3] if seed % 2 else STAGES[seed // 2 % len(STAGES)]
    output = world.root / f"pair_{seed}"
    arguments, constants = world.command(name, output)
    processes = []
    for number in range(2):
        log = world.root / f"pair_{seed}_{number}.log"
        processes.append(start(*arguments, log=log, constants={**constants, **COMMITS}))
        if number == 0:
            time.sleep(rng.uniform(0, 2) if rng.random() < 0.5 else rng.uniform(0, 0.2))
    if seed % 3 == 0:
        time.sleep(rng.uniform(0, 1))
        kill(processes[int(rng.integers(2))])
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    assert set(codes) <= {0, 1, -signal.SIGKILL}, [process.log.read_text()[-2000:] for process in processes]
    for process, code in zip(processes, codes, strict=True):
        if code == 1:
            last = process.log.read_text().strip().splitlines()[-1]  # after what it kept
            assert last.startswith("error: ") and "is being made by" in last
    whole = contents(world.whole / name)
    found = {
        key: value
        for key, value in (contents(output) if output.exists() else {}).items()
        if not is_temporary(key)
    }
    assert [key for key in found if found[key] != whole.get(key)] == []
    if 0 in codes:
        assert found.keys() == whole.keys()
    world.run(name, output)
    assert_same_files(output, world.whole / name)
