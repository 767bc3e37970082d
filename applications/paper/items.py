"""The tables and figures of the paper, each a function that runs the stages it needs and returns its rows and
pictures.

The paper's values are those of ViT-B-32 with OpenAI's weights on ImageNet, unless the item says otherwise.
"""

import csv
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from PIL import Image
from tqdm import tqdm

from applications.attack import adversarial
from applications.paper import measures
from applications.paper.study import TASKS, Row, here
from utils.ablation import accuracies
from utils.concepts import concepts_of_images
from utils.data.folders import find_pictures, tell
from utils.data.images import Images, Loader
from utils.data.segmentation_set import IGNORED_VALUES, SegmentationSet
from utils.data.text_sets import load_texts
from utils.descriptions import load_descriptions, load_support
from utils.first_order import FirstOrder
from utils.model.texts import text_vectors
from utils.neurons import NeuronLayer
from utils.norms import CentredNorms
from utils.omp import make_atoms, orthogonal_matching_pursuit, rebuilt_from
from utils.pca import principal_directions
from utils.prs import fold, second_order
from utils.runtime.errors import UserError
from utils.runtime.files import read_array, read_json, save_atomic, save_json
from utils.runtime.passes import walk
from utils.segmentation import METHODS, TOWARDS_CLASS, enlarge, row_name

ITEMS = {}
ALIASES = {
    "table5": "table2",
    "fig6": "table3",
    "fig15": "table3",
    "fig7": "table4",
    "fig12": "fig11",
    "fig13": "fig5",
    "fig14": "fig5",
}
SHOWN = 16  # top images of a neuron in Fig. 5


class Item(NamedTuple):
    """A table or figure.

    title: what it is.
    layers: whose components it needs: "", "one", "late" or "all".
    passes, disk: `Paper` -> how many images go through the tower; bytes besides the components.
    lacks: `Paper` -> what it cannot do without, in words; "" if all is there.
    seed: of what is drawn, in words.
    make: `Paper` -> (rows, pictures).
    """

    title: str
    layers: str
    passes: Callable
    disk: Callable
    lacks: Callable
    seed: str
    make: Callable


def item(
    name, title, layers="", passes=lambda paper: 0, disk=lambda paper: 0, lacks=lambda paper: "", seed="none"
):
    """Register a function as an item."""

    def register(function):
        def lacking(paper):
            return lacks(paper) or ("" if paper.args.data_path else "it needs images: --data_path")

        ITEMS[name] = Item(title, layers, passes, disk, lacking, seed, function)
        return function

    return register


def without(name, reason):
    """What an item lacks when a flag is not given."""
    return lambda paper: "" if getattr(paper.args, name) else reason


def train(paper):
    return len(paper.images("train").images)


def val(paper):
    return len(paper.images(paper.args.split).images)


def chance_of(paper):
    return f"chance {100 / paper.judged[0].shape[1]:.2g} %"


def plot(curves, xlabel, ylabel, path):
    from utils.figures import plot_lines  # here, because matplotlib takes its time

    plot_lines(curves, xlabel, ylabel, path)


def write_csv(path, columns, rows):
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([columns, *rows])
    save_atomic(path, lambda file: file.write(table.getvalue().encode()))


