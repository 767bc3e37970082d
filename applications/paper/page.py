"""The page of the paper's tables and figures: paper.json, and from it paper.md and paper.html."""

import base64
import hashlib

import jinja2
from markupsafe import Markup

from utils.runtime.files import read_json, save_atomic, save_json

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for line in lines %}<p>{{ line }}</p>
{% endfor %}
{% for name, item in items.items() %}
<section id="{{ name }}">
<h2>{{ name }}: {{ item.title }}</h2>
{% if item.left_out %}<p class="left">Left out: {{ item.left_out }}</p>{% else %}
<table>
<tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in item.rows %}<tr>{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for picture in item.pictures %}<img src="{{ picture }}" alt="{{ item.title }}">
{% endfor %}
<p>{{ item.settings }}; {{ item.cost }}.</p>
<pre>{% for command in item.commands %}{{ command }}
{% endfor %}</pre>
{% endif %}
</section>
{% endfor %}
</body>
</html>
"""
STYLE = """
body { font-family: sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff }
table { border-collapse: collapse; font-size: 0.9rem }
td, th { border-bottom: 1px solid #ccc; padding: 0.25rem 0.6rem; text-align: left }
td:nth-child(n + 2):nth-child(-n + 4) { white-space: nowrap }
img { max-width: 100%; display: block; margin: 1rem 0 }
pre { font-size: 0.75rem; overflow-x: auto; background: #f4f4f4; padding: 0.6rem }
.left { color: #8a4b00 }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #111 }
  pre { background: #222 }
  .left { color: #e0a050 }
}
"""
ABOUT = "The paper's numbers are of ViT-B-32, OpenAI's weights, ImageNet and layer 9. Differences are shown where ours are, too."
COLUMNS = ("what", "paper", "ours", "difference", "beside", "n", "note")


def number(value, unit):
    """A value with its unit, as it stands in a table."""
    if value is None:
        return ""
    text = (
        f"{value:,.0f}"
        if unit == "" and float(value).is_integer()
        else f"{value:.1f}"
        if unit == "%"
        else f"{value:.3f}"
    )
    return f"{text} {unit}".strip()


def cells(row, comparable=True):
    """A row's cells, in the order of COLUMNS. row: a `Row` as a dict. comparable: whether model, data, layer
    are the paper's.
    """
    both = comparable and row["ours"] is not None and row["paper"] is not None
    difference = f"{row['ours'] - row['paper']:+.1f}" if both else ""
    count = "" if row["n"] is None else f"{row['n']:,}"
    values = [number(row[name], row["unit"]) for name in ("paper", "ours")]
    return [row["what"], *values, difference, row["beside"], count, row["note"]]


def read(folder):
    """The items of an earlier run, {} if there are none."""
    path = folder / "paper.json"
    content = read_json(path, "", "remove it") if path.is_file() else {}
    return content["items"] if isinstance(content, dict) and isinstance(content.get("items"), dict) else {}


def write(folder, model, note, items):
    """Write paper.json, .md and .html.

    model, note: MODEL_PRETRAINED; a line for the top, or None.
    items: {name: {"title", "settings", "comparable", "left_out", "rows": [`Row` as a dict], "pictures",
        "commands", "cost"}}.
    """
    title, lines = f"Second-order effects of neurons, {model}", [*([note] if note else []), ABOUT]
    save_json(folder / "paper.json", {"title": title, "about": lines, "items": items})
    items = {
        name: {**item, "rows": [{"cells": cells(row, item["comparable"])} for row in item["rows"]]}
        for name, item in items.items()
    }
    save_atomic(folder / "paper.md", lambda file: file.write(markdown(title, lines, items).encode()))
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src 'self' file:; style-src 'sha256-{digest}'"
    parts = {
        "title": title,
        "lines": lines,
        "items": items,
        "columns": COLUMNS,
        "style": Markup(STYLE),
        "policy": Markup(policy),
    }
    page = jinja2.Environment(autoescape=True).from_string(TEMPLATE)
    save_atomic(folder / "paper.html", lambda file: file.write(page.render(**parts).encode()))


def markdown(title, lines, items):
    """The page as markdown. items: as in `write`, with the cells of their rows."""
    parts = [f"# {title}", "", *lines, ""]
    for name, item in items.items():
        parts += [f"## {name}: {item['title']}", ""]
        if item["left_out"]:
            parts += [f"Left out: {item['left_out']}", ""]
            continue
        parts += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        parts += [
            "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row["cells"]) + " |"
            for row in item["rows"]
        ]
        parts += [
            "",
            *(f"![{item['title']}]({picture})" for picture in item["pictures"]),
            "",
            f"{item['settings']}; {item['cost']}.",
            "",
        ]
        parts += ["```bash", *item["commands"], "```", ""]
    return "\n".join(parts) + "\n"
