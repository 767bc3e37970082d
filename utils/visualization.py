"""Pictures and tables of results."""

import matplotlib

matplotlib.use("Agg", force=False)
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen first, so that no screen is needed)

from utils.artifacts import save_atomic  # noqa: E402


def accuracy_table(table):
    """A plain-text table of {layer: {name: per cent}}."""
    names = list(next(iter(table.values())))
    width = max(len(name) for name in names)
    lines = [" " * 6 + "  ".join(f"{name:>{width}}" for name in names)]
    lines += [f"{layer:>5} " + "  ".join(f"{row[name]:>{width}.2f}" for name in names) for layer, row in table.items()]
    return "\n".join(["layer, accuracy in per cent", *lines])


def plot_ablations(table, path):
    """Accuracies {layer: {name: per cent}} as a line per ablation over the layers, or as bars where there is one layer."""
    layers, names = list(table), list(next(iter(table.values())))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if len(layers) == 1:
        axes.barh(names[::-1], [table[layers[0]][name] for name in names[::-1]], color="C0")
        axes.set_xlabel(f"accuracy, layer {layers[0]} (%)")
    else:
        for name in names:
            axes.plot(layers, [table[layer][name] for layer in layers], marker="o", label=name)
        axes.set_xlabel("MLP layer")
        axes.set_ylabel("accuracy (%)")
        axes.legend(fontsize="small")
    save_figure(figure, path)


def save_figure(figure, path):
    """Write a figure as .png in one step, the same bytes for the same figure, and close it."""
    save_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120, metadata={"Software": None}))
    plt.close(figure)
