"""Image towers of timm in open_clip's form, with their own parameters, so that the same hooks and weights
serve both.
"""

import timm.models.vision_transformer as timm_vit
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock
from timm.layers import AttentionPoolLatent, Mlp
from torch import nn

from utils.runtime.errors import UserError


class PooledTower(nn.Module):
    """A ViT whose tokens are pooled by attention with one learned query, as SigLIP's: rep = o + MLP(LN(o)),
    with o the output of the attention. The names are those of open_clip's VisionTransformer. It has no class
    token, last LayerNorm or projection."""

    pool_type, final_ln_after_pool, proj, ln_post = "attention", False, None, None

    def __init__(self, trunk, image_size):
        super().__init__()
        self.patch_embed, self.pos_embed = trunk.patch_embed, trunk.pos_embed
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(map(as_block, trunk.blocks))
        self.attn_pool, self.mlp = (
            LatentPool(trunk.norm, trunk.attn_pool),
            nn.Sequential(trunk.attn_pool.norm, trunk.attn_pool.mlp),
        )
        self.grid_size, self.image_size, self.output_dim = (
            trunk.patch_embed.grid_size,
            image_size,
            trunk.embed_dim,
        )

    def forward(self, images):
        z = self.patch_embed(images) + self.pos_embed
        for block in self.transformer.resblocks:
            z = block(z)
        return self._pool(z)[0]

    def _pool(self, z):
        """As open_clip's: what the output is made of, and the tokens."""
        o = self.attn_pool(z)[:, 0]
        return o + self.mlp(o), z


class LatentPool(nn.Module):
    """Attention of learned queries to normalised tokens, in the form of open_clip's AttentionalPooler."""

    def __init__(self, norm, pool):
        super().__init__()
        self.ln_k, self.ln_q, self.query = norm, nn.Identity(), pool.latent[0]
        width = pool.proj.in_features
        with torch.device("meta"):
            self.attn = nn.MultiheadAttention(width, pool.num_heads, batch_first=True)
        self.attn.in_proj_weight = nn.Parameter(
            torch.cat([pool.q.weight, pool.kv.weight]), requires_grad=False
        )
        self.attn.in_proj_bias = nn.Parameter(torch.cat([pool.q.bias, pool.kv.bias]), requires_grad=False)
        self.attn.out_proj = pool.proj

    def forward(self, z):
        x = self.ln_k(z)
        return self.attn(self.query.expand(len(x), -1, -1), x, x, need_weights=False)[0]


class TokenTower(nn.Module):
    """A timm ViT whose output is read from the class token or from an average of the patches by a linear head
    (`proj`, perhaps `bias`), as MobileCLIP-B's. The names are those of open_clip's VisionTransformer."""

    attn_pool = None

    def __init__(self, trunk, head, image_size):
        super().__init__()
        self.trunk, self.transformer, self.ln_post = trunk, nn.Module(), trunk.norm
        self.transformer.resblocks = nn.ModuleList(map(as_block, trunk.blocks))
        self.pool_type, self.final_ln_after_pool = "tok" if trunk.global_pool == "token" else "avg", False
        if isinstance(trunk.norm, nn.Identity):
            self.ln_post, self.final_ln_after_pool = trunk.fc_norm, True
        self.head = head
        if trunk.cls_token is not None:
            self.class_embedding = trunk.cls_token
        self.grid_size, self.image_size = trunk.patch_embed.grid_size, image_size

    @property
    def proj(self):
        return self.head.weight.T

    @property
    def bias(self):
        return self.head.bias

    def _embeds(self, images):
        return self.trunk.norm_pre(self.trunk._pos_embed(self.trunk.patch_embed(images)))

    def forward(self, images):
        z = self._embeds(images)
        for block in self.transformer.resblocks:
            z = block(z)
        pooled = self._pool(z)[0] @ self.proj
        return pooled if self.bias is None else pooled + self.bias

    def _pool(self, z):
        """As open_clip's: what the projection is given, and the tokens."""
        z = z if self.final_ln_after_pool else self.ln_post(z)
        pooled = (
            z[:, 0] if self.pool_type == "tok" else z[:, int(hasattr(self, "class_embedding")) :].mean(dim=1)
        )
        return self.ln_post(pooled) if self.final_ln_after_pool else pooled, z


