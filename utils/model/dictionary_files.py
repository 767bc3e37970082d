"""Read dictionaries of units from the files of several libraries, and write them in a format of our own.

    ours                   one .safetensors; `save_dictionary` says its names and metadata
    SAELens                a folder: cfg.json, sae_weights.safetensors
    ViT-Prisma             a folder: config.json, weights.pt or n_images_*.pt
    saev                   sae.pt: a line of JSON, then a state dict
    dictionary_learning    a folder: config.json, ae.pt
    overcomplete           a state dict, with its top_k or threshold in config.json
    directions             .npy [U, d]

Files are judged by their content, and nothing that they contain is run: safetensors, JSON, YAML without tags,
and pickles of tensors, numbers and ViT-Prisma's config, which is read as a plain record.
"""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save

from utils.model.checkpoints import read_file, why_unreadable
from utils.model.dictionaries import ACTIVATIONS, NORMS, READS, SITES, TOKENS, Dictionary
from utils.model.fitting import as_floats
from utils.runtime.errors import UserError
from utils.runtime.files import one_line, read_array, save_atomic

WEIGHTS = (  # of a folder: the first that is there
    "sae_weights.safetensors",
    "weights.pt",
    "n_images_*.pt",
    "ae.pt",
    "sae.pt",
    "model.safetensors",
    "*.safetensors",
    "*.pt",
)
CONFIGS = ("cfg.json", "config.json", "config.yaml", "config.yml")
HOOKS = {  # names of sites, after TransformerLens: (site, how many blocks back)
    "hook_resid_post": ("resid.post", 0),
    "hook_resid_pre": ("resid.post", 1),
    "hook_mlp_out": ("mlp.out", 0),
    "hook_attn_out": ("attn.out", 0),
    "hook_mlp_in": ("mlp.in", 0),
    "ln2.hook_normalized": ("mlp.in", 0),
}
BLOCK = re.compile(r"(?:blocks|layers|resblocks)\.(\d+)(?:\.(.+))?")
AGAIN = "give the files as the library saved them"


# stands for the config object in a pickle of ViT-Prisma: it has its name, attributes, and no code
_Record = type("VisionModelSAERunnerConfig", (), {"__module__": "vit_prisma.sae.config"})


def read_dictionary(path):
    """Read a `Dictionary` from a file, or from a folder with one.

    Raises UserError, which says what is wrong, for anything else.
    """
    path = Path(path)
    file = weights_in(path) if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--units {path}: there is no such file or folder")
    if file.suffix == ".json":
        file = weights_in(file.parent)
    if file.suffix == ".npy":
        found = of_directions(file)
    else:
        try:
            found = of_content(file)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            what = f"{type(error).__name__} {one_line(error)[:100]}"
            raise UserError(f"{file} is no dictionary that is known ({what}); {AGAIN}") from error
    found.check(file)
    return found


def weights_in(folder):
    """Return the file of weights in a folder. Raises UserError where there is none, or one of several."""
    for pattern in WEIGHTS:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:4])
            raise UserError(f"{folder} has {len(found)} files of weights ({names}, ...); give one of them")
        if found:
            return found[0]
    raise UserError(f"{folder} has no weights of a dictionary; give its folder or file (docs/units.md)")


def config_of(file):
    """Read the config beside a file of weights, {key: value}; {} where there is none."""
    for name in CONFIGS:
        path = file.with_name(name)
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
            found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({one_line(error)[:100]}); {AGAIN}") from error
        if not isinstance(found, dict):
            raise UserError(f"{path} is no config; {AGAIN}")
        return found
    return {}


