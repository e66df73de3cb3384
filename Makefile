# make demo           train three tasks on composed scenes into runs/demo: 2 minutes on 2 cores (FULL=1: 10 minutes)
# make test           run the tests
# make lint           ruff and mypy
# make wheel          build the wheel into dist/
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint wheel clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev,tracking,onnx]"
	touch $@

demo: setup
	$(BIN)/allinone-ds demo $(if $(FULL),--full) $(if $(SEED),--seed $(SEED)) $(ARGS)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: setup
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
