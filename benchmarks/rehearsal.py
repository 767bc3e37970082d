"""A real-size rehearsal: every stage in README order on photos at full size, with random weights; time, memory and disk of each.

    python benchmarks/rehearsal.py --mlp_layer all --images 5124 --val_images 5000 --texts 30000     # the paper's sizes
    python benchmarks/rehearsal.py --model ViT-L-14 --mlp_layer all --images 200 --val_images 200 --keep top --project 5124 5000

Texts are given random unit vectors, which the matching pursuit does not notice; the text encoder has its own benchmark.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, bench_parser, looping, measured, row, save_table

from tests.photos import SYNSETS, write_photos
from utils.artifacts import Names
from utils.clip import load_clip


def main(args):
    if args.quick:
        args.images, args.val_images, args.texts, args.components, args.describe = 8, 8, 20, 4, args.describe[:1]
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        out, photos, rng = Path(folder) / "out", Path(folder) / "photos", np.random.default_rng(0)
        out.mkdir()
        for split, images in (("train", args.images), ("val", args.val_images)):
            write_photos(photos, splits=(split,), per_class=images // len(SYNSETS))
        names = Names(out, args.model, "random")
        D = load_clip(args.model, "random", "cpu").model.visual.output_dim
        for path, count, columns in ((names.classifier("imagenet"), 1000, True), (names.texts("words"), args.texts, False)):
            vectors = rng.standard_normal((count, D), dtype=np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            np.save(path, vectors.T if columns else vectors)
        (out / f"words_{names.clip}.txt").write_text("".join(f"word {i}\n" for i in range(args.texts)))

        model = ["--model", args.model, "--pretrained", "random", "--device", args.device, "--output_dir", out]
        images = ["--data_path", photos, "--subsample", 1, "--batch_size", args.batch_size]
        layers, pca = ["--mlp_layer", *args.mlp_layer], ["--top_k_pca", min(100, args.images)]
        memory = ["--memory", args.memory] if args.memory else []
        effects = [*images, *layers, "--split", "train"]
        describe = ["--mlp_layer", *args.describe, *pca, "--text_descriptions", "words", "--components", args.components]
        stages = [("compute_representations", [*images, "--split", "train"])]
        for keep in args.keep:
            form = ["--keep", keep, *(pca if keep == "top" else ["--store_dtype", "float16"])]
            stages += [("compute_second_order_neuron_prs", [*effects, *form, *memory]), ("compute_pcas", [*layers, *pca])]
        stages += [("compute_ablations", [*images, *layers, *pca, *memory]), ("compute_sparse_decomposition", describe)]

        rows, judged, peaks, plain, keep = [], [], [], None, None
        barred = args.model == "ViT-B-32" and args.mlp_layer == ["all"]
        for script, flags in stages:
            before = time.time()
            _, seconds, peak, errors = measured([sys.executable, ROOT / f"{script}.py", *model, *flags])
            written = sum(file.stat().st_size for file in out.glob("*") if file.stat().st_mtime >= before)
            plain = plain or seconds
            name = script
            if "--keep" in flags:
                keep = flags[flags.index("--keep") + 1]
                name += f" --keep {keep}"
            elif script == "compute_pcas":
                name += f", after --keep {keep}"
                for part in ("coefficients", "top_coefficients"):  # the other form comes next
                    for path in out.glob(f"*_{part}.npy"):
                        path.unlink()
            if script == "compute_second_order_neuron_prs":
                bar = {"full": 1.3, "top": 2.6}[keep] if barred else None
                judged.append(row(f"effects, --keep {keep}", seconds / plain, "x plain", bar, "the whole processes"))
                if keep == "top":
                    judged.append(row("effects, --keep top, on disk", written / 1e9, "GB", 3 if barred else None))
            peaks.append(peak)
            note = f"peak {peak / 1e9:.2f} GB, {written / 1e9:,.2f} GB written"
            if args.project:
                held_out, loop = script == "compute_ablations", looping(errors)
                projected = seconds - loop + loop * args.project[held_out] / (args.images, args.val_images)[held_out]
                note += f"; {loop} s of it over images, projected {projected:,.0f} s"
            rows.append(row(name, seconds, "s", None, note))
            print(rows[-1], flush=True)
        judged.append(row("peak memory of all stages", max(peaks) / 1e9, "GB", 3 if barred else None, "with their workers"))
    title = f"Rehearsal, {args.model}, random weights, layer {' '.join(args.mlp_layer)}, {args.images} + {args.val_images} photos"
    title += f", {args.texts} texts, {args.components} of them for each neuron of layer {' '.join(args.describe)}"
    title += f", --keep {' '.join(args.keep)}"
    if args.project:
        title += f", projected to {args.project[0]} + {args.project[1]} photos"
    name = f"rehearsal_{args.model}" + ("" if len(args.keep) > 1 else f"_{args.keep[0]}")
    save_table(name, title, rows + judged, args, args.device)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=200, help="photos of the train split")
    parser.add_argument("--val_images", type=int, default=200, help="photos of the val split")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--mlp_layer", nargs="+", default=["9"])
    parser.add_argument("--describe", nargs="+", default=["9"], help="the layers that are decomposed")
    parser.add_argument(
        "--keep", nargs="+", default=["top", "full"], help="in this order: the full store fills the system's cache"
    )
    parser.add_argument("--memory", type=float, help="--memory of the stages; default: theirs")
    parser.add_argument("--project", nargs=2, type=int, metavar=("IMAGES", "VAL"), help="say what so many photos would take")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--tmp", help="where photos and results are put for the time of the run; default: the temporary folder")
    main(parser.parse_args())
