"""Fit and grade both descriptions of every neuron: the work of evaluate_descriptions.py."""

from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch

from utils import controls, grading, omp
from utils.ablation import Rebuilt
from utils.controls import Compared, Rotation
from utils.data.images import train_set_of
from utils.data.splits import Split, load_split
from utils.data.text_sets import load_texts
from utils.descriptions import describe, load_descriptions, load_support
from utils.effects import READ_IMAGES, largest
from utils.model.clip import load_clip
from utils.norms import CentredNorms
from utils.pca import statistics
from utils.prs import SecondOrder
from utils.runtime import distributed, flags
from utils.runtime.errors import UserError
from utils.runtime.files import digest, one_line, read_array
from utils.runtime.layers import parse_layers
from utils.runtime.locks import Lock
from utils.runtime.passes import Pass, pieces_of
from utils.runtime.records import Digest, complete, has_record, is_made, load_record, record_path
from utils.runtime.results import Arrays
from utils.statistics import Statistics, find_k, load_statistics, load_training_images
from utils.units import ACTS, open_units

TRUTHS = 5000  # texts at most that a truth judges: their correlations are decomposed


class Units:
    """Units are what is described and graded: the neurons of a layer, or units of another kind.

    layer: MLP layer.
    count: how many there are.
    name: of the kind; "" for neurons.
    statistics: `Statistics` of their effects; None where they are not known yet.
    """

    def __init__(self, layer, count, name="", statistics=None):
        self.layer = layer
        self.count = count
        self.name = name
        self.statistics = statistics

    @property
    def names(self):
        """names are the fields of the names of files."""
        return {"layer": self.layer, "units": self.name}

    def __str__(self):
        return f"layer {self.layer}" + (f", {self.name} units" if self.name else "")


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
        open_units(args, self.clip)
        self.inputs = results.of(self.clip, args.coefficient)
        self.layers = parse_layers(args.mlp_layer, self.clip.vit)
        dataset = train_set_of(args.dataset)
        args.top_k_pca = find_k(args.top_k_pca, self.inputs, dataset, self.layers)
        self.names = flags.names_of_descriptions(args, dataset)
        self.inputs.load("texts", mmap=True, texts=args.text_descriptions)  # or raises
        self.statistics = load_statistics(self.inputs, dataset, self.layers, args.top_k_pca)
        images = load_training_images(args, self.inputs, self.layers, self.names, self.clip.transform)
        self.train = Split(images, args.device, args.num_workers, args.batch_size)
        self.held_out = load_split(args, self.clip.transform)
        self.share = min(1, args.top_k_pca / len(images))

    @property
    def splits(self):
        """splits are both `Split`s by name, the training images first."""
        return {"train": self.train, self.args.split: self.held_out}

    def of(self, split, **names):
        """Return the fields of the names of files about a `Split`."""
        return {**self.names, **split.names, **names}

    def neurons(self, layer):
        """Return the `Units` that are a layer's neurons, or what takes their place."""
        statistics = self.statistics[layer]
        return Units(layer, len(statistics.pcas), statistics=statistics)

    def acts(self, units):
        """Read on how many training images each of a dictionary's units acts, [N]; None for other units."""
        if units.name or self.clip.units is None or not self.clip.units.act:
            return None
        return self.inputs.load("acts", dataset=self.names["dataset"], layer=units.layer)

    def energy(self, units):
        """Return the sums of the squared centred norms of units over the training images, [N].

        None for neurons, and where they are not stored.
        """
        names = {"dataset": self.names["dataset"], "layer": units.layer}
        if self.clip.units is None or not self.inputs.find("image_norms", **names).is_file():
            return None
        norms = self.inputs.load("image_norms", mmap=True, **names)
        blocks = (norms[i : i + READ_IMAGES] for i in range(0, len(norms), READ_IMAGES))
        return sum(np.square(block, dtype=np.float64).sum(axis=0) for block in blocks)

    def graded(self, units):
        """Return which of a layer's units are graded, bool [N]: those that act on ACTS images at least.

        Raises UserError where none does.
        """
        acts = self.acts(units)
        if acts is None:
            return np.ones(units.count, bool)
        if acts.max() < ACTS:
            what = (
                f"no unit of {self.clip.units.name} acts on {ACTS} of the {len(self.train)} training images"
            )
            raise UserError(f"{what}, so none can be graded; give more images, or another dictionary")
        return acts >= ACTS

    def load_descriptions(self, results, units, kind="decomposition"):
        """Read the descriptions of a layer's units, as `utils.descriptions.load_descriptions` returns them.

        results: `Results` of the folder that has them.
        units: `Units`.
        kind: 'decomposition' for the texts that units write, 'fires_on' for those they fire on.

        Raises UserError when they are of other components or texts.
        """
        names = {"kind": kind, **units.names, **self.names}
        if kind == "decomposition":
            made_of = {"targets": digest(units.statistics.pcas)}
        else:
            made_of = {"statistics": units.statistics.digest()}
        found = load_descriptions(results.of(self.clip), {"N": units.count}, made_of, **names)
        for n, entries in enumerate(found):
            for i, _, text in entries:
                if not 0 <= i < len(self.texts) or self.texts[i] != text:
                    what = f"describes neuron {n} by {text!r}, which is not text {i} of the pool"
                    again = f"make it again with: {results.command(**names)} --overwrite"
                    raise UserError(f"{results.find(**names)} {what}; {again}")
        # one string for each text, however often
        return [[(i, c, self.texts[i]) for i, c, _ in entries] for entries in found]

    def sides(self, units, results):
        """Read {side: descriptions} of a layer's units. results: `Results` of the folder with fires_on."""
        written = results if units.name else self.inputs  # those of rotated units are made beside fires_on
        return {
            "writes": self.load_descriptions(written, units),
            "fires_on": self.load_descriptions(results, units, "fires_on"),
        }

    def explained(self, layer):
        """Read the share of a neuron's largest effects that lies along its component, [N].

        NaN for components of the published code, which does not keep it.
        """
        names = {**self.names, "layer": layer}
        of_component = load_record(self.inputs.find("pca", **names))
        if not of_component and not self.inputs.find("explained", **names).is_file():
            return np.full(len(self.statistics[layer].pcas), np.nan)
        return self.inputs.load("explained", **names)


