"""Read the configs beside weights: open_clip's, and those of the transformers library's models."""

import contextlib
from pathlib import Path

from utils.runtime.errors import UserError
from utils.runtime.files import one_line, read_json

OPEN_CLIP = "open_clip_config.json"

# Types of model of the transformers library that are covered, and what the names of their classes begin with
TYPES = {
    "clip": "CLIP",
    "siglip": "Siglip",
    "metaclip_2": "MetaClip2",
    "altclip": "AltCLIP",
    "chinese_clip": "ChineseCLIP",
}

# Why others are not
REASONS = {
    "align": "its image tower is an EfficientNet, without attention",
    "blip": "its weights have other names, which are not mapped",
    "blip-2": "its image features are several queries of a second transformer",
    "clipseg": "it is a decoder of masks on top of a CLIP",
    "siglip2": "it reads grids of any shape (NaFlex); SigLIP 2 of a fixed size has the type siglip",
    "tipsv2": "its image tower has register tokens",
    "videoprism": "it reads videos",
}


def read_config(path):
    """Return the fields of a json file; None where there is no file. Raises UserError for a damaged one."""
    try:
        found = read_json(path, "the config", "correct or remove it")
    except FileNotFoundError:
        return None
    if not isinstance(found, dict):
        raise UserError(f"the config {path} is damaged (it holds no fields); correct or remove it")
    return found


def clip_config(folder, kinds=("clip",)):
    """Return the fields of a model's config of the transformers library in a folder; {} if there is none.

    kinds: values of model_type that count.
    """
    config = read_config(Path(folder) / "config.json") or {}
    return config if config.get("model_type") in kinds else {}


def uncovered(folder):
    """Return the words that say which types of model are covered, for a folder of another one.

    None where its config names no type, or one that is covered.
    """
    kind = (read_config(Path(folder) / "config.json") or {}).get("model_type")
    if not kind or kind in TYPES:
        return None
    reason = f" ({REASONS[kind]})" if kind in REASONS else ""
    return f"its config.json says model_type {kind!r}{reason}, and {', '.join(TYPES)} are covered"


def parsed_config(folder):
    """Return the config of a folder with a `clip_config`, of a class that knows what it leaves out."""
    fields = clip_config(folder, TYPES)
    kind = getattr(library(), f"{TYPES[fields['model_type']]}Config")
    try:
        with silence():
            return kind.from_dict(fields)
    except Exception as error:  # the library has many
        what = f"{folder}/config.json is damaged ({one_line(error)[:100]})"
        raise UserError(f"the config {what}; correct or remove it") from error


def library():
    """Return the transformers library. Raises UserError where it is missing."""
    try:
        import transformers  # takes a second
    except ImportError as error:
        what = "Hugging Face's models are read by the transformers library, which is missing"
        raise UserError(f"{what}: pip install transformers") from error
    return transformers


@contextlib.contextmanager
def silence():
    """Silence the library: what it remarks on configs and weights is checked, and said in one line."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    shown = logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
