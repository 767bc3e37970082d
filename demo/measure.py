"""Compare the results of run_demo.py with the truth of the world.

Writes results.json, results.md and figures.

    python -m demo.measure --output_dir demo/output

Every measure stands beside its chance level. What is true of a picture is read from the world's .jsonl files,
never from the method's output.
"""

import argparse
import csv
import itertools
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
    GRADED,
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
from utils.concepts import nearest_texts, sums
from utils.data.images import load_images
from utils.data.splits import Split
from utils.data.text_sets import load_texts
from utils.figures import save_figure
from utils.model.clip import load_clip
from utils.neurons import NeuronLayer
from utils.prs import second_order
from utils.runtime.files import save_json

TOP_NEURONS, TOP_PICTURES = 100, 20
TOP_WORDS = 5  # discovered words of a picture that count
EVERY = 4  # stride of the held-out pictures whose concepts are discovered
TOGETHER = f"{ATTACK_LAYERS[0]} to {ATTACK_LAYERS[-1]} together"
GRADES = {  # {set of grades: text set, judge in file names}; the judge decides which texts fit a picture
    "words": ("words", ""),
    "atoms": ("atoms", ""),
    "words, judged by the truth": ("words", "_truth"),
}
FORMS = {  # of discovered texts
    "nearest": "nearest to the representation, no neurons",
    "fires_on": "active neurons fire on",
    "writes": "active neurons write",
}
TITLES = {"single": "one symbol", "two": "two symbols, the class of each in turn"}


