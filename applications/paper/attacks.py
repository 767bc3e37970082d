"""Make the table of semantic adversarial images (section 5.1): Table 3 with Figs. 6 and 15."""

import csv
import functools
import json

import numpy as np
import torch
from PIL import Image

from applications.attack.run import Run
from applications.attack.words import NeuronWords
from applications.paper import measures
from applications.paper.figures import plot_attacks
from applications.paper.registry import Row, item, train, without
from applications.paper.section4 import atoms_of
from applications.paper.study import TASKS
from utils.first_order import FirstOrder
from utils.model.texts import text_vectors
from utils.omp import orthogonal_matching_pursuit
from utils.pca import principal_directions
from utils.runtime.files import save_json

PUBLISHED_RATES = {
    "second_order": (5.3, 22.7, 8.0, 5.7, 7.0),
    "similar": (1.0, 3.3, 5.0, 0.0, 1.3),
}  # of TASKS
MODELS = ("text_model", "image_model", "similarity_model", "cosim_similarity", "image_options")
DRAWING = "it needs a drawing model: --image_model (and --text_model, --similarity_model)"
PAIRS_SHOWN = 4  # pairs of classes in Fig. 6
PICTURES = 5  # of each


@item(
    "table3",
    "Semantic adversarial images (Table 3), and where the wrong class is seen (Figs. 6 and 15)",
    "late",
    passes=lambda p: train(p) + 2 * p.args.drawn_neurons * p.args.drawn_images * len(p.late),
    disk=lambda p: p.drawn_on_disk(p.late),
    lacks=without("image_model", DRAWING),
    seed="0, 1, ... of words, descriptions and pictures (--seeds)",
)
def table3(paper):
    """Make Table 3 and Figs. 6 and 15."""
    paper.descriptions(paper.attack_texts, paper.late, paper.args.attack_components)
    paper.stages.classifier()
    measured = {}
    for source in sources_of(paper):
        measured[source] = [attacks(paper, classes, source) for classes in paper.tasks]
    chance = [float(np.mean(rates_of(runs))) for runs in measured["random_words"]]
    rows = []
    for source, title in sources_of(paper).items():
        rows += rows_of_source(paper, source, title, measured[source], chance)
    shown = [(classes, runs[0]) for classes, runs in zip(paper.tasks, measured["second_order"], strict=True)]
    plot_attacks([attributions(paper, *attack) for attack in shown[:PAIRS_SHOWN]], paper.picture("fig6"))
    return rows, [paper.picture("fig6")]


def sources_of(paper):
    """Return the word sources of the table, {source: in words}; the first is chance."""
    args = paper.args
    return {
        "random_words": "random words",
        "second_order": "words of neurons",
        "random": f"words of {args.neurons_num} random neurons",
        "similar": "words similar to v",
        "indirect": f"words by indirect effects of {args.drawn_neurons} drawn neurons a layer",
    }


def attacks(paper, classes, source):
    """Run the attacks of all seeds; return their folders. classes: class_0, class_1."""
    return [attack(paper, classes, source, seed) for seed in range(paper.args.seeds)]


def results_of(folder):
    """Read the rates of an attack."""
    return json.loads((folder / "results.json").read_text())


def rates_of(folders):
    """Return the shares of pictures that fool, a number for every seed, in per cent."""
    return [results_of(folder)["binary_rate"] for folder in folders]


def rows_of_source(paper, source, title, measured, chance):
    """Return the rows of one word source: each task, and all of them.

    title: of the source.
    measured: the folders of all seeds, for every task.
    chance: the share that random words fool, for every task.
    """
    rows = []
    for (class_0, class_1), folders, random in zip(paper.tasks, measured, chance, strict=True):
        rates = rates_of(folders)
        what = f"{title}: {class_1}, taken for {class_0}"
        published = published_rate(source, f"{class_1}:{class_0}")
        n = results_of(folders[0])["images"]
        of = {"beside": f"random words {random:.1f} %", "n": n, "note": spread(rates)}
        rows.append(Row(what, float(np.mean(rates)), published, **of))
    by_task = [rates_of(folders) for folders in measured]
    by_seed = [float(np.mean(rates)) for rates in zip(*by_task, strict=True)]
    beside = f"random words {np.mean(chance):.1f} %"
    of = {"beside": beside, "n": sum(row.n for row in rows), "note": spread(by_seed)}
    return [*rows, Row(f"{title}: all {len(rows)} tasks", float(np.mean(by_seed)), **of)]


def published_rate(source, task):
    """Return the paper's share of a task of Table 3, None where it has none."""
    if source in PUBLISHED_RATES and task in TASKS:
        return PUBLISHED_RATES[source][TASKS.index(task)]
    return None


