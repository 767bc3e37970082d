"""Mean-ablation of second-order effects on held-out images: five accuracies for every layer.

    python compute_ablations.py --model ViT-B-32 --pretrained openai --dataset imagenet --data_path PATH
        --mlp_layer 9

Reads mean, norms and first components of the train split (of --train_dataset; for --dataset imagenet_r that
of imagenet) and the classifier. Writes  DATASET_SPLIT_ablations_MODEL_PRETRAINED_LAYERS_K.json, the
accuracies in per cent, and beside it the same as .csv, a .png of the bars and ..._predictions.npy [images,
layers, 5], the predicted classes.
"""

import numpy as np
import torch

from utils.ablation import ABLATIONS, Ablations, accuracies, classify
from utils.data.images import Loader, load_images, train_set_of
from utils.model.clip import load_clip
from utils.prs import fold_layers
from utils.runtime import distributed, flags
from utils.runtime.files import digest, save_json, save_table
from utils.runtime.layers import groups_of_layers, parse_layers
from utils.runtime.passes import Pass, pieces_of
from utils.statistics import load_classifier, load_statistics


def main(args):
    train = args.train_dataset or train_set_of(args.dataset)
    inputs, results = flags.results_of(args, data_path=args.data_path, split=args.split)
    clip = load_clip(args.model, args.pretrained, args.device, precision=args.precision, image_only=True)
    vit, layers = clip.vit, parse_layers(args.mlp_layer, clip.vit)
    images = load_images(args.dataset, args.data_path, args.split, clip.transform, subsample=args.subsample)
    (classifier, labels), loader = (
        load_classifier(inputs, clip, images),
        Loader(images, args.device, args.num_workers),
    )
    wanted = {"clip": clip, "coefficient": args.coefficient}
    statistics = load_statistics(inputs, train, layers, args.top_k_pca, **wanted)

    names = {"dataset": args.dataset, "split": args.split, "train_dataset": train, "k": args.top_k_pca}
    made_of = {**clip.record, **images.record, "train_dataset": train, "top_k_pca": args.top_k_pca}
    record = {**made_of, "coefficient": args.coefficient, "classifier": digest(classifier)}
    record["statistics"] = [statistics[layer].digest() for layer in layers]
    pieces, table = pieces_of(images, args.batch_size), {}
    for group in groups_of_layers(vit, layers, args.memory * 1e9):
        path = results.path("predictions", layer=group, **names)
        arrays = results.arrays(
            ["predictions"], {"images": len(images), "layers": len(group)}, layer=group, **names
        )
        settings = {"layers": group, "batch_size": args.batch_size}
        with torch.inference_mode(), Pass(arrays, record, pieces, settings, overwrite=args.overwrite) as work:
            directions = [] if work.finished else fold_layers(vit, group)
            ablations = [
                Ablations(item, statistics.pop(item.layer)) for item in directions
            ]  # drops the means
            for rows, pixels in work.over(loader):
                work[path][rows] = classify(vit, pixels, ablations, classifier, coefficient=args.coefficient)
        del directions, ablations  # room for the next group
        if distributed.is_rank_zero():
            table |= dict(zip(map(str, group), accuracies(np.load(path), labels), strict=True))
    if not distributed.is_rank_zero():
        return
    from utils.figures import accuracy_table, plot_ablations  # here, because matplotlib takes 20 MB

    path = results.path("ablations", layer=layers, **names)
    table = {layer: dict(zip(ABLATIONS, row, strict=True)) for layer, row in table.items()}
    save_json(path, {**made_of, "layers": layers, "images": len(images), "accuracy": table})
    save_table(path.with_suffix(".csv"), table)
    plot_ablations(table, path.with_suffix(".png"))
    print(accuracy_table(table))
    print(f"wrote {path}, its .csv and .png, over {len(images)} images")


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__)
    flags.add_data(parser)
    help = "where the statistics come from; default: --dataset, for imagenet_r imagenet"
    parser.add_argument("--train_dataset", choices=flags.DATASETS, help=help)
    flags.add_layers(parser)
    flags.add_top_k(parser)
    flags.add_compute(parser, precision=True, memory=True)
    flags.add_coefficient(parser)
    flags.run(main, parser, parallel=True)
