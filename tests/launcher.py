"""Stages as processes that can be killed, and as several that share the work.

They are forked from one process that has imported everything, so that one starts in half a second and not in four. As a script,
`python -m tests.launcher '{"utils.rows.COMMIT_SECONDS": 0}' STAGE.py FLAGS` runs a stage with constants changed.
"""

import functools
import importlib
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
import time
from contextlib import closing
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tests.conftest import ROOT
from tests.photos import write_photos
from tests.test_segmentation import discs, write_mat

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTS = ("ablation", "adversarial", "arguments", "clip", "concepts", "datasets", "pca", "segmentation", "sparse_coding")
CONTEXT.set_forkserver_preload(["tests.launcher", *(f"utils.{name}" for name in (*IMPORTS, "top_effects", "visualization"))])
COMMITS = {"utils.rows.COMMIT_SECONDS": 0, "utils.top_effects.COMMIT_SECONDS": 0}  # every piece is counted at once
SLOW = {**COMMITS, "pause": 0.04}
WORDS = 60
STAGES = ("representations", "classifier", "full", "top", "pcas", "ablations", "texts", "decomposition", "segmentation")


def start(script, *flags, log, environment=(), constants=()):
    """A stage as a process of its own, whose output goes to the file `log`. constants: {module.NAME: value}, set beforehand."""
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "PYTHONPATH")}
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    command = [str(script), *map(str, flags)]
    process = CONTEXT.Process(target=_run_forked, args=(command, str(log), dict(environment), dict(constants)))
    process.log = Path(log)
    process.start()
    return process


def finish(process, code=0, seconds=120):
    """Wait for a process; returns what it printed. Fails when it ends otherwise than with `code`."""
    process.join(seconds)
    ended = process.exitcode
    if ended is None:
        process.kill()
    printed = process.log.read_text()
    assert ended == code, f"ended with {ended}:\n{printed[-3000:]}"
    return printed


def run(script, *flags, log, code=0, **options):
    """Run a stage to its end; returns what it printed."""
    Path(log).unlink(missing_ok=True)
    return finish(start(script, *flags, log=log, **options), code)


def start_ranks(size, script, *flags, log, constants=()):
    """A stage as `size` processes, each told by its environment what torchrun tells it."""
    log, port, processes = Path(log), free_port(), []
    for rank in range(size):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in environment.items()}
        its_log = log.with_name(f"{log.name}.{rank}")
        its_log.unlink(missing_ok=True)
        processes.append(start(script, *flags, log=its_log, environment=environment, constants=constants))
    return processes


def run_ranks(size, script, *flags, log, constants=()):
    """Returns what each of them printed."""
    return [finish(process) for process in start_ranks(size, script, *flags, log=log, constants=constants)]


def free_port():
    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def finished_pieces(folder):
    """How many pieces the records of the passes in a folder count."""
    return sum(path.read_bytes().split(b"\n", 1)[-1].count(b"\1") for path in Path(folder).glob("*.progress"))


def wait_for(condition, process, seconds=60):
    """Poll until condition() holds; returns whether it did before the process ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended = process.poll() is not None if hasattr(process, "poll") else not process.is_alive()
        if condition():
            return True
        if ended:
            return False
        time.sleep(0.002)
    raise AssertionError(f"nothing happened for {seconds} seconds")


def kill_when(condition, process):
    """kill -9 as soon as condition() holds."""
    assert wait_for(condition, process), process.log.read_text()[-3000:]
    process.kill()
    process.join()


def contents(folder):
    """{name: bytes} of all files in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def assert_same_files(folder, expected):
    """Two folders hold the same files, byte for byte, and nothing temporary."""
    found, wanted = contents(folder), contents(expected)
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert not [name for name in found if "partial" in name or "progress" in name or "rank" in name]


def the_line(printed):
    """The one line that answers a fault; progress bars are no lines."""
    lines = [line for line in printed.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line]
    bars = ("images:", "means:", "effects:", "layer ", "OMP:", "scores:", "texts:")
    lines = [line for line in lines if not line.startswith(bars) and not line.endswith("GB free")]
    assert len(lines) == 1 and lines[0].startswith("error: "), printed
    return lines[0]


