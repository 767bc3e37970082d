"""The stages on a GPU, if there is one, against the CPU; the cost of `--precision`, also on the CPU."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from tests.conftest import ROOT
from tests.launcher import STAGES, contents, shared_world, the_line
from utils.model.clip import load_clip
from utils.prs import fold, second_order
from utils.runtime.errors import UserError

LAYER = 1
GPU = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
needs_gpu = pytest.mark.skipif(
    GPU is None, reason="there is no CUDA or MPS device; the stages were tested on the CPU only"
)
needs_cuda = pytest.mark.skipif(
    GPU != "cuda", reason="there is no CUDA device; tf32 and autocast on CUDA were not tested"
)
READING = ("pcas", "ablations", "decomposition", "segmentation")
# errors of the effects from rounding to 8, 10 or 23 bits, relative to the largest effect, on a random model
# of 5 layers
TOLERANCES = {"bfloat16": 0.03, "float16": 0.003, "tf32": 0.003, "float32": 1e-4}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    return shared_world(tmp_path_factory, tiny_model)


def effects_of(model, precision, device="cpu"):
    """Unit representations [B, D], and the effects [B, N, D] of a layer on 12 images."""
    vit = load_clip(model, "random", device, precision=precision).vit
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(7)).to(device)
    directions = fold(vit, LAYER)
    representation, [phi] = second_order(vit, images, [directions])
    return torch.nn.functional.normalize(representation, dim=-1).cpu(), phi.dense().cpu()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_close_to_float32_on_a_cpu(tiny_model, precision):
    r, phi = effects_of(tiny_model, precision)
    r_exact, phi_exact = effects_of(tiny_model, "float32")
    assert r.dtype == phi.dtype == torch.float32
    assert 0 < (phi - phi_exact).abs().max() < TOLERANCES[precision] * phi_exact.abs().max()
    assert 0 < (r - r_exact).abs().max() < TOLERANCES[precision]
    cosine = torch.nn.functional.cosine_similarity(phi - phi.mean(0), phi_exact - phi_exact.mean(0), dim=-1)
    assert cosine.median() > 1 - 10 * TOLERANCES[precision] ** 2


def test_the_stage_records_the_precision_and_stays_close(world):
    output = world.root / "bfloat16"
    world.run("full", output, "--precision", "bfloat16")
    name = f"folder_train_mlps_tiny_random_{LAYER}_coefficients"
    assert json.loads((output / f"{name}.meta.json").read_text())["precision"] == "bfloat16"
    found, exact = (np.load(folder / f"{name}.npy") for folder in (output, world.whole / "full"))
    assert (
        found.dtype == np.float32
        and 0 < np.abs(found - exact).max() < TOLERANCES["bfloat16"] * np.abs(exact).max()
    )


def test_tf32_without_a_cuda_gpu_is_refused(world, tiny_model):
    line = the_line(world.run("full", world.root / "tf32", "--precision", "tf32", code=1))
    assert line == "error: --precision tf32 is a mode of CUDA GPUs; use float32 or bfloat16"
    with pytest.raises(UserError, match="tf32"):
        load_clip(tiny_model, "random", "cpu", precision="tf32")


@pytest.mark.skipif(GPU is not None, reason="there is a GPU, which is the default")
def test_the_default_device_without_a_gpu_is_the_cpu(world):
    said = world.run(
        "representations", world.root / "no_gpu", "--device", "cuda:0"
    )  # as published commands have it
    assert "note: --device cuda:0: there is no CUDA GPU, so another device is used" in said
    found, expected = (
        contents(folder) for folder in (world.root / "no_gpu", world.whole / "representations")
    )
    assert found == expected


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
def test_effects_on_a_gpu_are_those_of_the_cpu(tiny_model, precision):
    if precision != "float32" and GPU != "cuda":
        pytest.skip("only CUDA has this precision")
    r, phi = effects_of(tiny_model, precision, GPU)
    r_exact, phi_exact = effects_of(tiny_model, "float32")
    assert (phi - phi_exact).abs().max() < TOLERANCES[precision] * phi_exact.abs().max()
    assert (r - r_exact).abs().max() < TOLERANCES[precision]


def on_gpu(world, name, output, *flags):
    """Run a stage in a process that sees the GPU."""
    (script, *arguments), _ = world.command(name, output, *flags)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, script, *map(str, arguments), "--device", GPU]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_gpu
def test_every_stage_on_a_gpu_is_close_to_the_cpu(world):
    """Each stage on the GPU reads what earlier stages computed there."""
    output = world.root / "gpu"
    for name in STAGES:
        on_gpu(world, name, output, *(["--input_dir", output] if name in READING else []))
    expected = {path.name: path for name in STAGES for path in (world.whole / name).glob("*.npy")}
    assert {path.name for path in output.glob("*.npy")} == expected.keys()
    for name, path in expected.items():
        found, exact = np.load(output / name), np.load(path)
        assert found.shape == exact.shape and found.dtype == exact.dtype, name
        if "predictions" in name or "top_images" in name:
            assert (found == exact).mean() > 0.97, name
        elif "top_coefficients" in name or "_maps" in name:  # near-ties may swap rows
            assert np.isclose(found, exact, atol=1e-3 * np.abs(exact).max()).mean() > 0.97, name
        elif "_pca" in name:
            assert np.median((found * exact).sum(axis=1)) > 0.9999, name
        else:
            assert_allclose(found, exact, atol=1e-3 * max(np.abs(exact).max(), 1e-6), err_msg=name)


@needs_cuda
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_a_stage_on_cuda_in_lower_precision(world, precision):
    output = world.root / f"cuda_{precision}"
    on_gpu(world, "full", output, "--precision", precision)
    for layer in range(4):
        name = f"folder_train_mlps_tiny_random_{layer}_coefficients.npy"
        found, exact = np.load(output / name), np.load(world.whole / "full" / name)
        assert np.abs(found - exact).max() < TOLERANCES[precision] * np.abs(exact).max()
