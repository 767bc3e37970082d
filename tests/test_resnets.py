"""CLIP's ResNets: effects of the channels of the last map, in both precisions."""

import copy
import json

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import nn
from torch.testing import assert_close

from tests.conftest import TINY_RESNET
from tests.own_modules import share
from tests.test_families import difference
from tests.test_towers import shaken
from utils.contributions import Contributions
from utils.first_order import FirstOrder
from utils.indirect import Deletions, IndirectEffects
from utils.model.clip import load_clip
from utils.model.hooks import HookedViT
from utils.model.pooling import AttentionOfMap
from utils.prs import fold, second_order
from utils.runtime.errors import UserError
from utils.runtime.layers import parse_layers
from utils.segmentation import methods_of


def resnet(seed=0):
    """A small ResNet with a map of 3 x 3 places and 128 channels, every parameter and statistic random."""
    torch.manual_seed(seed)
    model = shaken(ModifiedResNet([1, 1, 1, 2], output_dim=24, heads=4, image_size=96, width=4), seed)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer += 0.2 * torch.randn_like(buffer)
        if name.endswith("running_var"):
            buffer *= 0.5 + torch.rand_like(buffer)
    return model


class Frozen:
    """One image's run through a ResNet in float64, with the probabilities of its pooling held fixed.

    map: [T, N]. rep: [D].
    """

    def __init__(self, model, image):
        self.pool, seen = model.attnpool, []
        handle = model.layer4.register_forward_hook(lambda _, given, out: seen.append(out[0]))
        self.rep = model(image[None])[0]
        handle.remove()
        self.map = seen[0].flatten(1).T
        self.N = self.map.shape[1]
        x = self.tokens(self.map) + self.pool.positional_embedding
        heads = (self.pool.num_heads, -1)
        q = self.pool.q_proj(x[0]).unflatten(-1, heads)  # [H, e]
        k = self.pool.k_proj(x).unflatten(-1, heads)
        scores = torch.stack([k[:, h] @ q[h] / q.shape[1] ** 0.5 for h in range(len(q))])
        self.A = torch.softmax(scores, dim=-1)  # [H, 1 + T]

    @staticmethod
    def tokens(x):
        return torch.cat([x.mean(dim=-2, keepdim=True), x], dim=-2)

    def read(self, x, part):
        """What the output makes of a part of the tokens, [..., 1 + T, N] -> [..., D]."""
        v = share(self.pool.v_proj, x, part).unflatten(-1, (self.pool.num_heads, -1))
        mixed = torch.stack([self.A[h] @ v[..., h, :] for h in range(len(self.A))], dim=-2)
        return 100 / self.rep.norm() * share(self.pool.c_proj, mixed.flatten(-2), part)

    def effects(self, p, count=1):
        """The effects of activations p [..., T, N] of `count` of the 2 N contributors."""
        return self.read(self.tokens(p), count / (2 * self.N))

    def of_positions(self):
        return self.read(self.pool.positional_embedding, 1 / 2)

    def alone(self, n):
        found = torch.zeros_like(self.map)
        found[:, n] = self.map[:, n]
        return found


@pytest.fixture(scope="module")
def tower():
    model = resnet()
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(3))
    exact = copy.deepcopy(model).double()
    return model, images, exact, [Frozen(exact, image) for image in images.double()]


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_effects_equal_those_of_the_modules_themselves(tower, precision):
    model, images, exact, runs = tower
    if precision == "float64":
        model, images = exact, images.double()
    tolerance = {"float32": 1e-5, "float64": 1e-11}[precision]
    vit = HookedViT(model)
    assert torch.equal(vit(images), model(images))
    assert (vit.L, vit.H, vit.N, vit.d, vit.D, vit.T, vit.grid, vit.K(0)) == (
        1,
        0,
        128,
        128,
        24,
        9,
        (3, 3),
        4,
    )
    representation, [phi] = second_order(vit, images, [fold(vit, 0)])
    for b, run in enumerate(runs):
        assert difference(representation[b], run.rep) < tolerance
        truth = torch.stack([run.effects(run.alone(n)) for n in range(run.N)])
        assert difference(phi.dense()[b], truth) < tolerance
        assert difference(phi.kappa[b], run.effects(torch.zeros_like(run.map))) < tolerance
        assert difference(phi.sum()[b], run.effects(run.map, run.N)) < tolerance
        assert difference(phi.sum()[b] + run.of_positions(), 100 * run.rep / run.rep.norm()) < tolerance


