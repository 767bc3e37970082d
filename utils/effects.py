"""Second-order effects on disk: factorised or dense, read back by blocks of neurons through one interface.

Factorised (what compute_second_order_neuron_prs.py writes): coefficients [images, K, N], bias [images, D],
values [K, N, e], outputs [K, e, D]; phi[i, n] = sum_k coefficients[i, k, n] values[k, n] @ outputs[k] + bias[i].
Dense (`--merged`, and the published code): merged [images, N, D].
"""

import numpy as np
import torch

from utils.artifacts import load_array, load_meta
from utils.errors import UserError
from utils.prs import CentredNorms, Directions

READ_IMAGES = 512  # rows copied from one memory map, which is then closed, so that its pages do not count as ours


def open_effects(names, dataset, split, layer, device="cpu"):
    """The effects of one layer that `names.directory` holds, whichever form they have; blocks are read to `device`.

    Raises UserError when there are none, or when parts of them do not belong together.
    """
    command = f"python compute_second_order_neuron_prs.py --mlp_layer {layer} --dataset {dataset} --split {split} ..."
    path = names.effects(dataset, split, layer, "coefficients")
    if path.is_file() or not names.effects(dataset, split, layer, "merged").is_file():
        return FactorisedEffects(names, dataset, split, layer, command, device)
    return DenseEffects(names.effects(dataset, split, layer, "merged"), command, device)


def stored_layers(names, dataset, layers, parts, script):
    """The layers that `--mlp_layer` names where no model is loaded: numbers as they are, 'all' by the files that are there.

    parts: of which at least one has to be there. script: what makes them, for the message.
    """
    if layers != ["all"]:
        wrong = [layer for layer in layers if not layer.isdecimal()]
        if wrong:
            raise UserError(f"--mlp_layer {wrong[0]} is no layer; give numbers, or 'all'")
        return sorted({int(layer) for layer in layers})
    found = set()
    for part in parts:
        pattern = names.effects(dataset, "train", "*", part)
        prefix, suffix = pattern.name.split("*")
        middles = (path.name.removeprefix(prefix).removesuffix(suffix) for path in pattern.parent.glob(pattern.name))
        found |= {int(middle) for middle in middles if middle.isdecimal()}  # others are of weights with a longer name
    if not found:
        raise UserError(
            f"{names.directory} has no {' or '.join(parts)} of {dataset}; make them with: python {script} --mlp_layer all "
            f"--dataset {dataset} ..."
        )
    return sorted(found)


class _Effects:
    """Sizes and the walk over blocks of neurons that both forms share."""

    def slices(self, memory, k):
        """Slices of the neurons; reading one, or forming its k top effects in float64, takes about `memory` bytes."""
        floats = max(self.images * self.floats_per_neuron, 3 * k * self.D)
        block = max(1, int(memory / (4 * floats)))
        return [slice(n, min(n + block, self.N)) for n in range(0, self.N, block)]


class FactorisedEffects(_Effects):
    """Effects as coefficients and directions."""

    def __init__(self, names, dataset, split, layer, command, device):
        self.path = names.effects(dataset, split, layer, "coefficients")
        self.images, self.K, self.N = load_array(self.path, command, (None, None, None), mmap=True).shape
        self.meta = load_meta(self.path)
        expected = {"fingerprint": self.meta.get("fingerprint"), "data": self.meta.get("data")}

        def read(part, *shape):
            array = load_array(names.effects(dataset, split, layer, part), command, shape, **expected)
            return torch.from_numpy(array).to(device, torch.float32)

        self.values = read("values", self.K, self.N, None)
        self.outputs = read("outputs", self.K, self.values.shape[2], None)
        self.D = self.outputs.shape[2]
        self.bias = read("bias", self.images, self.D)
        self.floats_per_neuron = self.K
        self.layer, self.device = layer, device

    def read(self, neurons):
        coefficients = np.empty((self.images, self.K, neurons.stop - neurons.start), np.float32)
        for row in range(0, self.images, READ_IMAGES):
            stored = np.load(self.path, mmap_mode="r", allow_pickle=False)
            coefficients[row : row + READ_IMAGES] = stored[row : row + READ_IMAGES, :, neurons]
        directions = Directions(self.layer, self.values[:, neurons], self.outputs, None)
        return _FactorisedBlock(torch.from_numpy(coefficients).to(self.device), self.bias, directions)


class DenseEffects(_Effects):
    """Effects as the published code stores them."""

    def __init__(self, path, command, device):
        self.path, self.device = path, device
        self.images, self.N, self.D = load_array(path, command, (None, None, None), mmap=True).shape
        self.meta = load_meta(path)
        self.floats_per_neuron = self.D

    def read(self, neurons):
        block = np.empty((self.images, neurons.stop - neurons.start, self.D), np.float32)
        for row in range(0, self.images, READ_IMAGES):
            stored = np.load(self.path, mmap_mode="r", allow_pickle=False)
            block[row : row + READ_IMAGES] = stored[row : row + READ_IMAGES, neurons]
        return _DenseBlock(torch.from_numpy(block).to(self.device))


class _DenseBlock:
    """Effects of n neurons on all images, [images, n, D]."""

    def __init__(self, effects):
        self.mean = effects.mean(dim=0)  # [n, D]
        self.centred = effects.sub_(self.mean)

    def norms(self, rows):
        """|phi - mean| of a slice of images: [rows, n]."""
        return self.centred[rows].norm(dim=-1)

    def take(self, images):
        """Centred effects of chosen images: images [n, k] -> [n, k, D]."""
        neurons = torch.arange(images.shape[0], device=images.device)[:, None]
        return self.centred[images, neurons]


class _FactorisedBlock:
    """The same of coefficients [images, K, n]; the effects themselves are formed only for the images that are asked for."""

    def __init__(self, coefficients, bias, directions):
        self.coefficients, self.bias = coefficients, bias
        B_n = torch.einsum("kne,keo->nko", directions.values, directions.outputs)  # [n, K, D]
        mean_coefficients = coefficients.mean(dim=0).T  # [n, K]
        self.mean = torch.einsum("nk,nko->no", mean_coefficients, B_n) + bias.mean(dim=0)
        self.centred_norms = CentredNorms(directions, self.mean)
        self.mean_coefficients, self.mean_bias, self.B_n = mean_coefficients, bias.mean(dim=0), B_n

    def norms(self, rows):
        return self.centred_norms(self.coefficients[rows], self.bias[rows])

    def take(self, images):
        neurons = torch.arange(images.shape[0], device=images.device)[:, None]
        x = self.coefficients[images, :, neurons] - self.mean_coefficients[:, None]  # [n, k, K]
        return torch.bmm(x, self.B_n) + (self.bias[images] - self.mean_bias)