class Evaluation(Inputs):
    """An Evaluation is the inputs of evaluate_descriptions.py, and where its results go.

    args, inputs: as in `Inputs`.
    results: `Results` of the folder that is written.

    Attributes, besides those of `Inputs`
    truth: what is true of the images of both splits, two tensors [images, T]; None where the CLIP judges.
    units: {layer: list of `Units`}: the neurons, and rotated units.
    """

    def __init__(self, args, inputs, results):
        super().__init__(args, inputs)
        self.results = results.of(self.clip, args.coefficient)
        self.names = {**self.names, "judge": "_truth" if args.truth else ""}
        self.units = {}
        for layer in self.layers:
            self.units[layer] = [self.neurons(layer)]
            self.load_descriptions(self.inputs, self.units[layer][0])  # or raises, before the passes
            self.graded(self.units[layer][0])  # likewise
            if args.rotated_units:
                rotated = min(args.rotated_units, self.units[layer][0].count)
                self.units[layer].append(Units(layer, rotated, "rotated"))
        self.truth = None
        if args.truth:
            self.truth = load_truth(args.truth, (self.train.images, self.held_out.images), self.texts)

    def path(self, kind, split, **names):
        """Return the path of a result about a `Split`."""
        return self.results.path(kind, **self.of(split, **names))

    def read(self, kind, split, **names):
        """Read a result about a `Split` that this stage has made, as a tensor."""
        return torch.from_numpy(np.load(self.path(kind, split, **names)))

    def deletes(self, units, split):
        """Return whether units are to be taken away on a split: neurons, on the held-out images."""
        return not units.name and split is self.held_out and units.layer in self.activations

    @cached_property
    def activations(self):
        """activations are mean activations, {layer: [T, N]}, of the layers whose neurons are deleted."""
        found = {}
        dataset = self.names["dataset"]
        pairs = self.clip.units is not None and not self.clip.units.act
        for layer in self.layers if self.args.delete and not self.truth and not pairs else ():
            if not self.inputs.find("activations", dataset=dataset, layer=layer).is_file():
                command = self.inputs.command("activations", dataset=dataset, layer=layer, split="train")
                what = f"the mean activations of layer {layer} are missing"
                print(f"note: {what}, so no neuron is deleted; make them with: {command}")
                continue
            made_of = {"data": self.train.record["data"]}
            mean = self.inputs.load("activations", expected=made_of, dataset=dataset, layer=layer)
            found[layer] = torch.from_numpy(mean).to(self.clip.device)
        return found

    @cached_property
    def features(self):
        """features are what descriptions are graded by on the held-out images, [images, F]."""
        return self.truth[1] if self.truth else self.read("representations", self.held_out)


