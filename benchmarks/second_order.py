"""The second-order stage against open_clip's plain forward pass, and against the definition computed naively.

    python benchmarks/second_order.py [--model ViT-B-32] [--device cpu] [--batch_size 16] [--rounds 15] [--quick]

The same random images go through `encode_image` and through `second_order` for one late layer, three layers and all layers, in
turn; a ratio is the median of the rounds' ratios. For ViT-L-14 the naive definition takes more than 20 GB of memory and minutes
an image; --naive_rounds 0 leaves it out.
"""

import torch
from common import bench_parser, interleaved, median, ratio, row, save_table
from naive import naive_effects

from utils.clip import load_clip
from utils.prs import dense, fold, second_order


def main(args):
    batch_size, rounds = (2, 1) if args.quick else (args.batch_size, args.rounds)
    naive_rounds = min(args.naive_rounds, 1) if args.quick else args.naive_rounds
    clip = load_clip(args.model, args.pretrained, args.device)
    vit = clip.hooked_vit()
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, *clip.model.visual.image_size, device=args.device)
    late = vit.L - 3
    several = list(range(vit.L - 1)) if not args.quick else [late - 1, late, late + 1]
    directions = {layer: fold(vit, layer) for layer in several}
    three = [directions[layer] for layer in (late - 1, late, late + 1)]

    @torch.inference_mode()
    def plain():
        clip.model.encode_image(images)

    @torch.inference_mode()
    def dense_effects():
        _, [(C, kappa)] = second_order(vit, images, [directions[late]])
        dense(C, kappa, directions[late])

    def effects(of, images=images):  # each layer's are computed when they are asked for
        for _ in second_order(vit, images, of)[1]:
            pass

    functions = {
        "plain encode_image": plain,
        f"layer {late}": lambda: effects([directions[late]]),
        f"layers {late - 1} to {late + 1}": lambda: effects(three),
        f"layers 0 to {vit.L - 2}": lambda: effects(list(directions.values())),
        f"layer {late}, with the dense effects": dense_effects,
    }
    if args.quick:
        del functions[f"layers 0 to {vit.L - 2}"]
    seconds = interleaved(functions, rounds, args.device)
    reference = seconds["plain encode_image"]
    bars = dict(zip(functions, (None, 1.05, 1.15), strict=False))
    rows = []
    for name, times in seconds.items():
        note = f"{1000 * median(times) / batch_size:.2f} ms an image"
        rows.append(row(name, ratio(times, reference), "x plain", bars.get(name), note))

    one = images[:1]
    both = {
        "ours": lambda: effects([directions[late]], one),
        "definition as written": lambda: naive_effects(vit.visual, one, late),
        "definition, tokens summed at the attention": lambda: naive_effects(vit.visual, one, late, sum_early=True),
    }
    if args.quick:
        del both["definition as written"]
    seconds = interleaved(both if naive_rounds else {}, naive_rounds, args.device)
    ours = median(reference) / batch_size * rows[1]["value"]  # an image of a batch, as the stage has it
    for name, times in list(seconds.items())[1:]:
        alone = 1000 * median(seconds["ours"])
        note = f"{median(times):.2f} s an image; ours {1000 * ours:.1f} ms in a batch, {alone:.1f} ms alone"
        rows.append(row(f"{name}, layer {late}", median(times) / ours, "x ours", None if "summed" in name else (500,), note))
    name = "second_order" if args.model == "ViT-B-32" else f"second_order_{args.model}"
    title = f"Second-order effects, {args.model}, batches of {batch_size} images of {images.shape[-1]} px"
    save_table(name, title, rows, args, args.device)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pretrained", default="random")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--naive_rounds", type=int, default=2)
    main(parser.parse_args())
