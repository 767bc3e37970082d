"""Grade descriptions: how well the texts that a neuron writes or fires on predict its effects on new images.

    python evaluate_descriptions.py --model ViT-B-32 --pretrained openai --dataset imagenet \\
        --data_path PATH --mlp_layer 9 --text_descriptions 30k --components 128

What a neuron writes is the decomposition of compute_sparse_decomposition.py. What it fires on are as many
signed texts of the same pool, pursued so that their similarities with the training images predict the
neuron's effect along its component. Files:
    DATASET_SPLIT_representations_MODEL_PRETRAINED.npy, as compute_representations.py writes them
    DATASET_SPLIT_mlps_MODEL_PRETRAINED_LAYER_K_projections.npy [images, N], effects along the components,
    train and held out DATASET_mlps_MODEL_PRETRAINED_LAYER_NAME_fires_on_omp_COMPONENTS.json and .npz, as the
    decomposition
    ..._wpmi.npy [N], CLIP-Dissect's labels
    DATASET_SPLIT_grades_MODEL_PRETRAINED_LAYER_NAME_COMPONENTS.npy [N, rows, measures]; .csv, every neuron's
    texts and grades;
    ..._summary.json and .png, over neurons
With --truth TRAIN.npy HELD_OUT.npy [images, texts], texts are judged by what is true of the images, not by
similarity.
"""

import torch

from utils.ablation import Rebuilt
from utils.evaluation import Evaluation, fit, grade, judge_of, plan_effects, report, to_grade
from utils.grading import Along
from utils.norms import groups_of_layers
from utils.prs import fold_layers, second_order
from utils.runtime import distributed, flags
from utils.runtime.passes import Pass


def main(args):
    stage = Evaluation(args, *flags.results_of(args))
    groups = groups_of_layers(stage.clip.vit, stage.layers, args.memory * 1e9)
    for group in groups:
        look(stage, stage.train, group)
    judge = judge_of(stage)
    graded = {}
    for group in groups:
        described = {layer: fit(stage, judge, layer) for layer in group}
        look(stage, stage.held_out, group, to_grade(stage, described))
        for layer in group:
            graded[layer] = grade(stage, layer, described[layer])
    if distributed.is_rank_zero():
        path = stage.path("graded", stage.held_out, layer=stage.layers)
        print("\n".join(report(path, stage, graded)))
        images = f"{len(stage.held_out)} held-out images"
        print(f"wrote {path}, its .png, and a .csv of all neurons of each layer; over {images}")
        if not args.truth:
            names = stage.of(stage.held_out, layer=stage.layers)
            print(f"next: {stage.results.command('gallery', **names)}")


def look(stage, split, layers, described=()):
    """Go over a split: representations, and effects along components and descriptions."""
    arrays, record, alone = plan_effects(stage, split, layers, described)
    work = Pass(arrays, record, split, alone=alone, overwrite=stage.args.overwrite)
    with torch.inference_mode(), work:
        folded = work.prepare(fold_layers, stage.clip.vit, layers)
        components = []
        along = {}
        for item in folded:
            statistics = stage.statistics[item.layer]
            components.append(Rebuilt(item, statistics.mean, statistics.pcas))
            if item.layer in described:
                along[item.layer] = Along(item, described[item.layer].directions)
        for rows, pixels in work:
            representation, effects = second_order(stage.clip.vit, pixels, folded, stage.args.coefficient)
            unit = torch.nn.functional.normalize(representation, dim=-1)
            work[stage.path("representations", split)][rows] = stage.args.coefficient * unit
            for component, phi in zip(components, effects, strict=True):
                layer = phi.directions.layer
                work[stage.path("projections", split, layer=layer)][rows] = component.projections(phi)
                if layer in along:
                    work[stage.path("along", split, layer=layer)][rows] = along[layer](phi)


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__)
    flags.add_described(parser)
    parser.add_argument(
        "--truth", nargs=2, metavar=("TRAIN", "HELD_OUT"), help="two .npy [images, texts] that judge texts"
    )
    flags.add_compute(parser, precision=True, memory=True)
    flags.add_coefficient(parser)
    flags.run(main, parser, parallel=True)
