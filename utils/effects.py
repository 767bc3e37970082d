"""Second-order effects on disk: factorised, dense, or the largest only. Three readers give what the
statistics need.

Factorised: coefficients [images, K, N], values [K, N, e], outputs [K, e, D], bias [images, D];
    phi[i, n] = sum_k coefficients[i, k, n] values[k, n] @ outputs[k] + bias[i].
Dense (`--merged`, and the published code): merged [images, N, D].
The largest only (`--keep top`): top_coefficients [N, kept, K] (centred, by falling norm), top_images [N,
kept], top_mean [N, D],
    values, outputs and bias.
"""

import shutil
from functools import partial

import numpy as np
import torch

from utils.norms import CentredNorms
from utils.prs import Directions, SecondOrder
from utils.runtime.distributed import is_rank_zero
from utils.runtime.errors import UserError
from utils.runtime.files import read_array, sampled_digest, save_atomic
from utils.runtime.records import Digest, digest_of_parts, digests_of_files, load_record, publish

READ_IMAGES = 512  # rows read through one memory map; it is closed afterwards, so its pages do not count as this process's memory
SAME = (
    "fingerprint",
    "data",
    "coefficient",
    "preprocessing",
    "precision",
)  # what all parts of effects have to agree in
FORMS = ("coefficients", "top_coefficients", "merged")


def open_effects(results, dataset, split, layer, device="cpu"):
    """Open one layer's effects in whichever form they are stored.

    results, dataset, split, layer: the folder's `Results`, and what is in the files' names.
    device: where the statistics are computed.

    Raises UserError when there are none, or when parts of them do not belong together.
    """
    names, readers = (
        {"dataset": dataset, "split": split, "layer": layer},
        (FactorisedEffects, TopEffects, DenseEffects),
    )
    stored = [reader for reader in readers if results.find(reader.main, **names).is_file()]
    return (stored or readers)[0](results, names, device)


def mean_effects(results, sizes, expected, **names):
    """Mean effects of the train split [N, D]: those of compute_pcas.py; in a folder of the published code,
    which has none, the mean of its effects. Parameters as in `Results.load`."""
    path, merged = (results.find(kind, **names) for kind in ("mean", "merged"))
    if path.is_file() or not merged.is_file():
        return results.load("mean", sizes, expected, **names)
    print(f"{path.name} is missing, so {merged.name} is averaged")
    results.load("merged", sizes, expected, mmap=True, **names)  # or raises
    return DenseEffects(results, names, "cpu").mean()


def copy_norms(effects, results):
    """Copy the norms that are stored with the effects into the folder of the other statistics."""
    names = {"dataset": effects.names["dataset"], "layer": effects.names["layer"]}
    source, target = effects.results.find("image_norms", **names), results.path("image_norms", **names)
    if is_rank_zero() and source.resolve() != target.resolve():
        with open(source, "rb") as file:
            save_atomic(
                target,
                lambda out: shutil.copyfileobj(file, out),
                partial(publish, record=load_record(source)),
            )


