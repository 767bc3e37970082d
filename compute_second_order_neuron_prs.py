"""Second-order effects of all neurons of one or several MLP layers, in one pass over the images, or two.

    python compute_second_order_neuron_prs.py --model ViT-B-32 --pretrained openai --dataset imagenet
        --data_path PATH \\ --split train --mlp_layer 9

Writes, for every layer (K heads come after it),  DATASET_SPLIT_mlps_MODEL_PRETRAINED_LAYER_...
    coefficients.npy [images, K, N]   bias.npy [images, D]   values.npy [K, N, e]   outputs.npy [K, e, D]
    merged.npy [images, N, D], the effects themselves, with --merged
With --keep top (the default for several layers) two passes, and instead of all coefficients
    top_coefficients.npy [N, k, K], top_images.npy [N, k], top_mean.npy [N, D], image_norms.npy [images, N]
effect[i, n] = sum_k coefficients[i, k, n] * (values[k, n] @ outputs[k]) + bias[i]
"""

from functools import partial

from utils.data.images import Loader, load_images
from utils.model.clip import load_clip
from utils.prs import fold_layers, second_order
from utils.runtime import flags
from utils.runtime.layers import groups_of_layers, parse_layers
from utils.runtime.passes import Pass, pieces_of
from utils.runtime.results import Results
from utils.top_effects import FULL, TOP, Sums, TopK, of_batch, start_of, write_top, write_weights


def main(args):
    clip = load_clip(args.model, args.pretrained, args.device, precision=args.precision, image_only=True)
    layers = parse_layers(args.mlp_layer, clip.vit)
    images = load_images(args.dataset, args.data_path, args.split, clip.transform, subsample=args.subsample)
    loader, results = (
        Loader(images, args.device, args.num_workers),
        Results(args.output_dir, args.model, args.pretrained),
    )
    path = partial(results.path, dataset=args.dataset, split=args.split)
    record = {**clip.record, **images.record, "coefficient": args.coefficient}

    def plan(layers, kinds, dtype=None):
        """The arrays of some layers."""
        sizes = {**clip.vit.sizes, "images": len(images), "k": args.top_k_pca}
        each = (
            results.arrays(kinds, {**sizes, "K": clip.vit.K(layer)}, dtype, layer=layer, **path.keywords)
            for layer in layers
        )
        return {path: spec for arrays in each for path, spec in arrays.items()}

    clip.vit.tell_left_out(loader, pieces_of(images, args.batch_size)[:1])
    if (args.keep or ("top" if len(layers) > 1 and not args.merged else "full")) == "full":
        large = plan(layers, ["coefficients", *["merged"] * args.merged], args.store_dtype)
        keep_all(args, clip.vit, layers, loader, path=path, arrays=large | plan(layers, FULL), record=record)
    else:
        for group in groups_of_layers(clip.vit, layers, args.memory * 1e9):
            keep_top(args, clip.vit, group, loader, path=path, arrays=plan(group, TOP), record=record)
    print(
        f"wrote the effects of MLP layer {', '.join(map(str, layers))}: {len(images)} images, {clip.vit.N} neurons"
    )
    print(f"next: {results.command('pca', dataset=args.dataset, layer=layers, k=args.top_k_pca)}")


def keep_all(args, vit, layers, loader, path, arrays, record):
    """One pass that stores every effect."""
    pieces, settings = (
        pieces_of(loader.images, args.batch_size),
        {"layers": layers, "batch_size": args.batch_size},
    )
    with Pass(arrays, record, pieces, settings, overwrite=args.overwrite) as work:
        directions = [] if work.finished else fold_layers(vit, layers)
        for rows, pixels in work.over(loader):
            _, effects = second_order(vit, pixels, directions, args.coefficient)
            for phi in effects:
                layer = phi.directions.layer
                work[path("coefficients", layer=layer)][rows] = phi.C
                work[path("bias", layer=layer)][rows] = phi.kappa
                if args.merged:
                    work[path("merged", layer=layer)][rows] = phi.dense()
        write_weights(work, directions, path)


def keep_top(args, vit, layers, loader, path, arrays, record):
    """Two passes that leave the largest effects of every neuron."""
    pieces = pieces_of(loader.images, args.batch_size)
    settings = {"top_k_pca": args.top_k_pca, "layers": layers, "batch_size": args.batch_size}
    state, scratch = start_of(vit, layers, args.top_k_pca, len(loader.images))
    with Pass(
        arrays, record, pieces * 2, settings, state=state, scratch=scratch, overwrite=args.overwrite
    ) as work:
        if work.finished:
            return
        directions, sums = fold_layers(vit, layers), Sums(work, args.coefficient)
        for _, pixels in work.over(loader, slice(len(pieces)), "means"):
            _, effects = second_order(vit, pixels, directions, args.coefficient, form=of_batch)
            for _ in layers:
                sums.add(next(effects))  # unnamed: one layer's effects are in memory at a time
        means = sums.means(layers, len(loader.images))
        tops = [TopK(work, item, means[item.layer]) for item in directions]
        for rows, pixels in work.over(loader, slice(len(pieces), None), "effects"):
            _, effects = second_order(vit, pixels, directions, args.coefficient)
            for top, layer in zip(tops, layers, strict=True):
                kappa, norms = top.add(next(effects), rows.start)
                work[path("bias", layer=layer)][rows], work[path("image_norms", layer=layer)][rows] = (
                    kappa,
                    norms,
                )
        write_top(work, tops, path)


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__, reads=False)
    flags.add_data(parser, split="train")
    flags.add_layers(parser)
    flags.add_compute(parser, precision=True, memory=True)
    flags.add_coefficient(parser)
    parser.add_argument(
        "--keep", choices=("full", "top"), help="all effects, or each neuron's largest ones in two passes"
    )
    flags.add_top_k(parser, "effects of a neuron with --keep top")
    parser.add_argument(
        "--merged", action="store_true", help="also write the effects themselves, images x N x D"
    )
    parser.add_argument(
        "--store_dtype", default="float32", choices=("float32", "float16"), help="precision on disk"
    )
    flags.run(main, parser, parallel=True)
