"""Frame every benchmark, and share timing in turns, processes with their peak memory, inputs and tables.

A benchmark is three functions, which `run` calls:

    set_up(args, folder)    make the case, outside of the time; folder: temporary
    measure(args, case)     time the case
    table(args, found)      return the `Table` of the measurements
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils.runtime.results import Results, model_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
median = statistics.median


class Table(NamedTuple):
    """A `Table` is the result of a benchmark.

    name: name of its files.
    title: its heading.
    rows: list of rows, made by `row`.
    """

    name: str
    title: str
    rows: list


def bench_parser(description, device=True):
    """Return the parser of a benchmark, with the flags that all have.

    description: docstring of the benchmark.
    device: whether there is a choice of devices.
    """
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=as_written)
    help = "tiny sizes, to see that everything runs; the figures mean nothing"
    parser.add_argument("--quick", action="store_true", help=help)
    if device:
        parser.add_argument("--device", default="cpu")
    parser.set_defaults(device="cpu")
    help = "where photos and results are put for the time of the run; default: the temporary folder"
    parser.add_argument("--tmp", help=help)
    return parser


def run(parser, set_up, measure, table, quick):
    """Run a benchmark and save its table. quick: {flag: value} that --quick sets."""
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.CRITICAL)  # open_clip's notes
    if args.quick:
        args = argparse.Namespace(**{**vars(args), **quick})
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        found = measure(args, set_up(args, Path(folder)))
    save_table(table(args, found), args)


# time


def interleaved(functions, rounds, device="cpu"):
    """Time functions in turn, A B C A B C ..., so that a slow moment of the machine hits all.

    Returns {name: [seconds per round]}.
    """
    seconds = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(times, reference):
    """Return the median over the rounds of the ratio within a round."""
    return median(a / b for a, b in zip(times, reference, strict=True))


# processes


class Process(NamedTuple):
    """A `Process` is one that has ended."""

    output: str
    errors: str
    seconds: float
    peak: float  # memory, bytes


def measured(*words):
    """Run python with some words in the repository's root. Ends with its stderr if it fails.

    The peak is the larger of the main process's own high-water mark and the largest sum over it and its
    workers, in which shared pages are counted once (proportional set size). Where there is no /proc it is the
    largest single process.
    """
    command = [sys.executable, *map(str, words)]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=errors)
        ended, peak = _watch(process.pid)
        seconds = time.perf_counter() - start
        for file in (output, errors):
            file.seek(0)
        printed = output.read()
        complaint = errors.read()
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nended with code {process.returncode}:\n{complaint[-2000:]}")
    largest = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Process(printed, complaint, seconds, peak or largest)


def _watch(pid):
    """Wait for a process to end. Returns the answer of `os.wait4`, and the peak of its memory."""
    peak = 0
    look_at = 0
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        peak = max(peak, 1024 * kilobytes(pid, "status", "VmHWM"))
        now = time.perf_counter()
        # The sum walks page tables, a second and more for 30 GB: it may take a hundredth of the time
        if now > look_at:
            peak = max(peak, memory_of(pid))
            look_at = now + max(1, 100 * (time.perf_counter() - now))
        time.sleep(0.02)
    return ended, peak


def memory_of(pid):
    """Return the bytes of a process and its descendants, shared pages counted once."""
    return 1024 * sum(kilobytes(relative, "smaps_rollup", "Pss") for relative in _family(pid))


def kilobytes(pid, file, key):
    """Return a number of /proc/PID/FILE, 0 when it is not there."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def _family(pid):
    """List a process and its descendants."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):  # it has just ended
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
    return found


def stage(script, *flags):
    """Run a stage script as `measured` does."""
    return measured(f"{script}.py", *flags)


def stage_of_few(few, script, *flags):
    """Run a stage whose preliminary mean is of `few` images at least: so few images take one pass, too."""
    changed = "import utils.top_effects as module; module.FEW = int(sys.argv.pop(1))"
    run = f"import runpy, sys; {changed}; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return measured("-c", run, few, f"{script}.py", *flags)


def alone(function, **arguments):
    """Call a benchmark's function in a process of its own. Returns its result (by json) and the `Process`.

    arguments: numbers, strings, lists of them.
    """
    module = sys.modules[function.__module__].__spec__.name  # the name behind __main__
    call = f"print(json.dumps({function.__name__}(**{arguments!r})))"
    process = measured("-c", f"import json; from {module} import {function.__name__}; {call}")
    return json.loads(process.output.splitlines()[-1]), process


def bars(errors, title=""):
    """List the seconds that each progress bar of images has taken. errors: stderr. title: of some bars."""
    found = []
    before = f"{title}: [^]]*" if title else ""
    pattern = before + r" (\d+)/\d+ \[(?:(\d+):)?(\d+):(\d+)<[^]]*image"
    for done, hours, minutes, seconds in re.findall(pattern, errors):
        if done == "0":
            found.append(0)
        found[-1] = 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds)
    return found


def looping(errors):
    """Return the seconds that all progress bars of images have taken: they grow with the images.

    errors: stderr of a stage.
    """
    return sum(bars(errors))


# inputs


def write_photos(root, images, splits=("train", "val"), **options):
    """Write a tree of class folders by `tests.photos.write_photos`, `images` photos in every split.

    Returns the root.
    """
    from tests import photos  # here, because scikit-learn would count as memory of all processes

    classes = len(photos.SYNSETS)
    if images % classes:
        sys.exit(f"error: {images} images cannot be divided into {classes} classes; give a multiple")
    return photos.write_photos(root, splits, per_class=images // classes, **options)


def save_unit_vectors(path, count, width, columns=False):
    """Save random unit vectors [count, width] in place of text vectors, or [width, count] of a classifier."""
    vectors = np.random.default_rng(0).standard_normal((count, width), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(path, vectors.T if columns else vectors)


def real_size_inputs(args, folder, words):
    """Write photos of both splits, a random classifier [D, 1000] and random vectors [texts, D] of some words.

    Returns the folder of the photos, and the `Results` of the stages.

    args: flags, with model, images, val_images.
    """
    from utils.model.clip import load_clip  # here, because open_clip would count as memory of all processes

    photos = folder / "photos"
    results = Results(folder / "out", args.model, "random")
    results.directory.mkdir()
    for split, images in (("train", args.images), ("val", args.val_images)):
        write_photos(photos, images, (split,))
    width = load_clip(args.model, "random", "cpu", image_only=True).vit.D
    texts = results.path("texts", texts="words")
    save_unit_vectors(results.path("classifier", dataset="imagenet"), 1000, width, columns=True)
    save_unit_vectors(texts, len(words), width)
    texts.with_suffix(".txt").write_text("".join(f"{word}\n" for word in words))
    return photos, results


# tables


def row(what, value, unit="", *, at_most=None, at_least=None, note=""):
    """Return a row of a table. at_most, at_least: the bar, one of them or none."""
    bar = at_most if at_least is None else at_least
    held = None if bar is None else bool(value <= bar if at_least is None else value >= bar)
    found = {"what": what, "value": float(value), "unit": unit}
    return {**found, "at_least": at_least is not None, "bar": bar, "held": held, "note": note}


def of_model(name, model):
    """Return the name of a table: other models than ViT-B-32 have tables of their own."""
    return name if model == "ViT-B-32" else f"{name}_{model_name(model)}"


def save_table(table, args):
    """Print a table, and write results/NAME.json and .md.

    NAME has _cuda on a GPU; quick tables go to results/quick.
    """
    kind = torch.device(args.device).type
    name = table.name if kind == "cpu" else f"{table.name}_{kind}"
    folder = RESULTS / "quick" if args.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    content = {"title": table.title, "quick": args.quick, "machine": machine(args.device), "rows": table.rows}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (folder / f"{name}.md").write_text(markdown(content))
    print(markdown(content))


def machine(device="cpu"):
    """Describe the machine in words: cores, threads, versions, device."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device).upper()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    return f"{name}, {platform.machine()}, {cores} cores, {torch.get_num_threads()} threads, {versions}"


def markdown(table):
    """Return a saved table as markdown; in a quick one no bar is judged."""
    quick = " (quick: the figures mean nothing)" if table["quick"] else ""
    lines = [f"### {table['title']}", "", table["machine"] + quick, ""]
    lines += ["| what | measured | bar | |", "|---|---|---|---|"]
    for item in table["rows"]:
        bar = "" if item["bar"] is None else f"{'≥' if item['at_least'] else '≤'} {item['bar']:g}"
        if item["held"] is not None and not table["quick"]:
            bar += ", held" if item["held"] else ", **missed**"
        value = f"{item['value']:.3g}" if abs(item["value"]) < 1000 else f"{item['value']:,.0f}"
        value = f"{value} {item['unit']}".rstrip()
        lines.append(f"| {item['what']} | {value} | {bar} | {item['note']} |")
    return "\n".join(lines) + "\n"
