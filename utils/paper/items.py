"""The tables and figures of the paper, each a function that runs the stages it needs and returns its rows and pictures.

The paper's values are those of ViT-B-32 with OpenAI's weights on ImageNet, unless the item says otherwise.
"""

import csv
import io
import json
import shutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from PIL import Image
from tqdm import tqdm

from utils import adversarial
from utils.ablation import accuracies
from utils.concepts import concepts_of_images
from utils.datasets import IMG_EXTENSIONS, to_rgb
from utils.first_order import FirstOrder
from utils.neurons import NeuronLayer
from utils.norms import CentredNorms
from utils.paper import measures
from utils.paper.paper import Row, here
from utils.pca import principal_directions
from utils.prs import fold, second_order
from utils.runtime.errors import UserError
from utils.runtime.files import digest, read_json, save_atomic, save_json
from utils.segmentation import METHODS
from utils.sparse_coding import load_descriptions, load_support, load_texts, make_atoms, orthogonal_matching_pursuit, rebuilt_from
from utils.texts import text_vectors

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


class Item(NamedTuple):
    """A table or figure.

    title: what it is.
    layers: whose components it needs: "", "one", "late" or "all".
    passes: `Paper` -> how many images go through the tower.
    lacks: `Paper` -> what it cannot do without, in words; "" if all is there.
    make: `Paper` -> (rows, pictures).
    """

    title: str
    layers: str
    passes: Callable
    lacks: Callable
    make: Callable


def item(name, title, layers="", passes=lambda paper: 0, lacks=lambda paper: ""):
    """Register a function as an item."""

    def register(function):
        ITEMS[name] = Item(title, layers, passes, lacks, function)
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


@item("table1", "Accuracy and variance explained: direct, second-order and indirect effects of one layer", "one",
      passes=lambda p: 3 * train(p) + 3 * val(p) + 2 * p.args.drawn_neurons * p.args.drawn_images)  # fmt: skip
def table1(paper):
    layer, images = paper.layer, val(paper)
    table, _, _ = paper.accuracies([layer])
    first, chance, row = paper.first_order, chance_of(paper), table[layer]
    of = {"n": images, "beside": chance}
    rows = [Row("accuracy, nothing ablated", row["baseline"], **of)]
    rows += [Row(f"accuracy without the indirect effects of layer {layer}", first[f"indirect {layer}"], 52.3, **of)]
    rows += [Row(f"accuracy without the second-order effects of layer {layer}", row["without all effects"], 29.6, **of)]
    rows += [Row(f"accuracy without the direct effects of layer {layer}", first[f"mlp {layer}"], **of)]
    neurons, effects = paper.drawn(layer)
    k, count = min(paper.args.top_k_pca, len(effects)), len(neurons)
    for kind, published in (("indirect", 11.0), ("second order", 48.2), ("direct", None)):
        own = effects[:, measures.EFFECTS.index(kind)]
        for which, limit, value in ((f"the {k} largest", k, published), (f"all {len(effects)}", None, None)):
            shares = [measures.explained(own[:, n].astype(np.float64), limit) for n in range(count)]
            note = "of one direction times one number, so 100 by definition" if kind == "direct" else ""
            floor = f"at least {100 / min(limit or len(effects), paper.clip.vit.D):.2g} %"
            what = f"variance explained by the first component, {kind}, {which} effects of drawn images"
            rows.append(Row(what, 100 * float(np.mean(shares)), value, beside=floor, n=count, note=note))
    whole = paper.inputs.load("explained", layer=layer, **paper.names())
    what = f"the same, second order, all neurons, the {paper.args.top_k_pca} largest of all train images"
    floor = f"at least {100 / min(paper.args.top_k_pca, paper.clip.vit.D):.2g} %"
    return [*rows, Row(what, 100 * float(whole.mean()), 48.2, beside=floor, n=len(whole))], []


def by_layer(paper, layers, name, **more):
    """Rows and picture of the ablations of some layers."""
    table, images, picture = paper.accuracies(layers, **more)
    shutil.copy(picture, paper.picture(name))
    rows = []
    for layer, row in table.items():
        rows += [Row(f"layer {layer}: {what}", value, n=images, beside=chance_of(paper)) for what, value in row.items()]
    return rows, [paper.picture(name)]


