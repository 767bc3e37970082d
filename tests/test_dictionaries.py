"""Dictionaries of units in the files of several libraries.

The folders in `tests/dictionaries` were written by the libraries, with what their own `encode` gave
(its README says by which versions). ViT-Prisma and saev's later schemas are not on PyPI: their layout is
written here, and the truth is their formula in float64.
"""

import json
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from tests.conftest import ROOT
from utils.model.dictionaries import Dictionary, random_dictionary
from utils.model.dictionary_files import read_dictionary, save_dictionary
from utils.runtime.errors import UserError
from utils.units import check_tower, open_units, place

D, U, K = 12, 20, 4
WRITTEN = sorted((ROOT / "tests" / "dictionaries").glob("*/expected.npz"))


def tensors(seed=0):
    drawn = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, U), "b_enc": (U,), "W_dec": (U, D), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}


def some_inputs():
    return torch.randn(3, 5, D, generator=torch.Generator().manual_seed(9)) * 2 + 0.3


def kept(before, k=K):
    """The k largest of the last axis, with their signs, and 0 elsewhere."""
    order = np.argsort(-before, axis=-1)[..., :k]
    found = np.zeros_like(before)
    np.put_along_axis(found, order, np.take_along_axis(before, order, axis=-1), axis=-1)
    return found


def before_activation(state, x, subtract):
    W_enc, b_enc, _, b_dec = (state[name].double().numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    return (np.asarray(x, np.float64) - subtract * b_dec) @ W_enc + b_enc


def assert_encodes(path, x, f):
    found = read_dictionary(path).encode(x.clone()).numpy()
    assert_allclose(found, f, rtol=0, atol=1e-6 * max(1, np.abs(f).max()))


def test_there_is_a_fixture_of_every_library_that_can_be_installed():
    libraries = {path.parent.name.rpartition("_")[0].split("_")[0] for path in WRITTEN}
    assert libraries == {"dictionary", "overcomplete", "saelens", "saev"} and len(WRITTEN) >= 18


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.parent.name)
def test_activations_and_what_they_rebuild_are_those_of_the_library_itself(path):
    expected = np.load(path)
    found = read_dictionary(path.parent)
    x = torch.from_numpy(expected["x"])
    size = max(1, np.abs(expected["f"]).max())
    assert_allclose(found.encode(x.clone()).numpy(), expected["f"], rtol=0, atol=1e-6 * size)
    assert ((found.encode(x.clone()).numpy() != 0) == (expected["f"] != 0)).all()
    size = max(1, np.abs(expected["rebuilt"]).max())
    if "transcoder" not in path.parent.name:
        assert_allclose(found.rebuild(x.clone()).numpy(), expected["rebuilt"], rtol=0, atol=1e-6 * size)


@pytest.mark.parametrize(
    "name, where",
    [
        ("standard", ("resid.post", 1, "same")),
        ("layer_norm", ("mlp.out", 1, "same")),
        ("jumprelu", ("attn.out", 1, "same")),
        ("transcoder", ("mlp.out", 1, "mlp.in")),
    ],
)
def test_saelens_says_where_its_units_write(name, where):
    found = read_dictionary(ROOT / "tests" / "dictionaries" / f"saelens_{name}")
    assert (found.site, found.layer, found.reads) == where


# ViT-Prisma


@pytest.fixture
def prisma(monkeypatch):
    """The class that ViT-Prisma's pickles name, as long as they are written."""
    module = types.ModuleType("vit_prisma.sae.config")
    kind = type("VisionModelSAERunnerConfig", (), {"__module__": "vit_prisma.sae.config"})
    module.VisionModelSAERunnerConfig = kind
    for name in ("vit_prisma", "vit_prisma.sae"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "vit_prisma.sae.config", module)

    def write(folder, state, config, name="n_images_1300000.pt"):
        record = kind()
        record.__dict__.update(config, dtype=torch.float32, device=torch.device("cpu"))
        torch.save({"cfg": record, "state_dict": state}, folder / name)
        for module in ("vit_prisma.sae.config", "vit_prisma.sae", "vit_prisma"):
            sys.modules.pop(module)  # who reads it does not have the library
        return folder

    return write


