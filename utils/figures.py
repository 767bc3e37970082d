"""Pictures and tables of results."""

import textwrap

import numpy as np
import torch
from matplotlib import pyplot
from PIL import Image

from utils.grading import ROWS
from utils.runtime.files import save_atomic


def accuracy_table(table):
    """A plain-text table of {layer: {name: per cent}}."""
    names = list(next(iter(table.values())))
    width = max(map(len, names))
    lines = [" " * 6 + "  ".join(f"{name:>{width}}" for name in names)]
    lines += [
        f"{layer:>5} " + "  ".join(f"{row[name]:>{width}.2f}" for name in names)
        for layer, row in table.items()
    ]
    return "\n".join(["layer, accuracy in per cent", *lines])


def plot_ablations(table, path):
    """Accuracies {layer: {name: per cent}}: a line per ablation over the layers, or bars for one layer."""
    layers, names = list(table), list(next(iter(table.values())))
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    if len(layers) == 1:
        axes.barh(names[::-1], [table[layers[0]][name] for name in names[::-1]], color="C0")
        axes.set_xlabel(f"accuracy, layer {layers[0]} (%)")
    else:
        for name in names:
            axes.plot(layers, [table[layer][name] for layer in layers], marker="o", label=name)
        axes.set(xlabel="MLP layer", ylabel="accuracy (%)")
        axes.legend(fontsize="small")
    save_figure(figure, path)


def words(text):
    """A text for a figure, in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def save_figure(figure, path):
    """Write a figure as .png in one step, the same bytes for the same figure, and close it."""
    save_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120, metadata={"Software": None}))
    pyplot.close(figure)


def plot_lines(curves, xlabel, ylabel, path):
    """A line for each of some curves {name: {x: y}}."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", markersize=4, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")
    save_figure(figure, path)


def plot_grades(graded, path):
    """How the correlations of a layer's neurons are distributed: a panel for each of {layer: `Graded`}, a
    line for each row.
    """
    columns = min(3, len(graded))
    rows = -(-len(graded) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns, 4.6 * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(graded) :]:
        axes.set_axis_off()
    for axes, (layer, of) in zip(grid.flat, graded.items(), strict=False):
        for i, row in enumerate(of.rows):
            values = np.sort(of.of(row, of.measures[2] if len(of.measures) > 2 else of.measures[0]))
            style = ":" if row.startswith("null") else "-"
            axes.plot(
                values,
                np.linspace(0, 1, len(values)),
                style,
                color=f"C{i}",
                label=f"{ROWS[row]} ({values.mean():.2f})",
            )
        axes.set(
            title=f"layer {layer}",
            xlabel="correlation with the effect, held-out images",
            ylabel="share of neurons below",
        )
        axes.set_xlim(-0.8, 1)
        axes.axvline(0, color="black", linewidth=0.6)
        axes.legend(fontsize="x-small", title="mean in brackets", title_fontsize="x-small", loc="upper center",
                    bbox_to_anchor=(0.5, -0.16), frameon=False)  # fmt: skip
    save_figure(figure, path)


def plot_maps(pictures, masks, maps, path):
    """Segmentations side by side: pictures [n, S, S, 3] in [0, 1], masks [n, S, S] of 1, 0 and -1, and
    {method: [n, S, S]}.
    """
    count, columns = len(pictures), ["input", "mask", *maps]
    size = (1.6 * len(columns), 1.7 * count)
    figure, grid = pyplot.subplots(count, len(columns), figsize=size, squeeze=False, layout="constrained")
    for row, picture, mask, *heats in zip(grid, pictures, masks, *maps.values(), strict=True):
        overlays = [0.5 * picture + 0.5 * pyplot.get_cmap("jet")(heat)[..., :3] for heat in heats]
        panels = [picture, np.repeat(np.where(mask < 0, 0.5, mask)[..., None], 3, axis=-1), *overlays]
        for axes, name, panel in zip(row, columns, panels, strict=True):
            axes.imshow(panel)
            axes.set_axis_off()
            if axes in grid[0]:
                axes.set_title(words(name), fontsize="small")
    save_figure(figure, path)


def plot_attacks(rows, path):
    """Pictures, and under each a map of what speaks for the wrong class (red) and against it (blue).

    rows: [(title, [(picture, map [rows, columns], caption), ...]), ...].
    """
    columns = max(len(pictures) for _, pictures in rows)
    figure = pyplot.figure(figsize=(2 * columns, 4.6 * len(rows)), layout="constrained")
    for part, (title, pictures) in zip(np.atleast_1d(figure.subfigures(len(rows), 1)), rows, strict=True):
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


