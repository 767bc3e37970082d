"""Plan which stages a gallery still needs, say what they cost, and run them."""

import shutil
import time
from functools import cached_property, partial
from typing import NamedTuple

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES

from applications.gallery.collect import TOP_PICTURES
from utils import controls, grading, omp
from utils.data.images import classes_of, load_images, train_set_of
from utils.data.splits import Split, load_split
from utils.data.text_sets import find_texts, load_texts, read_texts
from utils.deletion import DRAWN
from utils.effects import FORMS, FULL, TOP
from utils.model.clip import clip_of
from utils.model.texts import text_vectors
from utils.pca import principal_directions
from utils.runtime import distributed, flags
from utils.runtime.arrays import bytes_of
from utils.runtime.errors import UserError
from utils.runtime.layers import parse_layers
from utils.runtime.results import PAIRS, text_set
from utils.runtime.stages import Stages
from utils.statistics import choose_k
from utils.top_effects import Strides, strides_of
from utils.units import count_units, groups_of, kind_of, open_units

POOL = "concepts"  # the text set, where none is given
TIMED = 64  # texts or components that are timed
MANY = 20_000  # units of a layer, above which it is said how to have fewer
PATIENCE = 3  # seconds after which nothing is timed again


class Step(NamedTuple):
    """A Step is a stage that a gallery needs, and what it costs on this machine."""

    title: str
    seconds: float
    bytes: int
    run: object  # a function without arguments; None for the gallery itself


