# make demo   train by plain and by decorrelated backpropagation on real images, side by side
# make test   the test suite          make bench  speed against the alternatives
# make test-hostile   errors, signals, threads, broken files, long runs: many seeded cases, counted
# make bench-check   in three minutes: has anything become slower than the committed results?
# make cuda   compiles the CUDA kernels for this clone (nvcc), compares what they need with its limits
# make device-check   on a machine with a GPU: everything about every kernel, in under ten minutes
# make lint   style, types, and what imports what; make format mends what it can
# Each sets up the environment in .venv first. To use one of yours: make test VENV=path
PYTHON ?= python3
VENV ?= .venv
# On a machine without a GPU, plain torch from PyPI brings along gigabytes of CUDA libraries: name
# a CPU build here if you have one at hand, e.g. make demo TORCH="torch --index-url URL".
TORCH ?= torch==2.13.0
JOBS ?= 2
BIN = $(abspath $(VENV))/bin
CPP = $(shell find csrc tests examples -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h')
READY = $(VENV)/.dbp-kernels-installed

.PHONY: demo test test-all test-hostile bench bench-check cuda device-check lint format clean

demo: $(READY)
	rm -rf runs/demo
	$(BIN)/python -m experiments queue demo --here --results runs/results

# One thread a process: the tests are small, and run side by side.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) -m "not slow and not hostile"

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) -m "not hostile"

# MINUTES=60: as long as that, with further seeds.
test-hostile: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) tests/hostile --minutes $(or $(MINUTES),0)

bench: $(READY)
	$(BIN)/python -m bench --save

bench-check: $(READY)
	$(BIN)/python -m bench check

cuda: $(READY)
	$(BIN)/python csrc/build.py --in-place
	$(BIN)/python csrc/resources.py build/cuda --limits tests/backends/cuda/limits.json

# With the CUDA kernels where they can be compiled.
device-check: $(READY)
	if command -v nvcc >/dev/null; then $(BIN)/python csrc/build.py --in-place; fi
	$(BIN)/python -m bench device-check first rest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

$(READY): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e ".[experiments,bench,test,dev]"
	touch $@

clean:
	rm -rf build dbp_kernels/backends/cuda/*.so *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
