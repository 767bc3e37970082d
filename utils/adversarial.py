"""Semantic adversarial images (section 5.1 of the paper): pictures of one class that show what moves CLIP to another.

In five steps: mine words from the descriptions of the neurons that tell the classes apart, drop those that are too near to
class_0, have descriptions of class_1 written with the rest, draw them, classify the drawings. class_0 is the class that the
classifier is to be fooled into; it is never named in a description.
"""

import csv
import difflib
import io
import json
import random
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.clip import text_vectors
from utils.concepts import word_scores
from utils.datasets import IMAGENET, Images, Loader, class_names_of
from utils.runtime.errors import UserError
from utils.runtime.files import read_json, save_atomic, save_json
from utils.runtime.passes import pieces_of, walk
from utils.runtime.results import load_record
from utils.sparse_coding import load_descriptions, load_texts

FILES = ("candidates.json", "words.json", "generations.json", "prompts.json", "images.json", "files.csv", "results.json")
BLOCK = 256  # candidates that are compared with class_0 at a time
TEMPLATE_WORDS = 3  # of the list in one description of `template_descriptions`
GENERATIONS = 3  # times that a language model is asked before we give up
SEEDS = 100_000  # seeds of pictures that belong to one --seed

REQUEST = """I draw pictures with a text-to-image model. Write {count} short descriptions of pictures for it.
Every description has to name "{class_1}". None may name "{class_0}", in the singular or plural, or any other word for it.
Beside that, a description should be made of as many words as possible from this list, and of almost no others:
{words}
Leave out words that cannot be seen in a picture, and words that you do not know. Instead of the name of a place or a person write
what one sees of it, for example "the Eiffel Tower in the background" instead of "Paris".
Answer with a numbered list of {count} descriptions, one a line, and nothing else."""


# ---------------------------------------------------------------------------------------------------------------------
# The folder of one attack


class Run:
    """The folder of one attack. Every step keeps its result with the settings that it was made with, and is not made twice.

    output_dir: where the folder is made.
    parts: what it is named after: class_0, class_1, the word source.
    seed: of words, descriptions and images.
    overwrite: discard all earlier results at the start.

    Raises UserError for a result that was made with other settings.
    """

    def __init__(self, output_dir, parts, seed, overwrite=False):
        name = "_".join(re.sub(r"[^\w-]+", "-", part) for part in parts)
        self.folder = Path(output_dir) / f"{name}_seed{seed}"
        self.images = self.folder / "images"
        self.images.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for path in (*self.images.glob("*.png"), *(self.folder / file for file in FILES)):
                path.unlink(missing_ok=True)

    def kept(self, file, settings, beside=()):
        """The result that an earlier run left in a file; None when it, or a file that belongs to it, is not there."""
        path, scratch = self.folder / file, "add --overwrite to start from scratch"
        if not all((self.folder / name).is_file() for name in (file, *beside)):
            return None
        content = read_json(path, "", f"remove it, or {scratch}")
        if not isinstance(content, dict) or "settings" not in content:
            raise UserError(f"{path} is damaged (it has no settings); remove it, or {scratch}")
        earlier, settings = content["settings"], json.loads(json.dumps(settings))
        if earlier != settings:
            differing = [key for key in settings | earlier if settings.get(key) != earlier.get(key)]
            raise UserError(f"{path} was made with other {', '.join(differing)}; {scratch}, or choose another --output_dir")
        return content

    def step(self, file, settings, make, beside=()):
        """The content of a file: what an earlier run left there, or make(), a dict, which is saved with the settings.

        beside: files that make() writes too, and without which nothing was left.
        """
        content = self.kept(file, settings, beside)
        if content is not None:
            print(f"kept {self.folder / file}")
            return content
        content = {"settings": settings, **make()}
        save_json(self.folder / file, content)
        print(f"wrote {self.folder / file}")
        return content


# ---------------------------------------------------------------------------------------------------------------------
# Classes and how texts name them


def load_named_classifier(results, dataset, clip):
    """The zero-shot classifier [D, classes] on the model's device, and the names of its classes.

    The names are in the record of compute_classifier_projection.py; for a classifier without one they are the data set's.
    """
    classifier = results.load("classifier", clip.vit.sizes, {"fingerprint": clip.fingerprint}, dataset=dataset)
    path = results.path("classifier", dataset=dataset)
    class_names = load_record(path).get("class_names")
    if class_names is None and dataset in IMAGENET:
        class_names = class_names_of(dataset)
    if class_names is None or len(class_names) != classifier.shape[1]:
        command = results.command("classifier", dataset=dataset)
        raise UserError(
            f"the names of the {classifier.shape[1]} classes of {path} are not known; make it again with: {command} --overwrite"
        )
    return torch.from_numpy(classifier).to(clip.device), class_names


