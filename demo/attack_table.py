"""How often drawn pictures of class_1 are taken for class_0: the attack of generate_adversarial_images.py,
for many pairs of classes, seeds, sources of words and opacities in one process.

    python -m demo.attack_table --output_dir demo/output                 # the whole table: about five minutes on one core

Pairs, by a rule that looks at no result: class_0 goes through the symbols with a background habit by name,
class_1 is the symbol at the same place among those without one. Sources of words:
    second_order, weighted, random, similar, random_words   as in generate_adversarial_images.py
    planted    the habit of class_0 itself: what words can do at best
    nothing    no words, class_1 alone
Words, descriptions, pictures and classes are the script's own, for the flags that run_demo.py gives it.

Reads what run_demo.py wrote into DIR. Writes DIR/attack_table.json (the rates in per cent: argmax_rate of
pictures taken for class_0 among all classes, binary_rate of those nearer to its bare name than to that of
class_1, class_1_rate of those taken for class_1), DIR/attack_table.md, and for several opacities
DIR/figures/attack_table.png.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot
from tqdm import tqdm

from applications.attack.adversarial import (
    SEEDS,
    NeuronWords,
    PoolWords,
    check_classes,
    filter_words,
    judge,
    load_named_classifier,
    rates,
    template_descriptions,
    usable,
)
from applications.attack.generators import load_similarity
from demo.figures import markdown_table
from demo.layout import (
    ATTACK,
    ATTACK_LAYERS,
    ATTACK_TEXTS,
    HERE,
    MODEL,
    NAMES,
    OPACITY,
    WEIGHTS,
    attack_pairs,
    results_of,
)
from demo.world import articles, describe, draw, to_pil
from utils.figures import save_figure
from utils.model.clip import load_clip
from utils.runtime.files import save_json

SOURCES = ("second_order", "weighted", "random", "similar", "random_words", "planted", "nothing")
RATES = {
    "argmax_rate": "taken for class_0",
    "binary_rate": "nearer to class_0",
    "class_1_rate": "taken for class_1, drawn",
}
OPACITIES = (0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


class Attacks:
    """The small CLIP and everything that words are taken from.

    out: the demo's output folder.
    """

    def __init__(self, out):
        self.clip = load_clip(MODEL, WEIGHTS, "cpu")
        self.habits = json.loads((out / "world/habits.json").read_text())["habits"]
        results = results_of(out, "symbols")
        self.classifier, self.class_names = load_named_classifier(results, "folder", self.clip)
        self.neurons = NeuronWords.load(results, self.clip, ATTACK_LAYERS, texts=ATTACK_TEXTS, **NAMES)
        self.pool = PoolWords(results, ATTACK_TEXTS, out / "world", self.clip)
        texts = [*self.class_names, *self.pool.texts]
        self.vectors = dict(zip(texts, load_similarity("clip", self.clip, 64)(texts), strict=True))

    def habit(self, class_0):
        """The planted background of a symbol, in words."""
        return f"{self.habits[class_0]['texture']} {self.habits[class_0]['background']} background"

    def words(self, source, class_0, class_1, seed):
        """The words that descriptions are made of."""
        if source in ("planted", "nothing"):
            return [self.habit(class_0)] if source == "planted" else []
        text_0, text_1 = self.encode([class_0, class_1]).numpy()
        v, count = text_0 - text_1, ATTACK["neurons_num"]
        mined = {
            "second_order": lambda: self.neurons.mine(v, count),
            "weighted": lambda: self.neurons.mine(v, count, shares=self.pool.shares(v)),
            "random": lambda: self.neurons.mine(v, count, seed=seed),
            "similar": lambda: self.pool.similar(v),
            "random_words": lambda: self.pool.random(seed),
        }[source]()
        limits = {"threshold": ATTACK["cosim_similarity"], "blocked": []}
        taken = filter_words(mined["words"], class_0, ATTACK["overall_words"], self.encode, **limits)
        return [entry["word"] for entry in taken["words"]]

    def encode(self, texts):
        """Unit text vectors [texts, D] of class names and texts of the pool."""
        return torch.stack([self.vectors[text] for text in texts])

    def plan(self, words, class_0, class_1, seed, images):
        """[(description, seed of the picture), ...], one for each picture: as many of each description."""
        texts = [articles(f"a photo of a {class_1}")]
        if words:
            written = template_descriptions(words, class_1, ATTACK["results_per_generation"], seed)
            texts, _ = usable(written, class_0, class_1, [])
        each = -(-images // len(texts))
        return [(texts[i // each], SEEDS * seed + i) for i in range(images)]

    def pictures(self, plan, opacity):
        """What `world.draw_description` draws, in one batch: a list of PIL images."""
        scenes = [describe(text, random.Random(f"{seed} {text}"), opacity) for text, seed in plan]
        return [to_pil(image) for image in draw(scenes)[0]]

    @torch.inference_mode()
    def judge(self, pictures, class_0, class_1):
        """How the CLIP takes pictures of a pair: columns as `applications.attack.adversarial.judge` gives
        them.
        """
        vectors = self.clip.vit(torch.stack([self.clip.transform(picture) for picture in pictures]))
        texts, vectors = self.encode([class_0, class_1]), torch.nn.functional.normalize(vectors, dim=-1)
        return judge(vectors, texts, (class_0, class_1), self.classifier, class_names=self.class_names)


def select(rows, **wanted):
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def over_seeds(rows, rate="argmax_rate"):
    """Mean, and standard deviation over seeds, of a rate that is first averaged over the pairs of each
    seed.
    """
    by_seed = [
        np.mean([row[rate] for row in select(rows, seed=seed)])
        for seed in sorted({row["seed"] for row in rows})
    ]
    return float(np.mean(by_seed)), float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else 0.0


def summary(content):
    """Means and spreads of the rows: {"opacity", "images", "seeds",
    "pairs": [{"class_0", "class_1", "habit", source: [mean, spread]}, ...] of argmax_rate, "overall": {rate:
    {source: [mean, spread]}}, "by_opacity": {opacity: {source: {rate: [mean, spread]}}},
    "best": {source: number of pairs for which the words that it found fool most often}}."""
    rows, sources, opacity = content["rows"], content["sources"], content["opacity"]
    at = select(rows, opacity=opacity)
    pairs = [
        {"class_0": class_0, "class_1": class_1, "habit": habit}
        | {
            source: over_seeds(select(at, class_0=class_0, class_1=class_1, source=source))
            for source in sources
        }
        for class_0, class_1, habit in content["pairs"]
    ]
    found = {"opacity": opacity, "images": content["images"], "seeds": content["seeds"], "pairs": pairs}
    found["overall"] = {
        rate: {source: over_seeds(select(at, source=source), rate) for source in sources} for rate in RATES
    }
    found["by_opacity"] = {
        str(x): {
            source: {rate: over_seeds(select(rows, opacity=x, source=source), rate) for rate in RATES}
            for source in sources
        }
        for x in content["opacities"]
    }
    mined = [source for source in sources if source not in ("planted", "nothing")]
    largest = [max(pair[source][0] for source in mined) for pair in pairs]
    found["best"] = {
        source: sum(pair[source][0] == most > 0 for pair, most in zip(pairs, largest, strict=True))
        for source in mined
    }
    return found


def markdown(found):
    """The lines of the tables of a `summary`."""
    sources, count = list(found["overall"]["argmax_rate"]), len(found["pairs"])
    titles = [f"{source.replace('_', '-')} %" for source in sources]
    drawn = f"{found['seeds']} x {found['images']} pictures, opacity {found['opacity']}"

    def cells(rates):
        return [f"{mean:.1f} ± {spread:.1f}" for mean, spread in (rates[source] for source in sources)]

    rows = [[f"{pair['class_1']}, {pair['class_0']}", pair["habit"], *cells(pair)] for pair in found["pairs"]]
    rows += [
        [f"all {count} pairs: {what}", "", *cells(found["overall"][rate])] for rate, what in RATES.items()
    ]
    lines = markdown_table([f"drawn, taken for ({drawn})", "habit of the latter", *titles], rows)
    wins = ", ".join(f"{source.replace('_', '-')} {wins}" for source, wins in found["best"].items())
    lines += [
        "",
        f"Mean and standard deviation over seeds. Words that fool most often, by number of pairs: {wins}.",
    ]
    if len(found["by_opacity"]) > 1:
        for rate, what in RATES.items():
            rows = [
                [x, *cells({source: of_source[rate] for source, of_source in rates.items()})]
                for x, rates in found["by_opacity"].items()
            ]
            lines += ["", *markdown_table([f"opacity: {what}, all pairs", *titles], rows)]
    return lines


def plot(found, path):
    """Rates by opacity, a line for each source: pictures taken for class_0, and for class_1."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    opacities = [float(opacity) for opacity in found["by_opacity"]]
    titles = {
        "argmax_rate": "taken for class_0, which is not there",
        "class_1_rate": "taken for class_1, which is drawn",
    }
    for axes, (rate, title) in zip(panels, titles.items(), strict=True):
        for source in next(iter(found["by_opacity"].values())):
            means, spreads = zip(
                *(rates[source][rate] for rates in found["by_opacity"].values()), strict=True
            )
            axes.errorbar(
                opacities, means, spreads, marker="o", markersize=4, capsize=2, label=source.replace("_", "-")
            )
        axes.set_xscale("log")
        axes.set_xticks(opacities, [f"{opacity:g}" for opacity in opacities], minor=False)
        axes.minorticks_off()
        axes.set(xlabel="opacity of the symbols", ylabel="pictures (%)", ylim=(0, None), title=title)
    panels[0].legend(title="words", fontsize="small")
    save_figure(figure, path)


