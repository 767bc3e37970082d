"""Compare sources of words: why do words similar to v fool the small CLIP more often than words of neurons?

    python -m demo.attack_study --output_dir demo/output                 # about five minutes on one core

All 16 pairs of attack_table.py at one opacity. v is the difference of the classes' text vectors; a word's
share of v is the projection of its centred text vector on v. Reads what run_demo.py wrote into DIR. Runs
evaluate_descriptions.py first, where what the neurons of these layers fire on is not there. Writes
DIR/attack_study.md and .json: pictures taken for class_0, those nearer to its bare name, and in how many
pairs one of the three words names the colour of the planted background.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from applications.attack.generators import load_similarity
from applications.attack.judging import rates
from applications.attack.words import NeuronWords, PoolWords
from demo.attack_table import Attacks, fit_fires_on, over_seeds, shares, weighted
from demo.figures import markdown_table
from demo.layout import ATTACK, ATTACK_LAYERS, HERE, NAMES, OPACITY, attack_pairs
from utils.omp import make_atoms, orthogonal_matching_pursuit
from utils.runtime.files import save_json


class Study(Attacks):
    """A Study holds the sources of words: functions (v, seed) -> [[word, score], ...]."""

    def __init__(self, out):
        super().__init__(out)
        self.all_texts = PoolWords(self.results, "words", out / "world")
        new = [text for text in self.all_texts.texts if text not in self.vectors]
        self.vectors |= dict(zip(new, load_similarity("clip", self.clip, 64)(new), strict=True))
        self.all_words = NeuronWords.load(self.results, ATTACK_LAYERS, texts="words", **NAMES)

    def described(self, n_texts, normalise="axis"):
        """Describe the neurons again, by so many texts. normalise: as in `make_atoms`."""
        atoms = make_atoms(torch.from_numpy(np.array(self.pool.vectors)), normalise)
        found = {}
        for layer, components in self.neurons.pcas.items():
            support, coefficients = orthogonal_matching_pursuit(atoms, torch.from_numpy(components), n_texts)
            rows = zip(support.tolist(), coefficients.tolist(), strict=True)
            found[layer] = [self.with_texts(*row) for row in rows]
        return NeuronWords(self.neurons.pcas, found)

    def with_texts(self, support, coefficients):
        """Return the description of one neuron: [(text index, coefficient, text), ...]."""
        chosen = zip(support, coefficients, strict=True)
        return [(i, c, self.pool.texts[i]) for i, c in chosen if i >= 0]

    def mined(self, words, count=ATTACK["neurons_num"], drawn=False):
        """Return the source that mines `words`, a `NeuronWords`. drawn: from random neurons."""
        return lambda v, seed: words.mine(v, count, seed=seed if drawn else None)["words"]

    def by_share(self, words, pool, **options):
        """Return the source that multiplies the scores of `mined` by the words' share of v."""
        source = self.mined(words, **options)
        return lambda v, seed: weighted(source(v, seed), shares(pool, v))

    def positive(self, v, seed):
        """Return the words of neurons that have a positive share of v."""
        share = shares(self.pool, v)
        words = self.mined(self.neurons)(v, seed)
        return [item for item in words if share[item[0]] > 0]

    def variants(self):
        """Return {what is tried: source of words}."""
        neurons = self.neurons
        pool = self.pool
        count = ATTACK["neurons_num"]
        every = sum(map(len, neurons.pcas.values()))
        return {
            f"{count} neurons, 8 texts each (the table's second-order)": self.mined(neurons),
            f"{count} random neurons": self.mined(neurons, drawn=True),
            f"{count} neurons, texts that they fire on": self.mined(self.fired_on),
            f"{count} random neurons, texts that they fire on": self.mined(self.fired_on, drawn=True),
            "words similar to v": lambda v, seed: pool.similar(v)["words"],
            **{f"{n} neurons": self.mined(neurons, n) for n in (10, 25, 50, 200, 400)},
            f"all {every} neurons": self.mined(neurons, every),
            "32 texts each": self.mined(self.described(32)),
            "atoms of equal norm (--normalise text)": self.mined(self.described(8, "text")),
            "only words with a positive share of v": self.positive,
            "scores weighted by the share of v (weighted)": self.by_share(neurons, pool),
            f"the same, all {every} neurons": self.by_share(neurons, pool, count=every),
            f"the same, {count} random neurons": self.by_share(neurons, pool, drawn=True),
            f"all texts, names of class_0 dropped: {count} neurons": self.mined(self.all_words),
            "all texts: weighted": self.by_share(self.all_words, self.all_texts),
            "all texts: words similar to v": lambda v, seed: self.all_texts.similar(v)["words"],
        }

    def rows(self, pairs, source, seeds, images):
        """Measure one source of words: a row of rates for each pair and seed.

        Returns the rows, and how often the words name the planted colour.
        """
        rows = []
        named = []
        for class_0, class_1 in pairs:
            v = self.difference(class_0, class_1)
            for seed in range(seeds):
                words = self.choose(source(v, seed), class_0)
                named.append(self.habits[class_0]["background"] in " ".join(words))
                plan = self.plan(words, class_0, class_1, seed=seed, images=images)
                columns = self.judge(self.pictures(plan, OPACITY), class_0, class_1)
                rows.append({"seed": seed, **rates(columns, class_1)})
        return rows, float(np.mean(named))


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--output_dir", type=Path, default=HERE / "output", help="of run_demo.py")
    add("--pairs", type=int, help="how many pairs, in order; default: all")
    add("--seeds", type=int, default=3, help="0, 1, ... of words, descriptions and pictures")
    add("--images", type=int, default=102, help="pictures of each pair, source and seed")
    args = parser.parse_args()
    fit_fires_on(args.output_dir)
    torch.set_num_threads(1)
    study = Study(args.output_dir)
    pairs = attack_pairs(args.output_dir / "world")[: args.pairs]
    lines = []
    content = {}
    for name, source in tqdm(study.variants().items(), unit="variant"):
        rows, named = study.rows(pairs, source, args.seeds, args.images)
        found = {rate: over_seeds(rows, rate) for rate in ("argmax_rate", "binary_rate")}
        cells = ["{:.1f} ± {:.1f}".format(*of_rate) for of_rate in found.values()]
        lines.append([name, *cells, f"{named:.2f}"])
        content[name] = {**found, "names_the_colour": named}
    drawn = f"{len(pairs)} pairs, {args.seeds} x {args.images} pictures each, opacity {OPACITY}"
    titles = [f"words ({drawn})", "taken for class_0 %", "nearer to its name %", "name the colour"]
    table = markdown_table(titles, lines)
    (args.output_dir / "attack_study.md").write_text("\n".join(table) + "\n")
    save_json(args.output_dir / "attack_study.json", content)
    print("\n".join(table))


if __name__ == "__main__":
    main()
