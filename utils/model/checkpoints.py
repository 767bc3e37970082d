"""Read the tensors of a checkpoint, from wrapped state dicts, prefixed names and shards.

Files are judged by their content. Nothing that they contain is run.
"""

import codecs
import contextlib
import json
import os
import pickle
import re
import shlex
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from utils.runtime.errors import UserError
from utils.runtime.files import one_line
from utils.runtime.results import file_and_key

# Keys under which weights may lie. Of several the first is taken: trained weights before averaged ones
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "module", "ema", "model_ema")
MARK = re.compile(r"(?:(.*)\.)?((?:visual|vision_model)\..+)")  # a prefix, and a name of a CLIP's image tower
INNER = re.compile(  # what compiling, checkpointing and sharding put into the middle of names
    r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module"
    r"|(?<=visual\.)module|(?<=transformer\.)module)\."
)
ADAPTER = re.compile(r"(^|\.)(lora_|ia3_|hada_|lokr_)")
SHARD = re.compile(r"(.+)-\d{5}-of-(?!00001)\d{5}(\.\w+)")
OLD_FORMAT = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)  # the start of files of old torch
KEEP = (  # for a user who trusts a file: saves its tensors, in the dicts where they lie
    "import torch, numpy; parts = lambda x: x.state_dict() if isinstance(x, torch.nn.Module) else x "
    "if isinstance(x, dict) else dict(enumerate(x)) if isinstance(x, (list, tuple)) "
    "else getattr(x, '__dict__', {}); "
    "keep = lambda x: torch.as_tensor(x) if isinstance(x, (torch.Tensor, numpy.ndarray)) else "
    "{str(k): w for k, v in parts(x).items() for w in [keep(v)] if torch.is_tensor(w) or w}; "
    'torch.save(keep(torch.load(%s, map_location="cpu", weights_only=False)), "tensors.pt")'
)
CORE = getattr(np, "_core", None) or np.core  # its name since numpy 2
NUMPY = [CORE.multiarray.scalar, np.dtype]
NUMPY += [type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u1", "?")]


def read_checkpoint(pretrained):
    """Read the tensors of a checkpoint, wherever they lie in it: {name: tensor}, on the CPU.

    pretrained: FILE, or FILE::KEY for one of several state dicts. FILE may be an index of shards.

    Raises UserError when there are none, or several among which only the user can choose.
    """
    file, key = file_and_key(str(pretrained))
    path = Path(file)
    if path.is_dir():
        fix = f"for a folder with a config use --model local-dir:{path}"
        raise UserError(f"--pretrained {path} is a folder; {fix}")
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
    refuse_adapter(state, path)
    return state


def refuse_adapter(state, path):
    """Raise UserError for a state dict with layers of an adapter, such as LoRA's."""
    layers = [name for name in state if ADAPTER.search(name)]
    alone = path.name.startswith("adapter_model.")
    if not layers and not alone:
        return
    what = "a LoRA adapter, which only changes the weights of another model"
    if not alone and len(layers) < len(state) / 2:
        what = "a LoRA adapter in the layers of a model, which are not merged"
    fix = "merge it into its model (peft: merge_and_unload), save the result, and give that file"
    raise UserError(f"{path} holds {what}; {fix}")


# Files


def read_file(path, shards=True):
    """Read the content of a weights file, by its first bytes.

    shards: whether it may be an index of other files, which are read then.

    Raises UserError, which says what the file is, for anything else.
    """
    with open(path, "rb") as file:
        start = file.read(1024)
    text = as_text(start)
    if text is not None:
        return read_text(path, text, shards)
    safe = start[8:9] == b"{"  # safetensors begin with the length of a json header
    try:
        if safe:
            return load_file(path)
        refuse_archive(path, start)
        # Opened here, because torch would go by the ending of a path
        with torch.serialization.safe_globals(NUMPY), open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch, zipfile, pickle and safetensors each raise their own
        formats = safe or start.startswith(OLD_FORMAT)
        damaged = formats or isinstance(error, zipfile.BadZipFile | EOFError)
        raise UserError(why_unreadable(path, error, damaged)) from error


def refuse_archive(path, start):
    """Raise UserError for an archive that is none of torch's. start: the file's first bytes."""
    kind = ""
    if start.startswith(b"\x1f\x8b"):
        kind = "gzip"
    elif start[257:262] == b"ustar":
        kind = "tar"
    elif start.startswith(b"PK"):
        inside = zipfile.ZipFile(path).namelist()
        if any(name.endswith("constants.pkl") for name in inside):
            fix = (
                "for OpenAI's weights use --pretrained openai, or save the state dict alone: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
            )
            what = "a TorchScript archive, and no code that a file holds is run"
            raise UserError(f"{path} is {what}; {fix}")
        if inside and not any(name.endswith("data.pkl") for name in inside):
            kind = "zip"
    if kind:
        raise UserError(f"{path} is a {kind} archive; unpack it, and give the weights file that is in it")


def why_unreadable(path, error, damaged):
    """Return the message for a file that cannot be read.

    error: of torch, zipfile, pickle or safetensors.
    damaged: whether the file begins as a weights file does, or ends too early.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    refused = re.search(r"GLOBAL (\S+)", text)  # a class or function that is not on torch's list
    if refused:
        command = shlex.join(["python", "-c", KEEP % json.dumps(str(path), ensure_ascii=False)])
        what = f"holds a {refused[1]}, and nothing but tensors and numbers is read from a file"
        fix = f"where you trust it, save the weights alone, as tensors.pt: {command}"
        return f"{path} {what}; {fix}"
    if damaged:
        return f"{path} cannot be read as a checkpoint: it is cut off or damaged; download it again"
    reason = one_line(text.rpartition("WeightsUnpickler error: ")[2])
    reason = "" if "weights_only" in reason else f" ({reason[:120]})"  # a flag of torch that nobody gave
    fix = "it has to be a state dict, as safetensors or from torch.save"
    return f"{path} cannot be read as a checkpoint{reason}; {fix}"


def as_text(start):
    """Return the first bytes of a file as text; None where they are not."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)
    except UnicodeDecodeError:
        return None
    return text if "".join(text.split()).isprintable() else None


def read_text(path, text, shards):
    """Read the weights to which an index of shards points. Raises UserError for any other text.

    text: the beginning of the file.
    shards: whether an index is allowed.
    """
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
    """Read the tensors of all shards of an index. places: {name: file beside the index}."""
    weights = {}
    for name in sorted(set(map(str, places.values()))):
        shard = path.parent / name
        if Path(name).name != name or "\\" in name:
            raise UserError(f"{path} names the shard {name!r}, and shards have to lie beside it; correct it")
        if not shard.is_file():
            raise UserError(f"{shard} is missing, which {path.name} names; download it, too")
        found = list(state_dicts(read_file(shard, shards=False)).values())
        if len(found) != 1:
            what = f"{len(found) or 'no'} state dicts, where a shard holds one"
            raise UserError(f"{shard} holds {what}; download it again")
        weights |= found[0]
    return weights


# State dicts


def state_dicts(content, key="", depth=4):
    """Find every state dict in the content of a file: {key: {name: tensor}}.

    The key of a dict inside of another one is KEY.KEY. Names have no prefix before those of a CLIP; where
    several prefixes share names, each is a key of its own.
    """
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        return {}
    found = {}
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    tensors = {INNER.sub("", name): value for name, value in tensors.items()}
    if any("." in name for name in tensors):
        for prefix, state in without_prefix(tensors).items():
            found[".".join(filter(None, [key, prefix]))] = state
    if depth:
        for name, value in content.items():
            found |= state_dicts(value, f"{key}.{name}" if key else str(name), depth - 1)
    return found


def without_prefix(tensors):
    """Take the prefixes off the names of a state dict: {prefix: {name: tensor}}.

    Each prefix also has the tensors that are under none. The result is {"": {name: tensor}} where all names
    have one prefix, or none.
    """
    names = {}  # prefix: names in the image tower
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
        if prefix is not None:
            found[prefix][name.removeprefix(f"{prefix}.")] = value
        else:
            for state in found.values():
                state[name] = value
    return found if len(found) > 1 else {"": next(iter(found.values()))}


def choose(found, key, path):
    """Return one of {key: state dict}: that of a key, the only one, or the first in the order of WRAPPERS.

    Raises UserError for an unknown key, and where WRAPPERS has none of several.
    """
    under = " and ".join(name or "the top level" for name in found)
    first = next(iter(found))
    if key is not None:
        if key in found:
            return found[key]
        below = [name for name in found if name.startswith(f"{key}.")]
        if len(below) != 1:
            raise UserError(f"{path} has no weights under {key}, but under {under}: {_flag(path, first)}")
        return found[below[0]]
    if len(found) == 1:
        return found[first]
    taken = trained(found)
    if taken is None:
        raise UserError(f"{path} has weights under {under}; choose one of them: {_flag(path, first)}")
    others = [name for name in found if name != taken]
    other = f"for {'the other' if len(others) == 1 else 'another'}: {_flag(path, others[0])}"
    print(f"note: {path} has weights under {under}; {taken or 'the top level'} is taken; {other}")
    return found[taken]


def trained(keys):
    """Return the key of the trained weights, by the order of WRAPPERS; None where none is the first."""
    parts = [key.split(".") for key in keys]
    shared = len(os.path.commonprefix(parts))
    for wrapper in ("", *WRAPPERS):  # "" for one around the others
        taken = [".".join(part) for part in parts if ".".join(part[shared : shared + 1]) == wrapper]
        if taken:
            return taken[0] if len(taken) == 1 else None
    return None


def _flag(path, key):
    return f"--pretrained {path}::{key}" if key else f"--pretrained {path}"