def measure(attacks, args, pairs, opacities):
    """The rates of every pair, source, seed and opacity, as rows; and the words of every pair, source and
    seed.
    """
    rows, words = [], []
    with tqdm(
        total=len(pairs) * len(args.sources) * args.seeds * len(opacities) * args.images, unit="image"
    ) as bar:
        for (class_0, class_1), source, seed in itertools.product(pairs, args.sources, range(args.seeds)):
            check_classes(class_0, class_1, [])
            what = {"class_0": class_0, "class_1": class_1, "source": source, "seed": seed}
            chosen = attacks.words(source, class_0, class_1, seed)
            words.append(what | {"words": chosen})
            plan = attacks.plan(chosen, class_0, class_1, seed=seed, images=args.images)
            for opacity in opacities:
                columns = attacks.judge(attacks.pictures(plan, opacity), class_0, class_1)
                rows.append(what | {"opacity": opacity} | rates(columns, class_1))
                bar.update(args.images)
    return {"rows": rows, "words": words}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=HERE / "output", help="of run_demo.py")
    parser.add_argument("--pairs", type=int, help="how many pairs, in order; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ... of words, descriptions and pictures")
    images = ATTACK["results_per_generation"] * ATTACK["batch_size"]
    parser.add_argument("--images", type=int, default=images, help="pictures of each pair, source and seed")
    parser.add_argument(
        "--sources", nargs="+", choices=SOURCES, default=SOURCES, help="where the words come from"
    )
    parser.add_argument(
        "--opacity", type=float, default=OPACITY, help="of the symbols, in the table by pairs"
    )
    parser.add_argument(
        "--opacities", type=float, nargs="+", default=OPACITIES, help="of the table by opacity"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # many small operations: on a busy machine threads wait for each other
    attacks, out = Attacks(args.output_dir), args.output_dir
    pairs, opacities = attack_pairs(out / "world")[: args.pairs], sorted({*args.opacities, args.opacity})
    content = {
        "fingerprint": attacks.clip.fingerprint,
        "images": args.images,
        "seeds": args.seeds,
        "opacity": args.opacity,
    }
    content |= {"opacities": opacities, "sources": list(args.sources)}
    content |= {
        "pairs": [[*pair, attacks.habit(pair[0])] for pair in pairs],
        **measure(attacks, args, pairs, opacities),
    }
    found = summary(content)
    lines = markdown(found)
    (out / "attack_table.md").write_text("\n".join(["# Adversarial pictures", "", *lines]) + "\n")
    if len(opacities) > 1:
        (out / "figures").mkdir(exist_ok=True)
        plot(found, out / "figures/attack_table.png")
    save_json(out / "attack_table.json", content | {"summary": found})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
