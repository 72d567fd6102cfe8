# make demo    a decoupled network trained on handwritten digits, with a table and a picture
# make demo-distributed  the digits' network on three processes, none of which waits for another
# make demo-recurrent  an LSTM that copies what it saw windows ago: DNI beside BPTT, 2 minutes
# make test    the test suite, a sample of its tables: five minutes on two cores
# make test-all  every combination of them (TESTS='tests/test_sweep.py ...': of these files)
# make bench   the CPU benchmarks      make lint   ruff, clang-format, the README's tables
# make test-mutants  plants faults in the engine and the rules: each must be found
# make test-triton   Triton's tests with its newest release, beside the one that is installed
# make test-emulated a CUDA build of torch (6 GB, in build/), and device tests on an emulated GPU
# make gpu     on a machine with a CUDA GPU: builds for it, tests, measures (GPU=--quick: 8 minutes)
#
# PYTHON=python3.12   the interpreter that .venv is made from
# SYSTEM_TORCH=1      no .venv and no network: PYTHON's own packages (torch 2.11 or later, cmake,
#                     ninja, pybind11, pytest) are used and the extension is built in place

PYTHON ?= python3

# Tests on as many processors as there are, up to eight.
WORKERS := --numprocesses=auto --maxprocesses=8 --dist=worksteal

ifeq ($(SYSTEM_TORCH),1)
  RUN := PYTHONPATH='$(CURDIR)' $(PYTHON)
  BUILT := build/.in-place
  READY :=
  # Spread if PYTHON can.
  SPREAD = $(if $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && echo 1),$(WORKERS))
else
  RUN := .venv/bin/python
  SPREAD = $(WORKERS)
  BUILT := build/.installed
  READY := .venv/.requirements
  export PATH := $(CURDIR)/.venv/bin:$(PATH)
endif

SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo demo-recurrent demo-distributed test test-all test-mutants test-triton test-emulated bench gpu lint format build clean

demo: build
	$(RUN) examples/mnist_fcn.py

demo-recurrent: build
	$(RUN) examples/copy_task.py --seconds 30

demo-distributed: build
	OMP_NUM_THREADS=1 $(RUN) -m torch.distributed.run --standalone --nproc-per-node 3 \
	  examples/distributed_fcn.py

test: build
	$(RUN) -m pytest $(SPREAD)

test-all: build
	$(RUN) -m pytest --all $(SPREAD) $(TESTS)

test-mutants: build
	$(RUN) tests/mutants $(MUTANTS)

test-triton: build
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
	  --target build/triton triton
	PYTHONPATH=build/triton $(RUN) -c 'import triton; print("Triton", triton.__version__)'
	PYTHONPATH=build/triton $(RUN) -m pytest $(SPREAD) tests/test_triton.py \
	  tests/test_triton_compiled.py

# The newest torch that has a CUDA build for Python 3.11 in the mirrors; its Triton comes with it.
EMULATED_TORCH := torch==2.14.1
EMULATED := build/emulated/bin

test-emulated: build/emulated/.requirements
	PATH='$(CURDIR)/$(EMULATED)':$$PATH $(EMULATED)/python -m pytest $(SPREAD) \
	  tests/test_on_emulated_gpu.py

build/emulated/.requirements: Makefile requirements.txt
	$(PYTHON) -m venv build/emulated
	grep -vE '^(torch|triton|matplotlib|scikit-learn|-r)' requirements.txt >build/emulated/others.txt
	$(EMULATED)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  $(EMULATED_TORCH) -r build/emulated/others.txt
	@touch $@

bench: build
	$(RUN) -m benchmarks

# The architecture of the GPU at hand, and nothing else, as nvcc names it.
ARCHITECTURE = import sys, torch; \
  torch.cuda.is_available() or sys.exit("make gpu: torch sees no CUDA GPU"); \
  major, minor = torch.cuda.get_device_capability(); \
  major >= 8 or sys.exit(f"make gpu: the kernels are for sm_80 and later, this is sm_{major}{minor}"); \
  print(f"{major}{minor}" + "a" * (major == 9))

gpu: $(READY)
	@architecture=$$($(RUN) -c '$(ARCHITECTURE)') && \
	if [ "$$architecture" != "$$(cat build/.architecture 2>/dev/null)" ]; then rm -f $(BUILT); fi && \
	FASTDNI_CUDA=1 FASTDNI_CUDA_ARCHS=$$architecture $(MAKE) --no-print-directory build && \
	echo $$architecture >build/.architecture && \
	$(RUN) -m benchmarks.gpu $(GPU)

build: $(BUILT)

build/.in-place: $(SOURCES)
	$(PYTHON) setup.py --quiet build_ext --inplace
	@$(RUN) -m fastdni info | grep 'built with'
	@touch $@

build/.installed: .venv/.requirements $(SOURCES)
	.venv/bin/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@$(RUN) -m fastdni info | grep 'built with'
	@mkdir -p build && touch $@

# What is imported is compiled then: a small part of what is installed, which takes half as long.
.venv/.requirements: requirements.txt requirements-lint.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  -r requirements.txt
	@touch $@

ifeq ($(SYSTEM_TORCH),1)
LINT := $(PYTHON)
else
LINT := .venv/bin/python
lint format: .venv/.requirements
endif

lint:
	$(LINT) -m ruff check .
	$(LINT) -m ruff format --check .
	clang-format --dry-run --Werror $(CXX_FILES)
	$(LINT) -m benchmarks.readme --check

format:
	$(LINT) -m ruff check --fix .
	$(LINT) -m ruff format .
	clang-format -i $(CXX_FILES)

clean:
	rm -rf .venv build dist out *.egg-info fastdni/_C*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
