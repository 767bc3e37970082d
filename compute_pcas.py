"""Find the component of every neuron's second-order effects, and the statistics that later stages need.

    python compute_pcas.py --model ViT-B-32 --pretrained openai --dataset imagenet \\
        --mlp_layer 9

Reads the effects of the train split, factorised or merged. Writes
DATASET_train_mlps_MODEL_PRETRAINED_LAYER_...
    K_pca.npy [N, D]         first principal component of the K images with the largest centred effects
    K_norm.npy [N, K]        their centred norms, ascending
    K_explained.npy [N]      share of their squared norm along the component
    mean.npy [N, D]          mean effects          image_norms.npy [images, N]   centred norm of every effect
The last are those that --keep top has stored, in its one pass about a preliminary mean: their record says so.
After this stage the effects can be deleted.
"""

import numpy as np

from utils.data.images import UNSORTED, train_set_of
from utils.effects import FORMS, about_norms, copy_norms, open_effects, slices
from utils.pca import statistics
from utils.runtime import distributed, flags
from utils.runtime.errors import UserError
from utils.runtime.layers import stored_layers
from utils.runtime.passes import Pass, require_space
from utils.statistics import choose_k
from utils.units import units_record_of


def main(args):
    inputs, results = flags.results_of(args)
    dataset = train_set_of(args.dataset)
    layers = stored_layers(inputs, FORMS, args.mlp_layer, dataset=dataset, split="train")
    stored = {layer: open_effects(inputs, dataset, "train", layer, args.device) for layer in layers}
    made_of = units_record_of(args)  # or the effects are of another dictionary of that name
    for effects in stored.values():
        inputs.check_record(effects.path, made_of, f"make them again with: {effects.again()}")
    images = {layer: effects.images for layer, effects in stored.items()}
    args.top_k_pca = choose_k(args.top_k_pca, dataset, images)
    names = {"dataset": dataset, "k": args.top_k_pca}
    arrays = {layer: plan(args, results, effects, names) for layer, effects in stored.items()}
    if distributed.is_rank_zero():
        every = {path: spec for planned in arrays.values() for path, spec in planned.items()}
        require_space(every, overwrite=args.overwrite)
    for layer in layers:
        effects = stored.pop(layer)  # what is read of them stays in memory as long as they do
        if effects.has_norms:
            copy_norms(effects, results)
        summarise(args, results, effects, arrays[layer], names)
    follows = "texts" if dataset == UNSORTED else "ablations"  # which need classes
    print(f"next: {results.command(follows, dataset=args.dataset, layer=layers, k=args.top_k_pca)}")


def plan(args, results, effects, names):
    """Return the arrays of a layer. Raise UserError when fewer effects of a neuron are stored."""
    if effects.kept < args.top_k_pca:
        fix = "lower it, or run compute_second_order_neuron_prs.py with a smaller --subsample"
        raise UserError(
            f"{effects.path} has {effects.kept} images for a neuron, and --top_k_pca {args.top_k_pca} needs "
            f"{args.top_k_pca}; {fix} (for --keep top, a larger --top_k_pca)"
        )
    kinds = ["mean", "pca", "norm", "explained"]
    if not effects.has_norms:
        kinds.append("image_norms")
    sizes = {"N": effects.N, "D": effects.D, "images": effects.images, "k": args.top_k_pca}
    return results.arrays(kinds, sizes, layer=effects.layer, **names)


def summarise(args, results, effects, arrays, names):
    """Compute the statistics of one layer, a slice of neurons at a time."""
    paths = {kind: results.path(kind, layer=effects.layer, **names) for kind in ("image_norms", "explained")}
    floats = max(effects.floats, 3 * args.top_k_pca * effects.D)
    pieces = slices(effects.N, floats, args.memory * 1e9, title=f"layer {effects.layer}")
    record = {**effects.record, "effects": effects.content(), **results.signed}
    by_sum = bool(results.signed)
    with Pass(arrays, record, pieces, overwrite=args.overwrite) as work:
        for neurons in work:
            for kind, values in statistics(effects, neurons, args.top_k_pca, by_sum).items():
                rows = (slice(None), neurons) if kind == "image_norms" else neurons
                work[results.path(kind, layer=effects.layer, **names)][rows] = values
        effects.check_unchanged()  # or nothing is published
    share = 100 * float(np.load(paths["explained"]).mean())
    print(f"wrote {', '.join(file.name for file in arrays)}")
    if are := about_norms(paths["image_norms"]):
        print(f"note: {paths['image_norms'].name} holds norms {are}")
    print(
        f"layer {effects.layer}: the first component explains {share:.1f} % of the effects on the top images"
    )


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__)
    flags.add_dataset(parser)
    flags.add_layers(parser)
    flags.add_units(parser)
    flags.add_top_k(parser, "images of largest centred norm per neuron")
    parser.add_argument("--memory", type=float, default=0.25, help="GB of effects that are read at a time")
    parser.add_argument(
        "--device", help="where the statistics are computed; default: the GPU if there is one, else the CPU"
    )
    flags.add_unused(parser, "--batch_size", "--num_workers")
    flags.run(main, parser, parallel=True)
