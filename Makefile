PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint gpu clean

demo: $(READY)
	$(BIN)/python examples/reconstruct.py --output outputs

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu: $(READY)
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/model_sizes.py

# torch comes first and by its exact version, so that a machine with a build of its own keeps that build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) outputs build dist .pytest_cache .ruff_cache .mypy_cache
