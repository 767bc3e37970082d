"""A `Paper` is what the items of the page share: flags, model, images, and the stages that are run."""

import argparse
import functools
import json
import time
from pathlib import Path

import numpy as np
import torch

from applications.paper import measures
from utils.ablation import classify
from utils.data.images import IMAGENET, require_classes, train_set_of
from utils.data.splits import load_split
from utils.model.clip import load_clip
from utils.prs import fold
from utils.runtime import flags
from utils.runtime.errors import UserError
from utils.runtime.files import digest
from utils.runtime.layers import parse_layers
from utils.runtime.passes import Pass
from utils.runtime.results import Results, text_set
from utils.runtime.stages import Stages
from utils.statistics import choose_k, load_classifier, load_statistics

TASKS = ("horse:automobile", "dog:deer", "bird:frog", "ship:truck", "ship:automobile")  # of Table 3


# flags


def add_flags(parser):
    """Add the flags of reproduce_paper.py to a parser."""
    flags.add_data(parser, required=False)
    add_more_data(parser.add_argument_group("more data").add_argument)
    method = parser.add_argument_group("method")
    add_method(method.add_argument)
    flags.add_top_k(method)
    add_drawn(method.add_argument)
    add_attack(parser.add_argument_group("adversarial images").add_argument)
    parser.add_argument("--note", help="a line for the top of the page")
    flags.add_compute(parser, precision=True, memory=True)


def add_more_data(add):
    """Add the flags of further images. add: the `add_argument` of a group."""
    names = "a text file with one class name a line (--dataset folder)"
    add("--class_names", help=f"{names}, as in compute_classifier_projection.py")
    add("--imagenet_r", help="ImageNet-R's root folder (Fig. 10)")
    add("--segmentation", help="gtsegs_ijcv.mat (Table 4, Fig. 7)")
    add("--class_source", help="the class of each of its images, as in compute_segmentation.py")
    add("--images", type=Path, help="a folder of pictures whose concepts are wanted (Fig. 8)")


def add_method(add):
    """Add the flags of layers and texts. add: the `add_argument` of a group."""
    add("--mlp_layer", default="9", help="the layer of Tables 1 and 2 and Figs. 4, 5 and 8")
    late = "the layers of segmentation and adversarial images"
    add("--mlp_layers", nargs="+", default=["8", "9", "10"], help=late)
    texts = "text sets; the first describes neurons"
    add("--text_descriptions", nargs="+", default=["30k"], help=texts)
    add("--descriptions_dir", default="text_descriptions", help="where they are")
    add("--components", type=flags.positive_int, default=128, help="texts per neuron")
    counts = {"type": flags.positive_int, "nargs": "+", "default": [4, 8, 16, 32, 64, 128]}
    add("--counts", **counts, help="numbers of texts in Fig. 4")


def add_drawn(add):
    """Add the flags of which neurons are looked at. add: the `add_argument` of a group."""
    chosen = "neurons of Table 2 and Fig. 5; default: those with the largest effects"
    add("--neurons", type=int, nargs="+", help=chosen)
    drawn = "neurons of a layer whose indirect effects are computed"
    add("--drawn_neurons", type=flags.positive_int, default=100, help=drawn)
    add("--drawn_images", type=flags.positive_int, default=500, help="train images on which they are")
    add("--top_neurons", type=flags.positive_int, default=200, help="neurons that segment an image")