class Described(NamedTuple):
    """Described is a layer's neurons as directions, one for every row of the table."""

    directions: dict  # {row: [N, F]}
    digests: dict  # of the descriptions that they are made of


# the effects, along components and descriptions


def plan_effects(stage, split, layers, described=()):
    """Plan a pass over a split: representations, and effects along components and descriptions.

    stage: `Evaluation`.
    described: {Units: Described} of units that are to be graded: effects along these directions are kept.

    Returns the arrays, their record, and {path: record} of what some arrays alone are made from. Units
    without statistics have their coefficients stored, from which `summarise` makes them.
    """
    vit = stage.clip.vit
    count = len(split)
    arrays = Arrays({stage.path("representations", split): ((count, vit.D), "float32")})
    arrays.settings = {"layers": list(layers)}
    alone = {}
    for units in (units for layer in layers for units in stage.units[layer]):
        if units.statistics is None:
            K = stage.results.sizes(units.layer)["K"]
            for kind, shape in (("coefficients", (K, units.count)), ("bias", (vit.D,))):
                path = stage.path(kind, split, **units.names)
                arrays[path] = ((count, *shape), "float32")
                alone[path] = {"units": [units.name, units.count]}
            continue
        made_of = {"statistics": units.statistics.digest()}
        path = stage.path("projections", split, **units.names)
        arrays[path] = ((count, units.count), "float32")
        alone[path] = made_of
        if units in described:
            path = stage.path("along", split, **units.names)
            arrays[path] = ((count, len(described[units].directions), units.count), "float32")
            alone[path] = made_of | described[units].digests
        if stage.deletes(units, split):
            path = stage.path("image_norms", split, **units.names)
            arrays[path] = ((count, units.count), "float32")
            alone[path] = made_of
    record = {**stage.clip.record, **split.record, "coefficient": stage.args.coefficient}
    return arrays, record, alone


class Observer:
    """An Observer looks at one layer's units in batches of a split.

    stage: `Evaluation`.
    split: `Split`.
    units: `Units` of the layer.
    neurons: `Directions` of the layer's neurons.
    described: {Units: Described}, as for `plan_effects`.
    """

    def __init__(self, stage, split, units, neurons, described):
        self.paths = {
            kind: stage.path(kind, split, **units.names)
            for kind in ("coefficients", "bias", "projections", "along", "image_norms")
        }
        self.rotation = Rotation(neurons, units.count) if units.name else None
        directions = self.rotation.directions if units.name else neurons
        self.component = self.along = None
        if units.statistics is not None:
            self.component = Rebuilt(directions, units.statistics.mean, units.statistics.pcas)
        if units in described:
            self.along = grading.Along(directions, described[units].directions)
        self.norms = CentredNorms(directions, units.statistics.mean) if stage.deletes(units, split) else None

    def blocks(self, phi):
        """Yield (path, block) of everything that is kept. phi: `SecondOrder` of the layer's neurons."""
        if self.rotation:
            phi = self.rotation(phi)
        if self.component is None:
            yield self.paths["coefficients"], phi.C
            yield self.paths["bias"], phi.kappa
        else:
            yield self.paths["projections"], self.component.projections(phi)
        if self.along:
            yield self.paths["along"], self.along(phi)
        if self.norms:
            yield self.paths["image_norms"], self.norms(phi)


