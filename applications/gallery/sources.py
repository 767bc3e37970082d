"""What the gallery is made of: the results of the stages, and the images of both splits."""

import numpy as np
import torch

from applications.gallery.collect import ACTIVE, TOP, WORDS, Pairs, top_rows
from utils.data.images import train_set_of
from utils.evaluation import Inputs, digest_of_sides, load_grades
from utils.runtime.files import digest
from utils.runtime.records import Digest, complete, load_record
from utils.statistics import load_classifier


class Sources(Inputs):
    """The results that the gallery shows. args, inputs, and what is raised: as in `Inputs`.

    Attributes, besides those: text_ids {text: its place in the pool}; graded {layer: `Graded`}; splits
    {split: Images}; pairs {(layer, split): Pairs}; classifier [D, classes] or None, class_names, labels
    {split: [images]}, their places; size of the pictures, None without; record, what the gallery is made of.
    """

    def __init__(self, args, inputs):
        super().__init__(args, inputs)
        self.size = None if args.no_pictures else args.picture_size
        self.text_ids = {
            text: i for i, text in reversed(list(enumerate(self.texts)))
        }  # of equal texts the first
        self.splits = {"train": self.images, args.split: self.held_out}
        self._find_classes()
        self.graded, self.pairs = {}, {}
        self.record = complete(
            {**self.clip.record, **self.names, "layers": self.layers, "coefficient": args.coefficient}
        )
        self.record |= {
            "size": self.size,
            "images": {split: of.record["data"] for split, of in self.splits.items()},
        }
        self.record["classes"] = digest(*([] if self.classifier is None else [self.classifier]))
        self.record["results"] = {str(layer): self._look_at(layer) for layer in self.layers}

    def _look_at(self, layer):
        """Load a layer's grades and find its top images; what else it has is checked, and let go. Returns its
        digest.
        """
        of, described = self.statistics[layer], digest_of_sides(self.sides(layer, self.inputs))
        expected = {**self.of_images(self.held_out), "statistics": of.digest()}
        expected |= {"share": self.share, "descriptions": described}
        names, found = {"layer": layer, **self.held_out_names}, [self.explained(layer)]
        self.graded[layer] = load_grades(self.inputs, {"N": self.clip.vit.N}, expected, **names)
        for split, images in self.splits.items():
            projections = self.projections(layer, split)
            self.pairs[layer, split] = Pairs(top_rows(projections, min(TOP, len(images))), len(images))
            found.append(np.frombuffer(bytes.fromhex(digest(projections)), np.uint8))
        looked_at = [self.graded[layer].values, *found]
        more = digest(*looked_at, self.numbers(layer)["norm"])  # earlier versions did not look at the norms
        return [of.digest(), described, Digest(more, digest(*looked_at))]

    def _find_classes(self):
        """Labels are places of classes in the zero-shot classifier where there is one, else in all folders of
        both splits.
        """
        dataset, self.classifier = train_set_of(self.args.dataset), None
        path = self.inputs.find("classifier", dataset=dataset)
        if path.is_file():
            found = {
                split: load_classifier(self.inputs, self.clip, images)
                for split, images in self.splits.items()
            }
            self.labels = {split: labels.tolist() for split, (_, labels) in found.items()}
            self.classifier = found["train"][0].cpu().numpy()
            self.class_names = load_record(path).get("class_names", self.images.class_names)
        else:
            names = {}
            for images in self.splits.values():
                names |= dict(zip(images.folders, images.class_names, strict=True))
            place, self.class_names = {folder: i for i, folder in enumerate(names)}, list(names.values())
            self.labels = {
                split: [place[of.folders[i]] for i in of.labels] for split, of in self.splits.items()
            }

    def of_images(self, images):
        """What records of results about some `Images` must say."""
        return {**self.expected, **self.clip.expected, "data": images.record["data"]}

    def projections(self, layer, split):
        """Every neuron's effects along its component, [images, N]."""
        images, names = self.splits[split], self.held_out_names if split != "train" else self.names
        expected = {**self.of_images(images), "statistics": self.statistics[layer].digest()}
        return self.inputs.load(
            "projections", {"images": len(images), "N": self.clip.vit.N}, expected, layer=layer, **names
        )

    @property
    def representations(self):
        """Of the training images, as evaluate_descriptions.py left them: a tensor [images, D]."""
        sizes = {"images": len(self.images), "D": self.clip.vit.D}
        return torch.from_numpy(
            self.inputs.load("representations", sizes, self.of_images(self.images), **self.names)
        )

    def numbers(self, layer):
        """Of every neuron: share explained, mean norm of its largest effects."""
        norms = self.inputs.load("norm", self.clip.vit.sizes, self.expected, layer=layer, **self.names)
        return {"explained": self.explained(layer), "norm": norms.mean(axis=1)}

    def of_layer(self, layer, split):
        """What a `Collector` takes besides the directions."""
        writes = self.load_descriptions(self.inputs, layer)
        return self.statistics[layer], writes, self.text_ids, self.pairs[layer, split]

    def arrays(self, parts, split, layers):
        """The arrays of the pass over a split, its state, and its record. parts: the folder of the arrays.
        Shares of the heads are those of the training images."""
        vit, count, arrays, state = self.clip.vit, len(self.splits[split]), {}, {}
        rows, columns = vit.grid
        if self.size:
            arrays[parts / f"{split}_pictures.npy"] = ((count, self.size, self.size, 3), "uint8")
        for layer in layers:
            of, K = self.pairs[layer, split], vit.K(layer)
            made_of = {"results": self.record["results"][str(layer)], "pairs": digest(of.images, of.neurons)}
            shapes = {
                "maps": (len(of.neurons), rows * columns),
                "neurons": (count, ACTIVE),
                "norms": (count, ACTIVE),
            }
            shapes |= {"words": (count, WORDS), "scores": (count, WORDS)}
            if split == "train":
                shapes["heads"], state[f"heads{layer}"] = (K, vit.N), ((K, vit.N), "float64")
            for name, shape in shapes.items():
                dtype = "int32" if name in ("neurons", "words") else "float32"
                arrays[parts / f"{split}_{layer}_{name}.npy"] = (shape, dtype, made_of)
        return (
            arrays,
            state,
            {**self.clip.record, **self.splits[split].record, "coefficient": self.args.coefficient},
        )
