# make demo   the whole path on drawn patches, a report at the end (about 5 minutes on 2 cores)
# make test   every test                          make lint   format, lint and types
# make gpu-check   one command for a host with a GPU (DRY=1 for the same on a CPU)
# The first of them makes the virtual environment (about 5 minutes, 5 GB); the others find it made.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo
INSTALLED := $(VENV)/installed

.PHONY: demo test lint gpu-check install clean-demo
.DELETE_ON_ERROR:

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "PatchCLR needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the versions of constraints.txt into $(VENV) (about 5 minutes, 5 GB) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
