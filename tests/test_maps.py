"""Every segmentation method on every kind of pooling: the maps of the definition, or a refusal by name."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from torch import nn
from torch.testing import assert_close

from tests import definition
from tests.conftest import TINY, random_tower
from tests.launcher import run_stage_of_user
from tests.photos import discs, write_mat
from tests.test_towers import coca, run_coca, run_siglip, shaken, siglip
from utils.data.segmentation_row import Row
from utils.model.clip import load_clip
from utils.model.hooks import HookedViT
from utils.runtime.errors import UserError
from utils.runtime.results import Results
from utils.segmentation import METHODS, choose_method

LAYERS = (0, 2)
TOP = 9
CLASSES = 5
FIRST = 1  # number of the first image that the methods are given


def timm_tower(**options):
    """A small timm ViT without a class token, as open_clip wraps it; it averages its patches."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}
    options = {"num_classes": 24, "global_pool": "avg", "class_token": False, "init_values": 0.3, **options}
    model = TimmModel.__new__(TimmModel)
    nn.Module.__init__(model)
    model.trunk = timm.create_model("vit_tiny_patch16_224", **small, **options)
    model.head = nn.Sequential()
    model.image_size = (32, 32)
    return shaken(model)


AVERAGE = {"pool_type": "avg", "final_ln_after_pool": True}
TOWERS = {  # kind: (a function that makes the tower, its pooling, tokens before the 16 patches)
    "class token": (random_tower, "class token", 1),
    "average with class token": (lambda: random_tower(**AVERAGE), "average", 1),
    "average without class token": (timm_tower, "average", 0),
    "norms with class token": (lambda: random_tower(pool_type="avg"), "average of norms", 1),
    "norms without class token": (lambda: timm_tower(fc_norm=False), "average of norms", 0),
    "attention with class token": (coca, "attention", 1),
    "attention without class token": (siglip, "attention", 0),
}
POOLED = {"attention with class token": run_coca, "attention without class token": run_siglip}
OF_POOLED = ("second_order", "random", "attention")  # the methods that pooling by attention has


def run_pooled(by_hand, model, layers, image, classifier):
    """One image through a tower that pools by attention, in float64.

    Gives `p` [L, T, N], `end` [T, d] (the last residual stream), `pool` (the parts that
    `definition.pooled_effects` takes), `rep` [D], and `column` [D] of the class that it predicts.
    """
    runs = [by_hand(model, image, m) for m in range(layers)]
    _, end, rep, pool = runs[0]
    column = classifier[:, int((rep @ classifier).argmax())]
    p = torch.stack([run[0] for run in runs])
    return SimpleNamespace(p=p, end=end, pool=pool, rep=rep, column=column)


def run_tokens(visual, image, classifier):
    """One image through a tower that reads the class token or an average, in float64.

    Gives `visual`, `p`, `rep` and `column` as above, `z` (L+1 of [T, d]), `mlps` [T, d] (what all MLPs add),
    `A` [L, H, T, T], `gradient` [L, H, T, T] of the class score by `A`, `reads` (as `definition.reads` gives
    them), and `read` [T], the uniform average over the tokens that the output reads.
    """
    z, A, p, mlps = [visual._embeds(image[None])[0]], [], [], []
    for block in visual.transformer.resblocks:
        W_Q, W_K, W_V, b_Q, b_K, b_V, W_O = definition.heads(block.attn)
        x = block.ln_1(z[-1])
        q, k, v = (x @ W + b[:, None] for W, b in ((W_Q, b_Q), (W_K, b_K), (W_V, b_V)))  # [H, T, e]
        pattern = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        A.append(pattern if pattern.requires_grad else pattern.requires_grad_())
        middle = z[-1] + block.ls_1(((A[-1] @ v) @ W_O).sum(dim=0) + block.attn.out_proj.bias)
        p.append(block.mlp.gelu(block.mlp.c_fc(block.ln_2(middle))))
        mlps.append(block.ls_2(block.mlp.c_proj(p[-1])))
        z.append(middle + mlps[-1])
    reads = definition.reads(visual, z[-1])
    rep = sum(w * definition.straight(visual, z[-1][q], mu, sigma) for q, w, mu, sigma in reads)
    column = classifier[:, int((rep @ classifier).argmax())]
    gradient = torch.autograd.grad(rep @ column / (rep.norm() * column.norm()), A)
    read = torch.zeros(len(z[0]), dtype=torch.float64)
    read[[q for q, *_ in reads]] = 1 / len(reads)
    return SimpleNamespace(
        visual=visual,
        p=torch.stack(p).detach(),
        rep=rep.detach(),
        column=column,
        z=[each.detach() for each in z],
        mlps=sum(mlps).detach(),
        A=torch.stack(A).detach(),
        gradient=torch.stack(gradient),
        reads=[(q, w, mu.detach(), sigma.detach()) for q, w, mu, sigma in reads],
        read=read,
    )


