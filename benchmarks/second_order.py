"""Time the second-order stage against open_clip's plain forward pass, and against the naive definition.

    python -m benchmarks.second_order [--model ViT-B-32] [--device cpu] [--batch_size 16] [--rounds 15] \\
        [--quick]

The same random images go through `encode_image` and through `second_order` for one late layer, three layers
and all layers, in turn; a ratio is the median of the rounds' ratios. For ViT-L-14 the naive definition takes
more than 20 GB of memory and minutes an image; --naive_rounds 0 leaves it out. It is there for open_clip's
own ViTs alone.
"""

from functools import partial

import torch

from benchmarks.common import Table, bench_parser, interleaved, median, of_model, ratio, row, run
from benchmarks.naive import naive_effects
from utils.model.clip import load_clip
from utils.prs import fold, second_order


def set_up(args, folder):
    """Return {name: function} for a batch and for one image with the definition, and the side of an image."""
    clip = load_clip(args.model, args.pretrained, args.device)
    vit = clip.vit
    late = max(vit.L - 3, 0)
    near = [layer for layer in (late - 1, late, late + 1) if 0 <= layer <= vit.last]
    last = max(vit.L - 2, 0)
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, *vit.visual.image_size, device=args.device)
    wanted = near if args.quick else range(last + 1)
    directions = {layer: fold(vit, layer) for layer in wanted}
    one = [directions[late]]
    three = [directions[layer] for layer in near]
    batch = {
        "plain encode_image": lambda: plain(clip, images),
        f"layer {late}": lambda: effects(vit, images, one),
        f"layers {near[0]} to {near[-1]}": lambda: effects(vit, images, three),
        f"layers 0 to {last}": lambda: effects(vit, images, list(directions.values())),
        f"layer {late}, with the dense effects": lambda: dense_effects(vit, images, one),
    }
    image = images[:1]
    naive = partial(naive_effects, vit.visual, image, late)
    single = {
        f"ours, layer {late}": lambda: effects(vit, image, one),
        f"definition as written, layer {late}": naive,
        f"definition, tokens summed at the attention, layer {late}": partial(naive, sum_early=True),
    }
    if args.quick:
        del batch[f"layers 0 to {last}"], single[f"definition as written, layer {late}"]
    return batch, single, images.shape[-1]


@torch.inference_mode()
def plain(clip, images):
    clip.text.encode_image(images)


def effects(vit, images, directions):
    for _ in second_order(vit, images, directions)[1]:  # each layer's are computed when they are asked for
        pass


@torch.inference_mode()
def dense_effects(vit, images, directions):
    for phi in second_order(vit, images, directions)[1]:
        phi.dense()


def measure(args, case):
    batch, single, side = case
    of_batch = interleaved(batch, args.rounds, args.device)
    of_single = {}
    if args.naive_rounds:
        of_single = interleaved(single, args.naive_rounds, args.device)
    return of_batch, of_single, side


def table(args, found):
    batch, single, side = found
    title = f"Second-order effects, {args.model}, batches of {args.batch_size} images of {side} px"
    rows = batch_rows(args, batch) + single_rows(args, batch, single)
    return Table(of_model("second_order", args.model), title, rows)


def batch_rows(args, seconds):
    """Return the rows of a batch against the plain pass."""
    rows = []
    plain_seconds = seconds["plain encode_image"]
    bars = dict(zip(list(seconds)[:3], (None, args.at_most, args.at_most + 0.1), strict=True))
    for name, times in seconds.items():
        note = f"{1000 * median(times) / args.batch_size:.2f} ms an image"
        rows.append(row(name, ratio(times, plain_seconds), "x plain", at_most=bars.get(name), note=note))
    return rows


def single_rows(args, batch, single):
    """Return the rows of the definition against ours.

    Ours is an image of a batch, as the stage has it; alone it takes longer.
    """
    plain_seconds, late, *_ = batch.values()
    ours = median(plain_seconds) / args.batch_size * ratio(late, plain_seconds)
    rows = []
    for name, times in list(single.items())[1:]:
        alone = 1000 * median(next(iter(single.values())))
        note = f"{median(times):.2f} s an image; ours {1000 * ours:.1f} ms in a batch, {alone:.1f} ms alone"
        bar = None if "summed" in name else 500
        rows.append(row(name, median(times) / ours, "x ours", at_least=bar, note=note))
    return rows


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pretrained", default="random")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--naive_rounds", type=int, default=2)
    parser.add_argument("--at_most", type=float, default=1.05, help="bar of one layer, times the plain pass")
    run(parser, set_up, measure, table, quick={"batch_size": 2, "rounds": 1, "naive_rounds": 1})
