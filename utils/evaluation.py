"""Fit and grade both descriptions of every neuron: the work of evaluate_descriptions.py."""

import csv
import io
import json
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from utils import grading
from utils.data.images import load_images, train_set_of
from utils.data.splits import Split, load_split
from utils.data.text_sets import load_texts
from utils.descriptions import describe, load_descriptions, load_support
from utils.figures import plot_grades
from utils.model.clip import load_clip
from utils.runtime import distributed, flags
from utils.runtime.errors import UserError
from utils.runtime.files import digest, one_line, read_array, save_atomic, save_json
from utils.runtime.layers import parse_layers
from utils.runtime.passes import Pass, pieces_of
from utils.runtime.records import Digest, agrees, complete, is_made, load_record
from utils.runtime.results import Arrays
from utils.statistics import load_statistics

TRUTHS = 5000  # texts at most that a truth judges: their correlations are decomposed


class Inputs:
    """Inputs are what the stages that look at descriptions read.

    Parameters
    args: their flags.
    results: `Results` of the folder that is read.

    Attributes
    texts, vectors: the text set, and its unit vectors [T, D].
    clip, layers: the loaded `Clip`; the MLP layers.
    inputs: `Results` of the folder that is read, of the loaded model.
    names: fields of the names of files, besides data set and split.
    statistics: {layer: Statistics}.
    train, held_out: the `Split`s that texts are fitted to and graded on.
    share: fraction of images that count as a neuron's top images.

    Raises UserError, with the command, for what is missing or does not belong together.
    """

    def __init__(self, args, results):
        if args.split == "train":
            fix = "give the split of the held-out images, such as val"
            raise UserError(f"--split train is what texts are fitted to; {fix}")
        self.args = args
        load = partial(load_clip, args.model, args.pretrained, args.device)
        self.texts, vectors, _ = load_texts(results, args.text_descriptions, args.descriptions_dir, load)
        self.vectors = torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1)
        self.clip = load(precision=args.precision, image_only=True)
        self.inputs = results.of(self.clip, args.coefficient)
        self.layers = parse_layers(args.mlp_layer, self.clip.vit)
        dataset = train_set_of(args.dataset)
        self.names = flags.names_of_descriptions(args, dataset)
        self.inputs.load("texts", mmap=True, texts=args.text_descriptions)  # or raises
        self.statistics = load_statistics(self.inputs, dataset, self.layers, args.top_k_pca)
        images = self._training_images(dataset)
        self.train = Split(images, args.device, args.num_workers, args.batch_size)
        self.held_out = load_split(args, self.clip.transform)
        self.share = min(1, args.top_k_pca / len(images))

    def _training_images(self, dataset):
        """Load the images that the components are of.

        They lie in --train_data_path, in --data_path, or, for ImageNet-R, where they lay for the components.
        """
        args = self.args
        paths = [self.inputs.find("pca", layer=layer, **self.names) for layer in self.layers]
        records = {path: load_record(path) for path in paths}
        where = args.data_path
        if dataset != args.dataset:
            where = records[paths[0]].get("data_path", where)
        where = args.train_data_path or where
        images = load_images(dataset, where, "train", self.clip.transform, args.train_subsample)
        data = images.record["data"]
        for path, record in records.items():
            if not agrees(record.get("data", data), data):
                what = f"{path} is of other training images than the {len(images)} in {where}"
                fix = "give --train_data_path and --train_subsample as for compute_second_order_neuron_prs.py"
                raise UserError(f"{what}; {fix}")
        if len(images) < 2:
            fix = "give a smaller --train_subsample" if args.train_subsample else "add some"
            what = f"there is {len(images)} training image in {where}"
            raise UserError(f"{what}, and texts are fitted to several; {fix}")
        return images

    @property
    def splits(self):
        """splits are both `Split`s by name, the training images first."""
        return {"train": self.train, self.args.split: self.held_out}

    def of(self, split, **names):
        """Return the fields of the names of files about a `Split`."""
        return {**self.names, **split.names, **names}

    def load_descriptions(self, results, layer, kind="decomposition"):
        """Read the descriptions of a layer's neurons, as `utils.descriptions.load_descriptions` returns them.

        results: `Results` of the folder that has them.
        kind: 'decomposition' for the texts that neurons write, 'fires_on' for those they fire on.

        Raises UserError when they are of other components or texts.
        """
        names = {"kind": kind, "layer": layer, **self.names}
        statistics = self.statistics[layer]
        if kind == "decomposition":
            made_of = {"targets": digest(statistics.pcas)}
        else:
            made_of = {"statistics": statistics.digest()}
        found = load_descriptions(results.of(self.clip), {}, made_of, **names)
        for n, entries in enumerate(found):
            for i, _, text in entries:
                if not 0 <= i < len(self.texts) or self.texts[i] != text:
                    what = f"describes neuron {n} by {text!r}, which is not text {i} of the pool"
                    again = f"make it again with: {results.command(**names)} --overwrite"
                    raise UserError(f"{results.find(**names)} {what}; {again}")
        # one string for each text, however often
        return [[(i, c, self.texts[i]) for i, c, _ in entries] for entries in found]

    def sides(self, layer, results):
        """Read {side: descriptions} of a layer. results: `Results` of the folder with fires_on."""
        return {
            "writes": self.load_descriptions(self.inputs, layer),
            "fires_on": self.load_descriptions(results, layer, "fires_on"),
        }

    def explained(self, layer):
        """Read the share of a neuron's largest effects that lies along its component, [N].

        NaN for components of the published code, which does not keep it.
        """
        names = {**self.names, "layer": layer}
        of_component = load_record(self.inputs.find("pca", **names))
        if not of_component and not self.inputs.find("explained", **names).is_file():
            return np.full(self.clip.vit.N, np.nan)
        return self.inputs.load("explained", **names)


