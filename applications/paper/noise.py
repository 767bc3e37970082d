"""Make the tables of what descriptions say over noise and by deletion, which the paper does not have."""

import json
from itertools import product

from applications.paper.figures import plot_lines
from applications.paper.registry import Row, item, train, val
from utils import grading

TEXTS = 8  # of the descriptions that are graded by deletion, or as near to it as there is
MEASURES = {"pearson": "correlation", "auprc": "average precision", "share": "share rebuilt"}
ORDERS = {"writes": "writes", "total": "total order"}  # what is described
SIDES = {"fires_on": "fires on", "writes": "writes"}


@item(
    "noise",
    "What descriptions say over noise (not in the paper)",
    "all",
    passes=lambda p: len(p.texts) * (2 * train(p) + 2 * val(p)),
    seed="0, 1, ... of the control dictionaries, the layer's number of the rotated units",
)
def noise(paper):
    """Make the table and the figure: every number of texts for --mlp_layer, the justified one for others."""
    found = {texts: summary(paper, texts)["over_noise"] for texts in paper.texts}
    layer = str(paper.layer)
    rows = []
    for side, measure in (("fires_on", "pearson"), ("writes", "share"), ("fires_on", "auprc")):
        for texts, of in found.items():
            rows += rows_by_length(paper, texts, side, measure, of[layer][side][measure])
    curves = {}
    for side, measure in grading.JUDGED_BY.items():
        for texts, of in found.items():
            others = {other: sides[side] for other, sides in of.items() if other != layer}
            rows += [row_of_layer(paper, texts, other, side, found) for other, found in others.items()]
            columns = of[layer][side][measure]
            for name in ("grade", "control"):
                key = f"{texts}, {SIDES[side]}: {name}"
                curves[key] = dict(zip(columns["texts"], columns[name], strict=True))
    plot_lines(curves, "texts for a neuron", "mean grade", paper.picture("noise"))
    return rows, [paper.picture("noise")]


@item(
    "deletion",
    "What happens without a neuron: correlation over texts with its deletion (not in the paper)",
    "all",
    passes=lambda p: len(p.texts) * (2 * train(p) + 2 * val(p)),
    seed="the layer's number, of the drawn neurons",
)
def deletion(paper):
    """Make the table of grades by deletion, of every layer."""
    rows = []
    for layer in paper.all_layers:
        found = {texts: summary(paper, texts)["deletion"].get(str(layer)) for texts in paper.texts}
        if not all(found.values()):
            continue
        first = found[paper.texts[0]]
        said = {row: of["mean"] for row, of in first["rows"].items()}
        beside = ", ".join(f"{grading.DELETED[row]} {said[row]:.2f}" for row in said if row != "component")
        of = {"unit": "", "n": first["neurons"]}
        rows.append(Row(f"layer {layer}: component", said["component"], beside=beside, **of))
        for (texts, of_texts), (side, order) in product(found.items(), ORDERS.items()):
            columns = of_texts[side]
            place = min(range(len(columns["texts"])), key=lambda j: abs(columns["texts"][j] - TEXTS))
            what = f"layer {layer}: {order}, {columns['texts'][place]} of {texts}"
            rows.append(row_of(paper, what, columns, place)._replace(n=first["neurons"]))
    return rows, []


def summary(paper, texts):
    """Grade the descriptions of all layers by a text set; return the content of the summary."""
    paper.descriptions(texts, paper.all_layers)
    paper.stages.total_order(paper.given[texts], paper.all_layers)
    paper.grades(texts, paper.all_layers)
    names = paper.names(dataset=paper.dataset, split=paper.args.split, **paper.described(texts))
    path = paper.results.path("graded", layer=paper.all_layers, **names)
    return json.loads(path.read_text())


def rows_by_length(paper, texts, side, measure, columns):
    """Return a row for every number of texts of one side of the layer. columns: of the summary."""
    rows = []
    for j, m in enumerate(columns["texts"]):
        what = f"layer {paper.layer}, {named(texts, side, measure, m)}"
        rows.append(row_of(paper, what, columns, j))
    return rows


def row_of_layer(paper, texts, layer, side, found):
    """Return the row of the justified number of texts of another layer. found: its side of the summary."""
    measure = grading.JUDGED_BY[side]
    columns = found[measure]
    m = found["justified"]
    what = f"layer {layer}, {named(texts, side, measure, m or 1)}"
    row = row_of(paper, what, columns, columns["texts"].index(m or 1))
    return row if m else row._replace(note=f"{row.note}: none is justified")


def named(texts, side, measure, m):
    """Name a row: the side, the text set, the number of texts, and the measure."""
    return f"{SIDES[side]}, {m} of {texts}: {MEASURES[measure]}"


def row_of(paper, what, columns, j):
    """Return a row: the mean grade beside the control's and that of rotated units."""
    beside = f"control {columns['control'][j]:.3f}"
    if "rotated" in columns:
        beside += f", rotated {columns['rotated'][j]:.3f}"
    better, chance = (100 * columns[name][j] for name in ("better", "better_by_chance"))
    note = f"better for {better:.0f} % (chance {chance:.0f})"
    if "skill" in columns:
        note = f"skill {columns['skill'][j]:.2f}, {note}"
    return Row(what, columns["grade"][j], unit="", beside=beside, n=paper.clip.vit.N, note=note)
