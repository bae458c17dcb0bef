# Everything runs in .venv; nothing is installed twice: the stamps below are newer than all they depend on.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A process for each core, each with one thread; the tests of a file stay together and share what they build,
# and the files come in the order of tests/conftest.py.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
PYTEST_ARGS ?=
BENCH_ARGS ?= --models r50-single-scale,r50-single-scale-dc5,r50,r50-refine,r50-two-stage,tiny --image-size 800x1066 --rounds 5

# All that the installed package is made of.
SOURCES := pyproject.toml $(wildcard setup.py) $(shell find csrc src -type f -not -name '*.pyc' 2>/dev/null)
CXX_SOURCES := $(shell find csrc tests/native -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' \) 2>/dev/null)

.PHONY: help install demo test test-all lint format bench clean

help:
	@echo 'make demo      install, then box the objects in examples/images into out/'
	@echo 'make test      install with the test extra, then run the tests (under 10 minutes)'
	@echo 'make test-all  the same with the slow tests: sanitizers, kill loops, soaks (under 25 minutes)'
	@echo 'make lint      ruff, mypy, clang-format'
	@echo 'make bench     time every model on this machine into bench.json'
	@echo 'make install   only create .venv and install ddetr into it'
	@echo 'make clean     remove .venv and everything the other targets wrote'
	@echo 'Another interpreter: make PYTHON=python3.12 demo'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'make: $(PYTHON) is older than 3.11. Name a newer one: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install .
	@touch $@

$(VENV)/.installed-test: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install '.[test]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-lint: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install '.[test,lint]'
	@touch $(VENV)/.installed $(VENV)/.installed-test $@

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/ddetr detect examples/images --model demo --output out --overwrite
	@echo 'The pictures are in out/annotated, the boxes in out/detections.json.'

test: $(VENV)/.installed-test
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test
	$(PYTEST) $(PYTEST_ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/.installed
	$(BIN)/ddetr bench $(BENCH_ARGS) --json bench.json

clean:
	rm -rf $(VENV) build dist out bench.json .mypy_cache .pytest_cache .ruff_cache