def as_block(block):
    """A timm block as an open_clip block."""
    width, attn = block.norm1.normalized_shape[0], block.attn
    with torch.device("meta"):
        found = ResidualAttentionBlock(width, attn.num_heads, block.mlp.fc1.out_features / width)
    found.ln_1, found.ln_2, found.ls_1, found.ls_2 = block.norm1, block.norm2, block.ls1, block.ls2
    found.attn.in_proj_weight, found.attn.out_proj = attn.qkv.weight, attn.proj
    zeros = nn.Parameter(torch.zeros_like(attn.qkv.weight[:, 0]), requires_grad=False)
    found.attn.in_proj_bias = zeros if attn.qkv.bias is None else attn.qkv.bias
    found.mlp.c_fc, found.mlp.gelu, found.mlp.c_proj = block.mlp.fc1, block.mlp.act, block.mlp.fc2
    return found.eval()


def in_open_clips_form(visual):
    """An image tower as `HookedViT` reads it: a plain timm ViT becomes a `PooledTower` or `TokenTower`,
    others stay as they are.

    Raises UserError, with the reason, for a timm tower that cannot.
    """
    if not isinstance(visual, TimmModel):
        return visual
    trunk = visual.trunk
    if reason := next((reason for reason, holds in reasons(visual, trunk) if holds), None):
        raise UserError(
            f"this model's image tower is timm's {type(trunk).__name__}{reason}; choose a plain ViT or SigLIP"
        )
    if trunk.attn_pool is not None:
        return PooledTower(trunk, visual.image_size)
    return TokenTower(trunk, head_of(visual), visual.image_size)


def head_of(visual):
    """The linear layer after a timm tower's pooling: timm's own, or open_clip's; None where there is another
    number of them.
    """
    layers = [
        part for part in (visual.trunk.head, *visual.head) if not isinstance(part, nn.Identity | nn.Dropout)
    ]
    return layers[0] if len(layers) == 1 and isinstance(layers[0], nn.Linear) else None


def reasons(visual, trunk):
    """(reason, whether it holds) why a timm tower is not covered; a later one is looked at only if no earlier
    one holds.
    """
    yield ", not a ViT", type(trunk) is not timm_vit.VisionTransformer
    pool, block = trunk.attn_pool, trunk.blocks[0]
    parts = (
        (block.attn.q_norm, block.attn.norm, block.mlp.norm)
        if type(block) is timm_vit.Block and type(block.mlp) is Mlp
        else ()
    )
    yield (
        " with blocks that are not plain pre-norm",
        not parts or not all(isinstance(part, nn.Identity) for part in parts),
    )
    yield " with register tokens", trunk.reg_token is not None
    if pool is None:
        yield (
            " with more layers around its blocks",
            head_of(visual) is None or trunk.global_pool not in ("token", "avg"),
        )
        norms = [isinstance(norm, nn.LayerNorm) for norm in (trunk.norm, trunk.fc_norm)]
        yield " without one last LayerNorm", sum(norms) != 1 or (trunk.global_pool == "token" and norms[1])
        yield (
            " that averages the class token with its patches",
            trunk.pool_include_prefix and trunk.global_pool == "avg",
        )
        return
    yield " with another kind of pooling", type(pool) is not AttentionPoolLatent
    yield (
        " with several queries in its pooling",
        pool.latent_len != 1 or pool.pool != "token" or pool.mlp is None,
    )
    yield " with a class token besides its pooling", trunk.cls_token is not None or pool.pos_embed is not None
    rest = (trunk.norm_pre, trunk.fc_norm, trunk.head, pool.q_norm, pool.k_norm)
    yield (
        " with more layers around its blocks",
        not all(isinstance(x, nn.Identity) for x in rest) or len(visual.head) > 0,
    )
    yield " with images of any size", trunk.dynamic_img_size
