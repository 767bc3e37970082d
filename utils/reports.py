"""Say what the evaluation of descriptions has found: tables and sentences, the .csv, .json and .png."""

import csv
import io
import json

import numpy as np

from utils import grading
from utils.figures import plot_grades
from utils.runtime.files import read_json, save_atomic, save_json
from utils.runtime.results import PAIRS, RANDOM
from utils.units import ACTS, word_of

WRITES = {"second": "writes", "total": "total"}  # names of the texts that neurons write, by their order


def judged_by(side, compared):
    """Return the `Compared` by which a side's descriptions are judged; None where there are no controls.

    side: 'fires_on', by the correlation, or 'writes', by the share of the component.
    compared: {(side, measure): Compared}.
    """
    found = compared.get((side, grading.JUDGED_BY[side]))
    return found if found is not None and len(found.controls) > 1 else None


def save_neurons(path, found, explained, described, acts=None, word="neuron"):
    """Write the .csv of all neurons of a layer: their grades, and the texts of both sides as json.

    found: `LayerResults`.
    explained: [N].
    described: {side: descriptions, as `load_descriptions` returns them}.
    acts: on how many images units act, [N]; the grades of those that act on few are left out. None for all.
    word: for a neuron, or what is in its place.
    """
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    columns = {
        f"{row} {m}": found.graded.of(row, m) for row in found.graded.rows for m in found.graded.measures
    }
    kept = np.ones(len(explained), bool) if acts is None else acts >= ACTS
    columns |= columns_of(found.only(kept).compared, kept)
    if found.deleted is not None:
        columns |= columns_of_deletion(found.deleted, len(explained))
    first = [] if acts is None else ["images on which it acts"]
    table.writerow([word, "explained", *first, *columns, *described])
    for n, values in enumerate(zip(*columns.values(), strict=True)):
        cells = [cell_of(x) if kept[n] else "" for x in values]
        if acts is not None:
            cells.insert(0, str(acts[n]))
        sides = [[[text, round(c, 6)] for _, c, text in of[n]] for of in described.values()]
        texts = [json.dumps(side, ensure_ascii=False) for side in sides]
        table.writerow([n, f"{explained[n]:.4f}", *cells, *texts])
    save_atomic(path, lambda out: out.write(file.getvalue().encode()))


def save_lines(path, found, about, described, acts=None):
    """Write what is known of every unit of a layer as a line of JSON, for notebooks of other projects.

    A line has what is in `about`, the number of the unit, on how many images it acts, its texts and
    coefficients, its grades (null for NaN), and whether the texts of a side say more than random directions
    (null where it is not graded, or there were no controls). Texts that do not are left out, and so are those
    of units that act on few images.

    found: `LayerResults`.
    about: {key: value} that all lines have.
    described, acts: as in `save_neurons`.
    """
    graded = found.graded
    columns = {f"{row} {m}": graded.of(row, m) for row in graded.rows for m in graded.measures}
    kept = np.ones(len(graded.values), bool) if acts is None else acts >= ACTS
    of_kept = found.only(kept).compared
    columns |= columns_of(of_kept, kept)
    better = {side: judged_by(side, of_kept) for side in grading.JUDGED_BY}
    better = {
        side: everywhere(of.better().any(axis=1), kept) for side, of in better.items() if of is not None
    }
    lines = []
    for n in range(len(graded.values)):
        line = {**about, "unit": n, "images": None if acts is None else int(acts[n])}
        for side, texts in described.items():
            known = side in better and kept[n]
            over_noise = bool(better[side][n]) if known else None
            named = kept[n] and over_noise is not False
            line[side] = [[text, round(c, 6)] for _, c, text in texts[n]] if named else []
            line[f"{side}_over_noise"] = over_noise
        line["grades"] = {name: number_of(of[n]) for name, of in columns.items()} if kept[n] else None
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False))
    save_atomic(path, lambda out: out.write(("\n".join(lines) + "\n").encode()))


def number_of(value):
    """Return a grade for JSON: a truth as it is, None for NaN."""
    if isinstance(value, np.bool_):
        return bool(value)
    return round(float(value), 4) if np.isfinite(value) else None


def everywhere(values, kept):
    """Return values of graded units, as those of all units [N, ...]: NaN, or False, for the others.

    values: [graded units, ...]. kept: which are graded, bool [N].
    """
    found = np.full((len(kept), *values.shape[1:]), np.nan if values.dtype.kind == "f" else 0, values.dtype)
    found[kept] = values
    return found


