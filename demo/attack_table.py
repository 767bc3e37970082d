"""Measure how often drawn pictures of class_1 are taken for class_0, for many pairs of classes at once.

    python -m demo.attack_table --output_dir demo/output     # the whole table: about five minutes on one core

Pairs, by a rule that looks at no result: class_0 goes through the symbols with a background habit by name,
class_1 is the symbol at the same place among those without one. Sources of words:
    second_order, random, similar, random_words   as in generate_adversarial_images.py
    fires_on, random_fires_on   the same, if asked for; evaluate_descriptions.py runs first where it has not
    weighted   second_order, with every score times the word's own share of v (`weighted`; not in the paper)
    planted    the habit of class_0 itself: what words can do at best
    nothing    no words, class_1 alone
Words, descriptions, pictures and classes are the script's own, for the flags that run_demo.py gives it.

Reads what run_demo.py wrote into DIR. Writes DIR/attack_table.json, DIR/attack_table.md, and for several
opacities DIR/figures/attack_table.png. The rates are in per cent:
    argmax_rate    pictures taken for class_0 among all classes
    binary_rate    pictures nearer to the bare name of class_0 than to that of class_1
    class_1_rate   pictures taken for class_1
"""

import argparse
import functools
import itertools
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot
from tqdm import tqdm

from applications.attack.drawings import SEEDS, template_descriptions, usable
from applications.attack.generators import load_similarity
from applications.attack.judging import judge, load_named_classifier, rates
from applications.attack.words import NeuronWords, PoolWords, check_classes, filter_words
from demo.figures import markdown_table
from demo.launch import run
from demo.layout import (
    ATTACK,
    ATTACK_LAYERS,
    ATTACK_TEXTS,
    COMPONENTS,
    HERE,
    MODEL,
    NAMES,
    OPACITY,
    WEIGHTS,
    attack_pairs,
    results_of,
)
from demo.run_demo import readable, stage
from demo.world import articles, describe, draw, to_pil
from utils.figures import save_figure
from utils.model.clip import load_clip
from utils.runtime.files import save_json