def identity_of(path):
    """What changes when a file is replaced or written to; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def slices(neurons, floats, memory):
    """Slices of a number of neurons, each of about `memory` bytes at `floats` numbers a neuron."""
    block = max(1, int(memory / (4 * floats)))
    return [slice(start, min(start + block, neurons)) for start in range(0, neurons, block)]


class _Effects:
    """What the readers share.

    Attributes: N, D, images (sizes), kept (number of a neuron's effects that are stored), path (of the main
    array), record (what the effects were made from), has_norms (whether the norms of all effects are stored
    with them), main and parts (the kinds of their arrays).
    """

    has_norms = False

    def __init__(self, results, names, device):
        self.results, self.names, self.device = results, names, device
        self.seen = [identity_of(path) for path in self.files()]
        self.path, self.array = results.find(self.main, **names), results.load(self.main, mmap=True, **names)
        record = load_record(self.path)
        own = (
            "shape",
            "dtype",
            "method_number",
            "layers",
            "batch_size",
        )  # of the array, not of what it was made from
        self.record = {key: record[key] for key in record if key not in own}
        if record and self.array.dtype != np.float32:
            self.record["store_dtype"] = str(self.array.dtype)

    def content(self):
        """What tells these effects from others: a digest of all bytes of their files."""
        now = digest_of_parts([digest.encode() for digest in digests_of_files(self.files())])
        published = not load_record(self.path)  # known by a sample, in earlier versions
        return Digest(now, sampled_digest(self.array) if published else None)

    def load(self, kind, mmap=False, **sizes):
        """Another part of the effects, of the same weights, images and settings, and of these sizes."""
        path = self.results.find(kind, **self.names)
        record = load_record(path)
        for key in SAME if record and self.record else ():
            if record.get(key) != self.record.get(key):
                found, wanted = record.get(key), self.record.get(key)
                raise UserError(
                    f"{path} was made with {key} {found!r}, and here it is {wanted!r}, of {self.path.name}; remove what is not "
                    f"meant, or make it again with: {self.again()}"
                )
        return self.results.load(kind, sizes, mmap=mmap, **self.names)

    def files(self):
        """All files of the effects."""
        return [self.results.find(kind, **self.names) for kind in (self.main, *self.parts)]

    def check_unchanged(self):
        """Raise UserError when a file of the effects was replaced since they were opened."""
        if self.seen != [identity_of(path) for path in self.files()]:
            raise UserError(
                f"the effects of {self.path} have changed while they were read; run the same command again with --overwrite"
            )

    def tensor(self, array):
        """A copy on the device, in float32. Raises UserError when it is not finite."""
        found = torch.from_numpy(np.array(array, np.float32)).to(self.device)
        if not found.isfinite().all():
            raise UserError(
                f"the effects of {self.path} hold NaN or infinity; make them again with: {self.again()}"
            )
        return found

    def again(self):
        """The command that makes the effects again."""
        return f"{self.results.command(self.main, k=self.kept, **self.names)} --overwrite"

    def read_rows(self, take):
        """take(rows of the main array) for all blocks of rows, copied, in float32."""
        copied = np.empty((self.images, *take(self.array[:1]).shape[1:]), np.float32)
        self.check_unchanged()
        for rows in self.row_blocks():
            copied[rows] = take(read_array(self.path, mmap=True)[rows])
            if not np.isfinite(copied[rows]).all():
                image = rows.start + np.argwhere(~np.isfinite(copied[rows]))[0][0]
                raise UserError(
                    f"{self.path} holds NaN or infinity, first for image {image}; make it again with: {self.again()}"
                )
        return torch.from_numpy(copied).to(self.device)

    def row_blocks(self):
        return [slice(row, row + READ_IMAGES) for row in range(0, self.images, READ_IMAGES)]


class FactorisedEffects(_Effects):
    """Effects as coefficients and directions; only a neuron's largest ones are formed."""

    main, parts = "coefficients", ("values", "outputs", "bias")

    def __init__(self, results, names, device):
        super().__init__(results, names, device)
        self.images, K, self.N = self.array.shape
        self.kept = self.images
        values = self.load("values", mmap=True, K=K, N=self.N)
        outputs = self.load("outputs", K=K, e=values.shape[2])
        self.directions = Directions(names["layer"], self.tensor(values), self.tensor(outputs), None)
        self.D = outputs.shape[2]
        self.bias = self.tensor(self.load("bias", images=self.images, D=self.D))
        self.floats = max(self.images * K, 3 * K * self.D)

    def top(self, neurons, k):
        """Statistics of a slice of n neurons: mean effects [n, D]; the k largest centred effects, by falling
        norm [n, k, D]; the norms of all centred effects [images, n], None where they are stored already."""
        C = self.read_rows(lambda rows: rows[:, :, neurons])  # [images, K, n]
        directions = self.directions._replace(values=self.directions.values[:, neurons])
        B_n, mean_C, mean_bias = (
            directions.B(),
            C.mean(dim=0).T,
            self.bias.mean(dim=0),
        )  # [n, K, D], [n, K], [D]
        centred_norms = CentredNorms(directions, (mean_C.T, mean_bias))
        norms = torch.cat(
            [centred_norms(SecondOrder(C[i], self.bias[i], directions)) for i in self.row_blocks()]
        )
        images = norms.topk(k, dim=0).indices.T  # [n, k]
        x = (
            C[images, :, torch.arange(len(images), device=images.device)[:, None]] - mean_C[:, None]
        )  # [n, k, K]
        top = torch.bmm(x, B_n) + (self.bias[images] - mean_bias)
        return torch.einsum("nk,nko->no", mean_C, B_n) + mean_bias, top, norms

    def of(self, neuron):
        """Effects of one neuron on all images [images, D]."""
        B_n = self.directions.B([neuron])[0]  # [K, D]
        return self.read_rows(lambda rows: rows[:, :, neuron]) @ B_n + self.bias


