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
from utils.data.splits import Split
from utils.effects import about_norms
from utils.first_order import fold_direct
from utils.indirect import Acting, Deletions, agreement
from utils.model.hooks import HookedViT
from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.files import digest, read_array
from utils.runtime.passes import Pass, Totals, pieces_of
from utils.runtime.records import load_record
from utils.runtime.sums import fixed, mean_of
from utils.statistics import load_training_images

DRAWN = 512  # neurons of a layer that are taken away on held-out images
ORDERS = {"second": "component", "total": "deletion"}  # what the texts describe, by --order


class Deleted(NamedTuple):
    """Deleted are the grades of what a layer's drawn neurons write, by taking them away."""

    neurons: np.ndarray  # the drawn ones, [n]
    compared: dict  # {order: `Compared` of the texts that they write}; {} without controls
    rows: dict  # {row of grading.DELETED: grades [n]}


class Plan(NamedTuple):
    """A Plan says which neurons of a layer are taken away, and where."""

    layer: int
    neurons: np.ndarray  # [n]
    norms: np.ndarray  # centred norms of their effects on all images, [images, n]
    mean: torch.Tensor  # the layer's mean activations over the training images, [T, N]
    images: int  # for each neuron, those on which it acts most


def grade_by_deletion(stage, units, described):
    """Take drawn neurons of a layer away on the held-out images, and return the `Deleted`; None without."""
    if not stage.deletes(units, stage.held_out):
        return None
    graded = np.flatnonzero(stage.graded(units))
    count = min(stage.args.drawn_neurons, len(graded))
    drawn = np.random.default_rng(units.layer).choice(graded, count, replace=False)
    neurons = np.sort(drawn)
    norms = read_array(stage.path("image_norms", stage.held_out, **units.names), mmap=True)[:, neurons]
    plan = Plan(units.layer, neurons, norms, stage.activations[units.layer], stage.args.delete)
    path = stage.path("deletions", stage.held_out, **units.names)
    lost = torch.from_numpy(delete(path, stage.clip, stage.held_out, plan, stage.args))
    targets = {"second": units.statistics.pcas.cpu()}
    if (total := load_total_order(stage, units)) is not None:
        targets["total"] = total
    compared = {}
    for order, of in targets.items() if stage.args.controls else ():
        values = compare_deletions(stage, units, plan, lost, (order, of[neurons]))
        compared[order] = Compared("deletion", controls.lengths_of(stage.args.components), *values)
    directions = directions_of_deletion(stage, units, described, targets)
    order = list(targets)[-1]  # a run without the total order has left a file of its own
    path = stage.path("deletion_rows", stage.held_out, order=order, **units.names)
    record = record_of_grades(stage, units, plan, lost) | described.digests | {"rows": list(directions)}
    record["targets"] = digest(*targets.values())
    arrays = {path: ((len(neurons), len(directions)), "float32")}
    pieces = pieces_of(len(neurons), len(neurons), title=f"{units}, by deletion", unit="neuron")
    with Pass(arrays, record, pieces, overwrite=stage.args.overwrite) as work:
        for _ in work:
            said = torch.stack([of[neurons] for of in directions.values()])
            work[path][:] = agreement(lost, said, stage.vectors).T
    return Deleted(neurons, compared, dict(zip(directions, np.load(path).T, strict=True)))


def record_of_grades(stage, units, plan, lost):
    """Return the record that all grades by deletion share. Parameters: as in `compare_deletions`."""
    record = {**stage.clip.record, **stage.names, **stage.held_out.record, "layer": units.layer}
    record |= {"statistics": units.statistics.digest(), "vectors": digest(stage.vectors)}
    return record | {"neurons": plan.neurons.tolist(), "lost": digest(lost.numpy())}


def load_deleted(results, expected=(), **names):
    """Read the `Deleted` of a layer; None where no neuron was taken away.

    Parameters and errors: as in `Results.load`.
    """
    paths = {order: results.find("deletion_rows", **{**names, "order": order}) for order in ORDERS}
    orders = [order for order, path in paths.items() if path.is_file()]
    if not orders:
        return None
    path = paths[orders[-1]]
    again = f"make it again with: {results.command('deletion_rows', **names)} --overwrite"
    values = results.load("deletion_rows", expected=expected, **{**names, "order": orders[-1]})
    record = load_record(path)
    neurons, rows = (record.get(key, []) for key in ("neurons", "rows"))
    if values.shape != (len(neurons), len(rows)) or set(rows) - set(grading.DELETED):
        raise UserError(f"{path} does not have the neurons and rows that its record says; {again}")
    compared = {}
    for order in orders:
        named = {**names, "order": order}
        if results.find("by_deletion", **named).is_file():
            made_of = {**dict(expected), "neurons": neurons, "lost": record["lost"]}
            graded = results.load("by_deletion", expected=made_of, **named)
            lengths = load_record(results.find("by_deletion", **named)).get("lengths", [])
            if graded.shape[1:] != (len(neurons), len(lengths)):
                raise UserError(f"{path} and the grades by number of texts are of other neurons; {again}")
            compared[order] = Compared("deletion", lengths, graded[0], graded[1:])
    return Deleted(np.array(neurons), compared, dict(zip(rows, values.T, strict=True)))