def of_content(file):
    """Return the `Dictionary` of a file of weights, by what is in it."""
    with open(file, "rb") as opened:
        start = opened.read(2)
        opened.seek(0)
        if start in (b'{"', b"{ ") and file.suffix != ".safetensors":
            return of_saev(file, opened.readline(2**20), opened.read())
    config = config_of(file)
    metadata = metadata_of(file)
    if "site" in metadata or "activation" in metadata:
        return of_ours(floats(read_file(file, shards=False), file), metadata)
    with torch.serialization.safe_globals([_Record]):
        content = read_file(file, shards=False)
    if isinstance(content.get("cfg"), _Record):
        config = {**vars(content["cfg"]), **config}
    if isinstance(content.get("cfg"), dict):
        config = {**content["cfg"], **config}
    state = content["state_dict"] if isinstance(content.get("state_dict"), dict) else content
    state = floats(state, file)
    if "dictionary._weights" in state:
        return of_overcomplete(state, config)
    if "encoder.weight" in state:
        return of_linear(state, config)
    if "W_enc" in state and "W_dec" in state:
        return of_capitals(state, config)
    names = ", ".join(list(state)[:6]) or "no tensor"
    raise UserError(f"{file} is no dictionary that is known: it has {names}; see docs/units.md")


def floats(state, file):
    """Return the tensors of a state dict in float32. Raises UserError for weights that are no floats."""
    weights = {name: of for name, of in state.items() if isinstance(of, torch.Tensor)}
    counts = {name for name, of in weights.items() if of.ndim < 2 and not of.is_complex()}
    return {name: of.float() if name in counts else as_floats(name, of, file) for name, of in weights.items()}


def metadata_of(file):
    """Return the metadata of a .safetensors, {key: text}; {} for other files."""
    with contextlib.suppress(Exception), safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})
    return {}


def of_directions(file):
    """Return the `Dictionary` of plain directions, .npy [U, d]: a unit acts by x along its vector."""
    try:
        array = read_array(file)
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({one_line(error)[:100]}); give an .npy [U, d]") from error
    if array.ndim != 2 or array.dtype.kind not in "fiu" or not array.size:
        has = f"{array.dtype} {' x '.join(map(str, array.shape))}"
        raise UserError(f"{file} holds {has}, and directions are numbers [U, d]; give such an .npy")
    vectors = torch.from_numpy(array.astype(np.float32))
    U, d = vectors.shape
    wide = vectors.double()
    encoder = (wide / wide.square().sum(dim=1, keepdim=True).clamp_min(1e-300)).float()
    found = Dictionary(encoder, torch.zeros(U), vectors, torch.zeros(d), activation="identity")
    found.rebuilds = False
    return found


# our own format


def save_dictionary(path, dictionary):
    """Write a `Dictionary` as one .safetensors.

    Tensors: encoder.weight [U, d_in], encoder.bias [U], decoder.weight [U, d], decoder.bias [d], perhaps
    threshold [U]. Metadata: site, layer, reads, activation, k, subtract_decoder_bias ("true", "false"),
    tokens and, where it is known, fingerprint.
    """
    tensors = {
        "encoder.weight": dictionary.encoder,
        "encoder.bias": dictionary.encoder_bias,
        "decoder.weight": dictionary.decoder,
        "decoder.bias": dictionary.decoder_bias,
    }
    if dictionary.threshold is not None:
        tensors["threshold"] = dictionary.threshold
    metadata = {"site": dictionary.site, "layer": str(dictionary.layer), "reads": dictionary.reads}
    metadata |= {"activation": dictionary.activation, "tokens": dictionary.tokens}
    metadata["subtract_decoder_bias"] = "false" if dictionary.input_bias is None else "true"
    if dictionary.k:
        metadata["k"] = str(dictionary.k)
    if dictionary.fingerprint:
        metadata["fingerprint"] = str(dictionary.fingerprint)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_atomic(path, lambda file: file.write(save(tensors, metadata)))


