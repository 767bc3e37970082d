"""One layer's neurons to look at: what the notebooks and the demo's cards show, from the files of the
stages.
"""

import numpy as np
import torch

from utils.ablation import Rebuilt
from utils.data.images import train_set_of
from utils.descriptions import load_descriptions
from utils.effects import DenseEffects, FactorisedEffects
from utils.evaluation import load_grades
from utils.figures import plot_neuron, to_pictures
from utils.norms import CentredNorms
from utils.prs import COEFFICIENT, fold, second_order
from utils.runtime.errors import UserError
from utils.runtime.files import digest
from utils.statistics import load_statistics


class NeuronLayer:
    """The statistics and descriptions of one MLP layer, and the images behind them.

    clip, results: the loaded `Clip`; `Results` of the stages' folder.
    images: the `Images` that are looked at. Of the train split, compute_pcas.py has left their norms; of
        another one, the effects must be stored (`compute_second_order_neuron_prs.py --split val`).
    layer, k: the MLP layer; images per neuron, as in compute_pcas.py.
    described: {"texts": name of the text set, "components": texts per neuron, "alpha": as in the files'
        names}.
    held_out: the split on which evaluate_descriptions.py has graded the descriptions.

    Attributes: norms [N, k] ascending, explained [N] (None in a folder of the published code), descriptions
    (what every neuron writes, as `load_descriptions` gives it), fires_on (the same) and graded (`Graded`),
    both None where evaluate_descriptions.py has not run; statistics, directions, centred_norms.

    Raises UserError, with the command, when a file is missing or of other images or weights.
    """

    def __init__(self, clip, results, images, layer, described, k=100, held_out="val"):
        self.clip, self.images, self.layer = clip, images, layer
        self.directions = fold(clip.vit, layer)
        train, sizes, expected = train_set_of(images.dataset), clip.vit.sizes, clip.expected
        names = {"dataset": train, "layer": layer, "k": k}
        self.statistics = load_statistics(results, train, [layer], k, clip=clip, coefficient=COEFFICIENT)[
            layer
        ]
        self.norms, published = (
            results.load("norm", sizes, expected, **names),
            not results.find("explained", **names).is_file(),
        )
        self.explained = None if published else results.load("explained", sizes, expected, **names)
        shown = {"dataset": images.dataset, "split": images.split, "layer": layer}
        readers = (
            reader
            for reader in (FactorisedEffects, DenseEffects)
            if results.find(reader.main, **shown).is_file()
        )
        self._stored = next((reader(results, shown, clip.device) for reader in readers), None)
        if self._stored is not None:
            found = results.load(self._stored.main, sizes, expected, mmap=True, **shown)
        elif images.split == "train":
            found = self._image_norms = results.load("image_norms", sizes, expected, mmap=True, **names)
        else:
            found = results.load(
                "coefficients", sizes, expected, mmap=True, **shown
            )  # raises, with the command
        if len(found) != len(images):
            counts = f"the statistics are of {len(found)} images and there are {len(images)}"
            raise UserError(
                f"{counts}; use the same --data_path and --subsample as for compute_second_order_neuron_prs.py"
            )
        shown, self._projections = {**shown, "k": k}, None
        if self._stored is None and results.find("projections", **shown).is_file():
            data = {**expected, "data": images.record["data"], "statistics": self.statistics.digest()}
            self._projections = results.load(
                "projections", {**sizes, "images": len(images)}, data, mmap=True, **shown
            )
        names |= {"alpha": 1, **described}
        expected = {"fingerprint": clip.fingerprint}  # all that descriptions say of a model
        self.descriptions = load_descriptions(
            results, sizes, {**expected, "targets": digest(self.statistics.pcas)}, **names
        )
        expected |= {"statistics": self.statistics.digest()}
        fires_on, graded = (
            results.find("fires_on", **names).is_file(),
            {**names, "dataset": images.dataset, "split": held_out},
        )
        self.fires_on = (
            load_descriptions(results, sizes, expected, kind="fires_on", **names) if fires_on else None
        )
        self.graded = (
            load_grades(results, sizes, expected, **graded)
            if results.find("grades", **graded).is_file()
            else None
        )
        self.centred_norms = CentredNorms(self.directions, self.statistics.mean)
        self._along = Rebuilt(self.directions, self.statistics.mean, self.statistics.pcas)

    def effects(self, pixels):
        """`SecondOrder` of transformed images [n, 3, side, side]."""
        return next(second_order(self.clip.vit, pixels, [self.directions])[1])

    def largest(self, count):
        """The neurons with the largest effects (mean of their k largest norms): int [count], largest
        first.
        """
        return np.argsort(-self.norms.mean(axis=1), kind="stable")[:count]

    def measured(self, neuron):
        """On all images, the norms of the neuron's centred effects [images] and their projections on its
        component [images]; None for these where only the norms are stored."""
        if self._stored is None:
            along = None if self._projections is None else np.asarray(self._projections[:, neuron])
            return np.asarray(self._image_norms[:, neuron]), along
        centred = self._stored.of(neuron) - self.statistics.mean[neuron]
        return centred.norm(dim=1).cpu().numpy(), (centred @ self.statistics.pcas[neuron]).cpu().numpy()

    def top_images(self, neuron, count, by="norm"):
        """Row numbers [count] of the images with the neuron's largest effects, largest first.

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
        """Run images through the tower: pictures [n, S, S, 3] in [0, 1], the neuron's activation maps [n,
        rows, columns], and the projections [n] of its centred effects on its first component."""
        items = [self.images[int(row)] for row in rows]
        for item in items:
            if isinstance(item, UserError):
                raise item
        pixels = torch.stack([image for image, _ in items]).to(self.clip.device)
        return (to_pictures(pixels, self.clip.transform, (224, 224)), *self.activity(pixels, neuron))

    @torch.inference_mode()
    def activity(self, pixels, neuron):
        """Maps [n, rows, columns] and projections [n] of one neuron on transformed images [n, 3, side,
        side].
        """
        vit, name = self.clip.vit, f"blocks.{self.layer}.mlp.post"
        with vit.record(name) as cache:
            phi = self.effects(pixels)
            maps = cache[name][:, vit.prefix :, neuron].unflatten(1, vit.grid)
        return maps.cpu().numpy(), self._along.projections(phi)[:, neuron].cpu().numpy()

    def card(self, neuron, pictures=8, words=8, by="projection"):
        """The neuron's card, a figure: the images with its largest effects (`by` as in `top_images`; along
        its component most project positively, by the component's sign), the texts that it writes and those
        that it fires on, with their grades and those of another neuron's texts, and the histogram of its
        norms."""
        shown, maps, _ = self.look(self.top_images(neuron, pictures, by), neuron)
        title = f"layer {self.layer}, neuron {neuron}, {self.images.split} images by {by}"
        if self.explained is not None:
            title += f": {100 * self.explained[neuron]:.0f} % of its largest effects lie along one direction"
        sides = {}
        for side, described in (("writes", self.descriptions), ("fires_on", self.fires_on)):
            if described is not None:
                sides[self._name_of(side, neuron)] = [(text, c) for _, c, text in described[neuron][:words]]
        norms, _ = self.measured(neuron)
        return plot_neuron(
            title, shown, np.maximum(maps, 0), sides, norms=norms, threshold=self.norms[neuron, 0]
        )

    def _name_of(self, side, neuron):
        """What stands above the texts of a side."""
        name = side.replace("_", " ")
        if self.graded is None:
            return name
        own, null = (self.graded.of(row, "pearson_without")[neuron] for row in (side, f"null_{side}"))
        return f"{name}: r = {own:.2f} (another's {null:.2f})"
