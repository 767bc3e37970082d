"""The second-order effects of many layers without their store: only each neuron's largest ones are kept (`--keep top`).

`compute_pcas.py` needs the mean effect of every neuron, the centred norm of every effect, and the k largest centred effects. Two
passes over the images give these: the first sums up the coefficients, the second takes the norms about the mean (quadratic forms
in the coefficients) and keeps the coefficients of the k largest. Shapes as in `utils.prs`; k images per neuron.

Both passes are gone on with after an interruption: what a process has summed up or kept is saved every few seconds (more rarely
where saving takes long), together with the number of its batches that are in it. Under torchrun every process has its own; the
first one puts them together at the end.
"""

import json
import mmap
import time
from contextlib import suppress
from zipfile import BadZipFile

import numpy as np
import torch

from utils import distributed
from utils.artifacts import meta_path, save_array, save_atomic, save_json
from utils.datasets import batches
from utils.effects import save_directions
from utils.errors import UserError
from utils.prs import CentredNorms, fold_layers, second_order
from utils.rows import COMMIT_SECONDS, RowWriter, reserve, row_pieces, telling

FIXED = 2.0**32  # sums are of whole numbers of 1/FIXED, so that they do not depend on the order in which they are formed
SAVING = 0.01  # the share of the time that saving may take
ENTERING = 8192  # effects that are written to the kept ones at a time
MERGED = 64  # neurons that are put together at a time
LAST_IMAGE = 2**32 - 1


class Saved:
    """Arrays of one process, changed in memory, saved with the number of batches that are in them.

    path: where. identity: what they belong to; a file of something else is refused. make: gives the arrays at the start.
    """

    def __init__(self, path, identity, make, overwrite):
        self.path, self.identity = path, json.dumps(identity, sort_keys=True)
        self.done, self.arrays, self.cost = 0, None, 0.0
        if path.is_file() and not overwrite:
            self._load()
        if self.arrays is None:
            self.arrays = make()
        self.saved = time.monotonic()

    def _load(self):
        with suppress(ValueError, EOFError, OSError, KeyError, BadZipFile), np.load(self.path, allow_pickle=False) as file:
            if str(file["identity"]) != self.identity:
                raise UserError(
                    f"{self.path} belongs to a run with other settings; repeat that run to finish it, or add --overwrite to "
                    "start afresh"
                )
            self.done = int(file["done"])
            self.arrays = {name: file[name] for name in file.files if name not in ("identity", "done")}

    def step(self, before=None, last=False):
        """Count one more batch, or with `last` none; save when it is time. before: called first, to save what belongs to it."""
        self.done += not last
        began = time.monotonic()
        if last or began - self.saved > max(COMMIT_SECONDS, self.cost / SAVING):
            if before:
                before()
            content = {"identity": self.identity, "done": self.done, **self.arrays}
            save_atomic(self.path, lambda file: np.savez(file, **content))
            self.saved = time.monotonic()
            self.cost = self.saved - began


