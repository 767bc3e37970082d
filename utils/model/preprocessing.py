"""The preprocessing of a model, the steps from a picture to pixels, and where it is known from.

`choose` decides for every way that a model may come in. It uses a config whole, or refuses what it cannot do.
"""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip import transform as of_open_clip
from open_clip.transform import CenterCropOrPad, PreprocessCfg, ResizeKeepRatio
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from utils.runtime.errors import UserError
from utils.runtime.files import one_line, read_json
from utils.runtime.records import Digest
from utils.runtime.results import file_and_key, is_checkpoint_path, model_name

CONFIG = "open_clip_config.json"
DEFAULT = asdict(PreprocessCfg())  # open_clip's
CHOICES = {
    "mode": ("RGB",),
    "interpolation": ("bicubic", "bilinear", "random"),  # random: bicubic, outside of training
    "resize_mode": ("shortest", "longest", "squash"),
}
PROCESSORS = ("CLIPImageProcessor", "SiglipImageProcessor", "ViTImageProcessor")
DONE = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
NOT_DONE = ("crop_pct", "rescale_offset")  # and every other field do_...
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of Pillow's numbers


class Preprocessing(Compose):
    """PIL image -> float32 [3, height, width], by steps. The last has `mean` and `std`, for pixels in [0, 1].

    source: where it is from, in words.
    note: a line for the user, "" for none.

    Attribute: earlier_record, the record of what versions without this module took; None where they refused.
    """

    def __init__(self, steps, source, note=""):
        super().__init__(steps)
        self.source = source
        self.note = note
        self.earlier_record = None

    @property
    def record(self):
        """As `record_of` gives it."""
        return record_of(self.transforms)

    @property
    def digest(self):
        """Sixteen hex digits of `record`, for records of results. Those of earlier versions have none; they
        agree with it if the pixels were the same then."""
        content = json.dumps(self.record, sort_keys=True).encode()
        digest = hashlib.sha256(content).hexdigest()[:16]
        return Digest(digest, None) if self.record == self.earlier_record else digest


class OnWhite:
    """A PIL image in RGB, on white where it is transparent."""

    def __call__(self, image):
        return on_white(image).convert("RGB")


