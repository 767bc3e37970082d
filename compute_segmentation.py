"""Segment images by the neurons that matter for their class, and score it on ImageNet-Segmentation.

    python compute_segmentation.py --model ViT-B-32 --pretrained openai \\
        --data_path gtsegs_ijcv.mat --mlp_layers 8 9 10

Reads the first components of --dataset (compute_pcas.py, for all --mlp_layers) and its classifier. Writes
FILE_segmentation_MODEL_PRETRAINED_METHOD_LAYERS_TOP...
    .json                             the scores in per cent: one row of a table of methods
    _precision.npy _recall.npy .png   the curve over all pixels, at the thresholds 0, 1/65536, ..., 1
    _maps.npy [images, patches]       the maps, not scaled
    _images/00000.png, ...            with --save_img: input, mask, prediction and heat map, side by side
--units pairs: maps of neuron-head pairs, chosen by the weights and class names alone; no components are read.
"""

import argparse

import torch

from utils.data.images import to_pictures
from utils.data.segmentation_row import Row
from utils.data.segmentation_set import SegmentationSet
from utils.data.splits import Split
from utils.figures import plot_precision_recall, save_segmentation, segmentation_table
from utils.model.clip import clip_of
from utils.model.preprocessing import describe
from utils.runtime import distributed, flags
from utils.runtime.files import read_array, whole_folder
from utils.runtime.passes import Pass
from utils.runtime.results import Results
from utils.segmentation import METHODS, Scores, choose_method, row_of, save_scores, walk_enlarged


def main(args):
    scores = Scores(args.mask_thr, args.thr)
    clip = clip_of(args)
    inputs, results = flags.results_of(args, clip, data_path=None)  # its own are not those of earlier stages
    row = row_of(args, clip.vit, inputs)
    data = open_set(args, clip)
    print(f"images of {data.path.stem}: {len(data)}")
    print(describe(clip.transform))
    classifier_dir = args.classifier_dir or args.input_dir
    classifiers = Results(classifier_dir, args.model, args.pretrained, also=args.output_dir, clip=clip)
    method, made_of = choose_method(row, clip, inputs, classifiers, images=len(data))
    data.check_masks()

    names = {"file": data.path.stem, "row": row.name}
    path, maps = (results.path(kind, **names) for kind in ("segmentation", "maps"))
    record = {**clip.record, **data.record, **row.record(), "size": data.size, **made_of}
    record["preprocessing"] = clip.transform.digest
    sizes = {"images": len(data), "patches": clip.vit.grid[0] * clip.vit.grid[1]}
    arrays = results.arrays(["maps"], sizes=sizes, **names)
    split = Split(data, args.device, args.num_workers, args.batch_size)
    with torch.inference_mode(), Pass(arrays, record, split, overwrite=args.overwrite) as work:
        for rows, pixels in work:
            work[maps][rows] = method(pixels, rows.start)
    if not distributed.is_rank_zero():
        return
    pictures = path.with_name(path.stem + "_images") if args.save_img else None
    with whole_folder(pictures) as folder:
        score_maps(args, clip, read_array(maps, mmap=True), scores, folder)
    result, precision, recall = save_scores(path, scores, record)
    plot_precision_recall(precision, recall, row.name, path.with_suffix(".png"))
    print(segmentation_table({row.name: result}))
    written = f"{path} and .png, _precision.npy, _recall.npy{', _images' if pictures else ''}"
    print(f"wrote {written} from {scores.images} images")


def open_set(args, clip, images=True):
    """Open the segmentation set. images: whether its images are needed, besides the masks."""
    size = (args.image_size, args.image_size) if args.image_size else clip.vit.visual.image_size
    options = {"geometry": args.geometry, "size": size, "ignored": args.ignore_index, "images": images}
    return SegmentationSet(args.data_path, clip.transform, **options)


def score_maps(args, clip, maps, scores, folder):
    """Enlarge the maps and add them to `scores`. Save a picture of every image, unless `folder` is None."""
    data = open_set(args, clip, images=args.save_img)
    split = Split(data, num_workers=args.num_workers, batch_size=args.batch_size)
    for rows, pixels, masks, heats in walk_enlarged(maps, split, clip.vit.grid):
        scores.add(heats, masks)
        if folder is None:
            continue
        for i, picture in enumerate(to_pictures(pixels, clip.transform, data.size)):
            path = folder / f"{rows.start + i:05d}.png"
            save_segmentation(path, picture, masks[i], heats[i], scores.mask_thr)


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__)
    group = parser.add_argument_group("data")
    add = group.add_argument
    default = "imagenet_seg/gtsegs_ijcv.mat"
    add("--data_path", "--dataset_path", default=default, help="the file, or its folder")
    add("--image_size", type=flags.positive_int, help="side of the scored maps; default: the model's")
    help = "squash masks, or crop them as images"
    add("--geometry", choices=("paper", "aligned"), default=Row.geometry, help=help)
    help = "values of mask pixels that do not count; NaN never does"
    add("--ignore_index", nargs="+", type=int, default=list(Row.ignore_index), help=help)
    flags.add_workers(group)
    group = parser.add_argument_group("method")
    add = group.add_argument
    add("--method", choices=METHODS, default=Row.method, help="neurons of the class, or another method")
    help = "short for --method pairs, of neurons and heads"
    add("--units", dest="method", choices=("pairs",), default=argparse.SUPPRESS, help=help)
    add("--random", dest="method", action="store_const", const="random", help="short for --method random")
    add("--seed", type=int, default=Row.seed, help="of the random neurons")
    add("--mlp_layers", nargs="+", default=list(Row.layers), help="zero-based MLP layers, or 'all'")
    help = "neurons per image, over all layers; for pairs those of each layer"
    add("--top_neurons", type=flags.positive_int, default=Row.top_neurons, help=help)
    help = "positive: only those for the class"
    add("--neuron_sign", choices=("both", "positive"), default=Row.neuron_sign, help=help)
    help = "predicted, or a file (.npy, .json, .txt) of class indices"
    add("--class_source", default=Row.class_source, help=help)
    add("--mask_thr", type=float, default=Row.mask_thr, help="maps above it are predicted as object")
    help = "scores below it are raised to it for the precision/recall curve"
    add("--thr", type=float, default=Row.thr, help=help)
    help = "of components and classifier"
    add("--dataset", choices=flags.DATASETS, default=Row.train_dataset, help=help)
    flags.add_top_k(group)
    flags.add_compute(parser, precision=True)
    parser.add_argument("--classifier_dir", help="where the classifier is; default: --input_dir")
    help = "save a picture of every image, mask, prediction and heat map"
    parser.add_argument("--save_img", action="store_true", help=help)
    flags.add_unused(parser, "--train_dataset")
    flags.run(main, parser, parallel=True)
