# Both targets set themselves up in .venv/: Python 3.11, a package registry, nothing else.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-vllm lint clean

demo: .venv/core
	$(BIN)/mllm-audio demo --out runs/demo

test: .venv/dev lint
	$(BIN)/python -m pytest

# The served models, through the real engine: an environment of its own, .venv-vllm.
test-vllm:
	cd integrations/vllm && $$(../../scripts/vllm_environment.sh test)/bin/python -m pytest

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Stamps: rebuilt when the project's dependencies change. torch comes first and pinned, so that a
# machine that offers a CPU build of it gets that one.
.venv/core: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/dev: .venv/core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-vllm build *.egg-info .mypy_cache .ruff_cache .pytest_cache
