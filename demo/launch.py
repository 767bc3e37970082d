"""Run commands as copies of one process that has imported everything.

Importing torch takes longer than most of the commands.
"""

import importlib
import multiprocessing
import os
import pkgutil
import runpy
import subprocess
import sys
import tempfile

import applications
import utils
from demo.layout import ROOT

FORK = None  # outside Linux it is missing or unsafe
if sys.platform == "linux":
    FORK = multiprocessing.get_context("fork")


def load_everything():
    """Import what the commands need. Only imports: threads do not survive a fork."""
    # The model is small: two threads would mostly wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if FORK is None:
        return
    importlib.import_module("demo.world")
    for package in (utils, applications):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def run(words):
    """Run `python WORDS` in the root folder; returns its exit code."""
    if FORK is None:
        return subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    child = FORK.Process(target=run_here, args=(words,))
    child.start()
    child.join()
    return child.exitcode


def run_here(words):
    """Do in this process what `python WORDS` does."""
    os.chdir(ROOT)
    sys.argv = words[1:] if words[0] == "-m" else words
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def run_together(function, items):
    """Call function(item), which returns an exit code, for all items at once. Returns the largest code.

    The output of the first call is seen at once, the output of the others when they have ended.
    """
    if FORK is None:
        return max(map(function, items))
    logs = [tempfile.TemporaryFile("w+") for _ in items[1:]]
    children = []
    for item, log in zip(items[1:], logs, strict=True):
        children.append(FORK.Process(target=run_logged, args=(function, item, log)))
        children[-1].start()
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
