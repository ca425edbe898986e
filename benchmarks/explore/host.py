"""How long the host takes to ask for one micro-batch, and below how many tokens a GPU waits for it.

The model has all of its layers and only tiny widths, so that asking is all that takes time: modules, autograd,
autocast, adapters, fused blocks. On a CPU Triton's kernels are bound to their arguments as for an H200 and not
launched, attention gives memory as it comes, and what is left of products takes microseconds; what counts is processor
time. On a GPU all of it runs, and what counts is the time until everything has been asked for.

A GPU waits where the least time that a micro-batch takes it (its FLOPs at an MFU of 0.5) is below the host's.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from benchmarks.device import CPU, DEVICES, Device
from benchmarks.estimate import PEAK
from benchmarks.explore.stepping import Stepping
from benchmarks.flops import needed_flops
from benchmarks.models import MODELS, Model
from benchmarks.run import LORA_RANK
from benchmarks.workload import PROFILES, build_model, pair_lengths
from fastdpo import attention_backends
from fastdpo.attention_backends import Facts
from fastdpo.data import TokenPair
from fastdpo.first_use import Checks
from fastdpo.model import Policy
from fastdpo.patching import patched
from fastdpo.step import TOKEN_STATS
from fastdpo_kernels.compile_report import compiling_for

HALF_B = Model("qwen2.5-0.5b", "Qwen2.5-0.5B's shape", "qwen2", 151_936, 896, 4864, 24, 14, 2, True, True, 1e-4)
SHAPES = (MODELS["llama-3.1-8b"], MODELS["llama-3.2-1b"], HALF_B)
TINY = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1}
IDLE = ("aten::detach", "aten::alias", "aten::promote_types")
PAIRS = [TokenPair([1] * 4, [2] * 4, [3] * 4)] * 8
MFU = 0.5


@dataclass(frozen=True)
class Asked:
    """One micro-batch's passes, each ready to be called."""

    policy: Policy
    passes: dict[str, Callable[[], object]]


def micro_batch(model: Model, device: Device) -> Asked:
    """A LoRA model with the layers of `model`, in bf16 with adapters in fp32, and what is done with 8 small pairs."""
    run = Stepping(build_model(replace(model, **TINY), 1024, "bfloat16", device.place))  # type: ignore[arg-type]
    whole, trained = run.batch(PAIRS), list(run.trained.values())
    [batch] = whole.microbatches
    optimizer = torch.optim.AdamW(trained, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    passes = {"reference": lambda: run.reference.compute(batch), "forward": lambda: run.policy(batch, TOKEN_STATS)}
    return Asked(run.policy, {**passes, "micro-batch": lambda: run.backward(whole), "update": update})


class _NoAttention(torch.autograd.Function):
    """Memory in place of a result, so that a CPU has as many nodes and calls as FlashAttention's one call a layer."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(one) for one in ctx.saved_tensors)


def _attend(query: Tensor, key: Tensor, value: Tensor, segments: Any, scores: Any) -> Tensor:
    def attend(query: Tensor, key: Tensor, value: Tensor, call: Any) -> Tensor:
        return _NoAttention.apply(query, key, value)

    return attention_backends._by_flash_kernels(query, key, value, segments, attend)


@contextmanager
def asking(asked: Asked, device: Device) -> Iterator[None]:
    """Blocks fused; on a CPU, as on an H200 but for what kernels compute."""
    with ExitStack() as stack:
        if device is CPU:
            stack.enter_context(attention_backends.pretend(Facts("cuda", (9, 0), torch.bfloat16, flash_built=True)))
            stack.enter_context(mock.patch.dict(attention_backends.BACKENDS, flash=_attend))
            stack.enter_context(mock.patch.object(Checks, "due", lambda *given: False))
            stack.enter_context(compiling_for("H200"))
        stack.enter_context(patched([asked.policy.model]))
        yield


def seconds(asked: Asked, device: Device, rounds: int) -> dict[str, float]:
    """The least of each pass, which take turns: other work on the machine only adds."""
    clock, laps = time.process_time if device is CPU else time.perf_counter, {name: [] for name in asked.passes}
    for _ in range(rounds + 2):  # two to warm up
        for name, call in asked.passes.items():
            device.wait()
            start = clock()
            call()
            laps[name].append(clock() - start)
    return {name: min(times[2:]) for name, times in laps.items()}


def seconds_of_product(device: Device, times: int = 1000) -> float:
    """One of the tiny products by itself: a CPU's library takes longer to begin than it takes to ask a GPU."""
    left, right = (torch.randn(96, 128, device=device.place).bfloat16() for _ in range(2))
    device.wait()
    start = time.process_time()
    for _ in range(times):
        torch.mm(left, right.T)
    return (time.process_time() - start) / times


class Counted(TorchDispatchMode):
    """Counts operations that compute or copy, and products among them; views, allocations and questions of dtypes
    launch nothing.
    """

    count = products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.count += not (func.is_view or "empty" in name or name in IDLE)
        self.products += "mm" in name
        return func(*args, **(kwargs or {}))


def flops_per_token(model: Model, profile: str) -> float:
    """Needed for a packed token, the reference included."""
    pairs = pair_lengths(PROFILES[profile], 256)
    return needed_flops(pairs, model, LORA_RANK, True) / sum(pair.tokens for pair in pairs)


def measure(options: Namespace) -> dict[str, list[dict[str, Any]]]:
    device, rows = DEVICES[options.device], []
    for model in SHAPES:
        asked = micro_batch(model, device)
        with asking(asked, device):
            found = seconds(asked, device, rounds=10)
            launched = mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run)
            with Counted() as operations, launched as launches:
                asked.passes["micro-batch"]()
        row: dict[str, Any] = {"model": model.name, "layers": model.num_hidden_layers}
        row |= {f"{name}, ms": 1e3 * value for name, value in found.items()}
        row |= {"operations of torch": operations.count, "products among them": operations.products}
        row |= {"Triton launches": launches.call_count, "a product alone, µs": 1e6 * seconds_of_product(device)}
        for profile in ("hh-rlhf", "ultrafeedback"):
            waiting = found["micro-batch"] * MFU * PEAK / flops_per_token(model, profile)
            row[f"tokens below which it waits, {profile}"] = waiting
        rows.append(row)
    return {"one micro-batch": rows}
