# The commands of the README. Everything runs in a virtual environment made by `make setup`.
PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN ?= runs/demo

.PHONY: help setup demo demo-cascade test test-slow test-parity lint audit

help:
	@echo "make demo         draw with the released model, train the demo, sample, write a report"
	@echo "make demo-cascade run the demo, train its super-resolution stage, sample with both"
	@echo "make test         run the default tests"
	@echo "make test-slow    run the tests that take minutes"
	@echo "make test-parity  compare with PyTorch libraries; installs the parity extra"
	@echo "make lint         run ruff"
	@echo "make audit        look up known vulnerabilities of the installed packages; needs pypi.org"
	@echo "make setup        only make the virtual environment, $(VENV); the others do so first"
	@echo ""
	@echo "PYTHON=python3.12 uses another Python, RUN=DIR another workdir than runs/demo"

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test,gcs]'
	@touch $@

# Some platforms have no PyTorch build. There the parity tests are skipped, so ignore the error.
# torch-fidelity is installed without torchvision: its networks for FID do not use it, and PyPI's
# breaks transformers where PyTorch has no CUDA.
$(VENV)/.installed-parity: $(VENV)/.installed-test
	-$(PIP) --editable '.[parity,metrics,onnx]'
	-$(PIP) --no-deps torch-fidelity efficientnet-lite-pytorch jax2onnx
	@touch $@

PROMPTS := a large red circle on a white background;a green tree and a purple moon

demo: setup
	$(BIN)/python -m imagen_jax.sample --num=2 --out=samples/first --prompts="$(PROMPTS)"
	$(BIN)/python -m imagen_jax.train --config=configs/demo.py --workdir=$(RUN)
	$(BIN)/python -m imagen_jax.evaluate --workdir=$(RUN)

# A cascade of two stages: the demo's base model and its super-resolution.
demo-cascade: demo
	$(BIN)/python -m imagen_jax.train --config=configs/demo_sr.py --workdir=$(RUN)_sr
	$(BIN)/python -m imagen_jax.sample --workdir=$(RUN),$(RUN)_sr --out=$(RUN)_sr/cascade \
	    --all_stages --prompts="a red circle on a white background;a blue square on a gray background;a green star on a white background"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow" --ignore=tests/parity

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

test-parity: $(VENV)/.installed-parity
	$(BIN)/python -m pytest tests/parity || [ $$? -eq 5 ]

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

audit: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --local --skip-editable
