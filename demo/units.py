"""Look at other units than neurons on the embedded world: its dictionaries, their controls, and pairs.

    python -m demo.units [--output_dir demo/output]

Runs the stages with --units on layer 4 of the symbols that `run_demo.py` has drawn (it draws them where they
are missing), and writes DIR/units.json and DIR/units.md, one table. Rows: the residual stream's and the MLP's
dictionary (`train_sae.py`), one of the residual stream that is trained with a decoder which stays random (DIR
gets it), random directions without any training, neurons, pairs of neurons and heads, and a random rotation
of the neurons. What is true of a picture is read from the world's files.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from demo import layout
from demo.figures import markdown_table
from demo.launch import load_everything, run
from demo.measure import Tree
from demo.run_demo import readable, stage
from demo.truth import true_of
from utils import grading
from utils.controls import Rotation
from utils.data.images import load_images
from utils.data.splits import Split
from utils.model.clip import load_clip
from utils.norms import CentredNorms
from utils.prs import second_order
from utils.runtime.files import save_json
from utils.runtime.records import load_record
from utils.units import ACTS, fold_units, look_at

RESID, MLP = (str(layout.HERE / f"symbols-sae-{name}.safetensors") for name in ("resid", "mlp"))
LAYER = layout.GRADED  # that these are of
FROZEN = "symbols-sae-resid-frozen.safetensors"  # in the folder of the demo
CONTROLS = 2  # control dictionaries
KEPT = 4  # units whose effects a picture keeps
TEXTS = "words"


def sets_of(out):
    """Return {what is looked at: its --units}. out: folder of the demo."""
    return {
        "residual dictionary": RESID,
        "MLP dictionary": MLP,
        "random decoder, trained encoder": str(out / FROZEN),
        "random directions": f"random:{RESID}",
        "neurons": None,
        "pairs": "pairs",
    }


def commands(out, units):
    """Yield (result, command) of the stages for one set of units."""
    results = layout.results_of(out, "symbols").looking_at(units)
    path = partial(results.path, layer=LAYER, **layout.NAMES)
    where = ["--output_dir", out / "symbols"]
    which = ["--mlp_layer", LAYER, *([] if units is None else ["--units", units])]
    k = ["--top_k_pca", layout.NAMES["k"]]
    images = ["--dataset", "folder", "--data_path", out / "world/symbols", "--batch_size", 64]
    train = [*images, "--split", "train", *which, *k, *where]
    yield path("values"), stage("compute_second_order_neuron_prs.py", *train)
    yield path("pca"), stage("compute_pcas.py", "--dataset", "folder", *which, *k, *where)
    texts = ["--text_descriptions", TEXTS, "--components", layout.COMPONENTS]
    described = [*images, *which, *k, *texts, *where]
    yield path("decomposition", texts=TEXTS), stage("compute_sparse_decomposition.py", *described)
    graded = path("graded", texts=TEXTS, split="val")
    few = ["--controls", CONTROLS, "--num_workers", 0]
    yield graded, stage("evaluate_descriptions.py", *described, *few)


def prepare(out):
    """Run what is missing of the world, the texts and the stages."""
    path = partial(layout.results_of(out, "symbols").path, **layout.NAMES)
    world = out / "world"
    where = ["--output_dir", out / "symbols"]
    tree = ["--dataset", "folder", "--data_path", world / "symbols"]
    names = ["--class_names", world / "symbols/class_names.txt"]
    texts = ["--text_descriptions", world / f"{TEXTS}.txt"]
    todo = [
        (world / "segmentation_two.mat", ["-m", "demo.make_world", "--output_dir", world]),
        (path("classifier"), stage("compute_classifier_projection.py", *tree, *names, *where)),
        (path("texts", texts=TEXTS), stage("compute_text_set_projection.py", *texts, *where)),
        (out / FROZEN, ["-m", "demo.train_sae", "--random_decoder", "--output_dir", out]),
    ]
    for units in sets_of(out).values():
        todo += commands(out, units)
    for result, words in todo:
        if not result.exists():
            words = [str(word) for word in words]
            print(f"\n$ {readable('python', *words)}", flush=True)
            if code := run(words):
                raise SystemExit(code)


class World:
    """A World is what the measures look at: held-out symbols, their truth, and the classifier.

    out: folder of the demo.
    """

    def __init__(self, out):
        self.out = out
        self.tree = Tree(out, "symbols", TEXTS)
        self.clip = load_clip(layout.MODEL, layout.WEIGHTS, "cpu", image_only=True)
        images = load_images("folder", out / "world/symbols", "val", self.clip.transform)
        self.split = Split(images, batch_size=64)
        self.labels = images.labels
        self.classifier = torch.from_numpy(self.tree.load("classifier"))
        self.true = true_of(self.tree.texts, self.tree.truth("val"))
        train = self.tree.load("representations", split="train")
        self.judge = grading.Judge(torch.from_numpy(train), torch.from_numpy(self.tree.text_vectors))

    def nearest(self):
        """Return the share of pictures of which the nearest text is true."""
        rows = normalize(torch.from_numpy(self.tree.load("representations", split="val")), dim=1)
        text = (rows @ torch.from_numpy(self.tree.text_vectors).T).argmax(dim=1).numpy()
        return float(self.true[text, np.arange(len(rows))].mean())


class Measured:
    """Measured is one set of units on a world.

    world: `World`.
    units: as --units has it. rotated: whether rows of a random rotation of them are measured in their place.
    """

    def __init__(self, world, units, rotated=False):
        self.world = world
        self.given = units
        self.rotated = rotated
        self.results = layout.results_of(world.out, "symbols").looking_at(units)
        self.names = {**layout.NAMES, "layer": LAYER, "texts": TEXTS}
        if rotated:
            self.names["units"] = "rotated"
        self.kept = np.ones(len(self.load("pca")), bool)
        acts = self.results.path("acts", **self.names)
        if acts.is_file() and not rotated:
            self.kept = np.load(acts) >= ACTS
        along = np.square(self.load("projections").astype(np.float64)).sum(axis=0)
        self.energy = along * self.kept  # of the units' effects along their components

    def load(self, kind, split="train"):
        """Return an array of the units."""
        return np.load(self.results.path(kind, split=split, **self.names))

    def true_share(self, texts):
        """Return of how many units the text [N] is true of the held-out picture on which they act most.

        Returns the share of the units that are graded, and their share of the energy.
        """
        picture = self.load("projections", "val").argmax(axis=0)
        return self.means(self.world.true[texts, picture])

    def means(self, values, units=None):
        """Return the mean of values over graded units, and that weighted by energy. units: which, for all."""
        units = np.arange(len(self.kept)) if units is None else units
        kept = units[self.kept[units]]
        values = np.asarray(values, np.float64)[self.kept[units]]
        return [float(values.mean()), float(np.average(values, weights=self.energy[kept]))]

    def fired_on(self):
        """Return the text whose presence goes up most with each unit's effect, [N]."""
        targets = self.world.judge.targets(torch.from_numpy(self.load("projections")))
        blocks = [(some @ self.world.judge.atoms.T).argmax(dim=1) for some in targets.split(512)]
        return torch.cat(blocks).numpy()

    def written(self):
        """Return the text that lies nearest to each unit's component, [N]."""
        atoms = torch.from_numpy(self.world.tree.text_vectors)
        atoms = normalize(atoms - atoms.mean(dim=0), dim=1)
        return (torch.from_numpy(self.load("pca")) @ atoms.T).argmax(dim=1).numpy()

    def over_noise(self):
        """Return {what: number} of what 1 text that units fire on has over noise; {} without grades."""
        path = self.results.path("graded", split="val", **self.names)
        if self.rotated or not path.is_file():
            return {}
        columns = json.loads(path.read_text())["over_noise"][str(LAYER)]["fires_on"]["pearson"]
        return {"skill": columns["skill"][0], "better": columns["better"][0]}

    def deleted(self):
        """Return {what: means} of how well it says what deleting a unit does; {} where none was deleted."""
        path = self.results.path("deletion_rows", split="val", **self.names)
        if self.rotated or not path.is_file():
            return {}
        record = load_record(path)
        units = np.array(record["neurons"])
        rows = dict(zip(record["rows"], np.load(path).T, strict=True))
        texts = np.load(self.results.path("by_deletion", split="val", **self.names))[..., -1]
        found = {"by deletion": texts[0], "control": texts[1:].mean(axis=0)}
        found |= {"logit lens": rows["direct"], "null": rows["null"]}
        return {what: self.means(values, units) for what, values in found.items()}

    @torch.inference_mode()
    def accuracies(self):
        """Return accuracies in per cent: with all effects, none, and the KEPT largest of every picture."""
        world = self.world
        clip = world.clip
        look_at(clip, self.given, LAYER)
        [directions] = fold_units(clip, [LAYER])
        mean = torch.from_numpy(self.load("mean"))
        rotation = Rotation(directions, len(mean)) if self.rotated else None
        directions = rotation.directions if rotation else directions
        norms = CentredNorms(directions, mean)
        hits = np.zeros(3)
        for rows, pixels in world.split.walk():
            representation, [phi] = second_order(clip.vit, pixels, fold_units(clip, [LAYER]))
            rep = 100 * normalize(representation, dim=-1)
            phi = rotation(phi) if rotation else phi
            base = rep - phi.sum() + mean.sum(dim=0)
            top = norms(phi).topk(KEPT, dim=1).indices
            kept = []
            for b, n in enumerate(top):
                effects = torch.einsum("kn,nko->no", phi.C[b][:, n], directions.B(n)) + phi.kappa[b]
                kept.append((effects - mean[n]).sum(dim=0))
            shown = torch.stack([rep, base, base + torch.stack(kept)])
            found = (shown @ world.classifier).argmax(dim=-1).numpy()
            hits += (found == world.labels[rows]).sum(axis=1)
        return (100 * hits / len(world.labels)).tolist()

    def row(self):
        """Return the row of the table, {column: number}."""
        full, none, kept = self.accuracies()
        found = {"units": int(self.kept.sum()), "fires on": self.true_share(self.fired_on())}
        found |= {"writes": self.true_share(self.written()), "4 kept": kept, "all": full, "none": none}
        return found | self.over_noise() | self.deleted()


