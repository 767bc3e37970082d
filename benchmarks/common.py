"""What every benchmark needs: timing, the peak memory of a process, the machine in words, tables on disk.

    from common import interleaved, measured, median, save_table

Importing this module puts the repository's root on the path, so that `utils` and `tests` are found from any folder.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
sys.path.insert(0, str(ROOT))
median = statistics.median


def bench_parser(description):
    """The parser of a benchmark; description is its docstring."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs; the figures mean nothing")
    return parser


def interleaved(functions, rounds, device="cpu"):
    """Time functions in turn, A B C A B C ..., so that a slow moment of the machine hits all: {name: [seconds per round]}."""
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


def measured(command):
    """Run a command in the repository's root: (output, seconds, peak bytes, stderr). Ends with its stderr if it fails.

    The peak is the larger of the main process's own high-water mark and the largest sum over it and its workers, in which
    shared pages are counted once (proportional set size). Where there is no /proc it is the largest single process.
    """
    command = [str(word) for word in command]
    peak = 0
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    texts = {}
    pipes = {name: getattr(process, name) for name in ("stdout", "stderr")}
    readers = [threading.Thread(target=lambda n=n, p=p: texts.update({n: p.read()})) for n, p in pipes.items()]
    for reader in readers:
        reader.start()
    look_at = start
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)  # its usage is of this process and its children alone
        if pid:
            break
        peak = max(peak, _kilobytes(f"/proc/{process.pid}/status", "VmHWM:"))
        began = time.perf_counter()
        if began > look_at:  # the sum walks page tables, a second and more for 30 GB: it may take a hundredth of the time
            peak = max(peak, sum(_kilobytes(f"/proc/{p}/smaps_rollup", "Pss:") for p in _family(process.pid)))
            look_at = began + max(1, 100 * (time.perf_counter() - began))
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    for reader in readers:
        reader.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nended with code {process.returncode}:\n{texts['stderr'][-2000:]}")
    if not peak:
        peak = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return texts["stdout"], seconds, 1024 * peak, texts["stderr"]


def looping(stderr):
    """Seconds that the progress bars of images in a stage's stderr have taken: what grows with the images, not the start-up."""
    total = last = 0
    for done, hours, minutes, seconds in re.findall(r" (\d+)/\d+ \[(?:(\d+):)?(\d+):(\d+)<[^]]*image", stderr):
        if done == "0":  # another bar begins
            total, last = total + last, 0
        last = 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds)
    return total + last


def _family(pid):
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        try:
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
        except OSError:
            pass  # it has just ended
    return found


def _kilobytes(file, key):
    try:
        return next((int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(key)), 0)
    except OSError:
        return 0


def machine(device="cpu"):
    """The machine in words: cores, threads, versions, device."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device).upper()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    return f"{name}, {platform.machine()}, {cores} cores, {torch.get_num_threads()} threads, {versions}"


def row(what, value, unit, bar=None, note=""):
    """One line of a table. bar: a number that the value must not exceed, or (number,) that it has to reach."""
    at_least = isinstance(bar, tuple)
    limit = bar[0] if at_least else bar
    held = None if bar is None else bool(value >= limit if at_least else value <= limit)
    return {"what": what, "value": float(value), "unit": unit, "at_least": at_least, "bar": limit, "held": held, "note": note}


def save_table(name, title, rows, args, device="cpu"):
    """Print the rows, and write results/NAME.json and .md (NAME_cuda on a GPU; quick ones go to results/quick)."""
    kind = torch.device(device).type
    name = name if kind == "cpu" else f"{name}_{kind}"
    folder = RESULTS / "quick" if args.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    table = {"title": title, "quick": args.quick, "machine": machine(device), "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    (folder / f"{name}.md").write_text(markdown(table))
    print(markdown(table))


def markdown(table):
    """A table as markdown; in a quick one no bar is judged."""
    lines = [f"### {table['title']}", "", table["machine"] + (" (quick: the figures mean nothing)" if table["quick"] else ""), ""]
    lines += ["| what | measured | bar | |", "|---|---|---|---|"]
    for item in table["rows"]:
        bar = "" if item["bar"] is None else f"{'≥' if item['at_least'] else '≤'} {item['bar']:g}"
        if item["held"] is not None and not table["quick"]:
            bar += ", held" if item["held"] else ", **missed**"
        value = f"{item['value']:.3g}" if abs(item["value"]) < 1000 else f"{item['value']:,.0f}"
        value = f"{value} {item['unit']}".rstrip()
        lines.append(f"| {item['what']} | {value} | {bar} | {item['note']} |")
    return "\n".join(lines) + "\n"
