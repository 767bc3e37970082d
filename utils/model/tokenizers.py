"""Read the tokenizer of a Hugging Face folder. Its files are data: no code that a folder holds is run."""

import hashlib
import json

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from open_clip.tokenizer import SimpleTokenizer

from utils.model.configs import read_config
from utils.runtime.errors import UserError
from utils.runtime.files import one_line

SPECIAL_FILES = ("special_tokens_map.json", "tokenizer_config.json")  # the second is the newer one and wins
WHOLE = ("tokenizer.json", *SPECIAL_FILES)
PARTS = ("vocab.json", "merges.txt", *SPECIAL_FILES)
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
OPENAI = 49408  # tokens of the vocabulary that open_clip brings along; the last one ends a text
OLD_END = 2  # the end token in old configs, whatever it is; then a text is read at its largest token


class FolderTokenizer:
    """A FolderTokenizer is a folder's own: list of texts -> tokens [texts, context], padded or cut.

    tokenizer: of the transformers library.
    context_length: tokens of a text.
    end: the token that ends a text, and pads it where the tokenizer has no other for that.
    digest: sixteen hex digits over the bytes of its files.
    """

    def __init__(self, tokenizer, context_length, end, digest):
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.digest = digest

    def __call__(self, texts):
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = self.tokenizer(texts, truncation=True, max_length=self.context_length)["input_ids"]
        tokens = torch.full((len(texts), self.context_length), self.pad)
        for row, found in zip(tokens, ids, strict=True):
            row[: len(found)] = torch.tensor(found)
        return tokens

    def is_openais(self):
        """Return whether it cuts some sentences as OpenAI's tokenizer, which earlier versions always used."""
        openais = SimpleTokenizer()
        texts = [template("sea lion") for template in OPENAI_IMAGENET_TEMPLATES]
        return all(self.tokenizer(text)["input_ids"][1:-1] == openais.encode(text) for text in texts)


def load_tokenizer(folder, text):
    """Load the tokenizer of a `CLIPModel`'s folder; open_clip's where it has none, for OpenAI's vocabulary.

    text: the config of the text tower, a `CLIPTextConfig`.

    Raises UserError when files are missing, or texts do not end with the token at which the model reads them.
    """
    end = text.eos_token_id
    files = files_of(folder)
    if files is None:
        if text.vocab_size == OPENAI and end in (OLD_END, OPENAI - 1):
            return SimpleTokenizer(context_length=text.max_position_embeddings)
        vocabulary = f"its vocabulary ({text.vocab_size} tokens, of which {end} ends a text)"
        what = f"has no tokenizer.json (nor vocab.json and merges.txt), and {vocabulary} is not OpenAI's"
        raise UserError(f"{folder} {what}; put the model's tokenizer.json there")
    try:
        tokenizer = _whole(folder) if files == WHOLE else _parts(folder)
    except Exception as error:  # the library has many
        what = f"the tokenizer's files in {folder} cannot be read ({one_line(error)[:120]})"
        raise UserError(f"{what}; download them again") from error
    last = tokenizer("a")["input_ids"][-1:]
    if last != [end] and (end != OLD_END or last != [tokenizer.eos_token_id]):
        what = f"does not end a text with the model's end token {end}"
        fix = "put the files there that the model was trained with"
        raise UserError(f"the tokenizer of {folder} {what}; {fix}")
    return FolderTokenizer(tokenizer, text.max_position_embeddings, last[0], _digest(folder, files))


def files_of(folder):
    """Return the names of a folder's tokenizer files, `WHOLE` or `PARTS`; None where it has none."""
    if (folder / "tokenizer.json").is_file():
        return WHOLE
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return PARTS
    return None


def _whole(folder):
    from transformers import PreTrainedTokenizerFast  # takes seconds, and only texts need it

    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **_special_tokens(folder))


def _parts(folder):
    from transformers import CLIPTokenizerFast

    return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)


def _special_tokens(folder):
    """Return the special tokens in the files beside a tokenizer.json: {"eos_token": text, ...}."""
    given = {}
    for name in SPECIAL_FILES:
        content = read_config(folder / name) or {}
        for key in SPECIAL:
            token = content.get(key)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                given[key] = token
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