class TopEffects:
    """Means, norms and the k largest effects of some layers, by two passes over the images.

    Parameters
    vit: HookedViT. layers: that are worked on together. images: `Images`. k: effects to keep of every neuron. names: Names of
    the output. dataset, split: for its names. meta: what the effects are made from. batch_size. passing: the keyword arguments
    num_workers and device of `batches`. coefficient: as in `second_order`. overwrite: drop what a broken run left.
    """

    def __init__(self, vit, layers, images, k, names, dataset, split, meta, batch_size, passing, coefficient, overwrite):
        if len(images) < k:
            raise UserError(f"there are {len(images)} images, and --top_k_pca {k} needs {k}; lower it, or --subsample")
        self.vit, self.layers, self.images, self.k = vit, layers, images, k
        self.names, self.dataset, self.split, self.meta = names, dataset, split, {**meta, "top_k_pca": k}
        self.passing, self.coefficient, self.overwrite = passing, coefficient, overwrite
        self.pieces = row_pieces(len(images), batch_size)
        self.work = distributed.share(list(enumerate(self.pieces)))  # the same in every run of as many processes
        self.identity = {**self.meta, "layers": self.layers, "processes": distributed.size()}

    def path(self, layer, part):
        return self.names.effects(self.dataset, self.split, layer, part)

    def of_rank(self, part, layer, rank=None):
        """A file of one process."""
        rank = distributed.rank() if rank is None else rank
        path = self.path(layer, part)
        return path.with_name(f"{path.stem}.rank{rank}.partial")

    def writer(self):
        """Of bias and image_norms, to be entered before `run` and left after it."""
        arrays, kept = {}, 0
        for layer in self.layers:
            arrays[self.path(layer, "bias")] = ((len(self.images), self.vit.D), "float32")
            arrays[self.path(layer, "image_norms")] = ((len(self.images), self.vit.N), "float32")
            kept += 4 * self.vit.N * self.k * (self.vit.L - 1 - layer) * self.vit.H
        kept *= distributed.size()  # every process has its own
        return RowWriter(arrays, {**self.meta, "layers": self.layers}, self.pieces, self.overwrite, besides=kept)

    @torch.inference_mode()
    def run(self, writer):
        """Both passes. Besides the writer's arrays they leave values, outputs, top_coefficients [N, k, K], top_images [N, k] and
        top_mean [N, D] of every layer."""
        self.directions = fold_layers(self.vit, self.layers)
        self.second_pass(self.first_pass(), writer)
        if distributed.first():
            for item in self.directions:
                save_directions(self.names, self.dataset, self.split, item, self.meta)
        self.directions = None

    def clean(self):
        """Remove what an interrupted run would have gone on with, also that of an earlier one by more processes."""
        if distributed.first():
            for layer in self.layers:
                for part in ("sums", "top", "top_coefficients"):
                    path = self.path(layer, part)
                    for file in path.parent.glob(f"{path.stem}.rank*.partial*"):
                        file.unlink()

    def first_pass(self):
        """The mean coefficients [K, N] and mean kappa [D] of every layer, float32."""
        first = self.layers[0]

        def zeros():
            arrays = {}
            for item in self.directions:
                K, N, _ = item.values.shape
                arrays |= {f"C{item.layer}": np.zeros((K, N), np.int64), f"kappa{item.layer}": np.zeros(self.vit.D, np.int64)}
            return arrays

        sums = Saved(self.of_rank("sums", first), self.identity, zeros, self.overwrite)
        scale = FIXED / self.coefficient

        for _, _, pixels, _ in batches(self.images, self.work[sums.done :], **self.passing, description="means"):
            _, effects = second_order(self.vit, pixels, self.directions, self.coefficient, summed=True)
            for layer, (C, kappa) in zip(self.layers, effects, strict=True):
                for name, values in ((f"C{layer}", C), (f"kappa{layer}", kappa)):
                    sums.arrays[name] += values.cpu().double().mul_(scale).round_().to(torch.int64).numpy()
            sums.step()
        sums.step(last=True)
        distributed.barrier()
        total = None
        for rank in range(distributed.size()):
            with np.load(self.of_rank("sums", first, rank), allow_pickle=False) as file:
                part = {name: file[name] for name in sums.arrays}
            total = part if total is None else {name: total[name] + part[name] for name in total}
        count = len(self.images) * scale
        return {name: torch.from_numpy((value / count).astype(np.float32)) for name, value in total.items()}

    def second_pass(self, means, writer):
        """Keep the largest effects, and write bias and norms with `writer`."""
        device, stores = self.passing["device"], []
        for item in self.directions:
            layer = item.layer
            stores.append(_Store(item, means[f"C{layer}"].to(device), means[f"kappa{layer}"].to(device), self.k))

        def empty():
            return {f"keys{s.layer}": np.zeros((s.N, self.k), np.uint64) for s in stores}

        path = self.of_rank("top", self.layers[0])
        top = Saved(path, self.identity, empty, self.overwrite)
        if any(number in writer.unfinished for number, _ in self.work[: top.done]):  # its bias and norms were begun anew
            top = Saved(path, self.identity, empty, overwrite=True)
        if top.done < len(self.work) or not path.is_file():
            for store in stores:
                store.open(self.of_rank("top_coefficients", store.layer), fresh=not top.done)

            def save_first():  # what counts as kept has to be on the disk before
                for store in stores:
                    store.file.flush()
                writer.commit()

            for number, row, pixels, _ in batches(self.images, self.work[top.done :], **self.passing, description="effects"):
                _, effects = second_order(self.vit, pixels, self.directions, self.coefficient)
                blocks = {}
                for store in stores:
                    C, kappa = next(effects)
                    norms = store.norms(C, kappa).cpu().numpy()
                    store.keep(top.arrays[f"keys{store.layer}"], norms, C, row)
                    del C  # one layer's are in memory at a time
                    blocks[self.path(store.layer, "bias")] = kappa.cpu().numpy()
                    blocks[self.path(store.layer, "image_norms")] = norms
                writer.write(number, row, blocks)
                top.step(save_first)
            top.step(save_first, last=True)
        distributed.barrier()
        if distributed.first():
            for store in stores:
                store.norms = None  # room for the kept ones
            self.put_together(stores)

    def put_together(self, stores):
        """Of what all processes kept, the k largest by falling norm, of equal ones the earlier image."""
        ranks = range(distributed.size())
        kept = [np.load(self.of_rank("top", self.layers[0], rank), allow_pickle=False) for rank in ranks]
        for store in stores:
            layer, paths = store.layer, [self.of_rank("top_coefficients", store.layer, rank) for rank in ranks]
            if not all(path.is_file() for path in paths):
                continue  # done before an interruption
            keys = np.concatenate([file[f"keys{layer}"] for file in kept], axis=1)  # [N, ranks k]
            order = keys.argsort(axis=1)[:, ::-1][:, : self.k]
            images = image_of(np.take_along_axis(keys, order, axis=1))
            files = [np.memmap(path, np.float32, "r", shape=store.shape) for path in paths]

            _save_sorted(self.path(layer, "top_coefficients"), files, order, self.meta)
            save_array(self.path(layer, "top_images"), images, self.meta)
            save_array(self.path(layer, "top_mean"), store.mean().cpu().numpy(), self.meta)
            for path in paths:
                path.unlink()