def stored_effects(stage, split, layers, record):
    """Return the paths of the coefficients and the bias of layers whose effects on a split are stored.

    Returns [] unless these of all layers, and the representations, are there with the `record` of the pass.
    """
    vit = stage.clip.vit
    count = len(split)
    representations = stage.path("representations", split)
    planned = {representations: (count, vit.D)}
    found = []
    for layer in layers:
        names = {**split.names, "layer": layer}
        paths = [stage.inputs.find(kind, **names) for kind in ("coefficients", "bias")]
        sizes = stage.results.sizes(layer)
        planned |= zip(paths, ((count, sizes["K"], sizes["N"]), (count, vit.D)), strict=True)
        found.append(paths)
    made = (has_record(path, complete(record, shape, "float32")) for path, shape in planned.items())
    return [] if stage.args.overwrite or not all(made) else found


# rotated units


def record_of_units(stage, units):
    """Return the record of the statistics of units that this stage makes itself."""
    record = {**stage.clip.record, **stage.clip.units_record, **stage.train.record, "layer": units.layer}
    return record | {"units": [units.name, units.count], "coefficient": stage.args.coefficient}


def plan_statistics(stage, units):
    """Plan the statistics of units, {path: (shape, dtype)}."""
    D = stage.clip.vit.D
    k = min(stage.args.top_k_pca, len(stage.train))
    shapes = {"mean": (units.count, D), "pca": (units.count, D), "norm": (units.count, k)}
    paths = {kind: stage.path(kind, stage.train, **units.names) for kind in shapes}
    return Arrays({paths[kind]: (shape, "float32") for kind, shape in shapes.items()})


def recall(stage, units):
    """Read the statistics of units that an earlier run has made. Raises UserError for others of the name."""
    record = record_of_units(stage, units)
    planned = plan_statistics(stage, units).items()
    if all(is_made(path, complete(record, *spec), stage.args.overwrite) for path, spec in planned):
        mean, pcas, norm = (torch.from_numpy(np.load(path)).to(stage.clip.device) for path, _ in planned)
        found = Statistics(mean, pcas, norm[:, 0].contiguous())
        path = stage.path("projections", stage.train, **units.names)
        store = stage.path("coefficients", stage.train, **units.names)
        if path.is_file() or not store.is_file():
            units.statistics = found
            remove_store(stage, units)


class Stored:
    """Stored are the effects of a layer's units on all images of a split, as a pass has stored them.

    It is read as `utils.effects.open_effects` is.

    path: of the coefficients.
    bias: path of the bias.
    directions: `Directions` of the units.
    """

    def __init__(self, path, bias, directions):
        self.path = path
        self.directions = directions
        self.device = directions.values.device
        self.bias = torch.from_numpy(np.load(bias)).to(self.device)

    def lines(self, units):
        """Return None: rotated units are of no rank that is known."""

    def top(self, units, k):
        """Return the statistics of a slice of units that `FactorisedEffects.top` returns."""
        C = torch.from_numpy(read_array(self.path, mmap=True)[:, :, units].copy()).to(self.device)
        values = self.directions.values[:, units]
        return largest(C, self.bias, self.directions._replace(values=values), k)

    def on(self, rows):
        """Return the `SecondOrder` of a slice of the images."""
        C = torch.from_numpy(read_array(self.path, mmap=True)[rows].copy()).to(self.device)
        return SecondOrder(C, self.bias[rows], self.directions)


def summarise(stage, units, neurons):
    """Make the statistics of units from their stored effects, and their effects along the components.

    neurons: `Directions` of the layer's neurons.
    """
    with Lock(stage.path("coefficients", stage.train, **units.names)):
        distributed.barrier()  # nobody looks before the lock is taken
        recall(stage, units)  # another run may have made them meanwhile, and removed the store
        if units.statistics is None:
            paths = (stage.path(kind, stage.train, **units.names) for kind in ("coefficients", "bias"))
            make_statistics(stage, units, Stored(*paths, Rotation(neurons, units.count).directions))
        distributed.barrier()


