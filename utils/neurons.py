"""One layer's neurons to look at: what the notebooks and the demo's cards show, from the files of the stages."""

import numpy as np
import torch

from utils.ablation import Rebuilt, load_statistics
from utils.artifacts import load_array
from utils.concepts import load_descriptions
from utils.errors import UserError
from utils.prs import fold, second_order
from utils.visualization import plot_neuron, to_pictures


class NeuronLayer:
    """The statistics and descriptions of one MLP layer, with the images that they are of.

    Parameters
    clip: the loaded `Clip`. names: `Names` of the results. images: the train split's `Images`, as the effects were made from.
    dataset, layer, k, text_descriptions, components, alpha: as in the names of the files. coefficient: as in the stages.

    Attributes: norms [N, k] ascending, explained [N], image_norms [images, N] (memory map), descriptions (list over neurons of
    (text index, coefficient, text) by falling |coefficient|), statistics, directions, vit.

    Raises UserError, naming the command, when a file is missing or of other images or weights.
    """

    def __init__(
        self, clip, names, images, dataset, layer, text_descriptions, components, k=100, alpha=1, coefficient=100.0, flags=""
    ):
        self.clip, self.images, self.layer, self.coefficient = clip, images, layer, coefficient
        self.vit = clip.hooked_vit()
        self.directions = fold(self.vit, layer)
        self.statistics = load_statistics(names, dataset, layer, k, clip, flags, coefficient)
        command = f"python compute_pcas.py --mlp_layer {layer} --top_k_pca {k} --dataset {dataset} {flags}"

        def read(part, *shape, **options):
            path = names.statistics(dataset, layer, part)
            return load_array(path, command, shape, fingerprint=clip.fingerprint, **options)

        self.norms, self.explained = read(f"{k}_norm", self.vit.N, k), read(f"{k}_explained", self.vit.N)
        self.image_norms = read("image_norms", None, self.vit.N, mmap=True)
        if len(self.image_norms) != len(images):
            raise UserError(
                f"the statistics are of {len(self.image_norms)} images and there are {len(images)}; use the same --data_path and "
                "--subsample as for compute_second_order_neuron_prs.py"
            )
        self.descriptions = load_descriptions(names, dataset, layer, text_descriptions, alpha, components, self.vit.N, flags)
        self._along = Rebuilt(self.directions, self.statistics.mean, self.statistics.pcas)

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
        pixels = torch.stack([self._image(row) for row in rows]).to(self.clip.device)
        return (to_pictures(pixels, self.clip.transform, (224, 224)), *self.activity(pixels, neuron))

    @torch.inference_mode()
    def activity(self, pixels, neuron):
        """Maps [n, rows, columns] and projections [n] of one neuron on transformed images [n, 3, side, side]."""
        name = f"blocks.{self.layer}.mlp.post"
        with self.vit.record(name) as cache:
            _, [(C, kappa)] = second_order(self.vit, pixels, [self.directions], self.coefficient)
            maps = cache[name][:, 1:, neuron].unflatten(1, self.vit.grid)
        return maps.cpu().numpy(), self._along.projections(C, kappa)[:, neuron].cpu().numpy()

    def _image(self, row):
        item = self.images[int(row)]
        if isinstance(item, UserError):
            raise item
        return item[0]

    def card(self, neuron, pictures=8, words=8):
        """The neuron's card, a figure: the images with the largest effects along its component (most project positively, by
        the component's sign), its texts, the histogram of its norms."""
        entries = self.descriptions[neuron][:words]
        shown, maps, projections = self.look(self.top_images(neuron, 4 * pictures), neuron)
        order = np.argsort(-projections, kind="stable")[:pictures]
        share = 100 * self.explained[neuron]
        title = f"layer {self.layer}, neuron {neuron}: {share:.0f} % of its largest effects lie along one direction"
        words = [(text, coefficient) for _, coefficient, text in entries]
        norms = np.asarray(self.image_norms[:, neuron])
        return plot_neuron(title, shown[order], np.maximum(maps[order], 0), words, norms, self.norms[neuron, 0])
