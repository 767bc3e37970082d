"""Second-order effects on disk: factorised, dense, or the largest only; read back by blocks of neurons through one interface.

Factorised (what compute_second_order_neuron_prs.py writes): coefficients [images, K, N], bias [images, D],
values [K, N, e], outputs [K, e, D]; phi[i, n] = sum_k coefficients[i, k, n] values[k, n] @ outputs[k] + bias[i].
Dense (`--merged`, and the published code): merged [images, N, D].
The largest only (`--keep top`, `utils.top_effects`): top_coefficients [N, kept, K] (centred, by falling norm), top_images
[N, kept], top_mean [N, D], bias, values and outputs.
"""

from functools import cached_property

import numpy as np
import torch

from utils.artifacts import load_array, load_meta, save_array
from utils.errors import UserError
from utils.prs import CentredNorms, Directions

READ_IMAGES = 512  # rows copied from one memory map, which is then closed, so that its pages do not count as ours


def open_effects(names, dataset, split, layer, device="cpu"):
    """The effects of one layer that `names.directory` holds, whichever form they have; blocks are read to `device`.

    Raises UserError when there are none, or when parts of them do not belong together.
    """
    command = f"python compute_second_order_neuron_prs.py --mlp_layer {layer} --dataset {dataset} --split {split} ..."
    forms = {"coefficients": FactorisedEffects, "top_coefficients": KeptEffects, "merged": DenseEffects}
    there = [part for part in forms if names.effects(dataset, split, layer, part).is_file()]
    form = forms[there[0] if there else "coefficients"]
    return form(names, dataset, split, layer, command, device)


def save_directions(names, dataset, split, directions, meta):
    """Write the weights' part of one layer's effects, values and outputs."""
    for part in ("values", "outputs"):
        path = names.effects(dataset, split, directions.layer, part)
        save_array(path, getattr(directions, part).cpu().numpy(), meta)


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
    """Sizes and the walk over blocks of neurons that all forms share."""

    K = 0  # directions of a neuron
    image_norms = None  # where the norms of all effects lie, if an earlier stage has computed them
    kept = None  # how many effects of every neuron there are, if not all

    def slices(self, memory, k):
        """Slices of the neurons; reading one, or forming its directions or its k top effects in float64, takes about `memory`
        bytes."""
        floats = max(self.images * self.floats_per_neuron, 3 * k * self.D, 3 * self.K * self.D)
        block = max(1, int(memory / (4 * floats)))
        return [slice(n, min(n + block, self.N)) for n in range(0, self.N, block)]


class FactorisedEffects(_Effects):
    """Effects as coefficients and directions."""

    def __init__(self, names, dataset, split, layer, command, device):
        self.path = names.effects(dataset, split, layer, "coefficients")
        self.images, self.K, self.N = load_array(self.path, command, (None, None, None), mmap=True).shape
        self.meta = load_meta(self.path)
        expected = {"fingerprint": self.meta.get("fingerprint"), "data": self.meta.get("data")}

        def opened(part, *shape):
            return load_array(names.effects(dataset, split, layer, part), command, shape, mmap=True, **expected)

        self._values = opened("values", self.K, self.N, None)
        self._outputs = opened("outputs", self.K, self._values.shape[2], None)
        self.D = self._outputs.shape[2]
        self._bias = opened("bias", self.images, self.D)
        self.floats_per_neuron = self.K
        self.layer, self.device = layer, device

    @cached_property
    def parts(self):
        """values, outputs and bias on the device."""
        arrays = (self._values, self._outputs, self._bias)
        return [torch.from_numpy(np.array(array)).to(self.device, torch.float32) for array in arrays]

    def read(self, neurons):
        coefficients = np.empty((self.images, self.K, neurons.stop - neurons.start), np.float32)
        for row in range(0, self.images, READ_IMAGES):
            stored = np.load(self.path, mmap_mode="r", allow_pickle=False)
            coefficients[row : row + READ_IMAGES] = stored[row : row + READ_IMAGES, :, neurons]
        values, outputs, bias = self.parts
        directions = Directions(self.layer, values[:, neurons], outputs, None)
        return _FactorisedBlock(torch.from_numpy(coefficients).to(self.device), bias, directions)


class DenseEffects(_Effects):
    """Effects as the published code stores them."""

    def __init__(self, names, dataset, split, layer, command, device):
        path = self.path = names.effects(dataset, split, layer, "merged")
        self.device = device
        self.images, self.N, self.D = load_array(path, command, (None, None, None), mmap=True).shape
        self.meta = load_meta(path)
        self.floats_per_neuron = self.D

    def read(self, neurons):
        block = np.empty((self.images, neurons.stop - neurons.start, self.D), np.float32)
        for row in range(0, self.images, READ_IMAGES):
            stored = np.load(self.path, mmap_mode="r", allow_pickle=False)
            block[row : row + READ_IMAGES] = stored[row : row + READ_IMAGES, neurons]
        return _DenseBlock(torch.from_numpy(block).to(self.device))


