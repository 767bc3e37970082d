"""Write the files of the gallery: scripts of data, sheets of pictures, the page, and a parquet file.

FORMAT.md, which `write_page` lays beside them, describes the format. Data are scripts that call
gallery.receive(key, value), because a page that is opened from the file system may not read files in another
way.
"""

import base64
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from tqdm import tqdm

from applications.gallery.collect import AT_ONCE, Pairs
from utils import grading, omp
from utils.concepts import FORMS
from utils.evaluation import LayerResults
from utils.reports import columns_of, columns_of_deletion, everywhere, judged_by, table_of
from utils.runtime.errors import UserError
from utils.runtime.files import read_array, save_json, whole_folder
from utils.runtime.records import record_path, to_json
from utils.runtime.results import PAIRS, text_set
from utils.units import ACTS, kind_of, word_of

HERE = Path(__file__).parent
NEURONS_A_FILE = 64  # in one file of details
IMAGES_A_FILE = 256  # in one file of details
SHEET_COLUMNS, SHEET_ROWS = 8, 8  # of a sheet of pictures
SEARCHED = 16  # texts of each side, at most, that cards and the search know
HISTOGRAM_BINS = 40
NEAREST, CLASSES, HEADS, WITHOUT = 8, 8, 8, 4  # that a neuron's page shows
FIRING = 8  # neurons that the search knows of every text, besides those whose cards show it
OURS = (
    "index.html",
    "index.meta.json",
    "gallery.css",
    "gallery.js",
    "FORMAT.md",
    "neurons.parquet",
    "units.parquet",
    "data",
    "pictures",
)


# numbers and scripts


