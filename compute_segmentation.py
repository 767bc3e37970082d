"""Zero-shot segmentation by the neurons that matter for an image's class, scored on ImageNet-Segmentation.

    python compute_segmentation.py --model ViT-B-32 --pretrained openai --data_path gtsegs_ijcv.mat
        --mlp_layers 8 9 10

Reads the first components of --dataset (compute_pcas.py, for all --mlp_layers) and its classifier. Writes
FILE_segmentation_MODEL_PRETRAINED_METHOD_LAYERS_TOP...
    .json                             the scores in per cent: one row of a table of methods
    _precision.npy _recall.npy .png   the curve over all pixels, at the thresholds 0, 1/65536, ..., 1
    _maps.npy [images, patches]       the maps, not scaled
    _images/00000.png, ...            with --save_img: input, mask, prediction and heat map, side by side
"""

from functools import partial

import torch

from utils.data.images import Loader
from utils.data.segmentation_set import IGNORED_VALUES, SegmentationSet
from utils.model.clip import load_clip
from utils.model.preprocessing import describe
from utils.runtime import distributed, flags
from utils.runtime.files import read_array, whole_folder
from utils.runtime.layers import parse_layers
from utils.runtime.passes import Pass, pieces_of, walk
from utils.runtime.results import Results
from utils.segmentation import METHODS, Scores, choose_method, enlarge, row_name, save_scores, settings_of


def main(args):
    scores, (inputs, results) = Scores(args.mask_thr, args.thr), flags.results_of(args)
    classifiers = Results(
        args.classifier_dir or args.input_dir, args.model, args.pretrained, also=args.output_dir
    )
    clip = load_clip(args.model, args.pretrained, args.device, precision=args.precision, image_only=True)
    vit, size = (
        clip.vit,
        (args.image_size, args.image_size) if args.image_size else clip.vit.visual.image_size,
    )
    open_set = partial(
        SegmentationSet, args.data_path, clip.transform, args.geometry, size=size, ignored=args.ignore_index
    )
    layers = parse_layers(args.mlp_layers, vit) if args.method in ("second_order", "random") else []
    data, settings = open_set(), settings_of(args, layers)
    print(f"images of {data.path.stem}: {len(data)}")
    print(describe(clip.transform))
    method, made_of = choose_method(settings, clip, inputs, classifiers, images=len(data))
    data.check_masks()

    names = {"file": data.path.stem, "row": row_name(settings)}
    path, maps_path = results.path("segmentation", **names), results.path("maps", **names)
    record = {**clip.record, **data.record, **settings, "size": size, **made_of}
    record["preprocessing"] = clip.transform.digest
    arrays = results.arrays(["maps"], {"images": len(data), "patches": vit.grid[0] * vit.grid[1]}, **names)
    pieces, loader = pieces_of(len(data), args.batch_size), Loader(data, args.device, args.num_workers)
    with (
        torch.inference_mode(),
        Pass(arrays, record, pieces, {"batch_size": args.batch_size}, overwrite=args.overwrite) as work,
    ):
        for rows, pixels in work.over(loader):
            work[maps_path][rows] = method(pixels, rows.start)
    if not distributed.is_rank_zero():
        return
    from utils.figures import (
        plot_precision_recall,
        save_segmentation,
        segmentation_table,
        to_pictures,
    )  # matplotlib: 20 MB

    maps, pictures = (
        read_array(maps_path, mmap=True),
        path.with_name(path.stem + "_images") if args.save_img else None,
    )
    data = open_set(images=args.save_img)
    with whole_folder(pictures) as folder:
        for rows, (pixels, masks) in walk(
            pieces, Loader(data, num_workers=args.num_workers).with_targets, "scores"
        ):
            enlarged = enlarge(torch.tensor(maps[rows]), vit.grid, size).numpy()
            scores.add(enlarged, masks.numpy())
            for i, picture in enumerate(to_pictures(pixels, clip.transform, size) if folder else ()):
                shown = {"mask": masks[i].numpy(), "heat": enlarged[i], "thr": args.mask_thr}
                save_segmentation(folder / f"{rows.start + i:05d}.png", picture, **shown)
    result, precision, recall = save_scores(path, scores, record)
    plot_precision_recall(precision, recall, names["row"], path.with_suffix(".png"))
    print(segmentation_table({names["row"]: result}))
    print(
        f"wrote {path} and .png, _precision.npy, _recall.npy{', _images' if pictures else ''} from {scores.images} images"
    )
    other = "random" if args.method == "second_order" else "second_order"
    print(f"next, for another row of the table: {flags.same_command(method=other)}")


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        "--dataset_path",
        default="imagenet_seg/gtsegs_ijcv.mat",
        help="the file, or its folder",
    )
    group.add_argument(
        "--image_size", type=flags.positive_int, help="side of the scored maps; default: the model's"
    )
    group.add_argument(
        "--geometry",
        choices=("paper", "aligned"),
        default="paper",
        help="squash masks, or crop them as images",
    )
    help = "values of mask pixels that do not count; NaN never does"
    group.add_argument("--ignore_index", nargs="+", type=int, default=list(IGNORED_VALUES), help=help)
    flags.add_workers(group)
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method", choices=METHODS, default="second_order", help="neurons of the class, or another method"
    )
    group.add_argument(
        "--random", dest="method", action="store_const", const="random", help="the same as --method random"
    )
    group.add_argument("--seed", type=int, default=0, help="of the random neurons")
    group.add_argument(
        "--mlp_layers", nargs="+", default=["8", "9", "10"], help="zero-based MLP layers, or 'all'"
    )
    group.add_argument(
        "--top_neurons", type=flags.positive_int, default=200, help="neurons per image, over all layers"
    )
    group.add_argument(
        "--neuron_sign",
        choices=("both", "positive"),
        default="both",
        help="positive: only those for the class",
    )
    group.add_argument(
        "--class_source",
        default="predicted",
        help="predicted, or a file (.npy, .json, .txt) of class indices",
    )
    group.add_argument("--mask_thr", type=float, default=0.5, help="maps above it are predicted as object")
    group.add_argument(
        "--thr", type=float, default=0.0, help="scores below it count as it in the precision/recall curve"
    )
    group.add_argument(
        "--dataset", choices=flags.DATASETS, default="imagenet", help="of components and classifier"
    )
    flags.add_top_k(group)
    flags.add_compute(parser, precision=True)
    parser.add_argument("--classifier_dir", help="where the classifier is; default: --input_dir")
    parser.add_argument(
        "--save_img", action="store_true", help="save a picture of every image, mask, prediction and heat map"
    )
    flags.add_unused(parser, "--train_dataset")
    flags.run(main, parser, parallel=True)
