"""Keep only each neuron's largest effects, of many layers, without storing all of them.

This is `--keep top`. `compute_pcas.py` needs every neuron's mean effect mu and its k largest about it.
A look at a few images gives a preliminary mean mu0, and a floor that about 3k norms of all will be above. A
pass over all sums up mu, takes norms about mu0, and keeps the effects above the floor. As
| |phi - mu| - |phi - mu0| | <= |mu - mu0|, these candidates have the k largest about mu among them if the
floor plus |mu - mu0| is below the k-th largest about mu. Where this leaves neurons in doubt, batches with an
image that may be missing are gone over again, about mu.

Letters as in `utils.prs`, k effects that are kept, and c candidates.
"""

import math

import numpy as np
import torch

from utils.effects import TOP
from utils.model.attention import double
from utils.norms import CentredNorms
from utils.runtime.distributed import is_rank_zero
from utils.runtime.errors import UserError
from utils.runtime.largest import ROWS, correct, enter, image_of, key_of, merge, norm_of, smallest_key

FEW = 256  # images of the preliminary mean, at least
ENOUGH = 1280  # of them, where these are not more than a quarter
CANDIDATES = 3  # times as many effects as are kept
SHARE = 20  # one in so many images, where this is more still
NEAR = 1e-3  # of a norm: rounding that is allowed for at first, where the k largest are looked for
MERGED_AT_ONCE = 16  # neurons whose candidates are merged at a time
ROUNDING = 16  # times the largest rounding error among a neuron's candidates is allowed for
CERTAIN, DOUBTED, KEPT = 1, 2, 3  # see `TopK`
AGAIN = 2  # the round of the pass for doubted neurons; round 0 goes over a few images, round 1 over all


