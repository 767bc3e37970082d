"""Compute the norms of centred effects, |phi_n(I) - mean_n|, without forming the effects.

Letters as in `utils.prs`.
"""

import torch
from torch import einsum

NEURONS = 256  # neurons that are worked on together where intermediate results would be large
STRIP = 24  # columns of a Gram matrix that are multiplied together


def blocks_of(neurons):
    """Return the slices of a number of neurons that are worked on together."""
    return [slice(start, min(start + NEURONS, neurons)) for start in range(0, neurons, NEURONS)]


class CentredNorms:
    """A `CentredNorms` computes |phi_n(I) - mean_n| for all neurons of a layer.

    An effect is a combination of the K directions B_n, plus kappa. Its norm is a quadratic form in the
    coefficients, with the Gram matrix G_n = B_n B_n^T. The coefficients are centred first, so that nothing
    cancels when effects vary little about a large mean.

    Parameters
    directions: `Directions` of the layer.
    mean: mean effects, as an array [N, D] or as their factors (C [K, N], kappa [D]).

    Attributes, with mean_n = origin[:, n] B_n + shift + rest[n]:
    origin: [K, N], the coefficients of the mean. For an array they are found by least squares.
    shift: [D], kappa of the mean; 0 for an array.
    rest: [N, D], the part of the mean that the directions cannot express, orthogonal to them; None for
        factors.
    """

    def __init__(self, directions, mean):
        self.directions = directions
        K, N, _ = directions.values.shape
        new = directions.values.new_empty
        factors = isinstance(mean, tuple)
        if factors:
            self.origin, self.shift = mean
            self.rest = None
        else:
            self.origin = new(K, N)
            self.shift = 0
            self.rest = new(mean.shape)
        # G is symmetric: strips of its columns are kept from the diagonal down, doubled below the diagonal
        self.strips = [new(N, K - first, min(STRIP, K - first)) for first in range(0, K, STRIP)]
        for n in blocks_of(N):
            B_n = directions.B(n)  # [n, K, D]
            if not factors:
                x = least_squares(B_n, mean[n])  # [n, K]
                self.origin[:, n] = x.T
                self.rest[n] = mean[n] - einsum("nk,nko->no", x, B_n)
            G = B_n @ B_n.mT
            for first, strip in zip(range(0, K, STRIP), self.strips, strict=True):
                strip[n] = G[:, first:, first : first + STRIP]
                strip[n, STRIP:] *= 2

    def __call__(self, phi):
        """Return the norms [B, N] of a `SecondOrder`."""
        squares = self.squares(phi.C)
        kappa = phi.kappa - self.shift
        heads = einsum("bo,keo->kbe", kappa, self.directions.outputs)
        for n in blocks_of(squares.shape[1]) if kappa.any() else ():  # units have no share of constants
            x = phi.C[:, :, n] - self.origin[:, n]  # phi - mean = x B_n + kappa - rest, and B_n rest = 0
            B_kappa = torch.bmm(heads, self.directions.values[:, n].mT).transpose(0, 1)  # [B, K, n]
            squares[:, n] += 2 * B_kappa.mul_(x).sum(dim=1)
        return (squares + self.beside(kappa)).clamp_(0).sqrt_()

    def beside(self, kappa):
        """Return |kappa - rest|^2, [B, N]; [B, 1] where there is no rest."""
        rest = 0 if self.rest is None else self.rest.square().sum(dim=-1) - 2 * kappa @ self.rest.T
        return kappa.square().sum(dim=-1, keepdim=True) + rest

    def squares(self, C):
        """Return |x B_n|^2, [B, N]: squared norms without kappa, which is small, and half of the work."""
        squares = torch.empty_like(C[:, 0])
        for n in blocks_of(squares.shape[1]):
            x = C.mT[:, n] - self.origin[:, n].T.contiguous()  # [B, n, K]
            squares[:, n] = self.along(x.transpose(0, 1).contiguous(), n).T
        return squares

    def along(self, x, n=slice(None)):
        """Return |x B_n|^2 = x^T G_n x of some neurons: x [n, B, K] -> [n, B]."""
        products = torch.zeros_like(x[:, :, :STRIP])
        for first, strip in zip(range(0, x.shape[2], STRIP), self.strips, strict=True):
            below, columns = x[:, :, first:], strip.shape[2]
            products[:, :, :columns].addcmul_(torch.bmm(below, strip[n]), below[:, :, :columns])
        return products.sum(dim=-1)


def least_squares(B_n, mean):
    """Return the combination of directions nearest to the mean: B_n [n, K, D], mean [n, D] -> [n, K]."""
    wide = B_n.to("cpu" if B_n.device.type == "mps" else B_n.device, torch.float64)  # MPS has no float64
    G = wide @ wide.mT
    ridge = 1e-9 * G.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30)  # directions may be dependent
    ridge = ridge[:, None, None] * torch.eye(G.shape[1], dtype=G.dtype, device=G.device)
    B_mean = einsum("nko,no->nk", wide, mean.to(wide))
    return torch.cholesky_solve(B_mean[..., None], torch.linalg.cholesky(G + ridge))[..., 0].to(B_n)


def groups_of_layers(vit, layers, memory):
    """Divide layers into lists that share one pass over the images. A list has at least one layer.

    memory: bytes that the folded weights [K, N, e] and the Gram matrices (half of [N, K, K]) may take.
    """
    groups = []
    left = 0
    for layer in layers:
        K = vit.K(layer)
        needed = 4 * vit.N * K * (vit.sizes["e"] + (K + STRIP) // 2)  # strips end beyond the diagonal
        if not groups or needed > left:
            groups.append([])
            left = memory
        groups[-1].append(layer)
        left -= needed
    return groups
