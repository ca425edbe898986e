"""`rope` in Triton: a program rotates all heads of q and of k of one token, with its cos and sin in registers.

Legend: B sequences, T tokens, H heads of q, G heads of k, E numbers of a head, R of them rotated, P = R / 2 pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels import launch
from fastdpo_kernels.rope import Rotation


@triton.jit
def _interleaved(pointers, mask, B: tl.constexpr):
    """(A, 2 B) pointers to pairs of neighbours -> the first and the second of each, (A, B) fp32."""
    values = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(values, (values.shape[0], B, 2)))


@triton.jit
def _factors(
    factor, column_stride, P: tl.constexpr, B: tl.constexpr, INTERLEAVED: tl.constexpr, BY_PAIR: tl.constexpr
):  # fmt: skip
    """A token's cos or sin for the first and the second number of each pair, (1, B) each."""
    pairs = tl.arange(0, B)[None, :]
    if BY_PAIR:
        of_first = tl.load(factor + pairs * column_stride, mask=pairs < P, other=0.0).to(tl.float32)
        return of_first, of_first
    elif INTERLEAVED:
        columns = tl.arange(0, 2 * B)[None, :]
        return _interleaved(factor + columns * column_stride, columns < 2 * P, B)
    else:
        of_first = tl.load(factor + pairs * column_stride, mask=pairs < P, other=0.0).to(tl.float32)
        of_second = tl.load(factor + (P + pairs) * column_stride, mask=pairs < P, other=0.0).to(tl.float32)
        return of_first, of_second


@triton.jit
def _rounded(x, result, ROUND: tl.constexpr):
    if ROUND:
        x = x.to(result.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _rotate_heads(
    x, result, cos_a, cos_b, sin_a, sin_b, heads, HEADS, head_stride, stride, result_head_stride,
    E: tl.constexpr, P: tl.constexpr, B: tl.constexpr, PASSED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """Some heads (A, 1) of one token, of which x and result are the first numbers."""
    x += heads.to(tl.int64) * head_stride
    result += heads.to(tl.int64) * result_head_stride
    dtype = result.dtype.element_ty
    if INTERLEAVED:
        columns = tl.arange(0, 2 * B)[None, :]
        inside = (heads < HEADS) & (columns < 2 * P)
        a, b = _interleaved(x + columns * stride, inside, B)
    else:
        pairs = tl.arange(0, B)[None, :]
        inside = (heads < HEADS) & (pairs < P)
        a = tl.load(x + pairs * stride, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + (P + pairs) * stride, mask=inside, other=0.0).to(tl.float32)
    to_a = (_rounded(a * cos_a, result, ROUND) - _rounded(b * sin_a, result, ROUND)).to(dtype)
    to_b = (_rounded(b * cos_b, result, ROUND) + _rounded(a * sin_b, result, ROUND)).to(dtype)
    if INTERLEAVED:
        columns = tl.arange(0, 2 * B)[None, :]
        tl.store(result + columns, tl.reshape(tl.join(to_a, to_b), (a.shape[0], 2 * B)), mask=inside)
    else:
        pairs = tl.arange(0, B)[None, :]
        tl.store(result + pairs, to_a, mask=inside)
        tl.store(result + P + pairs, to_b, mask=inside)
    if PASSED > 0:
        rest = 2 * P + tl.arange(0, PASSED)[None, :]
        inside = (heads < HEADS) & (rest < E)
        tl.store(result + rest, tl.load(x + rest * stride, mask=inside, other=0.0).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _rope_kernel(
    q, k, cos, sin, q_result, k_result, T, H, G,
    q_batch_stride, q_head_stride, q_token_stride, q_stride, q_result_batch_stride, q_result_head_stride,
    q_result_token_stride, k_batch_stride, k_head_stride, k_token_stride, k_stride, k_result_batch_stride,
    k_result_head_stride, k_result_token_stride, cos_batch_stride, cos_token_stride, cos_stride,
    sin_batch_stride, sin_token_stride, sin_stride,
    E: tl.constexpr, P: tl.constexpr, B: tl.constexpr, PASSED: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr, BY_PAIR: tl.constexpr, BACKWARD: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """k and its result may be None."""
    batch = (tl.program_id(0) // T).to(tl.int64)
    token = (tl.program_id(0) % T).to(tl.int64)
    cos += batch * cos_batch_stride + token * cos_token_stride
    sin += batch * sin_batch_stride + token * sin_token_stride
    cos_a, cos_b = _factors(cos, cos_stride, P, B, INTERLEAVED, BY_PAIR)
    sin_a, sin_b = _factors(sin, sin_stride, P, B, INTERLEAVED, BY_PAIR)
    if BACKWARD:
        sin_a, sin_b = -sin_b, -sin_a
    q += batch * q_batch_stride + token * q_token_stride
    q_result += batch * q_result_batch_stride + token * q_result_token_stride
    for first in range(0, H, HEADS):
        _rotate_heads(
            q, q_result, cos_a, cos_b, sin_a, sin_b, first + tl.arange(0, HEADS)[:, None], H, q_head_stride, q_stride,
            q_result_head_stride, E, P, B, PASSED, INTERLEAVED, ROUND,
        )  # fmt: skip
    if k is not None:
        k += batch * k_batch_stride + token * k_token_stride
        k_result += batch * k_result_batch_stride + token * k_result_token_stride
        for first in range(0, G, HEADS):
            _rotate_heads(
                k, k_result, cos_a, cos_b, sin_a, sin_b, first + tl.arange(0, HEADS)[:, None], G, k_head_stride,
                k_stride, k_result_head_stride, E, P, B, PASSED, INTERLEAVED, ROUND,
            )  # fmt: skip


@torch._disable_dynamo  # a graph of torch.compile breaks here
def rotate(
    inputs: tuple[Tensor, ...],  # q and k, or one of them: (B, heads, T, E)
    cos: Tensor,
    sin: Tensor,
    results: tuple[Tensor, ...],  # as inputs, with neighbours side by side
    rotation: Rotation,
) -> None:
    batch, _, tokens, size = inputs[0].shape
    pairs = cos.shape[2] if rotation.by_pair else cos.shape[2] // 2
    if not batch * tokens * size:
        return
    (q, q_result), (k, k_result) = [*zip(inputs, results, strict=True), (None, None)][:2]
    config = launch.rope_config(pairs, max(x.shape[1] for x in inputs))
    constants: dict[str, Any] = {
        "E": size,
        "P": pairs,
        "B": config.block,
        "PASSED": _power_of_2(size - 2 * pairs),
        "HEADS": config.rows,
        "INTERLEAVED": rotation.interleaved,
        "BY_PAIR": rotation.by_pair,
        "BACKWARD": rotation.backward,
        "ROUND": not rotation.upcast,
    }
    constants |= {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": False}
    constants |= launch.every_register(config.num_warps, launch.device_of(q.device))
    _rope_kernel[(batch * tokens,)](
        q, k, cos, sin, q_result, k_result, tokens, q.shape[1], 0 if k is None else k.shape[1],
        *q.stride(), *q_result.stride()[:3], *_strides(k), *_strides(k_result)[:3], *_factor_strides(cos, batch),
        *_factor_strides(sin, batch), **constants,
    )  # fmt: skip


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0,) * 4 if x is None else x.stride()


def _factor_strides(factor: Tensor, batch: int) -> tuple[int, ...]:
    """One row for all sequences has nowhere to go."""
    return (0 if factor.shape[0] < batch else factor.stride(0), *factor.stride()[1:])


def _power_of_2(size: int) -> int:
    """The next one; 0 of 0."""
    return size and 1 << (size - 1).bit_length()
