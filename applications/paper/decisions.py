"""Make the table of contributions to single decisions, which the paper does not have.

A decision is the class that the model takes a picture for, against the runner-up. Its margin is that of
`utils.contributions`, with v the difference of the two unit columns of the classifier. Letters as there; no
text describes anything here, so the table holds for any weights.
"""

import numpy as np
import torch
from torch.nn.functional import normalize

from applications.paper import measures
from applications.paper.page import number
from applications.paper.registry import Row, item, train, val
from utils.contributions import Contributions
from utils.indirect import Deletions
from utils.model.hooks import HookedViT
from utils.runtime.files import digest
from utils.runtime.passes import Pass

SOURCES = {
    "contribution": "by contribution",
    "second_order": "second order",
    "activation_norm": "activation times norm",
    "random": "random",
}
DELETED = (1, 2, 5, 10, 20)  # numbers of neurons that are taken away
KEPT = (20, 100, 400)  # numbers of neurons of which all others are taken away
PICTURES = 300  # held-out pictures on which neurons are taken away in the order of each source
COMPARED = 40  # of them on which drawn neurons are taken away one by one


def cost(paper):
    """Return how many images go through the tower; contributions are three of them."""
    pictures, compared = (min(count, val(paper)) for count in (PICTURES, COMPARED))
    sets = len(SOURCES) * (len(DELETED) + len(KEPT))
    drawn = paper.args.drawn_neurons * len(paper.all_layers)
    return train(paper) + pictures * (4 + sets) + compared * (4 + drawn)


def lacks_classes(paper):
    """Say that a decision needs two classes, where there is one."""
    classes = paper.args.data_path and paper.images(paper.args.split).images.class_names
    return "it needs images of two classes" if classes and len(classes) < 2 else ""


@item(
    "decisions",
    "Which neurons decide for a class over the runner-up? By contribution (not in the paper)",
    passes=cost,
    lacks=lacks_classes,
    seed="0, of the pictures; their and the layers' numbers, of neurons",
)
def decisions(paper):
    """Make the table of what taking the first neurons away does, and of contributions beside deletions."""
    study = Decisions(paper)
    return [*study.rows_of_sets(), *study.rows_of_layers()], []


