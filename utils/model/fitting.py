"""Put the weights of a checkpoint into an open_clip model, or say in what they differ."""

import contextlib
import re
from pathlib import Path

import torch
from open_clip.factory import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from open_clip.transformer import QuickGELU

from utils.model import configs, hugging_face, tokenizers
from utils.model.checkpoints import read_checkpoint
from utils.model.configs import clip_config, parsed_config, read_config
from utils.runtime.errors import UserError
from utils.runtime.results import file_and_key

OPENAIS = {"input_resolution", "context_length", "vocab_size"}  # beside the weights in OpenAI's own files
BUFFERS = re.compile(
    r"(^|\.)(position_ids|attn_mask|num_batches_tracked|inv_freq|freqs_(cos|sin)|(rope|rotary_emb)\.\w+)$"
    r"|^visual\.image_(mean|std)$",
)
LOGITS = ("logit_scale", "logit_bias")  # weights that have no effect on vectors


def load_weights(model, pretrained, image_only=False):
    """Load a checkpoint into an open_clip model, in float32.

    pretrained: a path, as `read_checkpoint` takes it.
    image_only: whether the text tower may be missing; then it is removed from the model.

    Raises UserError when the weights do not fit, or when a config beside them describes another model.
    """
    state = read_checkpoint(pretrained)
    path = file_and_key(str(pretrained))[0]
    check_beside(model, path)
    if OPENAIS <= state.keys() and not has_quick_gelu(model):
        fix = "if it is, its weights need a --model with -quickgelu"
        print(f"note: {path} looks like a file of OpenAI's; {fix}")
    state = renamed(model, {name: as_floats(name, value, path) for name, value in state.items()})
    own = model.state_dict()
    set_logits(state, own)
    if lacks_text(own, state):
        remove_text(model, path, image_only)
        own = model.state_dict()
    check_names(state, own, path)
    state = {name: value for name, value in state.items() if name in own}
    with contextlib.suppress(AssertionError):  # of another width: refused below
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    check_sizes(state, own, path)
    model.load_state_dict(state, strict=False)


def as_floats(name, value, path):
    """Return a tensor of a checkpoint in float32. Raises UserError for quantised weights and the like."""
    if value.is_floating_point() or value.ndim == 0 or BUFFERS.search(name):
        return value.float()
    what = f"{name} as {value.dtype}, and weights are floating-point numbers"
    raise UserError(f"{path} holds {what}; convert them first")


def renamed(model, state):
    """Return the weights of any known layout under the names of an open_clip model."""
    own = model.state_dict()
    if hugging_face.is_clip_model(state):
        state = hugging_face.renamed(state)
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


def set_logits(state, own):
    """Give a state dict the logit scale and bias of a model, in its shape.

    own: the state dict of the model.
    """
    for name in LOGITS:
        if name in own:
            value = state.get(name, torch.zeros_like(own[name]))
            state[name] = value.reshape(own[name].shape)


# The config beside a checkpoint


def has_quick_gelu(model):
    """Return whether the activation of a model's transformers is QuickGELU.

    Both towers have the same one, but the image tower may have none (a ResNet).
    """
    return any(isinstance(module, QuickGELU) for module in model.modules())


def check_beside(model, path):
    """Raise UserError when a config beside a checkpoint says that the model is another one than --model."""
    path = Path(path)
    quick = trained_with_quick_gelu(path)
    if quick not in (None, has_quick_gelu(model)):
        trained, right = ("QuickGELU", "with") if quick else ("GELU", "without")
        of_config = f'"quick_gelu": {"true" if quick else "false"} in its config'
        fix = f"use the --model {right} -quickgelu, or {of_config}"
        raise UserError(f"{path} was trained with {trained}, says the config beside it; {fix}")
    folder = path.parent
    fix = f"use --model local-dir:{folder}"
    beside = clip_config(folder, configs.TYPES)
    if path.name.startswith("open_clip") or not beside:
        return
    says = f"{path}: the config beside it says"
    if beside["model_type"] != "clip":
        raise UserError(f"{says} model_type {beside['model_type']!r}; {fix}")
    said = parsed_config(folder)
    towers = {"image": (model.visual, said.vision_config), "text": (model, said.text_config)}
    for name, (tower, config) in towers.items():
        if difference := tower_difference(tower, config, folder):
            what, wanted, found = difference
            raise UserError(f"{says} {what} {wanted} of the {name} tower, and --model has {found}; {fix}")
    end = said.text_config.eos_token_id
    known = (tokenizers.OLD_END, tokenizers.OPENAI - 1)
    if end not in known and getattr(model, "text_pool_type", "") == "argmax":
        what = f"the token {end} ends a text, which --model does not read"
        raise UserError(f"{says} that {what}; {fix}")


