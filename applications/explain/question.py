"""Read what is asked: two texts, pictures or a folder of them, and what taking a neuron away means."""

import os
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from utils.data.folders import find_pictures, tell
from utils.data.images import IMAGENET, Images, classes_of, train_set_of
from utils.model.texts import text_vectors, too_long
from utils.runtime.errors import UserError
from utils.runtime.records import load_record

LARGEST = 1e6  # mean activation; float32 does not hold the squares of far larger ones
SAME = 1e-4  # length of the difference of two text vectors that are the same for the model


class Asked(NamedTuple):
    """Asked are the words of a question, before any model is loaded."""

    texts: list  # --text, and --against where it is given
    paths: list  # of the pictures
    folder: str | None  # whose pictures they are; None for single pictures


class Question(NamedTuple):
    """A Question is a direction v of the output, by which scores are measured."""

    texts: list
    vectors: torch.Tensor  # [texts, D], of unit length
    v: torch.Tensor  # [D]


class Classes(NamedTuple):
    """Classes are those of a zero-shot classifier."""

    classifier: torch.Tensor  # [D, classes]
    names: list


def read_question(args):
    """Return what the flags ask, as `Asked`. Raises UserError for texts and paths that say nothing."""
    texts = [" ".join(text.split()) for text in (args.text, args.against) if text is not None]
    for flag, text in zip(("--text", "--against"), texts, strict=False):
        if not text:
            raise UserError(f"{flag} is empty; give a text such as 'a photo of a dog'")
        if readable(text) != text:
            raise UserError(f"{flag} is not UTF-8; type it in a terminal that is set to UTF-8")
    if len(texts) == 2 and texts[0] == texts[1]:
        raise UserError(f"--text and --against are both {texts[0]!r}; give two different texts")
    folders = [path for path in args.pictures if os.path.isdir(path)]
    if not folders:
        missing = [path for path in args.pictures if not os.path.isfile(path)]
        if missing:
            raise UserError(f"there is no picture {missing[0]}; check the path")
        return Asked(texts, list(args.pictures), None)
    if len(args.pictures) > 1:
        raise UserError(f"{folders[0]} is a folder; give one folder alone, or single pictures")
    return Asked(texts, pictures_of(folders[0]), folders[0])


def readable(name):
    """Return a name with letters that are not UTF-8, as old disks have them, written as numbers."""
    return name.encode("utf-8", "backslashreplace").decode()


def pictures_of(folder):
    """List the pictures in and below a folder. Raises UserError where there are none."""
    left_out = Counter()
    [paths] = find_pictures(folder, [folder], left_out)
    if not paths:
        raise UserError(f"there are no pictures in {folder}; give a folder that has some")
    tell(left_out)
    return paths


def ask(clip, texts):
    """Return the `Question` of one or two texts. Raises UserError for texts that the model cannot read."""
    long = too_long(clip, texts)
    if long:
        limit = clip.tokenizer.context_length
        what = f"the text {long[0][:40]!r}... is longer than the {limit} tokens that the model reads"
        raise UserError(f"{what}; give a shorter one")
    tokens = clip.tokenizer([*texts, ""])
    silent = [text for text, of in zip(texts, tokens, strict=False) if torch.equal(of, tokens[-1])]
    if silent:
        raise UserError(f"the model reads nothing in the text {silent[0]!r}; give another one")
    vectors = torch.from_numpy(text_vectors(clip, texts, len(texts))).to(clip.device)
    v = vectors[0] if len(texts) == 1 else vectors[0] - vectors[1]
    if v.norm() < SAME:
        raise UserError(f"the model does not tell {texts[0]!r} and {texts[1]!r} apart; give other texts")
    return Question(texts, vectors, v)


def load_means(args, clip, results, layers):
    """Return {layer: [T, N]}, the activations that neurons have where they are taken away.

    Raises UserError, with the command, where the mean activations of some layers are missing, of other images
    than those of other layers, or far too large.
    """
    vit = clip.vit
    if args.baseline == "zero":
        return {l: torch.zeros(vit.T, results.sizes(l)["N"], device=clip.device) for l in layers}
    dataset = train_set_of(args.dataset)
    names = {"dataset": dataset, "split": "train"}
    paths = {l: results.find("activations", layer=l, **names) for l in layers}
    missing = [l for l, path in paths.items() if not path.is_file()]
    if missing:
        command = results.command("activations", layer=missing, **names)
        numbers = ", ".join(map(str, missing))
        what = f"mean activations of layer {numbers} are missing in {results.directory}"
        raise UserError(f"{what}; make them with: {command}   (or add --baseline zero, which needs none)")
    means = {l: results.load("activations", layer=l, **names) for l in layers}
    again = f"make them again with: {results.command('activations', layer=layers, **names)} --overwrite"
    data = [load_record(path).get("data") for path in paths.values()]
    if len(set(map(str, data)) - {"None"}) > 1:
        what = f"mean activations in {results.directory} are of other images in some layers"
        raise UserError(f"{what}; {again}")
    for l, mean in means.items():
        if np.abs(mean).max() > LARGEST:
            raise UserError(f"{paths[l]} holds {np.abs(mean).max():.0e}, as no activation is; {again}")
    return {l: torch.from_numpy(mean).to(clip.device) for l, mean in means.items()}


def load_classes(args, clip, results):
    """Return the `Classes` of the data set's zero-shot classifier; None where there is no such file.

    Raises UserError where its record has other classes than columns.
    """
    dataset = train_set_of(args.dataset)
    path = results.find("classifier", dataset=dataset)
    if not path.is_file():
        return None
    classifier = torch.from_numpy(results.load("classifier", dataset=dataset)).to(clip.device)
    columns = classifier.shape[1]
    names = load_record(path).get("class_names")
    if names is None:  # made by the published code
        unnamed = [f"class {i}" for i in range(columns)]
        names = classes_of(dataset)["class_names"] if dataset in IMAGENET else unnamed
    if not isinstance(names, list) or not len(names) == columns > 0:
        again = f"make it again with: {results.command('classifier', dataset=dataset)} --overwrite"
        raise UserError(f"{path} has {columns} columns, and its record does not name as many; {again}")
    return Classes(classifier, names)


def images_of(asked, clip):
    """Return the pictures of a question as `Images`."""
    return Images([(path, 0) for path in asked.paths], ["pictures"], ["pictures"], clip.transform)
