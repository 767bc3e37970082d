"""Read the configs beside weights: open_clip's, and those of the transformers library's `CLIPModel`."""

from pathlib import Path

from utils.runtime.errors import UserError
from utils.runtime.files import one_line, read_json

OPEN_CLIP = "open_clip_config.json"


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
    """Return the fields of a `CLIPModel`'s config in a folder; {} if there is none.

    kinds: values of model_type that count.
    """
    config = read_config(Path(folder) / "config.json") or {}
    return config if config.get("model_type") in kinds else {}


def parsed_config(folder):
    """Return the `CLIPConfig` of a folder with a `clip_config`: it knows what a config.json leaves out."""
    from transformers import CLIPConfig  # takes a second

    try:
        return CLIPConfig.from_dict(clip_config(folder))
    except Exception as error:  # the library has many
        what = f"{folder}/config.json is damaged ({one_line(error)[:100]})"
        raise UserError(f"the config {what}; correct or remove it") from error
