"""Contributions to a score: by finite differences, by models with other weights, by second-order effects."""

import copy

import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

from tests.conftest import random_tower
from tests.test_towers import coca, siglip
from tests.test_units import dictionary, encoded
from utils.contributions import Contributions
from utils.model.hooks import HookedViT
from utils.prs import fold, second_order
from utils.units import Features

TOWERS = {
    "class token": random_tower,
    "average": lambda: random_tower(pool_type="avg", final_ln_after_pool=True),
    "average of norms": lambda: random_tower(pool_type="avg"),
    "attention": coca,
    "attention and an MLP": siglip,
}


@pytest.fixture(scope="module", params=TOWERS)
def tower(request, images):
    """A tower, the same in float64, mean activations, and a direction."""
    model = TOWERS[request.param]()
    vit = HookedViT(model)
    exact = HookedViT(copy.deepcopy(model).double())
    with vit.record("blocks.*.mlp.post") as cache:
        vit(images)
    means = {l: cache[f"blocks.{l}.mlp.post"].mean(dim=0) for l in range(vit.last + 1)}
    v = torch.randn(vit.D, generator=torch.Generator().manual_seed(2))
    return vit, exact, means, v / v.norm()


def score(vit, images, v):
    """100 <rep/|rep|, v>, by the tower itself."""
    output = vit.visual(images)
    output = output[0] if isinstance(output, tuple) else output
    return 100 * normalize(output, dim=-1) @ v


def test_a_contribution_is_the_derivative_of_the_score_as_the_neuron_goes_to_its_mean(tower, images):
    vit, exact, means, v = tower
    finder = Contributions(vit, means, v)
    found = finder.contributions(finder(images[:2])).double()
    assert found.shape == (2, len(means), vit.N)
    assert_close(finder.score(vit(images)), score(vit, images, v), rtol=1e-5, atol=1e-4)
    for place, layer in enumerate(means):
        for n in (0, 17, vit.N - 1):

            def score_at(eps, layer=layer, n=n):
                def change(p):
                    p = p.clone()
                    p[..., n] += eps * (means[layer][:, n].double() - p[..., n])
                    return p

                with exact.edit({f"blocks.{layer}.mlp.post": change}):
                    return score(exact, images[:2].double(), v.double())

            eps = 1e-4
            slope = (score_at(eps) - score_at(-eps)) / (-2 * eps)
            assert_close(found[:, place, n], slope, rtol=1e-4, atol=1e-5 * float(found.abs().max()))


def test_second_order_along_v_is_that_of_the_effects_and_of_every_head(tower, images):
    vit, _, means, v = tower
    finder = Contributions(vit, {l: torch.zeros_like(mean) for l, mean in means.items()}, v)
    decision = finder(images[:2])
    found = finder.second_order(decision)
    for place, layer in enumerate(means):
        _, [phi] = second_order(vit, images[:2], [fold(vit, layer)])
        along = (phi.dense() - phi.kappa[:, None]) @ v
        assert_close(found[:, place], along, rtol=1e-3, atol=1e-4 * float(along.abs().max()))
        of_heads = torch.cat(list(finder.of_heads(decision, layer, 3).values()), dim=1)
        by_hand = phi.C[:, :, 3] * (phi.directions.B([3])[0] @ v)
        assert_close(of_heads, by_hand, rtol=1e-3, atol=1e-4 * float(by_hand.abs().max()))


def test_tokens_and_heads_add_up(tower, images):
    vit, _, means, v = tower
    finder = Contributions(vit, means, v)
    decision = finder(images[:2])
    found = finder.contributions(decision)
    straight = finder.second_order(decision)
    for place, layer in enumerate(means):
        tokens = finder.of_tokens(decision, layer, 5)
        assert tokens.shape == (2, vit.T)
        assert_close(tokens.sum(dim=1), found[:, place, 5], rtol=1e-4, atol=1e-4)
        of_heads = torch.cat(list(finder.of_heads(decision, layer, 5).values()), dim=1)
        assert_close(of_heads.sum(dim=1), straight[:, place, 5], rtol=1e-4, atol=1e-4)


