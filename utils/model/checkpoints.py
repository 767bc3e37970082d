"""Weights as people have them: wrapped state dicts, prefixes, shards, and Hugging Face's `CLIPModel`.

Files are judged by their content. Nothing that they contain is run.
"""

import codecs
import contextlib
import json
import os
import re
import shlex
import zipfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.factory import convert_state_dict
from open_clip.model import (
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
    set_model_preprocess_cfg,
)
from open_clip.transform import PreprocessCfg
from safetensors.torch import load_file

from utils.model.tokenizers import OPENAI, load_tokenizer
from utils.runtime.errors import UserError
from utils.runtime.files import one_line
from utils.runtime.results import file_and_key

# Keys under which weights may lie. Of several the first is taken: trained weights before averaged ones
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "module", "ema", "model_ema")
FOLDER = (  # files of a folder that may hold its weights, or say which do
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
MARK = re.compile(r"(?:(.*)\.)?((?:visual|vision_model)\..+)")  # a prefix, and a name of a CLIP's image tower
BUFFERS = re.compile(
    r"(^|\.)(position_ids|attn_mask|num_batches_tracked|inv_freq|freqs_(cos|sin)|(rope|rotary_emb)\.\w+)$"
    r"|^visual\.image_(mean|std)$",
)
INNER = re.compile(  # what compiling, checkpointing and sharding put into the middle of names
    r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|(?<=visual\.)module|(?<=transformer\.)module)\."
)
SHARD = re.compile(r"(.+)-\d{5}-of-(?!00001)\d{5}(\.\w+)")
OPENAIS = {"input_resolution", "context_length", "vocab_size"}  # beside the weights in its own files
CUT_OFF = re.compile("incomplete|header length|header too|central directory|not a zip|EOF|truncated|Ran out")
KEEP = (  # for a user who trusts a file: saves its tensors, in the dicts where they lie
    "import torch, numpy; parts = lambda x: x.state_dict() if isinstance(x, torch.nn.Module) else x "
    "if isinstance(x, dict) else dict(enumerate(x)) if isinstance(x, (list, tuple)) else getattr(x, '__dict__', {}); "
    "keep = lambda x: torch.as_tensor(x) if isinstance(x, (torch.Tensor, numpy.ndarray)) else "
    "{str(k): w for k, v in parts(x).items() for w in [keep(v)] if torch.is_tensor(w) or w}; "
    'torch.save(keep(torch.load(%s, map_location="cpu", weights_only=False)), "tensors.pt")'
)
CORE = getattr(np, "_core", None) or np.core  # its name since numpy 2
NUMPY = [
    CORE.multiarray.scalar,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u1", "?")),
]

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
    (r"^vision_model\.", "visual."),
    (r"^text_model\.", "transformer."),
)
TRANSPOSED = ("visual.proj", "text_projection")


def read_checkpoint(pretrained):
    """The tensors of a checkpoint {name: tensor}, on the CPU, wherever they lie in it.

    pretrained: FILE, or FILE::KEY for one of several state dicts. FILE may be an index of shards.

    Raises UserError when there are none, or several among which only the user can choose.
    """
    file, key = file_and_key(str(pretrained))
    path = Path(file)
    if path.is_dir():
        raise UserError(
            f"--pretrained {path} is a folder; for a folder with a config use --model local-dir:{path}"
        )
    if not path.is_file():
        raise UserError(f"--pretrained {path}: there is no such file")
    if shard := SHARD.fullmatch(path.name):
        index = path.with_name(f"{shard[1]}{shard[2]}.index.json")
        raise UserError(f"{path} is one of several shards; give the index beside them: --pretrained {index}")
    content = read_file(path)
    found = state_dicts(content)
    if not found:
        names = list(map(str, content)) if isinstance(content, dict) else [f"a {type(content).__name__}"]
        raise UserError(f"{path} has no state dict; it has {', '.join(names[:8]) or 'nothing'}")
    towers = {name: state for name, state in found.items() if any(map(MARK.match, state))}
    state = choose(towers or found, key, path)
    layers = [name for name in state if re.search(r"(^|\.)(lora_|ia3_|hada_|lokr_)", name)]
    if layers or path.name.startswith("adapter_model."):
        whole = len(layers) < len(state) / 2 and not path.name.startswith("adapter_model.")
        what = "a LoRA adapter, which only changes the weights of another model"
        what = "a LoRA adapter in the layers of a model, which are not merged" if whole else what
        fix = "merge it into its model (peft: merge_and_unload), save the result, and give that file"
        raise UserError(f"{path} holds {what}; {fix}")
    return state


