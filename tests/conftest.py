"""Fixtures: a tiny tokenizer, a tiny Llama and a few rows, all made here.

Kernels run on the CUDA device where there is one, else in Triton's interpreter. The two cannot share a process, nor
can the interpreter and ahead-of-time compilation, so the choice is made here, before anything imports triton.
"""

from __future__ import annotations

import os
import sys

import torch

if "triton" in sys.modules:
    raise RuntimeError("triton is imported before tests/conftest.py could choose between compiling and interpreting")
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where tests marked `kernels` put their tensors
KERNEL_DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# ruff: noqa: E402 (imports that may bring triton come after the choice)
import gc
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers_for_tests
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if KERNEL_DEVICE == "cpu" and importlib.util.find_spec("triton"):
    import interpreted_bf16

    interpreted_bf16.install()

# `make test` hands whole files to several processes: those that take longest first, or one would end the run alone.
LONGEST_FIRST = ("compile", "memory", "demo", "benchmarks", "compiled", "train", "losses_trained", "linear_logps")
LONGEST_FIRST += ("head_fused",)
PLACES = {f"test_{name}.py": place for place, name in enumerate(LONGEST_FIRST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: PLACES.get(item.path.name, len(PLACES)))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def figure(line: str) -> None:
    """Notes a number that a test found, for the lines that `make soak` ends with."""
    print(line)
    if path := os.environ.get("FASTDPO_FIGURES"):
        with open(path, "a") as file:
            file.write(line + "\n")


torch.set_num_threads(1)  # threads cost more than they bring at these sizes
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # processes that a test starts share the cores with the other workers'
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))


@pytest.fixture(autouse=True, scope="module")
def garbage_of_a_file_is_collected() -> Iterator[None]:
    gc.collect()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def old_objects_are_not_looked_through(garbage_of_a_file_is_collected: None) -> None:
    """A training run collects garbage, and took 0.3 s to find that transformers, torch and 3000 tests are none.

    What a test leaves in cycles then stays until the end of its file, so not where it may be gigabytes of a GPU's.
    """
    if KERNEL_DEVICE == "cpu":
        gc.freeze()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Each test starts from one seed, and leaves fastdpo's logger as it was."""
    torch.manual_seed(0)
    package = logging.getLogger("fastdpo")
    level = package.level
    yield
    package.setLevel(level)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tokenizers_for_tests.byte_level()


def tiny_llama(vocabulary: int = 500, **changes: Any) -> LlamaForCausalLM:
    """Two layers, 35k parameters, weights large enough that its numbers move."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    defaults = {"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **{**shape, **defaults, **changes}))


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    return praise_and_scolding()


def praise_and_scolding() -> list[dict[str, str]]:
    """24 rows of ragged lengths; the chosen answer praises, the rejected one scolds."""
    good = ["a good question, thank you", "I would like to help you with that", "you are welcome"]
    bad = ["the dog does not mind", "it is a question for somebody else", "lazy"]
    return [
        {
            "prompt": f"Human: what is the answer number {n}? " + "tell me more " * (n % 5) + "Assistant:",
            "chosen": f" {good[n % 3]}" + " and the best" * (n % 4),
            "rejected": f" {bad[n % 3]}" + " at all" * (n % 3),
        }
        for n in range(24)
    ]


def draw_no_picture(patch: pytest.MonkeyPatch) -> None:
    """Curves are plotted at the end of each run, and nothing of them is rendered, which takes longer than the run."""
    patch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)


@pytest.fixture
def quick(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a short run."""
    draw_no_picture(monkeypatch)
    return {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 6,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