def of_ours(state, metadata):
    """Return the `Dictionary` of our own format, as `save_dictionary` writes it."""
    known = {"site": SITES, "reads": READS, "activation": (*ACTIVATIONS, "batchtopk"), "tokens": TOKENS}
    known["subtract_decoder_bias"] = ("true", "false")
    for key, values in known.items():
        if key in metadata and metadata[key] not in values:
            raise ValueError(f"its {key} is {metadata[key]!r}, and known are {', '.join(values)}")
    bias = state["decoder.bias"]
    return Dictionary(
        state["encoder.weight"],
        state["encoder.bias"],
        state["decoder.weight"],
        bias,
        site=metadata.get("site"),
        layer=int(metadata["layer"]) if "layer" in metadata else None,
        reads=metadata.get("reads", "same"),
        **activation_of(metadata.get("activation", "relu"), metadata.get("k"), state.get("threshold")),
        input_bias=bias if metadata.get("subtract_decoder_bias") == "true" else None,
        tokens=metadata.get("tokens", "all"),
        fingerprint=metadata.get("fingerprint", ""),
    )


def activation_of(name, k=None, threshold=None):
    """Return the fields activation, k and threshold of a `Dictionary`.

    name: of the activation, in small letters. A batch top-k acts above its threshold, one for all images.

    Raises ValueError for an unknown one, and for a batch top-k without threshold.
    """
    if name in ("batchtopk", "batch_topk"):
        if threshold is None or not bool((threshold >= 0).all()):
            raise ValueError("a batch top-k without threshold depends on the batch; save its threshold")
        name = "jumprelu"
    if name == "jumprelu" and threshold is None:
        raise ValueError("a jumprelu without threshold")
    if name not in ACTIVATIONS:
        raise ValueError(f"its activation is {name!r}, and known are {', '.join(ACTIVATIONS)}")
    return {"activation": name, "k": None if k is None else int(k), "threshold": threshold}


# other libraries


def of_capitals(state, config):
    """Return the `Dictionary` of SAELens, ViT-Prisma, and dictionary_learning where it has W_enc, W_dec."""
    nested = [config[key] for key in ("metadata", "trainer") if isinstance(config.get(key), dict)]
    for more in nested:
        config = {**config, **more}
    architecture = config.get("architecture") or "standard"
    refuse_other_units(state, config, architecture)
    transcoder = "transcoder" in architecture or config.get("is_transcoder") is True
    norm = norm_of(config, transcoder)
    W_enc, W_dec, b_dec = (state[name] for name in ("W_enc", "W_dec", "b_dec"))
    bias = state.get("b_enc", torch.zeros(W_enc.shape[1]))
    if config.get("rescale_acts_by_decoder_norm"):
        lengths = W_dec.norm(dim=1)
        W_enc, bias, W_dec = W_enc * lengths, bias * lengths, W_dec / lengths[:, None]
    fields = activation_in(state, config, architecture)
    usual = not transcoder and config.get("dict_class") != "JumpReluAutoEncoder"
    subtracts = config.get("apply_b_dec_to_input", usual)
    if config.get("cls_token_only"):
        fields["tokens"] = "class"
    elif config.get("use_patches_only"):
        fields["tokens"] = "patches"
    fields |= {"norm": norm, "input_bias": b_dec if subtracts else None, **place_of(config, transcoder)}
    return Dictionary(W_enc.T.contiguous(), bias, W_dec, b_dec, **fields)


def refuse_other_units(state, config, architecture):
    """Raise ValueError for what is not a sum of units of one site."""
    others = ("skip", "matching", "temporal", "abstopk", "clt", "crosscoder")
    if any(name in architecture for name in others) or "W_skip" in state:
        raise ValueError(f"its architecture is {architecture!r}, which is more than units of one site")
    if config.get("reshape_activations", "none") != "none":
        raise ValueError("it is of single heads before their output, and units write into the stream")