@item("fig3", "Ablations of second-order effects, layer by layer", "all", lambda p: 2.6 * train(p) + 2 * val(p))
def fig3(paper):
    return by_layer(paper, paper.all_layers, "fig3")


def other_than_large(paper):
    """What Fig. 9 lacks."""
    large = "it is Fig. 3 of another model: add --model ViT-L-14 --pretrained laion2b_s32b_b82k --memory 16"
    return "" if paper.args.model == "ViT-L-14" else large


@item("fig9", "The same for ViT-L-14", "all", lambda p: 2.6 * train(p) + 2 * val(p), other_than_large)
def fig9(paper):
    return by_layer(paper, paper.all_layers, "fig9")


@item("fig10", "The same on ImageNet-R", "all", lambda p: 6000, without("imagenet_r", "it needs ImageNet-R: --imagenet_r PATH"))
def fig10(paper):
    return by_layer(paper, paper.all_layers, "fig10", dataset="imagenet_r", data_path=paper.args.imagenet_r)


@item("fig4", "Accuracy by the number of texts that describe a neuron", "one", val)
def fig4(paper):
    from utils.visualization import plot_lines

    layer, rows, curves = paper.layer, [], {}
    counts = sorted({m for m in paper.args.counts if m <= paper.args.components} | {paper.args.components})
    for texts in paper.texts:
        paper.descriptions(texts, [layer])
        path = paper.inputs.find("decomposition", layer=layer, **paper.names(**paper.described(texts)))
        pool, vectors, _ = load_texts(paper.inputs, texts, paper.args.descriptions_dir, lambda: paper.clip)
        pcas = torch.from_numpy(paper.inputs.load("pca", layer=layer, **paper.names()))
        support, atoms = load_support(path.with_suffix(".npz")), make_atoms(torch.from_numpy(vectors))
        rebuilt = [rebuilt_from(support[:, :m], atoms, pcas) for m in counts]
        by_chance = np.random.default_rng(0).integers(0, len(pool), support.shape)
        shuffled = [rebuilt_from(by_chance[:, :m], atoms, pcas) for m in counts]
        shown = [item.to(paper.clip.device) for item in (*rebuilt, *shuffled, pcas)]
        made_of = {"vectors": digest(*shown)}
        found, labels = paper.predictions(f"fig4_{texts}", layer, shown, made_of)
        values = accuracies(found[:, None], labels)[0]
        curves[texts], component = dict(zip(counts, values, strict=False)), values[-1]
        curves[f"{texts}, chosen at random"] = random = dict(zip(counts, values[len(counts) :], strict=False))
        for m in counts:
            beside = f"random texts {random[m]:.1f} %, first components {component:.1f} %"
            rows.append(Row(f"{texts}, {m} texts", curves[texts][m], n=len(labels), beside=beside))
    curves["first components"] = dict.fromkeys(counts, component)
    plot_lines(curves, "texts for a neuron", "accuracy (%)", paper.picture("fig4"))
    return rows, [paper.picture("fig4")]


@item("table2", "Texts of single neurons (Tables 2 and 5), and of all neurons of the layer", "one")
def table2(paper):
    layer, texts = paper.layer, paper.texts[0]
    paper.descriptions(texts, [layer])
    vit, names = paper.clip.vit, paper.names(**paper.described(texts))
    described = load_descriptions(paper.inputs, vit.sizes, layer=layer, **names)
    pcas, norms = (paper.inputs.load(kind, layer=layer, **paper.names()) for kind in ("pca", "norm"))
    _, vectors, _ = load_texts(paper.inputs, texts, paper.args.descriptions_dir, lambda: paper.clip)
    atoms = make_atoms(torch.from_numpy(vectors)).numpy()
    matrix = scipy.sparse.load_npz(paper.inputs.find("decomposition", layer=layer, **names).with_suffix(".npz"))
    left = np.linalg.norm(pcas - matrix @ atoms, axis=1)
    support = np.random.default_rng(0).integers(0, len(atoms), (len(pcas), paper.args.components))
    chance = np.linalg.norm(pcas - rebuilt_from(support, atoms, torch.from_numpy(pcas)).numpy(), axis=1)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["layer", "neuron", "unexplained", "rank", "coefficient", "text"])
    for n, entries in enumerate(described):
        writer.writerows([layer, n, f"{left[n]:.4f}", rank, f"{c:.6f}", text] for rank, (_, c, text) in enumerate(entries))
    save_atomic(paper.folder / f"neurons_{layer}_{texts}.csv", lambda file: file.write(table.getvalue().encode()))
    shown = paper.args.neurons or np.argsort(-norms.mean(axis=1), kind="stable")[:8].tolist()
    rows = []
    for n in shown:
        words = ", ".join(f"{'' if c > 0 else '-'}{text}" for _, c, text in described[n][:8])
        beside = f"random texts {chance[n]:.2f}"
        rows.append(Row(f"neuron {n}: {words}", float(left[n]), unit="|r - texts|", beside=beside, n=1))
    what = f"all {len(left)} neurons, mean; every text in neurons_{layer}_{texts}.csv"
    beside = f"random texts {chance.mean():.2f}"
    return [*rows, Row(what, float(left.mean()), unit="|r - texts|", beside=beside, n=len(left))], []


