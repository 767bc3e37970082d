"""Bring image towers into one form: open_clip's ViT, and timm's own parameters under open_clip's names."""

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import LayerScale, ResidualAttentionBlock, VisionTransformer
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionPoolLatent, AttentionRope, Mlp, RotaryEmbeddingCat, SwiGLU
from timm.models import eva, vision_transformer, vision_transformer_relpos, vitamin
from torch import nn

from utils.model.attention import Attention
from utils.model.resnets import ResNetTower
from utils.runtime.errors import UserError

PLAIN = "choose a plain ViT such as --model ViT-B-32"
# what of timm's is known. Each kind is taken as it is: a class that is derived from it may do something else
TRUNKS = (vision_transformer.VisionTransformer, eva.Eva, vision_transformer_relpos.VisionTransformerRelPos)
BLOCKS = (vision_transformer.Block, eva.EvaBlock, eva.EvaBlockPostNorm, vision_transformer_relpos.RelPosBlock)
WHY_NOT = {  # of others, by the name of the class
    "ConvNeXt": ", which has no attention",
    "FastVit": ", whose attention is followed by convolutions and a GELU, so that no path is linear",
    "SwinTransformer": ", whose attention stays inside windows",
}
ATTENTIONS = (TimmAttention, AttentionRope, eva.EvaAttention, vision_transformer_relpos.RelPosAttention)


def in_open_clips_form(visual):
    """Return an image tower under open_clip's names: timm's as a `Tower`, others unchanged.

    Raises UserError, with the reason, unless the second-order effects of the tower are defined exactly.
    """
    if isinstance(visual, Tower | ResNetTower):
        return visual
    if type(visual) is ModifiedResNet:
        return ResNetTower(visual)
    if not isinstance(visual, TimmModel):
        check_supported(visual)
        return visual
    trunk = visual.trunk
    for reason, holds in reasons(visual, trunk):
        if holds:
            tower = f"this model's image tower is timm's {type(trunk).__name__}"
            raise UserError(f"{tower}{reason}; choose a plain ViT or SigLIP")
    kind = TokenTower if getattr(trunk, "attn_pool", None) is None else PooledTower
    return kind(trunk, head_of(visual), visual.image_size)


def check_supported(visual):
    """Raise UserError, with the reason, unless the method covers an image tower of open_clip's own."""
    if not isinstance(visual, VisionTransformer):
        kind = f"a {type(visual).__name__} and not open_clip's own VisionTransformer"
        raise UserError(f"this model's image tower is {kind}; {PLAIN} or ViT-L-14")
    pooled = visual.attn_pool is not None
    if pooled and (visual.attn_pool_contrastive is not None or visual.pool_type != "tok"):
        how = "by attention with several queries that all count"
        raise UserError(f"this model pools its tokens {how}; {PLAIN}")
    if visual.pool_type not in ("tok", "avg"):
        how = f"by '{visual.pool_type}': neither the class token nor an average"
        raise UserError(f"this model's output is pooled {how}; {PLAIN}")
    kind = type(visual.transformer.resblocks[0])
    if kind is not ResidualAttentionBlock or visual.proj is None:
        what = f"{kind.__name__} blocks, which are not plain pre-norm, or no output projection"
        raise UserError(f"this model has {what}; {PLAIN}")


def reasons(visual, trunk):
    """Yield (reason, whether it holds) why a timm tower is not covered.

    A reason may be looked at only if no earlier one holds.
    """
    yield WHY_NOT.get(type(trunk).__name__, ", not a known ViT"), type(trunk) not in TRUNKS
    for block in trunk.blocks:
        yield from reasons_of_block(block)
    yield " with register tokens", getattr(trunk, "reg_token", None) is not None
    rope = getattr(trunk, "rope", None)
    yield " with another kind of rotary positions", type(rope) not in (type(None), RotaryEmbeddingCat)
    yield " with images of any size", rope is not None and trunk.dynamic_img_size
    if getattr(trunk, "attn_pool", None) is None:
        yield from reasons_of_tokens(visual, trunk)
    else:
        yield from reasons_of_pool(visual, trunk, trunk.attn_pool)


