"""Second-order effects on disk: factorised, dense, or the largest only. Three readers give what the statistics need.

Factorised (what compute_second_order_neuron_prs.py writes): coefficients [images, K, N], bias [images, D],
values [K, N, e], outputs [K, e, D]; phi[i, n] = sum_k coefficients[i, k, n] values[k, n] @ outputs[k] + bias[i].
Dense (`--merged`, and the published code): merged [images, N, D].
The largest only (`--keep top`, `utils.top_effects`): top_coefficients [N, kept, K] (centred, by falling norm), top_images
[N, kept], top_mean [N, D], bias, values and outputs.
"""

import shutil
from functools import partial

import numpy as np
import torch

from utils.norms import CentredNorms
from utils.prs import Directions, SecondOrder
from utils.runtime.distributed import is_rank_zero
from utils.runtime.files import sampled_digest, save_atomic
from utils.runtime.results import load_record, publish

READ_IMAGES = 512  # rows copied from one memory map, which is then closed, so that its pages do not count as ours
FORMS = ("coefficients", "top_coefficients", "merged")


def open_effects(results, dataset, split, layer, device="cpu"):
    """The effects of one layer in a folder, in whichever form they are there.

    results: `Results` of the folder.
    dataset, split, layer: in the files' names.
    device: where the statistics are computed.

    Raises UserError when there are none, or when parts of them do not belong together.
    """
    names = {"dataset": dataset, "split": split, "layer": layer}
    readers = dict(zip(FORMS, (FactorisedEffects, TopEffects, DenseEffects), strict=True))
    there = [form for form in FORMS if results.path(form, **names).is_file()]
    return readers[there[0] if there else "coefficients"](results, names, device)


def copy_norms(effects, results):
    """Copy the norms of all effects, where they are stored with the effects, into the folder of the other statistics."""
    names = {"dataset": effects.names["dataset"], "layer": effects.names["layer"]}
    source, target = (place.path("image_norms", **names) for place in (effects.results, results))
    if is_rank_zero() and source.resolve() != target.resolve():
        with open(source, "rb") as file:
            rename = partial(publish, record=load_record(source))
            save_atomic(target, lambda out: shutil.copyfileobj(file, out), rename)


def slices(neurons, floats, memory):
    """Slices of a number of neurons; one with `floats` numbers for each takes about `memory` bytes."""
    block = max(1, int(memory / (4 * floats)))
    return [slice(start, min(start + block, neurons)) for start in range(0, neurons, block)]


class _Effects:
    """What the readers share.

    Attributes: N, D (sizes), images, kept (largest effects of a neuron that are there), path (of the main array), record (what
    the effects were made from), has_norms (whether the norms of all effects are among the results already).
    """

    has_norms = False

    def __init__(self, results, names, device):
        self.results, self.names, self.device = results, names, device
        self.path = results.path(self.main, **names)
        self.array = results.load(self.main, mmap=True, **names)
        record = load_record(self.path)
        self.record = {key: record[key] for key in record if key not in ("shape", "dtype", "method", "layers", "batch_size")}
        if not record:  # made by the published code: known by its content
            self.record["effects"] = sampled_digest(self.array)
        if record and self.array.dtype != np.float32:
            self.record["store_dtype"] = str(self.array.dtype)

    def load(self, kind, **sizes):
        """Another part of the effects, as a memory map: of the same weights and images, and of these sizes."""
        expected = {key: self.record.get(key) for key in ("fingerprint", "data")}
        return self.results.load(kind, sizes, expected, mmap=True, **self.names)

    def tensor(self, array):
        """A copy on the device, in float32."""
        return torch.from_numpy(np.array(array)).to(self.device, torch.float32)

    def read_rows(self, take):
        """take(rows of the main array) for blocks of rows, concatenated, in float32."""
        blocks = []
        for row in range(0, self.images, READ_IMAGES):
            stored = np.load(self.path, mmap_mode="r", allow_pickle=False)
            blocks.append(np.asarray(take(stored[row : row + READ_IMAGES]), np.float32))
        return torch.from_numpy(np.concatenate(blocks)).to(self.device)


