"""Make the model of a Hugging Face folder.

The transformers library makes its own model of the weights. Those of the image tower, and of a text tower
that open_clip has too, go by name into open_clip's or timm's modules; another text tower is used as it is.
"""

from dataclasses import asdict

import open_clip
import torch
from open_clip.model import set_model_preprocess_cfg
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg
from open_clip.transformer import VisionTransformer
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import nn

from utils.model import configs, hugging_face, tokenizers
from utils.model.checkpoints import read_checkpoint
from utils.model.configs import library, parsed_config, silence
from utils.model.fitting import LOGITS, as_floats, check_names, refuse, remove_text
from utils.runtime.errors import UserError

OF_OPEN_CLIP = ("clip", "metaclip_2")  # types whose text tower is causal and read at the end token
OF_IMAGES = ("vision_model.", "visual_projection.")


class TwoTowers(nn.Module):
    """A TwoTowers is an image tower that can be hooked, beside a text tower of the transformers library.

    visual: of open_clip or timm.
    text: the library's model, without its image tower.

    Attributes:
    vocab_size: number of tokens.
    num_heads, text_pad: of the text tower; the token is None where padding is read like other tokens.
    """

    def __init__(self, visual, text):
        super().__init__()
        self.visual = visual
        self.text = text
        words = text.config.text_config
        self.vocab_size = words.vocab_size
        self.num_heads = words.num_attention_heads
        # SigLIP was trained without a mask: it reads the last token, mostly padding
        self.text_pad = None if text.config.model_type == "siglip" else words.pad_token_id

    def ends(self, tokens):
        """Return the number of the last token of each text before its padding, int64 [texts].

        It is 0 for a tower that reads padding. tokens: [texts, context].
        """
        if self.text_pad is None:
            return torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return ((tokens != self.text_pad) * places).amax(dim=1)

    def encode_text(self, tokens):
        """Return the library's text features [B, D] of tokens [B, context], as it masks their padding."""
        mask = None
        if self.text_pad is not None:
            ends = self.ends(tokens)
            tokens = tokens[:, : int(ends.max()) + 1]
            mask = (torch.arange(tokens.shape[1], device=tokens.device) <= ends[:, None]).long()
        found = self.text.get_text_features(input_ids=tokens, attention_mask=mask)
        return getattr(found, "pooler_output", found)  # a tensor before transformers 5


class SiglipTower(TimmModel):
    """A SiglipTower is timm's ViT with a pooling attention, of the shape of any SigLIP.

    vision: the library's config of the image tower.
    """

    def __init__(self, vision):
        nn.Module.__init__(self)  # TimmModel's own knows the shapes that have names
        self.image_size = (vision.image_size, vision.image_size)
        self.head = nn.Sequential()
        self.trunk = TimmTransformer(
            img_size=vision.image_size,
            patch_size=vision.patch_size,
            in_chans=vision.num_channels,
            num_classes=0,
            global_pool="map",
            embed_dim=vision.hidden_size,
            depth=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            mlp_ratio=_ratio(vision),
            class_token=False,
        )


def load_folder(folder, weights, image_only):
    """Return the model of a folder, in float32: open_clip's CLIP, or a `TwoTowers`.

    weights: the file with its weights, or the index of their shards.
    image_only: whether the text tower may be missing; then the model has none.

    Raises UserError for a config that is not covered, and for weights that do not fit it.
    """
    config = parsed_config(folder)
    check_config(config, folder)
    state = read_checkpoint(weights)
    state = {name: as_floats(name, value, weights) for name, value in state.items()}
    source, has_text = read_by_library(config, state, weights)
    own = source.state_dict()
    if config.model_type in OF_OPEN_CLIP:
        model = open_clips(config, folder)
        model.load_state_dict(hugging_face.renamed(own))  # strict: all places and all weights are used
    else:
        names = hugging_face.SIGLIP_NAMES if config.model_type == "siglip" else hugging_face.NAMES
        own = {name: value for name, value in own.items() if name.startswith(OF_IMAGES)}
        model = TwoTowers(image_tower(config, folder), source)
        found = hugging_face.renamed(own, names)
        model.visual.load_state_dict({key.removeprefix("visual."): found[key] for key in found})
        source.vision_model = source.visual_projection = None
    if not has_text:
        remove_text(model, weights, image_only)
    set_model_preprocess_cfg(model, asdict(PreprocessCfg(size=model.visual.image_size)))
    return model


