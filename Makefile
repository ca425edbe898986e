# make demo | make test | make check | make gpu      everything is set up in .venv first, from constraints.txt

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check gpu format clean

demo: $(INSTALLED)
	$(BIN)/fastdpo demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The tests and benchmarks that need a CUDA device; without one they say so and end. Uses .venv where it is, else python3.
# COMMIT=... says which code this is where it was copied without its repository.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
gpu: export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu:
	$(GPU_PYTHON) -m pytest -m "gpu or kernels" -rs
	$(GPU_PYTHON) -m benchmarks step --device cuda $(if $(COMMIT),--commit $(COMMIT))

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first, by its pinned version: asked for by another package, pip would take the newest one.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,check]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build *.egg-info demo_output trainer_output
