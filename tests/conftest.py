"""Small random image towers, and a way to run a stage as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from open_clip.transformer import VisionTransformer

from utils.model.hooks import HookedViT

ROOT = Path(__file__).parent.parent
TINY = {  # a CLIP that runs in a moment
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "layers": 5,
        "width": 48,
        "head_width": 12,
        "mlp_ratio": 2.0,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
RESNET = {"layers": [1, 1, 1, 1], "width": 4, "head_width": 32, "image_size": 64, "patch_size": None}
TINY_RESNET = TINY | {"vision_cfg": RESNET}


def random_tower(seed=0, **options):
    """A small ViT of which every parameter is random, LayerNorm weights and all biases included."""
    torch.manual_seed(seed)
    settings = {
        "image_size": 32,
        "patch_size": 8,
        "width": 48,
        "layers": 5,
        "heads": 4,
        "mlp_ratio": 2.0,
        "output_dim": 24,
    }
    visual = VisionTransformer(**(settings | options)).eval().requires_grad_(False)
    for name, parameter in visual.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(
                torch.randn_like(parameter) * 0.5
                + (1.0 if ".weight" in name or "ln_post.weight" in name else 0.0)
            )
        elif "mlp" in name or "attn" in name:
            parameter.mul_(1.5)
    return visual


@pytest.fixture(scope="session")
def visual():
    return random_tower()


@pytest.fixture(scope="session")
def vit(visual):
    return HookedViT(visual)


@pytest.fixture(scope="session")
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The path of a model-config json of a CLIP that runs in a moment."""
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def run_script(script, *flags, check=True):
    """Run a stage in a process of its own, in the root folder, without a GPU. Returns the finished
    process.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One headless Chromium for all tests of a process; skips the test where there is none."""
    from tests.browser import start_browser

    driver = start_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()