class Evaluation(Inputs):
    """An Evaluation is the inputs of evaluate_descriptions.py, and where its results go.

    args, inputs: as in `Inputs`.
    results: `Results` of the folder that is written.

    Attributes, besides those of `Inputs`
    truth: what is true of the images of both splits, two tensors [images, T]; None where the CLIP judges.
    """

    def __init__(self, args, inputs, results):
        super().__init__(args, inputs)
        self.results = results.of(self.clip, args.coefficient)
        self.names = {**self.names, "judge": "_truth" if args.truth else ""}
        for layer in self.layers:
            self.load_descriptions(self.inputs, layer)  # or raises, before the passes
        self.truth = None
        if args.truth:
            self.truth = load_truth(args.truth, (self.train.images, self.held_out.images), self.texts)

    def path(self, kind, split, **names):
        """Return the path of a result about a `Split`."""
        return self.results.path(kind, **self.of(split, **names))

    def read(self, kind, split, **names):
        """Read a result about a `Split` that this stage has made, as a tensor."""
        return torch.from_numpy(np.load(self.path(kind, split, **names)))


class Described(NamedTuple):
    """Described is a layer's neurons as directions, one for every row of the table."""

    directions: dict  # {row: [N, F]}
    digests: dict  # of the descriptions that they are made of


# the effects, along components and descriptions


def plan_effects(stage, split, layers, described=()):
    """Plan a pass over a split: representations, and effects along components and descriptions.

    stage: `Evaluation`.
    described: {layer: Described} of layers that are to be graded: effects along these directions are kept.

    Returns the arrays, their record, and {path: record} of what some arrays alone are made from.
    """
    vit = stage.clip.vit
    arrays = Arrays({stage.path("representations", split): ((len(split), vit.D), "float32")})
    arrays.settings = {"layers": list(layers)}
    alone = {}
    for layer in layers:
        statistics = {"statistics": stage.statistics[layer].digest()}
        path = stage.path("projections", split, layer=layer)
        arrays[path] = ((len(split), vit.N), "float32")
        alone[path] = statistics
        if layer in described:
            path = stage.path("along", split, layer=layer)
            arrays[path] = ((len(split), len(described[layer].directions), vit.N), "float32")
            alone[path] = statistics | described[layer].digests
    record = {**stage.clip.record, **split.record, "coefficient": stage.args.coefficient}
    return arrays, record, alone


# what neurons fire on


def judge_of(stage):
    """Return the `grading.Judge` of texts on the training images."""
    if stage.truth:
        return grading.Judge(stage.truth[0], torch.eye(len(stage.texts)))
    return grading.Judge(stage.read("representations", stage.train), stage.vectors)


