# One task per line of `make help`. Every task first brings its virtual environment up to date: plain pip, inside the
# checkout, every version from a constraints file. A second run installs nothing.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
CONSTRAINTS := constraints.txt
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
EXTRAS := triton,hf,cli,plot,testing,oracles,authors,docs,dev
# A folder named `interpreted` runs in a process of its own: Triton reads TRITON_INTERPRET when it is imported.
INTERPRETED := $(sort $(dir $(wildcard tests/ops/interpreted/test_*.py plugins/*/tests/interpreted/test_*.py)))
MARKS := not full

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: fixtures help setup demo test test-all test-oldest lint types pytest format bench docs clean

help:  ## list the tasks
	@sed -n 's/^\([a-z-]*\):.*##  */\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r task text; do \
		printf '  make %-12s %s\n' "$$task" "$$text"; done

setup: $(INSTALLED)  ## make the virtual environment (every task does it by itself)

demo: setup  ## write small real checkpoints, run them through plugins, compare with transformers
	$(BIN)/moe-core demo

test: lint types pytest  ## everything that must be green: lint, types, import contracts, tests

test-all:  ## the same with the tests marked `full` and every format's library, in .venv-all
	$(MAKE) --no-print-directory test MARKS='full or not full' EXTRAS=$(EXTRAS),torchao VENV=.venv-all

test-oldest:  ## the tests with the oldest supported torch and transformers, in .venv-oldest
	$(MAKE) --no-print-directory pytest VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

lint: setup  ## ruff (rules and format) and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup  ## mypy
	$(BIN)/mypy

pytest: setup  ## the tests alone
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m '$(MARKS)' $(INTERPRETED)
	$(BIN)/python -m pytest -q -n $(WORKERS) -m '$(MARKS)'

format: setup  ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## our experts beside those of transformers, on the CPU
	$(BIN)/python benchmarks/experts_cpu.py

docs: setup  ## build the documentation into docs/_build; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

fixtures:  ## have ModelOpt write tests/fixtures anew, in .venv-fixtures (it excludes our transformers)
	$(PYTHON) -m venv .venv-fixtures
	.venv-fixtures/bin/python -m pip install -q -r tests/fixtures/requirements.txt
	HF_HUB_OFFLINE=1 .venv-fixtures/bin/python tests/fixtures/make_modelopt.py

clean:  ## remove the virtual environments and every cache
	rm -rf docs/_build .venv .venv-all .venv-fixtures .venv-oldest .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up

# The build backend comes first, because the editable installs then need no isolated (unpinned) build environment.
# An environment without pip is one whose making failed half-way (no ensurepip, say), and is made again.
$(INSTALLED): pyproject.toml $(PLUGINS:=/pyproject.toml) $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("moe-core needs Python 3.10 or newer, and \
	$(PYTHON) is %s. Name a newer one: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) hatchling editables
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) --no-build-isolation torch \
		-e '.[$(EXTRAS)]' $(addprefix -e ./,$(PLUGINS))
	touch $@
