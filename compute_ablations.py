"""Mean-ablation of second-order effects on held-out images: five accuracies for every layer.

    python compute_ablations.py --model ViT-B-32 --pretrained openai --dataset imagenet --data_path PATH --mlp_layer 9

Reads mean, norms and first components of the train split (of --train_dataset, for instance imagenet when --dataset is
imagenet_r) and the classifier. Writes  DATASET_SPLIT_ablations_MODEL_PRETRAINED_LAYERS_K.json, the accuracies in per cent, and
beside it the same as .csv, a .png of the bars and ..._predictions.npy [images, layers, 5], the predicted classes.
"""

from utils import arguments, distributed
from utils.ablation import ABLATIONS, Ablations, load_classifier, load_statistics, predict
from utils.artifacts import Names, save_json, save_table
from utils.clip import load_clip
from utils.datasets import load_images
from utils.prs import groups_of_layers, parse_layers
from utils.visualization import accuracy_table, plot_ablations


def main(args):
    train = args.train_dataset or args.dataset
    names = Names(args.input_dir, args.model, args.pretrained)
    clip = load_clip(args.model, args.pretrained, args.device, precision=args.precision, image_only=True)
    vit = clip.hooked_vit()
    layers = parse_layers(args.mlp_layer, vit)
    images = load_images(args.dataset, args.data_path, args.split, clip.transform, args.subsample)
    flags = arguments.repeated_flags(args)
    classifier = load_classifier(names, args.dataset, clip, images, flags)
    statistics = {layer: load_statistics(names, train, layer, args.top_k_pca, clip, flags, args.coefficient) for layer in layers}

    def make(directions):
        return Ablations(directions, statistics.pop(directions.layer))  # it keeps of them what it needs

    results = Names(args.output_dir, args.model, args.pretrained)

    def path_of(group):
        path = results.ablations(args.dataset, args.split, train, group, args.top_k_pca)
        return path.with_name(path.stem + "_predictions.npy")

    path = results.ablations(args.dataset, args.split, train, layers, args.top_k_pca)
    data = {"dataset": args.dataset, "split": args.split, "data": images.fingerprint()}
    meta = {**arguments.clip_record(args), "fingerprint": clip.fingerprint, **data}
    meta |= {"train_dataset": train, "top_k_pca": args.top_k_pca, "layers": layers}
    made_of = {**meta, "statistics": [statistics[layer].digest() for layer in layers]}
    accuracies = predict(
        vit,
        groups_of_layers(vit, layers, args.memory * 1e9),
        make,
        images,
        classifier,
        args.coefficient,
        path_of,
        made_of,
        args.batch_size,
        arguments.passing(args),
        args.overwrite,
    )
    if not distributed.first():
        return
    table = {str(layer): dict(zip(ABLATIONS, row, strict=True)) for layer, row in accuracies.items()}
    save_json(path, {**meta, "images": len(images), "accuracy": table})
    save_table(path.with_suffix(".csv"), table)
    plot_ablations(table, path.with_suffix(".png"))
    print(accuracy_table(table))
    print(f"wrote {path}, its .csv and .png, over {len(images)} images")


if __name__ == "__main__":
    parser = arguments.stage_parser(__doc__)
    arguments.add_model(parser)
    arguments.add_data(parser)
    parser.add_argument("--train_dataset", choices=arguments.DATASETS, help="where the statistics come from; default: --dataset")
    arguments.add_layers(parser)
    parser.add_argument("--top_k_pca", type=arguments.positive_int, default=100, help="as in compute_pcas.py")
    arguments.add_compute(parser)
    arguments.add_precision(parser)
    arguments.add_memory(parser)
    arguments.add_directories(parser, streams=True)
    arguments.add_coefficient(parser)
    arguments.run(main, parser, parallel=True)
