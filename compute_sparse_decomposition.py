"""Sparse text descriptions of neurons: orthogonal matching pursuit of every first component over a pool of texts.

    python compute_sparse_decomposition.py --model ViT-B-32 --pretrained openai --dataset imagenet --mlp_layer 9 \\
        --text_descriptions 30k --components 128 [--evaluate --data_path PATH]

Writes  DATASET_mlps_MODEL_PRETRAINED_LAYER_NAME_decomposition_omp_ALPHA_COMPONENTS
    .json   {neuron: [[text index, coefficient, text], ...]}, by falling |coefficient|
    .npz    the same as a scipy csc matrix [N, texts]
With --evaluate, the accuracy on held-out images when effects are rebuilt from the descriptions, in ..._evaluation.json.
"""

import numpy as np
import torch

from utils import arguments, distributed
from utils.ablation import Rebuilt, load_classifier, load_statistics, predict
from utils.artifacts import Names, digest, load_array, save_json
from utils.clip import load_clip
from utils.datasets import load_images
from utils.effects import stored_layers
from utils.errors import UserError
from utils.prs import groups_of_layers
from utils.sparse_coding import decompose, decomposition_matrix, load_texts, make_atoms, save_decomposition


def main(args):
    if args.evaluate and not args.data_path:
        raise UserError("--evaluate needs held-out images; add --data_path")
    names = Names(args.input_dir, args.model, args.pretrained)
    results = Names(args.output_dir, args.model, args.pretrained)
    flags = arguments.repeated_flags(args)
    texts, vectors, fingerprint = load_texts(names, args.text_descriptions, args.descriptions_dir, flags)
    atoms = make_atoms(torch.from_numpy(vectors).to(args.device), args.normalise)
    rebuilt = {}
    meta = {**arguments.clip_record(args), "fingerprint": fingerprint, "dataset": args.dataset, "top_k_pca": args.top_k_pca}
    meta |= {"text_descriptions": args.text_descriptions, "components": args.components, "normalise": args.normalise}

    def output(layers):
        name = "-".join(map(str, layers))
        return results.decomposition(args.dataset, name, args.text_descriptions, args.transform_alpha, args.components)

    layers = stored_layers(names, args.dataset, args.mlp_layer, (f"{args.top_k_pca}_pca",), "compute_pcas.py")
    targets = []
    for layer in layers:
        make_pcas = f"python compute_pcas.py --mlp_layer {layer} --dataset {args.dataset} {flags}"
        pca_path = names.statistics(args.dataset, layer, f"{args.top_k_pca}_pca")
        targets.append(load_array(pca_path, make_pcas, (None, vectors.shape[1]), fingerprint=fingerprint))
    together = torch.from_numpy(np.concatenate(targets)).to(args.device)
    made_of = {**meta, "layers": layers}
    support, coefficients = decompose(atoms, together, args.components, output(layers), made_of, args.overwrite)
    ends = np.cumsum([len(target) for target in targets])[:-1]
    parts = zip(layers, targets, np.split(support, ends), np.split(coefficients, ends), strict=True)
    for layer, target, *found in parts:
        if distributed.first():
            save_decomposition(output([layer]), *found, texts, {**meta, "layer": layer})
        rebuilt[layer] = decomposition_matrix(*found, len(texts)) @ atoms.cpu().numpy()
        loss = (np.linalg.norm(rebuilt[layer] - target, axis=1) / np.linalg.norm(target, axis=1)).mean()
        print(f"wrote {output([layer])} and .npz: {len(target)} neurons, {args.components} of {len(texts)} texts each")
        print(f"layer {layer}: |component - description| is {loss:.3f} of |component| on average")
    if args.evaluate:

        def path_of(group, ending):
            return output(group).with_name(f"{output(group).stem}_evaluation{ending}")

        evaluate(args, names, path_of, rebuilt)


def evaluate(args, names, path_of, rebuilt):
    """Accuracy on held-out images when effects are projected on the descriptions, rebuilt {layer: array [N, D]}."""
    clip = load_clip(args.model, args.pretrained, args.device, precision=args.precision, image_only=True)
    vit = clip.hooked_vit()
    images = load_images(args.dataset, args.data_path, args.split, clip.transform, args.subsample)
    flags = arguments.repeated_flags(args)
    classifier = load_classifier(names, args.dataset, clip, images, flags)
    statistics = {
        layer: load_statistics(names, args.dataset, layer, args.top_k_pca, clip, flags, args.coefficient) for layer in rebuilt
    }

    def make(directions):
        layer = directions.layer
        return Rebuilt(directions, statistics[layer].mean, torch.from_numpy(rebuilt[layer]).to(clip.device))

    meta = {**arguments.clip_record(args), "fingerprint": clip.fingerprint, "data": images.fingerprint(), "split": args.split}
    meta |= {"layers": list(rebuilt), "text_descriptions": args.text_descriptions, "components": args.components}
    sums = [statistics[layer].digest() + digest(rebuilt[layer]) for layer in rebuilt]
    accuracies = predict(
        vit,
        groups_of_layers(vit, list(rebuilt), args.memory * 1e9),
        make,
        images,
        classifier,
        args.coefficient,
        lambda group: path_of(group, "_predictions.npy"),
        {**meta, "statistics": sums},
        args.batch_size,
        arguments.passing(args),
        args.overwrite,
    )
    if not distributed.first():
        return
    path = path_of(list(rebuilt), ".json")
    table = {str(layer): accuracy for layer, (accuracy,) in accuracies.items()}
    save_json(path, {**meta, "images": len(images), "accuracy": table})
    for layer, accuracy in table.items():
        print(f"layer {layer}: accuracy {accuracy:.2f} % with effects rebuilt from {args.components} texts")
    print(f"wrote {path}, over {len(images)} images")


if __name__ == "__main__":
    parser = arguments.stage_parser(__doc__)
    arguments.add_model(parser)
    arguments.add_data(parser, required=False)
    arguments.add_layers(parser)
    parser.add_argument("--top_k_pca", type=arguments.positive_int, default=100, help="as in compute_pcas.py")
    parser.add_argument("--text_descriptions", default="30k", help="name of the text set, as in compute_text_set_projection.py")
    parser.add_argument("--descriptions_dir", default="text_descriptions", help="where NAME.txt is, if not beside the vectors")
    parser.add_argument("--components", type=arguments.positive_int, default=128, help="texts per neuron")
    parser.add_argument("--transform_alpha", type=float, default=1, help="only part of the file names")
    parser.add_argument("--normalise", choices=("axis", "text"), default="axis", help="atoms as published, or each of norm 100")
    parser.add_argument("--evaluate", action="store_true", help="measure the accuracy with effects rebuilt from the texts")
    arguments.add_compute(parser)
    arguments.add_precision(parser)
    arguments.add_memory(parser)
    arguments.add_directories(parser, streams=True)
    arguments.add_coefficient(parser)
    arguments.run(main, parser, parallel=True)