def of_second_order(run, image, pcas):
    """The mean activation of the neurons whose first component lies most along the class."""
    products = [(abs(float(r.double() @ run.column)), l, n) for l in LAYERS for n, r in enumerate(pcas[l])]
    return sum(run.p[l, :, n] for _, l, n in sorted(products, reverse=True)[:TOP]) / TOP


def of_random(run, image, pcas):
    """The mean activation of random neurons, which depend on the seed and the image's number."""
    total = len(LAYERS) * run.p.shape[2]
    chosen = np.random.default_rng((4, image)).choice(total, TOP, replace=False)
    return sum(run.p[LAYERS[n // run.p.shape[2]], :, n % run.p.shape[2]] for n in chosen.tolist()) / TOP


def of_attention(run, image, pcas):
    """The last attention's rows, weighted as the output weighs the tokens, averaged over heads."""
    if hasattr(run, "pool"):
        pool = run.pool
        mu, sigma = definition.mean_and_sigma(run.end, pool["norm"])
        x = (run.end - mu[:, None]) / sigma[:, None] * pool["norm"].weight + pool["norm"].bias
        heads = zip(pool["q"], pool["W_K"], pool["b_K"], strict=True)
        scores = [(x @ W_K.T + b_K) @ q for q, W_K, b_K in heads]
        return torch.softmax(torch.stack(scores) / pool["q"].shape[1] ** 0.5, dim=1).mean(dim=0)
    rows = sum(weight / sigma * run.A[-1][:, q] for q, weight, _, sigma in run.reads)  # [H, T]
    return rows.mean(dim=0) / sum(weight / sigma for _, weight, _, sigma in run.reads)


def of_pairs(run, image, pcas):
    """What the neuron-head pairs of each layer that write most along the class take from every token."""
    visual = run.visual
    blocks = visual.transformer.resblocks
    sizes = [(w / sigma) for _, w, _, sigma in run.reads]
    found = torch.zeros(len(run.read), dtype=torch.float64)
    for m in LAYERS:
        scale = torch.as_tensor(definition.scale_of(blocks[m].ls_2)).reshape(-1, 1)
        w = (blocks[m].mlp.c_proj.weight * scale).T
        pairs = []
        for l in range(m + 1, len(blocks)):
            _, _, W_V, _, _, _, W_O = definition.heads(blocks[l].attn)
            for h in range(len(W_V)):
                B = (w * blocks[l].ln_1.weight) @ W_V[h] @ W_O[h] * definition.scale_of(blocks[l].ls_1)
                along = (B * visual.ln_post.weight) @ visual.proj @ run.column  # [N]
                rows = zip(sizes, run.reads, strict=True)
                a = sum(size * run.A[l][h][q] for size, (q, *_) in rows) / sum(sizes)
                pairs += [(float(b), a * run.p[m, :, n] * b) for n, b in enumerate(along)]
        found += sum(of for _, of in sorted(pairs, key=lambda pair: -pair[0])[:TOP])
    return found


def of_rollout(run, image, pcas):
    """The product over layers of (A + 1) / 2."""
    one = torch.eye(run.A.shape[-1], dtype=torch.float64)
    product = one
    for A in run.A:
        product = (A.mean(dim=0) + one) / 2 @ product
    return run.read @ product


def of_first_order(run, image, pcas):
    """What all heads take from every token, through the last LayerNorm as it was; the rest closes the sum."""
    visual = run.visual
    found = torch.zeros(len(run.read), dtype=torch.float64)
    for l, block in enumerate(visual.transformer.resblocks):
        _, _, W_V, _, _, b_V, W_O = definition.heads(block.attn)
        x = block.ln_1(run.z[l])
        for h in range(len(W_V)):
            written = (x @ W_V[h] + b_V[h]) @ W_O[h] + block.attn.out_proj.bias / len(W_V)  # [T, d]
            written = definition.scale_of(block.ls_1) * written
            for q, w, _, sigma in run.reads:
                parts = run.A[l][h][q][:, None] * written
                parts = (parts - parts.mean(dim=1, keepdim=True)) / sigma * visual.ln_post.weight
                found += w * (parts @ visual.proj) @ run.column
    rest = 0
    for q, w, _, sigma in run.reads:
        other = run.z[0][q] + run.mlps[q]
        rest = rest + w * definition.straight(visual, other, other.mean(), sigma)
    assert_close(found.sum(), (run.rep - rest) @ run.column, rtol=1e-9, atol=1e-9)
    return 100 / run.rep.norm() * found


def of_gradcam(run, image, pcas):
    """The last attention, each head weighted by its mean gradient over patches."""
    patches = slice(len(run.read) - 16, None)
    heads = zip(run.A[-1], run.gradient[-1], strict=True)
    weighted = [(run.read @ gradient)[patches].mean() * (run.read @ A) for A, gradient in heads]
    return (sum(weighted) / len(weighted)).clamp_min(0)


def of_chefer(run, image, pcas):
    """The product over layers of 1 + the mean over heads of the positive part of gradient * A."""
    product = torch.eye(run.A.shape[-1], dtype=torch.float64)
    for A, gradient in zip(run.A, run.gradient, strict=True):
        product = product + (gradient * A).clamp_min(0).mean(dim=0) @ product
    return run.read @ product


DEFINITIONS = {name: globals()[f"of_{name}"] for name in METHODS}


@pytest.fixture(scope="module", params=TOWERS)
def world(request, tmp_path_factory, images):
    """A tower, the files that methods read, and two images by hand."""
    make, pooling, prefix = TOWERS[request.param]
    model = make()
    vit = HookedViT(model)
    assert (vit.pooling.name, vit.prefix) == (pooling, prefix)
    generator = torch.Generator().manual_seed(3)
    classifier = nn.functional.normalize(torch.randn(vit.D, CLASSES, generator=generator), dim=0)
    pcas = {l: nn.functional.normalize(torch.randn(vit.N, vit.D, generator=generator), dim=1) for l in LAYERS}
    results = Results(tmp_path_factory.mktemp("maps"), "tiny", "random")
    np.save(results.path("classifier", dataset="imagenet"), classifier)
    for l, r in pcas.items():
        np.save(results.path("pca", dataset="imagenet", layer=l, k=100), r)
    exact = copy.deepcopy(vit.visual).double()
    columns = classifier.double()
    if by_hand := POOLED.get(request.param):
        runs = [run_pooled(by_hand, model, vit.L, image, columns) for image in images[:2]]
    else:
        runs = [run_tokens(exact, image.double(), columns) for image in images[:2]]
    for run, own in zip(runs, tower_itself(model, images[:2]), strict=True):
        assert_close(run.rep.float(), own, rtol=1e-4, atol=1e-5)
    return SimpleNamespace(vit=vit, results=results, pcas=pcas, runs=runs)


def tower_itself(model, images):
    """The representations that the model gives without this project's code."""
    output = model(images)
    return output[0] if isinstance(output, tuple) else output


def chosen(world, method):
    row = Row(method, layers=LAYERS, top_neurons=TOP, seed=4)
    clip = SimpleNamespace(
        vit=world.vit, device="cpu", fingerprint="0" * 12, expected={"fingerprint": "0" * 12}
    )
    return choose_method(row, clip, world.results, world.results, images=FIRST + 2)[0]


@pytest.mark.parametrize("method", METHODS)
def test_maps_equal_the_definition_or_the_method_is_refused(world, images, method):
    if world.vit.pooling.name == "attention" and method not in OF_POOLED:
        with pytest.raises(UserError, match=f"--method {method} is not for towers that pool .* by attention"):
            chosen(world, method)
        return
    with torch.inference_mode():  # as the stage runs them
        maps = chosen(world, method)(images[:2], FIRST).double()
    assert maps.shape == (2, 16)
    runs = enumerate(world.runs, start=FIRST)
    expected = torch.stack([DEFINITIONS[method](run, image, world.pcas)[-16:] for image, run in runs])
    largest = float(expected.abs().max())
    assert largest > 0
    assert_close(maps, expected, rtol=0, atol=1e-5 * largest)


def stage(tmp_path, vision, method):
    """Run the script with a tiny model; returns how it ended and the folder of its results."""
    model = tmp_path / "tiny.json"
    model.write_text(json.dumps({**TINY, "vision_cfg": vision}))
    write_mat(tmp_path / "discs.mat", *discs(4))
    output = tmp_path / "out"
    flags = ["--model", model, "--pretrained", "random", "--device", "cpu", "--num_workers", 0]
    flags += ["--data_path", tmp_path / "discs.mat", "--output_dir", output, "--method", method]
    return run_stage_of_user("compute_segmentation.py", *flags, folder=tmp_path, check=False), output


@pytest.mark.parametrize("method", [method for method in METHODS if method not in OF_POOLED])
def test_a_refused_method_ends_the_stage_in_one_line(tmp_path, method):
    pool = {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 3, "output_tokens": True}
    done, output = stage(tmp_path, TINY["vision_cfg"] | pool, method)
    assert done.returncode == 1 and done.stderr.startswith(f"error: --method {method} is not for towers")
    assert done.stderr.count("\n") == 1 and list(output.iterdir()) == []


def test_the_stage_stores_the_maps_of_all_patches_of_a_tower_without_a_class_token(tmp_path):
    """Rollout of a tower of open_clip's table."""
    timm_config = {"timm_model_name": "vit_medium_patch16_gap_256", "timm_pool": "avg", "timm_proj": "linear"}
    done, output = stage(tmp_path, {"image_size": 256, **timm_config}, "rollout")
    assert done.returncode == 0, done.stderr
    maps = np.load(output / "discs_segmentation_tiny_random_rollout_maps.npy")
    clip = load_clip(str(tmp_path / "tiny.json"), "random", "cpu", image_only=True)
    assert clip.vit.prefix == 0 and maps.shape == (4, 256)
    assert (maps > 0).all() and np.allclose(maps.sum(axis=1), 1)  # no patch is left out
