"""A registry of the page's items: an item is a table or a figure, and the function that makes it."""

import csv
import io
from collections.abc import Callable
from typing import NamedTuple

from utils.runtime.files import save_atomic

REGISTERED = {}  # {name: Item}


class Row(NamedTuple):
    """A Row is one number of a table or figure.

    what: the number, in words.
    ours, paper: its value here and in the paper; None where there is none.
    unit: of both.
    beside: a chance level or baseline, in words.
    n: images or neurons behind it.
    note: a remark.
    """

    what: str
    ours: float | None
    paper: float | None = None
    unit: str = "%"
    beside: str = ""
    n: int | None = None
    note: str = ""


class Item(NamedTuple):
    """An Item is a table or figure.

    title: what it shows.
    layers: whose components it needs: "", "one", "late" or "all".
    passes, disk: `Paper` -> how many images go through the tower; bytes besides the components.
    lacks: `Paper` -> what it cannot do without, in words; "" if all is there.
    seed: of what is drawn, in words.
    make: `Paper` -> (rows, pictures).
    """

    title: str
    layers: str
    passes: Callable
    disk: Callable
    lacks: Callable
    seed: str
    make: Callable


def nothing(paper):
    """Return 0: no passes, no bytes."""
    return 0


def no_lack(paper):
    """Return "": the item can be made from the images alone."""
    return ""


def item(name, title, layers="", passes=nothing, disk=nothing, lacks=no_lack, seed="none"):
    """Register a function as an item. Parameters: as in `Item`."""

    def register(function):
        def lacking(paper):
            if reason := lacks(paper):
                return reason
            return "" if paper.args.data_path else "it needs images: --data_path"

        REGISTERED[name] = Item(title, layers, passes, disk, lacking, seed, function)
        return function

    return register


def without(name, reason):
    """Return a function that says what an item lacks when a flag is not given."""
    return lambda paper: "" if getattr(paper.args, name) else reason


def train(paper):
    """Return the number of train images."""
    return len(paper.images("train"))


def val(paper):
    """Return the number of held-out images."""
    return len(paper.images(paper.args.split))


def chance_of(paper):
    """Return the accuracy of a guess, in words."""
    classifier, _ = paper.judged
    return f"chance {100 / classifier.shape[1]:.2g} %"


def write_csv(path, columns, rows):
    """Write a table as .csv in one step."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([columns, *rows])
    save_atomic(path, lambda file: file.write(table.getvalue().encode()))
