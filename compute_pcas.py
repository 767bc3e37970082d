"""The main direction of every neuron's second-order effects, and the statistics that later stages need.

    python compute_pcas.py --model ViT-B-32 --pretrained openai --dataset imagenet --mlp_layer 9 --top_k_pca 100

Reads the effects of the train split, factorised or merged. Writes  DATASET_train_mlps_MODEL_PRETRAINED_LAYER_...
    K_pca.npy [N, D]         first principal component of the K images with the largest centred effects
    K_norm.npy [N, K]        their centred norms, ascending
    K_explained.npy [N]      share of their squared norm along the component
    mean.npy [N, D]          mean effects          image_norms.npy [images, N]   centred norm of every effect
After this stage the effects can be deleted.
"""

from utils import arguments
from utils.artifacts import Names
from utils.effects import stored_layers
from utils.pca import write_statistics


def main(args):
    names = Names(args.input_dir, args.model, args.pretrained)
    results = Names(args.output_dir, args.model, args.pretrained)
    makes_effects = "compute_second_order_neuron_prs.py"
    layers = stored_layers(names, args.dataset, args.mlp_layer, ("coefficients", "top_coefficients", "merged"), makes_effects)
    explained = write_statistics(
        names, results, args.dataset, layers, args.top_k_pca, args.memory * 1e9, args.device, args.overwrite
    )
    for layer, share in explained.items():
        print(f"wrote {results.statistics(args.dataset, layer, '*')}")
        print(f"layer {layer}: the first component explains {100 * share:.1f} % of the effects on the top images")
    layers = " ".join(map(str, layers))
    print(f"next: python compute_ablations.py --mlp_layer {layers} --dataset {args.dataset} {arguments.repeated_flags(args)}")


if __name__ == "__main__":
    parser = arguments.stage_parser(__doc__)
    arguments.add_model(parser)
    arguments.add_dataset(parser)
    arguments.add_layers(parser)
    parser.add_argument("--top_k_pca", type=arguments.positive_int, default=100, help="images of largest centred norm per neuron")
    parser.add_argument("--memory", type=float, default=0.25, help="GB of effects that are read at a time")
    parser.add_argument("--device", help="where the statistics are computed; default: the GPU if there is one, else the CPU")
    arguments.add_directories(parser, streams=True)
    arguments.run(main, parser, parallel=True)
