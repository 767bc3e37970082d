"""Choose the preprocessing of a model: the steps from a picture to pixels, and the source that says so.

`choose` decides for every way in which a model may be given. It uses a config whole, or refuses it.
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

from utils.model.configs import OPEN_CLIP, TYPES, clip_config, library, read_config
from utils.runtime.errors import UserError
from utils.runtime.files import one_line
from utils.runtime.records import Digest
from utils.runtime.results import file_and_key, is_checkpoint_path, model_name

DEFAULT = asdict(PreprocessCfg())  # open_clip's
CHOICES = {
    "mode": ("RGB",),
    "interpolation": ("bicubic", "bilinear", "random"),  # random: bicubic, outside of training
    "resize_mode": ("shortest", "longest", "squash"),
}
PROCESSORS = ("CLIPImageProcessor", "SiglipImageProcessor", "ViTImageProcessor", "ChineseCLIPImageProcessor")
OF_TYPES = {"siglip": "SiglipImageProcessor", "chinese_clip": "ChineseCLIPImageProcessor"}  # others: CLIP's
DONE = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
NOT_DONE = ("crop_pct", "rescale_offset")  # and every other field do_...
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of Pillow's numbers


class Preprocessing(Compose):
    """A Preprocessing makes float32 pixels [3, height, width] from a PIL image, in steps.

    steps: the last has `mean` and `std`, for pixels in [0, 1].
    source: where the preprocessing is from, in words.
    note: a line for the user, "" for none.

    Attributes:
    earlier_record: the record of the preprocessing in versions without this module; None where they refused.
    """

    def __init__(self, steps, source, note=""):
        super().__init__(steps)
        self.source = source
        self.note = note
        self.earlier_record = None

    @property
    def record(self):
        """The record is `record_of` the steps."""
        return record_of(self.transforms)

    @property
    def digest(self):
        """The digest is sixteen hex digits of `record`, for records of results.

        Records of earlier versions have no digest; they agree with this one if the pixels were the same then.
        """
        content = json.dumps(self.record, sort_keys=True).encode()
        digest = hashlib.sha256(content).hexdigest()[:16]
        return Digest(digest, None) if self.record == self.earlier_record else digest


class OnWhite:
    """An OnWhite step makes a PIL image RGB, on white where it is transparent."""

    def __call__(self, image):
        return on_white(image).convert("RGB")


def on_white(image):
    """Return a PIL image without transparency: on white where it has some, else unchanged."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


class LowerCrop(CenterCrop):
    """A LowerCrop takes the middle of a PIL image, the upper or left one of two.

    fill: the value around a smaller image.
    """

    fill = 0

    def forward(self, image):
        height, width = self.size
        left = (image.width - width) // 2
        top = (image.height - height) // 2
        middle = Image.new(image.mode, (width, height), self.fill)
        middle.paste(image, (-left, -top))
        return middle


