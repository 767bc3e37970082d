"""Draw the embedded world's data sets, in the layouts that the project's loaders read.

    python -m demo.make_world --output_dir runs/world

    DIR/symbols/{train,val,val_broken}/CLASS/*.png   32 classes: the (larger) symbol of one or two
    DIR/pairs/{train,val}/CLASS/*.png                320 classes: colour and symbol of the larger of two
    DIR/{symbols,pairs}/SPLIT.jsonl                  the truth, a line per picture in the order of the files
    DIR/{symbols,pairs}/class_names.txt              in the order of the sorted folders
    DIR/segmentation_{single,two}.mat                MATLAB v7.3, like gtsegs_ijcv.mat; in "two" every scene
                                                     comes twice, once with the mask of each symbol
    DIR/segmentation_{single,two}.jsonl              the truth
    DIR/segmentation_{single,two}_classes.npy        the index of the symbol that is meant
    DIR/habits.json                                  the planted habits
    DIR/words.txt, grounds.txt, atoms.txt            text sets; grounds: the texts that name no symbol; atoms:
                                                     those that name one thing, colour or texture

`train` follows the habits and has its share of pale, tiny and cut off symbols, as the CLIP's own training
pictures do; `val` follows the habits with clear pictures, `val_broken` never follows them. The bytes depend
on the flags alone. A second call draws only what is missing.
"""

import argparse
import json
import os
import random
import shutil
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

from demo.world import (
    COLOURS,
    HARD_RATE,
    PAIRS,
    SIDE,
    SYMBOLS,
    TEXTURES,
    World,
    atomic_texts,
    caption,
    draw,
    parse,
    text_pool,
    to_pil,
)