BASE = {"hook_point_layer": 2, "layer_subtype": "hook_resid_post", "activation_fn_str": "relu", "d_in": D}
BASE |= {"activation_fn_kwargs": {}, "normalize_activations": "none", "architecture": "standard"}


def test_prismas_config_is_read_from_its_pickle_as_a_plain_record(tmp_path, prisma):
    state = tensors()
    found = read_dictionary(prisma(tmp_path, state, BASE))
    assert (found.site, found.layer, found.tokens) == ("resid.post", 2, "all")
    x = some_inputs()
    assert_encodes(tmp_path, x, np.maximum(before_activation(state, x, 1), 0))


def test_prismas_top_k_layer_norm_and_tokens(tmp_path, prisma):
    state = tensors()
    config = {**BASE, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    config |= {"normalize_activations": "layer_norm", "cls_token_only": True, "layer_subtype": "hook_mlp_out"}
    (tmp_path / "config.json").write_text(json.dumps({"d_in": D}))
    found = read_dictionary(prisma(tmp_path, state, config, "weights.pt"))
    assert (found.site, found.layer, found.tokens) == ("mlp.out", 2, "class")
    x = some_inputs()
    wide = x.double().numpy() - x.double().numpy().mean(axis=-1, keepdims=True)
    normed = wide / (wide.std(axis=-1, keepdims=True, ddof=1) + 1e-5)
    assert_encodes(tmp_path, x, np.maximum(kept(before_activation(state, normed, 1)), 0))


def test_prismas_transcoder_reads_the_mlps_input(tmp_path, prisma):
    config = {**BASE, "layer_subtype": "ln2.hook_normalized", "is_transcoder": True}
    config |= {"layer_out_subtype": "hook_mlp_out", "out_hook_point_layer": 2}
    found = read_dictionary(prisma(tmp_path, tensors(), config))
    assert (found.site, found.layer, found.reads) == ("mlp.out", 2, "mlp.in")
    assert found.input_bias is None


class Hostile:
    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", ["cfg", "state_dict", "beside"])
def test_nothing_that_a_file_contains_is_run(tmp_path, where):
    hostile = Hostile()
    hostile.marker = tmp_path / "was run"
    content = {"cfg": {}, "state_dict": tensors(), where: hostile}
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="nothing but tensors and numbers is read") as error:
        read_dictionary(tmp_path / "weights.pt")
    assert "\n" not in str(error.value)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(hostile))
    with pytest.raises(UserError):
        read_dictionary(tmp_path / "plain.pt")
    assert not hostile.marker.exists()


# saev


def saev(path, header, state):
    with open(path, "wb") as file:
        file.write((json.dumps(header) + "\n").encode())
        torch.save(state, file)
    return path


def many(before):
    """15 of 20, some of which are negative: saev keeps their signs."""
    assert (kept(before, 15) < 0).any()
    return kept(before, 15)


SAEV = {
    "1, by its class": ({"schema": 1, "cls": "TopK", "cfg": {"d_vit": D, "top_k": 15}}, 0, many),
    "1, by its activation": (
        {
            "schema": 1,
            "cls": "SparseAutoencoderConfig",
            "cfg": {"d_model": D, "activation": {"cls": "Relu", "params": {}}},
        },
        0,
        lambda before: np.maximum(before, 0),
    ),
    "1, Matryoshka": (
        {
            "schema": 1,
            "cls": "MatryoshkaSparseAutoencoder",
            "cfg": {"activation": {"cls": "Relu", "params": {}}},
        },
        1,
        lambda before: np.maximum(before, 0),
    ),
    "2": ({"schema": 2, "cfg": {"activation": {"cls": "TopK", "params": {"top_k": 15}}}}, 0, many),
    "5": (
        {"schema": 5, "cfg": {"activation": {"cls": "BatchTopK", "params": {"top_k": K}}}},
        0,
        lambda before: before * (before > 1.5),
    ),
}


