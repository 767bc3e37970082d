"""Compares the results of `run_demo.py` with the truth of the world; writes results.json, results.md and figures.

    python demo/measure.py --output_dir demo/output

Every measure stands beside its chance level. What is true of a picture is read from the world's .jsonl files, never from the
method's output.
"""

import argparse
import csv
import json
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import scipy.sparse
from PIL import Image
from world import COLOURS, TEXTURES, articles, parse

sys.path.insert(0, str(Path(__file__).parent.parent))
from attack_table import markdown  # noqa: E402
from run_demo import (  # noqa: E402
    ATTACK_LAYERS,
    ATTACKS,
    CLIP,
    COMPONENTS,
    LAYERS,
    OPACITY,
    attack_pairs,
    attack_result,
    decomposition_name,
    evaluation_result,
    segmentation_result,
)

from utils.ablation import ABLATIONS  # noqa: E402
from utils.artifacts import Names, save_json  # noqa: E402
from utils.clip import load_clip  # noqa: E402
from utils.concepts import concepts_of_images  # noqa: E402
from utils.datasets import batches, load_images  # noqa: E402
from utils.neurons import NeuronLayer  # noqa: E402
from utils.prs import CentredNorms  # noqa: E402
from utils.rows import row_pieces  # noqa: E402
from utils.visualization import plot_concepts, plot_grid, plot_segmentations, save_figure  # noqa: E402

HERE = Path(__file__).parent
TOP_NEURONS, TOP_PICTURES = 100, 20
TOP_WORDS = 5  # discovered words of a picture that count
EVERY = 4  # of the held-out pictures is asked for its concepts


class Results:
    """The files of one tree of class folders (symbols or pairs) and one text set, and the truth of its pictures."""

    def __init__(self, out, tree, text_set="words"):
        self.directory, self.world = out / tree, out / "world"
        self.tree, self.text_set = tree, text_set
        self.texts = (self.directory / f"{text_set}_{CLIP}.txt").read_text().splitlines()
        self.text_vectors = self.array(f"{text_set}_{CLIP}.npy") / 100

    def array(self, name):
        return np.load(self.directory / name)

    def truth(self, split):
        """A dict per picture, in the order of the representations."""
        return [json.loads(line) for line in (self.world / self.tree / f"{split}.jsonl").read_text().splitlines()]

    def statistic(self, layer, part):
        return self.array(f"folder_train_mlps_{CLIP}_{layer}_{part}.npy")

    def decomposition(self, layer):
        """csc matrix [N, texts]."""
        return scipy.sparse.load_npz(self.directory / decomposition_name(layer, self.text_set))

    def projections(self, layer):
        """<phi_n - mean_n, r_n> of every train picture and neuron: [images, N]."""
        C = self.statistic(layer, "coefficients")
        heads = np.einsum("keo,no->kne", self.statistic(layer, "outputs"), self.statistic(layer, "100_pca"))
        along = (self.statistic(layer, "values") * heads).sum(axis=-1)
        values = np.einsum("ikn,kn->in", C, along) + self.statistic(layer, "bias") @ self.statistic(layer, "100_pca").T
        return values - values.mean(axis=0)


def true_of(texts, pictures):
    """Which texts are true of which pictures, bool [texts, pictures]: all that a text names has to be there.

    A text that names a symbol or a pair is true of a picture with it, large or small; one of a background, of that background;
    a lone colour, of a picture where a symbol or the background has it.
    """
    table = np.zeros((len(texts), len(pictures)), bool)
    facts = []
    for p in pictures:
        things = {(p["symbol"], p["colour"])} | ({(p["companion"], p["companion_colour"])} if p["companion"] else set())
        facts.append((things, {s for s, _ in things}, p["background"], p["texture"], {c for _, c in things} | {p["background"]}))
    for t, text in enumerate(texts):
        said = parse(text)
        colour = text if text in COLOURS else None
        for i, (things, symbols, background, texture, colours) in enumerate(facts):
            table[t, i] = (
                all((x["symbol"], x["colour"]) in things if x["colour"] else x["symbol"] in symbols for x in said["things"])
                and said["background"] in (None, background)
                and said["texture"] in (None, texture)
                and (colour is None or colour in colours)
            )
    return table


