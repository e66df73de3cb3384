# make demo           train three tasks on composed scenes and look at runs/demo   (2 minutes; FULL=1: 11 minutes)
# make test           run the tests               (JOBS=4: processes; ARGS="-m quick": those of 90 seconds)
# make lint           ruff and mypy
# make docs           build the documentation and the API reference into site/
# make wheel          build the wheel into dist/
# make gpu-wheels     collect what a GPU machine without a network needs in build/gpu-wheels   (GPU_PYTHON=3.12)
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
GPU_PYTHON ?= 3.12
BIN := $(VENV)/bin

.PHONY: setup demo test lint docs wheel gpu-wheels clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev,tracking,onnx]"
	touch $@

demo: setup
	$(BIN)/allinone-ds demo $(if $(FULL),--full) $(if $(SEED),--seed $(SEED)) $(ARGS)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[docs]"
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

wheel: setup
	$(BIN)/python -m build --wheel

gpu-wheels: setup
	rm -rf build/gpu-wheels
	$(BIN)/python tools/gpu_wheels.py build/gpu-wheels $(GPU_PYTHON)

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