class Decisions:
    """`Decisions` takes neurons away on held-out pictures, and sees what is left of the model's decisions.

    paper: `Paper`.
    """

    def __init__(self, paper):
        self.paper = paper
        self.vit = HookedViT(paper.clip.vit.visual)  # in float32: one neuron does less than bfloat16 rounds
        self.classifier, _ = paper.judged
        self.means = {layer: paper.averages[0][layer] for layer in paper.all_layers}
        self.total = len(self.means) * self.vit.N
        self.kept = [count for count in KEPT if count < self.total]

    def margin(self, image):
        """Return the class and the runner-up of an image [1, 3, side, side], and v [D]."""
        first, second = (self.vit(image) @ self.classifier)[0].topk(2).indices
        return first, second, self.classifier[:, first] - self.classifier[:, second]

    def record(self, split):
        """Return what results on some pictures are made from."""
        record = {key: value for key, value in self.paper.clip.record.items() if key != "precision"}
        record |= {**split.record, "layers": list(self.means), "classifier": digest(self.classifier)}
        return record | {"average": digest(*self.means.values())}

    # the first neurons of all layers

    @torch.inference_mode()
    def sets(self):
        """Take the first neurons of every source away; return two arrays [pictures, sources, numbers].

        The first is the share of the margin that is left, the second whether the prediction changes. The
        numbers of neurons are DELETED, then those of KEPT.
        """
        split = self.paper.images(self.paper.args.split, PICTURES)
        path = self.paper.array(split, f"{len(split)}_decisions")
        record = self.record(split) | {"deleted": DELETED, "kept": self.kept}
        arrays = {path: ((len(split), len(SOURCES), len(DELETED) + len(self.kept), 2), "float32")}
        with Pass(arrays, record, split, overwrite=self.paper.args.overwrite) as work:
            for rows, pixels in work.round(0, "neurons taken away"):
                seeds = range(rows.start, rows.stop)
                found = [self.without(*each) for each in zip(pixels.split(1), seeds, strict=True)]
                work[path][rows] = torch.stack(found)
        return np.moveaxis(np.load(path), -1, 0)

    def without(self, image, seed):
        """Return [sources, numbers, 2] of one image, as `sets` does. seed: of its random neurons."""
        first, second, v = self.margin(image)
        finder = Contributions(self.vit, self.means, v)
        values = [of[0].flatten() for of in finder.values(finder(image)).values()]
        random = np.random.default_rng([0, seed]).random(self.total, np.float32)
        values = torch.stack([*values, torch.from_numpy(random).to(v.device)])
        places = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0 is the largest
        taken = [places < count for count in DELETED] + [places >= count for count in self.kept]
        masks = torch.stack(taken, dim=1).view(-1, len(self.means), self.vit.N)
        without = finder.without(image.expand(len(masks), -1, -1, -1), masks)
        logits = normalize(torch.cat([self.vit(image), without]), dim=-1) @ self.classifier
        margins = logits[:, first] - logits[:, second]
        left = margins[1:] / margins[0].clamp_min(1e-9)
        changed = (logits[1:].argmax(dim=1) != first).float()
        return torch.stack([left, changed], dim=-1).view(len(SOURCES), -1, 2).cpu()

    def rows_of_sets(self):
        """Return a row for every number of neurons: taken away, and kept alone."""
        left, changed = self.sets()
        rows = []
        for j, count in enumerate(DELETED):
            medians = 100 * np.median(left[:, :, j], axis=0)
            shares = ", ".join(f"{100 * share:.1f}" for share in changed[:, :, j].mean(axis=0))
            which = f"first {count} neurons" if count > 1 else "first neuron"
            what = f"median margin left without the {which} of {self.total:,}"
            rows.append(row(what, medians, len(left), note=f"class changes for {shares} %"))
        for j, count in enumerate(self.kept, len(DELETED)):
            shares = 100 * (1 - changed[:, :, j].mean(axis=0))
            what = f"same class with only the first {count} neurons at work"
            rows.append(row(what, shares, len(left)))
        return rows

    # one neuron after the other

    @torch.inference_mode()
    def compared(self):
        """Take drawn neurons away one by one; return float32 [pictures, layers, 4, n].

        They are the values of the three sources that are not random, and what each deletion costs the margin.
        """
        paper = self.paper
        split = paper.images(paper.args.split, COMPARED)
        n = min(paper.args.drawn_neurons, self.vit.N)
        path = paper.array(split, f"{len(split)}_{n}_contributions")
        arrays = {path: ((len(split), len(self.means), len(SOURCES), n), "float32")}
        with Pass(arrays, self.record(split), split, overwrite=paper.args.overwrite) as work:
            for rows, pixels in work.round(0, "contributions"):
                seeds = range(rows.start, rows.stop)
                found = [self.one_by_one(*each) for each in zip(pixels.split(1), seeds, strict=True)]
                work[path][rows] = torch.stack(found)
        return np.load(path)

    def one_by_one(self, image, seed):
        """Return [layers, 4, n] of one image, as `compared` does. seed: of its neurons, with the layer."""
        _, _, v = self.margin(image)
        finder = Contributions(self.vit, self.means, v)
        values = torch.stack(list(finder.values(finder(image)).values()), dim=2)[0]  # [layers, 3, N]
        found = []
        for place, layer in enumerate(self.means):
            drawn = measures.drawn(self.vit.N, self.paper.args.drawn_neurons, [layer, seed])
            neurons = torch.from_numpy(drawn).to(v.device)
            deletions = Deletions(self.vit, layer, self.means[layer])
            lost = deletions(image, torch.zeros_like(neurons), neurons) @ v
            found.append(torch.cat([values[place][:, neurons], lost[None]]))
        return torch.stack(found).cpu()

    def rows_of_layers(self):
        """Return a row for every layer: correlations over its neurons with deletion, means over pictures."""
        found = self.compared()
        rows = []
        for layer, of_layer in zip(self.means, found.swapaxes(0, 1), strict=True):
            values = [[measures.agreement(value, of[-1]) for value in of[:-1]] for of in of_layer]
            what = f"layer {layer}: correlation of contributions with deletion"
            note = f"over {found.shape[-1]} neurons drawn for each"
            rows.append(row(what, np.mean(values, axis=0), len(found), unit="", note=note))
        return rows


def row(what, values, n, unit="%", note=""):
    """Return a row: a value by contribution, beside those of other sources, in the order of SOURCES."""
    names = list(SOURCES.values())[1 : len(values)]
    others = zip(names, values[1:], strict=True)
    beside = ", ".join(f"{name} {number(value, unit)}" for name, value in others)
    return Row(what, float(values[0]), unit=unit, beside=beside, n=n, note=note)
