# make demo | test | soak | check | gpu | compile-report      everything is set up in .venv first, from constraints.txt

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test soak check gpu compile-report format clean

demo: $(INSTALLED)
	$(BIN)/fastdpo demo

# Whole files go to workers, in the order of tests/conftest.py: fixtures of a file are made once. WORKERS=0: one process.
WORKERS ?= logical
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# The long forms of three tests, one after the other, as one of them measures time; their figures are printed last.
SOAKED := tests/test_hostile.py tests/test_resume.py::test_a_run_killed_again_and_again_ends_as_if_nothing_had_been
SOAKED += tests/test_long_run.py
soak: export FASTDPO_FIGURES := $(CURDIR)/build/soak.txt
soak: $(INSTALLED)
	mkdir -p build && rm -f $(FASTDPO_FIGURES)
	FASTDPO_KILLS=30 FASTDPO_CASES=2000 FASTDPO_STEPS=2000 $(BIN)/python -m pytest -n 0 --timeout 3600 $(SOAKED); \
	status=$$?; cat $(FASTDPO_FIGURES); exit $$status

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The tests and benchmarks that need a CUDA device, in stages of at most 9 minutes that run alone, too (`make gpu-tests`);
# without a device it prints what it would run. benchmarks/gpu.py has the stages. Uses .venv where it is, else python3.
# RESULTS=... is the folder of all files, benchmarks/results unless given; COMMIT=... says which code this is where it was
# copied without its repository; UNSLOTH=... names a folder with Unsloth and the packages it needs, where not installed.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
GPU := PYTHONPATH=$(CURDIR):$(CURDIR)/kernels$(if $(PYTHONPATH),:$(PYTHONPATH)) $(GPU_PYTHON) -m benchmarks.gpu
GPU += $(if $(RESULTS),--results $(RESULTS)) $(if $(COMMIT),--commit $(COMMIT)) $(if $(UNSLOTH),--unsloth $(UNSLOTH))
gpu:
	$(GPU)

gpu-%:
	$(GPU) $*

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
