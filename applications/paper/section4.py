"""Make the tables and figures about second-order effects (section 4 of the paper and its appendix).

The paper's values are those of ViT-B-32 with OpenAI's weights on ImageNet, unless the item says otherwise.
"""

import shutil

import numpy as np
import scipy.sparse
import torch

from applications.paper import measures
from applications.paper.figures import plot_lines
from applications.paper.noise import summary
from applications.paper.registry import Row, chance_of, item, train, val, without, write_csv
from utils.ablation import accuracies
from utils.controls import CONTROLS, control_dictionary
from utils.data.text_sets import load_texts
from utils.descriptions import load_descriptions, load_support
from utils.figures import save_figure
from utils.neurons import NeuronLayer
from utils.omp import PURSUED, make_atoms, nested_fits, orthogonal_matching_pursuit, rebuilt_from
from utils.runtime.errors import UserError

TOP_IMAGES = 16  # of a neuron in Fig. 5
EXPLAINED = {"indirect": 11.0, "second-order": 48.2}  # of Table 1; the second is over all train images


# Table 1


@item(
    "table1",
    "Accuracy and variance explained: direct, second-order and indirect effects of one layer",
    "one",
    passes=lambda p: 4 * train(p) + 3 * val(p) + 2 * p.args.drawn_neurons * p.args.drawn_images,
    disk=lambda p: p.drawn_on_disk([p.layer]),
    seed="the layer's number, of the drawn neurons",
)
def table1(paper):
    """Make Table 1."""
    layer = paper.layer
    table, _, _ = paper.accuracies([layer])
    first = paper.first_order
    indirect = first[f"indirect {layer}"]
    second = table[layer]["without all effects"]
    of = {"beside": chance_of(paper), "n": val(paper)}
    rows = [
        Row("accuracy, nothing ablated", table[layer]["baseline"], **of),
        Row(f"accuracy without the indirect effects of layer {layer}", indirect, 52.3, **of),
        Row(f"accuracy without the second-order effects of layer {layer}", second, 29.6, **of),
    ]
    if f"mlp {layer}" in first:
        direct = first[f"mlp {layer}"]
        rows.append(Row(f"accuracy without the direct effects of layer {layer}", direct, **of))
    return [*rows, *rows_of_drawn(paper), row_of_all_neurons(paper)], []


def rows_of_drawn(paper):
    """Return the rows about the variance that the first components of drawn neurons explain."""
    neurons, effects = paper.drawn(paper.layer)
    images = len(effects)
    k = min(paper.k, images)
    rows = []
    for kind in ("indirect", "second-order", "direct"):
        own = np.asarray(effects[:, measures.KINDS.index(kind)], np.float64)
        if not own.any():  # a tower without direct effects
            continue
        note = "drawn neurons, drawn images"
        if kind == "direct":
            note = "a number times one direction, and a share of the bias"
        for limit in (k, None):
            shares = [measures.explained(own[:, n], limit) for n in range(len(neurons))]
            which = f"all {images}" if limit is None else f"the {k} largest"
            what = f"{kind} effects, {which} of {images} images"
            published = EXPLAINED["indirect"] if kind == "indirect" and limit == k else None
            of = {"beside": least(paper, limit or images), "n": len(neurons), "note": note}
            rows.append(row_of_variance(what, shares, published, of))
    return rows


def row_of_all_neurons(paper):
    """Return the row about the variance that the first components of all neurons explain."""
    k = paper.k
    shares = paper.results.load("explained", layer=paper.layer, **paper.names())
    what = f"second-order effects, the {k} largest of all train images"
    of = {"beside": least(paper, k), "n": len(shares), "note": "all neurons"}
    return row_of_variance(what, shares, EXPLAINED["second-order"], of)


def row_of_variance(what, shares, published, of):
    """Return a row about explained variance. shares: of every neuron. of: the other fields of the row."""
    what = f"variance explained by the first component: {what}"
    return Row(what, 100 * float(np.mean(shares)), published, **of)


def least(paper, images):
    """Return the share of the variance that a first component explains at least, in words."""
    return f"at least {100 / min(images, paper.clip.vit.D):.2g} %"


# ablations by layer


def by_layer(paper, layers, name, **more):
    """Make the rows and the picture of the ablations of some layers. more: as for `Paper.accuracies`."""
    table, images, picture = paper.accuracies(layers, **more)
    shutil.copy(picture, paper.picture(name))
    beside = chance_of(paper)
    rows = []
    for layer, measured in table.items():
        for what, value in measured.items():
            rows.append(Row(f"layer {layer}: {what}", value, n=images, beside=beside))
    return rows, [paper.picture(name)]