@item("fig5", "Val images of the largest effects (Figs. 5, 13 and 14)", "one", val)
def fig5(paper):
    from utils.visualization import save_figure

    layer, texts = paper.layer, paper.texts[0]
    paper.descriptions(texts, [layer])
    split = paper.args.split
    paper.stage("compute_second_order_neuron_prs.py", *paper.image_flags(split), "--mlp_layer", layer, "--keep", "full")
    data, described = paper.images(split).images, paper.described(texts)
    neurons = NeuronLayer(paper.clip, paper.inputs, data, layer=layer, described=described, k=paper.args.top_k_pca)
    rows, pictures = [], []
    labels = np.bincount(data.labels) / len(data)
    for n in paper.args.neurons or neurons.largest(4).tolist():
        pictures.append(paper.picture(f"fig5_neuron_{n}"))
        save_figure(neurons.card(n, pictures=16), pictures[-1])
        classes = data.labels[neurons.top_images(n, 16, by="projection")]
        share = np.bincount(classes).max() / len(classes)
        beside = f"chance about {100 * (labels**2).sum():.1f} %"
        rows.append(
            Row(f"neuron {n}: of the 16 top images, the most frequent class has", 100 * float(share), beside=beside, n=16)
        )
    return rows, pictures


@item("fig8", "Concepts of images (Fig. 8; --images FOLDER for your own)", "one", lambda p: 64)
def fig8(paper):
    layer, texts = paper.layer, paper.texts[0]
    paper.descriptions(texts, [layer])
    vit, names = paper.clip.vit, paper.names(**paper.described(texts))
    statistics = paper.statistics([layer])[layer]
    described = load_descriptions(paper.inputs, vit.sizes, layer=layer, **names)
    directions = fold(vit, layer)
    norms = CentredNorms(directions, statistics.mean)
    if paper.args.images:
        files = sorted(path for path in paper.args.images.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise UserError(f"--images {paper.args.images} has no pictures")
        pictures = [(str(path), to_rgb(Image.open(path))) for path in files]
    else:
        data = paper.images(paper.args.split, 8).images
        pictures = [(data.class_names[label], data.picture(i)) for i, (_, label) in enumerate(data.samples)]
    rows, table = [], io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "rank", "score", "text"])
    for start in range(0, len(pictures), paper.args.batch_size):
        part = pictures[start : start + paper.args.batch_size]
        pixels = torch.stack([paper.clip.transform(picture) for _, picture in part]).to(paper.clip.device)
        _, [phi] = second_order(vit, pixels, [directions])
        for (name, _), found in zip(part, concepts_of_images(phi, norms, statistics.thresholds, described), strict=True):
            writer.writerows([name, rank, f"{score:.5f}", text] for rank, (text, score) in enumerate(found.words[:50]))
            words = ", ".join(f"{text} {score:.2f}" for text, score in found.words[:5])
            share, beside = 100 * len(found.neurons) / vit.N, f"{100 * paper.args.top_k_pca / train(paper):.2g} % by definition"
            rows.append(Row(f"{name}: {words}; active neurons", share, beside=beside, n=1))
    save_atomic(paper.folder / "concepts.csv", lambda file: file.write(table.getvalue().encode()))
    return rows[:16], []


