"""Compares the results of run_demo.py with the truth of the world; writes results.json, results.md and figures.

    python -m demo.measure --output_dir demo/output

Every measure stands beside its chance level. What is true of a picture is read from the world's .jsonl files, never from the
method's output.
"""

import argparse
import csv
import json
import shutil
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import scipy.sparse
from PIL import Image

from demo import attack_table
from demo.figures import markdown_table, plot_concepts, plot_grid, plot_segmentations
from demo.layout import (
    ATTACK_LAYERS,
    ATTACK_SOURCES,
    ATTACKS,
    COMPONENTS,
    HERE,
    LAYERS,
    MODEL,
    NAMES,
    OPACITY,
    SEGMENTERS,
    WEIGHTS,
    attack_pairs,
    attack_result,
    results_of,
    segmentation_result,
)
from demo.truth import true_of
from demo.world import COLOURS, TEXTURES, articles, parse
from utils.ablation import ABLATIONS
from utils.concepts import concepts_of_images, word_scores
from utils.data.images import Loader, load_images
from utils.data.text_sets import load_texts
from utils.figures import save_figure
from utils.model.clip import load_clip
from utils.neurons import NeuronLayer
from utils.prs import second_order
from utils.runtime.files import save_json
from utils.runtime.passes import pieces_of, walk

TOP_NEURONS, TOP_PICTURES = 100, 20
TOP_WORDS = 5  # discovered words of a picture that count
EVERY = 4  # of the held-out pictures is asked for its concepts
TOGETHER = f"{ATTACK_LAYERS[0]} to {ATTACK_LAYERS[-1]} together"
JUDGES = {"the CLIP's similarity": "", "the truth": "_truth"}  # of which texts fit a picture, as in the files' names
TITLES = {"single": "one symbol", "two": "two symbols, the class of each in turn"}


class Tree:
    """The results of one tree of class folders (symbols or pairs) with one text set, and the truth of its pictures."""

    def __init__(self, out, name, text_set="words"):
        self.name, self.text_set, self.world = name, text_set, out / "world"
        self.results = results_of(out, name)
        self.texts, vectors, _ = load_texts(self.results, text_set, self.world, partial(load_clip, MODEL, WEIGHTS, "cpu"))
        self.text_vectors = vectors / 100
        self.class_names = (self.world / name / "class_names.txt").read_text().splitlines()

    def load(self, kind, **names):
        """An array of an earlier stage."""
        return self.results.load(kind, **names, **NAMES)

    def path(self, kind, **names):
        """Path of any result."""
        return self.results.path(kind, **names, **NAMES)

    def truth(self, split):
        """A dict per picture, in the order of the representations."""
        return [json.loads(line) for line in (self.world / self.name / f"{split}.jsonl").read_text().splitlines()]

    def statistic(self, layer, kind):
        """What the stages found for the neurons of a layer on the train split."""
        return self.load(kind, layer=layer)

    def decomposition(self, layer):
        """csc matrix [N, texts]."""
        return scipy.sparse.load_npz(self.path("decomposition", layer=layer, texts=self.text_set).with_suffix(".npz"))

    def accuracies(self):
        """{layer: {ablation: per cent}} of the ablations, and with effects rebuilt from their descriptions."""
        table = _accuracy(self.path("ablations", split="val", layer=LAYERS))
        rebuilt = _accuracy(self.path("evaluation", layer=LAYERS, texts="words"))
        return {layer: row | {f"rebuilt from {COMPONENTS} texts": rebuilt[layer]} for layer, row in table.items()}

    def projections(self, layer):
        """<phi_n - mean_n, r_n> of every train picture and neuron: [images, N]."""
        pcas = self.statistic(layer, "pca")
        heads = np.einsum("keo,no->kne", self.statistic(layer, "outputs"), pcas)
        along = (self.statistic(layer, "values") * heads).sum(axis=-1)
        C = self.statistic(layer, "coefficients")
        values = np.einsum("ikn,kn->in", C, along) + self.statistic(layer, "bias") @ pcas.T
        return values - values.mean(axis=0)


def _accuracy(path):
    return json.loads(path.read_text())["accuracy"]


# ---------------------------------------------------------------------------------------------------------------------
# What was found


