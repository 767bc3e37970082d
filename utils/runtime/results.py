"""Name the results in a folder, say which command makes them, and read them.

Every array is a plain .npy. Beside `X.npy` lies its record `X.meta.json`: shape, dtype, and everything that
it was made from. The next stage compares it. A result without a record (made by the published code) is
accepted after a look at its shape.
"""

import errno
import os
import re
import shlex
from pathlib import Path

import numpy as np

from utils.runtime.artifacts import ARTIFACTS, OF_UNITS, OF_WEIGHTS
from utils.runtime.errors import UserError
from utils.runtime.files import ADVICE, one_line, read_array
from utils.runtime.records import ADDED, METHOD, NEURONS, UNSAID, agrees, load_record, tell_earlier, was

NAME_MAX = 255 - len(".0123456789ab.progress.00.partial")  # bytes; leaves room for names of temporary files
UNIT_SUFFIXES = (".safetensors", ".pt", ".pth", ".npy", ".json")
CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".pyth", ".bin", ".ckpt", ".index.json")
PAIRS = "pairs"  # the --units that are neuron-head pairs
RANDOM = "random:"  # begins a --units that are the control of a dictionary
# names of files and folders that say nothing about the dictionary in them
GENERIC = ("sae_weights", "sae", "ae", "model", "weights", "dictionary", "checkpoint", "final", "trainer_0")
OF_MODEL = ("hf-hub:", "hf:", "local-dir:")  # a --model that names its weights
# commands do not repeat these
DEFAULTS = (("--transform_alpha", 1), ("--normalise", "axis"), ("--order", "second"))


def text_set(given):
    """Return the name of a text set that a user gives as NAME, NAME.txt, sub/NAME or a path."""
    return Path(given).name.removesuffix(".txt")


def model_name(model):
    """Return `--model` as it stands in file names: a path's stem, a hub id with dashes, else the name itself.

    An `open_clip_config.json` goes by its folder's name.
    """
    if model.startswith(("hf-hub:", "hf:")):
        return model.split(":", 1)[1].replace("/", "-")
    if model.startswith("local-dir:"):
        return Path(model.removeprefix("local-dir:")).resolve().name
    if Path(model).name == "open_clip_config.json":  # the hub's name for every model
        return Path(model).resolve().parent.name
    return Path(model).stem if model.endswith(".json") else model.replace("/", "-")


def unit_set(given):
    """Return the name of `--units` as it stands in file names; "" for neurons, which have none.

    It is the file's or folder's own, or, where that says nothing, the folder's above.
    """
    if given in (None, PAIRS):
        return given or ""
    path = Path(given.removeprefix(RANDOM))
    names = [path.name.removesuffix(path.suffix if path.suffix in UNIT_SUFFIXES else "")]
    names += [folder.name for folder in path.absolute().parents]
    name = next((name for name in names if name and name not in GENERIC), "units")
    name = re.sub(r"[^\w.-]", "-", name)
    if not name[0].isalpha() or name in ("rotated", PAIRS):
        name = f"units-{name}"
    return f"{name}-random" if given.startswith(RANDOM) else name


def pretrained_name(model, pretrained):
    """Return `--pretrained` as it stands in file names: STEM or STEM_KEY of a path, else the tag.

    Where the model names its weights, it is the scheme.
    """
    if model.startswith(OF_MODEL):
        return model.split(":")[0]
    if not is_checkpoint_path(pretrained):
        return pretrained
    file, key = file_and_key(pretrained)
    stem = Path(file.removesuffix(".index.json")).stem
    return stem if key is None else f"{stem}_{key}".replace(os.sep, "-")


def is_checkpoint_path(pretrained):
    """Return whether `--pretrained` is the path of a file, or FILE::KEY, and not a tag."""
    return file_and_key(pretrained)[0].endswith(CHECKPOINT_SUFFIXES) or os.sep in pretrained


def file_and_key(pretrained):
    """Split FILE::KEY, the weights under a key of a file.

    The key is None where none is given, or a file has that very name.
    """
    file, colons, key = pretrained.rpartition("::")
    return (file, key) if colons and not Path(pretrained).is_file() else (pretrained, None)


class Arrays(dict):
    """Arrays are {path: (shape, dtype)} of results to be made, as a `Pass` takes them.

    settings: {flag: value} that an interrupted pass must agree with to be resumed, besides the batch size.
    """

    settings = {}