@item(
    "table1",
    "Accuracy and variance explained: direct, second-order and indirect effects of one layer",
    "one",
    passes=lambda p: 4 * train(p) + 3 * val(p) + 2 * p.args.drawn_neurons * p.args.drawn_images,
    disk=lambda p: p.drawn_on_disk([p.layer]),
    seed="the layer's number, of the drawn neurons",
)
def table1(paper):
    layer, images = paper.layer, val(paper)
    table, _, _ = paper.accuracies([layer])
    first, row, of = paper.first_order, table[layer], {"n": images, "beside": chance_of(paper)}
    rows = [Row("accuracy, nothing ablated", row["baseline"], **of)]
    rows += [
        Row(f"accuracy without the indirect effects of layer {layer}", first[f"indirect {layer}"], 52.3, **of)
    ]
    rows += [
        Row(
            f"accuracy without the second-order effects of layer {layer}",
            row["without all effects"],
            29.6,
            **of,
        )
    ]
    if f"mlp {layer}" in first:
        rows += [Row(f"accuracy without the direct effects of layer {layer}", first[f"mlp {layer}"], **of)]
    neurons, effects = paper.drawn(layer)
    k, count = min(paper.args.top_k_pca, len(effects)), len(neurons)
    for kind, published in (("indirect", 11.0), ("second-order", None), ("direct", None)):
        own = np.asarray(effects[:, measures.EFFECTS.index(kind)], np.float64)
        for which, limit, value in (
            ((f"the {k} largest", k, published), (f"all {len(effects)}", None, None)) if own.any() else ()
        ):
            share = 100 * float(np.mean([measures.explained(own[:, n], limit) for n in range(count)]))
            floor = f"at least {100 / min(limit or len(effects), paper.clip.vit.D):.2g} %"
            note = (
                "a number times one direction, and a share of the bias"
                if kind == "direct"
                else "drawn neurons, drawn images"
            )
            what = (
                f"variance explained by the first component: {kind} effects, {which} of {len(effects)} images"
            )
            rows.append(Row(what, share, value, beside=floor, n=count, note=note))
    whole = paper.results.load("explained", layer=layer, **paper.names())
    what = f"variance explained by the first component: second-order effects, the {paper.args.top_k_pca} largest of all train images"
    floor = f"at least {100 / min(paper.args.top_k_pca, paper.clip.vit.D):.2g} %"
    return [
        *rows,
        Row(what, 100 * float(whole.mean()), 48.2, beside=floor, n=len(whole), note="all neurons"),
    ], []


def by_layer(paper, layers, name, **more):
    """Rows and picture of the ablations of some layers."""
    table, images, picture = paper.accuracies(layers, **more)
    shutil.copy(picture, paper.picture(name))
    rows = []
    for layer, row in table.items():
        rows += [
            Row(f"layer {layer}: {what}", value, n=images, beside=chance_of(paper))
            for what, value in row.items()
        ]
    return rows, [paper.picture(name)]


@item(
    "fig3", "Ablations of second-order effects, layer by layer", "all", lambda p: 2.6 * train(p) + 2 * val(p)
)
def fig3(paper):
    return by_layer(paper, paper.all_layers, "fig3")


def other_than_large(paper):
    """What Fig. 9 lacks."""
    large = "it is Fig. 3 of another model: add --model ViT-L-14 --pretrained laion2b_s32b_b82k --memory 16"
    return "" if paper.args.model == "ViT-L-14" else large


@item("fig9", "The same for ViT-L-14", "all", lambda p: 2.6 * train(p) + 2 * val(p), lacks=other_than_large)
def fig9(paper):
    return by_layer(paper, paper.all_layers, "fig9")


@item(
    "fig10",
    "The same on ImageNet-R",
    "all",
    lambda p: 6000,
    lacks=without("imagenet_r", "it needs ImageNet-R: --imagenet_r PATH"),
)
def fig10(paper):
    return by_layer(paper, paper.all_layers, "fig10", dataset="imagenet_r", data_path=paper.args.imagenet_r)


@item(
    "fig4",
    "Accuracy by the number of texts that describe a neuron",
    "one",
    val,
    seed="0, of the random texts",
)
def fig4(paper):
    rows, curves = [], {}
    counts = sorted({m for m in paper.args.counts if m <= paper.args.components} | {paper.args.components})
    for texts in paper.texts:
        try:
            values, random, component = by_number_of_texts(paper, texts, counts)
        except UserError as error:
            rows.append(Row(f"{texts}: left out", None, note=str(error)))
            continue
        curves |= {
            texts: values,
            f"{texts}, chosen at random": random,
            "first components": dict.fromkeys(counts, component),
        }
        for m in counts:
            beside = f"random texts {random[m]:.1f} %, first components {component:.1f} %"
            rows.append(
                Row(f"{texts}, {m} text{'s' if m > 1 else ''}", values[m], n=val(paper), beside=beside)
            )
    if not curves:
        raise UserError(rows[0].note)
    plot(curves, "texts for a neuron", "accuracy (%)", paper.picture("fig4"))
    return rows, [paper.picture("fig4")]