class FactorisedEffects(_Effects):
    """Effects as coefficients and directions; they are formed only for the images of a neuron's largest ones."""

    main = "coefficients"

    def __init__(self, results, names, device):
        super().__init__(results, names, device)
        self.images, K, self.N = self.array.shape
        self.kept = self.images
        values = self.load("values", K=K, N=self.N)
        outputs = self.load("outputs", K=K, e=values.shape[2])
        self.D = outputs.shape[2]
        bias = self.load("bias", images=self.images, D=self.D)
        self.directions = Directions(names["layer"], self.tensor(values), self.tensor(outputs), None)
        self.bias, self.floats = self.tensor(bias), max(self.images * K, 3 * K * self.D)

    def top(self, neurons, k):
        """Statistics of a slice of neurons.

        Returns mean effects [n, D]; centred effects [n, k, D] of every neuron's k images of largest norm, by falling norm; and
        the norms of all centred effects [images, n], None where they are stored already.
        """
        C = self.read_rows(lambda rows: rows[:, :, neurons])  # [images, K, n]
        directions = self.directions._replace(values=self.directions.values[:, neurons])
        B_n, mean_C, mean_bias = directions.B(), C.mean(dim=0).T, self.bias.mean(dim=0)  # [n, K, D], [n, K], [D]
        centred_norms = CentredNorms(directions, (mean_C.T, mean_bias))
        rows = [slice(i, i + READ_IMAGES) for i in range(0, self.images, READ_IMAGES)]
        norms = torch.cat([centred_norms(SecondOrder(C[i], self.bias[i], directions)) for i in rows])
        images = norms.topk(k, dim=0).indices.T  # [n, k]
        x = C[images, :, torch.arange(len(images), device=images.device)[:, None]] - mean_C[:, None]  # [n, k, K]
        top = torch.bmm(x, B_n) + (self.bias[images] - mean_bias)
        return torch.einsum("nk,nko->no", mean_C, B_n) + mean_bias, top, norms


class DenseEffects(_Effects):
    """Effects as the published code stores them."""

    main = "merged"

    def __init__(self, results, names, device):
        super().__init__(results, names, device)
        self.images, self.N, self.D = self.array.shape
        self.kept, self.floats = self.images, self.images * self.D

    def top(self, neurons, k):
        """As `FactorisedEffects.top`."""
        phi = self.read_rows(lambda rows: rows[:, neurons])  # [images, n, D]
        mean = phi.mean(dim=0)
        phi -= mean
        norms = torch.cat([phi[i : i + READ_IMAGES].norm(dim=-1) for i in range(0, self.images, READ_IMAGES)])
        images = norms.topk(k, dim=0).indices.T  # [n, k]
        return mean, phi[images, torch.arange(len(images), device=images.device)[:, None]], norms


class TopEffects(_Effects):
    """What `--keep top` leaves: of every neuron the mean, and the largest centred effects, as coefficients."""

    main, has_norms = "top_coefficients", True

    def __init__(self, results, names, device):
        super().__init__(results, names, device)
        self.N, self.kept, self.K = self.array.shape
        outputs = self.load("outputs", K=self.K)
        self.outputs, self.D = self.tensor(outputs), outputs.shape[2]
        self.values = self.load("values", K=self.K, N=self.N, e=outputs.shape[1])
        self.mean = self.load("top_mean", N=self.N, D=self.D)
        self.top_images, self.bias = self.load("top_images", N=self.N, k=self.kept), self.load("bias", D=self.D)
        self.images = len(self.bias)
        self.floats = max(self.kept * self.K, 3 * self.K * self.D)
        self.load("image_norms", images=self.images, N=self.N)

    def top(self, neurons, k):
        """As `FactorisedEffects.top`."""
        x = self.tensor(np.load(self.path, mmap_mode="r", allow_pickle=False)[neurons])  # [n, kept, K]
        B_n = Directions(None, self.tensor(self.values[:, neurons]), self.outputs, None).B()
        bias = self.bias[self.top_images[neurons]] - self.bias.mean(axis=0)  # [n, kept, D]
        top = torch.bmm(x, B_n) + self.tensor(bias)
        return self.tensor(self.mean[neurons]), top[:, :k], None
