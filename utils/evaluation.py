"""The two descriptions of every neuron of a layer: the inputs, fits, files and report of
evaluate_descriptions.py.
"""

import csv
import io
import json
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from utils import grading
from utils.data.images import load_images, train_set_of
from utils.data.text_sets import load_texts
from utils.descriptions import describe, load_descriptions, load_support
from utils.model.clip import load_clip
from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.files import digest, one_line, read_array, save_atomic, save_json
from utils.runtime.layers import parse_layers
from utils.runtime.passes import Pass, pieces_of
from utils.runtime.records import Digest, agrees, complete, is_made, load_record
from utils.statistics import load_statistics

TRUTHS = 5000  # texts at most that a truth judges: their correlations are decomposed


class Inputs:
    """What the stages that look at descriptions read.

    args: their flags. inputs: `Results` of the folder that is read.

    Attributes: texts, vectors [T, D]; clip, layers; names, the fields of files' names; expected, what records
        must say;
    statistics {layer: Statistics}; images and held_out, the `Images` that texts are fitted to and graded on;
    share of the images that a neuron is said to act on.

    Raises UserError, with the command, for what is missing or does not belong together.
    """

    def __init__(self, args, inputs):
        if args.split == "train":
            raise UserError(
                "--split train is what texts are fitted to; give the split of the held-out images, such as val"
            )
        self.args, self.inputs = args, inputs
        load, dataset = (
            partial(load_clip, args.model, args.pretrained, args.device),
            train_set_of(args.dataset),
        )
        self.texts, vectors, _ = load_texts(inputs, args.text_descriptions, args.descriptions_dir, load)
        self.vectors = torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1)
        self.clip = load(precision=args.precision, image_only=True)
        self.layers = parse_layers(args.mlp_layer, self.clip.vit)
        self.names = {
            "dataset": dataset,
            "k": args.top_k_pca,
            "texts": args.text_descriptions,
            "components": args.components,
        }
        self.names |= {"alpha": args.transform_alpha, "normalise": args.normalise}
        self.expected = {"fingerprint": self.clip.fingerprint, "coefficient": args.coefficient}
        inputs.load(
            "texts", {"D": self.clip.vit.D}, self.expected, mmap=True, texts=args.text_descriptions
        )  # or raises
        self.statistics = load_statistics(
            inputs, dataset, self.layers, args.top_k_pca, self.clip, args.coefficient
        )
        self.images = self._training_images(dataset)
        self.held_out = load_images(
            args.dataset, args.data_path, args.split, self.clip.transform, subsample=args.subsample
        )
        self.share = min(1, args.top_k_pca / len(self.images))

    def _training_images(self, dataset):
        """The images that the components are of, from --train_data_path, --data_path, or, of ImageNet-R,
        where they lay.
        """
        args, records = self.args, {}
        for layer in self.layers:
            path = self.inputs.find("pca", layer=layer, **self.names)
            records[path] = load_record(path)
        where = (
            args.data_path
            if dataset == args.dataset
            else next(iter(records.values())).get("data_path", args.data_path)
        )
        where = args.train_data_path or where
        images = load_images(dataset, where, "train", self.clip.transform, subsample=args.train_subsample)
        data = images.record["data"]
        for path, record in records.items():
            if not agrees(record.get("data", data), data):
                fix = "give --train_data_path and --train_subsample as for compute_second_order_neuron_prs.py"
                raise UserError(
                    f"{path} is of other training images than the {len(images)} in {where}; {fix}"
                )
        if len(images) < 2:
            raise UserError(
                f"there is {len(images)} training image in {where}, and texts are fitted to several; {fix_stride(args)}"
            )
        return images

    @property
    def held_out_names(self):
        """The fields of the names of files about the held-out images."""
        return {**self.names, "dataset": self.args.dataset, "split": self.args.split}

    def load_descriptions(self, results, layer, kind="decomposition"):
        """What a layer's neurons write (decomposition), or what they fire on (fires_on), as
        `load_descriptions` gives it.
        """
        names, of = {"kind": kind, "layer": layer, **self.names}, self.statistics[layer]
        made_of = {"targets": digest(of.pcas)} if kind == "decomposition" else {"statistics": of.digest()}
        found = load_descriptions(
            results, self.clip.vit.sizes, {"fingerprint": self.clip.fingerprint, **made_of}, **names
        )
        for n, entries in enumerate(found):
            for i, _, text in entries:
                if not 0 <= i < len(self.texts) or self.texts[i] != text:
                    path, again = (
                        results.find(**names),
                        f"make it again with: {results.command(**names)} --overwrite",
                    )
                    raise UserError(
                        f"{path} describes neuron {n} by {text!r}, which is not text {i} of the pool; {again}"
                    )
        return [
            [(i, c, self.texts[i]) for i, c, _ in entries] for entries in found
        ]  # one string for each text, however often

    def sides(self, layer, results):
        """{side: descriptions} of a layer. results: `Results` of the folder that has what its neurons fire
        on.
        """
        loaded = {"writes": (self.inputs, "decomposition"), "fires_on": (results, "fires_on")}
        return {
            side: self.load_descriptions(results, layer, kind) for side, (results, kind) in loaded.items()
        }

    def explained(self, layer):
        """Share of the squared norm of every neuron's largest effects that lies along its component, [N]; NaN
        for components of the published code, which does not keep it."""
        names, sizes = {**self.names, "layer": layer}, self.clip.vit.sizes
        published = (
            not load_record(self.inputs.find("pca", **names))
            and not self.inputs.find("explained", **names).is_file()
        )
        return (
            np.full(sizes["N"], np.nan)
            if published
            else self.inputs.load("explained", sizes, self.expected, **names)
        )


