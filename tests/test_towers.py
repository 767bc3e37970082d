"""Towers that are pooled by attention, CoCa's and SigLIP's: the same representations, and effects by the
definition.
"""

import copy
import json

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from torch import nn
from torch.testing import assert_close

from docs.models import table
from tests import definition
from tests.conftest import ROOT, TINY, random_tower
from tests.launcher import World, run_stage_of_user
from tests.photos import discs, write_mat, write_photos
from utils.concepts import concepts_of_images
from utils.data.images import load_images
from utils.first_order import FirstOrder
from utils.model.clip import load_clip
from utils.model.hooks import HookedViT
from utils.neurons import NeuronLayer
from utils.prs import fold, second_order
from utils.runtime.errors import UserError
from utils.runtime.layers import parse_layers
from utils.runtime.results import Results


def shaken(model, seed=0):
    """The model with every parameter random."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.ndim == 1 else 0.15
        parameter.data = parameter.data + scale * torch.randn_like(parameter)
        assert "meta" not in str(parameter.device), name
    return model.eval().requires_grad_(False)


def siglip(**options):
    """A small SigLIP image tower, as open_clip wraps it."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}
    model = TimmModel.__new__(TimmModel)
    nn.Module.__init__(model)
    model.trunk = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, **(small | options))
    model.head, model.image_size = nn.Sequential(), (32, 32)
    return shaken(model)


def coca():
    """A small CoCa image tower: three queries, of which the first is read."""
    options = {
        "attentional_pool": True,
        "attn_pooler_queries": 3,
        "attn_pooler_heads": 3,
        "heads": 4,
        "output_tokens": True,
    }
    return shaken(random_tower(**options))


def run_siglip(model, image, m):
    """Activations of MLP m, the last residual stream, the representation, and the parts of the definition;
    all in float64.
    """
    trunk, seen = copy.deepcopy(model).double().trunk, []
    handle = trunk.blocks[m].mlp.act.register_forward_hook(
        lambda module, inputs, output: seen.append(output[0])
    )
    z = trunk.patch_embed(image.double()[None]) + trunk.pos_embed
    for block in trunk.blocks:
        z = block(z)
    handle.remove()
    pool, H = trunk.attn_pool, trunk.attn_pool.num_heads
    (W_K, W_V), (b_K, b_V) = pool.kv.weight.chunk(2), pool.kv.bias.chunk(2)
    parts = {"norm": trunk.norm, "q": pool.q(pool.latent)[0, 0].unflatten(0, (H, -1)), "b_O": pool.proj.bias}
    parts |= {
        "W_K": W_K.unflatten(0, (H, -1)),
        "W_V": W_V.unflatten(0, (H, -1)),
        "b_K": b_K.view(H, -1),
        "b_V": b_V.view(H, -1),
    }
    parts |= {"W_O": pool.proj.weight.T.unflatten(0, (H, -1)), "out": lambda o, share: o}
    fc2 = trunk.blocks[m].mlp.fc2
    parts |= {"w": fc2.weight.T, "b_out": fc2.bias, "share": (1 + 2 * len(trunk.blocks)) * fc2.in_features}
    return seen[0], z[0], trunk(image.double()[None])[0], parts


def run_coca(model, image, m):
    """The same of CoCa's."""
    visual, seen = copy.deepcopy(model).double(), []
    handle = visual.transformer.resblocks[m].mlp.gelu.register_forward_hook(
        lambda module, inputs, output: seen.append(output[0])
    )
    z = visual._embeds(image.double()[None])
    for block in visual.transformer.resblocks:
        z = block(z)
    handle.remove()
    pool, attn = visual.attn_pool, visual.attn_pool.attn
    H, e = attn.num_heads, attn.head_dim
    out = pool.attn(pool.ln_q(pool.query)[None], pool.ln_k(z), pool.ln_k(z))[0][0, 0]
    mu, sigma = definition.mean_and_sigma(out, visual.ln_post)
    b_Q, b_K, b_V = attn.in_proj_bias.chunk(3)
    parts = {
        "norm": pool.ln_k,
        "q": (attn.q_proj_weight @ pool.ln_q(pool.query)[0] + b_Q).view(H, e),
        "b_O": attn.out_proj.bias,
    }
    parts |= {"W_K": attn.k_proj_weight.unflatten(0, (H, e)), "W_V": attn.v_proj_weight.unflatten(0, (H, e))}
    parts |= {
        "b_K": b_K.view(H, e),
        "b_V": b_V.view(H, e),
        "W_O": attn.out_proj.weight.T.unflatten(0, (H, e)),
    }
    parts["out"] = lambda o, share: definition.straight(visual, o, mu, sigma, 1 / share)
    c_proj = visual.transformer.resblocks[m].mlp.c_proj
    parts |= {"w": c_proj.weight.T, "b_out": c_proj.bias}
    parts["share"] = (1 + 2 * len(visual.transformer.resblocks)) * c_proj.in_features
    return seen[0], z[0], visual(image.double()[None])[0][0], parts