def check_config(config, folder):
    """Raise UserError for an activation that nobody has, and for a SigLIP without its pooling attention."""
    for part in (config.vision_config, config.text_config):
        hugging_face.activation(part.hidden_act, folder)
    if not getattr(config.vision_config, "vision_use_head", True):
        what = "vision_use_head is false, and image features are read from that head"
        raise UserError(f"{folder}/config.json: {what}; give a whole SigLIP")


# The library's model


def read_by_library(config, state, path):
    """Return the library's own model of a state dict, and whether the state dict has its text tower.

    The library knows the names that its earlier versions gave to weights. path: of the weights.

    Raises UserError for weights that are missing, left over or of another size.
    """
    kind = getattr(library(), f"{configs.TYPES[config.model_type]}Model")
    with silence():
        model, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below
        )
    own = model.state_dict()
    others = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    sizes = [f"size mismatch for {key}, where the config says {list(own[key].shape)}" for key in others]
    refuse(sizes, path)
    missing = set(report["missing_keys"]) - set(LOGITS)  # these have no effect on vectors
    words = {name for name in own if name.startswith("text_")}
    has_text = not words <= missing
    missing -= set() if has_text else words
    more = [name for name in report["unexpected_keys"] if ".pooler." not in name]  # BERT's, never read
    check_names(dict.fromkeys([*(own.keys() - missing), *sorted(more)]), own, path)
    return model.eval(), has_text


# The towers of its shape


def open_clips(config, folder):
    """Return open_clip's model with the shape and activations of a config, and random weights."""
    text = config.text_config
    words = _shape(text)
    words |= {"context_length": text.max_position_embeddings, "vocab_size": text.vocab_size}
    words["heads"] = text.num_attention_heads
    if config.model_type != "clip" or text.eos_token_id != tokenizers.OLD_END:
        words |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    vision = config.vision_config
    image = _shape(vision)
    image |= {"image_size": vision.image_size, "patch_size": vision.patch_size}
    image["head_width"] = vision.hidden_size // vision.num_attention_heads
    model = open_clip.CLIP(config.projection_dim, vision_cfg=image, text_cfg=words)
    _set_inner(model.visual, vision, folder)
    _set_inner(model.transformer, text, folder)
    _set_inner(model.ln_final, text, folder)
    return model


def image_tower(config, folder):
    """Return an image tower of open_clip or timm with the shape of a config, and random weights."""
    vision = config.vision_config
    if config.model_type == "siglip":
        tower = SiglipTower(vision)
    else:
        sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size}
        heads = vision.num_attention_heads
        tower = VisionTransformer(**sizes, **_shape(vision), heads=heads, output_dim=config.projection_dim)
    _set_inner(tower, vision, folder)
    return tower


def _shape(config):
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "mlp_ratio": _ratio(config),
    }


def _ratio(config):
    return (config.intermediate_size + 0.5) / config.hidden_size  # the product is rounded down


def _set_inner(part, config, folder):
    """Give the LayerNorms of a part of a model their eps, and its MLPs their activation."""
    for name, module in list(part.named_modules()):
        if isinstance(module, nn.LayerNorm):
            module.eps = config.layer_norm_eps
        if name.endswith(".mlp"):
            place = "gelu" if hasattr(module, "gelu") else "act"  # open_clip's, timm's
            setattr(module, place, hugging_face.activation(config.hidden_act, folder))