COLUMNS = {  # what of a row: its title, how a number is written, and what it is multiplied with
    "units": ("units that act", "{:.0f}", 1),
    "fires on": ("the text that it fires on is true of the picture on which it acts most, %", "{:.0f}", 100),
    "writes": ("so is the text that it writes, %", "{:.0f}", 100),
    "4 kept": (f"accuracy with the {KEPT} largest effects of every picture, %", "{:.1f}", 1),
    "skill": ("skill of 1 text that it fires on", "{:.2f}", 1),
    "better": ("units for which it is better than noise, %", "{:.0f}", 100),
    "by deletion": ("its 8 written texts predict its deletion", "{:.2f}", 1),
    "control": ("8 random directions", "{:.2f}", 1),
    "logit lens": ("logit lens", "{:.2f}", 1),
    "null": ("another unit's", "{:.2f}", 1),
}


def report(table, world):
    """Return the table in Markdown. table: {what: row}."""
    rows = []
    for name, row in table.items():
        cells = [name]
        for column, (_, form, factor) in COLUMNS.items():
            numbers = np.atleast_1d(row[column]) if column in row else []
            cells.append("; ".join(form.format(factor * number) for number in numbers))
        rows.append(cells)
    first = next(iter(table.values()))
    neurons = table["neurons"]
    chance = 100 * float(world.true.mean())
    lines = [*markdown_table(["layer 4", *(title for title, *_ in COLUMNS.values())], rows), ""]
    lines.append(
        "Two numbers: plain means over units, and means weighted by the energy of their effects. "
        f"Nearest text of a picture: true of {100 * world.nearest():.0f} %; a random text: {chance:.1f} %. "
        f"Accuracy with all effects {first['all']:.1f} %, without those of the residual units "
        f"{first['none']:.1f} %, of the neurons {neurons['none']:.1f} %."
    )
    return "\n".join(lines) + "\n"


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--output_dir", type=Path, default=layout.HERE / "output")
    out = parser.parse_args().output_dir.resolve()
    load_everything()
    prepare(out)
    world = World(out)
    table = {name: Measured(world, units).row() for name, units in sets_of(out).items()}
    table["rotated neurons"] = Measured(world, None, rotated=True).row()
    save_json(out / "units.json", table)
    (out / "units.md").write_text(report(table, world))
    print("\n" + (out / "units.md").read_text())


if __name__ == "__main__":
    main()