def find_class(flag, name, class_names):
    """The class that a user names, whatever the case. Raises UserError, with near matches, when there is none."""
    by_lower = {known.lower(): known for known in reversed(class_names)}
    wanted = " ".join(name.replace("_", " ").lower().split())
    if wanted in by_lower:
        return by_lower[wanted]
    near = difflib.get_close_matches(wanted, by_lower, n=4, cutoff=0.5)
    near += [known for known in by_lower if wanted in known.split() and known not in near][:4]
    known = ", ".join(by_lower[match] for match in near) or f"{', '.join(class_names[:8])}, ..."
    raise UserError(f"{flag} {name} is no class of the classifier; {'did you mean' if near else 'there are'} {known}?")


def check_classes(class_0, class_1, blocked):
    """Raise UserError when no description can name class_1 without class_0 or a blocked word."""
    if class_0 == class_1:
        raise UserError(f"--class_0 and --class_1 are both {class_0}; they have to differ")
    if names_class(class_1, class_0, inside=True):
        raise UserError(f"every description of {class_1} names {class_0}, which it must not; choose another --class_0")
    named = next((name for name in blocked if names_class(class_1, name)), None)
    if named is not None:
        raise UserError(f"the block list of {class_0} has {named}, which every description of {class_1} names; take it off")


def names_class(text, name, inside=False):
    """Whether a text names a class, in the singular or plural. inside: a part of a longer word counts too ("horseback"), for
    names of four letters and more."""
    stem = r"[\s_-]+".join(re.escape(part) for part in name.lower().split())
    forms = [rf"{stem}(?:s|es|'s)?"]
    for ending, plural in (("y", "ies"), ("fe", "ves"), ("f", "ves"), ("man", "men")):
        if name.lower().endswith(ending):
            forms.append(stem.removesuffix(ending) + plural)
    pattern = "|".join(forms)
    if not (inside and len(name) >= 4):
        pattern = rf"(?<![^\W_])(?:{pattern})(?![^\W_])"
    return re.search(pattern, text.lower()) is not None


def banned(text, class_0, blocked):
    """Why a word or description must not be used: it names class_0 or a blocked word; None when it may."""
    if names_class(text, class_0, inside=True):
        return f"names {class_0}"
    named = next((name for name in blocked if names_class(text, name)), None)
    return named and f"names {named}, which is on the block list"


def load_block_list(path, class_0):
    """The words that a block list, a json {class: [words]}, has for class_0; none when it has no entry, or path is None."""
    if path is None:
        return []
    try:
        content = read_json(path, "--block_list", "give a json {class: [words]}")
    except FileNotFoundError as error:
        raise UserError(f"--block_list {path} cannot be read: there is no such file") from error
    if not isinstance(content, dict) or not all(isinstance(words, list) for words in content.values()):
        raise UserError(f'--block_list {path} needs a list of words for every class: {{"horse": ["pony", "mare"]}}')
    words = {name.lower(): [str(word) for word in words] for name, words in content.items()}
    return words.get(class_0.lower(), [])


# ---------------------------------------------------------------------------------------------------------------------
# Mine words


class NeuronWords:
    """Words of the neurons whose main direction tells the classes apart most.

    results: `Results` of the folder. names: dataset, texts, components, alpha, k: in the files' names.
    clip: the loaded `Clip`.
    layers: of the MLP.
    """

    def __init__(self, results, clip, layers, **names):
        sizes, expected = clip.vit.sizes, {"fingerprint": clip.fingerprint}
        self.pcas = {layer: results.load("pca", sizes, expected, layer=layer, **names) for layer in layers}
        self.descriptions = {
            layer: load_descriptions(results, sizes, {**expected, "top_k_pca": names["k"]}, layer=layer, **names)
            for layer in layers
        }

    def mine(self, v, neurons_num, neurons_texts):
        """The words of the neurons_num neurons of all layers with the largest |<r_n, v>|, each scored coefficient * <r_n, v>.

        v: [D], the difference of the classes' text vectors.
        neurons_num: of all layers together.
        neurons_texts: words of a description that count, None for all.

        Returns {"neurons": [[layer, neuron, <r_n, v>], ...], "words": [[word, score], ...]}, words of positive score only.
        """
        along = [(layer, n, float(x)) for layer, r in self.pcas.items() for n, x in enumerate(r @ v)]
        along.sort(key=lambda item: -abs(item[2]))
        chosen = along[:neurons_num]
        every = [self.descriptions[layer][n] for layer, n, _ in chosen]
        scores = word_scores(every, {i: x for i, (_, _, x) in enumerate(chosen)}, neurons_texts)
        return {"neurons": [list(item) for item in chosen], "words": [[word, score] for word, score in scores if score > 0]}


