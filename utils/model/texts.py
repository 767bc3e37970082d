"""Embed texts and classes.

Texts are sorted by length and each batch is cut to its longest, because `encode_text` mostly computes
padding.
"""

import numpy as np
import open_clip
import torch
from open_clip.transformer import TextTransformer

from utils.model.library import TwoTowers
from utils.runtime.errors import UserError

TEXTS = 4096  # that are embedded, and so saved, at a time
CLASSES = 50  # that are embedded, and so saved, at a time


def too_long(clip, texts):
    """Return those of some texts that are longer than the model's context; it reads only their beginnings."""
    limit = clip.tokenizer.context_length
    of_library = getattr(clip.tokenizer, "tokenizer", None)
    if of_library:  # it counts the tokens at both ends itself
        clean = getattr(clip.tokenizer, "clean", str)
        return [text for text in texts if len(of_library(clean(text))["input_ids"]) > limit]
    return [text for text in texts if len(clip.tokenizer.encode(text)) + 2 > limit]


@torch.inference_mode()
def text_vectors(clip, texts, batch_size):
    """Return unit text vectors, without a template: list of texts -> float32 array [texts, D].

    Texts are sorted by length, and each batch is cut to its longest, where nothing after a text's end token
    matters.

    Raises UserError for tokens that the model does not have.
    """
    tokens = clip.tokenizer(list(texts))
    refuse_unknown(clip.text, tokens)
    tower = causal_tower(clip.text)
    ends = clip.text.ends(tokens) if isinstance(clip.text, TwoTowers) else end_tokens(tower, tokens)
    order = ends.argsort(stable=True)
    batches = []
    for rows in order.split(batch_size):
        batch = tokens[rows].to(clip.device)
        if tower is None:
            found = clip.text.encode_text(batch)
        else:
            longest = int(ends[rows].max()) + 1
            found = encode_cut(tower, batch[:, :longest], ends[rows].to(clip.device))
        batches.append(torch.nn.functional.normalize(found.float(), dim=-1).cpu())
    vectors = torch.cat(batches).numpy()
    return vectors[order.argsort().numpy()]


@torch.inference_mode()
def zero_shot_classifier(clip, class_names, batch_size):
    """Return the zero-shot classifier over OpenAI's 80 templates, float32 array [D, classes].

    Its columns are unit vectors.
    """
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    prompts = [template(name) for name in class_names for template in templates]
    vectors = text_vectors(clip, prompts, batch_size)
    columns = vectors.reshape(len(class_names), len(templates), -1).mean(axis=1)
    return (columns / np.linalg.norm(columns, axis=1, keepdims=True)).T


def refuse_unknown(model, tokens):
    """Raise UserError when a model's vocabulary does not have all of some tokens."""
    if isinstance(model, TwoTowers):
        known = model.vocab_size
    else:
        tower = getattr(model, "text", model)
        embeddings = getattr(tower, "token_embedding", None) or tower.transformer.get_input_embeddings()
        known = embeddings.num_embeddings
    largest = int(tokens.max())
    if largest < known:
        return
    what = f"the tokenizer gives token {largest}, and the model has {known} tokens"
    fix = "put the model's own tokenizer into its folder and use --model local-dir:FOLDER"
    other = "or name it as hf_tokenizer_name in the config's text_cfg"
    raise UserError(f"{what}: they do not belong together; {fix}, {other}")


def causal_tower(model):
    """Return the text tower of an open_clip model if it is causal and read at the end token, else None.

    Nothing after the end token matters to such a tower.
    """
    tower = getattr(model, "text", model)
    if not isinstance(tower, TextTransformer | open_clip.CLIP) or tower.attn_mask is None:
        return None
    if getattr(tower, "cls_emb", None) is not None or pooling(tower)[0] not in ("argmax", "eos"):
        return None
    return tower


def pooling(tower):
    """Return how a text tower is pooled, and the number of its end token."""
    if isinstance(tower, TextTransformer):
        return tower.pool_type, tower.eos_id
    return tower.text_pool_type, getattr(tower, "text_eos_id", None)


def end_tokens(tower, tokens):
    """Return the place at which each text is read, int64 [texts]; 0 for a tower that is run without a cut.

    tokens: [texts, context].
    """
    if tower is None:
        return torch.zeros(len(tokens), dtype=torch.int64)
    kind, end = pooling(tower)
    return tokens.argmax(dim=1) if kind == "argmax" else (tokens == end).int().argmax(dim=1)


def encode_cut(tower, tokens, ends):
    """Return the output [B, D] of open_clip's `encode_text`, from the first tokens alone.

    tokens: [B, n].
    ends: [B], the tokens that are read.
    """
    n = tokens.shape[1]
    x = tower.token_embedding(tokens) + tower.positional_embedding[:n]
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:n, :n]))
    x = x[torch.arange(len(x), device=x.device), ends]
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, torch.nn.Linear) else x @ projection
