"""Measure the images a second of each part of the input pipeline, beside those of the model.

    python -m benchmarks.pipeline [--model ViT-B-32] [--images 256] [--side 500] [--device cpu] [--quick]

The photos are JPEG files of `--side` pixels. Reading, decoding and transforming are timed alone in one
process, then together by the loader with 0, 1, 2, ... worker processes, then the model, then all in the
stage's own loop.
"""

import os
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from benchmarks.common import Table, bench_parser, interleaved, median, row, run, write_photos
from utils.data.images import load_images
from utils.data.splits import Loader
from utils.model.clip import load_clip
from utils.runtime.passes import pieces_of, walk


def set_up(args, folder):
    """Return the parts, {name: (number of images, function)}."""
    clip = load_clip(args.model, "random", args.device, image_only=True)
    root = write_photos(folder, args.images, ("val",), side=args.side)
    images = load_images("imagenet", root, "val", clip.transform, subsample=1)
    paths = [path for path, _ in images.samples]
    pieces = pieces_of(len(images), args.batch_size)
    pixels = torch.stack([images[i][0] for i in range(args.batch_size)]).to(args.device)
    decoded = [Image.open(path).convert("RGB") for path in paths[:32]]
    parts = {
        "reading files": (len(paths), lambda: [Path(path).read_bytes() for path in paths]),
        "reading and decoding": (len(paths), lambda: [Image.open(path).convert("RGB") for path in paths]),
        "transforming": (len(decoded), lambda: [clip.transform(image) for image in decoded]),
    }
    for workers in (0, *(2**i for i in range(8) if 2**i <= args.num_workers)):
        loader = Loader(images, args.device, workers)
        name = f"the loader, {workers} worker processes"
        parts[name] = (len(paths), partial(loading, loader, pieces))
    parts[f"{args.model} alone"] = (args.batch_size, lambda: clip.vit(pixels).cpu())
    loader = Loader(images, args.device, args.num_workers)
    parts["all together"] = (len(paths), lambda: everything(clip.vit, loader, pieces))
    return parts


def loading(loader, pieces):
    for _ in loader(pieces):
        pass


def everything(vit, loader, pieces):
    for _, pixels in walk(pieces, loader):
        vit(pixels).cpu()


@torch.inference_mode()
def measure(args, parts):
    """Return the images a second of every part."""
    seconds = interleaved({name: function for name, (_, function) in parts.items()}, args.rounds, args.device)
    return {name: images / median(seconds[name]) for name, (images, _) in parts.items()}


def table(args, found):
    rows = []
    for name, rate in found.items():
        note = "worker processes start within the time" if "worker" in name and " 0 " not in name else ""
        rows.append(row(name, rate, "images a second", note=note))
    title = f"Input pipeline, {args.images} photos of {args.side} px, batches of {args.batch_size}"
    title += f", {args.num_workers} workers"
    return Table("pipeline", title, rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--images", type=int, default=256, help="a multiple of 4")
    parser.add_argument("--side", type=int, default=500, help="pixels of a photo, about ImageNet's")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3)
    run(parser, set_up, measure, table, quick={"images": 16, "rounds": 1})
