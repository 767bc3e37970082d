"""Make a page of all neurons of some layers: what each writes and fires on over noise, and its top pictures.

    python make_gallery.py --model ViT-B-32 --pretrained WEIGHTS --dataset images --data_path PICTURES
    python make_gallery.py --model ViT-B-32 --pretrained openai --dataset imagenet \\
        --data_path PATH --mlp_layer 9 --text_descriptions 30k --components 128

Runs the stages whose results are not there yet, after it has said which and what they cost, and then goes
once over the images of both splits. Interrupted, the same command resumes. Without --mlp_layer it takes the
last layer but two, without --text_descriptions the pool of visual concepts. Writes the folder --gallery
(OUTPUT_DIR/gallery): index.html, to be opened as it is or put on any web host, its data and pictures,
neurons.parquet, and FORMAT.md, which describes the files. Every neuron has an address,
index.html#LAYER/NEURON. The notebooks know from OUTPUT_DIR/make_gallery.json what the page was made of.
With --units PATH it is a page of a dictionary's units in OUTPUT_DIR/gallery_NAME, with units.parquet, and
with --units pairs of neuron-head pairs (docs/units.md).
"""

import shutil
from pathlib import Path

import numpy as np
import torch

from applications.gallery.collect import Collector, collect, thumbnails
from applications.gallery.plan import Plan
from applications.gallery.sources import Sources
from applications.gallery.write import check_folder, write_gallery
from utils.runtime import distributed, flags
from utils.runtime.locks import Lock
from utils.runtime.passes import Pass
from utils.runtime.records import is_made
from utils.runtime.settings import save_settings
from utils.units import fold_units, kind_of


def main(args):
    inputs, results = flags.results_of(args)
    gallery = Path(args.gallery or results.path("gallery").parent).resolve()
    parts = check_folder(gallery)
    Plan(args, inputs).run()
    sources = Sources(args, inputs, parts)
    gallery.parent.mkdir(parents=True, exist_ok=True)
    with Lock(gallery):
        distributed.barrier()  # nobody looks before the lock is taken
        made = is_made(gallery / "index.html", sources.record, args.overwrite)
        if not made:
            sources.parts.mkdir(exist_ok=True)
            for split in sources.splits:
                for group in sources.groups:
                    look(sources, split, group)
        if distributed.is_rank_zero():
            if not made:
                write_gallery(gallery, sources)
            shutil.rmtree(sources.parts, ignore_errors=True)
            train = {"data_path": args.data_path, "subsample": args.train_subsample, **sources.train.record}
            known = {name: train[name] for name in ("dataset", "data_path", "subsample")}
            save_settings(args.output_dir, args, known, sources.layers)
            done = "kept" if made else "wrote"
            count = sum(sources.neurons(layer).count for layer in sources.layers)
            print(f"{done} {gallery}: {count} {kind_of(sources.clip)}; open {gallery / 'index.html'}")


def look(sources, split, layers):
    """Go over the images of a split: small pictures, maps, concepts, and shares of the heads."""
    clip = sources.clip
    arrays, record, alone, state = sources.plan(split, layers)
    over = sources.splits[split]
    work = Pass(arrays, record, over, alone=alone, state=state, overwrite=sources.args.overwrite)
    with torch.inference_mode(), work:
        directions = work.prepare(fold_units, clip, layers)
        collectors = [Collector(sources, split, item) for item in directions]
        for rows, pixels in work:
            if sources.size:
                pictures = sources.part(split, "pictures")
                work[pictures][rows] = thumbnails(pixels, clip.transform, sources.size)
            for collector, phi, representation in collect(clip.vit, collectors, pixels):
                for path, place, block in collector.blocks(rows, phi, representation):
                    work[path][place] = block
                if state:
                    work.state[collector.paths["heads"].stem] += collector.through_heads(phi)
        if state and collectors:
            for name, of_processes in work.gather(list(state)).items():
                work[sources.part(name)][:] = np.sum(of_processes, axis=0)


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__)
    flags.add_described(parser)
    flags.add_units(parser)
    parser.set_defaults(mlp_layer=None, text_descriptions=None)
    help = "a text file, a class a line, for a zero-shot classifier; for --dataset images any texts"
    parser.add_argument("--class_names", help=help)
    parser.add_argument("--gallery", help="the folder to write; default: OUTPUT_DIR/gallery")
    help = "leave out pictures and the names of their files"
    parser.add_argument("--no_pictures", action="store_true", help=help)
    help = "side of a small picture in pixels"
    parser.add_argument("--picture_size", type=flags.positive_int, default=96, help=help)
    flags.add_compute(parser, precision=True, memory=True)
    flags.add_coefficient(parser)
    flags.run(main, parser, parallel=True)
