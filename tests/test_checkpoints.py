"""Checkpoints as people have them give the weights that are in them; others are refused in one line."""

import argparse
import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import TINY
from utils.model.checkpoints import read_checkpoint
from utils.model.clip import load_clip
from utils.model.texts import text_vectors, too_long
from utils.runtime.errors import UserError

HF_SHAPES = {  # of a CLIPModel: wide and narrow projections, both activations
    "wide": {
        "projection_dim": 40,
        "hidden_act": "quick_gelu",
        "width": 32,
        "heads": 4,
        "text_width": 24,
        "side": 32,
        "patch": 8,
    },
    "narrow": {
        "projection_dim": 16,
        "hidden_act": "gelu",
        "width": 48,
        "heads": 3,
        "text_width": 32,
        "side": 24,
        "patch": 6,
    },
}


@pytest.fixture(scope="module")
def state(tiny_model):
    return load_clip(tiny_model, "random", "cpu", seed=7).text.state_dict()


@pytest.fixture(scope="module")
def fingerprint(tiny_model):
    return load_clip(tiny_model, "random", "cpu", seed=7).fingerprint


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


WRAPPED = {
    "plain": lambda state: state,
    "epoch": lambda state: {
        "epoch": 3,
        "name": "x",
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": []},
    },
    "model": lambda state: {"model": state, "epoch": 1},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "ema in a wrapper": lambda state: {"state_dict": {"ema": state}},
    "net": lambda state: {"net": prefixed(state, "module.")},
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "compiled and parallel": lambda state: prefixed(state, "module._orig_mod."),
    "lightning": lambda state: {"state_dict": prefixed(state, "model."), "hyper_parameters": {"lr": 0.1}},
    "any prefix": lambda state: prefixed(state, "student.backbone."),
    "numpy numbers": lambda state: {
        "state_dict": state,
        "best": np.float64(0.5),
        "step": np.int64(3),
        "old": np.float32(1),
    },
    "half": lambda state: {name: value.half() for name, value in state.items()},
    "custom text": lambda state: {
        name if name.startswith(("visual.", "logit")) else f"text.{name}": value
        for name, value in state.items()
    },
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_state_dict_is_found_wherever_it_lies(tiny_model, state, fingerprint, tmp_path, kind):
    torch.save(WRAPPED[kind](state), tmp_path / "weights.ckpt")
    found = load_clip(tiny_model, str(tmp_path / "weights.ckpt"), "cpu")
    for name, value in found.text.state_dict().items():
        torch.testing.assert_close(
            value, state[name].half().float() if kind == "half" else state[name], rtol=0, atol=0
        )
    assert (found.fingerprint == fingerprint) == (kind != "half")


@pytest.mark.parametrize("ending", [".pt", ".bin", ".safetensors", ".weights"])
def test_a_file_is_judged_by_its_content_and_not_by_its_ending(
    tiny_model, state, fingerprint, tmp_path, ending
):
    torch.save(state, tmp_path / f"a{ending}")
    save_file(state, tmp_path / f"b{ending}")
    for name in "ab":
        assert load_clip(tiny_model, f"{tmp_path}/{name}{ending}", "cpu").fingerprint == fingerprint


def test_half_precision_fits_another_image_size(tiny_model, state, tmp_path):
    config = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "image_size": 48}}
    (tmp_path / "larger.json").write_text(json.dumps(config))
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pt")
    clip = load_clip(str(tmp_path / "larger.json"), str(tmp_path / "half.pt"), "cpu")
    assert clip.vit.visual.positional_embedding.shape == (37, 48)
    torch.testing.assert_close(clip.vit.visual.proj, state["visual.proj"].half().float())


