"""Grade descriptions: how well the texts that a neuron writes or fires on predict its held-out effects.

A description is a sparse signed sum of texts. It predicts a neuron's effect on an image by the same sum of
the texts' presences there. A judge says how present a text is: the model, by the similarity of image and text
(`features` are representations and `vectors` text vectors), or known truth (`features` [images, texts] and
`vectors` the identity). So a description is one direction of the features, and directions are graded here.

Beyond the paper. Grades are those that notice missing and extra labels, over all held-out images: Pearson
correlation and average precision (NeuronEval, arXiv 2506.05774). Letters as in `utils.prs`; T texts, F
features, R rows of the table.
"""

import copy

import numpy as np
import scipy.sparse
import torch

from utils.norms import blocks_of

ROWS = {
    "writes": "texts that it writes",
    "fires_on": "texts that it fires on",
    "direction": "its component itself",
    "one_written": "the strongest text that it writes",
    "one_fired_on": "the first text that it fires on",
    "wpmi": "its label by soft-WPMI (CLIP-Dissect)",
    "null_writes": "another neuron's texts that it writes",
    "null_fires_on": "another neuron's texts that it fires on",
    "rotated_writes": "rotated units: texts that they write",
    "rotated_fires_on": "rotated units: texts that they fire on",
    "rotated_wpmi": "rotated units: their labels by soft-WPMI",
}
DELETED = {  # what may say what happens without a neuron, besides the texts that it writes
    "component": "its component",
    "fires_on": "texts that it fires on",
    "total": "its deletion on training images (total order)",
    "direct": "its direct effect (the logit lens)",
    "null": "another neuron's component",
}
ROTATED = ("writes", "fires_on", "wpmi")  # rows that rotated units have beside the neurons'
SIDES = {  # rows of each side, its own texts first
    "writes": ("writes", "one_written", "direction", "null_writes"),
    "fires_on": ("fires_on", "one_fired_on", "wpmi", "null_fires_on"),
}
# where a truth judges, the first two
MEASURES = ("pearson", "auprc", "pearson_without", "auprc_without", "drop")
JUDGED_BY = {"fires_on": "pearson", "writes": "share"}  # the measure that decides what is over noise
COMPARED = {
    "fires_on": "texts that they fire on",
    "writes": "texts that they write",
    "total": "texts that they write, total order",
    "wpmi": "soft-WPMI labels",
}
MEASURE_NAMES = {
    "pearson": "correlation with the effect on held-out images",
    "auprc": "average precision on held-out images",
    "share": "share of the component that they rebuild",
    "deletion": "correlation over texts with their deletion",
}
WPMI = {"scale": 10.0, "images": 100, "first": 0.998, "last": 0.97, "least": 1e-7}  # of CLIP-Dissect
TEXTS_AT_ONCE = 1024  # that are worked on together
NEURONS_AT_ONCE = 128
FACTORS = 10  # that are multiplied before a logarithm is taken; float32 holds their product


class Judge:
    """A Judge says how present every text is on training images, so that texts can be fitted to effects.

    features: [images, F].
    vectors: [T, F].

    Presences are features @ vectors.T, [images, T]; standardised over the images they are the atoms. All lie
    in the space of the features, so a basis of that space has atoms and targets of F numbers at most in place
    of one for every image.

    Attributes: atoms [T, rank] of unit norm (0 for a text that is equally present everywhere), spread [T].
    """

    def __init__(self, features, vectors):
        wide = features.double()
        self.centred = wide - wide.mean(dim=0)
        squares, V = torch.linalg.eigh(self.centred.T @ self.centred)
        kept = squares > 1e-10 * squares[-1]
        self.singular = squares[kept].sqrt()
        self.V = V[:, kept]
        self._take(vectors)

    def _take(self, vectors):
        """Make the atoms of a dictionary."""
        self.vectors = vectors
        atoms = []
        spreads = []
        for some in vectors.split(TEXTS_AT_ONCE):  # float64 for few at a time
            part = some.double() @ self.V * self.singular  # [texts, rank]
            spreads.append(part.norm(dim=1))
            atoms.append((part / spreads[-1].clamp_min(1e-300)[:, None]).float())
        self.spread = torch.cat(spreads)
        told_apart = self.spread > 1e-6 * self.spread.max()
        self.atoms = torch.where(told_apart[:, None], torch.cat(atoms), 0)

    def of(self, vectors):
        """Return the judge, by the same images, of another dictionary [T, F]."""
        other = copy.copy(self)
        other._take(vectors)
        return other

    def targets(self, effects):
        """Return effects [images, N], centred and of unit norm, projected on the basis: [N, rank]."""
        found = []
        for some in effects.split(256, dim=1):  # float64 for few at a time
            wide = some.double() - some.double().mean(dim=0)
            along = (self.V.T @ (self.centred.T @ wide)) / self.singular[:, None]
            found.append((along / wide.norm(dim=0).clamp_min(1e-300)).T.float())
        return torch.cat(found)

    def direction(self, description):
        """Return the directions [N, F] of sparse sums [N, T] of standardised presences."""
        scaled = scipy.sparse.csr_matrix(description) @ scipy.sparse.diags(
            1 / np.maximum(self.spread.cpu().numpy(), 1e-300)
        )
        return written(scaled, self.vectors)

    def directions(self, support, coefficients):
        """Return the directions [lengths, n, F] of descriptions by number of texts.

        support: [n, S], -1 for none. coefficients: of standardised presences, [lengths, n, S].
        """
        chosen = support.clamp_min(0)
        scaled = coefficients * (support >= 0) / self.spread[chosen].clamp_min(1e-300)
        return torch.einsum("lns,nsf->lnf", scaled, self.vectors[chosen].double()).float()


