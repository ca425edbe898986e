# make demo | test | soak | check | gpu | compile-report      everything is set up in .venv first, from constraints.txt

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

GPU_STEPS_8B := gpu-step-8b-hh-rlhf gpu-step-8b-helpsteer gpu-step-8b-ultrafeedback
GPU_TESTS := $(addprefix gpu-tests-,gpu memory offload patching linear_logps head_fused pair_loss)
GPU_TESTS_BLOCK := $(addprefix gpu-tests-,nf4 lora rms_norm rope glu)
GPU_STAGES := gpu-tests gpu-block-tests gpu-kernels gpu-step $(GPU_STEPS_8B) gpu-step-mistral-nf4 gpu-memory
GPU_STAGES += gpu-parts gpu-trace

.PHONY: demo test soak check gpu $(GPU_STAGES) $(GPU_TESTS) $(GPU_TESTS_BLOCK) gpu-step-8b compile-report format clean

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

# The tests and benchmarks that need a CUDA device; without one they say so and end. Each stage runs alone and ends within
# 9 minutes: KERNEL_, STEP_ and MEMORY_SECONDS are what its contenders may take, and `timeout` ends what hangs. A stage that
# fails does not keep the next from running, but fails the whole. Uses .venv where it is, else python3. COMMIT=... says
# which code this is where it was copied without its repository; UNSLOTH=... names a folder with Unsloth and the packages
# it needs, where it is not installed.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
GPU_RUN := timeout --kill-after=10 530 $(GPU_PYTHON) -m
FROM := $(if $(COMMIT),--commit $(COMMIT))
KERNEL_SECONDS ?= 420
STEP_SECONDS ?= 500
MEMORY_SECONDS ?= 460
STEP := $(GPU_RUN) benchmarks step --device cuda --tune --epochs 2 $(FROM) $(if $(UNSLOTH),--unsloth $(UNSLOTH))
$(GPU_STAGES) $(GPU_TESTS) $(GPU_TESTS_BLOCK): export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu:
	$(MAKE) --keep-going --jobs=1 $(GPU_STAGES)

# Compiling takes most of the time: files go side by side.
gpu-tests:
	$(MAKE) --keep-going --jobs=7 --output-sync=target $(GPU_TESTS)

gpu-block-tests:
	$(MAKE) --keep-going --jobs=5 --output-sync=target $(GPU_TESTS_BLOCK)

$(GPU_TESTS) $(GPU_TESTS_BLOCK): gpu-tests-%:
	$(GPU_RUN) pytest tests/test_$*.py -m "gpu or kernels" -rs

gpu-kernels:
	$(GPU_RUN) benchmarks kernels --device cuda --seconds $(KERNEL_SECONDS) $(FROM)

gpu-step:
	$(STEP) --model llama-3.2-1b --seconds $(STEP_SECONDS)

gpu-step-8b:
	$(MAKE) --keep-going --jobs=1 $(GPU_STEPS_8B)

$(GPU_STEPS_8B): gpu-step-8b-%:
	$(STEP) --model llama-3.1-8b --profile $* --seconds $(STEP_SECONDS)

gpu-step-mistral-nf4:
	$(STEP) --model mistral-7b --load-in-4bit --profile ultrafeedback --seconds $(STEP_SECONDS)

gpu-memory:
	$(GPU_RUN) benchmarks memory --device cuda --seconds $(MEMORY_SECONDS) $(FROM)

gpu-parts gpu-trace: gpu-%:
	$(GPU_RUN) benchmarks $* --device cuda --model llama-3.1-8b $(FROM)

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
