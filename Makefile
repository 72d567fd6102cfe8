# make demo    a decoupled network trained on handwritten digits, with a table and a picture
# make test    the test suite            make test-all   with every combination
# make bench   the CPU benchmarks        make lint       ruff, clang-format, the README's tables
#
# PYTHON=python3.12   the interpreter that .venv is made from
# SYSTEM_TORCH=1      no .venv and no network: PYTHON's own packages (torch 2.11 or later, cmake,
#                     ninja, pybind11, pytest) are used and the extension is built in place

PYTHON ?= python3

ifeq ($(SYSTEM_TORCH),1)
  RUN := PYTHONPATH='$(CURDIR)' $(PYTHON)
  BUILT := build/.in-place
else
  RUN := .venv/bin/python
  BUILT := build/.installed
  export PATH := $(CURDIR)/.venv/bin:$(PATH)
endif

SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-all bench lint format build clean

demo: build
	$(RUN) examples/mnist_fcn.py

test: build
	$(RUN) -m pytest

test-all: build
	$(RUN) -m pytest --all

bench: build
	$(RUN) -m benchmarks

build: $(BUILT)

build/.in-place: $(SOURCES)
	$(PYTHON) setup.py --quiet build_ext --inplace
	@$(RUN) -m fastdni info | grep 'built with'
	@touch $@

build/.installed: .venv/.requirements $(SOURCES)
	.venv/bin/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@$(RUN) -m fastdni info | grep 'built with'
	@mkdir -p build && touch $@

.venv/.requirements: requirements.txt requirements-lint.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
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
