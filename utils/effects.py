"""Read second-order effects from disk, in any of three forms.

Factorised: coefficients [images, K, N], values [K, N, e], outputs [K, e, D], bias [images, D];
    phi[i, n] = sum_k coefficients[i, k, n] values[k, n] @ outputs[k] + bias[i].
Dense (`--merged`, and the published code): merged [images, N, D].
The largest only (`--keep top`): top_coefficients [N, kept, K] (centred, by falling norm), top_images
    [N, kept], top_mean [N, D], and values, outputs and bias.
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
from utils.runtime.passes import pieces_of
from utils.runtime.records import Digest, digest_of_parts, digests_of_files, load_record, publish
from utils.runtime.results import PAIRS
from utils.units import lines_of_pairs

# rows read through one memory map; it is closed afterwards, so its pages do not count as this process's
READ_IMAGES = 512
SAME = ("fingerprint", "data", "coefficient", "preprocessing", "precision")  # equal in all parts of effects
# keys of records that do not say what the array is made of
OF_ARRAY = ("shape", "dtype", "method_number", "layers", "batch_size")
FORMS = ("coefficients", "top_coefficients", "merged")
WEIGHT_PARTS = ("values", "outputs")
FULL = ("bias", *WEIGHT_PARTS)  # written with --keep full, besides the large arrays
TOP = ("bias", "image_norms", "top_coefficients", "top_images", "top_mean", *WEIGHT_PARTS)  # with --keep top


def open_effects(results, dataset, split, layer, device="cpu"):
    """Open one layer's effects in whichever form they are stored.

    results: `Results` of the folder.
    dataset, split, layer: in the files' names.
    device: where the statistics are computed.

    Raises UserError when there are none, or when parts of them do not belong together.
    """
    names = {"dataset": dataset, "split": split, "layer": layer}
    readers = (FactorisedEffects, TopEffects, DenseEffects)
    stored = [reader for reader in readers if results.find(reader.main, **names).is_file()]
    return (stored or readers)[0](results, names, device)


def mean_effects(results, **names):
    """Read the mean effects of the train split [N, D]. Parameters and errors: as in `Results.load`.

    A folder of the published code has none: its effects are averaged.
    """
    path = results.find("mean", **names)
    merged = results.find("merged", **names)
    if path.is_file() or not merged.is_file():
        return results.load("mean", **names)
    print(f"{path.name} is missing, so {merged.name} is averaged")
    return DenseEffects(results, names, "cpu").mean()


def copy_norms(effects, results):
    """Copy the norms that are stored with the effects into the folder of the other statistics."""
    names = {"dataset": effects.names["dataset"], "layer": effects.layer}
    source = effects.results.find("image_norms", **names)
    target = results.path("image_norms", **names)
    if is_rank_zero() and source.resolve() != target.resolve():
        with_record = partial(publish, record=load_record(source))
        with open(source, "rb") as file:
            save_atomic(target, lambda out: shutil.copyfileobj(file, out), with_record)


def about_norms(path):
    """Return in words what a record says of norms about a preliminary mean; "" for those about the mean."""
    record = load_record(path)
    if not record.get("norms_about"):
        return ""
    exact = f"but for the {record['norms_exact']} largest of a neuron"
    return f"about {record['norms_about']}, off by {record['norms_off_by']:.2g} at most, {exact}"


def write_weights(work, directions, results, names):
    """Write the weights' part of the effects of some layers.

    work: `Pass`.
    directions: a list of `Directions`.
    results, names: `Results`, and the fields of file names besides the layer.
    """
    if is_rank_zero():
        for item in directions:
            for kind in WEIGHT_PARTS:
                work[results.path(kind, layer=item.layer, **names)][:] = getattr(item, kind)


def identity_of(path):
    """Return what changes when a file is replaced or written to; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def slices(neurons, floats, memory, title):
    """Divide neurons into `Pieces` of about `memory` bytes, at `floats` numbers a neuron."""
    return pieces_of(neurons, max(1, int(memory / (4 * floats))), title=title, unit="neuron")


