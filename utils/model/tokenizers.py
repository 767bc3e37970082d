"""Read the tokenizer of a Hugging Face folder. Its files are data: no code that a folder holds is run."""

import hashlib
import json
import string
from functools import partial
from importlib import import_module

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from open_clip.tokenizer import SimpleTokenizer

from utils.model.configs import library, parsed_config, read_config
from utils.runtime.errors import UserError
from utils.runtime.files import one_line

SPECIAL_FILES = ("special_tokens_map.json", "tokenizer_config.json")  # the second is the newer one and wins
WHOLE = ("tokenizer.json", *SPECIAL_FILES)
PARTS = {  # by type of model, what there may be without a tokenizer.json: {class of the tokenizer: its files}
    "clip": {"CLIPTokenizerFast": ("vocab.json", "merges.txt")},
    "siglip": {"SiglipTokenizer": ("spiece.model",), "GemmaTokenizer": ("tokenizer.model",)},
    "metaclip_2": {"XLMRobertaTokenizer": ("sentencepiece.bpe.model",)},
    "altclip": {"XLMRobertaTokenizer": ("sentencepiece.bpe.model",)},
    "chinese_clip": {"BertTokenizer": ("vocab.txt",)},
}
FETCHED = {*WHOLE, *(name for kinds in PARTS.values() for files in kinds.values() for name in files)}
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
SETTINGS = ("padding_side", "truncation_side", "model_max_length", "add_bos_token", "add_eos_token")
PADS_LEFT = ("GemmaTokenizer", "Siglip2Tokenizer")  # classes that pad there unless a config says otherwise
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
OPENAI = 49408  # tokens of the vocabulary that open_clip brings along; the last one ends a text
OLD_END = 2  # the end token in old configs of type clip, whatever it is; then the largest token is read


class FolderTokenizer:
    """A FolderTokenizer is a folder's own: list of texts -> tokens [texts, context], padded or cut.

    tokenizer: of the transformers library.
    context_length: tokens of a text.
    pad: the token that fills a text up.
    digest: sixteen hex digits over the bytes of its files.
    clean: function of a text, before the tokenizer gets it.
    """

    def __init__(self, tokenizer, context_length, pad, digest, clean=str):
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.pad = pad
        self.digest = digest
        self.clean = clean

    def __call__(self, texts):
        texts = [texts] if isinstance(texts, str) else texts
        texts = [self.clean(text) for text in texts]
        ids = self.tokenizer(texts, truncation=True, max_length=self.context_length)["input_ids"]
        tokens = torch.full((len(texts), self.context_length), self.pad)
        for row, found in zip(tokens, ids, strict=True):
            start = len(row) - len(found) if self.tokenizer.padding_side == "left" else 0
            row[start : start + len(found)] = torch.tensor(found)
        return tokens

    def is_openais(self):
        """Return whether it cuts some sentences as OpenAI's tokenizer, which earlier versions always used."""
        openais = SimpleTokenizer()
        texts = [template("sea lion") for template in OPENAI_IMAGENET_TEMPLATES]
        return all(self.tokenizer(text)["input_ids"][1:-1] == openais.encode(text) for text in texts)


def load_tokenizer(folder):
    """Load the tokenizer of a folder; open_clip's where a `CLIPModel` with OpenAI's vocabulary has none.

    Raises UserError when files are missing, or texts are not made as the model reads them.
    """
    config = parsed_config(folder)
    text = config.text_config
    files = files_of(folder, config.model_type)
    if files is None:
        if is_openais(config):
            return SimpleTokenizer(context_length=text.max_position_embeddings)
        raise UserError(f"{folder} {what_is_missing(config)}; put the model's tokenizer.json there")
    if files[0].endswith(".model"):
        check_sentencepiece(folder, files[0])
    try:
        clean = str
        if files == WHOLE:
            tokenizer, clean = _whole(folder, config.model_type)
        else:
            tokenizer = _parts(folder, config.model_type, files)
    except UserError:
        raise
    except Exception as error:  # the library has many
        what = f"the tokenizer's files in {folder} cannot be read ({one_line(error)[:120]})"
        raise UserError(f"{what}; download them again") from error
    pad = check_marks(tokenizer, config, folder)
    context = min(context_of(config), tokenizer.model_max_length)
    return FolderTokenizer(tokenizer, context, pad, _digest(folder, files), clean)


def check_sentencepiece(folder, file):
    """Raise UserError unless the packages are there that read a sentencepiece model, a file of a folder."""
    try:
        for name in ("sentencepiece", "google.protobuf"):
            import_module(name)
    except ImportError as error:
        what = f"{folder} has no tokenizer.json, and its {file} needs sentencepiece"
        raise UserError(f"{what}: pip install sentencepiece protobuf") from error


def is_openais(config):
    """Return whether a model's vocabulary is OpenAI's, which open_clip brings along."""
    text = config.text_config
    known = text.eos_token_id in (OLD_END, OPENAI - 1)
    return config.model_type == "clip" and text.vocab_size == OPENAI and known