def on_white(image):
    """A PIL image without transparency: on white where it has some, else as it is."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


class LowerCrop(CenterCrop):
    """The middle of a PIL image, the upper or left one of two, with `fill` around a smaller image."""

    fill = 0

    def forward(self, image):
        height, width = self.size
        corner = ((image.width - width) // 2, (image.height - height) // 2)
        middle = Image.new(image.mode, (width, height), self.fill)
        middle.paste(image, (-corner[0], -corner[1]))
        return middle


class ToPixels:
    """PIL image in RGB -> (values * factor - mean) / std, float32 [3, height, width]; values are 0 to 255.

    Attributes: mean and std, three numbers each, which would give the same for pixels in [0, 1].
    """

    def __init__(self, factor, mean, std):
        self.factor = factor
        self.taken_off = torch.tensor(mean)[:, None, None]
        self.divided_by = torch.tensor(std)[:, None, None]
        self.mean = tuple(value / (255 * factor) for value in mean)
        self.std = tuple(value / (255 * factor) for value in std)

    def __call__(self, image):
        values = (np.asarray(image) * self.factor).astype(np.float32)
        return (torch.from_numpy(values).permute(2, 0, 1) - self.taken_off) / self.divided_by


# Which of two middle places a crop takes, and whether it pads
CROPS = {CenterCrop: "even", CenterCropOrPad: "even, padded", LowerCrop: "lower, padded"}


def record_of(steps):
    """What fixes the pixels, as plain values: equal for equal pixels, wherever the steps are from."""
    record = {"transparent": "white" if any(isinstance(step, OnWhite) for step in steps) else "dropped"}
    for step in steps:
        if isinstance(step, Resize | ResizeKeepRatio):
            record |= {"resize": _edge(step), "interpolation": step.interpolation.value}
            record["size"] = [step.size] * 2 if isinstance(step.size, int) else list(step.size)
        elif type(step) in CROPS:
            record |= {"crop": list(step.size), "place": CROPS[type(step)]}
            record |= {"fill": step.fill} if hasattr(step, "fill") else {}
        elif hasattr(step, "mean"):
            record["mean"] = [float(value) for value in step.mean]
            record["std"] = [float(value) for value in step.std]
    return record


def _edge(step):
    """Which edge a step brings to its size: shortest, longest or both."""
    if isinstance(step, ResizeKeepRatio):
        return "longest" if step.longest else "shortest"
    return "shortest" if isinstance(step.size, int) else "both"


def describe(transform):
    """The line that says what a `Preprocessing` does and where it is from. Its note is below, if any."""
    record = transform.record
    words = []
    if "resize" in record:
        edge = "resize" if record["resize"] == "both" else f"{record['resize']} edge"
        size = record["size"] if record["resize"] == "both" else dict.fromkeys(record["size"])
        words.append(f"{edge} to {_times(size)} ({record['interpolation']})")
    if "crop" in record:
        words.append(f"crop {_times(record['crop'])}")
    for name in ("mean", "std"):
        words.append(" ".join([name, *(f"{value:.3g}" for value in record[name])]))
    line = f"preprocessing: {', '.join(words)}; from {transform.source}"
    return f"{line}\n{transform.note}" if transform.note else line


def _times(size):
    return " x ".join(map(str, size))


def choose(model, pretrained, visual, folder=None):
    """The `Preprocessing` of a model.

    model, pretrained: as in the flags.
    visual: its image tower, as open_clip made it.
    folder: where its config.json is, for a model of the transformers library.

    Raises UserError, with the field, for a config that is damaged, that has what cannot be done, or that does
    not bring every picture to the tower's size.
    """
    size = _pair(visual.image_size)
    shown = model.removeprefix("local-dir:").rstrip("/")
    beside = folder
    if folder is not None:
        chosen = _of_folder(folder, shown, size) or _without_config(model, size)
    elif model.startswith(("hf-hub:", "local-dir:")):
        chosen = _of_config(Path(shown) / CONFIG, f"{shown}/{CONFIG}", size)
        chosen = chosen or _of_fields(visual.preprocess_cfg, size, f"{shown}/{CONFIG}")
    elif is_checkpoint_path(pretrained):
        beside = Path(file_and_key(pretrained)[0]).parent
        chosen = _of_config(beside / CONFIG, f"{beside}/{CONFIG}", size) or _of_folder(beside, beside, size)
        chosen = chosen or _of_model_config(model, size) or _published(model, size)
    elif pretrained == "random":
        chosen = _of_model_config(model, size) or _of_fields({}, size, "open_clip's default (random weights)")
    else:
        chosen = _of_fields(visual.preprocess_cfg, size, f"open_clip's tag {pretrained}")
    chosen.earlier_record = _earlier_record(visual.preprocess_cfg, beside)
    return chosen


def _pair(size):
    """(height, width) of a size as open_clip's configs have it."""
    sizes = tuple(size) if isinstance(size, list | tuple) else (size,)
    return sizes * 2 if len(sizes) == 1 else sizes


def _read(path):
    """The fields of a json file, None where there is no file."""
    try:
        found = read_json(path, "the config", "correct or remove it")
    except FileNotFoundError:
        return None
    if not isinstance(found, dict):
        raise UserError(f"the config {path} is damaged (it holds no fields); correct or remove it")
    return found


# open_clip


def _of_model_config(model, size):
    """The preprocessing of the config that is --model; None where it has none, and for a name."""
    return _of_config(Path(model), model, size) if model.endswith(".json") else None


def _of_config(path, shown, size):
    """The preprocessing under preprocess_cfg in a config; None where it has none, or is not there."""
    fields = (_read(path) or {}).get("preprocess_cfg")
    return None if fields is None else _of_fields(fields, size, shown)


