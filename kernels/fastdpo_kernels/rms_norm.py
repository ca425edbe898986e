"""Root-mean-square norm of rows, in the cast orders that transformers has, forward and backward.

    n = x r,   r = 1 / sqrt(mean(x^2) + eps)
    y = weight * (n rounded to the dtype of x)            round_first: Llama and most others
    y = (n * (offset + weight)) rounded to that dtype     Gemma (offset 1), OLMo-2 and gpt-oss (offset 0)
    dx = r (w g - n mean(w g n)),   dw = sum over rows of g n

The forward reads x and writes y, the backward reads x and g and writes dx: 4 and 6 bytes an element of bf16. Plain
torch moves 36 and about 60, counted operation by operation, and keeps fp32 copies of x; here x and one fp32 number a
row wait for the backward. Those of q_norm and k_norm, 128 long, are rows as any other.

Numerics: fp32 inside (fp64 for fp64), rounded where transformers rounds in the forward, once in the backward. weight's
gradient is summed in fp32, in an order that the launch numbers fix: deterministic. A weight of another dtype than x
gives a result in the dtype that torch promotes both to, as the modules of Llama's order do. No weight at all is
Llama-4's L2 norm.

Legend: N rows, D their length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo_kernels import launch


def rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor | None,  # (D,)
    eps: float,
    *,
    offset: float = 0.0,
    round_first: bool = True,
    method: str = "auto",
) -> Tensor:  # (..., D)
    """The norm over the last dimension, differentiable in x and weight; the result lies in memory as x does.

    `offset` is added to weight in fp32 and goes with round_first=False. `method` is one of launch.BLOCK_METHODS; "auto"
    takes triton on GPUs, for bf16, fp16 and fp32 rows of up to launch.LONGEST_NORM elements, and torch elsewhere.

    Raises ValueError for shapes and dtypes that do not fit, an offset with round_first, and a method that cannot run.
    """
    _check(x, weight, offset, round_first)
    method = _method(method, x, weight)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return _RmsNorm.apply(x, weight, eps, offset, round_first, method)


def method_report(device: torch.device | None = None) -> list[tuple[str, str]]:
    """Which way `rms_norm` goes on a device (the GPU where there is one): rows of (kernel, path)."""
    return [("rms_norm", launch.block_method_in_words(device))]


def _check(x: Tensor, weight: Tensor | None, offset: float, round_first: bool) -> None:
    if not x.ndim or not x.shape[-1] or not x.is_floating_point():
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}, expected (..., D) floating-point numbers, D above 0")
    if weight is not None and (weight.shape != x.shape[-1:] or not weight.is_floating_point()):
        came = f"{tuple(weight.shape)} {weight.dtype}"
        raise ValueError(f"weight is {came}, expected ({x.shape[-1]},): a floating-point number for each column of x")
    if offset and (round_first or weight is None):
        raise ValueError(f"offset={offset} goes with a weight and round_first=False, as in Gemma")


def _method(method: str, x: Tensor, weight: Tensor | None) -> str:
    if x.shape[-1] > launch.LONGEST_NORM:
        if method == "triton":
            raise ValueError(
                f"method='triton' of rms_norm takes rows of up to {launch.LONGEST_NORM} elements, not {x.shape[-1]}: "
                "use method='torch'"
            )
        method = "torch" if method == "auto" else method
    return launch.block_method("rms_norm", method, *((x,) if weight is None else (x, weight)))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool, method: str
    ) -> Tensor:
        y, rstd = _of(method).forward(x, weight, eps, offset, round_first)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.method = offset, method
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        with torch.cuda.device_of(x):
            gradients = _of(ctx.method).backward(grad_y, x, weight, rstd, ctx.offset, needs)
        return *gradients, None, None, None, None


def _of(method: str) -> Any:
    if method == "torch":
        return _Torch
    from fastdpo_kernels import rms_norm_triton  # Triton exists on Linux only

    return rms_norm_triton


class _Torch:
    """The torch method, with the names that the Triton module has."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool
    ) -> tuple[Tensor, Tensor]:
        exact = _exact(x)
        rstd = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
        normed = exact * rstd
        if weight is None:
            return normed.to(x.dtype), rstd
        if round_first:
            return weight * normed.to(x.dtype), rstd
        return (normed * _scale(weight, offset)).to(x.dtype), rstd

    @staticmethod
    def backward(
        grad_y: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        grad, normed = _exact(grad_y), _exact(x) * rstd
        grad_x = grad_weight = None
        if needs[1] and weight is not None:
            grad_weight = (grad * normed).sum_to_size(weight.shape).to(weight.dtype)
        if needs[0]:
            scaled = grad if weight is None else grad * _scale(weight, offset)
            grad_x = (rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))).to(x.dtype)
        return grad_x, grad_weight


def _exact(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _scale(weight: Tensor, offset: float) -> Tensor:
    return _exact(weight) + offset if offset else _exact(weight)