def zero_shot(symbols, pairs):
    """Accuracies of the CLIP itself: {what: (per cent, chance)}."""
    rows = {}

    def accuracy(results, split, chosen, classes, label):
        representations = results.array(f"folder_{split}_representations_{CLIP}.npy")
        pictures = results.truth(split)
        keep = [i for i, p in enumerate(pictures) if chosen(p)]
        right = [np.argmax(representations[i] @ classes[1]) == classes[0].index(label(pictures[i])) for i in keep]
        return 100 * float(np.mean(right)), 100 / len(classes[0])

    def classifier(results):
        names = (results.world / results.tree / "class_names.txt").read_text().splitlines()
        return names, results.array(f"folder_classifier_{CLIP}.npy")

    backgrounds = [symbols.texts.index(f"{colour} background") for colour in COLOURS]
    colours = (COLOURS, symbols.text_vectors[backgrounds].T)

    def single(p):
        return p["companion"] is None and not p["flaw"]

    by_symbol, by_pair = classifier(symbols), classifier(pairs)
    rows["symbol, one symbol"] = accuracy(symbols, "val", single, by_symbol, lambda p: p["symbol"])
    rows["symbol, habits broken"] = accuracy(symbols, "val_broken", single, by_symbol, lambda p: p["symbol"])
    rows["background colour"] = accuracy(symbols, "val", single, colours, lambda p: p["background"])
    rows["colour and symbol of the larger of two"] = accuracy(pairs, "val", lambda p: True, by_pair, lambda p: p["pair"])
    return rows


def won_back(results):
    """What the first components win back of what ablating all effects costs, of the same pictures:
    {layer: {"loss", "short": (points, standard error), "won back": per cent of the loss}}; short: of the baseline. A loss of less
    than twice its error is no loss, and None is won back of it."""
    file = f"folder_val_ablations_{CLIP}_{'-'.join(LAYERS)}_100_predictions.npy"
    classes = (results.world / results.tree / "class_names.txt").read_text().splitlines()
    labels = np.array([classes.index(p["pair"]) for p in results.truth("val")])
    right = 100.0 * (results.array(file) == labels[:, None, None])  # [pictures, layers, 5]
    names = ("baseline", "without all effects", "reconstructed from PC")
    baseline, without, rebuilt = (right[..., ABLATIONS.index(name)] for name in names)  # [pictures, layers] each
    rows = {}
    for i, layer in enumerate(LAYERS):
        differences = {"loss": baseline[:, i] - without[:, i], "short": baseline[:, i] - rebuilt[:, i]}
        row = {name: (float(d.mean()), float(d.std() / np.sqrt(len(d)))) for name, d in differences.items()}
        (loss, error), (short, _) = row["loss"], row["short"]
        rows[layer] = {**row, "won back": 100 * (1 - short / loss) if loss > 2 * error else None}
    return rows


def descriptions(results):
    """How often a neuron's strongest text is true of its top pictures: {layer: (share, share of a random text, ratio)}."""
    table = true_of(results.texts, results.truth("train"))
    rows = {}
    for layer in LAYERS:
        matrix = results.decomposition(layer).tocsr()
        projections = results.projections(layer)
        largest = np.argsort(-results.statistic(layer, "100_norm").mean(axis=1))[:TOP_NEURONS]
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


