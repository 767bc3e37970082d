"""Which of open_clip's configurations the method covers.

python -m docs.models > docs/models.md
"""

from pathlib import Path

import open_clip
import torch
from open_clip.model import _build_vision_tower  # the image tower alone: some text towers would ask the hub

from utils.model.hooks import HookedViT
from utils.runtime.errors import UserError

COVERED = {
    "class token": "exact",
    "average": "exact (average of the patches)",
    "average of norms": "exact (average of normalised patches)",
    "attention": "exact, through the pooling attention",
}


def coverage(name):
    """How the method covers a configuration, in words: its image tower is built without memory (meta
    device).
    """
    config = open_clip.get_model_config(name)
    try:
        with torch.device("meta"):
            vit = HookedViT(
                _build_vision_tower(
                    config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)
                )
            )
    except UserError as error:
        return f"refused: {str(error).split('; choose')[0]}"
    left_out = (
        "; the MLP after it is left out" if vit.pooling == "attention" and vit.visual.ln_post is None else ""
    )
    return COVERED[vit.pooling] + left_out


def table():
    """The lines of docs/models.md."""
    files = (Path(open_clip.__file__).parent / "model_configs").glob(
        "*.json"
    )  # none that a program has added
    rows = {name: coverage(name) for name in sorted((file.stem for file in files), key=str.lower)}
    counts = [sum(found.startswith(kind) for found in rows.values()) for kind in ("exact", "refused")]
    lines = [
        "# open_clip's configurations",
        "",
        f"Made by `python -m docs.models` with open_clip {open_clip.__version__}: of {len(rows)}",
    ]
    lines[-1] += (
        f" configurations {counts[0]} are covered and {counts[1]} refused. Text towers of the transformers library work;"
    )
    lines[-1] += " their tokenizers come from the hub."
    return [
        *lines,
        "",
        "| `--model` | second-order effects |",
        "|---|---|",
        *(f"| {name} | {found} |" for name, found in rows.items()),
    ]


if __name__ == "__main__":
    print("\n".join(table()))
