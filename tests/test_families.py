"""EVA, PE-Core, ViTamin and relative positions: the effects are those of `own_modules`, in both precisions,
and none of their factors can be left out.
"""

import copy
import fnmatch

import pytest
import torch
from open_clip.timm_model import TimmModel
from torch import nn
from torch.testing import assert_close

from tests.own_modules import Frozen, last_layer
from tests.test_towers import shaken
from tests.tiny_timm import FAMILIES, trunk_of
from utils.contributions import Contributions
from utils.first_order import FirstOrder, direct_effects, fold_direct
from utils.indirect import Deletions, IndirectEffects
from utils.model.attention import attention_pattern
from utils.model.hooks import HookedViT
from utils.prs import fold, second_order
from utils.runtime.errors import UserError
from utils.segmentation import NeuronMaps

NEURONS = [0, 7, 41, 95]


def tower_of(trunk, seed=0):
    """A trunk as open_clip wraps it, with every parameter random."""
    model = TimmModel.__new__(TimmModel)
    nn.Module.__init__(model)
    model.trunk = trunk
    model.head = nn.Sequential()
    model.image_size = (64, 64) if hasattr(trunk.patch_embed, "backbone") else (32, 32)
    return shaken(model, seed)


def images_of(model, count=2):
    return torch.randn(count, 3, *model.image_size, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A tower and images; both in float64, and each image's run."""
    model = tower_of(trunk_of(request.param))
    model.name = request.param
    images = images_of(model)
    exact = copy.deepcopy(model).double()
    return model, images, exact, [Frozen(exact, image) for image in images.double()]


def difference(found, truth):
    """The largest difference, over the largest value."""
    return float((found.double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_effects_equal_those_of_the_modules_themselves(family, precision):
    model, images, exact, runs = family
    # no configuration has all norms; attention rows of this tower are 2e-5 off in float32
    tolerance = 1e-4 if model.name == "all norms" else 1e-5
    if precision == "float64":
        model, images, tolerance = exact, images.double(), 1e-11
    vit = HookedViT(model)
    assert difference(vit(images), model(images).double()) < tolerance
    for layer in (0, vit.last):
        representation, [phi] = second_order(vit, images, [fold(vit, layer)])
        assert phi.C.dtype == images.dtype
        for b, run in enumerate(runs):
            assert difference(representation[b], run.rep) < tolerance
            truth, kappa = run.of_neurons(layer, NEURONS)
            assert difference(phi.dense()[b, NEURONS], truth) < tolerance
            assert difference(phi.kappa[b], kappa) < tolerance
            total = run.effects(layer, run.p[layer], run.N)
            assert difference(phi.sum()[b], total) < tolerance


def test_all_contributors_of_all_attentions_and_what_is_left_are_the_representation(family):
    """Effects of all MLPs, the embedding and attentions through each attention, and what goes to the output
    without an attention.
    """
    _, images, exact, runs = family
    vit = HookedViT(exact)
    layers = range(vit.last + 1)
    _, effects = second_order(vit, images.double(), [fold(vit, layer) for layer in layers])
    of_mlps = sum(phi.sum() for phi in effects)
    for b, run in enumerate(runs):
        scale = 100 / run.rep.norm()
        parts = run.summands()
        others = [parts[0], *parts[1::2]]  # the embedding, and each attention
        found = of_mlps[b]
        if run.trunk.global_pool == "map":
            found = found + scale * sum(run.through_pool(x, run.N) for x in others)
            found = found + scale * run.left_out()
        else:
            for l in range(run.L):
                for x in others[: l + 1]:
                    total = 1 / ((1 + 2 * l) * (1 + 2 * run.L))
                    found = found + scale * run.to_output(run.through(l, x, run.N), total)
            for x in (parts[0], *parts[2::2]):
                found = found + scale * run.to_output(x, 1 / (1 + 2 * run.L))
        assert difference(found, scale * run.rep) < 1e-12


# No factor can be left out


def neutral(module, name):
    """Give a parameter of a module the value that leaves it out."""
    parameter = getattr(module, name)
    parameter.data = torch.ones_like(parameter) if name == "weight" else torch.zeros_like(parameter)


def no_rotation(vit, cache):
    for l, block in enumerate(vit.blocks):
        block.attn.rope = None
        pattern = attention_pattern(block.attn, cache[f"blocks.{l}.ln1.out"])
        cache[f"blocks.{l}.attn.row"] = pattern[:, :, 0]


def no_bias(vit, cache):
    for l, block in enumerate(vit.blocks):
        block.attn.bias = None
        pattern = attention_pattern(block.attn, cache[f"blocks.{l}.ln1.out"])
        cache[f"blocks.{l}.attn.row"] = pattern.mean(dim=2)


def of(statistic, value):
    """Leave a statistic of every block out."""

    def change(vit, cache):
        for name in [name for name in cache if name.endswith(statistic)]:
            cache[name] = torch.full_like(cache[name], value)

    return change


INNER = "attn.inner"
NUMBERS = {  # (family, what is left out): change of what is recorded
    ("EVA02", "sigma of Inner"): of("inner.std", 1.0),
    ("EVA02", "mu of Inner"): of("inner.mean", 0.0),
    ("EVA02", "the rotation"): no_rotation,
    ("EVA02-E", "sigma of Post2"): of("post2.std", 1.0),
    ("EVA02-E", "mu of Post2"): of("post2.mean", 0.0),
    ("EVA02-E", "sigma of Post1"): of("post1.std", 1.0),
    ("EVA02-E", "mu of Post1"): of("post1.mean", 0.0),
    ("all norms", "sigma of Inner"): of("inner.std", 1.0),
    ("all norms", "mu of Inner"): of("inner.mean", 0.0),
    ("all norms", "mu of Post1"): of("post1.mean", 0.0),
    ("relpos, average", "the bias"): no_bias,
    ("EVA01", "sigma of LN1"): of("ln1.std", 1.0),
    ("EVA01", "mu of LN1"): of("ln1.mean", 0.0),
}
BLOCK = "transformer.resblocks.*"
WEIGHTS = {  # (family, what is left out): (modules, their parameter)
    ("EVA02", "gamma of Inner"): (f"{BLOCK}.attn.inner", "weight"),
    ("EVA02", "beta of Inner"): (f"{BLOCK}.attn.inner", "bias"),
    ("EVA02", "b_O"): (f"{BLOCK}.attn.out_proj", "bias"),
    ("EVA02", "b_V"): (f"{BLOCK}.attn", "in_proj_bias"),
    ("EVA02-E", "gamma of Post1"): (f"{BLOCK}.ls_1", "weight"),
    ("EVA02-E", "beta of Post1"): (f"{BLOCK}.ls_1", "bias"),
    ("EVA02-E", "gamma of Post2"): (f"{BLOCK}.ls_2", "weight"),
    ("EVA02-E", "beta of Post2"): (f"{BLOCK}.ls_2", "bias"),
    ("EVA02-E", "b_O"): (f"{BLOCK}.attn.out_proj", "bias"),
    ("EVA02-E", "b_V"): (f"{BLOCK}.attn", "in_proj_bias"),
    ("EVA02-E", "b_out"): (f"{BLOCK}.mlp.c_proj", "bias"),
    ("all norms", "beta of Inner"): (f"{BLOCK}.attn.inner", "bias"),
    ("EVA01", "b_V"): (f"{BLOCK}.attn", "in_proj_bias"),
    ("EVA01", "gamma of the layer scale"): (f"{BLOCK}.ls_1", "gamma"),
    ("EVA01", "beta of the last LayerNorm"): ("ln_post", "bias"),
    ("EVA01", "the bias of the head"): ("head", "bias"),
    ("PE-Core", "the bias of the head"): ("head", "bias"),
    ("PE-Core", "b_V"): ("attn_pool.attn", "in_proj_bias"),
    ("PE-Core", "gamma of the pool's LayerNorm"): ("attn_pool.ln_k", "weight"),
    ("PE-Core", "beta of the pool's LayerNorm"): ("attn_pool.ln_k", "bias"),
    ("ViTamin", "b_out"): (f"{BLOCK}.mlp.c_proj", "bias"),
}


@pytest.mark.parametrize("name, what", [*NUMBERS, *WEIGHTS])
def test_no_factor_can_be_left_out(name, what, monkeypatch):
    """What the other tests hold to 1e-11 is then 1e-4 of the effects or 1e-3 of their constant away."""
    model = tower_of(trunk_of(name)).double()
    images = images_of(model, 1).double()
    run, vit, other = Frozen(model, images[0]), HookedViT(model), HookedViT(copy.deepcopy(model))
    truth, kappa = run.of_neurons(0, NEURONS)

    def differences(folded, change):
        def changed(cache):
            before(cache)
            change(other, cache)

        before = vit.pooling.read_rows
        with monkeypatch.context() as patch:
            patch.setattr(vit.pooling, "read_rows", changed)
            patch.setattr(vit, "names_from", lambda layer: [*HookedViT.names_from(vit, layer), "*.ln1.out"])
            _, [phi] = second_order(vit, images, [folded])
        return difference(phi.dense()[0, NEURONS], truth), difference(phi.kappa[0], kappa)

    assert max(differences(fold(vit, 0), lambda other, cache: None)) < 1e-11
    if (name, what) in NUMBERS:
        found = differences(fold(vit, 0), NUMBERS[name, what])
    else:
        pattern, parameter = WEIGHTS[name, what]
        modules = dict(other.visual.named_modules(remove_duplicate=False))
        paths = fnmatch.filter(modules, pattern)
        assert paths
        for path in paths:
            neutral(modules[path], parameter)
        found = differences(fold(other, 0), lambda other, cache: None)
    assert found[0] > 1e-4 or found[1] > 1e-3, found


# Everything else that reads a tower


def centred(x):
    """A part of the last stream: first order takes its own mean off, and not a share of the stream's."""
    return x - x.mean(dim=-1, keepdim=True)


def test_first_order_parts_sum_to_the_representation(family):
    _, images, exact, runs = family
    vit, images = HookedViT(exact), images.double()
    if not vit.pooling.has_first_order:
        with pytest.raises(UserError, match="no first order"):
            FirstOrder(vit)
        return
    order = FirstOrder(vit)
    with vit.record(*order.activations) as cache:
        representation = vit(images)
    parts = order.parts(cache, representation)
    unit = 100 * nn.functional.normalize(representation, dim=1)
    assert difference(parts.sum(), unit) < 1e-11
    direction = torch.randn(vit.D, generator=torch.Generator().manual_seed(1)).double()
    tokens = order.tokens(cache, representation, direction.expand(len(images), -1))
    assert difference(tokens.sum(dim=-1), parts.heads @ direction) < 1e-11
    for b, run in enumerate(runs):
        truth = [100 / run.rep.norm() * run.to_output(centred(x), 0) for x in run.summands()]
        found = torch.stack([parts.heads[b].sum(dim=1), parts.mlps[b]], dim=1).flatten(0, 1)
        assert difference(parts.embedding[b], truth[0]) < 1e-11
        assert difference(found, torch.stack(truth[1:])) < 1e-11


@pytest.mark.parametrize("name", ["EVA02", "EVA02-E", "ViTamin"])
def test_direct_effects_are_what_a_neuron_writes_straight_to_the_output(name):
    model = tower_of(trunk_of(name)).double()
    images, layer = images_of(model).double(), 1
    vit = HookedViT(model)
    with vit.record(f"blocks.{layer}.mlp.post", *vit.names_from(vit.L)) as cache:
        representation = vit(images)
    scale = 100 / representation.norm(dim=1)
    phi = direct_effects(vit, cache, fold_direct(vit, layer), scale).dense()
    for b, image in enumerate(images):
        run = Frozen(model, image)
        for n in NEURONS:
            alone = torch.zeros_like(run.p[layer])
            alone[:, n] = run.p[layer][:, n]
            truth = scale[b] * run.to_output(centred(run.written(layer, alone, 1)), 0)
            assert difference(phi[b, n], truth) < 1e-11


def changed_run(model, image, layer, change):
    """The representation that the tower itself gives if an MLP's activations [1, T, N] are changed."""
    last = last_layer(model.trunk.blocks[layer].mlp)
    handle = last.register_forward_pre_hook(lambda _, given: (change(given[0]),))
    try:
        return model(image[None])[0]
    finally:
        handle.remove()


def test_changes_of_the_running_model_are_true(family):
    """Deletions, indirect effects, `edit`, and the model from a block on."""
    _, images, model, runs = family
    vit, images, layer = HookedViT(model), images.double(), 1
    with vit.record("*.resid.pre", "*.mlp.post") as cache:
        representation = vit(images)
    for b, run in enumerate(runs):
        assert difference(cache[f"blocks.{layer}.mlp.post"][b], run.p[layer]) < 1e-12
    assert difference(vit.after(layer, cache[f"blocks.{layer + 1}.resid.pre"]), representation) < 1e-12
    mean = cache[f"blocks.{layer}.mlp.post"].mean(dim=0)
    changed = []
    for image, n in zip(images, (3, 50), strict=True):

        def change(p, n=n):
            p = p.clone()
            p[..., n] = mean[:, n]
            return p

        changed.append(changed_run(model, image, layer, change))
        with vit.edit({f"blocks.{layer}.mlp.post": change}):
            assert difference(vit(image[None])[0], changed[-1]) < 1e-12
    before, after = (nn.functional.normalize(rep, dim=1) for rep in (representation, torch.stack(changed)))
    found = Deletions(vit, layer, mean)(images, torch.tensor([0, 1]), torch.tensor([3, 50]), 1.0)
    assert difference(found, before - after) < 1e-10
    indirect = IndirectEffects(vit, layer, mean, [3, 50])
    with vit.record(*indirect.activations) as cache:
        vit(images)
    effects = indirect(cache, representation, 1.0)
    for b, n in ((0, 0), (1, 1)):
        truth = (representation[b] - changed[b]) / representation[b].norm()
        assert difference(effects[b, n], truth) < 1e-10


def test_contributions_are_derivatives_and_second_order_effects(family):
    _, images, model, runs = family
    vit, images = HookedViT(model), images.double()
    layers = range(vit.last + 1)
    generator = torch.Generator().manual_seed(2)
    means = {l: torch.randn(run.p[l].shape, generator=generator).double() for run in runs[:1] for l in layers}
    v = torch.randn(vit.D, generator=generator).double()
    finder = Contributions(vit, means, v)
    decision = finder(images)
    along = finder.second_order(decision)
    found = finder.contributions(decision)
    for b, run in enumerate(runs):
        for layer in (0, vit.last):
            for n in (0, 41):
                away = torch.zeros_like(run.p[layer])
                away[:, n] = run.p[layer][:, n] - means[layer][:, n]
                truth = run.effects(layer, away) - run.effects(layer, torch.zeros_like(away))
                assert abs(float(along[b, layer, n] - truth @ v)) < 1e-10 * float(along.abs().max())
                of_heads = sum(part[b] for part in finder.of_heads(decision, layer, n).values())
                assert abs(float(of_heads.sum() - truth @ v)) < 1e-10 * float(along.abs().max())
                moved = [
                    changed_run(model, images[b], layer, lambda p, step=step, away=away: p - step * away)
                    for step in (1e-4, -1e-4)
                ]
                scores = finder.score(torch.stack(moved))
                slope = (scores[1] - scores[0]) / 2e-4
                assert abs(float(found[b, layer, n] - slope)) < 1e-5 * float(found.abs().max())


def test_patterns_are_those_of_the_running_attention_and_no_hook_stays(family):
    model, images, exact, runs = family
    vit, pictures = HookedViT(exact), images.double()
    before = vit(pictures)
    seen = {}
    with vit.record("*"), vit.edit({"*.attn.pattern": lambda A: seen.setdefault(len(seen), A)}):
        during = vit(pictures)
    assert difference(during, before) < 1e-12
    assert torch.equal(vit(pictures), before)
    for b, run in enumerate(runs):
        for l in range(vit.L):
            assert difference(seen[l][b], run.A[l][0]) < 1e-12
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in vit.visual.modules()]
    assert sum(hooks) == 0
    vit.class_token_last()
    layer = f"blocks.{vit.L - 1}.mlp.post"
    with vit.record(layer) as cache, vit.class_token_last():
        assert difference(vit(pictures), before) < 1e-12
    assert cache[layer].shape[1] == (1 if vit.pooling.name == "class token" else vit.T)


@pytest.mark.parametrize("name", ["PE-Core", "PE-Core without a class token"])
def test_what_the_pooling_heads_mlp_adds_is_measured(name):
    model = tower_of(trunk_of(name)).double()
    images = images_of(model).double()
    share_left = HookedViT(model).left_out(images)
    for b, image in enumerate(images):
        run = Frozen(model, image)
        assert_close(share_left[b], run.left_out().norm() / run.rep.norm(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["EVA02", "ViTamin"])
def test_a_gated_neuron_has_no_sign_of_its_own(name):
    """With some neurons' products and weights negated, the model and its effects are the same."""
    model = tower_of(trunk_of(name)).double()
    images = images_of(model).double()
    other = copy.deepcopy(model)
    mlp = other.trunk.blocks[1].mlp
    linear = mlp.w1 if name == "ViTamin" else mlp.fc1_x
    last_layer(mlp).weight.data[:, ::3] *= -1
    if name == "ViTamin":
        linear.weight.data[::3] *= -1
        linear.bias.data[::3] *= -1
    else:  # through the norm
        mlp.norm.weight.data[::3] *= -1
        mlp.norm.bias.data[::3] *= -1
    towers = [HookedViT(model), HookedViT(other)]
    assert all(vit.gated for vit in towers)
    phi = [next(second_order(vit, images, [fold(vit, 1)])[1]).dense() for vit in towers]
    assert difference(phi[1], phi[0]) < 1e-11
    with towers[1].record("blocks.1.mlp.post") as cache:
        towers[1](images)
    with towers[0].record("blocks.1.mlp.post") as cache_0:
        towers[0](images)
    assert_close(cache["blocks.1.mlp.post"][..., ::3], -cache_0["blocks.1.mlp.post"][..., ::3])
    chosen = torch.arange(0, 20)[None], torch.full((1, 20), 1 / 20).double()
    maps = [NeuronMaps(vit, [1], *chosen, lambda rep, image: [0] * len(rep))(images, 0) for vit in towers]
    assert difference(maps[1], maps[0]) < 1e-11 and float(maps[0].min()) > 0


REFUSED = [
    ("EVA02", {"qk_norm": True}, "normalised queries and keys"),
    ("EVA02", {"num_reg_tokens": 2}, "register tokens"),
    ("EVA02", {"global_pool": "avg"}, "averages its patches and has norms inside its branches"),
    ("EVA02", {"scale_mlp": False}, "another kind of MLP"),
    ("EVA02", {"rope_type": "dinov3"}, "another kind of rotary positions"),
    ("EVA02", {"dynamic_img_size": True}, "images of any size"),
    ("EVA01", {"scale_mlp": True}, "a norm in its MLP"),
    ("EVA02-E", {"global_pool": "avg"}, "averages its patches and has norms inside its branches"),
    ("PE-Core", {"num_kv_heads": 2, "qkv_fused": False}, "heads that share keys"),
    ("PE-Core", {"use_post_norm": True}, "post-norm before a pooling"),
    ("PE-Core", {"use_fc_norm": True}, "more layers around its blocks"),
    ("relpos", {"qk_norm": True}, "normalised queries and keys"),
    ("relpos", {"num_classes": 0}, "more layers around its blocks"),
]


@pytest.mark.parametrize("name, options, reason", REFUSED)
def test_what_the_method_does_not_cover_is_refused_with_the_reason(name, options, reason):
    with pytest.raises(UserError, match=reason):
        HookedViT(tower_of(trunk_of(name, **options)))
