# One environment, files of exact pins; every target sets up what it needs.
VENV := .venv
PYTHON ?= python3
export HF_HUB_OFFLINE ?= 1
PROCESSORS := $(VENV)/processors

.PHONY: setup setup-tests demo test test-long test-all bench gpu check lint types

setup: $(VENV)/.done

$(VENV)/.done: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "qmixlora needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --requirement requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps --editable .
	touch $@

setup-tests: $(PROCESSORS)/.done

# in a folder of its own, which the tests alone look into: see tests/processors/processor_packages.py
$(PROCESSORS)/.done: tests/processors/requirements.lock | $(VENV)/.done
	rm -rf $(PROCESSORS)
	$(VENV)/bin/pip install --quiet --no-deps --target $(PROCESSORS) --requirement $<
	touch $@

demo: setup
	$(VENV)/bin/qmixlora demo

test: lint types setup-tests  # what has to pass before every commit
	$(VENV)/bin/pytest -m "not long"

test-long: setup-tests
	$(VENV)/bin/pytest -m long

test-all: lint types setup-tests
	$(VENV)/bin/pytest

check: test

bench: setup  # runs that are there are kept; all of them anew take about a day on two cores
	$(VENV)/bin/python benchmarks/method.py run
	$(VENV)/bin/python benchmarks/method.py table

gpu: setup  # what wants a GPU, the most important first; what is there is kept; then docs/gpu.md
	$(VENV)/bin/python benchmarks/gpu.py run
	$(VENV)/bin/python benchmarks/gpu.py table

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: setup
	$(VENV)/bin/mypy
