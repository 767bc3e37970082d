"""List which of open_clip's configurations the method covers.

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
    left_out = "; the MLP after it is left out" if vit.pooling.leaves_out_mlp else ""
    return COVERED[vit.pooling.name] + left_out


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


if __name__ == "__main__":
    print("\n".join(table()))
