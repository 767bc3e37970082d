"""What the items of the paper share: a model, images, the stages that they need, and where their files
lie.
"""

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

from applications.paper import measures
from utils.ablation import classify
from utils.data.images import Loader, load_images, train_set_of
from utils.data.text_sets import text_set
from utils.model.clip import load_clip
from utils.prs import fold
from utils.runtime import flags
from utils.runtime.errors import UserError
from utils.runtime.files import ROOT, digest
from utils.runtime.layers import parse_layers
from utils.runtime.passes import Pass
from utils.runtime.results import Results
from utils.statistics import load_classifier, load_statistics

TASKS = ("horse:automobile", "dog:deer", "bird:frog", "ship:truck", "ship:automobile")  # of Table 3


class Row(NamedTuple):
    """A number of a table or figure. beside: a chance level or baseline, in words. n: images or neurons
    behind it.
    """

    what: str
    ours: float | None
    paper: float | None = None
    unit: str = "%"
    beside: str = ""
    n: int | None = None
    note: str = ""


def add_flags(parser):
    """The flags of reproduce_paper.py."""
    flags.add_data(parser, required=False)
    add = parser.add_argument_group("more data").add_argument
    add(
        "--class_names",
        help="a text file with one class name a line (--dataset folder), as in compute_classifier_projection.py",
    )
    add("--imagenet_r", help="ImageNet-R's root folder (Fig. 10)")
    add("--segmentation", help="gtsegs_ijcv.mat (Table 4, Fig. 7)")
    add("--class_source", help="the class of each of its images, as in compute_segmentation.py")
    add("--images", type=Path, help="a folder of pictures whose concepts are wanted (Fig. 8)")
    add = parser.add_argument_group("method").add_argument
    add("--mlp_layer", default="9", help="the layer of Tables 1 and 2 and Figs. 4, 5 and 8")
    add(
        "--mlp_layers",
        nargs="+",
        default=["8", "9", "10"],
        help="the layers of segmentation and adversarial images",
    )
    flags.add_top_k(parser)
    add("--text_descriptions", nargs="+", default=["30k"], help="pools of texts; the first describes neurons")
    add("--descriptions_dir", default="text_descriptions", help="where they are")
    add("--components", type=flags.positive_int, default=128, help="texts per neuron")
    add(
        "--counts",
        type=flags.positive_int,
        nargs="+",
        default=[4, 8, 16, 32, 64, 128],
        help="numbers of texts in Fig. 4",
    )
    add(
        "--neurons",
        type=int,
        nargs="+",
        help="neurons of Table 2 and Fig. 5; default: those with the largest effects",
    )
    add(
        "--drawn_neurons",
        type=flags.positive_int,
        default=100,
        help="neurons of a layer whose indirect effects are computed",
    )
    add("--drawn_images", type=flags.positive_int, default=500, help="train images on which they are")
    add("--top_neurons", type=flags.positive_int, default=200, help="neurons that segment an image")
    add = parser.add_argument_group("adversarial images").add_argument
    add(
        "--tasks",
        nargs="+",
        default=list(TASKS),
        metavar="DRAWN:SEEN",
        help="what is drawn, and what it should be taken for",
    )
    add("--seeds", type=flags.positive_int, default=3, help="seeds 0, 1, ...")
    add("--attack_texts", help="the pool of their words; default: the first of --text_descriptions")
    add("--attack_components", type=flags.positive_int, help="texts per neuron; default: --components")
    add("--neurons_num", type=flags.positive_int, default=100, help="neurons whose words are taken")
    add("--overall_words", type=flags.positive_int, default=25, help="words")
    add("--results_per_generation", type=flags.positive_int, default=25, help="descriptions that are drawn")
    add("--pictures", type=flags.positive_int, default=4, help="pictures of each")
    for name in ("text_model", "image_model", "similarity_model", "image_options"):
        add(f"--{name}", help="as in generate_adversarial_images.py")
    add("--cosim_similarity", type=float, help="as in generate_adversarial_images.py")
    add(
        "--request",
        type=Path,
        help="a file with another request for Table 7, with {count} and {class_name} in it",
    )
    add(
        "--descriptions_per_class",
        type=flags.positive_int,
        default=30,
        help="descriptions of Table 7 for each class",
    )
    add("--note", help="a line for the top of the page")
    flags.add_compute(parser, precision=True, memory=True)


def here(path):
    """A path as one types it in the working directory."""
    return str(path).removeprefix(f"{os.getcwd()}{os.sep}")


def parse_tasks(tasks):
    """[(class_0, which should be seen, class_1, which is drawn), ...] of `--tasks`. Raises UserError for no
    DRAWN:SEEN.
    """
    found = []
    for task in tasks:
        drawn, _, seen = (" ".join(part.split()) for part in task.partition(":"))
        if not drawn or not seen:
            raise UserError(f"--tasks {task} is not DRAWN:SEEN; give for example horse:automobile")
        found.append((seen, drawn))
    return found