def tower_difference(tower, config, folder):
    """Return the first difference of a tower and its config: what, value in the config, value in the tower.

    tower: of open_clip. One without a `transformer` is not compared.
    config: of the transformers library, in a folder.

    Returns None if there is none.
    """
    if getattr(tower, "transformer", None) is None:
        return None
    block = tower.transformer.resblocks[0]
    activation = repr(hugging_face.activation(config.hidden_act, folder))
    values = {  # what: (of the config, of the model)
        "heads": (config.num_attention_heads, block.attn.num_heads),
        "layer_norm_eps": (config.layer_norm_eps, block.ln_1.eps),
        "activation": (activation, repr(block.mlp.gelu)),
    }
    for what, (wanted, found) in values.items():
        if wanted != found:
            return what, wanted, found
    return None


def trained_with_quick_gelu(path):
    """Return whether a config beside a weights file says QuickGELU; None where no config says it."""
    config = clip_config(path.parent, ("clip", "clip_vision_model"))
    if config and not path.name.startswith("open_clip"):
        return config.get("vision_config", config).get("hidden_act", "quick_gelu") == "quick_gelu"
    config = read_config(path.parent / configs.OPEN_CLIP) or {}
    return config["model_cfg"].get("quick_gelu", False) if "model_cfg" in config else None


# Towers


def lacks_text(own, state):
    """Return whether a state dict has a whole image tower and no layer of the text tower.

    own: the state dict of the model.
    """
    of_text = [name for name in own if "transformer." in name and not name.startswith("visual.")]
    whole = all(name in state for name in own if name.startswith("visual."))
    return whole and not any(name in state for name in of_text)


def remove_text(model, path, image_only):
    """Remove the text tower of a model, so that no random weights are taken for those of its checkpoint."""
    if not image_only:
        fix = "give a checkpoint that has one, such as that of the model from which it was tuned"
        raise UserError(f"{path} has no text tower, and texts are embedded here; {fix}")
    print(f"note: {path} has no text tower; stages that embed texts need a checkpoint with one")
    for name in {name.split(".")[0] for name in model.state_dict()} - {"visual", *LOGITS}:
        delattr(model, name)


# Differences


def check_names(state, own, path):
    """Raise UserError unless a state dict has all weights of a model, and no more of its towers.

    What else there is, is named on the screen. own: the model's state dict.
    """
    missing = [name for name in own if name not in state and not name.endswith("position_ids")]
    refuse([f"{name} is missing" for name in missing], path)
    others = [name for name in state if name not in own]
    towers = {name.split(".")[0] for name in own}
    weights = [name for name in others if not BUFFERS.search(name)]
    refuse([f"it has {name}" for name in weights if name.split(".")[0] in towers], path)
    if others:
        first = ", ".join(others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        print(f"note: {path} also holds {first}{more}, which are no weights of the towers; left")


def check_sizes(state, own, path):
    """Raise UserError unless the tensors of a state dict have the shapes of a model's. own: the model's."""
    problems = []
    for name, value in state.items():
        found = list(value.shape)
        wanted = list(own[name].shape)
        if found != wanted:
            problems.append(f"size mismatch for {name}, {found} for {wanted}")
    refuse(problems, path)


def refuse(problems, path):
    """Raise UserError, with the first, if there are differences between a checkpoint and a model."""
    if problems:
        more = f" and {len(problems) - 1} more differences" if len(problems) > 1 else ""
        fix = "choose another model or other weights"
        raise UserError(f"{path} does not fit the model: {problems[0]}{more}; {fix}")
