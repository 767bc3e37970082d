"""What the gallery is made of: the results of the stages, and the images of both splits."""

from functools import cached_property

import numpy as np
import torch

from utils.ablation import load_classifier
from utils.datasets import train_set_of
from utils.descriptions import Inputs, load_grades
from utils.gallery.collect import ACTIVE, TOP, WORDS, Pairs, top_rows
from utils.runtime.files import digest
from utils.runtime.results import complete, load_record


class Sources(Inputs):
    """The results that the gallery shows. args, inputs, and what is raised: as in `Inputs`.

    Attributes, besides those: text_ids {text: its place in the pool}; sides {layer: {side: descriptions}}; graded {layer:
    `Graded`}; splits {split: Images}; pairs {(layer, split): Pairs}; classifier [D, classes] or None, class_names, labels
    {split: [images]}, their places; size of the pictures, None without.
    """

    def __init__(self, args, inputs):
        super().__init__(args, inputs)
        self.size = None if args.no_pictures else args.picture_size
        self.text_ids = {text: i for i, text in reversed(list(enumerate(self.texts)))}  # of equal texts the first
        kinds = {"writes": "decomposition", "fires_on": "fires_on"}
        self.sides = {
            layer: {side: self.load_descriptions(inputs, layer, kind) for side, kind in kinds.items()} for layer in self.layers
        }
        self.splits = {"train": self.images, args.split: self.held_out}
        self.pairs = {(layer, split): self._pairs(layer, split) for layer in self.layers for split in self.splits}
        sizes, names = {"N": self.clip.vit.N}, self.held_out_names
        self.graded = {layer: load_grades(inputs, sizes, self.expected, layer=layer, **names) for layer in self.layers}
        self._find_classes()

    def _find_classes(self):
        """Labels are places of classes in the zero-shot classifier where there is one, else in all folders of both splits."""
        dataset, self.classifier = train_set_of(self.args.dataset), None
        path = self.inputs.find("classifier", dataset=dataset)
        if path.is_file():
            found = {split: load_classifier(self.inputs, self.clip, images) for split, images in self.splits.items()}
            self.labels = {split: labels.tolist() for split, (_, labels) in found.items()}
            self.classifier = found["train"][0].cpu().numpy()
            self.class_names = load_record(path).get("class_names", self.images.class_names)
        else:
            names = {}
            for images in self.splits.values():
                names |= dict(zip(images.folders, images.class_names, strict=True))
            place, self.class_names = {folder: i for i, folder in enumerate(names)}, list(names.values())
            self.labels = {split: [place[of.folders[i]] for i in of.labels] for split, of in self.splits.items()}

    def projections(self, layer, split):
        """Every neuron's effects along its component, [images, N]."""
        images, names = self.splits[split], self.held_out_names if split != "train" else self.names
        expected = self.expected | {"data": images.record["data"], "statistics": self.statistics[layer].digest()}
        return self.inputs.load("projections", {"images": len(images), "N": self.clip.vit.N}, expected, layer=layer, **names)

    def _pairs(self, layer, split):
        return Pairs(top_rows(self.projections(layer, split), min(TOP, len(self.splits[split]))), len(self.splits[split]))

    @property
    def representations(self):
        """Of the training images, as evaluate_descriptions.py left them: a tensor [images, D]."""
        sizes, expected = (
            {"images": len(self.images), "D": self.clip.vit.D},
            {**self.expected, "data": self.images.record["data"]},
        )
        return torch.from_numpy(self.inputs.load("representations", sizes, expected, **self.names))

    def numbers(self, layer):
        """Of every neuron: share explained, mean norm of its largest effects, threshold; and the share of images it acts on."""
        norms = self.inputs.load("norm", self.clip.vit.sizes, self.expected, layer=layer, **self.names)
        numbers = {"explained": self.explained(layer), "norm": norms.mean(axis=1), "threshold": norms[:, 0]}
        return numbers | {"share": round(self.share, 4)}

    @cached_property
    def record(self):
        """What the gallery is made of."""
        arrays = [self.classifier] if self.classifier is not None else []
        for layer in self.layers:
            arrays += [self.graded[layer].values, self.explained(layer), *map(_as_array, self.sides[layer].values())]
            arrays += [self.projections(layer, split) for split in self.splits]
        statistics = [of.digest() for of in self.statistics.values()]
        images = {split: of.record["data"] for split, of in self.splits.items()}
        shown = {"layers": self.layers, "images": images, "statistics": statistics, "results": digest(*arrays), "size": self.size}
        return complete({**self.clip.record, **self.names, **shown, "coefficient": self.args.coefficient})

    def of_layer(self, layer, split):
        """What a `Collector` takes besides the directions."""
        return self.statistics[layer], self.sides[layer]["writes"], self.text_ids, self.pairs[layer, split]

    def arrays(self, parts, split, layers):
        """The arrays of the pass over a split, its state, and its record. parts: the folder of the arrays."""
        vit, count, arrays, state = self.clip.vit, len(self.splits[split]), {}, {}
        rows, columns = vit.grid
        if self.size:
            arrays[parts / f"{split}_pictures.npy"] = ((count, self.size, self.size, 3), "uint8")
        for layer in layers:
            of, K = self.pairs[layer, split], vit.K(layer)
            made_of = {"statistics": self.statistics[layer].digest(), "pairs": digest(of.images, of.neurons)}
            made_of |= {"texts": digest(_as_array(self.sides[layer]["writes"]))}
            shapes = {"maps": (len(of.neurons), rows * columns), "heads": (K, vit.N)}
            shapes |= {"neurons": (count, ACTIVE), "norms": (count, ACTIVE)}
            shapes |= {"words": (count, WORDS), "scores": (count, WORDS)}
            for name, shape in shapes.items():
                dtype = "int32" if name in ("neurons", "words") else "float32"
                arrays[parts / f"{split}_{layer}_{name}.npy"] = (shape, dtype, made_of)
            state[f"heads{layer}"] = ((K, vit.N), "float64")
        return arrays, state, {**self.clip.record, **self.splits[split].record, "coefficient": self.args.coefficient}


def _as_array(descriptions):
    """(neuron, text, coefficient) of all descriptions."""
    return np.array([(n, i, c) for n, texts in enumerate(descriptions) for i, c, _ in texts])
