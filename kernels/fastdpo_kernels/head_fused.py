"""linear_logps in Triton alone: the LM head's product and the log-sum-exp in one kernel, the logits never in memory.

Forward: a program owns a tile of rows and a range of the vocabulary. It computes one tile of logits after another and
keeps of each the softmax state of its rows, six numbers at most. A second kernel joins the ranges' states with the
target's exact logit. Those states, (ranges, 2 or 6, N), are all that is allocated beside the results.

Backward: the logits are computed again, a slab of the vocabulary at a time, and their gradient, rounded as torch rounds
it, is all that is stored of them. One product with the slab adds its share to dH, in fp32; another finishes the slab's
rows of dW, as the slab has every row of hidden. That is one product of N x V x D for the slabs and one for each
gradient, on every multiprocessor however few rows there are, and no buffer of the size of dW. A program that owned a
tile of rows, or of the vocabulary, from its logits to its gradient would need one product more when both gradients are
wanted, an fp32 dW, and 132 tiles of rows to fill an H200.

The slab and the fp32 sums of dH take at most `workspace_bytes`, rows going in chunks; with a head that trains, whose
slabs need every row, the slab takes that and the sums another N x D.

Nothing is atomic, every element of a result has one owner, and slabs come in order: results repeat bitwise.

Legend: N rows, V vocabulary, D hidden size; C rows of a chunk, S columns of a slab. A program's tile of a product is
BLOCK_M x BLOCK_N, summed over BLOCK_K terms at a time.
"""

# A type checker knows neither the options of a launch nor that constexpr parameters take plain values.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdpo_kernels import launch
from fastdpo_kernels._device import LOWEST, absorb, empty_state, exp, finish, finish_stats, slope, to_logits
from fastdpo_kernels.head import STATS, HeadForward, HeadOptions, Wants


def forward(
    hidden: Tensor,  # (N, D), any stride
    weight: Tensor,  # (V, D), each row contiguous
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    options: HeadOptions,
    wants: Wants,
) -> HeadForward:
    """The same whatever `wants` is, as the backward computes the logits again."""
    hidden, bias, targets = _arranged(hidden, weight, bias, targets)
    rows = hidden.shape[0]
    result = HeadForward(
        logps=hidden.new_empty(rows, dtype=torch.float32),
        stats={name: hidden.new_empty(rows, dtype=torch.float32) for name in options.stats},
        saved=tuple(hidden.new_empty(rows, dtype=torch.float32) for _ in range(3)),
    )
    if rows:
        states = _range_states(hidden, weight, bias, targets, options)
        _join_states(states, hidden, weight, bias, targets, options, result)
    return result


def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    saved: tuple[Tensor, ...],  # peak, total, complement: (N,) each
    kept: None,
    grad_logps: Tensor,  # (N,)
    options: HeadOptions,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """-> gradients of hidden, weight and bias, each where `needs` asks for it."""
    hidden, bias, targets = _arranged(hidden, weight, bias, targets)
    rows, (vocabulary, hidden_size) = hidden.shape[0], weight.shape
    grad_hidden, grad_weight, grad_bias = (
        None if tensor is None or not need else tensor.new_empty(tensor.shape) if rows else torch.zeros_like(tensor)
        for tensor, need in zip((hidden, weight, bias), needs, strict=True)
    )
    if rows == 0:
        return grad_hidden, grad_weight, grad_bias
    chunk, columns = launch.fused_slab(
        rows,
        vocabulary,
        hidden_size,
        hidden.dtype,
        launch.device_of(hidden.device),
        options.workspace_bytes,
        whole_rows=needs[1] or needs[2],
    )
    slab = hidden.new_empty(chunk, columns)
    rounds = grad_hidden is not None and grad_hidden.dtype != torch.float32
    sums = hidden.new_empty(chunk, hidden_size, dtype=torch.float32) if rounds else None
    factors = torch.stack((*saved, grad_logps))
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        grad_part = None if grad_hidden is None else grad_hidden[part]
        exact = grad_part if sums is None else sums[: part.stop - start]
        inputs = hidden[part], weight, bias, targets[part], factors[:, part], options
        _backward_chunk(*inputs, slab[: part.stop - start], exact, grad_weight, grad_bias)
        if grad_part is not None and sums is not None:
            grad_part.copy_(sums[: part.stop - start])
    return grad_hidden, grad_weight, grad_bias


