"""Describe neurons by texts: orthogonal matching pursuit of every component over a text set.

    python compute_sparse_decomposition.py --model ViT-B-32 --pretrained openai --dataset imagenet \\
        --mlp_layer 9 --text_descriptions 30k --components 128 [--evaluate --data_path PATH]

Writes  DATASET_mlps_MODEL_PRETRAINED_LAYER_NAME_decomposition_omp_ALPHA_COMPONENTS
    .json   {neuron: [[text index, coefficient, text], ...]}, by falling |coefficient|
    .npz    the same as a scipy csc matrix [N, texts]
With --evaluate, the accuracy on held-out images when effects are rebuilt from the descriptions, in
..._evaluation.json. With --order total, what taking a neuron away in the running model costs, on the --delete
training images on which it acts most, is described in place of its component; the names then end in _total.
"""

from functools import partial

import numpy as np
import scipy.sparse
import torch

from utils.ablation import Rebuilt, Trial
from utils.data.images import require_classes, train_set_of
from utils.data.splits import load_split
from utils.data.text_sets import load_texts
from utils.deletion import ORDERS, delete_on_training_images
from utils.descriptions import describe
from utils.model.clip import clip_of, load_clip
from utils.omp import make_atoms
from utils.runtime import distributed, flags
from utils.runtime.errors import UserError
from utils.runtime.files import digest, save_json
from utils.runtime.layers import stored_layers
from utils.runtime.records import load_record
from utils.runtime.results import PAIRS
from utils.statistics import find_k, load_classifier, load_statistics
from utils.units import open_units, units_record_of


def main(args):
    if args.evaluate:
        require_classes(args.dataset)
    inputs, results = flags.results_of(args)
    load = partial(load_clip, args.model, args.pretrained, args.device)
    texts, vectors, fingerprint = load_texts(inputs, args.text_descriptions, args.descriptions_dir, load)
    atoms = make_atoms(torch.from_numpy(vectors).to(args.device), args.normalise)
    train = train_set_of(args.dataset)
    args.top_k_pca = find_k(args.top_k_pca, inputs, train, args.mlp_layer)
    names = flags.names_of_descriptions(args, train)
    components = {"dataset": names["dataset"], "k": args.top_k_pca}
    layers = stored_layers(inputs, ["pca"], args.mlp_layer, **components)
    expected = {"fingerprint": fingerprint, **units_record_of(args), **inputs.signed}
    of_weights = {"sizes": {"D": vectors.shape[1]}, "expected": expected}
    described = {layer: inputs.load("pca", layer=layer, **components, **of_weights) for layer in layers}
    record = {"fingerprint": fingerprint, "dataset": names["dataset"], "top_k_pca": args.top_k_pca}
    if args.order == "total":
        described = total_order(args, inputs, results, layers, components)
        record["order"] = args.order
    record |= {"normalise": args.normalise, "text_descriptions": args.text_descriptions}
    record |= {"components": args.components, "atoms": digest(atoms)}
    rebuilt = {}
    for layer, targets in described.items():
        path = results.path("decomposition", layer=layer, **names)
        made_of = {**record, "layer": layer, "targets": digest(targets)}
        on_device = torch.from_numpy(targets).to(args.device)
        describe(path, texts, atoms, on_device, made_of, args.overwrite)
        named = {"": "neurons", PAIRS: "neuron-head pairs"}
        what = named.get(results.units, f"units of {results.units}")
        print(f"{path}: {args.components} of {len(texts)} texts for each of {len(targets)} {what}")
        rebuilt[layer] = scipy.sparse.load_npz(path.with_suffix(".npz")) @ atoms.cpu().numpy()
        loss = relative_error(rebuilt[layer], targets)
        what = ORDERS[args.order]
        print(f"layer {layer}: |{what} - description| is {loss:.3f} of |{what}| on average")
    if args.evaluate:
        evaluate(args, inputs, results, rebuilt, names)


