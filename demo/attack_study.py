"""Why do words similar to v fool the small CLIP more often than words of neurons? What was tried, and what
each gave.

    python -m demo.attack_study --output_dir demo/output                 # about ten minutes on one core

All 16 pairs of attack_table.py at one opacity. v is the difference of the classes' text vectors; a word's
share of v is what its vector, from the mean over all texts, has along v. Reads what run_demo.py wrote into
DIR, writes DIR/attack_study.md and .json: pictures taken for class_0, those nearer to its bare name, and in
how many pairs one of the three words names the colour of the planted background.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from applications.attack.adversarial import NeuronWords, PoolWords, filter_words, rates
from applications.attack.generators import load_similarity
from demo.attack_table import Attacks, over_seeds
from demo.figures import markdown_table
from demo.layout import ATTACK, ATTACK_LAYERS, HERE, NAMES, OPACITY, attack_pairs, results_of
from utils.omp import make_atoms, orthogonal_matching_pursuit
from utils.runtime.files import save_json


class Study(Attacks):
    """The sources of words: functions (v, seed) -> [[word, score], ...]."""

    def __init__(self, out):
        super().__init__(out)
        self.all_texts = PoolWords(results_of(out, "symbols"), "words", out / "world", self.clip)
        new = [text for text in self.all_texts.texts if text not in self.vectors]
        self.vectors |= dict(zip(new, load_similarity("clip", self.clip, 64)(new), strict=True))
        self.all_words = NeuronWords.load(
            results_of(out, "symbols"), self.clip, ATTACK_LAYERS, texts="words", **NAMES
        )

    def described(self, texts, normalise="axis"):
        """The same neurons, described by so many texts."""
        atoms = make_atoms(torch.from_numpy(np.array(self.pool.vectors)), normalise)
        found = {}
        for layer, targets in self.neurons.pcas.items():
            support, weights = orthogonal_matching_pursuit(atoms, torch.from_numpy(targets), texts)
            rows = zip(support.tolist(), weights.tolist(), strict=True)
            found[layer] = [
                [(i, c, self.pool.texts[i]) for i, c in zip(*row, strict=True) if i >= 0] for row in rows
            ]
        return NeuronWords(self.neurons.pcas, found)

    def variants(self):
        """{what is tried: source of words}."""
        neurons, pool, all_words, all_texts = self.neurons, self.pool, self.all_words, self.all_texts
        count, every = ATTACK["neurons_num"], sum(map(len, neurons.pcas.values()))

        def of(words, n=count, **chosen):
            return lambda v, seed: words.mine(v, n, **chosen)["words"]

        def positive(v, seed):
            share = pool.shares(v)
            return [item for item in neurons.mine(v, count)["words"] if share[item[0]] > 0]

        def weighted(words, texts, n=count, drawn=False):
            return lambda v, seed: words.mine(v, n, seed=seed if drawn else None, shares=texts.shares(v))[
                "words"
            ]

        return {
            f"{count} neurons, 8 texts each (the table's second-order)": of(neurons),
            f"{count} random neurons": lambda v, seed: neurons.mine(v, count, seed=seed)["words"],
            "words similar to v": lambda v, seed: pool.similar(v)["words"],
            **{f"{n} neurons": of(neurons, n) for n in (10, 25, 50, 200, 400)},
            f"all {every} neurons": of(neurons, every),
            "32 texts each": of(self.described(32)),
            "atoms of equal norm (--normalise text)": of(self.described(8, "text")),
            "only words with a positive share of v": positive,
            "scores weighted by the share of v (weighted)": weighted(neurons, pool),
            f"the same, all {every} neurons": weighted(neurons, pool, every),
            f"the same, {count} random neurons": weighted(neurons, pool, drawn=True),
            f"all texts, names of class_0 dropped: {count} neurons": of(all_words),
            "all texts: weighted": weighted(all_words, all_texts),
            "all texts: words similar to v": lambda v, seed: all_texts.similar(v)["words"],
        }

    def rows(self, pairs, source, seeds, images):
        """The rates of one source of words, a row for each pair and seed; and how often it names the planted
        colour.
        """
        rows, named = [], []
        for class_0, class_1 in pairs:
            text_0, text_1 = self.encode([class_0, class_1]).numpy()
            for seed in range(seeds):
                limits = {"threshold": ATTACK["cosim_similarity"], "blocked": []}
                taken = filter_words(
                    source(text_0 - text_1, seed), class_0, ATTACK["overall_words"], self.encode, **limits
                )
                words = [entry["word"] for entry in taken["words"]]
                named.append(self.habits[class_0]["background"] in " ".join(words))
                plan = self.plan(words, class_0, class_1, seed=seed, images=images)
                columns = self.judge(self.pictures(plan, OPACITY), class_0, class_1)
                rows.append({"seed": seed, **rates(columns, class_1)})
        return rows, float(np.mean(named))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=HERE / "output", help="of run_demo.py")
    parser.add_argument("--pairs", type=int, help="how many pairs, in order; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ... of words, descriptions and pictures")
    parser.add_argument("--images", type=int, default=102, help="pictures of each pair, source and seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study, lines, content = Study(args.output_dir), [], {}
    pairs = attack_pairs(args.output_dir / "world")[: args.pairs]
    for name, source in tqdm(study.variants().items(), unit="variant"):
        rows, named = study.rows(pairs, source, seeds=args.seeds, images=args.images)
        found = {rate: over_seeds(rows, rate) for rate in ("argmax_rate", "binary_rate")}
        lines.append(
            [name, *(f"{mean:.1f} ± {spread:.1f}" for mean, spread in found.values()), f"{named:.2f}"]
        )
        content[name] = {**found, "names_the_colour": named}
    drawn = f"{len(pairs)} pairs, {args.seeds} x {args.images} pictures each, opacity {OPACITY}"
    table = markdown_table(
        [f"words ({drawn})", "taken for class_0 %", "nearer to its name %", "name the colour"], lines
    )
    (args.output_dir / "attack_study.md").write_text("\n".join(table) + "\n")
    save_json(args.output_dir / "attack_study.json", content)
    print("\n".join(table))


if __name__ == "__main__":
    main()
