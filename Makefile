# Each target that runs something first makes or updates .venv, whatever environment is active; test-oldest one of its own.
PYTHON ?= python3
DATA_DIR ?= data
ARGS ?=
WORKERS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Each process has one thread of its own: the tests are many and small.
TESTS := -m pytest -n $(WORKERS) --dist worksteal
OLDEST := .venv-oldest

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: demo test test-oldest lint types docs bench report clean help

demo: $(STAMP)  ## fine-tune EfficientNet-Lite0 on digits; prints accuracies and the path of a figure
	MPLBACKEND=Agg $(RUN) examples/plot_quickstart.py

test: $(STAMP)  ## all tests with coverage, in WORKERS=2 processes; a part of them: make test ARGS="--no-cov -k pattern"
	OMP_NUM_THREADS=1 $(RUN) $(TESTS) --cov=sklearn_lqf --cov-fail-under=95 $(ARGS)

test-oldest: $(OLDEST)/.installed  ## all tests with the oldest supported versions; Python 3.10 or 3.11: PYTHON=python3.11
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(TESTS) $(ARGS)

lint: $(STAMP)  ## ruff: rules and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(STAMP)  ## mypy
	$(RUN) -m mypy sklearn_lqf

docs: $(STAMP)  ## the pages as a site in docs/_build/html; without running the examples: make docs ARGS="-D plot_gallery=0"
	MPLBACKEND=Agg $(RUN) -m sphinx -b html -d docs/_build/doctrees -W --keep-going -n -q $(ARGS) docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(STAMP)  ## all benchmarks; DATA_DIR=folder says where the image folders are
	@test -d "$(DATA_DIR)" || { echo "no folder '$(DATA_DIR)'; use: make bench DATA_DIR=folder" >&2; exit 2; }
	@set -e; for script in benchmarks/[!_]*.py; do \
		echo "$$script --data-dir $(DATA_DIR) $(ARGS)"; \
		MPLBACKEND=Agg $(RUN) "$$script" --data-dir "$(DATA_DIR)" $(ARGS); \
	done

report: $(STAMP)  ## tables and figures of README and docs from benchmarks/results
	MPLBACKEND=Agg $(RUN) benchmarks/_report.py

clean:  ## remove caches, reports and builds; keeps .venv and .venv-oldest
	rm -rf .pytest_cache .ruff_cache .mypy_cache .coverage .coverage.* htmlcov build dist docs/_build docs/gallery docs/generated
	find sklearn_lqf tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,dev)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(call install,$(OLDEST),constraints-oldest.txt,test)

define install  # a virtual environment, the versions to install, the extra
	@echo "installing into $(1): some minutes and about 6 GB the first time"
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install -q --disable-pip-version-check -c $(2) -e ".[$(3)]"
	@touch $(1)/.installed
endef