def by_number_of_texts(paper, texts, counts):
    """{number of texts: accuracy}, the same of random texts, and the accuracy with the first components, from
    one pursuit.
    """
    layer = paper.layer
    paper.descriptions(texts, [layer])
    path = paper.results.path("decomposition", layer=layer, **paper.names(**paper.described(texts)))
    pool, vectors, _ = load_texts(paper.results, texts, paper.args.descriptions_dir, lambda: paper.clip)
    pcas = torch.from_numpy(paper.results.load("pca", layer=layer, **paper.names()))
    support, atoms = load_support(path.with_suffix(".npz")), make_atoms(torch.from_numpy(vectors))
    by_chance = np.random.default_rng(0).integers(0, len(pool), support.shape)
    rebuilt = [rebuilt_from(chosen[:, :m], atoms, pcas) for chosen in (support, by_chance) for m in counts]
    found, labels = paper.predictions(
        f"fig4_{texts}", layer, [each.to(paper.clip.device) for each in (*rebuilt, pcas)]
    )
    values = accuracies(found[:, None], labels)[0]
    return (
        dict(zip(counts, values, strict=False)),
        dict(zip(counts, values[len(counts) :], strict=False)),
        values[-1],
    )


@item(
    "table2",
    "Texts of single neurons (Tables 2 and 5), and of all neurons of the layer",
    "one",
    seed="0, of the random texts",
)
def table2(paper):
    layer, texts = paper.layer, paper.texts[0]
    paper.descriptions(texts, [layer])
    names = paper.names(**paper.described(texts))
    described = load_descriptions(paper.results, paper.clip.vit.sizes, layer=layer, **names)
    pcas, norms = (paper.results.load(kind, layer=layer, **paper.names()) for kind in ("pca", "norm"))
    _, vectors, _ = load_texts(paper.results, texts, paper.args.descriptions_dir, lambda: paper.clip)
    atoms = make_atoms(torch.from_numpy(vectors)).numpy()
    matrix = scipy.sparse.load_npz(
        paper.results.path("decomposition", layer=layer, **names).with_suffix(".npz")
    )
    left = np.linalg.norm(pcas - matrix @ atoms, axis=1)
    support = np.random.default_rng(0).integers(0, len(atoms), (len(pcas), paper.args.components))
    chance = np.linalg.norm(pcas - rebuilt_from(support, atoms, torch.from_numpy(pcas)).numpy(), axis=1)
    columns = ["layer", "neuron", "unexplained", "rank", "coefficient", "text"]
    of_all = [
        [layer, n, f"{left[n]:.4f}", rank, f"{c:.6f}", text]
        for n, entries in enumerate(described)
        for rank, (_, c, text) in enumerate(entries)
    ]
    path = paper.folder / f"neurons_{layer}_{texts}.csv"
    write_csv(path, columns, of_all)
    rows = []
    for n in paper.neurons_or(np.argsort(-norms.mean(axis=1), kind="stable")[:8]):
        words = ", ".join(f"{'' if c > 0 else '-'}{text}" for _, c, text in described[n][:8])
        rows.append(
            Row(
                f"neuron {n}: {words}",
                float(left[n]),
                unit="|r - texts|",
                beside=f"random texts {chance[n]:.2f}",
                n=1,
            )
        )
    what, beside = (
        f"all {len(left)} neurons, mean; every text in {path.name}",
        f"random texts {chance.mean():.2f}",
    )
    return [*rows, Row(what, float(left.mean()), unit="|r - texts|", beside=beside, n=len(left))], []