def columns_of(compared, kept):
    """Return {name: [N]}: grades by number of texts, means of their controls, whether they are better.

    compared: {(side, measure): Compared} of the units that are graded. kept: which these are, bool [N].
    """
    found = {}
    for (side, measure), of in compared.items():
        if len(of.controls) < 2:
            continue
        better = of.better()
        for j, m in enumerate(of.lengths):
            name = f"{side} {measure} {m} {'texts' if m > 1 else 'text'}"
            found[name] = of.texts[:, j]
            found[f"{name}, control"] = of.controls[..., j].mean(axis=0)
            found[f"{name}, better than noise"] = better[:, j]
    return {name: everywhere(values, kept) for name, values in found.items()}


def cell_of(value):
    """Return a number of the .csv in words: 1 or 0 for a truth, nothing for NaN."""
    if isinstance(value, np.bool_):
        return str(int(value))
    return "" if np.isnan(value) else f"{value:.4f}"


def columns_of_deletion(deleted, neurons):
    """Return {name: [N]}: grades by deletion, NaN for neurons that were not drawn. deleted: `Deleted`."""
    found = {f"deletion {row}": values for row, values in deleted.rows.items()}
    for order, of in deleted.compared.items():
        for j, m in enumerate(of.lengths):
            name = f"deletion {WRITES[order]} {m} {'texts' if m > 1 else 'text'}"
            found[name] = of.texts[:, j]
            found[f"{name}, control"] = of.controls[..., j].mean(axis=0)
    columns = {}
    for name, values in found.items():
        columns[name] = np.full(neurons, np.nan, np.float32)
        columns[name][deleted.neurons] = values
    return columns


def finish(stage, found):
    """Write the .csv of every layer. found: {layer: LayerResults}."""
    for layer, of in found.items():
        units = stage.units[layer][0]
        path = stage.path("grades", stage.held_out, layer=layer)
        sides = stage.sides(units, stage.results)
        acts = stage.acts(units)
        word = word_of(stage.clip)
        save_neurons(path.with_suffix(".csv"), of, stage.explained(layer), sides, acts, word)
        if stage.clip.units is not None:
            about = {"units": stage.results.units, "site": stage.clip.units.site(layer), "layer": layer}
            save_lines(path.with_suffix(".jsonl"), of, about, sides, acts)


def report(path, stage, found):
    """Write the summary of some layers at `path` (.json) and a .png beside; return lines of text.

    found: {layer: LayerResults}. Units that act on few images are counted, and left out.
    """
    graded = {layer: stage.graded(stage.units[layer][0]) for layer in found}
    found = {layer: of.only(graded[layer]) for layer, of in found.items()}
    tables = {str(layer): table_of(of) for layer, of in found.items()}
    noise = {str(layer): noise_of(of) for layer, of in found.items()}
    made_of = {**stage.clip.record, **stage.names, **stage.held_out.record}
    made_of |= {"coefficient": stage.args.coefficient, "controls": stage.args.controls}
    made_of["rotated_units"] = stage.args.rotated_units
    deleted = {str(layer): of_deletion(of.deleted) for layer, of in found.items() if of.deleted}
    content = {"neurons": tables, "over_noise": noise, "deletion": deleted}
    weighted = {}
    if stage.clip.units is not None:
        for layer, of in found.items():
            weighted[str(layer)] = weighted_means(stage, of, graded[layer], layer)
        counts = {str(layer): [int(kept.sum()), len(kept)] for layer, kept in graded.items()}
        content |= {"unit_set": stage.results.units, "graded": counts, "weighted_by_energy": weighted}
    save_json(path, {**made_of, "layers": list(found), **content})
    plot_grades(found, path.with_suffix(".png"))
    lines = []
    for layer, of in found.items():
        lines += ["", *lines_of_table(layer, tables[str(layer)])]
        if weighted:
            lines += lines_of_units(stage, layer, graded[layer], weighted[str(layer)])
        lines += lines_of_noise(layer, of)
    return lines


def weighted_means(stage, found, graded, layer):
    """Return {row: {measure: mean}} over units, weighted by the energy of their effects; {} without.

    found: `LayerResults` of the graded units of a layer. graded: which these are, bool [N].
    """
    energy = stage.energy(stage.units[layer][0])
    if energy is None or not energy[graded].sum():
        return {}
    weights = energy[graded] / energy[graded].sum()
    means = (found.graded.values.astype(np.float64) * weights[:, None, None]).sum(axis=0)
    measures = found.graded.measures
    rows = zip(found.graded.rows, means, strict=True)
    return {row: dict(zip(measures, map(float, of), strict=True)) for row, of in rows}