class Results:
    """Results are those of one model in one folder.

    Parameters
    directory: the folder.
    model, pretrained: as in the flags.
    also: a second folder that is searched, such as a stage's own --output_dir.
    clip: the loaded `Clip`. Arrays that are read must have its sizes, weights and preprocessing.
    coefficient: that arrays must have been made with.
    known: other flags of the running command, which the commands in messages repeat.
    """

    def __init__(self, directory, model, pretrained, also=None, clip=None, coefficient=None, **known):
        self.directory = Path(directory)
        self.model = model
        self.pretrained = pretrained
        self.loaded = clip
        self.coefficient = coefficient
        self.known = known
        self.folders = list(dict.fromkeys([self.directory, Path(also or directory)]))
        self.units = unit_set(known.get("unit_set"))
        self.clip = f"{model_name(model)}_{pretrained_name(model, pretrained)}"

    def of(self, clip, coefficient=None):
        """Return these results as those of a loaded `Clip`, made with a coefficient."""
        return Results(
            self.directory,
            self.model,
            self.pretrained,
            also=self.folders[-1],
            clip=clip,
            coefficient=coefficient,
            **self.known,
        )

    def looking_at(self, units):
        """Return these results about other units, as --units names them; None for neurons."""
        known = {**self.known, "unit_set": units}
        return Results(self.directory, self.model, self.pretrained, also=self.folders[-1], **known)

    @property
    def signed(self):
        """signed is what records of components say, besides, of their sign.

        The sum of effects says it of a dictionary's unit: most of a rare one's k largest effects are those of
        images on which it does not act.
        """
        return {} if self.units in ("", PAIRS) else {"sign": "sum"}

    # names and commands

    def path(self, kind, **names):
        """Return the path of a result.

        names: the fields of its file's name, such as dataset, split, layer (one or a list), k, and the units
            where they are not those of the flags, such as rotated ones.
        """
        fields = {"split": "train", "source": "", "variant": "", "judge": "", **names, "clip": self.clip}
        fields["layer"] = "-".join(map(str, _list(names.get("layer", ""))))
        fields["unit_set"] = self.units and f"_{self.units}"
        for units in filter(None, (self.units, names.get("units"))):
            fields["layer"] += f"_{units}"
        if names.get("train_dataset", names.get("dataset")) != names.get("dataset"):
            fields["source"] = f"_{names['train_dataset']}"
        if "texts" in names:
            fields["texts"] = text_set(names["texts"])
        if "alpha" in names:
            fields["alpha"] = float(names["alpha"])  # 1.0, as in the published names
        for field, usual in (("normalise", "axis"), ("order", "second")):
            if names.get(field, usual) != usual:
                fields["variant"] += f"_{names[field]}"
        name = ARTIFACTS[kind].file.format(**fields)
        if (length := len(os.fsencode(name))) > NAME_MAX:
            fix = ADVICE[errno.ENAMETOOLONG]
            raise UserError(
                f"the name {name} has {length} bytes, and disks take {NAME_MAX} of a result; {fix}"
            )
        return self.directory / name

    def find(self, kind, **names):
        """Return the path of a result that is to be read: in the folder, or in `also` if it is only there."""
        path = self.path(kind, **names)
        places = [folder / path.name for folder in self.folders]
        return next((place for place in places if place.is_file()), path)

    def arrays(self, kinds, sizes=(), dtypes=(), layers=None, **names):
        """Return the `Arrays` of some kinds.

        sizes: {letter: size} of the letters in their shapes, besides those of the model.
        dtypes: {kind: dtype} in place of the table's.
        layers: MLP layers that each have arrays of their own.
        names: as in `path`.
        """
        found = Arrays()
        several = names.get("layer") if layers is None else layers
        if isinstance(several, list):
            top = {"top_k_pca": dict(sizes)["k"]} if "k" in dict(sizes) else {}
            found.settings = {**top, "layers": several}
        for layer in [None] if layers is None else layers:
            own = names if layer is None else {**names, "layer": layer}
            known = {**self.sizes(layer), **dict(sizes)}
            for kind in kinds:
                shape = [int(known.get(letter, letter)) for letter in ARTIFACTS[kind].shape.split()]
                dtype = dict(dtypes).get(kind) or ARTIFACTS[kind].dtype
                found[self.path(kind, **own)] = (tuple(shape), dtype)
        return found

    def command(self, kind, **names):
        """Return the command that makes a result in this folder, as one types it in a shell.

        A flag without a known value is left out; an unknown --data_path stands as DATA_PATH, to be replaced,
        and so do the CLASS_NAMES of pictures without classes.
        """
        script, flags = ARTIFACTS[kind].maker
        given = {key: value for key, value in self.known.items() if value is not None}
        known = {"data_path": "DATA_PATH", **given, **names}
        if kind == "classifier" and known.get("dataset") in ("imagenet", "imagenet_r"):
            known["data_path"] = None  # its class names need no images
        if kind == "classifier" and known.get("dataset") == "images":
            known = {"class_names": "CLASS_NAMES", **known, "data_path": None, "split": None}
        if known.get("train_dataset") == known.get("dataset"):
            known["train_dataset"] = None
        words = []
        for flag, field in flags.items():
            value = field if isinstance(field, tuple) else known.get(field)
            if value is not None and (flag, value) not in DEFAULTS:
                words += [flag, *_list(value)]
        words += ["--model", self.model, "--pretrained", self.pretrained, "--output_dir", self.directory]
        return shlex.join(["python", script, *map(str, words)])

    # reading

    def load(self, kind, sizes=(), expected=(), mmap=False, **names):
        """Read an array of an earlier stage.

        kind, names: as in `path`.
        sizes: {letter: size} of the letters in the artifact's shape, besides those of the model; other
            letters may have any size.
        expected: {key: value} that the array's record has to agree with where it has the key, besides the
            model's; None values are not compared.
        mmap: open it as a read-only memory map.

        Raises UserError, with the command that makes it, when it is missing, damaged, of another shape, or of
        other weights or data.
        """
        path = self.find(kind, **names)
        command = self.command(kind, **names)
        again = f"make it again with: {command} --overwrite"
        if not path.is_file():
            raise UserError(self.missing(path, command))
        try:
            array = read_array(path, mmap)
        except ValueError as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}); {again}") from error
        dtype = np.dtype(ARTIFACTS[kind].dtype)
        if array.dtype.kind not in {"f": "f", "i": "iu"}[dtype.kind]:
            raise UserError(f"{path} holds {array.dtype} and not {dtype}; {again}")
        known = {"k": names.get("k"), **self.sizes(names.get("layer")), **dict(sizes)}
        check_shape(path, array.shape, ARTIFACTS[kind].shape, known, again)
        self.check_record(path, {**self.expected(kind), **dict(expected)}, again)
        if mmap:
            return array
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            where = ", ".join(map(str, np.argwhere(~np.isfinite(array))[0]))
            raise UserError(f"{path} holds NaN or infinity, first at [{where}]; {again}")
        return array.astype(dtype, copy=False)

    def sizes(self, layer=None):
        """Return {letter: size} of the model; K, and as many heads, only for one layer."""
        if self.loaded is None:
            return {}
        vit = self.loaded.vit
        one = layer if isinstance(layer, int) else None
        sizes = dict(vit.sizes) if one is None else {**vit.sizes, "K": vit.K(one), "heads": vit.K(one)}
        units = getattr(self.loaded, "units", None)
        return sizes if units is None else {**sizes, **units.sizes(vit, one)}

    def expected(self, kind):
        """Return {key: value} that the record of a kind of result must agree with, for the loaded model."""
        if self.loaded is None:
            return {}
        found = {"fingerprint": self.loaded.fingerprint, "coefficient": self.coefficient}
        if kind not in OF_WEIGHTS:
            found["preprocessing"] = self.loaded.expected["preprocessing"]
        if kind in OF_UNITS:
            found |= self.loaded.units_record if self.units else {"unit_set": NEURONS}
        if kind == "pca":
            found |= self.signed
        return found

    def missing(self, path, command):
        """Return the message about a result that is in none of the folders."""
        others = "".join(f" (and not in {folder})" for folder in self.folders[1:])
        return f"{path} is missing{others}; make it with: {command}"

    def check_record(self, path, expected, again):
        """Raise UserError, ending in `again`, when a record contradicts {key: value} of `expected`."""
        record = load_record(path)
        for key, value in {**expected, "method_number": METHOD}.items():
            found = record.get(key, UNSAID.get(key) if "fingerprint" in record else None)
            known = found is not None or (key in ADDED and "fingerprint" in record)
            if value is None or not known:
                continue
            if not agrees(found, value):
                raise UserError(f"{path} was made with {key} {found!r}, and here it is {value!r}; {again}")
            if was(found, value):
                tell_earlier(path.parent)


def check_shape(path, shape, letters, sizes, again):
    """Raise UserError, ending in `again`, unless a shape is that of some letters.

    letters: of the dimensions, or their sizes, such as "N k 5". sizes: {letter: size}; others may have any.
    """
    wanted = [int(letter) if letter.isdecimal() else sizes.get(letter) for letter in letters.split()]
    fits = len(wanted) == len(shape)
    if fits and all(want in (None, have) for want, have in zip(wanted, shape, strict=True)):
        return
    has = " x ".join(map(str, shape))
    needed = " x ".join("any" if size is None else str(size) for size in wanted)
    why = "it is of another model, layer or data set"
    raise UserError(f"{path} has the shape {has} where {needed} is needed: {why}; {again}")


def _list(value):
    return value if isinstance(value, list | tuple) else [value]
