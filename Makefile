# make train, make test: each makes its own virtual environment in .venv first.
#   make train ARGS="--latent-dim 2 --epochs 200"   flags of python -m jvae.experiments.mnist
#   make PYTHON=python3.13 check                     another interpreter

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test lint types check benchmark clean
.DELETE_ON_ERROR:

train: .venv/installed-experiments
	$(BIN)/python -m jvae.experiments.mnist $(ARGS)

check: lint types test

test: .venv/installed-dev
	$(BIN)/pytest $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

benchmark: .venv/installed-benchmark
	$(BIN)/python -m jvae.experiments.benchmark $(ARGS)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"jvae needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv .venv

.venv/installed-%: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[$*]'
	@touch $@
