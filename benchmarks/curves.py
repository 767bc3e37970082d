"""How time and memory grow with the number of images, layers and neurons; with the number of texts: benchmarks/omp.py.

    python benchmarks/curves.py [--images 100 500 1000 5000] [--layers 1 3 6 11] [--neurons 128 512 2048] [--tmp FOLDER] [--quick]

ViT-B-32 with random weights on photos. Every point is a process of its own: one late layer on N images, and its components;
several layers on the fewest images, all effects and the largest only; the matching pursuit for N neurons with 30,000 texts.
"""

import sys
import tempfile
from pathlib import Path

from common import ROOT, bench_parser, measured, row, save_table
from omp import run as pursue

from tests.photos import SYNSETS, write_photos
from utils.artifacts import Names

LAYER = 9


def main(args):
    if args.quick:
        args.images, args.layers, args.neurons, args.texts, args.atoms = [8, 16], [1, 2], [4, 8], 600, 8
    rows = []
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        names, few = Names(Path(folder) / "out", "ViT-B-32", "random"), min(args.images)
        output = ["--model", "ViT-B-32", "--pretrained", "random", "--output_dir", names.directory, "--device", args.device]

        def effects(photos, layers, *flags):
            data = ["--data_path", photos, "--split", "train", "--subsample", 1, "--mlp_layer", *layers, "--top_k_pca", few]
            script = [sys.executable, ROOT / "compute_second_order_neuron_prs.py", *output, *data, *flags]
            _, seconds, peak, _ = measured(script)
            written = sum(file.stat().st_size for file in names.directory.iterdir())
            return seconds, f"peak {peak / 1e9:.2f} GB, {written / 1e9:.2f} GB written"

        def clear():
            for file in names.directory.iterdir():
                file.unlink()

        for count in args.images:
            photos = write_photos(Path(folder) / str(count), ("train",), per_class=count // len(SYNSETS))
            rows.append(row(f"effects of layer {LAYER}, {count:,} images", *_of(effects(photos, [LAYER]))))
            flags = ["--mlp_layer", LAYER, "--top_k_pca", few]
            _, seconds, peak, _ = measured([sys.executable, ROOT / "compute_pcas.py", *output, *flags])
            rows.append(row(f"components of layer {LAYER}, {count:,} images", seconds, "s", None, f"peak {peak / 1e9:.2f} GB"))
            clear()
        for count in args.layers:
            for keep in ("full", "top"):
                layers = range(11 - count, 11)
                found = effects(Path(folder) / str(few), layers, "--keep", keep)
                rows.append(row(f"effects of {count} layers, {few} images, --keep {keep}", *_of(found)))
                clear()
    for neurons in args.neurons:
        result = pursue("ours", args.texts, args.atoms, neurons, args)
        note = f"peak {result['peak'] / 1e9:.2f} GB, {1000 * result['seconds']:.1f} ms a neuron"
        name = f"{args.atoms} of {args.texts:,} texts for {neurons:,} neurons"
        rows.append(row(name, neurons * result["seconds"], "s", None, note))
    save_table("curves", "Cost curves, ViT-B-32, random weights, photos of 224 px", rows, args, args.device)


def _of(found):
    """The rest of a row of (seconds, note)."""
    return found[0], "s", None, found[1]


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 500, 1000, 5000])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3, 6, 11], help="how many of the last ones")
    parser.add_argument("--neurons", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--texts", type=int, default=30000)
    parser.add_argument("--atoms", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tmp", help="where photos and results are put for the time of the run; default: the temporary folder")
    main(parser.parse_args())
