"""Compute the second-order effects of all neurons of some MLP layers, in one pass over the images.

    python compute_second_order_neuron_prs.py --model ViT-B-32 --pretrained openai --dataset imagenet \\
        --data_path PATH --split train --mlp_layer 9

Writes, for every layer (K heads come after it),  DATASET_SPLIT_mlps_MODEL_PRETRAINED_LAYER_...
    coefficients.npy [images, K, N]   bias.npy [images, D]   values.npy [K, N, e]   outputs.npy [K, e, D]
    merged.npy [images, N, D], the effects themselves, with --merged
With --keep top (the default for several layers), instead of all coefficients
    top_coefficients.npy [N, k, K], top_images.npy [N, k], top_mean.npy [N, D], image_norms.npy [images, N]
This takes a look at some images for a preliminary mean (256, or 5 %), then one pass, which proves for each
neuron that the k largest effects about the mean were found. Of 2,048 images or more the pass begins with
every fourth, and takes the mean of these from there on. Neurons without proof are counted. For them the
images are gone over again.
The norms are about the preliminary means, but for the k largest; their record says how far they may be off.
Of fewer than 512 images, and with --passes 2, the mean comes first, in a pass of its own; norms are about it.
And in any case the mean activations of the neurons at every token, activations.npy [T, N]. With
--representations also what compute_representations.py writes.
effect[i, n] = sum_k coefficients[i, k, n] * (values[k, n] @ outputs[k]) + bias[i]
With --units PATH the units of a dictionary take the neurons' place (docs/units.md), by default with --keep
top. Names have LAYER_NAME for LAYER. What the units rebuild of their site is printed; less than half is an
error. acts.npy [N] says on how many images each acts. --units pairs: every neuron through every later head,
K N units of one coefficient each, all kept.
"""

from torch.nn.functional import normalize

from utils.data.splits import load_split
from utils.effects import FULL, TOP, write_weights
from utils.indirect import Activations
from utils.model.clip import clip_of
from utils.model.hooks import left_out_note
from utils.prs import second_order
from utils.runtime import flags
from utils.runtime.errors import UserError
from utils.runtime.layers import parse_layers
from utils.runtime.passes import Pass
from utils.runtime.results import PAIRS
from utils.runtime.sums import Look, Sums
from utils.statistics import choose_k
from utils.top_effects import (
    AGAIN,
    LOOK,
    OTHERS,
    PART_FIRST,
    TopK,
    move,
    settle,
    settle_again,
    start_of,
    strides_of,
)
from utils.units import check_rebuilding, count_units, fold_units, groups_of, open_units, stored_weights


def main(args):
    check_pairs(args)
    clip = clip_of(args)
    open_units(args, clip)
    layers = parse_layers(args.mlp_layer, clip.vit)
    split = load_split(args, clip.transform)
    results = flags.outputs_of(args, clip)
    record = {**clip.record, **split.record, "coefficient": args.coefficient}
    if clip.vit.pooling.leaves_out_mlp:
        print(left_out_note(clip.vit, split.first()))
    check_rebuilding(clip, split, args.unit_set)
    keep = args.keep or usual_form(args, layers)
    if keep == "full":
        keep_all(args, clip, layers, split, results, record)
    else:
        args.top_k_pca = choose_k(args.top_k_pca, args.dataset, dict.fromkeys(layers, len(split)))
        for group in groups_of(clip, layers, args.memory * 1e9):
            keep_top(args, clip, group, split, results, record)
    effects = f"the effects of MLP layer {', '.join(map(str, layers))}"
    print(f"wrote {effects}: {len(split)} images, {count_units(clip, layers[0])}")
    if args.split == "train":
        print(f"next: {results.command('pca', dataset=args.dataset, layer=layers, k=args.top_k_pca)}")


def usual_form(args, layers):
    """Return what --keep is where it is not given."""
    if args.unit_set == PAIRS or args.merged:
        return "full"  # all norms of pairs are as large as all coefficients
    return "full" if len(layers) == 1 and args.unit_set is None else "top"


def check_pairs(args):
    """Raise UserError for forms that pairs do not have."""
    if args.unit_set == PAIRS and args.keep == "top":
        raise UserError("--keep top saves nothing for pairs, which have one coefficient each; leave it out")
    if args.unit_set == PAIRS and args.merged:
        raise UserError("--merged is for neurons, and pairs are many times as many; leave it out")