SOURCES = ("second_order", "weighted", "random", "similar", "random_words", "planted", "nothing")
FIRES_ON = ("fires_on", "random_fires_on")  # sources that evaluate_descriptions.py has to run for
RATES = {
    "argmax_rate": "taken for class_0",
    "binary_rate": "nearer to class_0",
    "class_1_rate": "taken for class_1, drawn",
}
OPACITIES = (0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


def fit_fires_on(out):
    """Find the texts that the neurons fire on, where they are not there. out: the demo's output folder.

    Exits where evaluate_descriptions.py fails.
    """
    out = out.resolve()
    path = functools.partial(results_of(out, "symbols").path, **NAMES)
    files = [path("fires_on", layer=layer, texts=ATTACK_TEXTS) for layer in ATTACK_LAYERS]
    files += [path("projections", layer=layer) for layer in ATTACK_LAYERS]
    if all(file.is_file() for file in files):
        return
    flags = ["--dataset", "folder", "--data_path", out / "world/symbols", "--output_dir", out / "symbols"]
    flags += ["--batch_size", 64, "--num_workers", 0, "--mlp_layer", *ATTACK_LAYERS]
    flags += ["--text_descriptions", ATTACK_TEXTS, "--components", COMPONENTS, "--top_k_pca", NAMES["k"]]
    words = [str(word) for word in stage("evaluate_descriptions.py", *flags)]
    print(f"$ {readable('python', *words)}", flush=True)
    if code := run(words):
        sys.exit(code)


def shares(pool, v):
    """Return {word: projection of its centred text vector on v}.

    pool: `PoolWords`.
    v: [D], the difference of the classes' text vectors.
    """
    projections = (pool.vectors - pool.vectors.mean(axis=0)) @ v
    return dict(zip(pool.texts, projections.tolist(), strict=True))


def weighted(mined, share):
    """Multiply the scores of words by their share of v.

    mined: [[word, score], ...].
    share: {word: share}, as `shares` returns it.

    Returns [[word, score], ...] with the positive scores only, largest first.
    """
    scores = [[word, score * share[word]] for word, score in mined if share[word] > 0]
    return sorted(scores, key=lambda item: (-item[1], item[0]))


class Attacks:
    """`Attacks` holds the small CLIP and everything that words are taken from.

    out: the demo's output folder.
    """

    def __init__(self, out):
        self.clip = load_clip(MODEL, WEIGHTS, "cpu")
        self.habits = json.loads((out / "world/habits.json").read_text())["habits"]
        self.results = results_of(out, "symbols").of(self.clip)
        self.classifier, self.class_names = load_named_classifier(self.results, "folder")
        self.neurons = NeuronWords.load(self.results, ATTACK_LAYERS, texts=ATTACK_TEXTS, **NAMES)
        self.pool = PoolWords(self.results, ATTACK_TEXTS, out / "world")
        texts = [*self.class_names, *self.pool.texts]
        self.vectors = dict(zip(texts, load_similarity("clip", self.clip, 64)(texts), strict=True))

    @functools.cached_property
    def fired_on(self):
        """fired_on are the `NeuronWords` of what neurons fire on, for which `fit_fires_on` has run."""
        return NeuronWords.load_fires_on(self.results, ATTACK_LAYERS, texts=ATTACK_TEXTS, **NAMES)

    def habit(self, class_0):
        """Return the planted background of a symbol, in words."""
        return f"{self.habits[class_0]['texture']} {self.habits[class_0]['background']} background"

    def difference(self, class_0, class_1):
        """Return v [D], the difference of the classes' text vectors."""
        text_0, text_1 = self.encode([class_0, class_1]).numpy()
        return text_0 - text_1

    def words(self, source, class_0, class_1, seed):
        """Return the words that descriptions are made of."""
        if source == "nothing":
            return []
        if source == "planted":
            return [self.habit(class_0)]
        return self.choose(self.mine(source, self.difference(class_0, class_1), seed), class_0)

    def mine(self, source, v, seed):
        """Return [[word, score], ...] of a source of words, best first."""
        count = ATTACK["neurons_num"]
        if source == "similar":
            return self.pool.similar(v)["words"]
        if source == "random_words":
            return self.pool.random(seed)["words"]
        neurons = self.fired_on if source in FIRES_ON else self.neurons
        drawn = source in ("random", "random_fires_on")
        mined = neurons.mine(v, count, seed=seed if drawn else None)["words"]
        return weighted(mined, shares(self.pool, v)) if source == "weighted" else mined

    def choose(self, candidates, class_0):
        """Return the best of [[word, score], ...] that do not name class_0."""
        limits = {"threshold": ATTACK["cosim_similarity"], "blocked": []}
        taken = filter_words(candidates, class_0, ATTACK["overall_words"], self.encode, **limits)
        return [entry["word"] for entry in taken["words"]]

    def encode(self, texts):
        """Return the unit text vectors [texts, D] of class names and texts of the pool."""
        return torch.stack([self.vectors[text] for text in texts])

    def plan(self, words, class_0, class_1, seed, images):
        """Return [(description, seed of the picture), ...], equally many pictures of each description."""
        texts = [articles(f"a photo of a {class_1}")]
        if words:
            written = template_descriptions(words, class_1, ATTACK["results_per_generation"], seed)
            texts, _ = usable(written, class_0, class_1, [])
        each = -(-images // len(texts))
        return [(texts[i // each], SEEDS * seed + i) for i in range(images)]

    def pictures(self, plan, opacity):
        """Draw a plan in one batch, as `world.draw_description` does: a list of PIL images."""
        scenes = [describe(text, random.Random(f"{seed} {text}"), opacity) for text, seed in plan]
        return [to_pil(image) for image in draw(scenes)[0]]

    @torch.inference_mode()
    def judge(self, pictures, class_0, class_1):
        """Return how the CLIP takes pictures of a pair: the columns of `judging.judge`."""
        vectors = self.clip.vit(torch.stack([self.clip.transform(picture) for picture in pictures]))
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
        texts = self.encode([class_0, class_1])
        return judge(vectors, texts, (class_0, class_1), self.classifier, class_names=self.class_names)


def select(rows, **wanted):
    """Return the rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def over_seeds(rows, rate="argmax_rate"):
    """Return mean and standard deviation over seeds of a rate, which is averaged over pairs first."""
    seeds = sorted({row["seed"] for row in rows})
    by_seed = [np.mean([row[rate] for row in select(rows, seed=seed)]) for seed in seeds]
    spread = np.std(by_seed, ddof=1) if len(by_seed) > 1 else 0
    return float(np.mean(by_seed)), float(spread)


def summary(content):
    """Return means and spreads of the rows: a dict of

    opacity, images, seeds;
    pairs: [{"class_0", "class_1", "habit", source: [mean, spread] of argmax_rate}, ...];
    overall: {rate: {source: [mean, spread]}};
    by_opacity: {opacity: {source: {rate: [mean, spread]}}};
    best: {source: number of pairs for which its words fool most often}, without planted and nothing.
    """
    rows = content["rows"]
    sources = content["sources"]
    at = select(rows, opacity=content["opacity"])
    pairs = []
    for class_0, class_1, habit in content["pairs"]:
        of_pair = select(at, class_0=class_0, class_1=class_1)
        found = {source: over_seeds(select(of_pair, source=source)) for source in sources}
        pairs.append({"class_0": class_0, "class_1": class_1, "habit": habit} | found)
    overall = {}
    for rate in RATES:
        overall[rate] = {source: over_seeds(select(at, source=source), rate) for source in sources}
    by_opacity = {}
    for opacity in content["opacities"]:
        of_opacity = select(rows, opacity=opacity)
        by_opacity[str(opacity)] = {source: all_rates(of_opacity, source) for source in sources}
    return {
        "opacity": content["opacity"],
        "images": content["images"],
        "seeds": content["seeds"],
        "pairs": pairs,
        "overall": overall,
        "by_opacity": by_opacity,
        "best": count_wins(pairs, sources),
    }


def all_rates(rows, source):
    """Return {rate: (mean, spread)} of one source of words."""
    return {rate: over_seeds(select(rows, source=source), rate) for rate in RATES}


def count_wins(pairs, sources):
    """Return {source: number of pairs for which its words fool most often}, of sources that find words."""
    wins = {source: 0 for source in sources if source not in ("planted", "nothing")}
    for pair in pairs:
        most = max(pair[source][0] for source in wins)
        for source in wins:
            wins[source] += pair[source][0] == most > 0
    return wins


def markdown(found):
    """Return the lines of the tables of a `summary`."""
    sources = list(found["overall"]["argmax_rate"])
    titles = [f"{title(source)} %" for source in sources]
    everyone = f"all {len(found['pairs'])} pairs"
    rows = []
    for pair in found["pairs"]:
        rows.append([f"{pair['class_1']}, {pair['class_0']}", pair["habit"], *cells(pair, sources)])
    for rate, what in RATES.items():
        rows.append([f"{everyone}: {what}", "", *cells(found["overall"][rate], sources)])
    drawn = f"{found['seeds']} x {found['images']} pictures, opacity {found['opacity']}"
    lines = markdown_table([f"drawn, taken for ({drawn})", "habit of the latter", *titles], rows)
    wins = ", ".join(f"{title(source)} {count}" for source, count in found["best"].items())
    note = "Mean and standard deviation over seeds. Words that fool most often, by number of pairs"
    lines += ["", f"{note}: {wins}."]
    if len(found["by_opacity"]) > 1:
        for rate, what in RATES.items():
            rows = []
            for opacity, of_sources in found["by_opacity"].items():
                of_rate = {source: of_source[rate] for source, of_source in of_sources.items()}
                rows.append([opacity, *cells(of_rate, sources)])
            lines += ["", *markdown_table([f"opacity: {what}, all pairs", *titles], rows)]
    return lines


def title(source):
    """Return the name of a source of words in tables and figures."""
    return source.replace("_", "-")


def cells(rates, sources):
    """Return the cells of a row. rates: {source: (mean, spread)}."""
    return ["{:.1f} ± {:.1f}".format(*rates[source]) for source in sources]


def plot(found, path):
    """Draw rates by opacity, a line for each source: pictures taken for class_0, and for class_1."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    by_opacity = found["by_opacity"]
    opacities = [float(opacity) for opacity in by_opacity]
    titles = {
        "argmax_rate": "taken for class_0, which is not there",
        "class_1_rate": "taken for class_1, which is drawn",
    }
    for axes, rate in zip(panels, titles, strict=True):
        for source in found["overall"][rate]:
            means, spreads = zip(*(row[source][rate] for row in by_opacity.values()), strict=True)
            style = {"marker": "o", "markersize": 4, "capsize": 2}
            axes.errorbar(opacities, means, spreads, label=title(source), **style)
        axes.set_xscale("log")
        axes.set_xticks(opacities, [f"{opacity:g}" for opacity in opacities], minor=False)
        axes.minorticks_off()
        axes.set(xlabel="opacity of the symbols", ylabel="pictures (%)", ylim=(0, None), title=titles[rate])
    panels[0].legend(title="words", fontsize="small")
    save_figure(figure, path)


def measure(attacks, args, pairs, opacities):
    """Measure the rates of every pair, source, seed and opacity.

    Returns {"rows": [{"class_0", "class_1", "source", "seed", "opacity", rates}, ...], "words": [...]}, the
    words of every pair, source and seed.
    """
    rows = []
    words = []
    count = len(pairs) * len(args.sources) * args.seeds * len(opacities) * args.images
    with tqdm(total=count, unit="image") as bar:
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


def parse_args():
    """Return the flags of the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--output_dir", type=Path, default=HERE / "output", help="of run_demo.py")
    add("--pairs", type=int, help="how many pairs, in order; default: all")
    add("--seeds", type=int, default=3, help="0, 1, ... of words, descriptions and pictures")
    images = ATTACK["results_per_generation"] * ATTACK["batch_size"]
    add("--images", type=int, default=images, help="pictures of each pair, source and seed")
    where = "where the words come from; default: all but those that neurons fire on"
    add("--sources", nargs="+", choices=SOURCES + FIRES_ON, default=SOURCES, help=where)
    add("--opacity", type=float, default=OPACITY, help="of the symbols, in the table by pairs")
    add("--opacities", type=float, nargs="+", default=OPACITIES, help="of the table by opacity")
    return parser.parse_args()


def main(args):
    if set(args.sources) & set(FIRES_ON):
        fit_fires_on(args.output_dir)
    torch.set_num_threads(1)  # many small operations: on a busy machine threads wait for each other
    out = args.output_dir
    attacks = Attacks(out)
    pairs = attack_pairs(out / "world")[: args.pairs]
    opacities = sorted({*args.opacities, args.opacity})
    content = {
        "fingerprint": attacks.clip.fingerprint,
        "images": args.images,
        "seeds": args.seeds,
        "opacity": args.opacity,
        "opacities": opacities,
        "sources": list(args.sources),
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
    main(parse_args())
