# The two commands of the README, and what they are made of.
PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN ?= runs/demo

.PHONY: help setup demo demo-cascade test test-slow test-parity lint

help:
	@echo "make demo         set up, train the demo on the embedded data, draw held-out captions"
	@echo "make demo-cascade after it, train super-resolution and draw both stages"
	@echo "make test         set up and run the default tests (PYTHON=python3.12 for another Python)"
	@echo "make test-slow    the tests that take minutes"
	@echo "make test-parity  comparisons with torch libraries (installs the parity extra)"
	@echo "make lint         ruff"
	@echo "make setup        only the virtual environment, in $(VENV)"

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

# Where torch has no build these tests are skipped, so failing to install it is no error.
$(VENV)/.installed-parity: $(VENV)/.installed-test
	-$(PIP) --editable '.[parity]'
	@touch $@

demo: setup
	$(BIN)/python -m imagen_jax.train --config=configs/demo.py --workdir=$(RUN)
	$(BIN)/python -m imagen_jax.evaluate --workdir=$(RUN)

# The demo's pictures enlarged: a cascade of two stages.
demo-cascade: demo
	$(BIN)/python -m imagen_jax.train --config=configs/demo_sr.py --workdir=$(RUN)_sr
	$(BIN)/python -m imagen_jax.sample --workdir=$(RUN),$(RUN)_sr --out=$(RUN)_sr/cascade \
	    --all_stages --prompts="a red circle;a blue square on a white background;a green star"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow" --ignore=tests/parity

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

test-parity: $(VENV)/.installed-parity
	$(BIN)/python -m pytest tests/parity || [ $$? -eq 5 ]

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