def delete(path, clip, split, plan, args):
    """Return what taking each of some neurons away costs the representation, float32 [n, D].

    The mean is over the images of a split on which the neuron acts most. The array is kept at `path`.

    clip: `Clip`.
    split: `Split`.
    plan: `Plan`.
    args: the flags coefficient and overwrite.
    """
    acting = Acting(plan.norms, plan.images)
    neurons = torch.from_numpy(plan.neurons)
    shape = (len(neurons), clip.vit.D)
    record = {**clip.record, **clip.units_record, **split.record, "coefficient": args.coefficient}
    record |= {"layer": plan.layer, "neurons": plan.neurons.tolist(), "images": acting.count}
    record |= {"norms": digest(plan.norms), "activations": digest(plan.mean)}
    state = Totals(lost=(shape, "int64"))
    with Pass({path: (shape, "float32")}, record, split, state=state, overwrite=args.overwrite) as work:
        vit = HookedViT(clip.vit.visual)  # in float32: one neuron does less than half precision rounds
        of = None if clip.units is None else clip.units.units[plan.layer]
        deletions = work.prepare(Deletions, vit, plan.layer, plan.mean, of)
        for rows, pixels in work.round(0, f"deleting neurons of layer {plan.layer}"):
            images, places = acting.of(rows)
            if len(images):
                pairs = (of.to(pixels.device) for of in (images, neurons[places]))
                change = deletions(pixels, *pairs, args.coefficient)
                np.add.at(work.state["lost"], places.numpy(), fixed(change[None]))
        if not work.finished:
            gathered = work.gather(["lost"])
            if distributed.is_rank_zero():
                work[path][:] = mean_of(gathered["lost"], acting.count)
    return np.load(path)


def delete_on_training_images(args, inputs, results, layers, names):
    """Take all neurons of some layers away where they act most among the training images.

    args: flags of compute_sparse_decomposition.py.
    inputs, results: `Results` that are read and written, of a loaded model.
    layers: MLP layers.
    names: of the components' files.

    Returns {layer: changes [N, D]}: the total order, in place of the components of second order.
    """
    clip = inputs.loaded
    images = load_training_images(args, inputs, layers, names, clip.transform)
    split = Split(images, args.device, args.num_workers, args.batch_size)
    expected = {"data": images.record["data"]}
    found = {}
    for layer in layers:
        named = {"dataset": names["dataset"], "layer": layer}
        norms = inputs.load("image_norms", {"images": len(images)}, expected, mmap=True, **named)
        path = inputs.find("image_norms", **named)
        if args.delete > (load_record(path).get("norms_exact") or len(images)):
            print(
                f"note: the images on which neurons of layer {layer} act most go by norms {about_norms(path)}"
            )
        mean = torch.from_numpy(inputs.load("activations", expected=expected, **named)).to(clip.device)
        plan = Plan(layer, np.arange(mean.shape[1]), np.asarray(norms), mean, args.delete)
        path = results.path("total_order", **named)
        found[layer] = delete(path, clip, split, plan, args)
    return found


def load_total_order(stage, units):
    """Read what taking units away costs on the training images, of unit norm [N, D]; None without."""
    names = {**stage.names, "layer": units.layer}
    if not stage.inputs.find("total_order", **names).is_file():
        return None
    lost = stage.inputs.load("total_order", expected={"data": stage.train.record["data"]}, **names)
    return torch.nn.functional.normalize(torch.from_numpy(lost), dim=1)


def compare_deletions(stage, units, plan, lost, described):
    """Say how well the texts that neurons write, and controls, tell what deletions do.

    plan: `Plan`.
    lost: as `delete` returns it.
    described: (order, what the texts describe [n, D]).

    Returns [n, lengths] of the texts and [C, n, lengths] of the controls.
    """
    args = stage.args
    order, targets = described
    neurons = len(plan.neurons)
    lengths = controls.lengths_of(args.components)
    dictionaries = 1 + args.controls
    path = stage.path("by_deletion", stage.held_out, order=order, **units.names)
    record = record_of_grades(stage, units, plan, lost)
    record |= {"lengths": lengths, "seeds": list(range(args.controls)), "targets": digest(targets)}
    arrays = {path: ((dictionaries, neurons, len(lengths)), "float32")}
    pieces = pieces_of(neurons, omp.PURSUED, title=str(units), unit="neuron", rounds=dictionaries)
    targets = targets.to(args.device)
    with Pass(arrays, record, pieces, overwrite=args.overwrite) as work:
        for number in range(0 if work.finished else dictionaries):
            vectors = controls.control_dictionary(stage.vectors, number - 1) if number else stage.vectors
            atoms = omp.make_atoms(100 * vectors, args.normalise).to(targets)
            for n in work.round(number, f"by deletion, {order} order, {number} of {args.controls}"):
                support, _ = omp.orthogonal_matching_pursuit(atoms, targets[n], args.components)
                coefficients, _ = omp.nested_fits(support, atoms, targets[n], lengths)
                said = torch.einsum("lns,nsd->lnd", coefficients, atoms[support.clamp_min(0)].double())
                work[path][number, n] = agreement(lost[n], said.cpu(), stage.vectors).T
    values = np.load(path)
    return values[0], values[1:]


def directions_of_deletion(stage, units, described, targets):
    """Return what else may say what a deletion does, {row of grading.DELETED: [N, D]}.

    targets: {order: what its texts describe [N, D]}.
    """
    found = {
        "component": targets["second"],
        "fires_on": described.directions["fires_on"],
        "null": grading.of_another(targets["second"]),
    }
    if "total" in targets:
        found["total"] = targets["total"]
    if stage.clip.vit.pooling.has_first_order:
        if stage.clip.units is None:
            direct = fold_direct(stage.clip.vit, units.layer)
            found["direct"] = (direct.values[0] @ direct.outputs[0]).cpu()
        else:
            found["direct"] = stage.clip.units.units[units.layer].direct(stage.clip.vit).cpu()
    return {row: found[row] for row in grading.DELETED if row in found}
