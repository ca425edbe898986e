"""`rms_norm` in Triton: a program holds whole rows in registers, so nothing is read twice.

Rows are taken in the order in which they lie in memory: a row's numbers do not depend on the others, and a transposed
view costs no copy. weight's gradient comes from as many programs as fill the GPU, each going through rows that lie
apart by their number, with the sums of its rows in registers; torch adds up the (programs, D) sums.

Legend: N rows, D their length, R rows a program holds at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels import launch
from fastdpo_kernels.memory_order import empty_in_order, memory_order


@triton.jit
def _scale(weight, D: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    """(1, BLOCK). Loaded as a vector: a (1, BLOCK) load would give its layout to the whole tile, short rows of which
    then have no wide loads.
    """
    columns = tl.arange(0, BLOCK)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    if OFFSET != 0.0:
        w += OFFSET
    return w[None, :]


@triton.jit(do_not_specialize=["N"])
def _rms_norm_forward_kernel(
    x, weight, y, rstd, eps, N, x_stride, y_stride, D: tl.constexpr, OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < N) & (columns < D)
    values = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(values * values, 1, keep_dims=True) / D + eps)
    if rstd is not None:
        tl.store(rstd + rows, r, mask=rows < N)
    normed = values * r
    if weight is not None:
        if ROUND_FIRST:
            normed = normed.to(x.dtype.element_ty).to(tl.float32)
        normed *= _scale(weight, D, OFFSET, BLOCK)
    tl.store(y + rows * y_stride + columns, normed.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _row_gradients(
    grad_y, x, weight, rstd, grad_x, rows, columns, N, grad_y_stride, x_stride, grad_x_stride, D: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """Writes dx of these rows where there is a grad_x; -> g n of them, (R, B)."""
    inside = (rows < N) & (columns < D)
    values = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_y + rows * grad_y_stride + columns, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(rstd + rows, mask=rows < N, other=0.0)
    normed = values * r
    if grad_x is not None:
        scaled = grad
        if weight is not None:
            scaled = grad * _scale(weight, D, OFFSET, columns.shape[1])
        mean = tl.sum(scaled * normed, 1, keep_dims=True) / D
        result = r * (scaled - normed * mean)
        tl.store(grad_x + rows * grad_x_stride + columns, result.to(grad_x.dtype.element_ty), mask=inside)
    return grad * normed


@triton.jit(do_not_specialize=["N"])
def _rms_norm_backward_kernel(
    grad_y, x, weight, rstd, grad_x, N, grad_y_stride, x_stride, grad_x_stride,
    D: tl.constexpr, OFFSET: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    _row_gradients(
        grad_y, x, weight, rstd, grad_x, rows, tl.arange(0, BLOCK)[None, :], N,
        grad_y_stride, x_stride, grad_x_stride, D, OFFSET,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _rms_norm_weight_kernel(
    grad_y, x, weight, rstd, grad_x, sums, N, grad_y_stride, x_stride, grad_x_stride,
    D: tl.constexpr, OFFSET: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same, with this program's sums of g n (D,) beside it; grad_x may be None."""
    columns = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((R, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * R, N, tl.num_programs(0) * R):
        rows = (first + tl.arange(0, R)[:, None]).to(tl.int64)
        total += _row_gradients(
            grad_y, x, weight, rstd, grad_x, rows, columns, N, grad_y_stride, x_stride, grad_x_stride, D, OFFSET
        )
    total = tl.sum(total, 0, keep_dims=True)
    tl.store(sums + tl.program_id(0).to(tl.int64) * D + columns, total, mask=columns < D)


@torch._disable_dynamo  # a graph of torch.compile breaks here
def forward(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool) -> tuple[Tensor, Tensor]:
    """-> y, and r of each row, (..., 1) fp32."""
    dtype = x.dtype if weight is None or not round_first else torch.promote_types(x.dtype, weight.dtype)
    order, width = memory_order(x), x.shape[-1]
    y, config = empty_in_order(x.shape, order, dtype, x.device), launch.norm_config(width)
    rstd = empty_in_order((*x.shape[:-1], 1), order, torch.float32, x.device)
    rows, results = _rows(x, order), _rows(y, order)
    if len(rows):
        _rms_norm_forward_kernel[(triton.cdiv(len(rows), config.rows),)](
            rows, _contiguous(weight), results, rstd, eps, len(rows), rows.stride(0), results.stride(0),
            **{**_constants(config, width, offset, x), "ROUND_FIRST": round_first},
        )  # fmt: skip
    return y, rstd


@torch._disable_dynamo  # a graph of torch.compile breaks here
def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """What was saved may lie otherwise than it did: a hook that moves it to the host and back may pack it densely."""
    order, width, rows = memory_order(x), x.shape[-1], rstd.numel()
    rstd = _rows(rstd, order).contiguous()
    grad_x = empty_in_order(x.shape, order, x.dtype, x.device) if needs[0] else None
    grads, values = _rows(grad_y, order), _rows(x, order)
    results = None if grad_x is None else _rows(grad_x, order)
    strides = grads.stride(0), values.stride(0), 0 if results is None else results.stride(0)
    trained = weight if needs[1] else None
    fused = trained is not None and width <= launch.LONGEST_NORM_WITH_WEIGHT
    constants = _constants(launch.norm_config(width), width, offset, x)
    if rows and needs[0] and not fused:
        _rms_norm_backward_kernel[(triton.cdiv(rows, constants["R"]),)](
            grads, values, _contiguous(weight), rstd, results, rows, *strides, **constants
        )
    if trained is None:
        return grad_x, None
    programs = launch.norm_programs(rows, width, launch.device_of(x.device))
    constants = _constants(launch.norm_config(width, with_weight=True), width, offset, x)
    sums = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    if rows:
        _rms_norm_weight_kernel[(programs,)](
            grads, values, trained.contiguous(), rstd, results if fused else None, sums, rows, *strides, **constants
        )
    return grad_x, sums.sum(0).to(trained.dtype)


def _rows(tensor: Tensor, order: list[int]) -> Tensor:
    """(N, D) in that order with neighbours side by side, a copy only where no view has that."""
    rows = tensor.permute([*order, tensor.ndim - 1]).reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _constants(config: launch.NormConfig, width: int, offset: float, x: Tensor) -> dict[str, Any]:
    registers = launch.every_register(config.num_warps, launch.device_of(x.device))
    tile = {"R": config.rows, "BLOCK": config.block, "num_warps": config.num_warps, "num_stages": 1}
    return {"D": width, "OFFSET": offset, "enable_fp_fusion": False, **tile, **registers}