def written(description, vectors):
    """Return the directions [N, F] of what neurons write: sparse sums of texts.

    description: sparse [N, T], as the decomposition has it. vectors: [T, F].
    """
    return torch.from_numpy(scipy.sparse.csr_matrix(description) @ vectors.double().cpu().numpy()).float()


def as_matrix(descriptions, texts):
    """Return descriptions, as `load_descriptions` returns them, as a csr matrix [N, texts]."""
    counts = np.array([len(entries) for entries in descriptions], np.int64)
    rows = np.repeat(np.arange(len(descriptions)), counts)
    columns = np.fromiter((i for entries in descriptions for i, _, _ in entries), np.int64, counts.sum())
    values = np.fromiter((c for entries in descriptions for _, c, _ in entries), np.float64, counts.sum())
    return scipy.sparse.csr_matrix((values, (rows, columns)), shape=(len(descriptions), texts))


def only(description, chosen):
    """Return a description [N, T] with one text alone, with the sign of its coefficient.

    chosen: the text of every neuron, [N]; -1 for none.
    """
    matrix = scipy.sparse.csr_matrix(description)
    n = np.arange(matrix.shape[0])
    texts = np.maximum(chosen, 0)
    signs = np.sign(np.asarray(matrix[n, texts]).ravel()) * (np.asarray(chosen) >= 0)
    return scipy.sparse.csr_matrix((signs, (n, texts)), shape=matrix.shape)


def strongest(description):
    """Return the text of the largest |coefficient| of every neuron, int [N]."""
    return np.asarray(abs(scipy.sparse.csr_matrix(description)).argmax(axis=1)).ravel()


def of_another(directions):
    """Return the null [N, F]: the directions of another neuron in place of a neuron's own."""
    return directions.roll(1, dims=0)


class SoftWPMI:
    """SoftWPMI is CLIP-Dissect's label of every neuron (arXiv 2204.10965).

    Of all texts, it is the one that tells most about the images on which the neuron acts most. For the
    neuron's 100 images x of largest effect, ranked, log P(t) = sum_x log(1 + p_x (P(t|x) - 1)) with P(t|x)
    the softmax over texts of 10 cos(x, t), and p_x falling from 0.998 to 0.97. The label has the largest
    log P(t) - log mean_n P(t).

    representations: [images, D].
    vectors: [T, D].
    effects: [images, N].
    """

    def __init__(self, representations, vectors, effects):
        self.images = torch.nn.functional.normalize(representations, dim=1)
        self.vectors = torch.nn.functional.normalize(vectors, dim=1)
        count = min(WPMI["images"], len(effects))
        self.top = effects.topk(count, dim=0).indices.T  # [N, count]
        rank = torch.arange(count, device=effects.device) / count
        self.weight = WPMI["first"] - rank * (WPMI["first"] - WPMI["last"])
        parts = [self._scores(part).logsumexp(dim=1) for part in self.vectors.split(TEXTS_AT_ONCE)]
        self.total = torch.stack(parts).logsumexp(dim=0)[:, None]  # [images, 1]

    def _scores(self, vectors):
        return WPMI["scale"] * self.images @ vectors.T

    def __call__(self, texts):
        """Return the scores of a slice of the texts, [N, texts]."""
        probability = (self._scores(self.vectors[texts]) - self.total).exp()  # [images, texts]
        found = []
        for top in self.top.split(NEURONS_AT_ONCE):
            total = torch.zeros(len(top), probability.shape[1], device=top.device)
            product = torch.ones_like(total)
            for i, w in enumerate(self.weight.tolist()):
                each = probability[top[:, i]].mul_(w).add_(1 - w + WPMI["least"])  # 0.002 at least
                product.mul_(each)
                if (i + 1) % FACTORS == 0:
                    total += product.log_()
                    product.fill_(1)
            found.append(total + product.log_())
        found = torch.cat(found)
        return found - (found.logsumexp(dim=0) - np.log(len(found)))


class Along:
    """Along computes <phi_n, v> for R directions v of every neuron: its own part of a prediction about it.

    directions: `Directions` of the layer.
    vectors: {row: [N, D]}.
    """

    def __init__(self, directions, vectors):
        self.vectors = [rows.to(directions.values) for rows in vectors.values()]
        heads = []
        for n in blocks_of(len(self.vectors[0])):
            v = torch.stack([rows[n] for rows in self.vectors])
            heads.append(torch.einsum("nko,rno->nkr", directions.B(n), v))
        self.along = torch.cat(heads)  # [N, K, R]

    def __call__(self, phi):
        """Return [B, R, N] for a `SecondOrder`."""
        own = torch.bmm(phi.C.permute(2, 0, 1), self.along).permute(1, 2, 0)
        return own + torch.stack([phi.kappa @ rows.T for rows in self.vectors], dim=1)


