"""The files of the gallery: scripts of data, sheets of pictures, the page, and a parquet file of all neurons.

FORMAT.md, which `write_page` lays beside them, writes the format down. Data are scripts that call
gallery.receive(key, value), because a page that is opened from the file system may not read files in another
way.
"""

import base64
import json
import shutil
from pathlib import Path

import jinja2
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from tqdm import tqdm

from utils import grading
from utils.data.text_sets import text_set
from utils.runtime.errors import UserError
from utils.runtime.files import read_array, save_json
from utils.runtime.records import record_path, to_json

HERE = Path(__file__).parent
NEURONS, IMAGES = 64, 256  # whose details are in one file
COLUMNS, ROWS = 8, 8  # of a sheet of pictures
SHOWN = 16  # texts of each side that the search looks at
BINS = 40
NEAREST, CLASSES, HEADS = 8, 8, 8
FIRING = 8  # neurons that the search knows of every text, besides those whose cards show it


def short(values, digits=3):
    """Numbers with few digits, as plain Python: nested lists of floats, null for none."""
    array = np.asarray(values, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 10.0 ** (digits - 1 - np.floor(np.log10(np.abs(array))))
        rounded = np.where(np.isfinite(scale), np.round(array * scale) / scale, array)
    return _plain(rounded.tolist())


def _plain(value):
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if value != value else int(value) if value == int(value) else float(f"{value:.6g}")


def packed(array):
    """The bytes of an int8 or uint8 array, as base64."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def save_script(path, key, value):
    """Write a script that hands `value` to the page under `key`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("</", "<\\/")
    path.write_text(f"gallery.receive({json.dumps(key)},{text});\n")


def write_page(folder, title):
    """Write the page, its script and style, and FORMAT.md."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, keep_trailing_newline=True
    )
    (folder / "index.html").write_text(environment.get_template("gallery.html").render(title=title))
    for name in ("gallery.css", "gallery.js", "FORMAT.md"):
        shutil.copyfile(HERE / name, folder / name)


def write_sheets(folder, split, thumbnails):
    """Write the pictures of a split in sheets, `COLUMNS` times `ROWS` in each. thumbnails: uint8 [images,
    size, size, 3].
    """
    folder.mkdir(exist_ok=True)
    per_sheet, size = COLUMNS * ROWS, thumbnails.shape[1]
    for number, first in enumerate(range(0, len(thumbnails), per_sheet)):
        some = np.zeros((per_sheet, size, size, 3), np.uint8)
        part = thumbnails[first : first + per_sheet]
        some[: len(part)] = part
        sheet = (
            some.reshape(ROWS, COLUMNS, size, size, 3)
            .transpose(0, 2, 1, 3, 4)
            .reshape(ROWS * size, COLUMNS * size, 3)
        )
        Image.fromarray(sheet).save(folder / f"{split}_{number}.jpg", quality=80)


class Side:
    """One side of the descriptions of a layer, writes or fires on. descriptions: as `load_descriptions` gives
    them.
    """

    def __init__(self, descriptions):
        self.descriptions = descriptions
        self.entries = []
        for of in descriptions:
            coefficients = short([c for _, c, _ in of])
            self.entries.append([[i, c] for (i, _, _), c in zip(of, coefficients, strict=True)])

    def strongest(self):
        """The first SHOWN texts of every neuron, in columns for the grid."""
        filled = [(of + [[-1, 0]] * SHOWN)[:SHOWN] for of in self.entries]
        return {
            "texts": [i for of in filled for i, _ in of],
            "coefficients": [c for of in filled for _, c in of],
        }


class Predicted:
    """How well single texts predict the effects of neurons: correlations over the training images, for the
    search.

    judge: `grading.Judge` of the training images. effects: [images, N], along the components.
    """

    def __init__(self, judge, effects):
        self.atoms, self.targets = judge.atoms, judge.targets(torch.from_numpy(effects))

    def index(self):
        """The neurons whose effects every text predicts best, and the correlations, scaled to 127."""
        count = min(FIRING, len(self.targets))
        parts = [(atoms @ self.targets.T).topk(count, dim=1) for atoms in self.atoms.split(grading.TEXTS)]
        values, neurons = (torch.cat([part[i] for part in parts]).cpu().numpy() for i in range(2))
        packed_values = packed(np.round(127 * values).astype(np.int8))
        return {"count": count, "neurons": packed(neurons.astype("<u2")), "correlations": packed_values}

    def of(self, texts):
        """Correlations of each neuron's effects with some texts, [N, m] of their ids; 0 for an id of -1."""
        chosen = torch.as_tensor(texts)
        found = [
            (self.atoms[ids.clamp_min(0)] @ target) * (ids >= 0)
            for ids, target in zip(chosen, self.targets, strict=True)
        ]
        return torch.stack(found).numpy()


class LayerFiles:
    """The data of one layer's neurons, as files.

    Made from: layer, sides {writes, fires_on: Side}, predicted (`Predicted`), graded (`Graded`), pcas [N, D],
    explained [N], norm [N], k (images of a neuron's largest effects), chance (AUPRC of a random order),
    classifier [D, classes] or None, heads [(layer, head), ...] and shares [heads, N], nearest as
    `nearest_neurons` gives them, and splits {split: {"projections" [images, N], "top" (positive, negative),
    "maps" [pairs, patches], "pairs"}}.
    """

    def __init__(self, **parts):
        self.__dict__.update(parts)
        self.N = len(self.pcas)
        size = np.abs(self.splits["train"]["projections"])
        self.threshold = np.partition(size, -self.k, axis=0)[
            -self.k
        ]  # [N], the smallest of the k largest effects along r_n
        self.along_classes = None if self.classifier is None else self.pcas @ self.classifier  # [N, classes]

    def write(self, folder):
        """Write all files of the layer into its folder."""
        save_script(folder / "layer.js", f"layer {self.layer}", self.grid())
        save_script(folder / "texts.js", f"texts {self.layer}", self.predicted.index())
        if self.along_classes is not None:
            scale = np.abs(self.along_classes).max(axis=0).clip(1e-30)
            values = np.round(127 * self.along_classes / scale).astype(np.int8).T
            save_script(
                folder / "classes.js",
                f"classes {self.layer}",
                {"scale": short(scale), "values": packed(values)},
            )
        for number, first in enumerate(range(0, self.N, NEURONS)):
            details = [self.detail(n) for n in range(first, min(first + NEURONS, self.N))]
            save_script(
                folder / f"neurons_{number}.js",
                f"neurons {self.layer} {number}",
                {"first": first, "neurons": details},
            )

    def grid(self):
        """What the grid shows of all neurons, in columns."""
        sides, train = {name: side.strongest() for name, side in self.sides.items()}, self.splits["train"]
        top = np.full((self.N, 4), -1)
        rows = train["top"][0][:, :4]
        top[:, : rows.shape[1]] = np.where(np.take_along_axis(train["projections"].T, rows, 1) > 0, rows, -1)
        texts = np.reshape(sides["fires_on"]["texts"], (self.N, SHOWN))
        sides["fires_on"]["correlations"] = short(self.predicted.of(texts).ravel(), digits=2)
        return {
            "explained": short(self.explained),
            "norm": short(self.norm),
            "grades": {row: short(self.graded.of(row, "pearson_without")) for row in self.sides},
            "shown": SHOWN,
            **sides,
            "pictures": {"split": "train", "rows": top.ravel().tolist()},
        }

    def detail(self, n):
        """Everything that a neuron's page shows."""
        found = {name: side.entries[n] for name, side in self.sides.items()}
        rows = zip(self.graded.rows, short(self.graded.values[n]), strict=True)
        found["grades"] = {
            row: dict(zip(self.graded.measures, numbers, strict=True)) for row, numbers in rows
        }
        found["auprc_chance"] = self.chance
        found["top"] = {split: self.pictures(of, n) for split, of in self.splits.items()}
        found["threshold"] = short(self.threshold[n])
        found["histogram"] = self.histogram(n)
        order = np.argsort(-np.abs(self.shares[:, n]), kind="stable")[:HEADS]
        found["heads"] = [
            [*self.heads[k], share] for k, share in zip(order, short(self.shares[order, n]), strict=True)
        ]
        found["for"], found["against"] = self.classes(n)
        found["nearest"] = self.nearest[n]
        return found

    def pictures(self, of, n):
        """The top pictures of a neuron in one split, with where it fires. Only those of the right sign."""
        places = of["pairs"].place[:, n]  # [2, count]
        maps = np.maximum(of["maps"][places.ravel()].astype(np.float32), 0).reshape(*places.shape, -1)
        levels = np.round(255 * maps / max(float(maps.max()), 1e-30)).astype(np.uint8)
        found = {}
        for sign, (name, rows, of_sign) in zip(
            (1, -1), zip(("positive", "negative"), of["top"], levels, strict=True), strict=True
        ):
            values = short(of["projections"][rows[n], n])
            entries = zip(rows[n].tolist(), values, of_sign, strict=True)
            found[name] = [[row, value, packed(level)] for row, value, level in entries if sign * value > 0]
        return found

    def histogram(self, n):
        """Counts of the neuron's effects along its component in equal bins."""
        columns = {split: of["projections"][:, n] for split, of in self.splits.items()}
        edges = [
            min(column.min() for column in columns.values()),
            max(column.max() for column in columns.values()),
        ]
        edges = [float(edges[0]), max(float(edges[1]), float(edges[0]) + 1e-6)]
        counts = {
            split: np.histogram(column, BINS, range=edges)[0].tolist() for split, column in columns.items()
        }
        return {"edges": short(edges), **counts}

    def classes(self, n):
        """The classes that the neuron's component speaks for most, and against: two lists of (class, <r_n,
        classifier>).
        """
        if self.along_classes is None:
            return [], []
        values = self.along_classes[n]
        order = np.argsort(-values, kind="stable")
        parts = (order[values[order] > 0][:CLASSES], order[values[order] < 0][::-1][:CLASSES])
        return (
            [list(pair) for pair in zip(part.tolist(), short(values[part]), strict=True)] for part in parts
        )


def nearest_neurons(pcas, layer):
    """For every neuron of a layer the ones of all layers whose components are nearest, either sign: (layer,
    neuron, cosine).

    pcas: {layer: unit components [N, D]}.
    """
    layers, every = list(pcas), np.concatenate(list(pcas.values()))
    N, found = len(pcas[layer]), []
    for first in range(0, N, 512):
        some = np.arange(first, min(first + 512, N))
        cosines = pcas[layer][some] @ every.T
        own = layers.index(layer) * N + some
        size = np.abs(cosines)
        size[np.arange(len(some)), own] = -1
        order = (
            np.argsort(-size, axis=1, kind="stable")[:, :NEAREST] if size.shape[1] < 4096 else _largest(size)
        )
        for row, places in zip(cosines, order, strict=True):
            values = zip(places.tolist(), short(row[places]), strict=True)
            found.append([[layers[place // N], place % N, value] for place, value in values])
    return found


def _largest(size):
    """Columns of the NEAREST largest entries of every row, largest first."""
    some = np.sort(np.argpartition(-size, NEAREST, axis=1)[:, :NEAREST], axis=1)
    return np.take_along_axis(some, np.argsort(-np.take_along_axis(size, some, 1), axis=1, kind="stable"), 1)


def write_images(folder, key, neurons, norms, words, scores):
    """Write the active neurons and the words of a split's images. Arrays as `Collector.concepts` gives them,
    of all images.
    """
    for number, first in enumerate(range(0, len(neurons), IMAGES)):
        images = []
        for i in range(first, min(first + IMAGES, len(neurons))):
            pairs = (zip(ids[ids >= 0].tolist(), short(values[ids >= 0]), strict=True)
                     for ids, values in ((neurons[i], norms[i]), (words[i], scores[i])))  # fmt: skip
            of_neurons, of_words = ([list(pair) for pair in part] for part in pairs)
            images.append({"neurons": of_neurons, "words": of_words})
        layer, split = key
        value = {"first": first, "images": images}
        save_script(folder / f"images_{split}_{number}.js", f"images {layer} {split} {number}", value)


def write_parquet(path, files):
    """Write a row for every neuron of some layers (`LayerFiles`): numbers, grades, and texts with
    coefficients of both sides.
    """
    pairs = pyarrow.list_(pyarrow.struct([("text", pyarrow.string()), ("coefficient", pyarrow.float32())]))
    tables = []
    for of in files:
        columns = {
            "layer": pyarrow.array([of.layer] * of.N, pyarrow.int32()),
            "neuron": pyarrow.array(range(of.N), pyarrow.int32()),
            "explained": pyarrow.array(np.asarray(of.explained, np.float32)),
            "norm": pyarrow.array(np.asarray(of.norm, np.float32)),
            "threshold": pyarrow.array(np.asarray(of.threshold, np.float32)),
        }
        for row in of.graded.rows:
            for measure in of.graded.measures:
                columns[f"{row}_{measure}"] = pyarrow.array(
                    np.asarray(of.graded.of(row, measure), np.float32)
                )
        for name, side in of.sides.items():
            entries = [
                [{"text": text, "coefficient": c} for _, c, text in texts] for texts in side.descriptions
            ]
            columns[name] = pyarrow.array(entries, pairs)
        for split, parts in of.splits.items():
            for sign, name, rows in zip((1, -1), ("positive", "negative"), parts["top"], strict=True):
                kept = [
                    some[sign * parts["projections"][some, n] > 0].tolist() for n, some in enumerate(rows)
                ]
                columns[f"{split}_{name}"] = pyarrow.array(kept, pyarrow.list_(pyarrow.int32()))
        tables.append(pyarrow.table(columns))
    pyarrow.parquet.write_table(pyarrow.concat_tables(tables), path, compression="zstd")


OURS = (
    "index.html",
    "index.meta.json",
    "gallery.css",
    "gallery.js",
    "FORMAT.md",
    "neurons.parquet",
    "data",
    "pictures",
)


def check_folder(gallery):
    """Raise UserError when a folder can be no gallery; returns the folder beside it where the parts of one
    lie meanwhile.
    """
    fix = "choose another --gallery, or remove it"
    if not gallery.name:
        raise UserError(f"--gallery {gallery} is the root of all folders; give a folder in it")
    parts = gallery.with_name(f"{gallery.name}.parts")
    if gallery.exists() and not gallery.is_dir():
        raise UserError(f"--gallery {gallery} is a file; {fix}")
    page = (gallery / "index.html").is_file() and (gallery / "FORMAT.md").is_file()
    if gallery.is_dir() and any(gallery.iterdir()) and not page:
        raise UserError(f"{gallery} is there and is no gallery; {fix}")
    if parts.exists() and not all(
        ".npy" in path.name or path.name.endswith(".meta.json") for path in parts.rglob("*")
    ):
        raise UserError(f"{parts} is there, and the parts of the gallery are to go there; {fix}")
    return parts


def write_gallery(folder, sources, parts, earlier):
    """Write everything. folder: an empty one. sources: `Sources`. parts: the folder with the arrays of the
    passes. earlier: the folder of an earlier gallery, if there is one: what others have put there (.git,
    CNAME) is kept."""
    for path in earlier.iterdir() if earlier.is_dir() else ():
        if path.name not in OURS:
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, folder / path.name)
    data, splits, vit = folder / "data", sources.splits, sources.clip.vit
    save_script(data / "about.js", "about", about(sources))
    write_page(folder, f"Neurons of {sources.clip.record['model']}")
    for split in splits if sources.size else ():
        write_sheets(folder / "pictures", split, read_array(parts / f"{split}_pictures.npy", mmap=True))
    judge = grading.Judge(sources.representations, sources.vectors)
    held_out = len(sources.held_out)
    chance = round(grading.positives(held_out, sources.share) / held_out, 4)
    pcas, files = {layer: of.pcas.cpu().numpy() for layer, of in sources.statistics.items()}, []
    for layer in tqdm(sources.layers, desc="pages", unit="layer"):
        of_splits = {}
        for split in splits:
            maps = read_array(parts / f"{split}_{layer}_maps.npy", mmap=True)
            pairs, projections = sources.pairs[layer, split], sources.projections(layer, split)
            of_splits[split] = {"projections": projections, "top": pairs.top, "maps": maps, "pairs": pairs}
            found = (
                np.load(parts / f"{split}_{layer}_{name}.npy")
                for name in ("neurons", "norms", "words", "scores")
            )
            write_images(data / str(layer), (layer, split), *found)
        projections = of_splits["train"]["projections"]
        centred = projections - projections.mean(axis=0)
        heads = np.load(parts / f"train_{layer}_heads.npy") / np.square(centred, dtype=np.float64).sum(
            axis=0
        ).clip(1e-30)
        of = LayerFiles(
            layer=layer,
            sides={side: Side(texts) for side, texts in sources.sides(layer, sources.inputs).items()},
            predicted=Predicted(judge, projections),
            graded=sources.graded[layer],
            pcas=pcas[layer],
            classifier=sources.classifier,
            heads=[
                (l if l < vit.L else -1, h)
                for l in vit.later(layer)
                for h in range(vit.K(layer) // len(vit.later(layer)))
            ],
            shares=heads,
            nearest=nearest_neurons(pcas, layer),
            splits=of_splits,
            k=min(sources.args.top_k_pca, len(sources.images)),
            chance=chance,
            **sources.numbers(layer),
        )
        of.write(data / str(layer))
        files.append(of)
    write_parquet(folder / "neurons.parquet", files)
    save_json(record_path(folder / "index.html"), to_json(sources.record))


def about(sources):
    """What all pages need to know."""
    args, vit = sources.args, sources.clip.vit
    splits = {}
    for split, of in sources.splits.items():
        files = [name_of(image, i) for i, (image, _) in enumerate(of.samples)]
        splits[split] = {"count": len(of), "dataset": of.dataset, "labels": sources.labels[split]}
        splits[split]["files"] = files if sources.size else None
    return {
        "model": sources.clip.record["model"],
        "pretrained": sources.clip.record["pretrained"],
        "dataset": args.dataset,
        "layers": sources.layers,
        "neurons": vit.N,
        "neuron_chunk": NEURONS,
        "image_chunk": IMAGES,
        "grid": list(vit.grid),
        "sheet": {"columns": COLUMNS, "rows": ROWS, "size": sources.size} if sources.size else None,
        "splits": splits,
        "class_names": list(sources.class_names),
        "classifier": sources.classifier is not None,
        "texts": sources.texts,
        "text_set": text_set(args.text_descriptions),
        "components": args.components,
        "k": args.top_k_pca,
        "graded_on": args.split,
        "graded_images": len(sources.held_out),
        "sides": grading.SIDES,
        "rows": {row: grading.ROWS[row] for row in sources.graded[sources.layers[0]].rows},
    }


def name_of(image, number):
    """What an image is called on the page: its folder and file, or its number."""
    return "/".join(Path(image).parts[-2:]) if isinstance(image, str) else f"image {number}"