def make_statistics(stage, units, effects):
    """Write the statistics of units and their effects along the components. effects: `Stored`."""
    arrays = plan_statistics(stage, units)
    overwrite = stage.args.overwrite
    k = min(stage.args.top_k_pca, len(stage.train))
    K = stage.results.sizes(units.layer)["K"]
    size = 2**26 // (len(stage.train) * K)  # 256 MB of coefficients
    pieces = pieces_of(units.count, max(16, min(256, size)), title=str(units), unit="unit")
    with Pass(arrays, record_of_units(stage, units), pieces, overwrite=overwrite) as work:
        for n in work:
            found = statistics(effects, n, k)
            for path, kind in zip(arrays, ("mean", "pca", "norm"), strict=True):
                work[path][n] = found[kind]
    mean, pcas, norm = (torch.from_numpy(np.load(path)).to(stage.clip.device) for path in arrays)
    units.statistics = Statistics(mean, pcas, norm[:, 0].contiguous())
    path = stage.path("projections", stage.train, **units.names)
    spec = ((len(stage.train), units.count), "float32")
    record = {**stage.clip.record, **stage.train.record, "coefficient": stage.args.coefficient}
    record["statistics"] = units.statistics.digest()
    component = Rebuilt(effects.directions, mean, pcas)
    pieces = pieces_of(len(stage.train), 64, title=f"{units}, along components")
    with Pass({path: spec}, record, pieces, overwrite=overwrite) as work:
        for rows in work:
            work[path][rows] = component.projections(effects.on(rows))
    distributed.barrier()  # every process has read the store
    remove_store(stage, units)


def remove_store(stage, units):
    """Remove the stored effects of units, also what a run has left that ended meanwhile."""
    if distributed.is_rank_zero():
        for kind in ("coefficients", "bias"):
            remove(stage.path(kind, stage.train, **units.names))


def remove(path):
    """Remove an array that is no result, and its record."""
    for file in (path, record_path(path)):
        file.unlink(missing_ok=True)


def decompose(stage, units):
    """Describe what units write, where no other stage does. units: `Units`, with statistics."""
    path = stage.path("decomposition", stage.train, **units.names)
    atoms = omp.make_atoms(100 * stage.vectors, stage.args.normalise)
    targets = units.statistics.pcas
    record = {**stage.clip.record, "text_descriptions": stage.args.text_descriptions, **units.names}
    record |= {"normalise": stage.args.normalise, "components": stage.args.components}
    record |= {"vectors": digest(stage.vectors), "targets": digest(targets)}
    describe(path, stage.texts, atoms.to(targets), targets, record, stage.args.overwrite)


# what neurons fire on


def judge_of(stage):
    """Return the `grading.Judge` of texts on the training images."""
    if stage.truth:
        return grading.Judge(stage.truth[0], torch.eye(len(stage.texts)))
    return grading.Judge(stage.read("representations", stage.train), stage.vectors)


def fit(stage, judge, units):
    """Find the texts that a layer's units fire on, and return the units' `Described`."""
    effects = stage.read("projections", stage.train, **units.names)
    record = record_of_fit(stage, units, effects)
    path = fit_fires_on(stage, judge, units, effects, record)
    first = load_support(path.with_suffix(".npz"))[:, 0]
    digested = [first]
    others = {}
    if not stage.truth:
        labels = fit_labels(stage, units, effects, record)
        others = {"component": units.statistics.pcas, "labels": labels}
        digested.append(labels)
    sides = stage.sides(units, stage.results)
    written, fired_on = (grading.as_matrix(side, len(stage.texts)) for side in sides.values())
    directions = directions_of(judge, written, fired_on, first, **others)
    return Described(directions, {"descriptions": digest_of_sides(sides), "labels": digest(*digested)})


