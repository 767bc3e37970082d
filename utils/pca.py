"""Find the component of every neuron: the first principal direction of its effects (section 4.1)."""

import torch

from utils.model.attention import double

ROUNDING = 1e-5  # of a mean effect: ten times the difference of equal images in batches of several sizes


def principal_directions(rows, by_sum=False):
    """Return the first right singular vector of every neuron's largest centred effects.

    rows: [n, k, D], centred effects of n neurons on their own k images; not centred again.
    by_sum: whether the sum of the projections says the sign, not most of them.

    Returns r [n, D] and explained [n].
    r: unit vectors, signed so that more than half of the rows project positively, or on a tie, and `by_sum`,
        so that the sum of the projections is positive.
    explained: share of the rows' squared norm along r.
    """
    # The Gram matrix squares the condition number, which float64 carries; it is far smaller than the rows.
    wide = double(rows)
    left = rows.shape[1] < rows.shape[2]
    gram = wide @ wide.mT if left else wide.mT @ wide
    eigenvalues, vectors = torch.linalg.eigh(gram)
    first = vectors[..., -1]  # [n, k] or [n, D]
    r = torch.einsum("nk,nkd->nd", first, wide) if left else first
    r = r / r.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    projections = torch.einsum("nkd,nd->nk", wide, r)
    balance = (projections > 0).sum(dim=1) * 2 - rows.shape[1]
    sign = torch.where((balance == 0) | by_sum, projections.sum(dim=1), balance.double()).sign()
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    explained = eigenvalues[:, -1] / eigenvalues.clamp_min(0).sum(dim=1).clamp_min(1e-300)
    return (r * sign[:, None]).float(), explained.float()


def statistics(effects, neurons, k, by_sum=False):
    """Return all statistics of a slice of neurons.

    effects: effects of a layer, opened by `utils.effects.open_effects`.
    neurons: slice.
    k: images per neuron.
    by_sum: as in `principal_directions`.

    Returns {kind: tensor}: mean [n, D], pca [n, D], norm [n, k] ascending, explained [n], and image_norms
    [images, n] unless they are stored already. A neuron whose effects do not vary has zeros for all but the
    mean.
    """
    mean, top, norms = effects.top(neurons, k)
    # Where effects are equal on all images (copies of one picture), the centred ones are rounding alone
    varies = top.abs().amax(dim=(1, 2)) > ROUNDING * mean.abs().amax(dim=1)  # [n]; squares could overflow
    top = torch.where(varies[:, None, None], top, 0)
    lines = effects.lines(neurons)
    if lines is None:
        r, explained = principal_directions(top, by_sum)
    else:
        r = torch.nn.functional.normalize(lines, dim=1)
        explained = torch.ones_like(r[:, 0])
    r = torch.where(varies[:, None], r, 0)
    norm = top.norm(dim=-1).sort(dim=1).values
    found = {"mean": mean, "pca": r, "norm": norm, "explained": explained}
    if norms is not None:
        found["image_norms"] = torch.where(varies, norms, 0)
    return found