def lines_of_units(stage, layer, graded, weighted):
    """Return the lines that a table of other units than neurons has besides: the units, and their controls.

    graded: which units are graded, bool [N]. weighted: as `weighted_means` returns it.
    """
    name = stage.results.units
    lines = [f"{len(graded)} units of {name}: {int(graded.sum())} are graded"]
    if not graded.all():
        lines[0] += f", {int((~graded).sum())} act on fewer than {ACTS} training images"
    width = max(map(len, grading.ROWS.values())) + 14
    for row in (row for row in ("writes", "fires_on", "one_fired_on", "wpmi") if row in weighted):
        cells = "".join(f"{value:>17.3f}" for value in weighted[row].values())
        lines.append(f"{grading.ROWS[row]}, by energy".ljust(width) + cells)
    for other, (units, table) in tables_beside(stage, layer).items():
        if table is None:
            how = "without --units" if units is None else f"with --units {units}"
            lines.append(f"{other} are not graded yet beside these units: run this command {how}, too")
            continue
        for row in (row for row in ("fires_on", "one_fired_on") if row in table):
            cells = "".join(f"{value['mean']:>17.3f}" for value in table[row].values())
            lines.append(f"{other}: {grading.ROWS[row]}".ljust(width) + cells)
    return lines


def tables_beside(stage, layer):
    """Return {what: (units, table)} of the controls of units; None for a table that there is not."""
    names = stage.of(stage.held_out, layer=[layer])
    given = stage.args.unit_set
    others = {"neurons": None}
    if given != PAIRS and not given.startswith(RANDOM):
        others["random dictionaries"] = f"{RANDOM}{given}"
    found = {}
    for other, units in others.items():
        path = stage.results.looking_at(units).find("graded", **names)
        table = None
        if path.is_file():
            summary = read_json(path, "the summary of grades", "make it again with --overwrite")
            table = summary["neurons"].get(str(layer))
        found[other] = (units, table)
    return found


def table_of(found):
    """Return the summary of a layer's table, {row: {measure: numbers}}, with the rotated units as rows."""
    table = grading.summary(found.graded.values, found.graded.rows, found.graded.measures)
    if found.rotated is not None:
        of_rotated = grading.summary(found.rotated.values, found.rotated.rows, found.rotated.measures)
        table |= {f"rotated_{row}": of_rotated[row] for row in grading.ROTATED if row in of_rotated}
    return table


def noise_of(found):
    """Return the summary of a layer's grades by number of texts, {side: {measure: columns}}."""
    summary = {}
    for (side, measure), of in found.compared.items():
        if len(of.controls) < 2:
            continue
        columns = columns_by_length(of, found.rotated_compared.get((side, measure)))
        summary.setdefault(side, {})[measure] = columns
        if measure == grading.JUDGED_BY.get(side):
            place = of.justified()
            summary[side]["justified"] = 0 if place is None else of.lengths[place]
    return summary


def columns_by_length(compared, rotated=None):
    """Return {name: a number for every number of texts}, over neurons. compared, rotated: `Compared`."""
    texts, control = compared.mean()
    columns = {"grade": texts, "control": control}
    if compared.measure != "auprc":
        columns["skill"] = compared.skill()
    columns |= {"better": compared.better().mean(axis=0), "better_by_chance": compared.by_chance()}
    if rotated is not None:
        columns["rotated"] = rotated.texts.mean(axis=0)
    rounded = {name: [round(float(x), 6) for x in values] for name, values in columns.items()}
    return {"texts": compared.lengths, **rounded}


def lines_of_table(layer, table):
    """Return the lines of the table of a layer's grades, and what does not tell neurons from a null."""
    width = max(map(len, grading.ROWS.values())) + 2
    measures = next(iter(table.values()))
    title = f"layer {layer}, means over neurons".ljust(width)
    lines = [title + "".join(f"{name:>17}" for name in measures)]
    for row, measured in table.items():
        cells = (f"{value['mean']:.3f} ± {value['error']:.3f}" for value in measured.values())
        lines.append(grading.ROWS[row].ljust(width) + "".join(f"{cell:>17}" for cell in cells))
    blind = grading.blind_measures(table)
    for row, names in blind.items():
        lines.append(f"{', '.join(names)}: not higher than for rotated units ({grading.ROWS[row]})")
    return lines


