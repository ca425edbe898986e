"""bf16 in Triton's interpreter as a GPU computes it: numbers that are rounded to the nearest, ties to even.

The interpreter of Triton 3.6 and of 3.9 holds bf16 as uint16, casts to it by cutting bits off, and adds and multiplies
(`tl.dot` too) the bits as integers. Products of all 16 and 32 bit numbers are summed in fp64, whatever the BLAS below
would do. test_interpreted_bf16.py holds what is mended against torch's bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from triton.language import bfloat16, float16, float32
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == bfloat16


def widened(handle: TensorHandle) -> TensorHandle:
    """Exactly."""
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), float32) if _is_bf16(handle) else handle


def rounded(handle: TensorHandle) -> TensorHandle:
    """float32 -> bf16"""
    numbers = torch.from_numpy(np.ascontiguousarray(handle.data)).bfloat16()
    return TensorHandle(numbers.view(torch.uint16).numpy().reshape(handle.data.shape), bfloat16)


def install() -> None:
    of = InterpreterBuilder
    cast, dot, unary, binary, ternary = of.cast_impl, of.create_dot, of.unary_op, of.binary_op, of.ternary_op

    def cast_impl(builder: InterpreterBuilder, source: TensorHandle, dtype: Any) -> TensorHandle:
        if dtype.scalar == bfloat16:
            return source if _is_bf16(source) else rounded(cast(builder, source, float32))
        return cast(builder, widened(source), dtype)

    def create_dot(builder: InterpreterBuilder, left: TensorHandle, right: TensorHandle, *others: Any) -> TensorHandle:
        if left.dtype.scalar not in (bfloat16, float16, float32):
            return dot(builder, left, right, *others)
        # summed in fp64: in fp32 a BLAS may give a row other bits where it stands elsewhere
        exact = widened(left).data.astype(np.float64) @ widened(right).data.astype(np.float64)
        addend = others[0]
        return TensorHandle(exact.astype(addend.data.dtype) + addend.data, addend.dtype.scalar)

    def numerically(compute: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
        def operation(builder: InterpreterBuilder, *given: Any) -> TensorHandle:
            *handles, what = given
            result = compute(builder, *map(widened, handles), what)
            numbers = any(map(_is_bf16, handles)) and result.data.dtype == np.float32  # no comparison
            return rounded(result) if numbers else result

        return operation

    of.cast_impl, of.create_dot = cast_impl, create_dot
    of.unary_op, of.binary_op, of.ternary_op = numerically(unary), numerically(binary), numerically(ternary)
