"""How many images a second each part of the input pipeline gives, beside what the model takes.

    python benchmarks/pipeline.py [--model ViT-B-32] [--images 256] [--side 500] [--device cpu] [--quick]

The photos are JPEG files of `--side` pixels. Reading, decoding and transforming are timed alone in one process, then together by
the loader with 0, 1, 2, ... worker processes, then the model, then all in the stage's own loop.
"""

import os
import tempfile
import time
from pathlib import Path

import torch
from common import bench_parser, median, row, save_table
from PIL import Image

from tests.photos import SYNSETS, write_photos
from utils.clip import load_clip
from utils.datasets import batches, load_images
from utils.rows import row_pieces


def main(args):
    if args.quick:
        args.images, args.rounds = 16, 1
    clip = load_clip(args.model, "random", args.device, image_only=True)
    vit = clip.hooked_vit()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        root = write_photos(Path(folder), ("val",), per_class=args.images // len(SYNSETS), side=args.side)
        images = load_images("imagenet", root, "val", clip.transform, subsample=1)
        paths = [path for path, _ in images.samples]
        todo = list(enumerate(row_pieces(len(images), args.batch_size)))
        pixels = torch.stack([images[i][0] for i in range(args.batch_size)]).to(args.device)
        decoded = [Image.open(path).convert("RGB") for path in paths[:32]]

        def loading(workers):
            for _ in batches(images, todo, workers, args.device):
                pass

        def everything():
            for _, _, batch, _ in batches(images, todo, args.num_workers, args.device):
                vit(batch).cpu()

        parts = {
            "reading files": (len(paths), lambda: [Path(path).read_bytes() for path in paths]),
            "reading and decoding": (len(paths), lambda: [Image.open(path).convert("RGB") for path in paths]),
            "transforming": (len(decoded), lambda: [clip.transform(image) for image in decoded]),
        }
        for workers in (0, *(2**i for i in range(8) if 2**i <= args.num_workers)):
            parts[f"the loader, {workers} worker processes"] = (len(paths), lambda workers=workers: loading(workers))
        parts[f"{args.model} alone"] = (args.batch_size, lambda: vit(pixels).cpu())
        parts["all together"] = (len(paths), everything)
        seconds = {name: [] for name in parts}
        for _ in range(args.rounds):
            for name, (_, work) in parts.items():
                start = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, (count, _) in parts.items():
        note = "worker processes start within the time" if "worker" in name and " 0 " not in name else ""
        rows.append(row(name, count / median(seconds[name]), "images a second", None, note))
    title = f"Input pipeline, {args.images} photos of {args.side} px, batches of {args.batch_size}, {args.num_workers} workers"
    save_table("pipeline", title, rows, args, args.device)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--side", type=int, default=500, help="pixels of a photo, about ImageNet's")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    main(parser.parse_args())
