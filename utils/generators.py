"""The outside models of the semantic adversarial attack: sentence similarity, language model, text-to-image model.

Their packages (requirements-adversarial.txt) are imported here, when a model is loaded, and nowhere else. Weights are read from
safetensors only, and no code that comes with a model is run.
"""

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image

from utils.clip import text_vectors
from utils.runtime.errors import UserError
from utils.runtime.files import one_line

INSTALL = "pip install -r requirements-adversarial.txt"
FLUX = "black-forest-labs/FLUX.1-schnell"
FLUX_OPTIONS = {"num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 256}  # as its authors draw with it
DEEPFLOYD = ("DeepFloyd/IF-I-XL-v1.0", "DeepFloyd/IF-II-L-v1.0")  # 64 pixels, then 256: more than a CLIP reads
TEMPLATE = "--text_model template needs no model"
CLIP_TOWER = "--similarity_model clip needs no other model"
FUNCTION = "--image_model MODULE:FUNCTION draws with a function of yours"
TOKENS = 64  # that a description may take


def parse_options(text):
    """Keyword arguments of `--image_options`, a dict. Raises UserError when the text is no json object."""
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise UserError(f"--image_options {text} is no json object such as '{{\"num_inference_steps\": 20}}'")
    return options


def is_function(image_model):
    """Whether `--image_model` names a function, MODULE:FUNCTION."""
    return ":" in image_model and not Path(image_model).exists()


def packages_of(similarity_model=None, text_model=None, image_model=None):
    """{flag and model: package} of the models that are asked for; None, or what needs no package, is left out."""
    needed = {}
    if similarity_model not in (None, "clip"):
        needed[f"--similarity_model {similarity_model}"] = ("sentence_transformers",)
    if text_model not in (None, "template"):
        needed[f"--text_model {text_model}"] = ("transformers", "gguf") if text_model.endswith(".gguf") else ("transformers",)
    if image_model is not None and not is_function(image_model):
        needed[f"--image_model {image_model}"] = ("diffusers", "transformers", "accelerate")
    return needed


def require_packages(**models):
    """Raise UserError before any work is done when a package is not installed that `packages_of` names."""
    for flag, packages in packages_of(**models).items():
        for package in packages:
            if importlib.util.find_spec(package) is None:
                raise UserError(f"{flag} needs the package {package.replace('_', '-')}: {INSTALL}")


def load_similarity(model, clip, batch_size):
    """A function from a list of texts to their unit vectors [texts, any], float32, on the CPU.

    model: 'clip' for the text tower of `clip`, else a sentence-transformers id or folder.
    """
    if model == "clip":
        return lambda texts: torch.from_numpy(text_vectors(clip, texts, batch_size))

    def load():
        import sentence_transformers

        return sentence_transformers.SentenceTransformer(
            model, device=str(clip.device), model_kwargs={"use_safetensors": True}, trust_remote_code=False
        )

    encoder = _load("--similarity_model", model, CLIP_TOWER, load)
    return lambda texts: encoder.encode(
        texts, batch_size=batch_size, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
    ).float().cpu()  # fmt: skip


class LanguageModel:
    """An instruct model of the transformers library.

    model: a Hugging Face id, a folder, or a .gguf file; it has to have a chat template.
    """

    def __init__(self, model, device):
        self.model, self.device = model, device

        def load():
            import transformers

            transformers.utils.logging.set_verbosity_error()
            transformers.utils.logging.disable_progress_bar()
            if model.endswith(".gguf"):
                where, options = str(Path(model).parent), {"gguf_file": Path(model).name}
            else:
                where, options = model, {}
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
            weights = {} if options else {"use_safetensors": True}
            lm = transformers.AutoModelForCausalLM.from_pretrained(
                where, dtype="auto", trust_remote_code=False, **weights, **options
            )
            return tokenizer, lm.to(device).eval()

        if model.endswith(".gguf") and not Path(model).is_file():
            raise UserError(f"--text_model {model}: there is no such file; {TEMPLATE}")
        self.tokenizer, self.lm = _load("--text_model", model, TEMPLATE, load)
        if not self.tokenizer.chat_template:
            raise UserError(f"--text_model {model} has no chat template; choose an instruct model, or: {TEMPLATE}")

    @torch.inference_mode()
    def __call__(self, request, descriptions, seed):
        """Answer a request that asks for so many descriptions. Returns the text, and whether it was cut off at the limit."""
        torch.manual_seed(seed)
        inputs = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": request}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.device)
        prompt = inputs["input_ids"].shape[1]
        room = getattr(self.lm.config, "max_position_embeddings", None) or 1 << 30
        limit = min(TOKENS * (descriptions + 1), room - prompt)
        if limit < TOKENS:
            raise UserError(
                f"--text_model {self.model} reads {room} tokens, and the request has {prompt}; use a smaller --overall_words"
            )
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        try:
            output = self.lm.generate(
                **inputs, max_new_tokens=limit, do_sample=True, temperature=0.6, top_p=0.9, pad_token_id=pad
            )
        except torch.OutOfMemoryError as error:
            raise UserError(f"the device has not enough memory for --text_model {self.model}; {TEMPLATE}") from error
        answer = output[0, prompt:]
        return self.tokenizer.decode(answer, skip_special_tokens=True), len(answer) == limit


def load_image_model(model, device, options, offload=False):
    """A function (description, seed) -> PIL image.

    Parameters
    model: FLUX, DeepFloyd, a diffusers id or folder, or package.module:function, called as function(description, seed=seed).
    options: more keyword arguments for that function, or for the call of the pipeline. offload: keep on the device only the part
    of the pipeline that works.
    """
    if is_function(model):
        draw = _Function(model, options)
    elif model == "DeepFloyd":
        draw = DeepFloyd(*DEEPFLOYD, device, options, offload)
    elif model == "FLUX":
        draw = _Pipeline(FLUX, device, FLUX_OPTIONS | options, offload)
    else:
        draw = _Pipeline(model, device, options, offload)

    def checked(description, seed):
        try:
            image = draw(description, seed)
        except torch.OutOfMemoryError as error:
            raise UserError(f"the device has not enough memory for --image_model {model}; add --offload") from error
        except Exception as error:  # whatever the model, or the user's function, raises
            raise UserError(f"--image_model {model} failed on {description!r} (seed {seed}): {_reason(error)}") from error
        if not isinstance(image, Image.Image):
            raise UserError(f"--image_model {model} returned a {type(image).__name__}, and a PIL image is needed")
        return image.convert("RGB")

    return checked


class _Function:
    """A drawing function, found from the current folder or the root of the repository."""

    def __init__(self, model, options):
        module, name = model.rsplit(":", 1)
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            self.function = getattr(importlib.import_module(module), name)
        except (ImportError, ValueError, AttributeError) as error:
            raise UserError(f"--image_model {model} cannot be imported from this folder: {_reason(error)}") from error
        self.options = options

    def __call__(self, description, seed):
        return self.function(description, seed=seed, **self.options)


class _Pipeline:
    """Any text-to-image pipeline of the diffusers library."""

    def __init__(self, model, device, options, offload):
        self.pipe, self.options = _load_pipeline(model, device, offload), options

    def __call__(self, description, seed):
        return self.pipe(prompt=description, generator=_generator(seed), **self.options).images[0]


class DeepFloyd:
    """A small picture, and a second model that enlarges it; both read the text vectors of the first."""

    def __init__(self, first, second, device, options, offload=False):
        self.first = _load_pipeline(first, device, offload)
        self.second = _load_pipeline(second, device, offload, text_encoder=None)
        self.options = options

    def __call__(self, description, seed):
        generator = _generator(seed)
        wanted, unwanted = self.first.encode_prompt(description)
        given = {"prompt_embeds": wanted, "negative_prompt_embeds": unwanted, "generator": generator, **self.options}
        small = self.first(**given, output_type="pt").images
        return self.second(image=small, **given).images[0]


def _generator(seed):
    return torch.Generator("cpu").manual_seed(seed)  # the same noise on every device


def _load_pipeline(model, device, offload, **options):
    def load():
        import diffusers
        import transformers

        diffusers.utils.logging.set_verbosity_error()
        transformers.utils.logging.set_verbosity_error()
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, use_safetensors=True, **options)
        pipe.set_progress_bar_config(disable=True)
        if offload:
            pipe.enable_model_cpu_offload(device=device)
            return pipe
        return pipe.to(device)

    return _load("--image_model", model, FUNCTION, load)


