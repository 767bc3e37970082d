"""Semantic adversarial images (section 5.1 of the paper): pictures of one class that hold what moves CLIP to another.

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

from utils.artifacts import load_array, load_meta, one_line, save_atomic, save_json
from utils.clip import text_vectors
from utils.concepts import load_descriptions, word_scores
from utils.datasets import Images, batches, class_names_of
from utils.errors import UserError
from utils.rows import row_pieces
from utils.sparse_coding import load_texts

FILES = ("candidates.json", "words.json", "generations.json", "prompts.json", "images.json", "files.csv", "results.json")
BLOCK = 256  # candidates that are compared with class_0 at a time
TEMPLATE_WORDS = 3  # of the list in one description of `template_descriptions`
GENERATIONS = 3  # times that a language model is asked before it is given up
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

    Raises UserError for a result that was made with other settings; `overwrite` drops all results at the start.
    """

    def __init__(self, output_dir, class_0, class_1, word_source, seed, overwrite=False):
        name = "_".join(re.sub(r"[^\w-]+", "-", part) for part in (class_0, class_1, word_source))
        self.folder = Path(output_dir) / f"{name}_seed{seed}"
        self.images = self.folder / "images"
        self.images.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for path in (*self.images.glob("*.png"), *(self.folder / file for file in FILES)):
                path.unlink(missing_ok=True)

    def kept(self, file, settings, beside=()):
        """The result that an earlier run left in a file; None when it, or a file that belongs to it, is not there."""
        path = self.folder / file
        if not all((self.folder / name).is_file() for name in (file, *beside)):
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            earlier = content["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({one_line(error)}); remove it, or add --overwrite to start afresh") from error
        settings = json.loads(json.dumps(settings))
        if earlier != settings:
            differing = [key for key in settings | earlier if settings.get(key) != earlier.get(key)]
            raise UserError(
                f"{path} was made with other {', '.join(differing)}; add --overwrite to start afresh, or choose another "
                "--output_dir"
            )
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


def load_named_classifier(names, dataset, clip, flags):
    """The zero-shot classifier [D, classes] on the model's device, and the names of its classes.

    The names are in the record of compute_classifier_projection.py; for a classifier without one they are the data set's.
    """
    path = names.classifier(dataset)
    command = f"python compute_classifier_projection.py --dataset {dataset} {flags}"
    classifier = load_array(path, command, (clip.model.visual.output_dim, None), fingerprint=clip.fingerprint)
    class_names = load_meta(path).get("class_names")
    if class_names is None and dataset in ("imagenet", "imagenet_r"):
        class_names = class_names_of(dataset)
    if class_names is None or len(class_names) != classifier.shape[1]:
        raise UserError(f"the names of the {classifier.shape[1]} classes of {path} are not known; make it again with: {command}")
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


