"""What the items of the paper share: a model, images, the stages that they need, and where their files lie."""

import functools
import json
import os
import runpy
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils.ablation import load_classifier, load_statistics
from utils.clip import load_clip
from utils.datasets import Loader, load_images, train_set_of
from utils.paper import measures
from utils.runtime import flags
from utils.runtime.errors import UserError
from utils.runtime.files import ROOT, text_set
from utils.runtime.layers import parse_layers
from utils.runtime.passes import Pass

CHANCE = "chance"


class Row(NamedTuple):
    """A number of a table or figure. beside: a chance level or baseline, in words. n: images or neurons behind it."""

    what: str
    ours: float | None
    paper: float | None = None
    unit: str = "%"
    beside: str = ""
    n: int | None = None
    note: str = ""


def here(path):
    """A path as one types it in the working directory."""
    return str(path).removeprefix(f"{os.getcwd()}{os.sep}")


class Paper:
    """One run of `reproduce_paper.py`.

    args: its flags.

    Attributes: folder, where pictures and tables lie; inputs, results: `Results`; commands: the stages of the current item.
    """

    def __init__(self, args):
        self.args, self.dataset, self.train_set = args, args.dataset, train_set_of(args.dataset)
        known = {"data_path": args.data_path, "split": args.split, "descriptions_dir": args.descriptions_dir}
        self.inputs, self.results = flags.results_of(args, **known)
        self.folder = Path(args.output_dir) / f"paper_{self.results.clip}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.texts, self.commands, self._ran = [text_set(name) for name in args.text_descriptions], [], set()
        self.attack_texts = text_set(args.attack_texts or args.text_descriptions[0])
        self.wanted = []  # how far the components have to reach: "one", "late", "all"
        self.pools = {text_set(name): name for name in (args.attack_texts or args.text_descriptions[0], *args.text_descriptions)}

    @functools.cached_property
    def clip(self):
        return load_clip(self.args.model, self.args.pretrained, self.args.device, precision=self.args.precision)

    @functools.cached_property
    def layer(self):
        """The layer of Tables 1, 2 and Fig. 4."""
        return parse_layers([self.args.mlp_layer], self.clip.vit)[0]

    @functools.cached_property
    def late(self):
        """The layers of the applications."""
        return parse_layers(self.args.mlp_layers, self.clip.vit)

    @functools.cached_property
    def all_layers(self):
        return parse_layers(["all"], self.clip.vit)

    @functools.cached_property
    def needed(self):
        """The layers whose components the items need, all of which are made in one pass."""
        layers = {"one": [self.layer], "late": self.late, "all": self.all_layers}
        return sorted({layer for reach in self.wanted or ["one"] for layer in layers[reach]})

    # Stages

    def stage(self, script, *words):
        """Run a stage in this process, as one types it, unless this run has done so before. Raises UserError when it fails."""
        args = self.args
        shared = [
            "--model",
            args.model,
            "--pretrained",
            args.pretrained,
            "--output_dir",
            args.output_dir,
            "--device",
            args.device,
        ]
        command = [script, *map(str, [*words, *shared])]
        readable = shlex.join(["python", *map(here, command)])
        if readable not in self.commands:
            self.commands.append(readable)
        if readable in self._ran:
            return
        print(f"\n$ {readable}", flush=True)
        before, sys.argv = sys.argv, command
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as leaving:
            if leaving.code:
                raise UserError(f"{script}: {str(leaving.code).removeprefix('error: ')}") from leaving
        finally:
            sys.argv = before
        self._ran.add(readable)

    def image_flags(self, split=None, dataset=None, data_path=None):
        """The flags of a data set, as the stages take them."""
        args = self.args
        path = data_path or args.data_path
        if not path:
            raise UserError("it needs images: --data_path")
        words = ["--dataset", dataset or self.dataset, "--data_path", path, "--num_workers", args.num_workers]
        words += ["--batch_size", args.batch_size, "--precision", args.precision]
        words += ["--subsample", args.subsample] if args.subsample else []
        return words + (["--split", split] if split else [])

    def classifier(self):
        """Make the zero-shot classifier."""
        images = ["--data_path", self.args.data_path] if self.dataset not in ("imagenet", "imagenet_r") else []
        names = ["--class_names", self.args.class_names] if self.args.class_names else []
        self.stage("compute_classifier_projection.py", "--dataset", self.dataset, *images, *names)

    def components(self):
        """Make the effects, components and statistics of the needed layers on the train split."""
        words, k = ["--mlp_layer", *self.needed], ["--top_k_pca", self.args.top_k_pca]
        passing = [*self.image_flags("train"), *words, "--memory", self.args.memory]
        self.stage("compute_second_order_neuron_prs.py", *passing, "--keep", "top", *k)
        self.stage("compute_pcas.py", "--dataset", self.train_set, *words, *k)

    def descriptions(self, texts, layers, components=None):
        """Make the text vectors of a set and the descriptions of some layers."""
        self.components()
        where, k = ["--descriptions_dir", self.args.descriptions_dir], ["--top_k_pca", self.args.top_k_pca]
        given = self.pools[texts]
        self.stage("compute_text_set_projection.py", "--text_descriptions", given, *where)
        words = ["--dataset", self.dataset, "--mlp_layer", *layers, "--text_descriptions", given, *where, *k]
        self.stage("compute_sparse_decomposition.py", *words, "--components", components or self.args.components)

    def names(self, **more):
        """What is in the names of results of the train split."""
        return {"dataset": self.train_set, "k": self.args.top_k_pca, **more}

    def described(self, texts):
        return {"texts": texts, "components": self.args.components, "alpha": 1}

    @property
    def class_names(self):
        return self.images(self.args.split).images.class_names

    # Images and arrays

    @functools.lru_cache  # noqa: B019  one of them lives
    def images(self, split, count=None):
        """`measures.Images` of a split: all, or `count` drawn ones."""
        args = self.args
        self.image_flags()
        dataset = self.train_set if split == "train" else self.dataset
        images = load_images(dataset, args.data_path, split, self.clip.transform, subsample=args.subsample)
        name = f"{dataset}_{split}"
        if count is not None:
            chosen = measures.drawn(len(images), count)
            images.samples, name = [images.samples[i] for i in chosen], f"{name}_{len(chosen)}"
        return measures.Images(images, Loader(images, args.device, args.num_workers), args.batch_size, name)

    @functools.cached_property
    def averages(self):
        """Mean activations and first-order parts over the train split."""
        return measures.means(self.clip, self.images("train"), self.folder, self.args.overwrite)

    @functools.cached_property
    def judged(self):
        """The classifier, and the labels of the val images as its columns."""
        self.classifier()
        return load_classifier(self.inputs, self.clip, self.images(self.args.split).images)

    @functools.cached_property
    def first_order(self):
        """{name: accuracy in per cent} without first-order parts, and without the indirect effects of the layer."""
        classifier, labels = self.judged
        data = self.images(self.args.split)
        found = measures.first_order_ablations(self.clip, data, self.folder, self.averages, [self.layer], classifier)
        return {name: 100 * float((classes == labels).mean()) for name, classes in found.items()}

    @functools.lru_cache  # noqa: B019
    def drawn(self, layer):
        """`measures.drawn_effects` of a layer: the neurons, and [images, 4, n, D]."""
        neurons = measures.drawn(self.clip.vit.N, self.args.drawn_neurons, layer)
        data = self.images("train", self.args.drawn_images)
        return neurons, measures.drawn_effects(self.clip, data, self.folder, layer, self.averages[0][layer], neurons)

    def statistics(self, layers):
        wanted = {"clip": self.clip, "coefficient": measures.COEFFICIENT}
        return load_statistics(self.inputs, self.train_set, layers, self.args.top_k_pca, **wanted)

    def accuracies(self, layers, dataset=None, data_path=None):
        """{layer: {ablation: per cent}} of compute_ablations.py, the number of images, and its picture."""
        self.classifier()
        self.components()
        dataset, layers = dataset or self.dataset, self.all_layers if "all" in self.wanted else layers
        words = [*self.image_flags(self.args.split, dataset, data_path), "--mlp_layer", *layers, "--memory", self.args.memory]
        self.stage("compute_ablations.py", *words, "--top_k_pca", self.args.top_k_pca)
        path = self.results.path(
            "ablations", split=self.args.split, layer=layers, dataset=dataset, train_dataset=self.train_set, k=self.args.top_k_pca
        )
        content = json.loads(path.read_text())
        return {int(layer): row for layer, row in content["accuracy"].items()}, content["images"], path.with_suffix(".png")

    @torch.inference_mode()
    def predictions(self, name, layer, vectors, made_of):
        """Predicted classes of the val images with effects projected on several sets of vectors: [images, V].

        name: of the file. vectors: list of [N, D]. made_of: what they are made from.
        """
        from utils.ablation import classify
        from utils.prs import fold

        (classifier, labels), data, statistics = self.judged, self.images(self.args.split), self.statistics([layer])[layer]
        path = self.folder / f"{data.name}_{layer}_{name}.npy"
        arrays = {path: ((len(data.images), 1, len(vectors)), "int32")}
        record = {**self.clip.record, **data.images.record, "statistics": statistics.digest(), **made_of}
        with Pass(arrays, record, data.pieces, {"batch_size": data.batch_size}, overwrite=self.args.overwrite) as work:
            many = None if work.finished else measures.ManyRebuilt(fold(self.clip.vit, layer), statistics.mean, vectors)
            for rows, pixels in work.over(data.loader):
                work[path][rows] = classify(self.clip.vit, pixels, [many], classifier, coefficient=measures.COEFFICIENT)
        return np.load(path)[:, 0], labels

    def picture(self, name):
        """Path of a picture of the page."""
        return self.folder / f"{name}.png"

    def disk(self):
        """Bytes of the components, about."""
        vit, k, images = self.clip.vit, self.args.top_k_pca, len(self.images("train").images)
        each = (k * vit.K(l) + 4 * vit.D + k + images + vit.K(l) * vit.d // vit.H for l in self.needed)
        return sum(4 * vit.N * numbers for numbers in each)

    @functools.cached_property
    def seconds_of_an_image(self):
        """Of a forward pass, from two batches of noise."""
        vit, batch = self.clip.vit, self.args.batch_size
        noise = torch.randn(batch, 3, *vit.visual.image_size, device=self.clip.device)
        with torch.inference_mode():
            vit(noise).sum().item()
            start = time.perf_counter()
            vit(noise).sum().item()
        return (time.perf_counter() - start) / batch