@item(
    "fig5",
    "Val images of the largest effects (Figs. 5, 13 and 14)",
    "one",
    val,
    disk=lambda p: p.effects_on_disk(),
    seed="0, of the chance level",
)
def fig5(paper):
    from utils.figures import save_figure

    layer, split = paper.layer, paper.args.split
    paper.descriptions(paper.texts[0], [layer])
    paper.stage(
        "compute_second_order_neuron_prs.py",
        *paper.image_flags(split),
        "--mlp_layer",
        layer,
        "--keep",
        "full",
    )
    data, described = paper.images(split).images, paper.described(paper.texts[0])
    neurons = NeuronLayer(
        paper.clip, paper.results, data, layer=layer, described=described, k=paper.args.top_k_pca
    )
    count = min(SHOWN, len(data))
    drawn = np.random.default_rng(0).permuted(np.tile(data.labels, (1000, 1)), axis=1)[:, :count]
    chance = 100 * np.mean([np.bincount(labels).max() for labels in drawn]) / count
    rows, pictures = [], []
    for n in paper.neurons_or(neurons.largest(4)):
        pictures.append(paper.picture(f"fig5_neuron_{n}"))
        save_figure(neurons.card(n, pictures=count), pictures[-1])
        classes = data.labels[neurons.top_images(n, count, by="projection")]
        share, beside = 100 * float(np.bincount(classes).max() / count), f"any {count} images {chance:.1f} %"
        rows.append(
            Row(
                f"neuron {n}: share of the most frequent class in the {count} top images",
                share,
                beside=beside,
                n=count,
            )
        )
    return rows, pictures


@item(
    "fig8",
    "Concepts of images (Fig. 8; --images FOLDER for your own)",
    "one",
    lambda p: 64,
    seed="0, of the images",
)
def fig8(paper):
    layer, texts = paper.layer, paper.texts[0]
    paper.descriptions(texts, [layer])
    vit, statistics = paper.clip.vit, paper.statistics([layer])[layer]
    described = load_descriptions(
        paper.results, vit.sizes, layer=layer, **paper.names(**paper.described(texts))
    )
    directions = fold(vit, layer)
    norms, data = (
        CentredNorms(directions, statistics.mean),
        own_images(paper) if paper.args.images else paper.images(paper.args.split, 8),
    )
    found = []
    with torch.inference_mode():
        for _, pixels in walk(data.pieces, data.loader, "concepts"):
            _, [phi] = second_order(vit, pixels, [directions])
            found += concepts_of_images(phi, norms, statistics.thresholds, described)
    names = [
        here(image) if paper.args.images else data.images.class_names[label]
        for image, label in data.images.samples
    ]
    listed = [
        [name, rank, f"{score:.5f}", text]
        for name, each in zip(names, found, strict=True)
        for rank, (text, score) in enumerate(each.words[:50])
    ]
    write_csv(paper.folder / "concepts.csv", ["image", "rank", "score", "text"], listed)
    rows, beside = [], f"{100 * min(1, paper.args.top_k_pca / train(paper)):.2g} % of train images"
    for name, each in list(zip(names, found, strict=True))[:16]:
        words = ", ".join(f"{text} {score:.2f}" for text, score in each.words[:5])
        rows.append(
            Row(f"{name}: {words}; active neurons", 100 * len(each.neurons) / vit.N, beside=beside, n=1)
        )
    violin = "the paper's image, a violin: violin .69, guitar .49, chords .40, faceted .32, cranes .32"
    return [*rows, Row(violin, None, note="another image; try it with --images")], []


def own_images(paper):
    """The pictures of `--images`, as `measures.Images`."""
    root = paper.args.images
    if not root.is_dir():
        raise UserError(f"--images {root} has no pictures")
    left_out = Counter()
    [found] = find_pictures(root.parent, [str(root)], left_out)
    files = sorted(map(Path, found))
    tell(left_out)
    if not files:
        raise UserError(f"--images {root} has no pictures")
    images = Images(
        [(str(path), 0) for path in files], ["images"], ["images"], paper.clip.transform, dataset="images"
    )
    return measures.Images(
        images, Loader(images, paper.args.device, paper.args.num_workers), paper.args.batch_size, "images"
    )


def without_first_order(paper):
    """What Figs. 11 and 12 lack."""
    return (
        "this model pools its tokens by attention, so there is no first order"
        if paper.clip.vit.pooling == "attention"
        else ""
    )