class Timings:
    """Timings are the seconds that single things take on this machine, each measured once.

    clip: the loaded `Clip`.
    train: `Split` of the training images.
    args: the flags batch_size, components, top_k_pca.
    texts: the text set.
    """

    def __init__(self, clip, train, args, texts):
        self.clip = clip
        self.train = train
        self.args = args
        self.texts = texts

    @cached_property
    def image(self):
        """image is the time of one image in a forward pass, from one batch of the data."""
        pixels = self.train.first()
        return seconds(lambda: self.clip.vit(pixels).sum().item()) / len(pixels)

    @cached_property
    def text(self):
        """text is the time of one text in the text tower."""
        some = self.texts[:: max(1, len(self.texts) // TIMED)]
        clip = clip_of(self.args, texts=True)
        return seconds(lambda: text_vectors(clip, some, self.args.batch_size)) / len(some)

    @cached_property
    def pursuit(self):
        """pursuit is the time in which the texts of one neuron are found."""
        rows = (len(self.texts), omp.PURSUED)
        both = [torch.randn(count, self.clip.vit.D, device=self.clip.device) for count in rows]
        count = min(self.args.components, len(self.texts))
        return seconds(lambda: omp.orthogonal_matching_pursuit(*both, count)) / omp.PURSUED

    @cached_property
    def label(self):
        """label is the time in which soft-WPMI compares one text with one neuron."""
        images = min(grading.WPMI["images"], len(self.train))
        texts = min(grading.TEXTS_AT_ONCE, len(self.texts))
        rows = ((images, self.clip.vit.D), (texts, self.clip.vit.D), (images, grading.NEURONS_AT_ONCE))
        compare = grading.SoftWPMI(*(torch.randn(shape, device=self.clip.device) for shape in rows))
        return seconds(lambda: compare(slice(texts))) / (grading.NEURONS_AT_ONCE * texts)

    @cached_property
    def component(self):
        """component is the time in which the component of one neuron is found."""
        rows = torch.randn(TIMED, self.args.top_k_pca, self.clip.vit.D, device=self.clip.device)
        return seconds(lambda: principal_directions(rows)) / TIMED


@torch.inference_mode()
def seconds(work):
    """Return how long some work takes, the shortest of up to three times: other programs may disturb it."""
    times = []
    while len(times) < 3 and sum(times) < PATIENCE:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


class Plan:
    """A Plan is what a gallery needs and what is not there yet.

    args: the flags of make_gallery.py. Layer, texts and --top_k_pca are filled in where they are not given.
    inputs: `Results` of the folders that are read.

    Attributes: layers; train, held_out, the `Split`s; steps, those that come before the gallery itself.

    Raises UserError for flags that cannot be.
    """

    def __init__(self, args, inputs):
        self.args = args
        self.clip = clip_of(args)
        vit = self.clip.vit
        if args.mlp_layer is None:
            args.mlp_layer = [str(max(0, min(vit.last, vit.L - 3)))]  # as layer 9 of 12
        open_units(args, self.clip)
        args.text_descriptions = args.text_descriptions or POOL
        self.layers = parse_layers(args.mlp_layer, vit)
        self.inputs = inputs.of(self.clip, args.coefficient)
        self.train_set = train_set_of(args.dataset)
        where = args.train_data_path or args.data_path
        options = {"subsample": args.train_subsample, "held_out": args.held_out}
        images = load_images(self.train_set, where, "train", self.clip.transform, **options)
        self.train = Split(images, args.device, args.num_workers, args.batch_size)
        self.held_out = load_split(args, None)
        print(self.held_out.images.summary())  # how they are read has been said
        self.held_out.images.transform = self.clip.transform
        args.top_k_pca = choose_k(args.top_k_pca, self.train_set, dict.fromkeys(self.layers, len(images)))
        self.names = flags.names_of_descriptions(args, self.train_set)
        also = args.input_dir if args.input_dir != args.output_dir else None
        self.stages = Stages(args, self.train_set, args.top_k_pca, also)
        self.steps = [step for step in self._all_steps() if step]

    @cached_property
    def texts(self):
        """texts are the text set."""
        given = (self.args.text_descriptions, self.args.descriptions_dir)
        if not self.inputs.find("texts", **self.names).is_file():
            return read_texts(find_texts(*given))
        texts, _, _ = load_texts(self.inputs, *given, partial(clip_of, self.args, texts=True))
        return texts

    @cached_property
    def costs(self):
        """costs are the `Timings` on this machine."""
        return Timings(self.clip, self.train, self.args, self.texts)

    def count(self, layers):
        """Return how many neurons, or other units, some layers have together."""
        return sum(self.inputs.sizes(layer)["N"] for layer in layers)

    def in_full(self, layers):
        """Return whether compute_second_order_neuron_prs.py stores all effects of some layers."""
        return self.args.unit_set == PAIRS or (self.clip.units is None and len(layers) == 1)

    def passes(self, layers):
        """Return how often a pass goes over the images, if layers take turns to fit in --memory."""
        return len(groups_of(self.clip, layers, self.args.memory * 1e9))

    def lacking(self, *kinds, **names):
        """Return the layers that lack a result of one of some kinds. names: fields of the files' names."""
        found = []
        for layer in self.layers:
            fields = {**self.names, "layer": layer, **names}
            if not all(self.inputs.find(kind, **fields).is_file() for kind in kinds):
                found.append(layer)
        return found

    def _all_steps(self):
        """Yield the `Step` of every stage; None for a stage that has nothing to do."""
        yield self._classifier()
        described = self.lacking("pca", "norm")
        stored = set.intersection(*(set(self.lacking(form)) for form in FORMS))
        to_make = [layer for layer in described if layer in stored]
        yield self._effects(to_make)
        yield self._components(described)
        yield self._texts()
        yield self._descriptions(self.lacking("decomposition"))
        yield self._grades(self.ungraded(), to_make)

    def _classifier(self):
        """Plan the zero-shot classifier, where there are classes or names for them."""
        args = self.args
        there = self.inputs.find("classifier", dataset=self.train_set).is_file()
        if there or not (args.class_names or self.train.images.folders):
            return None
        names = classes_of(args.dataset, args.data_path, args.split, args.class_names)["class_names"]
        prompts = len(OPENAI_IMAGENET_TEMPLATES) * len(names)
        size = 4 * len(names) * self.clip.vit.D
        title = f"zero-shot classifier of {len(names)} classes"
        return Step(title, prompts * self.costs.text, size, self.stages.classifier)

    def _effects(self, layers):
        if not layers:
            return None
        vit, count = self.clip.vit, len(self.train)
        once = self.in_full(layers)
        kinds = ["coefficients", *FULL] if once else TOP
        sizes = {"images": count, "k": self.args.top_k_pca}
        arrays = self.inputs.arrays(kinds, sizes, layers=layers, dataset=self.train_set)
        size = sum(bytes_of(*spec) for spec in arrays.values())
        stride = (Strides() if self.clip.units else strides_of(count)).look
        looked_at = count if once else count + len(range(0, count, stride))
        passes = "one pass" if looked_at < 2 * count else "two passes"
        title = f"effects of {named(layers)} of {vit.L}, {passes} over {count} images"
        run = partial(self.stages.effects, layers)
        return Step(title, looked_at * self.costs.image, size, run)

    def _components(self, layers):
        if not layers:
            return None
        neurons = self.count(layers)
        size = 4 * neurons * (2 * self.clip.vit.D + self.args.top_k_pca + len(self.train))
        run = partial(self.stages.components, layers)
        known = self.args.unit_set == PAIRS  # from the weights
        cost = 0 if known else neurons * self.costs.component
        return Step(f"components of {neurons} {kind_of(self.clip)}", cost, size, run)

    def _texts(self):
        if self.inputs.find("texts", **self.names).is_file():
            return None
        count = len(self.texts)
        run = partial(self.stages.texts, self.args.text_descriptions)
        title = f"vectors of {count} texts ({text_set(self.args.text_descriptions)})"
        return Step(title, count * self.costs.text, 4 * count * self.clip.vit.D, run)

    def _descriptions(self, layers):
        if not layers:
            return None
        texts, neurons = self.args.components, self.count(layers)
        omp.check_components(texts, len(self.texts))  # before any pass
        run = partial(self.stages.descriptions, self.args.text_descriptions, layers)
        size = 60 * texts * neurons
        return Step(f"{texts} texts that each of them writes", neurons * self.costs.pursuit, size, run)

    def ungraded(self):
        """Return the layers that lack grades, or what evaluate_descriptions.py makes beside them."""
        of_train = self.lacking("projections", "fires_on")
        of_held_out = self.lacking("projections", "grades", **self.held_out.names)
        return sorted({*of_train, *of_held_out})

    def _grades(self, layers, to_make):
        """Plan the grades: a pass over held-out images, controls, and neurons that are deleted.

        And a pass over training images, where not all effects are stored.

        to_make: layers whose effects are to be made.
        """
        if not layers:
            return None
        vit = self.clip.vit
        partly = set(self.lacking("coefficients")) & set(layers) - set(to_make)
        partly = partly or (to_make and not self.in_full(to_make))
        images = self.passes(layers) * (len(self.held_out) + (len(self.train) if partly else 0))
        neurons = self.count(layers)
        described = neurons * (1 + controls.CONTROLS) + len(layers) * controls.ROTATED
        pairs = self.args.unit_set == PAIRS  # which cannot be taken away
        deleted = 0 if pairs else min(DRAWN, neurons) * min(flags.DELETE, len(self.held_out))
        again = sum(deleted * (vit.L - 1 - layer) / vit.L for layer in layers)
        each = 2 * self.costs.pursuit + len(self.texts) * self.costs.label
        total = (images + again) * self.costs.image + described * each
        size = (
            4 * neurons * (2 * (len(self.train) + len(self.held_out)) + 200)
            + 60 * self.args.components * neurons
        )
        run = partial(self.stages.grades, self.args.text_descriptions, layers)
        return Step("texts that each fires on, grades over noise", total, size, run)

    def _page(self):
        """Plan the gallery itself: a pass over both splits."""
        images = len(self.train) + len(self.held_out)
        picture = 0 if self.args.no_pictures else self.args.picture_size**2
        maps = 2 * TOP_PICTURES * self.count(self.layers)
        rows, columns = self.clip.vit.grid
        size = images * picture // 4 + 4 * maps * rows * columns
        cost = self.passes(self.layers) * images * self.costs.image
        return Step("the page, one pass over all images", cost, size, None)

    # telling and running

    def tell(self):
        """Print what will be done, and what it costs."""
        args = self.args
        images = len(self.train) + len(self.held_out)
        both = f"{len(self.train)} for components and texts, {len(self.held_out)} held out for grades"
        print(f"{images} images of {args.data_path}: {both}")
        each = ", ".join(dict.fromkeys(count_units(self.clip, layer) for layer in self.layers))
        of = f"{named(self.layers)} of {self.clip.vit.L}, {each} each"
        print(f"{of}; text set {text_set(args.text_descriptions)}; this is to be done:")
        steps = [*self.steps, self._page()]
        for step in [*steps, together(steps)]:
            size = f"{step.bytes / 1e6:,.0f} MB"
            print(f"  {step.title:<62} {duration(step.seconds):>12} {size:>10}")
        if (most := max(self.count([layer]) for layer in self.layers)) > MANY:
            fewer = " and a later --mlp_layer has fewer" if args.unit_set == PAIRS else ""
            print(f"{most} units are many: fewer --components take less time{fewer}")
        free = shutil.disk_usage(args.output_dir).free
        print(f"{args.output_dir} has {free / 1e9:,.0f} GB free", flush=True)

    def run(self):
        """Run the stages that are left, one after the other. Raises UserError when one fails."""
        if not self.steps:
            return
        if distributed.world_size() > 1:
            commands = "run the stages with torchrun, and this command without: it keeps what they left"
            raise UserError(f"{len(self.steps)} stages are still to be run; {commands}")
        self.tell()
        for step in self.steps:
            step.run()


def together(steps):
    """Return the sum of some steps."""
    total, size = (sum(getattr(step, name) for step in steps) for name in ("seconds", "bytes"))
    return Step("together", total, size, None)


def named(layers):
    """Return the words for some layers."""
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"


def duration(seconds):
    """Return a duration in words."""
    return f"about {seconds:,.0f} s" if seconds < 120 else f"about {seconds / 60:,.0f} min"
