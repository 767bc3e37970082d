"""Read the results that the gallery shows, and plan its passes over the images of both splits."""

from typing import NamedTuple

import numpy as np
import torch

from applications.gallery.collect import ACTIVE, CONCEPTS, IMAGE_WORDS, TOP_PICTURES, Pairs, top_rows
from utils.data.images import train_set_of
from utils.evaluation import Inputs, digest_of_sides, load_grades
from utils.norms import groups_of_layers
from utils.runtime.files import digest
from utils.runtime.records import Digest, complete, load_record
from utils.runtime.results import Arrays
from utils.statistics import load_classifier


class Classes(NamedTuple):
    """Classes are the classes of the images of both splits."""

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
    graded: {layer: Graded}.
    pairs: {(layer, split): Pairs}.
    record: everything that the gallery is made of.

    Raises UserError as `Inputs` does.
    """

    def __init__(self, args, inputs, parts):
        super().__init__(args, inputs)
        self.parts = parts
        self.size = None if args.no_pictures else args.picture_size
        self.groups = groups_of_layers(self.clip.vit, self.layers, args.memory * 1e9)
        self.text_ids = {text: i for i, text in reversed(list(enumerate(self.texts)))}
        self.classes = self._find_classes()
        self.graded = {}
        self.pairs = {}
        self.record = self._record()

    def _find_classes(self):
        """Find the `Classes`: those of the zero-shot classifier, or without one all class folders."""
        dataset = train_set_of(self.args.dataset)
        path = self.inputs.find("classifier", dataset=dataset)
        images = {split: of.images for split, of in self.splits.items()}
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
        record = {**self.clip.record, **self.names, "layers": self.layers}
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
        described = digest_of_sides(self.sides(self.neurons(layer), self.inputs))
        made_of = {"data": self.held_out.record["data"], "statistics": statistics}
        made_of |= {"share": self.share, "descriptions": described}
        self.graded[layer] = load_grades(self.inputs, made_of, **self.of(self.held_out, layer=layer))
        looked_at = [self.graded[layer].values, self.explained(layer)]
        for split, of in self.splits.items():
            projections = self.projections(layer, split)
            top = top_rows(projections, min(TOP_PICTURES, len(of)))
            self.pairs[layer, split] = Pairs(top, len(of))
            looked_at.append(digest(projections))
        with_norms = digest(*looked_at, self.norms(layer))  # earlier versions did not look at them
        return [statistics, described, Digest(with_norms, digest(*looked_at))]

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
            "words": ((count, IMAGE_WORDS), "int32"),
            "scores": ((count, IMAGE_WORDS), "float32"),
        }
        if split == "train":
            specs["heads"] = ((vit.K(layer), vit.N), "float32")
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
        record = {**self.clip.record, **of.record, "coefficient": self.args.coefficient}
        return arrays, record, alone, state
