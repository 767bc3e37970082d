"""Write which texts are true of which pictures of the world.

    python -m demo.truth --world demo/output/world --tree symbols --texts words

Writes WORLD/TREE/TEXTS_SPLIT.npy, bool [pictures, texts], for train and val: files for --truth of
evaluate_descriptions.py.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from demo.world import COLOURS, parse


def true_of(texts, pictures):
    """Return which texts are true of which pictures, bool [texts, pictures]: all that a text names is there.

    A text that names a symbol or a pair is true of a picture with it, large or small. One that names a
    background is true of pictures with that background, and a lone colour where a symbol or the background
    has it.
    """
    table = np.zeros((len(texts), len(pictures)), bool)
    facts = [facts_of(picture) for picture in pictures]
    for t, text in enumerate(texts):
        said = facts_said(text)
        table[t] = [said <= known for known in facts]
    return table


def facts_of(picture):
    """Return the set of all simple facts that are true of a picture. picture: a line of a .jsonl file."""
    things = [(picture["symbol"], picture["colour"])]
    if picture["companion"]:
        things.append((picture["companion"], picture["companion_colour"]))
    facts = {("background", picture["background"]), ("texture", picture["texture"])}
    facts.add(("colour", picture["background"]))
    for symbol, colour in things:
        facts |= {("symbol", symbol), ("pair", symbol, colour), ("colour", colour)}
    return facts


def facts_said(text):
    """Return the set of the simple facts that a text says."""
    said = parse(text)
    facts = {(kind, said[kind]) for kind in ("background", "texture") if said[kind]}
    for thing in said["things"]:
        if thing["colour"]:
            facts.add(("pair", thing["symbol"], thing["colour"]))
        else:
            facts.add(("symbol", thing["symbol"]))
    if text in COLOURS:
        facts.add(("colour", text))
    return facts


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--world", type=Path, required=True, help="of make_world.py")
    parser.add_argument("--tree", default="symbols", choices=("symbols", "pairs"))
    parser.add_argument("--texts", default="words", help="name of a text set in WORLD")
    args = parser.parse_args()
    texts = (args.world / f"{args.texts}.txt").read_text().splitlines()
    for split in ("train", "val"):
        lines = (args.world / args.tree / f"{split}.jsonl").read_text().splitlines()
        pictures = [json.loads(line) for line in lines]
        path = args.world / args.tree / f"{args.texts}_{split}.npy"
        np.save(path, true_of(texts, pictures).T)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