class ToPixels:
    """A ToPixels makes (values * factor - mean) / std of an RGB image, float32 [3, height, width].

    The values are 0 to 255.

    Attributes:
    mean, std: three numbers each, for pixels in [0, 1] without the factor.
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
    """Return what fixes the pixels, as plain values: equal for equal pixels, from any source."""
    record = {"transparent": "white" if any(isinstance(step, OnWhite) for step in steps) else "dropped"}
    for step in steps:
        if isinstance(step, Resize | ResizeKeepRatio):
            record |= {"resize": _edge(step), "interpolation": step.interpolation.value}
            record["size"] = [step.size] * 2 if isinstance(step.size, int) else list(step.size)
        elif type(step) in CROPS:
            record |= {"crop": list(step.size), "place": CROPS[type(step)]}
            if hasattr(step, "fill"):
                record["fill"] = step.fill
        elif hasattr(step, "mean"):
            record["mean"] = [float(value) for value in step.mean]
            record["std"] = [float(value) for value in step.std]
    return record


def _edge(step):
    """Return which edge a step brings to its size: shortest, longest or both."""
    if isinstance(step, ResizeKeepRatio):
        return "longest" if step.longest else "shortest"
    return "shortest" if isinstance(step.size, int) else "both"


def describe(transform):
    """Return the line that says what a `Preprocessing` does and where it is from; its note is below."""
    record = transform.record
    words = []
    if "resize" in record:
        edge = f"{record['resize']} edge"
        size = dict.fromkeys(record["size"])
        if record["resize"] == "both":
            edge = "resize"
            size = record["size"]
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
    """Return the `Preprocessing` of a model.

    model, pretrained: the values of the flags.
    visual: the image tower, as open_clip made it.
    folder: of a model of the transformers library; else None.

    Raises UserError, with the field, for a config that is damaged, that asks for something that cannot be
    done, or that does not bring every picture to the tower's size.
    """
    size = _pair(visual.image_size)
    shown = model.removeprefix("local-dir:").rstrip("/")
    beside = folder
    if folder is not None:
        chosen = _of_folder(folder, shown, size) or _without_config(folder, model, size)
    elif model.startswith(("hf-hub:", "local-dir:")):
        source = f"{shown}/{OPEN_CLIP}"
        chosen = _of_config(source, size) or _of_fields(visual.preprocess_cfg, size, source)
    elif is_checkpoint_path(pretrained):
        beside = Path(file_and_key(pretrained)[0]).parent
        chosen = _of_config(beside / OPEN_CLIP, size) or _of_folder(beside, beside, size)
        chosen = chosen or _of_model_config(model, size) or _published(model, size)
    elif pretrained == "random":
        chosen = _of_model_config(model, size) or _of_fields({}, size, "open_clip's default (random weights)")
    else:
        chosen = _of_fields(visual.preprocess_cfg, size, f"open_clip's tag {pretrained}")
    chosen.earlier_record = _earlier_record(visual.preprocess_cfg, beside)
    return chosen


def _pair(size):
    """Return (height, width) of a size in open_clip's configs."""
    sizes = tuple(size) if isinstance(size, list | tuple) else (size,)
    return sizes * 2 if len(sizes) == 1 else sizes


# open_clip


def _of_model_config(model, size):
    """Return the preprocessing of the config that is --model; None where it has none, and for a name."""
    return _of_config(model, size) if model.endswith(".json") else None


def _of_config(path, size):
    """Return the preprocessing under preprocess_cfg in a config; None where it has none, or is not there."""
    fields = (read_config(path) or {}).get("preprocess_cfg")
    return None if fields is None else _of_fields(fields, size, str(path))


def _of_fields(fields, size, source):
    """Return the preprocessing of open_clip's fields. Those that are not there, or null, have its default."""
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
    """Return three numbers, of a list of them or of one for all. Raises UserError for anything else."""
    values = value if isinstance(value, list | tuple) else [value] * 3
    numbers = all(type(each) in (int, float) and math.isfinite(each) for each in values)
    positive = "positive " if "std" in field else ""
    if len(values) != 3 or not numbers or (positive and min(values) <= 0):
        raise UserError(f"{source}: {field} is {value!r}; it has to be a {positive}number, or three of them")
    return tuple(map(float, values))


def _published(model, size):
    """Return the preprocessing of weights without a config: that on which the model's published tags agree.

    Where they differ, it is that of most tags, or open_clip's default where no preprocessing has most.
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
        fix = f"for another write {OPEN_CLIP} beside them: {' or '.join(others)}"
        chosen.note = f"note: {differ}; {which} is taken, {fix}"
    return chosen


def _tags_of_preprocessing(name):
    """Return a model's published tags by preprocessing: {fields, as in a config: list of tags}."""
    found = {}
    for tag in open_clip.list_pretrained_tags_by_model(name):
        fields = of_open_clip.merge_preprocess_dict(DEFAULT, open_clip.get_pretrained_cfg(name, tag))
        others = {field: value for field, value in fields.items() if value != DEFAULT[field]}
        found.setdefault(json.dumps({"preprocess_cfg": others}), []).append(tag)
    return found


# The transformers library


def _of_folder(folder, shown, size):
    """Return the preprocessing of a folder's image processor; None without its config."""
    file = "processor_config.json"
    fields = (read_config(folder / file) or {}).get("image_processor")
    if fields is None:
        file = "preprocessor_config.json"
        fields = read_config(folder / file)
    if fields is None:
        return None
    where = f"{shown}/{file}"
    if not isinstance(fields, dict):
        raise UserError(f"the config {where} is damaged (it holds no fields); correct or remove it")
    return Preprocessing(_processor_steps(fields, size, where, _default_of(folder)), where)