def test_a_deletion_of_a_set_is_a_plain_model_with_other_weights(images):
    """Where the mean is one number for all tokens, what the neuron writes goes into the output bias."""
    visual = random_tower()
    vit = HookedViT(visual)
    generator = torch.Generator().manual_seed(3)
    constant = {l: torch.rand(vit.N, generator=generator) for l in range(4)}
    means = {l: of.expand(vit.T, -1) for l, of in constant.items()}
    taken = torch.rand(4, vit.N, generator=generator) < 0.1
    v = torch.randn(vit.D, generator=generator)
    finder = Contributions(vit, means, v)
    for mask in (taken, ~taken):  # to delete a set, and to keep only it
        plain = copy.deepcopy(visual)
        for l in range(4):
            c_proj = plain.transformer.resblocks[l].mlp.c_proj
            c_proj.bias += c_proj.weight[:, mask[l]] @ constant[l][mask[l]]
            c_proj.weight[:, mask[l]] = 0
        found = finder.without(images, mask.expand(len(images), -1, -1))
        assert_close(found, plain(images), rtol=1e-5, atol=1e-5)


def test_each_image_loses_its_own_neurons(vit, images):
    means = {l: torch.zeros(vit.T, vit.N) for l in (1, 2)}
    finder = Contributions(vit, means, torch.ones(vit.D))
    taken = torch.zeros(len(images), 2, vit.N, dtype=torch.bool)
    taken[1, 0, 4] = taken[2, 1, 7] = True
    found = finder.without(images, taken)
    assert_close(found[[0, 3]], vit(images)[[0, 3]], rtol=1e-5, atol=1e-5)
    for b, layer, n in ((1, 1, 4), (2, 2, 7)):

        def zero(p, n=n):
            p = p.clone()
            p[..., n] = 0
            return p

        with vit.edit({f"blocks.{layer}.mlp.post": zero}):
            assert_close(found[b], vit(images)[b], rtol=1e-5, atol=1e-5)


def test_a_small_neurons_deletion_costs_its_contribution(images):
    visual = random_tower()
    for l in range(4):
        visual.transformer.resblocks[l].mlp.c_proj.weight[:, ::10] *= 1e-2
    vit = HookedViT(visual)
    means = {l: torch.zeros(vit.T, vit.N) for l in range(4)}
    v = torch.randn(vit.D, generator=torch.Generator().manual_seed(4))
    finder = Contributions(vit, means, v)
    pixels = images[:1]
    said = finder.contributions(finder(pixels))[0, :, ::10]
    taken = torch.zeros(said.numel(), 4, vit.N, dtype=torch.bool)
    places, neurons = torch.meshgrid(torch.arange(4), torch.arange(0, vit.N, 10), indexing="ij")
    taken[torch.arange(said.numel()), places.flatten(), neurons.flatten()] = True
    without = finder.score(finder.without(pixels.expand(len(taken), -1, -1, -1), taken))
    lost = (finder.score(vit(pixels)) - without).view_as(said)
    assert_close(lost, said, rtol=0, atol=0.02 * float(said.abs().max()))
    assert said.abs().max() > 1e-2


def test_it_works_in_inference_mode_and_leaves_no_trace(vit, images):
    means = {l: torch.zeros(vit.T, vit.N) for l in range(4)}
    finder = Contributions(vit, means, torch.ones(vit.D))
    expected = finder.contributions(finder(images))
    with torch.inference_mode():
        finder = Contributions(vit, means, torch.ones(vit.D))
        found = finder.contributions(finder(images.clone()))
    assert_close(found, expected)
    assert not any(parameter.requires_grad for parameter in vit.visual.parameters())
    assert not any(module._forward_hooks for module in vit.visual.modules())


# other units than neurons, of layer 1

