# The commands of this repository. They need Python 3.11 or newer, make and a package index (whatever pip is set up to use).
# Everything is installed into .venv, pinned by constraints.txt; a second call installs nothing.

VENV ?= .venv
# Tried in this order; `make PYTHON=/path/to/python3.12 ...` chooses one.
PYTHON ?= python3.11 python3.12 python3.13 python3
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart quickstart-images test test-unit test-whole lint format bench clean

help: ## List the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 26

quickstart: $(VENV)/.quickstart ## Fine-tune a real model on real text, and show that it got better (ARGS="--output_dir out")
	$(BIN)/vembed quickstart $(ARGS)

quickstart-images: $(VENV)/.quickstart ## Train a small model to find pictures by words, and show what it finds
	$(BIN)/vembed quickstart images $(ARGS)

test: $(VENV)/.dev ## Run the tests, two halves at a time (ARGS="-k name": some of them)
ifeq ($(ARGS),)
	@echo "Two halves at a time, about ten minutes on two cores; each is shown when it is done."
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-unit test-whole
else
	$(BIN)/python -m pytest $(ARGS)
endif

# One thread each: OpenMP's threads spin while they wait, which takes the other half's processor.
# Not by pytest-xdist, under whose workers signals do not reach the programs that tests stop.
test-unit: export OMP_NUM_THREADS = 1
test-unit: $(VENV)/.dev
	$(BIN)/python -m pytest tests/unit

test-whole: export OMP_NUM_THREADS = 1
test-whole: $(VENV)/.dev
	$(BIN)/python -m pytest --ignore=tests/unit

lint: $(VENV)/.dev ## Check format, lint, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## Measure speed and memory beside sentence-transformers (ARGS="--quick", ARGS="quality --help")
	$(BIN)/python benchmarks/suite.py $(ARGS)

clean: ## Remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info

# Stamp files: an interrupted step leaves no stamp, so that the next call does it again. A .venv that works is kept.
IS_USABLE := 'import pip, sys; sys.exit(sys.version_info < (3, 11))'
CAN_CREATE := 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'

$(VENV)/.created:
	@if $(BIN)/python -c $(IS_USABLE) 2>/dev/null; then touch $@; exit; fi; \
	for python in $(PYTHON); do \
		if $$python -c $(CAN_CREATE) 2>/dev/null; then \
			echo "Creating $(VENV) with $$python ($$($$python -V))"; \
			$$python -m venv --clear $(VENV) && touch $@; exit; \
		fi; \
	done; \
	echo "Python 3.11 or newer with its venv module is needed. Tried: $(PYTHON)." >&2; \
	echo "Install one (on Debian and Ubuntu also python3-venv), or: make PYTHON=/path/to/python ..." >&2; \
	exit 1

$(VENV)/.quickstart: pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP_INSTALL) --editable '.[quickstart]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@
