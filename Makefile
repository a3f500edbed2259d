# Everything from a fresh clone: `make demo` and `make test` make their own environment first.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin

.PHONY: demo gpu test lint types unit oldest format site notebooks release clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   what longer sleep buys: shipped models answer, then two are trained (minutes on 2 cores)"
	@echo "make test   lint, types and tests, with the newest packages"
	@echo "make gpu    all that is to be measured on a GPU, in 12 minutes; goes on where it was"
	@echo "make oldest tests with the lower bound of every package (nox --list: other environments)"
	@echo "make format rewrite the sources the way the linter wants them"
	@echo "make site   the documentation as pages: site/index.html"
	@echo "make notebooks  execute docs/notebooks and write their outputs anew"
	@echo "make release    wheel and sdist in dist/, tried in an empty environment"

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lmsleep needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# What is never imported need not be compiled.
$(VENV)/.base: $(VENV)/.made pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --no-compile -c $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --no-compile -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

demo: $(VENV)/.base
	$(BIN)/lmsleep demo

# With the PyTorch of PYTHON, if it has one; what else is missing comes from PyPI, or from the wheels in WHEELS.
GPU ?= .gpu

$(GPU)/.made: pyproject.toml
	$(PYTHON) -m benchmarks.gpu.environment $(GPU) $(addprefix --wheels ,$(WHEELS))
	touch $@

gpu: $(GPU)/.made
	PYTHONPATH=src $(GPU)/bin/python -m benchmarks gpu $(OPTIONS)

test: lint types unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	$(BIN)/pytest -n 2 --dist worksteal --durations=25

oldest: $(VENV)/.dev
	CONSTRAINTS=$(CONSTRAINTS) $(BIN)/nox --session oldest

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

site: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

notebooks: $(VENV)/.dev
	$(BIN)/python docs/hooks/notebooks.py

release: $(VENV)/.dev
	$(BIN)/python tools/release.py $(CONSTRAINTS)

clean:
	rm -rf $(VENV) $(GPU) .nox dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