def zero_shot(symbols, pairs):
    """Accuracies of the CLIP itself: {what: (per cent, chance)}."""
    backgrounds = [symbols.texts.index(f"{colour} background") for colour in COLOURS]
    colours = (COLOURS, symbols.text_vectors[backgrounds].T)
    by_symbol, by_pair = ((tree.class_names, tree.load("classifier")) for tree in (symbols, pairs))

    def single(p):
        return p["companion"] is None and not p["flaw"]

    return {
        "symbol, one symbol": accuracy(symbols, "val", by_symbol, named="symbol", chosen=single),
        "symbol, habits broken": accuracy(symbols, "val_broken", by_symbol, named="symbol", chosen=single),
        "background colour": accuracy(symbols, "val", colours, named="background", chosen=single),
        "colour and symbol of the larger of two": accuracy(pairs, "val", by_pair, named="pair"),
    }


def accuracy(tree, split, classes, named, chosen=lambda p: True):
    """(per cent, chance) of the chosen pictures. classes: (names, vectors [D, names]). named: what the truth calls the class."""
    names, vectors = classes
    rows = zip(tree.load("representations", split=split), tree.truth(split), strict=True)
    right = [np.argmax(x @ vectors) == names.index(p[named]) for x, p in rows if chosen(p)]
    return 100 * float(np.mean(right)), 100 / len(names)


def won_back(pairs):
    """What the first components win back of what ablating all effects costs, of the same pictures:
    {layer: {"loss", "short": (points, standard error), "won back": per cent of the loss}}; short: of the baseline. A loss of less
    than twice its error is no loss, and None is won back of it."""
    labels = np.array([pairs.class_names.index(p["pair"]) for p in pairs.truth("val")])
    right = 100.0 * (pairs.load("predictions", split="val", layer=LAYERS) == labels[:, None, None])  # [pictures, layers, 5]
    names = ("baseline", "without all effects", "reconstructed from PC")
    baseline, without, rebuilt = (right[..., ABLATIONS.index(name)] for name in names)  # [pictures, layers] each
    rows = {}
    for i, layer in enumerate(LAYERS):
        differences = {"loss": baseline[:, i] - without[:, i], "short": baseline[:, i] - rebuilt[:, i]}
        row = {name: (float(d.mean()), float(d.std() / np.sqrt(len(d)))) for name, d in differences.items()}
        (loss, error), (short, _) = row["loss"], row["short"]
        rows[layer] = {**row, "won back": 100 * (1 - short / loss) if loss > 2 * error else None}
    return rows


def grades(symbols):
    """How well each side of the descriptions predicts effects on held-out pictures, by the judge of which texts fit a picture:
    {judge: {layer: {row: {measure: {"mean", "error", ...}}}}}."""
    paths = {
        judge: symbols.path("graded", split="val", layer=LAYERS, texts="words", judge=name) for judge, name in JUDGES.items()
    }
    return {judge: json.loads(path.read_text())["neurons"] for judge, path in paths.items()}


def descriptions(symbols):
    """How often a neuron's strongest text is true of its top pictures: {layer: (share, share of a random text, ratio)}."""
    table = true_of(symbols.texts, symbols.truth("train"))
    rows = {}
    for layer in LAYERS:
        matrix = symbols.decomposition(layer).tocsr()
        projections = symbols.projections(layer)
        largest = np.argsort(-symbols.statistic(layer, "norm").mean(axis=1))[:TOP_NEURONS]
        named, chance = [], []
        for n in largest:
            row = matrix[n]
            best = np.argmax(np.abs(row.data))
            side = np.sign(row.data[best])
            top = np.argsort(-side * projections[:, n])[:TOP_PICTURES]
            named.append(table[row.indices[best], top].mean())
            chance.append(table[:, top].mean())
        rows[layer] = (float(np.mean(named)), float(np.mean(chance)), float(np.mean(named) / np.mean(chance)))
    return rows


