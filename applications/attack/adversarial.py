"""Semantic adversarial images (section 5.1 of the paper): pictures of one class that CLIP takes for another.

Five steps: mine words from the descriptions of the neurons that separate the two classes, drop words too
close to class_0, write descriptions of class_1 with the rest, draw them, classify the drawings. CLIP should
take them for class_0, which none names. The classes are any two texts.
"""

import csv
import io
import json
import random
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from utils.concepts import word_scores
from utils.data.images import IMAGENET, Images, Loader, classes_of, train_set_of
from utils.data.text_sets import as_text, load_texts
from utils.descriptions import load_descriptions
from utils.runtime.errors import UserError
from utils.runtime.files import ROOT, digest, read_json, save_atomic, save_json
from utils.runtime.locks import Lock
from utils.runtime.passes import pieces_of, walk
from utils.runtime.records import agrees, like_json, load_record

FILES = (
    "candidates.json",
    "words.json",
    "generations.json",
    "prompts.json",
    "images.json",
    "files.csv",
    "results.json",
)
BLOCK = 256  # words compared with class_0 at a time
TEMPLATE_WORDS = 3  # words in one description of `template_descriptions`
GENERATIONS = 3  # attempts of a language model
SEEDS = 100_000  # picture seeds per --seed
BLOCK_LIST = ROOT / "text_descriptions" / "block_list.json"
COLUMNS = (
    "file",
    "description",
    "seed",
    "keep",
    "black",
    "binary",
    "predicted",
    "adversarial",
    "cosine_class_0",
    "cosine_class_1",
)

REQUEST = """I draw pictures with a text-to-image model. Write {count} short descriptions of pictures for it.
Every description has to name "{class_1}". None may name "{class_0}", in the singular or plural, or any other word for it.
Beside that, a description should be made of as many words as possible from this list, and of almost no others:
{words}
Leave out words that cannot be seen in a picture, and words that you do not know. Instead of the name of a place or a person write
what one sees of it, for example "the Eiffel Tower in the background" instead of "Paris".
Answer with a numbered list of {count} descriptions, one a line, and nothing else."""


