"""Second-order effects against their definition, and by causal intervention."""

import copy

import pytest
import torch
from torch.testing import assert_close

from tests import definition
from tests.conftest import random_tower
from utils import norms as norms_module
from utils.model.hooks import HookedViT
from utils.norms import CentredNorms, groups_of_layers
from utils.prs import SecondOrder, fold, fold_layers, second_order
from utils.runtime.errors import UserError
from utils.runtime.layers import parse_layers


def double(visual):
    return copy.deepcopy(visual).double()


@pytest.mark.parametrize("layer", [0, 2, 3])  # first, middle, the last one with an attention after it
def test_effects_equal_the_definition(vit, visual, images, layer):
    directions = fold(vit, layer)
    _, [phi] = second_order(vit, images, [directions])
    for image, effects in zip(images[:3], phi.dense(), strict=False):
        truth = definition.effects(double(visual), image.double(), layer)
        assert_close(effects.double(), truth, rtol=0, atol=1e-5 * float(truth.abs().max()))


def test_the_shares_of_means_and_biases_are_part_of_the_effects(vit, visual, images):
    directions = fold(vit, 3)
    _, [phi] = second_order(vit, images[:1], [directions])
    truth = definition.effects(double(visual), images[0].double(), 3)
    without = phi._replace(kappa=torch.zeros_like(phi.kappa)).dense()[0].double()
    assert (without - truth).abs().max() > 1e-3 * truth.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"ls_init_value": 0.7},  # LayerScale
        {"final_ln_after_pool": True},
        {"pool_type": "avg", "final_ln_after_pool": True},
        {"pool_type": "avg"},
        {"no_ln_pre": True, "output_tokens": True},
        {"norm_layer": lambda d: torch.nn.LayerNorm(d, eps=0.1)},
    ],
)
def test_effects_equal_the_definition_for_other_kinds_of_towers(images, options):
    visual = random_tower(3, **options)
    vit = HookedViT(visual)
    directions = fold(vit, 2)
    _, [phi] = second_order(vit, images[:1], [directions])
    truth = definition.effects(double(visual), images[0].double(), 2)
    assert_close(phi.dense()[0].double(), truth, rtol=0, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("options", [{"pool_type": "avg", "final_ln_after_pool": True}, {"pool_type": "avg"}])
@pytest.mark.parametrize("layer", [0, 3])
def test_effects_on_an_average_of_patches_close_and_are_what_a_frozen_model_gains(images, layer, options):
    """The sum over neurons by another route; and the change when a neuron is silenced and only later
    attentions see it.
    """
    visual = random_tower(3, **options)
    vit, exact = HookedViT(visual), double(visual)
    representation, [phi] = second_order(vit, images[:2], [fold(vit, layer)])
    assert_close(representation, vit(images[:2]), rtol=0, atol=1e-6 * float(representation.abs().max()))
    for image, total, effects, kappa in zip(
        images[:2].double(), phi.sum(), phi.dense(), phi.kappa, strict=True
    ):
        truth = definition.sum_of_effects(exact, image, layer)
        assert_close(total.double(), truth, rtol=0, atol=1e-5 * float(truth.abs().max()))
        run = definition.run(exact, image)
        w = exact.transformer.resblocks[layer].mlp.c_proj.weight.T
        for n in (5, 60):
            moved = definition.representation_with_changed_mlp(
                exact, image, layer, -run.p[layer][:, n, None] * w[n]
            )
            lost = 100 * (run.rep - moved) / run.rep.norm()
            assert_close((effects[n] - kappa).double(), lost, rtol=0, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("layer", [0, 3])
def test_effects_sum_to_the_attention_path_of_the_mlp(vit, visual, images, layer):
    directions = fold(vit, layer)
    _, [phi] = second_order(vit, images, [directions])
    total = phi.sum()
    assert_close(total, phi.dense().sum(dim=1), rtol=1e-4, atol=1e-4)
    for i in range(3):
        truth = definition.sum_of_effects(double(visual), images[i].double(), layer)
        assert_close(total[i].double(), truth, rtol=0, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("layer", [0, 3])
def test_silencing_a_neuron_with_all_else_frozen_removes_its_effect(vit, visual, images, layer):
    visual64, image = double(visual), images[0].double()
    clean = definition.run(visual64, image)
    directions = fold(vit, layer)
    _, [phi] = second_order(vit, images[:1], [directions])
    effect = (
        phi._replace(kappa=torch.zeros_like(phi.kappa)).dense()[0].double()
    )  # without the constant shares
    w = visual64.transformer.resblocks[layer].mlp.c_proj.weight.T
    for n in (0, 17, 95):
        change = -clean.p[layer][:, n, None] * w[n]
        moved = definition.representation_with_changed_mlp(visual64, image, layer, change) - clean.rep
        moved = 100 / clean.rep.norm() * moved
        assert_close(-moved, effect[n], rtol=0, atol=1e-5 * float(effect.abs().max()))


def test_one_pass_serves_several_layers_as_single_passes_do(vit, images):
    directions = [fold(vit, layer) for layer in (0, 1, 3)]
    representation, together = second_order(vit, images, directions)
    for item, effects in zip(directions, together, strict=True):
        alone, [single] = second_order(vit, images, [item])
        assert_close(alone, representation, rtol=0, atol=0)
        assert_close(single, effects, rtol=1e-6, atol=1e-6)


def test_the_representation_is_the_models(vit, visual, images):
    representation, _ = second_order(vit, images, [fold(vit, 3)])
    exact = copy.deepcopy(visual).double()(images.double())
    assert_close(representation.double(), exact, rtol=0, atol=1e-6 * float(exact.abs().max()))
    assert_close(vit(images), visual(images), rtol=0, atol=0)  # the last MLP sees all tokens again


def test_the_coefficient_scales_effects(vit, images):
    directions = fold(vit, 2)
    _, [phi] = second_order(vit, images, [directions])
    _, [unit] = second_order(vit, images, [directions], coefficient=1)
    assert_close((phi.C, phi.kappa), (100 * unit.C, 100 * unit.kappa))


@pytest.mark.parametrize(
    "strip", [norms_module.STRIP, 5]
)  # one of all columns; several, the last one narrower
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1e-3])  # a small one makes plain squares cancel
def test_centred_norms_equal_norms_of_the_dense_effects(vit, images, spread, factors, strip, monkeypatch):
    monkeypatch.setattr(norms_module, "STRIP", strip)
    directions = fold(vit, 1)
    _, [phi] = second_order(vit, images, [directions])
    C, kappa = phi.C, phi.kappa
    C = C.mean(dim=0) + spread * (C - C.mean(dim=0))
    phi = SecondOrder(C.double(), kappa.double(), in_double(directions)).dense()
    mean = phi.mean(dim=0)
    centred_norms = CentredNorms(directions, (C.mean(dim=0), kappa.mean(dim=0)) if factors else mean.float())
    norms = centred_norms(SecondOrder(C, kappa, directions))
    truth = (phi - mean).norm(dim=-1)
    assert_close(norms.double(), truth, rtol=2e-3 if spread < 1 else 1e-4, atol=1e-5 * float(truth.max()))


def in_double(directions):
    return directions._replace(
        **{name: getattr(directions, name).double() for name in ("values", "outputs", "constants")}
    )


def test_layers_that_are_folded_together_are_those_folded_alone_and_share_what_they_have_in_common(vit):
    together = fold_layers(vit, [0, 1, 3])
    for item in together:
        alone = fold(vit, item.layer)
        for name in ("values", "outputs", "constants"):
            assert_close(getattr(item, name), getattr(alone, name), rtol=0, atol=0)
        assert item.outputs.untyped_storage().data_ptr() == together[0].outputs.untyped_storage().data_ptr()


def test_groups_of_layers_fit_into_the_memory(vit):
    """By the sizes of the folded weights and half the Gram matrices, in float32; the test's tower has 4
    heads, e = 12, N = 96.
    """

    def needed(layer):
        K = (vit.L - 1 - layer) * vit.H
        return 4 * vit.N * (K * vit.d // vit.H + K * (K + 16) / 2)

    layers = [0, 1, 2, 3]
    assert groups_of_layers(vit, layers, 1e12) == [layers]
    assert groups_of_layers(vit, layers, 1) == [[0], [1], [2], [3]]
    for memory in (needed(0) + 1, needed(0) + needed(1) + 1, needed(1) + needed(2) + needed(3) + 1):
        groups = groups_of_layers(vit, layers, memory)
        assert sum(groups, []) == layers
        assert all(len(group) == 1 or sum(map(needed, group)) <= memory for group in groups)


def test_layers_are_named_by_number_or_all(vit):
    assert parse_layers(["3", "1", "1"], vit) == [1, 3]
    assert parse_layers(["all"], vit) == [0, 1, 2, 3]
    for wrong in (["4"], ["5"], ["-1"], ["nine"], ["all", "1"]):
        with pytest.raises(UserError, match="0 to 3"):
            parse_layers(wrong, vit)