def fix_stride(args):
    """What to do about too few training images."""
    return "give a smaller --train_subsample" if args.train_subsample else "add some"


class Evaluation(Inputs):
    """What evaluate_descriptions.py works with.

    results: `Results` of the folder that is written. args, inputs, and what is raised: as in `Inputs`.

    Attributes, besides those: truth, of both splits, or None; made_of, what results say.
    """

    def __init__(self, args, inputs, results):
        super().__init__(args, inputs)
        self.results = results
        self.names["judge"] = "_truth" if args.truth else ""
        for layer in self.layers:
            self.load_descriptions(inputs, layer)  # or raises, before the passes
        self.truth = load_truth(args.truth, (self.images, self.held_out), self.texts) if args.truth else None
        self.made_of = {
            **self.clip.record,
            **self.names,
            **self.held_out.record,
            "coefficient": args.coefficient,
        }

    def path(self, kind, **names):
        """Path of a result about the training images."""
        return self.results.path(kind, **self.names, **names)

    def held_out_path(self, kind, **names):
        """Path of a result about the held-out images."""
        return self.results.path(kind, **self.held_out_names, **names)

    def arrays(self, layers, images, described=()):
        """The arrays of a pass over images, {path: spec}, and their record: representations, every neuron's
        effects along its
        component, and, with described {layer: Described}, along the directions of the rows of the table."""
        count, vit, path = (
            len(images),
            self.clip.vit,
            self.held_out_path if images is self.held_out else self.path,
        )
        record = {**self.clip.record, **images.record, "coefficient": self.args.coefficient}
        arrays = {path("representations"): ((count, vit.D), "float32")}
        for layer in layers:
            made_of = {"statistics": self.statistics[layer].digest()}
            arrays[path("projections", layer=layer)] = ((count, vit.N), "float32", made_of)
            if layer in described:
                of = described[layer]
                arrays[path("along", layer=layer)] = (
                    (count, len(of.directions), vit.N),
                    "float32",
                    made_of | of.digests,
                )
        return arrays, record

    @property
    def judge(self):
        """The `grading.Judge` of texts on the training images."""
        if self.truth:
            return grading.Judge(self.truth[0], torch.eye(len(self.texts)))
        return grading.Judge(torch.from_numpy(np.load(self.path("representations"))), self.vectors)

    def fit(self, judge, layer):
        """Find what a layer's neurons fire on; returns the layer's `Described`."""
        args, effects = self.args, torch.from_numpy(np.load(self.path("projections", layer=layer)))
        # atoms and targets are left out: another number of threads rounds them differently
        record = {
            **self.clip.record,
            **self.images.record,
            "layer": layer,
            "text_descriptions": args.text_descriptions,
        }
        record |= {"coefficient": args.coefficient, "statistics": self.statistics[layer].digest()}
        record |= {"judge": digest(self.truth[0]) if self.truth else digest(self.vectors)}
        looked_at = [effects] if self.truth else [effects, np.load(self.path("representations"))]
        record["looked_at"] = Digest(digest(*looked_at), None)
        atoms, targets = (x.to(args.device) for x in (judge.atoms, judge.targets(effects)))
        of_texts = {**record, "components": args.components}
        describe(
            self.path("fires_on", layer=layer),
            self.texts,
            atoms,
            targets,
            record=of_texts,
            overwrite=args.overwrite,
        )
        more, arrays = (
            {"first": load_support(self.path("fires_on", layer=layer).with_suffix(".npz"))[:, 0]},
            [],
        )
        if not self.truth:
            inputs = (torch.from_numpy(np.load(self.path("representations"))), self.vectors, effects)
            path, inputs = self.path("labels", layer=layer), [x.to(args.device) for x in inputs]
            labels = soft_wpmi(path, *inputs, record=record, overwrite=args.overwrite)
            more |= {"component": self.statistics[layer].pcas, "labels": labels}
            arrays = [labels]
        sides = self.sides(layer, self.results)
        matrices = [grading.as_matrix(side, len(self.texts)) for side in sides.values()]
        directions = directions_of(judge, *matrices, **more)
        return Described(
            directions, {"descriptions": digest_of_sides(sides), "labels": digest(more["first"], *arrays)}
        )

    def grades(self, layer, described):
        """The array of a layer's grades, {path: spec}, and its record."""
        made_of = {"layer": layer, "share": self.share, "statistics": self.statistics[layer].digest()}
        made_of |= {"rows": list(described.directions), **described.digests}
        made_of |= {"truth": digest(*self.truth)} if self.truth else {}
        measures = grading.MEASURES[: 2 if self.truth else None]
        spec = ((self.clip.vit.N, len(described.directions), len(measures)), "float32")
        return {self.held_out_path("grades", layer=layer): spec}, self.made_of | made_of

    def to_grade(self, described):
        """Those of {layer: Described} whose grades are not there. Raises UserError when they are there, of
        other inputs.
        """
        found = {}
        for layer, of in described.items():
            arrays, record = self.grades(layer, of)
            if not all(
                is_made(path, complete(record, *spec), self.args.overwrite) for path, spec in arrays.items()
            ):
                found[layer] = of
        return found

    def of_neurons(self, layer, described, n):
        """What `grading.grades` takes of a slice of neurons."""
        effects = columns(self.held_out_path("projections", layer=layer), n)
        rows = torch.stack([directions[n] for directions in described.directions.values()])
        if self.truth:
            return {"features": self.truth[1], "directions": rows, "effects": effects, "share": self.share}
        features = torch.from_numpy(np.load(self.held_out_path("representations")))
        own = columns(self.held_out_path("along", layer=layer), n)
        mean = (rows * self.statistics[layer].mean[n].cpu()).sum(dim=-1)
        return {
            "features": features,
            "directions": rows,
            "effects": effects,
            "share": self.share,
            "own": own,
            "mean": mean,
        }

    def finish(self, layer, graded):
        """Write the .csv of a layer, and remove what was only needed for its grades. graded: its `Graded`."""
        path, along = (self.held_out_path(kind, layer=layer) for kind in ("grades", "along"))
        save_neurons(path.with_suffix(".csv"), graded, self.explained(layer), self.sides(layer, self.results))
        for file in (along, along.with_suffix(".meta.json")):
            file.unlink(missing_ok=True)


