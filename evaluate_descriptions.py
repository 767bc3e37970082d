"""Grade descriptions: what the texts that a neuron writes or fires on say of its effects, over noise.

    python evaluate_descriptions.py --model ViT-B-32 --pretrained openai --dataset imagenet \\
        --data_path PATH --mlp_layer 9 --text_descriptions 30k --components 128

What a neuron writes is the decomposition of compute_sparse_decomposition.py. What it fires on are as many
signed texts of the same pool, pursued so that their similarities with the training images predict the
neuron's effect along its component. The first 1, 2, 4, ... texts of both are graded beside --controls
dictionaries of random directions, pursued, fitted and graded as the texts are: a description counts for what
it has over them. So are units that nobody trained, rows of a random rotation (--rotated_units). What neurons
write is also graded by taking drawn ones away where they act most (--delete, --drawn_neurons). Files:
    DATASET_SPLIT_representations_MODEL_PRETRAINED.npy, as compute_representations.py writes them
    DATASET_SPLIT_mlps_MODEL_PRETRAINED_LAYER_K_projections.npy [images, N], effects along the components,
    train and held out DATASET_mlps_MODEL_PRETRAINED_LAYER_NAME_fires_on_omp_COMPONENTS.json and .npz, as the
    decomposition
    ..._wpmi.npy [N], CLIP-Dissect's labels
    DATASET_SPLIT_grades_MODEL_PRETRAINED_LAYER_NAME_COMPONENTS.npy [N, rows, measures]; .csv, every neuron's
    texts and grades; ..._controls.npy, grades by number of texts and of the controls; ..._deletion.npy
    ..._summary.json and .png, over neurons
    the same for LAYER_rotated
Several text sets are compared at equal numbers of texts:  --text_descriptions 30k concepts
With --truth TRAIN.npy HELD_OUT.npy [images, texts], texts are judged by what is true of the images, not by
similarity.
"""

import argparse

import torch

from utils.controls import CONTROLS, ROTATED
from utils.deletion import DRAWN, grade_by_deletion
from utils.evaluation import (
    Evaluation,
    LayerResults,
    Observer,
    Stored,
    compare,
    decompose,
    fit,
    grade,
    judge_of,
    plan_effects,
    recall,
    stored_effects,
    summarise,
    to_grade,
)
from utils.prs import second_order
from utils.reports import finish, lines_of_pools, report
from utils.runtime import distributed, flags
from utils.runtime.errors import UserError
from utils.runtime.passes import Pass, without_images
from utils.units import fold_units, groups_of


def main(args):
    if args.controls == 1:
        raise UserError("--controls 1 shows no spread; give 0, or 2 and more")
    pools = {}
    for texts in args.text_descriptions:
        own = argparse.Namespace(**{**vars(args), "text_descriptions": texts})
        stage = Evaluation(own, *flags.results_of(own))
        pools[texts] = evaluate(stage)
    if len(pools) > 1 and distributed.is_rank_zero():
        for layer in stage.layers:
            of_layer = {texts: found[layer] for texts, found in pools.items()}
            print("\n".join(["", *lines_of_pools(layer, of_layer)]))


def evaluate(stage):
    """Grade the descriptions by one text set; return {layer: LayerResults}."""
    groups = groups_of(stage.clip, stage.layers, stage.args.memory * 1e9)
    for group in groups:
        study(stage, group)
    judge = judge_of(stage)
    found = {}
    for group in groups:
        units = [units for layer in group for units in stage.units[layer]]
        described = {of: fit(stage, judge, of) for of in units}
        look(stage, stage.held_out, group, to_grade(stage, described))
        for layer in group:
            of_units = stage.units[layer]
            graded = [grade(stage, of, described[of]) for of in of_units]
            compared = [compare(stage, judge, of) for of in of_units]
            rotated = (graded[1], compared[1]) if len(of_units) > 1 else (None, {})
            deleted = grade_by_deletion(stage, of_units[0], described[of_units[0]])
            found[layer] = LayerResults(graded[0], compared[0], *rotated, deleted)
    if distributed.is_rank_zero():
        conclude(stage, found)
    return found


def study(stage, group):
    """Look at the training images: effects along components, and the rotated units' own components."""
    rotated = [units for layer in group for units in stage.units[layer] if units.name]
    for units in rotated:
        recall(stage, units)
    look(stage, stage.train, group)
    for units in rotated:
        if units.statistics is None:
            summarise(stage, units, *fold_units(stage.clip, [units.layer]))
        decompose(stage, units)


def look(stage, split, layers, described=()):
    """Go over a split: representations, and effects along components and descriptions.

    Where the representations are there, and the effects in full, they are read, and no image is.
    """
    arrays, record, alone = plan_effects(stage, split, layers, described)
    stored = stored_effects(stage, split, layers, record)
    over = without_images(split.pieces) if stored else split
    work = Pass(arrays, record, over, alone=alone, overwrite=stage.args.overwrite)
    with torch.inference_mode(), work:
        folded = work.prepare(fold_units, stage.clip, layers)
        observers = []
        for item in folded:
            each = stage.units[item.layer]
            observers.append([Observer(stage, split, units, item, described) for units in each])
        stores = [Stored(*paths, item) for paths, item in zip(stored, folded, strict=False)]
        for rows, pixels in work:
            if stores:
                effects = (store.on(rows) for store in stores)
            else:
                representation, effects = second_order(stage.clip.vit, pixels, folded, stage.args.coefficient)
                unit = torch.nn.functional.normalize(representation, dim=-1)
                work[stage.path("representations", split)][rows] = stage.args.coefficient * unit
            for of_layer, phi in zip(observers, effects, strict=True):
                for observer in of_layer:
                    for path, block in observer.blocks(phi):
                        work[path][rows] = block


def conclude(stage, found):
    """Write the tables of all layers, and print them. found: {layer: LayerResults}."""
    finish(stage, found)
    path = stage.path("graded", stage.held_out, layer=stage.layers)
    print("\n".join(report(path, stage, found)))
    images = f"{len(stage.held_out)} held-out images"
    print(f"wrote {path}, its .png, and a .csv of all neurons of each layer; over {images}")
    if not stage.args.truth:
        names = stage.of(stage.held_out, layer=stage.layers)
        print(f"next: {stage.results.command('gallery', **names)}")


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__)
    flags.add_described(parser, several=True)
    flags.add_units(parser)
    help = "control dictionaries of random directions; 0: none, and nothing is said over noise"
    parser.add_argument("--controls", type=flags.count, default=CONTROLS, help=help)
    help = "units of a random rotation of a layer's neurons, which are graded beside them"
    parser.add_argument("--rotated_units", type=flags.count, default=ROTATED, help=help)
    parser.add_argument(
        "--truth", nargs=2, metavar=("TRAIN", "HELD_OUT"), help="two .npy [images, texts] that judge texts"
    )
    flags.add_deletion(parser)
    help = "neurons of a layer that are taken away, on held-out images"
    parser.add_argument("--drawn_neurons", type=flags.positive_int, default=DRAWN, help=help)
    flags.add_compute(parser, precision=True, memory=True)
    flags.add_coefficient(parser)
    flags.run(main, parser, parallel=True)
