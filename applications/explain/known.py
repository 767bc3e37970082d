"""Say what is known of a neuron: the texts that it writes and fires on, and what they have over noise."""

import functools

from utils.descriptions import load_descriptions, load_support
from utils.evaluation import digest_of_sides, load_compared
from utils.reports import judged_by
from utils.units import ACTS

SHOWN = 4  # texts of a side at most
KINDS = {"writes": "decomposition", "fires_on": "fires_on"}
SIDES = {"writes": "writes", "fires_on": "fires on"}


class Known:
    """`Known` reads the descriptions and grades of neurons where they are there, a layer at a time.

    results: `Results` of a loaded model.
    names: fields of the names of files of descriptions, besides the layer.
    split: on which the descriptions were graded.
    """

    def __init__(self, results, names, split):
        self.results = results
        self.names = names
        self.split = split
        self._of_layer = functools.cache(self._read)

    def _read(self, layer):
        """Return {side: (descriptions, path of their .npz)}, and {(side, measure): Compared}, of a layer.

        And of which units the grades are, bool [N]; None for all. Grades are those of the very descriptions,
        or an error is raised.
        """
        names = {**self.names, "layer": layer}
        found = {}
        for side, kind in KINDS.items():
            path = self.results.find(kind, **names)
            if path.is_file():
                found[side] = load_descriptions(self.results, kind=kind, **names), path.with_suffix(".npz")
        compared = {}
        kept = None
        graded = {**names, "split": self.split}
        if len(found) == len(KINDS) and self.results.find("controls", **graded).is_file():
            made_of = {"descriptions": digest_of_sides({side: of for side, (of, _) in found.items()})}
            compared = load_compared(self.results, made_of, **graded)
            if self.results.find("acts", **names).is_file():
                kept = self.results.load("acts", **names) >= ACTS
                compared = {side: of.only(kept) for side, of in compared.items()}
        for side, (descriptions, path) in found.items():
            of = judged_by(side, compared)
            if of and of.justified() is not None:
                load_support(path, descriptions)  # or raises
        return found, compared, kept

    def of(self, layer, neuron):
        """Return {side: {"texts", "grade", "control", "verdict"}} of a neuron; {} where nothing is known.

        A description that is no better than noise has no texts; one without grades claims nothing.
        """
        found, compared, kept = self._of_layer(layer)
        rare = kept is not None and not kept[neuron]  # acts on few images
        at = neuron if kept is None else int(kept[:neuron].sum())
        sides = {}
        for side, (descriptions, path) in found.items():
            entries = [(i, text, round(c, 6)) for i, c, text in descriptions[neuron]]
            judge = None if rare else judged_by(side, compared)
            sides[side] = graded(neuron, entries, path, judge, at)
        return sides


def graded(neuron, entries, path, compared, at):
    """Return what a side says of a neuron, as `Known.of` does.

    entries: [(text index, text, coefficient)], by falling |coefficient|.
    path: of the descriptions' .npz.
    compared: the `Compared` that judges the side, or None.
    at: the neuron's place in it.
    """
    if compared is None:
        texts = [[text, c] for _, text, c in entries[:SHOWN]]
        return {"texts": texts, "grade": None, "control": None, "verdict": "not graded"}
    place = compared.justified()
    shown = -1 if place is None else place
    grade = round(float(compared.texts[at, shown]), 4)
    control = round(float(compared.controls[:, at, shown].mean()), 4)
    found = {"texts": [], "grade": grade, "control": control, "verdict": "no better than noise"}
    if place is None or not compared.better()[at, place]:
        return found
    by_index = {i: [text, c] for i, text, c in entries}
    chosen = load_support(path)[neuron, : min(compared.lengths[place], SHOWN)].tolist()
    texts = [by_index[i] for i in chosen if i in by_index]
    return {**found, "texts": texts, "verdict": "better than noise"}


def naming(shown, one="neuron"):
    """Say whether texts name some neurons: {"neurons", "described", "graded", "named", "verdict"}.

    A neuron is named by a text that is better than noise.

    shown: neurons of an answer, each with what is "known" of it. one: the word for one of them.
    """
    graded = [[of for of in item["known"].values() if of["grade"] is not None] for item in shown]
    found = {"neurons": len(shown), "described": sum(bool(item["known"]) for item in shown)}
    found["graded"] = sum(bool(of) for of in graded)
    found["named"] = sum(any(side["texts"] for side in of) for of in graded)
    return {**found, "verdict": verdict_of(**found, many=f"{one}s")}


def verdict_of(neurons, described, graded, named, many):
    """Return what `naming` has counted as a sentence."""
    if not described:
        return f"No text names these {many}: there are no descriptions of them."
    if not graded:
        return f"Whether texts name these {many} is not known: their descriptions are not graded."
    of = f"the descriptions of {graded} are graded"
    if not named:
        return f"No text names these {neurons} {many}: {of}, and none is better than noise."
    return f"Texts name {named} of these {neurons} {many}; {of}."