class Discovered:
    """The concepts that the active neurons of held-out pictures stand for.

    tree: whose pictures.
    layers: {layer: NeuronLayer}.

    Attributes: pictures, their truth; images, the same as files; words {row of the table: [(word, score), ...] for each picture},
    a row for each layer, and one for the active neurons of the last layers together.
    """

    def __init__(self, tree, layers):
        clip = layers[LAYERS[0]].clip
        self.texts, self.pictures = tree.texts, tree.truth("val")[::EVERY]
        self.images = load_images("folder", tree.world / tree.name, "val", clip.transform, subsample=EVERY)
        found, directions = {layer: [] for layer in layers}, [neurons.directions for neurons in layers.values()]
        for _, pixels in walk(pieces_of(len(self.images), 64), Loader(self.images), "concepts"):
            _, effects = second_order(clip.vit, pixels, directions)
            for (layer, neurons), phi in zip(layers.items(), effects, strict=True):
                thresholds = neurons.statistics.thresholds
                found[layer] += concepts_of_images(phi, neurons.centred_norms, thresholds, neurons.descriptions)
        self.words = {layer: [concepts.words for concepts in found[layer]] for layer in layers}
        self.words[TOGETHER] = []
        for of_picture in zip(*(found[layer] for layer in ATTACK_LAYERS), strict=True):
            active = list(zip(ATTACK_LAYERS, of_picture, strict=True))
            described = [layers[layer].descriptions[n] for layer, concepts in active for n in concepts.neurons]
            norms = [norm for _, concepts in active for norm in concepts.norms]
            self.words[TOGETHER].append(word_scores(described, dict(enumerate(norms))))

    def table(self):
        """How often the strongest words are true of their picture: {row: (share, share of random texts, ratio)}."""
        truth = true_of(self.texts, self.pictures)
        row_of = {text: row for row, text in enumerate(self.texts)}
        chance = truth.mean()
        table = {}
        for name, words in self.words.items():
            hits = [truth[row_of[word], i] for i, found in enumerate(words) for word, _ in found[:TOP_WORDS]]
            share = sum(hits) / (TOP_WORDS * len(words))  # a word that is missing counts as wrong
            table[name] = (float(share), float(chance), float(share / chance))
        return table


def habit_texts(texts, symbols):
    """What a habit may be, and the texts that speak of it: {kind: {value: rows of the texts}}.

    Of backgrounds speak the texts that name no symbol: of a colour or a texture those that name it, whatever else they say; of
    both ("striped green") those that name one of them or both, and no other. Of a companion speak those that name nothing else.
    """
    said = [parse(text) for text in texts]
    grounds = [(t, s["background"], s["texture"]) for t, s in enumerate(said) if not s["things"]]
    named = [
        (t, s["things"][0]["symbol"])
        for t, s in enumerate(said)
        if len(s["things"]) == 1 and not s["background"] and not s["texture"]
    ]
    return {
        "background": {c: [t for t, colour, _ in grounds if colour == c] for c in COLOURS},
        "texture": {x: [t for t, _, texture in grounds if texture == x] for x in TEXTURES},
        "texture and background": {
            f"{x} {c}": [t for t, b, y in grounds if (b or y) and b in (None, c) and y in (None, x)]
            for x in TEXTURES
            for c in COLOURS
        },
        "companion": {s: [t for t, symbol in named if symbol == s] for s in symbols},
    }


def habits(symbols, described, layers=ATTACK_LAYERS):
    """Where the second-order direction towards a symbol ranks its habit: {kind: its row of the table}.

    A background scores what the texts that speak of it score (`text_scores`). Equal scores share their ranks.
    auc: the share of the others that rank below the habit.
    auc_without: the same habits, ranked by the directions of the symbols that have no habit of the kind.
    auc_texts: with <text, v> as the score, without any neuron.

    symbols: `Tree` with the symbols' names among its texts. described: `Tree` whose texts are ranked.
    """
    known = json.loads((symbols.world / "habits.json").read_text())
    by_neurons, by_texts = text_scores(symbols, described, known["symbols"], layers)

    def auc(scores, rows, pairs):
        ranks = [rank_of(scores[name], rows, value, name) for name, value in pairs]
        return float(np.mean([(of - rank) / (of - 1) for rank, of in ranks]))

    table = {}
    for kind, rows in habit_texts(described.texts, known["symbols"]).items():
        if not any(rows.values()):  # a set of texts about backgrounds alone
            continue
        own = {name: habit_of(habit, kind) for name, habit in known["habits"].items() if habit_of(habit, kind)}
        ranks = {name: rank_of(by_neurons[name], rows, value, name) for name, value in own.items()}
        without = [(name, value) for value in own.values() for name in known["symbols"] if name not in own and name != value]
        of = ranks[next(iter(own))][1]
        table[kind] = {
            "symbols": {name: (value, ranks[name][0]) for name, value in own.items()},
            "of": of,
            "mean_rank": float(np.mean([rank for rank, _ in ranks.values()])),
            "chance_rank": (of + 1) / 2,
            "auc": auc(by_neurons, rows, own.items()),
            "chance_deviation": float(np.sqrt((of**2 - 1) / 12 / len(own)) / (of - 1)),
            "auc_without": auc(by_neurons, rows, without),
            "auc_texts": auc(by_texts, rows, own.items()),
        }
    return table