def stride_of(images):
    """Return over every how many-th of some images the preliminary mean is taken; 1 where they are few."""
    return max(1, images // max(FEW, min(images // 4, ENOUGH), images // SHARE))


def start_of(results, layers, k, images):
    """Return state (sums, keys, knowledge) and scratch (candidates) of a `Pass`. results: of a loaded model.

    Raises UserError when there are fewer images than k.
    """
    if images < k:
        raise UserError(f"there are {images} images, and --top_k_pca {k} needs {k}; lower it, or --subsample")
    c = min(CANDIDATES * k, images)
    state, scratch = {}, {}
    for layer in layers:
        N, K, D = (results.sizes(layer)[letter] for letter in "NKD")
        for name in ("few_", ""):
            state[f"{name}C{layer}"] = ((K, N), "int64")
            state[f"{name}kappa{layer}"] = ((D,), "int64")
        state[f"keys{layer}"] = ((N, c), "uint64")
        state[f"floor{layer}"] = ((N,), "uint64")
        state[f"known{layer}"] = ((N,), "uint8")
        state[f"apart{layer}"] = ((1,), "float64")
        state[f"span{layer}"] = ((2, N), "uint64")
        scratch[f"top{layer}"] = ((N, c, K), "float32")
    return state, scratch


class TopK:
    """TopK is the candidates for the k largest centred effects of a layer's neurons, and then these.

    In the state of a `Pass` are keys, uint64 [N, c]: `key_of` the candidates of this process, or 0; floor,
    [N]: all that are no candidates are below it, 0 where it is not known yet; known, [N]: CERTAIN, or
    DOUBTED, then KEPT when keys are about the mean; apart: how far stored norms may be from those about the
    mean; span, [2, N]: an image is missing whose stored key is at least the first and below the second. In
    its scratch are the candidates' coefficients, float32 [N, c, K].

    work: `Pass`.
    directions: `Directions` of the layer.
    mean: C [K, N] and kappa [D] of the mean of `few` images, that norms are taken about.
    paths: {kind: path} of the layer's results.
    """

    def __init__(self, work, directions, mean, few, paths):
        self.work = work
        self.directions = directions
        self.layer = layer = directions.layer
        self.few = few
        self.files = {kind: work[path] for kind, path in paths.items()}
        self.exact = few == self.files["bias"].shape[0]  # another pass would tell no more
        state = (work.state[f"{name}{layer}"] for name in ("keys", "floor", "known", "apart", "span"))
        self.keys, self.floor, self.known, self.apart, self.span = state
        self.scratch = work.scratch[f"top{layer}"]
        self.norms = CentredNorms(directions, tuple(part.to(directions.values.device) for part in mean))

    @classmethod
    def of_layers(cls, work, directions, look, results, names):
        """Return a `TopK` for each of some `Directions`, about the mean of some images. look: their `Look`.

        results, names: `Results`, and the fields of file names besides the layer.
        """
        means = look.means([item.layer for item in directions])
        paths = {item: {kind: results.path(kind, layer=item, **names) for kind in TOP} for item in means}
        tops = [cls(work, item, means[item.layer], look.images, paths[item.layer]) for item in directions]
        for top in tops:
            if not top.floor.all():
                top.floor[:] = top.first_floor(look)
        work.gather([])  # candidates take the place of the sample, which every process has to know
        return tops

    def first_floor(self, look):
        """Return keys [N] that about c of all norms reach, by those of the `Look`'s sample."""
        norms = []
        for C in [] if self.exact else look.sample(self.layer):
            norms += self.norms.squares(C.to(self.directions.values)).clamp_(0).sqrt_()
        expected = len(norms) * self.keys.shape[1] / self.files["bias"].shape[0]
        rank = math.ceil(expected + math.sqrt(expected) + 1)  # by chance the sample has more or fewer of them
        if rank > len(norms):
            return np.ones_like(self.floor)
        lowest = torch.stack(norms).topk(rank, dim=0).values[-1].cpu().numpy()
        return np.maximum(smallest_key(lowest), np.uint64(1))  # 0 is for a floor that is not known

    def add(self, phi, first, sums=None):
        """Keep the effects of a batch that are above the floor, and store their norms and kappa.

        first: index of the batch's first image.
        sums: `Sums` to add them to. Without, only what is missing is looked at, and nothing is stored.
        """
        near = sums is not None and not self.exact  # kappa, too, may be left out of what is preliminary
        norms = (self.norms.squares(phi.C).clamp_(0).sqrt_() if near else self.norms(phi)).cpu().numpy()
        rows = slice(first, first + len(norms))
        new = key_of(norms.T, np.arange(rows.start, rows.stop))
        if sums is None:
            new[~self.missing(rows)] = 0
        else:
            sums.add(phi)
            self.files["bias"][rows] = phi.kappa
            self.files["image_norms"][rows] = norms
        n, places, images = enter(self.keys, new, self.floor)
        C = phi.C.mT[torch.from_numpy(images), torch.from_numpy(n)]
        self.scratch.put(n * self.keys.shape[1] + places, C.cpu().numpy())

    def missing(self, rows):
        """Return whether images (a slice) may be among a neuron's k but are no candidates, [N, B]."""
        found = np.zeros((len(self.known), rows.stop - rows.start), bool)
        n = np.flatnonzero(self.span[1])
        stored = key_of(self.files["image_norms"].read()[rows, n].T, np.arange(rows.start, rows.stop))
        found[n] = (self.span[0, n, None] <= stored) & (stored < self.span[1, n, None])
        return found

    def look_again(self, mean, known, span):
        """Take norms about the mean from now on. known, span: of rank 0."""
        self.known[:] = np.maximum(self.known, np.minimum(known, DOUBTED))  # unless it has gone further
        self.span[:] = span
        doubted = np.flatnonzero(self.known == DOUBTED)
        for n in np.array_split(doubted, len(doubted) // MERGED_AT_ONCE + 1):
            keys, B = self.keys[n], double(self.directions.B(n))
            C = self.scratch.array[n] - mean[0].T[n, None].numpy()
            phi, _ = self._effects(B, image_of(keys), C, mean[1])
            self.keys[n] = np.where(keys < span[1, n, None], 0, key_of(norms_of(phi), image_of(keys)))
        self.scratch.release()
        self.norms.origin, self.norms.shift = (part.to(self.norms.shift) for part in mean)
        self.known[doubted], self.floor[doubted] = KEPT, 1

    def write(self, mean, keys, floor):
        """Write the largest effects about the mean. mean: C, kappa. keys, floor: of all processes, lists."""
        order, keys = merge(keys, self.keys.shape[1])  # [N, c]
        floor = np.max(floor, axis=0)
        first = not self.known.any()
        bias = self.files["bias"].read()
        blocks = np.array_split(bias, len(bias) // ROWS + 1)
        far = max(np.linalg.norm(block - mean[1].numpy(), axis=1).max() for block in blocks)  # kappa
        found = []
        for start in range(0, len(order), MERGED_AT_ONCE):
            n = slice(start, start + MERGED_AT_ONCE)
            if (self.known[n] == CERTAIN).all():
                continue
            # mapped again each time: pages once read would count as this process's
            every = [part[n] for part in self.work.gather_scratch(f"top{self.layer}")]  # [n, c, K] each
            every = np.concatenate(every, axis=1)[np.arange(len(every[0]))[:, None], order[n]]
            B = double(self.directions.B(n))
            if first:
                self.files["top_mean"][n] = torch.einsum("kn,nko->no", mean[0][:, n].to(B), B) + mean[1].to(B)
            C, *about = self._best(n, B, keys[n], every, mean, far, floor[n])
            self.files["top_coefficients"][n] = C
            self.files["top_images"][n] = about[0]
            found.append((np.arange(len(order))[n], *about))
        n, images, norms, apart, *span = (np.concatenate(part) for part in zip(*found, strict=True))
        ready = np.ones(len(n), bool)
        if first:
            self.apart[:] = apart.max()
            ready = (span[0] >= span[1]) | self.exact
            self.span[:] = np.where(ready, 0, span)
            self.known[:] = np.where(ready, CERTAIN, DOUBTED)
        if not self.exact:
            correct(self.files["image_norms"], n[ready], images[ready], norms[ready])

    def _best(self, n, B, keys, every, mean, far, floor):
        """Return the k largest effects of a block of neurons n from candidates by falling norm.

        B: their directions. keys, every: of the candidates, [n, c] and their C [n, c, K]. far: how far kappa
        is from its mean at most. floor: [n].

        Returns C about the mean [n, k, K]; images and norms [n, k], of equal norms the earlier image first;
        how far stored norms may be from those about the mean; and a span: an image may be missing whose
        stored key is at least the first and below the second. Of these [n] each.
        """
        k = self.files["top_images"].shape[1]
        below = np.maximum(floor, keys[:, -1] + np.uint64(1))
        below[(keys[:, -1] > 0) & (keys.shape[1] == self.files["bias"].shape[0])] = 0  # all are candidates
        every = every - mean[0].T[n, None].numpy()
        moved = (mean[0].to(self.norms.shift) - self.norms.origin)[:, n].to(B)
        moved = torch.einsum("kn,nko->no", moved, B)[:, None]
        apart = moved.norm(dim=-1)[:, 0].cpu().numpy() + far
        for near in (NEAR, 1):
            likely = self._likely(n, keys, every, k, near, far)
            C, own = every[np.arange(len(every))[:, None], likely], np.take_along_axis(keys, likely, axis=1)
            phi, kappa = self._effects(B, image_of(own), C, mean[1])
            norms = norms_of(phi)
            off = np.abs(phi.sub_(kappa).add_(moved).norm(dim=-1).cpu().numpy() - norm_of(own))
            rounding = ROUNDING * np.where(own, off, 0).max(axis=1)
            best = np.where(own, key_of(norms, image_of(own)), 0).argsort(axis=1)[:, ::-1][:, :k]
            images, norms = (np.take_along_axis(part, best, axis=1) for part in (image_of(own), norms))
            if (rounding <= near * norms[:, -1]).all():
                break
        low = smallest_key(norms[:, -1] - apart - 4 * rounding)  # 4, because two passes round, too
        return C[np.arange(len(C))[:, None], best], images, norms, apart + rounding, low, below

    def _likely(self, n, keys, C, k, near, far):
        """Return places [n, w] of candidates that have the k largest effects, by norms without kappa.

        near: share of a norm that they may be off by.
        """
        squares = self.norms.along(torch.from_numpy(C).to(self.directions.values), n).cpu().numpy()
        norms = np.where(keys, np.sqrt(np.maximum(squares, 0)), 0)
        smallest = (1 - near) * np.sort(norms, axis=1)[:, -k, None] - 2 * far
        return (-norms).argsort(axis=1)[:, : (norms >= smallest).sum(axis=1).max()]

    def _effects(self, B, images, C, mean_kappa):
        """Return effects, float64 [n, c, D], and kappa about its mean. C: about the mean, [n, c, K]."""
        kappa = torch.from_numpy(self.files["bias"].read()[images] - mean_kappa.numpy()).to(B.device)
        return torch.bmm(torch.from_numpy(C).to(B), B).add_(kappa), kappa


def norms_of(phi):
    """Return norms in float32: copies of an image have equal ones then, however these are computed."""
    return phi.norm(dim=-1).float().cpu().numpy()


def settle(work, tops, sums):
    """Write the largest effects of layers that all images were gone over for.

    work: `Pass`. tops: a list of `TopK`. sums: `Sums` of all images.

    Returns the `TopK` of layers with doubted neurons. These are to be gone over again, then `settle_again`.
    """
    if not tops:  # all is there
        return []
    means = sums.means([top.layer for top in tops])
    found = work.gather([f"{name}{top.layer}" for top in tops for name in ("keys", "floor")])
    for top in tops if is_rank_zero() else ():
        if not top.known.any():  # else it was written before an interruption
            top.write(means[top.layer], *(found[f"{name}{top.layer}"] for name in ("keys", "floor")))
        if not top.exact:
            about = {"norms_about": f"the mean of {top.few} images", "norms_off_by": float(top.apart[0])}
            top.files["image_norms"].record |= about | {"norms_exact": top.files["top_images"].shape[1]}
    known = work.gather([f"{name}{top.layer}" for top in tops for name in ("known", "span")])
    for top in tops:  # by what rank 0 has found
        top.look_again(means[top.layer], *(known[f"{name}{top.layer}"][0] for name in ("known", "span")))
    doubted = [top for top in tops if not (top.known == CERTAIN).all()]
    images = work.skip(AGAIN, lambda rows: any(top.missing(rows).any() for top in doubted))
    work.commit()  # else effects would take places of candidates whose keys may be computed once more
    if not tops[0].exact:
        certain = np.concatenate([top.known for top in tops]) == CERTAIN
        found = f"one pass has found the largest effects of {certain.sum()} of {certain.size} neurons"
        again = f"; the other {(~certain).sum()} are gone over again, over {images} images"
        print(f"{found} for certain{again if doubted else ''}")
    return doubted


def settle_again(work, doubted):
    """Write the largest effects of layers whose doubted neurons were gone over again."""
    if not doubted:
        return
    found = work.gather([f"{name}{top.layer}" for top in doubted for name in ("keys", "floor")])
    for top in doubted if is_rank_zero() else ():
        mean = [part.cpu() for part in (top.norms.origin, top.norms.shift)]
        top.write(mean, *(found[f"{name}{top.layer}"] for name in ("keys", "floor")))
