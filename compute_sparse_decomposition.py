"""Sparse text descriptions of neurons: orthogonal matching pursuit of every first component over a pool of
texts.

    python compute_sparse_decomposition.py --model ViT-B-32 --pretrained openai --dataset imagenet --mlp_layer
        9 \\ --text_descriptions 30k --components 128 [--evaluate --data_path PATH]

Writes  DATASET_mlps_MODEL_PRETRAINED_LAYER_NAME_decomposition_omp_ALPHA_COMPONENTS
    .json   {neuron: [[text index, coefficient, text], ...]}, by falling |coefficient|
    .npz    the same as a scipy csc matrix [N, texts]
With --evaluate, the accuracy on held-out images when effects are rebuilt from the descriptions, in
..._evaluation.json.
"""

from functools import partial

import numpy as np
import scipy.sparse
import torch

from utils.ablation import Rebuilt, accuracies, classify
from utils.data.images import Loader, load_images, train_set_of
from utils.data.text_sets import load_texts
from utils.descriptions import describe
from utils.model.clip import load_clip
from utils.omp import make_atoms
from utils.prs import fold_layers
from utils.runtime import distributed, flags
from utils.runtime.errors import UserError
from utils.runtime.files import digest, save_json
from utils.runtime.layers import groups_of_layers, stored_layers
from utils.runtime.passes import Pass, pieces_of
from utils.runtime.records import load_record
from utils.statistics import load_classifier, load_statistics


def main(args):
    known = {"data_path": args.data_path, "split": args.split, "descriptions_dir": args.descriptions_dir}
    inputs, results = flags.results_of(args, **known)
    load = partial(load_clip, args.model, args.pretrained, args.device)
    texts, vectors, fingerprint = load_texts(inputs, args.text_descriptions, args.descriptions_dir, load)
    atoms, dataset = (
        make_atoms(torch.from_numpy(vectors).to(args.device), args.normalise),
        train_set_of(args.dataset),
    )
    names = {
        "dataset": dataset,
        "k": args.top_k_pca,
        "texts": args.text_descriptions,
        "components": args.components,
    }
    names |= {"alpha": args.transform_alpha, "normalise": args.normalise}
    layers = stored_layers(inputs, ["pca"], args.mlp_layer, dataset=dataset, k=args.top_k_pca)
    sizes, expected = {"D": vectors.shape[1]}, {"fingerprint": fingerprint}
    pcas = {layer: inputs.load("pca", sizes, expected, layer=layer, **names) for layer in layers}
    rebuilt, record = (
        {},
        {**expected, "dataset": dataset, "top_k_pca": args.top_k_pca, "normalise": args.normalise},
    )
    record |= {
        "text_descriptions": args.text_descriptions,
        "components": args.components,
        "atoms": digest(atoms),
    }
    for layer, targets in pcas.items():
        path = results.path("decomposition", layer=layer, **names)
        made_of = {**record, "layer": layer, "targets": digest(targets)}
        describe(
            path,
            texts,
            atoms,
            torch.from_numpy(targets).to(args.device),
            record=made_of,
            overwrite=args.overwrite,
        )
        print(f"{path}: {args.components} of {len(texts)} texts for each of {len(targets)} neurons")
        rebuilt[layer] = scipy.sparse.load_npz(path.with_suffix(".npz")) @ atoms.cpu().numpy()
        loss = np.linalg.norm(rebuilt[layer] - targets, axis=1) / np.maximum(
            np.linalg.norm(targets, axis=1), 1e-30
        )
        print(f"layer {layer}: |component - description| is {loss.mean():.3f} of |component| on average")
    if args.evaluate:
        evaluate(args, inputs, results, rebuilt, names=names)


def evaluate(args, inputs, results, rebuilt, names):
    """Accuracy on held-out images when effects are projected on the descriptions, rebuilt {layer: array [N,
    D]}.
    """
    pca, known = inputs.find("pca", **names, layer=min(rebuilt)), args.dataset == names["dataset"]
    data_path = args.data_path or (
        known and load_record(pca).get("data_path")
    )  # else where the effects' images were
    if not data_path:
        raise UserError("--evaluate needs held-out images; add --data_path")
    clip = load_clip(args.model, args.pretrained, args.device, precision=args.precision, image_only=True)
    images = load_images(args.dataset, data_path, args.split, clip.transform, subsample=args.subsample)
    (classifier, labels), loader = (
        load_classifier(inputs, clip, images),
        Loader(images, args.device, args.num_workers),
    )
    layers, wanted = list(rebuilt), {"clip": clip, "coefficient": args.coefficient}
    statistics = load_statistics(inputs, names["dataset"], layers, args.top_k_pca, **wanted)
    made_of = {
        **clip.record,
        **images.record,
        "text_descriptions": args.text_descriptions,
        "components": args.components,
    }
    record = {**made_of, "coefficient": args.coefficient, "classifier": digest(classifier)}
    record["statistics"] = [statistics[layer].digest() + digest(rebuilt[layer]) for layer in layers]
    names, pieces, table = {**names, "dataset": args.dataset}, pieces_of(images, args.batch_size), {}
    for group in groups_of_layers(clip.vit, layers, args.memory * 1e9):
        arrays = results.arrays(
            ["evaluated"], {"images": len(images), "layers": len(group)}, layer=group, **names
        )
        [path], settings = arrays, {"layers": group, "batch_size": args.batch_size}
        with torch.inference_mode(), Pass(arrays, record, pieces, settings, overwrite=args.overwrite) as work:
            directions = [] if work.finished else fold_layers(clip.vit, group)
            vectors = {layer: torch.from_numpy(rebuilt[layer]).to(clip.device) for layer in group}
            ablations = [
                Rebuilt(item, statistics[item.layer].mean, vectors[item.layer]) for item in directions
            ]
            for rows, pixels in work.over(loader):
                work[path][rows] = classify(
                    clip.vit, pixels, ablations, classifier, coefficient=args.coefficient
                )
        if distributed.is_rank_zero():
            table |= dict(zip(map(str, group), accuracies(np.load(path), labels), strict=True))
    if distributed.is_rank_zero():
        path, table = (
            results.path("evaluation", layer=layers, **names),
            {layer: value for layer, (value,) in table.items()},
        )
        save_json(path, {**made_of, "layers": layers, "images": len(images), "accuracy": table})
        for layer, accuracy in table.items():
            print(
                f"layer {layer}: accuracy {accuracy:.2f} % with effects rebuilt from {args.components} texts"
            )
        print(f"wrote {path}, over {len(images)} images")


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__)
    flags.add_data(parser, required=False)
    flags.add_layers(parser)
    flags.add_top_k(parser)
    flags.add_texts(parser)
    parser.add_argument(
        "--normalise",
        choices=("axis", "text"),
        default="axis",
        help="atoms as published, or each of norm 100",
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="measure the accuracy with effects rebuilt from the texts"
    )
    flags.add_compute(parser, precision=True, memory=True)
    flags.add_coefficient(parser)
    flags.run(main, parser, parallel=True)
