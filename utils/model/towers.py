"""Bring image towers into one form: open_clip's ViT, and timm's own parameters under open_clip's names."""

import timm.models.vision_transformer as timm_vit
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.layers import AttentionPoolLatent, Mlp
from torch import nn

from utils.runtime.errors import UserError

PLAIN = "choose a plain ViT such as --model ViT-B-32"


def in_open_clips_form(visual):
    """Return an image tower under open_clip's names: timm's as a `Tower`, others unchanged.

    Raises UserError, with the reason, unless the second-order effects of the tower are defined exactly.
    """
    if isinstance(visual, Tower):
        return visual
    if not isinstance(visual, TimmModel):
        check_supported(visual)
        return visual
    trunk = visual.trunk
    for reason, holds in reasons(visual, trunk):
        if holds:
            tower = f"this model's image tower is timm's {type(trunk).__name__}"
            raise UserError(f"{tower}{reason}; choose a plain ViT or SigLIP")
    if trunk.attn_pool is not None:
        return PooledTower(trunk, visual.image_size)
    return TokenTower(trunk, head_of(visual), visual.image_size)


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
    yield ", not a ViT", type(trunk) is not timm_vit.VisionTransformer
    yield " with blocks that are not plain pre-norm", not is_plain(trunk.blocks[0])
    yield " with register tokens", trunk.reg_token is not None
    if trunk.attn_pool is None:
        yield from reasons_of_tokens(visual, trunk)
    else:
        yield from reasons_of_pool(visual, trunk, trunk.attn_pool)


def reasons_of_tokens(visual, trunk):
    """Yield `reasons` of a timm tower whose output is read from a token or an average."""
    average = trunk.global_pool == "avg"
    kinds = average or trunk.global_pool == "token"
    yield " with more layers around its blocks", head_of(visual) is None or not kinds
    norms = [isinstance(norm, nn.LayerNorm) for norm in (trunk.norm, trunk.fc_norm)]
    yield " without one last LayerNorm", sum(norms) != 1 or (norms[1] and not average)
    yield " that averages the class token with its patches", trunk.pool_include_prefix and average


def reasons_of_pool(visual, trunk, pool):
    """Yield `reasons` of a timm tower whose tokens are pooled by attention."""
    yield " with another kind of pooling", type(pool) is not AttentionPoolLatent
    several = pool.latent_len != 1 or pool.pool != "token" or pool.mlp is None
    yield " with several queries in its pooling", several
    yield " with a class token besides its pooling", trunk.cls_token is not None or pool.pos_embed is not None
    rest = (trunk.norm_pre, trunk.fc_norm, trunk.head, pool.q_norm, pool.k_norm)
    alone = all(isinstance(part, nn.Identity) for part in rest) and len(visual.head) == 0
    yield " with more layers around its blocks", not alone
    yield " with images of any size", trunk.dynamic_img_size


def is_plain(block):
    """Return whether a timm block is plain pre-norm."""
    if type(block) is not timm_vit.Block or type(block.mlp) is not Mlp:
        return False
    inner = (block.attn.q_norm, block.attn.norm, block.mlp.norm)
    return all(isinstance(norm, nn.Identity) for norm in inner)


def head_of(visual):
    """Return the linear layer after a timm tower's pooling, timm's or open_clip's; None unless it is one."""
    parts = (visual.trunk.head, *visual.head)
    layers = [part for part in parts if not isinstance(part, nn.Identity | nn.Dropout)]
    return layers[0] if len(layers) == 1 and isinstance(layers[0], nn.Linear) else None


def as_block(block):
    """Return a timm block as an open_clip block with its parameters."""
    width = block.norm1.normalized_shape[0]
    attn = block.attn
    with torch.device("meta"):
        found = ResidualAttentionBlock(width, attn.num_heads, block.mlp.fc1.out_features / width)
    found.ln_1 = block.norm1
    found.ln_2 = block.norm2
    found.ls_1 = block.ls1
    found.ls_2 = block.ls2
    bias = attn.qkv.bias
    if bias is None:
        bias = nn.Parameter(torch.zeros_like(attn.qkv.weight[:, 0]), requires_grad=False)
    found.attn.in_proj_weight = attn.qkv.weight
    found.attn.in_proj_bias = bias
    found.attn.out_proj = attn.proj
    found.mlp.c_fc = block.mlp.fc1
    found.mlp.gelu = block.mlp.act
    found.mlp.c_proj = block.mlp.fc2
    return found.eval()


class Tower(nn.Module):
    """A Tower is a timm ViT under the names of open_clip's VisionTransformer."""

    proj = None
    bias = None

    def __init__(self, trunk, image_size):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(map(as_block, trunk.blocks))
        self.grid_size = trunk.patch_embed.grid_size
        self.image_size = image_size

    def forward(self, images):
        z = self._embeds(images)
        for block in self.transformer.resblocks:
            z = block(z)
        return output_of(self, z)


def output_of(visual, z):
    """Return the output [B, D] of an image tower from its last residual stream z [B, T, d]."""
    output, _ = visual._pool(z)
    if visual.proj is not None:
        output = output @ visual.proj
    bias = getattr(visual, "bias", None)
    return output if bias is None else output + bias


class PooledTower(Tower):
    """A PooledTower pools its tokens by attention with one learned query, as SigLIP's does.

    The output is o + MLP(LN(o)), with o the output of the attention. There is no class token, last LayerNorm
    or projection.
    """

    pool_type = "attention"
    final_ln_after_pool = False
    ln_post = None

    def __init__(self, trunk, image_size):
        super().__init__(trunk, image_size)
        self.patch_embed = trunk.patch_embed
        self.pos_embed = trunk.pos_embed
        self.attn_pool = LatentPool(trunk.norm, trunk.attn_pool)
        self.mlp = nn.Sequential(trunk.attn_pool.norm, trunk.attn_pool.mlp)
        self.output_dim = trunk.embed_dim

    def _embeds(self, images):
        return self.patch_embed(images) + self.pos_embed

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
        super().__init__(trunk, image_size)
        self.trunk = trunk
        self.head = head
        self.pool_type = "tok" if trunk.global_pool == "token" else "avg"
        self.final_ln_after_pool = isinstance(trunk.norm, nn.Identity)
        self.ln_post = trunk.fc_norm if self.final_ln_after_pool else trunk.norm
        if trunk.cls_token is not None:
            self.class_embedding = trunk.cls_token

    @property
    def proj(self):
        """The projection is the head's weight, [d, D]."""
        return self.head.weight.T

    @property
    def bias(self):
        """The bias is the head's, [D] or None."""
        return self.head.bias

    def _embeds(self, images):
        return self.trunk.norm_pre(self.trunk._pos_embed(self.trunk.patch_embed(images)))

    def _pool(self, z):
        """Return the input of the projection, and the tokens, as open_clip's `_pool` does."""
        if not self.final_ln_after_pool:
            z = self.ln_post(z)
        first = int(hasattr(self, "class_embedding"))
        pooled = z[:, 0] if self.pool_type == "tok" else z[:, first:].mean(dim=1)
        return self.ln_post(pooled) if self.final_ln_after_pool else pooled, z