def passes_by_layer(paper):
    """Return how many images go through the tower for the ablations of all layers."""
    return 2.6 * train(paper) + 2 * val(paper)


@item("fig3", "Ablations of second-order effects, layer by layer", "all", passes_by_layer)
def fig3(paper):
    """Make Fig. 3."""
    return by_layer(paper, paper.all_layers, "fig3")


def other_than_large(paper):
    """Return what Fig. 9 lacks."""
    large = "it is Fig. 3 of another model: add --model ViT-L-14 --pretrained laion2b_s32b_b82k --memory 16"
    return "" if paper.args.model == "ViT-L-14" else large


@item("fig9", "Ablations of ViT-L-14, layer by layer", "all", passes_by_layer, lacks=other_than_large)
def fig9(paper):
    """Make Fig. 9."""
    return by_layer(paper, paper.all_layers, "fig9")


@item(
    "fig10",
    "Ablations on ImageNet-R, layer by layer",
    "all",
    passes=lambda p: 6000,
    lacks=without("imagenet_r", "it needs ImageNet-R: --imagenet_r PATH"),
)
def fig10(paper):
    """Make Fig. 10."""
    return by_layer(paper, paper.all_layers, "fig10", dataset="imagenet_r", data_path=paper.args.imagenet_r)


# Fig. 4


@item(
    "fig4",
    "Accuracy by the number of texts that describe a neuron",
    "one",
    val,
    seed="0 of the random texts, 0, 1, ... of the control dictionaries",
)
def fig4(paper):
    """Make Fig. 4. Raises UserError when it can be made with none of the text sets."""
    counts = {m for m in paper.args.counts if m <= paper.args.components}
    counts = sorted(counts | {paper.args.components})
    measured = {}
    refused = {}
    for texts in paper.texts:
        try:
            measured[texts] = by_number_of_texts(paper, texts, counts)
        except UserError as error:
            refused[texts] = str(error)
    if not measured:
        raise UserError(next(iter(refused.values())))
    rows = []
    curves = {}
    for texts in paper.texts:
        if texts in refused:
            rows.append(Row(f"{texts}: left out", None, note=refused[texts]))
            continue
        values, control, random, component = measured[texts]
        curves[texts] = values
        curves[f"{texts}, random directions in their place"] = control
        curves[f"{texts}, chosen at random"] = random
        curves["first components"] = dict.fromkeys(counts, component)
        for m in counts:
            what = f"{texts}, {m} text{'s' if m > 1 else ''}"
            beside = f"control {control[m]:.1f} %, random texts {random[m]:.1f} %"
            beside += f", first components {component:.1f} %"
            rows.append(Row(what, values[m], n=val(paper), beside=beside))
    plot_lines(curves, "texts for a neuron", "accuracy (%)", paper.picture("fig4"))
    return rows, [paper.picture("fig4")]


def by_number_of_texts(paper, texts, counts):
    """Measure the accuracy with effects rebuilt from texts, of one pursuit.

    texts: name of the text set.
    counts: numbers of texts for a neuron.

    Returns {count: accuracy} of the texts, of control dictionaries (the mean) and of random texts, and the
    accuracy with the first components.
    """
    layer = paper.layer
    paper.descriptions(texts, [layer])
    path = paper.results.path("decomposition", layer=layer, **paper.names(**paper.described(texts)))
    support = torch.from_numpy(load_support(path.with_suffix(".npz")))
    pool, atoms = atoms_of(paper, texts)
    by_chance = np.random.default_rng(0).integers(0, len(pool), support.shape)
    pcas = torch.from_numpy(paper.results.load("pca", layer=layer, **paper.names()))
    vectors = [rebuilt_from(by_chance[:, :m], atoms, pcas) for m in counts]
    for chosen, own in ((support, atoms), *controls_of(paper, texts, pcas)):
        vectors += rebuilt_by_length(chosen, own, pcas, counts)
    vectors = [each.to(paper.clip.device) for each in (*vectors, pcas)]
    found, labels = paper.predictions(f"fig4_{texts}_controls", layer, vectors)
    [values] = accuracies(found[:, None], labels)
    random, own, *controls = np.reshape(values[:-1], (-1, len(counts)))
    each = (own, np.mean(controls, axis=0), random)
    curves = [dict(zip(counts, map(float, curve), strict=True)) for curve in each]
    return *curves, values[-1]