class Described(NamedTuple):
    """The directions of the rows of the table, {row: [N, F]}, and digests of the descriptions that they are
    made of.
    """

    directions: dict
    digests: dict


def digest_of_sides(sides):
    """Twelve hex digits of {side: descriptions as `load_descriptions` gives them}."""
    of_sides = (
        np.array([(n, i, c) for n, texts in enumerate(side) for i, c, _ in texts]) for side in sides.values()
    )
    return digest(*of_sides)


def columns(path, n):
    """The columns n of an array on disk, a tensor [..., n]; nothing else of it stays in memory."""
    return torch.from_numpy(read_array(path, mmap=True)[..., n].copy())


def load_truth(paths, images, texts):
    """What is true of the training and of the held-out images, two float32 tensors [images, texts].

    paths: of two .npy, of numbers or booleans, a row for each of the two `Images` and a column for each of
        the texts.

    Raises UserError for another shape, or numbers that are not finite.
    """
    found = []
    if len(texts) > TRUTHS:
        raise UserError(
            f"--truth judges at most {TRUTHS} texts, and the pool has {len(texts)}; give a smaller --text_descriptions"
        )
    for path, of in zip(paths, images, strict=True):
        try:
            array = read_array(path)
        except ValueError as error:
            raise UserError(f"--truth {path} cannot be read: {one_line(error)[:120]}") from error
        if (
            array.shape != (len(of), len(texts))
            or array.dtype.kind not in "biuf"
            or not np.isfinite(array).all()
        ):
            wanted = f"finite numbers, {len(of)} {of.split} images x {len(texts)} texts, are needed"
            raise UserError(
                f"--truth {path} holds {array.dtype} {' x '.join(map(str, array.shape))}; {wanted}"
            )
        found.append(torch.from_numpy(array.astype(np.float32)))
    return found