def read_file(path, shards=True):
    """Read what a file holds, judged by its first bytes.

    shards: whether it may be an index of others, which are read then.

    Raises UserError, which calls it by its name, for what is no weights file.
    """
    with open(path, "rb") as file:
        start = file.read(1024)
    text = as_text(start)
    if text is not None:
        return read_text(path, text, shards)
    try:
        if start[8:9] == b"{":  # safetensors begin with the length of a json header
            return load_file(path)
        inside = zipfile.ZipFile(path).namelist() if start.startswith(b"PK") else []
        if any(name.endswith("constants.pkl") for name in inside):
            raise UserError(
                f"{path} is a TorchScript archive, and no code that a file holds is run; for OpenAI's weights "
                "use --pretrained openai, or save the state dict alone: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
            )
        packed = "gzip" if start.startswith(b"\x1f\x8b") else "tar" if start[257:262] == b"ustar" else ""
        packed = packed or ("zip" if inside and not any(name.endswith("data.pkl") for name in inside) else "")
        if packed:
            raise UserError(
                f"{path} is a {packed} archive; unpack it, and give the weights file that is in it"
            )
        # Opened here, because torch would go by the ending of a path
        with torch.serialization.safe_globals(NUMPY), open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch, zipfile, pickle and safetensors each raise their own
        raise UserError(why_unreadable(path, error)) from error


def as_text(start):
    """The first bytes of a file as text, None where they are not."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)
    except UnicodeDecodeError:
        return None
    return text if "".join(text.split()).isprintable() else None


def read_text(path, text, shards):
    """The weights to which an index of shards points; UserError for any other text. text: its beginning."""
    text = text.strip()
    what = f"it is text, and begins with {text[:20]!r}; give the weights file"
    if not text:
        what = "it is empty; download it again"
    elif text.startswith("version https://git-lfs"):
        what = "it is a Git LFS pointer and not the file itself; run git lfs pull in its folder"
    elif text.startswith("<"):
        what = "it is a web page and not the file itself; download that by its direct link"
    elif text.startswith(("{", "[")):
        what = "it is a json file without an index of shards; give the weights file"
        with contextlib.suppress(ValueError):
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            if shards and isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
                return read_shards(path, content["weight_map"])
    raise UserError(f"{path} cannot be read as a checkpoint: {what}")


def read_shards(path, places):
    """The tensors of all shards of an index. places: {name: file beside the index}."""
    weights = {}
    for name in sorted(set(map(str, places.values()))):
        shard = path.parent / name
        if Path(name).name != name or "\\" in name:
            raise UserError(f"{path} names the shard {name!r}, and shards have to lie beside it; correct it")
        if not shard.is_file():
            raise UserError(f"{shard} is missing, which {path.name} names; download it, too")
        content = read_file(shard, shards=False)
        parts = list(state_dicts(content).values())
        if len(parts) != 1:
            raise UserError(
                f"{shard} holds {len(parts) or 'no'} state dicts, where a shard holds one; download it again"
            )
        weights |= parts[0]
    return weights


def why_unreadable(path, error):
    """What a user should know of an error that torch, zipfile, pickle or safetensors raised."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    refused = re.search(r"GLOBAL (\S+)", text) or re.search(r"global (\S+)", text)
    if refused:
        command = shlex.join(["python", "-c", KEEP % json.dumps(str(path), ensure_ascii=False)])
        return (
            f"{path} holds a {refused[1]}, and nothing but tensors and numbers is read from a file; where "
            f"you trust it, save the weights alone, as tensors.pt: {command}"
        )
    if CUT_OFF.search(f"{type(error).__name__} {text}"):
        return f"{path} cannot be read as a checkpoint: it is cut off or damaged; download it again"
    reason = one_line(text.rpartition("WeightsUnpickler error: ")[2])
    reason = "" if "weights_only" in reason else f" ({reason[:120]})"  # a flag of torch that nobody gave
    fix = "it has to be a state dict, as safetensors or from torch.save"
    return f"{path} cannot be read as a checkpoint{reason}; {fix}"


def state_dicts(content, key="", depth=4):
    """Find every state dict in what a file holds: {key: {name: tensor}}.

    The key of a dict inside of another one is KEY.KEY. Names have no prefix before those of a CLIP; where
    several prefixes share names, each is a key of its own.
    """
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        return {}
    found = {}
    tensors = {
        INNER.sub("", str(name)): value for name, value in content.items() if isinstance(value, torch.Tensor)
    }
    if any("." in name for name in tensors):
        for prefix, state in without_prefix(tensors).items():
            found[".".join(filter(None, [key, prefix]))] = state
    for name, value in content.items() if depth else ():
        found |= state_dicts(value, f"{key}.{name}" if key else str(name), depth - 1)
    return found