def write(path, text):
    """Write a text file, whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def truth(scene, rng, **more):
    """Return what is known of a picture, as one line of json."""
    main = scene.things[0]
    other = scene.things[1] if len(scene.things) == 2 else None
    known = {
        **more,
        "caption": caption(scene, rng),
        "symbol": main.symbol,
        "colour": main.colour,
        "pair": main.pair,
        "companion": other and other.symbol,
        "companion_colour": other and other.colour,
        "background": scene.background,
        "texture": scene.texture,
        "flaw": scene.flaw,
        "scene": scene.to_json(),
    }
    return json.dumps(known) + "\n"


def draw_split(folder, classes, per_class, sample, seed):
    """Draw one split as class folders of PNGs, and its truth beside it.

    folder: folder of the split.
    classes: names of the classes, one folder each.
    per_class: pictures of each class.
    sample: (rng, class) -> scene.
    seed: seed of the pictures.
    """
    if folder.exists():
        return
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name in classes:
        (part / name).mkdir(parents=True)
    files = [f"{name}/{i:05d}.png" for name in sorted(classes) for i in range(per_class)]
    lines = []
    for start in tqdm(range(0, len(files), 64), desc=f"{folder.parent.name}/{folder.name}"):
        batch = files[start : start + 64]
        rngs = [random.Random(f"{seed} {folder.parent.name} {folder.name} {file}") for file in batch]
        scenes = [sample(rng, file.split("/")[0]) for rng, file in zip(rngs, batch, strict=True)]
        for file, scene, rng, image in zip(batch, scenes, rngs, draw(scenes)[0], strict=True):
            to_pil(image).save(part / file, compress_level=1)
            lines.append(truth(scene, rng, file=file))
    write(folder.with_suffix(".jsonl"), "".join(lines))
    os.replace(part, folder)


def draw_segmentation(path, scenes, rngs):
    """Draw scenes as a .mat file, a row for each of a scene's symbols.

    Images are [3, W, H] and masks [W, H], as in MATLAB.
    """
    if path.exists():
        return
    images, masks = draw(scenes)
    rows = [(b, o) for b, scene in enumerate(scenes) for o in range(len(scene.things))]
    meant = [SYMBOLS.index(scenes[b].things[o].symbol) for b, o in rows]
    part = path.with_suffix(".mat.part")
    with h5py.File(part, "w") as file:
        data = file.create_group("#refs#")
        img = file.create_dataset("value/img", (len(rows), 1), dtype=h5py.ref_dtype)
        gt = file.create_dataset("value/gt", (len(rows), 1), dtype=h5py.ref_dtype)
        for row, (b, o) in enumerate(rows):
            pixels = np.asarray(to_pil(images[b])).transpose(2, 1, 0)  # [3, W, H]
            img[row, 0] = data.create_dataset(f"img{row}", data=np.ascontiguousarray(pixels)).ref
            mask = data.create_dataset(f"mask{row}", data=masks[b, o].T.contiguous().byte().numpy())  # [W, H]
            cell = data.create_dataset(f"cell{row}", (1, 1), dtype=h5py.ref_dtype)
            cell[0, 0] = mask.ref
            gt[row, 0] = cell.ref
    np.save(path.with_name(f"{path.stem}_classes.npy"), np.array(meant))
    lines = [truth(scenes[b], rngs[b], meant=scenes[b].things[o].symbol) for b, o in rows]
    write(path.with_suffix(".jsonl"), "".join(lines))
    os.replace(part, path)


def write_texts(out, world):
    """Write the class names, the text sets and the habits."""
    for tree, classes in (("symbols", SYMBOLS), ("pairs", PAIRS)):
        (out / tree).mkdir(parents=True, exist_ok=True)
        write(out / tree / "class_names.txt", "\n".join(sorted(classes)) + "\n")
    texts = text_pool()
    grounds = [text for text in texts if not parse(text)["things"]]
    for name, lines in (("words", texts), ("grounds", grounds), ("atoms", atomic_texts())):
        write(out / f"{name}.txt", "\n".join(lines) + "\n")
    values = {
        "habits": world.habits,
        "symbols": SYMBOLS,
        "colours": COLOURS,
        "textures": TEXTURES,
        "side": SIDE,
    }
    write(out / "habits.json", json.dumps(values, indent=1) + "\n")


def splits_of(world, args):
    """Return {split: (classes, pictures of each class, (rng, class) -> scene)}."""

    def of_symbol(**options):
        return lambda rng, name: world.sample(rng, symbol=name, **options)

    def of_pair(**options):
        def sample(rng, name):
            colour, symbol = name.split()
            return world.sample(rng, symbol=symbol, colour=colour, companion=1, **options)

        return sample

    clear = {"companion": 0.2}
    return {
        "symbols/train": (SYMBOLS, args.train_per_class, of_symbol(hard=HARD_RATE)),
        "symbols/val": (SYMBOLS, args.val_per_class, of_symbol(**clear)),
        "symbols/val_broken": (SYMBOLS, args.val_per_class, of_symbol(**clear, broken=True)),
        "pairs/train": (PAIRS, args.pairs_per_class, of_pair(hard=HARD_RATE)),
        "pairs/val": (PAIRS, args.pairs_per_class, of_pair()),
    }


def main(argv=None):
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--output_dir", required=True, help="where the world is drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    help = "of the habits; the checkpoint has learned 0"
    parser.add_argument("--habit_seed", type=int, default=0, help=help)
    help = "symbols/train, of each of 32 classes"
    parser.add_argument("--train_per_class", type=int, default=64, help=help)
    parser.add_argument("--val_per_class", type=int, default=32, help="symbols/val and val_broken")
    help = "pairs/train and val, of each of 320 classes"
    parser.add_argument("--pairs_per_class", type=int, default=6, help=help)
    help = "scenes of each segmentation set"
    parser.add_argument("--segmentation_scenes", type=int, default=200, help=help)
    args = parser.parse_args(argv)

    out = Path(args.output_dir)
    world = World(args.habit_seed)
    flags = {name: value for name, value in vars(args).items() if name != "output_dir"}
    if (out / "flags.json").exists() and json.loads((out / "flags.json").read_text()) != flags:
        parser.error(f"{out} holds a world drawn with other flags; remove it or choose another --output_dir")
    write_texts(out, world)
    write(out / "flags.json", json.dumps(flags, indent=1) + "\n")
    for split, (classes, per_class, sample) in splits_of(world, args).items():
        draw_split(out / split, classes, per_class, sample=sample, seed=args.seed)
    for companion, name in enumerate(("single", "two")):
        seeds = [f"{args.seed} segmentation {name} {i}" for i in range(args.segmentation_scenes)]
        rngs = [random.Random(seed) for seed in seeds]
        scenes = [world.sample(rng, companion=companion) for rng in rngs]
        draw_segmentation(out / f"segmentation_{name}.mat", scenes, rngs)
    print(f"the world is in {out}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # many small operations: on a busy machine threads wait for each other
    main()