REFUSED = {
    "an object": (
        lambda state: {"state_dict": state, "args": argparse.Namespace(lr=1)},
        "holds a argparse.Namespace.*weights_only",
    ),
    "code": (lambda state: {"state_dict": print}, "holds a .*print, and nothing but tensors"),
    "no weights": (
        lambda state: {"epoch": 3, "optimizer": {}},
        "has no state dict; it has epoch, optimizer",
    ),
    "two prefixes": (
        lambda state: {
            f"{'a' if i % 2 else 'b'}.{name}": value for i, (name, value) in enumerate(state.items())
        },
        "does not fit the model: .* is missing",
    ),
    "more layers": (
        lambda state: {**state, "visual.transformer.resblocks.5.ln_1.bias": torch.ones(48)},
        "does not fit the model: it has visual.transformer.resblocks.5.ln_1.bias",
    ),
    "the image tower alone": (
        lambda state: {name: value for name, value in state.items() if name.startswith("visual.")},
        "has no text tower, and texts are embedded here; give a checkpoint that has one",
    ),
    "a part of the image tower": (
        lambda state: {name: value for name, value in state.items() if name != "visual.proj"},
        "does not fit the model: visual.proj is missing",
    ),
    "a part of the text tower": (
        lambda state: {name: value for name, value in state.items() if name != "text_projection"},
        "does not fit the model: text_projection is missing",
    ),
    "NaN": (lambda state: {**state, "visual.proj": state["visual.proj"] * torch.nan}, "hold NaN or infinity"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line_that_says_why(tiny_model, state, tmp_path, kind):
    make, said = REFUSED[kind]
    torch.save(make(state), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=said) as error:
        load_clip(tiny_model, str(tmp_path / "weights.pt"), "cpu")
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_torchscript_archives_and_folders_are_named(tiny_model, tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "jit.pt")
    with pytest.raises(UserError, match="is a TorchScript archive.*--pretrained openai"):
        load_clip(tiny_model, str(tmp_path / "jit.pt"), "cpu")
    with pytest.raises(UserError, match="is a folder; .*--model local-dir:"):
        load_clip(tiny_model, f"{tmp_path}/", "cpu")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "cut.pt")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("openai/clip-vit-base-patch32", "--model hf:openai/clip-vit-base-patch32"),
        ("ViT-B/32", "use --model ViT-B-32"),
        ("{folder}", "use --model local-dir:"),
        ("hf:nobody/nothing", "neither in the local cache nor could it be fetched"),
    ],
)
def test_common_mistakes_say_what_to_type(tmp_path, monkeypatch, model, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=said) as error:
        load_clip(model.format(folder=tmp_path), "openai", "cpu")
    assert "\n" not in str(error.value)


# Hugging Face's CLIPModel


