"""Measure the cost of looking at all bytes of weights and images, so that no change of them goes unseen.

    python -m benchmarks.fingerprints [--model ViT-L-14] [--images 5124] [--side 500] [--quick]

The photos are JPEG files of `--side` pixels, about ImageNet's. Earlier versions looked at 1,024 entries of
every tensor and at the sizes of the files: this is the alternative.
"""

import hashlib
import os

import open_clip

from benchmarks.common import Table, bench_parser, interleaved, median, row, run, write_photos
from utils.data.images import load_images
from utils.model.clip import weights_fingerprint


def set_up(args, folder):
    """Return the model, its bytes, the images, and their bytes."""
    model = open_clip.create_model(args.model)
    root = write_photos(folder, args.images, ("val",), side=args.side)
    images = load_images("imagenet", root, "val", subsample=1)
    weights = sum(4 * tensor.numel() for tensor in model.state_dict().values())
    return model, weights, images, sum(os.path.getsize(path) for path, _ in images.samples)


def samples_of(model):
    """Return a digest of 1,024 entries of every tensor."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.reshape(-1)[:: max(1, tensor.numel() // 1024)].numpy().tobytes())
    return digest.hexdigest()


def measure(args, case):
    """Time each way, {name: [seconds]}."""
    model, _, images, _ = case

    def digests():
        images.__dict__.pop("digests", None)  # it is kept once it is known
        return images.digests

    functions = {
        "weights": lambda: weights_fingerprint(model),
        "samples": lambda: samples_of(model),
        "images": digests,
        "sizes": lambda: [os.path.getsize(path) for path, _ in images.samples],
    }
    return case, interleaved(functions, args.rounds)


def table(args, found):
    (_, weights, images, size), seconds = found
    seconds = {name: median(times) for name, times in seconds.items()}
    count = f"{len(images):,} photos, {size / 1e9:.2f} GB"
    of_weights = f"all bytes of {args.model}'s weights, {weights / 1e9:.2f} GB"
    rows = [
        row(of_weights, seconds["weights"], "s", at_most=args.bars and 2),
        row("1,024 entries of each of its tensors", seconds["samples"], "s"),
        row(f"all bytes of {count}", seconds["images"], "s", at_most=args.bars and 5),
        row("the sizes of these", seconds["sizes"], "s"),
    ]
    return Table("fingerprints", "What tells weights and images apart", rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__, device=False)
    parser.add_argument("--model", default="ViT-L-14")
    parser.add_argument("--images", type=int, default=5124, help="a multiple of 4")
    parser.add_argument("--side", type=int, default=500, help="pixels of a photo, about ImageNet's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.set_defaults(bars=True)
    run(parser, set_up, measure, table, quick={"model": "ViT-B-32", "images": 16, "rounds": 1, "bars": None})
