"""Make atoms of text vectors, and run batched orthogonal matching pursuit (OMP; section 4.3 of the paper)."""

import hashlib

import torch

from utils.model.attention import double
from utils.runtime.errors import UserError

PURSUED = 256  # targets that are pursued at a time
COMPARED = 2048  # atoms that are compared with them at a time: their correlations stay in the cache
LITTLE = 0.1  # share of an atom's squared norm that is left over; below, rounding would tilt it


def rebuilt_from(support, atoms, targets, block=PURSUED):
    """Return every target as the best combination of its chosen atoms, [N, D], by least squares in float64.

    OMP is nested: when it is asked for m atoms, it chooses the first m columns of a longer support.

    support: int64 [N, m], -1 for none.
    atoms: [texts, D].
    targets: [N, D].
    block: targets at a time.
    """
    atoms = torch.as_tensor(atoms).cpu().double()
    targets = torch.as_tensor(targets).cpu()
    support = torch.as_tensor(support)
    rebuilt = []
    for rows in torch.arange(len(support)).split(block):
        chosen = support[rows]
        A = (atoms[chosen.clamp_min(0)] * (chosen >= 0)[..., None]).mT  # [n, D, m]
        y = targets[rows].double()[..., None]  # [n, D, 1]
        x = torch.linalg.lstsq(A, y, driver="gelsd").solution
        rebuilt.append((A @ x)[..., 0])
    return torch.cat(rebuilt).float()


def nested_fits(support, atoms, targets, lengths):
    """Fit every target again by the first m atoms that OMP chose for it, by least squares in float64.

    OMP is nested, so one pursuit gives the descriptions of all lengths m.

    support: int64 [n, S], in the order of choice, -1 (at the end) for none; the atoms are independent.
    atoms: [texts, D].
    targets: [n, D], on the same device.
    lengths: list of m.

    Returns coefficients [lengths, n, S], 0 from the m-th atom on, and shares [lengths, n] of the squared norm
    of the target that the atoms rebuild.
    """
    chosen = support >= 0
    A = double(atoms[support.clamp_min(0)] * chosen[..., None])  # [n, S, D]
    y = double(targets)[..., None]
    G = A @ A.mT + torch.diag_embed((~chosen).to(A))  # an identity where there is no atom
    L = torch.linalg.cholesky(G)
    z = torch.linalg.solve_triangular(L, A @ y, upper=False)  # the targets along an orthonormal basis
    m = torch.as_tensor(lengths, device=z.device)
    kept = z * (torch.arange(z.shape[1], device=z.device)[:, None] < m)  # [n, S, lengths]
    coefficients = torch.linalg.solve_triangular(L.mT, kept, upper=True).permute(2, 0, 1)
    shares = kept.square().sum(dim=1) / y.square().sum(dim=1).clamp_min(1e-300)
    return coefficients, shares.T


def make_atoms(text_vectors, normalise="axis"):
    """Return the dictionary of the decomposition: text vectors, centred, and scaled to norm 100, [texts, D].

    text_vectors: [texts, D].
    normalise: 'axis' divides by the norm over the texts, so every embedding dimension has norm 100 (the
    published behaviour); 'text' gives every atom norm 100.
    """
    centred = text_vectors - text_vectors.mean(dim=0)
    norms = centred.norm(dim=0) if normalise == "axis" else centred.norm(dim=1, keepdim=True)
    return 100 * centred / norms.clamp_min(torch.finfo(centred.dtype).tiny)


def check_components(n_texts, texts):
    """Raise UserError unless `n_texts` (--components) can be chosen from so many texts."""
    if not 1 <= n_texts <= texts:
        raise UserError(f"--components {n_texts} cannot be chosen from {texts} texts; give 1 to {texts}")