def lines_of_noise(layer, found):
    """Return what descriptions have over noise: tables by number of texts, and a sentence for each side."""
    lines = []
    for (side, measure), of in found.compared.items():
        if len(of.controls) < 2:
            continue
        lines += lines_of_lengths(side, of, found.rotated_compared.get((side, measure)))
    lines += lines_of_deletion(found)
    for side in grading.JUDGED_BY:
        of = judged_by(side, found.compared)
        if of is not None:
            lines.append(f"layer {layer}, {in_words(side, of)}")
    return lines


def of_deletion(deleted):
    """Return the summary of a layer's `Deleted`: means and errors of its rows, and columns by texts."""
    rows = {row: {"mean": float(of.mean()), "error": error_of(of)} for row, of in deleted.rows.items()}
    compared = {WRITES[order]: columns_by_length(of) for order, of in deleted.compared.items()}
    return {"neurons": len(deleted.neurons), "rows": rows, **compared}


def lines_of_deletion(found):
    """Return the table of what says what happens without a neuron. found: `LayerResults`."""
    if found.deleted is None:
        return []
    rows = found.deleted.rows.items()
    said = ", ".join(f"{grading.DELETED[row]} {of.mean():.3f} ± {error_of(of):.3f}" for row, of in rows)
    lines = [f"{len(found.deleted.neurons)} neurons deleted; {grading.MEASURE_NAMES['deletion']}: {said}"]
    for order, of in found.deleted.compared.items():
        lines += lines_of_lengths(WRITES[order], of, None)
    return lines


def error_of(values):
    """Return the standard error of a mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def lines_of_lengths(side, compared, rotated):
    """Return the lines of a table by number of texts. compared, rotated: `Compared`; rotated may be None."""
    columns = columns_by_length(compared, rotated)
    lengths = columns.pop("texts")
    names = {"grade": "texts", "better_by_chance": "by chance"}
    lines = [f"{grading.COMPARED[side]}, {grading.MEASURE_NAMES[compared.measure]}: number of texts"]
    lines.append(" " * 12 + "".join(f"{m:>8}" for m in lengths))
    for name, values in columns.items():
        lines.append(f"  {names.get(name, name):<10}" + "".join(f"{x:>8.3f}" for x in values))
    return lines


def in_words(side, compared):
    """Say how many texts of a side are justified, and for what share of the neurons they are over noise."""
    name = grading.COMPARED[side]
    place = compared.justified()
    if place is None:
        most = 100 * compared.better().mean(axis=0).max()
        chance = 100 * compared.by_chance().mean()
        passing = f"at most {most:.0f} % of the neurons pass, by chance {chance:.0f} %"
        return f"{name}: no more than random directions say. No number of texts is justified; {passing}."
    m = compared.lengths[place]
    share = 100 * compared.better()[:, place].mean()
    chance = 100 * compared.by_chance()[place]
    texts = "1 text is" if m == 1 else f"{m} texts are"
    skill = f"skill {compared.skill()[place]:.2f}"
    better = f"better than noise for {share:.0f} % of the neurons (by chance {chance:.0f} %)"
    return f"{name}: {texts} justified with this pool ({skill}), {better}."


def lines_of_pools(layer, pools):
    """Return a table of text sets at equal lengths. pools: {text set: LayerResults}, of a layer."""
    lines = []
    for side, measure in grading.JUDGED_BY.items():
        of_side = {name: judged_by(side, found.compared) for name, found in pools.items()}
        of_side = {name: of for name, of in of_side.items() if of is not None}
        if not of_side:
            continue
        width = max(max(map(len, of_side)), 10) + 2
        what = f"{grading.COMPARED[side]}, {grading.MEASURE_NAMES[measure]}"
        lines.append(f"layer {layer}, {what}: texts, control, skill, share better than noise")
        lengths = sorted({m for of in of_side.values() for m in of.lengths})
        lines.append(" " * width + "".join(f"{m:>26}" for m in lengths))
        for name, of in of_side.items():
            columns = zip(*of.mean(), of.skill(), of.better().mean(axis=0), strict=True)
            cells = dict(zip(of.lengths, columns, strict=True))
            row = ("  ".join(f"{x:.2f}" for x in cells[m]) if m in cells else "" for m in lengths)
            lines.append(name.ljust(width) + "".join(f"{cell:>26}" for cell in row))
    return lines
