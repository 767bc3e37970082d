"""Print an answer in the terminal."""

import shutil

from applications.explain.words import (
    SOURCES,
    cells,
    known_of,
    name_of_head,
    sentences,
    towards_winner,
    winner_first,
)


def lines_of(title, answer, texts, total, layers):
    """Return the lines about one picture or one folder. Parameters: as in `sentences` and `name_of_head`."""
    answer, texts = towards_winner(answer, texts), winner_first(answer, texts)
    lines = ["", title, *(f"  {sentence}" for _, sentence in sentences(answer, texts, total))]
    lines += of_neurons(answer, layers)
    for what, title in (("delete", "taken away"), ("keep", "only these kept")):
        if rows := answer["proof"].get(what):
            lines += of_proof(rows, title, single="pictures" not in answer)
    return lines


def of_neurons(answer, layers):
    """Return the table of the neurons that are shown."""
    last = "deleted" if "pictures" not in answer else "positive on"
    first = f"layer/{answer.get('one', 'neuron')}"
    columns = f"{'contribution':>13}{last:>13}{'2nd order':>11}  what is known; heads"
    lines = ["", f"  {first:<14}{columns}"]
    width = max(60, shutil.get_terminal_size((150, 24)).columns - 55)
    for item in [*answer["neurons"], *answer["against"]]:
        name = f"{item['layer']}/{item['neuron']}"
        of = item["deleted"] if "deleted" in item else f"{100 * item['positive_on']:.0f} %"
        of = f"{of:>13}" if isinstance(of, str) else f"{of:>+13.3f}"
        known = "; ".join(f"{side} {texts} ({grade})" for side, texts, grade in known_of(item))
        if heads := item.get("heads"):
            carried = ", ".join(f"{name_of_head(h, layers)} {100 * h['share']:+.0f} %" for h in heads)
            known = f"{known}; {carried}" if known else carried
        numbers = f"{item['contribution']:>+13.3f}{of}{item['second_order']:>+11.3f}"
        lines.append(f"  {name:<14}{numbers}  {known[:width]}")
    return lines


def of_proof(rows, title, single):
    """Return a table of scores by number of neurons; * where the prediction changes."""
    counts = [row["count"] for row in rows["contribution"]]
    table = {SOURCES[source]: cells(of, single) for source, of in rows.items()}
    width = max((len(cell) for of in table.values() for cell in of), default=0) + 2
    lines = ["", f"  {title:<26}" + "".join(f"{count:>{width}}" for count in counts)]
    for name, of in table.items():
        lines.append(f"  {name:<26}" + "".join(f"{cell:>{width}}" for cell in of))
    return lines