def _without_config(folder, model, size):
    """Return the default preprocessing of a folder's type of model, at the model's size."""
    default = _default_of(folder)
    square = {"height": size[0], "width": size[1]}
    fields = {"size": {"shortest_edge": min(size)}, "crop_size": square}
    if default == OF_TYPES["siglip"]:
        fields = {"size": square}
    what = f"{default.removesuffix('ImageProcessor')}'s default is taken, at the model's size"
    note = f"note: {model} has no preprocessor_config.json; {what}"
    return Preprocessing(_processor_steps(fields, size, model, default), f"{default}'s default", note)


def _default_of(folder):
    """Return the image processor of a config that names none: that of the folder's type of model."""
    kind = clip_config(folder, TYPES).get("model_type")
    return OF_TYPES.get(kind, PROCESSORS[0])


def _processor(fields, where, default):
    """Return the image processor of a config, which knows what the config leaves out.

    default: its class where the config names none.
    """
    kind = fields.get("image_processor_type") or fields.get("feature_extractor_type") or default
    name = str(kind).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in PROCESSORS:
        raise UserError(f"{where}: image_processor_type is {kind}; it has to be {' or '.join(PROCESSORS)}")
    for field, value in fields.items():
        if value and (field in NOT_DONE or (field.startswith("do_") and field not in DONE)):
            raise UserError(f"{where}: {field} is {value!r}, which cannot be done; correct it there")
    try:
        with_pillow = getattr(library(), f"{name}Pil", None)  # since transformers 5
        return (with_pillow or getattr(library(), name))(**fields)
    except UserError:
        raise
    except Exception as error:  # it has many
        why = f"no {name} can be made of it ({one_line(error)[:160]})"
        raise UserError(f"{where}: {why}; correct it there") from error


def _processor_steps(fields, size, where, default):
    """Return steps to the pixels of an image processor, of its variant for Pillow.

    fields: its config. default: its class where they name none.
    """
    processor = _processor(fields, where, default)
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
    """Return the steps by which an image processor brings pictures to the model's size."""
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
    """Return (height, width) of a processor's field, or (shortest edge,) of its `size`."""
    edges = dict(given or {})
    known = sorted(edges) == ["height", "width"] or (field == "size" and list(edges) == ["shortest_edge"])
    if not known or not all(type(edge) is int and edge > 0 for edge in edges.values()):
        what = f"{field} is {edges or given}, which cannot be done"
        raise UserError(f"{where}: {what}; use height and width, in pixels")
    return tuple(edges[name] for name in sorted(edges))


def _filter(resample, where):
    """Return a filter of Pillow, by its number or name."""
    if isinstance(resample, int) and 0 <= resample < len(FILTERS):
        return InterpolationMode(FILTERS[resample])
    if resample not in FILTERS:
        raise UserError(f"{where}: resample is {resample!r}; it has to be 0 to 5, or {', '.join(FILTERS)}")
    return InterpolationMode(resample)


# Earlier versions


def _earlier_record(own, beside):
    """Return the record of the preprocessing in versions before this module; None where they refused.

    own: the fields that open_clip set for the tower.
    beside: the folder of a model of the transformers library, or of weights given by path; else None.
    """
    read = {} if beside is None else _earlier_fields(beside)
    fields = {**own, **{field: value for field, value in read.items() if value is not None}}
    try:
        steps = of_open_clip.image_transform_v2(PreprocessCfg(**fields), is_train=False)
        return record_of(steps.transforms)
    except (AssertionError, TypeError, ValueError):
        return None


def _earlier_fields(folder):
    """Return the fields that earlier versions read from a folder, under open_clip's names."""
    if "vision_config" in clip_config(folder):
        fields = read_config(folder / "preprocessor_config.json") or {}
        filters = {2: "bilinear", 3: "bicubic"}
        read = {"mean": fields.get("image_mean"), "std": fields.get("image_std")}
        return read | {"interpolation": filters.get(fields.get("resample"))}
    config = read_config(folder / OPEN_CLIP) or {}
    fields = {}
    if "model_cfg" in config:  # else they refused
        fields = config.get("preprocess_cfg") or {}
    return {field: fields.get(field) for field in ("mean", "std", "interpolation", "resize_mode")}
