# `make demo` and `make test` are all that a newcomer needs. Both make .venv if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow docs gpu-check gpu-study lint clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Installed again only when the package's own description changes. Python compiles the modules that the demo imports, a
# quarter of all, at the first import; where it may not write them down, pip compiles all.
$(VENV)/demo.stamp: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		$(if $(PYTHONDONTWRITEBYTECODE),,--no-compile) -e '.[demo,tested]'
	@touch $@

$(VENV)/dev.stamp: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/demo.stamp

$(VENV)/bench.stamp: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,bench]'
	@touch $@ $(VENV)/dev.stamp $(VENV)/demo.stamp

demo: $(VENV)/demo.stamp  ## Pretrain on 3,000 emoji, then print and draw what was learnt
	$(BIN)/python tools/pretrain.py --config configs/pretrain/demo.yaml --run-dir runs/demo

test: lint  ## Lint, types, layers and the fast tests
	$(BIN)/python -m pytest

# In their own order: by default files with few tests come last, and these have the longest ones.
test-slow: $(VENV)/dev.stamp  ## The tests that take more than a second or two
	$(BIN)/python -m pytest -m slow --no-loadscope-reorder

docs: $(VENV)/dev.stamp  ## The documentation as a site, in site/; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet -f docs/site/mkdocs.yml

gpu-check: $(VENV)/bench.stamp  ## On a machine with a CUDA device: its tests, then its measurements as one table
	$(BIN)/python -m pytest -m "gpu and not slow" -n 0 -q; tests=$$?; $(BIN)/python tools/bench.py gpu && exit $$tests

# Of CIFAR-10, which DATA names (`make gpu-study DATA=cifar10:/data`). What is finished is not done again.
DATA ?= cifar10:data
TIME ?= 24m

gpu-study: $(VENV)/dev.stamp  ## On a machine with a CUDA device: what pretraining is worth, 24 minutes a call; call it again until it is finished
	timeout --signal=TERM $(TIME) $(BIN)/python tools/study.py --config configs/study/benefit_gpu.yaml \
		--data "$(DATA)" --run-dir runs/benefit_gpu || test $$? = 124
	$(BIN)/python docs/make_results.py runs/benefit_gpu

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) site runs/demo .pytest_cache .hypothesis .ruff_cache
