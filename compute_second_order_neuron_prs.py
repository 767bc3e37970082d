"""Second-order effects of all neurons of one or several MLP layers, in one pass over the images, or two.

    python compute_second_order_neuron_prs.py --model ViT-B-32 --pretrained openai --dataset imagenet --data_path PATH \\
        --split train --mlp_layer 9

Writes, for every layer (K heads come after it),  DATASET_SPLIT_mlps_MODEL_PRETRAINED_LAYER_...
    coefficients.npy [images, K, N]   bias.npy [images, D]   values.npy [K, N, e]   outputs.npy [K, e, D]
    merged.npy [images, N, D], the effects themselves, with --merged
With --keep top (the default for several layers) two passes, and instead of all coefficients
    top_coefficients.npy [N, k, K], top_images.npy [N, k], top_mean.npy [N, D], image_norms.npy [images, N]
effect[i, n] = sum_k coefficients[i, k, n] * (values[k, n] @ outputs[k]) + bias[i]
"""

from contextlib import ExitStack

import torch

from utils import arguments, distributed
from utils.artifacts import Names
from utils.clip import load_clip
from utils.datasets import batches, load_images
from utils.effects import save_directions
from utils.prs import dense, fold_layers, groups_of_layers, parse_layers, second_order
from utils.rows import RowWriter, row_pieces
from utils.top_effects import TopEffects


def main(args):
    clip = load_clip(args.model, args.pretrained, args.device, precision=args.precision, image_only=True)
    vit = clip.hooked_vit()
    layers = parse_layers(args.mlp_layer, vit)
    images = load_images(args.dataset, args.data_path, args.split, clip.transform, args.subsample)
    names = Names(args.output_dir, args.model, args.pretrained)
    meta = {
        **arguments.clip_record(args),
        "fingerprint": clip.fingerprint,
        "dataset": args.dataset,
        "split": args.split,
    }
    meta |= {"data": images.fingerprint(), "coefficient": args.coefficient, "batch_size": args.batch_size}

    keep = args.keep or ("top" if len(layers) > 1 and not args.merged else "full")
    if keep == "top":
        keep_top(args, vit, layers, images, names, meta)
    else:
        keep_all(args, vit, layers, images, names, meta)
    for layer in layers:
        print(f"wrote {names.effects(args.dataset, args.split, layer, '*')} for {len(images)} images and {vit.N} neurons")
    layers = " ".join(map(str, layers))
    print(f"next: python compute_pcas.py --mlp_layer {layers} --dataset {args.dataset} {arguments.repeated_flags(args)}")


def keep_top(args, vit, layers, images, names, meta):
    """Two passes for every group of layers that fits into memory, which leave the largest effects of every neuron."""
    settings = (args.dataset, args.split, meta, args.batch_size, arguments.passing(args), args.coefficient, args.overwrite)
    groups = groups_of_layers(vit, layers, args.memory * 1e9)
    groups = [TopEffects(vit, group, images, args.top_k_pca, names, *settings) for group in groups]
    with ExitStack() as stack:  # all files appear together, so that a broken run goes on at its group
        writers = [stack.enter_context(group.writer()) for group in groups]
        for group, writer in zip(groups, writers, strict=True):
            group.run(writer)
    for group in groups:
        group.clean()


def keep_all(args, vit, layers, images, names, meta):
    """One pass that stores every effect."""
    directions, arrays, dtype = fold_layers(vit, layers), {}, getattr(torch, args.store_dtype)

    def path(layer, part):
        return names.effects(args.dataset, args.split, layer, part)

    for item in directions:
        arrays[path(item.layer, "coefficients")] = ((len(images), len(item.values), vit.N), args.store_dtype)
        arrays[path(item.layer, "bias")] = ((len(images), vit.D), "float32")
        if args.merged:
            arrays[path(item.layer, "merged")] = ((len(images), vit.N, vit.D), args.store_dtype)
    pieces = row_pieces(len(images), args.batch_size)
    with RowWriter(arrays, {**meta, "layers": layers}, pieces, args.overwrite) as writer:
        for number, row, pixels, _ in batches(images, writer.todo, **arguments.passing(args)):
            _, effects = second_order(vit, pixels, directions, args.coefficient)
            blocks = {}
            for item, (C, kappa) in zip(directions, effects, strict=True):
                blocks[path(item.layer, "coefficients")] = C.to(dtype).cpu().numpy()
                blocks[path(item.layer, "bias")] = kappa.cpu().numpy()
                if args.merged:
                    blocks[path(item.layer, "merged")] = dense(C, kappa, item).to(dtype).cpu().numpy()
            writer.write(number, row, blocks)
    if distributed.first():
        for item in directions:
            save_directions(names, args.dataset, args.split, item, meta)


if __name__ == "__main__":
    parser = arguments.stage_parser(__doc__)
    arguments.add_model(parser)
    arguments.add_data(parser, split="train")
    arguments.add_layers(parser)
    arguments.add_compute(parser)
    arguments.add_precision(parser)
    arguments.add_memory(parser)
    arguments.add_directories(parser, reads=False, streams=True)
    arguments.add_coefficient(parser)
    parser.add_argument("--keep", choices=("full", "top"), help="all effects, or each neuron's largest ones in two passes")
    parser.add_argument("--top_k_pca", type=arguments.positive_int, default=100, help="effects of a neuron with --keep top")
    parser.add_argument("--merged", action="store_true", help="also write the effects themselves, images x N x D")
    parser.add_argument("--store_dtype", default="float32", choices=("float32", "float16"), help="precision on disk")
    arguments.run(main, parser, parallel=True)
