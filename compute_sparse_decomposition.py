"""Sparse text descriptions of neurons: orthogonal matching pursuit of every first component over a pool of texts.

    python compute_sparse_decomposition.py --model ViT-B-32 --pretrained openai --dataset imagenet --mlp_layer 9 \\
        --text_descriptions 30k --components 128 [--evaluate --data_path PATH]

Writes  DATASET_mlps_MODEL_PRETRAINED_LAYER_NAME_decomposition_omp_ALPHA_COMPONENTS
    .json   {neuron: [[text index, coefficient, text], ...]}, by falling |coefficient|
    .npz    the same as a scipy csc matrix [N, texts]
With --evaluate, the accuracy on held-out images when effects are rebuilt from the descriptions, in ..._evaluation.json.
"""

import torch

from utils import arguments
from utils.ablation import Rebuilt, load_classifier, load_statistics, predict
from utils.artifacts import Names, load_array, save_json
from utils.clip import load_clip
from utils.datasets import load_images
from utils.effects import stored_layers
from utils.errors import UserError
from utils.prs import fold
from utils.sparse_coding import load_texts, make_atoms, orthogonal_matching_pursuit, save_decomposition


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

    def output(layer):
        return results.decomposition(args.dataset, layer, args.text_descriptions, args.transform_alpha, args.components)

    for layer in stored_layers(names, args.dataset, args.mlp_layer, (f"{args.top_k_pca}_pca",), "compute_pcas.py"):
        make_pcas = f"python compute_pcas.py --mlp_layer {layer} --dataset {args.dataset} {flags}"
        pca_path = names.statistics(args.dataset, layer, f"{args.top_k_pca}_pca")
        pcas = load_array(pca_path, make_pcas, (None, vectors.shape[1]), fingerprint=fingerprint)
        targets = torch.from_numpy(pcas).to(args.device)
        support, coefficients = orthogonal_matching_pursuit(atoms, targets, args.components, progress=True)
        matrix = save_decomposition(output(layer), support, coefficients, texts, {**meta, "layer": layer})
        rebuilt[layer] = torch.from_numpy(matrix @ atoms.cpu().numpy()).to(args.device)
        loss = ((rebuilt[layer] - targets).norm(dim=1) / targets.norm(dim=1)).mean()
        print(f"wrote {output(layer)} and .npz: {len(targets)} neurons, {args.components} of {len(texts)} texts each")
        print(f"layer {layer}: |component - description| is {loss:.3f} of |component| on average")
    if args.evaluate:
        path = output("-".join(map(str, rebuilt)))
        evaluate(args, names, path.with_name(path.stem + "_evaluation.json"), rebuilt)


def evaluate(args, names, path, rebuilt):
    """Accuracy on held-out images when effects are projected on the descriptions, rebuilt {layer: [N, D]}."""
    clip = load_clip(args.model, args.pretrained, args.device)
    vit = clip.hooked_vit()
    images = load_images(args.dataset, args.data_path, args.split, clip.transform, args.subsample)
    flags = arguments.repeated_flags(args)
    classifier = load_classifier(names, args.dataset, clip, images, flags)
    directions = [fold(vit, layer) for layer in rebuilt]
    ablations = []
    for item in directions:
        mean = load_statistics(names, args.dataset, item.layer, args.top_k_pca, clip, flags, args.coefficient).mean
        ablations.append(Rebuilt(item, mean, rebuilt[item.layer]))
    meta = {**arguments.clip_record(args), "fingerprint": clip.fingerprint, "data": images.fingerprint(), "split": args.split}
    meta |= {"layers": list(rebuilt), "text_descriptions": args.text_descriptions, "components": args.components}
    accuracies = predict(
        vit, directions, ablations, images, classifier, args.coefficient, path, meta, arguments.passing(args), args.overwrite
    )
    table = {str(layer): accuracy for layer, (accuracy,) in zip(rebuilt, accuracies, strict=True)}
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
    arguments.add_directories(parser, streams=True)
    arguments.add_coefficient(parser)
    arguments.run(main, parser)
