"""Units that are no neurons under the same lens: dictionaries and pairs, against the definition."""

import copy
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from tests import definition
from tests.conftest import random_tower
from tests.test_towers import coca, run_coca, run_siglip, siglip
from utils.indirect import Deletions
from utils.model.dictionaries import Dictionary
from utils.model.hooks import HookedViT
from utils.prs import fold, second_order
from utils.units import Features, HeadPairs, Rest

UNITS = 30
ROWS = {  # how an output is read from tokens
    "class token": {},
    "average": {"pool_type": "avg", "final_ln_after_pool": True},
    "average of norms": {"pool_type": "avg"},
    "layer scale": {"ls_init_value": 0.7},
}
SITES = ("mlp.out", "attn.out", "resid.post")


def dictionary(site, layer, d=48, seed=0, **options):
    """A Dictionary of random weights, whose units act on about half of the tokens."""
    drawn = torch.Generator().manual_seed(seed)
    shapes = ((UNITS, d), (UNITS,), (UNITS, d), (d,))
    tensors = [torch.randn(shape, generator=drawn) for shape in shapes]
    return Dictionary(*tensors, site=site, layer=layer, **options)


def by_hand(visual, image, m, site):
    """What a site adds to the residual stream, float64 [T, d]."""
    run = definition.run(visual, image)
    found = {"mlp.out": run.mlp[m], "attn.out": run.middle[m] - run.z[m], "resid.post": run.z[m + 1]}
    return found[site]


def encoded(of, x):
    """The activations of a plain ReLU dictionary, written out in float64."""
    return torch.relu(x @ of.encoder.double().T + of.encoder_bias.double())


def near(found, truth, share=1e-5):
    assert_close(found.double(), truth, rtol=0, atol=share * float(truth.abs().max()))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("how", ROWS)
def test_effects_of_units_are_those_of_the_definition_and_add_up_to_the_site(images, how, site):
    visual = random_tower(3, **ROWS[how])
    exact = copy.deepcopy(visual).double()
    vit = HookedViT(visual)
    of = dictionary(site, 1)
    units = Features(vit, of)
    representation, [phi] = second_order(vit, images[:2], [units.fold(vit)])
    near(representation, vit(images[:2]).double())
    rest = Rest(vit, units).effects(images[:2])
    basis = torch.eye(48, dtype=torch.float64)
    for b, image in enumerate(images[:2].double()):
        x = by_hand(exact, image, 1, site)
        f = encoded(of, x)
        near(phi.dense()[b], definition.unit_effects(exact, image, 1, f, of.decoder.double()))
        total = definition.unit_effects(exact, image, 1, x, basis).sum(dim=0)
        size = float(total.norm())
        near(rest["site"][b], total)
        found = phi.sum()[b] + rest["bias"][b] + rest["error"][b]
        assert float((found.double() - total).norm()) < 1e-5 * max(size, float(rest["error"][b].norm()))
        one = torch.ones(len(x), 1, dtype=torch.float64)
        bias = definition.unit_effects(exact, image, 1, one, of.decoder_bias.double()[None])[0]
        near(rest["bias"][b], bias)


def centred_out(out, o):
    """Let a contribution pass the last LayerNorm with its own mean taken off, and no share of constants."""
    return out(o - o.mean(dim=1, keepdim=True), 1e30)


@pytest.mark.parametrize("kind", ["siglip", "coca"])
def test_units_act_through_a_pooling_attention_as_defined(images, kind):
    model, run = {"siglip": (siglip(), run_siglip), "coca": (coca(), run_coca)}[kind]
    vit = HookedViT(model)
    layer = vit.L - 1  # its MLP is followed by the pooling alone
    of = dictionary("resid.post", layer)
    units = Features(vit, of)
    _, [phi] = second_order(vit, images[:2], [units.fold(vit)])
    rest = Rest(vit, units).effects(images[:2])
    norm = copy.deepcopy(model).double().ln_post if kind == "coca" else None
    for b, image in enumerate(images[:2]):
        _, z, rep, parts = run(model, image, layer)
        if norm is None:
            parts["bare_out"] = lambda o: o
        else:
            parts["bare_out"] = partial(centred_out, parts["out"])
        truth = definition.pooled_unit_effects(parts, encoded(of, z), of.decoder.double(), z, rep)
        near(phi.dense()[b], truth)
        total = definition.pooled_unit_effects(parts, z, torch.eye(48, dtype=torch.float64), z, rep).sum(
            dim=0
        )
        near(rest["site"][b], total)
        near(phi.sum()[b] + rest["bias"][b] + rest["error"][b], total, 3e-5)


def without_means(visual):
    """Take the mean off what neurons and heads write, which no LayerNorm lets through."""
    for block in visual.transformer.resblocks:
        for layer in (block.mlp.c_proj, block.attn.out_proj):
            layer.weight.sub_(layer.weight.mean(dim=0))
    return visual


def of_neurons(visual, layer):
    """The dictionary that is a layer's own neurons."""
    mlp = visual.transformer.resblocks[layer].mlp
    weights = (mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight.T.contiguous(), mlp.c_proj.bias)
    return Dictionary(*weights, site="mlp.out", layer=layer, reads="mlp.in", activation="gelu")


@pytest.mark.parametrize("how", list(ROWS)[:3])
def test_a_dictionary_that_is_the_layers_neurons_has_their_effects_but_for_shares_of_constants(images, how):
    visual = without_means(random_tower(3, **ROWS[how])).double()
    vit = HookedViT(visual)
    units = Features(vit, of_neurons(visual, 2))
    pixels = images[:3].double()
    _, [phi] = second_order(vit, pixels, [units.fold(vit)])
    _, [neurons] = second_order(vit, pixels, [fold(vit, 2)])
    today = neurons.dense() - neurons.kappa[:, None]
    near(phi.dense(), today, 1e-6)
    near(phi.C, neurons.C, 1e-6)
    rest = Rest(vit, units)
    found = rest.effects(pixels)
    near(phi.sum() + found["bias"], found["site"], 1e-6)
    assert float(found["error"].abs().max()) < 1e-6 * float(found["site"].abs().max())
    assert rest.rebuilt() > 1 - 1e-9