PLAIN = {  # timm ViTs with a class token or an average, and how open_clip would have its head
    "class token, biased head": {"num_classes": 24},
    "average of norms": {
        "num_classes": 24,
        "global_pool": "avg",
        "fc_norm": False,
        "class_token": False,
        "qkv_bias": False,
    },
    "average": {"num_classes": 24, "global_pool": "avg"},
    "norm before the blocks": {"num_classes": 24, "pre_norm": True, "init_values": 0.3},
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_timm_towers_have_their_own_representations_and_the_effects_of_the_definition(images, kind):
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}
    model = TimmModel.__new__(TimmModel)
    nn.Module.__init__(model)
    model.trunk, model.head, model.image_size = (
        timm.create_model("vit_tiny_patch16_224", **(small | PLAIN[kind])),
        nn.Sequential(),
        (32, 32),
    )
    vit = HookedViT(shaken(model))
    assert_close(vit(images), model(images), rtol=1e-5, atol=1e-5)
    exact = copy.deepcopy(vit.visual).double()
    for layer in (0, 2):
        representation, [phi] = second_order(vit, images[:2], [fold(vit, layer)])
        assert_close(representation, model(images[:2]), rtol=1e-4, atol=1e-5)
        for image, effects in zip(images.double(), phi.dense(), strict=False):
            truth = definition.effects(exact, image, layer)
            assert_close(effects.double(), truth, rtol=0, atol=1e-5 * float(truth.abs().max()))
            total = definition.sum_of_effects(exact, image, layer)
            assert_close(effects.double().sum(dim=0), total, rtol=0, atol=2e-5 * float(total.abs().max()))
    order = FirstOrder(vit)
    with vit.record(*order.activations) as cache:
        representation = vit(images)
    assert_close(
        order.parts(cache, representation).sum(),
        100 * nn.functional.normalize(model(images), dim=1),
        rtol=0,
        atol=1e-3,
    )
    with vit.record("blocks.2.resid.pre") as cache:
        vit(images)
    assert_close(vit.after(1, cache["blocks.2.resid.pre"]), model(images), rtol=1e-5, atol=1e-5)


KINDS = {"siglip": (siglip, run_siglip), "coca": (coca, run_coca)}


@pytest.fixture(scope="module", params=KINDS)
def tower(request):
    make, by_hand = KINDS[request.param]
    model = make()
    return model, HookedViT(model), by_hand


