"""Compute the representations of all images of a data set: the first stage.

    python compute_representations.py --model ViT-B-32 --pretrained openai --dataset imagenet --data_path PATH

Writes  DATASET_SPLIT_representations_MODEL_PRETRAINED.npy  [images, D], 100 times the unit representation
        DATASET_SPLIT_classes.npy                           [images], int64 labels, where there are classes
"""

import torch

from utils.data.splits import load_split
from utils.model.clip import clip_of
from utils.runtime import distributed, flags
from utils.runtime.locks import Lock, is_locked
from utils.runtime.passes import Pass
from utils.runtime.records import complete, is_made, save_array


def main(args):
    clip = clip_of(args)
    split = load_split(args, clip.transform)
    results = flags.outputs_of(args, clip)
    classes = results.path("classes", **split.names)
    of_classes = {**split.record, **split.images.classes}
    of_classes.pop("preprocessing")  # labels are equal for all models
    has_classes = bool(split.images.folders)
    classes_are_made = not has_classes or is_made(classes, complete(of_classes), args.overwrite)

    record = {**clip.record, **split.record, "coefficient": args.coefficient}
    arrays = results.arrays(["representations"], {"images": len(split)}, **split.names)
    [path] = arrays
    with torch.inference_mode(), Pass(arrays, record, split, overwrite=args.overwrite) as work:
        for rows, pixels in work:
            work[path][rows] = args.coefficient * torch.nn.functional.normalize(clip.vit(pixels), dim=-1)

    if distributed.is_rank_zero():
        if not classes_are_made or (has_classes and is_locked([classes])):
            save_classes(classes, split.images.labels, of_classes, args.overwrite)
        print(f"wrote {path} {arrays[path][0]}{f' and {classes}' if has_classes else ''}")
        if has_classes:
            print(f"next: {results.command('classifier', dataset=args.dataset)}")
        else:
            known = {"dataset": args.dataset, "split": "train", "layer": "LAYER"}
            print(f"next: {results.command('coefficients', **known)}")


def save_classes(path, labels, record, overwrite):
    """Write the labels, unless they are there. Other models have the same ones: one run at a time writes."""
    with Lock(path):
        if not is_made(path, complete(record), overwrite):
            save_array(path, labels, record)


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__, reads=False)
    flags.add_data(parser, split="train")
    flags.add_compute(parser, precision=True)
    flags.add_coefficient(parser)
    flags.run(main, parser, parallel=True)