@item(
    "fig11",
    "First-order parts by layer, alone and accumulated (Figs. 11 and 12)",
    passes=lambda p: train(p) + val(p),
    lacks=without_first_order,
)
def fig11(paper):
    first, layers, curves = paper.first_order, range(paper.clip.vit.L), {}
    for kind in ("attention", "mlp"):
        for how, title in (("", "of the layer"), ("up to ", "of all layers up to it")):
            curves[f"without {kind} {title}"] = {l: first[f"{kind} {how}{l}"] for l in layers}
    plot(curves, "layer", "accuracy (%)", paper.picture("fig11"))
    of = {"n": val(paper), "beside": f"{chance_of(paper)}, nothing ablated {first['baseline']:.1f} %"}
    rows = [
        Row(f"layer {l}: {name}", value, **of) for name, curve in curves.items() for l, value in curve.items()
    ]
    return rows, [paper.picture("fig11")]


@item(
    "causal",
    "Do the effects say what happens when a neuron is deleted? (not in the paper)",
    passes=lambda p: train(p) + p.args.drawn_neurons * p.args.drawn_images * len(p.all_layers),
    disk=lambda p: p.drawn_on_disk(p.all_layers),
    seed="the layer's number, of the drawn neurons",
)
def causal(paper):
    curves, rows = {}, []
    for layer in paper.all_layers:
        neurons, effects = paper.drawn(layer)
        truth = np.asarray(effects[:, measures.EFFECTS.index("deleted")])
        for i, kind in enumerate(measures.EFFECTS[:-1]):
            own = np.asarray(effects[:, i])
            if not own.any():  # no direct effects
                continue
            pairs = [[(n + shift) % len(neurons) for n in range(len(neurons))] for shift in (0, 1)]
            each, other = (
                [measures.agreement(own[:, n], truth[:, m]) for n, m in enumerate(of)] for of in pairs
            )
            curves.setdefault(kind, {})[layer] = float(np.mean(each))
            what, beside = (
                f"layer {layer}: correlation of {kind} effects with what is lost",
                f"another neuron's {np.mean(other):.3f}",
            )
            rows.append(Row(what, float(np.mean(each)), unit="", beside=beside, n=len(neurons)))
    plot(curves, "MLP layer", "correlation with deletion", paper.picture("causal"))
    return rows, [paper.picture("causal")]


PAPER_SEGMENTATION = {  # pixel accuracy, mIoU, mAP
    "second_order": (78.1, 59.0, 84.9),
    "first_order": (76.5, 58.1, 84.1),
    "attention": (69.6, 49.8, 80.0),
}


@item(
    "table4",
    "Zero-shot segmentation (Table 4), and its maps side by side (Fig. 7)",
    "late",
    lambda p: 4276 * len(METHODS),
    lacks=without("segmentation", "it needs ImageNet-Segmentation: --segmentation gtsegs_ijcv.mat"),
    seed="0, of the random neurons",
)
def table4(paper):
    from utils.figures import plot_maps, to_pictures

    args, clip, scores, maps = paper.args, paper.clip, {}, {}
    paper.components()
    paper.classifier()
    for method in METHODS if clip.vit.pooling != "attention" else ("second_order", "random", "attention"):
        path, words = segmentation_of(paper, method)
        paper.stage("compute_segmentation.py", *words)
        scores[method], maps[method] = (
            json.loads(path.read_text()),
            read_array(path.with_name(f"{path.stem}_maps.npy"), mmap=True)[:4],
        )
    rows = []
    for method, found in scores.items():
        for key, published in zip(
            ("pixel_accuracy", "mIoU", "mAP"), PAPER_SEGMENTATION.get(method, (None,) * 3), strict=True
        ):
            beside = f"random neurons {scores['random']['scores'][key]:.1f} %"
            rows.append(
                Row(f"{method}: {key}", found["scores"][key], published, beside=beside, n=found["images"])
            )
    note = "not computed here; the paper's Table 4 has the values"
    rows += [Row(f"{name}: all scores", None, note=note) for name in ("LRP", "partial LRP")]
    size = clip.vit.visual.image_size
    pixels, masks = zip(
        *torch.utils.data.Subset(
            SegmentationSet(args.segmentation, clip.transform, size=size), range(len(maps["random"]))
        ),
        strict=True,
    )
    enlarged = {name: enlarge(torch.tensor(each), clip.vit.grid, size).numpy() for name, each in maps.items()}
    plot_maps(
        to_pictures(torch.stack(pixels), clip.transform, size),
        torch.stack(masks).numpy(),
        enlarged,
        paper.picture("fig7"),
    )
    return rows, [paper.picture("fig7")]


