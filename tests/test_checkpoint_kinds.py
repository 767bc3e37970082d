"""Kinds of files that people have: several state dicts, heads, shards, vocabularies, and no weights."""

import argparse
import fnmatch
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.conftest import TINY, run_script
from utils.model.clip import load_clip
from utils.model.texts import text_vectors, too_long
from utils.runtime.errors import UserError
from utils.runtime.records import Digest, agrees
from utils.runtime.results import is_checkpoint_path, model_name, pretrained_name


@pytest.fixture(scope="module")
def state(tiny_model):
    return load_clip(tiny_model, "random", "cpu", seed=7).text.state_dict()


def times(state, factor):
    return {name: value * factor for name, value in state.items()}


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def assert_loads(model, pretrained, state):
    found = load_clip(model, str(pretrained), "cpu").text.state_dict()
    assert sorted(found) == sorted(state)
    for name, value in state.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def refused(model, pretrained):
    """The one line with which a checkpoint is refused."""
    with pytest.raises(UserError) as error:
        load_clip(str(model), str(pretrained), "cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


# More than the weights


def test_what_lies_beside_the_weights_is_named_and_left(tiny_model, state, tmp_path, capsys):
    numbers = {name: torch.tensor(77) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save({**state, **numbers}, tmp_path / "openai.pt")
    assert_loads(tiny_model, tmp_path / "openai.pt", state)
    named = "input_resolution, context_length, vocab_size, which are no weights of the towers; left"
    quick, left = capsys.readouterr().out.splitlines()
    assert quick == (
        f"note: {tmp_path}/openai.pt looks like a file of OpenAI's; "
        "if it is, its weights need a --model with -quickgelu"
    )
    assert left == f"note: {tmp_path}/openai.pt also holds {named}"
    buffers = ("attn_mask", "visual.rope.freqs_cos", "visual.bn.num_batches_tracked")
    more = {name: torch.ones(3) for name in ("text_decoder.ln.weight", "head.bias", *buffers)}
    save_file({**state, **more}, tmp_path / "more.safetensors")
    assert_loads(tiny_model, tmp_path / "more.safetensors", state)
    assert " and 2 more, which are no weights of the towers; left\n" in capsys.readouterr().out


def test_nothing_is_said_of_a_file_that_holds_the_weights_alone(tiny_model, state, tmp_path, capsys):
    optimizer = {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}
    content = {"epoch": 3, "state_dict": prefixed(state, "module."), "optimizer": optimizer}
    torch.save(content, tmp_path / "a.pt")
    assert_loads(tiny_model, tmp_path / "a.pt", state)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("tower", ["visual.transformer", "transformer"])
def test_a_layer_that_the_model_does_not_have_is_refused(tiny_model, state, tmp_path, tower):
    name = f"{tower}.resblocks.12.ln_1.bias"
    torch.save({**state, name: torch.ones(48)}, tmp_path / "deep.pt")
    assert f"does not fit the model: it has {name}" in refused(tiny_model, tmp_path / "deep.pt")


# Several state dicts in one file

SEVERAL = {  # content: (how it is made of two state dicts, key that is taken, key of the other)
    "model_ema": (lambda a, b: {"model_ema": b, "model": a, "epoch": 3}, "model", "model_ema"),
    "state_dict_ema": (lambda a, b: {"state_dict": a, "state_dict_ema": b}, "state_dict", "state_dict_ema"),
    "ema": (lambda a, b: {"ema": b, "model": a}, "model", "ema"),
    "net": (lambda a, b: {"ema": b, "net": a}, "net", "ema"),
    "prefixes inside": (lambda a, b: {"model": a, "ema": prefixed(b, "module.")}, "model", "ema"),
    "deeper": (lambda a, b: {"state_dict": {"model": a, "ema": b}}, "state_dict.model", "state_dict.ema"),
    "by prefix": (lambda a, b: prefixed(a, "module.") | prefixed(b, "ema.module."), "module", "ema.module"),
    "lightning": (
        lambda a, b: {"state_dict": prefixed(b, "ema.") | prefixed(a, "model.") | {"n": torch.ones(1)}},
        "state_dict.model",
        "state_dict.ema",
    ),
    "around": (lambda a, b: {**a, **prefixed(b, "ema.")}, "the top level", "ema"),
    "params": (lambda a, b: {"params": a, "params_ema": b}, None, "params_ema"),
    "teacher": (lambda a, b: {"teacher": b, "student": a}, None, "teacher"),
    "backbones": (lambda a, b: prefixed(a, "student.it.") | prefixed(b, "teacher.it."), None, "teacher.it"),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_of_several_state_dicts_the_trained_one_is_taken(tiny_model, state, tmp_path, capsys, kind):
    """The others are named, and taken by their keys. Where no key says which one was trained, one has to."""
    make, taken, other = SEVERAL[kind]
    path, average = tmp_path / "weights.pth", times(state, 0.5)
    torch.save(make(state, average), path)
    if taken:
        assert_loads(tiny_model, path, state)
        note = capsys.readouterr().out.splitlines()[0]
        both = re.match(f"note: {re.escape(str(path))} has weights under (.*) and (.*?); ", note).groups()
        assert sorted(both) == sorted([taken, other])
        assert note.endswith(f"; {taken} is taken; for the other: --pretrained {path}::{other}")
    else:
        line = refused(tiny_model, path)
        assert other in line
        [advice] = re.findall(r"choose one of them: --pretrained (\S+)$", line)
        load_clip(tiny_model, advice, "cpu")
    assert_loads(tiny_model, f"{path}::{other}", average)
    if kind in ("by prefix", "backbones"):
        assert_loads(tiny_model, f"{path}::{other.split('.')[0]}", average)  # what names it


def test_a_key_that_a_file_does_not_have_is_answered_with_those_that_it_has(tiny_model, state, tmp_path):
    torch.save({"model": state, "model_ema": state}, tmp_path / "both.pt")
    line = refused(tiny_model, f"{tmp_path}/both.pt::ema")
    advice = f"--pretrained {tmp_path}/both.pt::model"
    assert line.endswith(f"has no weights under ema, but under model and model_ema: {advice}")
    torch.save(state, tmp_path / "one.pt")
    line = refused(tiny_model, f"{tmp_path}/one.pt::ema")
    assert line.endswith(f"but under the top level: --pretrained {tmp_path}/one.pt")
    assert "none.pt: there is no such file" in refused(tiny_model, f"{tmp_path}/none.pt::ema")


def test_results_of_two_keys_of_a_file_have_different_names(tiny_model, state, tmp_path, monkeypatch):
    assert is_checkpoint_path("weights.pt::ema") and not is_checkpoint_path("openai")
    assert pretrained_name("ViT-B-32", "run/weights.pt::ema") == "weights_ema"
    assert pretrained_name("ViT-B-32", "weights.pt::a/b") == "weights_a-b"
    assert pretrained_name("ViT-B-32", "model.safetensors.index.json") == "model"
    monkeypatch.chdir(tmp_path)
    torch.save(state, "odd.pt::ema")  # a file's very own name
    assert pretrained_name("ViT-B-32", "./odd.pt::ema") == "odd"
    assert_loads(tiny_model, "./odd.pt::ema", state)


# Parts of models


def test_a_lora_adapter_is_called_by_its_name(tiny_model, state, tmp_path):
    name = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(2, 2)}, tmp_path / "adapter.safetensors")
    save_file({"base_model.model.ia3_l": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    torch.save({**state, "visual.proj.lora_B": torch.ones(2)}, tmp_path / "unmerged.pt")
    for file in ("adapter.safetensors", "adapter_model.safetensors", "unmerged.pt"):
        assert "holds a LoRA adapter" in refused(tiny_model, tmp_path / file)
        assert "merge_and_unload" in refused(tiny_model, tmp_path / file)


@pytest.mark.parametrize("prefix", ["image_encoder.model.", ""])
def test_a_tuned_image_encoder_with_a_head_is_loaded(tiny_model, state, tmp_path, capsys, prefix):
    """WiSE-FT's state dicts have all but the text tower's layers."""
    kept = {name: value for name, value in state.items() if not name.startswith("transformer.")}
    head = {"classification_head.weight": torch.ones(5, 24)}
    torch.save({**prefixed(kept, prefix), **head}, tmp_path / "tuned.pt")
    clip = load_clip(tiny_model, str(tmp_path / "tuned.pt"), "cpu", image_only=True)
    said = capsys.readouterr().out
    assert "tuned.pt has no text tower; stages that embed texts need a checkpoint with one\n" in said
    assert "which are no weights of the towers; left\n" in said
    for name, value in clip.vit.visual.state_dict().items():
        torch.testing.assert_close(value, state[f"visual.{name}"], rtol=0, atol=0)
    again = load_clip(tiny_model, str(tmp_path / "tuned.pt"), "cpu", image_only=True, seed=5)
    assert again.fingerprint == clip.fingerprint  # the random text tower has no part in it
    line = refused(tiny_model, tmp_path / "tuned.pt")
    assert "has no text tower, and texts are embedded here; give a checkpoint that has one" in line


def test_a_stage_that_embeds_texts_says_in_one_line_that_there_is_no_text_tower(tiny_model, state, tmp_path):
    images = {name: value for name, value in state.items() if name.startswith("visual.")}
    torch.save(images, tmp_path / "image.pt")
    (tmp_path / "words.txt").write_text("a cat\n")
    flags = ["--model", tiny_model, "--pretrained", tmp_path / "image.pt", "--output_dir", tmp_path / "out"]
    flags += ["--data_path", tmp_path / "words.txt"]
    done = run_script("compute_text_set_projection.py", *flags, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "has no text tower" in done.stderr


ARGS = argparse.Namespace(lr=1)
MODULES = {
    "a module": lambda model: model,
    "a module in a dict": lambda model: {"model": model, "args": ARGS, "epoch": 3},
    "a dict with an object": lambda model: {"state_dict": model.state_dict(), "args": ARGS},
    "an object deeper inside": lambda model: {"model": model.state_dict(), "cfg": {"args": ARGS}},
    "an object around": lambda model: argparse.Namespace(model=model.state_dict()),
    "a list": lambda model: [model.state_dict(), ARGS],
    "numpy arrays": lambda model: {
        **{name: value.numpy() for name, value in model.state_dict().items()},
        "args": ARGS,
    },
}


@pytest.mark.parametrize("kind", MODULES)
def test_the_command_for_a_module_makes_a_file_that_loads(tiny_model, state, tmp_path, monkeypatch, kind):
    (tmp_path / "mine.py").write_text("import open_clip\n\n\nclass Mine(open_clip.CLIP):\n    pass\n")
    path = tmp_path / "it's whole.pt"
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        model = importlib.import_module("mine").Mine(**TINY)
        model.load_state_dict(state)
        torch.save(MODULES[kind](model), path)
        del sys.modules["mine"]
    line = refused(tiny_model, path)
    assert "nothing but tensors and numbers is read from a file; where you trust it, save the weights" in line
    [command] = re.findall(r"as tensors.pt: (python .*)$", line)
    paths = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PATH": paths}  # so that it can be imported
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=environment, timeout=300)
    assert_loads(tiny_model, tmp_path / "tensors.pt", state)


# What is no weights file


def test_what_is_no_weights_file_is_called_by_its_name(tiny_model, state, tmp_path):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 605157884\n"
    files = {
        "lfs.safetensors": (pointer, "it is a Git LFS pointer and not the file itself; run git lfs pull"),
        "page.pt": ("\ufeff\n<!DOCTYPE html><html><body>Not found</body></html>", "it is a web page"),
        "error.bin": ('<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "it is a web page"),
        "config.bin": (json.dumps({"model_type": "clip"}), "it is a json file without an index of shards"),
        "cut.pt": ('{"abc": {"weight_map": ', "it is a json file without an index"),  # like a header
        "notes.ckpt": ("Schöne Grüße, und die Gewichte später", "it is text, and begins with 'Schöne"),
        "nothing.pt": ("", "it is empty; download it again"),
    }
    for name, (content, said) in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        line = refused(tiny_model, tmp_path / name)
        assert line.startswith(f"{tmp_path / name} cannot be read as a checkpoint: ") and said in line


@pytest.mark.parametrize("form", ["safetensors", "zip", "pickle"])
def test_a_file_that_is_cut_off_anywhere_is_said_to_be_cut_off(tiny_model, state, tmp_path, form):
    path = tmp_path / "weights.pt"
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for share in (0.001, 0.01, 0.3, 0.9, 0.9999):
        path.write_bytes(whole[: int(share * len(whole))])
        line = refused(tiny_model, path)
        assert line == f"{path} cannot be read as a checkpoint: it is cut off or damaged; download it again"


OTHER_BYTES = {
    "zeros": bytes(4096),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(99),
    "a pickle": b"\x80\x02}q\x00(vwy",
    "noise": np.random.default_rng(0).bytes(999),
}


@pytest.mark.parametrize("kind", OTHER_BYTES)
def test_other_bytes_are_refused_without_a_word_about_flags_of_torch(tiny_model, tmp_path, kind):
    (tmp_path / "bytes.pt").write_bytes(OTHER_BYTES[kind])
    line = refused(tiny_model, tmp_path / "bytes.pt")
    assert "cannot be read as a checkpoint" in line and "weights_only" not in line and len(line) < 400


# Folders of the transformers library

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
TEXT = {**SMALL, "max_position_embeddings": 12}
TEXTS = ["a cat", "the dog on a mat", "", "Zebra, cat & dog", "a long text with far too many words in it"]


def save_model(folder, **text):
    """A random CLIPModel in a folder, and the model. text: more of its text tower's config."""
    torch.manual_seed(3)
    config = transformers.CLIPConfig(vision_config=VISION, text_config={**TEXT, **text}, projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def save_other(folder, vision=(), text=()):
    """A random CLIPModel of another config, and the model."""
    torch.manual_seed(4)
    of_image, of_text = {**VISION, **dict(vision)}, {**TEXT, **dict(text)}
    config = transformers.CLIPConfig(vision_config=of_image, text_config=of_text, projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


OTHER_CONFIGS = {
    "relu": ({"hidden_act": "relu"}, {"hidden_act": "relu"}),
    "tanh": ({"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "gelu_new"}),
    "of each tower its own": ({"hidden_act": "gelu"}, {"hidden_act": "quick_gelu"}),
    "and the other way": ({"hidden_act": "quick_gelu"}, {"hidden_act": "silu"}),
    "eps": ({"layer_norm_eps": 1e-3}, {"layer_norm_eps": 1e-2}),
    "small eps": ({"layer_norm_eps": 1e-12}, {}),
    "heads": ({"num_attention_heads": 2 * VISION["num_attention_heads"]}, {}),
    "an odd width of the MLP": ({"intermediate_size": 101}, {"intermediate_size": 77}),
}


@pytest.mark.parametrize("kind", OTHER_CONFIGS)
def test_a_folder_gives_what_its_library_gives_whatever_its_config(tmp_path, kind):
    vision, text = OTHER_CONFIGS[kind]
    model = save_other(tmp_path, vision, text)
    clip = load_clip(f"local-dir:{tmp_path}", "ignored", "cpu")
    known = kind in ("heads", "an odd width of the MLP")  # to earlier versions, whose results agree
    assert isinstance(clip.fingerprint, Digest) == known
    assert_same_images(clip, model)
    tokens = clip.tokenizer(TEXTS)
    theirs = torch.nn.functional.normalize(pooled(model.get_text_features(tokens)), dim=-1)
    torch.testing.assert_close(torch.from_numpy(text_vectors(clip, TEXTS, 2)), theirs, rtol=1e-5, atol=1e-5)


def test_an_unknown_activation_is_refused_by_its_name(tmp_path):
    save_other(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "mystery"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "hidden_act is 'mystery'" in refused(f"local-dir:{tmp_path}", "ignored")


@pytest.mark.parametrize("kind", ["eps", "heads", "relu", "and the other way"])
def test_weights_by_path_whose_config_beside_says_otherwise_are_refused(tmp_path, kind):
    """A model json of the same sizes would take them, and compute something else."""
    save_other(tmp_path / "plain", {"hidden_act": "gelu"}, {"hidden_act": "gelu"})
    vision, text = OTHER_CONFIGS[kind]
    save_other(tmp_path / "other", {"hidden_act": "gelu", **vision}, {"hidden_act": "gelu", **text})
    sizes = {"image_size": 32, "patch_size": VISION["patch_size"], "layers": VISION["num_hidden_layers"]}
    sizes |= {
        "width": VISION["hidden_size"],
        "head_width": VISION["hidden_size"] // VISION["num_attention_heads"],
    }
    sizes["mlp_ratio"] = VISION["intermediate_size"] / VISION["hidden_size"]
    words = {
        "context_length": TEXT["max_position_embeddings"],
        "vocab_size": 49408,
        "width": TEXT["hidden_size"],
    }
    words |= {"heads": TEXT["num_attention_heads"], "layers": TEXT["num_hidden_layers"]}
    words["mlp_ratio"] = TEXT["intermediate_size"] / TEXT["hidden_size"]
    (tmp_path / "x.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": sizes, "text_cfg": words}))
    load_clip(str(tmp_path / "x.json"), str(tmp_path / "plain/model.safetensors"), "cpu")
    line = refused(tmp_path / "x.json", tmp_path / "other/model.safetensors")
    assert "the config beside it" in line and ("local-dir:" in line or "-quickgelu" in line)


def test_other_models_of_the_library_are_called_by_their_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "align", "vision_config": {}}))
    line = refused(f"local-dir:{tmp_path}", "ignored")
    assert "says model_type 'align'" in line and "clip, siglip, metaclip_2, altclip, chinese_clip" in line


def write_open_clips_folder(folder, content):
    """A folder as open_clip has it on the hub, with a byte-order mark in its config."""
    folder.mkdir()
    config = json.dumps({"model_cfg": TINY, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}})
    (folder / "open_clip_config.json").write_text(config, encoding="utf-8-sig")
    torch.save(content, folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def test_weights_in_a_folder_of_open_clips_are_read_as_those_by_path(state, tmp_path, capsys):
    both = {"state_dict": state, "state_dict_ema": times(state, 2)}
    assert_loads(write_open_clips_folder(tmp_path / "ema", both), "ignored", state)
    assert "has weights under state_dict and state_dict_ema" in capsys.readouterr().out
    extras = {**state, "input_resolution": torch.tensor(32), "attn_mask": torch.zeros(2, 2)}
    name = write_open_clips_folder(tmp_path / "extras", extras)
    assert_loads(name, "ignored", state)
    assert load_clip(name, "ignored", "cpu").transform.record["mean"] == [0.5] * 3
    (tmp_path / "extras/open_clip_pytorch_model.bin").write_text(
        "version https://git-lfs.github.com/spec/v1\n"
    )
    assert "Git LFS pointer" in refused(name, "ignored")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: name.replace("visual.", "visual._orig_mod."),
        lambda name: name.replace("visual.", "visual.module."),
        lambda name: re.sub(r"(resblocks\.\d+\.)", r"\1_checkpoint_wrapped_module.", name),
        lambda name: (
            "module._fsdp_wrapped_module." + name.replace("transformer.", "transformer._fsdp_wrapped_module.")
        ),
    ],
)
def test_wrappers_inside_of_names_are_taken_off(tiny_model, state, tmp_path, wrap):
    torch.save({wrap(name): value for name, value in state.items()}, tmp_path / "wrapped.pt")
    assert_loads(tiny_model, tmp_path / "wrapped.pt", state)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_an_image_tower_alone_is_loaded_for_stages_of_images(tiny_model, state, tmp_path, prefix):
    tower = {
        name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")
    }
    torch.save(prefixed(tower, prefix), tmp_path / "tower.pt")
    clip = load_clip(tiny_model, str(tmp_path / "tower.pt"), "cpu", image_only=True)
    for name, value in clip.vit.visual.state_dict().items():
        torch.testing.assert_close(value, tower[name], rtol=0, atol=0)
    assert "has no text tower" in refused(tiny_model, tmp_path / "tower.pt")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(tiny_model, state, tmp_path, dtype):
    torch.save({name: (value * 100).to(dtype) for name, value in state.items()}, tmp_path / "odd.pt")
    assert f"as {dtype}, and weights are floating-point numbers" in refused(tiny_model, tmp_path / "odd.pt")


def test_a_shard_alone_and_archives_are_called_by_their_name(tiny_model, state, tmp_path):
    write_shards(tmp_path, state, "bin")
    line = refused(tiny_model, tmp_path / "pytorch_model-00001-of-00002.bin")
    assert f"give the index beside them: --pretrained {tmp_path}/pytorch_model.bin.index.json" in line
    torch.save(state, tmp_path / "weights.pt")
    for kind in ("zip", "gztar", "tar"):
        (tmp_path / kind).mkdir()
        shutil.copy(tmp_path / "weights.pt", tmp_path / kind)
        archive = shutil.make_archive(str(tmp_path / f"packed_{kind}"), kind, tmp_path / kind)
        assert "archive; unpack it" in refused(tiny_model, archive)


def pooled(features):
    return getattr(features, "pooler_output", features).detach()


def assert_same_images(clip, model):
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    theirs = pooled(model.get_image_features(pixels))
    torch.testing.assert_close(clip.vit(pixels), theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A CLIPModel with OpenAI's vocabulary, its folder, and its state dict."""
    folder = tmp_path_factory.mktemp("plain")
    model = save_model(folder)
    return model, folder, {name: value.clone() for name, value in model.state_dict().items()}


def write_shards(folder, state, form):
    """Split a state dict into two shards, with their index. form: safetensors or bin."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[form]
    names, places = sorted(state), {}
    for i in range(2):
        shard = f"{stem}-0000{i + 1}-of-00002.{form}"
        places |= {name: shard for name in names[i::2]}
        part = {name: state[name] for name in names[i::2]}
        save_file(part, folder / shard) if form == "safetensors" else torch.save(part, folder / shard)
    (folder / f"{stem}.{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_weights(folder, source, state, form):
    """A folder with a config and its weights as .bin, or as shards of safetensors or .bin."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text((source / "config.json").read_text())
    if form == "one bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        write_shards(folder, state, form)


@pytest.mark.parametrize("form", ["one bin", "safetensors", "bin"])
def test_bin_files_and_shards_of_a_folder_are_loaded(plain, tmp_path, form):
    model, source, state = plain
    write_weights(tmp_path / "mine", source, state, form)
    clip = load_clip(f"local-dir:{tmp_path}/mine", "ignored", "cpu")
    assert_same_images(clip, model)
    assert clip.fingerprint == load_clip(f"local-dir:{source}", "ignored", "cpu").fingerprint


@pytest.mark.parametrize("form", ["one bin", "safetensors", "bin"])
def test_bin_files_and_shards_of_the_hub_are_read_from_the_local_cache(plain, tmp_path, monkeypatch, form):
    model, source, state = plain
    (tmp_path / "models--some--clip" / "refs").mkdir(parents=True)
    (tmp_path / "models--some--clip" / "refs" / "main").write_text("0123")
    write_weights(tmp_path / "models--some--clip" / "snapshots" / "0123", source, state, form)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_same_images(load_clip("hf:some/clip", "ignored", "cpu"), model)


def test_the_hub_is_asked_for_bin_files_only_where_it_has_no_safetensors(plain, tmp_path, monkeypatch):
    _, source, state = plain
    asked = []

    def fetch(name, allow_patterns):
        """A hub of two models: what is asked for is copied, as far as it is there."""
        asked.append(set(allow_patterns))
        (tmp_path / name).mkdir(exist_ok=True, parents=True)
        for file in (tmp_path / "hub" / name).iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
        return str(tmp_path / name)

    monkeypatch.setattr("utils.model.hugging_face.snapshot_download", fetch)
    shutil.copytree(source, tmp_path / "hub" / "some" / "clip")
    for other in ("pytorch_model.bin", "model.fp16.safetensors"):
        (tmp_path / "hub" / "some" / "clip" / other).write_bytes(b"not needed")
    load_clip("hf:some/clip", "ignored", "cpu")
    assert len(asked) == 2 and asked[0] == {"config.json"}  # first whether the type is covered
    assert sorted(os.listdir(tmp_path / "some" / "clip")) == ["config.json", "model.safetensors"]
    assert {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} < asked[1]
    assert {"vocab.json", "merges.txt"} < asked[1]
    write_weights(tmp_path / "hub" / "some" / "old", source, state, "bin")
    load_clip("hf:some/old", "ignored", "cpu")
    assert len(asked) == 5


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_an_index_of_shards_may_be_given_itself(tiny_model, state, tmp_path, form):
    write_shards(tmp_path, state, form)
    [index] = tmp_path.glob("*.index.json")
    assert_loads(tiny_model, index, state)


def test_shards_that_are_missing_or_lie_elsewhere_are_refused(plain, tmp_path):
    _, source, state = plain
    folder = tmp_path / "mine"
    write_weights(folder, source, state, "safetensors")
    shard = folder / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "outside.safetensors")
    line = refused(f"local-dir:{folder}", "openai")
    assert line.startswith(f"{shard} is missing, which model.safetensors.index.json names")
    assert "--pretrained" not in line
    index = folder / "model.safetensors.index.json"
    for name in ("../outside.safetensors", f"{tmp_path}/outside.safetensors", "..\\outside.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        assert "shards have to lie beside it" in refused(f"local-dir:{folder}", "openai")
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    assert "it is a json file without an index" in refused(f"local-dir:{folder}", "openai")
    index.unlink()
    line = refused(f"local-dir:{folder}", "openai")
    assert "has no weights; put one of model.safetensors, " in line and "--pretrained" not in line


# Vocabularies of their own


def toy_vocabulary(folder, bos=0, eos=1, pad=2, unk=3):
    """vocab.json, merges.txt and tokenizer_config.json of 58 tokens, and how many tokens they are."""
    special = {"<s>": bos, "</s>": eos, "<pad>": pad, "<unk>": unk}
    free = iter(i for i in range(99) if i not in special.values())
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "at</w>", "cat</w>"]
    vocabulary = special | {word: next(free) for word in words}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na t</w>\nc at</w>\n")
    pad = {"__type": "AddedToken", "content": "<pad>", "lstrip": False, "rstrip": False, "normalized": False}
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": pad, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, "tokenizer_class": "CLIPTokenizer"}))
    return max(vocabulary.values()) + 1


def to_one_file(folder):
    """A tokenizer.json in place of vocab.json and merges.txt."""
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()


def assert_same_texts(clip, model, tokenizer):
    """Text vectors are those of transformers itself, of single texts and of all in one padded batch."""
    ours = torch.from_numpy(text_vectors(clip, TEXTS, 2))
    cut = {"truncation": True, "max_length": TEXT["max_position_embeddings"], "return_tensors": "pt"}
    for texts in (TEXTS, *([text] for text in TEXTS)):
        tokens = tokenizer(texts, padding=True, **cut)
        theirs = pooled(model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"]))
        theirs = torch.nn.functional.normalize(theirs, dim=-1)
        rows = [TEXTS.index(text) for text in texts]
        torch.testing.assert_close(ours[rows], theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("one_file", [False, True])
@pytest.mark.parametrize("ends", ["not the largest", "old config", "largest"])
def test_texts_of_a_folder_go_through_its_own_tokenizer(tmp_path, ends, one_file):
    eos = {"not the largest": 1, "old config": 57, "largest": 57}[ends]
    size = toy_vocabulary(tmp_path, eos=eos)
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(tmp_path)
    told = 2 if ends == "old config" else eos
    model = save_model(tmp_path, vocab_size=size, bos_token_id=0, eos_token_id=told, pad_token_id=2)
    if one_file:
        to_one_file(tmp_path)
    clip = load_clip(f"local-dir:{tmp_path}", "ignored", "cpu")
    assert_same_images(clip, model)
    assert_same_texts(clip, model, tokenizer)
    tokens = clip.tokenizer(TEXTS)
    assert tokens.shape == (5, 12) and tokens[-1, -1] == eos  # the end token is kept
    assert tokens[0].tolist() == tokenizer("a cat")["input_ids"] + [2] * 8
    assert too_long(clip, TEXTS) == [TEXTS[1], TEXTS[3], TEXTS[4]]  # of 13 tokens and more


def test_the_digest_of_a_tokenizer_changes_with_its_files_alone(tmp_path):
    size = toy_vocabulary(tmp_path)
    save_model(tmp_path, vocab_size=size, eos_token_id=1)
    name = f"local-dir:{tmp_path}"
    first = load_clip(name, "ignored", "cpu").text_record["tokenizer"]
    (tmp_path / "README.md").write_text("A model.")
    assert (
        re.fullmatch("[0-9a-f]{16}", first)
        and load_clip(name, "ignored", "cpu").text_record["tokenizer"] == first
    )
    (tmp_path / "merges.txt").write_text("#version: 0.2\na t</w>\n")
    assert load_clip(name, "ignored", "cpu").text_record["tokenizer"] != first


def test_text_results_of_earlier_versions_agree_where_a_folder_has_openais_vocabulary(tmp_path):
    """They were made with open_clip's tokenizer, whatever the folder held."""
    openais = open_clip.SimpleTokenizer()
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # their names on the hub
    vocabulary = {ends.get(token, token): number for token, number in openais.encoder.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) for pair in openais.bpe_ranks]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    save_model(tmp_path, vocab_size=49408, eos_token_id=49407)
    same = load_clip(f"local-dir:{tmp_path}", "ignored", "cpu").text_record["tokenizer"]
    assert agrees(None, same) and re.fullmatch("[0-9a-f]{16}", same)
    size = toy_vocabulary(tmp_path)
    save_model(tmp_path, vocab_size=size, eos_token_id=1)
    other = load_clip(f"local-dir:{tmp_path}", "ignored", "cpu").text_record["tokenizer"]
    assert not agrees(None, other) and other != same


def test_without_files_openais_vocabulary_is_open_clips_and_another_one_is_refused(plain, tmp_path):
    model, source, _ = plain
    clip = load_clip(f"local-dir:{source}", "ignored", "cpu")
    assert clip.text_record == clip.record
    expected = open_clip.SimpleTokenizer(context_length=12)(TEXTS)
    torch.testing.assert_close(clip.tokenizer(TEXTS), expected)
    theirs = torch.nn.functional.normalize(pooled(model.get_text_features(expected)), dim=-1)
    torch.testing.assert_close(torch.from_numpy(text_vectors(clip, TEXTS, 2)), theirs, rtol=1e-5, atol=1e-5)
    for text in ({"vocab_size": 99, "eos_token_id": 1}, {"eos_token_id": 5}):
        other = save_model(tmp_path / "own", **text)
        clip = load_clip(f"local-dir:{tmp_path}/own", "ignored", "cpu")
        assert_same_images(clip, other)  # images need no tokenizer
        with pytest.raises(UserError, match="has no tokenizer.json .*; put the model's tokenizer.json there"):
            text_vectors(clip, TEXTS, 2)


def test_a_tokenizer_that_does_not_end_texts_as_the_model_reads_them_is_refused(tmp_path):
    size = toy_vocabulary(tmp_path)
    save_model(tmp_path, vocab_size=size, eos_token_id=7)
    with pytest.raises(UserError, match="does not end a text with the model's end token 7"):
        text_vectors(load_clip(f"local-dir:{tmp_path}", "ignored", "cpu"), TEXTS, 2)


def test_tokens_that_a_model_does_not_have_are_refused(tmp_path):
    config = {**TINY, "text_cfg": {**TINY["text_cfg"], "vocab_size": 500}}
    (tmp_path / "small.json").write_text(json.dumps(config))
    clips = [load_clip(str(tmp_path / "small.json"), "random", "cpu")]
    (tmp_path / "small.json").write_text(json.dumps({**config, "custom_text": True}))
    clips.append(load_clip(str(tmp_path / "small.json"), "random", "cpu"))
    toy_vocabulary(tmp_path)
    save_model(tmp_path, vocab_size=20, eos_token_id=1)
    clips.append(load_clip(f"local-dir:{tmp_path}", "ignored", "cpu"))
    for clip, most in zip(clips, (500, 500, 20), strict=True):
        with pytest.raises(UserError, match=f"tokenizer gives token \\d+, and the model has {most} tokens"):
            text_vectors(clip, TEXTS, 2)


def test_no_code_of_a_folder_is_run(tmp_path):
    size = toy_vocabulary(tmp_path)
    save_model(tmp_path, vocab_size=size, eos_token_id=1)
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n\nclass Mine: pass\n")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}, "tokenizer_class": "Mine"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text_vectors(load_clip(f"local-dir:{tmp_path}", "ignored", "cpu"), TEXTS, 2)
    assert not (tmp_path / "ran").exists()


# The hub's config as --model


def test_the_hubs_config_of_open_clip_is_a_model(state, tmp_path):
    (tmp_path / "laion").mkdir()
    path = tmp_path / "laion" / "open_clip_config.json"
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    content = {"model_cfg": {**TINY, "quick_gelu": True}, "preprocess_cfg": preprocess}
    path.write_text(json.dumps(content))
    save_file(state, tmp_path / "laion" / "open_clip_model.safetensors")
    clip = load_clip(str(path), str(tmp_path / "laion" / "open_clip_model.safetensors"), "cpu")
    assert type(clip.vit.blocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert tuple(clip.transform.transforms[-1].mean) == (0.4, 0.5, 0.6)
    assert clip.record["model"] == model_name(str(path)) == "laion"
    assert clip.tokenizer(["a cat"]).shape == (1, 77)


MALFORMED = ("{", "[]", "3", '{"model_cfg": 3}', '{"model_cfg": null}', '{"model_cfg": {"embed_dim": 3}}')


@pytest.mark.parametrize("content", MALFORMED)
def test_a_malformed_config_of_the_hub_is_refused(tmp_path, content):
    (tmp_path / "open_clip_config.json").write_text(content)
    line = refused(tmp_path / "open_clip_config.json", "random")
    assert f"--model {tmp_path}/open_clip_config.json is not a" in line
