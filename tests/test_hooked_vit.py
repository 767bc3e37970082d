"""Recorded activations are those of the running model, and no hook stays behind."""

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from torch.testing import assert_close

from tests.conftest import random_tower
from utils.model.hooks import HookedViT
from utils.runtime.errors import UserError


def hooks(visual):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in visual.modules())


def test_attention_rows_equal_those_of_the_running_model(vit, visual, images):
    rows = {}

    def keep(module, arguments, keywords, output):
        weights = module(*arguments, **{**keywords, "need_weights": True, "average_attn_weights": False})[1]
        rows[names[module]] = weights[:, :, 0]

    names = {block.attn: l for l, block in enumerate(visual.transformer.resblocks)}
    handles = []

    class Once:  # the hook calls the module, which must not call the hook again
        def __init__(self):
            self.inside = False

        def __call__(self, *arguments):
            if not self.inside:
                self.inside = True
                keep(*arguments)
                self.inside = False

    for module in names:
        handles.append(module.register_forward_hook(Once(), with_kwargs=True))
    visual(images)
    for handle in handles:
        handle.remove()
    with vit.record("*.attn.row") as cache:
        vit(images)
    assert len(rows) == vit.L
    for l, row in rows.items():
        assert_close(cache[f"blocks.{l}.attn.row"], row, rtol=1e-5, atol=1e-6)


def test_norm_statistics_reproduce_the_output_of_the_norms(vit, visual, images):
    seen = {}
    modules = {f"blocks.{l}.ln1": block.ln_1 for l, block in enumerate(visual.transformer.resblocks)}
    modules["ln_post"] = visual.ln_post
    handles = [
        module.register_forward_hook(lambda m, x, y, name=name: seen.__setitem__(name, (x[0], y)))
        for name, module in modules.items()
    ]
    with vit.record("*.mean", "*.std") as cache:
        vit(images)
    for handle in handles:
        handle.remove()
    for name, module in modules.items():
        x, y = seen[name]
        if name == "ln_post":
            x, y = x[:, 0], y[:, 0]
        mean, std = cache[f"{name}.mean"][..., None], cache[f"{name}.std"][..., None]
        assert_close((x - mean) / std * module.weight + module.bias, y, rtol=1e-4, atol=1e-5)


def test_post_activations_reproduce_the_output_of_the_mlp(vit, visual, images):
    seen = {}
    block = visual.transformer.resblocks[2]
    handle = block.mlp.register_forward_hook(lambda m, x, y: seen.__setitem__("out", y))
    with vit.record("blocks.2.mlp.post") as cache:
        vit(images)
    handle.remove()
    assert list(cache) == ["blocks.2.mlp.post"]
    assert_close(block.mlp.c_proj(cache["blocks.2.mlp.post"]), seen["out"])


def test_recording_leaves_no_trace(vit, visual, images):
    before = visual(images)
    with vit.record("*"):
        during = vit(images)
    assert hooks(visual) == 0
    assert torch.equal(before, during) and torch.equal(before, visual(images))


def test_an_exception_while_recording_leaves_no_trace(vit, visual, images):
    before = visual(images)
    with pytest.raises(RuntimeError), vit.record("*"):
        assert hooks(visual) > 0
        vit(images[:, :1])  # a wrong number of channels
    assert hooks(visual) == 0
    assert torch.equal(before, visual(images))


def test_the_last_mlp_on_the_class_token_alone_gives_the_representation(vit, visual, images):
    last = f"blocks.{vit.L - 1}.mlp.post"
    before = visual(images)
    with vit.record(last) as all_tokens:
        vit(images)
    with vit.record(last) as class_token, vit.class_token_last():
        representation = vit(images)
    assert all_tokens[last].shape[1] == vit.T and class_token[last].shape[1] == 1
    assert_close(class_token[last][:, 0], all_tokens[last][:, 0], rtol=0, atol=1e-5)
    assert_close(representation, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    with pytest.raises(RuntimeError), vit.class_token_last():
        vit(images[:, :1])  # a wrong number of channels
    assert hooks(visual) == 0
    assert torch.equal(before, visual(images))


def test_an_unknown_activation_is_refused(vit, visual):
    with pytest.raises(KeyError, match="mlp.pre"), vit.record("blocks.0.mlp.pre"):
        pass
    assert hooks(visual) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pool_type": "none"}, "neither the class token nor an average"),
        ({"attentional_pool": "cascade", "heads": 4, "attn_pooler_heads": 4}, "several queries"),
        ({"qk_norm": True}, "CustomResidualAttentionBlock"),
    ],
)
def test_towers_that_the_method_does_not_cover_are_refused(options, reason):
    with pytest.raises(UserError, match=reason):
        HookedViT(random_tower(**options))


def test_a_tower_of_an_unknown_class_is_refused():
    class Other(ModifiedResNet):
        pass

    with pytest.raises(UserError, match="is a Other and not open_clip's own VisionTransformer"):
        HookedViT(Other([1, 1, 1, 1], output_dim=24, heads=4, image_size=64, width=4))
