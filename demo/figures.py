"""Draw the figures and write the tables that only the demo shows."""

import numpy as np
from matplotlib import pyplot


def markdown_table(columns, rows):
    """Return the lines of a markdown table.

    columns: titles.
    rows: lists of cells, of any type; str(cell) is shown.
    """
    lines = []
    for row in (columns, *rows):
        cells = [f" {cell} " if cell != "" else " " for cell in row]
        lines.append("|".join(["", *cells, ""]))
    return [lines[0], "|---" * len(columns) + "|", *lines[1:]]


def plot_segmentations(blocks):
    """Draw examples of segmentation, a row each: input, mask, prediction and heat map. Returns the figure.

    blocks: {title: [(label, strip), ...]}, side by side; `save_segmentation` writes the strips.
    """
    names = ("input", "mask", "prediction", "heat map")
    rows = max(len(examples) for examples in blocks.values())
    figure = pyplot.figure(figsize=(5.4 * len(blocks), 1.25 * rows + 0.6), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(1, len(blocks)))
    for part, (title, examples) in zip(parts, blocks.items(), strict=True):
        part.suptitle(title, fontsize="medium")
        grid = part.subplots(rows, len(names), squeeze=False)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[], frame_on=False)
        for axes, name in zip(grid[0], names, strict=True):
            axes.set_title(name, fontsize="small")
        for row, (label, strip) in zip(grid, examples, strict=False):
            row[0].set_ylabel(label)
            panels = np.split(np.asarray(strip), len(names), axis=1)
            for axes, panel in zip(row, panels, strict=True):
                axes.imshow(panel[2:-2, 2:-2])
    return figure


def plot_concepts(title, examples):
    """Draw pictures with their strongest words as bars, blue where a word is true. Returns the figure.

    examples: [(picture, caption, [(word, score), ...], [whether it is true, ...]), ...], two of them in a
        row.
    """
    rows = -(-len(examples) // 2)
    figure = pyplot.figure(figsize=(11, 1.9 * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    parts = figure.subfigures(rows, 2, squeeze=False).flat
    for part, (picture, caption, words, right) in zip(parts, examples, strict=False):
        left, axes = part.subplots(1, 2, width_ratios=[1, 1.6])
        part.suptitle(caption, fontsize="small")
        left.imshow(picture)
        left.set_axis_off()
        colours = ["C0" if true else "C3" for true in right]
        axes.barh(range(len(words)), [score for _, score in words], color=colours)
        axes.set_yticks(range(len(words)), [word for word, _ in words], fontsize="x-small")
        axes.invert_yaxis()
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(axis="x", labelsize="x-small")
    return figure


def plot_grid(title, rows):
    """Draw rows of pictures in coloured frames, with a caption under each. Returns the figure.

    rows: {title of the row: [(picture, caption, colour), ...]}.
    """
    columns = max(len(pictures) for pictures in rows.values())
    lines = max(caption.count("\n") + 1 for pictures in rows.values() for _, caption, _ in pictures)
    size = (1.7 * columns, (2 + 0.12 * lines) * len(rows) + 0.4)
    figure = pyplot.figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize="medium")
    parts = np.atleast_1d(figure.subfigures(len(rows), 1))
    for part, (name, pictures) in zip(parts, rows.items(), strict=True):
        part.suptitle(name, fontsize="small", fontweight="bold")
        grid = part.subplots(1, columns, squeeze=False)[0]
        for axes in grid[len(pictures) :]:
            axes.set_axis_off()
        for axes, (picture, caption, colour) in zip(grid, pictures, strict=False):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[], anchor="N")
            axes.set_xlabel(caption, fontsize="x-small")
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=3)
    return figure
