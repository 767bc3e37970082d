"""Find the folder of a model of the transformers library, and give its weights the names of our towers."""

import re
from pathlib import Path

import open_clip
import torch
from huggingface_hub import snapshot_download

from utils.model import configs, tokenizers
from utils.model.configs import clip_config, library, parsed_config, uncovered
from utils.runtime.errors import UserError
from utils.runtime.files import one_line

WEIGHT_FILES = (  # files of a folder that may hold its weights, or say which do
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Names in the transformers library and in open_clip, as patterns that are replaced in this order
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
    (r"\.self_attn\.in_proj\.", ".attn.in_proj_"),
    (r"^vision_model\.", "visual."),
    (r"^text_model\.", "transformer."),
)

# Names in a SigLIP's image tower and in timm's
SIGLIP_NAMES = (
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.trunk.patch_embed.proj."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.trunk.pos_embed"),
    (r"^vision_model\.encoder\.layers\.", "visual.trunk.blocks."),
    (r"^vision_model\.post_layernorm\.", "visual.trunk.norm."),
    (r"^vision_model\.head\.probe$", "visual.trunk.attn_pool.latent"),
    (r"^vision_model\.head\.attention\.q\.", "visual.trunk.attn_pool.q."),
    (r"^vision_model\.head\.attention\.kv\.", "visual.trunk.attn_pool.kv."),
    (r"^vision_model\.head\.attention\.out_proj\.", "visual.trunk.attn_pool.proj."),
    (r"^vision_model\.head\.layernorm\.", "visual.trunk.attn_pool.norm."),
    (r"^vision_model\.head\.mlp\.", "visual.trunk.attn_pool.mlp."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.in_proj\.", ".attn.qkv."),
)
TRANSPOSED = ("visual.proj", "text_projection")
QUERY_KEY_VALUE = re.compile(r"(.*\.self_attn)\.([qkv])_proj\.(weight|bias)")
OF_POOL = re.compile(r"(vision_model\.head\.attention)\.in_proj_(weight|bias)")


def folder_of(name):
    """Return the folder of a covered model: `local-dir:PATH`, or `hf:ORG/NAME`; None for another name.

    Raises UserError for a model that the hub does not have, or that is not covered.
    """
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        usable = weights_file(folder) or not (folder / configs.OPEN_CLIP).is_file()
        return folder if clip_config(folder, configs.TYPES) and usable else None
    if not name.startswith("hf:"):
        return None
    folder = fetched(name, ["config.json"])
    if what := uncovered(folder):
        raise UserError(f"--model {name} could not be loaded: {what}; give a model of these types")
    files = ["config.json", "preprocessor_config.json", "processor_config.json", *tokenizers.FETCHED]
    for form in ("model{}.safetensors", "pytorch_model{}.bin"):  # .bin only where there is nothing else
        files += [form.format(""), form.format("-*"), form.format("") + ".index.json"]
        folder = fetched(name, files)
        if weights_file(folder):
            break
    if not clip_config(folder, configs.TYPES) or not weights_file(folder):
        fix = "for open_clip's own models use hf-hub:ORG/NAME"
        raise UserError(f"--model {name} is no CLIP of the transformers library with its weights; {fix}")
    return folder


def fetched(name, files):
    """Return the folder with some files of `hf:ORG/NAME`, from the local cache or the hub."""
    try:
        return Path(snapshot_download(name.removeprefix("hf:"), allow_patterns=files))
    except Exception as error:  # the hub has many
        what = f"neither in the local cache nor could it be fetched: {one_line(error)[:160]}"
        raise UserError(f"--model {name} is {what}") from error


def weights_file(folder):
    """Return the file with the weights of a folder, or the index of their shards; None without one."""
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def activation(name, folder):
    """Return the module of an activation, by its name in a config. Raises UserError for an unknown name."""
    if name == "quick_gelu":
        return open_clip.transformer.QuickGELU()
    if name == "gelu":
        return torch.nn.GELU()
    library()
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        what = f"hidden_act is {name!r}, which the transformers library does not have"
        raise UserError(f"{folder}/config.json: {what}")
    return ACT2FN[name]


def is_as_before(folder):
    """Return whether earlier versions computed the same for a folder.

    They knew type clip alone, one activation for both towers, one eps, and the end token of OpenAI's
    vocabulary.
    """
    parsed = parsed_config(folder)
    if parsed.model_type != "clip":
        return False
    towers = (parsed.vision_config, parsed.text_config)
    activations = {tower.hidden_act for tower in towers}
    return (
        activations in ({"gelu"}, {"quick_gelu"})
        and all(tower.layer_norm_eps == 1e-5 for tower in towers)
        and parsed.text_config.eos_token_id in (tokenizers.OLD_END, tokenizers.OPENAI - 1)
    )


def is_clip_model(state):
    """Return whether the names of a state dict are those of the transformers library."""
    return any(name.startswith("vision_model.encoder.") for name in state)


def renamed(state, names=NAMES):
    """Return weights of the transformers library under open_clip's names; SIGLIP_NAMES for a SigLIP's."""
    found = {}
    for name, value in joined(state).items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        found[name] = value.T.contiguous() if name in TRANSPOSED else value
    if names is SIGLIP_NAMES:
        found["visual.trunk.pos_embed"] = found["visual.trunk.pos_embed"][None]
    return found


def joined(state):
    """Return weights with one in_proj for the queries, keys and values of an attention, as in open_clip.

    That of a pooling attention is split into q and kv, as in timm.
    """
    found = {}
    joint = {}  # {name: its parts q, k and v}
    for name, value in state.items():
        if name.endswith("position_ids"):
            continue
        if projection := QUERY_KEY_VALUE.fullmatch(name):
            block, part, kind = projection.groups()
            joint.setdefault(f"{block}.in_proj.{kind}", {})[part] = value
        elif pool := OF_POOL.fullmatch(name):
            attention, kind = pool.groups()
            q, k, v = value.chunk(3)
            found |= {f"{attention}.q.{kind}": q, f"{attention}.kv.{kind}": torch.cat([k, v])}
        else:
            found[name] = value
    for name, parts in joint.items():
        found[name] = torch.cat([parts[part] for part in "qkv"])
    return found
