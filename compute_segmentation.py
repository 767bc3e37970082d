"""Zero-shot segmentation by the neurons that matter for an image's class, scored on ImageNet-Segmentation.

    python compute_segmentation.py --model ViT-B-32 --pretrained openai --dataset_path gtsegs_ijcv.mat --mlp_layers 8 9 10

Reads the first components of --train_dataset (compute_pcas.py, for all --mlp_layers) and its classifier. Writes
FILE_segmentation_MODEL_PRETRAINED_METHOD_LAYERS_TOP...
    .json                             the scores in per cent: one row of a table of methods
    _precision.npy _recall.npy .png   the curve over all pixels, at the thresholds 0, 1/65536, ..., 1
    _maps.npy [images, patches]       the maps before they are scaled
    _images/00000.png, ...            with --save_img: input, mask, prediction and heat map, side by side
The rows to compare with: --method random (or --random), attention, rollout.
"""

import os

import numpy as np
import torch

from utils import arguments, distributed
from utils.artifacts import Names, digest
from utils.clip import load_clip
from utils.datasets import batches
from utils.prs import parse_layers
from utils.rows import RowWriter, row_pieces
from utils.segmentation import (
    METHODS,
    AttentionMaps,
    NeuronMaps,
    RandomNeurons,
    RolloutMaps,
    Scores,
    SegmentationSet,
    check_settings,
    enlarge,
    load_neurons,
    mask_transform,
    patch_maps,
    row_name,
    save_scores,
    whole_folder,
)
from utils.visualization import plot_precision_recall, save_segmentation, segmentation_table, to_pictures


def main(args):
    settings = {"method": args.method, "geometry": args.geometry, "image_size": args.image_size, "thr": args.thr}
    check_settings(settings)
    data = SegmentationSet(args.dataset_path)
    clip = load_clip(args.model, args.pretrained, args.device, precision=args.precision)
    vit = clip.hooked_vit()
    size = (args.image_size, args.image_size) if args.image_size else clip.model.visual.image_size
    data.transform, data.mask_transform = clip.transform, mask_transform(clip.transform, args.geometry, size)
    method = choose_method(args, clip, vit, len(data), settings)

    results = Names(args.output_dir, args.model, args.pretrained)
    path = results.directory / f"{data.path.stem}_segmentation_{results.clip}_{row_name(settings)}.json"
    pictures = path.with_name(path.stem + "_images") if args.save_img else None
    record = {**arguments.clip_record(args), "fingerprint": clip.fingerprint, "dataset": data.path.stem}
    record |= {**settings, "data": data.fingerprint(), "size": size, "batch_size": args.batch_size}
    pieces = row_pieces(len(data), args.batch_size)
    maps_path = path.with_name(path.stem + "_maps.npy")
    shape = (len(data), vit.grid[0] * vit.grid[1])
    with torch.inference_mode(), RowWriter({maps_path: (shape, "float32")}, record, pieces, args.overwrite) as writer:
        for number, row, pixels, _ in batches(data, writer.todo, **arguments.passing(args)):
            writer.write(number, row, {maps_path: patch_maps(vit, method, pixels, row).cpu().numpy()})
    if not distributed.first():
        return
    maps = np.load(maps_path, mmap_mode="r", allow_pickle=False)
    scores = Scores(args.thr)
    data.reads_images = bool(pictures)
    with whole_folder(pictures) as folder:
        for _, row, pixels, masks in batches(data, list(enumerate(pieces)), args.num_workers, description="scores"):
            enlarged = enlarge(torch.tensor(maps[row : row + len(masks)]), vit.grid, size).numpy()
            scores.add(enlarged, masks.numpy())
            if folder:
                for i, picture in enumerate(to_pictures(pixels, clip.transform, size)):
                    save_segmentation(folder / f"{row + i:05d}.png", picture, masks[i].numpy(), enlarged[i], args.thr)
    result, precision, recall = save_scores(path, scores, record)
    plot_precision_recall(precision, recall, row_name(settings), path.with_suffix(".png"))
    print(segmentation_table({row_name(settings): result}))
    print(f"wrote {path}, its .png, _precision.npy and _recall.npy, over {scores.images} images")
    if pictures:
        print(f"wrote {pictures}")
    other = "random" if args.method == "second_order" else "second_order"
    flags = f"--dataset_path {args.dataset_path} {arguments.repeated_flags(args)}"
    print(f"next: another row of the table, python compute_segmentation.py --method {other} {flags}")


def choose_method(args, clip, vit, images, settings):
    """What makes the maps; adds to `settings` what only this method has."""
    if args.method == "attention":
        return AttentionMaps(vit)
    if args.method == "rollout":
        return RolloutMaps(vit)
    layers = parse_layers(args.mlp_layers, vit)
    settings |= {"layers": layers, "top_neurons": args.top_neurons}
    if args.method == "random":
        settings["seed"] = args.seed
        return NeuronMaps(layers, RandomNeurons(len(layers) * vit.N, args.top_neurons, args.seed))
    settings |= {"neuron_sign": args.neuron_sign, "class_source": args.class_source}
    settings |= {"train_dataset": args.train_dataset, "top_k_pca": args.top_k_pca}
    names = Names(args.input_dir, args.model, args.pretrained)
    classifiers = Names(args.classifier_dir or args.input_dir, args.model, args.pretrained)
    flags = f"--model {args.model} --pretrained {args.pretrained}"
    chosen = load_neurons(names, classifiers, clip, vit, images, settings, flags)
    classes = [] if chosen.classes is None else [chosen.classes]
    settings["inputs"] = digest(chosen.neurons, chosen.weights, chosen.classifier, *classes)
    return NeuronMaps(layers, chosen)


if __name__ == "__main__":
    parser = arguments.stage_parser(__doc__)
    arguments.add_model(parser)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_path", required=True, help="gtsegs_ijcv.mat, its folder, or a file of the same layout")
    group.add_argument("--image_size", type=arguments.positive_int, help="side of the scored maps; default: the model's")
    group.add_argument("--geometry", choices=("paper", "aligned"), default="paper", help="squash masks, or crop them as images")
    group.add_argument("--num_workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that load images")
    group = parser.add_argument_group("method")
    group.add_argument("--method", choices=METHODS, default="second_order", help="neurons of the class, or a baseline")
    group.add_argument("--random", dest="method", action="store_const", const="random", help="the same as --method random")
    group.add_argument("--seed", type=int, default=0, help="of the random neurons")
    group.add_argument("--mlp_layers", nargs="+", default=["8", "9", "10"], help="zero-based MLP layers, or 'all'")
    group.add_argument("--top_neurons", type=arguments.positive_int, default=200, help="neurons per image, over all layers")
    group.add_argument("--neuron_sign", choices=("both", "positive"), default="both", help="positive: only those for the class")
    group.add_argument("--class_source", default="predicted", help="predicted, or a file (.npy, .json, .txt) of class indices")
    group.add_argument("--thr", type=float, default=0.5, help="maps above it are predicted as object")
    group.add_argument("--train_dataset", choices=arguments.DATASETS, default="imagenet", help="of components and classifier")
    group.add_argument("--top_k_pca", type=arguments.positive_int, default=100, help="as in compute_pcas.py")
    arguments.add_compute(parser)
    arguments.add_precision(parser)
    arguments.add_directories(parser, streams=True)
    parser.add_argument("--classifier_dir", help="where the classifier is; default: --input_dir")
    parser.add_argument("--save_img", action="store_true", help="save a picture of every image, mask, prediction and heat map")
    arguments.run(main, parser, parallel=True)
