# make demo    train and fill holes on drawn scenes, nothing downloaded but the requirements
# make test    the tests       make check   formatting, lint, types, and the tests
# make lint    the first three make format  reformat
# make soak    the tests that take minutes or hours

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Quiet, offline, and one thread a process: two spinning OpenMP teams on a busy machine take ten
# times as long.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test soak lint check format

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