def total_order(args, inputs, results, layers, components):
    """Return what taking neurons away costs on training images, of unit norm, {layer: [N, D]}.

    components: fields of the names of the components' files.
    """
    if not args.delete:
        raise UserError("--delete 0 takes no neuron away; give a number of images for --order total")
    clip = clip_of(args)
    open_units(args, clip)
    inputs, results = (of.of(clip, args.coefficient) for of in (inputs, results))
    lost = delete_on_training_images(args, inputs, results, layers, components)
    return {layer: of / np.maximum(np.linalg.norm(of, axis=1), 1e-30)[:, None] for layer, of in lost.items()}


def relative_error(rebuilt, targets):
    """Return the mean over neurons of |target - description| / |target|. rebuilt, targets: [N, D]."""
    lost = np.linalg.norm(rebuilt - targets, axis=1)
    return (lost / np.maximum(np.linalg.norm(targets, axis=1), 1e-30)).mean()


def evaluate(args, inputs, results, rebuilt, names):
    """Measure the accuracy on held-out images when effects are projected on their descriptions.

    rebuilt: {layer: what the descriptions add up to, [N, D]}. names: of the descriptions' files.
    """
    layers = list(rebuilt)
    data_path = held_out_path(args, inputs, layers[0], names)
    clip = clip_of(args)
    open_units(args, clip)
    inputs = inputs.of(clip, args.coefficient)
    results = results.of(clip, args.coefficient)
    split = load_split(args, clip.transform, data_path=data_path)
    classifier, labels = load_classifier(inputs, split.images)
    statistics = load_statistics(inputs, names["dataset"], layers, args.top_k_pca)
    made_of = {**clip.record, **clip.units_record, **split.record}
    made_of |= {"text_descriptions": args.text_descriptions, "components": args.components}
    record = {**made_of, "coefficient": args.coefficient, "classifier": digest(classifier)}
    record["statistics"] = [statistics[layer].digest() + digest(rebuilt[layer]) for layer in layers]
    names = {**names, "dataset": args.dataset}

    def ablate(directions):
        vectors = torch.from_numpy(rebuilt[directions.layer]).to(clip.device)
        return Rebuilt(directions, statistics[directions.layer].mean, vectors)

    trial = Trial(args, clip, results, split, classifier, labels)
    table = trial.run("evaluated", layers, ablate, record, names)
    if distributed.is_rank_zero():
        table = {layer: accuracy for layer, [accuracy] in table.items()}
        path = results.path("evaluation", layer=layers, **names)
        save_json(path, {**made_of, "layers": layers, "images": len(split), "accuracy": table})
        for layer, accuracy in table.items():
            print(
                f"layer {layer}: accuracy {accuracy:.2f} % with effects rebuilt from {args.components} texts"
            )
        print(f"wrote {path}, over {len(split)} images")


def held_out_path(args, inputs, layer, names):
    """Return the root folder of the held-out images: --data_path, or else that of the effects' images."""
    path = args.data_path
    if path is None and args.dataset == names["dataset"]:
        path = load_record(inputs.find("pca", **{**names, "layer": layer})).get("data_path")
    if not path:
        raise UserError("--evaluate needs held-out images; add --data_path")
    return path


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__)
    flags.add_data(parser, required=False)
    flags.add_training(parser)
    flags.add_layers(parser)
    flags.add_units(parser)
    flags.add_top_k(parser)
    flags.add_texts(parser)
    flags.add_normalise(parser)
    help = "second: describe the components; total: what taking neurons away costs, beyond the paper"
    parser.add_argument("--order", choices=tuple(ORDERS), default="second", help=help)
    flags.add_deletion(parser)
    parser.add_argument(
        "--evaluate", action="store_true", help="measure the accuracy with effects rebuilt from the texts"
    )
    flags.add_compute(parser, precision=True, memory=True)
    flags.add_coefficient(parser)
    flags.run(main, parser, parallel=True)
