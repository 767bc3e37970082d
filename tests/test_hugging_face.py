"""Folders of every covered type of the transformers library: features, tokens and pixels are its own."""

import copy
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from numpy.testing import assert_allclose
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from docs.models import type_rows, type_table
from tests import definition
from tests.conftest import ROOT
from tests.photos import write_photos
from tests.test_towers import run_siglip
from utils.model.clip import load_clip
from utils.model.configs import REASONS, TYPES
from utils.model.texts import text_vectors, too_long
from utils.runtime.errors import UserError
from utils.runtime.results import Results

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIZES = {"hidden_size": 32, "intermediate_size": 65, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": 24, "patch_size": 8}
TEXT = {**SIZES, "num_attention_heads": 2}
TEXTS = ["a cat", "The Dog, on a mat!", "", "zebra", "a very long text of far too many words for any context"]
CONTEXT = 20


# Folders


def save_model(folder, kind, vision=(), text=()):
    """Save a random model of a type, and return it. vision, text: more of its configs."""
    torch.manual_seed(7)
    vision = {**VISION, **dict(vision)}
    words = {**TEXT, "vocab_size": 99, "max_position_embeddings": CONTEXT, **dict(text)}
    if kind == "siglip":
        more = {"text_config": {"projection_size": 32, **words}}
    else:
        more = {"text_config": words, "projection_dim": 24}
    config = getattr(transformers, f"{TYPES[kind]}Config")(vision_config=vision, **more)
    model = getattr(transformers, f"{TYPES[kind]}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms, too
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def letters(space):
    """Pieces of one letter, and of one letter after a space."""
    return [*LETTERS, *(f"{space}{letter}" for letter in LETTERS), space, "at", f"{space}the"]


def save_clips(folder):
    words = ["<s>", "</s>", "<pad>", "<unk>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "at</w>"]
    numbers = {word: i for i, word in enumerate(words)}
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = transformers.CLIPTokenizer(vocab=numbers, merges=[("a", "t</w>")], **special)
    tokenizer.save_pretrained(folder)
    return {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def save_xlm(folder):
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [(piece, -float(i % 7) - 1) for i, piece in enumerate([*special, *letters("▁"), "<mask>"])]
    transformers.XLMRobertaTokenizer(vocab=pieces).save_pretrained(folder)
    return {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def save_bert(folder):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, "一", "只", "猫", *LETTERS, *(f"##{letter}" for letter in LETTERS), "cat", "##at"]
    numbers = {word: i for i, word in enumerate(words)}
    transformers.BertTokenizer(vocab=numbers).save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    return {"pad_token_id": 0}


def save_sentences(folder):
    """A tokenizer.json as SigLIP has it, whose class takes the punctuation away before."""
    pieces = [
        (piece, -float(i % 7) - 1) for i, piece in enumerate(["<unk>", "</s>", *letters("▁"), ",", "!"])
    ]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    core.save(str(folder / "tokenizer.json"))
    marks = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>", "do_lower_case": True}
    config = {**marks, "tokenizer_class": "SiglipTokenizer", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}


def save_gemma(folder, **more):
    """As SigLIP 2 has it."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    numbers = {word: i for i, word in enumerate([*special, *letters("▁"), *LETTERS.upper()[:4]])}
    merges = [("a", "t"), *(("▁", letter) for letter in LETTERS)]
    settings = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right", **more}
    transformers.GemmaTokenizer(vocab=numbers, merges=merges, **settings).save_pretrained(folder)
    return {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}


# name: (type, its tokenizer, more of the image tower's config, of the text tower's, the image processor)
CROP = {"size": {"shortest_edge": 27}, "crop_size": {"height": 24, "width": 24}}
SQUASH = {"size": {"height": 24, "width": 24}}
KINDS = {
    "clip": ("clip", save_clips, {}, {}, ("CLIPImageProcessor", CROP)),
    "siglip": ("siglip", save_sentences, {}, {}, ("SiglipImageProcessor", SQUASH)),
    "siglip2": (
        "siglip",
        save_gemma,
        {"patch_size": 7, "hidden_act": "gelu"},  # 24 pixels leave a rest of 3
        {"projection_size": 32, "hidden_act": "gelu"},
        ("SiglipImageProcessor", {**SQUASH, "resample": 2}),
    ),
    "metaclip_2": (
        "metaclip_2",
        save_xlm,
        {"hidden_act": "quick_gelu"},
        {"layer_norm_eps": 1e-3},
        ("CLIPImageProcessor", CROP),
    ),
    "altclip": (
        "altclip",
        save_xlm,
        {"layer_norm_eps": 1e-3},
        {"project_dim": 40, "max_position_embeddings": CONTEXT + 2},
        ("CLIPImageProcessor", CROP),
    ),
    "chinese_clip": (
        "chinese_clip",
        save_bert,
        {"hidden_act": "gelu"},
        {},
        ("ChineseCLIPImageProcessor", {**CROP, "size": SQUASH["size"], "do_center_crop": False}),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: (folder, model)} of KINDS."""
    found = {}
    for name, (kind, save_tokenizer, vision, text, (processor, fields)) in KINDS.items():
        folder = tmp_path_factory.mktemp("models") / name
        folder.mkdir()
        marks = save_tokenizer(folder)
        getattr(transformers, f"{processor}Pil")(**fields).save_pretrained(folder)
        found[name] = (folder, save_model(folder, kind, vision, {**marks, **text}))
    return found


def load(folder, **options):
    return load_clip(f"local-dir:{folder}", "ignored", "cpu", **options)


def copy_of(folder, to, *without):
    """A copy of a folder without some files."""
    to.mkdir()
    for file in folder.iterdir():
        if file.name not in without:
            (to / file.name).write_bytes(file.read_bytes())
    return to


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def features(found):
    return getattr(found, "pooler_output", found).detach()


def pixels_of(model, images=5):
    side = model.config.vision_config.image_size
    return torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(2))


def assert_same_images(clip, model):
    pixels = pixels_of(model)
    theirs = features(model.get_image_features(pixels))
    assert float((clip.vit(pixels) - theirs).abs().max() / theirs.abs().max()) < 1e-5


def text_features(model, given):
    """The library's unit text vectors of tokens; a SigLIP was trained without a mask."""
    mask = None if model.config.model_type == "siglip" else given["attention_mask"]
    found = features(model.get_text_features(given["input_ids"], attention_mask=mask))
    return torch.nn.functional.normalize(found, dim=-1)


def own_tokens(folder, texts, **options):
    """What the folder's own tokenizer makes of texts; the class of SigLIP's needs sentencepiece."""
    options = {"truncation": True, "max_length": CONTEXT, "return_tensors": "pt", **options}
    if json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] != "SiglipTokenizer":
        return transformers.AutoTokenizer.from_pretrained(folder)(texts, **options)
    plain = transformers.PreTrainedTokenizerFast.from_pretrained(folder, tokenizer_class=None)
    return plain([re.sub(" +", " ", re.sub(r"[^\w\s]|_", "", text.lower())) for text in texts], **options)


# Features, tokens and pixels


@pytest.mark.parametrize("name", KINDS)
def test_image_features_are_the_librarys(folders, name):
    folder, model = folders[name]
    clip = load(folder, image_only=True)
    assert clip.text is None
    assert_same_images(clip, model)


@pytest.mark.parametrize("name", KINDS)
def test_text_features_are_the_librarys(folders, name):
    """Of single texts and of batches in which texts are padded; unit vectors, as they are stored."""
    folder, model = folders[name]
    clip = load(folder)
    ours = torch.from_numpy(text_vectors(clip, TEXTS, 2))
    padding = "max_length" if model.config.model_type == "siglip" else True
    for texts in (TEXTS, *([text] for text in TEXTS)):
        theirs = text_features(model, own_tokens(folder, texts, padding=padding))
        rows = [TEXTS.index(text) for text in texts]
        assert float((ours[rows] - theirs).abs().max()) < 1e-5
    assert float((ours[0] - ours[3]).abs().max()) > 1e-2  # they tell texts apart


@pytest.mark.parametrize("name", KINDS)
def test_tokens_are_those_of_the_folders_own_tokenizer(folders, name):
    folder, _ = folders[name]
    clip = load(folder)
    expected = own_tokens(folder, TEXTS, padding="max_length")
    assert clip.tokenizer(TEXTS).tolist() == expected["input_ids"].tolist()
    assert clip.tokenizer("a cat").tolist() == expected["input_ids"][:1].tolist()
    assert clip.tokenizer.context_length == CONTEXT
    whole = [
        len(own_tokens(folder, [text], truncation=False, max_length=None).input_ids[0]) for text in TEXTS
    ]
    assert too_long(clip, TEXTS) == [text for text, n in zip(TEXTS, whole, strict=True) if n > CONTEXT]
    assert 1 <= len(too_long(clip, TEXTS)) <= 2


@pytest.mark.parametrize("name", KINDS)
def test_pixels_are_those_of_the_folders_own_processor(folders, name):
    folder, _ = folders[name]
    transform = load(folder, image_only=True).transform
    processor = getattr(transformers, f"{KINDS[name][4][0]}Pil").from_pretrained(folder)
    rng = np.random.default_rng(0)
    for size in ((24, 24), (50, 31), (31, 50), (9, 90)):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        for picture in (image, image.convert("L")):
            expected = processor(picture)["pixel_values"][0]
            assert_allclose(transform(picture).numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip", "chinese_clip"])
def test_without_a_config_the_pixels_are_those_of_the_types_default(folders, tmp_path, name):
    """A SigLIP squashes, and has its own mean; a CLIP crops."""
    folder = copy_of(folders[name][0], tmp_path / name, "preprocessor_config.json")
    transform = load(folder, image_only=True).transform
    size = SQUASH if name == "siglip" else {"size": 24, "crop_size": 24}
    processor = getattr(transformers, f"{KINDS[name][4][0]}Pil")(**size)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    assert_allclose(transform(image).numpy(), processor(image)["pixel_values"][0], rtol=0, atol=1e-5)
    assert f"{TYPES[name]}'s default is taken" in transform.note
    (folder / "preprocessor_config.json").write_text(json.dumps(size))  # which does not name its class
    again = load(folder, image_only=True).transform
    assert again.record == transform.record and not again.note


# Weights


def write_as(folder, state, form):
    """Write weights as one .bin, or as two shards of safetensors or .bin with their index."""
    (folder / "model.safetensors").unlink()
    if form == "one bin":
        torch.save(state, folder / "pytorch_model.bin")
        return
    stem, ending = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    names = sorted(state)
    places = {}
    for i in range(2):
        part = {name: state[name].contiguous() for name in names[i::2]}
        file = f"{stem}-0000{i + 1}-of-00002.{ending}"
        save_file(part, folder / file) if ending == "safetensors" else torch.save(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["one bin", "safetensors", "bin"])
def test_shards_and_bin_files_are_read_as_one_file_is(folders, tmp_path, form):
    folder, model = folders["siglip"]
    before = load(folder).record["fingerprint"]
    copy = copy_of(folder, tmp_path / "copy")
    write_as(copy, load_file(folder / "model.safetensors"), form)
    clip = load(copy)
    assert_same_images(clip, model)
    assert clip.record["fingerprint"] == before


def test_names_that_the_library_has_changed_are_known(folders, tmp_path, capsys):
    """Published files of AltCLIP have the names of earlier versions, and buffers."""
    folder, _ = folders["altclip"]
    copy = copy_of(folder, tmp_path / "copy")
    state = load_file(folder / "model.safetensors")
    part = {"text_model": "encoder.layer.", "vision_model": "encoder.layers."}
    found = {}
    for name, value in state.items():
        found[re.sub(r"encoder\.layers?\.", part.get(name.split(".")[0], ""), name)] = value
    found["text_model.roberta.embeddings.position_ids"] = torch.arange(CONTEXT)[None]
    found["text_model.roberta.pooler.dense.weight"] = torch.zeros(32, 32)  # which nobody reads
    save_file(found, copy / "model.safetensors")
    assert_allclose(text_vectors(load(copy), TEXTS, 3), text_vectors(load(folder), TEXTS, 3), atol=1e-6)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", KINDS)
def test_weights_that_do_not_fit_are_refused_by_their_name(folders, tmp_path, capfd, name):
    folder, _ = folders[name]
    copy = copy_of(folder, tmp_path / "copy")
    state = load_file(folder / "model.safetensors")
    image = next(key for key in state if re.fullmatch(r"vision_model.encoder.layers?.1.mlp.fc1.bias", key))
    text = next(key for key in state if key.startswith("text_model") and key.endswith("weight"))

    def said(changed):
        save_file({key: value.contiguous() for key, value in changed.items()}, copy / "model.safetensors")
        with pytest.raises(UserError) as error:
            load(copy, image_only=True)
        assert "\n" not in str(error.value) and str(copy) in str(error.value)
        return str(error.value)

    for key in (image, text):
        found = said({name: value for name, value in state.items() if name != key})
        assert f"{key.replace('layer.', 'layers.')} is missing" in found
    size = f"size mismatch for {image.replace('layer.', 'layers.')}, where the config says [65]"
    assert size in said({**state, image: torch.zeros(7)})
    more = "vision_model.encoder.layers.3.mlp.fc1.bias"
    assert f"it has {more}" in said({**state, more: torch.zeros(7)})
    assert "as torch.int8, and weights are floating-point" in said({**state, image: state[image].char()})
    alone = {key: value for key, value in state.items() if not key.startswith("text_")}
    save_file({**alone, "head.weight": torch.zeros(3)}, copy / "model.safetensors")
    clip = load(copy, image_only=True)
    assert_same_images(clip, folders[name][1])
    assert clip.record["fingerprint"] != load(folder, image_only=True).record["fingerprint"]
    with pytest.raises(UserError, match="has no text tower, and texts are embedded here"):
        load(copy)
    printed = capfd.readouterr()
    assert "also holds head.weight" in printed.out and "LOAD REPORT" not in printed.err


def test_a_siglip_without_its_head_is_refused(folders, tmp_path):
    copy = copy_of(folders["siglip"][0], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["vision_config"]["vision_use_head"] = False
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="vision_use_head is false"):
        load(copy)


def test_heads_of_the_text_tower_are_in_the_fingerprint(folders, tmp_path):
    """They change text vectors, and no weight."""
    folder, _ = folders["chinese_clip"]
    copy = copy_of(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["num_attention_heads"] = 8
    (copy / "config.json").write_text(json.dumps(config))
    assert load(copy).record["fingerprint"] != load(folder).record["fingerprint"]
    moved = copy_of(folder, tmp_path / "moved")
    assert load(moved).record["fingerprint"] == load(folder).record["fingerprint"]


def test_weights_by_path_of_another_type_say_what_to_use(folders, tiny_model):
    folder, _ = folders["metaclip_2"]
    with pytest.raises(UserError, match=f"says model_type 'metaclip_2'; use --model local-dir:{folder}"):
        load_clip(tiny_model, str(folder / "model.safetensors"), "cpu")


# Types


@pytest.mark.parametrize("kind", ["siglip2", "blip", "something_new"])
def test_types_that_are_not_covered_are_called_by_their_name(tmp_path, monkeypatch, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    asked = []
    fetch = lambda name, allow_patterns: asked.append(allow_patterns) or str(tmp_path)  # noqa: E731
    monkeypatch.setattr("utils.model.hugging_face.snapshot_download", fetch)
    for model in (f"local-dir:{tmp_path}", "hf:some/model"):
        with pytest.raises(UserError) as error:
            load_clip(model, "ignored", "cpu")
        line = str(error.value)
        assert f"model_type {kind!r}" in line and "\n" not in line
        assert "clip, siglip, metaclip_2, altclip, chinese_clip are covered" in line
        assert REASONS.get(kind, kind) in line
    assert asked == [["config.json"]]  # its weights are not fetched


def test_a_folder_of_the_hub_has_all_files_that_its_tokenizer_may_need(folders, monkeypatch):
    folder, model = folders["chinese_clip"]
    asked = set()
    fetch = lambda name, allow_patterns: asked.update(allow_patterns) or str(folder)  # noqa: E731
    monkeypatch.setattr("utils.model.hugging_face.snapshot_download", fetch)
    assert_same_images(load_clip("hf:some/model", "ignored", "cpu"), model)
    names = {"vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "tokenizer.json"}
    assert names <= asked and not {"*", "*.py", "modeling.py"} & asked


def test_without_the_library_the_message_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="which is missing: pip install transformers$"):
        load(folders["altclip"][0])


# Tokenizers of other files


def test_berts_vocabulary_is_enough(folders, tmp_path):
    folder, _ = folders["chinese_clip"]
    texts = [*TEXTS, "一只猫 CAT"]
    copy = copy_of(folder, tmp_path / "copy", "tokenizer.json")
    expected = own_tokens(folder, texts, padding="max_length")["input_ids"]
    assert load(copy).tokenizer(texts).tolist() == expected.tolist()
    (copy / "vocab.txt").unlink()
    with pytest.raises(
        UserError, match=r"has no tokenizer.json \(nor vocab.txt\); put the model's tokenizer.json"
    ):
        load(copy).tokenizer(texts)


SENTENCES = {
    "siglip": ("spiece.model", "SiglipTokenizer"),
    "siglip2": ("tokenizer.model", "GemmaTokenizer"),
    "metaclip_2": ("sentencepiece.bpe.model", "XLMRobertaTokenizer"),
    "altclip": ("sentencepiece.bpe.model", "XLMRobertaTokenizer"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_a_folder_that_needs_sentencepiece_says_so(folders, tmp_path, monkeypatch, name):
    file, kind = SENTENCES[name]
    copy = copy_of(folders[name][0], tmp_path / "copy", "tokenizer.json")
    (copy / file).write_bytes(b"a sentencepiece model")
    change(copy / "tokenizer_config.json", tokenizer_class=kind)
    clip = load(copy)  # images need none
    for missing, there in (("sentencepiece", "google.protobuf"), ("google.protobuf", "sentencepiece")):
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.setitem(sys.modules, there, sys)
        with pytest.raises(UserError, match=f"its {file} needs sentencepiece: pip install sentencepiece"):
            clip.tokenizer(TEXTS)
    monkeypatch.setitem(sys.modules, "google.protobuf", sys)
    change(copy / "tokenizer_config.json", tokenizer_class="T5Tokenizer")
    with pytest.raises(UserError, match=f"{file} is read by {kind}, not by its T5Tokenizer"):
        load(copy).tokenizer(TEXTS)


def test_siglips_texts_lose_their_punctuation_and_capitals(folders, tmp_path):
    """As its class in the library does it, which needs sentencepiece."""
    folder, _ = folders["siglip"]
    clip = load(folder)
    tokenizer = clip.tokenizer
    assert too_long(clip, ["a, " * 8 + "!" * CONTEXT]) == []
    same = ("the dog on a mat", "The dog on a mat!", "  the   dog, on a mat\n", "the d-o-g o_n a 'mat'")
    rows = tokenizer(list(same)).tolist()
    assert rows[1:] == rows[:1] * 3
    copy = copy_of(folder, tmp_path / "copy")
    change(copy / "tokenizer_config.json", do_lower_case=False)
    kept = load(copy).tokenizer(["the dog", "the, dog", "The dog"]).tolist()
    assert kept[0] == kept[1] != kept[2]
    change(copy / "tokenizer_config.json", tokenizer_class="T5Tokenizer")
    plain = load(copy).tokenizer(["the dog", "the, dog"]).tolist()
    assert plain[0] != plain[1]


def test_siglips_tokens_are_those_of_its_class(folders, tmp_path):
    """Of a sentencepiece model trained here, with and without the tokenizer.json that is made of it."""
    trainer = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    folder = copy_of(folders["siglip"][0], tmp_path / "copy", "tokenizer.json")
    lines = [f"{word} {text.lower()}" for text in TEXTS for word in "a cat dog the zebra, mat! ÄÖ".split()]
    marks = {"unk_id": 2, "eos_id": 1, "pad_id": 0, "bos_id": -1, "normalization_rule_name": "identity"}
    options = {"vocab_size": 60, "hard_vocab_limit": False, "model_prefix": str(tmp_path / "words"), **marks}
    trainer.SentencePieceTrainer.train(sentence_iterator=iter(lines), **options)
    (folder / "spiece.model").write_bytes((tmp_path / "words.model").read_bytes())
    theirs = transformers.SiglipTokenizer.from_pretrained(folder)
    expected = theirs(TEXTS, padding="max_length", max_length=CONTEXT, truncation=True)["input_ids"]
    assert load(folder).tokenizer(TEXTS).tolist() == expected
    converted = transformers.T5Tokenizer.from_pretrained(
        folder, vocab_file=str(folder / "spiece.model"), extra_ids=0
    )
    converted.backend_tokenizer.save(str(folder / "tokenizer.json"))
    assert load(folder).tokenizer(TEXTS).tolist() == expected


@pytest.mark.parametrize("side", ["left", None])
def test_a_tokenizer_that_pads_on_the_left_does_so_or_is_refused(folders, tmp_path, side):
    """Gemma's class does where nothing is said. SigLIP reads the last token, whatever it is."""
    folder, model = folders["siglip2"]
    copy = copy_of(folder, tmp_path / "copy")
    change(copy / "tokenizer_config.json", padding_side=side)
    if side is None:
        config = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps({k: config[k] for k in config if config[k]}))
    expected = own_tokens(copy, TEXTS, padding="max_length")["input_ids"]
    assert expected[2, 0] == 0 and expected[2, -1] == 1  # an empty text: padding, then its end
    assert load(copy).tokenizer(TEXTS).tolist() == expected.tolist()
    for name in ("clip", "chinese_clip") if side else ():
        other = copy_of(folders[name][0], tmp_path / name)
        change(other / "tokenizer_config.json", padding_side="left")
        with pytest.raises(UserError, match="pads texts on the left"):
            load(other).tokenizer(TEXTS)


def test_an_end_token_that_the_config_does_not_name_stays(folders, tmp_path):
    folder, _ = folders["siglip2"]
    copy = copy_of(folder, tmp_path / "copy")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config |= {"add_bos_token": False, "add_eos_token": True}
    for without in ({}, {"eos_token"}):
        kept = {key: config[key] for key in config if key not in without}
        (copy / "tokenizer_config.json").write_text(json.dumps(kept))
        tokens = load(copy).tokenizer(TEXTS)
        assert tokens.tolist() == own_tokens(copy, TEXTS, padding="max_length")["input_ids"].tolist()
        assert tokens[2, 0] == 1  # of an empty text, too


def test_siglip_2s_own_class_writes_small_letters(folders, tmp_path):
    folder, _ = folders["siglip2"]
    copy = copy_of(folder, tmp_path / "copy")
    change(copy / "tokenizer_config.json", tokenizer_class="Siglip2Tokenizer")
    texts = ["A CAT", "a cat"]
    theirs = transformers.Siglip2Tokenizer.from_pretrained(copy)
    expected = theirs(texts, padding="max_length", max_length=CONTEXT)["input_ids"]
    found = load(copy).tokenizer(texts).tolist()
    assert found == expected and found[0] == found[1]
    plain = load(folder).tokenizer(texts).tolist()
    assert plain[0] != plain[1]


def test_marks_that_the_model_does_not_know_are_refused(folders, tmp_path):
    """The end token of metaclip_2 is 2, which in type clip means an old config."""
    other = copy_of(folders["metaclip_2"][0], tmp_path / "end")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 5
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not end a text with the model's end token 5"):
        load(other).tokenizer(TEXTS)
    other = copy_of(folders["metaclip_2"][0], tmp_path / "two")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (other / file).write_bytes((folders["clip"][0] / file).read_bytes())
    with pytest.raises(UserError, match="does not end a text with the model's end token 2"):
        load(other).tokenizer(TEXTS)
    other = copy_of(folders["altclip"][0], tmp_path / "pad")
    change(other / "tokenizer_config.json", pad_token="<mask>")
    with pytest.raises(UserError, match="pads texts with token .*, and the model knows another one"):
        load(other).tokenizer(TEXTS)


def test_a_shorter_context_of_the_tokenizer_counts(folders, tmp_path):
    copy = copy_of(folders["chinese_clip"][0], tmp_path / "copy")
    change(copy / "tokenizer_config.json", model_max_length=9)
    tokens = load(copy).tokenizer(TEXTS)
    own = transformers.AutoTokenizer.from_pretrained(copy)(TEXTS, padding="max_length", truncation=True)
    assert tokens.shape == (5, 9) and tokens.tolist() == own["input_ids"]


def test_text_vectors_do_not_pay_for_padding(folders, monkeypatch):
    """Texts of a tower that masks its padding are sorted by length, and cut to the longest of their batch."""
    clip = load(folders["altclip"][0])
    seen = []
    whole = clip.text.text.get_text_features

    def watched(input_ids, attention_mask):
        seen.append(tuple(input_ids.shape))
        return whole(input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(clip.text.text, "get_text_features", watched)
    text_vectors(clip, ["zebra zebra", "a", "it", "the cat on mats"], 2)
    assert [rows for rows, _ in seen] == [2, 2] and seen[0][1] < seen[1][1] < CONTEXT


# Stages


def run_here(monkeypatch, script, *flags):
    """Run a stage in this process, as its script does."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    runpy.run_path(str(ROOT / script), run_name="__main__")


def true_effects(name, visual, image):
    """The effects of MLP 1 on an image by the definition, in float64."""
    if KINDS[name][0] == "siglip":
        p, z, rep, parts = run_siglip(visual, image, 1)
        return definition.pooled_effects(parts, p, z, rep)
    return definition.effects(copy.deepcopy(visual).double(), image.double(), 1)


@pytest.mark.parametrize("name", KINDS)
def test_the_stages_store_what_the_library_computes(folders, tmp_path, monkeypatch, name):
    folder, model = folders[name]
    photos = write_photos(tmp_path / "photos", per_class=1, classes=("cat", "dog"), side=40)
    (tmp_path / "words.txt").write_text("a cat\nthe dog\nzebra\n")
    clip = load(folder)
    results = Results(tmp_path / "out", clip.record["model"], clip.record["pretrained"])
    flags = ["--model", f"local-dir:{folder}", "--output_dir", tmp_path / "out", "--device", "cpu"]
    of_folder = ["--dataset", "folder", "--data_path", photos]
    data = [*of_folder, "--num_workers", 0]

    run_here(monkeypatch, "compute_representations.py", *flags, *data)
    processor = getattr(transformers, f"{KINDS[name][4][0]}Pil").from_pretrained(folder)
    pictures = [Image.open(path) for path in sorted(Path(photos / "train").glob("*/*"))]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    theirs = torch.nn.functional.normalize(features(model.get_image_features(pixels)), dim=-1)
    stored = np.load(results.path("representations", dataset="folder", split="train"))
    assert_allclose(stored, 100 * theirs, rtol=0, atol=1e-3)

    run_here(monkeypatch, "compute_second_order_neuron_prs.py", *flags, *data, "--mlp_layer", 1)
    of_layer = {"dataset": "folder", "split": "train", "layer": 1}
    parts = ("coefficients", "values", "outputs", "bias")
    C, values, outputs, bias = (np.load(results.path(part, **of_layer)).astype(float) for part in parts)
    phi = np.einsum("ikn,kne,keo->ino", C, values, outputs) + bias[:, None]
    expected = true_effects(name, clip.text.visual, pixels[0])
    assert_allclose(phi[0], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    run_here(monkeypatch, "compute_text_set_projection.py", *flags, "--data_path", tmp_path / "words.txt")
    given = own_tokens(folder, ["a cat", "the dog", "zebra"], padding="max_length")
    theirs = text_features(model, given)
    stored = np.load(results.path("texts", texts=str(tmp_path / "words.txt")))
    assert_allclose(stored, 100 * theirs, rtol=0, atol=1e-3)

    run_here(monkeypatch, "compute_classifier_projection.py", *flags, *of_folder)
    templates = [template("dog") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    theirs = text_features(model, own_tokens(folder, templates, padding="max_length")).mean(dim=0)
    stored = np.load(results.path("classifier", dataset="folder"))
    assert_allclose(stored[:, 1], theirs / theirs.norm(), rtol=0, atol=1e-5)


# docs/models.md


def test_every_type_of_the_library_is_covered_or_has_its_reason(tmp_path):
    """The table is of the installed version; the names of types and of the flags are in it."""
    rows = type_rows()
    assert set(TYPES) <= set(rows)
    covered = {kind for kind, (effects, _, _) in rows.items() if effects.startswith("exact")}
    assert covered == set(TYPES)
    stored = (ROOT / "docs" / "models.md").read_text().splitlines()
    stored = stored[stored.index("# Hugging Face's types of model") :]
    if f"transformers {transformers.__version__} " not in stored[2]:
        pytest.skip(f"docs/models.md is of another version than transformers {transformers.__version__}")
    assert type_table() == stored
    assert all(row in REASONS for row in set(rows) - covered)