def _backward_chunk(
    hidden: Tensor,  # (C, D)
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,  # (C,)
    factors: Tensor,  # (4, C) peak, total, complement, upstream gradient
    options: HeadOptions,
    slab: Tensor,  # (C, S), overwritten
    grad_hidden: Tensor | None,  # (C, D) fp32
    grad_weight: Tensor | None,  # (V, D); with all rows in the chunk
    grad_bias: Tensor | None,  # (V,)
) -> None:
    """Fills the three gradients from a chunk of rows, a slab of the vocabulary at a time."""
    for first in range(0, weight.shape[0], slab.shape[1]):
        part = slice(first, min(first + slab.shape[1], weight.shape[0]))
        gradient, bias_part = slab[:, : part.stop - first], None if bias is None else bias[part]
        _logit_gradients(gradient, hidden, weight[part], bias_part, targets, factors, first, options)
        if grad_hidden is not None:
            _multiply(gradient, weight[part], grad_hidden, transposed=False, accumulate=first > 0)
        if grad_weight is not None:
            _multiply(gradient, hidden, grad_weight[part], transposed=True, accumulate=False)
        if grad_bias is not None:
            grad_bias[part] = gradient.sum(0, dtype=torch.float32)


def _arranged(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """hidden, bias and targets as the kernels read them: copies of N x D at most."""
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        raise ValueError(
            f"method='fused' reads rows of weight, and {tuple(weight.shape)} has strides {weight.stride()}: pass "
            "weight.contiguous(), or use method='streamed'"
        )
    hidden = hidden if hidden.stride(1) == 1 or hidden.shape[1] == 1 else hidden.contiguous()
    return hidden, None if bias is None else bias.contiguous(), targets.contiguous()


# ---- what the launchers share


def _aligned(*matrices: Tensor) -> bool:
    """Whether rows start at multiples of 16 bytes, as tensor descriptors (TMA) need, and 16 elements apart, by which
    Triton knows that it can load 16 bytes a thread.
    """
    return all(
        matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 16 == 0 and matrix.stride(0) >= matrix.shape[1]
        for matrix in matrices
    )


def _operand(matrix: Tensor, block: tuple[int, int], config: launch.MatmulConfig) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, list(block)) if config.descriptors else matrix


def _operands(hidden: Tensor, weight: Tensor, config: launch.MatmulConfig) -> tuple[Tensor | TensorDescriptor, ...]:
    """Of a product of hidden with weight.T."""
    blocks = (config.block_m, config.block_k), (config.block_n, config.block_k)
    return _operand(hidden, blocks[0], config), _operand(weight, blocks[1], config)


