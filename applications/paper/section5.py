"""Make the tables and figures about uses of second-order effects (section 5), but for adversarial images."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from applications.attack import generators
from applications.attack.drawings import parse_list
from applications.attack.words import names_class
from applications.paper.figures import plot_maps
from applications.paper.registry import Row, item, train, val, without, write_csv
from utils.ablation import Rebuilt
from utils.concepts import FORMS, Concepts, LayerConcepts, load_fires_on, nearest_texts
from utils.data.folders import find_pictures, tell
from utils.data.images import Images, to_pictures
from utils.data.segmentation_row import Row as SegmentationRow
from utils.data.segmentation_set import SegmentationSet, file_of
from utils.data.splits import Split
from utils.data.text_sets import load_texts
from utils.descriptions import load_descriptions
from utils.norms import CentredNorms
from utils.prs import fold, second_order
from utils.runtime.errors import UserError
from utils.runtime.files import read_array, read_json, save_atomic, save_json
from utils.runtime.stages import here
from utils.segmentation import METHODS, enlarge, methods_of

QUOTED_SCORES = ("pixel_accuracy", "mIoU", "mAP")
PUBLISHED_SCORES = {  # the scores of Table 4
    "second_order": (78.1, 59.0, 84.9),
    "first_order": (76.5, 58.1, 84.1),
    "attention": (69.6, 49.8, 80.0),
    "rollout": (61.8, 42.6, 74.0),
    "gradcam": (67.3, 39.3, 61.9),
    "chefer": (68.9, 49.1, 79.7),
}
QUOTED = {"LRP": (62.9, 35.8, 68.5), "partial LRP": (55.0, 35.5, 66.9)}  # rows that are not computed here
NONE = (None, None, None)
MAPS = 4  # images of Fig. 7
LISTED = 50  # concepts of an image in the .csv of Fig. 8
TEXTS_REQUEST = (
    'Write {count} short descriptions of different photos that show "{class_name}": '
    "what else is in them, where they were\ntaken, their light and their colours. "
    "Name it in every description. "
    "Answer with a numbered list of {count} descriptions, one a\nline, and nothing else."
)


# Fig. 8


@item(
    "fig8",
    "Concepts of images (Fig. 8; --images FOLDER for your own)",
    "one",
    passes=lambda p: train(p) + val(p) + 64,
    seed="0, of the images",
)
def fig8(paper):
    """Make Fig. 8, and a .csv of the concepts of all its images, in all forms."""
    if paper.args.images:
        split = own_images(paper)
        names = [here(path) for path, _ in split.images.samples]
    else:
        split = paper.images(paper.args.split, 8)
        names = [split.images.class_names[label] for _, label in split.images.samples]
    paper.grades(paper.texts[0], [paper.layer])
    found = concepts_of(paper, split)
    listed = []
    for i, name in enumerate(names):
        for form, concepts in found.items():
            for rank, (text, score) in enumerate(concepts[i].words[:LISTED]):
                listed.append([name, form, rank, f"{score:.5f}", text])
    write_csv(paper.folder / "concepts.csv", ["image", "form", "rank", "score", "text"], listed)
    rows = []
    for i, name in enumerate(names[:16]):
        rows += [row_of_concepts(paper, form, name, concepts[i]) for form, concepts in found.items()]
    violin = "the paper's image, a violin: violin .69, guitar .49, chords .40, faceted .32, cranes .32"
    return [*rows, Row(violin, None, note="another image; try it with --images")], []


def row_of_concepts(paper, form, name, concepts):
    """Return the row of one image's concepts in one form. name: of the image."""
    words = ", ".join(f"{text} {score:.2f}" for text, score in concepts.words[:5])
    what = f"{form.replace('_', ' ')}, {name}: {words}"
    if form == "nearest":
        return Row(what, None, note=FORMS[form], n=1)
    active = 100 * len(concepts.neurons) / paper.clip.vit.N
    beside = f"{100 * min(1, paper.k / train(paper)):.2g} % of train images"
    return Row(f"{what}; active neurons", active, beside=beside, note=FORMS[form], n=1)


@torch.inference_mode()
def concepts_of(paper, split):
    """Return {form: `Concepts` of every image of a `Split`}, in the order of `FORMS`."""
    layer = paper.layer
    names = {"layer": layer, **paper.names(**paper.described(paper.texts[0]))}
    written = load_descriptions(paper.results, **names)
    statistics = paper.statistics(layer)
    directions = fold(paper.clip.vit, layer)
    norms = CentredNorms(directions, statistics.mean)
    rebuilt = Rebuilt(directions, statistics.mean, statistics.pcas)
    fires_on = load_fires_on(paper.results, statistics, **names)
    by_neurons = LayerConcepts(norms, statistics.thresholds, written, rebuilt, fires_on)
    where = paper.args.descriptions_dir
    texts, vectors, _ = load_texts(paper.results, paper.texts[0], where, lambda: paper.clip)
    found = {form: [] for form in FORMS}
    for _, pixels in split.walk("concepts"):
        representation, [phi] = second_order(paper.clip.vit, pixels, [directions])
        for form, concepts in by_neurons(phi).items():
            found[form] += concepts
        nearest = nearest_texts(representation, texts, vectors, LISTED)
        found["nearest"] += [Concepts([], [], words) for words in nearest]
    return found


def own_images(paper):
    """Return the pictures of `--images` as a `Split`. Raises UserError when there are none."""
    args = paper.args
    none = f"--images {args.images} has no pictures"
    if not args.images.is_dir():
        raise UserError(none)
    left_out = Counter()
    [found] = find_pictures(args.images.parent, [str(args.images)], left_out)
    files = sorted(map(Path, found))
    tell(left_out)
    if not files:
        raise UserError(none)
    samples = [(str(path), 0) for path in files]
    images = Images(samples, ["images"], ["images"], paper.clip.transform, dataset="images")
    return Split(images, args.device, args.num_workers, args.batch_size)