def keep_all(args, clip, layers, split, results, record):
    """Store every effect, in one pass."""
    large = ["coefficients", "merged"] if args.merged else ["coefficients"]
    dtypes = dict.fromkeys(large, args.store_dtype)
    sizes = {"images": len(split)}
    arrays = results.arrays(large, sizes, dtypes, layers=layers, **split.names)
    arrays.update(results.arrays(FULL, sizes, layers=layers, **split.names))
    activations = Activations(clip, layers, results, split.names)
    arrays.update(activations.arrays)
    alone = of_units(clip, arrays)
    representations = arrays_of_representations(args, results, split)
    arrays.update(representations)
    options = {"alone": alone, "state": activations.sums, "overwrite": args.overwrite}
    with Pass(arrays, record, split, **options) as work:
        directions = work.prepare(stored_weights, clip, layers)
        for rows, pixels in work:
            representation, effects = activations.second_order(work, pixels, directions, args.coefficient)
            for path in representations:
                work[path][rows] = args.coefficient * normalize(representation, dim=-1)
            for phi in effects:
                names = {**split.names, "layer": phi.directions.layer}
                work[results.path("coefficients", **names)][rows] = phi.C
                work[results.path("bias", **names)][rows] = phi.kappa
                if args.merged:
                    work[results.path("merged", **names)][rows] = phi.dense()
        activations.write(work, len(split))
        write_weights(work, directions, results, split.names)


def keep_top(args, clip, layers, split, results, record):
    """Store the largest effects of every neuron. `utils.top_effects` says what the rounds are for."""
    arrays = results.arrays(TOP, {"images": len(split), "k": args.top_k_pca}, layers=layers, **split.names)
    activations = Activations(clip, layers, results, split.names)
    arrays.update(activations.arrays)
    alone = of_units(clip, arrays)
    representations = arrays_of_representations(args, results, split)
    arrays.update(representations)
    state, scratch = start_of(results, layers, args.top_k_pca, len(split), clip.units is not None)
    options = {"alone": alone, "state": state | activations.sums, "scratch": scratch}
    strides = strides_of(len(split))
    if args.passes == 2:
        strides = strides._replace(look=1)
    if strides.look == 1:
        for layer in layers:
            path = results.path("image_norms", layer=layer, **split.names)
            alone[path] = {**clip.units_record, "norms_about": None}  # those of one pass will not do
    with Pass(arrays, record, split.rounds(*strides.rounds()), overwrite=args.overwrite, **options) as work:
        directions = work.prepare(fold_units, clip, layers)
        write_weights(work, directions, results, split.names)
        images, of_look, of_part = (len(range(0, len(split), stride)) for stride in (1, *strides))
        look = look_at(work, clip, directions, Look(work, args.coefficient, of_look, "few_"))
        tops = work.prepare(TopK.of_layers, work, directions, look, strides.part, results, split.names)
        directions = [top.directions for top in tops]  # which may be without what takes memory
        part = Sums(work, args.coefficient, of_part, "part_")
        every = Sums(work, args.coefficient, images, "part_", "")
        for number, sums in ((PART_FIRST, part), (OTHERS, every)):
            for rows, pixels in work.round(number, "effects"):
                representation, effects = activations.second_order(work, pixels, directions, args.coefficient)
                for path in representations:
                    work[path][rows] = args.coefficient * normalize(representation, dim=-1)
                for top in tops:
                    top.add(next(effects), rows, sums)
            if number == PART_FIRST:
                move(work, tops, part)
        go_over_again(work, clip, settle(work, tops, every), args.coefficient)
        activations.write(work, len(split))


def look_at(work, clip, directions, look):
    """Go over a few images. Returns the `Look`."""
    for rows, pixels in work.round(LOOK, "means"):
        _, effects = second_order(clip.vit, pixels, directions, look.coefficient)
        for _ in directions:
            look.add(next(effects), rows)  # unnamed: one layer's effects are in memory at a time
    return look


def go_over_again(work, clip, doubted, coefficient):
    """Go over the images again for layers with neurons in doubt. doubted: of `settle`."""
    for rows, pixels in work.round(AGAIN, "effects"):
        _, effects = second_order(clip.vit, pixels, [top.directions for top in doubted], coefficient)
        for top in doubted:
            top.add(next(effects), rows)
    settle_again(work, doubted)


def of_units(clip, arrays):
    """Return {path: record} of what arrays about other units than neurons are made from besides."""
    return dict.fromkeys(arrays, clip.units_record) if clip.units else {}


def arrays_of_representations(args, results, split):
    """Return the `Arrays` of the representations, where they are to be written."""
    kinds = ["representations"] if args.representations else []
    return results.arrays(kinds, {"images": len(split)}, **split.names)


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__, reads=False)
    flags.add_data(parser, split="train")
    flags.add_layers(parser)
    flags.add_units(parser)
    flags.add_compute(parser, precision=True, memory=True)
    flags.add_coefficient(parser)
    parser.add_argument("--keep", choices=("full", "top"), help="all effects, or each neuron's largest ones")
    help = (
        "over the images with --keep top: 1, and a look at a few, or 2, for norms that are all about the mean"
    )
    parser.add_argument("--passes", type=int, choices=(1, 2), default=1, help=help)
    flags.add_top_k(parser, "effects of a neuron with --keep top")
    parser.add_argument(
        "--merged", action="store_true", help="also write the effects themselves, images x N x D"
    )
    help = "also write the representations, which a pass has at hand"
    parser.add_argument("--representations", action="store_true", help=help)
    parser.add_argument(
        "--store_dtype", default="float32", choices=("float32", "float16"), help="precision on disk"
    )
    flags.run(main, parser, parallel=True)