def soft_wpmi(path, representations, vectors, effects, record, overwrite=False):
    """`grading.SoftWPMI` labels of all neurons, int [N], in a file at `path`; all processes share the texts.
    record: what they are made from; other parameters as there."""
    N, pieces = effects.shape[1], pieces_of(len(vectors), grading.TEXTS)
    state = {
        "score": ((N,), "float64"),
        "place": ((N,), "int64"),
    }  # place: of the best text so far, counted from 1
    with Pass({path: ((N,), "int32")}, record, pieces, state=state, overwrite=overwrite) as work:
        label = None if work.finished else grading.SoftWPMI(representations, vectors, effects)
        for part, _ in work.over(description="soft-WPMI", unit="text"):
            score, place = (x.cpu().numpy() for x in label(part).max(dim=1))
            larger = (work.state["place"] == 0) | (score > work.state["score"])
            work.state["score"][larger], work.state["place"][larger] = (
                score[larger],
                place[larger] + part.start + 1,
            )
        if not work.finished:
            found = {name: np.array(parts) for name, parts in work.gather(["score", "place"]).items()}
            best = np.where(found["place"] > 0, found["score"], -np.inf).argmax(axis=0)
            if distributed.is_rank_zero():
                work[path][:] = found["place"][best, np.arange(N)] - 1
    return np.load(path)


def directions_of(judge, written, fired_on, first, component=None, labels=None):
    """The directions of the rows of the table, {row: [N, F]}, in the order of `grading.ROWS`.

    judge: `grading.Judge`. written, fired_on: descriptions, sparse [N, T] (fired_on: in standardised
        presences).
    first: the text of `fired_on` that was chosen first, [N].
    component, labels: [N, D], and a text for each neuron; None where a truth judges.
    """
    vectors, one = judge.vectors, grading.only
    found = {
        "writes": grading.written(written, vectors),
        "fires_on": judge.direction(fired_on),
        "one_written": grading.written(one(written, grading.strongest(written)), vectors),
        "one_fired_on": grading.written(one(fired_on, first), vectors),
    }
    if component is not None:
        found |= {"direction": component.cpu(), "wpmi": vectors[torch.from_numpy(labels).long()].float()}
    found |= {f"null_{row}": grading.of_another(found[row]) for row in ("writes", "fires_on")}
    return {row: found[row] for row in grading.ROWS if row in found}


class Graded:
    """The grades of a layer. values: [N, rows, measures]. rows: their names."""

    def __init__(self, values, rows):
        self.values, self.rows, self.measures = values, list(rows), list(grading.MEASURES[: values.shape[2]])

    def of(self, row, measure):
        """[N]."""
        return self.values[:, self.rows.index(row), self.measures.index(measure)]


def load_grades(results, sizes, expected, **names):
    """The `Graded` of a layer, as evaluate_descriptions.py left it. Parameters as in `Results.load`; raises
    as it does.
    """
    values, path = results.load("grades", sizes, expected, **names), results.find("grades", **names)
    rows = load_record(path).get("rows", [])
    if (
        len(rows) != values.shape[1]
        or set(rows) - set(grading.ROWS)
        or values.shape[2] not in (2, len(grading.MEASURES))
    ):
        command = results.command("grades", **names)
        raise UserError(
            f"{path} does not have the rows that its record says; make it again with: {command} --overwrite"
        )
    return Graded(values, rows)


def save_neurons(path, graded, explained, described):
    """Write the .csv of all neurons of a layer: their grades, and the texts of both sides with coefficients,
    as json.

    graded: `Graded`. explained: [N]. described: {side: descriptions as `load_descriptions` gives them}.
    """
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(
        [
            "neuron",
            "explained",
            *(f"{row} {measure}" for row in graded.rows for measure in graded.measures),
            *described,
        ]
    )
    for n, values in enumerate(graded.values):
        sides = [
            json.dumps([[text, round(c, 6)] for _, c, text in of[n]], ensure_ascii=False)
            for of in described.values()
        ]
        table.writerow([n, f"{explained[n]:.4f}", *(f"{x:.4f}" for x in values.ravel()), *sides])
    save_atomic(path, lambda out: out.write(file.getvalue().encode()))


def report(path, made_of, graded):
    """Write the summary of some layers, {layer: Graded}, at `path` (.json) and a .png beside; returns the
    lines of a table.
    """
    from utils.figures import plot_grades  # here, because matplotlib takes 20 MB

    tables = {str(layer): grading.summary(of.values, of.rows, of.measures) for layer, of in graded.items()}
    save_json(path, {**made_of, "layers": list(graded), "neurons": tables})
    plot_grades(graded, path.with_suffix(".png"))
    lines, width = [], max(map(len, grading.ROWS.values())) + 2
    for layer, table in tables.items():
        measures = next(iter(table.values()))
        lines.append(
            f"layer {layer}, means over neurons".ljust(width) + "".join(f"{name:>17}" for name in measures)
        )
        for row, measured in table.items():
            cells = (f"{value['mean']:.3f} ± {value['error']:.3f}" for value in measured.values())
            lines.append(grading.ROWS[row].ljust(width) + "".join(f"{cell:>17}" for cell in cells))
    return lines