def segmentation_table(rows):
    """A plain-text table of {method: scores in per cent}, as `utils.segmentation.Scores` gives them."""
    columns = {
        "PixAcc": "pixel_accuracy",
        "mIoU": "mIoU",
        "mAP": "mAP",
        "IoU bg": "IoU_background",
        "IoU obj": "IoU_object",
    }
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>9}" for name in columns)]
    lines += [
        f"{name:<{width}}" + "".join(f"{row[key]:>9.2f}" for key in columns.values())
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def plot_precision_recall(precision, recall, label, path):
    """The curve over all pixels, of `utils.segmentation.Scores.precision_recall`."""
    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    axes.plot(recall[:-1], precision[:-1], label=words(label))
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.01))
    axes.legend(fontsize="small")
    save_figure(figure, path)


def to_pictures(pixels, transform, size):
    """What the model saw, to look at: pixels [B, 3, side, side] -> [B, *size, 3] in [0, 1]; transform: what
    made them.
    """
    normalise = transform.transforms[-1]
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (normalise.mean, normalise.std))
    pictures = torch.nn.functional.interpolate(
        pixels * std + mean, size=size, mode="bilinear", antialias=True
    )
    return pictures.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def save_segmentation(path, picture, mask, heat, thr):
    """Write side by side as .png: the picture [S, S, 3] in [0, 1], its mask [S, S] (1, 0, and -1 for ignored,
    in grey), the prediction heat > thr, and the heat map [S, S] in [0, 1] over the picture."""
    overlay = 0.5 * picture + 0.5 * pyplot.get_cmap("jet")(heat)[..., :3]
    flat = [np.repeat(panel[..., None], 3, axis=-1) for panel in (np.where(mask < 0, 0.5, mask), heat > thr)]
    panels = [
        np.pad(panel, ((2, 2), (2, 2), (0, 0)), constant_values=1) for panel in (picture, *flat, overlay)
    ]
    strip = Image.fromarray((255 * np.concatenate(panels, axis=1)).round().astype(np.uint8))
    save_atomic(path, lambda file: strip.save(file, format="png"))


def plot_neuron(title, pictures, maps, sides, norms=None, threshold=None):
    """A neuron's card, as a figure: top pictures, bright where it fires; texts with signed coefficients;
    histogram of its norms.

    pictures, maps: [n, S, S, 3] in [0, 1]; the neuron's post-GELU activations on their patches, [n, rows,
        columns].
    sides: {what they are: [(text, coefficient), ...]}.
    norms, threshold: its centred norm on every image, [images]; the norm above which an effect is
        significant.
    """
    columns, parts = min(len(pictures), 8), len(sides) + (norms is not None)
    rows = -(-len(pictures) // columns)
    figure = pyplot.figure(
        figsize=(1.1 * columns + 3.2 * parts, max(2.6, 1.15 * rows + 0.5)), layout="constrained"
    )
    figure.suptitle(words(title), fontsize="medium")
    left, *middle = figure.subfigures(1, 1 + parts, width_ratios=[1.1 * columns, *[3.2] * parts])
    grid = left.subplots(rows, columns, squeeze=False).reshape(-1)
    top = float(maps.max()) or 1.0
    for axes in grid:
        axes.set_axis_off()
    for axes, picture, heat in zip(grid, pictures, maps, strict=False):
        light = Image.fromarray((heat / top).astype(np.float32)).resize(
            picture.shape[1::-1], Image.Resampling.BILINEAR
        )
        axes.imshow(picture * (0.3 + 0.7 * np.clip(np.asarray(light), 0, 1))[..., None])
    for part, (name, described) in zip(middle, sides.items(), strict=False):
        axes = part.subplots()
        texts, coefficients = zip(*described[::-1], strict=True) if described else ((), ())
        axes.barh(range(len(texts)), coefficients, color=["C3" if c < 0 else "C0" for c in coefficients])
        axes.set_yticks(range(len(texts)), map(words, texts), fontsize="x-small")
        axes.tick_params(axis="x", labelsize="x-small")
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_title(name, fontsize="small")
    if norms is not None:
        axes = middle[-1].subplots()
        axes.hist(norms, bins=40, color="C7")
        axes.set_yscale("log")
        if threshold is not None:
            axes.axvline(threshold, color="C3", linewidth=1)
        axes.tick_params(labelsize="x-small")
        axes.set_title("centred norm over the images", fontsize="small")
    return figure
