# `make demo` and `make test` set up .venv by themselves; everything else builds on it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# What the development environment pins; the package itself accepts torch>=2.10.
TORCH ?= torch==2.13.0
READY := $(VENV)/.ready
SOURCES := $(wildcard kernels/cpu/* kernels/cuda/* kernels/include/*) CMakeLists.txt setup.py pyproject.toml

.PHONY: setup test test-cpu test-interpret test-compiled test-emulation test-aot test-gpu lint docs demo examples bench clean

setup: $(READY)

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy
	touch $@

$(READY): $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/aefast train --model autoencoder --data patches --hidden 512 --latent 16 --epochs 10 --out runs/demo --overwrite

# Kernels, models, training and packaging on the CPU; then what needs a process or a compiler of its own.
test: setup test-cpu test-interpret test-compiled

# The lanes run on one thread each, so that processes share the cores; tests of threads ask for more by themselves. Two
# processes leave a quarter of two cores idle, while one of them waits for programs that its test has started.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 3

# A file's tests stay in one process, since some share what takes long to make.
test-cpu: setup
	$(PARALLEL) --dist loadfile --no-loadscope-reorder -m "not aot" \
	  --ignore=tests/aot --ignore=tests/cuda_emulation --ignore=tests/matrix_unit_emulation --ignore-glob='tests/ops/test_triton_*'

test-interpret: setup
	TRITON_INTERPRET=1 $(PARALLEL) tests/ops/test_triton_*.py

# What a compiler does without a GPU, or Intel's matrix unit: the emulations and code ahead of time. A class's tests stay
# in one process too.
COMPILED = $(PARALLEL) --dist loadscope tests/cuda_emulation tests/matrix_unit_emulation tests/bench/test_static.py \
  tests/aot

test-compiled: setup
	$(COMPILED)

test-emulation: setup
	$(COMPILED) -m "not aot"

test-aot: setup
	$(COMPILED) -m aot

test-gpu: setup
	$(BIN)/python -m pytest -q -m gpu

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# The site, into site/; what MkDocs warns of is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# Each prints its figures and leaves its picture in runs/.
examples: setup
	set -e; for example in examples/*.py; do echo "== $$example"; $(BIN)/python $$example; done

bench: setup
	$(BIN)/aefast bench --report bench/results

clean:
	rm -rf build dist site aefast/lib *.egg-info