def controls_of(paper, texts, pcas):
    """Yield the support [N, S] and atoms of every control dictionary of a text set. pcas: [N, D]."""
    _, vectors, _ = load_texts(paper.results, texts, paper.args.descriptions_dir, lambda: paper.clip)
    for seed in range(CONTROLS):
        atoms = make_atoms(100 * control_dictionary(torch.from_numpy(vectors), seed))
        support, _ = orthogonal_matching_pursuit(atoms, pcas, min(paper.args.components, len(atoms)))
        yield support, atoms


def rebuilt_by_length(support, atoms, pcas, counts):
    """Return what the first m atoms of a pursuit rebuild of every component, a list of [N, D] by m."""
    blocks = []
    for n in torch.arange(len(pcas)).split(PURSUED):
        coefficients, _ = nested_fits(support[n], atoms, pcas[n], counts)
        chosen = atoms[support[n].clamp_min(0)].double()
        blocks.append(torch.einsum("lns,nsd->lnd", coefficients, chosen).float())
    return list(torch.cat(blocks, dim=1))


def atoms_of(paper, texts):
    """Return the texts of a text set, and the atoms [texts, D] that neurons are decomposed into."""
    found, vectors, _ = load_texts(paper.results, texts, paper.args.descriptions_dir, lambda: paper.clip)
    return found, make_atoms(torch.from_numpy(vectors))


# Tables 2 and 5


@item(
    "table2",
    "Texts of single neurons (Tables 2 and 5), and of all neurons of the layer",
    "one",
    seed="0 of the random texts, 0, 1, ... of the control dictionaries",
)
def table2(paper):
    """Make Tables 2 and 5, and a .csv of all neurons."""
    layer = paper.layer
    texts = paper.texts[0]
    paper.descriptions(texts, [layer])
    names = paper.names(**paper.described(texts))
    described = load_descriptions(paper.results, layer=layer, **names)
    left, control, chance = left_by_texts(paper, texts)
    path = paper.folder / f"neurons_{layer}_{texts}.csv"
    listed = []
    for n, entries in enumerate(described):
        for rank, (_, c, text) in enumerate(entries):
            listed.append([layer, n, f"{left[n]:.4f}", rank, f"{c:.6f}", text])
    write_csv(path, ["layer", "neuron", "unexplained", "rank", "coefficient", "text"], listed)
    norms = paper.results.load("norm", layer=layer, **paper.names())
    unit = "|r - texts|"
    rows = []
    for n in paper.neurons_or(np.argsort(-norms.mean(axis=1), kind="stable")[:8]):
        words = ", ".join(f"{'' if c > 0 else '-'}{text}" for _, c, text in described[n][:8])
        beside = f"control {control[n]:.2f}, random texts {chance[n]:.2f}"
        rows.append(Row(f"neuron {n}: {words}", float(left[n]), unit=unit, beside=beside, n=1))
    what = f"all {len(left)} neurons, mean; every text in {path.name}"
    beside = f"control {control.mean():.2f}, random texts {chance.mean():.2f}"
    return [*rows, Row(what, float(left.mean()), unit=unit, beside=beside, n=len(left))], []


def left_by_texts(paper, texts):
    """Return how much of every component of the layer is left, a norm [N], by three sources of texts.

    They are the texts, control dictionaries (the mean), and random texts.
    """
    layer = paper.layer
    pcas = torch.from_numpy(paper.results.load("pca", layer=layer, **paper.names()))
    path = paper.results.path("decomposition", layer=layer, **paper.names(**paper.described(texts)))
    matrix = scipy.sparse.load_npz(path.with_suffix(".npz"))
    _, atoms = atoms_of(paper, texts)
    by_chance = np.random.default_rng(0).integers(0, len(atoms), (len(pcas), paper.args.components))
    random = rebuilt_from(by_chance, atoms, pcas)
    written = torch.from_numpy(matrix @ atoms.numpy())
    found = controls_of(paper, texts, pcas)
    controls = [rebuilt_by_length(*own, pcas, [paper.args.components])[0] for own in found]
    left = [(pcas - rebuilt).norm(dim=1).numpy() for rebuilt in (written, random, *controls)]
    return left[0], np.mean(left[2:], axis=0), left[1]


# Fig. 5