@item("fig11", "First-order parts by layer, alone and accumulated (Figs. 11 and 12)", passes=lambda p: train(p) + val(p))
def fig11(paper):
    from utils.visualization import plot_lines

    first, layers = paper.first_order, range(paper.clip.vit.L)
    curves = {}
    for kind in ("attention", "mlp"):
        for how, title in (("", "of the layer"), ("up to ", "of all layers up to it")):
            curves[f"without {kind} {title}"] = {l: first[f"{kind} {how}{l}"] for l in layers}
    plot_lines(curves, "layer", "accuracy (%)", paper.picture("fig11"))
    of = {"n": val(paper), "beside": f"{chance_of(paper)}, nothing ablated {first['baseline']:.1f} %"}
    rows = [Row(f"layer {l}: {name}", value, **of) for name, curve in curves.items() for l, value in curve.items()]
    return rows, [paper.picture("fig11")]


@item("causal", "Do the effects say what happens when a neuron is deleted? (not in the paper)",
      passes=lambda p: 2 * p.args.drawn_neurons * p.args.drawn_images * len(p.all_layers) / 2)  # fmt: skip
def causal(paper):
    from utils.visualization import plot_lines

    curves, rows = {kind: {} for kind in measures.EFFECTS[:3]}, []
    for layer in paper.all_layers:
        neurons, effects = paper.drawn(layer)
        truth = np.asarray(effects[:, 3])
        for i, kind in enumerate(measures.EFFECTS[:3]):
            own = np.asarray(effects[:, i])
            each = [measures.agreement(own[:, n], truth[:, n]) for n in range(len(neurons))]
            other = [measures.agreement(own[:, n], truth[:, (n + 1) % len(neurons)]) for n in range(len(neurons))]
            curves[kind][layer] = float(np.mean(each))
            beside = f"another neuron's {np.mean(other):.3f}"
            what = f"layer {layer}: correlation of {kind} effects with what is lost"
            rows.append(Row(what, float(np.mean(each)), unit="", beside=beside, n=len(neurons)))
    plot_lines(curves, "MLP layer", "correlation with deletion", paper.picture("causal"))
    return rows, [paper.picture("causal")]


PAPER_SEGMENTATION = {  # pixel accuracy, mIoU, mAP
    "second_order": (78.1, 59.0, 84.9), "first_order": (76.5, 58.1, 84.1), "attention": (69.6, 49.8, 80.0),
}  # fmt: skip


@item("table4", "Zero-shot segmentation (Table 4), and its maps side by side (Fig. 7)", "late", lambda p: 4276 * len(METHODS),
      without("segmentation", "it needs ImageNet-Segmentation: --segmentation gtsegs_ijcv.mat"))  # fmt: skip
def table4(paper):
    from utils.visualization import stack_pictures

    args = paper.args
    paper.components()
    paper.classifier()
    scores, strips = {}, {}
    for method in METHODS:
        words = ["--data_path", args.segmentation, "--method", method, "--dataset", paper.dataset, "--save_img"]
        words += ["--mlp_layers", *paper.late, "--top_neurons", args.top_neurons, "--top_k_pca", args.top_k_pca]
        words += ["--batch_size", args.batch_size, "--num_workers", args.num_workers]
        words += (
            ["--class_source", args.class_source]
            if method not in ("random", "attention", "rollout") and args.class_source
            else []
        )
        before = set(paper.results.directory.glob("*_segmentation_*.json"))
        paper.stage("compute_segmentation.py", *words)
        path = newest(paper, method, before)
        scores[method] = json.loads(path.read_text())
        strips[method] = sorted(path.with_name(f"{path.stem}_images").glob("*.png"))[:4]
    rows = []
    for method, found in scores.items():
        for key, published in zip(("pixel_accuracy", "mIoU", "mAP"), PAPER_SEGMENTATION.get(method, (None,) * 3), strict=True):
            beside = f"random neurons {scores['random']['scores'][key]:.1f} %"
            rows.append(Row(f"{method}: {key}", found["scores"][key], published, beside=beside, n=found["images"]))
    note = "not computed here; the paper's Table 4 has them"
    rows += [Row(f"{name}: all scores", None, note=note) for name in ("LRP", "partial LRP")]
    stack_pictures(strips, paper.picture("fig7"))
    return rows, [paper.picture("fig7")]


def newest(paper, method, before):
    """The scores that a segmentation has written, or kept."""
    paths = [path for path in paper.results.directory.glob(f"*_segmentation_{paper.results.clip}_{method}*.json")]
    paths = [path for path in paths if not path.name.endswith(".meta.json")]
    return max(paths, key=lambda path: (path not in before, path.stat().st_mtime))


