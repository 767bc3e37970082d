"""List which of open_clip's configurations and of the transformers library's types of model are covered.

python -m docs.models > docs/models.md
"""

from pathlib import Path

import open_clip
import torch
import transformers
from open_clip.model import _build_vision_tower  # the image tower alone: some text towers would ask the hub
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES as ZERO_SHOT,  # the library's list of CLIPs
)

from utils.model.configs import REASONS, TYPES
from utils.model.hooks import HookedViT
from utils.model.library import OF_OPEN_CLIP, image_tower
from utils.model.tokenizers import PARTS
from utils.runtime.errors import UserError

COVERED = {
    "class token": "exact",
    "average": "exact (average of the patches)",
    "average of norms": "exact (average of normalised patches)",
    "attention": "exact, through the pooling attention",
    "attention of the last map": "exact, of the last map's channels, through the pooling attention",
}


def coverage(name):
    """Say how the method covers a configuration. Its image tower is built without memory (meta device)."""
    config = open_clip.get_model_config(name)
    quick_gelu = config.get("quick_gelu", False)
    try:
        with torch.device("meta"):
            vit = HookedViT(_build_vision_tower(config["embed_dim"], config["vision_cfg"], quick_gelu))
    except UserError as error:
        return f"refused: {str(error).split('; choose')[0]}"
    return effects_of(vit)


def effects_of(vit):
    """Say how the effects of a `HookedViT` are defined."""
    left_out = "; the MLP after it is left out" if vit.pooling.leaves_out_mlp else ""
    return COVERED[vit.pooling.name] + left_out


def type_rows():
    """Return {type of model: how it is covered, its text tower, its tokenizer's files} of the library."""
    rows = {}
    for kind in sorted({*ZERO_SHOT, *TYPES}):
        if kind not in TYPES:
            rows[kind] = (f"refused: {REASONS.get(kind, 'nobody has looked at it')}", "", "")
            continue
        config = getattr(transformers, f"{TYPES[kind]}Config")()
        with torch.device("meta"):
            effects = effects_of(HookedViT(image_tower(config, kind)))
        text = "open_clip's" if kind in OF_OPEN_CLIP else "the library's own"
        files = [" and ".join(names) for names in PARTS[kind].values()]
        rows[kind] = (effects, text, " or ".join(["tokenizer.json", *files]))
    return rows


def table():
    """Return the lines of docs/models.md."""
    folder = Path(open_clip.__file__).parent / "model_configs"  # without those that a program has added
    names = sorted((file.stem for file in folder.glob("*.json")), key=str.lower)
    rows = {name: coverage(name) for name in names}
    exact, refused = (sum(row.startswith(kind) for row in rows.values()) for kind in ("exact", "refused"))
    made = f"Made by `python -m docs.models` with open_clip {open_clip.__version__}"
    counts = f"of {len(rows)} configurations {exact} are covered and {refused} refused"
    texts = "Text towers of the transformers library work; their tokenizers come from the hub."
    return [
        "# open_clip's configurations",
        "",
        f"{made}: {counts}. {texts}",
        "",
        "| `--model` | second-order effects |",
        "|---|---|",
        *(f"| {name} | {found} |" for name, found in rows.items()),
    ]


def type_table():
    """Return the lines of docs/models.md on the library's types of model."""
    rows = type_rows()
    exact = sum(effects.startswith("exact") for effects, _, _ in rows.values())
    made = f"Of the {len(rows)} types of CLIP in transformers {transformers.__version__} {exact} are covered"
    flags = "`--model hf:ORG/NAME` or `--model local-dir:PATH`"
    own = "Features are the library's, tokens and pixels those of the folder's tokenizer and image processor"
    needs = "Files that end in `.model` need `pip install sentencepiece protobuf`"
    return [
        "# Hugging Face's types of model",
        "",
        f"{made}: {flags}, whose config.json says this `model_type`. {own}. {needs}.",
        "",
        "| `model_type` | second-order effects | text tower | files of its tokenizer |",
        "|---|---|---|---|",
        *(f"| {' | '.join([kind, *cells])} |" for kind, cells in rows.items()),
    ]


if __name__ == "__main__":
    print("\n".join([*table(), "", *type_table()]))
