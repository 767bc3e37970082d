"""Make the open_clip model that --model and --pretrained name, with its weights."""

import contextlib
import difflib
import json
import logging
import tempfile
from functools import partial
from pathlib import Path

import open_clip
from open_clip.model import set_model_preprocess_cfg
from open_clip.transform import merge_preprocess_dict

from utils.model import configs, hugging_face
from utils.model.configs import clip_config, read_config, uncovered
from utils.model.fitting import load_weights
from utils.model.library import load_folder
from utils.model.tokenizers import load_tokenizer
from utils.runtime.errors import UserError
from utils.runtime.files import one_line
from utils.runtime.results import file_and_key, is_checkpoint_path, model_name

# files of a folder of open_clip's that may hold its weights
OPEN_CLIPS_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    *hugging_face.WEIGHT_FILES,
)


def create(model, pretrained, image_only):
    """Make the model of the flags --model and --pretrained, on the CPU.

    Returns the open_clip model or a `TwoTowers`, a function that loads its tokenizer, and the folder of a
    model of the transformers library, None for other models.
    """
    folder = hugging_face.folder_of(model)
    if folder is not None:
        return *_of_library(model, folder, image_only), folder
    name = _register_config(model) if model.endswith(".json") else model
    tokenizer = partial(open_clip.get_tokenizer, name)
    if name.startswith("local-dir:"):
        return _of_open_clips_folder(name, image_only), tokenizer, None
    if name.startswith("hf-hub:"):
        return open_clip.create_model(name, require_pretrained=True), tokenizer, None
    check_name(name)
    if pretrained == "random":
        return _without_weights(name), tokenizer, None
    if is_checkpoint_path(pretrained):
        clip = _without_weights(name)
        load_weights(clip, pretrained, image_only)
        beside = Path(file_and_key(pretrained)[0]).parent
        if clip_config(beside):
            tokenizer = partial(load_tokenizer, beside)
        return clip, tokenizer, None
    check_tag(name, pretrained)
    quick = open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)
    return open_clip.create_model(name, pretrained=pretrained, force_quick_gelu=quick), tokenizer, None


def _of_library(name, folder, image_only):
    """Return the model of a folder of the transformers library, and a function that loads its tokenizer."""
    weights = hugging_face.weights_file(folder)
    if weights is None:
        files = ", ".join(hugging_face.WEIGHT_FILES)
        raise UserError(f"--model {name}: {folder} has no weights; put one of {files} there")
    return load_folder(folder, weights, image_only), partial(load_tokenizer, folder)


def _of_open_clips_folder(name, image_only):
    """Return the model of `local-dir:PATH`, a folder with open_clip's config and weights."""
    folder = Path(name.removeprefix("local-dir:"))
    failed = f"--model {name} could not be loaded"
    path = folder / configs.OPEN_CLIP
    config = read_config(path)
    if config is None:
        what = uncovered(folder) or f"it has no {configs.OPEN_CLIP}"
        raise UserError(f"{failed}: {what}; give the folder of a CLIP")
    weights = next((folder / file for file in OPEN_CLIPS_WEIGHTS if (folder / file).is_file()), None)
    if weights is None:
        files = ", ".join(OPEN_CLIPS_WEIGHTS[:2])
        raise UserError(f"{failed}: it has no weights; put one of {files} there")
    clip = _without_weights(_register_config(str(path)))
    load_weights(clip, weights, image_only)
    fields = config.get("preprocess_cfg")
    if isinstance(fields, dict):
        set_model_preprocess_cfg(clip, merge_preprocess_dict(clip.visual.preprocess_cfg, fields))
    return clip


def _without_weights(name):
    """Return a random open_clip model."""
    with _silence():  # pretrained_text: else the hub is asked for a text tower's weights
        return open_clip.create_model(name, pretrained_text=False)


@contextlib.contextmanager
def _silence():
    """Silence open_clip's warning that a model is random: it is meant to be, or weights follow."""
    root = logging.getLogger()
    disabled = logging.root.manager.disable
    handlers = list(root.handlers)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers  # the first warning of a process adds one


def _register_config(path):
    """Make a model-config json known to open_clip, and return its name there.

    In a config from the hub the model's fields are under `model_cfg`; `utils.model.preprocessing` reads the
    others.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        config = config["model_cfg"] if "model_cfg" in config else config
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    except FileNotFoundError as error:
        fix = "give an open_clip name or the path of a config json"
        raise UserError(f"--model {path}: there is no such file; {fix}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"--model {path} is not a model config ({one_line(error)})") from error
    if missing:
        instead = ""
        if "vision_config" in config:
            folder = Path(path).parent
            instead = f"; it is one of the transformers library: use --model local-dir:{folder}"
        what = f"it has no {', '.join(missing)}"
        raise UserError(f"--model {path} is not an open_clip model config: {what}{instead}")
    name = model_name(path)
    with tempfile.TemporaryDirectory() as folder:  # open_clip reads configs from files alone
        file = Path(folder) / f"{name}.json"
        file.write_text(json.dumps(config))
        open_clip.add_model_config(file)
    return name


def check_name(name):
    """Raise UserError, with what to type, for a model that open_clip does not know."""
    models = open_clip.list_models()
    if name in models:
        return
    unknown = f"--model {name} is not known to open_clip"
    if name.replace("/", "-") in models:
        raise UserError(f"{unknown}; use --model {name.replace('/', '-')}")
    if Path(name).is_dir():
        raise UserError(f"--model {name} is a folder; use --model local-dir:{name}")
    if "/" in name:
        hub = f"a model of the Hugging Face hub is --model hf:{name} (or hf-hub:{name}, open_clip's own)"
        raise UserError(f"{unknown}; {hub}")
    raise UserError(f"{unknown}; {_near(name, models)}")


def check_tag(name, pretrained):
    """Raise UserError, with what to type, for a tag that an open_clip model does not have."""
    if open_clip.get_pretrained_cfg(name, pretrained):
        return
    if Path(pretrained).exists():
        what = "is no tag; the path of a file needs a folder before it"
        raise UserError(f"--pretrained {pretrained} {what}: ./{pretrained}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    hint = _near(pretrained, tags) if tags else "it has no tags, give the path of a checkpoint"
    raise UserError(f"--pretrained {pretrained} is no tag of {name}; {hint}")


def _near(word, choices):
    near = difflib.get_close_matches(word, choices, n=4, cutoff=0.4)
    if near:
        return f"did you mean {', '.join(near)}?"
    return f"there are {', '.join(sorted(choices)[:12])}, ..."
