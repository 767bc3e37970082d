"""What every result is called, which command makes it, and what it was made from.

Every array is a plain .npy in one folder. Beside `X.npy` lies its record `X.meta.json`: shape, dtype, and
what it was made from. The next stage compares it. A result without a record (made by the published code) is
accepted after a look at its shape.
"""

import errno
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.runtime.errors import UserError
from utils.runtime.files import ADVICE, one_line, read_array
from utils.runtime.records import (
    ADDED,
    METHOD,
    agrees,
    load_record,
    tell_earlier,
    was,
)

NAME_MAX = 255 - len(
    ".0123456789ab.progress.00.partial"
)  # bytes, so that there is room for the names of temporary files
CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".pyth", ".bin", ".ckpt", ".index.json")


class Artifact(NamedTuple):
    """A kind of result."""

    file: str  # its name; {clip} is MODEL_PRETRAINED, the other fields are those of `Results.path`
    shape: str  # of the array, in the letters of `utils.prs` (and k images per neuron); "" for other files
    maker: str  # the stage and the flags that make this very file, besides the model and the folder
    content: str  # one line for the README
    dtype: str = "float32"


LAYER = "{dataset}_{split}_mlps_{clip}_{layer}_"
ABLATIONS = "{dataset}_{split}_ablations{source}_{clip}_{layer}_{k}"
DESCRIPTIONS = "{dataset}_mlps_{clip}_{layer}_{texts}_decomposition_omp_{alpha}_{components}{variant}"
FIRES_ON = "{dataset}_mlps_{clip}_{layer}_{texts}_fires_on_omp_{components}{judge}"
GRADES = "{dataset}_{split}_grades_{clip}_{layer}_{texts}_{components}{variant}{judge}"
SEGMENTATION = "{file}_segmentation_{clip}_{row}"

IMAGES = "--dataset {dataset} --data_path {data_path} --split {split}"
EMBEDS, CLASSIFIER = f"compute_representations.py {IMAGES}", f"compute_classifier_projection.py {IMAGES}"
EFFECTS = f"compute_second_order_neuron_prs.py {IMAGES} --mlp_layer {{layer}}"
MERGED, TOP = f"{EFFECTS} --merged", f"{EFFECTS} --keep top --top_k_pca {{k}}"
PCAS = "compute_pcas.py --dataset {dataset} --mlp_layer {layer} --top_k_pca {k}"
ABLATES = (
    f"compute_ablations.py {IMAGES} --train_dataset {{train_dataset}} --mlp_layer {{layer}} --top_k_pca {{k}}"
)
TEXTS = "compute_text_set_projection.py --text_descriptions {texts} --descriptions_dir {descriptions_dir}"
DESCRIBES = (
    "compute_sparse_decomposition.py --dataset {dataset} --mlp_layer {layer} --top_k_pca {k} --text_descriptions {texts} "
    "--descriptions_dir {descriptions_dir} --components {components} --transform_alpha {alpha} --normalise {normalise}"
)
EVALUATES = DESCRIBES + " --evaluate --data_path {data_path} --split {split}"
GRADES_ALL = (
    f"evaluate_descriptions.py {IMAGES} --subsample {{subsample}} --train_data_path {{train_data_path}} "
    "--train_subsample {train_subsample} --truth {truth} --mlp_layer {layer} --top_k_pca {k} --text_descriptions {texts} "
    "--descriptions_dir {descriptions_dir} --components {components} --transform_alpha {alpha} --normalise {normalise}"
)
LOOKS = GRADES_ALL.replace("evaluate_descriptions.py", "make_gallery.py").replace(" --truth {truth}", "")
SEGMENTS = "compute_segmentation.py --data_path {data_path}"

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
        LAYER + "{k}_projections.npy", "images N", GRADES_ALL, "effects along the first components"
    ),
    "fires_on": Artifact(
        FIRES_ON + ".json", "", GRADES_ALL, "texts that neurons fire on, as the decomposition; also `.npz`"
    ),
    "labels": Artifact(FIRES_ON + "_wpmi.npy", "N", GRADES_ALL, "soft-WPMI labels, text indices", "int32"),
    "along": Artifact(
        GRADES + "_along.npy", "images rows N", GRADES_ALL, "effects along texts; removed once graded"
    ),
    "grades": Artifact(GRADES + ".npy", "N rows measures", GRADES_ALL, "grades of descriptions; also `.csv`"),
    "graded": Artifact(GRADES + "_summary.json", "", GRADES_ALL, "their means over neurons; also `.png`"),
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


