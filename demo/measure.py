"""Compares the results of `run_demo.py` with the truth of the world; writes results.json, results.md and figures.

    python demo/measure.py --output_dir demo/output

Every measure stands beside its chance level. What is true of a picture is read from the world's .jsonl files, never from the
method's output.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import scipy.sparse
from world import COLOURS, TEXTURES, parse

sys.path.insert(0, str(Path(__file__).parent.parent))
from run_demo import ATTACKS, CLIP, COMPONENTS, LAYERS, OPACITY, attack_result, segmentation_result  # noqa: E402

from utils.artifacts import Names, save_json  # noqa: E402
from utils.clip import load_clip  # noqa: E402
from utils.datasets import load_images  # noqa: E402
from utils.neurons import NeuronLayer  # noqa: E402
from utils.visualization import save_figure  # noqa: E402

HERE = Path(__file__).parent
TOP_NEURONS, TOP_PICTURES = 100, 20


class Results:
    """The files of one tree of class folders (symbols or pairs), and the truth of its pictures."""

    def __init__(self, out, tree):
        self.directory, self.world = out / tree, out / "world"
        self.tree = tree
        self.texts = (self.directory / f"words_{CLIP}.txt").read_text().splitlines()
        self.text_vectors = self.array(f"words_{CLIP}.npy") / 100

    def array(self, name):
        return np.load(self.directory / name)

    def truth(self, split):
        """A dict per picture, in the order of the representations."""
        return [json.loads(line) for line in (self.world / self.tree / f"{split}.jsonl").read_text().splitlines()]

    def statistic(self, layer, part):
        return self.array(f"folder_train_mlps_{CLIP}_{layer}_{part}.npy")

    def decomposition(self, layer):
        """csc matrix [N, texts]."""
        name = f"folder_mlps_{CLIP}_{layer}_words_decomposition_omp_1_{COMPONENTS}.npz"
        return scipy.sparse.load_npz(self.directory / name)

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


def habits(results, layers=("2", "3", "4")):
    """Where the second-order direction towards a symbol ranks its habit: {symbol: (kind, habit, rank, of how many)}.

    Neurons are taken by |<r_n, v>| with v the symbol's text against the mean of all symbols, as for adversarial images; every
    word of their descriptions scores coefficient * <r_n, v>, and a background scores what the texts that name it score.
    """
    known = json.loads((results.world / "habits.json").read_text())
    texts = np.array([results.texts.index(symbol) for symbol in known["symbols"]])
    mean = results.text_vectors[texts].mean(axis=0)
    r = np.concatenate([results.statistic(layer, "100_pca") for layer in layers])
    matrix = scipy.sparse.vstack([results.decomposition(layer) for layer in layers]).tocsr()
    said = [parse(text) for text in results.texts]
    rows = {}
    for symbol, habit in known["habits"].items():
        (kind, value), *_ = habit.items()
        if kind == "companion":
            continue
        v = results.text_vectors[results.texts.index(symbol)] - mean
        along = r @ v
        chosen = np.argsort(-np.abs(along))[:TOP_NEURONS]
        scores = matrix[chosen].T @ along[chosen]  # [texts]
        values = COLOURS if kind == "background" else TEXTURES
        total = {x: sum(scores[t] for t, s in enumerate(said) if s[kind] == x and not s["things"]) for x in values}
        rank = 1 + sum(bool(total[x] > total[value]) for x in values)
        rows[symbol] = (kind, value, rank, len(values))
    return rows


def draw_neurons(results, layer, path, count=8):
    """The cards of the neurons with the largest effects."""
    weights = str(HERE / "symbols-vit.safetensors")
    clip = load_clip(str(HERE / "symbols-vit.json"), weights, "cpu")
    images = load_images("folder", results.world / results.tree, "train", clip.transform)
    names = Names(results.directory, "symbols-vit.json", weights)
    neurons = NeuronLayer(clip, names, images, "folder", int(layer), "words", COMPONENTS)
    for n in neurons.largest(count):
        save_figure(neurons.card(n), path / f"neuron_{layer}_{n}.png")


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
        file = f"folder_mlps_{CLIP}_{'-'.join(LAYERS)}_words_decomposition_omp_1_{COMPONENTS}_evaluation.json"
        rebuilt = json.loads((tree.directory / file).read_text())["accuracy"]
        for layer, row in table.items():
            row[f"rebuilt from {COMPONENTS} texts"] = rebuilt[layer]
        results[f"ablations_{name}"] = table
        columns = list(next(iter(table.values())))
        lines += ["", f"| accuracy on {name} %, layer | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {layer} | " + " | ".join(f"{row[c]:.1f}" for c in columns) + " |" for layer, row in table.items()]
    results["descriptions"] = descriptions(symbols)
    lines += ["", "| strongest text true of the top pictures, layer | share | random text | ratio |", "|---|---|---|---|"]
    lines += [f"| {layer} | {a:.3f} | {b:.3f} | {ratio:.1f} |" for layer, (a, b, ratio) in results["descriptions"].items()]
    found = results["habits"] = habits(symbols)
    lines += ["", "| the habit among backgrounds or textures | mean rank | chance | AUC | chance |", "|---|---|---|---|---|"]
    for kind in ("background", "texture"):
        ranks = [(rank, of) for k, _, rank, of in found.values() if k == kind]
        auc = np.mean([(of - rank) / (of - 1) for rank, of in ranks])
        of = ranks[0][1]
        mean = np.mean([rank for rank, _ in ranks])
        lines.append(f"| {kind}, {len(ranks)} symbols | {mean:.2f} of {of} | {(of + 1) / 2} | {auc:.2f} | 0.50 |")
    results["segmentation"] = {}
    for scenes in ("single", "two"):
        files = {name: segmentation_result(out, scenes, name) for name in ("positive", "both", "random", "attention", "rollout")}
        rows = {name: json.loads(file.read_text())["scores"] for name, file in files.items()}
        results["segmentation"][scenes] = rows
        title = "one symbol" if scenes == "single" else "two symbols, the class of each in turn"
        lines += ["", f"| segmentation, {title} | PixAcc | mIoU | mAP |", "|---|---|---|---|"]
        lines += [f"| {name} | {r['pixel_accuracy']:.1f} | {r['mIoU']:.1f} | {r['mAP']:.1f} |" for name, r in rows.items()]
    results["adversarial"] = {}
    lines += ["", f"| drawn (opacity {OPACITY}), taken for | second-order words % | random words % |", "|---|---|---|"]
    for class_0, class_1 in ATTACKS:
        files = [attack_result(out, class_0, class_1, source, 0) for source in ("second_order", "random")]
        rates = [json.loads(file.read_text())["success_rate"] for file in files]
        results["adversarial"][f"{class_1} for {class_0}"] = rates
        lines.append(f"| {class_1}, {class_0} | {rates[0]:.1f} | {rates[1]:.1f} |")
    (out / "figures").mkdir(exist_ok=True)
    draw_neurons(symbols, LAYERS[-1], out / "figures")
    for tree in (symbols, pairs):
        picture = tree.directory / f"folder_val_ablations_{CLIP}_{'-'.join(LAYERS)}_100.png"
        shutil.copy(picture, out / "figures" / f"ablations_{tree.tree}.png")
    save_json(out / "results.json", results)
    (out / "results.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