class Tree:
    """A `Tree` reads the results of one tree of class folders with one text set, and its truth.

    out: folder of the demo.
    name: symbols or pairs.
    text_set: name of the text set.
    """

    def __init__(self, out, name, text_set="words"):
        self.name = name
        self.text_set = text_set
        self.world = out / "world"
        self.results = results_of(out, name)
        open_clip = partial(load_clip, MODEL, WEIGHTS, "cpu")
        self.texts, vectors, _ = load_texts(self.results, text_set, self.world, open_clip)
        self.text_vectors = vectors / 100
        self.class_names = (self.world / name / "class_names.txt").read_text().splitlines()

    def load(self, kind, **names):
        """Return an array of an earlier stage."""
        return self.results.load(kind, **names, **NAMES)

    def path(self, kind, **names):
        """Return the path of any result."""
        return self.results.path(kind, **names, **NAMES)

    def truth(self, split):
        """Return a dict per picture, in the order of the representations."""
        lines = (self.world / self.name / f"{split}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def statistic(self, layer, kind):
        """Return an array of the neurons of a layer, of the train split."""
        return self.load(kind, layer=layer)

    def decomposition(self, layer):
        """Return the coefficients of the texts, csc matrix [N, texts]."""
        path = self.path("decomposition", layer=layer, texts=self.text_set)
        return scipy.sparse.load_npz(path.with_suffix(".npz"))

    def accuracies(self):
        """Return {layer: {ablation: per cent}}, also with effects rebuilt from their descriptions."""
        table = _accuracy(self.path("ablations", split="val", layer=LAYERS))
        rebuilt = _accuracy(self.path("evaluation", layer=LAYERS, texts="words"))
        for layer, row in table.items():
            row[f"rebuilt from {COMPONENTS} texts"] = rebuilt[layer]
        return table

    def projections(self, layer):
        """Return <phi_n - mean_n, r_n> of every train picture and neuron, [images, N]."""
        pcas = self.statistic(layer, "pca")
        heads = np.einsum("keo,no->kne", self.statistic(layer, "outputs"), pcas)
        along = (self.statistic(layer, "values") * heads).sum(axis=-1)
        C = self.statistic(layer, "coefficients")
        values = np.einsum("ikn,kn->in", C, along) + self.statistic(layer, "bias") @ pcas.T
        return values - values.mean(axis=0)


def _accuracy(path):
    return json.loads(path.read_text())["accuracy"]


# ------------------------------------------------------------------------------------------------------------
# What was found


def zero_shot(symbols, pairs):
    """Return the accuracies of the CLIP itself, {what: (per cent, chance)}."""
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
    """Return (per cent, chance) of the chosen pictures.

    classes: (names, vectors [D, names]).
    named: key of the class in the truth.
    """
    names, vectors = classes
    rows = zip(tree.load("representations", split=split), tree.truth(split), strict=True)
    right = [np.argmax(x @ vectors) == names.index(p[named]) for x, p in rows if chosen(p)]
    return 100 * float(np.mean(right)), 100 / len(names)


def won_back(pairs):
    """Return how much of the cost of ablating all effects the components win back, on the same pictures.

    {layer: {"loss", "short": (points, standard error), "won back": per cent of the loss}}
    loss: accuracy that ablating all effects costs.
    short: accuracy that is missing to the baseline when effects are reconstructed.
    won back: None where the loss is less than twice its error, which is no loss.
    """
    labels = np.array([pairs.class_names.index(p["pair"]) for p in pairs.truth("val")])
    predictions = pairs.load("predictions", split="val", layer=LAYERS)  # [pictures, layers, 5]
    right = 100.0 * (predictions == labels[:, None, None])
    names = ("baseline", "without all effects", "reconstructed from PC")
    baseline, without, rebuilt = (right[..., ABLATIONS.index(name)] for name in names)  # [pictures, layers]
    rows = {}
    for i, layer in enumerate(LAYERS):
        differences = {"loss": baseline[:, i] - without[:, i], "short": baseline[:, i] - rebuilt[:, i]}
        row = {name: (float(d.mean()), float(d.std() / np.sqrt(len(d)))) for name, d in differences.items()}
        loss, error = row["loss"]
        short, _ = row["short"]
        rows[layer] = {**row, "won back": 100 * (1 - short / loss) if loss > 2 * error else None}
    return rows


def grades(symbols):
    """Return what descriptions of layer GRADED say of effects on held-out pictures, and what noise says.

    {set of grades: {"neurons": {row: {measure: numbers}}, "over_noise": {side: {measure: columns}}}}.
    """
    found = {}
    for name, (texts, judge) in GRADES.items():
        path = symbols.path("graded", split="val", layer=[GRADED], texts=texts, judge=judge)
        content = json.loads(path.read_text())
        found[name] = {key: content[key][str(GRADED)] for key in ("neurons", "over_noise")}
    return found


def descriptions(symbols):
    """Return how often a neuron's strongest text is true of its top pictures.

    {layer: (share, share of a random text, ratio)}.
    """
    table = true_of(symbols.texts, symbols.truth("train"))
    rows = {}
    for layer in LAYERS:
        matrix = symbols.decomposition(layer).tocsr()
        projections = symbols.projections(layer)
        largest = np.argsort(-symbols.statistic(layer, "norm").mean(axis=1))[:TOP_NEURONS]
        named = []
        chance = []
        for n in largest:
            row = matrix[n]
            best = np.argmax(np.abs(row.data))
            side = np.sign(row.data[best])
            top = np.argsort(-side * projections[:, n])[:TOP_PICTURES]
            named.append(table[row.indices[best], top].mean())
            chance.append(table[:, top].mean())
        share = np.mean(named)
        by_chance = np.mean(chance)
        rows[layer] = (float(share), float(by_chance), float(share / by_chance))
    return rows


class Discovered:
    """A `Discovered` holds the concepts of held-out pictures, in three forms.

    tree: `Tree` of the pictures.
    layers: {layer: NeuronLayer}.

    Attributes
    texts: the texts of the tree.
    pictures: truth of the pictures.
    images: the pictures, as `Images`.
    words: {form: {row of the table: [(word, score), ...] for each picture}}. The forms are those of
        `utils.concepts`. Those with neurons have a row for each layer whose neurons are so described, and one
        for the last layers together where all of them are.
    """

    def __init__(self, tree, layers):
        clip = layers[LAYERS[0]].clip
        self.texts = tree.texts
        self.pictures = tree.truth("val")[::EVERY]
        self.images = load_images("folder", tree.world / tree.name, "val", clip.transform, subsample=EVERY)
        self.words = {"nearest": {"": []}, "fires_on": {}, "writes": {}}
        for representations, found in self._by_batch(clip, layers):
            self.words["nearest"][""] += nearest_texts(
                representations, tree.texts, tree.text_vectors, TOP_WORDS
            )
            for layer, forms in found.items():
                for form, concepts in forms.items():
                    self.words[form].setdefault(layer, []).extend(of.words for of in concepts)
        for by_layer in self.words.values():
            if by_layer.keys() >= set(ATTACK_LAYERS):
                of_layers = zip(*(by_layer[layer] for layer in ATTACK_LAYERS), strict=True)
                by_layer[TOGETHER] = [sums(itertools.chain(*of_picture)) for of_picture in of_layers]

    def _by_batch(self, clip, layers):
        """Yield the representations of a batch of pictures, and {layer: {form: `Concepts` of each}}."""
        directions = [neurons.directions for neurons in layers.values()]
        for _, pixels in Split(self.images, batch_size=64).walk("concepts"):
            representations, effects = second_order(clip.vit, pixels, directions)
            found = {}
            for (layer, neurons), phi in zip(layers.items(), effects, strict=True):
                found[layer] = neurons.concepts(phi)
            yield representations, found

    def table(self):
        """Return how often the strongest words are true of their picture.

        {form: {row: (share, share of random texts, ratio)}}.
        """
        truth = true_of(self.texts, self.pictures)
        row_of = {text: row for row, text in enumerate(self.texts)}
        chance = truth.mean()
        table = {}
        for form, rows in self.words.items():
            table[form] = {}
            for name, words in rows.items():
                strongest = [(i, word) for i, found in enumerate(words) for word, _ in found[:TOP_WORDS]]
                hits = sum(truth[row_of[word], i] for i, word in strongest)
                share = hits / (TOP_WORDS * len(words))  # a word that is missing counts as wrong
                table[form][name] = (float(share), float(chance), float(share / chance))
        return table


def habit_texts(texts, symbols):
    """Return the values that a habit may have, and the texts that speak of each: {kind: {value: rows}}.

    Texts that name no symbol speak of backgrounds. Those that name a colour or a texture speak of it,
    whatever else they say. Those that name one or both of a texture and a colour, and no other, speak of both
    ("striped green"). Texts that name one symbol and nothing else speak of a companion.
    """
    said = [parse(text) for text in texts]
    grounds = [(t, s["background"], s["texture"]) for t, s in enumerate(said) if not s["things"]]
    both = {}
    for x, c in itertools.product(TEXTURES, COLOURS):
        both[f"{x} {c}"] = [t for t, b, y in grounds if (b or y) and b in (None, c) and y in (None, x)]
    companions = {symbol: [] for symbol in symbols}
    for t, s in enumerate(said):
        if len(s["things"]) == 1 and not s["background"] and not s["texture"]:
            companions[s["things"][0]["symbol"]].append(t)
    return {
        "background": {c: [t for t, colour, _ in grounds if colour == c] for c in COLOURS},
        "texture": {x: [t for t, _, texture in grounds if texture == x] for x in TEXTURES},
        "texture and background": both,
        "companion": companions,
    }


def habits(symbols, described, layers=ATTACK_LAYERS):
    """Return where the second-order direction towards a symbol ranks its habit, {kind: row of the table}.

    The score of a background is the sum of the scores of the texts that speak of it (`text_scores`). Equal
    scores share their ranks.
    auc: share of the others that rank below the habit.
    auc_without: share for the same habits, ranked by the symbols that have no habit of the kind.
    auc_texts: share with <text, v> as the score, without any neuron.

    symbols: `Tree` with the symbols' names among its texts.
    described: `Tree` whose texts are ranked.
    layers: layers of the neurons.
    """
    known = json.loads((symbols.world / "habits.json").read_text())
    by_neurons, by_texts = text_scores(symbols, described, known["symbols"], layers)
    table = {}
    for kind, rows in habit_texts(described.texts, known["symbols"]).items():
        if not any(rows.values()):  # a set of texts about backgrounds alone
            continue
        said = {name: habit_of(habit, kind) for name, habit in known["habits"].items()}
        own = {name: value for name, value in said.items() if value}
        others = [name for name in known["symbols"] if name not in own]
        without = [(name, value) for value in own.values() for name in others if name != value]
        ranks = {name: rank_of(by_neurons[name], rows, value, name) for name, value in own.items()}
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


def auc(scores, rows, pairs):
    """Return the mean share of the other values that rank below a symbol's.

    scores: {symbol: scores of the texts}.
    rows: {value: rows of the texts}.
    pairs: [(symbol, value), ...].
    """
    ranks = [rank_of(scores[name], rows, value, name) for name, value in pairs]
    return float(np.mean([(of - rank) / (of - 1) for rank, of in ranks]))


def text_scores(symbols, described, names, layers):
    """Return the scores of all texts for each symbol, by neurons and by the texts alone.

    Both are {symbol: scores [texts]}.

    Neurons are taken by |<r_n, v>|, as for adversarial images; v is the symbol's text against the mean of all
    symbols. Every text of their descriptions scores coefficient * <r_n, v>. By the texts alone, a text scores
    <text, v>.
    """
    vectors = symbols.text_vectors[[symbols.texts.index(name) for name in names]]
    r = np.concatenate([described.statistic(layer, "pca") for layer in layers])
    matrix = scipy.sparse.vstack([described.decomposition(layer) for layer in layers]).tocsr()
    texts = described.text_vectors - described.text_vectors.mean(axis=0)
    by_neurons = {}
    by_texts = {}
    for name, v in zip(names, vectors - vectors.mean(axis=0), strict=True):
        along = r @ v
        chosen = np.argsort(-np.abs(along))[:TOP_NEURONS]
        by_neurons[name] = matrix[chosen].T @ along[chosen]
        by_texts[name] = texts @ v
    return by_neurons, by_texts


def habit_of(habit, kind):
    """Return the value of a kind in a symbol's habit, None where the habit says nothing about it."""
    if kind == "texture and background":
        return f"{habit['texture']} {habit['background']}" if "background" in habit else None
    return habit.get(kind)


def rank_of(scores, texts, value, symbol):
    """Return the rank of a value by the sum of its texts' scores, and the number of values.

    A symbol is no companion of itself.
    """
    total = {x: scores[rows].sum() for x, rows in texts.items() if x != symbol}
    larger = sum(bool(score > total[value]) for score in total.values())
    equal = sum(bool(score == total[value]) for score in total.values())
    return 1 + larger + (equal - 1) / 2, len(total)


def segmentation(out):
    """Return the scores of both segmentation sets, {set: {row: scores in per cent}}."""
    table = {}
    for scenes in TITLES:
        files = {row: segmentation_result(out, scenes, row) for row in SEGMENTERS}
        table[scenes] = {row: json.loads(file.read_text())["scores"] for row, file in files.items()}
    return table


def adversarial(out):
    """Return the success rates of the attacks by command line.

    {"class_1 for class_0": one rate for each source of words}.
    """
    table = {}
    for class_0, class_1 in attack_pairs(out / "world")[:ATTACKS]:
        files = [attack_result(out, class_0, class_1, source) for source in ATTACK_SOURCES]
        rates = [json.loads(file.read_text())["argmax_rate"] for file in files]
        table[f"{class_1} for {class_0}"] = rates
    return table


# ------------------------------------------------------------------------------------------------------------
# Tables


def report(results):
    """Return the lines of results.md."""
    strongest = "strongest text true of the top pictures, layer"
    tables = [
        table_of_accuracies(results["zero_shot"]),
        *(table_of_ablations(name, results[f"ablations_{name}"]) for name in ("pairs", "symbols")),
        table_of_losses(results["won_back"]),
        table_of_noise(results["grades"]),
        table_of_nulls(results["grades"]),
        table_of_shares([strongest, "share", "random text", "ratio"], results["descriptions"]),
        table_of_habits(results["habits"]),
        table_of_concepts(results["concepts"]),
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
        costs = [f"{points:.1f} ± {error:.1f}" for points, error in (row["loss"], row["short"])]
        rows.append([layer, *costs, share])
    columns = ["points on pairs, layer", "cost of ablating all effects"]
    columns += ["left when reconstructed from PC", "won back %"]
    return markdown_table(columns, rows)


def table_of_noise(grades):
    """Return the table of grades by number of texts, each beside the control's."""
    measures = {("fires_on", "pearson"): "fires on, correlation", ("fires_on", "auprc"): "average precision"}
    measures[("writes", "share")] = "writes, share of the component"
    rows = []
    lengths = []
    for name, of in grades.items():
        for (side, measure), title in measures.items():
            if measure not in of["over_noise"].get(side, {}):
                continue
            columns = of["over_noise"][side][measure]
            lengths = columns["texts"]
            pairs = zip(columns["grade"], columns["control"], strict=True)
            rows.append([f"{name}: {title}: texts; control", *(f"{x:.3f}; {c:.3f}" for x, c in pairs)])
            rows.append(["the same of rotated units", *(f"{x:.3f}" for x in columns["rotated"])])
            if "skill" in columns:
                rows.append(["skill", *(f"{x:.2f}" for x in columns["skill"])])
            pairs = zip(columns["better"], columns["better_by_chance"], strict=True)
            rows.append(
                ["better than noise, % (by chance)", *(f"{100 * x:.0f} ({100 * c:.0f})" for x, c in pairs)]
            )
    return markdown_table([f"layer {GRADED}, by number of texts", *lengths], rows)


def table_of_nulls(grades):
    """Return the table of grades of whole descriptions, beside their controls and nulls; the CLIP judges."""
    shown = {
        "fires_on": "8 texts that the neuron fires on",
        "one_fired_on": "the first of these texts",
        "wpmi": "its soft-WPMI label",
        "null_fires_on": "texts that another neuron fires on",
        "rotated_fires_on": "texts that rotated units fire on",
        "rotated_wpmi": "soft-WPMI labels of rotated units",
        "writes": "8 texts that it writes",
        "direction": "its component",
        "null_writes": "texts that another neuron writes",
        "rotated_writes": "texts that rotated units write",
    }
    of = grades["words"]
    controls = {"wpmi": of["over_noise"]["wpmi"]}
    controls["fires_on"] = {key: at(columns, -1) for key, columns in of["over_noise"]["fires_on"].items()}
    controls["one_fired_on"] = {key: at(columns, 0) for key, columns in of["over_noise"]["fires_on"].items()}
    rows = []
    for row, title in shown.items():
        cells = []
        for measure in ("pearson", "auprc", "pearson_without"):
            cell = f"{of['neurons'][row][measure]['mean']:.3f}"
            control = controls.get(row, {}).get(measure)
            cells.append(f"{cell}; {control['control'][0]:.3f}" if control else cell)
        rows.append([title, *cells])
    columns = ["correlation; control", "average precision; control", "correlation without own effect"]
    return markdown_table([f"layer {GRADED}, {len(shown)} ways to predict an effect", *columns], rows)


def at(columns, place):
    """Return the columns of one number of texts; what is no column is left as it is."""
    return (
        {name: values[place:][:1] for name, values in columns.items()}
        if isinstance(columns, dict)
        else columns
    )


def table_of_shares(columns, table):
    rows = []
    for name, (share, chance, ratio) in table.items():
        rows.append([name, f"{share:.3f}", f"{chance:.3f}", f"{ratio:.1f}"])
    return markdown_table(columns, rows)


def table_of_concepts(concepts):
    rows = {}
    for form, by_row in concepts.items():
        for name, found in by_row.items():
            where = f", layer {name}" if isinstance(name, int) else name and f", layers {name}"
            rows[FORMS[form] + where] = found
    title = f"discovered: the {TOP_WORDS} strongest texts true of the picture"
    return table_of_shares([title, "share", "random texts", "ratio"], rows)


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


# ------------------------------------------------------------------------------------------------------------
# Figures


def load_layers(symbols):
    """Return {layer: NeuronLayer} of the small CLIP."""
    clip = load_clip(MODEL, WEIGHTS, "cpu")
    images = load_images("folder", symbols.world / symbols.name, "train", clip.transform)
    options = {"described": {"texts": "words", "components": COMPONENTS}}
    return {
        layer: NeuronLayer(clip, symbols.results, images, layer=layer, k=NAMES["k"], **options)
        for layer in LAYERS
    }


def draw_neurons(neurons, folder, count=8):
    """Draw the cards of the neurons with the largest effects."""
    for n in neurons.largest(count):
        save_figure(neurons.card(n), folder / f"neuron_{neurons.layer}_{n}.png")


def draw_concepts(discovered, path, count=8, words=8):
    """Draw some pictures with the texts that active neurons of the last layer fire on.

    Blue where a text is true of its picture. The texts that they write where the layer has no others.
    """
    layer = LAYERS[-1]
    form = "fires_on" if layer in discovered.words["fires_on"] else "writes"
    rows = range(0, len(discovered.pictures), len(discovered.pictures) // count)[:count]
    examples = []
    for i in rows:
        found = discovered.words[form][layer][i][:words]
        truth = discovered.pictures[i]
        right = true_of([word for word, _ in found], [truth])[:, 0]
        picture = Image.open(discovered.images.samples[i][0]).convert("RGB")
        caption = "a {colour} {symbol}"
        if truth["companion"]:
            caption += " and a {companion_colour} {companion}"
        caption = articles((caption + " on a {texture} {background} background").format(**truth))
        examples.append((picture, caption, found, right))
    texts = f"texts that {FORMS[form]}, MLP layer {layer}"
    title = f"Concepts of held-out pictures: {texts} (blue: true of the picture, red: not)"
    save_figure(plot_concepts(title, examples), path)


def draw_segmentations(out, path, count=6):
    """Draw input, mask, prediction and heat map of the first pictures of both sets."""
    blocks = {}
    for scenes, title in TITLES.items():
        lines = (out / f"world/segmentation_{scenes}.jsonl").read_text().splitlines()[:count]
        truth = [json.loads(line) for line in lines]
        result = segmentation_result(out, scenes, "positive")
        folder = result.with_name(result.stem + "_images")
        blocks[title] = [(p["meant"], Image.open(folder / f"{i:05d}.png")) for i, p in enumerate(truth)]
    save_figure(plot_segmentations(blocks), path)


def draw_attacks(out, path):
    """Draw a row of pictures for each attack by command line."""
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
    """Return pictures that fool and others, of different descriptions.

    [(picture, caption, colour of the frame), ...].
    """
    with open(folder / "files.csv") as file:
        items = list(csv.DictReader(file))
    fooled, others = ([item for item in items if item["adversarial"] == flag] for flag in "10")
    taken = min(len(fooled), count // 2)
    shown = [fooled[len(fooled) * i // taken] for i in range(taken)]
    left = count - taken
    shown += [others[len(others) * i // left] for i in range(left)]
    examples = []
    for item in shown:
        words = textwrap.fill(item["description"].removeprefix("a photo of "), 24)
        caption = f"{words}\ntaken for: {item['predicted']}"
        examples.append((Image.open(folder / item["file"]), caption, colours.get(item["predicted"], "C7")))
    return examples


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--output_dir", type=Path, default=HERE / "output", help="of run_demo.py")
    out = parser.parse_args().output_dir
    symbols = Tree(out, "symbols")
    grounds = Tree(out, "symbols", "grounds")
    pairs = Tree(out, "pairs")
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
