"""The tokenizer of a Hugging Face folder. Its files are data: no code that a folder holds is run."""

import hashlib
import json

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from open_clip.tokenizer import SimpleTokenizer

from utils.runtime.errors import UserError
from utils.runtime.files import one_line

SPECIAL_FILES = ("special_tokens_map.json", "tokenizer_config.json")  # the second is the newer one and wins
WHOLE = ("tokenizer.json", *SPECIAL_FILES)
PARTS = ("vocab.json", "merges.txt", *SPECIAL_FILES)
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
OPENAI = 49408  # tokens of the vocabulary that open_clip brings along


class FolderTokenizer:
    """A folder's own tokenizer: list of texts -> tokens [texts, context], padded, or cut before their end.

    tokenizer: of the transformers library.
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
        """Whether it cuts some sentences as OpenAI's tokenizer does, which earlier versions took for every
        folder.
        """
        texts = [template("sea lion") for template in OPENAI_IMAGENET_TEMPLATES]
        openais = SimpleTokenizer()
        return all(self.tokenizer(text)["input_ids"][1:-1] == openais.encode(text) for text in texts)


def load_tokenizer(folder, text):
    """Load the tokenizer of a `CLIPModel`'s folder; open_clip's where it has none, for OpenAI's vocabulary.

    text: the config of the text tower, a `CLIPTextConfig`.

    Raises UserError when files are missing, or texts do not end with the token at which the model reads them.
    """
    context, size, end = text.max_position_embeddings, text.vocab_size, text.eos_token_id
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = _whole(folder)
            files = WHOLE
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer = _parts(folder)
            files = PARTS
        else:
            tokenizer = None
    except Exception as error:  # the library has many
        what = f"the tokenizer's files in {folder} cannot be read ({one_line(error)[:120]})"
        raise UserError(f"{what}; download them again") from error
    if tokenizer is not None:
        pass
    elif size == OPENAI and end in (2, OPENAI - 1):  # old configs say 2 whatever the end token is
        return SimpleTokenizer(context_length=context)
    else:
        raise UserError(
            f"{folder} has no tokenizer.json (nor vocab.json and merges.txt), and its vocabulary ({size} "
            f"tokens, of which {end} ends a text) is not OpenAI's; put the model's tokenizer.json there"
        )
    last = tokenizer("a")["input_ids"][-1:]
    if last not in ([end], [tokenizer.eos_token_id] if end == 2 else [end]):
        raise UserError(
            f"the tokenizer of {folder} does not end a text with the model's end token {end}; put the files "
            "there that the model was trained with"
        )
    return FolderTokenizer(tokenizer, context, last[0], _digest(folder, files))


def _whole(folder):
    from transformers import PreTrainedTokenizerFast  # takes seconds, and only texts need it

    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **_special_tokens(folder))


def _parts(folder):
    from transformers import CLIPTokenizerFast

    return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)


def _special_tokens(folder):
    """What the files beside a tokenizer.json say about its special tokens: {"eos_token": text, ...}."""
    given = {}
    for name in SPECIAL_FILES:
        content = (
            json.loads((folder / name).read_text(encoding="utf-8-sig")) if (folder / name).is_file() else {}
        )
        for key in SPECIAL:
            token = content.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            given |= {key: token} if isinstance(token, str) else {}
    return given


def digest_of(tokenizer):
    """Sixteen hex digits of a tokenizer of the transformers library: its vocabulary and rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _digest(folder, names):
    content = hashlib.sha256()
    for name in names:
        if (folder / name).is_file():
            content.update(name.encode() + (folder / name).read_bytes())
    return content.hexdigest()[:16]
