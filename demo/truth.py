"""What is true of the pictures of the world: which texts, of which pictures.

    python -m demo.truth --world demo/output/world --tree symbols --texts words

Writes  WORLD/TREE/TEXTS_SPLIT.npy, bool [pictures, texts], for train and val: what evaluate_descriptions.py
takes as --truth.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from demo.world import COLOURS, parse


def true_of(texts, pictures):
    """Which texts are true of which pictures, bool [texts, pictures]: all that a text names has to be there.

    A text that names a symbol or a pair is true of a picture with it, large or small; one of a background, of
    that background; a lone colour, of a picture where a symbol or the background has it.
    """
    table = np.zeros((len(texts), len(pictures)), bool)
    facts = []
    for p in pictures:
        things = {(p["symbol"], p["colour"])} | (
            {(p["companion"], p["companion_colour"])} if p["companion"] else set()
        )
        facts.append(
            (
                things,
                {s for s, _ in things},
                p["background"],
                p["texture"],
                {c for _, c in things} | {p["background"]},
            )
        )
    for t, text in enumerate(texts):
        said = parse(text)
        colour = text if text in COLOURS else None
        for i, (things, symbols, background, texture, colours) in enumerate(facts):
            table[t, i] = (
                all(
                    (x["symbol"], x["colour"]) in things if x["colour"] else x["symbol"] in symbols
                    for x in said["things"]
                )
                and said["background"] in (None, background)
                and said["texture"] in (None, texture)
                and (colour is None or colour in colours)
            )
    return table


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", type=Path, required=True, help="of make_world.py")
    parser.add_argument("--tree", default="symbols", choices=("symbols", "pairs"))
    parser.add_argument("--texts", default="words", help="name of a text set in WORLD")
    args = parser.parse_args()
    texts = (args.world / f"{args.texts}.txt").read_text().splitlines()
    for split in ("train", "val"):
        pictures = [
            json.loads(line) for line in (args.world / args.tree / f"{split}.jsonl").read_text().splitlines()
        ]
        path = args.world / args.tree / f"{args.texts}_{split}.npy"
        np.save(path, true_of(texts, pictures).T)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
