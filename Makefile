# Each makes its own virtual environment in .venv first: make train, make test,
#   make train ARGS="--latent-dim 2 --epochs 200"   flags of python -m jvae.experiments.mnist
#   make figures                                    from the records, in folders named as their studies
#   make PYTHON=python3.13 check                    another interpreter

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
.PHONY: train test lint types check benchmark figures clean

train: $(VENV)/installed-experiments
	$(BIN)/python -m jvae.experiments.mnist $(ARGS)

check: lint types test
test: $(VENV)/installed-dev
	$(BIN)/pytest -n auto --dist worksteal $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

benchmark: $(VENV)/installed-benchmark
	$(BIN)/python -m jvae.experiments.benchmark $(ARGS)

figures: $(VENV)/installed-experiments
	@status=0; for dir in $(wildcard experiments/aevb/*/); do \
	  $(BIN)/python -m jvae.experiments.$$(basename $$dir) --redraw --out $$dir || status=$$?; done; exit $$status

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"jvae needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[$*]'
	@touch $@