class PoolWords:
    """Words of the whole pool of texts, the two baselines: those most similar to class_0, or any.

    results: `Results` of the folder with the text vectors. texts, descriptions_dir: as in `load_texts`.
    clip: the loaded `Clip`.
    """

    def __init__(self, results, texts, descriptions_dir, clip):
        self.texts, self.vectors, _ = load_texts(results, texts, descriptions_dir)
        again = f"make it again with: {results.command('texts', texts=texts)} --overwrite"
        results.check_record(results.path("texts", texts=texts), {"fingerprint": clip.fingerprint}, again)

    def similar(self, text_0):
        """All texts, by the cosine with a unit text vector [D]."""
        norms = np.linalg.norm(self.vectors, axis=1)
        cosines = self.vectors @ text_0 / np.maximum(norms, np.finfo(norms.dtype).tiny)
        scores = dict(zip(self.texts, cosines.tolist(), strict=True))  # a text that is there twice counts once
        return {"words": [[text, score] for text, score in sorted(scores.items(), key=lambda item: (-item[1], item[0]))]}

    def random(self, seed):
        """All texts in a random order, without scores."""
        texts = sorted(set(self.texts))
        random.Random(f"words {seed}").shuffle(texts)
        return {"words": [[text, None] for text in texts]}


def class_difference(clip, class_0, class_1):
    """Unit text vectors of the bare class names: v = text(class_0) - text(class_1) [D], and text(class_0) [D]."""
    text_0, text_1 = text_vectors(clip, [class_0, class_1], 2)
    return text_0 - text_1, text_0


# ---------------------------------------------------------------------------------------------------------------------
# Filter words


def filter_words(candidates, class_0, count, encode, threshold, blocked):
    """Take the first words that neither name class_0 nor come too near to it.

    candidates: [[word, score], ...], the best first.
    count: words to take.
    encode: texts -> unit vectors.
    threshold: the largest cosine with class_0 that a word may have.
    blocked: words that must not be named either.

    Returns {"words": [{"word", "score", "cosine"}, ...], "dropped": the same with a "reason", of those before the last taken}.
    Raises UserError when no word is left.
    """
    taken, dropped = [], []
    own = encode([class_0])[0]
    for start in range(0, len(candidates), BLOCK):
        block = candidates[start : start + BLOCK]
        cosines = (encode([word for word, _ in block]) @ own).tolist()
        for (word, score), cosine in zip(block, cosines, strict=True):
            entry = {"word": word, "score": score, "cosine": round(cosine, 4)}
            reason = banned(word, class_0, blocked)
            if reason is None and cosine > threshold:
                reason = f"cosine with {class_0} above {threshold}"
            dropped.append(entry | {"reason": reason}) if reason else taken.append(entry)
            if len(taken) == count:
                return {"words": taken, "dropped": dropped}
    if not taken:
        raise UserError(
            f"of {len(candidates)} words none is left for {class_0}; raise --cosim_similarity (it is {threshold}), --neurons_num "
            "or --neurons_texts, or shorten the block list"
        )
    return {"words": taken, "dropped": dropped}


# ---------------------------------------------------------------------------------------------------------------------
# Write descriptions


def template_descriptions(words, class_1, count, seed):
    """Descriptions without a language model: class_1, and some words of the list."""
    rng = random.Random(f"descriptions {seed}")
    article = "an" if class_1[0].lower() in "aeiou" else "a"
    descriptions = {}
    for _ in range(20 * count):  # few words make few different descriptions
        chosen = rng.sample(words, min(TEMPLATE_WORDS, len(words)))
        descriptions[f"a photo of {article} {class_1}, {', '.join(chosen)}"] = None
        if len(descriptions) == count:
            break
    return list(descriptions)


def usable(descriptions, class_0, class_1, blocked):
    """Divide descriptions into those that can be drawn, and [[description, reason], ...] for those that cannot."""
    good, bad = [], []
    for text in descriptions:
        reason = banned(text, class_0, blocked)
        if reason is None and not names_class(text, class_1):
            reason = f"does not name {class_1}"
        if reason is None and text in good:
            reason = "is there twice"
        bad.append([text, reason]) if reason else good.append(text)
    return good, bad


def parse_list(answer, cut_off):
    """The entries of a numbered or bulleted list, without numbers, quotes and emphasis; the last one is left out if the answer
    was cut off."""
    lines = [line for line in answer.splitlines() if line.strip()]
    if cut_off:
        lines = lines[:-1]
    entries = [re.match(r"\s*[*_]*(?:\d+\s*[.):]|[-*•])[*_]*\s+(.+)", line) for line in lines]
    texts = [entry[1].strip().strip("\"'“”*_").strip() for entry in entries if entry]
    return [text for text in texts if text]