def _of_fields(fields, size, source):
    """The preprocessing of open_clip's fields. Those that are not there, or null, have its default."""
    if not isinstance(fields, dict):
        raise UserError(f"{source}: preprocess_cfg is {fields!r}; it has to hold fields")
    for field in fields:
        if field not in DEFAULT:
            raise UserError(f"{source}: preprocess_cfg has {field}; open_clip has {', '.join(DEFAULT)}")
    given = of_open_clip.merge_preprocess_dict(DEFAULT, fields)
    for field, choices in CHOICES.items():
        if given[field] not in choices:
            raise UserError(f"{source}: {field} is {given[field]!r}; it has to be {' or '.join(choices)}")
    for field in ("mean", "std"):
        given[field] = _channels(given[field], field, source)
    fill = given["fill_color"]
    if type(fill) is not int or not 0 <= fill <= 255:
        raise UserError(f"{source}: fill_color is {fill!r}; it has to be a whole number from 0 to 255")
    if "size" in fields and fields["size"] is not None and _pair(fields["size"]) != size:
        what = f"size is {fields['size']!r}, and the model takes {_times(size)}"
        raise UserError(f"{source}: {what}; correct it there")
    steps = of_open_clip.image_transform_v2(PreprocessCfg(**{**given, "size": size}), is_train=False)
    return Preprocessing(steps.transforms, source)


def _channels(value, field, source):
    """Three numbers, given as such or as one for all. Raises UserError for others."""
    values = value if isinstance(value, list | tuple) else [value] * 3
    numbers = all(type(each) in (int, float) and math.isfinite(each) for each in values)
    positive = "positive " if "std" in field else ""
    if len(values) != 3 or not numbers or (positive and min(values) <= 0):
        raise UserError(f"{source}: {field} is {value!r}; it has to be a {positive}number, or three of them")
    return tuple(map(float, values))


def _published(model, size):
    """The preprocessing of weights that no config describes: that on which the model's published tags agree.

    Where they differ it is that of most tags, or open_clip's default where no preprocessing has most.
    """
    name = model_name(model)
    tags_of = _tags_of_preprocessing(name)
    if not tags_of:
        return _of_fields({}, size, f"open_clip's default ({name} has no published tags)")
    source = f"{'most of ' if len(tags_of) > 1 else ''}{name}'s published tags"
    counts = {text: len(tags) for text, tags in tags_of.items()}
    most = [text for text, count in counts.items() if count == max(counts.values())]
    taken = most[0]
    which = f"that of {counts[taken]} of {sum(counts.values())}"
    if len(most) > 1:
        taken = json.dumps({"preprocess_cfg": {}})
        which = "open_clip's default"
        source = f"{which} ({name}'s published tags differ)"
    chosen = _of_fields(json.loads(taken)["preprocess_cfg"], size, source)
    others = [f"{text} ({', '.join(tags)})" for text, tags in tags_of.items() if text != taken]
    if others:
        differ = f"{name}'s published tags differ in preprocessing, and no config beside the weights says it"
        fix = f"for another write {CONFIG} beside them: {' or '.join(others)}"
        chosen.note = f"note: {differ}; {which} is taken, {fix}"
    return chosen


def _tags_of_preprocessing(name):
    """A model's published tags, under the preprocessing that they have, which is written as in a config."""
    found = {}
    for tag in open_clip.list_pretrained_tags_by_model(name):
        fields = of_open_clip.merge_preprocess_dict(DEFAULT, open_clip.get_pretrained_cfg(name, tag))
        others = {field: value for field, value in fields.items() if value != DEFAULT[field]}
        found.setdefault(json.dumps({"preprocess_cfg": others}), []).append(tag)
    return found


# The transformers library


def _of_folder(folder, shown, size):
    """The preprocessing of a folder's image processor, by the file that the library takes; else None."""
    file = "processor_config.json"
    fields = (_read(folder / file) or {}).get("image_processor")
    if fields is None:
        file = "preprocessor_config.json"
        fields = _read(folder / file)
    where = f"{shown}/{file}"
    if fields is not None and not isinstance(fields, dict):
        raise UserError(f"the config {where} is damaged (it holds no fields); correct or remove it")
    return None if fields is None else Preprocessing(_processor_steps(fields, size, where), where)


def _without_config(model, size):
    """CLIP's default preprocessing, at the model's size."""
    fields = {"size": {"shortest_edge": min(size)}, "crop_size": {"height": size[0], "width": size[1]}}
    note = f"note: {model} has no preprocessor_config.json; CLIP's default is taken, at the model's size"
    return Preprocessing(_processor_steps(fields, size, model), f"{PROCESSORS[0]}'s default", note)