def _matmul_launch(config: launch.MatmulConfig, terms: int, device: launch.Device) -> dict[str, Any]:
    share = {"maxnreg": config.registers} if device.kind == "cuda" else {}  # AMD's compiler has no such option
    return share | {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "EVEN_K": config.descriptors or terms % config.block_k == 0,
        "PARTS": max(1, config.block_n // config.epilogue),
        "DESCRIPTORS": config.descriptors,
        "SIDE_BY_SIDE": launch.ROW_TILES_SIDE_BY_SIDE,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _with_stats(options: HeadOptions, dtype: torch.dtype) -> bool:
    """Whether the states are those of statistics too. A log-prob's bits must not depend on who asks for statistics, so
    nothing may be fused into multiply-adds by what else a kernel computes: the compiler is told not to, but in fp32,
    whose products are multiply-adds. There one kernel serves both.
    """
    return bool(options.stats) or dtype == torch.float32


@triton.jit
def _tile_of(program, row_tiles, columns, SIDE_BY_SIDE: tl.constexpr):
    """-> row tile, column. SIDE_BY_SIDE row tiles go through the columns together: the programs that run at one time
    share what they read along both, and W comes from memory once for each such group.
    """
    first = program // (SIDE_BY_SIDE * columns) * SIDE_BY_SIDE
    together = tl.minimum(row_tiles - first, SIDE_BY_SIDE)
    place = program - first * columns
    return first + place % together, place // together


@triton.jit
def _halves(tile, R: tl.constexpr, B: tl.constexpr):
    """The left and the right half of a tile's B columns."""
    return tl.split(tl.permute(tl.reshape(tile, (R, 2, B // 2)), (0, 2, 1)))


@triton.jit
def _logit_products(
    hidden, weight, first_row, first_column, N, V, D, hidden_stride, weight_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """W h of a tile. Past the last row or column it repeats that one, or, with descriptors, is 0."""
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIPTORS:
        for d in range(0, D, BLOCK_K):
            h, w = hidden.load([first_row, d]), weight.load([first_column, d])
            products = tl.dot(h, w.T, products, input_precision="ieee")
    else:
        along = tl.arange(0, BLOCK_K)[None, :]
        rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), N - 1).to(tl.int64)[:, None]
        columns = tl.minimum(first_column + tl.arange(0, BLOCK_N), V - 1).to(tl.int64)[:, None]
        of_rows, of_columns = hidden + rows * hidden_stride + along, weight + columns * weight_stride + along
        for d in range(0, D, BLOCK_K):
            if EVEN_K:
                h, w = tl.load(of_rows + d), tl.load(of_columns + d)
            else:
                h = tl.load(of_rows + d, mask=along < D - d, other=0.0)
                w = tl.load(of_columns + d, mask=along < D - d, other=0.0)
            products = tl.dot(h, w.T, products, input_precision="ieee")
    return products


# ---- forward


@triton.jit
def _absorb_tile(
    peak, total, spread, squares, sum_, before, products, bias, target, first_column, V,
    logit_scale, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr, WITH_STATS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The state after a tile of W h, a part of its columns at a time. `before` is the peak of the columns before the
    target: what is needed of the first column that has the peak, for less than an argmax.
    """
    if PARTS > 1:
        half: tl.constexpr = BLOCK_N // 2
        left, right = _halves(products, BLOCK_M, BLOCK_N)
        peak, total, spread, squares, sum_, before = _absorb_tile(
            peak, total, spread, squares, sum_, before, left, bias, target, first_column, V,
            logit_scale, softcap, inverse_temperature, HAS_SOFTCAP, WITH_STATS, BLOCK_M, half, PARTS // 2,
        )  # fmt: skip
        return _absorb_tile(
            peak, total, spread, squares, sum_, before, right, bias, target, first_column + half, V,
            logit_scale, softcap, inverse_temperature, HAS_SOFTCAP, WITH_STATS, BLOCK_M, half, PARTS // 2,
        )  # fmt: skip
    else:
        columns = first_column + tl.arange(0, BLOCK_N)
        offsets = None
        if bias is not None:
            offsets = tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        z = to_logits(products, offsets, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP)
        # columns counted from the tile's first: the others would be kept in registers from one tile to the next
        place, target_place = tl.arange(0, BLOCK_N)[None, :], (target - first_column)[:, None]
        counted = (place < V - first_column) & (place != target_place)
        peak, total, spread, squares, sum_ = absorb(peak, total, spread, squares, sum_, z, counted, WITH_STATS)
        if WITH_STATS:
            before = tl.maximum(before, tl.max(tl.where(place < target_place, z, LOWEST), 1))
        return peak, total, spread, squares, sum_, before


@triton.jit(do_not_specialize=["N", "ranges", "tiles_a_range"])
def _range_states_kernel(
    hidden, weight, bias, targets, states, N, V, D, hidden_stride, weight_stride, ranges, tiles_a_range,
    logit_scale, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr, WITH_STATS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PARTS: tl.constexpr, DESCRIPTORS: tl.constexpr, SIDE_BY_SIDE: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows and a range of the vocabulary: the state of its columns but the target's."""
    row_tile, vocabulary_range = _tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_M), ranges, SIDE_BY_SIDE)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < N
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
    peak, total, spread, squares, sum_ = empty_state(BLOCK_M)
    before = peak
    first_tile = vocabulary_range * tiles_a_range
    for tile in range(first_tile, tl.minimum(first_tile + tiles_a_range, tl.cdiv(V, BLOCK_N))):
        products = _logit_products(
            hidden, weight, row_tile * BLOCK_M, tile * BLOCK_N, N, V, D, hidden_stride, weight_stride,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS,
        )  # fmt: skip
        peak, total, spread, squares, sum_, before = _absorb_tile(
            peak, total, spread, squares, sum_, before, products, bias, target, tile * BLOCK_N, V,
            logit_scale, softcap, inverse_temperature, HAS_SOFTCAP, WITH_STATS, BLOCK_M, BLOCK_N, PARTS,
        )  # fmt: skip
    stride = tl.cast(N, tl.int64)
    states += vocabulary_range * stride * (6 if WITH_STATS else 2) + rows
    tl.store(states, peak, mask=inside)
    tl.store(states + stride, total, mask=inside)
    if WITH_STATS:
        tl.store(states + 2 * stride, spread, mask=inside)
        tl.store(states + 3 * stride, squares, mask=inside)
        tl.store(states + 4 * stride, sum_, mask=inside)
        tl.store(states + 5 * stride, before, mask=inside)


def _range_states(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions) -> Tensor:
    """-> (ranges, 2 or 6, N): peak, total, and for statistics spread, squares, sum, and the peak before the target."""
    rows, (vocabulary, hidden_size) = hidden.shape[0], weight.shape
    device = launch.device_of(hidden.device)
    config = launch.fused_logits(rows, hidden.dtype, device, _aligned(hidden, weight))
    ranges = launch.fused_ranges(rows, vocabulary, config, device)
    with_stats = _with_stats(options, hidden.dtype)
    states = hidden.new_empty((ranges, 6 if with_stats else 2, rows), dtype=torch.float32)
    _range_states_kernel[(triton.cdiv(rows, config.block_m) * ranges,)](
        *_operands(hidden, weight, config), bias, targets, states, rows, vocabulary, hidden_size,
        hidden.stride(0), weight.stride(0), ranges, triton.cdiv(triton.cdiv(vocabulary, config.block_n), ranges),
        **options.of_kernels, WITH_STATS=with_stats, **_matmul_launch(config, hidden_size, device),
        enable_fp_fusion=hidden.dtype == torch.float32,
    )  # fmt: skip
    return states


@triton.jit
def _target_logits(
    hidden, weight, bias, rows, target, scored, D, hidden_stride, weight_stride,
    logit_scale, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z of each row's target, as an fp32 dot of h_n with W[y_n]."""
    along = tl.arange(0, BLOCK_K)[None, :]
    of_rows = hidden + rows.to(tl.int64)[:, None] * hidden_stride + along
    of_targets = weight + target[:, None] * weight_stride + along
    products = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for d in range(0, D, BLOCK_K):
        read = scored[:, None] & (along < D - d)
        h = tl.load(of_rows + d, mask=read, other=0.0).to(tl.float32)
        products += h * tl.load(of_targets + d, mask=read, other=0.0).to(tl.float32)
    offset = None
    if bias is not None:
        offset = tl.load(bias + target, mask=scored, other=0.0).to(tl.float32)
    return to_logits(tl.sum(products, 1), offset, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP)


@triton.jit
def _joined(states, stride, inside, ranges, WITH_STATS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The state of whole rows from those of the ranges; `states` points at the first range's peaks."""
    peak, total, spread, squares, sum_ = empty_state(BLOCK_M)
    before = peak
    for _ in range(0, ranges):
        next_peak = tl.load(states, mask=inside, other=0.0)
        next_total = tl.load(states + stride, mask=inside, other=0.0)
        new_peak = tl.maximum(peak, next_peak)
        shrink, next_shrink = exp(peak - new_peak), exp(next_peak - new_peak)
        if WITH_STATS:
            next_spread = tl.load(states + 2 * stride, mask=inside, other=0.0)
            next_squares = tl.load(states + 3 * stride, mask=inside, other=0.0)
            sum_ += tl.load(states + 4 * stride, mask=inside, other=0.0)
            before = tl.maximum(before, tl.load(states + 5 * stride, mask=inside, other=0.0))
            spread = shrink * (spread + (peak - new_peak) * total)
            spread += next_shrink * (next_spread + (next_peak - new_peak) * next_total)
            squares = shrink * shrink * squares + next_shrink * next_shrink * next_squares
        total = shrink * total + next_shrink * next_total
        peak = new_peak
        states += stride * (6 if WITH_STATS else 2)
    return peak, total, spread, squares, sum_, before


@triton.jit(do_not_specialize=["N", "ranges"])
def _join_states_kernel(
    states, hidden, weight, bias, targets, logps, peaks, totals, complements,
    entropy, mean_logit, is_top1, log_sum_sq_probs, N, V, D, hidden_stride, weight_stride, ranges,
    logit_scale, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr, WITH_STATS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows: joins the states of their ranges with the target's logit, and finishes."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < N
    target = tl.load(targets + rows, mask=inside, other=-1)
    scored = (target >= 0) & (target < V)
    target_logit = _target_logits(
        hidden, weight, bias, rows, target, scored, D, hidden_stride, weight_stride,
        logit_scale, softcap, inverse_temperature, HAS_SOFTCAP, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    peak, total, spread, squares, sum_, before = _joined(
        states + rows, tl.cast(N, tl.int64), inside, ranges, WITH_STATS, BLOCK_M
    )
    logp, whole_peak, whole, complement = finish(peak, total, target_logit)
    unknown = tl.where(scored, 0.0, float("nan"))
    tl.store(logps + rows, logp + unknown, mask=inside)
    tl.store(peaks + rows, whole_peak, mask=inside)
    tl.store(totals + rows, whole, mask=inside)
    tl.store(complements + rows, complement, mask=inside)
    if WITH_STATS:
        row_entropy, row_mean, row_is_top1, row_squares = finish_stats(
            peak, total, spread, squares, sum_, before, target_logit, V
        )
        if entropy is not None:
            tl.store(entropy + rows, row_entropy + unknown, mask=inside)
        if mean_logit is not None:
            tl.store(mean_logit + rows, row_mean + unknown, mask=inside)
        if is_top1 is not None:
            tl.store(is_top1 + rows, row_is_top1 + unknown, mask=inside)
        if log_sum_sq_probs is not None:
            tl.store(log_sum_sq_probs + rows, row_squares + unknown, mask=inside)


def _join_states(
    states: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: HeadOptions,
    result: HeadForward,
) -> None:
    """Writes every tensor of `result`."""
    rows, hidden_size = hidden.shape
    config = launch.fused_join(hidden_size)
    _join_states_kernel[(triton.cdiv(rows, launch.FUSED_JOIN_ROWS),)](
        states, hidden, weight, bias, targets, result.logps, *result.saved, *map(result.stats.get, STATS),
        rows, weight.shape[0], hidden_size, hidden.stride(0), weight.stride(0), states.shape[0],
        **options.of_kernels, WITH_STATS=_with_stats(options, hidden.dtype),
        BLOCK_M=launch.FUSED_JOIN_ROWS, BLOCK_K=config.block, num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


# ---- backward


@triton.jit
def _store_gradients(
    slab, products, bias, rows, inside, target, peak, inverse_total, complement, upstream, first_column, V,
    slab_stride, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Turns a tile of W h into upstream * (1[v = y] - p_v) * dz/d(W h), a part of its columns at a time."""
    if PARTS > 1:
        half: tl.constexpr = BLOCK_N // 2
        left, right = _halves(products, BLOCK_M, BLOCK_N)
        _store_gradients(
            slab, left, bias, rows, inside, target, peak, inverse_total, complement, upstream, first_column, V,
            slab_stride, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP, BLOCK_M, half, PARTS // 2,
        )  # fmt: skip
        _store_gradients(
            slab, right, bias, rows, inside, target, peak, inverse_total, complement, upstream, first_column + half, V,
            slab_stride, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP, BLOCK_M, half, PARTS // 2,
        )  # fmt: skip
    else:
        columns = first_column + tl.arange(0, BLOCK_N)
        offsets = None
        if bias is not None:
            offsets = tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        z = to_logits(products, offsets, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP)
        probabilities = exp(z - peak[:, None]) * inverse_total[:, None]
        gradient = tl.where(columns[None, :] == target[:, None], complement[:, None], -probabilities)
        gradient *= slope(products, offsets, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP)
        at = slab + rows.to(tl.int64)[:, None] * slab_stride + columns[None, :]
        mask = inside[:, None] & (columns < V)[None, :]
        tl.store(at, (gradient * upstream[:, None]).to(slab.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "first"])
def _logit_gradients_kernel(
    slab, hidden, weight, bias, targets, factors, N, V, D, first, slab_stride, hidden_stride, weight_stride,
    factors_stride, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PARTS: tl.constexpr, DESCRIPTORS: tl.constexpr, SIDE_BY_SIDE: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of the slab. V counts the slab's columns, which start at the vocabulary's `first`."""
    row_tile, column_tile = _tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(V, BLOCK_N), SIDE_BY_SIDE)
    products = _logit_products(
        hidden, weight, row_tile * BLOCK_M, column_tile * BLOCK_N, N, V, D, hidden_stride, weight_stride,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS,
    )  # fmt: skip
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < N
    target = tl.load(targets + rows, mask=inside, other=-1) - first
    peak = tl.load(factors + rows, mask=inside, other=0.0)
    total = tl.load(factors + factors_stride + rows, mask=inside, other=1.0)
    complement = tl.load(factors + 2 * factors_stride + rows, mask=inside, other=0.0)
    upstream = tl.load(factors + 3 * factors_stride + rows, mask=inside, other=0.0)
    _store_gradients(
        slab, products, bias, rows, inside, target, peak, 1.0 / total, complement, upstream, column_tile * BLOCK_N, V,
        slab_stride, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP, BLOCK_M, BLOCK_N, PARTS,
    )  # fmt: skip


def _logit_gradients(
    slab: Tensor,  # (C, S), filled
    hidden: Tensor,  # (C, D)
    weight: Tensor,  # (S, D)
    bias: Tensor | None,  # (S,)
    targets: Tensor,  # (C,)
    factors: Tensor,  # (4, C)
    first: int,  # the vocabulary's column that is the slab's column 0
    options: HeadOptions,
) -> None:
    (rows, hidden_size), columns = hidden.shape, weight.shape[0]
    device = launch.device_of(hidden.device)
    config = launch.fused_logits(rows, hidden.dtype, device, _aligned(hidden, weight))
    _logit_gradients_kernel[(triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n),)](
        slab, *_operands(hidden, weight, config), bias, targets, factors, rows, columns, hidden_size, first,
        slab.stride(0), hidden.stride(0), weight.stride(0), factors.stride(0),
        **options.of_kernels, **_matmul_launch(config, hidden_size, device),
    )  # fmt: skip


@triton.jit
def _store_products(
    out, products, rows, first_column, M, D, out_stride, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Stores a tile in `out`, or adds it, a part of its columns at a time."""
    if PARTS > 1:
        half: tl.constexpr = BLOCK_N // 2
        left, right = _halves(products, BLOCK_M, BLOCK_N)
        _store_products(out, left, rows, first_column, M, D, out_stride, ACCUMULATE, BLOCK_M, half, PARTS // 2)
        _store_products(out, right, rows, first_column + half, M, D, out_stride, ACCUMULATE, BLOCK_M, half, PARTS // 2)
    else:
        columns = first_column + tl.arange(0, BLOCK_N)
        at = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
        inside = (rows < M)[:, None] & (columns < D)[None, :]
        if ACCUMULATE:
            products += tl.load(at, mask=inside, other=0.0)
        tl.store(at, products.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _multiply_kernel(
    left, right, out, M, K, D, left_stride, right_stride, out_stride,
    TRANSPOSED: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PARTS: tl.constexpr, DESCRIPTORS: tl.constexpr, SIDE_BY_SIDE: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of out (M, D) = left (M, K) @ right (K, D), left being stored as (K, M) if TRANSPOSED."""
    row_tile, column_tile = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(D, BLOCK_N), SIDE_BY_SIDE)
    first_row, first_column = row_tile * BLOCK_M, column_tile * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_M)
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIPTORS:
        for k in range(0, K, BLOCK_K):
            a = left.load([k, first_row]).T if TRANSPOSED else left.load([first_row, k])
            products = tl.dot(a, right.load([k, first_column]), products, input_precision="ieee")
    else:
        terms = tl.arange(0, BLOCK_K)
        columns = first_column + tl.arange(0, BLOCK_N)[None, :]
        if TRANSPOSED:
            of_left = left + terms.to(tl.int64)[None, :] * left_stride + rows[:, None]
            left_step = tl.cast(left_stride, tl.int64) * BLOCK_K
        else:
            of_left = left + rows.to(tl.int64)[:, None] * left_stride + terms[None, :]
            left_step = tl.cast(BLOCK_K, tl.int64)
        of_right = right + terms.to(tl.int64)[:, None] * right_stride + columns
        for k in range(0, K, BLOCK_K):
            left_inside, right_inside = (rows < M)[:, None], columns < D
            if not EVEN_K:
                left_inside &= (terms < K - k)[None, :]
                right_inside &= (terms < K - k)[:, None]
            a = tl.load(of_left, mask=left_inside, other=0.0)
            b = tl.load(of_right, mask=right_inside, other=0.0)
            products = tl.dot(a, b, products, input_precision="ieee")
            of_left += left_step
            of_right += tl.cast(right_stride, tl.int64) * BLOCK_K
    _store_products(out, products, rows, first_column, M, D, out_stride, ACCUMULATE, BLOCK_M, BLOCK_N, PARTS)


def _multiply(left: Tensor, right: Tensor, out: Tensor, transposed: bool, accumulate: bool) -> None:
    """out = left @ right, or left.T @ right; or adds that to out."""
    (rows, columns), terms = out.shape, right.shape[0]
    device = launch.device_of(left.device)
    config = launch.fused_gradient(rows, columns, left.dtype, device, _aligned(left, right))
    left_block = (config.block_k, config.block_m) if transposed else (config.block_m, config.block_k)
    _multiply_kernel[(triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n),)](
        _operand(left, left_block, config), _operand(right, (config.block_k, config.block_n), config), out,
        rows, terms, columns, left.stride(0), right.stride(0), out.stride(0),
        TRANSPOSED=transposed, ACCUMULATE=accumulate, **_matmul_launch(config, terms, device),
    )  # fmt: skip
