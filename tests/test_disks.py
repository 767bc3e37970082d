"""Disks that cannot do all that a local one does: every stage runs there, and leaves the same files."""

import errno
import json

import numpy as np
import pytest

from tests.launcher import (
    STAGES,
    World,
    assert_same_files,
    hold,
    kill,
    shared_world,
    the_line,
    wait_until_held,
)
from tests.system import FILTERS

NETWORK = {  # what disks of networks answer, by the kind of what they cannot do
    "no room in advance, no shared maps, no sync": {
        "fallocate": errno.EOPNOTSUPP,
        "mmap": errno.ENODEV,
        "fsync": errno.EINVAL,
        "fdatasync": errno.EINVAL,
    },
    "none of these calls, and no locks": {
        "fallocate": errno.ENOSYS,
        "mmap": errno.EINVAL,
        "fsync": errno.ENOSYS,
        "fdatasync": errno.ENOSYS,
        "fcntl": errno.ENOLCK,
    },
}
pytestmark = pytest.mark.skipif(not FILTERS, reason="calls can be refused on Linux on x86-64 only")
DEEP = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 16,
        "layers": 48,
        "width": 16,
        "head_width": 8,
        "mlp_ratio": 2.0,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    return shared_world(tmp_path_factory, tiny_model)


@pytest.mark.parametrize("disk", NETWORK)
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_runs_on_a_disk_of_a_network(world, name, disk):
    output = world.root / f"network_{name}_{len(disk)}"
    world.run(name, output, constants={"without": NETWORK[disk]})
    assert_same_files(output, world.whole / name)


@pytest.mark.parametrize("name", ["full", "top"])
def test_what_was_interrupted_on_such_a_disk_is_resumed_there(world, name):
    [disk, *_] = NETWORK.values()
    output = world.root / f"network_dies_{name}"
    log = world.root / f"{output.name}_{name}.log"
    process = world.start(name, output, constants={**hold(2, log), "without": disk})
    wait_until_held(process)
    kill(process)
    world.run(name, output, constants={"without": disk})
    assert_same_files(output, world.whole / name)


@pytest.mark.parametrize("call", ["fallocate", "fsync"])
def test_an_error_of_the_disk_is_no_missing_ability(world, call):
    output = world.root / f"broken_{call}"
    line = the_line(world.run("full", output, constants={"without": {call: errno.EIO}}, code=1))
    assert "cannot be written (Input/output error); what is finished is kept" in line


def not_drawn(found, path):
    """Leave an empty picture; a row for each of 47 layers takes as long as all the rest."""
    path.touch()


def test_all_layers_of_a_deep_model_where_256_files_may_be_open(tmp_path):
    """As on macOS. 48 layers have more than 300 files."""
    (tmp_path / "deep.json").write_text(json.dumps(DEEP))
    world = World(tmp_path / "world", str(tmp_path / "deep.json"), per_class=2)
    few, output = {"files": 256}, tmp_path / "out"
    world.base = output
    for name in ("classifier", "top", "pcas", "texts"):
        world.run(name, output, *(["--subsample", 1] if name == "top" else []), constants=few)
    pcas = sorted(output.glob("*_5_pca.npy"))
    assert len(pcas) == 47 and all(np.isfinite(np.load(path)).all() for path in pcas)
    for name in ("decomposition", "ablations"):
        world.run(name, output, constants=few)
    layers = ["--mlp_layer", "all"]
    sparing = ["--controls", 2, "--delete", 1, "--rotated_units", 2]  # as many kinds of files, in less time
    constants = {**few, "utils.reports.plot_grades": not_drawn, "utils.omp.PURSUED": 128}
    world.run("evaluation", output, *layers, *sparing, constants=constants)
    world.run("gallery", output, *layers, constants=few)
    assert len(list((output / "gallery" / "data").iterdir())) >= 47
    assert not [path for path in output.iterdir() if "partial" in path.name or ".lock" in path.name]