def test_a_channel_lost_is_its_effect_less_its_share_of_the_constant(tower):
    """The map without a channel, through the pool with the probabilities that it had."""
    _, images, exact, runs = tower
    vit = HookedViT(exact)
    _, [phi] = second_order(vit, images.double(), [fold(vit, 0)])
    for b, run in enumerate(runs):
        for n in (3, 77):
            tokens = [
                run.tokens(x) + run.pool.positional_embedding for x in (run.map, run.map - run.alone(n))
            ]
            lost = run.read(tokens[0], 1) - run.read(tokens[1], 1)
            assert difference(phi.dense()[b, n] - phi.kappa[b], lost) < 1e-11


@pytest.mark.parametrize("what", ["the mean token", "b_V", "b_O", "the positions"])
def test_no_factor_can_be_left_out(tower, what, monkeypatch):
    _, images, exact, runs = tower
    truth, kappa = runs[0].effects(runs[0].alone(3)), runs[0].effects(torch.zeros_like(runs[0].map))
    other = HookedViT(copy.deepcopy(exact))
    pool = other.visual.attn_pool
    if what == "the mean token":
        name = "blocks.1.attn.row"
        module, compute = other._activations[name]
        x = HookedViT(exact).visual.attn_pool
        less = lambda norm, z, out: compute(norm, z, out) - _mean_share(x, out)  # noqa: E731
        monkeypatch.setitem(other._activations, name, (module, less))
    elif what == "b_V":
        pool.attn.in_proj_bias.data[2 * 128 :] = 0
    elif what == "b_O":
        pool.attn.out_proj.bias.data[:] = 0
    else:
        pool.pool.positional_embedding.data[:] = 0
    folded = fold(other, 0)
    vit = other if what in ("the mean token", "the positions") else HookedViT(exact)
    _, [phi] = second_order(vit, images.double(), [folded])
    assert max(difference(phi.dense()[0, 3], truth), difference(phi.kappa[0], kappa)) > 1e-3


def _mean_share(pool, x):
    """What the row gives the places for the mean token."""
    from utils.model.attention import class_attention

    return class_attention(pool.attn, pool.tokens(x))[:, :, :1] / x.shape[1]


