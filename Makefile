# make demo | test | check | gpu | compile-report      everything is set up in .venv first, from constraints.txt

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check gpu gpu-tests gpu-kernels gpu-step compile-report format clean

demo: $(INSTALLED)
	$(BIN)/fastdpo demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The tests and benchmarks that need a CUDA device; without one they say so and end. A part that fails does not keep the
# next from running, but fails the whole. Uses .venv where it is, else python3. COMMIT=... says which code this is where it
# was copied without its repository.
#
# Meant to end within 9 minutes, by count: tests 2, kernels 4 at most (KERNEL_SECONDS and half a minute to start), step 3.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
KERNEL_SECONDS ?= 210
gpu-tests gpu-kernels gpu-step: export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu:
	$(MAKE) --keep-going --jobs=1 gpu-tests gpu-kernels gpu-step

gpu-tests:
	$(GPU_PYTHON) -m pytest -m "gpu or kernels" -rs

gpu-kernels:
	$(GPU_PYTHON) -m benchmarks kernels --device cuda --seconds $(KERNEL_SECONDS) $(if $(COMMIT),--commit $(COMMIT))

gpu-step:
	$(GPU_PYTHON) -m benchmarks step --device cuda $(if $(COMMIT),--commit $(COMMIT))

# What the compiler makes of every kernel, for every architecture and in every configuration; no GPU takes part.
compile-report: $(INSTALLED)
	$(BIN)/python -m fastdpo_kernels.compile_report --cover full --markdown docs/compile-report.md

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
