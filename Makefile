# One environment, and one of the oldest releases; files of exact pins; every target sets up what it needs.
VENV := .venv
PYTHON ?= python3
export HF_HUB_OFFLINE ?= 1
PROCESSORS := $(VENV)/processors
OLDEST := .venv-oldest
# another Python than the environment's, where there is one
PYTHON_OLDEST ?= $(firstword $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null \
	|| ls $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12*/bin/python 2>/dev/null || echo $(PYTHON)))

.PHONY: setup setup-tests setup-oldest demo test test-long test-exhaustive test-all test-oldest audit docs release-check bench gpu check lint types

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

setup-oldest: $(OLDEST)/.done

$(OLDEST)/.done: requirements-oldest.lock pyproject.toml
	$(PYTHON_OLDEST) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --no-cache-dir --requirement requirements-oldest.lock
	$(OLDEST)/bin/pip install --quiet --no-deps --editable .
	touch $@

demo: setup
	$(VENV)/bin/qmixlora demo

FAST := -m "not long and not exhaustive"

test: lint types setup-tests  # what has to pass before every commit
	$(VENV)/bin/pytest $(FAST)

test-long: setup-tests
	$(VENV)/bin/pytest -m long

test-exhaustive: setup-tests  # before a release
	$(VENV)/bin/pytest -m exhaustive

test-all: lint types setup-tests
	$(VENV)/bin/pytest

docs: setup $(VENV)/docs/.done  # the site, in build/site; an environment of its own
	mkdir -p build && $(VENV)/bin/qmixlora recipes schema > build/schema.json
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict --quiet

$(VENV)/docs/.done: requirements-docs.lock | $(VENV)/.done
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/pip install --quiet --requirement $<
	touch $@

RELEASE := build/release
release-check: docs  # the wheel alone, in a clean environment, from a folder without the sources: demo and report
	rm -rf $(RELEASE) && mkdir -p $(RELEASE)
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir $(RELEASE) .
	$(PYTHON) -m venv $(RELEASE)/venv
	$(RELEASE)/venv/bin/pip install --quiet --requirement requirements.lock
	$(RELEASE)/venv/bin/pip install --quiet --no-deps $(RELEASE)/*.whl
	$(RELEASE)/venv/bin/pip check
	cd $(RELEASE) && venv/bin/qmixlora recipes list --vram 12
	cd $(RELEASE) && venv/bin/qmixlora demo train.max_steps=50 export.polish=0 && venv/bin/qmixlora report demo/run

audit: setup  # known holes in the pinned releases; asks the network, and fails where it gets no answer
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet pip-audit
	$(VENV)/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement requirements.lock

# the lower bounds of pyproject.toml; about 3 GB to download, 6 GB on the disk. TESTS: some of the fast tests alone
test-oldest: setup-oldest
	$(OLDEST)/bin/pytest $(FAST) $(TESTS)

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
