"""Keep only each neuron's largest effects, of many layers, without storing all of them.

This is `--keep top`. `compute_pcas.py` needs every neuron's mean effect mu and its k largest about it.
A look at a few images gives a preliminary mean mu0. A pass over all sums up mu, takes norms about mu0, and
keeps the 2k effects of largest norm. As | |phi - mu| - |phi - mu0| | <= |mu - mu0|, these candidates have the
k largest about mu among them if the smallest one's norm plus |mu - mu0| is below the k-th largest about mu.
Neurons that this leaves in doubt are gone over again, about mu.

Letters as in `utils.prs`, k effects that are kept, and c candidates.
"""

import numpy as np
import torch

from utils.effects import TOP
from utils.model.attention import double
from utils.norms import CentredNorms
from utils.runtime.distributed import is_rank_zero
from utils.runtime.errors import UserError
from utils.runtime.largest import enter, image_of, key_of, norm_of

FEW = 256  # images of the preliminary mean, at least
SHARE = 20  # one in so many images, where this is more
ENTERING = 8192  # effects that are copied into the candidates at a time
MERGED_AT_ONCE = 32  # neurons whose candidates are merged at a time
ROWS = 512  # images that are worked on together afterwards
ROUNDING = 16  # times the largest rounding error among a neuron's candidates is allowed for
CERTAIN, DOUBTED = 1, 2  # what is known of a neuron's k largest; 0 as long as nothing is
AGAIN = 2  # the round of the pass for doubted neurons; round 0 goes over a few images, round 1 over all