def correlation(predicted, effects):
    """Return the Pearson correlation of every column, [..., n]; 0 where one is constant.

    predicted, effects: [..., images, n].
    """
    predicted, effects = (x.double() - x.double().mean(dim=-2, keepdim=True) for x in (predicted, effects))
    norms = predicted.norm(dim=-2) * effects.norm(dim=-2)
    return torch.where(norms > 0, (predicted * effects).sum(dim=-2) / norms.clamp_min(1e-300), 0)


def average_precision(predicted, positive):
    """Return the average precision of every column, [..., n], as scikit-learn's `average_precision_score`.

    Equal predictions count together.

    predicted: [..., images, n].
    positive: bool [images, n], one of a column at least.
    """
    predicted = predicted.transpose(-1, -2).contiguous()  # [..., n, images]
    hit = positive.T.expand(predicted.shape)
    ascending = _sorted(predicted)
    hits = _sorted(torch.where(hit, predicted, -torch.inf))  # those that count come last
    count = hit.shape[-1]
    above = count - torch.searchsorted(ascending, hits)  # predictions that are as large as this hit or larger
    hits_above = count - torch.searchsorted(hits, hits)
    total = hit.sum(dim=-1, keepdim=True)
    counts = torch.arange(count, device=hit.device) >= count - total
    return (hits_above.double() / above * counts).sum(dim=-1) / total[..., 0]


def _sorted(values):
    """Sort along the last axis. numpy is quicker on the CPU: it does without the order."""
    if values.device.type != "cpu":
        return values.sort(dim=-1).values
    return torch.from_numpy(np.sort(values.contiguous().numpy(), axis=-1))


def positives(images, share):
    """Return how many images a share of them is, one at least."""
    return max(1, min(images, round(share * images)))


def most_active(effects, share):
    """Return the `share` of the images with a neuron's largest effects: bool [images, n]."""
    count = positives(len(effects), share)
    return torch.zeros_like(effects, dtype=torch.bool).scatter_(0, effects.topk(count, dim=0).indices, True)


def grades(features, directions, effects, share, own=None, mean=None):
    """Grade some neurons' directions on held-out images.

    features: [images, F].
    directions: [R, n, F].
    effects: [images, n], along the components.
    share: fraction of images taken as positives (largest effects).
    own: <phi_n, v> of every image, [images, R, n]; None where a truth judges: the neuron has no part in it.
    mean: <phi_n, v> of the mean effect, [R, n]; None as above.

    Returns {measure: [R, n]}: pearson and auprc. With `own` also pearson_without and auprc_without, of
    predictions without the neuron's own effect, and drop: how far the similarity with the description, in
    units of `features`, falls on the positives when the neuron's effect is put at its mean.
    """
    predicted = torch.einsum("if,rnf->rin", features, directions)
    positive = most_active(effects, share)
    found = {"pearson": correlation(predicted, effects), "auprc": average_precision(predicted, positive)}
    if own is not None:
        own = own.transpose(0, 1)  # [R, images, n]
        found["pearson_without"] = correlation(predicted - own, effects)
        found["auprc_without"] = average_precision(predicted - own, positive)
        lost = ((own - mean[:, None]) * positive).sum(dim=1) / positive.sum(dim=0)
        found["drop"] = lost / directions.norm(dim=-1).clamp_min(1e-30)
    return {name: found[name].float() for name in MEASURES if name in found}


def summary(graded, rows, measures):
    """Return {row: {measure: {"mean", "error", "median", "above_null"}}} over neurons.

    "above_null" is the share of neurons that score above the 95th percentile of the null of their side.

    graded: [N, rows, measures].
    rows, measures: their names.
    """
    found = {}
    for r, row in enumerate(rows):
        found[row] = {}
        null = rows.index(next(f"null_{side}" for side, its_rows in SIDES.items() if row in its_rows))
        for m, measure in enumerate(measures):
            values = graded[:, r, m].astype(np.float64)
            bound = np.quantile(graded[:, null, m], 0.95)
            found[row][measure] = {
                "mean": float(values.mean()),
                "error": float(values.std(ddof=1) / np.sqrt(len(values))),
                "median": float(np.median(values)),
                "above_null": float((values > bound).mean()),
            }
    return found


def blind_measures(table):
    """Return {row: measures} that do not tell neurons from rotated units: their means are within two errors.

    table: as `summary` returns it, with rows of rotated units.
    """
    found = {}
    for row in ROTATED:
        own, rotated = table.get(row), table.get(f"rotated_{row}")
        if own is None or rotated is None:
            continue
        for measure in own:
            error = np.hypot(own[measure]["error"], rotated[measure]["error"])
            if own[measure]["mean"] <= rotated[measure]["mean"] + 2 * error:
                found.setdefault(row, []).append(measure)
    return found