def test_with_means_the_units_are_the_ones_that_are_centred(vit, visual, images):
    units = Features(vit, of_neurons(visual, 2))
    _, [phi] = second_order(vit, images[:1], [units.fold(vit)])
    _, [neurons] = second_order(vit, images[:1], [fold(vit, 2)])
    today = neurons.dense() - neurons.kappa[:, None]
    assert float((phi.dense() - today).abs().max()) > 1e-2 * float(today.abs().max())
    exact = copy.deepcopy(visual).double()
    p = definition.run(exact, images[0].double()).p[2]
    w = exact.transformer.resblocks[2].mlp.c_proj.weight.T
    near(phi.dense()[0], definition.unit_effects(exact, images[0].double(), 2, p, w))


def test_pairs_are_the_terms_of_the_neurons_effects(vit, images):
    neurons = fold(vit, 1)
    _, [whole] = second_order(vit, images[:2], [neurons])
    pairs = HeadPairs(vit, 1)
    _, [phi] = second_order(vit, images[:2], [pairs.fold(vit)])
    terms = torch.einsum("bkn,nko->bkno", whole.C, neurons.B())
    near(phi.dense(), terms.flatten(1, 2).double())
    assert pairs.count == 12 * 96 and phi.C.shape == (2, 1, pairs.count)
    near(phi.sum(), (whole.sum() - 96 * whole.kappa).double())


def test_folding_units_leaves_neurons_as_they_are(vit, images):
    first = fold(vit, 2)
    units = Features(vit, dictionary("resid.post", 2))
    both = [units.fold(vit), fold(vit, 2)]
    for name in ("values", "outputs", "constants"):
        assert_close(getattr(both[1], name), getattr(first, name), rtol=0, atol=0)
    _, [_, together] = second_order(vit, images, both)
    _, [alone] = second_order(vit, images, [first])
    assert_close(together.C, alone.C, rtol=0, atol=0)


@pytest.mark.parametrize("tokens, acting", [("class", [0]), ("patches", range(1, 17))])
def test_units_of_some_tokens_act_nowhere_else_and_the_sum_still_closes(vit, visual, images, tokens, acting):
    units = Features(vit, dictionary("resid.post", 1, tokens=tokens))
    _, [phi] = second_order(vit, images[:2], [units.fold(vit)])
    places = phi.p.abs().sum(dim=(0, 2)).nonzero().flatten().tolist()
    assert places == list(acting)
    rest = Rest(vit, units)
    found = rest.effects(images[:2])
    near(phi.sum() + found["bias"] + found["error"], found["site"].double(), 1e-4)
    assert rest.tokens() == 2 * len(acting)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_a_norm_of_the_dictionary_is_undone_in_its_activations(vit, images, norm):
    units = Features(vit, dictionary("resid.post", 1, norm=norm))
    found = Rest(vit, units).effects(images[:2])
    with vit.record(units.site.name) as cache:
        vit(images[:2])
    x = cache[units.site.name]
    _, [phi] = second_order(vit, images[:2], [units.fold(vit)])
    near(phi.sum() + found["bias"] + found["error"], found["site"].double(), 1e-4)
    rebuilt = phi.p @ units.dictionary.decoder + units._bias(cache) * units.dictionary.decoder_bias
    if norm == "layer_norm":
        rebuilt = rebuilt + x.mean(dim=-1, keepdim=True)
    near(units.dictionary.rebuild(x), rebuilt.double())
    near(x - rebuilt, units.error(cache, units.of_cache(cache)).double())


@pytest.mark.parametrize("site", SITES)
def test_a_unit_is_deleted_where_it_writes_and_all_later_blocks_see_it(vit, images, site):
    """Against the running model, whose branch is changed by a hook of its own."""
    units = Features(vit, dictionary(site, 1))
    mean = torch.rand(17, UNITS, generator=torch.Generator().manual_seed(4))
    b, n = torch.tensor([0, 0, 2]), torch.tensor([3, 7, 7])
    lost = Deletions(vit, 1, mean, units)(images[:3], b, n)
    with vit.record(units.site.name) as cache:
        plain = torch.nn.functional.normalize(vit(images[:3]), dim=-1)
    f = torch.relu(cache[units.site.name] @ units.dictionary.encoder.T + units.dictionary.encoder_bias)
    branch = "attn.out" if site == "attn.out" else "mlp.out"  # what is added last before the stream is read
    for pair, (image, unit) in enumerate(zip(b.tolist(), n.tolist(), strict=True)):
        less = (mean[:, unit] - f[image, :, unit])[:, None] * units.vectors[unit]
        with vit.edit({f"blocks.1.{branch}": partial(torch.add, other=less)}):
            without = torch.nn.functional.normalize(vit(images[image : image + 1]), dim=-1)[0]
        near(lost[pair], (100 * (plain[image] - without)).double(), 1e-3)
    assert float(lost.abs().max()) > 1e-3


def test_the_logit_lens_of_units_is_their_vectors_through_the_last_norm(vit, visual):
    units = Features(vit, dictionary("mlp.out", 1))
    w = units.vectors.double()
    exact = copy.deepcopy(visual).double()
    truth = ((w - w.mean(dim=1, keepdim=True)) * exact.ln_post.weight) @ exact.proj
    near(units.direct(vit), truth)