def reasons_of_block(block):
    """Yield `reasons` of a block."""
    yield " with blocks of another kind", type(block) not in BLOCKS or type(block.attn) not in ATTENTIONS
    attn = block.attn
    alone = isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)
    yield " with normalised queries and keys", not alone
    yield " with gates on its attention", getattr(attn, "gate", None) is not None
    yield " with heads that share keys", getattr(attn, "num_kv_groups", 1) > 1
    yield " with heads of another width", attn.num_heads * attn.head_dim != attn.proj.out_features
    kind = type(block.mlp)
    yield " with another kind of MLP", kind is not Mlp and kind not in GATED
    yield " with a norm in its MLP", kind is Mlp and not isinstance(block.mlp.norm, nn.Identity)
    inner = getattr(attn, "norm", nn.Identity())
    norms = [block.norm1, block.norm2, *([] if isinstance(inner, nn.Identity) else [inner])]
    yield " with norms that are no LayerNorms", not all(map(is_whole_norm, norms))


def is_whole_norm(norm):
    """Return whether a module is a LayerNorm with weight and bias."""
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def reasons_of_tokens(visual, trunk):
    """Yield `reasons` of a timm tower whose output is read from a token or an average."""
    average = trunk.global_pool == "avg"
    kinds = average or trunk.global_pool == "token"
    yield " with more layers around its blocks", head_of(visual) is None or not kinds
    norms = [is_whole_norm(norm) for norm in (trunk.norm, trunk.fc_norm)]
    yield " without one last LayerNorm", sum(norms) != 1 or (norms[1] and not average)
    with_prefix = getattr(trunk, "pool_include_prefix", False)
    yield " that averages the class token with its patches", with_prefix and average
    yield " that averages its patches and has norms inside its branches", average and has_norms_inside(trunk)


def has_norms_inside(trunk):
    """Return whether LayerNorms stand inside the branches of a timm tower, behind the attention."""
    inner = [getattr(block.attn, "norm", None) for block in trunk.blocks]
    return any(map(is_whole_norm, inner)) or type(trunk.blocks[0]) is eva.EvaBlockPostNorm


def reasons_of_pool(visual, trunk, pool):
    """Yield `reasons` of a timm tower whose tokens are pooled by attention."""
    yield " with another kind of pooling", type(pool) is not AttentionPoolLatent
    several = pool.latent_len != 1 or pool.pool != "token" or pool.mlp is None
    yield " with several queries in its pooling", several
    yield " with another kind of query", not isinstance(pool.q, nn.Linear)
    yield " with positions in its pooling", pool.pos_embed is not None
    # timm's Eva pools all tokens, its VisionTransformer only patches unless it is told so
    without_class = trunk.cls_token is not None and not getattr(trunk, "pool_include_prefix", True)
    yield " whose pooling leaves the class token out", without_class
    alone = all(isinstance(part, nn.Identity) for part in (trunk.fc_norm, pool.q_norm, pool.k_norm))
    heads = [part for part in (trunk.head, *visual.head) if not isinstance(part, nn.Identity | nn.Dropout)]
    yield " with more layers around its blocks", not alone or (heads and head_of(visual) is None)
    yield " with images of any size", trunk.dynamic_img_size
    yield " with blocks that are post-norm before a pooling", type(trunk.blocks[0]) is eva.EvaBlockPostNorm
    yield " without a last LayerNorm", not is_whole_norm(trunk.norm)


def head_of(visual):
    """Return the linear layer after a timm tower's pooling, timm's or open_clip's; None unless it is one."""
    parts = (visual.trunk.head, *visual.head)
    layers = [part for part in parts if not isinstance(part, nn.Identity | nn.Dropout)]
    return layers[0] if len(layers) == 1 and isinstance(layers[0], nn.Linear) else None


# Blocks


