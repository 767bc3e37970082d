"""Grade what neurons write by taking them away in the running model. Beyond the paper.

A description of what a neuron writes claims what happens to the output when the neuron acts. So it is graded
by what happens without it: on the held-out images on which the neuron acts most, its activations are put at
their means over the training images, and the later blocks run as they are.
"""

from typing import NamedTuple

import numpy as np
import torch

from utils import controls, grading, omp
from utils.controls import Compared
from utils.first_order import fold_direct
from utils.indirect import Acting, Deletions, agreement
from utils.model.hooks import HookedViT
from utils.runtime import distributed
from utils.runtime.files import digest, read_array
from utils.runtime.passes import Pass, Totals, pieces_of


class Deleted(NamedTuple):
    """Deleted are the grades of what a layer's drawn neurons write, by taking them away."""

    neurons: np.ndarray  # the drawn ones, [n]
    compared: Compared | None  # of the texts that they write, by their number; None without controls
    rows: dict  # {row of grading.DELETED: grades [n]}


def grade_by_deletion(stage, units, described):
    """Take drawn neurons of a layer away on the held-out images, and return the `Deleted`; None without."""
    if not stage.deletes(units, stage.held_out):
        return None
    count = units.count
    drawn = np.random.default_rng(units.layer).choice(
        count, min(stage.args.drawn_neurons, count), replace=False
    )
    neurons = np.sort(drawn)
    lost = torch.from_numpy(delete(stage, units, neurons))
    compared = None
    if stage.args.controls:
        values = compare_deletions(stage, units, neurons, lost)
        lengths = controls.lengths_of(stage.args.components)
        compared = Compared("deletion", lengths, values[0], values[1:])
    rows = {}
    for row, vectors in directions_of_deletion(stage, units, described).items():
        rows[row] = agreement(lost, vectors[neurons], stage.vectors).numpy()
    return Deleted(neurons, compared, rows)


def delete(stage, units, neurons):
    """Return what taking each of some neurons away costs the representation, float32 [n, D].

    The mean is over the --delete held-out images on which the neuron acts most.
    """
    args = stage.args
    norms = read_array(stage.path("image_norms", stage.held_out, **units.names), mmap=True)[:, neurons]
    acting = Acting(norms, args.delete)
    path = stage.path("deletions", stage.held_out, **units.names)
    shape = (len(neurons), stage.clip.vit.D)
    record = {**stage.clip.record, **stage.held_out.record, "coefficient": args.coefficient}
    record |= {"layer": units.layer, "neurons": neurons.tolist(), "images": acting.count}
    record |= {"norms": digest(norms), "activations": digest(stage.activations[units.layer])}
    state = Totals(lost=(shape, "int64"))
    with Pass(
        {path: (shape, "float32")}, record, stage.held_out, state=state, overwrite=args.overwrite
    ) as work:
        vit = HookedViT(stage.clip.vit.visual)  # in float32: one neuron does less than half precision rounds
        deletions = work.prepare(Deletions, vit, units.layer, stage.activations[units.layer])
        for rows, pixels in work.round(0, f"deleting neurons of layer {units.layer}"):
            images, places = acting.of(rows)
            if len(images):
                chosen = torch.from_numpy(neurons)[places]
                change = deletions(
                    pixels, images.to(pixels.device), chosen.to(pixels.device), args.coefficient
                )
                fixed = (change.cpu().double() * 2.0**32).round().to(torch.int64).numpy()
                np.add.at(work.state["lost"], places.numpy(), fixed)
        if not work.finished:
            total = sum(work.gather(["lost"])["lost"])
            if distributed.is_rank_zero():
                work[path][:] = (total / (2.0**32 * acting.count)).astype(np.float32)
    return np.load(path)


def compare_deletions(stage, units, neurons, lost):
    """Return how well the texts that neurons write, and controls, say what deletions do, [1 + C, n, lengths].

    lost: as `delete` returns it.
    """
    args = stage.args
    lengths = controls.lengths_of(args.components)
    dictionaries = 1 + args.controls
    path = stage.path("by_deletion", stage.held_out, **units.names)
    record = {**stage.clip.record, **stage.names, **stage.held_out.record, "layer": units.layer}
    record |= {"statistics": units.statistics.digest(), "vectors": digest(stage.vectors)}
    record |= {"lengths": lengths, "seeds": list(range(args.controls)), "neurons": neurons.tolist()}
    record |= {"lost": digest(lost.numpy())}
    arrays = {path: ((dictionaries, len(neurons), len(lengths)), "float32")}
    pieces = pieces_of(len(neurons), omp.PURSUED, title=str(units), unit="neuron", rounds=dictionaries)
    targets = units.statistics.pcas[torch.from_numpy(neurons).to(units.statistics.pcas.device)]
    with Pass(arrays, record, pieces, overwrite=args.overwrite) as work:
        for number in range(0 if work.finished else dictionaries):
            vectors = controls.control_dictionary(stage.vectors, number - 1) if number else stage.vectors
            atoms = omp.make_atoms(100 * vectors, args.normalise).to(targets)
            for n in work.round(number, f"by deletion, {number} of {args.controls}"):
                support, _ = omp.orthogonal_matching_pursuit(atoms, targets[n], args.components)
                coefficients, _ = omp.nested_fits(support, atoms, targets[n], lengths)
                said = torch.einsum("lns,nsd->lnd", coefficients, atoms[support.clamp_min(0)].double())
                work[path][number, n] = agreement(lost[n], said.cpu(), stage.vectors).T
    return np.load(path)


def directions_of_deletion(stage, units, described):
    """Return what else may say what a deletion does, {row of grading.DELETED: [N, D]}."""
    found = {
        "component": units.statistics.pcas.cpu(),
        "fires_on": described.directions["fires_on"],
        "null": grading.of_another(units.statistics.pcas.cpu()),
    }
    if stage.clip.vit.pooling.has_first_order:
        direct = fold_direct(stage.clip.vit, units.layer)
        found["direct"] = (direct.values[0] @ direct.outputs[0]).cpu()
    return {row: found[row] for row in grading.DELETED if row in found}