def norm_of(config, transcoder):
    """Return the norm of `Dictionary` in a config. Raises ValueError for one whose numbers are not there."""
    norm = config.get("normalize_activations") or "none"
    if norm is True or norm in ("expected_average_only_in", "covariance_whitening"):
        raise ValueError("its inputs are scaled by numbers that no file has; fold them into the weights")
    if norm not in NORMS or (transcoder and norm != "none"):
        raise ValueError(f"normalize_activations is {norm!r}, and known are {', '.join(NORMS)}")
    return norm


def activation_in(state, config, architecture):
    """Return the fields of a `Dictionary` about its activation, from the tensors and config of a library."""
    if architecture == "gated" or "r_mag" in state:
        return {"activation": "gated", "gate": tuple(state[name] for name in ("b_gate", "r_mag", "b_mag"))}
    name = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    if config.get("dict_class"):
        name = {"JumpReluAutoEncoder": "jumprelu", "MatryoshkaBatchTopKSAE": "batchtopk"}[
            config["dict_class"]
        ]
    arguments = config.get("activation_fn_kwargs") or {}
    k = config.get("k", arguments.get("k"))
    threshold = state.get("threshold", state.get("topk_threshold"))
    if "topk" in architecture:
        name = "batchtopk" if "batch" in architecture else "topk"
    if "jumprelu" in architecture or (threshold is not None and name == "relu"):
        name = "jumprelu"
    return activation_of(str(name).lower(), k, threshold)


def hook_of(name):
    """Return the site (or mlp.in) and the block of the name of a hook or module."""
    found = BLOCK.search(str(name))
    if not found:
        raise ValueError(f"its site is {name!r}, and known are blocks.LAYER.hook_resid_post and the like")
    rest = found[2] or "hook_resid_post"  # a whole block
    if rest not in HOOKS:
        raise ValueError(f"its site is {name!r}, and known are {', '.join(HOOKS)}")
    site, back = HOOKS[rest]
    return site, int(found[1]) - back


def place_of(config, transcoder):
    """Return the fields site, layer and reads of a `Dictionary` that a config says; {} for none."""
    read = config.get("hook_name") or config.get("hook_point")
    out = config.get("hook_name_out")
    if read is None and "hook_point_layer" in config and "layer_subtype" in config:
        read = f"blocks.{config['hook_point_layer']}.{config['layer_subtype']}"
    if transcoder and out is None and "layer_out_subtype" in config:
        layer = config.get("out_hook_point_layer", config.get("hook_point_layer"))
        out = f"blocks.{layer}.{config['layer_out_subtype']}"
    if read is None:
        return {}
    before = hook_of(read)
    if transcoder and out is None:
        raise ValueError("a transcoder whose config does not say what it writes")
    site, layer = hook_of(out or read)
    if site not in SITES or before not in ((site, layer), ("mlp.in", layer)):
        raise ValueError(f"it reads {read} and writes {out or read}, which is no unit of one block")
    return {"site": site, "layer": layer, "reads": "same" if before == (site, layer) else "mlp.in"}


def of_linear(state, config):
    """Return the `Dictionary` of dictionary_learning, with encoder.weight and decoder.weight.

    decoder.weight may lie either way round, as far as its shape tells.
    """
    if "multiplier" in state:
        raise ValueError("it has a multiplier whose meaning is not known; put it into the decoder")
    trainer = config.get("trainer") if isinstance(config.get("trainer"), dict) else config
    encoder = state["encoder.weight"]
    U, d = encoder.shape
    decoder = state["decoder.weight"]
    if tuple(decoder.shape) == (d, U):  # as nn.Linear has it
        decoder = decoder.T.contiguous()
    names = ("b_dec", "bias", "decoder_bias", "decoder.bias")
    name = next((name for name in names if name in state), None)
    bias = torch.zeros(d) if name is None else state[name]
    threshold = state.get("threshold", state.get("_running_threshold"))
    kinds = {"AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk"}
    kind = kinds.get(trainer.get("dict_class"), trainer.get("activation"))
    if "gate_bias" in state:
        gate = tuple(state[name] for name in ("gate_bias", "r_mag", "mag_bias"))
        fields = {"activation": "gated", "gate": gate}
    elif kind is None and (threshold is not None or "k" in state):
        raise ValueError("without its config.json it is not known whether it is a top-k or a batch top-k")
    else:
        fields = activation_of(kind or "relu", trainer.get("k"), threshold)
    subtracted = None if name in (None, "decoder.bias") else bias
    return Dictionary(
        encoder, state.get("encoder.bias", torch.zeros(U)), decoder, bias, **fields, input_bias=subtracted
    )