def write_descriptions(run, settings, ask, words):
    """Have a language model write descriptions; its answers are kept in generations.json as they are.

    run: `Run`.
    settings: class_0, class_1, block_list, text_model, results_per_generation (descriptions in one answer), seed.
    ask: `LanguageModel`, asked again only while nothing can be used.
    words: the list.

    Returns {"descriptions": [...], "dropped": [[text, reason], ...]}. Raises UserError when nothing can ever be used.
    """
    class_0, class_1, count = (settings[key] for key in ("class_0", "class_1", "results_per_generation"))
    request = REQUEST.format(count=count, class_0=class_0, class_1=class_1, words=", ".join(words))
    answers, dropped, cut, file = [], [], False, run.folder / "generations.json"
    for generation in range(GENERATIONS):
        answer, cut = ask(request, count, SEEDS * settings["seed"] + generation)
        answers.append({"answer": answer, "cut_off": cut})
        save_json(file, {"settings": settings, "request": request, "answers": answers})
        good, bad = usable(parse_list(answer, cut)[:count], class_0, class_1, settings["block_list"])
        dropped += bad
        if good:
            return {"descriptions": good, "dropped": dropped}
    reasons = sorted({reason for _, reason in dropped})
    why = f"{len(dropped)} descriptions, each of which {' or '.join(reasons)}" if dropped else "no numbered list of descriptions"
    raise UserError(
        f"--text_model {settings['text_model']} gave {why}{' (an answer was cut off)' if cut else ''}, asked {GENERATIONS} "
        f"times; its answers are in {file}; try again with another --text_model, a smaller --results_per_generation, or "
        "--text_model template (the words are kept)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Draw


def plan_drawings(folder, descriptions, count, seed):
    """Which description is drawn in which file, and from which seed: the descriptions in turn. Drops older drawings."""
    for path in (folder / "images").glob("*.png"):
        path.unlink()
    return {
        "images": [
            {"file": f"images/{i:05d}.png", "description": descriptions[i % len(descriptions)], "seed": SEEDS * seed + i}
            for i in range(count)
        ]
    }


def draw(folder, drawings, load):
    """Draw what is planned and not there yet. load: () -> a function (description, seed) -> PIL image, called if it is needed."""
    missing = [item for item in drawings if not (folder / item["file"]).is_file()]
    if not missing:
        print(f"kept {len(drawings)} images in {folder / 'images'}")
        return
    model = load()
    for item in tqdm(missing, desc="drawings", unit="image"):
        image = model(item["description"], item["seed"])
        save_atomic(folder / item["file"], lambda file, image=image: image.save(file, format="PNG"))
    print(f"drew {len(missing)} images in {folder / 'images'}")


# ---------------------------------------------------------------------------------------------------------------------
# Classify


@torch.inference_mode()
def classify(folder, drawings, clip, classifier, names, batch_size=64):
    """Classify the drawings, write files.csv, and count.

    folder: of the run.
    drawings: as `plan_drawings` has them.
    clip: the loaded `Clip`.
    classifier: [D, classes], on the model's device.
    names: {"classes": names of all classes, "class_0", "class_1"}.

    Returns the rates in per cent: success_rate, images for which class_0 is the largest of all logits; success_rate_of_two, those
    for which it is larger than that of class_1; class_1_rate, those for which class_1 is the largest.
    """
    class_names, class_0, class_1 = names["classes"], names["class_0"], names["class_1"]
    images = Images([(str(folder / item["file"]), 0) for item in drawings], class_names, clip.transform)
    loader = Loader(images, clip.device)
    vectors = [clip.vit(pixels) for _, pixels in walk(pieces_of(len(images), batch_size), loader)]
    logits = torch.nn.functional.normalize(torch.cat(vectors), dim=-1) @ classifier  # [images, classes], cosines
    predicted = [class_names[i] for i in logits.argmax(dim=1).tolist()]
    of_0, of_1 = logits[:, class_names.index(class_0)].tolist(), logits[:, class_names.index(class_1)].tolist()
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", "description", "seed", "predicted", "adversarial", "cosine_class_0", "cosine_class_1"])
    for item, found, a, b in zip(drawings, predicted, of_0, of_1, strict=True):
        adversarial = int(found == class_0)
        writer.writerow([item["file"], item["description"], item["seed"], found, adversarial, f"{a:.5f}", f"{b:.5f}"])
    save_atomic(folder / "files.csv", lambda file: file.write(table.getvalue().encode()))
    count = len(drawings)
    return {
        "images": count,
        "success_rate": 100 * predicted.count(class_0) / count,
        "success_rate_of_two": 100 * sum(a > b for a, b in zip(of_0, of_1, strict=True)) / count,
        "class_1_rate": 100 * predicted.count(class_1) / count,
    }
