"""Load a CLIP: `load_clip` makes the model, its image tower as a `HookedViT`, and what results say about
it.
"""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from utils.model import hugging_face, preprocessing, tokenizers
from utils.model.hooks import HookedViT
from utils.model.loading import create
from utils.runtime.errors import UserError
from utils.runtime.files import one_line
from utils.runtime.records import Digest, digest_of_parts
from utils.runtime.results import model_name, pretrained_name

# parts of the names of classes that are activations
ACTIVATIONS = ("GELU", "ReLU", "SiLU", "Tanh", "Sigmoid", "Activation", "Mish", "SquaredReLU")
STRUCTURE = (  # attributes of modules that change what is computed
    "num_heads",
    "eps",
    "pool_type",
    "text_pool_type",
    "eos_id",
    "text_eos_id",
    "final_ln_after_pool",
    "attn_pool_type",
    "text_pad",
)


@dataclass
class Clip:
    """A Clip is a loaded CLIP.

    vit: the image tower, a `HookedViT`.
    text: the open_clip model or `TwoTowers`, which embeds texts; None where only images were asked for.
    transform: PIL image -> [3, height, width], a `Preprocessing`.
    load_tokenizer: () -> `tokenizer`. Some come from the hub, so it is called only where texts are embedded.
    record: {key: value} about the model in the records of results: names, fingerprint of the weights, and
        precision where it is not float32.
    device: where the model is.
    units: the `utils.units.UnitSet` that is looked at; None for neurons.
    """

    vit: HookedViT
    text: Any
    transform: Any
    load_tokenizer: Any
    record: dict
    device: torch.device
    units: Any = None

    @functools.cached_property
    def tokenizer(self):
        """The tokenizer is a function: list of texts -> tokens [texts, context].

        Raises UserError when it can neither be found nor fetched.
        """
        try:
            return self.load_tokenizer()
        except UserError:
            raise
        except Exception as error:  # the hub and transformers raise their own
            model = self.record["model"]
            why = f"could not be loaded: {one_line(error)[:160]}"
            raise UserError(f"the tokenizer of --model {model} {why}") from error

    @property
    def text_record(self):
        """The text record is `record`, with a digest of the tokenizer if the model brings its own."""
        tokenizer = self.tokenizer
        if isinstance(tokenizer, tokenizers.FolderTokenizer):
            digest = tokenizer.digest
            if tokenizer.is_openais():  # then results of earlier versions, which have no digest, agree
                digest = Digest(digest, None)
            return {**self.record, "tokenizer": digest}
        of_library = getattr(tokenizer, "tokenizer", None)  # of a config that names one
        if of_library:
            return {**self.record, "tokenizer": Digest(tokenizers.digest_of(of_library), None)}
        return self.record

    @property
    def units_record(self):
        """The record of units is what results about other units than neurons have besides `record`."""
        return {} if self.units is None else {"unit_set": self.units.digest}

    @property
    def fingerprint(self):
        """The fingerprint is the `weights_fingerprint` of the model."""
        return self.record["fingerprint"]

    @property
    def expected(self):
        """The expected part of a record of image results is the fingerprint and the preprocessing."""
        return {"fingerprint": self.fingerprint, "preprocessing": self.transform.digest}


def clip_of(args, texts=False):
    """Load the CLIP that a stage's flags name: its image tower, with `texts` its text tower too.

    args: model, pretrained, device and, where the stage has it, precision.

    Raises UserError as `load_clip` does.
    """
    precision = getattr(args, "precision", "float32")
    return load_clip(args.model, args.pretrained, args.device, precision=precision, image_only=not texts)


def load_clip(model, pretrained, device, seed=0, precision="float32", image_only=False):
    """Load a CLIP in float32, for evaluation, with the activation that its tag or config says.

    model: an open_clip name, `hf-hub:ORG/NAME`, `local-dir:PATH`, `hf:ORG/NAME`, or the path of a
        model-config json.
    pretrained: an open_clip tag, a checkpoint's path, or 'random'; ignored where the model names its weights.
    device: where the weights go.
    seed: of random weights.
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
            clip, load_tokenizer, folder = create(model, pretrained, image_only)
            clip = clip.to(device).eval().requires_grad_(False)
    except UserError:
        raise
    except Exception as error:  # open_clip, torch, safetensors and the hub each raise their own
        raise UserError(f"{given} could not be loaded: {one_line(error)[:200]}") from error
    if not all(parameter.isfinite().all() for parameter in clip.parameters()):
        raise UserError(f"the weights of {given} hold NaN or infinity; use another checkpoint")
    vit = HookedViT(clip.visual, precision)
    transform = preprocessing.choose(model, pretrained, clip.visual, folder)
    record = record_of(model, pretrained, precision, clip, folder)
    return Clip(vit, None if image_only else clip, transform, load_tokenizer, record=record, device=device)


def record_of(model, pretrained, precision, clip, folder):
    """Return what results say about a model: {key: value}.

    model, pretrained, precision: as in `load_clip`.
    clip: the open_clip model or `TwoTowers`.
    folder: of a model of the transformers library; else None.
    """
    record = {"model": model_name(model), "pretrained": pretrained_name(model, pretrained)}
    if precision != "float32":
        record["precision"] = precision
    fingerprint = weights_fingerprint(clip)
    if folder is not None and not hugging_face.is_as_before(folder):
        fingerprint = str(fingerprint)  # agrees with no result of an earlier version
    record["fingerprint"] = fingerprint
    return record


def weights_fingerprint(model):
    """Return a `Digest` of all weights in float32 and of the `structure` of a model.

    Earlier versions took 1,024 evenly spaced entries of every tensor.
    """
    now = hashlib.sha256("\n".join(structure(model)).encode())
    earlier = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        header = f"{name}{tuple(tensor.shape)}".encode()
        entries = tensor.reshape(-1).float().cpu()
        now.update(header)
        now.update(digest_of_parts([block.numpy() for block in entries.split(2**20)]).encode())
        earlier.update(header)
        earlier.update(entries[:: max(1, len(entries) // 1024)].numpy().tobytes())
    return Digest(now.hexdigest()[:16], earlier.hexdigest()[:12])


def structure(model):
    """Return lines of text about heads, activations and the like, which are in no weight of a model."""
    lines = []
    for name, module in model.named_modules():
        found = {key: getattr(module, key, None) for key in STRUCTURE}
        found = {key: value for key, value in found.items() if isinstance(value, int | float | str)}
        if getattr(module, "attn_mask", None) is not None:
            found["causal"] = True
        if any(kind in type(module).__name__ for kind in ACTIVATIONS):
            found["activation"] = repr(module)
        if found:
            lines.append(f"{name} {sorted(found.items())}")
    return lines