def text_scores(symbols, described, names, layers):
    """Scores of all texts for each symbol, by neurons and by the texts alone: two {symbol: [texts]}.

    Neurons are taken by |<r_n, v>| with v the symbol's text against the mean of all symbols, as for adversarial images; every
    text of their descriptions scores coefficient * <r_n, v>. By the texts alone one scores <text, v>.
    """
    vectors = symbols.text_vectors[[symbols.texts.index(name) for name in names]]
    r = np.concatenate([described.statistic(layer, "pca") for layer in layers])
    matrix = scipy.sparse.vstack([described.decomposition(layer) for layer in layers]).tocsr()
    texts = described.text_vectors - described.text_vectors.mean(axis=0)
    by_neurons, by_texts = {}, {}
    for name, v in zip(names, vectors - vectors.mean(axis=0), strict=True):
        along = r @ v
        chosen = np.argsort(-np.abs(along))[:TOP_NEURONS]
        by_neurons[name], by_texts[name] = matrix[chosen].T @ along[chosen], texts @ v
    return by_neurons, by_texts


def habit_of(habit, kind):
    """What a symbol's habit says of a kind; None when nothing."""
    if kind == "texture and background":
        return f"{habit['texture']} {habit['background']}" if "background" in habit else None
    return habit.get(kind)


def rank_of(scores, texts, value, symbol):
    """Rank of a value by the sum of its texts' scores, and among how many; a symbol is no companion of itself."""
    total = {x: scores[rows].sum() for x, rows in texts.items() if x != symbol}
    larger, equal = (sum(bool(compare(total[x], total[value])) for x in total) for compare in (np.greater, np.equal))
    return 1 + larger + (equal - 1) / 2, len(total)


def segmentation(out):
    """{set: {row: scores in per cent}}."""
    files = {scenes: {row: segmentation_result(out, scenes, row) for row in SEGMENTERS} for scenes in TITLES}
    return {scenes: {row: json.loads(file.read_text())["scores"] for row, file in rows.items()} for scenes, rows in files.items()}


