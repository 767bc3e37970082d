"""Write the page of the paper's tables and figures: paper.json, and from it paper.md and paper.html.

An item fits a screen: its first rows and picture, and one folded part with the rest. Each command stands in
the folded part of the first item that runs it, with a number by which the others name it.
"""

import base64
import hashlib

import jinja2
from markupsafe import Markup

from utils.runtime.files import read_json, save_atomic, save_json

SHOWN = 12  # rows of an item that are not folded
TEMPLATE = """<!doctype html>
{% macro table(rows) %}
<table>
<tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endmacro %}
{% macro images(item, names) %}
{% for name in names %}<a href="{{ name }}"><img src="{{ name }}" alt="{{ item.title }}"></a>
{% endfor %}
{% endmacro %}
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
{% for item in items %}
<section id="{{ item.name }}">
<h2>{{ item.name }}: {{ item.title }}</h2>
{% if item.left_out %}<p class="left">Left out: {{ item.left_out }}</p>{% else %}
{{ table(item.rows) }}
{{ images(item, item.pictures) }}
<p>{{ item.made }}</p>
{% if item.folded %}<details>
<summary>{{ item.folded }}</summary>
{% if item.more_rows %}{{ table(item.more_rows) }}{% endif %}
{{ images(item, item.more_pictures) }}
{% if item.commands %}<ol start="{{ item.first }}">
{% for command in item.commands %}<li><code>{{ command }}</code></li>
{% endfor %}</ol>{% endif %}
</details>
{% endif %}
{% endif %}
</section>
{% endfor %}
</body>
</html>
"""
STYLE = """
body { font-family: sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
body { color: #1a1a1a; background: #fff }
table { border-collapse: collapse; font-size: 0.9rem }
td, th { border-bottom: 1px solid #ccc; padding: 0.25rem 0.6rem; text-align: left }
td:nth-child(n + 2):nth-child(-n + 4) { white-space: nowrap }
img { max-width: 100%; max-height: 17rem; display: block; margin: 1rem 0 }
details img { max-height: none }
summary { cursor: pointer }
code { font-size: 0.75rem; overflow-wrap: anywhere }
.left { color: #8a4b00 }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #111 }
  .left { color: #e0a050 }
}
"""
ABOUT = (
    "The paper's numbers are of ViT-B-32, OpenAI's weights, ImageNet and layer 9. "
    "Differences are shown where ours are, too."
)
TABLE_COLUMNS = ("what", "paper", "ours", "difference", "beside", "n", "note")


def number(value, unit):
    """Return a value with its unit, as it stands in a table."""
    if value is None:
        return ""
    if unit == "" and float(value).is_integer():
        return f"{value:,.0f}"
    text = f"{value:.1f}" if unit == "%" else f"{value:.3f}"
    return f"{text} {unit}".strip()


def cells(row, comparable=True):
    """Return a row's cells, in the order of TABLE_COLUMNS.

    row: a `Row` as a dict.
    comparable: whether model, data and layer are the paper's.
    """
    both = comparable and row["ours"] is not None and row["paper"] is not None
    difference = f"{row['ours'] - row['paper']:+.1f}" if both else ""
    count = "" if row["n"] is None else f"{row['n']:,}"
    values = [number(row[name], row["unit"]) for name in ("paper", "ours")]
    return [row["what"], *values, difference, row["beside"], count, row["note"]]


def read(folder):
    """Read the items of an earlier run, {} if there are none."""
    path = folder / "paper.json"
    content = read_json(path, "", "remove it") if path.is_file() else {}
    items = content.get("items") if isinstance(content, dict) else None
    return items if isinstance(items, dict) else {}


