"""Runs commands as copies of one process that has imported everything: importing torch takes longer than most
of them.
"""

import importlib
import multiprocessing
import os
import pkgutil
import runpy
import subprocess
import sys
import tempfile

import utils
from demo.layout import ROOT

FORK = (
    multiprocessing.get_context("fork") if sys.platform == "linux" else None
)  # elsewhere it is missing or unsafe


def load_everything():
    """Import what the commands need. Only imports: threads do not survive a fork."""
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # the model is small: two threads would mostly wait for each other
    if FORK is None:
        return
    for name in [*(module.name for module in pkgutil.walk_packages(utils.__path__, "utils.")), "demo.world"]:
        importlib.import_module(name)


def run(words):
    """Run `python WORDS` in the root folder; returns its exit code."""
    if FORK is None:
        return subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    child = FORK.Process(target=run_here, args=(words,))
    child.start()
    child.join()
    return child.exitcode


def run_here(words):
    """What `python WORDS` does, in this process."""
    os.chdir(ROOT)
    sys.argv = words[1:] if words[0] == "-m" else words
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def run_together(function, items):
    """Call function(item), which returns an exit code, for all items at the same time. Returns the largest
    code.

    What the first call prints is seen at once, what the others print when they have ended.
    """
    if FORK is None:
        return max(map(function, items))
    logs = [tempfile.TemporaryFile("w+") for _ in items[1:]]
    children = [
        FORK.Process(target=run_logged, args=(function, *pair)) for pair in zip(items[1:], logs, strict=True)
    ]
    for child in children:
        child.start()
    codes = [function(items[0])]
    for child, log in zip(children, logs, strict=True):
        child.join()
        log.seek(0)
        print(log.read(), flush=True)
        codes.append(child.exitcode)
    return max(map(abs, codes))


def run_logged(function, item, log):
    """Call function(item) with everything that is printed going to a file."""
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.exit(function(item))
