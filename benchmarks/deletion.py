"""Measure what it costs to take neurons away, and to find those that bring a score about, at full size.

    python -m benchmarks.deletion        # ViT-B-32, 200 photos

Deletions are those of compute_sparse_decomposition.py --order total: every neuron of a layer, on 24 images
on which it acts most. The contributions of all neurons of all layers are one forward and one backward pass.
"""

from typing import NamedTuple

from benchmarks.common import (
    Table,
    alone,
    bench_parser,
    interleaved,
    of_model,
    ratio,
    row,
    run,
    stage,
    write_photos,
)
from utils.runtime.results import Results


class Found(NamedTuple):
    """`Found` is all that was measured."""

    deletions: object  # `Process`
    explained: object  # `Process`
    contributions: float  # times a forward pass
    peak: float  # bytes, of the contributions


def set_up(args, folder):
    """Write photos, and run the stages up to the components. Returns a photo, and flags of stages."""
    photos = write_photos(folder / "photos", args.images, ("train",))
    results = Results(folder / "out", args.model, "random")
    model = ["--model", args.model, "--pretrained", "random", "--device", args.device]
    model += ["--output_dir", results.directory]
    images = ["--data_path", photos, "--subsample", 1, "--batch_size", args.batch_size]
    layer = ["--mlp_layer", args.mlp_layer, "--top_k_pca", min(100, args.images)]
    stage("compute_second_order_neuron_prs", *model, *images, *layer, "--split", "train", "--keep", "top")
    stage("compute_pcas", *model, *layer)
    stage("compute_text_set_projection", *model, "--text_descriptions", "concepts")
    return min(photos.rglob("*.JPEG")), model, [*images, *layer, "--train_subsample", 1]


def measure(args, case):
    """Delete all neurons of the layer, explain one picture, and time the contributions."""
    photo, model, flags = case
    texts = ["--text_descriptions", "concepts", "--components", 1]
    deletions = stage("compute_sparse_decomposition", *model, *flags, *texts, "--order", "total")
    asked = ["--text", "a dog", "--against", "a cat", "--baseline", "zero"]
    explained = stage("explain_image", photo, *model, *asked)
    times, process = alone(
        time_contributions,
        model=args.model,
        device=args.device,
        batch_size=args.batch_size,
        rounds=args.rounds,
    )
    return Found(deletions, explained, ratio(times["contributions"], times["forward"]), process.peak)


def time_contributions(model, device, batch_size, rounds):
    """Time a forward pass, and all contributions, in turns: {name: [seconds per round]}."""
    import torch

    from utils.contributions import Contributions
    from utils.model.clip import load_clip

    vit = load_clip(model, "random", device, image_only=True).vit
    pixels = torch.randn(batch_size, 3, *vit.visual.image_size, device=vit.device)
    means = {layer: torch.zeros(vit.T, vit.N, device=vit.device) for layer in range(vit.last + 1)}
    v = torch.nn.functional.normalize(torch.randn(vit.D, device=vit.device), dim=0)
    finder = Contributions(vit, means, v)

    def forward():
        with torch.inference_mode():
            vit(pixels)

    found = {"forward": forward, "contributions": lambda: finder.contributions(finder(pixels))}
    return interleaved(found, rounds, device)


def table(args, found):
    """Return the table, with bars where the full sizes were measured."""
    full = args.model == "ViT-B-32" and args.images >= 200

    def bar(value):
        return value if full else None

    each = f"layer {args.mlp_layer}, all neurons x 24 images"
    minutes = found.deletions.seconds / 60
    note = f"with its start, and a pass over {args.images} photos"
    rows = [
        row(f"deletions: {each}", minutes, "minutes", at_most=bar(10), note=note),
        row("deletions: peak memory", found.deletions.peak / 1e9, "GB", at_most=bar(3)),
        row("contributions of all neurons of all layers", found.contributions, "x forward", at_most=bar(3)),
        row("contributions: peak memory", found.peak / 1e9, "GB", at_most=bar(3)),
        row("explain_image.py, one picture, with its start", found.explained.seconds, "s", at_most=bar(20)),
        row("explain_image.py: peak memory", found.explained.peak / 1e9, "GB", at_most=bar(3)),
    ]
    title = f"Taking neurons away, {args.model}, random weights"
    return Table(of_model("deletion", args.model), title, rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--mlp_layer", type=int, default=9)
    parser.add_argument("--images", type=int, default=200, help="training photos")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    run(parser, set_up, measure, table, {"images": 40, "mlp_layer": 10, "rounds": 1})