def segmentation_of(paper, method):
    """Where compute_segmentation.py puts the scores of a method, and its flags."""
    args, classes = paper.args, paper.args.class_source
    words = [
        "--data_path",
        args.segmentation,
        "--method",
        method,
        "--dataset",
        paper.dataset,
        "--precision",
        args.precision,
    ]
    words += [
        "--batch_size",
        args.batch_size,
        "--num_workers",
        args.num_workers,
        "--top_k_pca",
        args.top_k_pca,
    ]
    settings = {
        "method": method,
        "geometry": "paper",
        "mask_thr": 0.5,
        "thr": 0,
        "image_size": None,
        "ignore_index": IGNORED_VALUES,
    }
    if method in ("second_order", "random"):
        words += ["--mlp_layers", *paper.late, "--top_neurons", args.top_neurons]
        settings |= {"layers": paper.late, "top_neurons": args.top_neurons}
    if classes and (method == "second_order" or method in TOWARDS_CLASS):
        words, settings = [*words, "--class_source", classes], {**settings, "class_source": classes}
    file = Path(args.segmentation)
    stem = "gtsegs_ijcv" if file.is_dir() else file.stem
    return paper.results.path("segmentation", file=stem, row=row_name(settings)), words


PAPER_ATTACKS = {"second_order": (5.3, 22.7, 8.0, 5.7, 7.0), "similar": (1.0, 3.3, 5.0, 0.0, 1.3)}  # of TASKS


@item(
    "table3",
    "Semantic adversarial images (Table 3), and where the wrong class is seen (Figs. 6 and 15)",
    "late",
    lambda p: train(p) + 2 * p.args.drawn_neurons * p.args.drawn_images * len(p.late),
    disk=lambda p: p.drawn_on_disk(p.late),
    lacks=without(
        "image_model", "it needs a drawing model: --image_model (and --text_model, --similarity_model)"
    ),
    seed="0, 1, ... of words, descriptions and pictures (--seeds)",
)
def table3(paper):
    from utils.figures import plot_attacks

    args, rows, shown, floor = paper.args, [], [], {}
    paper.descriptions(paper.attack_texts, paper.late, args.attack_components)
    paper.classifier()
    sources = {
        "random_words": "random words",
        "second_order": "words of neurons",
        "random": f"words of {args.neurons_num} random neurons",
    }
    sources |= {
        "similar": "words similar to v",
        "indirect": f"words by indirect effects of {args.drawn_neurons} drawn neurons a layer",
    }
    published = {
        (source, task): value
        for source, values in PAPER_ATTACKS.items()
        for task, value in zip(TASKS, values, strict=True)
    }
    for source, title in sources.items():
        by_seed = {seed: [] for seed in range(args.seeds)}
        for class_0, class_1 in paper.tasks:
            found, task = (
                [attack(paper, (class_0, class_1), source, seed) for seed in range(args.seeds)],
                f"{class_1}:{class_0}",
            )
            values = [rates["binary_rate"] for rates, _ in found]
            for seed, value in enumerate(values):
                by_seed[seed].append(value)
            what, mean = f"{title}: {class_1}, taken for {class_0}", float(np.mean(values))
            beside = f"random words {floor.setdefault(task, mean):.1f} %"
            rows.append(
                Row(
                    what,
                    mean,
                    published.get((source, task)),
                    beside=beside,
                    n=found[0][0]["images"],
                    note=spread(values),
                )
            )
            if source == "second_order" and len(shown) < 4:
                shown.append((class_0, class_1, found[0][1]))
        whole, beside = (
            [float(np.mean(values)) for values in by_seed.values()],
            f"random words {np.mean(list(floor.values())):.1f} %",
        )
        what = f"{title}: all {len(paper.tasks)} tasks"
        rows.append(
            Row(
                what,
                float(np.mean(whole)),
                beside=beside,
                n=rows[-1].n * len(paper.tasks),
                note=spread(whole),
            )
        )
    plot_attacks(attributions(paper, shown), paper.picture("fig6"))
    return rows, [paper.picture("fig6")]


