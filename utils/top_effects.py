"""Keep only each neuron's largest effects, of many layers, without storing all of them.

This is `--keep top`. `compute_pcas.py` needs every neuron's mean effect mu and its k largest effects about it. mu
is known after a pass over all images only. So a short pass over a few gives a preliminary mean mu0. The pass over
all sums up mu, takes the norms about mu0 (`utils.norms`), and keeps the 2 k largest of them, the candidates. As

    | |phi - mu| - |phi - mu0| | <= |mu - mu0|,

a neuron's k largest about mu are among its candidates for certain, if the smallest candidate's norm about mu0
plus |mu - mu0| is below the k-th largest norm about mu. The other neurons are gone over again, about mu.

Letters as in `utils.prs`, k images per neuron, and c candidates.
"""

import numpy as np
import torch

from utils.model.attention import double
from utils.norms import CentredNorms
from utils.prs import second_order
from utils.runtime.distributed import is_rank_zero
from utils.runtime.errors import UserError
from utils.runtime.passes import Totals

WEIGHT_PARTS = ("values", "outputs")
FULL = ("bias", *WEIGHT_PARTS)  # written with --keep full, besides the large arrays
TOP = ("bias", "image_norms", "top_coefficients", "top_images", "top_mean", *WEIGHT_PARTS)  # with --keep top
# Sums are int64 multiples of 1/FIXED: integer addition is exact, so the order of batches and the number of
# processes do not matter.
FIXED = 2.0**32
FEW = 256  # images of the preliminary mean, at least
SHARE = 20  # one in so many images, where this is more
CANDIDATES = 2  # for each of the k
ENTERING = 8192  # effects that are copied into the kept ones at a time
MERGED_AT_ONCE = 64  # neurons whose candidates are merged at a time
ROUNDING = 16  # times the largest error of a neuron's norms that was seen is allowed for
CERTAIN, DOUBTED = 1, 2  # what is known of a neuron's k largest; 0 as long as nothing is
AGAIN = 2  # the round of the pass for doubted neurons; round 0 goes over a few images, round 1 over all
STATE = ("keys", "known", "apart")
ROWS = 512  # of norms that are corrected at a time
LAST_IMAGE = 2**32 - 1


class Activations:
    """Activations are the mean post-GELU activations of some layers at every token, [T, N] each.

    They are summed in a `Pass`: an `Activations` is made before it, for its `sums` and `arrays`.

    vit: HookedViT.
    layers: MLP layers.
    results, names: `Results`, and the fields of file names besides the layer.
    """

    def __init__(self, vit, layers, results, names):
        self.vit = vit
        self.names = {layer: f"p{layer}" for layer in layers}
        self.recorded = {layer: f"blocks.{layer}.mlp.post" for layer in layers}
        self.sums = Totals({name: ((vit.T, vit.N), "int64") for name in self.names.values()})
        self.arrays = results.arrays(["activations"], layers=layers, **names)
        self.paths = {layer: results.path("activations", layer=layer, **names) for layer in layers}

    def second_order(self, work, pixels, directions, coefficient):
        """Run `utils.prs.second_order` on a batch, and add its activations to the sums of a `Pass`.

        Yields the `SecondOrder` of each layer, as they are asked for.
        """
        with self.vit.record(*self.recorded.values()) as cache:
            _, effects = second_order(self.vit, pixels, directions, coefficient)
        for item in directions:
            p = cache.pop(self.recorded[item.layer])
            work.state[self.names[item.layer]] += fixed(p, FIXED)
            del p
            yield next(effects)

    def write(self, work, images):
        """Write the means over all `images`, once all processes are here."""
        if work.finished:
            return
        gathered = work.gather(list(self.names.values()))
        if is_rank_zero():
            for layer, name in self.names.items():
                work[self.paths[layer]][:] = (sum(gathered[name]) / (images * FIXED)).astype(np.float32)


def fixed(values, scale):
    """Return the sum over the first axis as int64 multiples of 1/scale, an array."""
    return values.sum(dim=0).cpu().double().mul_(scale).round_().to(torch.int64).numpy()