def pools_of(args):
    """{name: as it was given} of the text sets. Raises UserError when two have one name, which their files
    would share.
    """
    pools = {}
    for given in (args.attack_texts or args.text_descriptions[0], *args.text_descriptions):
        if pools.setdefault(text_set(given), given) != given:
            raise UserError(
                f"{pools[text_set(given)]} and {given} have one name, so their results would be one file; rename one"
            )
    return pools


class Paper:
    """One run of `reproduce_paper.py`.

    args: its flags.

    Attributes: folder, where pictures and tables lie; results: `Results`; pools, texts, attack_texts: text
    sets; tasks: as `parse_tasks` gives them; commands: the stages of the current item; wanted: how far the
    components have to reach ("one", "late", "all").

    Raises UserError for flags that cannot be.
    """

    def __init__(self, args):
        self.args, self.dataset, self.train_set = args, args.dataset, train_set_of(args.dataset)
        known = {"data_path": args.data_path, "split": args.split, "descriptions_dir": args.descriptions_dir}
        self.results = Results(args.output_dir, args.model, args.pretrained, **known)
        self.tasks, self.pools = parse_tasks(args.tasks), pools_of(args)
        self.texts = [text_set(name) for name in args.text_descriptions]
        self.attack_texts = text_set(args.attack_texts or args.text_descriptions[0])
        self.folder = Path(args.output_dir) / f"paper_{self.results.clip}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.commands, self.wanted, self._ran = [], [], set()

    @functools.cached_property
    def clip(self):
        return load_clip(
            self.args.model, self.args.pretrained, self.args.device, precision=self.args.precision
        )

    @functools.cached_property
    def layer(self):
        """The layer of Tables 1, 2 and Fig. 4."""
        if self.args.mlp_layer == "all":
            raise UserError("--mlp_layer is one layer here; the figures by layer take all of them anyway")
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
        reaches = {"one": lambda: [self.layer], "late": lambda: self.late, "all": lambda: self.all_layers}
        return sorted({layer for reach in self.wanted for layer in reaches[reach]()})

    def neurons_or(self, largest):
        """The neurons that `--neurons` names, else `largest`. Raises UserError for one that does not
        exist.
        """
        N = self.clip.vit.N
        if wrong := [n for n in self.args.neurons or () if not 0 <= n < N]:
            raise UserError(f"--neurons {wrong[0]}: a layer of this model has the neurons 0 to {N - 1}")
        return self.args.neurons or [int(n) for n in largest]

    # Stages

    def stage(self, script, *words):
        """Run a stage in this process, as one types it, unless this run has done so before. Raises UserError
        when it fails.
        """
        args = self.args
        shared = {
            "--model": args.model,
            "--pretrained": args.pretrained,
            "--output_dir": args.output_dir,
            "--device": args.device,
        }
        command = [script, *map(str, [*words, *(word for pair in shared.items() for word in pair)])]
        readable = shlex.join(["python", *map(here, command)])
        if readable not in self.commands:
            self.commands.append(readable)
        if readable in self._ran:
            return
        print(f"\n$ {readable}", flush=True)
        before, sys.argv = sys.argv, [*command, *["--overwrite"] * args.overwrite]
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as leaving:
            said = str(leaving.code)
            if said.startswith("interrupted"):
                raise KeyboardInterrupt from leaving
            if leaving.code:
                raise UserError(f"{readable}\n    ended with {said.removeprefix('error: ')}") from leaving
        finally:
            sys.argv = before
        self._ran.add(readable)

    def image_flags(self, split=None, dataset=None, data_path=None):
        """The flags of a data set, as the stages take them."""
        args = self.args
        words = ["--dataset", dataset or self.dataset, "--data_path", data_path or args.data_path]
        words += [
            "--batch_size",
            args.batch_size,
            "--num_workers",
            args.num_workers,
            "--precision",
            args.precision,
        ]
        words += ["--subsample", args.subsample] if args.subsample else []
        return words + (["--split", split] if split else [])

    def classifier(self):
        """Make the zero-shot classifier."""
        images = (
            ["--data_path", self.args.data_path] if self.dataset not in ("imagenet", "imagenet_r") else []
        )
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
        self.stage(
            "compute_sparse_decomposition.py", *words, "--components", components or self.args.components
        )

    def names(self, **more):
        """What is in the names of results of the train split."""
        return {"dataset": self.train_set, "k": self.args.top_k_pca, **more}

    def described(self, texts):
        return {"texts": texts, "components": self.args.components, "alpha": 1}

    # Images and arrays

    @functools.lru_cache  # noqa: B019  one of them lives
    def images(self, split, count=None):
        """`measures.Images` of a split: all, or `count` drawn ones."""
        args, dataset = self.args, self.train_set if split == "train" else self.dataset
        options = {"subsample": args.subsample, "class_names": args.class_names}
        images = load_images(dataset, args.data_path, split, self.clip.transform, **options)
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
        return load_classifier(self.results, self.clip, self.images(self.args.split).images)

    @functools.cached_property
    def first_order(self):
        """{name: accuracy in per cent} without first-order parts, and without the indirect effects of the
        layer.
        """
        classifier, labels = self.judged
        made_of = {"averages": self.averages, "indirect": [self.layer], "classifier": classifier}
        data = self.images(self.args.split)
        found = measures.first_order_ablations(
            self.clip, data, self.folder, **made_of, overwrite=self.args.overwrite
        )
        return {name: 100 * float((classes == labels).mean()) for name, classes in found.items()}

    @functools.lru_cache  # noqa: B019
    def drawn(self, layer):
        """`measures.drawn_effects` of a layer: the neurons, and [images, 4, n, D]."""
        neurons = measures.drawn(self.clip.vit.N, self.args.drawn_neurons, layer)
        of_layer = {"layer": layer, "mean_p": self.averages[0][layer], "neurons": neurons}
        data = self.images("train", self.args.drawn_images)
        return neurons, measures.drawn_effects(
            self.clip, data, self.folder, **of_layer, overwrite=self.args.overwrite
        )

    def statistics(self, layers):
        wanted = {"clip": self.clip, "coefficient": measures.COEFFICIENT}
        return load_statistics(self.results, self.train_set, layers, self.args.top_k_pca, **wanted)

    def accuracies(self, layers, dataset=None, data_path=None):
        """{layer: {ablation: per cent}} of compute_ablations.py, the number of images, and its picture."""
        self.classifier()
        self.components()
        dataset, layers = dataset or self.dataset, self.all_layers if "all" in self.wanted else layers
        words = [
            *self.image_flags(self.args.split, dataset, data_path),
            "--mlp_layer",
            *layers,
            "--memory",
            self.args.memory,
        ]
        self.stage("compute_ablations.py", *words, "--top_k_pca", self.args.top_k_pca)
        names = {
            "dataset": dataset,
            "split": self.args.split,
            "train_dataset": self.train_set,
            "k": self.args.top_k_pca,
        }
        path = self.results.path("ablations", layer=layers, **names)
        content = json.loads(path.read_text())
        return (
            {int(layer): row for layer, row in content["accuracy"].items()},
            content["images"],
            path.with_suffix(".png"),
        )

    @torch.inference_mode()
    def predictions(self, name, layer, vectors):
        """Predicted classes of the val images with effects projected on several sets of vectors, [images, V];
        and the labels.

        name: of the file. vectors: list of [N, D].
        """
        (classifier, labels), data, statistics = (
            self.judged,
            self.images(self.args.split),
            self.statistics([layer])[layer],
        )
        path = self.folder / f"{data.name}_{layer}_{name}.npy"
        arrays = {path: ((len(data.images), 1, len(vectors)), "int32")}
        record = {
            **self.clip.record,
            **data.images.record,
            "statistics": statistics.digest(),
            "vectors": digest(*vectors),
        }
        record["classifier"] = digest(classifier)
        with Pass(
            arrays, record, data.pieces, {"batch_size": data.batch_size}, overwrite=self.args.overwrite
        ) as work:
            many = (
                None
                if work.finished
                else measures.ManyRebuilt(fold(self.clip.vit, layer), statistics.mean, vectors)
            )
            for rows, pixels in work.over(data.loader):
                work[path][rows] = classify(
                    self.clip.vit, pixels, [many], classifier, coefficient=measures.COEFFICIENT
                )
        return np.load(path)[:, 0], labels

    def picture(self, name):
        """Path of a picture of the page."""
        return self.folder / f"{name}.png"

    def disk(self):
        """Bytes of the components, about."""
        vit, k, images = self.clip.vit, self.args.top_k_pca, len(self.images("train").images)
        each = (k * vit.K(l) + 4 * vit.D + k + images + vit.K(l) * vit.sizes["e"] for l in self.needed)
        return sum(4 * vit.N * numbers for numbers in each)

    def effects_on_disk(self):
        """Bytes of all val effects of the layer (Fig. 5)."""
        return 4 * len(self.images(self.args.split).images) * self.clip.vit.K(self.layer) * self.clip.vit.N

    def drawn_on_disk(self, layers):
        """Bytes of the effects of drawn neurons of some layers."""
        return (
            4
            * len(layers)
            * self.args.drawn_images
            * len(measures.EFFECTS)
            * self.args.drawn_neurons
            * self.clip.vit.D
        )

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
