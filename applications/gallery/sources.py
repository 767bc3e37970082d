"""Read the results that the gallery shows, and plan its passes over the images of both splits."""

from typing import NamedTuple

import numpy as np
import torch

from applications.gallery.collect import ACTIVE, CONCEPTS, IMAGE_WORDS, TOP_PICTURES, Pairs, top_rows
from utils.concepts import FORMS
from utils.data.images import train_set_of
from utils.deletion import load_deleted
from utils.descriptions import load_support
from utils.evaluation import Inputs, LayerResults, digest_of_sides, load_compared, load_grades
from utils.reports import judged_by
from utils.runtime.errors import UserError
from utils.runtime.files import digest
from utils.runtime.records import complete, load_record
from utils.runtime.results import Arrays
from utils.statistics import load_classifier
from utils.units import groups_of


class Classes(NamedTuple):
    """Classes are the classes that images can have.

    Images without classes have the label -1.
    """

    classifier: np.ndarray | None  # zero-shot, [D, classes]
    names: list
    labels: dict  # {split: the class of every image, a place in `names`}


class Sources(Inputs):
    """Sources are the results that the gallery shows, and the plan of its passes.

    args, inputs: as in `Inputs`.
    parts: the folder of the arrays that the passes write.

    Attributes, besides those of `Inputs`
    size: side of the small pictures; None without pictures.
    groups: lists of layers that share one pass over the images.
    text_ids: {text: its index in the text set}, of equal texts the first.
    classes: `Classes`.
    found: {layer: LayerResults}, what evaluate_descriptions.py has found.
    pairs: {(layer, split): Pairs}.
    record: everything that the gallery is made of.

    Raises UserError as `Inputs` does.
    """

    def __init__(self, args, inputs, parts):
        super().__init__(args, inputs)
        self.any_units = inputs
        self.parts = parts
        self.size = None if args.no_pictures else args.picture_size
        self.groups = groups_of(self.clip, self.layers, args.memory * 1e9)
        self.text_ids = {text: i for i, text in reversed(list(enumerate(self.texts)))}
        self.classes = self._find_classes()
        self.found = {}
        self.pairs = {}
        self.record = self._record()

    def _find_classes(self):
        """Find the `Classes`: those of the zero-shot classifier, or without one all class folders."""
        dataset = train_set_of(self.args.dataset)
        path = self.inputs.find("classifier", dataset=dataset)
        images = {split: of.images for split, of in self.splits.items()}
        unsorted = not self.train.images.folders
        if unsorted:
            labels = {split: of.labels.tolist() for split, of in images.items()}
            if not path.is_file():
                return Classes(None, [], labels)
            classifier = self.inputs.load("classifier", dataset=dataset)
            return Classes(classifier, load_record(path)["class_names"], labels)
        if path.is_file():
            found = {split: load_classifier(self.inputs, of) for split, of in images.items()}
            labels = {split: of_images.tolist() for split, (_, of_images) in found.items()}
            classifier, _ = found["train"]
            names = load_record(path).get("class_names", self.train.images.class_names)
            return Classes(classifier.cpu().numpy(), names, labels)
        names = {}
        for of in images.values():
            names |= dict(zip(of.folders, of.class_names, strict=True))
        place = {folder: i for i, folder in enumerate(names)}
        labels = {split: [place[of.folders[i]] for i in of.labels] for split, of in images.items()}
        return Classes(None, list(names.values()), labels)

    def _record(self):
        """Look at all results, and return everything that the gallery is made of."""
        record = {**self.clip.record, **self.clip.units_record, **self.names, "layers": self.layers}
        record["coefficient"] = self.args.coefficient
        record = complete(record)
        record["size"] = self.size
        record["images"] = {split: of.record["data"] for split, of in self.splits.items()}
        classifier = self.classes.classifier
        record["classes"] = digest() if classifier is None else digest(classifier)
        record["results"] = {str(layer): self._look_at(layer) for layer in self.layers}
        return record

    def _look_at(self, layer):
        """Load a layer's grades, and find its top images. The other results are checked, and let go.

        Returns their digests.
        """
        statistics = self.statistics[layer].digest()
        sides = self.sides(self.neurons(layer), self.inputs)
        described = digest_of_sides(sides)
        found = self.found[layer] = self._load_results(layer, statistics, described)
        looked_at = [found.graded.values, self.explained(layer), self.norms(layer)]
        looked_at.append(self.deletions(layer))
        if (acts := self.acts(self.neurons(layer))) is not None:
            looked_at.append(acts)
        if found.deleted:
            looked_at += found.deleted.rows.values()
        if found.rotated:
            looked_at.append(found.rotated.values)
        of_deletion = found.deleted.compared if found.deleted else {}
        for of in (*found.compared.values(), *found.rotated_compared.values(), *of_deletion.values()):
            looked_at += [of.texts, of.controls]
        graded = found.only(self.graded(self.neurons(layer))).compared
        for side, descriptions in sides.items():
            compared = judged_by(side, graded)
            if compared and compared.justified() is not None:
                looked_at.append(self.support(side, layer, descriptions))
        for split, of in self.splits.items():
            projections = self.projections(layer, split)
            top = top_rows(projections, min(TOP_PICTURES, len(of)))
            self.pairs[layer, split] = Pairs(top, len(of))
            looked_at.append(digest(projections))
        return [statistics, described, digest(*looked_at)]

    def _load_results(self, layer, statistics, described):
        """Read the `LayerResults` of a layer; older runs have no controls and no rotated units.

        statistics, described: digests of what the grades must be of.
        """
        made_of = {"data": self.held_out.record["data"], "share": self.share}
        of_neurons = {**made_of, "statistics": statistics, "descriptions": described}
        names = self.of(self.held_out, layer=layer)
        graded = load_grades(self.inputs, of_neurons, **names)
        compared = self._load_compared(self.inputs, of_neurons, names)
        deleted = load_deleted(self.inputs, of_neurons, **names)
        # rotated units may be fewer than neurons, and what else they must be of is said here
        made_of |= self.inputs.expected("grades")
        names["units"] = "rotated"
        rotated = None
        if self.inputs.find("grades", **names).is_file():
            rotated = load_grades(self.any_units, made_of, **names)
        of_rotated = self._load_compared(self.any_units, made_of, names)
        return LayerResults(graded, compared, rotated, of_rotated, deleted)

    def _load_compared(self, results, made_of, names):
        """Read grades by number of texts, {(side, measure): Compared}; {} where there are none."""
        there = results.find("controls", **names).is_file()
        return load_compared(results, made_of, **names) if there else {}

    def support(self, side, layer, descriptions):
        """Read the texts of every neuron of a layer in the order of choice, int64 [N, S], -1 for none.

        side: 'writes' or 'fires_on'.
        descriptions: the same texts, as `load_descriptions` returns them.

        Raises UserError where they are not the same.
        """
        kind = "decomposition" if side == "writes" else side
        names = {**self.names, "layer": layer}
        path = self.inputs.find(kind, **names).with_suffix(".npz")
        support = load_support(path)
        described = [sorted(i for i, _, _ in of) for of in descriptions]
        if [sorted(i for i in of if i >= 0) for of in support.tolist()] != described:
            again = f"make both again with: {self.inputs.command(kind, **names)} --overwrite"
            raise UserError(f"{path} is of other texts than the .json beside it; {again}")
        return support

    def deletions(self, layer):
        """Read what taking drawn neurons of a layer away costs, [n, D]; empty where none was."""
        if not self.found[layer].deleted:
            return np.zeros((0, self.clip.vit.D), np.float32)
        names = self.of(self.held_out, layer=layer)
        neurons = self.found[layer].deleted.neurons.tolist()
        made_of = {"data": self.held_out.record["data"], "neurons": neurons}
        return self.inputs.load("deletions", {"drawn": len(neurons)}, made_of, **names)

    def projections(self, layer, split):
        """Read every neuron's effects along its component, [images, N]."""
        of = self.splits[split]
        made_of = {"data": of.record["data"], "statistics": self.statistics[layer].digest()}
        names = self.of(of, layer=layer)
        return self.inputs.load("projections", {"images": len(of)}, made_of, **names)

    def representations(self):
        """Read the representations of the training images, a tensor [images, D]."""
        made_of = {"data": self.train.record["data"]}
        sizes = {"images": len(self.train)}
        return torch.from_numpy(self.inputs.load("representations", sizes, made_of, **self.of(self.train)))

    def norms(self, layer):
        """Read the mean norm of every neuron's largest effects, [N]."""
        return self.inputs.load("norm", layer=layer, **self.names).mean(axis=1)

    def part(self, split, *words):
        """Return the path of an array that a pass writes."""
        return self.parts / f"{'_'.join(map(str, (split, *words)))}.npy"

    def paths(self, split, layer):
        """Return {name: path} of the arrays of a layer that the pass over a split writes."""
        return {name: self.part(split, layer, name) for name in self._specs(split, layer)}

    def concepts(self, layer, split):
        """Read the arrays of `Collector.concepts` of all images, {name: array}."""
        return {name: np.load(self.part(split, layer, name)) for name in CONCEPTS}

    def _specs(self, split, layer):
        """Return {name: (shape, dtype)} of the arrays of a layer."""
        vit = self.clip.vit
        count = len(self.splits[split])
        rows, columns = vit.grid
        specs = {
            "maps": ((len(self.pairs[layer, split].neurons), rows * columns), "float32"),
            "neurons": ((count, ACTIVE), "int32"),
            "norms": ((count, ACTIVE), "float32"),
            "words": ((count, len(FORMS), IMAGE_WORDS), "int32"),
            "scores": ((count, len(FORMS), IMAGE_WORDS), "float32"),
        }
        if split == "train":
            sizes = self.inputs.sizes(layer)
            specs["heads"] = ((sizes["K"], sizes["N"]), "float32")
        return specs

    def plan(self, split, layers):
        """Plan the pass over a split.

        Returns
        arrays: `Arrays`.
        record: everything that all of them are made from.
        alone: {path: record} of what some of them are made from besides.
        state: {name of an array: (shape, dtype)} of sums over the training images, for the shares of heads.
        """
        of = self.splits[split]
        arrays = Arrays()
        arrays.settings = {"layers": layers}
        alone = {}
        state = {}
        if self.size:
            arrays[self.part(split, "pictures")] = ((len(of), self.size, self.size, 3), "uint8")
        for layer in layers:
            pairs = self.pairs[layer, split]
            made_of = {"results": self.record["results"][str(layer)]}
            made_of["pairs"] = digest(pairs.images, pairs.neurons)
            for name, spec in self._specs(split, layer).items():
                path = self.part(split, layer, name)
                arrays[path] = spec
                alone[path] = made_of
                if name == "heads":
                    state[path.stem] = (spec[0], "float64")
        record = {**self.clip.record, **self.clip.units_record, **of.record}
        record["coefficient"] = self.args.coefficient
        return arrays, record, alone, state
