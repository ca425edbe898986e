"""What only a CUDA device shows: bf16 and fp16 arithmetic, the packed layout there, repeatability, and no host sync."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig

import fastdpo
from fastdpo.batch import pack, pad
from fastdpo.layout import probe_pairs
from fastdpo.model import Policy
from fastdpo_kernels.linear_logps import linear_logps, linear_logps_reference

pytestmark = pytest.mark.gpu
PRECISIONS = {"bf16": {"bf16": True}, "fp16": {"fp16": True}, "fp32": {"bf16": False}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_linear_logps_errs_at_most_twice_what_torch_does(dtype: torch.dtype, trained: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, 256, device="cuda", generator=generator).mul(0.3).to(dtype) for n in (700, 5003))
    targets = torch.randint(5003, (700,), device="cuda", generator=generator)
    upstream = torch.linspace(-1, 1, 700, device="cuda")

    def run(function: Any, to: torch.dtype) -> list[torch.Tensor]:
        leaves = [hidden.to(to).requires_grad_(), weight.to(to).requires_grad_(trained)]
        logps, _ = function(leaves[0], leaves[1], targets)
        (logps.double() * upstream).sum().backward()
        return [logps.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    truth, plain = run(linear_logps_reference, torch.float64), run(linear_logps_reference, dtype)
    ours = run(linear_logps, dtype)
    assert ours[0].max() <= 0
    for mine, torchs, exact in zip(ours, plain, truth, strict=True):
        error, allowed = (mine.double() - exact).abs(), (torchs.double() - exact).abs()
        assert error.max() <= 2 * allowed.max() and error.square().mean() <= 4 * allowed.square().mean()


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_training_starts_at_margin_zero_and_learns(precision, adapters, rows, tokenizer, quick) -> None:
    quick |= {"max_steps": 20, "learning_rate": 1e-2 if adapters else 3e-3, **precision}
    peft_config = LoraConfig(r=8, target_modules="all-linear") if adapters else None
    out = fastdpo.train(tiny_llama(), rows, processing_class=tokenizer, peft_config=peft_config, **quick)
    assert out.history[0]["rewards/margins"] == 0 and abs(out.history[0]["loss"] - math.log(2)) <= 1e-6
    assert out.history[19]["loss"] < 0.4


def test_packed_and_padded_log_probs_agree_in_fp32() -> None:
    policy = Policy(tiny_llama().cuda())
    pairs = probe_pairs(500)
    packed, _ = policy(pack(pairs).to("cuda"))
    padded, _ = policy(pad(pairs).to("cuda"))
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)


def test_two_runs_are_bitwise_the_same(rows, tokenizer, quick) -> None:
    runs = [fastdpo.train(tiny_llama(), rows, processing_class=tokenizer, full_determinism=True, **quick) for _ in "ab"]
    first, second = (run.model.state_dict() for run in runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_step_waits_for_the_device_at_log_lines_only(rows, tokenizer, quick) -> None:
    quick |= {"max_steps": 6, "logging_steps": 100}
    trainer = fastdpo.DPOTrainer(
        tiny_llama(), args=fastdpo.DPOConfig(**quick), train_dataset=rows, processing_class=tokenizer
    )
    step, seen = trainer._optimizer_step, []

    def watched(batches: list) -> None:
        torch.cuda.set_sync_debug_mode("error" if seen else 0)  # the first step checks the margins
        try:
            step(batches)
        finally:
            torch.cuda.set_sync_debug_mode(0)
        seen.append(len(batches))

    trainer._optimizer_step = watched
    trainer.train()
    assert len(seen) == 6