class Run:
    """The folder of one attack. Each step saves its result and settings there, and a later run keeps it.

    place: where the folder is made.
    parts: what it is named after: class_0, class_1, the word source.
    seed: of words, descriptions and images.
    """

    def __init__(self, place, parts, seed):
        name = "_".join(re.sub(r"[^\w-]+", "-", part) for part in parts)
        self.folder = Path(place) / f"{name}_seed{seed}"

    def lock(self):
        """Keep other runs from the folder, inside a `with`."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        return Lock(self.folder)

    def prepare(self, overwrite=False):
        """Make the folder. overwrite: delete all earlier results."""
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        if overwrite:
            for path in (*self.folder.glob("images/*.png"), *(self.folder / file for file in FILES)):
                path.unlink(missing_ok=True)

    def step(self, file, settings, make):
        """The content of a result file: what an earlier run saved, else what make() returns, a dict, which is
        saved.

        Raises UserError for a file that is damaged or was made with other settings.
        """
        path, scratch = self.folder / file, "add --overwrite to start from scratch"
        if not path.is_file():
            content = {"settings": settings, **make()}
            save_json(path, content)
            print(f"wrote {path}")
            return content
        content = read_json(path, "", f"remove it, or {scratch}")
        if not isinstance(content, dict) or "settings" not in content:
            raise UserError(f"{path} is damaged (it has no settings); remove it, or {scratch}")
        earlier, settings = content["settings"], like_json(settings)
        differing = [key for key in settings | earlier if not agrees(earlier.get(key), settings.get(key))]
        if differing:
            raise UserError(
                f"{path} was made with other {', '.join(differing)}; {scratch}, or choose another --dataset_path"
            )
        print(f"kept {path}")
        return content


def load_named_classifier(results, dataset, clip):
    """The zero-shot classifier [D, classes] on the model's device, and its class names: those in its record,
    else ImageNet's.
    """
    dataset = train_set_of(dataset)
    classifier = results.load(
        "classifier", clip.vit.sizes, {"fingerprint": clip.fingerprint}, dataset=dataset
    )
    path, count = results.find("classifier", dataset=dataset), classifier.shape[1]
    class_names = load_record(path).get("class_names") or (
        classes_of(dataset)["class_names"] if dataset in IMAGENET else []
    )
    if len(class_names) != count:
        command = results.command("classifier", dataset=dataset)
        raise UserError(
            f"{path} does not name its {count} classes; make it again with: {command} --overwrite"
        )
    return torch.from_numpy(classifier).to(clip.device), class_names


def find_classifier(results, dataset, clip, classes):
    """(classifier, class names) as `load_named_classifier` gives them, if it is there and has both classes;
    else (None, []).
    """
    if not results.find("classifier", dataset=train_set_of(dataset)).is_file():
        command = results.command("classifier", dataset=train_set_of(dataset))
        print(
            f"note: no classifier of {dataset}, so images are judged between the two names alone; make it with: {command}"
        )
        return None, []
    classifier, class_names = load_named_classifier(results, dataset, clip)
    return (
        (classifier, class_names)
        if None not in [place_of(name, class_names) for name in classes]
        else (None, [])
    )


def plain(name):
    """The name of a class without capitals and underscores."""
    return " ".join(name.replace("_", " ").lower().split())


def place_of(name, class_names):
    """Index of the class of a classifier that a text names; None if there is none."""
    return next((i for i, known in enumerate(class_names) if plain(known) == plain(name)), None)


def names_class(text, name, inside=False):
    """Whether a text names a class, singular or plural. inside: also within a longer word ("horseback"), from
    four letters on.
    """
    stem = r"[\s_-]+".join(re.escape(part) for part in name.lower().split())
    plurals = (("", "(?:s|es|'s)?"), ("y", "ies"), ("fe", "ves"), ("f", "ves"), ("man", "men"))
    pattern = "|".join(stem.removesuffix(end) + plural for end, plural in plurals if stem.endswith(end))
    if not (inside and len(name) >= 4):
        pattern = rf"(?<![^\W_])(?:{pattern})(?![^\W_])"
    return re.search(pattern, text.lower()) is not None


def banned(text, class_0, blocked):
    """Why a word or description must not be used: it names class_0 or a word of the block list. None if it
    may be used.
    """
    if names_class(text, class_0, inside=True):
        return f"names {class_0}"
    named = next((name for name in blocked if names_class(text, name)), None)
    return named and f"names {named}, which is on the block list"


def check_classes(class_0, class_1, blocked):
    """Raise UserError if every description of class_1 is banned."""
    if class_0 == class_1:
        raise UserError(f"--class_0 and --class_1 are both {class_0}; choose two different classes")
    if reason := banned(class_1, class_0, blocked):
        raise UserError(f"every description of {class_1} {reason}; choose another --class_0 or --block_list")


def load_block_list(path, class_0):
    """The words that a json {class: [words]} has for class_0: none if it has no entry."""
    if not Path(path).is_file():
        raise UserError(f"--block_list {path} cannot be read: there is no such file")
    fix = 'give a json such as {"horse": ["pony", "mare"]}'
    content = read_json(path, "--block_list", fix)
    if not isinstance(content, dict) or not all(isinstance(words, list) for words in content.values()):
        raise UserError(f"--block_list {path} does not have a list of words for every class; {fix}")
    return [str(word) for name, words in content.items() if name.lower() == class_0.lower() for word in words]


def read_words(path):
    """[[word, score], ...] of a json. Raises UserError when it is something else."""
    fix = 'give a json such as [["meadow", 0.7], ["fence", 0.4]]'
    if path is None or not Path(path).is_file():
        raise UserError(f"--words {path} cannot be read: there is no such file; {fix}")
    content = read_json(path, "--words", fix)
    try:
        return [[str(word), float(score)] for word, score in content]
    except (TypeError, ValueError) as error:
        raise UserError(f"--words {path} does not hold words and scores; {fix}") from error


class NeuronWords:
    """Words of neurons: of those whose first components separate the classes most, or of random ones (Table 3
    of the paper).

    pcas, descriptions: {layer: first components [N, D]}; {layer: as `load_descriptions` gives them}.
    """

    def __init__(self, pcas, descriptions):
        self.pcas, self.descriptions = pcas, descriptions

    @classmethod
    def load(cls, results, clip, layers, **names):
        """Read those of some layers. results: `Results`. names: dataset, texts, components, alpha, k: in the
        files' names.
        """
        sizes = clip.vit.sizes
        pcas = {layer: results.load("pca", sizes, clip.expected, layer=layer, **names) for layer in layers}
        described = {}
        for layer in layers:
            expected = {
                "fingerprint": clip.fingerprint,
                "top_k_pca": names["k"],
                "targets": digest(pcas[layer]),
            }
            described[layer] = load_descriptions(results, sizes, expected, layer=layer, **names)
        return cls(pcas, described)

    def digest(self):
        """Twelve hex digits of all components and descriptions."""
        content = json.dumps(list(self.descriptions.items()))
        return digest(*self.pcas.values(), np.frombuffer(content.encode(), np.uint8))

    def mine(self, v, neurons_num, seed=None, shares=None):
        """Score the words of some neurons: the sum of coefficient * <r_n, v> over the neurons (eq. 6).

        v: [D], the difference of the classes' text vectors.
        neurons_num: neurons to take, from all layers together.
        seed: of the random neurons; None takes those with the largest |<r_n, v>|.
        shares: {word: weight} that the scores are multiplied by, such as `PoolWords.shares` (not in the
            paper).

        Returns {"neurons": [[layer, neuron, <r_n, v>], ...], "words": [[word, score], ...]}, with the
        positive scores only.
        """
        along = [[layer, n, float(x)] for layer, r in self.pcas.items() for n, x in enumerate(r @ v)]
        if seed is not None:
            random.Random(f"neurons {seed}").shuffle(along)
        neurons = (along if seed is not None else sorted(along, key=lambda item: -abs(item[2])))[:neurons_num]
        descriptions = [self.descriptions[layer][n] for layer, n, _ in neurons]
        scores = word_scores(descriptions, {i: x for i, (_, _, x) in enumerate(neurons)})
        if shares is not None:
            scores = [[word, score * max(shares[word], 0)] for word, score in scores if score > 0]
            scores.sort(key=lambda item: (-item[1], item[0]))
        return {"neurons": neurons, "words": [[word, score] for word, score in scores if score > 0]}


class PoolWords:
    """Words of the whole text set, for two baselines: those most similar to the difference of the classes, or
    random ones.

    results, texts, descriptions_dir: as in `load_texts`.
    clip: the loaded `Clip`.
    """

    def __init__(self, results, texts, descriptions_dir, clip):
        results.load(
            "texts", clip.vit.sizes, {"fingerprint": clip.fingerprint}, mmap=True, texts=texts
        )  # or raises
        self.texts, self.vectors, _ = load_texts(results, texts, descriptions_dir, lambda: clip)

    def digest(self):
        """Twelve hex digits of all texts and their vectors."""
        return digest(self.vectors, np.frombuffer(as_text(self.texts), np.uint8))

    def similar(self, v):
        """All texts, sorted by the cosine of their vectors with v [D], the difference of the classes' text
        vectors.
        """
        norms = np.linalg.norm(self.vectors, axis=1)
        cosines = self.vectors @ (v / np.linalg.norm(v)) / np.maximum(norms, np.finfo(norms.dtype).tiny)
        scores = dict(zip(self.texts, cosines.tolist(), strict=True))  # duplicates count once
        return {
            "words": [
                [text, score] for text, score in sorted(scores.items(), key=lambda item: (-item[1], item[0]))
            ]
        }

    def shares(self, v):
        """{word: what its vector, from the mean over all texts, has along v [D]}."""
        return dict(zip(self.texts, ((self.vectors - self.vectors.mean(axis=0)) @ v).tolist(), strict=True))

    def random(self, seed):
        """All texts in a random order, without scores."""
        texts = sorted(set(self.texts))
        random.Random(f"words {seed}").shuffle(texts)
        return {"words": [[text, None] for text in texts]}


def filter_words(candidates, class_0, count, encode, threshold, blocked):
    """Take the first words that are not banned and not too close to class_0.

    candidates: [[word, score], ...], best first.
    count: words to take.
    encode: texts -> unit vectors.
    threshold: the largest cosine with class_0 that a word may have.
    blocked: words that are banned besides class_0.

    Returns {"words": [{"word", "score", "cosine"}, ...], "dropped": the same with "reason"}. Raises UserError
    if no word is left.
    """
    taken, dropped, own = [], [], encode([class_0])[0]
    for start in range(0, len(candidates), BLOCK):
        block = candidates[start : start + BLOCK]
        cosines = (encode([word for word, _ in block]) @ own).tolist()
        for (word, score), cosine in zip(block, cosines, strict=True):
            entry = {"word": word, "score": score, "cosine": round(cosine, 4)}
            close = f"cosine with {class_0} above {threshold}" if cosine > threshold else None
            reason = banned(word, class_0, blocked) or close
            dropped.append(entry | {"reason": reason}) if reason else taken.append(entry)
            if len(taken) == count:
                return {"words": taken, "dropped": dropped}
    if not taken:
        raise UserError(
            f"none of {len(candidates)} words is left for {class_0}; raise --cosim_similarity (now {threshold}) or "
            "--neurons_num, or shorten the block list"
        )
    return {"words": taken, "dropped": dropped}


def template_descriptions(words, class_1, count, seed):
    """Descriptions without a language model: class_1 and a few of the words. Fewer than `count` if there are
    few words.
    """
    rng = random.Random(f"descriptions {seed}")
    start = f"a photo of {'an' if class_1[0].lower() in 'aeiou' else 'a'} {class_1}"
    samples = (rng.sample(words, min(TEMPLATE_WORDS, len(words))) for _ in range(20 * count))
    return list(dict.fromkeys(", ".join([start, *chosen]) for chosen in samples))[:count]


def usable(descriptions, class_0, class_1, blocked):
    """Split descriptions into those that can be drawn, and [[description, reason], ...] for the others."""
    good, bad = [], []
    for text in descriptions:
        missing = None if names_class(text, class_1) else f"does not name {class_1}"
        twice = "is there twice" if text in good else None
        reason = banned(text, class_0, blocked) or missing or twice
        bad.append([text, reason]) if reason else good.append(text)
    return good, bad


def parse_list(answer, cut_off):
    """The entries of a numbered or bulleted list, without quotes and emphasis; if it was cut off, without the
    last.
    """
    lines = [line for line in answer.splitlines() if line.strip()]
    entries = [
        re.match(r"\s*[*_]*(?:\d+\s*[.):]|[-*•])[*_]*\s+(.+)", line)
        for line in (lines[:-1] if cut_off else lines)
    ]
    texts = (entry[1].strip().strip("\"'“”*_").strip() for entry in entries if entry)
    return [text for text in texts if text]


def write_descriptions(run, settings, ask, words):
    """Let a language model write descriptions, and save its answers as they are in generations.json.

    run: `Run`.
    settings: class_0, class_1, block_list, text_model, results_per_generation (descriptions in one answer),
        seed.
    ask: `LanguageModel`; asked again only while no description is usable.
    words: what descriptions are made of.

    Returns {"descriptions": [...], "dropped": [[text, reason], ...]}. Raises UserError if no answer is
    usable.
    """
    class_0, class_1, count = (settings[key] for key in ("class_0", "class_1", "results_per_generation"))
    request = REQUEST.format(count=count, class_0=class_0, class_1=class_1, words=", ".join(words))
    answers, dropped, file = [], [], run.folder / "generations.json"
    for generation in range(GENERATIONS):
        answer, cut_off = ask(request, count, SEEDS * settings["seed"] + generation)
        answers.append({"answer": answer, "cut_off": cut_off})
        save_json(file, {"settings": settings, "request": request, "answers": answers})
        good, bad = usable(parse_list(answer, cut_off)[:count], class_0, class_1, settings["block_list"])
        dropped += bad
        if good:
            return {"descriptions": good, "dropped": dropped}
    reasons = " or ".join(sorted({reason for _, reason in dropped}))
    gave = (
        f"{len(dropped)} descriptions, each of which {reasons}"
        if dropped
        else "no numbered list of descriptions"
    )
    raise UserError(
        f"--text_model {settings['text_model']} gave {gave}{' (an answer was cut off)' if cut_off else ''} in {GENERATIONS} "
        f"attempts, see {file}; try another --text_model, a smaller --results_per_generation, or --text_model template (the "
        "words are kept)"
    )


def plan_drawings(folder, descriptions, each, seed):
    """Which file shows which description, drawn from which seed: `each` pictures of every one. Deletes
    earlier drawings.
    """
    for path in folder.glob("images/*.png"):
        path.unlink()
    texts = enumerate(text for text in descriptions for _ in range(each))
    return {
        "images": [
            {"file": f"images/{i:05d}.png", "description": text, "seed": SEEDS * seed + i}
            for i, text in texts
        ]
    }


def draw(folder, drawings, load):
    """Draw what is planned and missing. load: () -> a function (description, seed) -> PIL image, called only
    if needed.
    """
    missing = [item for item in drawings if not (folder / item["file"]).is_file()]
    if missing:
        model = load()
        for item in tqdm(missing, desc="drawings", unit="image"):
            image = model(item["description"], item["seed"])
            save_atomic(folder / item["file"], lambda file, image=image: image.save(file, format="PNG"))
    print(f"drew {len(missing)} images in {folder / 'images'}, kept {len(drawings) - len(missing)}")


@torch.inference_mode()
def representations(folder, drawings, clip, batch_size=16):
    """Unit representations of the drawings [images, D]. folder, drawings: of the run, and as `plan_drawings`
    returns them.
    """
    images = Images([(str(folder / item["file"]), 0) for item in drawings], [], [], clip.transform)
    vectors = [
        clip.vit(pixels)
        for _, pixels in walk(pieces_of(len(images), batch_size), Loader(images, clip.device))
    ]
    return torch.nn.functional.normalize(torch.cat(vectors), dim=-1)


def judge(vectors, texts, classes, classifier=None, class_names=()):
    """How CLIP takes pictures, a dict of columns.

    vectors: unit representations [images, D].
    texts: [2, D], the unit vectors of the bare names of class_0 and class_1.
    classes: the two names.
    classifier, class_names: [D, classes] and their names; not needed where they do not hold both.

    Returns "binary", whether the cosine with class_0 is above that with class_1 (the published score); the
    cosines; and where the classifier has both classes "predicted", the name of its largest logit, and
    "adversarial", whether that is class_0.
    """
    of_0, of_1 = (vectors @ torch.as_tensor(texts).to(vectors).T).T.tolist()
    columns = {"binary": [int(a > b) for a, b in zip(of_0, of_1, strict=True)]}
    places = [place_of(name, class_names) for name in classes]
    if None not in places:
        found = (vectors @ classifier).argmax(dim=1).tolist()
        columns |= {
            "predicted": [class_names[i] for i in found],
            "adversarial": [int(i == places[0]) for i in found],
        }
    return columns | {
        "cosine_class_0": [f"{x:.5f}" for x in of_0],
        "cosine_class_1": [f"{x:.5f}" for x in of_1],
    }


def blacked_out(folder, drawings):
    """1 for every drawing that is black all over, as safety filters of drawing models return it; else 0."""
    black = []
    for item in drawings:
        with Image.open(folder / item["file"]) as picture:
            black.append(int(picture.convert("L").getextrema()[1] == 0))
    return black


def rates(columns, class_1, keep=None):
    """Counts and rates in per cent: binary_rate, images with "binary"; where there are predictions
    argmax_rate, images whose largest logit is that of class_0, and class_1_rate, of class_1.

    columns: as `judge` gives them, and which are "black"; these do not count. keep: which images count; None
        for all.
    """
    every, black = range(len(columns["binary"])), columns.get("black") or [0] * len(columns["binary"])
    keep = [i for i in every if not black[i] and (keep is None or keep[i])]
    if not keep:
        raise UserError(
            "no image is left to count: each has keep 0 in files.csv, or is black; set keep to 1 for some, or draw others"
        )
    hits = {"binary_rate": columns["binary"]}
    if "predicted" in columns:
        hits["argmax_rate"] = columns["adversarial"]
        hits["class_1_rate"] = [plain(name) == plain(class_1) for name in columns["predicted"]]
    return {
        "images": len(keep),
        "black": sum(black),
        **{name: 100 * sum(hit[i] for i in keep) / len(keep) for name, hit in hits.items()},
    }


def write_table(path, drawings, columns):
    """Write files.csv: a row for each image. A person may set "keep" to 0 to leave it out; what an earlier
    file has there stays, and is returned."""
    kept = read_table(path)[1] if path.is_file() else []
    kept = kept if len(kept) == len(drawings) else [1] * len(drawings)
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for i, item in enumerate(drawings):
        writer.writerow({**item, "keep": kept[i], **{name: values[i] for name, values in columns.items()}})
    save_atomic(path, lambda file: file.write(table.getvalue().encode()))
    return kept


def read_table(path):
    """Read files.csv again: columns as `judge` gives them, and which images count. Raises UserError for what
    it does not hold.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); run the same command without --recount first"
        ) from error
    first = text.partition("\n")[0]
    rows = list(
        csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=first.count))
    )  # as a spreadsheet program saves it
    for number, row in enumerate(rows, start=2):
        for name in ("keep", "black", "binary"):
            if row.get(name) not in ("0", "1"):
                raise UserError(f"{path}, line {number}: {name} is {row.get(name)!r}; it has to be 0 or 1")
        if row.get("adversarial") not in ("0", "1", "", None):
            raise UserError(
                f"{path}, line {number}: adversarial is {row['adversarial']!r}; it has to be 0, 1 or empty"
            )
    columns = {name: [int(row[name]) for row in rows] for name in ("black", "binary")}
    if rows and all(row.get("predicted") and row.get("adversarial") for row in rows):
        columns |= {
            "predicted": [row["predicted"] for row in rows],
            "adversarial": [int(row["adversarial"]) for row in rows],
        }
    return columns, [int(row["keep"]) for row in rows]


def report(run, found, class_0, class_1):
    """Write results.json and print the rates, the published one first. run: `Run`. found: as `rates` gives
    them.
    """
    settings = read_json(run.folder / "images.json", "", "remove it, or add --overwrite")["settings"]
    save_json(run.folder / "results.json", {"settings": settings, **found})
    print(
        f"{found['binary_rate']:.1f} % of {found['images']} images of {class_1} are nearer to {class_0} (the two bare names)"
    )
    if found["black"]:
        print(f"{found['black']} pictures are black, as safety filters make them, and do not count")
    if "argmax_rate" in found:
        taken = f"{found['argmax_rate']:.1f} % are taken for {class_0} and {found['class_1_rate']:.1f} % for {class_1}"
        print(f"among all classes of the classifier {taken}")
    print(f"see {run.folder / 'files.csv'}")
