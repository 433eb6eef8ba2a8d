# make demo    train and fill holes on drawn scenes, nothing downloaded but the requirements
# make test    the tests       make check   formatting, lint, types, and the tests
# make lint    the first three make format  reformat
# make soak    the tests that take minutes or hours
# make bench-env   the environment of benchmarks.e2e, outside of the project: 6 GB

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Where benchmarks.e2e looks for it.
BENCH_ENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/controlnet-inpainting/bench-env

# Quiet, offline, and one thread a process: two spinning OpenMP teams on a busy machine take ten
# times as long.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test soak lint check format bench-env

$(INSTALLED): requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m demo

test: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile

soak: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -m soak

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint test

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-env: $(BENCH_ENV)/.installed

$(BENCH_ENV)/.installed: requirements.txt benchmarks/requirements-e2e.txt
	test -x $(BENCH_ENV)/bin/python || $(PYTHON) -m venv $(BENCH_ENV)
	$(BENCH_ENV)/bin/python -m pip install --quiet -r benchmarks/requirements-e2e.txt
	touch $@
