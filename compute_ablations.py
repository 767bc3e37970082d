"""Put second-order effects at their means and measure what is left: five accuracies for every layer.

    python compute_ablations.py --model ViT-B-32 --pretrained openai --dataset imagenet \\
        --data_path PATH --mlp_layer 9

Reads mean, norms and first components of the train split (of --train_dataset; for --dataset imagenet_r that
of imagenet) and the classifier. Writes  DATASET_SPLIT_ablations_MODEL_PRETRAINED_LAYERS_K.json, the
accuracies in per cent, and beside it the same as .csv, a .png of the bars and ..._predictions.npy [images,
layers, 5], the predicted classes.
"""

from utils.ablation import ABLATIONS, Ablations, Trial
from utils.data.images import train_set_of
from utils.data.splits import load_split
from utils.figures import accuracy_table, plot_ablations
from utils.model.clip import clip_of
from utils.runtime import distributed, flags
from utils.runtime.files import digest, save_json, save_table
from utils.runtime.layers import parse_layers
from utils.statistics import find_k, load_classifier, load_statistics
from utils.units import open_units


def main(args):
    train = args.train_dataset or train_set_of(args.dataset)
    clip = clip_of(args)
    open_units(args, clip)
    inputs, results = flags.results_of(args, clip)
    layers = parse_layers(args.mlp_layer, clip.vit)
    split = load_split(args, clip.transform)
    classifier, labels = load_classifier(inputs, split.images)
    args.top_k_pca = find_k(args.top_k_pca, inputs, train, layers)
    statistics = load_statistics(inputs, train, layers, args.top_k_pca)

    names = {**split.names, "train_dataset": train, "k": args.top_k_pca}
    made_of = {**clip.record, **clip.units_record, **split.record}
    made_of |= {"train_dataset": train, "top_k_pca": args.top_k_pca}
    record = {**made_of, "coefficient": args.coefficient, "classifier": digest(classifier)}
    record["statistics"] = [statistics[layer].digest() for layer in layers]

    def ablate(directions):
        return Ablations(directions, statistics.pop(directions.layer))  # the means are not needed again

    trial = Trial(args, clip, results, split, classifier, labels)
    table = trial.run("predictions", layers, ablate, record, names)
    if distributed.is_rank_zero():
        made_of |= {"layers": layers, "images": len(split)}
        report(results.path("ablations", layer=layers, **names), made_of, table)


def report(path, made_of, table):
    """Write the accuracies {layer: [5]} as .json, .csv and .png, and print them."""
    table = {layer: dict(zip(ABLATIONS, row, strict=True)) for layer, row in table.items()}
    save_json(path, {**made_of, "accuracy": table})
    save_table(path.with_suffix(".csv"), table)
    plot_ablations(table, path.with_suffix(".png"))
    print(accuracy_table(table))
    print(f"wrote {path}, its .csv and .png, over {made_of['images']} images")


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__)
    flags.add_data(parser)
    help = "where the statistics come from; default: --dataset, for imagenet_r imagenet"
    parser.add_argument("--train_dataset", choices=flags.DATASETS, help=help)
    flags.add_layers(parser)
    flags.add_units(parser)
    flags.add_top_k(parser)
    flags.add_compute(parser, precision=True, memory=True)
    flags.add_coefficient(parser)
    flags.run(main, parser, parallel=True)