def fit(stage, judge, layer):
    """Find the texts that a layer's neurons fire on, and return the layer's `Described`."""
    effects = stage.read("projections", stage.train, layer=layer)
    record = record_of_fit(stage, layer, effects)
    path = fit_fires_on(stage, judge, layer, effects, record)
    first = load_support(path.with_suffix(".npz"))[:, 0]
    digested = [first]
    others = {}
    if not stage.truth:
        labels = fit_labels(stage, layer, effects, record)
        others = {"component": stage.statistics[layer].pcas, "labels": labels}
        digested.append(labels)
    sides = stage.sides(layer, stage.results)
    written, fired_on = (grading.as_matrix(side, len(stage.texts)) for side in sides.values())
    directions = directions_of(judge, written, fired_on, first, **others)
    return Described(directions, {"descriptions": digest_of_sides(sides), "labels": digest(*digested)})


def record_of_fit(stage, layer, effects):
    """Return the record of what texts are fitted to. effects: [images, N], along the components.

    Atoms and targets are left out: another number of threads rounds them differently.
    """
    record = {**stage.clip.record, **stage.train.record, "layer": layer}
    record |= {"text_descriptions": stage.args.text_descriptions, "coefficient": stage.args.coefficient}
    record["statistics"] = stage.statistics[layer].digest()
    record["judge"] = digest(stage.truth[0]) if stage.truth else digest(stage.vectors)
    looked_at = [effects]
    if not stage.truth:
        looked_at.append(stage.read("representations", stage.train))
    record["looked_at"] = Digest(digest(*looked_at), None)
    return record


def fit_fires_on(stage, judge, layer, effects, record):
    """Pursue, for every neuron, the texts whose presences predict its effects; return the json's path."""
    path = stage.path("fires_on", stage.train, layer=layer)
    atoms = judge.atoms.to(stage.args.device)
    targets = judge.targets(effects).to(stage.args.device)
    made_of = {**record, "components": stage.args.components}
    describe(path, stage.texts, atoms, targets, made_of, stage.args.overwrite)
    return path


def fit_labels(stage, layer, effects, record):
    """Return the `grading.SoftWPMI` label of every neuron, int [N]; all processes share the texts."""
    path = stage.path("labels", stage.train, layer=layer)
    inputs = (stage.read("representations", stage.train), stage.vectors, effects)
    inputs = [tensor.to(stage.args.device) for tensor in inputs]
    return soft_wpmi(path, *inputs, record=record, overwrite=stage.args.overwrite)


def soft_wpmi(path, representations, vectors, effects, record, overwrite=False):
    """Compute `grading.SoftWPMI` labels of all neurons into a file at `path`, and return them, int [N].

    representations, vectors, effects: as for `grading.SoftWPMI`.
    record: everything they are made from.
    """
    N = effects.shape[1]
    pieces = pieces_of(len(vectors), grading.TEXTS_AT_ONCE, title="soft-WPMI", unit="text")
    state = {"score": ((N,), "float64"), "place": ((N,), "int64")}  # place: of the best text, from 1
    with Pass({path: ((N,), "int32")}, record, pieces, state=state, overwrite=overwrite) as work:
        label = work.prepare(grading.SoftWPMI, representations, vectors, effects)
        for part in work:
            score, place = (x.cpu().numpy() for x in label(part).max(dim=1))
            larger = (work.state["place"] == 0) | (score > work.state["score"])
            work.state["score"][larger] = score[larger]
            work.state["place"][larger] = place[larger] + part.start + 1
        if not work.finished:
            found = {name: np.array(parts) for name, parts in work.gather(["score", "place"]).items()}
            best = np.where(found["place"] > 0, found["score"], -np.inf).argmax(axis=0)
            if distributed.is_rank_zero():
                work[path][:] = found["place"][best, np.arange(N)] - 1
    return np.load(path)