def spread(values):
    """Return the standard deviation over seeds, in words."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0
    return f"± {deviation:.1f} over {len(values)} seeds"


# one attack


def attack(paper, classes, source, seed):
    """Run generate_adversarial_images.py; return the folder of the attack. classes: class_0, class_1."""
    args = paper.args
    class_0, class_1 = classes
    place = paper.folder / "attacks"
    words = ["--class_0", class_0, "--class_1", class_1, "--seed", seed]
    words += ["--dataset", paper.dataset, "--dataset_path", place, "--mlp_layers", *paper.late]
    words += ["--neurons_num", args.neurons_num, "--overall_words", args.overall_words]
    words += ["--text_descriptions", paper.given[paper.attack_texts]]
    words += ["--descriptions_dir", args.descriptions_dir]
    words += ["--components", args.attack_components or args.components, "--top_k_pca", paper.k]
    words += ["--results_per_generation", args.results_per_generation, "--batch_size", args.pictures]
    for name in MODELS:
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", value]
    if source == "indirect":
        source = "file"
        words += ["--words", indirect_words(paper, classes)]
    paper.stages.run("generate_adversarial_images.py", *words, "--word_source", source)
    return Run(place, (class_0, class_1, source), seed).folder


def indirect_words(paper, classes):
    """Write a file of the words of drawn neurons by their indirect effects; return its path.

    Components, texts and scores are made as those of second order. classes: class_0, class_1.
    """
    found = indirect_neurons(paper).mine(difference(paper, classes), paper.args.neurons_num)
    names = ["_".join(name.split()) for name in classes]
    path = paper.folder / f"indirect_{'_'.join(names)}.json"
    save_json(path, found["words"])
    return path


@functools.lru_cache  # one `Paper` lives
def indirect_neurons(paper):
    """Return the `NeuronWords` of drawn neurons by their indirect effects."""
    texts, atoms = atoms_of(paper, paper.attack_texts)
    components = paper.args.attack_components or paper.args.components
    pcas = {}
    described = {}
    for layer in paper.late:
        r = components_of_indirect(paper, layer)
        support, coefficients = orthogonal_matching_pursuit(atoms, r, components)
        pcas[layer] = r.numpy()
        described[layer] = []
        for chosen, of in zip(support.tolist(), coefficients.tolist(), strict=True):
            entries = [(i, c, texts[i]) for i, c in zip(chosen, of, strict=True) if i >= 0]
            described[layer].append(entries)
    return NeuronWords(pcas, described)


def components_of_indirect(paper, layer):
    """Return the first components of the largest indirect effects of drawn neurons, [n, D]."""
    _, effects = paper.drawn(layer)
    indirect = np.array(effects[:, measures.KINDS.index("indirect")])
    centred = torch.from_numpy(indirect).transpose(0, 1)  # [n, images, D]
    centred = centred - centred.mean(dim=1, keepdim=True)
    k = min(paper.k, centred.shape[1])
    largest = centred.norm(dim=-1).topk(k, dim=1).indices
    r, _ = principal_directions(centred.gather(1, largest[..., None].expand(-1, -1, centred.shape[-1])))
    return r


def difference(paper, classes):
    """Return the difference of the text vectors of two classes, [D]."""
    return np.subtract(*text_vectors(paper.clip, list(classes), 2))


# Figs. 6 and 15


def attributions(paper, classes, folder):
    """Show pictures of an attack, those that fool first, and where the wrong class is seen in them.

    classes: class_0, class_1.
    folder: of the attack.

    Returns (title, [(picture, map, caption), ...]). Maps are 0 for a tower without a first order.
    """
    class_0, class_1 = classes
    with open(folder / "files.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["keep"] == "1" and row["black"] == "0"]
    rows = sorted(rows, key=lambda row: (row["binary"] != "1", row["file"]))[:PICTURES]
    pictures = [Image.open(folder / row["file"]).convert("RGB") for row in rows]
    captions = []
    for row in rows:
        judged = f"taken for {class_0}" if row["binary"] == "1" else "not fooled"
        captions.append(f"{judged}: {row['description']}")
    vit = paper.clip.vit
    maps = np.zeros((len(rows), *vit.grid))
    if vit.pooling.has_first_order:
        pixels = torch.stack([paper.clip.transform(picture) for picture in pictures])
        maps = towards(paper.clip, pixels, torch.from_numpy(difference(paper, classes)))
    title = f"{class_1}, which should be taken for {class_0}"
    return title, list(zip(pictures, maps, captions, strict=True))


@torch.inference_mode()
def towards(clip, pixels, v):
    """Return what all heads take from each patch along a direction, [n, rows, columns].

    clip: the loaded `Clip`.
    pixels: [n, 3, side, side].
    v: the direction [D].
    """
    order = FirstOrder(clip.vit)
    with clip.vit.record(*order.of_heads) as cache:
        representation = clip.vit(pixels.to(clip.device))
    along = v.to(representation).expand(len(pixels), -1)
    maps = order.tokens(cache, representation, along).sum(dim=(1, 2))
    return maps[:, clip.vit.prefix :].unflatten(1, clip.vit.grid).cpu().numpy()
