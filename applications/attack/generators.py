"""Load the outside models of the attack: sentence similarity, language model, text-to-image model.

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
FLUX_OPTIONS = {  # its authors' settings
    "num_inference_steps": 4,
    "guidance_scale": 0.0,
    "max_sequence_length": 256,
}
DEEPFLOYD = (
    "DeepFloyd/IF-I-XL-v1.0",  # 64 pixels
    "DeepFloyd/IF-II-L-v1.0",  # 256 pixels, more than a CLIP reads
)
PIPELINE = ("diffusers", "transformers", "accelerate")  # packages of a text-to-image pipeline
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
TOKENS = 64  # room for one description
ALTERNATIVES = {  # what works without the model
    "--similarity_model": "--similarity_model clip needs no other model",
    "--text_model": "--text_model template needs no model",
    "--image_model": "--image_model MODULE:FUNCTION draws with a function of yours",
}


def parse_options(text):
    """Return the keyword arguments of `--image_options`. Raise UserError unless the text is a json object."""
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        example = '{"num_inference_steps": 20}'
        raise UserError(f"--image_options {text} is not a json object such as '{example}'")
    return options


def is_function(image_model):
    """Return whether `--image_model` names a function, MODULE:FUNCTION."""
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
        needed += [(f"--image_model {image_model}", package) for package in PIPELINE]
    for flag, package in needed:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} needs the package {package.replace('_', '-')}: {INSTALL}")


@contextlib.contextmanager
def one_line_errors(flag, model, failed_on=None):
    """Turn every error of an outside library into a UserError of one line.

    flag: the flag that names the model.
    failed_on: what the model was given; None while it is loaded.
    """
    try:
        yield
    except Exception as error:  # the hub, its cache and each library raise their own
        if isinstance(error, torch.OutOfMemoryError):
            said = out_of_memory(flag, model)
        else:
            said = f"{flag} {model} {explain(flag, model, error, failed_on)}"
        if not is_function(model):
            said = f"{said}; {ALTERNATIVES[flag]}"
        raise UserError(said) from error


def out_of_memory(flag, model):
    """Return the message that a model does not fit on the device."""
    fix = "choose a smaller model"
    if flag == "--image_model":
        fix = f"add --offload, or {fix}"
    return f"the device has not enough memory for {flag} {model}; {fix}"


def explain(flag, model, error, failed_on):
    """Return why a model failed: reasons that can be looked up, else the message of its library."""
    reason = f"{type(error).__name__}: {one_line(error)[:160]}"
    if failed_on:
        return f"failed on {failed_on}: {reason}"
    if is_function(model):
        return f"cannot be imported: {reason}; run the script in the folder of the module"
    path = Path(model)
    if looks_like_path(model) and not path.exists():
        return "does not exist"
    if path.is_dir() and not any(path.rglob("*.safetensors")):
        return f"has no weights in safetensors, and others are not opened; choose another {flag}"
    if not path.exists() and is_gated(error):
        login = f"accept its licence on https://huggingface.co/{model}, log in with `hf auth login`"
        return f"is gated: {login}, and run the same command again"
    action = "loaded" if path.exists() else "fetched or loaded"
    return f"could not be {action}: {reason}"


def looks_like_path(model):
    """Return whether a model's name is a path, and not a Hugging Face id."""
    return model.startswith((".", os.sep)) or model.count("/") > 1 or model.endswith(".gguf")


