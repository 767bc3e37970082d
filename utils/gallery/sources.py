"""What the gallery is made of: the results of the stages, and the images of both splits."""

from functools import partial

import numpy as np
import torch

from utils.ablation import load_statistics
from utils.clip import load_clip
from utils.datasets import load_images, train_set_of
from utils.descriptions import load_grades
from utils.gallery.collect import ACTIVE, TOP, WORDS, Pairs, top_rows
from utils.runtime.errors import UserError
from utils.runtime.files import digest
from utils.runtime.layers import parse_layers
from utils.runtime.results import load_record
from utils.sparse_coding import load_descriptions, load_texts


class Sources:
    """The results that the gallery shows.

    args: flags of make_gallery.py. results: `Results` of the folder.

    Attributes: clip, layers, texts; statistics {layer: Statistics}; sides {layer: {side: descriptions}}; graded {layer: `Graded`};
    images {split: Images}; classifier [D, classes] or None; size, of the pictures, None without.

    Raises UserError, with the command, for what is missing or does not belong together.
    """

    def __init__(self, args, results):
        if args.split == "train":
            raise UserError("--split train is shown anyway; give the split of the held-out images, such as val")
        self.args, self.results, self.size = args, results, None if args.no_pictures else args.picture_size
        load, dataset = partial(load_clip, args.model, args.pretrained, args.device), train_set_of(args.dataset)
        self.texts, _, _ = load_texts(results, args.text_descriptions, args.descriptions_dir, load)
        self.text_ids = {text: i for i, text in reversed(list(enumerate(self.texts)))}  # of equal texts the first
        self.clip = load(precision=args.precision, image_only=True)
        self.layers = parse_layers(args.mlp_layer, self.clip.vit)
        self.names = {"dataset": dataset, "k": args.top_k_pca, "texts": args.text_descriptions, "components": args.components}
        self.names |= {"alpha": args.transform_alpha, "normalise": args.normalise}
        self.expected = {"fingerprint": self.clip.fingerprint, "coefficient": args.coefficient}
        self.statistics = load_statistics(results, dataset, self.layers, args.top_k_pca, self.clip, args.coefficient)
        self.sides = {layer: self._load_sides(layer) for layer in self.layers}
        where = args.data_path
        if dataset != args.dataset:  # ImageNet-R has no training images; ImageNet's are where its components' were
            where = load_record(results.find("pca", layer=self.layers[0], **self.names)).get("data_path", where)
        train = load_images(dataset, where, "train", self.clip.transform, subsample=args.train_subsample)
        held_out = load_images(args.dataset, args.data_path, args.split, self.clip.transform, subsample=args.subsample)
        self.images = {"train": train, args.split: held_out}
        self.pairs = {(layer, split): self._pairs(layer, split) for layer in self.layers for split in self.images}
        self.graded = {
            layer: load_grades(results, {"N": self.clip.vit.N}, self.expected, **self._held_out(layer)) for layer in self.layers
        }
        self.classifier, self.class_names = None, held_out.class_names
        if results.find("classifier", dataset=dataset).is_file():
            self.classifier = results.load(
                "classifier", self.clip.vit.sizes, {"fingerprint": self.clip.fingerprint}, dataset=dataset
            )
            self.class_names = load_record(results.find("classifier", dataset=dataset)).get("class_names", self.class_names)

    def _load_sides(self, layer):
        kinds, sizes = {"writes": "decomposition", "fires_on": "fires_on"}, self.clip.vit.sizes
        expected = {"fingerprint": self.clip.fingerprint}
        load = partial(load_descriptions, self.results, sizes, expected, layer=layer, **self.names)
        return {side: load(kind=kind) for side, kind in kinds.items()}

    def _held_out(self, layer):
        return {**self.names, "dataset": self.args.dataset, "split": self.args.split, "layer": layer}

    def projections(self, layer, split):
        """Every neuron's effects along its component, [images, N]."""
        images, names = self.images[split], self._held_out(layer) if split != "train" else {**self.names, "layer": layer}
        expected = self.expected | {"data": images.record["data"], "statistics": self.statistics[layer].digest()}
        return self.results.load("projections", {"images": len(images), "N": self.clip.vit.N}, expected, **names)

    def _pairs(self, layer, split):
        return Pairs(top_rows(self.projections(layer, split), min(TOP, len(self.images[split]))), len(self.images[split]))

    def numbers(self, layer):
        """Of every neuron of a layer: share explained, mean norm of its largest effects, threshold; and the share of the images."""
        sizes, norms = (
            self.clip.vit.sizes,
            self.results.load("norm", self.clip.vit.sizes, self.expected, layer=layer, **self.names),
        )
        explained = self.results.load("explained", sizes, self.expected, layer=layer, **self.names)
        share = self.args.top_k_pca / len(self.images["train"])
        return {"explained": explained, "norm": norms.mean(axis=1), "threshold": norms[:, 0], "share": round(share, 4)}

    def labels(self, images):
        """The labels of some images, places of their classes among `class_names`."""
        place = {name: i for i, name in enumerate(self.class_names)}
        return [place.get(images.class_names[label], -1) for label in images.labels]

    def of_layer(self, layer, split):
        """What a `Collector` takes besides the directions."""
        return self.statistics[layer], self.sides[layer]["writes"], self.text_ids, self.pairs[layer, split]

    def arrays(self, parts, split, layers):
        """The arrays of the pass over a split, its state, and its record. parts: the folder of the arrays."""
        vit, count, arrays, state = self.clip.vit, len(self.images[split]), {}, {}
        rows, columns = vit.grid
        if self.size:
            arrays[parts / f"{split}_pictures.npy"] = ((count, self.size, self.size, 3), "uint8")
        for layer in layers:
            of, K = self.pairs[layer, split], vit.K(layer)
            made_of = {"statistics": self.statistics[layer].digest(), "pairs": digest(of.images, of.neurons)}
            made_of |= {"texts": digest(*(np.array([i for i, _, _ in texts]) for texts in self.sides[layer]["writes"]))}
            shapes = {
                "maps": (len(of.neurons), rows * columns),
                "norms": (count, ACTIVE),
                "scores": (count, WORDS),
                "heads": (K, vit.N),
            }
            shapes |= {"neurons": (count, ACTIVE), "words": (count, WORDS)}
            for name, shape in shapes.items():
                dtype = "int32" if name in ("neurons", "words") else "float32"
                arrays[parts / f"{split}_{layer}_{name}.npy"] = (shape, dtype, made_of)
            state[f"heads{layer}"] = ((K, vit.N), "float64")
        return arrays, state, {**self.clip.record, **self.images[split].record, "coefficient": self.args.coefficient}
