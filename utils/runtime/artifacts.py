"""The table of results: how each is called, its shape, and which command makes it."""

from typing import NamedTuple


class Artifact(NamedTuple):
    """An Artifact is a kind of result."""

    file: str  # its name; {clip} is MODEL_PRETRAINED, the other fields are those of `Results.path`
    shape: str  # of the array, in the letters of `utils.prs` (and k images per neuron); "" for other files
    maker: tuple  # the script that makes it, and {flag: field, or a tuple of fixed words}
    content: str  # one line for docs/files.md
    dtype: str = "float32"


LAYER = "{dataset}_{split}_mlps_{clip}_{layer}_"
ABLATIONS = "{dataset}_{split}_ablations{source}_{clip}_{layer}_{k}"
DESCRIPTIONS = "{dataset}_mlps_{clip}_{layer}_{texts}_decomposition_omp_{alpha}_{components}{variant}"
FIRES_ON = "{dataset}_mlps_{clip}_{layer}_{texts}_fires_on_omp_{components}{judge}"
GRADES = "{dataset}_{split}_grades_{clip}_{layer}_{texts}_{components}{variant}{judge}"
SEGMENTATION = "{file}_segmentation_{clip}_{row}"

IMAGES = {"--dataset": "dataset", "--data_path": "data_path", "--split": "split"}
TRAINING = {
    "--subsample": "subsample",
    "--train_data_path": "train_data_path",
    "--train_subsample": "train_subsample",
}
LAYERS = {"--mlp_layer": "layer"}
COMPONENTS = LAYERS | {"--top_k_pca": "k"}
POOL = {"--text_descriptions": "texts", "--descriptions_dir": "descriptions_dir"}
OMP = POOL | {"--components": "components", "--transform_alpha": "alpha", "--normalise": "normalise"}

EMBEDS = ("compute_representations.py", IMAGES)
CLASSIFIER = ("compute_classifier_projection.py", IMAGES)
EFFECTS = ("compute_second_order_neuron_prs.py", IMAGES | LAYERS)
MERGED = (EFFECTS[0], EFFECTS[1] | {"--merged": ()})
TOP = (EFFECTS[0], EFFECTS[1] | {"--keep": ("top",), "--top_k_pca": "k"})
PCAS = ("compute_pcas.py", {"--dataset": "dataset", **COMPONENTS})
ABLATES = ("compute_ablations.py", IMAGES | {"--train_dataset": "train_dataset"} | COMPONENTS)
TEXTS = ("compute_text_set_projection.py", POOL)
DESCRIBES = ("compute_sparse_decomposition.py", {"--dataset": "dataset", **COMPONENTS, **OMP})
HELD_OUT = {"--evaluate": (), "--data_path": "data_path", "--split": "split"}
EVALUATES = (DESCRIBES[0], DESCRIBES[1] | HELD_OUT)
GRADED = ("evaluate_descriptions.py", IMAGES | TRAINING | {"--truth": "truth"} | COMPONENTS | OMP)
LOOKS = ("make_gallery.py", IMAGES | TRAINING | COMPONENTS | OMP)
SEGMENTS = ("compute_segmentation.py", {"--data_path": "data_path"})

ARTIFACTS = {
    "representations": Artifact(
        "{dataset}_{split}_representations_{clip}.npy", "images D", EMBEDS, "100 x unit representations"
    ),
    "classes": Artifact("{dataset}_{split}_classes.npy", "images", EMBEDS, "labels", "int64"),
    "classifier": Artifact(
        "{dataset}_classifier_{clip}.npy", "D classes", CLASSIFIER, "unit columns, mean over 80 templates"
    ),
    "coefficients": Artifact(
        LAYER + "coefficients.npy", "images K N", EFFECTS, "C, the images' part of the effects"
    ),
    "bias": Artifact(LAYER + "bias.npy", "images D", EFFECTS, "kappa, equal for all neurons"),
    "values": Artifact(
        LAYER + "values.npy", "K N e", EFFECTS, "the weights' part: neuron n written into head k"
    ),
    "outputs": Artifact(LAYER + "outputs.npy", "K e D", EFFECTS, "head k written into the representation"),
    "merged": Artifact(
        LAYER + "merged.npy", "images N D", MERGED, "`--merged`: the effects, as in the published code"
    ),
    "top_coefficients": Artifact(
        LAYER + "top_coefficients.npy", "N k K", TOP, "`--keep top`: the k largest centred effects"
    ),
    "top_images": Artifact(LAYER + "top_images.npy", "N k", TOP, "their images", "int32"),
    "top_mean": Artifact(LAYER + "top_mean.npy", "N D", TOP, "mean effects"),
    "pca": Artifact(LAYER + "{k}_pca.npy", "N D", PCAS, "first components"),
    "norm": Artifact(
        LAYER + "{k}_norm.npy", "N k", PCAS, "norms of the k largest centred effects, ascending"
    ),
    "explained": Artifact(
        LAYER + "{k}_explained.npy", "N", PCAS, "share of their squared norm along the component"
    ),
    "mean": Artifact(LAYER + "mean.npy", "N D", PCAS, "mean effects"),
    "image_norms": Artifact(LAYER + "image_norms.npy", "images N", PCAS, "centred norm of every effect"),
    "ablations": Artifact(
        ABLATIONS + ".json", "", ABLATES, "five accuracies for every layer; also `.csv`, `.png`"
    ),
    "predictions": Artifact(
        ABLATIONS + "_predictions.npy", "images layers 5", ABLATES, "predicted classes", "int32"
    ),
    "texts": Artifact(
        "{texts}_{clip}.npy", "texts D", TEXTS, "100 x unit text vectors; the texts in a `.txt` beside"
    ),
    "decomposition": Artifact(
        DESCRIPTIONS + ".json", "", DESCRIBES, "{neuron: [[text index, coefficient, text]]}; also `.npz`"
    ),
    "evaluation": Artifact(
        DESCRIPTIONS + "_evaluation.json", "", EVALUATES, "accuracy with effects rebuilt from the texts"
    ),
    "evaluated": Artifact(
        DESCRIPTIONS + "_evaluation_predictions.npy", "images layers 1", EVALUATES, "classes", "int32"
    ),
    "projections": Artifact(
        LAYER + "{k}_projections.npy", "images N", GRADED, "effects along the first components"
    ),
    "fires_on": Artifact(
        FIRES_ON + ".json", "", GRADED, "texts that neurons fire on, as the decomposition; also `.npz`"
    ),
    "labels": Artifact(FIRES_ON + "_wpmi.npy", "N", GRADED, "soft-WPMI labels, text indices", "int32"),
    "along": Artifact(
        GRADES + "_along.npy", "images rows N", GRADED, "effects along texts; removed once graded"
    ),
    "grades": Artifact(GRADES + ".npy", "N rows measures", GRADED, "grades of descriptions; also `.csv`"),
    "graded": Artifact(GRADES + "_summary.json", "", GRADED, "their means over neurons; also `.png`"),
    "gallery": Artifact(
        "gallery/index.html", "", LOOKS, "a page of all neurons; format in `gallery/FORMAT.md`"
    ),
    "segmentation": Artifact(
        SEGMENTATION + ".json", "", SEGMENTS, "scores; also `.png`, `_precision.npy`, `_recall.npy`"
    ),
    "maps": Artifact(
        SEGMENTATION + "_maps.npy", "images patches", SEGMENTS, "the maps before they are scaled"
    ),
}
OF_WEIGHTS = ("classifier", "texts", "decomposition")  # results that no image was looked at for
