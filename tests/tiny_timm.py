"""Small image towers of timm's other kinds, of timm's own classes, also as models that a config names."""

import sys

import torch
from timm.models import eva, register_model, vision_transformer, vision_transformer_relpos, vitamin

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}
ROTARY = {"use_rot_pos_emb": True, "ref_feat_shape": (5, 5)}
GATED = {"swiglu_mlp": True, "scale_mlp": True}
PE = {**ROTARY, "global_pool": "map", "attn_type": "rope", "use_pre_transformer_norm": True}
PE |= {"rope_grid_offset": 1.0, "rope_grid_indexing": "xy", "attn_pool_num_heads": 3}


def of_eva(**options):
    return eva.Eva(**{**SMALL, "num_classes": 24, "global_pool": "token"} | options)


def of_vit(**options):
    return vision_transformer.VisionTransformer(**{**SMALL, "num_classes": 24} | options)


def of_relpos(**options):
    usual = {"num_classes": 24, "class_token": True, "global_pool": "token", "fc_norm": False}
    usual |= {"init_values": 0.5, "rel_pos_dim": 16}
    return vision_transformer_relpos.VisionTransformerRelPos(**{**SMALL, **usual} | options)


def of_vitamin(**options):
    """Pictures of 64 pixels are a grid of 4 x 4."""
    cfg = vitamin.VitCfg(embed_dim=(8, 16, 48), depths=(1, 1, 1), stem_width=8)
    usual = {"embed_cfg": cfg, "class_token": False, "global_pool": "avg", "mlp_layer": vitamin.GeGluMlp}
    usual |= {name: SMALL[name] for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
    usual |= {"num_classes": 24, "img_size": 64}
    return vitamin._create_vitamin("vitamin_small_224", **{**usual, **options})


FAMILIES = {  # {name: (function that makes it, its options)}
    "EVA01": (of_eva, {"init_values": 0.5}),
    "EVA02": (of_eva, {**ROTARY, **GATED, "qkv_fused": False, "scale_attn_inner": True}),
    "EVA02-E": (of_eva, {"use_post_norm": True}),
    "all norms": (of_eva, {**ROTARY, **GATED, "use_post_norm": True, "scale_attn_inner": True}),
    "PE-Core": (of_eva, PE),
    "PE-Core without a class token": (of_eva, {**PE, "class_token": False}),
    "ViTamin": (of_vitamin, {}),
    "pool with a head": (of_vit, {"global_pool": "map", "class_token": False, "pre_norm": True}),
    "pool of all tokens": (of_vit, {"global_pool": "map", "pool_include_prefix": True}),
    "relpos": (of_relpos, {}),
    "relpos, table": (of_relpos, {"rel_pos_type": "bias"}),
    "relpos, shared": (of_relpos, {"shared_rel_pos": True}),
    "relpos, average": (of_relpos, {"class_token": False, "global_pool": "avg", "fc_norm": True}),
    "rotary, average": (of_eva, {**ROTARY, "global_pool": "avg"}),
    "rotary, average of norms": (of_eva, {**ROTARY, "global_pool": "avg", "use_fc_norm": False}),
}


def trunk_of(name, **options):
    torch.manual_seed(0)
    make, usual = FAMILIES[name]
    return make(**{**usual, **options})


def vision_config(name):
    """The `vision_cfg` of a config that names a family. Its model is known where this module is imported."""
    side = 64 if name == "ViTamin" else 32
    pool = FAMILIES[name][1].get("global_pool", "avg" if name == "ViTamin" else "token")
    return {"timm_model_name": registered(name), "timm_pool": pool, "timm_proj": "", "image_size": side}


def registered(name):
    return "tests_" + "".join(letter if letter.isalnum() else "_" for letter in name).lower()


def _register(name):
    def make(pretrained=False, num_classes=24, global_pool="token", **_):
        trunk = trunk_of(name, num_classes=num_classes, global_pool=global_pool)
        trunk.default_cfg = {}
        return trunk

    make.__name__ = registered(name)
    setattr(sys.modules[__name__], make.__name__, make)
    register_model(make)


for _name in FAMILIES:
    _register(_name)
