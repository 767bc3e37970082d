"""Write the page of answers: one html file that needs no network and no scripts."""

import base64
import hashlib
import io
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from applications.explain.words import (
    SOURCES,
    cells,
    known_of,
    name_of_head,
    sentences,
    towards_winner,
    winner_first,
)

HERE = Path(__file__).parent
FOR = (200, 60, 30)  # colour of what speaks for the winner of the question, and against it
AGAINST = (35, 95, 190)
CHART = {"width": 360, "height": 190, "left": 40, "right": 10, "top": 12, "bottom": 32}


def render(title, head, answers, texts, total, layers):
    """Return the page's html.

    head: lines about the model and the settings.
    answers: list of (name, answer, drawn); drawn is the picture, [S, S, 3] in [0, 1], or None.
    texts, total, layers: as in `sentences` and `name_of_head`.
    """
    style = (HERE / "page.css").read_text()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    views = [view_of(*answer, texts, total, layers) for answer in answers]
    parts = {"title": title, "head": head, "views": views, "texts": texts}
    parts |= {"style": Markup(style), "policy": Markup(policy)}
    parts["one"] = answers[0][1].get("one", "neuron")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((HERE / "page.html").read_text()).render(**parts)


def view_of(name, answer, drawn, texts, total, layers):
    """Return what the page shows of one answer, a dict."""
    single = "pictures" not in answer
    answer, texts = towards_winner(answer, texts), winner_first(answer, texts)
    view = {"name": name, "texts": texts, "single": single, "sentences": sentences(answer, texts, total)}
    if drawn is not None:
        view["picture"] = data_uri(drawn)
        view["map"] = data_uri(map_panel(drawn, np.array(answer["map"]["patches"])))
        shown = [*answer["neurons"], *answer["against"]]
        whole = sum(item["contribution"] for item in shown)
        other = answer["map"]["other_tokens"]
        if abs(other) > 0.05 * abs(whole):
            view["elsewhere"] = f"{100 * other / (whole or 1):.0f} %"
    view["neurons"] = neurons_of(answer, layers)
    view["heads"] = [
        (name_of_head(h, layers), f"{h['effect']:+.2f}", f"{100 * h['share']:+.0f} %")
        for h in answer.get("heads", ())
    ]
    view["layers"] = layers_of(answer["layers"])
    proof = answer["proof"]
    view["chart"] = chart_of(proof["delete"], proof.get("score", answer["score"]))
    view["proved_on"] = proof.get("pictures")
    view["tables"] = {}
    for what in ("delete", "keep"):
        if of := proof.get(what):
            counts = [row["count"] for row in of["contribution"]]
            rows = [(source, SOURCES[source], cells(rows, single)) for source, rows in of.items()]
            view["tables"][what] = {"counts": counts, "rows": rows}
    return view


def neurons_of(answer, layers):
    """Return the rows of the table of neurons."""
    shown = [*answer["neurons"], *answer["against"]]
    largest = max((abs(item["contribution"]) for item in shown), default=1) or 1
    rows = []
    for item in shown:
        row = {"name": f"{item['layer']}/{item['neuron']}", "value": f"{item['contribution']:+.2f}"}
        width = 60 * abs(item["contribution"]) / largest
        row |= {"width": f"{width:.1f}", "x": "60" if item["contribution"] > 0 else f"{60 - width:.1f}"}
        row["kind"] = "for" if item in answer["neurons"] else "against"
        if "deleted" in item:
            row["second"] = f"{item['deleted']:+.2f}"
        else:
            row["second"] = f"{100 * item['positive_on']:.0f} %"
        row["straight"] = f"{item['second_order']:+.2f}"
        row["known"] = known_of(item)
        row["heads"] = [
            (name_of_head(h, layers), f"{100 * h['share']:+.0f} %") for h in item.get("heads", ())
        ]
        rows.append(row)
    return rows


def layers_of(layers):
    """Return bars of what the neurons of every layer bring."""
    largest = max((max(of["positive"], -of["negative"]) for of in layers), default=1) or 1
    rows = []
    for of in layers:
        widths = [60 * abs(of[name]) / largest for name in ("positive", "negative")]
        row = {
            "layer": of["layer"],
            "positive": f"{of['positive']:+.1f}",
            "negative": f"{of['negative']:+.1f}",
        }
        row |= {"up": f"{widths[0]:.1f}", "down": f"{widths[1]:.1f}", "x": f"{60 - widths[1]:.1f}"}
        rows.append(row)
    return rows


def chart_of(deleted, before):
    """Return the drawing of scores by number of neurons taken away: points of one line for each source.

    deleted: {source: rows of the proof}.
    before: the score as it is.
    """
    counts = [0, *(row["count"] for row in deleted["contribution"])]
    lines = {source: [before, *(row["score"] for row in rows)] for source, rows in deleted.items()}
    values = [x for of in lines.values() for x in of] + [0.0] * (min(map(min, lines.values())) < before / 2)
    low, high = min(values), max(values)
    spread = (high - low) or 1.0
    inner = CHART["width"] - CHART["left"] - CHART["right"]
    tall = CHART["height"] - CHART["top"] - CHART["bottom"]

    def x(i):
        return round(CHART["left"] + inner * i / max(1, len(counts) - 1), 1)

    def y(value):
        return round(CHART["top"] + tall * (high - value) / spread, 1)

    drawn = []
    for source, of in lines.items():
        points = " ".join(f"{x(i)},{y(value)}" for i, value in enumerate(of))
        drawn.append({"source": source, "name": SOURCES[source], "points": points})
    ticks = [(x(i), count) for i, count in enumerate(counts)]
    marks = [(y(value), f"{value:.1f}") for value in dict.fromkeys((high, low))]
    zero = y(0) if low < 0 < high else None
    return {"lines": drawn, "ticks": ticks, "marks": marks, "zero": zero, **CHART}


def map_panel(picture, heat):
    """Return a picture [S, S, 3], grey, with a map [rows, columns] over it: red is for, blue against."""
    large = Image.fromarray(heat.astype(np.float32)).resize(picture.shape[1::-1], Image.Resampling.BICUBIC)
    values = np.asarray(large) / (np.abs(heat).max() or 1)
    grey = np.repeat(picture.mean(axis=-1, keepdims=True), 3, axis=-1) * 0.6 + 0.3
    colour = np.where(values[..., None] > 0, np.array(FOR), np.array(AGAINST)) / 255
    strength = np.clip(np.abs(values), 0, 1)[..., None] * 0.85
    return grey * (1 - strength) + colour * strength


def data_uri(picture):
    """Return a picture [S, S, 3] in [0, 1] as an address that holds it."""
    file = io.BytesIO()
    Image.fromarray((255 * np.clip(picture, 0, 1)).round().astype(np.uint8)).save(file, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