def _load(flag, model, alternative, load):
    """Call load(), and turn what it raises into one line."""
    local = Path(model).exists()
    if not local and (model.startswith((".", os.sep)) or model.count("/") > 1):
        raise UserError(f"{flag} {model}: there is no such folder; {alternative}")
    try:
        return load()
    except torch.OutOfMemoryError as error:
        raise UserError(f"the device has not enough memory for {flag} {model}; choose a smaller model; {alternative}") from error
    except ImportError as error:
        raise UserError(f"{flag} {model} needs a package that is not installed ({one_line(error)[:120]}): {INSTALL}") from error
    except Exception as error:  # the hub, its cache and each library raise their own
        raise UserError(_why_not_loaded(flag, model, alternative, local, error)) from error


def _why_not_loaded(flag, model, alternative, local, error):
    causes = _causes(error)
    said = " ".join(f"{type(cause).__name__} {cause}" for cause in causes)
    if not local and ("GatedRepo" in said or "gated repo" in said):
        return (
            f"{flag} {model} is gated: accept its licence on https://huggingface.co/{model}, log in with `hf auth login`, and "
            f"run the same command again; or choose another {flag}; {alternative}"
        )
    if not local and ("RepositoryNotFound" in said or "not a valid model identifier" in said):
        return (
            f"{flag} {model} is neither a folder nor a model that your Hugging Face account can see (its page would be "
            f"https://huggingface.co/{model}); {alternative}"
        )
    if "safetensors" in said and ("no file named" in said or "does not appear to have" in said or "not found" in said.lower()):
        return f"{flag} {model} has no weights in safetensors, and others are not opened; choose another {flag}; {alternative}"
    return f"{flag} {model} could not be {'loaded' if local else 'fetched or loaded'}: {_reason(error)}; {alternative}"


def _causes(error):
    """An exception and what led to it, the outermost first."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    return chain


def _reason(error):
    return f"{type(error).__name__}: {one_line(error)[:160]}"