@pytest.mark.parametrize("schema", SAEV)
def test_saevs_schemas(tmp_path, schema):
    header, subtract, activation = SAEV[schema]
    state = tensors()
    written = state | ({"activation.threshold": torch.tensor(1.5)} if schema == "5" else {})
    path = saev(tmp_path / "sae.pt", header, written)
    x = some_inputs()
    assert_encodes(path, x, activation(before_activation(state, x, subtract)))
    assert read_dictionary(path).site is None  # no schema says it


# our own format


def ours(**options):
    state = tensors()
    weights = (state["W_enc"].T.contiguous(), state["b_enc"], state["W_dec"], state["b_dec"])
    return Dictionary(*weights, **{"site": "resid.post", "layer": 1, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "topk", "k": K},
        {"activation": "jumprelu", "threshold": torch.rand(U)},
        {"activation": "gelu", "site": "mlp.out", "reads": "mlp.in"},
        {"tokens": "patches", "fingerprint": "0123"},
    ],
)
def test_our_own_format_comes_back_as_it_was(tmp_path, options):
    wanted = ours(**options)
    wanted.input_bias = wanted.decoder_bias if options.get("k") else None
    save_dictionary(tmp_path / "mine.safetensors", wanted)
    found = read_dictionary(tmp_path / "mine.safetensors")
    assert found.settings() == wanted.settings() and found.digest() == wanted.digest()
    x = some_inputs()
    assert torch.equal(found.encode(x.clone()), wanted.encode(x.clone()))
    assert found.fingerprint == options.get("fingerprint", "")


def test_weights_in_16_bits_are_read_as_they_are(tmp_path):
    state = {"encoder.weight": torch.rand(U, D), "encoder.bias": torch.rand(U)}
    state |= {"decoder.weight": torch.rand(U, D), "decoder.bias": torch.rand(D)}
    from safetensors.torch import save_file

    halves = {name: tensor.half() for name, tensor in state.items()}
    save_file(halves, tmp_path / "a.safetensors", {"site": "attn.out", "layer": "3", "activation": "relu"})
    found = read_dictionary(tmp_path)
    assert found.encoder.dtype == torch.float32 and (found.site, found.layer) == ("attn.out", 3)
    assert torch.equal(found.decoder, halves["decoder.weight"].float())


def test_directions_act_by_what_the_stream_has_along_them(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((5, D))
    np.save(tmp_path / "directions.npy", vectors)
    found = read_dictionary(tmp_path / "directions.npy")
    x = some_inputs()
    along = x.double().numpy() @ vectors.T / np.square(vectors).sum(axis=1)
    assert_allclose(found.encode(x).numpy(), along, atol=1e-5)
    assert not found.rebuilds


@pytest.mark.parametrize("units", [1023, 1024, 2500])
def test_many_units_are_encoded_as_few_are(units):
    """They are multiplied in blocks."""
    drawn = torch.Generator().manual_seed(units)
    W, b = torch.randn(units, D, generator=drawn), torch.randn(units, generator=drawn)
    found = Dictionary(W, b, W, torch.zeros(D), activation="topk", k=K).encode(some_inputs())
    before = some_inputs().double().numpy() @ W.double().numpy().T + b.double().numpy()
    assert_allclose(found.numpy(), np.maximum(kept(before), 0), atol=1e-5)


def test_a_random_dictionary_is_of_the_same_size_and_seeded():
    first, second = random_dictionary(ours(activation="topk", k=K)), random_dictionary(ours())
    assert first.decoder.shape == (U, D) and first.k == K
    assert torch.equal(first.decoder, second.decoder)
    assert_allclose(first.decoder.norm(dim=1).numpy(), 1, rtol=1e-6)
    assert ((first.encode(some_inputs()) != 0).sum(dim=-1) <= K).all()


# what is wrong


def save(path, state, **metadata):
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata or None)
    return path


def of_ours(**changes):
    state = tensors()
    named = {"encoder.weight": state["W_enc"].T, "encoder.bias": state["b_enc"]}
    named |= {"decoder.weight": state["W_dec"], "decoder.bias": state["b_dec"]}
    return {name: tensor for name, tensor in (named | changes).items() if tensor is not None}


def changed(tensor, value):
    tensor = tensor.clone()
    tensor[3] = value
    return tensor


