"""The main direction of every neuron's second-order effects, and the statistics that later stages need.

    python compute_pcas.py --model ViT-B-32 --pretrained openai --dataset imagenet --mlp_layer 9 --top_k_pca
        100

Reads the effects of the train split, factorised or merged. Writes
DATASET_train_mlps_MODEL_PRETRAINED_LAYER_...
    K_pca.npy [N, D]         first principal component of the K images with the largest centred effects
    K_norm.npy [N, K]        their centred norms, ascending
    K_explained.npy [N]      share of their squared norm along the component
    mean.npy [N, D]          mean effects          image_norms.npy [images, N]   centred norm of every effect
After this stage the effects can be deleted.
"""

from functools import partial

import numpy as np

from utils.data.images import train_set_of
from utils.effects import FORMS, copy_norms, open_effects, slices
from utils.pca import statistics
from utils.runtime import distributed, flags
from utils.runtime.errors import UserError
from utils.runtime.layers import stored_layers
from utils.runtime.passes import Pass, require_space


def main(args):
    inputs, results = flags.results_of(args)
    dataset, k = train_set_of(args.dataset), args.top_k_pca
    layers = stored_layers(inputs, FORMS, args.mlp_layer, dataset=dataset, split="train")
    stored = {layer: open_effects(inputs, dataset, "train", layer, device=args.device) for layer in layers}
    for effects in stored.values():
        if effects.kept < k:
            raise UserError(
                f"{effects.path} has {effects.kept} images for a neuron, and --top_k_pca {k} needs {k}; lower it, or run "
                "compute_second_order_neuron_prs.py with a smaller --subsample (for --keep top, a larger --top_k_pca)"
            )
    arrays = {}
    for layer, effects in stored.items():
        sizes = {"N": effects.N, "D": effects.D, "images": effects.images, "k": k}
        kinds = ("mean", "pca", "norm", "explained", *(() if effects.has_norms else ("image_norms",)))
        arrays[layer] = results.arrays(kinds, sizes, dataset=dataset, layer=layer, k=k)
    if distributed.is_rank_zero():
        require_space(
            {path: spec for each in arrays.values() for path, spec in each.items()}, overwrite=args.overwrite
        )
    for layer, effects in stored.items():
        path = partial(results.path, dataset=dataset, layer=layer, k=k)
        if effects.has_norms:
            copy_norms(effects, results)
        pieces = slices(effects.N, max(effects.floats, 3 * k * effects.D), args.memory * 1e9)
        record = {**effects.record, "effects": effects.content()}
        with Pass(arrays[layer], record, pieces, overwrite=args.overwrite) as work:
            for neurons, _ in work.over(description=f"layer {layer}", unit="neuron"):
                for kind, values in statistics(effects, neurons, k).items():
                    work[path(kind)][(slice(None), neurons) if kind == "image_norms" else neurons] = values
            effects.check_unchanged()  # or nothing is published
        share = 100 * float(np.load(path("explained")).mean())
        print(f"wrote {', '.join(file.name for file in arrays[layer])}")
        print(f"layer {layer}: the first component explains {share:.1f} % of the effects on the top images")
    print(f"next: {results.command('ablations', dataset=args.dataset, layer=layers, k=k)}")


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__)
    flags.add_dataset(parser)
    flags.add_layers(parser)
    flags.add_top_k(parser, "images of largest centred norm per neuron")
    parser.add_argument("--memory", type=float, default=0.25, help="GB of effects that are read at a time")
    parser.add_argument(
        "--device", help="where the statistics are computed; default: the GPU if there is one, else the CPU"
    )
    flags.add_unused(parser, "--batch_size", "--num_workers")
    flags.run(main, parser, parallel=True)