def without_prefix(tensors):
    """Take the prefixes off the names of a state dict: {prefix: {name: tensor}}.

    Each has also what is under none of them. {"": {name: tensor}} where all have the same prefix, or none.
    """
    names = {}  # prefix: those of the image tower
    for name in tensors:
        if mark := MARK.match(name):
            names.setdefault(mark[1] or "", set()).add(mark[2])
    if not names:  # another layout
        while len({name.split(".")[0] for name in tensors}) == 1 and all("." in name for name in tensors):
            tensors = {name.split(".", 1)[1]: value for name, value in tensors.items()}
        return {"": tensors}
    main = max(names.values(), key=len)
    prefixes = sorted((prefix for prefix, those in names.items() if those & main), key=len, reverse=True)
    found = {prefix: {} for prefix in reversed(prefixes)}
    for name, value in tensors.items():
        prefix = next((prefix for prefix in prefixes if not prefix or name.startswith(f"{prefix}.")), None)
        for own in prefixes if prefix is None else [prefix]:
            found[own][name if prefix is None else name.removeprefix(f"{prefix}.")] = value
    return found if len(found) > 1 else {"": next(iter(found.values()))}


def choose(found, key, path):
    """Take one of {key: state dict}: that of a key, the only one, or the first in the order of WRAPPERS.

    Raises UserError for an unknown key, and where WRAPPERS has none of several.
    """
    under = " and ".join(name or "the top level" for name in found)
    first = next(iter(found))
    if key is not None:
        those = [
            name for name in found if f"{name}.".startswith(f"{key}.")
        ]  # KEY, or the only KEY.KEY below it
        if len(those) != 1 and key not in found:
            raise UserError(f"{path} has no weights under {key}, but under {under}: {_flag(path, first)}")
        return found[key if key in found else those[0]]
    if len(found) == 1:
        return found[first]
    parts = [name.split(".") for name in found]
    shared = len(os.path.commonprefix(parts))
    differing = [".".join(part[shared:]).split(".")[0] for part in parts]  # "" for one around the others
    taken = []
    for wrapper in ("", *WRAPPERS):
        taken = taken or [name for name, part in zip(found, differing, strict=True) if part == wrapper]
    if len(taken) != 1:
        raise UserError(f"{path} has weights under {under}; choose one of them: {_flag(path, first)}")
    others = [name for name in found if name not in taken]
    other = f"for {'the other' if len(others) == 1 else 'another'}: {_flag(path, others[0])}"
    print(f"note: {path} has weights under {under}; {taken[0] or 'the top level'} is taken; {other}")
    return found[taken[0]]


def _flag(path, key):
    return f"--pretrained {path}::{key}" if key else f"--pretrained {path}"


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
        name: torch.cat([value[part] for part in "qkv"]) if isinstance(value, dict) else value
        for name, value in found.items()
    }


def renamed(model, state):
    """The weights of any known layout under the names of an open_clip model."""
    own = model.state_dict()
    if is_hugging_face(state):
        state = convert_hugging_face(state)
    if not any(name.startswith("visual.") for name in state):  # an image tower alone
        for prefix in ("visual.", "visual.trunk."):
            alone = [name for name in state if prefix + name in own]
            if {"conv1.weight", "patch_embed.proj.weight"} & set(alone):
                state = {prefix + name: value for name, value in state.items()}
    if "positional_embedding" in state and "positional_embedding" not in own:
        state = convert_to_custom_text_state_dict(state)
    elif "positional_embedding" in own and "text.positional_embedding" in state:
        state = {name.removeprefix("text."): value for name, value in state.items()}
    return convert_state_dict(model, state)