def short(values, digits=3):
    """Round numbers to few digits. Returns plain Python: nested lists of floats, None for NaN."""
    array = np.asarray(values, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 10.0 ** (digits - 1 - np.floor(np.log10(np.abs(array))))
        rounded = np.where(np.isfinite(scale), np.round(array * scale) / scale, array)
    return _plain(rounded.tolist())


def _plain(value):
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value != value:
        return None
    return int(value) if value == int(value) else float(f"{value:.6g}")


def with_values(ids, values):
    """Return [[id, short value], ...] of two arrays."""
    return [list(pair) for pair in zip(ids.tolist(), short(values), strict=True)]


def packed(array):
    """Return the bytes of an int8 or uint8 array, as base64."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def save_script(path, key, value):
    """Write a script that hands `value` to the page under `key`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("</", "<\\/")
    path.write_text(f"gallery.receive({json.dumps(key)},{text});\n")


# the page and its pictures


def write_page(folder, title, many="neurons"):
    """Write the page, its script and style, and FORMAT.md. many: the word for what it is a page of."""
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(loader=loader, autoescape=True, keep_trailing_newline=True)
    page = environment.get_template("gallery.html").render(title=title, many=many)
    (folder / "index.html").write_text(page)
    for name in ("gallery.css", "gallery.js", "FORMAT.md"):
        shutil.copyfile(HERE / name, folder / name)


def write_sheets(folder, split, thumbnails):
    """Write the pictures of a split in sheets, `SHEET_COLUMNS` times `SHEET_ROWS` in each.

    thumbnails: uint8 [images, size, size, 3].
    """
    folder.mkdir(exist_ok=True)
    per_sheet = SHEET_COLUMNS * SHEET_ROWS
    size = thumbnails.shape[1]
    for number, first in enumerate(range(0, len(thumbnails), per_sheet)):
        part = thumbnails[first : first + per_sheet]
        filled = np.zeros((per_sheet, size, size, 3), np.uint8)
        filled[: len(part)] = part
        sheet = filled.reshape(SHEET_ROWS, SHEET_COLUMNS, size, size, 3).transpose(0, 2, 1, 3, 4)
        picture = Image.fromarray(sheet.reshape(SHEET_ROWS * size, SHEET_COLUMNS * size, 3))
        picture.save(folder / f"{split}_{number}.jpg", quality=80)


# one layer


class Side:
    """A Side is the texts that the neurons of a layer write, or those that they fire on.

    descriptions: as `load_descriptions` returns them.
    kept: which neurons, or units, are graded, bool [N].
    compared: `Compared` of these, by which they are judged; None where they are not graded over noise.
    justified: the descriptions of the justified length; None where there is no such length.

    Attributes
    place: of the justified length; None without one.
    shown: the descriptions that the page shows: all where they are not graded; else the justified ones of
        the neurons for which they are better than noise.
    """

    def __init__(self, descriptions, kept, compared=None, justified=None):
        self.descriptions = descriptions
        self.kept = kept
        self.compared = compared
        self.place = compared.justified() if compared else None
        if compared is None:
            self.shown = descriptions
        elif self.place is None:
            self.shown = [[]] * len(descriptions)
        else:
            better = everywhere(compared.better()[:, self.place], kept)
            self.shown = [of if passes else [] for of, passes in zip(justified, better, strict=True)]

    def columns(self):
        """Return what the grid shows of all neurons: the first SEARCHED texts, grades and controls."""
        count = min(SEARCHED, max(map(len, self.shown)))
        filled = [(entries(of[:count]) + [[-1, 0]] * count)[:count] for of in self.shown]
        found = {
            "shown": count,
            "texts": [i for of in filled for i, _ in of],
            "coefficients": [c for of in filled for _, c in of],
        }
        if self.compared:
            found["judged"] = self.judged()
        if self.place is not None:
            found["grade"] = short(everywhere(self.compared.texts[:, self.place], self.kept))
            control = self.compared.controls[..., self.place].mean(axis=0)
            found["control"] = short(everywhere(control, self.kept))
            better = everywhere(self.compared.better()[:, self.place], self.kept)
            found["better"] = better.astype(int).tolist()
        return found

    def judged(self):
        """Return the numbers of texts that are graded, the justified one, and how many neurons pass by it.

        Without a justified one it is 0, and those are counted that pass by the length by which most do.
        """
        better = self.compared.better().sum(axis=0)
        chance = self.compared.by_chance() * self.kept.sum()
        best = better.argmax() if self.place is None else self.place
        return {
            "lengths": self.compared.lengths,
            "justified": 0 if self.place is None else self.compared.lengths[self.place],
            "better": int(better[best]),
            "chance": round(float(chance[best])),
            "controls": len(self.compared.controls),
        }


def entries(description):
    """Return [[text index, short coefficient], ...] of one neuron's description."""
    ids = [i for i, _, _ in description]
    return [list(pair) for pair in zip(ids, short([c for _, c, _ in description]), strict=True)]


def justified_texts(support, atoms, targets, texts):
    """Return the descriptions by the texts that were chosen first, fitted again, the strongest text first.

    support: of these texts, [N, m], in the order of choice, -1 for none.
    atoms: [T, D]. targets: [N, D].
    texts: the text set.

    Returns descriptions as `load_descriptions` does.
    """
    found = []
    for part, target in zip(support.split(omp.PURSUED), targets.split(omp.PURSUED), strict=True):
        [coefficients], _ = omp.nested_fits(part, atoms, target, [support.shape[1]])
        for ids, values in zip(part.tolist(), coefficients.tolist(), strict=True):
            there = [(i, c, texts[i]) for i, c in zip(ids, values, strict=True) if i >= 0]
            found.append(sorted(there, key=lambda entry: -abs(entry[1])))
    return found


class Predicted:
    """Predicted holds how well single texts predict the effects of neurons, for the search.

    These are correlations over the training images.

    judge: `grading.Judge` of the training images.
    effects: along the components, [images, N].
    """

    def __init__(self, judge, effects):
        self.atoms = judge.atoms
        self.targets = judge.targets(torch.from_numpy(effects))

    def index(self):
        """Return the neurons whose effects every text predicts best, and the correlations, scaled to 127."""
        count = min(FIRING, len(self.targets))
        parts = [
            (atoms @ self.targets.T).topk(count, dim=1) for atoms in self.atoms.split(grading.TEXTS_AT_ONCE)
        ]
        values, neurons = (torch.cat([part[i] for part in parts]).cpu().numpy() for i in range(2))
        correlations = packed(np.round(127 * values).astype(np.int8))
        numbers = neurons.astype("<u2" if len(self.targets) <= 2**16 else "<u4")
        return {"count": count, "neurons": packed(numbers), "correlations": correlations}


class LayerSplit(NamedTuple):
    """A LayerSplit is the effects and maps of one layer's neurons on the images of one split."""

    projections: np.ndarray  # effects along the components, [images, N]
    pairs: Pairs
    maps: np.ndarray  # of the pairs, [pairs, patches]

    def top(self):
        """Yield (name, sign, images [N, count]) of the most positive and the most negative effects."""
        positive, negative = self.pairs.top
        yield "positive", 1, positive
        yield "negative", -1, negative


@dataclass
class LayerFiles:
    """LayerFiles hold the data of one layer's neurons, and write them into files."""

    layer: int
    numbers: dict  # {name: numbers of all neurons}, as `numbers_of` returns them
    sides: dict  # {"writes", "fires_on": Side}
    predicted: Predicted
    found: LayerResults  # of the neurons, or units, that are graded
    kept: np.ndarray  # which these are, bool [N]
    acts: np.ndarray | None  # on how many training images each unit acts, [N]; None for neurons and pairs
    explained: np.ndarray  # share of the largest effects along the component, [N]
    norm: np.ndarray  # mean norm of the largest effects, [N]
    pcas: np.ndarray  # [N, D]
    classifier: np.ndarray | None  # [D, classes]
    heads: np.ndarray  # (layer, head), through which it acts, [heads, N, 2]
    shares: np.ndarray  # of the effects' variance, by head, [heads, N]
    nearest: list  # as `nearest_neurons` returns them
    splits: dict  # {split: LayerSplit}
    k: int  # number of a neuron's largest effects
    chance: float  # AUPRC of a random order
    deletions: np.ndarray  # what taking the neurons of found.deleted away costs the representation, [n, D]
    vectors: torch.Tensor  # of the texts, [T, D]

    @property
    def N(self):
        """N is the number of neurons."""
        return len(self.pcas)

    @cached_property
    def threshold(self):
        """Return the smallest of every neuron's k largest effects along its component, [N]."""
        found = []
        for n in range(0, self.N, AT_ONCE):
            size = np.abs(self.splits["train"].projections[:, n : n + AT_ONCE])
            found.append(np.partition(size, -self.k, axis=0)[-self.k])
        return np.concatenate(found)

    @cached_property
    def along_classes(self):
        """Return the components' class scores [N, classes]; None without a classifier."""
        return None if self.classifier is None else self.pcas @ self.classifier

    def write(self, folder):
        """Write all files of the layer into its folder."""
        save_script(folder / "layer.js", f"layer {self.layer}", self.grid())
        save_script(folder / "texts.js", f"texts {self.layer}", self.predicted.index())
        if self.along_classes is not None:
            scale = np.abs(self.along_classes).max(axis=0).clip(1e-30)
            values = np.round(127 * self.along_classes / scale).astype(np.int8).T
            content = {"scale": short(scale), "values": packed(values)}
            save_script(folder / "classes.js", f"classes {self.layer}", content)
        for number, first in enumerate(range(0, self.N, NEURONS_A_FILE)):
            details = [self.detail(n) for n in range(first, min(first + NEURONS_A_FILE, self.N))]
            content = {"first": first, "neurons": details}
            save_script(folder / f"neurons_{number}.js", f"neurons {self.layer} {number}", content)

    def grid(self):
        """Return the columns of all neurons that the grid shows."""
        train = self.splits["train"]
        rows = train.pairs.top[0][:, :4]
        shown = np.take_along_axis(train.projections.T, rows, 1) > 0
        top = np.full((self.N, 4), -1)
        top[:, : rows.shape[1]] = np.where(shown, rows, -1)
        return {
            "explained": short(self.explained),
            "norm": short(self.norm),
            **({} if self.acts is None else {"acts": self.acts.tolist()}),
            **{name: side.columns() for name, side in self.sides.items()},
            **self.rotated(),
            "pictures": {"split": "train", "rows": top.ravel().tolist()},
        }

    def rotated(self):
        """Return the means of rotated units, and the measures that do not tell neurons from them."""
        table = table_of(self.found)
        means = {}
        for row in (row for row in table if row.startswith("rotated_")):
            means[row] = {measure: short(numbers["mean"]) for measure, numbers in table[row].items()}
        by_length = {}
        for (side, measure), of in self.found.rotated_compared.items():
            if measure == grading.JUDGED_BY.get(side):
                by_length[side] = short(of.texts.mean(axis=0))
        return {"rotated": means, "rotated_by_length": by_length, "blind": grading.blind_measures(table)}

    def detail(self, n):
        """Return everything that a neuron's page shows."""
        found = {name: entries(side.descriptions[n]) for name, side in self.sides.items()}
        found["shown"] = {name: entries(side.shown[n]) for name, side in self.sides.items() if side.compared}
        found["by_length"] = {name: rows[n] for name, rows in self.by_length.items() if self.kept[n]}
        found["grades"] = {}
        graded = self.found.graded
        for row, values in zip(graded.rows, short(self.grades[n]), strict=True):
            if self.kept[n]:
                found["grades"][row] = dict(zip(graded.measures, values, strict=True))
        found["auprc_chance"] = self.chance
        found["top"] = {split: self.pictures(of, n) for split, of in self.splits.items()}
        found["threshold"] = short(self.threshold[n])
        found["histogram"] = self.histogram(n)
        order = np.argsort(-np.abs(self.shares[:, n]), kind="stable")[:HEADS]
        shares = short(self.shares[order, n])
        heads = self.heads[order, n].tolist()
        found["heads"] = [[*head, share] for head, share in zip(heads, shares, strict=True)]
        found["without"] = self.without(n)
        found["for"], found["against"] = self.classes(n)
        found["nearest"] = self.nearest[n]
        return found

    def without(self, n):
        """Return what the page says about the images without the neuron; None where it was not taken away.

        {"agreement", "null": correlation over texts with its component, and the mean of those with another
        neuron's; "texts": [number, grade, control] of the texts that it writes; "falls", "rises":
        [[text, how much], ...]}, the texts whose similarity with the images on which the neuron acts most
        falls and rises most.
        """
        deleted = self.found.deleted
        if deleted is None or n not in deleted.neurons:
            return None
        place = int(np.searchsorted(deleted.neurons, n))
        falls = self.falls[place]
        order = np.argsort(-falls, kind="stable")
        agreement = deleted.rows["component"][place]
        found = {"agreement": short(float(agreement)), "null": short(float(deleted.rows["null"].mean()))}
        if of := deleted.compared.get("second"):
            justified = self.sides["writes"].compared and self.sides["writes"].compared.justified()
            j = len(of.lengths) - 1 if justified is None else justified
            grades = of.texts[place, j], of.controls[:, place, j].mean()
            found["texts"] = [of.lengths[j], *short(np.array(grades))]
        found["falls"] = with_values(order[:WITHOUT], falls[order[:WITHOUT]])
        found["rises"] = with_values(order[::-1][:WITHOUT], -falls[order[::-1][:WITHOUT]])
        return found

    @cached_property
    def falls(self):
        """Return how far similarities with texts fall without each of the neurons taken away, [n, T]."""
        centred = self.vectors - self.vectors.mean(dim=0)
        return (torch.from_numpy(self.deletions) @ centred.T).numpy()

    @cached_property
    def grades(self):
        """Return the grades [N, rows, measures], NaN for units that are not graded."""
        return everywhere(self.found.graded.values, self.kept)

    @cached_property
    def by_length(self):
        """Return {side: [[[grade, control, better], ...] of every neuron]} by number of texts."""
        found = {side: of.compared for side, of in self.sides.items() if of.compared}
        if "fires_on" in found and ("wpmi", "pearson") in self.found.compared:
            found["wpmi"] = self.found.compared["wpmi", "pearson"]
        for side, of in found.items():
            columns = (of.texts, of.controls.mean(axis=0), of.better())
            found[side] = short(everywhere(np.stack(columns, axis=-1), self.kept))
        return found

    def pictures(self, of, n):
        """Return the top pictures of a neuron with their maps: {sign: [[image, effect, map], ...]}.

        An image whose effect has the other sign is left out. of: the `LayerSplit`.
        """
        places = of.pairs.place[:, n]  # [2, count]
        maps = np.maximum(of.maps[places.ravel()].astype(np.float32), 0).reshape(*places.shape, -1)
        levels = np.round(255 * maps / max(float(maps.max()), 1e-30)).astype(np.uint8)
        found = {}
        for (name, sign, images), maps_of_sign in zip(of.top(), levels, strict=True):
            rows = images[n]
            entries = zip(rows.tolist(), short(of.projections[rows, n]), maps_of_sign, strict=True)
            found[name] = [[row, value, packed(level)] for row, value, level in entries if sign * value > 0]
        return found

    def histogram(self, n):
        """Return counts of the neuron's effects along its component in equal bins."""
        columns = {split: of.projections[:, n] for split, of in self.splits.items()}
        low = float(min(column.min() for column in columns.values()))
        high = float(max(column.max() for column in columns.values()))
        edges = [low, max(high, low + 1e-6)]
        found = {"edges": short(edges)}
        for split, column in columns.items():
            counts, _ = np.histogram(column, HISTOGRAM_BINS, range=edges)
            found[split] = counts.tolist()
        return found

    def classes(self, n):
        """Return the classes that the neuron's component speaks for most, and against.

        Two lists of [class, <r_n, classifier>].
        """
        if self.along_classes is None:
            return [], []
        values = self.along_classes[n]
        order = np.argsort(-values, kind="stable")
        favoured = order[values[order] > 0][:CLASSES]
        opposed = order[values[order] < 0][::-1][:CLASSES]
        return with_values(favoured, values[favoured]), with_values(opposed, values[opposed])


def nearest_neurons(pcas, layer):
    """Find, for every neuron of a layer, the ones of all layers whose components are nearest, of either sign.

    pcas: {layer: unit components [N, D]}.

    Returns a list over neurons of [[layer, neuron, cosine], ...].
    """
    every = np.concatenate(list(pcas.values()))
    names = [(of, n) for of, some in pcas.items() for n in range(len(some))]
    N = len(pcas[layer])
    own = names.index((layer, 0))
    found = []
    for first in range(0, N, 512):
        rows = np.arange(first, min(first + 512, N))
        cosines = pcas[layer][rows] @ every.T
        size = np.abs(cosines)
        size[np.arange(len(rows)), own + rows] = -1  # the neuron itself
        for row, places in zip(cosines, _largest(size), strict=True):
            values = zip(places.tolist(), short(row[places]), strict=True)
            found.append([[*names[place], value] for place, value in values])
    return found


def _largest(size):
    """Return the columns of the NEAREST largest entries of every row, largest first."""
    if size.shape[1] < 4096:
        return np.argsort(-size, axis=1, kind="stable")[:, :NEAREST]
    chosen = np.sort(np.argpartition(-size, NEAREST, axis=1)[:, :NEAREST], axis=1)
    order = np.argsort(-np.take_along_axis(size, chosen, 1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, 1)


def write_images(folder, layer, split, found):
    """Write the active neurons of a split's images, and their concepts in all forms.

    found: {name: array} of all images, as `Collector.concepts` returns them.
    """
    lists = {"neurons": (found["neurons"], found["norms"])}
    for f, form in enumerate(FORMS):
        lists[form] = (found["words"][:, f], found["scores"][:, f])
    count = len(found["neurons"])
    for number, first in enumerate(range(0, count, IMAGES_A_FILE)):
        images = []
        for i in range(first, min(first + IMAGES_A_FILE, count)):
            image = {}
            for name, (ids, values) in lists.items():
                there = ids[i] >= 0
                image[name] = with_values(ids[i][there], values[i][there])
            images.append(image)
        content = {"first": first, "images": images}
        save_script(folder / f"images_{split}_{number}.js", f"images {layer} {split} {number}", content)


# all layers


def write_parquet(path, files):
    """Write a row for every neuron: numbers, grades, texts with coefficients, and top images.

    files: list of `LayerFiles`.
    """
    tables = [pyarrow.table(parquet_columns(of)) for of in files]
    table = pyarrow.concat_tables(tables, promote_options="default")  # layers without controls have nulls
    pyarrow.parquet.write_table(table, path, compression="zstd")


def parquet_columns(of):
    """Return the columns of a layer's neurons, {name: array}. of: its `LayerFiles`."""
    int32 = pyarrow.int32()
    columns = {name: pyarrow.array(values, int32) for name, values in of.numbers.items()}
    numbers = {"explained": of.explained, "norm": of.norm, "threshold": of.threshold}
    graded = of.found.graded
    for row in graded.rows:
        for measure in graded.measures:
            numbers[f"{row}_{measure}"] = everywhere(graded.of(row, measure), of.kept)
    numbers |= columns_of(of.found.compared, of.kept)
    if of.found.deleted is not None:
        numbers |= columns_of_deletion(of.found.deleted, of.N)
    for name, values in numbers.items():
        kept = values.dtype if values.dtype == bool else np.float32
        columns[name] = pyarrow.array(values.astype(kept))
    pairs = pyarrow.list_(pyarrow.struct([("text", pyarrow.string()), ("coefficient", pyarrow.float32())]))
    for name, side in of.sides.items():
        listed = [[{"text": text, "coefficient": c} for _, c, text in texts] for texts in side.descriptions]
        columns[name] = pyarrow.array(listed, pairs)
    for split, of_split in of.splits.items():
        for name, sign, images in of_split.top():
            kept = []
            for n, rows in enumerate(images):
                kept.append(rows[sign * of_split.projections[rows, n] > 0].tolist())
            columns[f"{split}_{name}"] = pyarrow.array(kept, pyarrow.list_(int32))
    return columns


def about(sources):
    """Return the facts that all pages need."""
    args = sources.args
    sheet = {"columns": SHEET_COLUMNS, "rows": SHEET_ROWS, "size": sources.size}
    counts = [sources.neurons(layer).count for layer in sources.layers]
    rows = {row: name.replace("neuron", word_of(sources.clip)) for row, name in grading.ROWS.items()}
    return {
        "model": sources.clip.record["model"],
        "pretrained": sources.clip.record["pretrained"],
        "dataset": args.dataset,
        "layers": sources.layers,
        "neurons": max(counts),
        "units": about_units(sources),
        "neuron_chunk": NEURONS_A_FILE,
        "image_chunk": IMAGES_A_FILE,
        "grid": list(sources.clip.vit.grid),
        "sheet": sheet if sources.size else None,
        "splits": {split: about_images(sources, split) for split in sources.splits},
        "class_names": list(sources.classes.names),
        "classifier": sources.classes.classifier is not None,
        "texts": sources.texts,
        "text_set": text_set(args.text_descriptions),
        "components": args.components,
        "k": args.top_k_pca,
        "graded_on": args.split,
        "graded_images": len(sources.held_out),
        "sides": grading.SIDES,
        "rows": rows,
    }


def about_units(sources):
    """Return the facts about other units than neurons that all pages need; None for neurons."""
    units = sources.clip.units
    if units is None:
        return None
    found = {"kind": kind_of(sources.clip), "least": ACTS, "site": {}, "heads": {}}
    for layer in sources.layers:
        found["site"][layer] = units.site(layer)
        if units.name == PAIRS:
            found["heads"][layer] = heads_after(sources.clip.vit, layer)
    return {**found, "paired": sources.clip.vit.N}


def about_images(sources, split):
    """Return the facts about the images of a split that all pages need."""
    images = sources.splits[split].images
    found = {"count": len(images), "dataset": images.dataset, "labels": sources.classes.labels[split]}
    found["files"] = None
    if sources.size:
        found["files"] = [name_of(image, i) for i, (image, _) in enumerate(images.samples)]
    return found


def name_of(image, number):
    """Return the name of an image on the page: its folder and file, or its number."""
    return "/".join(Path(image).parts[-2:]) if isinstance(image, str) else f"image {number}"


# the folder


def check_folder(gallery):
    """Return the folder beside a gallery where the arrays of its passes lie meanwhile.

    Raises UserError when one of them is there and is something else.
    """
    fix = "choose another --gallery, or remove it"
    if not gallery.name:
        raise UserError(f"--gallery {gallery} is the root of all folders; give a folder in it")
    if gallery.exists() and not gallery.is_dir():
        raise UserError(f"--gallery {gallery} is a file; {fix}")
    page = (gallery / "index.html").is_file() and (gallery / "FORMAT.md").is_file()
    if gallery.is_dir() and any(gallery.iterdir()) and not page:
        raise UserError(f"{gallery} is there and is no gallery; {fix}")
    parts = gallery.with_name(f"{gallery.name}.parts")
    ours = (".npy" in path.name or path.name.endswith(".meta.json") for path in parts.rglob("*"))
    if parts.exists() and not all(ours):
        raise UserError(f"{parts} is there, and the parts of the gallery are to go there; {fix}")
    return parts


def write_gallery(gallery, sources):
    """Write the folder of the gallery, whole or not at all, once the passes have made the arrays.

    Files that others have put into an earlier gallery there (.git, CNAME) are kept.

    sources: `Sources`.
    """
    with whole_folder(gallery) as folder:
        if gallery.is_dir():
            copy_others(gallery, folder)
        data = folder / "data"
        save_script(data / "about.js", "about", about(sources))
        many = f"{word_of(sources.clip)}s"
        model = sources.clip.record["model"]
        kind = kind_of(sources.clip)
        title = f"{kind[0].upper()}{kind[1:]} {'of' if kind == many else 'in'} {model}"
        write_page(folder, title, many)
        if sources.size:
            for split in sources.splits:
                pictures = read_array(sources.part(split, "pictures"), mmap=True)
                write_sheets(folder / "pictures", split, pictures)
        judge = grading.Judge(sources.representations(), sources.vectors)
        pcas = {layer: of.pcas.cpu().numpy() for layer, of in sources.statistics.items()}
        files = []
        for layer in tqdm(sources.layers, desc="pages", unit="layer"):
            for split in sources.splits:
                write_images(data / str(layer), layer, split, sources.concepts(layer, split))
            of = layer_files(sources, layer, judge, pcas)
            of.write(data / str(layer))
            files.append(of)
        table = "neurons" if sources.clip.units is None else "units"
        write_parquet(folder / f"{table}.parquet", files)
        save_json(record_path(folder / "index.html"), to_json(sources.record))


def copy_others(gallery, folder):
    """Copy files of others from an earlier gallery into the new folder."""
    for path in gallery.iterdir():
        if path.name not in OURS:
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, folder / path.name)


def layer_files(sources, layer, judge, pcas):
    """Read the `LayerFiles` of a layer.

    judge: `grading.Judge` of the training images.
    pcas: {layer: [N, D]} of all layers.
    """
    splits = {}
    for split in sources.splits:
        maps = read_array(sources.part(split, layer, "maps"), mmap=True)
        splits[split] = LayerSplit(sources.projections(layer, split), sources.pairs[layer, split], maps)
    effects = splits["train"].projections
    held_out = len(sources.held_out)
    predicted = Predicted(judge, effects)
    units = sources.neurons(layer)
    kept = sources.graded(units)
    return LayerFiles(
        layer=layer,
        numbers=numbers_of(sources, layer),
        sides=sides_of(sources, layer, predicted),
        predicted=predicted,
        found=sources.found[layer].only(kept),
        kept=kept,
        acts=sources.acts(units),
        explained=sources.explained(layer),
        norm=sources.norms(layer),
        pcas=pcas[layer],
        classifier=sources.classes.classifier,
        heads=heads_of(sources, layer),
        shares=shares_of_heads(np.load(sources.part("train", layer, "heads")), effects),
        nearest=nearest_neurons(pcas, layer),
        splits=splits,
        k=min(sources.args.top_k_pca, len(sources.train)),
        chance=round(grading.positives(held_out, sources.share) / held_out, 4),
        deletions=sources.deletions(layer),
        vectors=sources.vectors,
    )


def sides_of(sources, layer, predicted):
    """Return {side: `Side`} of a layer, with the descriptions that are justified.

    predicted: `Predicted`, whose atoms and targets the texts that neurons fire on are fitted with.
    """
    found = {}
    units = sources.neurons(layer)
    kept = sources.graded(units)
    graded = sources.found[layer].only(kept).compared
    for side, descriptions in sources.sides(units, sources.inputs).items():
        compared = judged_by(side, graded)
        place = compared.justified() if compared else None
        justified = None
        if place is not None:
            support = torch.from_numpy(sources.support(side, layer, descriptions))
            support = support[:, : compared.lengths[place]]
            atoms, targets = predicted.atoms, predicted.targets
            if side == "writes":
                atoms = omp.make_atoms(100 * sources.vectors, sources.args.normalise)
                targets = sources.statistics[layer].pcas.cpu()
            justified = justified_texts(support, atoms, targets, sources.texts)
        found[side] = Side(descriptions, kept, compared, justified)
    return found


def heads_after(vit, layer):
    """List the heads through which a layer's neurons act, (layer, head); a pooling attention is layer -1."""
    later = vit.later(layer)
    heads = range(vit.K(layer) // len(later))
    return [(l if l < vit.L else -1, h) for l in later for h in heads]


def heads_of(sources, layer):
    """Return the heads through which every neuron of a layer acts, [heads, N, 2]; of a pair its own one."""
    heads = np.array(heads_after(sources.clip.vit, layer))
    count = sources.neurons(layer).count
    if sources.clip.units is not None and sources.clip.units.name == PAIRS:
        return heads[np.arange(count) // sources.clip.vit.N][None]
    return np.broadcast_to(heads[:, None], (len(heads), count, 2))


def numbers_of(sources, layer):
    """Return the columns of the .parquet that say what its rows are of, {name: [N]}."""
    count = sources.neurons(layer).count
    rows = np.arange(count)
    found = {"layer": np.full(count, layer)}
    if sources.clip.units is None:
        return {**found, "neuron": rows}
    found["unit"] = rows
    acts = sources.acts(sources.neurons(layer))
    if acts is not None:
        found["images"] = acts
    if sources.clip.units.name == PAIRS:
        [heads] = heads_of(sources, layer)
        found |= {"neuron": rows % sources.clip.vit.N, "head_layer": heads[:, 0], "head": heads[:, 1]}
    return found


def shares_of_heads(sums, effects):
    """Return the shares of the effects' variance that go through each head, [K, N].

    sums: of `Collector.through_heads` over the training images, [K, N].
    effects: along the components, [images, N].
    """
    centred = effects - effects.mean(axis=0)
    return sums / np.square(centred, dtype=np.float64).sum(axis=0).clip(1e-30)