def record_of_fit(stage, units, effects):
    """Return the record of what texts are fitted to. effects: [images, N], along the components.

    Atoms and targets are left out: another number of threads rounds them differently.
    """
    record = {**stage.clip.record, **stage.train.record, "layer": units.layer}
    if units.name:
        record["units"] = [units.name, units.count]
    record |= {"text_descriptions": stage.args.text_descriptions, "coefficient": stage.args.coefficient}
    record["statistics"] = units.statistics.digest()
    record["judge"] = digest(stage.truth[0]) if stage.truth else digest(stage.vectors)
    looked_at = [effects]
    if not stage.truth:
        looked_at.append(stage.read("representations", stage.train))
    record["looked_at"] = Digest(digest(*looked_at), None)
    return record


def fit_fires_on(stage, judge, units, effects, record):
    """Pursue, for every unit, the texts whose presences predict its effects; return the json's path."""
    path = stage.path("fires_on", stage.train, **units.names)
    atoms = judge.atoms.to(stage.args.device)
    targets = judge.targets(effects).to(stage.args.device)
    made_of = {**record, "components": stage.args.components}
    describe(path, stage.texts, atoms, targets, made_of, stage.args.overwrite)
    return path


def fit_labels(stage, units, effects, record):
    """Return the `grading.SoftWPMI` label of every unit, int [N]; all processes share the texts."""
    path = stage.path("labels", stage.train, **units.names)
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


def plan_grades(stage, units, described):
    """Plan the array of the grades of a layer's units, {path: spec}, and its record."""
    record = {**stage.clip.record, **stage.names, **stage.held_out.record}
    record |= {"coefficient": stage.args.coefficient, "layer": units.layer, "share": stage.share}
    record |= {"statistics": units.statistics.digest(), "rows": list(described.directions)}
    record |= described.digests
    if stage.truth:
        record["truth"] = digest(*stage.truth)
    measures = 2 if stage.truth else len(grading.MEASURES)
    shape = (units.count, len(described.directions), measures)
    return {stage.path("grades", stage.held_out, **units.names): (shape, "float32")}, record


def to_grade(stage, described):
    """Return those of {Units: Described} whose grades need effects along their directions.

    None where a truth judges. Raises UserError when grades are there, of other inputs.
    """
    found = {}
    for units, of in described.items():
        arrays, record = plan_grades(stage, units, of)
        made = [is_made(path, complete(record, *spec), stage.args.overwrite) for path, spec in arrays.items()]
        if not all(made) and not stage.truth:
            found[units] = of
    return found