PLACED = {"site": "resid.post", "layer": "1", "activation": "relu"}
FAULTS = {
    "NaN": (
        of_ours(**{"decoder.weight": changed(tensors()["W_dec"], float("nan"))}),
        PLACED,
        "NaN or infinity",
    ),
    "no vector": (of_ours(**{"decoder.weight": changed(tensors()["W_dec"], 0)}), PLACED, "1 of 20 units"),
    "turned": (of_ours(**{"encoder.weight": tensors()["W_enc"]}), PLACED, "encoder bias is 20, and 12 fits"),
    "no bias": (of_ours(**{"encoder.bias": None}), PLACED, "no dictionary that is known.*KeyError"),
    "no k": (of_ours(), {**PLACED, "activation": "topk"}, "top-k dictionary with k None"),
    "k": (of_ours(), {**PLACED, "activation": "topk", "k": "21"}, "with k 21 of 20"),
    "batch": (of_ours(), {**PLACED, "activation": "batchtopk", "k": "4"}, "depends on the batch"),
    "activation": (of_ours(), {**PLACED, "activation": "swish"}, "its activation is 'swish'"),
    "site": (of_ours(), {**PLACED, "site": "attn.in"}, "its site is 'attn.in'"),
    "layer": (of_ours(), {**PLACED, "layer": "two"}, "ValueError"),
    "thresholds": (of_ours(threshold=torch.rand(7)), {**PLACED, "activation": "jumprelu"}, "7 thresholds"),
    "others": ({"weight": torch.rand(3)}, {}, "it has weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_one_line(tmp_path, fault):
    state, metadata, message = FAULTS[fault]
    path = save(tmp_path / "a.safetensors", state, **metadata)
    with pytest.raises(UserError, match=message) as error:
        read_dictionary(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


CONFIGS = {
    "hook": ({"hook_name": "blocks.1.attn.hook_z"}, "its site is"),
    "whole": ({"hook_name": "embedding"}, "its site is 'embedding'"),
    "skip": ({"architecture": "skip_transcoder"}, "more than units of one site"),
    "norm": ({"normalize_activations": "expected_average_only_in"}, "fold them into the weights"),
    "heads": ({"reshape_activations": "hook_z"}, "single heads"),
    "two": (
        {"architecture": "transcoder", "hook_name": "blocks.1.hook_mlp_in"},
        "does not say what it writes",
    ),
    "far": (
        {
            "architecture": "transcoder",
            "hook_name": "blocks.1.hook_mlp_in",
            "hook_name_out": "blocks.3.hook_mlp_out",
        },
        "no unit of one block",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_of_something_else_is_one_line(tmp_path, case):
    config, message = CONFIGS[case]
    save(tmp_path / "sae_weights.safetensors", tensors())
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        read_dictionary(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00", '{"activation_fn_kwargs": 3}'])
def test_a_damaged_config_is_one_line(tmp_path, text):
    save(tmp_path / "sae_weights.safetensors", tensors())
    (tmp_path / "cfg.json").write_text(text)
    with pytest.raises(UserError) as error:
        read_dictionary(tmp_path)
    assert "\n" not in str(error.value)


def test_files_that_are_cut_off_are_one_line(tmp_path):
    save(tmp_path / "whole.safetensors", of_ours(), **PLACED)
    saev(tmp_path / "sae.pt", SAEV["2"][0], tensors())
    torch.save(tensors(), tmp_path / "weights.pt")
    for name in ("whole.safetensors", "sae.pt", "weights.pt"):
        content = (tmp_path / name).read_bytes()
        for share in (0, 0.02, 0.1, 0.5, 0.9):
            path = tmp_path / f"cut-{name}"
            path.write_bytes(content[: int(share * len(content))])
            with pytest.raises(UserError) as error:
                read_dictionary(path)
            assert "\n" not in str(error.value)


def test_what_is_no_file_is_one_line(tmp_path):
    for path, message in ((tmp_path / "no", "no such file"), (tmp_path, "no weights of a dictionary")):
        with pytest.raises(UserError, match=message):
            read_dictionary(path)
    for number in (1, 2):
        save(tmp_path / f"{number}.safetensors", of_ours(), **PLACED)
    with pytest.raises(UserError, match="2 files of weights.*give one of them"):
        read_dictionary(tmp_path)
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}]), allow_pickle=True)
    np.save(tmp_path / "line.npy", np.arange(3.0))
    for name in ("objects", "line"):
        with pytest.raises(UserError, match="npy"):
            read_dictionary(tmp_path / f"{name}.npy")


def test_what_a_file_does_not_say_is_asked_for_by_name():
    for site, layers, message in (
        (None, ["all"], "add --site mlp.out"),
        ("mlp.out", ["all"], "add --mlp_layer LAYER"),
        ("mlp.out", ["1", "2"], "add --mlp_layer LAYER"),
    ):
        with pytest.raises(UserError, match=message):
            place(ours(site=None, layer=None), "a.pt", site, layers)
    found = ours(site=None, layer=None)
    place(found, "a.pt", "mlp.out", ["2"])
    assert (found.site, found.layer) == ("mlp.out", 2)
    for site, layers, message in (("mlp.out", ["all"], "--site mlp.out"), (None, ["2"], "--mlp_layer 2")):
        with pytest.raises(UserError, match=f"{message}: a.pt is of .*; leave the flag out"):
            place(ours(), "a.pt", site, layers)


@pytest.mark.parametrize("units, of", [(None, "neurons"), ("pairs", "pairs")])
def test_a_site_is_refused_where_no_file_asks_for_it(units, of):
    args = types.SimpleNamespace(unit_set=units, site="mlp.out", mlp_layer=["1"])
    with pytest.raises(UserError, match=f"^--site mlp.out: .* write, not {of}; leave it out$"):
        open_units(args, None)


def test_a_dictionary_of_another_width_layer_or_model_is_refused(vit):
    clip = types.SimpleNamespace(vit=vit, fingerprint="1234")
    wide = Dictionary(torch.rand(U, 48), torch.rand(U), torch.rand(U, 48), torch.rand(48), "mlp.out", 1)
    check_tower(wide, "a", clip)
    wide.fingerprint = "1234"
    check_tower(wide, "a", clip)
    with pytest.raises(UserError, match="reads 12 and writes 12 numbers.*48 wide"):
        check_tower(ours(), "a", clip)
    wide.layer = 4
    with pytest.raises(UserError, match="is of layer 4.*0 to 3"):
        check_tower(wide, "a", clip)
    wide.layer = 1
    wide.fingerprint = "other"
    with pytest.raises(UserError, match="other weights"):
        check_tower(wide, "a", clip)


def test_fixtures_are_small():
    files = [path for path in Path(ROOT / "tests" / "dictionaries").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 200_000


def mutated(content, rng):
    """Change a file: bytes, a part cut out, zeros, or a part twice."""
    content = bytearray(content)
    kind = rng.integers(4)
    place = int(rng.integers(len(content)))
    length = int(rng.integers(1, 40))
    if kind == 0:
        for _ in range(int(rng.integers(1, 6))):
            content[int(rng.integers(len(content)))] = int(rng.integers(256))
    elif kind == 1:
        del content[place : place + length]
    elif kind == 2:
        content[place : place + length] = bytes(len(content[place : place + length]))
    else:
        content[place:place] = content[place : place + length]
    return bytes(content)


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.parent.name)
def test_a_mutated_file_is_one_line_or_a_dictionary_that_fits_together(path, tmp_path):
    rng = np.random.default_rng(int(os.environ.get("SEED", 0)))
    files = {file.name: file.read_bytes() for file in path.parent.iterdir() if file.name != "expected.npz"}
    for number in range(int(os.environ.get("MUTATIONS", 12))):
        folder = tmp_path / str(number)
        folder.mkdir()
        name = list(files)[int(rng.integers(len(files)))]
        for other, content in files.items():
            (folder / other).write_bytes(mutated(content, rng) if other == name else content)
        try:
            found = read_dictionary(folder)
        except UserError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
        else:
            f = found.encode(torch.randn(3, found.encoder.shape[1]))
            assert f.shape == (3, len(found.decoder)) and found.decode(f).shape == (3, found.decoder.shape[1])
