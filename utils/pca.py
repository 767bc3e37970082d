"""The main direction of every neuron's second-order effects (section 4.1 of the paper)."""

from contextlib import ExitStack

import numpy as np
import torch
from tqdm import tqdm

from utils import distributed
from utils.artifacts import copy_array
from utils.effects import open_effects
from utils.errors import UserError
from utils.rows import RowWriter


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


def write_statistics(names, results, dataset, layers, k, memory, device="cpu", overwrite=False):
    """The statistics of all neurons, a block of neurons at a time, written to the files of `results.statistics`.

    Parameters
    names: Names of the input, whose effects of the train split are read. k: images per neuron. memory: bytes to read at a time.
    overwrite: drop what a broken run left.

    Returns {layer: share of the top images' squared norm along the first component, averaged over neurons}.
    Raises UserError when there are fewer than k images.
    """
    with ExitStack() as stack:  # all layers' files appear together, so that a broken run goes on at its layer
        writers = {}
        for layer in layers:
            effects = open_effects(names, dataset, "train", layer, device)
            if (effects.kept or effects.images) < k:
                raise UserError(
                    f"{effects.path} has {effects.kept or effects.images} images for a neuron, and --top_k_pca {k} needs {k}; "
                    "lower it, or run compute_second_order_neuron_prs.py with a smaller --subsample (for --keep top, a larger "
                    "--top_k_pca)"
                )
            N, D = effects.N, effects.D
            shapes = {"mean": (N, D), f"{k}_pca": (N, D), f"{k}_norm": (N, k), f"{k}_explained": (N,)}
            paths = {part: results.statistics(dataset, layer, part) for part in (*shapes, "image_norms")}
            arrays = {paths[part]: (shape, "float32") for part, shape in shapes.items()}
            if effects.image_norms is None:
                arrays[paths["image_norms"]] = ((effects.images, N), "float32")
            elif distributed.first():
                copy_array(effects.image_norms, paths["image_norms"])
            meta = {key: value for key, value in effects.meta.items() if key not in ("shape", "dtype", "layers")}
            pieces = [[neurons.start, neurons.stop] for neurons in effects.slices(memory, k)]
            writer = RowWriter(arrays, meta, pieces, overwrite, columns=[paths["image_norms"]])
            writers[layer] = stack.enter_context(writer), paths
        for layer, (writer, paths) in writers.items():
            effects = open_effects(names, dataset, "train", layer, device)
            bar = tqdm(writer.todo, desc=f"layer {layer}", unit="block", disable=not distributed.first())
            for number, (start, stop) in bar:
                block = effects.read(slice(start, stop))
                rows, norms = block.top(k)  # [n, k, D], [images, n]
                r, explained = principal_directions(rows)
                top = rows.norm(dim=-1).sort(dim=1).values
                found = {"mean": block.mean, f"{k}_pca": r, f"{k}_norm": top, f"{k}_explained": explained}
                if norms is not None:
                    found["image_norms"] = norms
                writer.write(number, start, {paths[part]: values.cpu().numpy() for part, values in found.items()})
    return {layer: float(np.load(paths[f"{k}_explained"]).mean()) for layer, (_, paths) in writers.items()}
