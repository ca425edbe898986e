"""torch_compile=True: the same numbers from compiled blocks, compiled once, and a model left as it was.

aot_eager traces and differentiates as inductor does, and generates no code: one run takes inductor itself.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig
from torch._dynamo.utils import counters

import fastdpo
from fastdpo.model import base_model


def run(rows: list, tokenizer: Any, quick: dict, adapters: bool, **options: Any) -> fastdpo.DPOTrainer:
    torch.compiler.reset()
    trainer = fastdpo.DPOTrainer(
        tiny_llama(),
        args=fastdpo.DPOConfig(**quick | {"adam_epsilon": 1e-6, "max_tokens_per_microbatch": 150} | options),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if adapters else None,
    )
    trainer.train()
    return trainer


CASES = {
    "adapters": (True, {"torch_compile_backend": "aot_eager"}),
    "full": (False, {"torch_compile_backend": "aot_eager"}),
    "checkpointing": (True, {"torch_compile_backend": "aot_eager", "gradient_checkpointing": True}),
    "inductor": (True, {"max_steps": 2}),
    "inductor on a GPU": pytest.param(True, {"max_steps": 2, "bf16": False}, marks=pytest.mark.gpu),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("adapters", "options"), CASES.values(), ids=CASES)
def test_a_compiled_run_has_the_numbers_of_one_that_is_not(
    adapters: bool, options: dict, rows: list, tokenizer: Any, quick: dict
) -> None:
    if "torch_compile_backend" not in options and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("inductor needs a C++ compiler on a CPU")
    counters.clear()
    plain = {name: value for name, value in options.items() if name != "torch_compile_backend"}
    expected = run(rows, tokenizer, quick, adapters, **plain)
    assert not counters["stats"]
    compiled = run(rows, tokenizer, quick, adapters, torch_compile=True, **options)
    assert 0 < counters["stats"]["unique_graphs"] <= 16  # a block's halves: with and without gradients and adapters
    for row, other in zip(compiled.state.log_history[:-1], expected.state.log_history[:-1], strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-4)
    for name, value in compiled.model.state_dict().items():
        other = expected.model.state_dict()[name]
        assert (value - other).norm() <= 1e-4 * other.norm(), name
    for block in base_model(compiled.model).model.layers:
        assert block._compiled_call_impl is None


def test_a_backend_without_compiling_is_refused(quick: dict) -> None:
    config = fastdpo.DPOConfig(**quick)
    config.torch_compile_backend = "inductor"
    with pytest.raises(ValueError, match="torch_compile_backend='inductor' has no effect without torch_compile=True"):
        config.validate()