SITES = {  # what units write: what that is, and to what it is added
    "mlp.out": ("blocks.1.mlp.out", "blocks.1.mlp.out"),
    "attn.out": ("blocks.1.attn.out", "blocks.1.attn.out"),
    "resid.post": ("blocks.2.resid.pre", "blocks.1.mlp.out"),
}
OF_UNITS = [(site, tower) for site in SITES for tower in ("class token", "average", "attention")]


class Written:
    """A tower, a dictionary's units in it, what they write, and their means."""

    def __init__(self, site, tower, images):
        model = TOWERS[tower]()
        self.vit = HookedViT(model)
        self.exact = HookedViT(copy.deepcopy(model).double())
        of = dictionary(site, 1, d=self.vit.d)
        self.units = Features(self.vit, of)
        generator = torch.Generator().manual_seed(5)
        self.mean = torch.rand(self.vit.T, len(of.decoder), generator=generator)
        v = torch.randn(self.vit.D, generator=generator)
        self.v = v / v.norm()
        name, self.added = SITES[site]
        self.images = images[:2].double()
        with self.exact.record(name) as cache:
            self.exact(self.images)
        change = self.mean.double() - encoded(of, cache[name])  # [2, T, U]
        self.written = change[..., None] * of.decoder.double()  # [2, T, U, d]

    def without(self, shares):
        """Representations where units [U] have gone a share of the way to their means."""
        more = torch.einsum("btud,u->btd", self.written, shares.double())
        with self.exact.edit({self.added: lambda x: x + more}):
            return self.exact(self.images)

    def score(self, shares):
        return 100 * normalize(self.without(shares), dim=-1) @ self.v.double()


@pytest.fixture(scope="module", params=OF_UNITS, ids="-".join)
def written(request, images):
    return Written(*request.param, images)


def test_a_unit_s_contribution_is_the_derivative_of_the_score_as_it_goes_to_its_mean(written):
    finder = Contributions(written.vit, {1: written.mean}, written.v, written.units)
    decision = finder(written.images.float())
    found = finder.contributions(decision)
    U = written.mean.shape[1]
    assert found.shape == (2, 1, U)
    for n in (0, 11, U - 1):
        step = 1e-4 * torch.nn.functional.one_hot(torch.tensor(n), U)
        slope = (written.score(-step) - written.score(step)) / 2e-4
        assert_close(found[:, 0, n].double(), slope, rtol=1e-3, atol=1e-4 * float(found.abs().max()))
        tokens = finder.of_tokens(decision, 1, n)
        assert_close(tokens.sum(dim=1), found[:, 0, n], rtol=1e-4, atol=1e-4)


def test_units_are_taken_away_as_by_hand(written):
    finder = Contributions(written.vit, {1: written.mean}, written.v, written.units)
    taken = torch.rand(written.mean.shape[1], generator=torch.Generator().manual_seed(6)) < 0.3
    for mask in (taken, ~taken):
        found = finder.without(written.images.float(), mask.expand(2, 1, -1))
        expected = written.without(mask)
        assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert float((expected - written.without(0 * mask)).abs().max()) > 1e-2


def test_second_order_along_v_of_units_is_that_of_their_effects_and_of_every_head(written):
    vit = written.vit
    finder = Contributions(vit, {1: torch.zeros_like(written.mean)}, written.v, written.units)
    decision = finder(written.images.float())
    _, [phi] = second_order(vit, written.images.float(), [written.units.fold(vit)])
    along = phi.dense() @ written.v
    assert_close(finder.second_order(decision)[:, 0], along, rtol=1e-3, atol=1e-4 * float(along.abs().max()))
    of_heads = torch.cat(list(finder.of_heads(decision, 1, 3).values()), dim=1)
    by_hand = phi.C[:, :, 3] * (phi.directions.B([3])[0] @ written.v)
    assert_close(of_heads, by_hand, rtol=1e-3, atol=1e-4 * float(by_hand.abs().max()))
