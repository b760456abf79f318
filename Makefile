# One environment, one file of exact pins; every target sets up what it needs.
VENV := .venv
PYTHON ?= python3
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test bench check lint types unit

setup: $(VENV)/.done

$(VENV)/.done: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "qmixlora needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --requirement requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps --editable .
	touch $@

demo: setup
	$(VENV)/bin/qmixlora demo

test: lint types unit

bench: setup  # runs that are there are kept; all of them anew take about a day on two cores
	$(VENV)/bin/python benchmarks/method.py run
	$(VENV)/bin/python benchmarks/method.py table

check: test

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: setup
	$(VENV)/bin/mypy

unit: setup
	$(VENV)/bin/pytest
