"""The table of results says how each is called, its shape, and which command makes it."""

from typing import NamedTuple


class Artifact(NamedTuple):
    """An Artifact is a kind of result."""

    file: str  # its name; {clip} is MODEL_PRETRAINED, the other fields are those of `Results.path`
    shape: str  # of the array, in the letters of `utils.prs` (and k images per neuron); "" for other files
    maker: tuple  # the script that makes it, and {flag: field, or a tuple of fixed words}
    content: str  # one line for docs/files.md
    dtype: str = "float32"


OF_LAYER = "{dataset}_{split}_mlps_{clip}_{layer}_"
OF_ABLATION = "{dataset}_{split}_ablations{source}_{clip}_{layer}_{k}"
OF_DESCRIPTIONS = "{dataset}_mlps_{clip}_{layer}_{texts}_decomposition_omp_{alpha}_{components}{variant}"
OF_FIRES_ON = "{dataset}_mlps_{clip}_{layer}_{texts}_fires_on_omp_{components}{judge}"
OF_GRADES = "{dataset}_{split}_grades_{clip}_{layer}_{texts}_{components}{variant}{judge}"
OF_SEGMENTATION = "{file}_segmentation_{clip}_{row}"

CLASS_FLAGS = {"--dataset": "dataset", "--data_path": "data_path", "--split": "split"}
IMAGE_FLAGS = CLASS_FLAGS | {"--held_out": "held_out"}
TRAINING_FLAGS = {
    "--subsample": "subsample",
    "--train_data_path": "train_data_path",
    "--train_subsample": "train_subsample",
}
NEURON_FLAGS = {"--mlp_layer": "layer", "--top_k_pca": "k"}
LAYER_FLAGS = {"--mlp_layer": "layer", "--units": "unit_set", "--site": "site"}
COMPONENT_FLAGS = LAYER_FLAGS | NEURON_FLAGS
TEXT_FLAGS = {"--text_descriptions": "texts", "--descriptions_dir": "descriptions_dir"}
OMP_FLAGS = TEXT_FLAGS | {
    "--components": "components",
    "--transform_alpha": "alpha",
    "--normalise": "normalise",
}

BY_REPRESENTATIONS = ("compute_representations.py", IMAGE_FLAGS)
BY_CLASSIFIER = ("compute_classifier_projection.py", CLASS_FLAGS | {"--class_names": "class_names"})
BY_SECOND_ORDER = ("compute_second_order_neuron_prs.py", IMAGE_FLAGS | LAYER_FLAGS)
BY_MERGED = (BY_SECOND_ORDER[0], BY_SECOND_ORDER[1] | {"--merged": ()})
BY_TOP = (BY_SECOND_ORDER[0], BY_SECOND_ORDER[1] | {"--keep": ("top",), "--top_k_pca": "k"})
BY_PCAS = ("compute_pcas.py", {"--dataset": "dataset", **COMPONENT_FLAGS})
BY_ABLATIONS = ("compute_ablations.py", IMAGE_FLAGS | {"--train_dataset": "train_dataset"} | COMPONENT_FLAGS)
BY_TEXTS = ("compute_text_set_projection.py", TEXT_FLAGS)
BY_DECOMPOSITION = (
    "compute_sparse_decomposition.py",
    {"--dataset": "dataset", **COMPONENT_FLAGS, **OMP_FLAGS, "--order": "order"},
)
BY_TOTAL_ORDER = (BY_DECOMPOSITION[0], BY_DECOMPOSITION[1] | {"--order": ("total",)})
HELD_OUT_FLAGS = {"--evaluate": (), "--data_path": "data_path", "--split": "split"}
BY_EVALUATION = (BY_DECOMPOSITION[0], BY_DECOMPOSITION[1] | HELD_OUT_FLAGS)
BY_GRADES = (
    "evaluate_descriptions.py",
    IMAGE_FLAGS | TRAINING_FLAGS | {"--truth": "truth"} | COMPONENT_FLAGS | OMP_FLAGS,
)
BY_GALLERY = ("make_gallery.py", IMAGE_FLAGS | TRAINING_FLAGS | COMPONENT_FLAGS | OMP_FLAGS)
BY_SEGMENTATION = ("compute_segmentation.py", {"--data_path": "data_path"})