@item(
    "fig5",
    "Val images of the largest effects (Figs. 5, 13 and 14)",
    "one",
    val,
    disk=lambda p: p.effects_on_disk(),
    seed="0, of the chance level",
)
def fig5(paper):
    """Make Figs. 5, 13 and 14."""
    split = paper.args.split
    paper.grades(paper.texts[0], [paper.layer])
    words = ["--mlp_layer", paper.layer, "--keep", "full"]
    paper.stages.run("compute_second_order_neuron_prs.py", *paper.stages.images(split), *words)
    images = paper.images(split).images
    given = {"layer": paper.layer, "described": paper.described(paper.texts[0]), "k": paper.k}
    neurons = NeuronLayer(paper.clip, paper.results, images, **given)
    count = min(TOP_IMAGES, len(images))
    beside = f"any {count} images {share_by_chance(images.labels, count):.1f} %"
    rows = []
    pictures = []
    for n in paper.neurons_or(neurons.largest(4)):
        pictures.append(paper.picture(f"fig5_neuron_{n}"))
        save_figure(neurons.card(n, pictures=count), pictures[-1])
        classes = images.labels[neurons.top_images(n, count, by="projection")]
        share = 100 * float(np.bincount(classes).max() / count)
        what = f"neuron {n}: share of the most frequent class in the {count} top images"
        rows.append(Row(what, share, beside=beside, n=count))
    return rows, pictures


def share_by_chance(labels, count):
    """Return the mean share of the most frequent label among `count` images, over 1,000 draws (%)."""
    draws = np.random.default_rng(0).permuted(np.tile(labels, (1000, 1)), axis=1)[:, :count]
    return 100 * np.mean([np.bincount(draw).max() for draw in draws]) / count


# first order, and deletion


def without_first_order(paper):
    """Return what Figs. 11 and 12 lack."""
    if paper.clip.vit.pooling.has_first_order:
        return ""
    return "this model pools its tokens by attention, so there is no first order"


@item(
    "fig11",
    "First-order parts by layer, alone and accumulated (Figs. 11 and 12)",
    passes=lambda p: train(p) + val(p),
    lacks=without_first_order,
)
def fig11(paper):
    """Make Figs. 11 and 12."""
    first = paper.first_order
    layers = range(paper.clip.vit.L)
    curves = {}
    for kind in ("attention", "mlp"):
        curves[f"without {kind} of the layer"] = {l: first[f"{kind} {l}"] for l in layers}
        curves[f"without {kind} of all layers up to it"] = {l: first[f"{kind} up to {l}"] for l in layers}
    plot_lines(curves, "layer", "accuracy (%)", paper.picture("fig11"))
    beside = f"{chance_of(paper)}, nothing ablated {first['baseline']:.1f} %"
    rows = []
    for name, curve in curves.items():
        for l, value in curve.items():
            rows.append(Row(f"layer {l}: {name}", value, n=val(paper), beside=beside))
    return rows, [paper.picture("fig11")]


@item(
    "causal",
    "Do the effects say what happens when a neuron is deleted? (not in the paper)",
    "all",
    passes=lambda p: (
        2 * train(p) + 2 * val(p) + p.args.drawn_neurons * p.args.drawn_images * len(p.all_layers)
    ),
    disk=lambda p: p.drawn_on_disk(p.all_layers),
    seed="the layer's number, of the drawn neurons",
)
def causal(paper):
    """Make the figure of effects and deletion, and set the grades of components by deletion beside."""
    rows = []
    curves = {}
    graded = summary(paper, paper.texts[0])["deletion"]
    for layer in paper.all_layers:
        _, effects = paper.drawn(layer)
        for kind, (own, other) in agreements(effects).items():
            mean = float(np.mean(own))
            curves.setdefault(kind, {})[layer] = mean
            what = f"layer {layer}: correlation of {kind} effects with what is lost"
            beside = f"another neuron's {np.mean(other):.3f}"
            if kind == "second-order" and str(layer) in graded:
                component = graded[str(layer)]["rows"]["component"]["mean"]
                beside += f"; its component, by deletion {component:.3f}"
            rows.append(Row(what, mean, unit="", beside=beside, n=len(own)))
    plot_lines(curves, "MLP layer", "correlation with deletion", paper.picture("causal"))
    return rows, [paper.picture("causal")]


def agreements(effects):
    """Compare effects [images, 4, n, D] with what deleting the neurons does.

    Returns {kind: (the correlation of every neuron, that with what deleting the next neuron does)}.
    """
    *kinds, _ = measures.KINDS
    truth = np.asarray(effects[:, len(kinds)])
    found = {}
    for i, kind in enumerate(kinds):
        own = np.asarray(effects[:, i])
        if not own.any():  # a tower without direct effects
            continue
        neurons = range(own.shape[1])
        each = [measures.agreement(own[:, n], truth[:, n]) for n in neurons]
        other = [measures.agreement(own[:, n], truth[:, (n + 1) % len(neurons)]) for n in neurons]
        found[kind] = (each, other)
    return found
