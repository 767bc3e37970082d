"""Stages as processes that can be killed, and as several that share the work.

They are forked from one process that has imported everything, so that one starts in half a second and not in
eight. As a script, `python -m tests.launcher '{"utils.runtime.passes.COMMIT_SECONDS": 0}' STAGE.py FLAGS`
runs a stage with constants changed.
"""

import functools
import importlib
import itertools
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import threading
import time
from contextlib import closing, suppress
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from zipfile import BadZipFile

import numpy as np
import open_clip
import torch
from tqdm import tqdm

from tests import tiny_timm  # noqa: F401 (its models are known to every stage)
from tests.conftest import ROOT
from tests.photos import discs, write_mat, write_photos
from tests.system import refuse
from utils.model.dictionaries import Dictionary
from utils.model.dictionary_files import save_dictionary

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTS = (  # of all stages, so that a process forks with them
    "applications.attack.generators",
    "applications.attack.judging",
    "applications.attack.words",
    "applications.explain.answer",
    "applications.explain.page",
    "applications.gallery.write",
    "applications.paper.items",
    "utils.ablation",
    "utils.concepts",
    "utils.deletion",
    "utils.evaluation",
    "utils.neurons",
    "utils.pca",
    "utils.segmentation",
    "utils.top_effects",
)
CONTEXT.set_forkserver_preload(["tests.launcher", *IMPORTS])
COMMITS = {
    "utils.runtime.passes.COMMIT_SECONDS": 0,
    "utils.runtime.passes.COMMIT_SHARE": 1e9,
}  # every piece is saved at once
WORDS = 60
GRADED = (1, 3)  # layers that are evaluated and in the gallery: the evaluation costs most of all stages
_RUNS = itertools.count()
STARTING = threading.Lock()  # tests start stages in several threads, and the environment is one for all
HANGS = 900  # seconds after which a process counts as hanging, however busy the machine is
STAGES = (
    "representations",
    "classifier",
    "full",
    "top",
    "pcas",
    "ablations",
    "texts",
    "decomposition",
    "evaluation",
    "gallery",
)
STAGES += ("segmentation",)
# look at units of a dictionary, or at pairs of neurons and heads
UNIT_STAGES = ("units_top", "units_full", "units_pcas", "units_evaluation", "pairs")
SELDOM = -2.5  # bias of units that act on few of the photos
RARE = 6  # units of `two_sided` that hardly act


def _start_forkserver():
    """Start the process that all stages fork from, in an environment of its own, unless it is there."""
    ours = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ |= ours
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def fork(function, *arguments):
    """A process that will call a function, to be started; it has imported everything."""
    with STARTING:
        _start_forkserver()
    return CONTEXT.Process(target=function, args=arguments)


def start(script, *flags, log, errors=None, environment=(), constants=()):
    """A stage as a process of its own, whose output goes to the file `log`; its stderr to `errors`, where
    that is given.

    constants: {module.NAME: value}, set beforehand.
    """
    command = [str(script), *map(str, flags)]
    logs = (str(log), str(errors or log))
    process = fork(_run_forked, command, logs, dict(environment), dict(constants))
    process.daemon = (
        "--num_workers" in command and command[command.index("--num_workers") + 1] == "0"
    )  # ends with the tests
    process.log, process.marker = Path(log), Path(f"{log}.held.0")
    process.start()
    return process


def finish(process, code=0):
    """Wait for a process; returns what it printed. Fails when it ends otherwise than with `code`."""
    process.join(HANGS)
    ended = process.exitcode
    if ended is None:
        process.kill()
    printed = process.log.read_text()
    assert ended == code, f"ended with {ended}:\n{printed[-3000:]}"
    return printed


def run_stage_of_user(script, *flags, folder, check=True, **options):
    """Run a stage to its end; returns `returncode`, `stdout` and `stderr`, as subprocess.run does. options:
    as in `start`.
    """
    stem = Path(folder) / str(next(_RUNS))
    process = start(script, *flags, log=f"{stem}.out", errors=f"{stem}.err", **options)
    process.join(HANGS)
    out, err = (Path(f"{stem}.{part}").read_text() for part in ("out", "err"))
    if check and process.exitcode:
        raise AssertionError(
            f"{script} {' '.join(map(str, flags))} ended with {process.exitcode}:\n{err[-2000:]}"
        )
    return SimpleNamespace(returncode=process.exitcode, stdout=out, stderr=err)