def text_set(given):
    """The name of a text set that a user names: NAME, NAME.txt, sub/NAME or a path."""
    return Path(given).name.removesuffix(".txt")


def model_name(model):
    """`--model` as it stands in file names: a path's stem, a hub id with dashes, else the name itself.

    An `open_clip_config.json` goes by its folder's name.
    """
    if model.startswith(("hf-hub:", "hf:")):
        return model.split(":", 1)[1].replace("/", "-")
    if model.startswith("local-dir:"):
        return Path(model.removeprefix("local-dir:")).resolve().name
    if Path(model).name == "open_clip_config.json":  # the hub's name for every model
        return Path(model).resolve().parent.name
    return Path(model).stem if model.endswith(".json") else model.replace("/", "-")


def pretrained_name(model, pretrained):
    """`--pretrained` as it stands in file names: STEM or STEM_KEY of a path, else the tag.

    Where the model names its weights, it is the scheme.
    """
    if model.startswith(("hf-hub:", "hf:", "local-dir:")):
        return model.split(":")[0]
    if not is_checkpoint_path(pretrained):
        return pretrained
    file, key = file_and_key(pretrained)
    stem = Path(file.removesuffix(".index.json")).stem
    return stem if key is None else f"{stem}_{key}".replace(os.sep, "-")


def is_checkpoint_path(pretrained):
    """Whether `--pretrained` is the path of a file, or FILE::KEY, and not a tag."""
    return file_and_key(pretrained)[0].endswith(CHECKPOINT_SUFFIXES) or os.sep in pretrained


def file_and_key(pretrained):
    """Split FILE::KEY: the weights under a key of a file. The key is None where none is given, or a file has
    that very name.
    """
    file, colons, key = pretrained.rpartition("::")
    return (file, key) if colons and not Path(pretrained).is_file() else (pretrained, None)