class _Effects:
    """_Effects is the common part of the readers.

    Attributes
    N, D, images: sizes.
    kept: number of a neuron's effects that are stored.
    layer: of the effects.
    path: of the main array.
    record: everything the effects were made from.
    has_norms: whether the norms of all effects are stored with them.
    main, parts: the kinds of their arrays.
    floats: numbers of a neuron that are in memory at a time.
    """

    has_norms = False

    def __init__(self, results, names, device):
        self.results = results
        self.names = names
        self.layer = names["layer"]
        self.device = device
        self.seen = [identity_of(path) for path in self.files()]
        self.path = results.find(self.main, **names)
        self.array = results.load(self.main, mmap=True, **names)
        record = load_record(self.path)
        self.record = {key: value for key, value in record.items() if key not in OF_ARRAY}
        if record and self.array.dtype != np.float32:
            self.record["store_dtype"] = str(self.array.dtype)

    def content(self):
        """Return a digest of all bytes of the effects' files."""
        now = digest_of_parts([digest.encode() for digest in digests_of_files(self.files())])
        published = not load_record(self.path)  # known by a sample, in earlier versions
        return Digest(now, sampled_digest(self.array) if published else None)

    def load(self, kind, mmap=False, **sizes):
        """Read another part of the effects, of equal weights, images and settings, and of these sizes."""
        path = self.results.find(kind, **self.names)
        record = load_record(path)
        if record and self.record:
            for key in SAME:
                self._check_same(path, key, record.get(key))
        return self.results.load(kind, sizes, mmap=mmap, **self.names)

    def _check_same(self, path, key, found):
        wanted = self.record.get(key)
        if found != wanted:
            both = f"{found!r}, and here it is {wanted!r}, of {self.path.name}"
            fix = f"remove what is not meant, or make it again with: {self.again()}"
            raise UserError(f"{path} was made with {key} {both}; {fix}")

    def lines(self, neurons):
        """Return the directions [n, D] along which all effects of a slice of units lie; None without.

        A neuron-head pair has one; its effects are exactly of rank one.
        """
        if not self.record.get("unit_set") or self.main == DenseEffects.main:
            return None
        directions = self.directions_of(neurons)
        return directions.B()[:, 0] if len(directions.values) == 1 else None

    def files(self):
        """List the files of the effects."""
        return [self.results.find(kind, **self.names) for kind in (self.main, *self.parts)]

    def check_unchanged(self):
        """Raise UserError when a file of the effects was replaced since they were opened."""
        if self.seen != [identity_of(path) for path in self.files()]:
            fix = "run the same command again with --overwrite"
            raise UserError(f"the effects of {self.path} have changed while they were read; {fix}")

    def tensor(self, array):
        """Copy an array to the device, in float32. Raises UserError when it is not finite."""
        found = torch.from_numpy(np.array(array, np.float32)).to(self.device)
        if not found.isfinite().all():
            fix = f"make them again with: {self.again()}"
            raise UserError(f"the effects of {self.path} hold NaN or infinity; {fix}")
        return found

    def again(self):
        """Return the command that makes the effects again."""
        names = {**self.names, "k": self.kept}
        return f"{self.results.command(self.main, **names)} --overwrite"

    def read_rows(self, take):
        """Copy take(rows of the main array) of all images to the device, in float32, a block at a time."""
        copied = np.empty((self.images, *take(self.array[:1]).shape[1:]), np.float32)
        self.check_unchanged()
        for rows in self.row_blocks():
            copied[rows] = take(read_array(self.path, mmap=True)[rows])
            if not np.isfinite(copied[rows]).all():
                image = rows.start + np.argwhere(~np.isfinite(copied[rows]))[0][0]
                what = f"NaN or infinity, first for image {image}"
                raise UserError(f"{self.path} holds {what}; make it again with: {self.again()}")
        return torch.from_numpy(copied).to(self.device)

    def row_blocks(self):
        """List the slices of images that are read at a time."""
        return [slice(row, row + READ_IMAGES) for row in range(0, self.images, READ_IMAGES)]


def largest(C, bias, directions, k):
    """Return mean effects, the k largest centred ones, and all norms, as `FactorisedEffects.top` does.

    C, bias: of all images, [images, K, n] and [images, D]. directions: `Directions` of the n neurons.
    """
    B_n = directions.B()  # [n, K, D]
    mean_C = C.mean(dim=0).T  # [n, K]
    mean_bias = bias.mean(dim=0)  # [D]
    centred_norms = CentredNorms(directions, (mean_C.T, mean_bias))
    rows = [slice(row, row + READ_IMAGES) for row in range(0, len(C), READ_IMAGES)]
    norms = torch.cat([centred_norms(SecondOrder(C[i], bias[i], directions)) for i in rows])
    images = norms.topk(k, dim=0).indices.T  # [n, k]
    n = torch.arange(len(images), device=images.device)[:, None]
    x = C[images, :, n] - mean_C[:, None]  # [n, k, K]
    top = torch.bmm(x, B_n) + (bias[images] - mean_bias)
    return torch.einsum("nk,nko->no", mean_C, B_n) + mean_bias, top, norms