def what_is_missing(config):
    """Return the words for a folder without any files of a tokenizer."""
    parts = [" and ".join(files) for files in PARTS[config.model_type].values()]
    what = f"has no tokenizer.json (nor {' nor '.join(parts)})"
    if config.model_type != "clip":
        return what
    text = config.text_config
    vocabulary = f"its vocabulary ({text.vocab_size} tokens, of which {text.eos_token_id} ends a text)"
    return f"{what}, and {vocabulary} is not OpenAI's"


def context_of(config):
    """Return how many tokens a model's text tower has places for."""
    text = config.text_config
    if config.model_type == "altclip":  # as in RoBERTa, places are counted from the one after the padding's
        return text.max_position_embeddings - text.pad_token_id - 1
    return text.max_position_embeddings


def check_marks(tokenizer, config, folder):
    """Return the token with which texts are padded.

    Raises UserError for a tokenizer that does not end or pad texts as the model reads them.
    """
    kind = config.model_type
    text = config.text_config
    pad = tokenizer.pad_token_id
    last = tokenizer("a")["input_ids"][-1:]
    what = ""
    if kind in ("clip", "metaclip_2"):
        old = kind == "clip" and text.eos_token_id == OLD_END and last == [tokenizer.eos_token_id]
        if last != [text.eos_token_id] and not old:
            what = f"does not end a text with the model's end token {text.eos_token_id}"
        pad = last[0] if pad is None and last else pad
    elif pad is None or (kind != "siglip" and pad != text.pad_token_id):
        what = f"pads texts with token {pad}, and the model knows another one"
    if kind != "siglip" and tokenizer.padding_side == "left":
        what = "pads texts on the left, and the model reads them from there"
    if what:
        fix = "put the files there that the model was trained with"
        raise UserError(f"the tokenizer of {folder} {what}; {fix}")
    return pad


def files_of(folder, kind):
    """Return the names of a folder's tokenizer files; None where it has none. kind: type of the model."""
    if (folder / WHOLE[0]).is_file():
        return WHOLE
    for files in PARTS[kind].values():
        if all((folder / name).is_file() for name in files):
            return (*files, *SPECIAL_FILES)
    return None


def _whole(folder, kind):
    """Return the tokenizer of a tokenizer.json, and what its class does to a text before.

    The file is used as it is: some classes of the library make their rules themselves, or need sentencepiece.
    """
    given = _settings(folder)
    name = class_of(folder) or next(iter(PARTS[kind]))
    if name in PADS_LEFT:
        given.setdefault("padding_side", "left")
    if any(given.get(f"add_{mark}") and mark not in given for mark in ("bos_token", "eos_token")):
        given = {key: given[key] for key in given if not key.startswith("add_")}  # the file's own rule stays
    tokenizer = library().PreTrainedTokenizerFast(tokenizer_file=str(folder / WHOLE[0]), **given)
    if name == "Siglip2Tokenizer":
        from tokenizers import normalizers

        rules = [normalizers.Lowercase(), tokenizer.backend_tokenizer.normalizer]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(list(filter(None, rules)))
    if name != "SiglipTokenizer":
        return tokenizer, str
    lower = (read_config(folder / SPECIAL_FILES[1]) or {}).get("do_lower_case", True)
    return tokenizer, partial(canonical, lower=lower)


def canonical(text, lower):
    """Return a text without punctuation and with single spaces, and perhaps in small letters, as SigLIP's."""
    text = text.lower() if lower else text
    return " ".join(text.translate(NO_PUNCTUATION).split())


def _parts(folder, kind, files):
    """Return the tokenizer of other files, of the class that reads them."""
    [name] = [name for name, parts in PARTS[kind].items() if parts == files[: len(parts)]]
    said = class_of(folder)
    if kind != "clip" and said not in (None, name):
        what = f"{folder} has no tokenizer.json, and {files[0]} is read by {name}, not by its {said}"
        raise UserError(f"{what}; put the model's tokenizer.json there")
    return getattr(library(), name).from_pretrained(folder, local_files_only=True)


def class_of(folder):
    """Return the class that a folder's config names for its tokenizer; None without one."""
    name = (read_config(folder / SPECIAL_FILES[1]) or {}).get("tokenizer_class")
    return str(name).removesuffix("Fast") if name else None


def _settings(folder):
    """Return special tokens and settings from the files beside a tokenizer.json: {"eos_token": text}."""
    given = {}
    for name in SPECIAL_FILES:
        content = read_config(folder / name) or {}
        for key in SPECIAL:
            token = content.get(key)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                given[key] = token
        given |= {key: content[key] for key in SETTINGS if content.get(key) is not None}
    return given


def digest_of(tokenizer):
    """Return sixteen hex digits of the vocabulary and rules of a tokenizer of the transformers library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _digest(folder, names):
    """Return sixteen hex digits over the bytes of a folder's files."""
    content = hashlib.sha256()
    for name in names:
        if (folder / name).is_file():
            content.update(name.encode() + (folder / name).read_bytes())
    return content.hexdigest()[:16]
