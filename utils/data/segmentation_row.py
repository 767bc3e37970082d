"""A `Row` is the settings of one line of the table of segmentation methods (Table 4).

The stage, the demo and the page of the paper share it. It imports neither torch nor open_clip, because the
demo asks for names of results before it loads anything.
"""

from dataclasses import dataclass, fields
from pathlib import Path

OF_NEURONS = ("second_order", "random")
OF_UNITS = (*OF_NEURONS, "pairs")
OF_CLASSES = ("second_order", "first_order", "gradcam", "chefer", "pairs")
NAME_PARTS = {  # how the name of a row says that a setting is not the default
    "seed": "seed{}".format,
    "neuron_sign": str,
    "class_source": lambda path: Path(path).stem,
    "geometry": str,
    "mask_thr": "mask{:g}".format,
    "thr": "thr{:g}".format,
    "image_size": "{}px".format,
    "ignore_index": lambda values: f"ignore{'_'.join(map(str, values))}",
}
METHODS_WITH = {  # settings that only some methods depend on
    "layers": OF_UNITS,
    "top_neurons": OF_UNITS,
    "train_dataset": OF_CLASSES,
    "neuron_sign": ("second_order",),
    "class_source": OF_CLASSES,
    "top_k_pca": ("second_order",),
    "seed": ("random",),
}
FLAGS = {"layers": "mlp_layers", "train_dataset": "dataset"}  # where a flag has another name than the setting


@dataclass(frozen=True)
class Row:
    """A Row holds everything that the maps and scores of a method depend on, besides model and images.

    method: one of `utils.segmentation.METHODS`.
    geometry: of the masks, as in `SegmentationSet`.
    image_size: side of the scored maps; None for the model's.
    mask_thr, thr: as in `utils.segmentation.Scores`.
    ignore_index: values of mask pixels that do not count.
    layers: MLP layers whose neurons are taken together.
    top_neurons: neurons per image, over all layers; of pairs, those of each layer.
    train_dataset: data set of the components and the classifier.
    neuron_sign: as in `utils.segmentation.neurons_of_classes`.
    class_source: "predicted", or a file with the class of every image.
    top_k_pca: effects per neuron behind its component.
    seed: of the random neurons.
    """

    method: str = "second_order"
    geometry: str = "paper"
    image_size: int | None = None
    mask_thr: float = 0.5
    thr: float = 0.0
    ignore_index: tuple = (-1, 255)
    layers: tuple = (8, 9, 10)
    top_neurons: int = 200
    train_dataset: str = "imagenet"
    neuron_sign: str = "both"
    class_source: str = "predicted"
    top_k_pca: int = 100
    seed: int = 0

    @property
    def name(self):
        """name is the method, its neurons, and each setting that is not the default, for tables and files."""
        words = [self.method]
        if self.method in OF_UNITS:
            words += ["-".join(map(str, self.layers)), str(self.top_neurons)]
        words += [word(getattr(self, key)) for key, word in NAME_PARTS.items() if self._changes(key)]
        return "_".join(words)

    def flags(self):
        """Return what one types for this row after compute_segmentation.py, besides model and images: words.

        A setting that the name leaves out because it is the default is left out here, too.
        """
        words = []
        for key, value in self.record().items():
            if key not in NAME_PARTS or self._changes(key):
                values = value if isinstance(value, tuple) else [value]
                words += [f"--{FLAGS.get(key, key)}", *map(str, values)]
        return words

    def record(self):
        """Return {setting: value} of the settings that the method depends on, as results record them."""
        keys = [field.name for field in fields(self)]
        return {key: getattr(self, key) for key in keys if self._uses(key)}

    def _uses(self, key):
        return key not in METHODS_WITH or self.method in METHODS_WITH[key]

    def _changes(self, key):
        """Return whether the method depends on a setting that is not the default."""
        return self._uses(key) and getattr(self, key) != getattr(Row, key)
