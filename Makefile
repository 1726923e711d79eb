# Needs only make and Python 3.11 or newer. Every target below makes the virtual environment it needs, once.

PYTHON ?= python3
VENV ?= .venv
# More arguments for pytest: make test ARGS='-k select --cov'
ARGS ?=
CHAOS ?= --rounds 100

PY = $(VENV)/bin/python
PIP = $(PY) -m pip install -q --disable-pip-version-check

.PHONY: help demo test lint types bench bench-detection chaos docs wheel clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo ## train, write to a real S3 server on this machine, then ls, inspect and check
	$(PY) examples/demo_on_s3.py

test: lint types ## lint, types and the whole test suite
	$(PY) -m pytest $(ARGS)

lint: $(VENV)/.dev ## ruff
	$(PY) -m ruff check .

# smdbg.cli and smdbg.rules live in folders of other names, so mypy gets one tree of links that has the real names.
types: $(VENV)/.dev ## mypy, strict
	@rm -rf build/types && mkdir -p build/types/smdbg
	@for item in smdbg/*; do ln -s "../../../$$item" build/types/smdbg/; done
	@ln -s ../../../cli ../../../rules build/types/smdbg/
	$(PY) -m mypy

bench: $(VENV)/.dev ## measure, and print the figures of benchmarks/RESULTS.md anew
	$(PY) benchmarks/run.py

bench-detection: $(VENV)/.dev ## train some 1,300 small models, healthy and faulty, and print what the rules find
	$(PY) -m benchmarks.detection

chaos: $(VENV)/.dev ## a hundred trainings under random faults: CHAOS='--rounds 1 --seed 7' repeats one
	$(PY) tests/chaos.py $(CHAOS)

docs: $(VENV)/.dev ## write the generated pages of docs/ anew
	$(PY) docs/generate.py

wheel: $(VENV)/.dev ## sdist and wheel in dist/
	$(PY) -m build

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist smdbg.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "smdbg needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "No virtual environment: on Debian and Ubuntu, install python3-venv." >&2; exit 1; }

# The stamps: what is installed is renewed only when these files change.
$(VENV)/.demo: setup.cfg pyproject.toml | $(PY)
	@echo "Installing what the demo needs into $(VENV) ..."
	@$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: setup.cfg pyproject.toml | $(PY)
	@echo "Installing what the tests need into $(VENV) ..."
	@$(PIP) -e '.[dev]'
	@touch $@