def _processor(fields, where):
    """An image processor of the library, which knows what its config leaves out."""
    import transformers  # takes a second

    kind = fields.get("image_processor_type") or fields.get("feature_extractor_type") or PROCESSORS[0]
    name = str(kind).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in PROCESSORS:
        raise UserError(f"{where}: image_processor_type is {kind}; it has to be {' or '.join(PROCESSORS)}")
    for field, value in fields.items():
        if value and (field in NOT_DONE or (field.startswith("do_") and field not in DONE)):
            raise UserError(f"{where}: {field} is {value!r}, which cannot be done; correct it there")
    try:
        with_pillow = getattr(transformers, f"{name}Pil", None)  # since transformers 5
        return (with_pillow or getattr(transformers, name))(**fields)
    except Exception as error:  # it has many
        why = f"no {name} can be made of it ({one_line(error)[:160]})"
        raise UserError(f"{where}: {why}; correct it there") from error


def _processor_steps(fields, size, where):
    """The steps that give the pixels of an image processor, of its variant for Pillow. fields: its config."""
    processor = _processor(fields, where)
    factor = processor.rescale_factor if processor.do_rescale else 1
    if type(factor) not in (int, float) or not 0 < factor < math.inf:
        raise UserError(f"{where}: rescale_factor is {factor!r}; it has to be a positive number")
    mean = [0.0] * 3
    std = [1.0] * 3
    if processor.do_normalize:
        mean = _channels(processor.image_mean, "image_mean", where)
        std = _channels(processor.image_std, "image_std", where)
    return [OnWhite(), *_geometry(processor, size, where), ToPixels(factor, mean, std)]


def _geometry(processor, size, where):
    """The steps by which an image processor brings pictures to the model's size."""
    steps = []
    field = "do_resize"
    made = (False,)
    if processor.do_resize:
        field = "size"
        made = _edges(processor.size, field, where)
        steps.append(Resize(made[0] if len(made) == 1 else made, _filter(processor.resample, where)))
    if getattr(processor, "do_center_crop", False):
        field = "crop_size"
        crop = _edges(processor.crop_size, field, where)
        steps += [LowerCrop(crop)] if crop != made else []
        made = crop
    if made != size:
        what = f"{field} {_times(made)} does not bring every picture to {_times(size)}, which the model takes"
        raise UserError(f"{where}: {what}; correct it or do_center_crop there")
    return steps


def _edges(given, field, where):
    """(height, width) of a processor's field, or (shortest edge,) of its `size`."""
    edges = dict(given or {})
    known = sorted(edges) == ["height", "width"] or (field == "size" and list(edges) == ["shortest_edge"])
    if not known or not all(type(edge) is int and edge > 0 for edge in edges.values()):
        what = f"{field} is {edges or given}, which cannot be done"
        raise UserError(f"{where}: {what}; use height and width, in pixels")
    return tuple(edges[name] for name in sorted(edges))


def _filter(resample, where):
    """A filter of Pillow, given by its number or name."""
    if isinstance(resample, int) and 0 <= resample < len(FILTERS):
        return InterpolationMode(FILTERS[resample])
    if resample not in FILTERS:
        raise UserError(f"{where}: resample is {resample!r}; it has to be 0 to 5, or {', '.join(FILTERS)}")
    return InterpolationMode(resample)


# Earlier versions


def _earlier_record(own, beside):
    """The record of what versions before this module took, None where they refused.

    own: what open_clip set for the tower.
    beside: the folder of a model of the transformers library, or of weights given by path; else None.
    """
    read = {} if beside is None else _earlier_fields(beside)
    fields = {**own, **{field: value for field, value in read.items() if value is not None}}
    try:
        return record_of(of_open_clip.image_transform_v2(PreprocessCfg(**fields), is_train=False).transforms)
    except (AssertionError, TypeError, ValueError):
        return None


def _earlier_fields(folder):
    """What they read from a folder, under open_clip's names."""
    config = _read(folder / "config.json") or {}
    if config.get("model_type") == "clip" and "vision_config" in config:
        fields = _read(folder / "preprocessor_config.json") or {}
        filters = {2: "bilinear", 3: "bicubic"}
        read = {"mean": fields.get("image_mean"), "std": fields.get("image_std")}
        return read | {"interpolation": filters.get(fields.get("resample"))}
    config = _read(folder / CONFIG) or {}
    fields = config.get("preprocess_cfg") or {} if "model_cfg" in config else {}  # else they refused
    return {field: fields.get(field) for field in ("mean", "std", "interpolation", "resize_mode")}