def as_block(block, trunk):
    """Return a timm block of a trunk as an open_clip block with its parameters.

    Where every branch ends with a LayerNorm, that stands in the place of the layer scale.
    """
    width = block.norm1.normalized_shape[0]
    with torch.device("meta"):
        found = ResidualAttentionBlock(width, block.attn.num_heads, 1)
    if type(block) is eva.EvaBlockPostNorm:
        found.ln_1 = nn.Identity()
        found.ln_2 = nn.Identity()
        found.ls_1 = block.norm1
        found.ls_2 = block.norm2
    else:
        found.ln_1 = block.norm1
        found.ln_2 = block.norm2
        found.ls_1 = scale_of(block, "1")
        found.ls_2 = scale_of(block, "2")
    found.attn = as_attention(found.attn, block.attn, trunk)
    if type(block.mlp) is Mlp:
        found.mlp.c_fc = block.mlp.fc1
        found.mlp.gelu = block.mlp.act
        found.mlp.c_proj = block.mlp.fc2
    else:
        found.mlp = Gated(block.mlp)
    return found.eval()


def scale_of(block, branch):
    """Return the layer scale of a timm block's branch, "1" or "2"."""
    if type(block) is not eva.EvaBlock:
        return getattr(block, f"ls{branch}")
    gamma = getattr(block, f"gamma_{branch}")
    if gamma is None:
        return nn.Identity()
    with torch.device("meta"):
        found = LayerScale(len(gamma))
    found.gamma = gamma
    return found


def as_attention(plain, attn, trunk):
    """Return an attention of timm under the names of nn.MultiheadAttention.

    plain: an nn.MultiheadAttention of its size, which is used where it can be.
    attn: of a block of the trunk.
    """
    inner = attn.norm if is_whole_norm(getattr(attn, "norm", None)) else None
    bias = getattr(attn, "rel_pos", None) or getattr(trunk, "shared_rel_pos", None)
    rope = getattr(trunk, "rope", None)
    joint = attn.qkv is not None
    if inner is not None or bias is not None or rope is not None or not joint:
        rotary = {"prefix": trunk.num_prefix_tokens, "half": getattr(attn, "rotate_half", False)}
        plain = Attention(plain.embed_dim, plain.num_heads, rope=rope, **rotary, bias=bias, inner=inner)
    if joint:
        plain.in_proj_weight = attn.qkv.weight
    else:
        for name in ("q", "k", "v"):
            setattr(plain, f"{name}_proj_weight", getattr(attn, f"{name}_proj").weight)
    plain.in_proj_bias = nn.Parameter(bias_of_projections(attn), requires_grad=False)
    plain.out_proj = attn.proj
    return plain


def bias_of_projections(attn):
    """Return the biases of queries, keys and values of an attention of timm, in one; 0 where it has none."""
    if attn.qkv is None:
        width = attn.q_proj.weight[:, 0]
        layers = (attn.q_proj, attn.k_proj, attn.v_proj)
        return torch.cat([torch.zeros_like(width) if of.bias is None else of.bias for of in layers])
    if attn.qkv.bias is not None:
        return attn.qkv.bias
    if getattr(attn, "q_bias", None) is not None:
        return torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    return torch.zeros_like(attn.qkv.weight[:, 0])


class Gated(nn.Module):
    """A Gated is an MLP whose activations are products of two linear functions, one through a nonlinearity.

    mlp: a gated MLP of timm.

    `gelu` is an identity, where the activations are read and changed.
    """

    def __init__(self, mlp):
        super().__init__()
        self.products, last = GATED[type(mlp)]
        self.parts = mlp
        self.gelu = nn.Identity()
        self.c_proj = getattr(mlp, last)

    def forward(self, x):
        return self.c_proj(self.gelu(self.products(self.parts, x)))


def _swiglu(mlp, x):
    return mlp.norm(mlp.act(mlp.fc1_g(x)) * mlp.fc1_x(x))


def _geglu(mlp, x):
    x = mlp.norm(x)
    return mlp.act(mlp.w0(x)) * mlp.w1(x)


# {class of a gated MLP: (function of it and its input, name of its last linear layer)}
GATED = {SwiGLU: (_swiglu, "fc2"), vitamin.GeGluMlp: (_geglu, "w2")}


# Towers