SOURCES = {
    "random_words": "random words",
    "second_order": "words of neurons",
    "random": "100 random neurons",
    "similar": "words similar to v",
    "indirect": "indirect effects",
}
PAPER_TASKS = ("horse:automobile", "dog:deer", "bird:frog", "ship:truck", "ship:automobile")
PAPER_ATTACKS = {"second_order": (5.3, 22.7, 8.0, 5.7, 7.0), "similar": (1.0, 3.3, 5.0, 0.0, 1.3)}  # of PAPER_TASKS


@item("table3", "Semantic adversarial images (Table 3), and where the wrong class is seen (Figs. 6 and 15)", "late",
      lambda p: 2 * p.args.drawn_neurons * p.args.drawn_images * len(p.late),
      without("image_model", "it needs a drawing model: --image_model (and --text_model, --similarity_model)"))  # fmt: skip
def table3(paper):
    from utils.visualization import plot_attacks

    args = paper.args
    texts, rows, shown, floor = paper.attack_texts, [], [], {}
    paper.descriptions(texts, paper.late, args.attack_components)
    paper.classifier()
    for source, title in SOURCES.items():
        by_seed = {seed: [] for seed in range(args.seeds)}
        for task in args.tasks:
            class_0, _, class_1 = task.partition(":")
            found = [attack(paper, class_0, class_1, source, seed) for seed in range(args.seeds)]
            values = [rates["binary_rate"] for rates, _ in found]
            for seed, value in enumerate(values):
                by_seed[seed].append(value)
            spread = f"± {np.std(values, ddof=1) if len(values) > 1 else 0:.1f} over {len(values)} seeds"
            published = dict(zip(PAPER_TASKS, PAPER_ATTACKS.get(source, ()), strict=False)).get(task)
            what, mean = f"{title}: {class_1}, taken for {class_0}", float(np.mean(values))
            beside = f"random words {floor.setdefault(task, mean):.1f} %"
            rows.append(Row(what, mean, published, beside=beside, n=found[0][0]["images"], note=spread))
            if source == "second_order" and len(shown) < 4:
                shown.append((class_0, class_1, found[0][1]))
        whole = [float(np.mean(values)) for values in by_seed.values()]
        spread = f"± {np.std(whole, ddof=1) if len(whole) > 1 else 0:.1f} over {len(whole)} seeds"
        beside = f"random words {np.mean(list(floor.values())):.1f} %"
        rows.append(Row(f"{title}: all {len(args.tasks)} tasks", float(np.mean(whole)), beside=beside, n=len(whole), note=spread))
    plot_attacks(attributions(paper, shown), paper.picture("fig6"))
    return rows, [paper.picture("fig6")]


def attack(paper, class_0, class_1, source, seed):
    """The rates of one attack, and its folder."""
    args = paper.args
    words = ["--class_0", class_0, "--class_1", class_1, "--seed", seed, "--dataset", paper.dataset]
    words += ["--mlp_layers", *paper.late, "--neurons_num", args.neurons_num, "--overall_words", args.overall_words]
    words += ["--text_descriptions", paper.pools[paper.attack_texts], "--top_k_pca", args.top_k_pca]
    words += ["--components", args.attack_components or args.components]
    words += ["--results_per_generation", args.results_per_generation, "--batch_size", args.pictures]
    for name in ("text_model", "image_model", "similarity_model", "cosim_similarity", "image_options"):
        words += [f"--{name}", value] if (value := getattr(args, name)) is not None else []
    folder = paper.folder / "attacks"
    if source == "indirect":
        source, words = "file", [*words, "--words", indirect_words(paper, class_0, class_1)]
    paper.stage("generate_adversarial_images.py", *words, "--word_source", source, "--dataset_path", folder)
    run = adversarial.Run(folder, (class_0, class_1, source), seed)
    return json.loads((run.folder / "results.json").read_text()), run.folder


