# One environment for all targets: .venv, made on demand. PYTHON=python3.12 make ... picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1# many processes share the cores, and waiting OpenMP threads spin

.PHONY: demo test lint matrix matrix-optimisations matrix-optimizers families styles soak bench test-211 clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q --durations=15 $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy tedcompile passes

# The whole product of models, meshes and cases.
matrix: $(VENV)/.installed
	$(BIN)/python -m tests.parity.matrix $(ARGS)

# The product of models and of optimisations that are left out or forced.
matrix-optimisations: $(VENV)/.installed
	$(BIN)/python -m tests.parity.matrix --optimisations $(ARGS)

# The product of optimizers, ZeRO stages and meshes.
matrix-optimizers: $(VENV)/.installed
	$(BIN)/python -m tests.parity.optimizers $(ARGS)

# Every MoE family of the installed transformers.
families: $(VENV)/.installed
	$(BIN)/python -m tests.parity.families $(ARGS)

# Every way to write an MoE block.
styles: $(VENV)/.installed
	$(BIN)/python -m tests.parity.styles_table $(ARGS)

# Ranks of a training run are killed at random moments, and it goes on.
soak: $(VENV)/.installed
	$(BIN)/python -m tests.soak $(ARGS)

# On a GPU: kernels, training steps and the optimizer beside their peers, and the README's tables.
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.moe_layer
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.optimizer
	$(BIN)/python -m benchmarks.plot
	$(BIN)/python -m benchmarks.readme

# The suite again on the oldest torch that the package allows.
test-211: .venv211/.installed
	.venv211/bin/python -m pytest -q --durations=15 $(ARGS)

clean:
	rm -rf .venv .venv211 build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch 2.11 comes with triton 3.6, whose interpreter knows numpy up to 2.3
.venv211/.installed: EDIT := s/^torch==.*/torch==2.11.0/; s/^numpy.*/numpy>=2.2,<2.4/
.venv/.installed .venv211/.installed: pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "No '$(PYTHON)' on this machine: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "'$(PYTHON)' is $$("$(PYTHON)" -V 2>&1), but Python 3.10 or newer is needed; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' cannot make virtual environments: install its venv module (Debian, Ubuntu: the package python3-venv)" >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || { echo "No C++ compiler '$(firstword $(CXX))' on this machine: TorchInductor needs one on CPUs; install g++, or set CXX" >&2; exit 1; }
	@"$(PYTHON)" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "'$(PYTHON)' has no Python.h, which TorchInductor compiles against: install its headers (Debian, Ubuntu: the package python3-dev)" >&2; exit 1; }
	"$(PYTHON)" -m venv $(@D)
	sed '$(EDIT)' constraints.txt >$(@D)/constraints.txt
	$(@D)/bin/python -m pip install --disable-pip-version-check -q -c $(@D)/constraints.txt -e '.[hf,triton,dev]' || { echo "The packages could not be installed (pip's message is above); they come from the package index, so check the network" >&2; exit 1; }
	@$(@D)/bin/python -m pip install --disable-pip-version-check -q -c $(@D)/constraints.txt -e '.[data,recipes]' || echo "Without the packages of the extras data and recipes their tests are skipped" >&2
	@touch $@
