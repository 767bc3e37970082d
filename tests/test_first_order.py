"""The first-order decomposition, edits of the running model, and indirect effects: against float64 loops and
interventions.
"""

import copy

import pytest
import torch
from torch.testing import assert_close

from tests import definition
from tests.conftest import random_tower
from utils.first_order import FirstOrder, direct_effects, fold_direct
from utils.indirect import IndirectEffects, replaced
from utils.model.attention import attention_pattern
from utils.model.hooks import HookedViT
from utils.prs import fold, second_order

LAYER = 2


KINDS = {
    "plain": {},
    "layer scale": {"ls_init_value": 0.4},
    "average": {"pool_type": "avg", "final_ln_after_pool": True},
    "average of norms": {"pool_type": "avg"},
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def vit(request):
    return HookedViT(random_tower(**request.param))


@pytest.fixture(scope="module")
def runs(vit, images):
    """Every image through the tower by hand, in float64."""
    visual = copy.deepcopy(vit.visual).double()
    return visual, [definition.run(visual, image.double()) for image in images]


def recorded(vit, images):
    order = FirstOrder(vit)
    with vit.record(*order.activations) as cache:
        representation = vit(images)
    return order, cache, representation


def written(visual, run, part):
    """J(part), in float64. part: token -> what it has of the part, [..., d]."""
    out = 0
    for q, weight, _, sigma in definition.reads(visual, run.z[-1]):
        own = part(q)
        out = (
            out
            + weight * ((own - own.mean(dim=-1, keepdim=True)) / sigma * visual.ln_post.weight) @ visual.proj
        )
    return 100 / run.rep.norm() * out


def head_part(visual, run, l, h, token):
    """What head h of layer l takes from a token to each token that the output reads."""
    block = visual.transformer.resblocks[l]
    _, _, W_V, _, _, b_V, W_O = definition.heads(block.attn)
    x = block.ln_1(run.z[l])[token] @ W_V[h] + b_V[h]
    value = definition.scale_of(block.ls_1) * (x @ W_O[h] + block.attn.out_proj.bias / len(W_O))
    return lambda q: run.A[l][h][q, token] * value


def test_the_parts_sum_to_the_representation(vit, images):
    order, cache, representation = recorded(vit, images)
    unit = 100 * representation / representation.norm(dim=-1, keepdim=True)
    assert_close(order.parts(cache, representation).sum(), unit, rtol=0, atol=1e-5 * 100)


def test_every_part_is_that_of_the_definition(vit, images, runs):
    order, cache, representation = recorded(vit, images)
    parts, (visual, by_hand) = order.parts(cache, representation), runs
    for i, run in enumerate(by_hand):
        assert_close(
            parts.embedding[i].double(),
            written(visual, run, lambda q, run=run: run.z[0][q]),
            rtol=1e-3,
            atol=1e-3,
        )
        for l in range(vit.L):
            of_mlp = written(visual, run, lambda q, run=run, l=l: run.mlp[l][q])
            assert_close(parts.mlps[i, l].double(), of_mlp, rtol=1e-3, atol=1e-3)
            for h in range(vit.H) if i < 2 else ():
                whole = sum(
                    written(visual, run, head_part(visual, run, l, h, token)) for token in range(vit.T)
                )
                assert_close(parts.heads[i, l, h].double(), whole, rtol=1e-3, atol=1e-3)


def test_tokens_add_up_to_their_heads_and_are_those_of_the_definition(vit, images, runs):
    order, cache, representation = recorded(vit, images)
    direction = torch.randn(len(images), vit.D, generator=torch.Generator().manual_seed(3))
    tokens, parts = order.tokens(cache, representation, direction), order.parts(cache, representation)
    assert tokens.shape == (len(images), vit.L, vit.H, vit.T)
    assert_close(
        tokens.sum(dim=-1), torch.einsum("blho,bo->blh", parts.heads, direction), rtol=1e-3, atol=1e-3
    )
    visual, by_hand = runs
    for i, l, h, token in ((0, 0, 0, 0), (1, 4, 3, 7), (5, 2, 1, 16)):
        expected = (
            written(visual, by_hand[i], head_part(visual, by_hand[i], l, h, token)) @ direction[i].double()
        )
        assert_close(tokens[i, l, h, token].double(), expected, rtol=1e-3, atol=1e-4)


def test_direct_effects_are_those_of_the_definition_and_add_up_to_the_mlp(vit, images, runs):
    order, cache, representation = recorded(vit, images)
    with vit.record(f"blocks.{LAYER}.mlp.post", *vit.names_from(vit.L)) as of_layer:
        vit(images)
    phi = direct_effects(vit, of_layer, fold_direct(vit, LAYER), 100 / representation.norm(dim=-1))
    assert_close(phi.sum(), order.parts(cache, representation).mlps[:, LAYER], rtol=1e-3, atol=1e-3)
    assert_close(phi.dense().sum(dim=1), phi.sum(), rtol=1e-3, atol=1e-3)
    visual, by_hand = runs
    block = visual.transformer.resblocks[LAYER]
    w = (block.mlp.c_proj.weight * torch.as_tensor(definition.scale_of(block.ls_2)).reshape(-1, 1)).T
    share = block.mlp.c_proj.bias * definition.scale_of(block.ls_2) / vit.N
    for i, run in enumerate(by_hand):
        expected = written(visual, run, lambda q, run=run: run.p[LAYER][q][:, None] * w + share)
        assert_close(phi.dense()[i].double(), expected, rtol=1e-3, atol=1e-4)


def test_direct_and_second_order_effects_are_what_a_frozen_model_loses(vit, images, runs):
    """A neuron is silenced; later attentions see it, with frozen probabilities and statistics, and nothing
    else does. The loss is the direct and the second-order effect, less their shares of constants."""
    visual, by_hand = runs
    representation, [phi] = second_order(vit, images, [fold(vit, LAYER)])
    with vit.record(f"blocks.{LAYER}.mlp.post", *vit.names_from(vit.L)) as cache:
        vit(images)
    direct = direct_effects(vit, cache, fold_direct(vit, LAYER), 100 / representation.norm(dim=-1))
    block = visual.transformer.resblocks[LAYER]
    w = (block.mlp.c_proj.weight * torch.as_tensor(definition.scale_of(block.ls_2)).reshape(-1, 1)).T
    for i, n in ((0, 3), (4, 77)):
        run = by_hand[i]
        change = -run.p[LAYER][:, n, None] * w[n]
        later = (
            definition.representation_with_changed_mlp(visual, images[i].double(), LAYER, change) - run.rep
        )
        straight = written(visual, run, lambda q, change=change: change[q])
        lost = -(100 / run.rep.norm() * later + straight)
        found = (phi.dense()[i, n] - phi.kappa[i] + direct.dense()[i, n] - direct.kappa[i]).double()
        assert lost.norm() > 0.01
        assert_close(found, lost, rtol=2e-3, atol=2e-3 * float(lost.abs().max()))


# Edits


def test_an_edit_equals_a_model_with_other_weights(vit, images):
    """Silencing neurons is a model whose MLP does not read them; so is a scaled attention."""
    other = copy.deepcopy(vit.visual)
    other.transformer.resblocks[LAYER].mlp.c_proj.weight[:, 5:9] = 0
    attention = other.transformer.resblocks[3].attn.out_proj
    attention.weight *= 0.5
    attention.bias *= 0.5

    def silence(p):
        p = p.clone()
        p[..., 5:9] = 0
        return p

    before = vit(images)
    with vit.edit({f"blocks.{LAYER}.mlp.post": silence, "blocks.3.attn.out": lambda out: 0.5 * out}):
        found = vit(images)
    assert_close(found, HookedViT(other)(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before, rtol=1e-2) and torch.equal(vit(images), before)


def test_attention_that_is_not_changed_changes_nothing_and_a_frozen_one_stays(vit, images):
    with vit.edit({"*.attn.pattern": lambda A: A}):
        edited = vit(images)
    assert_close(edited, vit(images), rtol=1e-4, atol=1e-5)
    with vit.record("*.ln1.out") as cache:
        vit(images)
    patterns = {
        l: attention_pattern(vit.blocks[l].attn, cache[f"blocks.{l}.ln1.out"]).roll(1, dims=0)
        for l in range(vit.L)
    }
    changes = {f"blocks.{l}.attn.pattern": lambda A, l=l: patterns[l] for l in range(vit.L)}
    with vit.edit(changes):
        found = vit(images)
    visual = copy.deepcopy(vit.visual).double()
    for i, image in enumerate(images[:2].double()):
        z = visual._embeds(image[None])[0]
        for l, block in enumerate(visual.transformer.resblocks):
            _, _, W_V, _, _, b_V, W_O = definition.heads(block.attn)
            x, A = block.ln_1(z), patterns[l][i].double()
            out = sum(A[h] @ (x @ W_V[h] + b_V[h]) @ W_O[h] for h in range(vit.H)) + block.attn.out_proj.bias
            z = z + definition.scale_of(block.ls_1) * out
            z = z + definition.scale_of(block.ls_2) * block.mlp(block.ln_2(z))
        expected = sum(
            w * definition.straight(visual, z[q], mu, sigma)
            for q, w, mu, sigma in definition.reads(visual, z)
        )
        assert_close(found[i].double(), expected, rtol=1e-3, atol=1e-4)


def test_a_record_inside_an_edit_sees_the_change(vit, images):
    with vit.edit({"blocks.1.mlp.post": torch.zeros_like}), vit.record("blocks.1.mlp.post") as cache:
        vit(images)
    assert not cache["blocks.1.mlp.post"].any()


def test_no_hook_stays_after_an_edit(vit, images):
    def hooks():
        return sum(len(module._forward_hooks) for module in vit.visual.modules())

    def fail(p):
        raise RuntimeError("no")

    before = hooks()
    with vit.edit({"*.mlp.post": lambda p: p}):
        assert hooks() == before + vit.L
    with pytest.raises(RuntimeError), vit.edit({"*.mlp.out": fail}):
        vit(images)
    with (
        pytest.raises(KeyError, match="mlp.pre"),
        vit.edit({"*.mlp.out": lambda x: x, "blocks.0.mlp.pre": fail}),
    ):
        pass
    assert hooks() == before


# Indirect effects


@pytest.mark.parametrize("layer", [1, 3])
def test_indirect_effects_equal_a_plain_model_with_replaced_activations(vit, images, layer):
    mean = torch.randn(vit.T, vit.N, generator=torch.Generator().manual_seed(7))
    effects = IndirectEffects(vit, layer, mean, [0, 40, 95])
    with vit.record(*effects.activations) as cache:
        representation = vit(images)
    found = effects(cache, representation)
    assert found.shape == (len(images), 3, vit.D)
    for j, n in enumerate((0, 40, 95)):

        def hook(module, inputs, output, n=n):
            output = output.clone()
            output[:, :, n] = mean[:, n]
            return output

        handle = vit.blocks[layer].mlp.gelu.register_forward_hook(hook)
        other = vit.visual(images)
        handle.remove()
        expected = 100 * (representation - other) / representation.norm(dim=-1, keepdim=True)
        assert expected.norm() > 0.01
        assert_close(found[:, j], expected, rtol=1e-3, atol=1e-3)


def test_replacing_all_activations_is_the_same_as_one_after_another(vit, images):
    mean = torch.randn(vit.T, vit.N, generator=torch.Generator().manual_seed(7))
    with vit.edit({f"blocks.{LAYER}.mlp.post": replaced(mean)}):
        found = vit(images)
    handle = vit.blocks[LAYER].mlp.gelu.register_forward_hook(
        lambda module, inputs, output: mean.expand_as(output)
    )
    expected = vit.visual(images)
    handle.remove()
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_later_blocks_alone_give_the_same_representation(vit, images):
    for layer in (0, 3):
        with vit.record(f"blocks.{layer + 1}.resid.pre") as cache:
            whole = vit(images)
        assert_close(vit.after(layer, cache[f"blocks.{layer + 1}.resid.pre"]), whole, rtol=1e-5, atol=1e-6)