def test_changes_of_the_running_model_are_true(tower):
    """Deletions, indirect effects, `edit`, and the pool alone."""
    _, images, model, runs = tower
    vit, images = HookedViT(model), images.double()
    with vit.record("*.resid.pre", "blocks.0.mlp.post") as cache:
        representation = vit(images)
    p = cache["blocks.0.mlp.post"]
    assert all(difference(p[b], run.map) < 1e-12 for b, run in enumerate(runs))
    assert difference(vit.after(0, cache["blocks.1.resid.pre"]), representation) < 1e-12
    mean, changed = p.mean(dim=0), []
    for image, n in zip(images, (3, 77), strict=True):

        def change(z, n=n):
            z = z.clone()
            z[..., n] = mean[:, n].view(z.shape[-3:-1]) if z.ndim == 4 else mean[:, n]
            return z

        handle = model.layer4.register_forward_hook(
            lambda _, given, out, change=change: change(out.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        )
        changed.append(model(image[None])[0])
        handle.remove()
        with vit.edit({"blocks.0.mlp.post": change}):
            assert difference(vit(image[None])[0], changed[-1]) < 1e-12
    before, after = (nn.functional.normalize(rep, dim=1) for rep in (representation, torch.stack(changed)))
    found = Deletions(vit, 0, mean)(images, torch.tensor([0, 1]), torch.tensor([3, 77]), 1.0)
    assert difference(found, before - after) < 1e-10
    indirect = IndirectEffects(vit, 0, mean, [3, 77])
    with vit.record(*indirect.activations) as cache:
        vit(images)
    effects = indirect(cache, representation, 1.0)
    for b in range(2):
        assert difference(effects[b, b], (representation[b] - changed[b]) / representation[b].norm()) < 1e-10


def test_contributions_are_derivatives_and_second_order_effects(tower):
    _, images, model, runs = tower
    vit, images = HookedViT(model), images.double()
    generator = torch.Generator().manual_seed(2)
    mean, v = torch.rand(9, 128, generator=generator).double(), torch.randn(24, generator=generator).double()
    finder = Contributions(vit, {0: mean}, v)
    decision = finder(images)
    along, found = finder.second_order(decision), finder.contributions(decision)
    for b, run in enumerate(runs):
        for n in (3, 77):
            away = run.alone(n)
            away[:, n] -= mean[:, n]
            truth = run.effects(away) - run.effects(torch.zeros_like(away))
            assert abs(float(along[b, 0, n] - truth @ v)) < 1e-10 * float(along.abs().max())
            heads = finder.of_heads(decision, 0, n)[1][b]
            assert abs(float(heads.sum() - truth @ v)) < 1e-10 * float(along.abs().max())
            moved = torch.stack([run.map - step * away for step in (1e-4, -1e-4)])
            scores = finder.score(vit.after(0, moved))
            assert abs(float(found[b, 0, n] - (scores[1] - scores[0]) / 2e-4)) < 1e-5 * float(
                found.abs().max()
            )


def test_what_a_resnet_has_no_part_in_is_refused_by_name(tower):
    vit = HookedViT(tower[0])
    with pytest.raises(UserError, match="--mlp_layer 9.*a ResNet counts as one layer: --mlp_layer 0"):
        parse_layers([9], vit)
    assert parse_layers(["all"], vit) == [0] == parse_layers([0], vit)
    assert methods_of(vit) == ("second_order", "random", "attention")
    with pytest.raises(UserError, match="no first order"):
        FirstOrder(vit)
    assert vit.left_out(tower[1]) is None and isinstance(vit.pooling, AttentionOfMap) and not vit.gated
    with pytest.raises(KeyError):
        vit.record("blocks.0.attn.out").__enter__()


def test_no_hook_stays(tower):
    vit = HookedViT(tower[0])
    before = vit(tower[1])
    with vit.record("*") as cache:
        assert_close(vit(tower[1]), before, rtol=0, atol=0)
    assert set(cache) == set(vit.names)
    assert sum(len(module._forward_hooks) for module in vit.visual.modules()) == 0


def test_quickgelu_of_a_resnet_is_looked_for_in_its_text_tower(tmp_path):
    """The image tower has none."""
    for name, quick in (("quick", True), ("plain", False)):
        (tmp_path / f"{name}.json").write_text(json.dumps(TINY_RESNET | {"quick_gelu": quick}))
    model = load_clip(str(tmp_path / "quick.json"), "random", "cpu")
    (tmp_path / "trained").mkdir()
    config = {"model_cfg": TINY_RESNET | {"quick_gelu": True}}
    (tmp_path / "trained" / "open_clip_config.json").write_text(json.dumps(config))
    weights = str(tmp_path / "trained" / "weights.pt")
    torch.save(model.text.state_dict(), weights)
    again = load_clip(str(tmp_path / "quick.json"), weights, "cpu")
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(again.vit(pixels), model.vit(pixels))
    with pytest.raises(UserError, match="was trained with QuickGELU"):
        load_clip(str(tmp_path / "plain.json"), weights, "cpu")
