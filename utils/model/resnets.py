"""Bring CLIP's ResNets into the form of a pooled tower of one block. Letters as in `utils.prs`.

Their neurons are the channels of the last map, after its ReLU. No LayerNorm and no MLP follows: a pooling
attention reads the map's places x_i, their mean x_0, and positions. It is read at token 0,

    rep = sum_h sum_i a_h[i] ((x_i + pos_i) W_V + b_V) W_O + b_O

A neuron writes itself: w_n is the n-th unit vector. What it adds to x_0 comes from all places alike, so the
row of the places is a_h[i] + a_h[0] / T. The sum that is read has 2 N contributors, N channels of the map and
as many for the positions.
"""

from collections import OrderedDict

import torch
from torch import nn

from utils.model.attention import Attention


class Channels(nn.Identity):
    """Channels is the last layer of an MLP whose neurons are the stream itself: w_n are unit vectors."""

    def __init__(self, width):
        super().__init__()
        self.in_features = width
        self.out_features = width


class MapBlock(nn.Module):
    """A MapBlock is a block without an attention, whose MLP is the map."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(OrderedDict(gelu=nn.Identity(), c_proj=Channels(width)))
        self.ls_2 = nn.Identity()

    def forward(self, z):
        return self.ls_2(self.mlp(z))


class MapPool(nn.Module):
    """A MapPool is the pooling attention of a ResNet, in the form of a pooled tower's.

    pool: of open_clip. grid: rows and columns of the map.
    """

    def __init__(self, pool, grid):
        super().__init__()
        self.grid = grid
        self.pool = pool
        self.ln_k = nn.Identity()
        self.attn = Attention(pool.q_proj.in_features, pool.num_heads)
        for name in ("q", "k", "v"):
            setattr(self.attn, f"{name}_proj_weight", getattr(pool, f"{name}_proj").weight)
        biases = torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias])
        self.attn.in_proj_bias = nn.Parameter(biases, requires_grad=False)
        self.attn.out_proj = pool.c_proj

    def tokens(self, x):
        """Return the tokens that the attention reads [B, 1 + T, d] of a map [B, T, d]."""
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        return x + self.pool.positional_embedding.to(x.dtype)

    def forward(self, z):
        x = self.ln_k(z)
        return self.pool(x.mT.unflatten(2, self.grid))[:, None]


class ResNetTower(nn.Module):
    """A ResNetTower is a ResNet of open_clip as a pooled tower of one block."""

    pool_type = "attention"
    final_ln_after_pool = False
    ln_post = None
    proj = None

    def __init__(self, visual):
        super().__init__()
        side = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
        self.visual = visual
        self.image_size = (side, side)
        self.grid_size = (side // 32, side // 32)
        self.output_dim = visual.attnpool.c_proj.out_features
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([MapBlock(visual.attnpool.q_proj.in_features)])
        self.attn_pool = MapPool(visual.attnpool, self.grid_size)
        self.eval()

    def forward(self, images):
        [block] = self.transformer.resblocks
        return self._pool(block(self._embeds(images)))[0]

    def _embeds(self, images):
        visual = self.visual
        x = visual.stem(images)
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = layer(x)
        return x.flatten(2).mT

    def _pool(self, z):
        """Return the output, and the places, as open_clip's `_pool` does."""
        return self.attn_pool(z)[:, 0], z