class Concepts:
    """The concepts that the active neurons of held-out pictures stand for.

    Attributes: pictures, their truth; images, the same as files; words {row of the table: [(word, score), ...] for each picture},
    a row for each layer, and one for the last layers together, whose scores are added.
    """

    def __init__(self, results, layers):
        """layers: {layer: NeuronLayer}."""
        self.texts, self.pictures = results.texts, results.truth("val")[::EVERY]
        transform = next(iter(layers.values())).clip.transform
        self.images = load_images("folder", results.world / results.tree, "val", transform, subsample=EVERY)
        self.words = {layer: [] for layer in layers}
        norms = {layer: CentredNorms(neurons.directions, neurons.statistics.mean) for layer, neurons in layers.items()}
        for _, _, pixels, _ in batches(self.images, list(enumerate(row_pieces(len(self.images), 64))), description="concepts"):
            for layer, neurons in layers.items():
                thresholds, directions = neurons.statistics.thresholds, neurons.directions
                found = concepts_of_images(
                    neurons.vit, pixels, directions, norms[layer], thresholds, neurons.descriptions, neurons.coefficient
                )
                self.words[layer] += [concepts.words for concepts in found]
        together = zip(*(self.words[layer] for layer in ATTACK_LAYERS), strict=True)
        self.together = f"{ATTACK_LAYERS[0]} to {ATTACK_LAYERS[-1]} together"
        self.words[self.together] = [add_scores(words) for words in together]

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


def add_scores(lists):
    """Word scores of several layers as one: lists of [(word, score), ...] -> [(word, score), ...] by falling score."""
    total = {}
    for words in lists:
        for word, score in words:
            total[word] = total.get(word, 0.0) + score
    return sorted(total.items(), key=lambda item: (-item[1], item[0]))


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

    Neurons are taken by |<r_n, v>| with v the symbol's text against the mean of all symbols, as for adversarial images; every
    text of their descriptions scores coefficient * <r_n, v>, and a background scores what the texts that speak of it score. Equal
    scores share their ranks. auc: the share of the others that rank below the habit. auc_without: the same habits ranked by the
    directions of the symbols that have no habit of the kind. auc_texts: with <text, v> as the score, without any neuron.

    symbols: `Results` with the symbols' names among its texts. described: `Results` whose texts are ranked.
    """
    known = json.loads((symbols.world / "habits.json").read_text())
    names = known["symbols"]
    vectors = symbols.text_vectors[[symbols.texts.index(name) for name in names]]
    r = np.concatenate([described.statistic(layer, "100_pca") for layer in layers])
    matrix = scipy.sparse.vstack([described.decomposition(layer) for layer in layers]).tocsr()
    texts = described.text_vectors - described.text_vectors.mean(axis=0)
    by_neurons, by_texts = {}, {}  # scores of all texts, for each symbol
    for name, v in zip(names, vectors - vectors.mean(axis=0), strict=True):
        along = r @ v
        chosen = np.argsort(-np.abs(along))[:TOP_NEURONS]
        by_neurons[name], by_texts[name] = matrix[chosen].T @ along[chosen], texts @ v

    def habit_of(name, kind):
        habit = known["habits"].get(name, {})
        if kind == "texture and background":
            return f"{habit['texture']} {habit['background']}" if "background" in habit else None
        return habit.get(kind)

    def auc(scores, rows, pairs):
        ranks = [rank_of(scores[name], rows, value, name) for name, value in pairs]
        return float(np.mean([(of - rank) / (of - 1) for rank, of in ranks]))

    table = {}
    for kind, rows in habit_texts(described.texts, names).items():
        if not any(rows.values()):  # a set of texts about backgrounds alone
            continue
        own = {name: habit_of(name, kind) for name in names if habit_of(name, kind)}
        ranks = {name: rank_of(by_neurons[name], rows, value, name) for name, value in own.items()}
        without = [(name, value) for value in own.values() for name in names if name not in own and name != value]
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


def rank_of(scores, texts, value, symbol):
    """Rank of a value by the sum of its texts' scores, and among how many; a symbol is no companion of itself."""
    total = {x: scores[rows].sum() for x, rows in texts.items() if x != symbol}
    larger, equal = (sum(bool(compare(total[x], total[value])) for x in total) for compare in (np.greater, np.equal))
    return 1 + larger + (equal - 1) / 2, len(total)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def load_layers(results):
    """{layer: NeuronLayer} of the small CLIP."""
    weights = str(HERE / "symbols-vit.safetensors")
    clip = load_clip(str(HERE / "symbols-vit.json"), weights, "cpu")
    images = load_images("folder", results.world / results.tree, "train", clip.transform)
    names = Names(results.directory, "symbols-vit.json", weights)
    return {layer: NeuronLayer(clip, names, images, "folder", int(layer), "words", COMPONENTS) for layer in LAYERS}