def load_weights(model, path, image_only=False):
    """Load a checkpoint into an open_clip model, in float32.

    path: as `read_checkpoint` takes it.
    image_only: whether the text tower may be missing; then it is removed from the model.

    Raises UserError when the weights do not fit, or when the config says that they were trained with another
    activation.
    """
    state = read_checkpoint(path)
    own = model.state_dict()
    path = file_and_key(str(path))[0]
    check_beside(model, path)
    if OPENAIS <= state.keys() and not has_quick_gelu(model):
        print(
            f"note: {path} looks like a file of OpenAI's; if it is, its weights need a --model with -quickgelu"
        )
    state = renamed(model, {name: as_floats(name, value, path) for name, value in state.items()})
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in own:
            state[name] = state[name].reshape(own[name].shape)
        elif name in own:
            state[name] = torch.zeros_like(own[name])  # no effect on what is embedded
    if lacks_text(own, state):
        remove_text(model, path, image_only)
        own = model.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("position_ids")]
    refuse([f"{name} is missing" for name in missing], path)
    leave([name for name in state if name not in own], {name.split(".")[0] for name in own}, path)
    state = {name: value for name, value in state.items() if name in own}
    with contextlib.suppress(AssertionError):  # of another width: refused below
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    sizes = ((name, list(value.shape), list(own[name].shape)) for name, value in state.items())
    refuse(
        [
            f"size mismatch for {name}, {found} for {wanted}"
            for name, found, wanted in sizes
            if found != wanted
        ],
        path,
    )
    model.load_state_dict(state, strict=False)


def as_floats(name, value, path):
    """A tensor of a checkpoint in float32. Raises UserError for weights of another kind, such as quantised
    ones.
    """
    if value.is_floating_point() or value.ndim == 0 or BUFFERS.search(name):
        return value.float()
    raise UserError(
        f"{path} holds {name} as {value.dtype}, and weights are floating-point numbers; convert them first"
    )


def has_quick_gelu(model):
    """Whether the image tower's activation is QuickGELU."""
    return any(isinstance(module, open_clip.transformer.QuickGELU) for module in model.visual.modules())


def check_beside(model, path):
    """Raise UserError when the config beside a checkpoint says that the model is another one than --model."""
    folder = Path(path).parent
    quick = read_beside(path)
    if quick not in (None, has_quick_gelu(model)):
        trained, right = ("QuickGELU", "with") if quick else ("GELU", "without")
        of_config = f'"quick_gelu": {"true" if quick else "false"} in its config'
        fix = f"use the --model {right} -quickgelu, or {of_config}"
        raise UserError(f"{path} was trained with {trained}, says the config beside it; {fix}")
    config = read_config(folder)
    if not config or Path(path).name.startswith("open_clip"):
        return
    of_config = parse_config(config, folder)
    towers = {"image": (of_config.vision_config, getattr(model.visual, "transformer", None))}
    towers["text"] = (of_config.text_config, getattr(model, "transformer", None))
    for tower, (said, transformer) in towers.items():
        if transformer is None:
            continue
        block = transformer.resblocks[0]
        found = {
            "heads": block.attn.num_heads,
            "layer_norm_eps": block.ln_1.eps,
            "activation": repr(block.mlp.gelu),
        }
        wanted = {"heads": said.num_attention_heads, "layer_norm_eps": said.layer_norm_eps}
        wanted["activation"] = repr(activation(said.hidden_act, folder))
        for key in [key for key in wanted if wanted[key] != found[key]]:
            what = f"{key} {wanted[key]} of the {tower} tower, and --model has {found[key]}"
            raise UserError(f"{path}: the config beside it says {what}; use --model local-dir:{folder}")
    end = of_config.text_config.eos_token_id
    if end not in (2, OPENAI - 1) and getattr(model, "text_pool_type", "") == "argmax":
        what = f"the token {end} ends a text, which --model does not read"
        raise UserError(f"{path}: the config beside it says that {what}; use --model local-dir:{folder}")


def lacks_text(own, state):
    """Whether a state dict has a whole image tower and no layer of the text tower. own: that of the model."""
    of_text = [name for name in own if "transformer." in name and not name.startswith("visual.")]
    whole = all(name in state for name in own if name.startswith("visual."))
    return whole and not any(name in state for name in of_text)


def remove_text(model, path, image_only):
    """Remove the text tower of a model, so that no random weights are taken for those of its checkpoint."""
    if not image_only:
        raise UserError(
            f"{path} has no text tower, and texts are embedded here; give a checkpoint that has one, such as "
            "that of the model from which it was tuned"
        )
    print(f"note: {path} has no text tower; stages that embed texts need a checkpoint with one")
    for name in {name.split(".")[0] for name in model.state_dict()} - {"visual", "logit_scale", "logit_bias"}:
        delattr(model, name)


def leave(names, towers, path):
    """Name what a checkpoint has besides the model's weights. Raises UserError when it belongs to a tower.

    towers: the first parts of the names of their weights.
    """
    weights = [name for name in names if not BUFFERS.search(name)]
    refuse([f"it has {name}" for name in weights if name.split(".")[0] in towers], path)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        first = ", ".join(names[:3])
        print(f"note: {path} also holds {first}{more}, which are no weights of the towers; left")