def indirect_words(paper, class_0, class_1):
    """A file of the words of drawn neurons by their indirect effects; components, texts and scores as those of second order."""
    args, pcas, described = paper.args, {}, {}
    pool, vectors, _ = load_texts(paper.inputs, paper.attack_texts, args.descriptions_dir, lambda: paper.clip)
    atoms = make_atoms(torch.from_numpy(vectors))
    for layer in paper.late:
        _, effects = paper.drawn(layer)
        own = torch.from_numpy(np.array(effects[:, measures.EFFECTS.index("indirect")])).transpose(0, 1)  # [n, images, D]
        own = own - own.mean(dim=1, keepdim=True)
        largest = own.norm(dim=-1).topk(min(args.top_k_pca, own.shape[1]), dim=1).indices
        r, _ = principal_directions(own.gather(1, largest[..., None].expand(-1, -1, own.shape[-1])))
        support, coefficients = orthogonal_matching_pursuit(atoms, r, args.attack_components or args.components)
        texts = (zip(s, c, strict=True) for s, c in zip(support.tolist(), coefficients.tolist(), strict=True))
        pcas[layer], described[layer] = r.numpy(), [[(i, c, pool[i]) for i, c in each if i >= 0] for each in texts]
    v = np.subtract(*text_vectors(paper.clip, [class_0, class_1], 2))
    path = paper.folder / f"indirect_{'_'.join(class_0.split())}_{'_'.join(class_1.split())}.json"
    save_json(path, adversarial.NeuronWords(pcas, described).mine(v, args.neurons_num)["words"])
    return path


def attributions(paper, shown):
    """Pictures of attacks and where the wrong class is seen in them: [(title, [(picture, map), ...]), ...]."""
    order, found = FirstOrder(paper.clip.vit), []
    for class_0, class_1, folder in shown:
        with open(folder / "files.csv", encoding="utf-8") as file:
            items = sorted(csv.DictReader(file), key=lambda item: (item["binary"] != "1", item["file"]))[:5]
        v = np.subtract(*text_vectors(paper.clip, [class_0, class_1], 2))
        pictures = [Image.open(folder / item["file"]).convert("RGB") for item in items]
        pixels = torch.stack([paper.clip.transform(picture) for picture in pictures]).to(paper.clip.device)
        with torch.inference_mode(), paper.clip.vit.record(*order.of_heads) as cache:
            representation = paper.clip.vit(pixels)
            direction = torch.from_numpy(v).to(representation).expand(len(pixels), -1)
            maps = order.tokens(cache, representation, direction).sum(dim=(1, 2))[:, 1:].unflatten(1, paper.clip.vit.grid)
        captions = [item["description"] for item in items]
        found.append((f"{class_1}, taken for {class_0}", list(zip(pictures, maps.cpu().numpy(), captions, strict=True))))
    return found


REQUEST = """Write {count} short descriptions of different photos that show "{class_name}": what else is in them, where they were
taken, their light and their colours. Name it in every description. Answer with a numbered list of {count} descriptions, one a
line, and nothing else."""


def without_language(paper):
    """What Table 7 lacks."""
    return "it needs a language model: --text_model" if paper.args.text_model in (None, "template") else ""


@item("table7", "A pool of image descriptions, written by a language model from class names (Table 7)", lacks=without_language)
def table7(paper):
    from utils.generators import LanguageModel, require_packages

    args = paper.args
    require_packages(text_model=args.text_model)
    request = args.request.read_text(encoding="utf-8") if args.request else REQUEST
    classes, path = paper.class_names, paper.folder / "image_descriptions.json"
    done = read_json(path, "", "remove it") if path.is_file() else {}
    if done.get("request") != request or done.get("text_model") != args.text_model:
        done = {"request": request, "text_model": args.text_model, "answers": {}}
    ask = None
    for i, name in enumerate(tqdm(classes, desc="descriptions", unit="class")):
        if name not in done["answers"]:
            ask = ask or LanguageModel(args.text_model, args.device)
            answer, cut_off = ask(
                request.format(count=args.descriptions_per_class, class_name=name), args.descriptions_per_class, i
            )
            done["answers"][name] = adversarial.parse_list(answer, cut_off)
            save_json(path, done)
    texts = list(dict.fromkeys(text for answers in done["answers"].values() for text in answers))
    target = paper.folder / "image_descriptions.txt"
    save_atomic(target, lambda file: file.write(("\n".join(texts) + "\n").encode()))
    naming = 100 * float(
        np.mean([adversarial.names_class(text, name) for name, texts in done["answers"].items() for text in texts] or [0])
    )
    rows = [
        Row(
            f"descriptions in {target.name} (use it with --text_descriptions {here(target)})", len(texts), unit="", n=len(classes)
        )
    ]
    return [*rows, Row("of these, name their class", naming, n=len(texts))], []