def spread(values):
    """Standard deviation over seeds, in words."""
    return f"± {np.std(values, ddof=1) if len(values) > 1 else 0:.1f} over {len(values)} seeds"


def attack(paper, classes, source, seed):
    """The rates of one attack, and its folder. classes: class_0, class_1."""
    args, (class_0, class_1), folder = paper.args, classes, paper.folder / "attacks"
    words = [
        "--class_0",
        class_0,
        "--class_1",
        class_1,
        "--seed",
        seed,
        "--dataset",
        paper.dataset,
        "--dataset_path",
        folder,
    ]
    words += [
        "--mlp_layers",
        *paper.late,
        "--neurons_num",
        args.neurons_num,
        "--overall_words",
        args.overall_words,
    ]
    words += [
        "--text_descriptions",
        paper.pools[paper.attack_texts],
        "--descriptions_dir",
        args.descriptions_dir,
    ]
    words += ["--components", args.attack_components or args.components, "--top_k_pca", args.top_k_pca]
    words += ["--results_per_generation", args.results_per_generation, "--batch_size", args.pictures]
    for name in ("text_model", "image_model", "similarity_model", "cosim_similarity", "image_options"):
        words += [f"--{name}", value] if (value := getattr(args, name)) is not None else []
    if source == "indirect":
        source, words = "file", [*words, "--words", indirect_words(paper, class_0, class_1)]
    paper.stage("generate_adversarial_images.py", *words, "--word_source", source)
    run = adversarial.Run(folder, (class_0, class_1, source), seed)
    return json.loads((run.folder / "results.json").read_text()), run.folder


def indirect_words(paper, class_0, class_1):
    """A file of the words of drawn neurons by their indirect effects; components, texts and scores as those
    of second order.
    """
    args, pcas, described = paper.args, {}, {}
    pool, vectors, _ = load_texts(
        paper.results, paper.attack_texts, args.descriptions_dir, lambda: paper.clip
    )
    atoms = make_atoms(torch.from_numpy(vectors))
    for layer in paper.late:
        _, effects = paper.drawn(layer)
        own = torch.from_numpy(np.array(effects[:, measures.EFFECTS.index("indirect")])).transpose(
            0, 1
        )  # [n, images, D]
        own = own - own.mean(dim=1, keepdim=True)
        largest = own.norm(dim=-1).topk(min(args.top_k_pca, own.shape[1]), dim=1).indices
        r, _ = principal_directions(own.gather(1, largest[..., None].expand(-1, -1, own.shape[-1])))
        support, coefficients = orthogonal_matching_pursuit(
            atoms, r, args.attack_components or args.components
        )
        texts = (zip(s, c, strict=True) for s, c in zip(support.tolist(), coefficients.tolist(), strict=True))
        pcas[layer], described[layer] = (
            r.numpy(),
            [[(i, c, pool[i]) for i, c in each if i >= 0] for each in texts],
        )
    v = np.subtract(*text_vectors(paper.clip, [class_0, class_1], 2))
    path = paper.folder / f"indirect_{'_'.join(class_0.split())}_{'_'.join(class_1.split())}.json"
    save_json(path, adversarial.NeuronWords(pcas, described).mine(v, args.neurons_num)["words"])
    return path


