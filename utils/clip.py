"""Load a CLIP by open_clip name and tag, local checkpoint or model-config json; embed texts and classes."""

import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from tqdm import tqdm

from utils.hooked_vit import HookedViT, check_supported
from utils.runtime.errors import UserError
from utils.runtime.files import one_line
from utils.runtime.results import is_checkpoint_path, model_name, pretrained_name

SCHEMES = ("hf-hub:", "local-dir:")


@dataclass
class Clip:
    """A loaded CLIP.

    vit: the image tower, a `HookedViT`.
    text: the open_clip model, which embeds texts; None where only the image tower was asked for.
    transform: open_clip's validation transform, PIL image -> [3, side, side].
    tokenizer: list of texts -> tokens.
    record: what results say about the model: names, precision where it is not float32, fingerprint of the weights.
    device: where it is.
    """

    vit: HookedViT
    text: Any
    transform: Any
    tokenizer: Any
    record: dict
    device: torch.device

    @property
    def fingerprint(self):
        """Twelve hex digits that change when the weights do."""
        return self.record["fingerprint"]


def load_clip(model, pretrained, device, seed=0, precision="float32", image_only=False):
    """Load a CLIP in float32 and evaluation mode.

    Parameters
    model: an open_clip name, `hf-hub:ORG/NAME`, `local-dir:PATH`, or the path of a model-config json.
    pretrained: an open_clip tag, the path of a checkpoint (.safetensors or .pt), or 'random' for weights drawn from `seed`.
        Ignored for hf-hub and local-dir names, which bring their weights.
    device: where to put it.
    precision: of the image tower's forward pass; the weights stay in float32.
    image_only: drop the text tower, so that it takes no memory.

    The activation (GELU or QuickGELU) is the one that the weights were trained with: the tag's own, or the config's.
    Raises UserError for an unknown name or tag (with near matches), for weights that do not fit, cannot be fetched or are not
    finite, and for an image tower that the method does not cover.
    """
    device = torch.device(device)
    if precision == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 is a mode of CUDA GPUs; use float32 or bfloat16")
    name = _register_config(model) if model.endswith(".json") else model
    options = {}
    if name.startswith(SCHEMES):
        options["require_pretrained"] = True
        weights = None
    else:
        weights = _checked_weights(name, pretrained)
        options["force_quick_gelu"] = open_clip.get_pretrained_cfg(name, weights or "").get("quick_gelu", False)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            clip = open_clip.create_model(name, pretrained=weights, device=device, **options).eval().requires_grad_(False)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip, torch, safetensors and the hub each raise their own
        raise UserError(_why_not_loaded(model, pretrained, weights, error)) from error
    if not all(parameter.isfinite().all() for parameter in clip.parameters()):
        raise UserError(f"the weights of --model {model} --pretrained {pretrained} hold NaN or infinity; use another checkpoint")
    check_supported(clip.visual)
    transform = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)
    record = {"model": model_name(model), "pretrained": pretrained_name(model, pretrained)}
    record |= {} if precision == "float32" else {"precision": precision}
    record["fingerprint"] = weights_fingerprint(clip)
    return Clip(HookedViT(clip.visual, precision), None if image_only else clip, transform, tokenizer, record, device)


def _register_config(path):
    """Make a model-config json known to open_clip; returns the name that it has there."""
    try:
        config = json.loads(Path(path).read_text())
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    except FileNotFoundError as error:
        raise UserError(f"--model {path}: there is no such file; give an open_clip name or the path of a config json") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"--model {path} is not a model config ({one_line(error)})") from error
    if missing:
        raise UserError(f"--model {path} is not an open_clip model config: it has no {', '.join(missing)}")
    open_clip.add_model_config(path)
    return Path(path).stem


def _checked_weights(name, pretrained):
    """The `pretrained` that open_clip is given; None for random weights."""
    if name not in open_clip.list_models():
        raise UserError(f"--model {name} is not known to open_clip{_near(name, open_clip.list_models())}")
    if pretrained == "random":
        return None
    if is_checkpoint_path(pretrained):
        if not Path(pretrained).is_file():
            raise UserError(f"--pretrained {pretrained}: there is no such file")
        return pretrained
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not open_clip.get_pretrained_cfg(name, pretrained):
        hint = _near(pretrained, tags) if tags else "; it has no tags, give the path of a checkpoint"
        raise UserError(f"--pretrained {pretrained} is no tag of {name}{hint}")
    return pretrained


def _near(word, choices):
    near = difflib.get_close_matches(word, choices, n=4, cutoff=0.4)
    return f"; did you mean {', '.join(near)}?" if near else f"; there are {', '.join(sorted(choices)[:12])}, ..."


def _why_not_loaded(model, pretrained, weights, error):
    reason = one_line(error)
    if "Error(s) in loading state_dict" in reason or "size mismatch" in reason or "Missing key" in reason:
        first = reason.split("CLIP:")[-1].strip()[:160]
        return f"the checkpoint {weights} does not fit --model {model}: {first}"
    if weights and is_checkpoint_path(weights):
        return (
            f"{weights} cannot be read as a checkpoint of --model {model} ({reason[:160]}); it has to be a state dict in a "
            ".safetensors or .pt file (TorchScript archives and pickled objects are not opened)"
        )
    return f"--model {model} --pretrained {pretrained} could not be loaded: {reason[:200]}"


def weights_fingerprint(model):
    """Twelve hex digits that change when the weights do: a hash over 1,024 evenly spaced entries of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.reshape(-1)
        stride = max(1, flat.numel() // 1024)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(flat[::stride].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


@torch.inference_mode()
def text_vectors(clip, texts, batch_size):
    """Unit text vectors, without a template: list of texts -> float32 array [texts, D]."""
    vectors = []
    for start in tqdm(range(0, len(texts), batch_size), desc="texts", unit="batch"):
        tokens = clip.tokenizer(texts[start : start + batch_size]).to(clip.device)
        vectors.append(clip.text.encode_text(tokens, normalize=True).float().cpu().numpy())
    return np.concatenate(vectors)


@torch.inference_mode()
def zero_shot_classifier(clip, class_names, batch_size):
    """The zero-shot classifier over OpenAI's 80 templates: unit columns, float32 array [D, classes]."""
    weights = open_clip.build_zero_shot_classifier(
        clip.text,
        clip.tokenizer,
        class_names,
        open_clip.OPENAI_IMAGENET_TEMPLATES,
        num_classes_per_batch=max(1, batch_size // len(open_clip.OPENAI_IMAGENET_TEMPLATES)),
        device=clip.device,
        use_tqdm=True,
    )
    return weights.float().cpu().numpy()
