"""Read a `CLIPModel` of the transformers library: its folder, its shape and the names of its weights."""

import re
from dataclasses import asdict
from functools import partial
from pathlib import Path

import open_clip
import torch
from huggingface_hub import snapshot_download
from open_clip.model import set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg

from utils.model import configs, tokenizers
from utils.model.configs import clip_config, parsed_config
from utils.runtime.errors import UserError
from utils.runtime.files import one_line

WEIGHT_FILES = (  # files of a folder that may hold its weights, or say which do
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Names in a CLIPModel and in open_clip, as patterns that are replaced in this order
NAMES = (
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.weight$", "visual.conv1.weight"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^text_model\.embeddings\.token_embedding\.weight$", "token_embedding.weight"),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"^vision_model\.", "visual."),
    (r"^text_model\.", "transformer."),
)
TRANSPOSED = ("visual.proj", "text_projection")
QUERY_KEY_VALUE = re.compile(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)")


def folder_of(name):
    """Return the folder of a `CLIPModel`: `local-dir:PATH` of one, or `hf:ORG/NAME`; None for another name.

    Raises UserError for a model that the hub does not have.
    """
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        usable = weights_file(folder) or not (folder / configs.OPEN_CLIP).is_file()
        return folder if clip_config(folder) and usable else None
    if not name.startswith("hf:"):
        return None
    files = ["config.json", "preprocessor_config.json", "processor_config.json"]
    files += [*tokenizers.WHOLE, *tokenizers.PARTS]
    try:
        for form in ("model{}.safetensors", "pytorch_model{}.bin"):  # .bin only where there is nothing else
            files += [form.format(""), form.format("-*"), form.format("") + ".index.json"]
            folder = Path(snapshot_download(name.removeprefix("hf:"), allow_patterns=files))
            if weights_file(folder):
                break
    except Exception as error:  # the hub has many
        what = f"neither in the local cache nor could it be fetched: {one_line(error)[:160]}"
        raise UserError(f"--model {name} is {what}") from error
    if not clip_config(folder) or not weights_file(folder):
        fix = "for open_clip's own models use hf-hub:ORG/NAME"
        raise UserError(f"--model {name} is no CLIPModel of the transformers library with its weights; {fix}")
    return folder


def weights_file(folder):
    """Return the file with the weights of a folder, or the index of their shards; None without one."""
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def load_tokenizer_of(folder):
    """Return a function that loads the tokenizer of a folder."""
    return partial(tokenizers.load_tokenizer, Path(folder), parsed_config(folder).text_config)


def model_of(folder):
    """Return an open_clip model with the shape and activations of a folder's config, and random weights."""
    parsed = parsed_config(folder)
    vision = parsed.vision_config
    text = parsed.text_config
    image = _shape(vision)
    image |= {"image_size": vision.image_size, "patch_size": vision.patch_size}
    image["head_width"] = vision.hidden_size // vision.num_attention_heads
    words = _shape(text)
    words |= {"context_length": text.max_position_embeddings, "vocab_size": text.vocab_size}
    words["heads"] = text.num_attention_heads
    if text.eos_token_id != tokenizers.OLD_END:
        words |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    model = open_clip.CLIP(parsed.projection_dim, vision_cfg=image, text_cfg=words)
    _set_inner(model.visual, vision, folder)
    _set_inner(model.transformer, text, folder)
    _set_inner(model.ln_final, text, folder)
    set_model_preprocess_cfg(model, asdict(PreprocessCfg(size=model.visual.image_size)))
    return model


def _shape(config):
    ratio = (config.intermediate_size + 0.5) / config.hidden_size  # open_clip rounds the product down
    return {"width": config.hidden_size, "layers": config.num_hidden_layers, "mlp_ratio": ratio}


def _set_inner(part, config, folder):
    """Give the LayerNorms of a part of a model their eps, and its MLPs their activation."""
    for name, module in list(part.named_modules()):
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = config.layer_norm_eps
        if name.endswith(".mlp"):
            module.gelu = activation(config.hidden_act, folder)


def activation(name, folder):
    """Return the module of an activation, by its name in a config. Raises UserError for an unknown name."""
    if name == "quick_gelu":
        return open_clip.transformer.QuickGELU()
    if name == "gelu":
        return torch.nn.GELU()
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        what = f"hidden_act is {name!r}, which the transformers library does not have"
        raise UserError(f"{folder}/config.json: {what}")
    return ACT2FN[name]


def is_as_before(folder):
    """Return whether earlier versions computed the same for a folder.

    They knew one activation for both towers, one eps, and the end token of OpenAI's vocabulary.
    """
    parsed = parsed_config(folder)
    towers = (parsed.vision_config, parsed.text_config)
    activations = {tower.hidden_act for tower in towers}
    return (
        activations in ({"gelu"}, {"quick_gelu"})
        and all(tower.layer_norm_eps == 1e-5 for tower in towers)
        and parsed.text_config.eos_token_id in (tokenizers.OLD_END, tokenizers.OPENAI - 1)
    )


def is_clip_model(state):
    """Return whether the names of a state dict are those of a `CLIPModel`."""
    return any(name.startswith("vision_model.encoder.") for name in state)


def renamed(state):
    """Return the weights of a `CLIPModel` under open_clip's names."""
    found = {}
    joint = {}  # {name: its parts q, k and v}
    for name, value in state.items():
        if name.endswith("position_ids"):
            continue
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if projection := QUERY_KEY_VALUE.fullmatch(name):
            block, part, kind = projection.groups()
            joint.setdefault(f"{block}.attn.in_proj_{kind}", {})[part] = value
        else:
            found[name] = value.T.contiguous() if name in TRANSPOSED else value
    for name, parts in joint.items():
        found[name] = torch.cat([parts[part] for part in "qkv"])
    return found
