"""Weights as people have them: wrapped state dicts, common prefixes, other layouts, and Hugging Face's `CLIPModel`.

Files are judged by their content. Nothing that they contain is run.
"""

import contextlib
import json
import re
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.factory import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed, set_model_preprocess_cfg
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg
from safetensors.torch import load_file

from utils.runtime.errors import UserError
from utils.runtime.files import one_line

WRAPPERS = ("state_dict", "model_state_dict", "model", "ema", "model_ema", "net", "module")  # keys under which weights may lie
CORE = getattr(np, "_core", None) or np.core  # its name since numpy 2
NUMPY = [CORE.multiarray.scalar, np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u1", "?"))]

# Names of Hugging Face's CLIPModel, and open_clip's
HF_PLAIN = {
    "logit_scale": "logit_scale",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
}
HF_PARTS = (  # patterns, in order; what is left of the name stays
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)
TRANSPOSED = ("visual.proj", "text_projection")


def read_checkpoint(path):
    """The tensors of a file {name: tensor}, on the CPU, wherever they lie in it. Raises UserError when it has none."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"--pretrained {path} is a folder; for a folder with a config use --model local-dir:{path}")
    if not path.is_file():
        raise UserError(f"--pretrained {path}: there is no such file")
    return weights_in(_read(path), path)


def _read(path):
    """What a file holds, by its first bytes: safetensors begin with the length of a json header."""
    with open(path, "rb") as file:
        start = file.read(9)
    try:
        if start[8:9] == b"{":
            return load_file(path)
        if start.startswith(b"PK") and any(name.endswith("constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            raise UserError(
                f"{path} is a TorchScript archive, and no code that a file holds is run; for OpenAI's weights use --pretrained "
                "openai, or save the state dict alone: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
            )
        with torch.serialization.safe_globals(NUMPY), open(path, "rb") as file:  # by its path torch would go by the ending
            return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch, zipfile, pickle and safetensors each raise their own
        refused = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"global (\S+)", str(error))
        if refused:
            raise UserError(
                f"{path} holds a {refused[1]}, and nothing but tensors and numbers is read from a file; where you trust it, save "
                "the weights alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pt')"
            ) from error
        reason = re.sub(r"\x1b\[[0-9;]*m", "", one_line(error))[:120]
        why = f"{path} cannot be read as a checkpoint ({reason})"
        raise UserError(f"{why}; it has to be a state dict, as safetensors or from torch.save") from error


def weights_in(content, path):
    """Find the state dict in what a file holds: itself, or under one of WRAPPERS. Without a prefix common to all its names."""
    found = content
    for _ in range(len(WRAPPERS)):
        if isinstance(found, dict) and any(isinstance(value, torch.Tensor) and "." in str(name) for name, value in found.items()):
            break
        inner = [found[key] for key in WRAPPERS if isinstance(found, dict) and isinstance(found.get(key), dict)]
        if not inner:
            has = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else f"a {type(content).__name__}"
            raise UserError(f"{path} has no state dict under {', '.join(WRAPPERS)}; it has {has or 'nothing'}")
        found = inner[0]
    state = {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
    while len({name.split(".")[0] for name in state}) == 1 and all("." in name for name in state):
        state = {name.split(".", 1)[1]: value for name, value in state.items()}
    return state


def is_hugging_face(state):
    """Whether the names are those of a `CLIPModel` of the transformers library."""
    return any(name.startswith("vision_model.encoder.") for name in state)


def convert_hugging_face(state):
    """The weights of a `CLIPModel` under open_clip's names."""
    found = {}
    for name, value in state.items():
        if name.endswith("position_ids"):
            continue
        new = HF_PLAIN.get(name, name)
        for pattern, replacement in HF_PARTS if new == name else ():
            new = re.sub(pattern, replacement, new)
        if projection := re.search(r"^(.*)\.self_attn\.([qkv])_proj\.(weight|bias)$", new):
            found.setdefault(f"{projection[1]}.attn.in_proj_{projection[3]}", {})[projection[2]] = value
        else:
            found[new] = value.T.contiguous() if new in TRANSPOSED else value
    return {
        name: torch.cat([value[part] for part in "qkv"]) if isinstance(value, dict) else value for name, value in found.items()
    }


def load_weights(model, path):
    """Load a checkpoint into an open_clip model, in float32. Preprocessing comes from a config beside the file, if there is one.

    Raises UserError when the weights do not fit, or when the config says that they were trained with another activation.
    """
    state, own = {name: value.float() for name, value in read_checkpoint(path).items()}, model.state_dict()
    if is_hugging_face(state):
        state = convert_hugging_face(state)
    quick, preprocess = read_beside(Path(path).parent)
    has_quick = any(isinstance(module, open_clip.transformer.QuickGELU) for module in model.visual.modules())
    if quick not in (None, has_quick):
        trained, right = ("QuickGELU", "with") if quick else ("GELU", "without")
        raise UserError(f"{path} was trained with {trained}, says the config beside it; use the --model {right} -quickgelu")
    set_model_preprocess_cfg(model, {**model.visual.preprocess_cfg, **preprocess})
    if "positional_embedding" in state and "positional_embedding" not in own:
        state = convert_to_custom_text_state_dict(state)
    elif "positional_embedding" in own and "text.positional_embedding" in state:
        state = {name.removeprefix("text."): value for name, value in state.items()}
    state = convert_state_dict(model, state)
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in own:
            state[name] = state[name].reshape(own[name].shape)
        elif name in own:
            state[name] = torch.zeros_like(own[name])  # no effect on what is embedded
    refuse([f"{name} is missing" for name in own if name not in state and not name.endswith("position_ids")], path)
    refuse([f"it has {name}" for name in state if name not in own], path)
    with contextlib.suppress(AssertionError):  # of another width: refused below
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    sizes = ((name, list(value.shape), list(own[name].shape)) for name, value in state.items())
    refuse([f"size mismatch for {name}, {found} for {wanted}" for name, found, wanted in sizes if found != wanted], path)
    model.load_state_dict(state, strict=False)


def refuse(problems, path):
    """Raise UserError if there are differences between a checkpoint and the model, with the first of them."""
    if problems:
        more = f" and {len(problems) - 1} more differences" if len(problems) > 1 else ""
        raise UserError(f"{path} does not fit the model: {problems[0]}{more}; choose another --model or --pretrained")


def read_beside(folder):
    """What the configs beside a weights file say: whether the activation is QuickGELU, None if they do not; preprocessing."""
    if config := read_config(folder):
        return quick_gelu_of(config), preprocessing_of(config)
    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        known = {key: config.get("preprocess_cfg", {}).get(key) for key in ("mean", "std", "interpolation", "resize_mode")}
        return config["model_cfg"].get("quick_gelu", False), {key: value for key, value in known.items() if value is not None}
    except FileNotFoundError:
        return None, {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder}/open_clip_config.json is damaged ({one_line(error)[:100]})") from error


def read_config(folder):
    """The config of a `CLIPModel` in a folder, with its preprocessing under "preprocess"; {} if there is none."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        preprocess = Path(folder) / "preprocessor_config.json"
        config["preprocess"] = json.loads(preprocess.read_text(encoding="utf-8")) if preprocess.is_file() else {}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}/config.json or preprocessor_config.json is damaged ({one_line(error)[:100]})") from error
    return config if config.get("model_type") == "clip" and "vision_config" in config else {}


def model_of_config(config):
    """An open_clip model of the shape, activation and preprocessing of a `CLIPModel`'s config, and a maker of its tokenizer."""
    vision, text = config["vision_config"], config["text_config"]
    D = config.get("projection_dim", 512)
    side = vision.get("image_size", 224)

    def tower(part, width, heads, layers):
        width, heads = part.get("hidden_size", width), part.get("num_attention_heads", heads)
        return width, heads, part.get("num_hidden_layers", layers), part.get("intermediate_size", 4 * width) / width

    width, heads, layers, ratio = tower(vision, 768, 12, 12)
    towers = {"vision_cfg": {"image_size": side, "patch_size": vision.get("patch_size", 32), "width": width, "layers": layers}}
    towers["vision_cfg"] |= {"head_width": width // heads, "mlp_ratio": ratio}
    width, heads, layers, ratio = tower(text, 512, 8, 12)
    context = text.get("max_position_embeddings", 77)
    towers["text_cfg"] = {"context_length": context, "vocab_size": text.get("vocab_size", 49408), "width": width, "heads": heads}
    towers["text_cfg"] |= {"layers": layers, "mlp_ratio": ratio}
    model = open_clip.CLIP(D, **towers, quick_gelu=quick_gelu_of(config))
    set_model_preprocess_cfg(model, asdict(PreprocessCfg(size=model.visual.image_size)))
    return model, lambda: SimpleTokenizer(context_length=context)


def quick_gelu_of(config):
    """Whether a `CLIPModel`'s config has the activation QuickGELU."""
    return config["vision_config"].get("hidden_act", "quick_gelu") == "quick_gelu"


def preprocessing_of(config):
    """Mean, deviation and interpolation of a `CLIPModel`'s preprocessing, under open_clip's names."""
    given = config["preprocess"]
    chosen = {"mean": given.get("image_mean"), "std": given.get("image_std")}
    chosen["interpolation"] = {2: "bilinear", 3: "bicubic"}.get(given.get("resample"))
    return {key: value for key, value in chosen.items() if value is not None}
