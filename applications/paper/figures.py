"""Draw the figures that only the page of the paper has."""

import textwrap

import numpy as np
from matplotlib import pyplot

from utils.figures import heat_panel, mask_panel, save_figure, words


def plot_lines(curves, xlabel, ylabel, path):
    """Draw one line for each of the curves {name: {x: y}}."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", markersize=4, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")
    save_figure(figure, path)


def plot_maps(pictures, masks, maps, path):
    """Draw segmentations side by side, a row for each picture.

    pictures: [n, S, S, 3] in [0, 1].
    masks: [n, S, S] of 1, 0 and -1 (ignored).
    maps: {method: [n, S, S] in [0, 1]}.
    """
    names = ["input", "mask", *maps]
    size = (1.6 * len(names), 1.7 * len(pictures))
    options = {"figsize": size, "squeeze": False, "layout": "constrained"}
    figure, grid = pyplot.subplots(len(pictures), len(names), **options)
    for row, picture, mask, *heats in zip(grid, pictures, masks, *maps.values(), strict=True):
        panels = [picture, mask_panel(mask), *(heat_panel(picture, heat) for heat in heats)]
        for axes, name, panel in zip(row, names, panels, strict=True):
            axes.imshow(panel)
            axes.set_axis_off()
            if axes in grid[0]:
                axes.set_title(words(name), fontsize="small")
    save_figure(figure, path)


def plot_attacks(rows, path):
    """Draw pictures, and under each a map of what speaks for the wrong class (red) and against it (blue).

    rows: [(title, [(picture, map [rows, columns], caption), ...]), ...].
    """
    columns = max(len(pictures) for _, pictures in rows)
    figure = pyplot.figure(figsize=(2 * columns, 4.6 * len(rows)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(rows), 1))
    for part, (title, pictures) in zip(parts, rows, strict=True):
        part.suptitle(words(title), fontsize="small", fontweight="bold")
        grid = part.subplots(2, columns, squeeze=False)
        limit = max(float(np.abs(heat).max()) for _, heat, _ in pictures)
        for axes in grid.flat:
            axes.set_axis_off()
        for i, (picture, heat, caption) in enumerate(pictures):
            grid[0, i].imshow(picture)
            grid[0, i].set_title(textwrap.fill(words(caption), 24), fontsize="xx-small")
            grid[1, i].imshow(heat, cmap="seismic", vmin=-limit, vmax=limit)
    save_figure(figure, path)