def add_attack(add):
    """Add the flags of adversarial images and of Table 7. add: the `add_argument` of a group."""
    tasks = "what is drawn, and what it should be taken for"
    add("--tasks", nargs="+", default=list(TASKS), metavar="DRAWN:SEEN", help=tasks)
    add("--seeds", type=flags.positive_int, default=3, help="seeds 0, 1, ...")
    texts = "the text set of their words; default: the first of --text_descriptions"
    add("--attack_texts", help=texts)
    add("--attack_components", type=flags.positive_int, help="texts per neuron; default: --components")
    add("--neurons_num", type=flags.positive_int, default=100, help="neurons whose words are taken")
    add("--overall_words", type=flags.positive_int, default=25, help="words")
    add("--results_per_generation", type=flags.positive_int, default=25, help="descriptions that are drawn")
    add("--pictures", type=flags.positive_int, default=4, help="pictures of each")
    for name in ("text_model", "image_model", "similarity_model", "image_options"):
        add(f"--{name}", help="as in generate_adversarial_images.py")
    add("--cosim_similarity", type=float, help="as in generate_adversarial_images.py")
    request = "a file with another request for Table 7, with {count} and {class_name} in it"
    add("--request", type=Path, help=request)
    count = "descriptions of Table 7 for each class"
    add("--descriptions_per_class", type=flags.positive_int, default=30, help=count)


def parse_tasks(tasks):
    """Return [(class_0, which should be seen, class_1, which is drawn), ...] of `--tasks`.

    Raises UserError for one that is not DRAWN:SEEN.
    """
    found = []
    for task in tasks:
        drawn, _, seen = (" ".join(part.split()) for part in task.partition(":"))
        if not drawn or not seen:
            raise UserError(f"--tasks {task} is not DRAWN:SEEN; give for example horse:automobile")
        found.append((seen, drawn))
    return found


def text_sets_of(args):
    """Return the text sets, {name: as it was given}.

    Raises UserError when two have one name, which their files would share.
    """
    found = {}
    for given in (args.attack_texts or args.text_descriptions[0], *args.text_descriptions):
        first = found.setdefault(text_set(given), given)
        if first != given:
            both = f"{first} and {given} have one name"
            raise UserError(f"{both}, so their results would be one file; rename one")
    return found