def save_hugging_face(folder, shape, preprocess=None):
    """A random CLIPModel in a folder, and the model."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(3)
    vision = {"hidden_size": shape["width"], "intermediate_size": 2 * shape["width"], "num_hidden_layers": 3}
    vision |= {
        "num_attention_heads": shape["heads"],
        "image_size": shape["side"],
        "patch_size": shape["patch"],
    }
    text = {
        "hidden_size": shape["text_width"],
        "intermediate_size": 3 * shape["text_width"],
        "num_hidden_layers": 2,
    }
    text |= {
        "num_attention_heads": 4,
        "vocab_size": 49408,
        "max_position_embeddings": 20,
        "eos_token_id": 49407,
    }
    act = {"hidden_act": shape["hidden_act"]}
    config = transformers.CLIPConfig(
        vision_config={**vision, **act}, text_config={**text, **act}, projection_dim=shape["projection_dim"]
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if preprocess:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocess))
    return model


def assert_same_embeddings(clip, model, shape):
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(4, 3, shape["side"], shape["side"], generator=generator)
    tokens = torch.randint(1, 49405, (3, 20), generator=generator)
    tokens[:, 12], tokens[:, 13:] = 49407, 0
    with torch.no_grad():
        images, texts = model.get_image_features(pixels), model.get_text_features(tokens)
        images, texts = (getattr(found, "pooler_output", found) for found in (images, texts))
        torch.testing.assert_close(clip.vit(pixels), images, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(clip.text.encode_text(tokens), texts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HF_SHAPES)
def test_a_folder_of_a_hugging_face_clip_is_loaded_into_open_clips_towers(tmp_path, name):
    shape, preprocess = (
        HF_SHAPES[name],
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 2},
    )
    preprocess |= {"size": shape["side"], "crop_size": shape["side"]}
    model = save_hugging_face(tmp_path / "mine", shape, preprocess)
    clip = load_clip(f"local-dir:{tmp_path / 'mine'}", "ignored", "cpu")
    assert_same_embeddings(clip, model, shape)
    steps = clip.transform.transforms
    assert tuple(steps[-1].mean) == (0.1, 0.2, 0.3) and steps[1].interpolation.value == "bilinear"
    assert clip.record["model"] == "mine" and clip.record["pretrained"] == "local-dir"


def test_weights_of_a_hugging_face_clip_fit_an_open_clip_model_of_their_shape(tmp_path):
    shape = HF_SHAPES["narrow"]
    preprocess = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "size": 24, "crop_size": 24}
    model = save_hugging_face(tmp_path / "hf", shape, preprocess)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 24, "patch_size": 6, "width": 48, "head_width": 16, "layers": 3},
    }
    config["vision_cfg"]["mlp_ratio"] = 2.0
    config["text_cfg"] = {
        "context_length": 20,
        "vocab_size": 49408,
        "width": 32,
        "heads": 4,
        "layers": 2,
        "mlp_ratio": 3.0,
    }
    (tmp_path / "same.json").write_text(json.dumps(config))
    clip = load_clip(str(tmp_path / "same.json"), str(tmp_path / "hf" / "model.safetensors"), "cpu")
    assert_same_embeddings(clip, model, shape)
    assert tuple(clip.transform.transforms[-1].std) == (0.5, 0.6, 0.7)
    (tmp_path / "quick.json").write_text(json.dumps({**config, "quick_gelu": True}))
    with pytest.raises(
        UserError,
        match="was trained with GELU, says the config beside it; use the --model without -quickgelu",
    ):
        load_clip(str(tmp_path / "quick.json"), str(tmp_path / "hf" / "model.safetensors"), "cpu")
    with pytest.raises(UserError, match="--model local-dir:"):
        load_clip(str(tmp_path / "hf" / "config.json"), "random", "cpu")


def test_a_hugging_face_id_is_read_from_the_local_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--clip" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--clip" / "refs").mkdir()
    (tmp_path / "models--some--clip" / "refs" / "main").write_text("0123")
    model = save_hugging_face(snapshot, HF_SHAPES["wide"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    clip = load_clip("hf:some/clip", "openai", "cpu")
    assert_same_embeddings(clip, model, HF_SHAPES["wide"])
    assert clip.record["model"] == "some-clip" and clip.record["pretrained"] == "hf"


def test_the_config_beside_a_hub_file_of_open_clip_gives_the_preprocessing(tiny_model, state, tmp_path):
    save_file(state, tmp_path / "open_clip_model.safetensors")
    beside = {
        "model_cfg": TINY,
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "interpolation": "bilinear"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(beside))
    steps = load_clip(tiny_model, str(tmp_path / "open_clip_model.safetensors"), "cpu").transform.transforms
    assert tuple(steps[-1].mean) == (0.4, 0.5, 0.6) and steps[0].interpolation.value == "bilinear"
    beside["model_cfg"] = {**TINY, "quick_gelu": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(beside))
    with pytest.raises(UserError, match="was trained with QuickGELU"):
        load_clip(tiny_model, str(tmp_path / "open_clip_model.safetensors"), "cpu")


def test_random_weights_are_open_clips_own(tiny_model):
    ours = load_clip(tiny_model, "random", "cpu", seed=4)
    torch.manual_seed(4)
    plain = open_clip.create_model("tiny")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, ours.text.state_dict()[name])


# Text towers of the transformers library


@pytest.fixture(scope="module")
def with_text_tower(tmp_path_factory):
    """The path of a model config whose text tower is a small RoBERTa, and the folder of that tower's config
    and tokenizer.
    """
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    folder = tmp_path_factory.mktemp("roberta")
    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "red", "dog", "house", "the", "sea"]
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)
    sizes = {"vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 90, "pad_token_id": 1}
    transformers.RobertaConfig(**sizes).save_pretrained(folder)
    text = {
        "hf_model_name": str(folder),
        "hf_tokenizer_name": str(folder),
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "mlp",
    }
    path = folder / "tower.json"
    path.write_text(json.dumps({**TINY, "text_cfg": text}))
    return str(path)


def test_a_text_tower_of_transformers_needs_no_weights_of_its_own(with_text_tower, tmp_path):
    """Its config and tokenizer are there, its weights are not: they are random, or come with the CLIP's
    checkpoint.
    """
    clip = load_clip(with_text_tower, "random", "cpu")
    texts = ["a red dog", "the sea", "house"]
    tower = clip.text.text
    with torch.no_grad():
        for text, found in zip(texts, text_vectors(clip, texts, 2), strict=True):
            tokens = clip.tokenizer.tokenizer(text, return_tensors="pt")["input_ids"]
            hidden = tower.transformer(input_ids=tokens).last_hidden_state
            expected = torch.nn.functional.normalize(tower.proj(hidden.mean(dim=1)), dim=-1)[0]
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    assert too_long(clip, ["a " * 75, "a " * 76]) == ["a " * 76]  # two more mark the ends, of 77
    save_file(
        {name: value.contiguous() for name, value in clip.text.state_dict().items()},
        tmp_path / "weights.safetensors",
    )
    again = load_clip(with_text_tower, str(tmp_path / "weights.safetensors"), "cpu", seed=9)
    assert (
        again.fingerprint
        == clip.fingerprint
        != load_clip(with_text_tower, "random", "cpu", seed=9).fingerprint
    )


def test_without_transformers_the_message_says_what_to_install(with_text_tower, monkeypatch):
    monkeypatch.setattr("open_clip.hf_model.transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        load_clip(with_text_tower, "random", "cpu")
