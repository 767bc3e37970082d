"""Measure how time and memory grow with the number of images, layers and neurons.

How they grow with the number of texts is in benchmarks/omp.py.

    python -m benchmarks.curves [--images 100 500 1000 5000] [--layers 1 3 6 11] [--neurons 128 512 2048] \\
        [--tmp FOLDER] [--quick]

ViT-B-32 with random weights on photos. Every point is a process of its own: one late layer on N images, and
its components; several layers on the fewest images, all effects and the largest only; the largest of the most
layers on N images (one pass, from 512 images on, beside two passes); the matching pursuit for N neurons with
30,000 texts.
"""

from benchmarks.common import Table, bench_parser, row, run, stage, write_photos
from benchmarks.omp import pursue
from utils.top_effects import strides_of

LAYER, L = 9, 12


def set_up(args, folder):
    """Write trees of photos. Returns {number of images: root} and the folder of the results."""
    photos = {images: write_photos(folder / str(images), images, ("train",)) for images in args.images}
    return photos, folder / "out"


def measure(args, case):
    """Measure all points, {what: (seconds, note)}."""
    photos, out = case
    found = {}
    for images in args.images:
        found[f"effects of layer {LAYER}, {images:,} images"] = effects(args, photos[images], out, [LAYER])
        found[f"components of layer {LAYER}, {images:,} images"] = components(args, out)
        clear(out)
    few = min(args.images)
    for count in args.layers:
        for keep in ("full", "top"):
            layers = [*range(L - 1 - count, L - 1), "--keep", keep]
            what = f"effects of {count} layers, {few} images, --keep {keep}"
            found[what] = effects(args, photos[few], out, layers)
            clear(out)
    for images in args.images:
        layers = [*range(L - 1 - max(args.layers), L - 1), "--keep", "top"]
        what = f"effects of {max(args.layers)} layers, {images:,} images, --keep top"
        for passes in ("", " --passes 2") if strides_of(images).look > 1 else ("",):
            found[what + passes] = effects(args, photos[images], out, layers + passes.split())
            clear(out)
    for neurons in args.neurons:
        result = pursue("ours", args.texts, args.atoms, neurons=neurons, device=args.device)
        note = f"peak {result['peak'] / 1e9:.2f} GB, {1000 * result['seconds']:.1f} ms a neuron"
        what = f"{args.atoms} of {args.texts:,} texts for {neurons:,} neurons"
        found[what] = (neurons * result["seconds"], note)
    return found


def shared_flags(args, out):
    flags = ["--model", "ViT-B-32", "--pretrained", "random", "--device", args.device, "--output_dir", out]
    return [*flags, "--top_k_pca", min(args.images)]


def effects(args, photos, out, layers):
    """Run the stage on some layers. Returns (seconds, note). layers: flags after --mlp_layer."""
    flags = [*shared_flags(args, out), "--data_path", photos, "--split", "train", "--subsample", 1]
    process = stage("compute_second_order_neuron_prs", *flags, "--mlp_layer", *layers)
    written = sum(file.stat().st_size for file in out.iterdir())
    return process.seconds, f"peak {process.peak / 1e9:.2f} GB, {written / 1e9:.2f} GB written"


def components(args, out):
    """Compute the components of the stored effects. Returns (seconds, note)."""
    process = stage("compute_pcas", *shared_flags(args, out), "--mlp_layer", LAYER)
    return process.seconds, f"peak {process.peak / 1e9:.2f} GB"


def clear(out):
    """Remove the results, which are of other images than the next ones."""
    for file in out.iterdir():
        file.unlink()


def table(args, found):
    rows = [row(what, seconds, "s", note=note) for what, (seconds, note) in found.items()]
    return Table("curves", "Cost curves, ViT-B-32, random weights, photos of 224 px", rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    several = {"type": int, "nargs": "+"}
    parser.add_argument("--images", **several, default=[100, 500, 1000, 5000], help="multiples of 4")
    parser.add_argument("--layers", **several, default=[1, 3, 6, 11], help="how many of the last ones")
    parser.add_argument("--neurons", **several, default=[128, 512, 2048])
    parser.add_argument("--texts", type=int, default=30000)
    parser.add_argument("--atoms", type=int, default=128)
    quick = {"images": [8, 16], "layers": [1, 2], "neurons": [4, 8], "texts": 600, "atoms": 8}
    run(parser, set_up, measure, table, quick=quick)
