"""A product with a frozen weight in FP8, by torch._scaled_mm, and what it can save, by counting.

A number is rounded to 3 bits beside its exponent (e4m3), or to 2 (e5m2) with more room; sums are in fp32. A scale goes
with each row of what is multiplied: with each output of a weight, with each token of an activation or a gradient, as it
comes. In the backward dX = (dY s) W, where s are the weight's scales: one set of codes serves both ways. Hopper reads
both factors along what is summed over, so the codes lie there twice, once transposed; or are transposed at each use.

Legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from benchmarks.device import CUDA, Device
from benchmarks.flops import needed_flops
from benchmarks.measure import METERS, median_seconds
from benchmarks.models import Model
from benchmarks.run import LORA_RANK
from benchmarks.workload import PROFILES, pair_lengths

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MICRO_BATCH = 8192  # tokens


def rounded(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(T, I) -> codes, and the scales (T, 1) fp32 that give each row's largest number the largest code."""
    rows = rows.float()
    scales = (rows.abs().amax(1, keepdim=True) / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (rows / scales).to(dtype), scales


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, transposed: Tensor, scales: Tensor, gradients: torch.dtype
    ) -> Tensor:
        """(T, I) bf16 times codes (O, I) with scales (O, 1) -> (T, O) bf16."""
        ctx.save_for_backward(transposed, scales)
        ctx.gradients = gradients
        ours, sizes = rounded(x, E4M3)
        return torch._scaled_mm(ours, codes.T, sizes, scales.T, out_dtype=torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        transposed, scales = ctx.saved_tensors
        ours, sizes = rounded(gradient.float() * scales.T, ctx.gradients)
        ones = torch.ones(1, len(transposed), device=scales.device)
        return torch._scaled_mm(ours, transposed.T, sizes, ones, out_dtype=torch.bfloat16), None, None, None, None


def product(x: Tensor, weight: Tensor, gradients: torch.dtype) -> Tensor:
    """x (T, I) times weight (O, I)."""
    codes, scales = rounded(weight.detach(), E4M3)
    return _Product.apply(x.bfloat16(), codes, codes.T.contiguous(), scales, gradients)


def attach(model: Any, gradients: torch.dtype) -> list[Any]:
    """From here on, the frozen layers under adapters multiply in FP8. -> those layers"""
    layers = [module.base_layer for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        codes, scales = rounded(layer.weight.detach(), E4M3)
        kept = codes, codes.T.contiguous(), scales

        def forward(self: Any, x: Tensor, kept: tuple[Tensor, ...] = kept) -> Tensor:
            y = _Product.apply(x.flatten(0, -2).bfloat16(), *kept, gradients)
            return y.view(*x.shape[:-1], len(kept[0]))

        layer.forward = MethodType(forward, layer)
    return layers


@contextmanager
def detached(layers: list[Any]) -> Iterator[None]:
    """Within it they multiply as they did before."""
    forwards = [vars(layer).pop("forward") for layer in layers]
    try:
        yield
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward


def base_share(model: Model, profile: str) -> tuple[float, float]:
    """Of a step, reference included: the frozen layers' share of the needed FLOPs, and all of those, a packed token."""
    pairs = pair_lengths(PROFILES[profile], 256)
    tokens, weights = sum(pair.tokens for pair in pairs), sum(i * o for i, o in model.linears.values())
    first = sum(i * o for name, (i, o) in model.linears.items() if name[0] in "qkv")  # needs no gradient by its input
    unread = sum(pair.prompt + 1 for pair in pairs) / tokens  # rows that the last MLP leaves out
    mlp = sum(i * o for name, (i, o) in model.linears.items() if name in ("gate_proj", "up_proj", "down_proj"))
    needed = needed_flops(pairs, model, LORA_RANK, True) / tokens
    return 2.0 * (3 * (model.num_hidden_layers * weights - unread * mlp) - first) / needed, needed


def rounded_numbers(model: Model) -> int:
    """Activations and gradients that are rounded a token: q, k and v share their input, and so do gate and up. Both
    forwards have the inputs, the backward the outputs.
    """
    inputs = sum(model.linears[name][0] for name in ("q_proj", "o_proj", "gate_proj", "down_proj"))
    outputs = sum(o for _, o in model.linears.values())
    return model.num_hidden_layers * (2 * inputs + outputs)


def saved(model: Model, profile: str) -> dict[str, Any]:
    """What FP8 at twice the rate of bf16 can save on an H200, at the rates that are expected of it."""
    assert CUDA.kernels.expected is not None
    _, flops, moved = CUDA.kernels.expected
    share, needed = base_share(model, profile)
    whole = needed / flops
    rounding = 3 * rounded_numbers(model) / moved  # 2 bytes read, 1 written
    weights = model.num_hidden_layers * sum(i * o for i, o in model.linears.values())
    transposing = 2 * weights / moved / MICRO_BATCH
    least = whole * (1 - share / 2)
    return {
        "model": model.name,
        "profile": profile,
        "share of FLOPs": share,
        "speed at most": whole / least,
        "speed, rounding as passes of its own": whole / (least + rounding),
        "speed, transposing each use besides": whole / (least + rounding + transposing),
        "weights in bf16, GB": 2 * weights / 1e9,
        "codes both ways, GB": 2 * weights / 1e9,
        "codes once, GB": weights / 1e9,
    }


def timed(device: Device) -> dict[str, Any]:
    """Seconds of one product with a weight (I, D) on this machine."""
    rows, width, wide = device.kernels.blocks[0]
    meter = METERS[device.place]()
    x, weight = (torch.randn(count, width, device=device.place).bfloat16() for count in (rows, wide))
    codes, scales = rounded(weight, E4M3)
    ours, sizes = rounded(x, E4M3)
    calls = {
        "bf16": lambda: x @ weight.T,
        "FP8": lambda: torch._scaled_mm(ours, codes.T, sizes, scales.T, out_dtype=torch.bfloat16),
        "rounding alone, eager": lambda: rounded(x, E4M3),
        "transposing alone": lambda: codes.T.contiguous(),
    }
    times = {f"{name}, ms": 1e3 * median_seconds(meter, call) for name, call in calls.items()}
    return {"T": rows, "I": width, "O": wide, **times}
