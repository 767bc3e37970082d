"""Keep only each neuron's largest effects, of many layers, without storing all of them.

This is `--keep top`. `compute_pcas.py` needs every neuron's mean effect mu and its k largest about it.
A look at a few images gives a preliminary mean mu0. A pass over all sums up mu, takes norms about mu0, and
keeps the 3k effects of largest norm. As | |phi - mu| - |phi - mu0| | <= |mu - mu0|, these candidates have the
k largest about mu among them if the smallest one's norm plus |mu - mu0| is below the k-th largest about mu.
Where this leaves neurons in doubt, batches with an image that may be missing are gone over again, about mu.

Letters as in `utils.prs`, k effects that are kept, and c candidates.
"""

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
ENTERING = 8192  # effects that are copied into the candidates at a time
MERGED_AT_ONCE = 32  # neurons whose candidates are merged at a time
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
        state[f"known{layer}"] = ((N,), "uint8")
        state[f"apart{layer}"] = ((1,), "float64")
        state[f"span{layer}"] = ((2, N), "uint64")
        scratch[f"top{layer}"] = ((N, c, K), "float32")
    return state, scratch


class TopK:
    """TopK is the candidates for the k largest centred effects of a layer's neurons, and then these.

    In the state of a `Pass` are keys, uint64 [N, c]: `key_of` the candidates of this process, 0 where none is
    yet; known, [N]: CERTAIN, or DOUBTED, then KEPT when keys are about the mean; apart: how far stored norms
    may be from those about the mean; span, [2, N]: an image is missing whose stored key is at least the first
    and below the second. In its scratch are the candidates' coefficients, float32 [N, c, K].

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
        state = (work.state[f"{name}{layer}"] for name in ("keys", "known", "apart", "span"))
        self.keys, self.known, self.apart, self.span = state
        self.scratch = work.scratch[f"top{layer}"]
        self.norms = CentredNorms(directions, tuple(part.to(directions.values.device) for part in mean))

    @classmethod
    def of_layers(cls, work, directions, sums, results, names):
        """Return a `TopK` for each of some `Directions`, about the mean of some images. sums: their `Sums`.

        results, names: `Results`, and the fields of file names besides the layer.
        """
        means = sums.means([item.layer for item in directions])
        paths = {item: {kind: results.path(kind, layer=item, **names) for kind in TOP} for item in means}
        return [cls(work, item, means[item.layer], sums.images, paths[item.layer]) for item in directions]

    def add(self, phi, first, sums=None):
        """Let the effects of a batch take the places of smaller ones, and store their norms and kappa.

        first: index of the batch's first image.
        sums: `Sums` to add them to. Without, only what is missing is looked at, and nothing is stored.
        """
        near = sums is not None and not self.exact  # kappa, too, may be left out of what is preliminary
        norms = (self.norms.squares(phi).clamp_(0).sqrt_() if near else self.norms(phi)).cpu().numpy()
        rows = slice(first, first + len(norms))
        new = key_of(norms.T, np.arange(rows.start, rows.stop))
        if sums is None:
            new[~self.missing(rows)] = 0
        else:
            sums.add(phi)
            self.files["bias"][rows] = phi.kappa
            self.files["image_norms"][rows] = norms
        n, places, images = enter(self.keys, new)
        kept = torch.from_numpy(self.scratch.array)  # shares the memory; torch writes with several threads
        for part in np.array_split(np.arange(len(n)), len(n) // ENTERING + 1):
            m, b = (torch.from_numpy(index[part]).to(phi.C.device) for index in (n, images))
            kept[torch.from_numpy(n[part]), torch.from_numpy(places[part])] = phi.C[b, :, m].cpu()
            self.scratch.release()

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
            keys = self.keys[n]
            _, _, norms = self._effects(n, keys, self.scratch.array[n], mean)
            self.keys[n] = np.where(keys < span[1, n, None], 0, key_of(norms, image_of(keys)))
        self.scratch.release()
        self.norms.origin, self.norms.shift = (part.to(self.norms.shift) for part in mean)
        self.known[doubted] = KEPT

    def write(self, mean, keys):
        """Write the largest effects about the mean. mean: C, kappa. keys: of all processes, a list."""
        order, keys = merge(keys, self.keys.shape[1])  # [N, c]
        found = []
        for start in range(0, len(order), MERGED_AT_ONCE):
            n = slice(start, start + MERGED_AT_ONCE)
            if (self.known[n] == CERTAIN).all():
                continue
            # mapped again each time: pages once read would count as this process's
            every = [part[n] for part in self.work.gather_scratch(f"top{self.layer}")]  # [n, c, K] each
            every = np.take_along_axis(np.concatenate(every, axis=1), order[n, :, None], axis=1)
            C, *effects = self._effects(n, keys[n], every, mean)
            best, *about = self._best(n, keys[n], *effects, mean[0])
            self.files["top_coefficients"][n] = np.take_along_axis(C, best[..., None], axis=1)
            self.files["top_images"][n] = about[0]
            found.append((np.arange(len(order))[n], *about))
        n, images, norms, apart, rounding = (np.concatenate(part) for part in zip(*found, strict=True))
        ready = np.ones(len(n), bool)
        if not self.known.any():
            C, kappa = (part.to(self.norms.shift) for part in mean)
            heads = torch.einsum("kn,kne->nke", C, self.directions.values)
            self.files["top_mean"][:] = torch.einsum("nke,keo->no", heads, self.directions.outputs) + kappa
            blocks = np.array_split(self.files["bias"].read(), self.files["bias"].shape[0] // ROWS + 1)
            apart += max(np.linalg.norm(block - mean[1].numpy(), axis=1).max() for block in blocks)
            self.apart[:] = (apart + rounding).max()
            low = smallest_key(norms[:, -1] - apart - 4 * rounding)  # 4, because two passes round, too
            ready = (low > keys[:, -1]) | (self.files["bias"].shape[0] == keys.shape[1]) | self.exact
            self.span[:] = np.where(ready, 0, [low, keys[:, -1]])
            self.known[:] = np.where(ready, CERTAIN, DOUBTED)
        if not self.exact:
            correct(self.files["image_norms"], n[ready], images[ready], norms[ready])

    def _effects(self, n, keys, C, mean):
        """Return C of candidates of neurons n about the mean [n, c, K]; C B, float64 [n, c, D]; and norms."""
        C = C - mean[0].T[n, None].numpy()
        kappa = self.files["bias"].read()[image_of(keys)] - mean[1].numpy()
        B = double(self.directions.B(n))
        along = torch.bmm(torch.from_numpy(C).to(B), B)
        # rounded to float32, so that copies of an image have equal norms whatever way they are computed
        return C, along, (along + torch.from_numpy(kappa).to(B)).norm(dim=-1).float().cpu().numpy()

    def _best(self, n, keys, along, norms, mean_C):
        """Return what is known of a block of neurons n from candidates by falling norm, and `_effects`.

        These are places of the k largest [n, k], of equal ones the earlier image first; their images and
        norms [n, k]; how far C B of the mean is from that of `norms`, and what rounding may add to it [n].
        """
        images = image_of(keys)
        moved = (mean_C.to(self.norms.shift) - self.norms.origin)[:, n].to(along)
        moved = torch.einsum("kn,nko->no", moved, double(self.directions.B(n)))
        before = (along + moved[:, None]).norm(dim=-1).cpu().numpy()
        best = key_of(norms, images).argsort(axis=1)[:, ::-1][:, : self.files["top_images"].shape[1]]
        rounding = ROUNDING * np.abs(before - norm_of(keys)).max(axis=1)
        found = (np.take_along_axis(part, best, axis=1) for part in (images, norms))
        return best, *found, moved.norm(dim=-1).cpu().numpy(), rounding


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
        if not top.known.any():  # else it was written before an interruption
            top.write(means[top.layer], keys[f"keys{top.layer}"])
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
    keys = work.gather([f"keys{top.layer}" for top in doubted]) if doubted else {}
    for top in doubted if is_rank_zero() else ():
        top.write([part.cpu() for part in (top.norms.origin, top.norms.shift)], keys[f"keys{top.layer}"])