class Results:
    """The results of one model in one folder.

    Parameters
    directory: the folder.
    model, pretrained: as in the flags.
    also: a folder where results are looked for that are not in the first, such as a stage's own --output_dir.
    known: other flags of the running command (data_path, split, descriptions_dir), which the commands in
        messages repeat.
    """

    def __init__(self, directory, model, pretrained, also=None, **known):
        self.directory, self.model, self.pretrained, self.known = Path(directory), model, pretrained, known
        self.folders = list(dict.fromkeys([self.directory, Path(also or directory)]))
        self.clip = f"{model_name(model)}_{pretrained_name(model, pretrained)}"

    def path(self, kind, **names):
        """Path of a result. names: the fields of its file's name, such as dataset, split, layer (one or a
        list), k.
        """
        fields = {"split": "train", "source": "", "variant": "", "judge": "", **names, "clip": self.clip}
        fields["layer"] = "-".join(map(str, _list(names.get("layer", ""))))
        if names.get("train_dataset", names.get("dataset")) != names.get("dataset"):
            fields["source"] = f"_{names['train_dataset']}"
        if "texts" in names:
            fields["texts"] = text_set(names["texts"])
        if "alpha" in names:
            fields["alpha"] = float(names["alpha"])  # 1.0, as in the published names
        if names.get("normalise", "axis") != "axis":
            fields["variant"] = f"_{names['normalise']}"
        name = ARTIFACTS[kind].file.format(**fields)
        if (length := len(os.fsencode(name))) > NAME_MAX:
            fix = ADVICE[errno.ENAMETOOLONG]
            raise UserError(
                f"the name {name} has {length} bytes, and disks take {NAME_MAX} of a result; {fix}"
            )
        return self.directory / name

    def find(self, kind, **names):
        """Path of a result that is to be read: where `path` says, or in the folder `also` if it is only
        there.
        """
        path = self.path(kind, **names)
        return next((place for folder in self.folders if (place := folder / path.name).is_file()), path)

    def arrays(self, kinds, sizes, dtype=None, **names):
        """{path: (shape, dtype)} of some kinds of arrays, as `Pass` takes it.

        sizes: {letter: size} of the letters in their shapes.
        dtype: in place of the table's.
        """
        found = {}
        for kind in kinds:
            shape = [int(sizes.get(letter, letter)) for letter in ARTIFACTS[kind].shape.split()]
            found[self.path(kind, **names)] = (tuple(shape), dtype or ARTIFACTS[kind].dtype)
        return found

    def command(self, kind, **names):
        """The command that makes a result in this folder, as one types it in a shell.

        A flag without a known value is left out; an unknown --data_path stands as DATA_PATH, to be replaced.
        """
        script, _, flags = ARTIFACTS[kind].maker.partition(" ")
        words, default = [], (("--transform_alpha", 1), ("--normalise", "axis"))
        known = {
            "data_path": "DATA_PATH",
            **{key: value for key, value in self.known.items() if value is not None},
            **names,
        }
        if kind == "classifier" and known.get("dataset") in ("imagenet", "imagenet_r"):
            known["data_path"] = None  # its class names need no images
        if known.get("train_dataset") == known.get("dataset"):
            known["train_dataset"] = None
        for flag, given in re.findall(r"(--\w+)(?: (?!--)(\S+))?", flags):
            value = known.get(given.strip("{}")) if given.startswith("{") else given
            if value == "":
                words.append(flag)
            elif value is not None and (flag, value) not in default:
                words += [flag, *_list(value)]
        words += ["--model", self.model, "--pretrained", self.pretrained, "--output_dir", self.directory]
        return shlex.join(["python", script, *map(str, words)])

    def load(self, kind, sizes=(), expected=(), mmap=False, **names):
        """Read an array of an earlier stage.

        Parameters
        kind, names: as in `path`.
        sizes: {letter: size} of the letters in the artifact's shape; other letters may have any size.
        expected: {key: value} that the array's record has to agree with where it has the key; None values are
            not compared.
        mmap: open it as a read-only memory map.

        Raises UserError, with the command that makes it, when it is missing, damaged, of another shape, or of
        other weights or data.
        """
        path, command = self.find(kind, **names), self.command(kind, **names)
        if not path.is_file():
            raise UserError(self.missing(path, command))
        again = f"make it again with: {command} --overwrite"
        try:
            array = read_array(path, mmap)
        except ValueError as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}); {again}") from error
        dtype = np.dtype(ARTIFACTS[kind].dtype)
        if array.dtype.kind not in {"f": "f", "i": "iu"}[dtype.kind]:
            raise UserError(f"{path} holds {array.dtype} and not {dtype}; {again}")
        sizes = {**dict(sizes), "k": names.get("k")}
        wanted = [
            int(letter) if letter.isdecimal() else sizes.get(letter)
            for letter in ARTIFACTS[kind].shape.split()
        ]
        if len(wanted) != array.ndim or any(
            want not in (None, have) for want, have in zip(wanted, array.shape, strict=True)
        ):
            shape = " x ".join("any" if size is None else str(size) for size in wanted)
            raise UserError(
                f"{path} has the shape {' x '.join(map(str, array.shape))} where {shape} is needed: it is of another model, "
                f"layer or data set; {again}"
            )
        self.check_record(path, dict(expected), again)
        if not mmap and array.dtype.kind == "f" and not np.isfinite(array).all():
            where = ", ".join(map(str, np.argwhere(~np.isfinite(array))[0]))
            raise UserError(f"{path} holds NaN or infinity, first at [{where}]; {again}")
        return array if mmap else array.astype(dtype, copy=False)

    def missing(self, path, command):
        """What is said of a result that is in none of the folders."""
        others = "".join(f" (and not in {folder})" for folder in self.folders[1:])
        return f"{path} is missing{others}; make it with: {command}"

    def check_record(self, path, expected, again):
        """Raise UserError, ending in `again`, when a result's record contradicts {key: value} of
        `expected`.
        """
        record = load_record(path)
        for key, value in {**expected, "method_number": METHOD}.items():
            found = record.get(key)
            known = found is not None or (key in ADDED and "fingerprint" in record)
            if value is None or not known:
                continue
            if not agrees(found, value):
                raise UserError(f"{path} was made with {key} {found!r}, and here it is {value!r}; {again}")
            if was(found, value):
                tell_earlier(path.parent)


def _list(value):
    return value if isinstance(value, list | tuple) else [value]
