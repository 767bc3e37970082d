"""A page of all neurons of some layers: what each writes and fires on, its top pictures, its grades.

    python make_gallery.py --model ViT-B-32 --pretrained openai --dataset imagenet --data_path PATH
        --mlp_layer 9 \\ --text_descriptions 30k --components 128

Reads what the stages up to evaluate_descriptions.py have left, and goes once over the images of both splits.
Writes the folder --gallery (OUTPUT_DIR/gallery): index.html, to be opened as it is or put on any web host,
its data and pictures, neurons.parquet, and FORMAT.md, which says what is in them. Every neuron has an
address, index.html#LAYER/NEURON.
"""

import shutil
from pathlib import Path

import numpy as np
import torch

from applications.gallery.collect import Collector, collect, thumbnails
from applications.gallery.sources import Sources
from applications.gallery.write import check_folder, write_gallery
from utils.data.images import Loader
from utils.prs import fold_layers
from utils.runtime import distributed, flags
from utils.runtime.files import whole_folder
from utils.runtime.layers import groups_of_layers
from utils.runtime.locks import Lock
from utils.runtime.passes import Pass, pieces_of
from utils.runtime.records import is_made


def main(args):
    known = {"data_path": args.data_path, "split": args.split, "descriptions_dir": args.descriptions_dir}
    known |= {
        "subsample": args.subsample,
        "train_subsample": args.train_subsample,
        "train_data_path": args.train_data_path,
    }
    inputs, results = flags.results_of(args, **known)
    gallery = Path(args.gallery).resolve() if args.gallery else results.path("gallery").parent.resolve()
    parts = check_folder(gallery)
    sources = Sources(args, inputs)
    gallery.parent.mkdir(parents=True, exist_ok=True)
    with Lock(gallery):
        distributed.barrier()  # nobody looks before the lock is taken
        make(args, sources, gallery, parts)


def make(args, sources, gallery, parts):
    """Go over the images of both splits, and write the page. parts: the folder of what the passes leave."""
    made = is_made(gallery / "index.html", sources.record, args.overwrite)
    if not made:
        parts.mkdir(parents=True, exist_ok=True)
        for split, images in sources.splits.items():
            for group in groups_of_layers(sources.clip.vit, sources.layers, args.memory * 1e9):
                look(args, sources, parts, split=split, images=images, layers=group)
    if distributed.is_rank_zero():
        if not made:
            with whole_folder(gallery) as folder:
                write_gallery(folder, sources, parts, earlier=gallery)
        shutil.rmtree(parts, ignore_errors=True)
        neurons = len(sources.layers) * sources.clip.vit.N
        print(f"{'kept' if made else 'wrote'} {gallery}: {neurons} neurons; open {gallery / 'index.html'}")


def look(args, sources, parts, split, images, layers):
    """One pass over the images of a split: small pictures, maps, concepts, and shares of the heads."""
    vit, (arrays, state, record) = sources.clip.vit, sources.arrays(parts, split, layers)
    pieces, settings = pieces_of(images, args.batch_size), {"layers": layers, "batch_size": args.batch_size}
    with (
        torch.inference_mode(),
        Pass(arrays, record, pieces, settings, state=state, overwrite=args.overwrite) as work,
    ):
        folded = [] if work.finished else fold_layers(vit, layers)
        collectors = [Collector(item, *sources.of_layer(item.layer, split)) for item in folded]
        for rows, pixels in work.over(Loader(images, args.device, args.num_workers)):
            if not args.no_pictures:
                work[parts / f"{split}_pictures.npy"][rows] = thumbnails(
                    pixels, sources.clip.transform, sources.size
                )
            for each, p, phi in collect(vit, layers, collectors, pixels):
                layer = each.directions.layer
                found, maps = each.maps(rows, p, vit.prefix)
                work[parts / f"{split}_{layer}_maps.npy"][found] = maps
                for name, values in zip(
                    ("neurons", "norms", "words", "scores"), each.concepts(phi), strict=True
                ):
                    work[parts / f"{split}_{layer}_{name}.npy"][rows] = values
                if state:
                    work.state[f"heads{layer}"] += each.through_heads(phi).cpu().double().numpy()
        if state and not work.finished:
            for name, of_processes in work.gather(list(state)).items():
                work[parts / f"{split}_{name.removeprefix('heads')}_heads.npy"][:] = np.sum(
                    of_processes, axis=0
                )


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__)
    flags.add_described(parser)
    parser.add_argument("--gallery", help="the folder to write; default: OUTPUT_DIR/gallery")
    parser.add_argument(
        "--no_pictures", action="store_true", help="leave out pictures and the names of their files"
    )
    parser.add_argument(
        "--picture_size", type=flags.positive_int, default=96, help="side of a small picture in pixels"
    )
    flags.add_compute(parser, precision=True, memory=True)
    flags.add_coefficient(parser)
    flags.run(main, parser, parallel=True)