# Table 4 and Fig. 7


@item(
    "table4",
    "Zero-shot segmentation (Table 4), and its maps side by side (Fig. 7)",
    "late",
    passes=lambda p: 4276 * len(METHODS),
    lacks=without("segmentation", "it needs ImageNet-Segmentation: --segmentation gtsegs_ijcv.mat"),
    seed="0, of the random neurons",
)
def table4(paper):
    """Make Table 4 and Fig. 7."""
    paper.components()
    paper.stages.classifier()
    paths = {method: segmentation_by(paper, method) for method in methods_of(paper.clip.vit)}
    found = {method: json.loads(path.read_text()) for method, path in paths.items()}
    rows = []
    for method, content in found.items():
        for key, published in zip(QUOTED_SCORES, PUBLISHED_SCORES.get(method, NONE), strict=True):
            value = content["scores"][key]
            beside = f"random neurons {found['random']['scores'][key]:.1f} %"
            of = {"beside": beside, "n": content["images"]}
            rows.append(Row(f"{method}: {key}", value, published, **of))
    for method, scores in QUOTED.items():
        for key, score in zip(QUOTED_SCORES, scores, strict=True):
            rows.append(Row(f"{method}: {key}, quoted", None, score, note="not computed here"))
    draw_maps(paper, paths)
    return rows, [paper.picture("fig7")]


def segmentation_by(paper, method):
    """Run compute_segmentation.py with a method; return the path of its scores."""
    args = paper.args
    row = SegmentationRow(
        method,
        layers=tuple(paper.late),
        top_neurons=args.top_neurons,
        train_dataset=paper.train_set,
        class_source=args.class_source or SegmentationRow.class_source,
        top_k_pca=paper.k,
    )
    words = ["--data_path", args.segmentation, *row.flags(), "--precision", args.precision]
    words += ["--batch_size", args.batch_size, "--num_workers", args.num_workers]
    paper.stages.run("compute_segmentation.py", *words)
    return paper.results.path("segmentation", file=file_of(args.segmentation).stem, row=row.name)


def draw_maps(paper, paths):
    """Draw the maps of the first images by every method (Fig. 7). paths: {method: path of its scores}."""
    clip = paper.clip
    size = clip.vit.visual.image_size
    data = SegmentationSet(paper.args.segmentation, clip.transform, size=size)
    pixels, masks = zip(*(data[i] for i in range(min(MAPS, len(data)))), strict=True)
    maps = {}
    for method, path in paths.items():
        stored = read_array(path.with_name(f"{path.stem}_maps.npy"), mmap=True)
        maps[method] = enlarge(torch.tensor(stored[: len(pixels)]), clip.vit.grid, size).numpy()
    pictures = to_pictures(torch.stack(pixels), clip.transform, size)
    plot_maps(pictures, torch.stack(masks).numpy(), maps, paper.picture("fig7"))


# Table 7


def without_language(paper):
    """Return what Table 7 lacks."""
    if paper.args.text_model in (None, "template"):
        return "it needs a language model: --text_model"
    return ""


@item(
    "table7",
    "A text set of image descriptions, written by a language model from class names (Table 7)",
    lacks=without_language,
    seed="the class's number, of the answer",
)
def table7(paper):
    """Make Table 7, and the text set. Raises UserError when the model writes no list."""
    args = paper.args
    classes = paper.images(args.split).images.class_names
    answers = answers_of(paper, classes)
    pairs = [(name, text) for name in classes for text in answers[name]]
    texts = list(dict.fromkeys(text for _, text in pairs))
    if not texts:
        what = f"--text_model {args.text_model} wrote no numbered list"
        raise UserError(f"{what}; see {paper.folder / 'image_descriptions.json'}")
    target = paper.folder / "image_descriptions.txt"
    save_atomic(target, lambda file: file.write(("\n".join(texts) + "\n").encode()))
    naming = 100 * float(np.mean([names_class(text, name) for name, text in pairs]))
    what = f"descriptions in {target.name} (use it with --text_descriptions {here(target)})"
    rows = [Row(what, len(texts), unit="", n=len(classes))]
    return [*rows, Row("of these, name their class", naming, n=len(pairs))], []


def answers_of(paper, classes):
    """Ask the language model for descriptions of every class; return {class: list of texts}.

    Answers are saved one by one, and those of an earlier run with equal settings are kept.
    """
    args = paper.args
    generators.require_packages(text_model=args.text_model)
    path = paper.folder / "image_descriptions.json"
    count = args.descriptions_per_class
    request = read_request(args.request)
    settings = {"request": request, "text_model": args.text_model, "count": count}
    done = read_json(path, "", "remove it") if path.is_file() else {}
    answers = {}
    if isinstance(done, dict) and done.get("settings") == settings and not args.overwrite:
        answers = done["answers"]
    ask = None
    for i, name in enumerate(tqdm(classes, desc="descriptions", unit="class")):
        if name not in answers:
            ask = ask or generators.LanguageModel(args.text_model, args.device)
            filled = request.replace("{count}", str(count)).replace("{class_name}", name)
            answers[name] = parse_list(*ask(filled, count, i))
            save_json(path, {"settings": settings, "answers": answers})
    return answers


def read_request(path):
    """Return the request of `--request`, or ours. Raises UserError when it does not say for which class."""
    if path is None:
        return TEXTS_REQUEST
    try:
        request = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--request {path} cannot be read as UTF-8 text") from error
    if "{class_name}" not in request:
        why = "so every class would be asked for the same"
        raise UserError(f"--request {path} does not have {{class_name}} in it, {why}")
    return request