class Paper:
    """A Paper is one run of `reproduce_paper.py`.

    args: its flags.

    Attributes
    name: MODEL_PRETRAINED.
    folder: where pictures and tables lie.
    dataset, train_set: the data set of the held-out images, and that of the train images.
    tasks: of Table 3, as `parse_tasks` returns them.
    given: {text set: how it was given}.
    texts, attack_texts: names of the text sets that describe neurons, and of the one for adversarial images.
    wanted: for which layers components are needed: "one" (--mlp_layer), "late" (--mlp_layers), "all".

    Raises UserError for flags that cannot be.
    """

    def __init__(self, args):
        require_classes(args.dataset)
        self.args = args
        self.dataset = args.dataset
        self.train_set = train_set_of(args.dataset)
        self.tasks = parse_tasks(args.tasks)
        self.given = text_sets_of(args)
        self.texts = [text_set(name) for name in args.text_descriptions]
        self.attack_texts = text_set(args.attack_texts or args.text_descriptions[0])
        self.name = Results(args.output_dir, args.model, args.pretrained).clip
        self.folder = Path(args.output_dir) / f"paper_{self.name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.wanted = []

    @functools.cached_property
    def clip(self):
        """clip is the loaded `Clip`."""
        args = self.args
        return load_clip(args.model, args.pretrained, args.device, precision=args.precision)

    @functools.cached_property
    def results(self):
        """results are those of the stages, of the loaded model."""
        return flags.outputs_of(self.args, self.clip, coefficient=measures.COEFFICIENT)

    @functools.cached_property
    def k(self):
        """k is how many of a neuron's effects its component is of."""
        known = self.args.top_k_pca or self.train_set in IMAGENET
        images = {} if known else {"all": len(self.images("train"))}
        return choose_k(self.args.top_k_pca, self.train_set, images)

    # layers and neurons

    @functools.cached_property
    def layer(self):
        """layer is that of Tables 1, 2 and Figs. 4, 5, 8."""
        if self.args.mlp_layer == "all":
            raise UserError("--mlp_layer is one layer here; the figures by layer take all of them anyway")
        return parse_layers([self.args.mlp_layer], self.clip.vit)[0]

    @functools.cached_property
    def late(self):
        """late is the list of the layers of segmentation and adversarial images."""
        return parse_layers(self.args.mlp_layers, self.clip.vit)

    @functools.cached_property
    def all_layers(self):
        """all_layers is the list of all layers with effects."""
        return parse_layers(["all"], self.clip.vit)

    @functools.cached_property
    def needed(self):
        """needed is the list of the layers whose components the items need; one pass makes them all."""
        found = set()
        if "one" in self.wanted:
            found.add(self.layer)
        if "late" in self.wanted:
            found.update(self.late)
        if "all" in self.wanted:
            found.update(self.all_layers)
        return sorted(found)

    def neurons_or(self, largest):
        """Return the neurons that `--neurons` names, else `largest`.

        Raises UserError for one that does not exist.
        """
        N = self.clip.vit.N
        if wrong := [n for n in self.args.neurons or () if not 0 <= n < N]:
            raise UserError(f"--neurons {wrong[0]}: a layer of this model has the neurons 0 to {N - 1}")
        return self.args.neurons or [int(n) for n in largest]

    # stages

    @functools.cached_property
    def stages(self):
        """stages are the scripts that the items need, with the flags of this run."""
        train = {"train_data_path": None, "train_subsample": self.args.subsample}
        return Stages(argparse.Namespace(**vars(self.args), **train), self.train_set, self.k)

    def components(self):
        """Make the effects, components and statistics of the needed layers on the train split."""
        self.stages.effects(self.needed, keep="top")
        self.stages.components(self.needed)

    def descriptions(self, texts, layers, components=None):
        """Make the text vectors of a text set, and the descriptions of some layers."""
        self.components()
        self.stages.texts(self.given[texts])
        self.stages.descriptions(self.given[texts], layers, components)

    def grades(self, texts, layers, components=None):
        """Make the texts that neurons of some layers fire on, and the grades of both their descriptions.

        Parameters: as in `descriptions`, which is run first.
        """
        self.descriptions(texts, layers, components)
        self.stages.grades(self.given[texts], layers, components)

    def names(self, **more):
        """Return the fields of the names of results of the train split."""
        return {"dataset": self.train_set, "k": self.k, **more}

    def described(self, texts):
        """Return the fields of the names of descriptions by a text set."""
        return {"texts": texts, "components": self.args.components, "alpha": 1}

    def accuracies(self, layers, dataset=None, data_path=None):
        """Run compute_ablations.py.

        Returns {layer: {ablation: per cent}}, the number of images, and the path of its picture.
        """
        self.stages.classifier()
        self.components()
        args = self.args
        dataset = dataset or self.dataset
        if "all" in self.wanted:
            layers = self.all_layers
        words = [*self.stages.images(args.split, dataset, data_path), "--mlp_layer", *layers]
        words += ["--memory", args.memory, "--top_k_pca", self.k]
        self.stages.run("compute_ablations.py", *words)
        names = self.names(dataset=dataset, split=args.split, train_dataset=self.train_set)
        path = self.results.path("ablations", layer=layers, **names)
        content = json.loads(path.read_text())
        table = {int(layer): row for layer, row in content["accuracy"].items()}
        return table, content["images"], path.with_suffix(".png")

    # images and arrays

    @functools.lru_cache  # noqa: B019  one of them lives
    def images(self, split, count=None):
        """Load the `Split` of the train or held-out images: all of them, or `count` drawn ones."""
        dataset = self.train_set if split == "train" else self.dataset
        changes = {"dataset": dataset, "split": split, "class_names": self.args.class_names}
        found = load_split(self.args, self.clip.transform, **changes)
        if count is not None:
            chosen = measures.drawn(len(found), count)
            found.images.samples = [found.images.samples[i] for i in chosen]
        return found

    def array(self, split, kind):
        """Return the path of an array about a `Split` that no stage makes."""
        return self.folder / f"{split.names['dataset']}_{split.names['split']}_{kind}.npy"

    def picture(self, name):
        """Return the path of a picture of the page."""
        return self.folder / f"{name}.png"

    @functools.cached_property
    def averages(self):
        """averages are the mean activations and first-order parts over the train split."""
        split = self.images("train")
        paths = [self.array(split, kind) for kind in ("mean_activations", "mean_parts")]
        return measures.means(self.clip, split, paths, self.args.overwrite)

    @functools.cached_property
    def judged(self):
        """judged are the classifier, and the labels of the held-out images as its columns."""
        self.stages.classifier()
        return load_classifier(self.results, self.images(self.args.split).images)

    @functools.cached_property
    def first_order(self):
        """first_order is {name: accuracy in per cent}, without first-order parts or indirect effects."""
        classifier, labels = self.judged
        split = self.images(self.args.split)
        path = self.array(split, f"{self.layer}_first_order_predictions")
        given = (self.averages, [self.layer], classifier)
        found = measures.first_order_ablations(self.clip, split, path, *given, self.args.overwrite)
        return {name: 100 * float((classes == labels).mean()) for name, classes in found.items()}

    @functools.lru_cache  # noqa: B019
    def drawn(self, layer):
        """Draw neurons of a layer; return them, and `measures.drawn_effects` of them [images, 4, n, D]."""
        neurons = measures.drawn(self.clip.vit.N, self.args.drawn_neurons, layer)
        mean_p = self.averages[0][layer]
        split = self.images("train", self.args.drawn_images)
        path = self.array(split, f"{len(split)}_{layer}_{len(neurons)}_drawn")
        given = (layer, mean_p, neurons, self.args.overwrite)
        return neurons, measures.drawn_effects(self.clip, split, path, *given)

    def statistics(self, layer):
        """Read the `Statistics` of a layer."""
        return load_statistics(self.results, self.train_set, [layer], self.k)[layer]

    @torch.inference_mode()
    def predictions(self, kind, layer, vectors):
        """Predict the classes of the held-out images with effects projected on several sets of vectors.

        kind: of the file.
        vectors: list of [N, D].

        Returns the classes [images, V], and the labels [images].
        """
        classifier, labels = self.judged
        split = self.images(self.args.split)
        statistics = self.statistics(layer)
        path = self.array(split, f"{layer}_{kind}")
        arrays = {path: ((len(split), 1, len(vectors)), "int32")}
        record = {**self.clip.record, **split.record, "statistics": statistics.digest()}
        record |= {"vectors": digest(*vectors), "classifier": digest(classifier)}
        with Pass(arrays, record, split, overwrite=self.args.overwrite) as work:
            directions = work.prepare(fold, self.clip.vit, layer)
            many = work.prepare(measures.ManyRebuilt, directions, statistics.mean, vectors)
            for rows, pixels in work:
                work[path][rows] = classify(self.clip.vit, pixels, [many], classifier, measures.COEFFICIENT)
        return np.load(path)[:, 0], labels

    # costs

    def disk(self):
        """Return about how many bytes the components take."""
        vit = self.clip.vit
        k = self.k
        images = len(self.images("train"))
        numbers = 0  # for each neuron
        for layer in self.needed:
            K = vit.K(layer)
            numbers += k * K + 4 * vit.D + k + images + K * vit.sizes["e"]
        return 4 * vit.N * numbers

    def effects_on_disk(self):
        """Return how many bytes all effects of the layer on the held-out images take (Fig. 5)."""
        vit = self.clip.vit
        return 4 * len(self.images(self.args.split)) * vit.K(self.layer) * vit.N

    def drawn_on_disk(self, layers):
        """Return how many bytes the effects of drawn neurons of some layers take."""
        drawn = self.args.drawn_images * self.args.drawn_neurons
        return 4 * len(layers) * drawn * len(measures.KINDS) * self.clip.vit.D

    @functools.cached_property
    def seconds_of_an_image(self):
        """seconds_of_an_image is the time of a forward pass, from two batches of noise."""
        vit = self.clip.vit
        batch = self.args.batch_size
        noise = torch.randn(batch, 3, *vit.visual.image_size, device=self.clip.device)
        with torch.inference_mode():
            vit(noise).sum().item()
            start = time.perf_counter()
            vit(noise).sum().item()
        return (time.perf_counter() - start) / batch