def test_the_representation_is_the_models_own(tower, images):
    model, vit, _ = tower
    expected = model(images)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert_close(vit(images), expected, rtol=1e-5, atol=1e-5)
    assert vit.pooling.name == "attention" and vit.last == vit.L - 1
    for layer in (0, vit.L - 2):
        with vit.record(f"blocks.{layer + 1}.resid.pre") as cache:
            vit(images)
        assert_close(vit.after(layer, cache[f"blocks.{layer + 1}.resid.pre"]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", [0, -1])  # the first MLP, and the last, which has effects here
def test_effects_equal_the_definition(tower, images, where):
    model, vit, by_hand = tower
    layer = range(vit.L)[where]
    _, [phi] = second_order(vit, images[:2], [fold(vit, layer)])
    for image, effects, total in zip(images, phi.dense(), phi.sum(), strict=False):
        p, z, rep, parts = by_hand(model, image, layer)
        truth = definition.pooled_effects(parts, p, z, rep)
        assert_close(effects.double(), truth, rtol=0, atol=1e-5 * float(truth.abs().max()))
        assert_close(
            total.double(), truth.sum(dim=0), rtol=0, atol=1e-5 * float(truth.sum(dim=0).abs().max())
        )


def test_an_effect_is_what_the_frozen_pooling_loses(tower, images):
    """A neuron's output is taken from the last residual stream; probabilities and statistics stay."""
    model, vit, by_hand = tower
    layer = 1
    _, [phi] = second_order(vit, images[:1], [fold(vit, layer)])
    p, z, rep, parts = by_hand(model, images[0], layer)
    mu, sigma = definition.mean_and_sigma(z, parts["norm"])
    x = (z - mu[:, None]) / sigma[:, None] * parts["norm"].weight + parts["norm"].bias
    for n in (3, 50):
        moved = x - p[:, n, None] * parts["w"][n] / sigma[:, None] * parts["norm"].weight
        written = []
        for tokens in (x, moved):
            o = parts["b_O"]
            for h in range(len(parts["q"])):
                k = x @ parts["W_K"][h].T + parts["b_K"][h]
                a = torch.softmax(k @ parts["q"][h] / k.shape[1] ** 0.5, dim=0)
                o = o + a @ (tokens @ parts["W_V"][h].T + parts["b_V"][h]) @ parts["W_O"][h]
            written.append(parts["out"](o, 1))
        lost = 100 * (written[0] - written[1]) / rep.norm()
        assert lost.norm() > 1e-3
        assert_close(
            (phi.dense()[0, n] - phi.kappa[0]).double(),
            lost,
            rtol=1e-3,
            atol=1e-5 * float(phi.dense().abs().max()),
        )


def test_what_the_pooling_heads_mlp_adds_is_measured(images):
    model = siglip()
    share = HookedViT(model).left_out(images)
    trunk = model.trunk
    x = trunk.forward_features(images)
    pool = trunk.attn_pool
    (k, v), q = (
        pool.kv(x).unflatten(-1, (2, pool.num_heads, -1)).permute(2, 0, 3, 1, 4),
        pool.q(pool.latent).unflatten(-1, (4, -1)),
    )
    o = torch.softmax(q.transpose(1, 2) @ k.mT / k.shape[-1] ** 0.5, dim=-1) @ v
    o = pool.proj(o.transpose(1, 2).flatten(2))[:, 0]
    added = pool.mlp(pool.norm(o))
    assert_close(share, added.norm(dim=1) / (o + added).norm(dim=1), rtol=1e-4, atol=1e-5)
    assert HookedViT(coca()).left_out(images) is None


def test_layers_go_to_the_last_one(tower):
    _, vit, _ = tower
    assert parse_layers(["all"], vit) == list(range(vit.L))
    with pytest.raises(UserError, match=f"layers with effects are 0 to {vit.L - 1}"):
        parse_layers([vit.L], vit)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"qk_norm": True}, "normalised queries and keys"),
        ({"global_pool": "avg"}, "more layers around its blocks"),
        ({"class_token": True}, "whose pooling leaves the class token out"),
        ({"reg_tokens": 2}, "register tokens"),
        ({"final_norm": False}, "without a last LayerNorm"),
    ],
)
def test_other_timm_towers_are_refused_with_the_reason(options, reason):
    with pytest.raises(UserError, match=reason):
        HookedViT(siglip(**options))


def test_a_timm_tower_that_is_no_vit_is_refused():
    model = TimmModel.__new__(TimmModel)
    nn.Module.__init__(model)
    model.trunk, model.head = timm.create_model("convnext_atto", num_classes=0), nn.Sequential()
    with pytest.raises(UserError, match="ConvNeXt, which has no attention; choose"):
        HookedViT(model)


POOLINGS = {
    "average": {"pool_type": "avg", "final_ln_after_pool": True},
    "average of norms": {"pool_type": "avg"},
    "attention": {
        "attentional_pool": True,
        "attn_pooler_queries": 3,
        "attn_pooler_heads": 3,
        "output_tokens": True,
    },
}


