"""The outside models of the semantic adversarial attack: sentence similarity, language model, text-to-image
model.

Their packages (requirements-adversarial.txt) are imported here only, when a model is loaded. Weights are read
from safetensors only, and no code that comes with a model is run.
"""

import contextlib
import importlib
import importlib.util
import json
import os
from pathlib import Path

import torch
from PIL import Image

from utils.model.texts import text_vectors
from utils.runtime.errors import UserError
from utils.runtime.files import one_line

INSTALL = "pip install -r requirements-adversarial.txt"
FLUX = "black-forest-labs/FLUX.1-schnell"
FLUX_OPTIONS = {
    "num_inference_steps": 4,
    "guidance_scale": 0.0,
    "max_sequence_length": 256,
}  # its authors' settings
DEEPFLOYD = (
    "DeepFloyd/IF-I-XL-v1.0",
    "DeepFloyd/IF-II-L-v1.0",
)  # 64 pixels, then 256: more than a CLIP reads
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
TOKENS = 64  # room for one description
ALTERNATIVES = {  # what works without the model
    "--similarity_model": "--similarity_model clip needs no other model",
    "--text_model": "--text_model template needs no model",
    "--image_model": "--image_model MODULE:FUNCTION draws with a function of yours",
}


def parse_options(text):
    """Keyword arguments of `--image_options`, a dict. Raises UserError if the text is not a json object."""
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise UserError(
            f"--image_options {text} is not a json object such as '{{\"num_inference_steps\": 20}}'"
        )
    return options


def is_function(image_model):
    """Whether `--image_model` names a function, MODULE:FUNCTION."""
    return ":" in image_model and not Path(image_model).exists()


def require_packages(similarity_model="clip", text_model="template", image_model=None):
    """Raise UserError if a model needs a package that is not installed. Called before any work is done."""
    needed = []
    if similarity_model != "clip":
        needed.append((f"--similarity_model {similarity_model}", "sentence_transformers"))
    if text_model != "template":
        needed.append((f"--text_model {text_model}", "transformers"))
    if text_model.endswith(".gguf"):
        needed.append((f"--text_model {text_model}", "gguf"))
    if image_model is not None and not is_function(image_model):
        needed += [
            (f"--image_model {image_model}", package)
            for package in ("diffusers", "transformers", "accelerate")
        ]
    for flag, package in needed:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} needs the package {package.replace('_', '-')}: {INSTALL}")


@contextlib.contextmanager
def one_line_errors(flag, model, failed_on=None):
    """Turn whatever an outside library raises into a UserError of one line.

    failed_on: what the model was given; None while it is loaded.
    """
    try:
        yield
    except Exception as error:  # the hub, its cache and each library raise their own
        instead = "" if is_function(model) else f"; {ALTERNATIVES[flag]}"
        if isinstance(error, torch.OutOfMemoryError):
            smaller = (
                "add --offload, or choose a smaller model"
                if flag == "--image_model"
                else "choose a smaller model"
            )
            raise UserError(
                f"the device has not enough memory for {flag} {model}; {smaller}{instead}"
            ) from error
        reason = f"{type(error).__name__}: {one_line(error)[:160]}"
        what = f"failed on {failed_on}: {reason}" if failed_on else why_not_loaded(flag, model, error, reason)
        raise UserError(f"{flag} {model} {what}{instead}") from error


def why_not_loaded(flag, model, error, reason):
    """What an exception and its causes tell about a model that could not be loaded."""
    if is_function(model):
        return f"cannot be imported: {reason}; run the script in the folder of the module"
    causes, local = [error], Path(model).exists()
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    said = " ".join(f"{type(cause).__name__} {cause}" for cause in causes).lower()
    if not local and (model.startswith((".", os.sep)) or model.count("/") > 1 or model.endswith(".gguf")):
        return "does not exist"
    if isinstance(error, ImportError):
        return f"needs a package that is not installed ({one_line(error)[:120]}): {INSTALL}"
    if not local and ("gatedrepo" in said or "gated repo" in said):
        page = f"https://huggingface.co/{model}"
        return f"is gated: accept its licence on {page}, log in with `hf auth login`, and run the same command again"
    if not local and ("repositorynotfound" in said or "not a valid model identifier" in said):
        return f"is neither a folder nor a model that your Hugging Face account can see at https://huggingface.co/{model}"
    if "safetensors" in said and (
        "no file named" in said or "does not appear to have" in said or "not found" in said
    ):
        return f"has no weights in safetensors, and others are not opened; choose another {flag}"
    return f"could not be {'loaded' if local else 'fetched or loaded'}: {reason}"


