"""The frame of every benchmark, and what they share: timing in turns, processes with their peak memory,
inputs, tables.

A benchmark is three functions, which `run` calls:

    set_up(args, folder)    make what is measured, outside of the time; folder: temporary
    measure(args, case)     time it; case: what set_up returned
    table(args, found)      the `Table`; found: what measure returned
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
    """What a benchmark found. name: of its files. rows: list of what `row` gives."""

    name: str
    title: str
    rows: list


def bench_parser(description, device=True):
    """The parser of a benchmark, with the flags that all have. description: its docstring. device: whether it
    has a choice.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, to see that everything runs; the figures mean nothing",
    )
    if device:
        parser.add_argument("--device", default="cpu")
    parser.set_defaults(device="cpu")
    parser.add_argument(
        "--tmp",
        help="where photos and results are put for the time of the run; default: the temporary folder",
    )
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
    """Time functions in turn, A B C A B C ..., so that a slow moment of the machine hits all: {name: [seconds
    per round]}.
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
    """Median over the rounds of the ratio within a round."""
    return median(a / b for a, b in zip(times, reference, strict=True))


# processes


class Process(NamedTuple):
    """A process that has ended: what it printed, seconds, peak memory in bytes."""

    output: str
    errors: str
    seconds: float
    peak: float


def measured(*words):
    """Run python with some words in the repository's root. Ends with its stderr if it fails.

    The peak is the larger of the main process's own high-water mark and the largest sum over it and its
    workers, in which shared pages are counted once (proportional set size). Where there is no /proc it is the
    largest single process.
    """
    command, peak, look_at = [sys.executable, *map(str, words)], 0, 0
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=errors)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            peak, now = max(peak, 1024 * kilobytes(process.pid, "status", "VmHWM")), time.perf_counter()
            if (
                now > look_at
            ):  # the sum walks page tables, a second and more for 30 GB: it may take a hundredth of the time
                peak = max(peak, memory_of(process.pid))
                look_at = now + max(1, 100 * (time.perf_counter() - now))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        for file in (output, errors):
            file.seek(0)
        printed, complaint = output.read(), errors.read()
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nended with code {process.returncode}:\n{complaint[-2000:]}")
    return Process(
        printed, complaint, seconds, peak or usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    )


def memory_of(pid):
    """Bytes of a process and its descendants, shared pages counted once."""
    return 1024 * sum(kilobytes(relative, "smaps_rollup", "Pss") for relative in _family(pid))


def kilobytes(pid, file, key):
    """A number of /proc/PID/FILE; 0 when it is not there."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def _family(pid):
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):  # it has just ended
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
    return found


def stage(script, *flags):
    """Run a stage script as `measured` does."""
    return measured(f"{script}.py", *flags)


def alone(function, **arguments):
    """Call a benchmark's function in a process of its own: (what it returned, as json has it; the `Process`).

    arguments: numbers, strings, lists of them.
    """
    module = sys.modules[function.__module__].__spec__.name  # the name behind __main__
    call = f"print(json.dumps({function.__name__}(**{arguments!r})))"
    process = measured("-c", f"import json; from {module} import {function.__name__}; {call}")
    return json.loads(process.output.splitlines()[-1]), process


def bars(errors):
    """Seconds that each progress bar of images in a stage's stderr has taken, a list."""
    found = []
    for done, hours, minutes, seconds in re.findall(
        r" (\d+)/\d+ \[(?:(\d+):)?(\d+):(\d+)<[^]]*image", errors
    ):
        if done == "0":
            found.append(0)
        found[-1] = 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds)
    return found


def looping(errors):
    """Seconds that the progress bars of images in a stage's stderr have taken: what grows with the images,
    not the start-up.
    """
    return sum(bars(errors))


# inputs


def write_photos(root, images, splits=("train", "val"), **options):
    """Write a tree of class folders, `images` photos in every split, as `tests.photos.write_photos` does.
    Returns the root.
    """
    from tests import photos  # here, because scikit-learn would count as memory of all processes

    if images % len(photos.SYNSETS):
        sys.exit(
            f"error: {images} images cannot be divided into {len(photos.SYNSETS)} classes; give a multiple"
        )
    return photos.write_photos(root, splits, per_class=images // len(photos.SYNSETS), **options)


def save_unit_vectors(path, count, width, columns=False):
    """Save random unit vectors in place of text vectors [count, width], or as columns [width, count] of a
    classifier.
    """
    vectors = np.random.default_rng(0).standard_normal((count, width), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(path, vectors.T if columns else vectors)


def real_size_inputs(args, folder, words):
    """Photos of both splits, a random classifier [D, 1000] and random vectors [texts, D] of some words; the
    folder of the photos,
    and the `Results` of the stages. args: with model, images, val_images."""
    from utils.model.clip import load_clip  # here, because open_clip would count as memory of all processes

    photos, results = folder / "photos", Results(folder / "out", args.model, "random")
    results.directory.mkdir()
    for split, images in (("train", args.images), ("val", args.val_images)):
        write_photos(photos, images, (split,))
    width, texts = (
        load_clip(args.model, "random", "cpu", image_only=True).vit.D,
        results.path("texts", texts="words"),
    )
    save_unit_vectors(results.path("classifier", dataset="imagenet"), 1000, width, columns=True)
    save_unit_vectors(texts, len(words), width)
    texts.with_suffix(".txt").write_text("".join(f"{word}\n" for word in words))
    return photos, results


# tables


def row(what, value, unit="", *, at_most=None, at_least=None, note=""):
    """A row of a table. at_most, at_least: the bar, one of them or none."""
    bar = at_most if at_least is None else at_least
    held = None if bar is None else bool(value <= bar if at_least is None else value >= bar)
    found = {"what": what, "value": float(value), "unit": unit}
    return {**found, "at_least": at_least is not None, "bar": bar, "held": held, "note": note}


def of_model(name, model):
    """Name of a table: other models than ViT-B-32 have tables of their own."""
    return name if model == "ViT-B-32" else f"{name}_{model_name(model)}"


def save_table(table, args):
    """Print a table, and write results/NAME.json and .md (NAME_cuda on a GPU; quick ones go to
    results/quick).
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
    """The machine in words: cores, threads, versions, device."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device).upper()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    return f"{name}, {platform.machine()}, {cores} cores, {torch.get_num_threads()} threads, {versions}"


def markdown(table):
    """A saved table as markdown; in a quick one no bar is judged."""
    lines = [
        f"### {table['title']}",
        "",
        table["machine"] + (" (quick: the figures mean nothing)" if table["quick"] else ""),
        "",
    ]
    lines += ["| what | measured | bar | |", "|---|---|---|---|"]
    for item in table["rows"]:
        bar = "" if item["bar"] is None else f"{'≥' if item['at_least'] else '≤'} {item['bar']:g}"
        if item["held"] is not None and not table["quick"]:
            bar += ", held" if item["held"] else ", **missed**"
        value = f"{item['value']:.3g}" if abs(item["value"]) < 1000 else f"{item['value']:,.0f}"
        value = f"{value} {item['unit']}".rstrip()
        lines.append(f"| {item['what']} | {value} | {bar} | {item['note']} |")
    return "\n".join(lines) + "\n"
