"""Vectors of texts and classes, at the price of their words: most of what `encode_text` computes is
padding.
"""

import numpy as np
import open_clip
import torch
from open_clip.transformer import TextTransformer

from utils.runtime.errors import UserError

TEXTS, CLASSES = 4096, 50  # that are embedded, and so saved, at a time


def too_long(clip, texts):
    """Those of some texts that are longer than the model's context; it reads their beginnings only."""
    limit, hugging_face = clip.tokenizer.context_length, getattr(clip.tokenizer, "tokenizer", None)
    if hugging_face:  # it counts the tokens at both ends itself
        return [text for text in texts if len(hugging_face(text)["input_ids"]) > limit]
    return [text for text in texts if len(clip.tokenizer.encode(text)) + 2 > limit]


@torch.inference_mode()
def text_vectors(clip, texts, batch_size):
    """Unit text vectors, without a template: list of texts -> float32 array [texts, D].

    Texts are sorted by length, and each batch is cut to its longest, where nothing after a text's end token
    matters.

    Raises UserError for tokens that the model does not have.
    """
    tokens, tower = clip.tokenizer(list(texts)), causal_tower(clip.text)
    refuse_unknown(clip.text, tokens)
    ends = end_tokens(tower, tokens)
    order, vectors = ends.argsort(stable=True), None
    for rows in order.split(batch_size):
        batch = tokens[rows].to(clip.device)
        if tower is None:
            found = clip.text.encode_text(batch)
        else:
            found = encode_cut(tower, batch[:, : int(ends[rows].max()) + 1], ends[rows].to(clip.device))
        found = torch.nn.functional.normalize(found.float(), dim=-1).cpu().numpy()
        vectors = np.empty((len(tokens), found.shape[1]), np.float32) if vectors is None else vectors
        vectors[rows.numpy()] = found
    return vectors


@torch.inference_mode()
def zero_shot_classifier(clip, class_names, batch_size):
    """The zero-shot classifier over OpenAI's 80 templates: unit columns, float32 array [D, classes]."""
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    prompts = text_vectors(
        clip, [template(name) for name in class_names for template in templates], batch_size
    )
    columns = prompts.reshape(len(class_names), len(templates), -1).mean(axis=1)
    return (columns / np.linalg.norm(columns, axis=1, keepdims=True)).T


def refuse_unknown(model, tokens):
    """Raise UserError when an open_clip model's vocabulary does not have all of some tokens."""
    tower = getattr(model, "text", model)
    known = getattr(tower, "token_embedding", None) or tower.transformer.get_input_embeddings()
    if int(tokens.max()) >= known.num_embeddings:
        raise UserError(
            f"the tokenizer gives token {int(tokens.max())}, and the model has {known.num_embeddings} tokens: they "
            "do not belong together; put the model's own tokenizer into its folder and use --model "
            "local-dir:FOLDER, or name it as hf_tokenizer_name in the config's text_cfg"
        )


def causal_tower(model):
    """The text tower of an open_clip model if it is causal and read at the end token, so that nothing after
    that matters; else None."""
    tower = getattr(model, "text", model)
    if not isinstance(tower, TextTransformer | open_clip.CLIP) or tower.attn_mask is None:
        return None
    return (
        tower if getattr(tower, "cls_emb", None) is None and pooling(tower)[0] in ("argmax", "eos") else None
    )


def pooling(tower):
    """How a text tower is pooled, and the number of its end token."""
    own = isinstance(tower, TextTransformer)
    return (
        (tower.pool_type, tower.eos_id)
        if own
        else (tower.text_pool_type, getattr(tower, "text_eos_id", None))
    )


def end_tokens(tower, tokens):
    """Where each text is read, int64 [texts]: tokens [texts, context]. 0 for a tower that is run as it is."""
    if tower is None:
        return torch.zeros(len(tokens), dtype=torch.int64)
    kind, end = pooling(tower)
    return tokens.argmax(dim=1) if kind == "argmax" else (tokens == end).int().argmax(dim=1)


def encode_cut(tower, tokens, ends):
    """What `encode_text` gives, from the first tokens alone: [B, n], of which `ends` [B] are read -> [B,
    D].
    """
    n = tokens.shape[1]
    x = tower.token_embedding(tokens) + tower.positional_embedding[:n]
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:n, :n]))
    x, projection = x[torch.arange(len(x), device=x.device), ends], tower.text_projection
    if projection is None or isinstance(projection, torch.nn.Linear):
        return x if projection is None else projection(x)
    return x @ projection