class World:
    """Photos whose number no batch size divides, a tiny model, texts, and the flags that name them."""

    def __init__(self, root, model, per_class=16, **photos):
        self.root, self.base, self.whole = Path(root), Path(root) / "base", Path(root) / "whole"
        self.photos = write_photos(self.root / "photos", per_class=per_class, side=40, **photos)
        for split in ("train", "val"):
            min((self.photos / split).rglob("*.JPEG")).unlink()
        rng = np.random.default_rng(0)
        words = ["".join(rng.choice(list("abcdefghijklmno"), 5)) for _ in range(WORDS)]
        (self.root / "words.txt").write_text("\n".join(words))
        self.model = ["--model", model, "--pretrained", "random"]
        self.data = ["--dataset", "folder", "--data_path", self.photos, "--num_workers", 0, "--batch_size", 4]
        self.train, self.val = [*self.data, "--split", "train"], [*self.data, "--split", "val"]

    def stages(self):
        """{name: (script, flags, constants)} in the README's order; inputs are in `base`."""
        k, layers, reads = ["--top_k_pca", 5], ["--mlp_layer", "all"], ["--input_dir", self.base]
        effects, small = "compute_second_order_neuron_prs.py", {"utils.sparse_coding.BLOCK": 16}
        pcas = ["--dataset", "folder", *layers, *k, "--memory", 2e-5, *reads]
        texts = ["--text_descriptions", "words", "--components", 8, "--evaluate"]
        masks = ["--dataset_path", self.root / "discs.mat", "--mlp_layers", 1, 2, 3, "--top_neurons", 20, "--num_workers", 0]
        masks += [*k, "--train_dataset", "folder", "--batch_size", 2, "--save_img"]
        return {
            "default": (effects, [*self.train, *k], {}),
            "representations": ("compute_representations.py", self.train, {}),
            "classifier": ("compute_classifier_projection.py", ["--dataset", "folder", "--data_path", self.photos], {}),
            "full": (effects, [*self.train, *layers, "--keep", "full"], {}),
            "top": (effects, [*self.train, *layers, "--keep", "top", *k], {}),
            "pcas": ("compute_pcas.py", pcas, {}),
            "ablations": ("compute_ablations.py", [*self.val, *layers, *k, *reads], {}),
            "texts": ("compute_text_set_projection.py", ["--text_descriptions", self.root / "words.txt"], {}),
            "decomposition": ("compute_sparse_decomposition.py", [*self.val, *layers, *k, *texts, *reads], small),
            "segmentation": ("compute_segmentation.py", [*masks, *reads], {}),
        }

    def command(self, name, output, *more):
        """The arguments of `start` for a stage, and its constants."""
        script, flags, constants = self.stages()[name]
        return [script, *self.model, "--output_dir", output, *flags, *more], constants

    def run(self, name, output, *more, code=0, constants=(), size=1):
        """Run a stage by one process, or by `size`; returns what (the first of them) printed."""
        arguments, own = self.command(name, output, *more)
        log = self.root / f"{Path(output).name}_{name}.log"
        if size > 1:
            return run_ranks(size, *arguments, log=log, constants={**own, **dict(constants)})[0]
        return run(*arguments, log=log, code=code, constants={**own, **dict(constants)})

    def start(self, name, output, *more, constants=(), **options):
        """Begin a stage."""
        arguments, own = self.command(name, output, *more)
        log = self.root / f"{Path(output).name}_{name}.log"
        log.unlink(missing_ok=True)
        return start(*arguments, log=log, constants={**own, **dict(constants)}, **options)

    def make(self):
        """What later stages read, in `base`; and in `whole` what every stage leaves that nothing disturbs."""
        write_mat(self.root / "discs.mat", *discs(9))
        for name in ("classifier", "full", "pcas", "texts"):
            self.run(name, self.base)
        for name in STAGES:
            self.run(name, self.whole / name)
        return self


def shared_world(tmp_path_factory, model):
    """One world for all test modules of a session."""
    return _world(tmp_path_factory.getbasetemp() / "world", model)


@functools.cache
def _world(root, model):
    return World(root, model).make()


def _run_forked(command, log, environment, constants):
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that kill -9 would leave behind
    run_stage(command, constants)


def run_stage(command, constants):
    """Run a stage in this process.

    constants: {"module.NAME": value}, set beforehand. Besides, {"pause": seconds} is slept before each piece is counted, and
    {"die": i} is kill -9 just before the i-th time that a file gets its name or is removed; 0 prints how many times there are.
    """
    os.chdir(ROOT)
    constants = dict(constants)
    pause, death = constants.pop("pause", 0), constants.pop("die", None)
    if pause:
        _before(importlib.import_module("utils.rows").RowWriter, "write", lambda: time.sleep(pause))
        _before(importlib.import_module("utils.top_effects").Saved, "step", lambda: time.sleep(pause))
    if death is not None:
        times = itertools.count(1)
        for owner, name in ((os, "replace"), (Path, "unlink")):
            _before(owner, name, lambda: next(times) == death and os.kill(os.getpid(), signal.SIGKILL))
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    if death == 0:
        print(f"{next(times) - 1} names and removals")


def _before(owner, name, action):
    """Let a function do something else first."""
    function = getattr(owner, name)

    def with_action(*args, **options):
        action()
        return function(*args, **options)

    setattr(owner, name, with_action)


if __name__ == "__main__":
    run_stage(sys.argv[2:], json.loads(sys.argv[1]))
