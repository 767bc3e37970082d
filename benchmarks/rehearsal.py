"""A real-size rehearsal: every stage in README order on photos at full size, with random weights; time, memory and disk of each.

python benchmarks/rehearsal.py [--model ViT-L-14 --mlp_layer 22 --images 100 --texts 1000]
"""

import sys
import tempfile
from pathlib import Path

from common import ROOT, bench_parser, measured, row, save_table

from tests.photos import SYNSETS, write_photos
from utils.artifacts import read_texts


def main(args):
    if args.quick:
        args.images, args.texts, args.components = 8, 20, 4
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        photos = write_photos(Path(folder) / "photos", per_class=args.images // len(SYNSETS))
        words = Path(folder) / "words.txt"
        words.write_text("\n".join(read_texts(ROOT / "text_descriptions" / "30k.txt")[: args.texts]) + "\n")
        model = ["--model", args.model, "--pretrained", "random", "--device", args.device, "--output_dir", out]
        folders = ["--dataset", "folder", "--data_path", photos]
        images = [*folders, "--batch_size", 8]
        layers = ["--mlp_layer", *args.mlp_layer]
        pca = [*layers, "--top_k_pca", min(100, args.images)]
        stages = {
            "compute_representations": images,
            "compute_classifier_projection": [*folders, "--batch_size", 160],
            "compute_second_order_neuron_prs": [*images, *layers, "--split", "train"],
            "compute_pcas": ["--dataset", "folder", *pca],
            "compute_ablations": [*images, *pca],
            "compute_text_set_projection": ["--text_descriptions", words],
            "compute_sparse_decomposition": [
                *[*images, *pca, "--text_descriptions", "words", "--components", args.components, "--evaluate"],
            ],
        }
        rows = []
        for script, flags in stages.items():
            before = _bytes(out)
            _, seconds, peak = measured([sys.executable, ROOT / f"{script}.py", *model, *flags])
            note = f"peak {peak / 1e9:.2f} GB, {(_bytes(out) - before) / 1e6:,.0f} MB written"
            rows.append(row(script, seconds, "s", None, note))
    title = f"Rehearsal, {args.model}, random weights, layer {' '.join(args.mlp_layer)}, "
    title += f"{args.images} + {args.images} photos, {args.texts} texts, {args.components} of them for each neuron"
    save_table(f"rehearsal_{args.model}", title, rows, args, args.device)


def _bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*")) if folder.is_dir() else 0


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=200, help="photos of each split")
    parser.add_argument("--mlp_layer", nargs="+", default=["9"])
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--components", type=int, default=64)
    main(parser.parse_args())
