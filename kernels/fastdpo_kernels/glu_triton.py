"""`glu` in Triton: a program goes through a block of a row, or of everything where all tensors are contiguous.

Legend: N rows of `width` elements.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels import launch
from fastdpo_kernels._device import exp


@triton.jit
def _gate_of(x, ACTIVATION: tl.constexpr):
    """-> act(x) / x, and its derivative by x; fp32.

    silu and gelu_tanh are a sigmoid s(v). With e^-|v| nothing overflows, and s (1 - s) keeps its digits where s is 1.
    """
    if ACTIVATION == "gelu":
        factor = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return factor, exp(-0.5 * x * x) * 0.3989422804014327
    else:
        if ACTIVATION == "silu":
            v, dv = x, 1.0
        else:
            v = x * (1.5957691216057308 + 0.0713548162726009 * x * x)
            dv = 1.5957691216057308 + 0.2140644488178027 * x * x
        e = exp(-tl.abs(v))
        r = 1.0 / (1.0 + e)
        return tl.where(v < 0.0, e * r, r), e * r * r * dv


@triton.jit
def _place(width, blocks, BLOCK: tl.constexpr):
    """-> this program's row and columns, and which of these exist. int64: all as one row may be beyond 2^31."""
    row = tl.program_id(0) // blocks
    columns = (tl.program_id(0) - row * blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row.to(tl.int64), columns, columns < width


@triton.jit
def _glu_forward_kernel(
    gate, up, h, width, blocks, gate_stride, up_stride, h_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, columns, inside = _place(width, blocks, BLOCK)
    x = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    factor, _ = _gate_of(x, ACTIVATION)
    active = (x * factor).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(h + row * h_stride + columns, (active * y).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _glu_backward_kernel(
    grad_h, gate, up, grad_gate, grad_up, h, width, blocks, grad_h_stride, gate_stride, up_stride, grad_gate_stride,
    grad_up_stride, h_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`h` may be None. Everything is loaded before anything is stored: a result may lie over grad_h."""
    row, columns, inside = _place(width, blocks, BLOCK)
    x = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_h + row * grad_h_stride + columns, mask=inside, other=0.0).to(tl.float32)
    factor, slope = _gate_of(x, ACTIVATION)
    to_gate = g * y * (factor + x * slope)
    tl.store(grad_gate + row * grad_gate_stride + columns, to_gate.to(grad_gate.dtype.element_ty), mask=inside)
    to_up = g * (x * factor)
    tl.store(grad_up + row * grad_up_stride + columns, to_up.to(grad_up.dtype.element_ty), mask=inside)
    if h is not None:
        active = (x * factor).to(gate.dtype.element_ty).to(tl.float32)
        tl.store(h + row * h_stride + columns, (active * y).to(h.dtype.element_ty), mask=inside)


@torch._disable_dynamo  # a graph of torch.compile breaks here
def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    h = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    _launch(_glu_forward_kernel, (gate, up), (h,), activation)
    return h


@torch._disable_dynamo  # a graph of torch.compile breaks here
def backward(
    grad_h: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    with_h: bool,
    into: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtypes = gate.dtype, up.dtype, torch.promote_types(gate.dtype, up.dtype)
    grad_gate, grad_up, h = (
        torch.empty(gate.shape, dtype=dtype, device=gate.device) if given is None else given
        for dtype, given in zip(dtypes, into, strict=True)
    )
    results = grad_gate, grad_up, h if with_h else None
    _launch(_glu_backward_kernel, (grad_h, gate, up), results, activation)
    return results


def _launch(kernel: Any, inputs: tuple[Tensor, ...], results: tuple[Tensor | None, ...], activation: str) -> None:
    """Rows as they lie; where every tensor is contiguous, all of them as one row, which ends in one odd block."""
    if not inputs[0].numel():
        return
    tensors = *inputs, *results
    whole = all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    width = inputs[0].numel() if whole else inputs[0].shape[-1]
    rows = [_rows(tensor, width) for tensor in inputs]
    rows += [None if result is None else result.view(-1, width) for result in results]
    aligned = all(row is None or row.stride(0) % 16 == 0 for row in rows) and width % 16 == 0
    config = launch.glu_config(width, max(tensor.element_size() for tensor in inputs), aligned)
    blocks = triton.cdiv(width, config.block)
    kernel[(inputs[0].numel() // width * blocks,)](
        *rows, width, blocks, *(0 if row is None else row.stride(0) for row in rows),
        ACTIVATION=activation, BLOCK=config.block, num_warps=config.num_warps, enable_fp_fusion=False,
        **launch.every_register(config.num_warps, launch.device_of(inputs[0].device)),
    )  # fmt: skip


def _rows(tensor: Tensor, width: int) -> Tensor:
    """(N, width) with neighbours side by side, a copy only where no view has that."""
    rows = tensor.reshape(-1, width)
    return rows if rows.stride(1) == 1 or width == 1 else rows.contiguous()