def is_gated(error):
    """Return whether an error comes from a Hugging Face model whose licence has to be accepted first."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    return any(type(cause).__name__ == "GatedRepoError" for cause in causes)


def load_similarity(model, clip, batch_size):
    """Return a function: list of texts -> their unit vectors [texts, any], float32, on the CPU.

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
    """A LanguageModel is an instruct model of the transformers library, with a chat template.

    model: a Hugging Face id, a folder, or a .gguf file.
    """

    def __init__(self, model, device):
        self.model = model
        self.device = device
        where = model
        options = {"trust_remote_code": False}
        weights = {"use_safetensors": True}
        if model.endswith(".gguf"):
            where = str(Path(model).parent)
            options["gguf_file"] = Path(model).name
            weights = {}
        with one_line_errors("--text_model", model):
            import transformers

            self.tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
            lm = transformers.AutoModelForCausalLM.from_pretrained(where, dtype="auto", **weights, **options)
            self.lm = lm.to(device).eval()
        if not self.tokenizer.chat_template:
            fix = "choose an instruct model, or --text_model template"
            raise UserError(f"--text_model {model} has no chat template; {fix}")

    @torch.inference_mode()
    def __call__(self, request, descriptions, seed):
        """Answer a request, at a length for so many descriptions.

        Returns the text, and whether it was cut off at the limit.
        """
        chat = [{"role": "user", "content": request}]
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        inputs = self.tokenizer.apply_chat_template(chat, **options).to(self.device)
        prompt = inputs["input_ids"].shape[1]
        limit = self.limit(prompt, descriptions)
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = self.tokenizer.eos_token_id
        restored = torch.random.fork_rng(range(torch.cuda.device_count()))
        with restored, one_line_errors("--text_model", self.model, "the request"):
            torch.manual_seed(seed)
            output = self.lm.generate(**inputs, max_new_tokens=limit, pad_token_id=pad, **SAMPLING)
        answer = output[0, prompt:]
        return self.tokenizer.decode(answer, skip_special_tokens=True), len(answer) == limit

    def limit(self, prompt, descriptions):
        """Return how many tokens an answer may have.

        prompt: tokens of the request.

        Raises UserError if there is no room for one description.
        """
        room = getattr(self.lm.config, "max_position_embeddings", None) or 1 << 30
        limit = min(TOKENS * (descriptions + 1), room - prompt)
        if limit < TOKENS:
            reads = f"--text_model {self.model} reads {room}"
            raise UserError(f"the request has {prompt} tokens and {reads}; lower --overall_words")
        return limit


def load_image_model(model, device, options, offload=False):
    """Return a function (description, seed) -> PIL image.

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
    elif model == "FLUX":
        options = FLUX_OPTIONS | options
        function = Pipeline(FLUX, device, offload)
    else:
        function = Pipeline(model, device, offload)

    def draw(description, seed):
        with one_line_errors("--image_model", model, f"{description!r} (seed {seed})"):
            image = function(description, seed=seed, **options)
        if not isinstance(image, Image.Image):
            kind = type(image).__name__
            raise UserError(f"--image_model {model} returned a {kind}, and a PIL image is needed")
        return image.convert("RGB")

    return draw


class Pipeline:
    """A Pipeline draws with a text-to-image pipeline of the diffusers library."""

    def __init__(self, model, device, offload=False, **parts):
        with one_line_errors("--image_model", model):
            import diffusers

            dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
            options = {"torch_dtype": dtype, "use_safetensors": True}
            self.pipe = diffusers.DiffusionPipeline.from_pretrained(model, **options, **parts)
            self.pipe.set_progress_bar_config(disable=True)
            if offload:
                self.pipe.enable_model_cpu_offload(device=device)
            else:
                self.pipe.to(device)

    def __call__(self, description, seed, **options):
        generator = torch.Generator("cpu").manual_seed(seed)  # equal noise on every device
        return self.pipe(prompt=description, generator=generator, **options).images[0]


class DeepFloyd:
    """DeepFloyd draws a small picture with one pipeline and enlarges it with another.

    Both pipelines read the text vectors of the first.
    """

    def __init__(self, first, second, device, offload=False):
        self.first = Pipeline(first, device, offload).pipe
        self.second = Pipeline(second, device, offload, text_encoder=None).pipe

    def __call__(self, description, seed, **options):
        wanted, unwanted = self.first.encode_prompt(description)
        given = {"prompt_embeds": wanted, "negative_prompt_embeds": unwanted, **options}
        given["generator"] = torch.Generator("cpu").manual_seed(seed)
        small = self.first(**given, output_type="pt").images
        return self.second(image=small, **given).images[0]
