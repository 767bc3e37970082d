"""Second-order effects against their definition, and by causal intervention."""

import copy

import pytest
import torch
from torch.testing import assert_close

from tests import definition
from tests.conftest import random_tower
from utils import prs
from utils.errors import UserError
from utils.hooked_vit import HookedViT
from utils.prs import CentredNorms, dense, fold, parse_layers, second_order, sum_of_effects


def double(visual):
    return copy.deepcopy(visual).double()


@pytest.mark.parametrize("layer", [0, 2, 3])  # first, middle, the last one with an attention after it
def test_effects_equal_the_definition(vit, visual, images, layer):
    directions = fold(vit, layer)
    _, [(C, kappa)] = second_order(vit, images, [directions])
    phi = dense(C, kappa, directions)
    for image, effects in zip(images[:3], phi, strict=False):
        truth = definition.effects(double(visual), image.double(), layer)
        assert_close(effects.double(), truth, rtol=0, atol=1e-5 * float(truth.abs().max()))


def test_the_shares_of_means_and_biases_are_part_of_the_effects(vit, visual, images):
    directions = fold(vit, 3)
    _, [(C, kappa)] = second_order(vit, images[:1], [directions])
    truth = definition.effects(double(visual), images[0].double(), 3)
    without = dense(C, torch.zeros_like(kappa), directions)[0].double()
    assert (without - truth).abs().max() > 1e-3 * truth.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"ls_init_value": 0.7},  # LayerScale
        {"final_ln_after_pool": True},
        {"no_ln_pre": True, "output_tokens": True},
        {"norm_layer": lambda d: torch.nn.LayerNorm(d, eps=0.1)},
    ],
)
def test_effects_equal_the_definition_for_other_kinds_of_towers(images, options):
    visual = random_tower(3, **options)
    vit = HookedViT(visual)
    directions = fold(vit, 2)
    _, [(C, kappa)] = second_order(vit, images[:1], [directions])
    truth = definition.effects(double(visual), images[0].double(), 2)
    assert_close(dense(C, kappa, directions)[0].double(), truth, rtol=0, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("layer", [0, 3])
def test_effects_sum_to_the_attention_path_of_the_mlp(vit, visual, images, layer):
    directions = fold(vit, layer)
    _, [(C, kappa)] = second_order(vit, images, [directions])
    total = sum_of_effects(C, kappa, directions)
    assert_close(total, dense(C, kappa, directions).sum(dim=1), rtol=1e-4, atol=1e-4)
    for i in range(3):
        truth = definition.sum_of_effects(double(visual), images[i].double(), layer)
        assert_close(total[i].double(), truth, rtol=0, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("layer", [0, 3])
def test_silencing_a_neuron_with_all_else_frozen_removes_its_effect(vit, visual, images, layer):
    visual64, image = double(visual), images[0].double()
    clean = definition.run(visual64, image)
    directions = fold(vit, layer)
    _, [(C, kappa)] = second_order(vit, images[:1], [directions])
    effect = dense(C, torch.zeros_like(kappa), directions)[0].double()  # without the constant shares
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


def test_sums_over_images_are_those_of_each_images_effects(vit, images):
    directions = [fold(vit, layer) for layer in (0, 2)]
    _, single = second_order(vit, images, directions)
    _, summed = second_order(vit, images, directions, summed=True)
    for of_each, sums in zip(single, summed, strict=True):
        for values, total in zip(of_each, sums, strict=True):
            exact = values.double().sum(dim=0)
            assert total.shape == exact.shape
            assert_close(total.double(), exact, rtol=0, atol=1e-6 * float(exact.abs().max()))


def test_the_representation_is_the_models(vit, visual, images):
    representation, _ = second_order(vit, images, [fold(vit, 3)])
    exact = copy.deepcopy(visual).double()(images.double())
    assert_close(representation.double(), exact, rtol=0, atol=1e-6 * float(exact.abs().max()))
    assert_close(vit(images), visual(images), rtol=0, atol=0)  # the last MLP sees all tokens again


def test_the_coefficient_scales_effects(vit, images):
    directions = fold(vit, 2)
    _, [(C, kappa)] = second_order(vit, images, [directions])
    _, [(C1, kappa1)] = second_order(vit, images, [directions], coefficient=1)
    assert_close((C, kappa), (100 * C1, 100 * kappa1))


@pytest.mark.parametrize("strip", [prs.STRIP, 5])  # one of all columns; several, the last one narrower
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1e-3])  # a small one makes plain squares cancel
def test_centred_norms_equal_norms_of_the_dense_effects(vit, images, spread, factors, strip, monkeypatch):
    monkeypatch.setattr(prs, "STRIP", strip)
    directions = fold(vit, 1)
    _, [(C, kappa)] = second_order(vit, images, [directions])
    C = C.mean(dim=0) + spread * (C - C.mean(dim=0))
    phi = dense(C.double(), kappa.double(), _in_double(directions))
    mean = phi.mean(dim=0)
    centred_norms = CentredNorms(directions, (C.mean(dim=0), kappa.mean(dim=0)) if factors else mean.float())
    norms = centred_norms(C, kappa)
    truth = (phi - mean).norm(dim=-1)
    assert_close(norms.double(), truth, rtol=2e-3 if spread < 1 else 1e-4, atol=1e-5 * float(truth.max()))


def _in_double(directions):
    return type(directions)(directions.layer, *(getattr(directions, k).double() for k in ("values", "outputs", "shares")))


def test_layers_are_named_by_number_or_all(vit):
    assert parse_layers(["3", "1", "1"], vit) == [1, 3]
    assert parse_layers(["all"], vit) == [0, 1, 2, 3]
    for wrong in (["4"], ["5"], ["-1"], ["nine"], ["all", "1"]):
        with pytest.raises(UserError, match="0 to 3"):
            parse_layers(wrong, vit)
