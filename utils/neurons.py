"""Look at one layer's neurons, as the notebooks do, from the files of the stages."""

import numpy as np
import torch

from utils.ablation import Rebuilt
from utils.concepts import LayerConcepts, load_fires_on
from utils.data.images import to_pictures, train_set_of
from utils.descriptions import load_descriptions
from utils.effects import DenseEffects, FactorisedEffects, about_norms
from utils.evaluation import load_compared
from utils.figures import plot_neuron
from utils.norms import CentredNorms
from utils.prs import COEFFICIENT, second_order
from utils.reports import judged_by
from utils.runtime.errors import UserError
from utils.runtime.files import digest
from utils.statistics import find_k, load_statistics
from utils.units import ACTS, fires_at, fold_units, name_of


class NeuronLayer:
    """A NeuronLayer is the statistics and descriptions of one MLP layer, and the images behind them.

    Parameters
    clip: the loaded `Clip`; of other units than neurons, after `utils.units.look_at`.
    results: `Results` of the stages' folder, with unit_set as --units has it.
    images: the `Images` that are looked at. Of the train split, compute_pcas.py has left their norms; of
        another one, the effects must be stored (`compute_second_order_neuron_prs.py --split val`).
    layer: the MLP layer.
    described: {"texts": name of the text set, "components": texts per neuron, "alpha": as in file names}.
    k: images per neuron, as in compute_pcas.py; None for the number that it takes by itself.
    held_out: the split on which evaluate_descriptions.py has graded the descriptions.

    Attributes
    norms: [N, k], ascending.
    explained: [N]; None in a folder of the published code.
    acts: on how many training images each unit of a dictionary acts, [N]; None for neurons and pairs.
    descriptions: the texts that every neuron writes, as `load_descriptions` returns them.
    fires_on: the texts that every neuron fires on; None where evaluate_descriptions.py has not run.
    compared: {(side, measure): Compared}, grades and their controls; {} where they are not there.
    command: the command that makes fires_on and compared.
    concepts: `LayerConcepts`, to find the concepts of images; without "fires_on" where fires_on is None.
    norms_are: what the norms on all images are about, in words; "" where that is their mean.
    statistics, directions, centred_norms: `Statistics`, `Directions` and `CentredNorms` of the layer.

    Raises UserError, with the command, when a file is missing or of other images or weights.
    """

    def __init__(self, clip, results, images, layer, described, k=None, held_out="val"):
        self.clip = clip
        self.results = results.of(clip, COEFFICIENT)
        self.images = images
        self.layer = layer
        [self.directions] = fold_units(clip, [layer])
        train = train_set_of(images.dataset)
        k = find_k(k, self.results, train, [layer])
        names = {"dataset": train, "layer": layer, "k": k}
        self.statistics = load_statistics(self.results, train, [layer], k)[layer]
        self.norms = self.results.load("norm", **names)
        self.explained = self._if_there("explained", **names)
        dictionary = clip.units is not None and clip.units.act
        self.acts = self.results.load("acts", dataset=train, layer=layer) if dictionary else None
        self._open_effects(names)
        self.centred_norms = CentredNorms(self.directions, self.statistics.mean)
        self._along = Rebuilt(self.directions, self.statistics.mean, self.statistics.pcas)
        self._load_descriptions({**names, "alpha": 1, **described}, held_out)

    def _if_there(self, kind, **names):
        """Read an array, or return None where there is no such file."""
        return self.results.load(kind, **names) if self.results.find(kind, **names).is_file() else None

    def _open_effects(self, names):
        """Find the effects on the images, or their norms and projections."""
        shown = {"dataset": self.images.dataset, "split": self.images.split, "layer": self.layer}
        forms = (FactorisedEffects, DenseEffects)
        stored = [form for form in forms if self.results.find(form.main, **shown).is_file()]
        self._stored = stored[0](self.results, shown, self.clip.device) if stored else None
        self._image_norms = self._projections = None
        self.norms_are = ""
        if stored:
            count = self._stored.images
        elif self.images.split == "train":
            self._image_norms = self.results.load("image_norms", mmap=True, **names)
            count = len(self._image_norms)
            self.norms_are = about_norms(self.results.find("image_norms", **names))
        else:
            count = len(self.results.load("coefficients", mmap=True, **shown))  # raises, with the command
        if count != len(self.images):
            what = f"the statistics are of {count} images and there are {len(self.images)}"
            fix = "use the same --data_path and --subsample as for compute_second_order_neuron_prs.py"
            raise UserError(f"{what}; {fix}")
        shown["k"] = names["k"]
        if not stored and self.results.find("projections", **shown).is_file():
            made_of = {"data": self.images.record["data"], "statistics": self.statistics.digest()}
            sizes = {"images": len(self.images)}
            self._projections = self.results.load("projections", sizes, made_of, mmap=True, **shown)

    def _load_descriptions(self, names, held_out):
        """Read both descriptions, how effects spread over the training images, and grades on a split."""
        targets = {"targets": digest(self.statistics.pcas)}
        statistics = {"statistics": self.statistics.digest()}
        graded = {**names, "dataset": self.images.dataset, "split": held_out}
        self.descriptions = load_descriptions(self.results, expected=targets, **names)
        self.compared = {}
        self.fires_on = fires_on = None
        self.command = self.results.command("fires_on", **names)
        if self.results.find("fires_on", **names).is_file():
            fires_on = load_fires_on(self.results, self.statistics, **names)
            self.fires_on = fires_on.descriptions
        known = (self.centred_norms, self.statistics.thresholds, self.descriptions)
        self.concepts = LayerConcepts(*known, self._along, fires_on)
        if self.results.find("controls", **graded).is_file():
            self.compared = load_compared(self.results, statistics, **graded)

    def effects(self, pixels):
        """Return the `SecondOrder` of transformed images [n, 3, side, side]."""
        _, effects = second_order(self.clip.vit, pixels, [self.directions])
        return next(effects)

    def largest(self, count):
        """Return the neurons with the largest effects (mean of their k largest norms), int [count]."""
        return np.argsort(-self.norms.mean(axis=1), kind="stable")[:count]

    def measured(self, neuron):
        """Return the norms of a neuron's centred effects, and their projections on its component.

        Both are [images]; the projections are None where only the norms are stored, and `norms_are` says what
        these are about.
        """
        if self._stored is None:
            along = None if self._projections is None else np.asarray(self._projections[:, neuron])
            return np.asarray(self._image_norms[:, neuron]), along
        centred = self._stored.of(neuron) - self.statistics.mean[neuron]
        along = centred @ self.statistics.pcas[neuron]
        return centred.norm(dim=1).cpu().numpy(), along.cpu().numpy()

    def top_images(self, neuron, count, by="norm"):
        """Return the row numbers [count] of the images with the neuron's largest effects, largest first.

        by: 'norm', or 'projection' on its component. Where only norms are stored, the largest projections are
            those among the 4 count largest norms.
        """
        norms, projections = self.measured(neuron)
        rows = np.argsort(-norms, kind="stable")
        if by == "norm":
            return rows[:count]
        if projections is None:
            rows = rows[: 4 * count]
            projections = self.look(rows, neuron)[2]
        else:
            projections = projections[rows]
        return rows[np.argsort(-projections, kind="stable")][:count]

    @torch.inference_mode()
    def look(self, rows, neuron):
        """Run images through the tower.

        Returns pictures [n, S, S, 3] in [0, 1], the neuron's activation maps [n, rows, columns], and the
        projections [n] of its centred effects on its first component.
        """
        items = [self.images[int(row)] for row in rows]
        for item in items:
            if isinstance(item, UserError):
                raise item
        pixels = torch.stack([image for image, _ in items]).to(self.clip.device)
        return to_pictures(pixels, self.clip.transform, (224, 224)), *self.activity(pixels, neuron)

    @torch.inference_mode()
    def activity(self, pixels, neuron):
        """Return maps [n, rows, columns] and projections [n] of one neuron on images [n, 3, side, side]."""
        vit = self.clip.vit
        phi = self.effects(pixels)
        maps = fires_at(vit, phi, slice(None), neuron).unflatten(1, vit.grid)
        return maps.cpu().numpy(), self._along.projections(phi)[:, neuron].cpu().numpy()

    def name(self, neuron):
        """Return the name of a neuron, or another unit."""
        return name_of(self.clip, self.layer, int(neuron))

    def card(self, neuron, pictures=8, words=8, by="projection"):
        """Draw the neuron's card, a figure.

        It shows the images with its largest effects (along its component most project positively, by the
        component's sign), the texts that it writes and those that it fires on, with their grades and those of
        random directions, and the histogram of its norms.

        pictures, words: how many are shown. by: as in `top_images`.
        """
        shown, maps, _ = self.look(self.top_images(neuron, pictures, by), neuron)
        title = f"layer {self.layer}, {self.name(neuron)}, {self.images.split} images by {by}"
        if self.explained is not None:
            share = 100 * self.explained[neuron]
            title += f": {share:.0f} % of its largest effects lie along one direction"
        sides = {}
        for side, described in (("writes", self.descriptions), ("fires_on", self.fires_on)):
            if described is not None:
                sides[self._name_of(side, neuron)] = [(text, c) for _, c, text in described[neuron][:words]]
        norms, _ = self.measured(neuron)
        known = {"threshold": self.norms[neuron, 0], "norms_are": self.norms_are}
        return plot_neuron(title, shown, np.maximum(maps, 0), sides, norms, **known)

    def _name_of(self, side, neuron):
        """Return the title above the texts of a side: their grade, and that of random directions."""
        name = side.replace("_", " ")
        if self.acts is not None and self.acts[neuron] < ACTS:
            return f"{name}: not graded, acts on {self.acts[neuron]} training images"
        compared = judged_by(side, self.compared)
        if compared is None:
            return f"{name}: not graded"
        own = compared.texts[neuron, -1]
        control = compared.controls[:, neuron, -1].mean()
        measure = "r" if compared.measure == "pearson" else "share"
        return f"{name}: {measure} = {own:.2f} (random directions {control:.2f})"