def draw_neurons(neurons, folder, count=8):
    """The cards of the neurons with the largest effects."""
    for n in neurons.largest(count):
        save_figure(neurons.card(n), folder / f"neuron_{neurons.layer}_{n}.png")


def draw_concepts(concepts, path, count=8, words=8):
    """Some pictures with what was discovered in them; words that are true of a picture are blue."""
    rows = range(0, len(concepts.pictures), len(concepts.pictures) // count)[:count]
    examples = []
    for i in rows:
        found = concepts.words[concepts.together][i][:words]
        truth = concepts.pictures[i]
        right = true_of([word for word, _ in found], [truth])[:, 0]
        picture = Image.open(concepts.images.samples[i][0]).convert("RGB")
        caption = "a {colour} {symbol} and a {companion_colour} {companion}" if truth["companion"] else "a {colour} {symbol}"
        caption = articles(f"{caption} on a {{texture}} {{background}} background".format(**truth))
        examples.append((picture, caption, found, right))
    title = f"Concepts of held-out pictures, MLP layers {concepts.together} (blue: true of the picture, red: not)"
    save_figure(plot_concepts(title, examples), path)


def draw_segmentations(out, path, count=6):
    """Input, mask, prediction and heat map of the first pictures of both sets."""
    blocks = {}
    for scenes, title in (("single", "one symbol"), ("two", "two symbols, the class of each in turn")):
        truth = [json.loads(line) for line in (out / f"world/segmentation_{scenes}.jsonl").read_text().splitlines()[:count]]
        result = segmentation_result(out, scenes, "positive")
        folder = result.with_name(result.stem + "_images")
        blocks[title] = [(p["meant"], Image.open(folder / f"{i:05d}.png")) for i, p in enumerate(truth)]
    save_figure(plot_segmentations(blocks), path)


def draw_attacks(out, path, count=6):
    """For each attack by command line, the first pictures that fool and the first that do not."""
    rows = {}
    for class_0, class_1 in attack_pairs(out / "world")[:ATTACKS]:
        colours = {class_0: "C3", class_1: "C2"}
        for source in ("second_order", "random"):
            result = attack_result(out, class_0, class_1, source)
            with open(result.with_name("files.csv")) as file:
                items = list(csv.DictReader(file))
            fooled, others = ([item for item in items if item["adversarial"] == flag] for flag in "10")
            shown = fooled[: count // 2]
            shown += others[: count - len(shown)]
            rate = json.loads(result.read_text())["success_rate"]
            title = f"{class_1} with {source.replace('_', '-')} words: {rate:.0f} % are taken for {class_0}"
            rows[title] = []
            for item in shown:
                words = textwrap.fill(item["description"].removeprefix("a photo of "), 24)
                picture = Image.open(result.parent / item["file"])
                rows[title].append((picture, f"{words}\ntaken for: {item['predicted']}", colours.get(item["predicted"], "C7")))
    title = f"Pale symbols (opacity {OPACITY}) in red frames fool the CLIP, in green frames they are known"
    save_figure(plot_grid(title, rows), path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "output")
    out = parser.parse_args().output_dir
    symbols, pairs = Results(out, "symbols"), Results(out, "pairs")
    lines = ["# The embedded world", "", "| the small CLIP, zero-shot | accuracy % | chance % |", "|---|---|---|"]
    results = {"zero_shot": zero_shot(symbols, pairs)}
    lines += [f"| {what} | {value:.1f} | {chance:.1f} |" for what, (value, chance) in results["zero_shot"].items()]
    for name, tree in (("pairs", pairs), ("symbols", symbols)):
        file = f"folder_val_ablations_{CLIP}_{'-'.join(LAYERS)}_100.json"
        table = json.loads((tree.directory / file).read_text())["accuracy"]
        rebuilt = json.loads(evaluation_result(out, name).read_text())["accuracy"]
        for layer, row in table.items():
            row[f"rebuilt from {COMPONENTS} texts"] = rebuilt[layer]
        results[f"ablations_{name}"] = table
        columns = list(next(iter(table.values())))
        lines += ["", f"| accuracy on {name} %, layer | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {layer} | " + " | ".join(f"{row[c]:.1f}" for c in columns) + " |" for layer, row in table.items()]
    results["won_back"] = won_back(pairs)
    lines += ["", "| points on pairs, layer | cost of ablating all effects | left when reconstructed from PC | won back % |"]
    lines += ["|---|---|---|---|"]
    for layer, row in results["won_back"].items():
        share = "no loss" if row["won back"] is None else f"{row['won back']:.0f}"
        (loss, loss_error), (short, short_error) = row["loss"], row["short"]
        lines.append(f"| {layer} | {loss:.1f} ± {loss_error:.1f} | {short:.1f} ± {short_error:.1f} | {share} |")
    results["descriptions"] = descriptions(symbols)
    lines += ["", "| strongest text true of the top pictures, layer | share | random text | ratio |", "|---|---|---|---|"]
    lines += [f"| {layer} | {a:.3f} | {b:.3f} | {ratio:.1f} |" for layer, (a, b, ratio) in results["descriptions"].items()]
    results["habits"] = {text_set: habits(symbols, Results(out, "symbols", text_set)) for text_set in ("words", "grounds")}
    lines += ["", "| the symbol's habit among all of its kind | text set | mean rank | chance | AUC | chance |"]
    lines[-1] += " AUC for symbols without it | AUC of texts alone |"
    lines += ["|---" * 8 + "|"]
    for text_set, rows in results["habits"].items():
        for kind, row in rows.items():
            ranks = f"{row['mean_rank']:.2f} of {row['of']} | {row['chance_rank']}"
            aucs = f"{row['auc']:.2f} | 0.50 ± {row['chance_deviation']:.2f} | {row['auc_without']:.2f} | {row['auc_texts']:.2f}"
            lines.append(f"| {kind}, {len(row['symbols'])} symbols | {text_set} | {ranks} | {aucs} |")
    layers = load_layers(symbols)
    concepts = Concepts(symbols, layers)
    results["concepts"] = concepts.table()
    lines += ["", f"| discovered: the {TOP_WORDS} strongest words true of the picture, layer | share | random texts | ratio |"]
    lines += ["|---|---|---|---|"]
    lines += [f"| {name} | {a:.3f} | {b:.3f} | {ratio:.1f} |" for name, (a, b, ratio) in results["concepts"].items()]
    results["segmentation"] = {}
    for scenes in ("single", "two"):
        files = {name: segmentation_result(out, scenes, name) for name in ("positive", "both", "random", "attention", "rollout")}
        rows = {name: json.loads(file.read_text())["scores"] for name, file in files.items()}
        results["segmentation"][scenes] = rows
        title = "one symbol" if scenes == "single" else "two symbols, the class of each in turn"
        lines += ["", f"| segmentation, {title} | PixAcc | mIoU | mAP |", "|---|---|---|---|"]
        lines += [f"| {name} | {r['pixel_accuracy']:.1f} | {r['mIoU']:.1f} | {r['mAP']:.1f} |" for name, r in rows.items()]
    results["adversarial"] = {}
    for class_0, class_1 in attack_pairs(out / "world")[:ATTACKS]:
        files = [attack_result(out, class_0, class_1, source) for source in ("second_order", "random")]
        rates = [json.loads(file.read_text())["success_rate"] for file in files]
        results["adversarial"][f"{class_1} for {class_0}"] = rates
    attacks = json.loads((out / "attack_table.json").read_text())["summary"]
    results["attack_table"] = attacks
    lines += ["", *markdown(attacks)]
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    draw_neurons(layers[LAYERS[-1]], figures)
    draw_concepts(concepts, figures / "concepts.png")
    draw_segmentations(out, figures / "segmentation.png")
    draw_attacks(out, figures / "adversarial.png")
    for tree in (symbols, pairs):
        picture = tree.directory / f"folder_val_ablations_{CLIP}_{'-'.join(LAYERS)}_100.png"
        shutil.copy(picture, figures / f"ablations_{tree.tree}.png")
    save_json(out / "results.json", results)
    (out / "results.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