def orthogonal_matching_pursuit(atoms, targets, n_nonzero, block=PURSUED):
    """Run OMP on many targets at once; scikit-learn's SparseCoder("omp") does it one by one.

    Each step takes the atom with the largest |<residual, atom>| (not divided by the atom's norm) and fits all
    chosen atoms again by least squares. Correlations of a block of targets are matrix products; the fit is a
    QR decomposition that grows by a column (Gram-Schmidt, twice where little is left), solved once at the
    end. No texts x texts matrix is formed.

    atoms: float32 [texts, D].
    targets: float32 [n, D], on the same device.
    n_nonzero: atoms per target.
    block: targets at a time.

    Returns support [n, n_nonzero], int64 indices in the order of choice, -1 where a target stopped early, and
    coefficients [n, n_nonzero], 0 there. A target stops as in scikit-learn: when the largest squared
    correlation is below the dtype's eps, when an atom would be taken twice, or when it depends on those
    already taken. Of equal atoms the earliest is taken.

    Raises UserError when more atoms are asked for than there are.
    """
    check_components(n_nonzero, len(atoms))
    first, distinct = _first_of_equal(atoms)
    steps = min(n_nonzero, len(distinct))
    pursued = [_pursue(distinct, part, steps, n_nonzero) for part in targets.split(block)]
    support, coefficients = (torch.cat(parts) for parts in zip(*pursued, strict=True))
    return torch.where(support >= 0, first[support], support), coefficients


def _first_of_equal(atoms):
    """Return the index of the earliest of equal atoms, and those atoms: else rounding would choose."""
    seen = {}
    for index, row in enumerate(atoms.cpu().numpy()):
        seen.setdefault(hashlib.sha1(row.tobytes()).digest(), index)
    first = torch.tensor(list(seen.values()), device=atoms.device)
    return first, atoms if len(first) == len(atoms) else atoms[first]


def _best(residual, atoms):
    """Return the atom of largest |<residual, atom>| [b], the earliest of equal ones, and this number [b]."""
    found = [(residual @ some.T).abs_().max(dim=1) for some in atoms.split(COMPARED)]
    largest = torch.stack([part.values for part in found])  # [parts, b]
    part = largest.argmax(dim=0, keepdim=True)
    within = torch.stack([part.indices for part in found]).gather(0, part)[0]
    return within + part[0] * COMPARED, largest.gather(0, part)[0]


def _pursue(atoms, targets, steps, width):
    """Run OMP on one block: targets [b, D] -> support [b, width], coefficients [b, width]."""
    b, D = targets.shape
    eps = torch.finfo(atoms.dtype).eps
    support = torch.full((b, width), -1, dtype=torch.int64, device=atoms.device)
    Q = atoms.new_zeros(b, width, D)  # orthonormal rows spanning the chosen atoms
    R = torch.eye(width, dtype=atoms.dtype, device=atoms.device).repeat(b, 1, 1)  # chosen atoms = R^T Q
    z = atoms.new_zeros(b, width)  # targets in the basis Q
    residual = targets.clone()
    running = torch.ones(b, dtype=torch.bool, device=atoms.device)
    for step in range(min(steps, width)):
        best, correlation = _best(residual, atoms)
        running &= correlation.square() >= eps
        running &= (support[:, :step] != best[:, None]).all(dim=1)
        atom = atoms[best]  # [b, D]
        known = Q[:, :step]  # [b, step, D]
        whole = atom.square().sum(dim=1)
        along = torch.bmm(known, atom[..., None])
        atom = atom - torch.bmm(known.mT, along)[..., 0]
        pivot = atom.square().sum(dim=1)
        if (pivot < LITTLE * whole).any():  # a second pass keeps Q orthogonal
            again = torch.bmm(known, atom[..., None])
            along += again
            atom = atom - torch.bmm(known.mT, again)[..., 0]
            pivot = atom.square().sum(dim=1)
        running &= pivot > eps
        if not running.any():
            break
        length = torch.where(running, pivot.sqrt(), 1)
        q = torch.where(running[:, None], atom / length[:, None], 0)
        support[:, step] = torch.where(running, best, -1)
        Q[:, step] = q
        R[:, :step, step] = torch.where(running[:, None], along[..., 0], 0)
        R[:, step, step] = length
        z[:, step] = (q * residual).sum(dim=1)
        residual -= z[:, step, None] * q
    coefficients = torch.linalg.solve_triangular(R, z[..., None], upper=True)[..., 0]
    return support, coefficients