class DenseEffects(_Effects):
    """Effects as the published code stores them."""

    main, parts = "merged", ()

    def __init__(self, results, names, device):
        super().__init__(results, names, device)
        self.images, self.N, self.D = self.array.shape
        self.kept, self.floats = self.images, self.images * self.D

    def top(self, neurons, k):
        """As `FactorisedEffects.top`."""
        phi = self.read_rows(lambda rows: rows[:, neurons])  # [images, n, D]
        mean = phi.mean(dim=0)
        phi -= mean
        norms = torch.cat([phi[i].norm(dim=-1) for i in self.row_blocks()])
        images = norms.topk(k, dim=0).indices.T  # [n, k]
        return mean, phi[images, torch.arange(len(images), device=images.device)[:, None]], norms

    def of(self, neuron):
        """As `FactorisedEffects.of`."""
        return self.read_rows(lambda rows: rows[:, neuron])

    def mean(self):
        """Mean effects [N, D], summed in float64."""
        blocks = (read_array(self.path, mmap=True)[rows] for rows in self.row_blocks())
        return (sum(block.sum(axis=0, dtype=np.float64) for block in blocks) / self.images).astype(np.float32)


class TopEffects(_Effects):
    """Every neuron's mean effect, and its largest centred effects as coefficients."""

    main, has_norms = "top_coefficients", True
    parts = ("values", "outputs", "bias", "top_images", "top_mean", "image_norms")

    def __init__(self, results, names, device):
        super().__init__(results, names, device)
        self.N, self.kept, self.K = self.array.shape
        outputs = self.load("outputs", K=self.K)
        self.outputs, self.D = self.tensor(outputs), outputs.shape[2]
        self.values = self.load("values", mmap=True, K=self.K, N=self.N, e=outputs.shape[1])
        self.mean = self.load("top_mean", N=self.N, D=self.D)
        self.top_images, self.bias = (
            self.load("top_images", N=self.N, k=self.kept),
            self.load("bias", D=self.D),
        )
        self.images, self.floats = len(self.bias), max(self.kept * self.K, 3 * self.K * self.D)
        self.load("image_norms", mmap=True, images=self.images, N=self.N)
        if self.top_images.min() < 0 or self.top_images.max() >= self.images:
            raise UserError(
                f"{self.path} is of other images than the bias beside it; make them again with: {self.again()}"
            )

    def top(self, neurons, k):
        """As `FactorisedEffects.top`."""
        x = self.tensor(read_array(self.path, mmap=True)[neurons])  # [n, kept, K]
        B_n = Directions(None, self.tensor(self.values[:, neurons]), self.outputs, None).B()
        bias = self.bias[self.top_images[neurons]] - self.bias.mean(axis=0)  # [n, kept, D]
        top = torch.bmm(x, B_n) + self.tensor(bias)
        return self.tensor(self.mean[neurons]), top[:, :k], None