def stride_of(images):
    """Return over every how many-th of some images the preliminary mean is taken; 1 where they are few."""
    return max(1, images // max(FEW, images // SHARE))


def start_of(vit, layers, k, images):
    """Return the state (sums, keys, what is certain) and scratch (candidates) of the pass, as `Pass` takes them.

    Raises UserError when there are fewer images than k.
    """
    if images < k:
        raise UserError(f"there are {images} images, and --top_k_pca {k} needs {k}; lower it, or --subsample")
    c = min(CANDIDATES * k, images)
    state = {}
    scratch = {}
    for layer in layers:
        for name in ("few_", ""):
            state[f"{name}C{layer}"] = ((vit.K(layer), vit.N), "int64")
            state[f"{name}kappa{layer}"] = ((vit.D,), "int64")
        state[f"keys{layer}"] = ((vit.N, c), "uint64")
        state[f"known{layer}"] = ((vit.N,), "uint8")
        state[f"apart{layer}"] = ((1,), "float64")
        scratch[f"top{layer}"] = ((vit.N, c, vit.K(layer)), "float32")
    return state, scratch


class Sums:
    """Sums are those of C and kappa over images, in the state of a `Pass`.

    work: `Pass`.
    coefficient: as in `second_order`.
    images: how many there are.
    name: before the names in the state.
    """

    def __init__(self, work, coefficient, images, name=""):
        self.work = work
        self.scale = FIXED / coefficient
        self.images = images
        self.name = name

    def add(self, phi):
        """Add the effects of a batch, a `SecondOrder`."""
        for name, values in (("C", phi.C), ("kappa", phi.kappa)):
            self.work.state[f"{self.name}{name}{phi.directions.layer}"] += fixed(values, self.scale)

    def means(self, layers):
        """Return {layer: (C [K, N], kappa [D])}, means over all images, once all processes are here."""
        names = {layer: [f"{self.name}{part}{layer}" for part in ("C", "kappa")] for layer in layers}
        gathered = self.work.gather([name for pair in names.values() for name in pair])
        means = {}
        for name, parts in gathered.items():
            mean = sum(parts) / (self.images * self.scale)
            means[name] = torch.from_numpy(mean.astype(np.float32))
        return {layer: tuple(means[name] for name in pair) for layer, pair in names.items()}


class TopK:
    """TopK is the candidates for the k largest centred effects of a layer's neurons, and then these.

    In the state of a `Pass` are keys, uint64 [N, c]: `key_of` the candidates of this process, 0 where there is
    none yet; and known, uint8 [N]: CERTAIN or DOUBTED. In its scratch are the candidates' coefficients, float32
    [N, c, K].

    work: `Pass`.
    directions: `Directions` of the layer.
    origin: C [K, N] and kappa [D] of the mean that norms are taken about.
    few: the number of images that this is the mean of.
    paths: {kind: path} of the layer's results.
    """

    def __init__(self, work, directions, origin, few, paths):
        self.work = work
        self.directions = directions
        self.layer = directions.layer
        self.few = few
        self.paths = paths
        self.exact = few == work[paths["bias"]].shape[0]  # another pass could tell no more
        self.keys, self.known, self.apart = (work.state[f"{name}{self.layer}"] for name in STATE)
        self.scratch = work.scratch[f"top{self.layer}"]
        self.norms = CentredNorms(directions, tuple(part.to(directions.values.device) for part in origin))

    @classmethod
    def of_layers(cls, work, directions, sums, results, names):
        """Return a `TopK` for each of some `Directions`, about the mean of some images. sums: their `Sums`.

        results, names: `Results`, and the fields of file names besides the layer.
        """
        means = sums.means([item.layer for item in directions])
        paths = [{kind: results.path(kind, layer=item.layer, **names) for kind in TOP} for item in directions]
        tops = zip(directions, paths, strict=True)
        return [cls(work, item, means[item.layer], sums.images, where) for item, where in tops]

    def add(self, phi, first, sums=None):
        """Let the effects of a batch take the places of smaller ones, and keep their norms.

        first: index of the batch's first image.
        sums: `Sums` to add them to. Without, doubted neurons are gone over again.
        """
        exact = sums is None or self.exact
        norms = (self.norms(phi) if exact else self.norms.squares(phi).clamp_(0).sqrt_()).cpu().numpy()
        rows = slice(first, first + len(norms))
        new = key_of(norms.T, np.arange(rows.start, rows.stop))
        if sums is None:
            new[self.known != DOUBTED] = 0
        else:
            sums.add(phi)
            self.work[self.paths["bias"]][rows] = phi.kappa
            self.work[self.paths["image_norms"]][rows] = norms
        n, places, images = enter(self.keys, new)
        kept = torch.from_numpy(self.scratch.array)  # shares the memory; torch writes with several threads
        for part in np.array_split(np.arange(len(n)), len(n) // ENTERING + 1):
            m, b = (torch.from_numpy(index[part]).to(phi.C.device) for index in (n, images))
            kept[torch.from_numpy(n[part]), torch.from_numpy(places[part])] = phi.C[b, :, m].cpu()
            self.scratch.release()

    def look_again(self, mean):
        """Take norms about the mean from now on; doubted neurons begin without candidates."""
        self.norms.origin, self.norms.shift = (part.to(self.norms.shift) for part in mean)
        if not self.work.entered(AGAIN):
            self.keys[self.known == DOUBTED] = 0

    def write(self, mean, keys):
        """Write the largest effects about the mean, and what is known of them now.

        keys: of all processes, a list of [N, c].
        """
        merged = Merged(self, mean, keys)
        images, norms, apart, certain = (np.concatenate(part) for part in zip(*merged.write(), strict=True))
        self.work[self.paths["top_images"]][:] = images
        self.work[self.paths["top_mean"]][:] = merged.means()
        first = not self.known.any()
        if first:
            self.apart[:] = apart.max()
        known = np.where(certain | self.exact, CERTAIN, DOUBTED) if first else self.known
        if not self.exact and (DOUBTED not in known or not first):
            self._correct_norms(images, norms)
        self.known[:] = known

    def _correct_norms(self, images, norms):
        """Make the stored norms [images, N] of the k largest [N, k] exact, and no other one as large."""
        file = self.work[self.paths["image_norms"]]
        below = np.nextafter(norms[:, -1], 0, dtype=np.float32)
        for start in range(0, file.shape[0], ROWS):
            rows = slice(start, min(start + ROWS, file.shape[0]))
            block = np.minimum(file.read()[rows], below)
            n, place = np.nonzero((images >= rows.start) & (images < rows.stop))
            block[images[n, place] - start, n] = norms[n, place]
            file[rows] = block

    def describe_norms(self):
        """Say in the record of the stored norms what they are, unless they are about the mean itself."""
        file = self.work[self.paths["image_norms"]]
        k = self.work[self.paths["top_images"]].shape[1]
        if not self.exact:
            about = f"the mean of {self.few} images, and exact for the {k} largest of a neuron"
            file.record |= {"norms_about": about, "norms_off_by": float(self.apart[0])}


def enter(keys, new):
    """Replace keys [N, k] in place by larger ones of new [N, B].

    Returns neuron, place and column of each that enters.
    """
    k = keys.shape[1]
    neurons = np.flatnonzero(new.max(axis=1) > keys.min(axis=1))
    both = np.concatenate([keys[neurons], new[neurons]], axis=1)  # [n, k + B]
    leaving = both.argpartition(new.shape[1], axis=1)[:, : new.shape[1]]
    leaves = np.zeros(both.shape, bool)
    np.put_along_axis(leaves, leaving, True, axis=1)
    n, places = leaves[:, :k].nonzero()  # for each neuron as many leave as enter
    _, columns = (~leaves[:, k:]).nonzero()
    keys[neurons[n], places] = new[neurons[n], columns]
    return neurons[n], places, columns


def key_of(norms, images):
    """Return sort keys, uint64: larger norms first, and of equal norms the earlier image.

    The norm (float32) is in the high 32 bits, the reversed image index in the low 32.
    """
    bits = np.ascontiguousarray(np.abs(norms)).view(np.uint32)  # bits of non-negative floats rise with them
    return bits.astype(np.uint64) << np.uint64(32) | (LAST_IMAGE - images.astype(np.int64)).astype(np.uint64)


def image_of(keys):
    """Return the images of `key_of`, int32."""
    return (LAST_IMAGE - (keys & np.uint64(LAST_IMAGE)).astype(np.int64)).astype(np.int32)


def norm_of(keys):
    """Return the norms of `key_of`, float32."""
    return (keys >> np.uint64(32)).astype(np.uint32).view(np.float32)


class Merged:
    """Merged are a layer's candidates of all processes.

    top: `TopK`.
    mean: C [K, N] and kappa [D] of the mean effects.
    keys: of all processes, a list of [N, c].
    """

    def __init__(self, top, mean, keys):
        self.top = top
        self.directions = top.directions
        self.mean_C, self.mean_kappa = (part.to(top.norms.shift) for part in mean)
        self.bias = top.work[top.paths["bias"]].read()
        keys = np.concatenate(keys, axis=1)  # [N, processes c]
        self.order = keys.argsort(axis=1)[:, ::-1][:, : top.keys.shape[1]]
        self.keys = np.take_along_axis(keys, self.order, axis=1)
        self.outputs = double(top.directions.outputs)
        rows = [slice(start, start + ROWS) for start in range(0, len(self.bias), ROWS)]
        mean = self.mean_kappa.cpu().numpy()
        self.reach = max(np.linalg.norm(self.bias[n] - mean, axis=1).max() for n in rows)  # of kappa

    def means(self):
        """Return the mean effects [N, D]."""
        heads = torch.einsum("kn,kne->nke", self.mean_C, self.directions.values)
        return torch.einsum("nke,keo->no", heads, self.directions.outputs) + self.mean_kappa

    def write(self):
        """Write the coefficients of the largest effects, and yield what is known of a block of neurons.

        Yields images and norms of the k largest [n, k], by falling norm, of equal ones the earlier image first;
        how far a stored norm may be from that about the mean [n]; and whether the k largest are certain [n].
        """
        file = self.top.work[self.top.paths["top_coefficients"]]
        for start in range(0, len(self.keys), MERGED_AT_ONCE):
            n = slice(start, start + MERGED_AT_ONCE)
            # mapped again each time: pages once read would count as this process's
            kept = self.top.work.gather_scratch(f"top{self.top.layer}")
            every = np.concatenate([part[n] for part in kept], axis=1)  # [n, processes c, K]
            candidates = np.take_along_axis(every, self.order[n, :, None], axis=1)
            centred = candidates - self.mean_C.T[n, None].cpu().numpy()
            images = image_of(self.keys[n])
            norms, about, apart = self._norms(n, centred, images)
            # rounded to float32, so that copies of an image have equal norms whatever way they are computed
            best = key_of(norms, images).argsort(axis=1)[:, ::-1][:, : file.shape[1]]
            file[n] = np.take_along_axis(centred, best[..., None], axis=1)
            largest = np.take_along_axis(norms, best, axis=1)
            rounding = ROUNDING * np.abs(about - norm_of(self.keys[n])).max(axis=1)
            apart = apart + self.reach
            others = about[:, -1] + apart + 4 * rounding  # at most; four: both forms round twice
            certain = (others < largest[:, -1]) | (images.shape[1] == len(self.bias))
            yield np.take_along_axis(images, best, axis=1), largest, apart + rounding, certain

    def _norms(self, n, centred, images):
        """Return norms about the mean, float32 [n, c], and of what directions express, in float64: norms about
        the origin [n, c], and |mean - origin| [n].

        centred: coefficients [n, c, K].
        """
        B = torch.einsum("kne,keo->nko", double(self.directions.values[:, n]), self.outputs)
        kappa = torch.from_numpy(self.bias[images]).to(self.mean_kappa) - self.mean_kappa
        effects = torch.bmm(torch.from_numpy(centred).to(B), B)  # [n, c, D], without kappa
        moved = torch.einsum("kn,nko->no", (self.mean_C - self.top.norms.origin)[:, n].to(B), B)
        about = (effects + moved[:, None]).norm(dim=-1)
        effects += kappa.to(B)
        found = (effects.norm(dim=-1).float(), about, moved.norm(dim=-1))
        return [norms.cpu().numpy() for norms in found]


def settle(work, tops, sums):
    """Write the largest effects of layers that all images were gone over for.

    work: `Pass`. tops: a list of `TopK`. sums: `Sums` of all images.

    Returns the `TopK` of layers with doubted neurons. These are to be gone over again, then `settle_again`.
    """
    if not tops:  # all is there
        return []
    means = sums.means([top.layer for top in tops])
    keys = work.gather([f"keys{top.layer}" for top in tops])
    for top in tops if is_rank_zero() else ():
        if not top.known.any():  # else they were written before an interruption
            top.write(means[top.layer], keys[f"keys{top.layer}"])
        top.describe_norms()
    known = work.gather([f"known{top.layer}" for top in tops])
    for top in tops:
        top.known[:] = known[f"known{top.layer}"][0]  # of rank 0
    doubted = [top for top in tops if DOUBTED in top.known]
    for top in doubted:
        top.look_again(means[top.layer])
    count = sum(int((top.known == DOUBTED).sum()) for top in doubted)
    every = sum(len(top.known) for top in tops)
    if doubted:
        print(f"the largest effects of {count} of {every} neurons are not certain yet: another pass for them")
    else:
        print(f"the largest effects of all {every} neurons are certain")
        work.skip(AGAIN)
    return doubted


def settle_again(work, doubted):
    """Write the largest effects of layers whose doubted neurons were gone over again."""
    if doubted:
        keys = work.gather([f"keys{top.layer}" for top in doubted])
        for top in doubted if is_rank_zero() else ():
            top.write((top.norms.origin, top.norms.shift), keys[f"keys{top.layer}"])


def write_weights(work, directions, results, names):
    """Write the weights' part of the effects of some layers. Parameters: as in `write_top`.

    directions: a list of `Directions`.
    """
    if is_rank_zero():
        for item in directions:
            for kind in WEIGHT_PARTS:
                work[results.path(kind, layer=item.layer, **names)][:] = getattr(item, kind)