class KeptEffects(_Effects):
    """What `--keep top` leaves: of every neuron the mean, and the largest centred effects, as coefficients."""

    def __init__(self, names, dataset, split, layer, command, device):
        self.path = names.effects(dataset, split, layer, "top_coefficients")
        self.N, self.kept, self.K = load_array(self.path, command, (None, None, None), mmap=True).shape
        self.meta = load_meta(self.path)
        expected = {"fingerprint": self.meta.get("fingerprint"), "data": self.meta.get("data")}

        def opened(part, *shape):
            return load_array(names.effects(dataset, split, layer, part), command, shape, mmap=True, **expected)

        self._outputs = opened("outputs", self.K, None, None)
        self.D = self._outputs.shape[2]
        self._values, self._mean = opened("values", self.K, self.N, self._outputs.shape[1]), opened("top_mean", self.N, self.D)
        self._top_images, self._bias = opened("top_images", self.N, self.kept), opened("bias", None, self.D)
        self.images, self.floats_per_neuron = len(self._bias), self.kept * self.K // len(self._bias) + 1
        self.image_norms = names.statistics(dataset, layer, "image_norms")
        load_array(self.image_norms, command, (self.images, self.N), mmap=True, **expected)
        self.device = device

    def read(self, neurons):
        arrays = (self._values[:, neurons], self._outputs, np.load(self.path, mmap_mode="r")[neurons], self._mean[neurons])
        values, outputs, x, mean = (torch.from_numpy(np.array(array)).to(self.device) for array in arrays)
        bias = self._bias[self._top_images[neurons]] - self._bias.mean(axis=0)  # [n, kept, D]
        B_n = torch.einsum("kne,keo->nko", values, outputs)
        return _KeptBlock(mean, torch.bmm(x, B_n) + torch.from_numpy(bias).to(self.device))


class _Block:
    """Effects of n neurons: their mean [n, D] as `mean`."""

    def top(self, k):
        """The centred effects [n, k, D] of every neuron's k images of largest norm, and the norms of all effects [images, n]."""
        norms = torch.cat([self.norms(slice(i, i + READ_IMAGES)) for i in range(0, self.images, READ_IMAGES)])
        return self.take(norms.topk(k, dim=0).indices.T), norms


class _KeptBlock(_Block):
    """The largest centred effects, by falling norm [n, kept, D]."""

    def __init__(self, mean, rows):
        self.mean, self.rows = mean, rows

    def top(self, k):
        return self.rows[:, :k], None


class _DenseBlock(_Block):
    """Effects of n neurons on all images, [images, n, D]."""

    def __init__(self, effects):
        self.images = len(effects)
        self.mean = effects.mean(dim=0)  # [n, D]
        self.centred = effects.sub_(self.mean)

    def norms(self, rows):
        """|phi - mean| of a slice of images: [rows, n]."""
        return self.centred[rows].norm(dim=-1)

    def take(self, images):
        """Centred effects of chosen images: images [n, k] -> [n, k, D]."""
        neurons = torch.arange(images.shape[0], device=images.device)[:, None]
        return self.centred[images, neurons]


class _FactorisedBlock(_Block):
    """The same of coefficients [images, K, n]; the effects themselves are formed only for the images that are asked for."""

    def __init__(self, coefficients, bias, directions):
        self.coefficients, self.bias, self.images = coefficients, bias, len(bias)
        B_n = torch.einsum("kne,keo->nko", directions.values, directions.outputs)  # [n, K, D]
        mean_coefficients = coefficients.mean(dim=0).T  # [n, K]
        self.mean = torch.einsum("nk,nko->no", mean_coefficients, B_n) + bias.mean(dim=0)
        self.mean_coefficients, self.mean_bias, self.B_n = mean_coefficients, bias.mean(dim=0), B_n
        self.centred_norms = CentredNorms(directions, (mean_coefficients.T, self.mean_bias))

    def norms(self, rows):
        return self.centred_norms(self.coefficients[rows], self.bias[rows])

    def take(self, images):
        neurons = torch.arange(images.shape[0], device=images.device)[:, None]
        x = self.coefficients[images, :, neurons] - self.mean_coefficients[:, None]  # [n, k, K]
        return torch.bmm(x, self.B_n) + (self.bias[images] - self.mean_bias)
