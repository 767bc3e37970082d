"""Load a CLIP by open_clip name and tag, local checkpoint or model-config json."""

import contextlib
import difflib
import functools
import hashlib
import json
import logging
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import snapshot_download
from open_clip.model import set_model_preprocess_cfg
from open_clip.transform import merge_preprocess_dict

from utils.model import checkpoints, preprocessing, tokenizers
from utils.model.hooks import HookedViT
from utils.runtime.errors import UserError
from utils.runtime.files import one_line
from utils.runtime.records import Digest, digest_of_parts
from utils.runtime.results import file_and_key, is_checkpoint_path, model_name, pretrained_name

OPEN_CLIPS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # weights in a folder
ACTIVATIONS = (
    "GELU",
    "ReLU",
    "SiLU",
    "Tanh",
    "Sigmoid",
    "Activation",
    "Mish",
    "SquaredReLU",
)  # in names of classes
STRUCTURE = (
    "num_heads",
    "eps",
    "pool_type",
    "text_pool_type",
    "eos_id",
    "text_eos_id",
    "final_ln_after_pool",
    "attn_pool_type",
)
STRUCTURAL = (int, float, str, bool)


@dataclass
class Clip:
    """A loaded CLIP.

    vit, device: the image tower; where the model is.
    text: the open_clip model, which embeds texts; None where only the image tower was asked for.
    transform: PIL image -> [3, height, width], as `utils.model.preprocessing.choose` gives it.
    load_tokenizer: () -> `tokenizer`; some come from the hub, so it is asked for where texts are.
    record: what results say about the model: names, precision where it is not float32, fingerprint of the
        weights.
    """

    vit: HookedViT
    text: Any
    transform: Any
    load_tokenizer: Any
    record: dict
    device: torch.device

    @functools.cached_property
    def tokenizer(self):
        """List of texts -> tokens [texts, context]. Raises UserError when it can neither be found nor
        fetched.
        """
        try:
            return self.load_tokenizer()
        except UserError:
            raise
        except Exception as error:  # the hub and transformers raise their own
            why = f"the tokenizer of --model {self.record['model']} could not be loaded: {one_line(error)[:160]}"
            raise UserError(why) from error

    @property
    def text_record(self):
        """What results about texts say about the model: `record`, and a digest of a folder's own tokenizer,
        if it has one.
        """
        tokenizer = self.tokenizer
        if isinstance(tokenizer, tokenizers.FolderTokenizer):
            same = tokenizer.is_openais()
            return {**self.record, "tokenizer": Digest(tokenizer.digest, None) if same else tokenizer.digest}
        of_library = getattr(tokenizer, "tokenizer", None)  # of a config that names one
        return (
            {**self.record, "tokenizer": Digest(tokenizers.digest_of(of_library), None)}
            if of_library
            else self.record
        )

    @property
    def fingerprint(self):
        """As `weights_fingerprint` gives it."""
        return self.record["fingerprint"]

    @property
    def expected(self):
        """What records of results about images must agree with: weights and preprocessing."""
        return {"fingerprint": self.fingerprint, "preprocessing": self.transform.digest}


def load_clip(model, pretrained, device, seed=0, precision="float32", image_only=False):
    """Load a CLIP in float32, for evaluation, with the activation that its weights were trained with (the
    tag's or config's).

    model: an open_clip name, `hf-hub:ORG/NAME`, `local-dir:PATH`, `hf:ORG/NAME`, or the path of a
        model-config json.
    pretrained: an open_clip tag, a checkpoint's path, or 'random'; ignored where the model names its weights.
    device, seed: where the weights go, and what random ones are drawn from.
    precision: of the image tower's forward pass; the weights stay in float32.
    image_only: drop the text tower, so that it takes no memory.

    Raises UserError for an unknown name or tag (with near matches), for weights that do not fit, cannot be
    fetched or are not finite, and for an image tower that the method does not cover.
    """
    device = torch.device(device)
    if precision == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 is a mode of CUDA GPUs; use float32 or bfloat16")
    given = f"--model {model}"
    if not model.startswith(("hf-hub:", "hf:", "local-dir:")):
        given += f" --pretrained {pretrained}"
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            folder = _hugging_face_folder(model)
            clip, load_tokenizer = _create(model, pretrained, folder, image_only)
            clip = clip.to(device).eval().requires_grad_(False)
    except UserError:
        raise
    except Exception as error:  # open_clip, torch, safetensors and the hub each raise their own
        raise UserError(f"{given} could not be loaded: {one_line(error)[:200]}") from error
    if not all(parameter.isfinite().all() for parameter in clip.parameters()):
        raise UserError(f"the weights of {given} hold NaN or infinity; use another checkpoint")
    vit = HookedViT(clip.visual, precision)
    transform = preprocessing.choose(model, pretrained, clip.visual, folder)
    record = {"model": model_name(model), "pretrained": pretrained_name(model, pretrained)}
    record |= {} if precision == "float32" else {"precision": precision}
    fingerprint = weights_fingerprint(clip)
    if folder is not None and not checkpoints.as_before(
        checkpoints.parse_config(checkpoints.read_config(folder), folder)
    ):
        fingerprint = str(fingerprint)  # agrees with no result of an earlier version
    record["fingerprint"] = fingerprint
    return Clip(vit, None if image_only else clip, transform, load_tokenizer, record=record, device=device)