class FactorisedEffects(_Effects):
    """FactorisedEffects are coefficients and directions; only a neuron's largest effects are formed."""

    main = "coefficients"
    parts = ("values", "outputs", "bias")

    def __init__(self, results, names, device):
        super().__init__(results, names, device)
        self.images, K, self.N = self.array.shape
        self.kept = self.images
        values = self.load("values", mmap=True, K=K, N=self.N)
        pairs = self.record.get("unit_set") == PAIRS
        outputs = self.load("outputs", e=values.shape[2], **({} if pairs else {"heads": K}))
        weights = self.tensor(values), self.tensor(outputs)
        if pairs and len(outputs) > 1:
            weights = lines_of_pairs(*weights)
        self.directions = Directions(self.layer, *weights, None)
        self.D = outputs.shape[2]
        self.bias = self.tensor(self.load("bias", images=self.images, D=self.D))
        self.floats = max(self.images * K, 3 * K * self.D)

    def top(self, neurons, k):
        """Return statistics of a slice of n neurons.

        Returns mean effects [n, D]; the k largest centred effects, largest first [n, k, D]; and the norms of
        all centred effects [images, n], None where they are stored already.
        """
        C = self.read_rows(lambda rows: rows[:, :, neurons])  # [images, K, n]
        return largest(C, self.bias, self.directions_of(neurons), k)

    def directions_of(self, neurons):
        """Return the `Directions` of a slice of neurons."""
        return self.directions._replace(values=self.directions.values[:, neurons])

    def of(self, neuron):
        """Return the effects of one neuron on all images [images, D]."""
        B_n = self.directions.B([neuron])[0]  # [K, D]
        return self.read_rows(lambda rows: rows[:, :, neuron]) @ B_n + self.bias


class DenseEffects(_Effects):
    """DenseEffects are stored as the published code stores them."""

    main = "merged"
    parts = ()

    def __init__(self, results, names, device):
        super().__init__(results, names, device)
        self.images, self.N, self.D = self.array.shape
        self.kept = self.images
        self.floats = self.images * self.D

    def top(self, neurons, k):
        """Return the statistics that `FactorisedEffects.top` returns."""
        phi = self.read_rows(lambda rows: rows[:, neurons])  # [images, n, D]
        mean = phi.mean(dim=0)
        phi -= mean
        norms = torch.cat([phi[i].norm(dim=-1) for i in self.row_blocks()])
        images = norms.topk(k, dim=0).indices.T  # [n, k]
        return mean, phi[images, torch.arange(len(images), device=images.device)[:, None]], norms

    def of(self, neuron):
        """Return the effects of one neuron on all images [images, D]."""
        return self.read_rows(lambda rows: rows[:, neuron])

    def mean(self):
        """Return the mean effects [N, D], summed in float64."""
        total = np.zeros((self.N, self.D))
        for rows in self.row_blocks():
            total += read_array(self.path, mmap=True)[rows].sum(axis=0, dtype=np.float64)
        return (total / self.images).astype(np.float32)


class TopEffects(_Effects):
    """TopEffects are every neuron's mean effect, and its largest centred effects as coefficients."""

    main = "top_coefficients"
    has_norms = True
    parts = ("values", "outputs", "bias", "top_images", "top_mean", "image_norms")

    def __init__(self, results, names, device):
        super().__init__(results, names, device)
        self.N, self.kept, K = self.array.shape
        outputs = self.load("outputs", heads=K)
        self.D = outputs.shape[2]
        self.outputs = self.tensor(outputs)
        self.values = self.load("values", mmap=True, K=K, N=self.N, e=outputs.shape[1])
        self.mean = self.load("top_mean", N=self.N, D=self.D)
        self.top_images = self.load("top_images", N=self.N, k=self.kept)
        self.bias = self.load("bias", D=self.D)
        self.images = len(self.bias)
        self.floats = max(self.kept * K, 3 * K * self.D)
        self.load("image_norms", mmap=True, images=self.images, N=self.N)
        if self.top_images.min() < 0 or self.top_images.max() >= self.images:
            what = f"{self.path} is of other images than the bias beside it"
            raise UserError(f"{what}; make them again with: {self.again()}")

    def top(self, neurons, k):
        """Return the statistics that `FactorisedEffects.top` returns."""
        x = self.tensor(read_array(self.path, mmap=True)[neurons])  # [n, kept, K]
        B_n = self.directions_of(neurons).B()
        bias = self.bias[self.top_images[neurons]] - self.bias.mean(axis=0)  # [n, kept, D]
        top = torch.bmm(x, B_n) + self.tensor(bias)
        return self.tensor(self.mean[neurons]), top[:, :k], None

    def directions_of(self, neurons):
        """Return the `Directions` of a slice of neurons."""
        return Directions(None, self.tensor(self.values[:, neurons]), self.outputs, None)
