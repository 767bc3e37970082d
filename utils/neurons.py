"""One layer's neurons to look at: what the notebooks and the demo's cards show, from the files of the stages."""

import numpy as np
import torch

from utils.ablation import Rebuilt, load_statistics
from utils.norms import CentredNorms
from utils.prs import COEFFICIENT, fold, second_order
from utils.runtime.errors import UserError
from utils.sparse_coding import load_descriptions
from utils.visualization import plot_neuron, to_pictures


class NeuronLayer:
    """The statistics and descriptions of one MLP layer, and the images behind them.

    clip, results: the loaded `Clip`; `Results` of the stages' folder.
    images: the train split's `Images`, from which the effects were made.
    layer, k: the MLP layer; images per neuron, as in compute_pcas.py.
    described: {"texts": name of the text set, "components": texts per neuron, "alpha": as in the files' names}.

    Attributes: norms [N, k] ascending, explained [N], image_norms [images, N] (memory map), descriptions (of every neuron, as
    `load_descriptions` gives them), statistics, directions, centred_norms.

    Raises UserError, with the command, when a file is missing or of other images or weights.
    """

    def __init__(self, clip, results, images, layer, described, k=100):
        self.clip, self.images, self.layer = clip, images, layer
        self.directions = fold(clip.vit, layer)
        names = {"dataset": images.dataset, "layer": layer, "k": k}
        expected = {"fingerprint": clip.fingerprint}
        self.statistics = load_statistics(results, images.dataset, [layer], k, clip=clip, coefficient=COEFFICIENT)[layer]
        self.norms, self.explained = (results.load(kind, clip.vit.sizes, expected, **names) for kind in ("norm", "explained"))
        self.image_norms = results.load("image_norms", clip.vit.sizes, expected, mmap=True, **names)
        if len(self.image_norms) != len(images):
            counts = f"the statistics are of {len(self.image_norms)} images and there are {len(images)}"
            raise UserError(f"{counts}; use the same --data_path and --subsample as for compute_second_order_neuron_prs.py")
        self.descriptions = load_descriptions(results, clip.vit.sizes, expected, **names, **{"alpha": 1, **described})
        self.centred_norms = CentredNorms(self.directions, self.statistics.mean)
        self._along = Rebuilt(self.directions, self.statistics.mean, self.statistics.pcas)

    def effects(self, pixels):
        """`SecondOrder` of transformed images [n, 3, side, side]."""
        return next(second_order(self.clip.vit, pixels, [self.directions])[1])

    def largest(self, count):
        """The neurons with the largest effects (mean of their k largest norms): int [count], largest first."""
        return np.argsort(-self.norms.mean(axis=1), kind="stable")[:count]

    def top_images(self, neuron, count):
        """The images with the neuron's largest effects: row numbers [count], largest first."""
        return np.argsort(-np.asarray(self.image_norms[:, neuron]), kind="stable")[:count]

    @torch.inference_mode()
    def look(self, rows, neuron):
        """Run images through the tower: pictures [n, S, S, 3] in [0, 1], the neuron's activation maps [n, rows, columns], and
        the projections [n] of its centred effects on its first component."""
        items = [self.images[int(row)] for row in rows]
        for item in items:
            if isinstance(item, UserError):
                raise item
        pixels = torch.stack([image for image, _ in items]).to(self.clip.device)
        return (to_pictures(pixels, self.clip.transform, (224, 224)), *self.activity(pixels, neuron))

    @torch.inference_mode()
    def activity(self, pixels, neuron):
        """Maps [n, rows, columns] and projections [n] of one neuron on transformed images [n, 3, side, side]."""
        vit, name = self.clip.vit, f"blocks.{self.layer}.mlp.post"
        with vit.record(name) as cache:
            phi = self.effects(pixels)
            maps = cache[name][:, 1:, neuron].unflatten(1, vit.grid)
        return maps.cpu().numpy(), self._along.projections(phi)[:, neuron].cpu().numpy()

    def card(self, neuron, pictures=8, words=8):
        """The neuron's card, a figure: the images with the largest effects along its component (most project positively, by
        the component's sign), its texts, the histogram of its norms."""
        shown, maps, projections = self.look(self.top_images(neuron, 4 * pictures), neuron)
        order = np.argsort(-projections, kind="stable")[:pictures]
        share = 100 * self.explained[neuron]
        title = f"layer {self.layer}, neuron {neuron}: {share:.0f} % of its largest effects lie along one direction"
        words = [(text, coefficient) for _, coefficient, text in self.descriptions[neuron][:words]]
        norms = np.asarray(self.image_norms[:, neuron])
        return plot_neuron(title, shown[order], np.maximum(maps[order], 0), words, norms=norms, threshold=self.norms[neuron, 0])
