"""The main direction of every neuron's second-order effects (section 4.1 of the paper)."""

import numpy as np
import torch
from tqdm import tqdm

from utils.artifacts import ColumnWriter, save_array
from utils.errors import UserError

IMAGES = 512  # images whose norms are computed at a time


def principal_directions(rows):
    """First right singular vector of every neuron's largest centred effects.

    Parameters
    rows: [n, k, D], centred effects of n neurons on their own k images; not centred again.

    Returns
    r [n, D], unit vectors, signed so that more than half of the rows project positively, on a tie so that the projections' sum is
    positive; and explained [n], the share of the rows' squared norm along r.
    """
    # The Gram matrix squares the condition number, which float64 carries; it is far smaller than the rows.
    wide = rows.to("cpu" if rows.device.type == "mps" else rows.device, torch.float64)  # MPS has no float64
    left = rows.shape[1] < rows.shape[2]
    gram = wide @ wide.mT if left else wide.mT @ wide
    eigenvalues, vectors = torch.linalg.eigh(gram)
    first = vectors[..., -1]  # [n, k] or [n, D]
    r = torch.einsum("nk,nkd->nd", first, wide) if left else first
    r = r / r.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    projections = torch.einsum("nkd,nd->nk", wide, r)
    balance = (projections > 0).sum(dim=1) * 2 - rows.shape[1]
    sign = torch.where(balance == 0, projections.sum(dim=1), balance.double()).sign()
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    explained = eigenvalues[:, -1] / eigenvalues.clamp_min(0).sum(dim=1).clamp_min(1e-300)
    return (r * sign[:, None]).float(), explained.float()


def write_statistics(effects, names, dataset, layer, k, memory):
    """The statistics of all neurons of one layer, a block of neurons at a time, written to the files of `names.statistics`.

    Parameters
    effects: what `open_effects` returns. names: Names of the output. k: images per neuron. memory: bytes to read at a time.

    Returns the share of the top images' squared norm along the first component, averaged over neurons.
    Raises UserError when there are fewer than k images.
    """
    if effects.images < k:
        raise UserError(
            f"{effects.path} has {effects.images} images, and --top_k_pca {k} needs {k}; lower --top_k_pca, or run "
            "compute_second_order_neuron_prs.py with a smaller --subsample"
        )
    N, D = effects.N, effects.D
    mean, pcas = np.empty((N, D), np.float32), np.empty((N, D), np.float32)
    norms, shares = np.empty((N, k), np.float32), np.empty(N, np.float32)
    meta = {key: value for key, value in effects.meta.items() if key not in ("shape", "dtype", "layers")}

    def path(part):
        return names.statistics(dataset, layer, part)

    with ColumnWriter(path("image_norms"), (effects.images, N), meta) as image_norms:
        for neurons in tqdm(effects.slices(memory, k), desc=f"layer {layer}", unit="block"):
            block = effects.read(neurons)
            all_norms = torch.cat([block.norms(slice(i, i + IMAGES)) for i in range(0, effects.images, IMAGES)])  # [images, n]
            rows = block.take(all_norms.topk(k, dim=0).indices.T)  # [n, k, D]
            r, explained = principal_directions(rows)
            mean[neurons], pcas[neurons], shares[neurons] = block.mean.cpu(), r.cpu(), explained.cpu()
            norms[neurons] = rows.norm(dim=-1).sort(dim=1).values.cpu()
            image_norms.write(neurons.start, all_norms.cpu().numpy())
    save_array(path("mean"), mean, meta)
    save_array(path(f"{k}_pca"), pcas, meta)
    save_array(path(f"{k}_norm"), norms, meta)
    save_array(path(f"{k}_explained"), shares, meta)
    return float(shares.mean())