def stride_of(images):
    """Return over every how many-th of some images the preliminary mean is taken; 1 where they are few."""
    return max(1, images // max(FEW, images // SHARE))


def start_of(results, layers, k, images):
    """Return the state (sums, keys, knowledge) and scratch (candidates) of the pass, as `Pass` takes them.

    results: `Results` of a loaded model.

    Raises UserError when there are fewer images than k.
    """
    if images < k:
        raise UserError(f"there are {images} images, and --top_k_pca {k} needs {k}; lower it, or --subsample")
    c = min(2 * k, images)
    state = {}
    scratch = {}
    for layer in layers:
        N, K, D = (results.sizes(layer)[letter] for letter in "NKD")
        for name in ("few_", ""):
            state[f"{name}C{layer}"] = ((K, N), "int64")
            state[f"{name}kappa{layer}"] = ((D,), "int64")
        state[f"keys{layer}"] = ((N, c), "uint64")
        state[f"known{layer}"] = ((N,), "uint8")
        state[f"apart{layer}"] = ((1,), "float64")
        scratch[f"top{layer}"] = ((N, c, K), "float32")
    return state, scratch


class TopK:
    """TopK is the candidates for the k largest centred effects of a layer's neurons, and then these.

    In the state of a `Pass` are keys, uint64 [N, c]: `key_of` the candidates of this process, 0 where none is
    yet; known, [N]: CERTAIN or DOUBTED; apart: how far stored norms may be from those about the mean. In its
    scratch are the candidates' coefficients, float32 [N, c, K].

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
        self.keys, self.known, self.apart = (work.state[f"{x}{layer}"] for x in ("keys", "known", "apart"))
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
        sums: `Sums` to add them to. Without, only doubted neurons are looked at, and nothing is stored.
        """
        near = sums is not None and not self.exact  # kappa, too, may be left out of what is preliminary
        norms = (self.norms.squares(phi).clamp_(0).sqrt_() if near else self.norms(phi)).cpu().numpy()
        rows = slice(first, first + len(norms))
        new = key_of(norms.T, np.arange(rows.start, rows.stop))
        if sums is None:
            new[self.known != DOUBTED] = 0
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

    def look_again(self, mean):
        """Take norms about the mean from now on; doubted neurons begin without candidates."""
        self.norms.origin, self.norms.shift = (part.to(self.norms.shift) for part in mean)
        if not self.work.entered(AGAIN):
            self.keys[self.known == DOUBTED] = 0

    def write(self, mean, keys):
        """Write the largest effects about the mean. mean: C, kappa. keys: of all processes, a list."""
        mean_C, mean_kappa = (part.to(self.norms.shift) for part in mean)
        keys = np.concatenate(keys, axis=1)  # [N, processes c]
        order = keys.argsort(axis=1)[:, ::-1][:, : self.keys.shape[1]]
        keys = np.take_along_axis(keys, order, axis=1)
        bias = self.files["bias"].read()
        blocks = np.array_split(bias, len(bias) // ROWS + 1)
        reach = max(np.linalg.norm(block - mean[1].numpy(), axis=1).max() for block in blocks)
        found = []
        for start in range(0, len(order), MERGED_AT_ONCE):
            n = slice(start, start + MERGED_AT_ONCE)
            # mapped again each time: pages once read would count as this process's
            every = [part[n] for part in self.work.gather_scratch(f"top{self.layer}")]  # [n, c, K] each
            every = np.take_along_axis(np.concatenate(every, axis=1), order[n, :, None], axis=1)
            effects = (every - mean[0].T[n, None].numpy(), bias[image_of(keys[n])] - mean[1].numpy())
            best, *about = self._best(n, keys[n], effects, mean_C, reach)
            self.files["top_coefficients"][n] = np.take_along_axis(effects[0], best[..., None], axis=1)
            found.append(about)
        images, norms, apart, certain = (np.concatenate(part) for part in zip(*found, strict=True))
        self.files["top_images"][:] = images
        heads = torch.einsum("kn,kne->nke", mean_C, self.directions.values)
        self.files["top_mean"][:] = torch.einsum("nke,keo->no", heads, self.directions.outputs) + mean_kappa
        known = self.known.copy()
        if not known.any():
            self.apart[:] = apart.max()
            known[:] = np.where(certain | self.exact, CERTAIN, DOUBTED)
        if not self.exact and (self.known.any() or DOUBTED not in known):
            self._correct_norms(images, norms)
        self.known[:] = known

    def _best(self, n, keys, effects, mean_C, reach):
        """Return what is known of a block of neurons n, computed in float64.

        keys: of their candidates [n, c], by falling norm.
        effects: coefficients [n, c, K] and kappa [n, c, D] about the mean, whose C is mean_C.
        reach: the largest norm of kappa of any image about the mean.

        Returns the places of the k largest among the candidates [n, k], of equal ones the earlier image
        first; their images and norms [n, k]; how far stored norms may be from those about the mean [n]; and
        whether no other image can be one of the k [n].
        """
        images = image_of(keys)
        B = double(self.directions.B(n))
        along, kappa = (torch.from_numpy(part).to(B) for part in effects)
        along = torch.bmm(along, B)  # [n, c, D]
        moved = torch.einsum("kn,nko->no", (mean_C - self.norms.origin)[:, n].to(B), B)
        before = (along + moved[:, None]).norm(dim=-1).cpu().numpy()
        # rounded to float32, so that copies of an image have equal norms whatever way they are computed
        norms = (along + kappa).norm(dim=-1).float().cpu().numpy()
        best = key_of(norms, images).argsort(axis=1)[:, ::-1][:, : self.files["top_images"].shape[1]]
        largest = np.take_along_axis(norms, best, axis=1)
        rounding = ROUNDING * np.abs(before - norm_of(keys)).max(axis=1)
        apart = moved.norm(dim=-1).cpu().numpy() + reach
        others = before[:, -1] + apart + 4 * rounding  # at most; 4, because two passes round, too
        certain = (others < largest[:, -1]) | (self.files["bias"].shape[0] == keys.shape[1])
        return best, np.take_along_axis(images, best, axis=1), largest, apart + rounding, certain

    def _correct_norms(self, images, norms):
        """Make the stored norms [images, N] of the k largest [N, k] exact, and no other one as large."""
        file = self.files["image_norms"]
        below = np.nextafter(norms[:, -1], 0, dtype=np.float32)
        for start in range(0, file.shape[0], ROWS):
            rows = slice(start, min(start + ROWS, file.shape[0]))
            block = np.minimum(file.read()[rows], below)
            n, place = np.nonzero((images >= rows.start) & (images < rows.stop))
            block[images[n, place] - start, n] = norms[n, place]
            file[rows] = block


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
    known = work.gather([f"known{top.layer}" for top in tops])
    for top in tops:
        top.known[:] = known[f"known{top.layer}"][0]  # of rank 0
    doubted = [top for top in tops if DOUBTED in top.known]
    for top in doubted:
        top.look_again(means[top.layer])
    if not doubted:
        work.skip(AGAIN)
    if not tops[0].exact:
        counts = [np.count_nonzero(top.known == CERTAIN) for top in tops]
        every = sum(len(top.known) for top in tops)
        again = f"; the other {every - sum(counts)} are gone over again" if doubted else ""
        print(
            f"one pass has found the largest effects of {sum(counts)} of {every} neurons for certain{again}"
        )
    return doubted


def settle_again(work, doubted):
    """Write the largest effects of layers whose doubted neurons were gone over again."""
    keys = work.gather([f"keys{top.layer}" for top in doubted]) if doubted else {}
    for top in doubted if is_rank_zero() else ():
        top.write([part.cpu() for part in (top.norms.origin, top.norms.shift)], keys[f"keys{top.layer}"])