def weights_file(folder):
    """The file with the weights of a `CLIPModel`'s folder, or the index of their shards; None without one."""
    return next((folder / name for name in FOLDER if (folder / name).is_file()), None)


def refuse(problems, path):
    """Raise UserError if there are differences between a checkpoint and the model, with the first of them."""
    if problems:
        more = f" and {len(problems) - 1} more differences" if len(problems) > 1 else ""
        fix = "choose another model or other weights"
        raise UserError(f"{path} does not fit the model: {problems[0]}{more}; {fix}")


def read_beside(path):
    """Whether the activation is QuickGELU, as the configs beside a weights file say; None if they do not."""
    folder = Path(path).parent
    config = read_config(folder, ("clip", "clip_vision_model"))
    if config and not Path(path).name.startswith("open_clip"):
        return config.get("vision_config", config).get("hidden_act", "quick_gelu") == "quick_gelu"
    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8-sig"))
        return config["model_cfg"].get("quick_gelu", False) if "model_cfg" in config else None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/open_clip_config.json is damaged ({one_line(error)[:100]})") from error


def read_config(folder, kinds=("clip",)):
    """The config of a `CLIPModel` in a folder; {} if there is none. kinds: values of model_type that
    count.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8-sig"))
        return config if config.get("model_type") in kinds else {}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder}/config.json is damaged ({one_line(error)[:100]})") from error


def model_type(folder):
    """What the config.json in a folder says the model is, None without one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8-sig")).get("model_type")
    return None


def parse_config(config, folder):
    """The `CLIPConfig` of the transformers library, which knows what a config.json leaves out."""
    from transformers import CLIPConfig  # takes a second

    try:
        return CLIPConfig.from_dict(config)
    except Exception as error:  # it has many
        raise UserError(f"{folder}/config.json is damaged ({one_line(error)[:100]})") from error


def activation(name, folder):
    """The module of an activation, by its name in a config of the transformers library. Raises UserError for
    an unknown one.
    """
    if name in ("quick_gelu", "gelu"):
        return open_clip.transformer.QuickGELU() if name == "quick_gelu" else torch.nn.GELU()
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise UserError(
            f"{folder}/config.json: hidden_act is {name!r}, which the transformers library does not have"
        )
    return ACT2FN[name]


def model_of_config(config, folder):
    """An open_clip model of the shape and activations of a `CLIPModel`'s config, and a maker of its
    tokenizer.

    folder: where its tokenizer's files are.
    """
    parsed = parse_config(config, folder)
    vision, text = parsed.vision_config, parsed.text_config
    image = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    image |= {**_shape(vision), "head_width": vision.hidden_size // vision.num_attention_heads}
    words = {"context_length": text.max_position_embeddings, "vocab_size": text.vocab_size}
    words |= {**_shape(text), "heads": text.num_attention_heads}
    if (
        text.eos_token_id != 2
    ):  # old configs have 2 whatever the end token is; then transformers reads at the largest one
        words |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    model = open_clip.CLIP(parsed.projection_dim, vision_cfg=image, text_cfg=words)
    towers = ((vision, [model.visual]), (text, [model.transformer, model.ln_final]))
    for of, parts in towers:
        for part in parts:
            _set(part, of, folder)
    set_model_preprocess_cfg(model, asdict(PreprocessCfg(size=model.visual.image_size)))
    return model, partial(load_tokenizer, Path(folder), text)


def as_before(parsed):
    """Whether earlier versions computed the same for a `CLIPConfig`: they knew one activation, for both
    towers, and one eps.
    """
    towers = (parsed.vision_config, parsed.text_config)
    one = {tower.hidden_act for tower in towers} in ({"gelu"}, {"quick_gelu"})
    return (
        one
        and all(tower.layer_norm_eps == 1e-5 for tower in towers)
        and towers[1].eos_token_id in (2, OPENAI - 1)
    )


def _shape(config):
    ratio = (config.intermediate_size + 0.5) / config.hidden_size  # open_clip rounds the product down
    return {"width": config.hidden_size, "layers": config.num_hidden_layers, "mlp_ratio": ratio}


def _set(part, config, folder):
    """Give the LayerNorms of a part of a model their eps, and its MLPs their activation."""
    for name, module in list(part.named_modules()):
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = config.layer_norm_eps
        if name.endswith(".mlp"):
            module.gelu = activation(config.hidden_act, folder)
