"""Keep only each neuron's largest effects, of many layers, without storing all of them.

This is `--keep top`. `compute_pcas.py` needs every neuron's mean effect mu and its k largest about it.
A look at a few images gives a preliminary mean mu0, and a floor that more than k norms of all will be above.
A pass over all sums up mu, takes norms about mu0, and keeps the effects above the floor. As
| |phi - mu| - |phi - mu0| | <= |mu - mu0|, these candidates have the k largest about mu among them if the
floor plus |mu - mu0| is below the k-th largest about mu. For neurons that this leaves in doubt the images are
gone over again, about mu. Of many images the pass goes over a part first. The others have the mean of this
part for mu0, and a floor of their own; norms of the part's candidates are taken again.
Effects of a unit of a dictionary are 0 on images on which it does not act: all alike, of which the earliest
come first. So of these only the first k can be among its k largest, which are kept beside the candidates.

Letters as in `utils.prs`, k effects that are kept, and c candidates.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from utils.effects import TOP
from utils.model.attention import double
from utils.norms import CentredNorms
from utils.runtime.distributed import is_rank_zero
from utils.runtime.errors import UserError
from utils.runtime.largest import (
    correct,
    enter,
    image_of,
    key_of,
    norm_of,
    smallest_key,
    taken_of,
)

FEW = 256  # images of the look, at least
SHARE = 20  # one in so many images, where this is more
PART = 4  # one in so many images is of the part that is gone over first
PLACES = 0.3  # of the places of candidates are for those of this part
CANDIDATES = 4  # times as many effects as are kept
MARGIN = 2  # times as far as a mean is by chance from that of all
NEAR = 1e-3  # of the largest norm: rounding allowed for at first, where the k largest are looked for
COMPARED = 32  # candidates whose norms show how far rounding is
AT_ONCE = 32  # neurons whose candidates are compared
ROUNDING = 16  # times the largest rounding error among these is allowed for
CERTAIN, DOUBTED, RESTARTED = 1, 2, 3  # see `TopK`
OF_WRITE = ("keys", "floors", "idle")  # what `TopK.write` takes of the state
LOOK, PART_FIRST, OTHERS, AGAIN = range(4)  # the rounds of a pass; the last is for doubted neurons


class Strides(NamedTuple):
    """Strides say over every how many-th image a look goes, and every how many-th is of the first part."""

    look: int = 1
    part: int = 1

    def rounds(self):
        """Return the images of the rounds of a pass, a list of slices for each."""
        part, *others = (slice(first, None, self.part) for first in range(self.part))
        return [slice(None, None, self.look)], [part], others, [part, *others]


def strides_of(images):
    """Return the `Strides` over some images; a look at all of them where they are few."""
    look = max(1, images // max(FEW, images // SHARE))
    return Strides(look, PART if images // PART >= 2 * FEW else 1)


def start_of(results, layers, k, images, units=False):
    """Return state (sums, keys, knowledge) and scratch (candidates) of a `Pass`. results: of a loaded model.

    units: whether the effects are of other units than neurons.

    Raises UserError when there are fewer images than k.
    """
    if images < k:
        raise UserError(f"there are {images} images, and --top_k_pca {k} needs {k}; lower it, or --subsample")
    c = min(CANDIDATES * k, images)
    state, scratch = {}, {}
    for layer in layers:
        N, K, D = (results.sizes(layer)[letter] for letter in "NKD")
        for name in ("few_", "part_", ""):
            state[f"{name}C{layer}"] = ((N, K), "int64")
            state[f"{name}kappa{layer}"] = ((D,), "int64")
        state[f"keys{layer}"] = ((N, c), "uint64")
        state[f"floors{layer}"] = ((2, N), "uint64")
        state[f"known{layer}"] = ((N,), "uint8")
        state[f"apart{layer}"] = ((1,), "float64")
        state[f"idle{layer}"] = ((N, k if units else 0), "int32")
        scratch[f"top{layer}"] = ((N, c, K), "float32")
    return state, scratch


class Kappa(NamedTuple):
    """Kappa is that of all images about its mean, [images, D], and how far it is from it at most."""

    centred: torch.Tensor
    far: float

    def of(self, images, like):
        """Return that of some images, an array [...], as [..., D], of the kind of another tensor."""
        return self.centred[torch.from_numpy(images).to(self.centred.device)].to(like)


class TopK:
    """TopK is the candidates for the k largest centred effects of a layer's neurons, and then these.

    In the state of a `Pass` are keys, uint64 [N, c]: `key_of` the candidates of this process, or 0; floors,
    [2, N]: all that are no candidates are below the first, or of the part that is gone over first below the
    second, about the mean of the look; 0 where they are not known yet; known, [N]: CERTAIN, or DOUBTED, then
    RESTARTED, with candidates about the mean; apart: how far stored norms may be from those about the mean,
    but for rounding; idle, [N, k]: the first images on which a unit does not act, as numbers that count down
    to 1 at the last image, and then 0.
    In its scratch are the candidates' coefficients, float32 [N, c, K].

    work: `Pass`.
    directions: `Directions` of the layer.
    mean: C [K, N] and kappa [D] of the mean of `few` images, that norms are taken about.
    part: every how many-th image is of the first part.
    paths: {kind: path} of the layer's results.
    """

    def __init__(self, work, directions, mean, few, part, paths):
        self.work = work
        self.outputs = directions.outputs
        self.layer = layer = directions.layer
        self.few = few
        self.part = part
        self.files = {kind: work[path] for kind, path in paths.items()}
        self.k = self.files["top_images"].shape[1]
        self.exact = few == self.files["bias"].shape[0]  # another pass would tell no more
        state = (work.state[f"{name}{layer}"] for name in ("keys", "floors", "known", "apart", "idle"))
        self.keys, self.floors, self.known, self.apart, self.idle = state
        self.floor = self.floors[0]
        self.taken = taken_of(self.keys)
        self.scratch = work.scratch[f"top{layer}"]
        self.norms = CentredNorms(directions, tuple(part.to(self.outputs.device) for part in mean))
        self.of_look = self.norms.origin
        # values are read again where they are needed, which a pass over the images is not
        self.directions = directions if self.exact else directions._replace(values=None)
        self.norms.directions = self.directions

    @classmethod
    def of_layers(cls, work, directions, look, part, results, names):
        """Return a `TopK` for each of some `Directions`, about the mean of some images. look: their `Look`.

        part: as above. results, names: `Results`, and the fields of file names besides the layer.
        """
        means = look.means([item.layer for item in directions])
        paths = {item: {kind: results.path(kind, layer=item, **names) for kind in TOP} for item in means}
        tops = [
            cls(work, item, means[item.layer], look.images, part, paths[item.layer]) for item in directions
        ]
        for top in tops:
            if not top.floor.all():
                top.floor[:] = top.first_floor(look)
        work.commit()
        work.gather([])  # candidates take the place of the sample, which every process has to know
        return tops

    def first_floor(self, look):
        """Return keys [N] that about c of all norms reach, or a share of a part, by the `Look`'s sample.

        Where norms are close together these are lower, for the k largest about the mean to be above.
        """
        norms = []
        for C in [] if self.exact else look.sample(self.layer):
            found = self.norms.squares(C.to(self.outputs)).clamp_(0).sqrt_()
            if self.directions.units is not None:
                found *= C.any(dim=1).to(found)  # of effects that are 0, few are candidates
            norms += found
        places = self.keys.shape[1] * (1 if self.part == 1 else PLACES)
        share = len(norms) / self.files["bias"].shape[0]
        rank = deeper(places * self.part * share)
        if rank > len(norms):
            return np.ones_like(self.floor)
        norms = torch.stack(norms)
        largest = norms.topk(rank, dim=0).values
        spread = norms.square().mean(dim=0).div(self.few).sqrt()  # of the mean of so many images
        below = largest[deeper(self.k * share) - 1] - MARGIN * spread
        lowest = torch.minimum(largest[-1], below).cpu().numpy()
        return np.maximum(smallest_key(lowest), np.uint64(1))  # 0 is for a floor that is not known

    def add(self, phi, rows, sums=None):
        """Keep the effects of a batch (a slice of images) that are above the floor; store norms and kappa.

        sums: `Sums` to add them to. Without, only doubted neurons are looked at, and nothing is stored.
        """
        near = sums is not None and not self.exact  # kappa, too, may be left out of what is preliminary
        norms = (self.norms.squares(phi.C).clamp_(0).sqrt_() if near else self.norms(phi)).cpu().numpy()
        new = key_of(norms.T, images_of(rows))
        if self.directions.units is not None:
            idle = ~phi.C.any(dim=1).T.cpu().numpy()
            new[idle] = 0
            if sums is not None:
                self._keep_first(idle, images_of(rows))
        if sums is None:
            new[self.known == CERTAIN] = 0
        else:
            sums.add(phi)
            self.files["bias"][rows] = phi.kappa
            self.files["image_norms"][rows] = norms
        n, places, images = enter(self.keys, self.taken, new, self.floor)
        C = phi.C.mT[torch.from_numpy(images), torch.from_numpy(n)]
        self.scratch.put(n * self.keys.shape[1] + places, C.cpu().numpy())

    def _keep_first(self, idle, images):
        """Keep the first k images on which units do not act. idle: whether they do not, [N, B]."""
        new = np.where(idle, self._count_down(images), np.int32(0))
        earlier = np.flatnonzero(new.max(axis=1) > self.idle[:, -1])
        every = np.sort(np.concatenate([self.idle[earlier], new[earlier]], axis=1), axis=1)
        self.idle[earlier] = every[:, : -self.idle.shape[1] - 1 : -1]

    def _count_down(self, images):
        """Return images as numbers that count down to 1 at the last one, or such numbers as images."""
        return (self.files["bias"].shape[0] - images).astype(np.int32)

    def move(self, mean):
        """Take the norms of candidates again, about the mean of the first part. mean: C [K, N], kappa [D]."""
        for n in () if self.floors[1].any() else self._blocks():
            some = n, slice(self.taken[n].max())
            C = torch.from_numpy(self.scratch.array[some]) - mean[0].T[n, None]
            norms = self.norms.along(C.to(self.outputs), n).clamp_(0).sqrt_().cpu().numpy()
            self.keys[some] = np.where(self.keys[some], key_of(norms, image_of(self.keys[some])), 0)
            self.scratch.release()

    def lift(self, mean, keys, images):
        """Take norms about the mean of the first part, of some images, from now on; the others get a floor.

        It leaves places for them, and is below the k largest by as much as the mean has moved.
        mean: as in `move`. keys: of all processes' candidates after it, a list of [N, c].
        """
        if not self.floors[1].any():
            self.floors[1] = self.floor
            c, every = self.keys.shape[1], self.files["bias"].shape[0]
            keys = np.sort(np.concatenate(keys, axis=1), axis=1)[:, ::-1]
            left = c - (keys != 0).sum(axis=1)  # places for the others
            rank = (left * images // (every - images)).clip(0, c - 1)
            level = np.take_along_axis(keys, rank[:, None], axis=1)[:, 0]
            expected = self.k * images / every
            kth = norm_of(keys[:, deeper(2 * expected) - 1])  # twice, as the part may have more of them
            for n in self._blocks():
                step = self._step(mean, self.of_look, n, self._B(n))
                kth[n] -= step.norm(dim=-1).cpu().numpy()
            self.floor[:] = np.minimum(level, smallest_key(kth)).clip(1)
        self.norms.origin, self.norms.shift = (part.to(self.norms.origin) for part in mean)

    def about(self):
        """Return the words for what norms are about."""
        if self.part == 1:
            return f"the mean of {self.few} images"
        part = len(range(0, self.files["bias"].shape[0], self.part))
        return f"the mean of {self.few} images, or of {part}"

    def restart(self, mean, known):
        """Take norms about the mean from now on; forget candidates of doubted neurons. known: of rank 0."""
        self.known[:] = np.maximum(self.known, np.minimum(known, DOUBTED))  # unless it has gone further
        doubted = self.known == DOUBTED
        self.keys[doubted], self.floor[doubted], self.known[doubted] = 0, 1, RESTARTED
        self.taken = taken_of(self.keys)
        self.norms.origin, self.norms.shift = (part.to(self.norms.shift) for part in mean)
        if (self.known > CERTAIN).any():
            self.norms.directions = self.directions._replace(values=self._values())

    def write(self, mean, keys, floors, idle):
        """Write the largest effects about the mean. mean: C, kappa. Others: of all processes, lists."""
        floors = np.max(floors, axis=0)
        first = not self.known.any()
        kappa = self._kappa(mean[1])
        shape = self.files["top_images"].shape
        images, norms = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        apart, ready = np.zeros(len(images)), np.zeros(len(images), bool)
        for n in self._blocks():
            if (self.known[n] == CERTAIN).all():
                continue
            # mapped again each time: pages once read would count as this process's
            every = [part[n] for part in self.work.gather_scratch(f"top{self.layer}")]
            every += [np.zeros((*part[n].shape, every[0].shape[2]), np.float32) for part in idle]
            C = torch.from_numpy(np.concatenate(every, axis=1)).sub_(mean[0].T[n, None].contiguous())
            B = self._B(n)
            if first:
                self.files["top_mean"][n] = self._along(mean[0], n, B) + double(mean[1].to(self.outputs))
            zero = norms_of(self._along(self.norms.origin, n, B))[:, None]  # norms of effects that are 0
            own = [part[n] for part in keys]
            own += [np.where(part[n], key_of(zero, self._count_down(part[n])), 0) for part in idle]
            own = np.concatenate(own, axis=1)
            C, images[n], norms[n], apart[n], certain = self._best(n, B, own, C, mean, kappa, floors[:, n])
            self.files["top_coefficients"][n] = C
            self.files["top_images"][n] = images[n]
            ready[n] = certain if first else True
        if first:
            self.apart[:] = apart.max()
            self.known[:] = np.where(ready, CERTAIN, DOUBTED)
        if not self.exact:
            correct(self.files["image_norms"], np.flatnonzero(ready), images[ready], norms[ready])

    def _best(self, n, B, keys, C, mean, kappa, floors):
        """Return the k largest effects of a block of neurons n from candidates by falling norm.

        B: `_B` of n. keys, C: of the candidates, [n, c] and about the mean [n, c, K]. mean: C, kappa.
        kappa: `Kappa`. floors: [2, n].

        Returns C [n, k, K]; images and norms [n, k], of equal norms the earlier image first; how far stored
        norms may be from those about the mean, [n]; and whether no other image can be among the k, [n].
        """
        k = self.k
        rows = np.arange(len(keys))[:, None]
        step, of_look = (self._step(mean, origin, n, B) for origin in (self.norms.origin, self.of_look))
        apart = torch.stack([step, of_look]).norm(dim=-1).cpu().numpy() + kappa.far
        for near in (NEAR, 1):
            likely = self._likely(n, keys, C, k, near, kappa.far)
            x, own = C[rows, likely], keys[rows, likely]
            phi = self._effects(B, image_of(own), x, kappa)
            norms = norms_of(phi)
            best = np.where(own, key_of(norms, image_of(own)), 0).argsort(axis=1)[:, : -k - 1 : -1].copy()
            some, compared = own[:, :COMPARED], phi[:, :COMPARED]
            if not self.exact:  # keys are of norms about another mean, without kappa
                compared = compared - kappa.of(image_of(some), step) + step[:, None]
            off = np.abs(compared.norm(dim=-1).cpu().numpy() - norm_of(some))
            rounding = ROUNDING * np.where(some, off, 0).max(axis=1)
            images, norms = image_of(own)[rows, best], norms[rows, best]
            if (rounding <= near * norms[:, 0]).all():
                break
        low = smallest_key(norms[:, -1] - apart - 4 * rounding)  # 4, because two passes round, too
        candidates = (keys != 0).sum(axis=1)
        certain = (candidates >= k) & (((low >= floors) | (floors <= 1)).all(axis=0) | self.exact)
        certain |= candidates == self.files["bias"].shape[0]  # all images are candidates
        return x[rows, best], images, norms, apart.max(axis=0), certain

    def _likely(self, n, keys, C, k, near, far):
        """Return places [n, w] of candidates that have the k largest effects, by norms without kappa.

        near: share of the largest norm that they may be off by.
        """
        if self.exact:  # keys are of norms about the mean, with kappa
            norms, far = norm_of(keys), 0
        else:
            squares = self.norms.along(C.to(self.outputs), n).cpu().numpy()
            norms = np.sqrt(np.maximum(squares, 0))
        norms = np.where(keys, norms, -np.inf)  # no candidates
        order = np.sort(norms, axis=1).clip(0)
        smallest = order[:, -k, None] - near * order[:, -1:] - 2 * far
        return (-norms).argsort(axis=1)[:, : max(k, (norms >= smallest).sum(axis=1).max())]

    def _blocks(self):
        """Return slices of neurons whose directions in float64 take little memory."""
        count = len(self.known)
        return [slice(start, min(start + AT_ONCE, count)) for start in range(0, count, AT_ONCE)]

    def _step(self, mean, origin, n, B):
        """Return how far a mean is from another, C [K, N], without kappa, float64 [n, D]."""
        return self._along(mean[0].to(origin) - origin, n, B)

    def _along(self, C, n, B):
        """Return the combinations C [K, N] of the directions of neurons n, float64 [n, D]. B: `_B` of n."""
        return torch.bmm(C[:, n].T[:, None].to(B), B)[:, 0]

    def _values(self, n=slice(None)):
        """Return the values of some neurons, [K, n, e], as they were written."""
        return torch.from_numpy(self.files["values"].read()[:, n].copy()).to(self.outputs)

    def _B(self, n):
        """Return the directions of some neurons in float64, [n, K, D]."""
        return double(self.directions._replace(values=self._values(n)).B())

    def _kappa(self, mean):
        """Return the `Kappa` of all images. mean: [D]."""
        centred = torch.from_numpy(self.files["bias"].read() - mean.numpy()).to(self.outputs.device)
        return Kappa(centred, float(centred.norm(dim=-1).max()))

    def _effects(self, B, images, C, kappa):
        """Return effects, float64 [n, c, D]. C: about the mean, [n, c, K]."""
        return kappa.of(images, B).baddbmm_(C.to(B), B)


def deeper(rank):
    """Return a rank in a sample that is deeper than an expected one, by what chance may do."""
    return math.ceil(rank + math.sqrt(rank) + 1)


def images_of(rows):
    """Return the images of a slice."""
    return np.arange(rows.start, rows.stop, rows.step or 1)


def norms_of(phi):
    """Return norms in float32: copies of an image have equal ones then, however these are computed."""
    return phi.norm(dim=-1).float().cpu().numpy()


def move(work, tops, sums):
    """Take norms about the mean of the first part of the images from now on. sums: its `Sums`."""
    if tops and tops[0].part > 1 and not tops[0].exact:
        means = sums.means([top.layer for top in tops])
        for top in tops:
            top.move(means[top.layer])
        keys = work.gather([f"keys{top.layer}" for top in tops])
        for top in tops:
            top.lift(means[top.layer], keys[f"keys{top.layer}"], sums.images)
        work.commit()
        work.gather([])  # no process has later candidates before all have lifted their floors


def settle(work, tops, sums):
    """Write the largest effects of layers that all images were gone over for.

    work: `Pass`. tops: a list of `TopK`. sums: `Sums` of all images.

    Returns the `TopK` of layers with doubted neurons. These are to be gone over again, then `settle_again`.
    """
    if not tops:  # all is there
        return []
    means = sums.means([top.layer for top in tops])
    found = work.gather([f"{name}{top.layer}" for top in tops for name in OF_WRITE])
    for top in tops if is_rank_zero() else ():
        if not top.known.any():  # else it was written before an interruption
            top.write(means[top.layer], *(found[f"{name}{top.layer}"] for name in OF_WRITE))
        if not top.exact:
            about = {"norms_about": top.about(), "norms_off_by": float(top.apart[0])}
            top.files["image_norms"].record |= about | {"norms_exact": top.files["top_images"].shape[1]}
    known = work.gather([f"known{top.layer}" for top in tops])
    for top in tops:  # by what rank 0 has found
        top.restart(means[top.layer], known[f"known{top.layer}"][0])
    doubted = [top for top in tops if not (top.known == CERTAIN).all()]
    if not doubted:
        work.skip(AGAIN)
    work.commit()  # else candidates would be forgotten once more
    if not tops[0].exact:
        certain = np.concatenate([top.known for top in tops]) == CERTAIN
        what = "neurons" if tops[0].directions.units is None else "units"
        found = f"one pass has found the largest effects of {certain.sum()} of {certain.size} {what}"
        again = f"; for the other {(~certain).sum()} the images are gone over again"
        print(f"{found} for certain{again if doubted else ''}")
    return doubted


def settle_again(work, doubted):
    """Write the largest effects of layers whose doubted neurons were gone over again."""
    if not doubted:
        return
    found = work.gather([f"{name}{top.layer}" for top in doubted for name in OF_WRITE])
    for top in doubted if is_rank_zero() else ():
        mean = [part.cpu() for part in (top.norms.origin, top.norms.shift)]
        top.write(mean, *(found[f"{name}{top.layer}"] for name in OF_WRITE))