class Tower(nn.Module):
    """A Tower is a timm ViT under the names of open_clip's VisionTransformer.

    head: a linear layer, the projection, perhaps with a bias; None.
    """

    def __init__(self, trunk, head, image_size):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(as_block(block, trunk) for block in trunk.blocks)
        self.trunk = trunk
        self.head = head
        self.grid_size = trunk.patch_embed.grid_size
        self.image_size = image_size
        if trunk.cls_token is not None:
            self.class_embedding = trunk.cls_token

    @property
    def proj(self):
        """The projection is the head's weight, [d, D]; None without a head."""
        return None if self.head is None else self.head.weight.T

    @property
    def bias(self):
        """The bias is the head's, [D] or None."""
        return None if self.head is None else self.head.bias

    def forward(self, images):
        z = self._embeds(images)
        for block in self.transformer.resblocks:
            z = block(z)
        return output_of(self, z)

    def _embeds(self, images):
        z = self.trunk.patch_embed(images)
        if isinstance(self.trunk, vision_transformer_relpos.VisionTransformerRelPos):
            token = self.trunk.cls_token
            return z if token is None else torch.cat([token.expand(len(z), -1, -1), z], dim=1)
        z = self.trunk._pos_embed(z)
        if isinstance(self.trunk, eva.Eva):
            z, _ = z  # rotary positions come from each attention
        return self.trunk.norm_pre(z)


def output_of(visual, z):
    """Return the output [B, D] of an image tower from its last residual stream z [B, T, d]."""
    output, _ = visual._pool(z)
    return projected(visual, output)


def projected(visual, x):
    """Return what the projection of an image tower and its bias make of x [B, d'], [B, D]."""
    if visual.proj is not None:
        x = x @ visual.proj
    bias = getattr(visual, "bias", None)
    return x if bias is None else x + bias


class PooledTower(Tower):
    """A PooledTower pools its tokens by attention with one learned query, as SigLIP's does.

    The output is o + MLP(LN(o)), with o the output of the attention, and perhaps a projection of that. There
    is no last LayerNorm.
    """

    pool_type = "attention"
    final_ln_after_pool = False
    ln_post = None

    def __init__(self, trunk, head, image_size):
        super().__init__(trunk, head, image_size)
        self.attn_pool = LatentPool(trunk.norm, trunk.attn_pool)
        self.mlp = nn.Sequential(trunk.attn_pool.norm, trunk.attn_pool.mlp)
        self.output_dim = trunk.embed_dim

    def _pool(self, z):
        """Return what the output is made of, and the tokens, as open_clip's `_pool` does."""
        o = self.attn_pool(z)[:, 0]
        return o + self.mlp(o), z


class LatentPool(nn.Module):
    """A LatentPool is an attention of learned queries to normalised tokens, in the form of open_clip's."""

    def __init__(self, norm, pool):
        super().__init__()
        self.ln_k = norm
        self.ln_q = nn.Identity()
        self.query = pool.latent[0]
        with torch.device("meta"):
            self.attn = nn.MultiheadAttention(pool.proj.in_features, pool.num_heads, batch_first=True)
        weight = torch.cat([pool.q.weight, pool.kv.weight])
        bias = torch.cat([pool.q.bias, pool.kv.bias])
        self.attn.in_proj_weight = nn.Parameter(weight, requires_grad=False)
        self.attn.in_proj_bias = nn.Parameter(bias, requires_grad=False)
        self.attn.out_proj = pool.proj

    def forward(self, z):
        x = self.ln_k(z)
        return self.attn(self.query.expand(len(x), -1, -1), x, x, need_weights=False)[0]


class TokenTower(Tower):
    """A TokenTower reads its output from the class token or an average of the patches, as MobileCLIP-B does.

    head: a linear layer, the projection; perhaps with a bias.
    """

    attn_pool = None

    def __init__(self, trunk, head, image_size):
        super().__init__(trunk, head, image_size)
        self.pool_type = "tok" if trunk.global_pool == "token" else "avg"
        self.final_ln_after_pool = isinstance(trunk.norm, nn.Identity)
        self.ln_post = trunk.fc_norm if self.final_ln_after_pool else trunk.norm

    def _pool(self, z):
        """Return the input of the projection, and the tokens, as open_clip's `_pool` does."""
        if not self.final_ln_after_pool:
            z = self.ln_post(z)
        first = int(hasattr(self, "class_embedding"))
        pooled = z[:, 0] if self.pool_type == "tok" else z[:, first:].mean(dim=1)
        return self.ln_post(pooled) if self.final_ln_after_pool else pooled, z
