"""Draw figures and write tables of results."""

import numpy as np
from matplotlib import pyplot
from PIL import Image

from utils.grading import COMPARED, JUDGED_BY, MEASURE_NAMES, ROWS
from utils.runtime.files import save_atomic

# grades by number of texts that are drawn, {(side, measure): in words}
DELETED = [(side, "deletion") for side in ("writes", "total")]
CURVES = {key: MEASURE_NAMES[key[1]] for key in (*JUDGED_BY.items(), *DELETED)}


def accuracy_table(table):
    """Return a plain-text table of {layer: {name: per cent}}."""
    names = list(next(iter(table.values())))
    width = max(map(len, names))
    lines = ["layer, accuracy in per cent", " " * 6 + "  ".join(f"{name:>{width}}" for name in names)]
    for layer, row in table.items():
        lines.append(f"{layer:>5} " + "  ".join(f"{row[name]:>{width}.2f}" for name in names))
    return "\n".join(lines)


def plot_ablations(table, path):
    """Draw accuracies: a line per ablation over the layers, or bars for one layer.

    table: {layer: {name: per cent}}.
    """
    layers = list(table)
    names = list(table[layers[0]])
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
    """Return a text for a figure, in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def save_figure(figure, path):
    """Write a figure as .png in one step, the same bytes for the same figure, and close it."""
    save_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120, metadata={"Software": None}))
    pyplot.close(figure)


def plot_grades(found, path):
    """Draw a row for each layer: how the grades are distributed, and grades by number of texts.

    found: {layer: `utils.evaluation.LayerResults`}.
    """
    curves = {key: name for key, name in CURVES.items() if any(curve(of, key) for of in found.values())}
    size = (4.6 * (1 + len(curves)), 4.6 * len(found))
    options = {"figsize": size, "squeeze": False, "layout": "constrained"}
    figure, grid = pyplot.subplots(len(found), 1 + len(curves), **options)
    for (distribution, *others), (layer, of) in zip(grid, found.items(), strict=True):
        _draw_grades(distribution, of.graded)
        distribution.set_title(f"layer {layer}")
        for axes, (key, name) in zip(others, curves.items(), strict=True):
            if compared := curve(of, key):
                _draw_lengths(axes, compared, of.rotated_compared.get(key))
            axes.set_title(COMPARED[key[0]])
            axes.set_ylabel(name, fontsize="small")
    save_figure(figure, path)


def curve(found, key):
    """Return the `Compared` of a side and measure, None without controls. found: `LayerResults`."""
    side, measure = key
    compared = found.compared.get(key)
    if measure == "deletion" and found.deleted is not None:
        compared = found.deleted.compared.get("total" if side == "total" else "second")
    return compared if compared is not None and len(compared.controls) > 1 else None


def _draw_lengths(axes, compared, rotated):
    """Draw mean grades by number of texts, of texts and controls. compared, rotated: `Compared`."""
    texts, control = compared.mean()
    axes.plot(compared.lengths, texts, marker="o", markersize=4, label="texts")
    spread = compared.controls.mean(axis=1)  # [C, lengths]
    style = {"marker": "o", "markersize": 4, "color": "C7"}
    axes.plot(compared.lengths, control, label="control: random directions", **style)
    axes.fill_between(compared.lengths, spread.min(axis=0), spread.max(axis=0), color="C7", alpha=0.3)
    if rotated is not None:
        axes.plot(rotated.lengths, rotated.texts.mean(axis=0), ":", color="C3", label="texts, rotated units")
    axes.set_xscale("log", base=2)
    axes.set_xticks(compared.lengths, compared.lengths)
    axes.set(xlabel="texts of a description", ylim=(0, 1))
    axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)


def _draw_grades(axes, grades):
    """Draw the share of neurons below each correlation. grades: `Graded` of a layer."""
    measure = "pearson_without" if "pearson_without" in grades.measures else "pearson"
    for i, row in enumerate(grades.rows):
        values = np.sort(grades.of(row, measure))
        shares = np.linspace(0, 1, len(values))
        style = ":" if row.startswith("null") else "-"
        axes.plot(values, shares, style, color=f"C{i}", label=f"{ROWS[row]} ({values.mean():.2f})")
    axes.set(xlabel="correlation with the effect, held-out images", ylabel="share of neurons below")
    axes.set_xlim(-0.8, 1)
    axes.axvline(0, color="black", linewidth=0.6)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "frameon": False}
    axes.legend(fontsize="x-small", title="mean in brackets", title_fontsize="x-small", **below)


def segmentation_table(rows):
    """Return a plain-text table of {method: scores in per cent}, of `utils.segmentation.Scores`."""
    columns = {
        "PixAcc": "pixel_accuracy",
        "mIoU": "mIoU",
        "mAP": "mAP",
        "IoU bg": "IoU_background",
        "IoU obj": "IoU_object",
    }
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>9}" for name in columns)]
    for name, row in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{row[key]:>9.2f}" for key in columns.values()))
    return "\n".join(lines)


def plot_precision_recall(precision, recall, label, path):
    """Draw the curve over all pixels, of `utils.segmentation.Scores.precision_recall`."""
    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    axes.plot(recall[:-1], precision[:-1], label=words(label))
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.01))
    axes.legend(fontsize="small")
    save_figure(figure, path)


def save_segmentation(path, picture, mask, heat, thr):
    """Write a picture, its mask, the prediction heat > thr, and the heat over the picture as one .png.

    picture: [S, S, 3] in [0, 1].
    mask: [S, S] of 1, 0 and -1 (ignored, in grey).
    heat: [S, S] in [0, 1].
    """
    panels = [picture, mask_panel(mask), mask_panel(heat > thr), heat_panel(picture, heat)]
    panels = [np.pad(panel, ((2, 2), (2, 2), (0, 0)), constant_values=1) for panel in panels]
    strip = Image.fromarray((255 * np.concatenate(panels, axis=1)).round().astype(np.uint8))
    save_atomic(path, lambda file: strip.save(file, format="png"))


def mask_panel(mask):
    """Return a mask [S, S] of 1, 0 and -1 (ignored, in grey) as a picture [S, S, 3]."""
    return np.repeat(np.where(mask < 0, 0.5, mask)[..., None], 3, axis=-1)


def heat_panel(picture, heat):
    """Return a picture [S, S, 3] with a heat map [S, S] in [0, 1] over it."""
    return 0.5 * picture + 0.5 * pyplot.get_cmap("jet")(heat)[..., :3]


def plot_neuron(title, pictures, maps, sides, norms, threshold, norms_are=""):
    """Draw a neuron's card and return the figure.

    It shows the top images, bright where the neuron fires, the texts with signed coefficients, and the
    histogram of its norms.

    pictures: [n, S, S, 3] in [0, 1].
    maps: the neuron's post-GELU activations on their patches, at least 0, [n, rows, columns].
    sides: {title of the texts: [(text, coefficient), ...]}.
    norms: centred norm on every image, [images].
    threshold: the norm above which an effect is significant.
    norms_are: as in `utils.neurons.NeuronLayer`.
    """
    columns = min(len(pictures), 8)
    rows = -(-len(pictures) // columns)
    widths = [1.1 * columns, *[3.2] * len(sides), 3.2]
    size = (1.1 * columns + 3.2 * (len(sides) + 1), max(2.6, 1.15 * rows + 0.5))
    figure = pyplot.figure(figsize=size, layout="constrained")
    figure.suptitle(words(title), fontsize="medium")
    left, *middle, right = figure.subfigures(1, len(widths), width_ratios=widths)
    _draw_pictures(left.subplots(rows, columns, squeeze=False), pictures, maps)
    for part, (name, described) in zip(middle, sides.items(), strict=True):
        _draw_texts(part.subplots(), name, described)
    _draw_norms(right.subplots(), norms, threshold, norms_are)
    return figure


def _draw_pictures(grid, pictures, maps):
    """Draw pictures, each dark where its map is small beside the largest value of all maps."""
    top = float(maps.max()) or 1.0
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, picture, heat in zip(grid.flat, pictures, maps, strict=False):
        light = Image.fromarray((heat / top).astype(np.float32))
        light = light.resize(picture.shape[1::-1], Image.Resampling.BILINEAR)
        axes.imshow(picture * (0.3 + 0.7 * np.clip(np.asarray(light), 0, 1))[..., None])


def _draw_texts(axes, name, described):
    """Draw the coefficients of the texts of one side as bars, red where they are negative."""
    texts = [text for text, _ in described[::-1]]
    coefficients = [coefficient for _, coefficient in described[::-1]]
    colours = ["C3" if coefficient < 0 else "C0" for coefficient in coefficients]
    axes.barh(range(len(texts)), coefficients, color=colours)
    axes.set_yticks(range(len(texts)), map(words, texts), fontsize="x-small")
    axes.tick_params(axis="x", labelsize="x-small")
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_title(name, fontsize="small")


def _draw_norms(axes, norms, threshold, norms_are):
    """Draw the histogram of a neuron's norms, and the threshold, and say what the norms are about."""
    axes.hist(norms, bins=40, color="C7")
    axes.set_yscale("log")
    axes.axvline(threshold, color="C3", linewidth=1)
    axes.tick_params(labelsize="x-small")
    axes.set_title("centred norm over the images", fontsize="small")
    axes.set_xlabel(norms_are, fontsize="xx-small", wrap=True)