class _Store:
    """What the second pass needs of one layer, and the coefficients [N, k, K] that it keeps, in a file."""

    def __init__(self, directions, mean_C, mean_kappa, k):
        self.layer, self.mean_rows = directions.layer, mean_C.T.contiguous()  # [N, K]
        K, self.N, _ = directions.values.shape
        self.shape = (self.N, k, K)
        self.directions, self.mean_C, self.mean_kappa = directions, mean_C, mean_kappa
        self.norms = CentredNorms(directions, (mean_C, mean_kappa))

    def mean(self):
        """The mean effects [N, D]."""
        heads = torch.einsum("kn,kne->nke", self.mean_C, self.directions.values)
        return torch.einsum("nke,keo->no", heads, self.directions.outputs) + self.mean_kappa

    def open(self, path, fresh):
        size = 4 * int(np.prod(self.shape, dtype=np.int64))
        if fresh:
            with telling(path), open(path, "wb") as file:
                reserve(file, size)  # else a disk that fills up ends the process without a word
        if not path.is_file() or path.stat().st_size != size:  # a map would fill up what is cut off with zeros
            raise UserError(f"{path} of a broken run is missing or cut off; add --overwrite to start afresh")
        self.file = np.memmap(path, np.float32, "r+", shape=self.shape)
        self.rows = torch.from_numpy(self.file)  # the same memory; torch writes with several threads

    def keep(self, keys, norms, C, row):
        """Let the effects of a batch take the places of smaller ones.

        keys [N, k]: `key_of` the kept ones, changed in place. norms [B, N]. C [B, K, N]. row: first image.
        """
        k, new = self.shape[1], key_of(norms.T, np.arange(row, row + len(norms)))  # [N, B]
        neurons = np.flatnonzero(new.max(axis=1) > keys.min(axis=1))
        both = np.concatenate([keys[neurons], new[neurons]], axis=1)  # [n, k + B]
        leaves = np.zeros(both.shape, bool)
        np.put_along_axis(leaves, both.argpartition(len(norms), axis=1)[:, : len(norms)], True, axis=1)
        n, slots = leaves[:, :k].nonzero()  # for each neuron as many leave as enter
        _, images = (~leaves[:, k:]).nonzero()
        n = neurons[n]
        keys[n, slots] = new[n, images]
        for part in np.array_split(np.arange(len(n)), len(n) // ENTERING + 1):
            b, m = (torch.from_numpy(index[part]).to(C.device) for index in (images, n))
            centred = C[b, :, m] - self.mean_rows[m]  # [entering, K]
            self.rows[torch.from_numpy(n[part]), torch.from_numpy(slots[part])] = centred.cpu()
            with suppress(AttributeError, OSError):  # pages of the file that are mapped count as this process's memory
                self.file._mmap.madvise(mmap.MADV_DONTNEED)


def key_of(norms, images):
    """One number for a norm and its image, which rises with the norm, and of equal norms is larger for the earlier image; 0 is
    below all. norms float32, images int -> uint64."""
    bits = np.ascontiguousarray(np.abs(norms)).view(np.uint32)  # of floats that are not negative the bits rise with them
    return bits.astype(np.uint64) << np.uint64(32) | (LAST_IMAGE - images).astype(np.uint64)


def image_of(keys):
    """The images of `key_of`, int32."""
    return (LAST_IMAGE - (keys & np.uint64(LAST_IMAGE)).astype(np.int64)).astype(np.int32)


def _save_sorted(path, files, order, meta):
    """[N, k, K] from the processes' files [N, k, K], a block of neurons at a time; order [N, k]: the places in all of theirs."""
    shape = (*order.shape, files[0].shape[2])

    def write(out):
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        for start in range(0, len(order), MERGED):
            every = np.concatenate([file[start : start + MERGED] for file in files], axis=1)  # [n, processes k, K]
            out.write(np.take_along_axis(every, order[start : start + MERGED, :, None], axis=1).data)

    save_atomic(path, write)
    save_json(meta_path(path), {**meta, "shape": list(shape), "dtype": "float32"})