def run(script, *flags, log, code=0, **options):
    """Run a stage to its end; returns what it printed."""
    Path(log).unlink(missing_ok=True)
    return finish(start(script, *flags, log=log, **options), code)


def start_ranks(size, script, *flags, log, constants=()):
    """A stage as `size` processes, each told by its environment what torchrun tells it."""
    log, port, processes = Path(log), free_port(), []
    for rank in range(size):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = {name: str(value) for name, value in environment.items()}
        its_log, marker = log.with_name(f"{log.name}.{rank}"), Path(f"{log}.held.{rank}")
        its_log.unlink(missing_ok=True)
        marker.unlink(missing_ok=True)
        processes.append(start(script, *flags, log=its_log, environment=environment, constants=constants))
    return processes


def run_ranks(size, script, *flags, log, constants=()):
    """Returns what each of them printed."""
    return [finish(process) for process in start_ranks(size, script, *flags, log=log, constants=constants)]


def free_port():
    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def progress_files(folder):
    """The progress of the passes in a folder, and in that of the gallery's parts, as numpy reads it."""
    found = []
    for place in (Path(folder), Path(folder) / "gallery.parts"):
        with suppress(FileNotFoundError):  # it has just been removed
            found += list(place.glob("*.progress.*"))
    return [path for path in found if path.suffix[1:].isdecimal()]


def finished_pieces(folder):
    """How many pieces the progress files in a folder count."""
    count = 0
    for path in progress_files(folder):
        with suppress(OSError, ValueError, BadZipFile), np.load(path, allow_pickle=False) as saved:
            count += int(saved["done"].sum())
    return count


def wait_for(condition, process):
    """Poll until condition() holds; returns whether it did before the process ended."""
    deadline = time.monotonic() + HANGS
    while time.monotonic() < deadline:
        ended = process.poll() is not None if hasattr(process, "poll") else not process.is_alive()
        if condition():
            return True
        if ended:
            return False
        time.sleep(0.002)
    raise AssertionError(f"nothing happened for {HANGS} seconds")


def hold(pieces, log):
    """Constants of a stage that saves its progress after every piece and stops after so many, until it is
    released or killed.
    """
    return {**COMMITS, "hold": [pieces, f"{log}.held"]}


def wait_until_held(process):
    """Wait until a process with the constants of `hold` has stopped."""
    assert wait_for(process.marker.exists, process), process.log.read_text()[-3000:]


def release(process):
    """Let it run on."""
    process.marker.unlink()


def kill(*processes):
    """kill -9."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def contents(folder):
    """{name: bytes} of all files in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def assert_same_files(folder, expected):
    """Two folders hold the same files, byte for byte, and nothing temporary."""
    found, wanted = contents(folder), contents(expected)
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert not [name for name in found if "partial" in name or "progress" in name or "rank" in name]


def the_line(printed):
    """The one line that answers a fault; progress bars are no lines."""
    lines = [line for line in printed.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line]
    bars = (
        "images of ",
        "preprocessing: ",
        "folder: ",
        "images:",
        "means:",
        "effects:",
        "layer ",
        "OMP:",
        "scores:",
        "texts:",
    )
    bars += ("masks:", "bytes of images:", "rebuilding:")
    bars += ("102 units of ", "they rebuild ", "of the site's ", "without any attention ")  # no fault
    lines = [line for line in lines if not line.startswith(bars) and not line.endswith("GB free")]
    assert len(lines) == 1 and lines[0].startswith("error: "), printed
    return lines[0]


def two_sided(site="resid.post", layer=1, d=48, bias=-1e4):
    """A dictionary that rebuilds all: an orthogonal basis and its negative, and units that hardly act."""
    V = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0))).Q
    both = torch.cat([V, -V, V[:RARE]])
    biases = torch.zeros(len(both))
    biases[-RARE:] = bias
    decoder = torch.cat([V, -V, 1e-6 * V[:RARE]])
    return Dictionary(both, biases, decoder, torch.zeros(d), site=site, layer=layer)