def load_block_list(path, class_0):
    """The words that a block list, a json {class: [words]}, has for class_0; none when it has no entry, or path is None."""
    if path is None:
        return []
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        words = {name.lower(): [str(word) for word in words] for name, words in content.items() if isinstance(words, list)}
    except OSError as error:
        raise UserError(f"--block_list {path} cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"--block_list {path} is no json of the form {{class: [words]}} ({one_line(error)[:100]})") from error
    if len(words) != len(content):
        raise UserError(f'--block_list {path} needs a list of words for every class: {{"horse": ["pony", "mare"]}}')
    return words.get(class_0.lower(), [])


# ---------------------------------------------------------------------------------------------------------------------
# Mine words


class NeuronWords:
    """Words of the neurons whose main direction tells the classes apart most.

    Parameters
    names: Names of the input. clip: the loaded `Clip`. dataset: whose statistics and descriptions are read. layers: of the MLP.
    top_k_pca, text_descriptions, transform_alpha, components: which of them. flags: the model's flags, for messages.
    """

    def __init__(self, names, clip, dataset, layers, top_k_pca, text_descriptions, transform_alpha, components, flags):
        vit = clip.hooked_vit()
        self.pcas, self.descriptions, self.data = {}, {}, {}
        for layer in layers:
            path = names.statistics(dataset, layer, f"{top_k_pca}_pca")
            command = f"python compute_pcas.py --mlp_layer {layer} --top_k_pca {top_k_pca} --dataset {dataset} {flags}"
            self.pcas[layer] = load_array(path, command, (vit.N, vit.D), fingerprint=clip.fingerprint)
            self.data[str(layer)] = load_meta(path).get("data")
            made_with = {"fingerprint": clip.fingerprint, "top_k_pca": top_k_pca}
            self.descriptions[layer] = load_descriptions(
                names, dataset, layer, text_descriptions, transform_alpha, components, vit.N, flags, **made_with
            )

    def mine(self, v, neurons_num, neurons_texts):
        """The words of the neurons_num neurons of all layers with the largest |<r_n, v>|, each scored coefficient * <r_n, v>.

        v: [D], the difference of the classes' text vectors. neurons_texts: words of a description that count, None for all.

        Returns {"neurons": [[layer, neuron, <r_n, v>], ...], "words": [[word, score], ...]}, words of positive score only.
        """
        along = [(layer, n, float(x)) for layer, r in self.pcas.items() for n, x in enumerate(r @ v)]
        along.sort(key=lambda item: -abs(item[2]))
        chosen = along[:neurons_num]
        every = [self.descriptions[layer][n] for layer, n, _ in chosen]
        scores = word_scores(every, {i: x for i, (_, _, x) in enumerate(chosen)}, neurons_texts)
        return {"neurons": [list(item) for item in chosen], "words": [[word, score] for word, score in scores if score > 0]}


class PoolWords:
    """Words of the whole pool of texts, the two baselines: those most similar to class_0, or any."""

    def __init__(self, names, text_descriptions, descriptions_dir, clip, flags):
        self.texts, self.vectors, fingerprint = load_texts(names, text_descriptions, descriptions_dir, flags)
        if fingerprint not in (None, clip.fingerprint):
            raise UserError(
                f"{names.texts(text_descriptions)} is of other weights; make it again with: "
                f"python compute_text_set_projection.py --text_descriptions {text_descriptions} {flags}"
            )

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

    Parameters
    candidates: [[word, score], ...], the best first. count: words to take. encode: texts -> unit vectors. threshold: the largest
    cosine with class_0 that a word may have. blocked: words that are not to be named either.

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
            named = next((name for name in blocked if names_class(word, name)), None)
            if names_class(word, class_0, inside=True):
                dropped.append(entry | {"reason": f"names {class_0}"})
            elif named is not None:
                dropped.append(entry | {"reason": f"{named} is on the block list"})
            elif cosine > threshold:
                dropped.append(entry | {"reason": f"cosine with {class_0} above {threshold}"})
            else:
                taken.append(entry)
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
        named = next((name for name in blocked if names_class(text, name)), None)
        if names_class(text, class_0, inside=True):
            bad.append([text, f"names {class_0}"])
        elif named is not None:
            bad.append([text, f"names {named}, which is on the block list"])
        elif not names_class(text, class_1):
            bad.append([text, f"does not name {class_1}"])
        elif text in good:
            bad.append([text, "is there twice"])
        else:
            good.append(text)
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


def write_descriptions(run, settings, model, ask, words, class_0, class_1, count, blocked, seed):
    """Have a language model write descriptions; its answers are kept in generations.json as they are.

    Parameters
    run: `Run`. settings: what the answers are made from. model: its name, for the message. ask: `LanguageModel`. words: the list.
    count: descriptions in one answer. blocked: words that are not to be named beside class_0. seed: of the first answer.

    Returns {"descriptions": [...], "dropped": [[text, reason], ...]}. The model is asked again only while nothing can be used.
    Raises UserError when it never can.
    """
    request = REQUEST.format(count=count, class_0=class_0, class_1=class_1, words=", ".join(words))
    answers, dropped, cut = [], [], False
    for generation in range(GENERATIONS):
        answer, cut = ask(request, count, SEEDS * seed + generation)
        answers.append({"answer": answer, "cut_off": cut})
        save_json(run.folder / "generations.json", {"settings": settings, "request": request, "answers": answers})
        good, bad = usable(parse_list(answer, cut)[:count], class_0, class_1, blocked)
        dropped += bad
        if good:
            return {"descriptions": good, "dropped": dropped}
    reasons = sorted({reason for _, reason in dropped})
    why = f"{len(dropped)} descriptions, each of which {' or '.join(reasons)}" if dropped else "no numbered list of descriptions"
    raise UserError(
        f"--text_model {model} gave {why}{' (an answer was cut off)' if cut else ''}, asked {GENERATIONS} times; its answers are "
        f"in {run.folder / 'generations.json'}; repeat with another --text_model, a smaller --results_per_generation, or "
        "--text_model template, and the words are kept"
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
def classify(folder, drawings, clip, classifier, class_names, class_0, class_1, batch_size):
    """Classify the drawings, write files.csv, and count.

    Parameters
    folder: of the run. drawings: as `plan_drawings` has them. classifier: [D, classes], on the model's device.

    Returns the rates in per cent: success_rate, images for which class_0 is the largest of all logits; success_rate_of_two, those
    for which it is larger than that of class_1; class_1_rate, those for which class_1 is the largest.
    """
    samples = [(str(folder / item["file"]), 0) for item in drawings]
    images = Images(samples, class_names, clip.transform)
    logits = [
        clip.model.encode_image(pixels, normalize=True).float() @ classifier
        for _, _, pixels, _ in batches(images, list(enumerate(row_pieces(len(images), batch_size))), device=clip.device)
    ]
    logits = torch.cat(logits)  # [images, classes], cosines
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