def write(folder, model, note, items):
    """Write paper.json, .md and .html.

    model: MODEL_PRETRAINED.
    note: a line for the top, or None.
    items: {name: {"title", "settings", "comparable", "left_out", "rows": [`Row` as a dict], "pictures",
        "commands", "cost"}}.
    """
    title = f"Second-order effects of neurons, {model}"
    lines = [note, ABOUT] if note else [ABOUT]
    save_json(folder / "paper.json", {"title": title, "about": lines, "items": items})
    views = views_of(items)
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src 'self' file:; style-src 'sha256-{digest}'"
    parts = {"title": title, "lines": lines, "items": views, "columns": TABLE_COLUMNS}
    parts |= {"style": Markup(STYLE), "policy": Markup(policy)}
    html = jinja2.Environment(autoescape=True).from_string(TEMPLATE).render(**parts)
    text = markdown(title, lines, views)
    save_atomic(folder / "paper.md", lambda file: file.write(text.encode()))
    save_atomic(folder / "paper.html", lambda file: file.write(html.encode()))


def views_of(items):
    """Return what the page shows of every item, a list of dicts. items: as in `write`."""
    numbers = {}  # {command: its number}
    views = []
    for name, item in items.items():
        rows = [cells(row, item["comparable"]) for row in item["rows"]]
        new = [command for command in item["commands"] if command not in numbers]
        first = len(numbers) + 1
        numbers |= {command: first + i for i, command in enumerate(new)}
        run = ranges([numbers[command] for command in item["commands"]])
        view = {"name": name, "title": item["title"], "left_out": item["left_out"], "first": first}
        view |= {"rows": rows[:SHOWN], "more_rows": rows[SHOWN:], "commands": new}
        view |= {"pictures": item["pictures"][:1], "more_pictures": item["pictures"][1:]}
        view["made"] = f"{item['settings']}; {item['cost']}" + (f"; commands {run}." if run else ".")
        view["folded"] = summary(view)
        views.append(view)
    return views


def summary(view):
    """Return what an item's folded part holds, in words; "" for nothing."""
    parts = []
    for what, count in (("row", len(view["more_rows"])), ("picture", len(view["more_pictures"]))):
        if count:
            parts.append(f"{count} more {what}{'s' if count > 1 else ''}")
    if view["commands"]:
        first = view["first"]
        parts.append(f"commands {ranges(range(first, first + len(view['commands'])))}")
    return ", ".join(parts)


def ranges(numbers):
    """Return whole numbers in words: "1-3, 7" for 1, 2, 3, 7."""
    runs = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs)


def markdown(title, lines, views):
    """Return the page as markdown. views: as `views_of` returns them."""
    parts = [f"# {title}", "", *lines, ""]
    for view in views:
        parts += [f"## {view['name']}: {view['title']}", ""]
        if view["left_out"]:
            parts += [f"Left out: {view['left_out']}", ""]
            continue
        parts += [*table_in_markdown(view["rows"]), *pictures_in_markdown(view, view["pictures"])]
        parts += [view["made"], ""]
        if view["folded"]:
            parts += ["<details>", f"<summary>{view['folded']}</summary>", ""]
            parts += table_in_markdown(view["more_rows"])
            parts += pictures_in_markdown(view, view["more_pictures"])
            parts += commands_in_markdown(view)
            parts += ["</details>", ""]
    return "\n".join(parts) + "\n"


def table_in_markdown(rows):
    """Return the lines of a table, and an empty one; none without rows. rows: lists of cells."""
    if not rows:
        return []
    lines = [TABLE_COLUMNS, ["---"] * len(TABLE_COLUMNS), *rows]
    lines = [" | ".join(str(cell).replace("|", "\\|") for cell in line) for line in lines]
    return [*(f"| {line} |" for line in lines), ""]


def pictures_in_markdown(view, names):
    """Return the lines that show pictures, and an empty one; none without pictures."""
    lines = [f"![{view['title']}]({name})" for name in names]
    return [*lines, ""] if lines else []


def commands_in_markdown(view):
    """Return the numbered lines of the commands, and an empty one; none without commands."""
    lines = [f"{i}. `{command}`" for i, command in enumerate(view["commands"], view["first"])]
    return [*lines, ""] if lines else []