def directions_of(judge, written, fired_on, first, component=None, labels=None):
    """Return the directions of the rows of the table, {row: [N, F]}, in the order of `grading.ROWS`.

    judge: `grading.Judge`.
    written: descriptions of what neurons write, sparse [N, T].
    fired_on: descriptions of what they fire on, sparse [N, T], in standardised presences.
    first: the text of `fired_on` that was chosen first, [N].
    component: [N, D]; None where a truth judges.
    labels: a text for each neuron, [N]; None where a truth judges.
    """
    vectors = judge.vectors
    one_written = grading.only(written, grading.strongest(written))
    found = {
        "writes": grading.written(written, vectors),
        "fires_on": judge.direction(fired_on),
        "one_written": grading.written(one_written, vectors),
        "one_fired_on": grading.written(grading.only(fired_on, first), vectors),
    }
    if component is not None:
        found["direction"] = component.cpu()
        found["wpmi"] = vectors[torch.from_numpy(labels).long()].float()
    for side in ("writes", "fires_on"):
        found[f"null_{side}"] = grading.of_another(found[side])
    return {row: found[row] for row in grading.ROWS if row in found}


def digest_of_sides(sides):
    """Return twelve hex digits of {side: descriptions, as `load_descriptions` returns them}."""
    entries = ([(n, i, c) for n, texts in enumerate(side) for i, c, _ in texts] for side in sides.values())
    return digest(*map(np.array, entries))


# grades


def plan_grades(stage, layer, described):
    """Plan the array of a layer's grades, {path: spec}, and its record."""
    record = {**stage.clip.record, **stage.names, **stage.held_out.record}
    record |= {"coefficient": stage.args.coefficient, "layer": layer, "share": stage.share}
    record |= {"statistics": stage.statistics[layer].digest(), "rows": list(described.directions)}
    record |= described.digests
    if stage.truth:
        record["truth"] = digest(*stage.truth)
    measures = 2 if stage.truth else len(grading.MEASURES)
    shape = (stage.clip.vit.N, len(described.directions), measures)
    return {stage.path("grades", stage.held_out, layer=layer): (shape, "float32")}, record


def to_grade(stage, described):
    """Return those of {layer: Described} whose grades need effects along their directions.

    None where a truth judges. Raises UserError when grades are there, of other inputs.
    """
    found = {}
    for layer, of in described.items():
        arrays, record = plan_grades(stage, layer, of)
        made = [is_made(path, complete(record, *spec), stage.args.overwrite) for path, spec in arrays.items()]
        if not all(made) and not stage.truth:
            found[layer] = of
    return found