def _create(model, pretrained, folder, image_only):
    """The open_clip model on the CPU, and a function that makes its tokenizer. folder: of a `CLIPModel`; else
    None.
    """
    name = _register_config(model) if model.endswith(".json") else model
    if folder is not None:
        weights = checkpoints.weights_file(folder)
        if weights is None:
            files = ", ".join(checkpoints.FOLDER)
            raise UserError(f"--model {name}: {folder} has no weights; put one of {files} there")
        clip, load_tokenizer = checkpoints.model_of_config(checkpoints.read_config(folder), folder)
        checkpoints.load_weights(clip, weights, image_only)
        return clip, load_tokenizer
    if name.startswith("local-dir:"):
        return _of_open_clips_folder(name, image_only), partial(open_clip.get_tokenizer, name)
    if name.startswith("hf-hub:"):
        return open_clip.create_model(name, require_pretrained=True), partial(open_clip.get_tokenizer, name)
    _check_names(name, pretrained)
    if pretrained == "random" or is_checkpoint_path(pretrained):
        with _without_notes():
            clip = open_clip.create_model(
                name, pretrained_text=False
            )  # else the hub is asked for a text tower's weights
        if pretrained != "random":
            checkpoints.load_weights(clip, pretrained, image_only)
            folder = Path(file_and_key(pretrained)[0]).parent
            if config := checkpoints.read_config(folder):
                text = checkpoints.parse_config(config, folder).text_config
                return clip, partial(tokenizers.load_tokenizer, folder, text)
    else:
        quick = open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)
        clip = open_clip.create_model(name, pretrained=pretrained, force_quick_gelu=quick)
    return clip, partial(open_clip.get_tokenizer, name)


def _of_open_clips_folder(name, image_only):
    """The model of `local-dir:PATH`, a folder with open_clip's config and weights."""
    folder = Path(name.removeprefix("local-dir:"))
    config = folder / preprocessing.CONFIG
    if not config.is_file():
        kind = checkpoints.model_type(folder)
        what = (
            f"its config.json says model_type {kind!r}, and clip is covered"
            if kind
            else f"it has no {preprocessing.CONFIG}"
        )
        raise UserError(f"--model {name} could not be loaded: {what}; give the folder of a CLIP")
    weights = next(
        (folder / file for file in (*OPEN_CLIPS, *checkpoints.FOLDER) if (folder / file).is_file()), None
    )
    if weights is None:
        raise UserError(
            f"--model {name} could not be loaded: it has no weights; put one of {', '.join(OPEN_CLIPS)} there"
        )
    with _without_notes():
        clip = open_clip.create_model(_register_config(str(config)), pretrained_text=False)
    checkpoints.load_weights(clip, weights, image_only)
    fields = json.loads(config.read_text(encoding="utf-8-sig")).get("preprocess_cfg")
    if isinstance(fields, dict):
        set_model_preprocess_cfg(clip, merge_preprocess_dict(clip.visual.preprocess_cfg, fields))
    return clip


@contextlib.contextmanager
def _without_notes():
    """open_clip warns that a model without its tag is random; here that is meant, or its weights are loaded
    afterwards.
    """
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers = list(root.handlers)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers  # the first warning of a process adds one