def grade(stage, units, described):
    """Grade a layer's units on the held-out images, write the array, and return the `Graded`."""
    arrays, record = plan_grades(stage, units, described)
    [path] = arrays
    size = max(16, min(256, 2**18 // len(stage.held_out)))
    pieces = pieces_of(units.count, size, title=f"grades of {units}", unit="unit")
    with Pass(arrays, record, pieces, overwrite=stage.args.overwrite) as work:
        for n in work:
            work[path][n] = grade_units(stage, units, described, n)
    if distributed.is_rank_zero():
        remove(stage.path("along", stage.held_out, **units.names))
    return Graded(np.load(path), described.directions)


def grade_units(stage, units, described, n):
    """Return the grades of a slice of a layer's units, [n, rows, measures]."""
    effects = columns(stage.path("projections", stage.held_out, **units.names), n)
    directions = torch.stack([of[n] for of in described.directions.values()])
    if stage.truth:
        found = grading.grades(stage.truth[1], directions, effects, stage.share)
    else:
        own = columns(stage.path("along", stage.held_out, **units.names), n)
        mean = (directions * units.statistics.mean[n].cpu()).sum(dim=-1)
        found = grading.grades(stage.features, directions, effects, stage.share, own, mean)
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


# controls


def slots_of(stage):
    """Return what is compared with controls, [(side, measure, number of texts), ...]; soft-WPMI has one."""
    lengths = controls.lengths_of(stage.args.components)
    slots = [("fires_on", measure, m) for measure in ("pearson", "auprc") for m in lengths]
    if not stage.truth:
        slots += [("writes", "share", m) for m in lengths]
        slots += [("wpmi", measure, 1) for measure in ("pearson", "auprc")]
    return slots


def compare(stage, judge, units):
    """Grade the descriptions of a layer's units by number of texts, and those from control dictionaries.

    Rotated units, a control themselves, are described by the text set alone. Writes the array
    [1 + C, N, slots], the text set first, and returns {(side, measure): Compared}; {} without controls.
    """
    dictionaries = 1 if units.name else 1 + stage.args.controls
    if not stage.args.controls:
        return {}
    labels = None
    if not stage.truth and dictionaries > 1:
        labels = control_labels(stage, units)
    slots = slots_of(stage)
    path = stage.path("controls", stage.held_out, **units.names)
    arrays = {path: ((dictionaries, units.count, len(slots)), "float32")}
    title = f"controls of {units}"
    size = 2**24 // (stage.args.components * judge.vectors.shape[1])  # a batch of descriptions takes 128 MB
    size = max(16, min(omp.PURSUED, size))
    pieces = pieces_of(units.count, size, title=title, unit="unit", rounds=dictionaries)
    record = record_of_comparison(stage, units, slots)
    with Pass(arrays, record, pieces, overwrite=stage.args.overwrite) as work:
        for number in range(0 if work.finished else dictionaries):
            candidate = Candidate(stage, judge, units, number, labels)
            for n in work.round(number, f"{title}, {number} of {dictionaries - 1}"):
                work[path][number, n] = candidate.grades(n)
    return compared_of(np.load(path), slots)


def record_of_comparison(stage, units, slots):
    """Return the record of the grades by number of texts."""
    record = {**stage.clip.record, **stage.names, **stage.held_out.record, "layer": units.layer}
    record |= {"coefficient": stage.args.coefficient, "share": stage.share, "slots": slots}
    record |= {"statistics": units.statistics.digest(), "vectors": digest(stage.vectors)}
    record["descriptions"] = digest_of_sides(stage.sides(units, stage.results))
    record["seeds"] = [] if units.name else list(range(stage.args.controls))
    if stage.truth:
        record["truth"] = digest(*stage.truth)
    return record


def compared_of(values, slots):
    """Return {(side, measure): Compared}. values: [1 + C, N, slots], as `compare` writes them."""
    found = {}
    for side, measure in dict.fromkeys((side, measure) for side, measure, _ in slots):
        chosen = [i for i, slot in enumerate(slots) if tuple(slot[:2]) == (side, measure)]
        lengths = [slots[i][2] for i in chosen]
        found[side, measure] = Compared(measure, lengths, values[0][:, chosen], values[1:][..., chosen])
    return found


def control_labels(stage, units):
    """Return the soft-WPMI labels of a layer's units from control dictionaries, int [C, N]."""
    effects = stage.read("projections", stage.train, **units.names)
    representations = stage.read("representations", stage.train)
    record = record_of_fit(stage, units, effects)
    found = []
    for c in range(stage.args.controls):
        inputs = (representations, controls.control_dictionary(stage.vectors, c), effects)
        inputs = [tensor.to(stage.args.device) for tensor in inputs]
        path = stage.path("control_labels", stage.train, **units.names, control=c)
        found.append(soft_wpmi(path, *inputs, record={**record, "seed": c}, overwrite=stage.args.overwrite))
    return np.array(found)


class Candidate:
    """A Candidate describes a layer's units by one dictionary: the text set, or a control.

    stage: `Evaluation`.
    judge: `grading.Judge` of the text set.
    units: `Units`.
    number: 0 for the text set, 1 + c for control c.
    labels: of the controls, [C, N]; None where there are none.
    """

    def __init__(self, stage, judge, units, number, labels):
        self.stage = stage
        self.units = units
        self.number = number
        self.lengths = controls.lengths_of(stage.args.components)
        vectors = stage.vectors
        if number:
            judge = judge.of(controls.control_dictionary(judge.vectors, number - 1))
            vectors = judge.vectors
        self.judge = judge
        self.targets = judge.targets(stage.read("projections", stage.train, **units.names))
        self.atoms = omp.make_atoms(100 * vectors, stage.args.normalise)
        self.supports = None if number else self._supports()
        self.labels = None
        if not stage.truth and (number == 0 or labels is not None):
            path = stage.path("labels", stage.train, **units.names)
            self.labels = labels[number - 1] if number else np.load(path)

    def _supports(self):
        """Read the texts of both sides in the order of choice."""
        stage = self.stage
        written = stage.results if self.units.name else stage.inputs
        path = written.find("decomposition", **self.units.names, **stage.names)
        found = {"writes": load_support(path.with_suffix(".npz"))}
        path = stage.path("fires_on", stage.train, **self.units.names)
        return {**found, "fires_on": load_support(path.with_suffix(".npz"))}

    def _fit(self, side, atoms, targets, n):
        """Return the support [n, S], and the coefficients and shares of `omp.nested_fits`."""
        atoms, targets = (x.to(self.stage.args.device) for x in (atoms, targets[n]))
        if self.supports is None:
            support, _ = omp.orthogonal_matching_pursuit(atoms, targets, self.stage.args.components)
        else:
            support = torch.from_numpy(self.supports[side][n]).to(atoms.device)
        return support, *omp.nested_fits(support, atoms, targets, self.lengths)

    def grades(self, n):
        """Return the grades of a slice of the units, [n, slots]."""
        effects = columns(self.stage.path("projections", self.stage.held_out, **self.units.names), n)
        support, coefficients, _ = self._fit("fires_on", self.judge.atoms, self.targets, n)
        directions = self.judge.directions(support.cpu(), coefficients.cpu())
        found = list(self._predicted(directions, effects))
        if not self.stage.truth:
            _, _, shares = self._fit("writes", self.atoms, self.units.statistics.pcas, n)
            found.append(shares.cpu())
            label = self.judge.vectors[torch.from_numpy(self.labels[n]).long()]
            found += self._predicted(label[None].float(), effects)
        return torch.cat(found).T.float()

    def _predicted(self, directions, effects):
        """Return correlations and average precisions, [lengths, n] each. directions: [lengths, n, F]."""
        share = self.stage.share
        each = [grading.grades(self.stage.features, of[None], effects, share) for of in directions]
        return (torch.cat([grades[measure] for grades in each]) for measure in ("pearson", "auprc"))


def load_compared(results, expected=(), **names):
    """Read what `compare` has written of a layer: {(side, measure): Compared}, and whether it has controls.

    Parameters and errors: as in `Results.load`.
    """
    values = results.load("controls", expected=expected, **names)
    path = results.find("controls", **names)
    slots = load_record(path).get("slots", [])
    if not are_slots(slots) or len(slots) != values.shape[2] or not len(values):
        again = f"make it again with: {results.command('controls', **names)} --overwrite"
        raise UserError(f"{path} does not have the columns that its record says; {again}")
    return compared_of(values, slots)


def are_slots(slots):
    """Return whether the value of a record is a list as `slots_of` makes it."""
    return isinstance(slots, list) and all(
        isinstance(slot, list) and [type(part) for part in slot] == [str, str, int] and slot[2] > 0
        for slot in slots
    )


# results


class LayerResults(NamedTuple):
    """LayerResults are what the evaluation of a layer has found."""

    graded: Graded  # of the neurons
    compared: dict  # {(side, measure): Compared}; without control dictionaries where --controls is 0
    rotated: Graded | None  # of the rotated units
    rotated_compared: dict
    deleted: tuple | None = None  # `utils.deletion.Deleted`, where neurons were taken away

    def only(self, kept):
        """Return the results of some units. kept: bool [N]; deleted units are among them."""
        if kept.all():
            return self
        compared = {side: of.only(kept) for side, of in self.compared.items()}
        graded = Graded(self.graded.values[kept], self.graded.rows)
        return self._replace(graded=graded, compared=compared)