def grade(stage, layer, described):
    """Grade a layer's neurons on the held-out images, write the files, and return the `Graded`."""
    arrays, record = plan_grades(stage, layer, described)
    [path] = arrays
    size = max(16, min(256, 2**18 // len(stage.held_out)))
    neurons = pieces_of(stage.clip.vit.N, size, title=f"grades of layer {layer}", unit="neuron")
    with Pass(arrays, record, neurons, overwrite=stage.args.overwrite) as work:
        for n in work:
            work[path][n] = grade_neurons(stage, layer, described, n)
    graded = Graded(np.load(path), described.directions)
    if distributed.is_rank_zero():
        finish(stage, layer, graded)
    return graded


def grade_neurons(stage, layer, described, n):
    """Return the grades of a slice of a layer's neurons, [n, rows, measures]."""
    effects = columns(stage.path("projections", stage.held_out, layer=layer), n)
    directions = torch.stack([of[n] for of in described.directions.values()])
    if stage.truth:
        found = grading.grades(stage.truth[1], directions, effects, stage.share)
    else:
        features = stage.read("representations", stage.held_out)
        own = columns(stage.path("along", stage.held_out, layer=layer), n)
        mean = (directions * stage.statistics[layer].mean[n].cpu()).sum(dim=-1)
        found = grading.grades(features, directions, effects, stage.share, own, mean)
    return torch.stack(list(found.values()), dim=-1).transpose(0, 1)


def columns(path, n):
    """Read the columns n of an array on disk, a tensor [..., n]; nothing else of it stays in memory."""
    return torch.from_numpy(read_array(path, mmap=True)[..., n].copy())


def load_truth(paths, images, texts):
    """Read what is true of the training and of the held-out images, two float32 tensors [images, texts].

    paths: of two .npy, of numbers or booleans, a row for each of the images and a column for each text.
    images: the two `Images`.

    Raises UserError for another shape, or numbers that are not finite.
    """
    if len(texts) > TRUTHS:
        what = f"--truth judges at most {TRUTHS} texts, and the pool has {len(texts)}"
        raise UserError(f"{what}; give a smaller --text_descriptions")
    found = []
    for path, of in zip(paths, images, strict=True):
        try:
            array = read_array(path)
        except ValueError as error:
            raise UserError(f"--truth {path} cannot be read: {one_line(error)[:120]}") from error
        fits = array.shape == (len(of), len(texts)) and array.dtype.kind in "biuf"
        if not fits or not np.isfinite(array).all():
            has = f"{array.dtype} {' x '.join(map(str, array.shape))}"
            wanted = f"finite numbers, {len(of)} {of.split} images x {len(texts)} texts, are needed"
            raise UserError(f"--truth {path} holds {has}; {wanted}")
        found.append(torch.from_numpy(array.astype(np.float32)))
    return found


class Graded:
    """Graded is the grades of a layer.

    values: [N, rows, measures].
    rows: their names.
    """

    def __init__(self, values, rows):
        self.values = values
        self.rows = list(rows)
        self.measures = list(grading.MEASURES[: values.shape[2]])

    def of(self, row, measure):
        """Return the grades of all neurons by one measure, [N]."""
        return self.values[:, self.rows.index(row), self.measures.index(measure)]


def load_grades(results, expected=(), **names):
    """Read the `Graded` of a layer. Parameters and errors: as in `Results.load`."""
    values = results.load("grades", expected=expected, **names)
    path = results.find("grades", **names)
    rows = load_record(path).get("rows", [])
    known = not set(rows) - set(grading.ROWS) and values.shape[2] in (2, len(grading.MEASURES))
    if len(rows) != values.shape[1] or not known:
        again = f"make it again with: {results.command('grades', **names)} --overwrite"
        raise UserError(f"{path} does not have the rows that its record says; {again}")
    return Graded(values, rows)


def finish(stage, layer, graded):
    """Write the .csv of a layer, and remove the effects along its directions. graded: its `Graded`."""
    path = stage.path("grades", stage.held_out, layer=layer)
    sides = stage.sides(layer, stage.results)
    save_neurons(path.with_suffix(".csv"), graded, stage.explained(layer), sides)
    along = stage.path("along", stage.held_out, layer=layer)
    for file in (along, along.with_suffix(".meta.json")):
        file.unlink(missing_ok=True)


def save_neurons(path, graded, explained, described):
    """Write the .csv of all neurons of a layer: their grades, and the texts of both sides as json.

    graded: `Graded`.
    explained: [N].
    described: {side: descriptions, as `load_descriptions` returns them}.
    """
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    grades = [f"{row} {measure}" for row in graded.rows for measure in graded.measures]
    table.writerow(["neuron", "explained", *grades, *described])
    for n, values in enumerate(graded.values):
        sides = [[[text, round(c, 6)] for _, c, text in of[n]] for of in described.values()]
        texts = [json.dumps(side, ensure_ascii=False) for side in sides]
        table.writerow([n, f"{explained[n]:.4f}", *(f"{x:.4f}" for x in values.ravel()), *texts])
    save_atomic(path, lambda out: out.write(file.getvalue().encode()))


def report(path, stage, graded):
    """Write the summary of some layers at `path` (.json) and a .png beside; return the lines of a table.

    graded: {layer: Graded}.
    """
    tables = {str(layer): grading.summary(of.values, of.rows, of.measures) for layer, of in graded.items()}
    made_of = {**stage.clip.record, **stage.names, **stage.held_out.record}
    made_of["coefficient"] = stage.args.coefficient
    save_json(path, {**made_of, "layers": list(graded), "neurons": tables})
    plot_grades(graded, path.with_suffix(".png"))
    width = max(map(len, grading.ROWS.values())) + 2
    lines = []
    for layer, table in tables.items():
        measures = next(iter(table.values()))
        title = f"layer {layer}, means over neurons".ljust(width)
        lines.append(title + "".join(f"{name:>17}" for name in measures))
        for row, measured in table.items():
            cells = (f"{value['mean']:.3f} ± {value['error']:.3f}" for value in measured.values())
            lines.append(grading.ROWS[row].ljust(width) + "".join(f"{cell:>17}" for cell in cells))
    return lines