def of_overcomplete(state, config):
    """Return the `Dictionary` of overcomplete, with its linear encoder; a batch norm is folded into it.

    The library saves no settings: config.json beside it has top_k, threshold (of a batch top-k), or relu:
    true.
    """
    weight = state["encoder.final_block.0.weight"]
    bias = state["encoder.final_block.0.bias"]
    if any(name.startswith("encoder.mlp_blocks") for name in state):
        raise ValueError("its encoder has several layers")
    if "encoder.final_block.1.running_var" in state:
        norm = {name: state[f"encoder.final_block.1.{name}"] for name in ("weight", "bias", "running_mean")}
        scale = norm["weight"] / (state["encoder.final_block.1.running_var"] + 1e-5).sqrt()
        weight = weight * scale[:, None]
        bias = (bias - norm["running_mean"]) * scale + norm["bias"]
    decoder = state["dictionary._weights"]
    if config.get("normalization", "l2") == "l2":
        decoder = decoder / (decoder.norm(dim=1, keepdim=True) + 1e-8)
    elif config["normalization"] != "identity":
        raise ValueError(f"its normalization is {config['normalization']!r}; known are l2 and identity")
    decoder = decoder * state.get("dictionary.multiplier", torch.zeros(())).exp()
    threshold = config.get("threshold", state.get("running_threshold"))
    if threshold is not None:
        fields = activation_of("jumprelu", None, torch.as_tensor(threshold, dtype=torch.float32))
    elif config.get("top_k"):
        fields = activation_of("topk", config["top_k"])
    elif config.get("relu") is True:
        fields = activation_of("relu")
    else:
        raise ValueError("its top_k is in no file; write it into config.json beside it")
    return Dictionary(weight, bias, decoder, torch.zeros(decoder.shape[1]), **fields)


def of_saev(file, line, rest):
    """Return the `Dictionary` of saev: a line of JSON, then a state dict.

    Files without a schema and those of the Matryoshka class take b_dec off before the encoder.
    """
    header = json.loads(line)
    try:
        state = torch.load(io.BytesIO(rest), map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle each raise their own
        raise UserError(why_unreadable(file, error, damaged=True)) from error
    schema = header.get("schema", 0)
    if schema not in range(6):
        raise ValueError(f"its schema is {schema!r}, and known are 0 to 5")
    config = header["cfg"] if schema else header
    kind = config.get("activation", header.get("cls", "Relu"))
    if isinstance(kind, dict):
        config = kind.get("params", {})
        kind = kind["cls"]
    kinds = {"Relu": "relu", "TopK": "signed_topk", "BatchTopK": "batchtopk"}
    if kind == "SparseAutoencoderConfig":
        kind = "Relu"
    if kind not in kinds:
        raise ValueError(f"its activation is {kind!r}, and known are {', '.join(kinds)}")
    threshold = next((of for name, of in state.items() if name.endswith("threshold")), None)
    fields = activation_of(kinds[kind], config.get("top_k"), threshold)
    subtracts = not schema or "Matryoshka" in str(header.get("cls"))
    state = floats(state, file)
    W_enc, b_enc, W_dec, bias = (state[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    return Dictionary(
        W_enc.T.contiguous(), b_enc, W_dec, bias, **fields, input_bias=bias if subtracts else None
    )