@pytest.mark.parametrize("kind", POOLINGS)
def test_every_stage_runs_on_every_kind_of_pooling(tmp_path, kind):
    """From images to descriptions, segmentation, the notebooks' class and concepts; accuracies as numpy has
    them.
    """
    (tmp_path / "tiny.json").write_text(
        json.dumps({**TINY, "vision_cfg": TINY["vision_cfg"] | POOLINGS[kind]})
    )
    world = World(tmp_path, str(tmp_path / "tiny.json"), per_class=4)
    write_mat(tmp_path / "discs.mat", *discs(4))
    for name in (
        "classifier",
        "representations",
        "full",
        "pcas",
        "ablations",
        "texts",
        "decomposition",
        "segmentation",
    ):
        world.run(name, world.base)
    world.run("full", world.base, "--split", "val")
    world.run("segmentation", world.base, "--method", "attention")
    clip = load_clip(str(tmp_path / "tiny.json"), "random", "cpu")
    assert clip.vit.pooling.name == kind
    results, layer = Results(world.base, str(tmp_path / "tiny.json"), "random"), clip.vit.last
    images = load_images("folder", world.photos, "val", clip.transform)
    names = {"dataset": "folder", "layer": layer, "k": 5}
    read = {
        part: results.load(part, split="val", **names).astype(float)
        for part in ("coefficients", "values", "outputs", "bias")
    }
    phi = (
        np.einsum("ikn,kne,keo->ino", read["coefficients"], read["values"], read["outputs"])
        + read["bias"][:, None]
    )
    mean, classifier = (
        results.load("mean", **names).astype(float),
        results.load("classifier", dataset="folder").astype(float),
    )
    with torch.inference_mode():
        unit = (
            100
            * torch.nn.functional.normalize(
                clip.vit(torch.stack([pixels for pixels, _ in images])), dim=1
            ).numpy()
        )
    predicted = ((unit - phi.sum(axis=1) + mean.sum(axis=0)) @ classifier).argmax(axis=1)
    layers = list(range(clip.vit.last + 1))
    content = json.loads(
        results.path("ablations", dataset="folder", split="val", layer=layers, k=5).read_text()
    )
    assert content["accuracy"][str(layer)]["without all effects"] == 100 * (predicted == images.labels).mean()
    neurons = NeuronLayer(
        clip, results, images, layer=layer, described={"texts": "words", "components": 8}, k=5
    )
    assert len(neurons.top_images(3, 4)) == 4 and neurons.card(3, pictures=4, words=3).axes
    phi = neurons.effects(torch.stack([images[0][0]]))
    [found] = concepts_of_images(
        phi, neurons.centred_norms, neurons.statistics.thresholds, neurons.descriptions
    )
    assert found.words == sorted(found.words, key=lambda item: (-item[1], item[0]))


def test_the_stages_run_on_a_siglip_of_real_size(tmp_path):
    """Random weights; its tokenizer, which would come from the hub, is not asked for."""
    photos = write_photos(tmp_path / "photos", per_class=2, side=64)
    model = [
        "--model",
        "ViT-B-16-SigLIP",
        "--pretrained",
        "random",
        "--output_dir",
        tmp_path / "out",
        "--device",
        "cpu",
    ]
    data = ["--dataset", "folder", "--data_path", photos, "--batch_size", 8, "--num_workers", 0]
    effects = ["compute_second_order_neuron_prs.py", *model, *data, "--mlp_layer", 11]
    said = run_stage_of_user(*effects, "--split", "train", folder=tmp_path).stdout
    assert "the MLP after the pooling attention, which effects leave out, makes" in said
    run_stage_of_user(
        "compute_pcas.py",
        *model,
        "--dataset",
        "folder",
        "--mlp_layer",
        "all",
        "--top_k_pca",
        5,
        folder=tmp_path,
    )
    base = "folder_train_mlps_ViT-B-16-SigLIP_random_11_"
    shapes = {
        name: np.load(tmp_path / "out" / f"{base}{name}.npy").shape
        for name in ("coefficients", "outputs", "5_pca")
    }
    assert shapes == {"coefficients": (8, 12, 3072), "outputs": (12, 64, 768), "5_pca": (3072, 768)}
    texts = ["compute_text_set_projection.py", *model, "--text_descriptions", tmp_path / "words.txt"]
    (tmp_path / "words.txt").write_text("a dog\nthe sea\n")
    refused = run_stage_of_user(*texts, folder=tmp_path, check=False)
    assert refused.returncode == 1 and refused.stderr.startswith(
        "error: the tokenizer of --model ViT-B-16-SigLIP could not be loaded"
    )


def test_the_table_of_configurations_is_that_of_the_installed_open_clip():
    stored = (ROOT / "docs" / "models.md").read_text().splitlines()
    if f"open_clip {open_clip.__version__}:" not in stored[2]:
        pytest.skip(f"docs/models.md is of another version than open_clip {open_clip.__version__}")
    of_open_clip = stored[: stored.index("# Hugging Face's types of model") - 1]
    assert table() == of_open_clip
    assert sum("| exact" in line for line in of_open_clip) == 126
