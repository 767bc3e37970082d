# make setup | demo | paper | test | lint | bench      All of them make .venv first where it is not there.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup demo paper test lint bench

setup: $(VENV)/.done

$(VENV)/.done: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 10) else 'error: Python 3.10 or newer is needed; try make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

demo: setup
	$(RUN) -m demo.run_demo

paper: setup
	$(RUN) -m demo.run_paper

test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: setup
	$(RUN) -m benchmarks.run