def attributions(paper, shown):
    """Pictures of attacks that count, those that fool first, and where the wrong class is seen in them (for a
    tower with a first order): [(title, [(picture, map, caption), ...]), ...]."""
    vit, found = paper.clip.vit, []
    for class_0, class_1, folder in shown:
        with open(folder / "files.csv", encoding="utf-8") as file:
            items = [item for item in csv.DictReader(file) if item["keep"] == "1" and item["black"] == "0"]
        items = sorted(items, key=lambda item: (item["binary"] != "1", item["file"]))[:5]
        pictures = [Image.open(folder / item["file"]).convert("RGB") for item in items]
        captions = [
            f"{f'taken for {class_0}' if item['binary'] == '1' else 'not fooled'}: {item['description']}"
            for item in items
        ]
        maps = np.zeros((len(items), *vit.grid))
        if vit.pooling != "attention":
            v = np.subtract(*text_vectors(paper.clip, [class_0, class_1], 2))
            maps = towards(
                paper.clip,
                torch.stack([paper.clip.transform(picture) for picture in pictures]),
                torch.from_numpy(v),
            )
        found.append(
            (
                f"{class_1}, which should be taken for {class_0}",
                list(zip(pictures, maps, captions, strict=True)),
            )
        )
    return found


@torch.inference_mode()
def towards(clip, pixels, v):
    """What all heads take from each patch along a direction v [D]: pixels [n, 3, side, side] -> array [n,
    rows, columns].
    """
    order = FirstOrder(clip.vit)
    with clip.vit.record(*order.of_heads) as cache:
        representation = clip.vit(pixels.to(clip.device))
    maps = order.tokens(cache, representation, v.to(representation).expand(len(pixels), -1)).sum(dim=(1, 2))
    return maps[:, clip.vit.prefix :].unflatten(1, clip.vit.grid).cpu().numpy()


REQUEST = """Write {count} short descriptions of different photos that show "{class_name}": what else is in them, where they were
taken, their light and their colours. Name it in every description. Answer with a numbered list of {count} descriptions, one a
line, and nothing else."""


def without_language(paper):
    """What Table 7 lacks."""
    return "it needs a language model: --text_model" if paper.args.text_model in (None, "template") else ""


@item(
    "table7",
    "A pool of image descriptions, written by a language model from class names (Table 7)",
    lacks=without_language,
    seed="the class's number, of the answer",
)
def table7(paper):
    from applications.attack.generators import LanguageModel, require_packages

    args, path = paper.args, paper.folder / "image_descriptions.json"
    require_packages(text_model=args.text_model)
    settings = {
        "request": read_request(args.request),
        "text_model": args.text_model,
        "count": args.descriptions_per_class,
    }
    done = read_json(path, "", "remove it") if path.is_file() else {}
    answers = (
        done["answers"]
        if isinstance(done, dict) and done.get("settings") == settings and not args.overwrite
        else {}
    )
    ask, classes = None, paper.images(args.split).images.class_names
    for i, name in enumerate(tqdm(classes, desc="descriptions", unit="class")):
        if name not in answers:
            ask = ask or LanguageModel(args.text_model, args.device)
            request = (
                settings["request"].replace("{count}", str(settings["count"])).replace("{class_name}", name)
            )
            answers[name] = adversarial.parse_list(*ask(request, settings["count"], i))
            save_json(path, {"settings": settings, "answers": answers})
    pairs = [(name, text) for name in classes for text in answers[name]]
    texts, target = list(dict.fromkeys(text for _, text in pairs)), paper.folder / "image_descriptions.txt"
    if not texts:
        raise UserError(f"--text_model {args.text_model} wrote no numbered list; see {path}")
    save_atomic(target, lambda file: file.write(("\n".join(texts) + "\n").encode()))
    naming = 100 * float(np.mean([adversarial.names_class(text, name) for name, text in pairs]))
    rows = [
        Row(
            f"descriptions in {target.name} (use it with --text_descriptions {here(target)})",
            len(texts),
            unit="",
            n=len(classes),
        )
    ]
    return [*rows, Row("of these, name their class", naming, n=len(pairs))], []


def read_request(path):
    """The request of `--request`, or ours. Raises UserError when it does not say for which class."""
    if path is None:
        return REQUEST
    try:
        request = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--request {path} cannot be read as UTF-8 text") from error
    if "{class_name}" not in request:
        raise UserError(
            f"--request {path} does not have {{class_name}} in it, so every class would be asked for the same"
        )
    return request