def _hugging_face_folder(name):
    """The folder of a `CLIPModel` of the transformers library: `local-dir:PATH` of one, or `hf:ORG/NAME`;
    else None.
    """
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        of_library = checkpoints.read_config(folder) and checkpoints.weights_file(folder)
        return (
            folder
            if of_library or not (folder / preprocessing.CONFIG).is_file() and checkpoints.read_config(folder)
            else None
        )
    if not name.startswith("hf:"):
        return None
    files = ["config.json", "preprocessor_config.json", "processor_config.json"]
    files += [*tokenizers.WHOLE, *tokenizers.PARTS]
    try:
        for form in ("model{}.safetensors", "pytorch_model{}.bin"):  # .bin only where there is nothing else
            files += [form.format(""), form.format("-*"), form.format("") + ".index.json"]
            folder = Path(snapshot_download(name.removeprefix("hf:"), allow_patterns=files))
            if checkpoints.weights_file(folder):
                break
    except Exception as error:  # the hub has many
        raise UserError(
            f"--model {name} is neither in the local cache nor could it be fetched: {one_line(error)[:160]}"
        ) from error
    if not checkpoints.read_config(folder) or not checkpoints.weights_file(folder):
        raise UserError(
            f"--model {name} is no CLIPModel of the transformers library with its weights; for open_clip's own "
            "models use hf-hub:ORG/NAME"
        )
    return folder


def _register_config(path):
    """Make a model-config json known to open_clip; returns the name that it has there.

    The hub's has the config under `model_cfg`, and `utils.model.preprocessing` reads what is beside that.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        config = config["model_cfg"] if "model_cfg" in config else config
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    except FileNotFoundError as error:
        raise UserError(
            f"--model {path}: there is no such file; give an open_clip name or the path of a config json"
        ) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"--model {path} is not a model config ({one_line(error)})") from error
    if missing:
        folder = Path(path).parent
        instead = (
            f"; it is one of the transformers library: use --model local-dir:{folder}"
            if "vision_config" in config
            else ""
        )
        raise UserError(
            f"--model {path} is not an open_clip model config: it has no {', '.join(missing)}{instead}"
        )
    name = model_name(path)
    with tempfile.TemporaryDirectory() as folder:  # open_clip reads configs from files alone
        file = Path(folder) / f"{name}.json"
        file.write_text(json.dumps(config))
        open_clip.add_model_config(file)
    return name


def _check_names(name, pretrained):
    """Raise UserError, with what to type, for a model or tag that open_clip does not know."""
    if name not in open_clip.list_models():
        if name.replace("/", "-") in open_clip.list_models():
            raise UserError(f"--model {name} is not known to open_clip; use --model {name.replace('/', '-')}")
        if Path(name).is_dir():
            raise UserError(f"--model {name} is a folder; use --model local-dir:{name}")
        hub = (
            f"; a model of the Hugging Face hub is --model hf:{name} (or hf-hub:{name}, open_clip's own)"
            if "/" in name
            else ""
        )
        raise UserError(
            f"--model {name} is not known to open_clip{hub or _near(name, open_clip.list_models())}"
        )
    if pretrained == "random" or is_checkpoint_path(pretrained):
        return
    if not open_clip.get_pretrained_cfg(name, pretrained):
        if Path(pretrained).exists():
            raise UserError(
                f"--pretrained {pretrained} is no tag; the path of a file needs a folder before it: ./{pretrained}"
            )
        tags = open_clip.list_pretrained_tags_by_model(name)
        hint = _near(pretrained, tags) if tags else "; it has no tags, give the path of a checkpoint"
        raise UserError(f"--pretrained {pretrained} is no tag of {name}{hint}")


def _near(word, choices):
    near = difflib.get_close_matches(word, choices, n=4, cutoff=0.4)
    return (
        f"; did you mean {', '.join(near)}?"
        if near
        else f"; there are {', '.join(sorted(choices)[:12])}, ..."
    )


def structure(model):
    """What of a model is in no weight and changes what it computes: lines of text."""
    lines = []
    for name, module in model.named_modules():
        found = {
            key: getattr(module, key)
            for key in STRUCTURE
            if isinstance(getattr(module, key, None), STRUCTURAL)
        }
        found |= {"causal": True} if getattr(module, "attn_mask", None) is not None else {}
        if any(kind in type(module).__name__ for kind in ACTIVATIONS):
            found["activation"] = repr(module)
        if found:
            lines.append(f"{name} {sorted(found.items())}")
    return lines


def weights_fingerprint(model):
    """A `Digest` of all bytes of all weights, in float32, and of what the config says of heads, activations
    and the like. Earlier versions took 1,024 evenly spaced entries of every tensor."""
    now, earlier = hashlib.sha256("\n".join(structure(model)).encode()), hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        header = f"{name}{tuple(tensor.shape)}".encode()
        entries = tensor.reshape(-1).float().cpu()
        now.update(header)
        now.update(digest_of_parts([block.numpy() for block in entries.split(2**20)]).encode())
        earlier.update(header)
        earlier.update(entries[:: max(1, len(entries) // 1024)].numpy().tobytes())
    return Digest(now.hexdigest()[:16], earlier.hexdigest()[:12])
