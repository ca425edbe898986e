"""Rotary position embedding of queries and keys together, forward and backward by one kernel.

A pair (a, b) of a head's first R numbers turns by its token's angle:

    a' = a cos_a - b sin_a,   b' = b cos_b + a sin_b        the numbers R..E pass through

    half         a and b are R/2 apart                      Llama and most others
    interleaved  a and b are neighbours                     Cohere, GLM-4, Llama-4

The backward is the same with (sin_a, sin_b) -> (-sin_b, -sin_a), so it keeps cos and sin and neither q nor k. q and k
are read once and written once: 4 bytes an element of bf16, where plain torch moves 20, in five launches each.
cos and sin are read again for every token and shared by its heads.

    cos, sin (B or 1, T, R): a column for each number, as Llama's and Cohere's rotary modules give them
    by_pair  (B or 1, T, R/2): a column for each pair, as gpt-oss gives them; GLM-4's are the first half of (B, T, R),
             Llama-4's real and imaginary part of its complex ones

Numerics, as in transformers. By itself, both products are rounded to the dtype that torch promotes q and cos to, and so
is their sum, which is the result's dtype (Llama, Qwen, Phi-3, GLM, GPT-NeoX, gpt-oss). `upcast` computes in fp32 and
rounds once to the dtype of q (Cohere, OLMo-2, Llama-4). The torch method is transformers' result bit for bit; gradients
are computed in fp32 and rounded once. Element by element, so deterministic.

Legend: B sequences, T tokens, H heads of q, G heads of k, E numbers of a head, R of them rotated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo_kernels import launch
from fastdpo_kernels.memory_order import empty_in_order, memory_order


@dataclass(frozen=True)
class Rotation:
    """How pairs are found, and where rounding happens."""

    interleaved: bool
    by_pair: bool
    upcast: bool
    backward: bool = False


def rope(
    q: Tensor,  # (B, H, T, E), any strides
    k: Tensor,  # (B, G, T, E), any strides
    cos: Tensor,  # (B or 1, T, R), by_pair (B or 1, T, R / 2)
    sin: Tensor,  # as cos
    *,
    interleaved: bool = False,
    by_pair: bool = False,
    upcast: bool = False,
    method: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotated q and k, differentiable in both; they lie in memory as q and k do, so that transposing them back is free.

    cos and sin get no gradient. `method` is one of launch.BLOCK_METHODS; "auto" takes triton on GPUs and torch
    elsewhere.

    Raises ValueError for shapes and dtypes that do not fit, for cos or sin that require a gradient, and for a method
    that cannot run.
    """
    _check(q, k, cos, sin, by_pair)
    method = launch.block_method("rope", method, q, k, cos, sin)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        return _Rope.apply(q, k, cos, sin, Rotation(interleaved, by_pair, upcast), method)


def method_report(device: torch.device | None = None) -> list[tuple[str, str]]:
    """Which way `rope` goes on a device (the GPU where there is one): rows of (kernel, path)."""
    return [("rope", launch.block_method_in_words(device))]


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, by_pair: bool) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != (q.shape[0], k.shape[1], *q.shape[2:]):
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must be (B, H, T, E) and (B, G, T, E)")
    batch, _, tokens, size = q.shape
    if cos.ndim != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != tokens or cos.shape != sin.shape:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be ({batch} or 1, {tokens}, columns) for q "
            f"{tuple(q.shape)}"
        )
    rotated = cos.shape[2] * (2 if by_pair else 1)
    if rotated % 2 or rotated > size:
        raise ValueError(
            f"cos has {cos.shape[2]} columns for by_pair={by_pair}, expected an even number of rotated numbers, at "
            f"most the {size} of a head"
        )
    for name, tensor in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected a floating-point dtype")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos or sin requires a gradient, and rope gives none: pass them detached")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation, method: str
    ) -> tuple[Tensor, Tensor]:
        q_result, k_result = (
            empty_in_order(x.shape, memory_order(x), _dtype(x, cos, sin, rotation), x.device) for x in (q, k)
        )
        _rotate(method, (q, k), cos, sin, (q_result, k_result), rotation)
        ctx.save_for_backward(cos, sin)
        ctx.rotation, ctx.method = rotation, method
        ctx.places = [(x.shape, memory_order(x), x.dtype, x.device) for x in (q, k)]
        ctx.set_materialize_grads(False)
        return q_result, k_result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        rotation = Rotation(ctx.rotation.interleaved, ctx.rotation.by_pair, upcast=True, backward=True)
        results = [
            None if grad is None else empty_in_order(*place) for place, grad in zip(ctx.places, grads, strict=True)
        ]
        used = [(grad, x) for grad, x in zip(grads, results, strict=True) if grad is not None and x is not None]
        if used:
            inputs, outputs = zip(*used, strict=True)
            with torch.cuda.device_of(cos):
                _rotate(ctx.method, inputs, cos, sin, outputs, rotation)
        return *results, None, None, None, None


def _dtype(x: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> torch.dtype:
    products = (torch.promote_types(x.dtype, factor.dtype) for factor in (cos, sin))
    return x.dtype if rotation.upcast else torch.promote_types(*products)


def _rotate(
    method: str,
    inputs: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    results: tuple[Tensor, ...],
    rotation: Rotation,
) -> None:
    """Fills each of `results` from its input."""
    if method == "triton":
        from fastdpo_kernels import rope_triton  # Triton exists on Linux only

        rope_triton.rotate(inputs, cos, sin, results, rotation)
    else:
        for x, result in zip(inputs, results, strict=True):
            _rotate_torch(x, cos[:, None], sin[:, None], result, rotation)


# The torch method


def _rotate_torch(x: Tensor, cos: Tensor, sin: Tensor, result: Tensor, rotation: Rotation) -> None:
    rotated = cos.shape[-1] * (2 if rotation.by_pair else 1)
    if rotation.upcast and x.dtype != torch.float64:
        x = x.float()
    (cos_a, cos_b), (sin_a, sin_b) = ((t, t) if rotation.by_pair else _pairs(t, rotation) for t in (cos, sin))
    if rotation.backward:
        sin_a, sin_b = -sin_b, -sin_a
    a, b = _pairs(x[..., :rotated], rotation)
    to_a, to_b = _pairs(result[..., :rotated], rotation)
    to_a.copy_(a * cos_a - b * sin_a)
    to_b.copy_(b * cos_b + a * sin_b)
    result[..., rotated:] = x[..., rotated:]


def _pairs(x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Views of the first and the second number of each pair."""
    half = x.shape[-1] // 2
    return (x[..., 0::2], x[..., 1::2]) if rotation.interleaved else (x[..., :half], x[..., half:])
