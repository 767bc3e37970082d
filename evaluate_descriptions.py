"""Descriptions graded: what every neuron writes and what it fires on, and how well that predicts its effects
on held-out images.

    python evaluate_descriptions.py --model ViT-B-32 --pretrained openai --dataset imagenet --data_path PATH
        --mlp_layer 9 \\ --text_descriptions 30k --components 128

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

import numpy as np
import torch

from utils.ablation import Rebuilt
from utils.data.images import Loader
from utils.evaluation import Evaluation, Graded, report
from utils.grading import Along, grades
from utils.prs import fold_layers, second_order
from utils.runtime import distributed, flags
from utils.runtime.layers import groups_of_layers
from utils.runtime.passes import Pass, pieces_of


def main(args):
    known = {
        "data_path": args.data_path,
        "split": args.split,
        "descriptions_dir": args.descriptions_dir,
        "truth": args.truth,
    }
    known |= {
        "subsample": args.subsample,
        "train_subsample": args.train_subsample,
        "train_data_path": args.train_data_path,
    }
    stage, graded = Evaluation(args, *flags.results_of(args, **known)), {}
    groups = groups_of_layers(stage.clip.vit, stage.layers, args.memory * 1e9)
    for group in groups:
        look(args, stage, group, stage.images)
    judge = stage.judge
    for group in groups:
        described = {layer: stage.fit(judge, layer) for layer in group}
        look(args, stage, group, stage.held_out, {} if args.truth else stage.to_grade(described))
        for layer in group:
            graded[layer] = grade(args, stage, layer, described[layer])
    if distributed.is_rank_zero():
        path = stage.held_out_path("graded", layer=stage.layers)
        print("\n".join(report(path, stage.made_of, graded)))
        print(
            f"wrote {path}, its .png, and a .csv of all neurons of each layer; over {len(stage.held_out)} held-out images"
        )
        if not args.truth:
            print(f"next: {stage.results.command('gallery', **stage.held_out_names, layer=stage.layers)}")


def look(args, stage, layers, images, described=()):
    """One pass over images: their representations, every neuron's effects along its component, and along the
    directions of {layer: Described}."""
    arrays, record = stage.arrays(layers, images, described)
    pieces, settings = pieces_of(images, args.batch_size), {"layers": layers, "batch_size": args.batch_size}
    path = stage.held_out_path if images is stage.held_out else stage.path
    with torch.inference_mode(), Pass(arrays, record, pieces, settings, overwrite=args.overwrite) as work:
        folded = [] if work.finished else fold_layers(stage.clip.vit, layers)
        found = [
            Rebuilt(item, stage.statistics[item.layer].mean, stage.statistics[item.layer].pcas)
            for item in folded
        ]
        along = {
            item.layer: Along(item, described[item.layer].directions)
            for item in folded
            if item.layer in described
        }
        for rows, pixels in work.over(Loader(images, args.device, args.num_workers)):
            representation, effects = second_order(stage.clip.vit, pixels, folded, args.coefficient)
            work[path("representations")][rows] = args.coefficient * torch.nn.functional.normalize(
                representation, dim=-1
            )
            for layer, rebuilt, phi in zip(layers, found, effects, strict=True):
                work[path("projections", layer=layer)][rows] = rebuilt.projections(phi)
                if layer in along:
                    work[path("along", layer=layer)][rows] = along[layer](phi)


def grade(args, stage, layer, described):
    """The `Graded` of one layer's neurons, and its files."""
    arrays, record = stage.grades(layer, described)
    [(path, ((N, *_), _))] = arrays.items()
    neurons = pieces_of(N, max(16, min(256, 2**18 // len(stage.held_out))))
    with Pass(arrays, record, neurons, overwrite=args.overwrite) as work:
        for n, _ in work.over(description=f"grades of layer {layer}", unit="neuron"):
            found = grades(**stage.of_neurons(layer, described, n))
            work[path][n] = torch.stack(list(found.values()), dim=-1).transpose(0, 1)  # [n, rows, measures]
    graded = Graded(np.load(path), described.directions)
    if distributed.is_rank_zero():
        stage.finish(layer, graded)
    return graded


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__)
    flags.add_described(parser)
    parser.add_argument(
        "--truth", nargs=2, metavar=("TRAIN", "HELD_OUT"), help="two .npy [images, texts] that judge texts"
    )
    flags.add_compute(parser, precision=True, memory=True)
    flags.add_coefficient(parser)
    flags.run(main, parser, parallel=True)