class World:
    """Photos whose number no batch size divides, a tiny model, texts, a dictionary, and the flags that name
    them."""

    def __init__(self, root, model, per_class=16, graded=GRADED, **photos):
        self.graded = graded
        self.root, self.base, self.whole = Path(root), Path(root) / "base", Path(root) / "whole"
        self.photos = write_photos(self.root / "photos", per_class=per_class, side=40, **photos)
        for split in ("train", "val"):
            min((self.photos / split).rglob("*.JPEG")).unlink()
        rng = np.random.default_rng(0)
        words = ["".join(rng.choice(list("abcdefghijklmno"), 5)) for _ in range(WORDS)]
        (self.root / "words.txt").write_text("\n".join(words))
        save_dictionary(self.dictionary, two_sided(bias=SELDOM))
        self.model = ["--model", model, "--pretrained", "random"]
        self.data = ["--dataset", "folder", "--data_path", self.photos, "--num_workers", 0, "--batch_size", 4]
        self.train, self.val = [*self.data, "--split", "train"], [*self.data, "--split", "val"]

    @property
    def dictionary(self):
        return self.root / "mine.safetensors"

    @property
    def unit_base(self):
        return self.root / "units"

    def stages(self):
        """{name: (script, flags, constants)} in the README's order; inputs are in `base`."""
        k, layers, reads = ["--top_k_pca", 5], ["--mlp_layer", "all"], ["--input_dir", self.base]
        effects, small = "compute_second_order_neuron_prs.py", {"utils.omp.PURSUED": 16}
        graded = ["--mlp_layer", *self.graded]
        pcas = ["--dataset", "folder", *layers, *k, "--memory", 2e-5, *reads]
        texts = ["--text_descriptions", "words", "--components", 8, "--evaluate"]
        masks = [
            "--data_path",
            self.root / "discs.mat",
            "--mlp_layers",
            1,
            2,
            3,
            "--top_neurons",
            20,
            "--num_workers",
            0,
        ]
        masks += [*k, "--dataset", "folder", "--batch_size", 2, "--save_img"]
        return {
            "default": (effects, [*self.train, *k], {}),
            "representations": ("compute_representations.py", self.train, {}),
            "classifier": (
                "compute_classifier_projection.py",
                ["--dataset", "folder", "--data_path", self.photos],
                {"utils.model.texts.CLASSES": 1},
            ),
            "full": (effects, [*self.train, *layers, "--keep", "full"], {}),
            "top": (effects, [*self.train, *layers, "--keep", "top", *k], {}),
            "pcas": ("compute_pcas.py", pcas, {}),
            "ablations": ("compute_ablations.py", [*self.val, *layers, *k, *reads], {}),
            "texts": (
                "compute_text_set_projection.py",
                ["--text_descriptions", self.root / "words.txt"],
                {"utils.model.texts.TEXTS": 16},
            ),
            "decomposition": (
                "compute_sparse_decomposition.py",
                [*self.val, *layers, *k, *texts, *reads],
                small,
            ),
            "evaluation": ("evaluate_descriptions.py", [*self.val, *graded, *k, *texts[:-1], *reads], small),
            "gallery": (
                "make_gallery.py",
                [*self.val, *graded, *k, *texts[:-1], *reads, "--picture_size", 24],
                {},
            ),
            "segmentation": ("compute_segmentation.py", [*masks, *reads], {}),
            **self.unit_stages(k, texts[:-1], small),
        }

    def unit_stages(self, k, texts, small):
        """The stages that look at other units than neurons; inputs are in `unit_base`."""
        units = ["--units", self.dictionary]
        reads = ["--input_dir", self.unit_base, *units]
        effects = "compute_second_order_neuron_prs.py"
        described = [*self.val, *k, *texts, *reads]
        return {
            "units_top": (effects, [*self.train, "--keep", "top", *k, *units], {}),
            "units_full": (effects, [*self.train, "--keep", "full", *units], {}),
            "units_pcas": ("compute_pcas.py", ["--dataset", "folder", *k, *reads], {}),
            "units_decomposition": ("compute_sparse_decomposition.py", described, small),
            "units_evaluation": ("evaluate_descriptions.py", described, small),
            "pairs": (effects, [*self.train, "--units", "pairs", "--mlp_layer", 2, 3], {}),
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

    def start(self, name, output, *more, constants=()):
        """Start a stage."""
        arguments, own = self.command(name, output, *more)
        log = self.root / f"{Path(output).name}_{name}.log"
        log.unlink(missing_ok=True)
        return start(*arguments, log=log, constants={**own, **dict(constants)})

    def start_held(self, name, output, *more, pieces=2):
        """Start a stage and wait until `pieces` of its pieces are done and saved; there it stops."""
        log = self.root / f"{Path(output).name}_{name}.log"
        Path(f"{log}.held.0").unlink(missing_ok=True)
        process = self.start(name, output, *more, constants=hold(pieces, log))
        wait_until_held(process)
        return process

    def interrupt(self, name, output, *more, pieces=2):
        """A stage that kill -9 ends when `pieces` of its pieces are done. Returns the folder."""
        kill(self.start_held(name, output, *more, pieces=pieces))
        return output

    def make(self):
        """What later stages read, in `base`; and in `whole` what every stage leaves that nothing disturbs."""
        write_mat(self.root / "discs.mat", *discs(25))
        for name in ("classifier", "full", "pcas", "texts", "decomposition", "evaluation"):
            self.run(name, self.base)
        for name in ("units_top", "units_pcas", "texts", "units_decomposition"):
            self.run(name, self.unit_base)
        for name in (*STAGES, *UNIT_STAGES):
            self.run(name, self.whole / name)
        return self


def shared_world(tmp_path_factory, model):
    """One world for all test modules of a session."""
    return _world(tmp_path_factory.getbasetemp() / "world", model)


@functools.cache
def _world(root, model):
    return World(root, model).make()


def _run_forked(command, logs, environment, constants):
    for descriptor, log in enumerate(logs, start=1):
        with open(log, "ab") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # loader processes start as those of a plain process
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that kill -9 would leave behind
    run_stage(command, constants)


def run_stage(command, constants):
    """Run a stage in this process.

    constants: {"module.NAME": value}, set beforehand. Besides, {"folder": path} is where it runs;
    {"templates": n} is how many of the 80 a classifier takes; {"without": {name of a call: errno}} is what
    the system refuses, see `tests.system`; {"files": n} is how many may be open; {"hold": [n, marker]} stops
    after n pieces (see `hold`); and {"die": i} is kill -9 just before the i-th time that a file gets its name
    or is removed; 0 prints how many times there are.
    """
    constants = dict(constants)
    os.chdir(constants.pop("folder", ROOT))
    held, death = constants.pop("hold", None), constants.pop("die", None)
    if files := constants.pop("files", None):
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    refuse(constants.pop("without", {}))
    if templates := constants.pop("templates", None):
        constants["open_clip.OPENAI_IMAGENET_TEMPLATES"] = open_clip.OPENAI_IMAGENET_TEMPLATES[:templates]
    if held:
        _hold(*held)
    if death is not None:
        times = itertools.count(1)
        for owner, name in ((os, "replace"), (Path, "unlink")):
            _before(owner, name, lambda: next(times) == death and os.kill(os.getpid(), signal.SIGKILL))
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    sys.argv = command
    runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    if death == 0:
        print(f"{next(times) - 1} names and removals")


def _hold(pieces, marker):
    """Make a pass save its progress after so many pieces, and wait as long as the marker is there."""
    pass_class, turns = importlib.import_module("utils.runtime.passes").Pass, itertools.count(1)
    marker, end_turn = Path(f"{marker}.{os.environ.get('RANK', 0)}"), pass_class._end_turn

    def held(self, *piece):
        end_turn(self, *piece)
        if next(turns) == pieces:
            self.commit()
            marker.touch()
            while marker.exists():
                time.sleep(0.005)

    pass_class._end_turn = held


def _before(owner, name, action):
    """Let a function do something else first."""
    function = getattr(owner, name)

    def with_action(*args, **options):
        action()
        return function(*args, **options)

    setattr(owner, name, with_action)


if __name__ == "__main__":
    run_stage(sys.argv[2:], json.loads(sys.argv[1]))