def load_similarity(model, clip, batch_size):
    """A function from a list of texts to their unit vectors [texts, any], float32, on the CPU.

    model: 'clip' for the text tower of `clip`, else a sentence-transformers id or folder.
    """
    if model == "clip":
        return lambda texts: torch.from_numpy(text_vectors(clip, texts, batch_size))
    with one_line_errors("--similarity_model", model):
        import sentence_transformers

        options = {"model_kwargs": {"use_safetensors": True}, "trust_remote_code": False}
        encoder = sentence_transformers.SentenceTransformer(model, device=str(clip.device), **options)
    options = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}
    return lambda texts: encoder.encode(texts, batch_size=batch_size, **options).float().cpu()


class LanguageModel:
    """An instruct model of the transformers library: a Hugging Face id, a folder, or a .gguf file, with a
    chat template.
    """

    def __init__(self, model, device):
        self.model, self.device = model, device
        where, options, weights = model, {"trust_remote_code": False}, {"use_safetensors": True}
        if model.endswith(".gguf"):
            where, options["gguf_file"], weights = str(Path(model).parent), Path(model).name, {}
        with one_line_errors("--text_model", model):
            import transformers

            self.tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
            lm = transformers.AutoModelForCausalLM.from_pretrained(where, dtype="auto", **weights, **options)
            self.lm = lm.to(device).eval()
        if not self.tokenizer.chat_template:
            raise UserError(
                f"--text_model {model} has no chat template; choose an instruct model, or --text_model template"
            )

    @torch.inference_mode()
    def __call__(self, request, descriptions, seed):
        """Answer a request for so many descriptions. Returns the text, and whether it was cut off at the
        limit.
        """
        chat, form = [{"role": "user", "content": request}], {"return_tensors": "pt", "return_dict": True}
        inputs = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, **form).to(self.device)
        prompt = inputs["input_ids"].shape[1]
        room = getattr(self.lm.config, "max_position_embeddings", None) or 1 << 30
        limit = min(TOKENS * (descriptions + 1), room - prompt)
        if limit < TOKENS:
            raise UserError(
                f"the request has {prompt} tokens and --text_model {self.model} reads {room}; lower --overall_words"
            )
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        with (
            torch.random.fork_rng(range(torch.cuda.device_count())),
            one_line_errors("--text_model", self.model, "the request"),
        ):
            torch.manual_seed(seed)
            output = self.lm.generate(**inputs, max_new_tokens=limit, pad_token_id=pad, **SAMPLING)
        answer = output[0, prompt:]
        return self.tokenizer.decode(answer, skip_special_tokens=True), len(answer) == limit


def load_image_model(model, device, options, offload=False):
    """A function (description, seed) -> PIL image.

    model: FLUX, DeepFloyd, a diffusers id or folder, or package.module:function, called as
        function(description, seed=seed).
    device: where a pipeline draws.
    options: more keyword arguments of that function, or of the pipeline's call.
    offload: keep only the active part of the pipeline on the device.
    """
    if is_function(model):
        module, name = model.rsplit(":", 1)
        with one_line_errors("--image_model", model):
            function = getattr(importlib.import_module(module), name)
    elif model == "DeepFloyd":
        function = DeepFloyd(*DEEPFLOYD, device, offload)
    else:
        options = FLUX_OPTIONS | options if model == "FLUX" else options
        function = Pipeline(FLUX if model == "FLUX" else model, device, offload)

    def draw(description, seed):
        with one_line_errors("--image_model", model, f"{description!r} (seed {seed})"):
            image = function(description, seed=seed, **options)
        if not isinstance(image, Image.Image):
            raise UserError(
                f"--image_model {model} returned a {type(image).__name__}, and a PIL image is needed"
            )
        return image.convert("RGB")

    return draw


class Pipeline:
    """A text-to-image pipeline of the diffusers library."""

    def __init__(self, model, device, offload=False, **parts):
        with one_line_errors("--image_model", model):
            import diffusers

            dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
            options = {"torch_dtype": dtype, "use_safetensors": True}
            self.pipe = diffusers.DiffusionPipeline.from_pretrained(model, **options, **parts)
            self.pipe.set_progress_bar_config(disable=True)
            self.pipe.enable_model_cpu_offload(device=device) if offload else self.pipe.to(device)

    def __call__(self, description, seed, **options):
        return self.pipe(
            prompt=description, generator=torch.Generator("cpu").manual_seed(seed), **options
        ).images[0]


class DeepFloyd:
    """A pipeline that draws a small picture, and one that enlarges it; both read the text vectors of the
    first.
    """

    def __init__(self, first, second, device, offload=False):
        self.first = Pipeline(first, device, offload).pipe
        self.second = Pipeline(second, device, offload, text_encoder=None).pipe

    def __call__(self, description, seed, **options):
        wanted, unwanted = self.first.encode_prompt(description)
        given = {"prompt_embeds": wanted, "negative_prompt_embeds": unwanted, **options}
        given["generator"] = torch.Generator("cpu").manual_seed(seed)  # the same noise on every device
        small = self.first(**given, output_type="pt").images
        return self.second(image=small, **given).images[0]