def adversarial(out):
    """Success rates of the attacks by command line: {"class_1 for class_0": one rate for each source of words}."""
    return {
        f"{class_1} for {class_0}": [
            json.loads(attack_result(out, class_0, class_1, source).read_text())["argmax_rate"] for source in ATTACK_SOURCES
        ]
        for class_0, class_1 in attack_pairs(out / "world")[:ATTACKS]
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def report(results):
    """The lines of results.md."""
    strongest = "strongest text true of the top pictures, layer"
    discovered = f"discovered: the {TOP_WORDS} strongest words true of the picture, layer"
    tables = [
        table_of_accuracies(results["zero_shot"]),
        *(table_of_ablations(name, results[f"ablations_{name}"]) for name in ("pairs", "symbols")),
        table_of_losses(results["won_back"]),
        table_of_grades(results["grades"]),
        table_of_shares([strongest, "share", "random text", "ratio"], results["descriptions"]),
        table_of_habits(results["habits"]),
        table_of_shares([discovered, "share", "random texts", "ratio"], results["concepts"]),
        *(table_of_segmentation(TITLES[scenes], rows) for scenes, rows in results["segmentation"].items()),
        attack_table.markdown(results["attack_table"]),
    ]
    return ["# The embedded world", *(line for table in tables for line in ("", *table))]


def table_of_accuracies(accuracies):
    rows = [[what, f"{value:.1f}", f"{chance:.1f}"] for what, (value, chance) in accuracies.items()]
    return markdown_table(["the small CLIP, zero-shot", "accuracy %", "chance %"], rows)


def table_of_ablations(name, table):
    columns = list(next(iter(table.values())))
    rows = [[layer, *(f"{row[column]:.1f}" for column in columns)] for layer, row in table.items()]
    return markdown_table([f"accuracy on {name} %, layer", *columns], rows)


def table_of_losses(table):
    rows = []
    for layer, row in table.items():
        share = "no loss" if row["won back"] is None else f"{row['won back']:.0f}"
        rows.append([layer, *(f"{points:.1f} ± {error:.1f}" for points, error in (row["loss"], row["short"])), share])
    columns = ["points on pairs, layer", "cost of ablating all effects", "left when reconstructed from PC", "won back %"]
    return markdown_table(columns, rows)


def table_of_grades(grades):
    """Mean correlations; "without": without the neuron's own effect on the picture's representation."""
    shown = {
        "fires_on": "fires on",
        "one_fired_on": "its first text",
        "wpmi": "soft-WPMI label",
        "null_fires_on": "of another neuron",
    }
    shown |= {"writes": "writes", "direction": "component itself", "null_writes": "of another neuron"}
    rows = []
    for judge, layers in grades.items():
        for measure, name in (("pearson", judge), ("pearson_without", f"{judge}, without own effect")):
            for layer, table in layers.items():
                cells = [f"{table[row][measure]['mean']:.3f}" if measure in table.get(row, ()) else "" for row in shown]
                rows += [[f"{layer}, {name}", *cells]] if any(cells) else []
    return markdown_table(["correlation with the effect on held-out pictures, layer and judge", *shown.values()], rows)


def table_of_shares(columns, table):
    rows = [[name, f"{share:.3f}", f"{chance:.3f}", f"{ratio:.1f}"] for name, (share, chance, ratio) in table.items()]
    return markdown_table(columns, rows)


def table_of_habits(habits):
    columns = ["the symbol's habit among all of its kind", "text set", "mean rank", "chance", "AUC", "chance"]
    columns += ["AUC for symbols without it", "AUC of texts alone"]
    rows = []
    for text_set, kinds in habits.items():
        for kind, row in kinds.items():
            ranks = [f"{row['mean_rank']:.2f} of {row['of']}", row["chance_rank"]]
            aucs = [f"{row['auc']:.2f}", f"0.50 ± {row['chance_deviation']:.2f}"]
            aucs += [f"{row['auc_without']:.2f}", f"{row['auc_texts']:.2f}"]
            rows.append([f"{kind}, {len(row['symbols'])} symbols", text_set, *ranks, *aucs])
    return markdown_table(columns, rows)


def table_of_segmentation(title, rows):
    columns = {"PixAcc": "pixel_accuracy", "mIoU": "mIoU", "mAP": "mAP"}
    cells = [[name, *(f"{row[key]:.1f}" for key in columns.values())] for name, row in rows.items()]
    return markdown_table([f"segmentation, {title}", *columns], cells)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def load_layers(symbols):
    """{layer: NeuronLayer} of the small CLIP."""
    clip = load_clip(MODEL, WEIGHTS, "cpu")
    images = load_images("folder", symbols.world / symbols.name, "train", clip.transform)
    described = {"texts": "words", "components": COMPONENTS}
    return {layer: NeuronLayer(clip, symbols.results, images, layer=layer, described=described) for layer in LAYERS}


def draw_neurons(neurons, folder, count=8):
    """The cards of the neurons with the largest effects."""
    for n in neurons.largest(count):
        save_figure(neurons.card(n), folder / f"neuron_{neurons.layer}_{n}.png")


def draw_concepts(discovered, path, count=8, words=8):
    """Some pictures with what was discovered in them; words that are true of a picture are blue."""
    rows = range(0, len(discovered.pictures), len(discovered.pictures) // count)[:count]
    examples = []
    for i in rows:
        found = discovered.words[TOGETHER][i][:words]
        truth = discovered.pictures[i]
        right = true_of([word for word, _ in found], [truth])[:, 0]
        picture = Image.open(discovered.images.samples[i][0]).convert("RGB")
        caption = "a {colour} {symbol} and a {companion_colour} {companion}" if truth["companion"] else "a {colour} {symbol}"
        caption = articles(f"{caption} on a {{texture}} {{background}} background".format(**truth))
        examples.append((picture, caption, found, right))
    title = f"Concepts of held-out pictures, MLP layers {TOGETHER} (blue: true of the picture, red: not)"
    save_figure(plot_concepts(title, examples), path)


def draw_segmentations(out, path, count=6):
    """Input, mask, prediction and heat map of the first pictures of both sets."""
    blocks = {}
    for scenes, title in TITLES.items():
        truth = [json.loads(line) for line in (out / f"world/segmentation_{scenes}.jsonl").read_text().splitlines()[:count]]
        result = segmentation_result(out, scenes, "positive")
        folder = result.with_name(result.stem + "_images")
        blocks[title] = [(p["meant"], Image.open(folder / f"{i:05d}.png")) for i, p in enumerate(truth)]
    save_figure(plot_segmentations(blocks), path)


def draw_attacks(out, path):
    """A row for each attack by command line."""
    rows = {}
    for class_0, class_1 in attack_pairs(out / "world")[:ATTACKS]:
        for source in ATTACK_SOURCES:
            result = attack_result(out, class_0, class_1, source)
            rate = json.loads(result.read_text())["argmax_rate"]
            words = {"second_order": "words of neurons", "random_words": "random words"}[source]
            title = f"{class_1} with {words}: {rate:.0f} % are taken for {class_0}"
            rows[title] = examples_of_attack(result.parent, {class_0: "C3", class_1: "C2"})
    title = f"Pale symbols (opacity {OPACITY}) in red frames fool the CLIP, in green frames they are known"
    save_figure(plot_grid(title, rows), path)


def examples_of_attack(folder, colours, count=6):
    """Pictures that fool and others, of different descriptions: [(picture, caption, colour of the frame), ...]."""
    with open(folder / "files.csv") as file:
        items = list(csv.DictReader(file))
    fooled, others = ([item for item in items if item["adversarial"] == flag] for flag in "10")
    taken = min(len(fooled), count // 2)
    shown = [items[len(items) * i // part] for items, part in ((fooled, taken), (others, count - taken)) for i in range(part)]
    examples = []
    for item in shown:
        words = textwrap.fill(item["description"].removeprefix("a photo of "), 24)
        caption = f"{words}\ntaken for: {item['predicted']}"
        examples.append((Image.open(folder / item["file"]), caption, colours.get(item["predicted"], "C7")))
    return examples


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "output", help="of run_demo.py")
    out = parser.parse_args().output_dir
    symbols, grounds, pairs = Tree(out, "symbols"), Tree(out, "symbols", "grounds"), Tree(out, "pairs")
    layers = load_layers(symbols)
    discovered = Discovered(symbols, layers)
    results = {
        "zero_shot": zero_shot(symbols, pairs),
        "ablations_pairs": pairs.accuracies(),
        "ablations_symbols": symbols.accuracies(),
        "won_back": won_back(pairs),
        "grades": grades(symbols),
        "descriptions": descriptions(symbols),
        "habits": {tree.text_set: habits(symbols, tree) for tree in (symbols, grounds)},
        "concepts": discovered.table(),
        "segmentation": segmentation(out),
        "adversarial": adversarial(out),
        "attack_table": json.loads((out / "attack_table.json").read_text())["summary"],
    }
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    draw_neurons(layers[LAYERS[-1]], figures)
    draw_concepts(discovered, figures / "concepts.png")
    draw_segmentations(out, figures / "segmentation.png")
    draw_attacks(out, figures / "adversarial.png")
    for tree in (symbols, pairs):
        picture = tree.path("ablations", split="val", layer=LAYERS).with_suffix(".png")
        shutil.copy(picture, figures / f"ablations_{tree.name}.png")
    (out / "results.md").write_text("\n".join(report(results)) + "\n")
    save_json(out / "results.json", results)


if __name__ == "__main__":
    main()