ARTIFACTS = {
    "representations": Artifact(
        "{dataset}_{split}_representations_{clip}.npy",
        "images D",
        BY_REPRESENTATIONS,
        "100 x unit representations",
    ),
    "classes": Artifact(
        "{dataset}_{split}_classes.npy",
        "images",
        BY_REPRESENTATIONS,
        "labels, where there are classes",
        "int64",
    ),
    "classifier": Artifact(
        "{dataset}_classifier_{clip}.npy", "D classes", BY_CLASSIFIER, "unit columns, mean over 80 templates"
    ),
    "coefficients": Artifact(
        OF_LAYER + "coefficients.npy", "images K N", BY_SECOND_ORDER, "C, the images' part of the effects"
    ),
    "bias": Artifact(OF_LAYER + "bias.npy", "images D", BY_SECOND_ORDER, "kappa, equal for all neurons"),
    "values": Artifact(
        OF_LAYER + "values.npy", "K N e", BY_SECOND_ORDER, "the weights' part: neuron n written into head k"
    ),
    "outputs": Artifact(
        OF_LAYER + "outputs.npy", "heads e D", BY_SECOND_ORDER, "head k written into the representation"
    ),
    "merged": Artifact(
        OF_LAYER + "merged.npy", "images N D", BY_MERGED, "`--merged`: the effects, as in the published code"
    ),
    "top_coefficients": Artifact(
        OF_LAYER + "top_coefficients.npy", "N k K", BY_TOP, "`--keep top`: the k largest centred effects"
    ),
    "top_images": Artifact(OF_LAYER + "top_images.npy", "N k", BY_TOP, "their images", "int32"),
    "top_mean": Artifact(OF_LAYER + "top_mean.npy", "N D", BY_TOP, "mean effects"),
    "activations": Artifact(
        OF_LAYER + "activations.npy", "T N", BY_SECOND_ORDER, "mean post-GELU activation at every token"
    ),
    "acts": Artifact(
        OF_LAYER + "acts.npy", "N", BY_SECOND_ORDER, "`--units`: on how many images each unit acts", "int32"
    ),
    "pca": Artifact(OF_LAYER + "{k}_pca.npy", "N D", BY_PCAS, "first components"),
    "norm": Artifact(
        OF_LAYER + "{k}_norm.npy", "N k", BY_PCAS, "norms of the k largest centred effects, ascending"
    ),
    "explained": Artifact(
        OF_LAYER + "{k}_explained.npy", "N", BY_PCAS, "share of their squared norm along the component"
    ),
    "mean": Artifact(OF_LAYER + "mean.npy", "N D", BY_PCAS, "mean effects"),
    "image_norms": Artifact(
        OF_LAYER + "image_norms.npy",
        "images N",
        BY_PCAS,
        "centred norm of every effect; of `--keep top` about a preliminary mean",
    ),
    "ablations": Artifact(
        OF_ABLATION + ".json", "", BY_ABLATIONS, "five accuracies for every layer; also `.csv`, `.png`"
    ),
    "predictions": Artifact(
        OF_ABLATION + "_predictions.npy", "images layers 5", BY_ABLATIONS, "predicted classes", "int32"
    ),
    "texts": Artifact(
        "{texts}_{clip}.npy", "texts D", BY_TEXTS, "100 x unit text vectors; the texts in a `.txt` beside"
    ),
    "decomposition": Artifact(
        OF_DESCRIPTIONS + ".json",
        "",
        BY_DECOMPOSITION,
        "{neuron: [[text index, coefficient, text]]}; also `.npz`",
    ),
    "total_order": Artifact(
        OF_LAYER + "deletions.npy",
        "N D",
        BY_TOTAL_ORDER,
        "`--order total`: what taking a neuron away costs the representation, on images where it acts",
    ),
    "evaluation": Artifact(
        OF_DESCRIPTIONS + "_evaluation.json",
        "",
        BY_EVALUATION,
        "accuracy with effects rebuilt from the texts",
    ),
    "evaluated": Artifact(
        OF_DESCRIPTIONS + "_evaluation_predictions.npy", "images layers 1", BY_EVALUATION, "classes", "int32"
    ),
    "projections": Artifact(
        OF_LAYER + "{k}_projections.npy", "images N", BY_GRADES, "effects along the first components"
    ),
    "fires_on": Artifact(
        OF_FIRES_ON + ".json", "", BY_GRADES, "texts that neurons fire on, as the decomposition; also `.npz`"
    ),
    "labels": Artifact(OF_FIRES_ON + "_wpmi.npy", "N", BY_GRADES, "soft-WPMI labels, text indices", "int32"),
    "along": Artifact(
        OF_GRADES + "_along.npy", "images rows N", BY_GRADES, "effects along texts; removed once graded"
    ),
    "grades": Artifact(
        OF_GRADES + ".npy",
        "N rows measures",
        BY_GRADES,
        "grades of descriptions; also `.csv`, `.jsonl` of `--units`",
    ),
    "controls": Artifact(
        OF_GRADES + "_controls.npy",
        "dictionaries N slots",
        BY_GRADES,
        "grades by number of texts: of the text set, then of control dictionaries",
    ),
    "control_labels": Artifact(
        OF_FIRES_ON + "_wpmi_control_{control}.npy",
        "N",
        BY_GRADES,
        "soft-WPMI labels from a control dictionary",
        "int32",
    ),
    "deletions": Artifact(
        OF_LAYER + "{k}_deletions.npy",
        "drawn D",
        BY_GRADES,
        "what taking drawn neurons away costs the representation, on held-out images where they act",
    ),
    "by_deletion": Artifact(
        OF_GRADES + "_deletion.npy",
        "dictionaries drawn lengths",
        BY_GRADES,
        "how well texts that drawn neurons write say that, by number of texts; then control dictionaries",
    ),
    "deletion_rows": Artifact(
        OF_GRADES + "_deletion_rows.npy",
        "drawn rows",
        BY_GRADES,
        "how well the component, the direct effect, ... of drawn neurons say that",
    ),
    "graded": Artifact(OF_GRADES + "_summary.json", "", BY_GRADES, "their means over neurons; also `.png`"),
    "gallery": Artifact(
        "gallery{unit_set}/index.html",
        "",
        BY_GALLERY,
        "a page of all neurons; format in `gallery/FORMAT.md`; of `--units` in `gallery_NAME`",
    ),
    "settings": Artifact(
        "make_gallery.json", "", BY_GALLERY, "what the page was made of; the notebooks read it"
    ),
    "segmentation": Artifact(
        OF_SEGMENTATION + ".json", "", BY_SEGMENTATION, "scores; also `.png`, `_precision.npy`, `_recall.npy`"
    ),
    "maps": Artifact(
        OF_SEGMENTATION + "_maps.npy", "images patches", BY_SEGMENTATION, "the maps before they are scaled"
    ),
}
OF_WEIGHTS = ("classifier", "texts", "decomposition")  # results that no image was looked at for
# results whose records say which units they are of; later ones say which of these they are made from
OF_UNITS = ["total_order", "deletions"]
OF_UNITS += [kind for kind, of in ARTIFACTS.items() if of.maker[0] in (BY_SECOND_ORDER[0], BY_PCAS[0])]
