"""Names of open_clip and timm that no documentation promises and this code relies on.

A release that moves one of them fails here, with its name. Towers of the small models below have them all.
"""

import importlib

import open_clip
import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer

from tests.tiny_timm import trunk_of

FUNCTIONS = {  # of modules
    "open_clip.factory": "convert_state_dict",
    "open_clip.model": "_build_vision_tower resize_pos_embed resize_text_pos_embed set_model_preprocess_cfg "
    "convert_to_custom_text_state_dict",
    "open_clip.modified_resnet": "ModifiedResNet",
    "open_clip.timm_model": "TimmModel",
    "open_clip.transform": "merge_preprocess_dict",
    "open_clip.transformer": "LayerScale QuickGELU ResidualAttentionBlock VisionTransformer",
    "timm.layers": "Attention AttentionPoolLatent AttentionRope Mlp RotaryEmbeddingCat SwiGLU "
    "apply_rot_embed_cat",
    "timm.models.eva": "Eva EvaAttention EvaBlock EvaBlockPostNorm",
    "timm.models.vision_transformer": "Block VisionTransformer",
    "timm.models.vision_transformer_relpos": "RelPosAttention RelPosBlock VisionTransformerRelPos",
    "timm.models.vitamin": "GeGluMlp",
}
TRUNK = "blocks cls_token fc_norm global_pool head norm num_prefix_tokens patch_embed patch_embed.grid_size"
POOL = (
    "q.weight q.bias kv.weight kv.bias q_norm k_norm latent latent_len mlp norm num_heads pool pos_embed proj"
)
POOLED = " ".join(f"attn_pool.{name}" for name in [*POOL.split(), "proj"])
PROJECTIONS = "q_proj.weight k_proj.weight v_proj.weight"
VIT = "_pos_embed norm_pre reg_token dynamic_img_size attn_pool embed_dim"
ATTENTION = "num_heads head_dim q_norm k_norm proj qkv"
RESNET = "stem layer1 layer2 layer3 layer4 image_size attnpool.positional_embedding attnpool.num_heads"
OPEN_CLIP = "_embeds _pool transformer.resblocks pool_type final_ln_after_pool ln_post proj grid_size "
OPEN_CLIP += "output_dim image_size attn_pool attn_pool_contrastive class_embedding"
LAST = "transformer.resblocks.1"


def of(prefix, names):
    return " ".join(f"{prefix}.{name}" for name in names.split())


EVA = f"{TRUNK} {VIT} rope {of('blocks.0', 'norm1 norm2 attn mlp gamma_1 gamma_2')} "
EVA += of("blocks.0.attn", f"{ATTENTION} norm gate")
SMALL = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "heads": 4, "mlp_ratio": 2.0}
ATTENTIONAL = {"attentional_pool": True, "attn_pooler_queries": 2, "attn_pooler_heads": 4}
PLAIN = of(LAST, "ln_1 ln_2 attn ls_1.gamma ls_2.gamma mlp.c_fc mlp.gelu mlp.c_proj")
TOWERS = {  # what: (a function that makes it, names)
    "open_clip's VisionTransformer": (
        lambda: VisionTransformer(**SMALL, output_dim=24, ls_init_value=0.5, **ATTENTIONAL),
        f"{OPEN_CLIP} {PLAIN} {of('attn_pool', 'query attn ln_q ln_k')}",
    ),
    "open_clip's ModifiedResNet": (
        lambda: ModifiedResNet([1, 1, 1, 1], output_dim=24, heads=4, image_size=64, width=4),
        f"{RESNET} {of('attnpool', f'{PROJECTIONS} q_proj.bias k_proj.bias v_proj.bias c_proj')}",
    ),
    "open_clip's TimmModel": (
        lambda: TimmModel("vit_tiny_patch16_224", 24, image_size=224, pool="token"),
        "trunk head image_size",
    ),
    "timm's Eva, EVA01": (
        lambda: trunk_of("EVA01"),
        f"{EVA} {of('blocks.0.attn', 'q_bias k_bias v_bias')} {of('blocks.0.mlp', 'fc1 act norm fc2')}",
    ),
    "timm's Eva, EVA02": (
        lambda: trunk_of("EVA02"),
        f"{EVA} rope.get_embed {of('blocks.0.attn', PROJECTIONS)} blocks.0.attn.rotate_half "
        f"{of('blocks.0.mlp', 'fc1_g fc1_x act norm fc2')}",
    ),
    "timm's Eva, EVA02-E": (lambda: trunk_of("EVA02-E"), of("blocks.0", "norm1 norm2 attn mlp")),
    "timm's Eva, PE-Core": (
        lambda: trunk_of("PE-Core"),
        f"{EVA} rope.get_embed {POOLED} {of('blocks.0.attn', 'num_kv_groups rotate_half')}",
    ),
    "timm's VisionTransformer, ViTamin": (
        lambda: trunk_of("ViTamin"),
        f"{TRUNK} {VIT} pool_include_prefix {of('blocks.0', 'norm1 norm2 ls1 ls2')} "
        f"{of('blocks.0.attn', f'{ATTENTION} norm gate')} {of('blocks.0.mlp', 'norm w0 act w1 w2')}",
    ),
    "timm's VisionTransformerRelPos": (
        lambda: trunk_of("relpos"),
        f"{TRUNK} shared_rel_pos {of('blocks.0', 'norm1 norm2 ls1 ls2')} "
        f"{of('blocks.0.attn', f'{ATTENTION} rel_pos.get_bias')}",
    ),
}


def missing(owner, names):
    """The names that an object does not have, a.b for the b of its a."""
    found = []
    for name in names.split():
        at = owner
        for part in name.split("."):
            if part.isdecimal():
                at = at[int(part)]
            elif hasattr(at, part):
                at = getattr(at, part)
            else:
                found.append(name)
                break
    return found


@pytest.mark.parametrize("module", FUNCTIONS)
def test_modules_have_the_names_that_the_code_relies_on(module):
    gone = missing(importlib.import_module(module), FUNCTIONS[module])
    assert gone == [], f"{module} of open_clip {open_clip.__version__} or timm has no more {', '.join(gone)}"


@pytest.mark.parametrize("what", TOWERS)
def test_towers_have_the_names_that_the_code_relies_on(what):
    make, names = TOWERS[what]
    gone = missing(make(), names)
    assert gone == [], f"{what} has no more {', '.join(gone)}"


def test_a_name_that_is_gone_is_said():
    linear = torch.nn.Sequential(torch.nn.Linear(2, 3))
    assert missing(linear, "0.weight 0.gamma 0.weight.shape beta.x") == ["0.gamma", "beta.x"]
