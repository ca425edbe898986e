"""linear_logps by cuBLAS and Triton: chunks of rows through one workspace, W h in, d logp / d (W h + b) out.

    products = X W^T              cuBLAS into the workspace
    row kernel                    log-sum-exp, statistics and, in place, the gradient of the logits
    dH = products W               cuBLAS out of the workspace

A row is read twice and written once, the second time backwards: what was read last is likely still in the L2 cache.
Without a gradient the kernel stops after the first pass. A head that trains needs the upstream gradient g for
dW = sum_n g_n (d logp_n / d (W h_n)) h_n^T, so its forward keeps three numbers a row and its backward computes the
products again (or finds them kept, where all rows fit the workspace). g scales the (C, D) hidden rows, not the (C, V)
gradient. dW is summed in fp32 over chunks; a single chunk's goes straight to the dtype of W.

Memory: (C, V) in the dtype of `hidden` (C from `launch.streamed_rows`), and for dW of several chunks (V, D) in fp32.
Rows of the workspace start at multiples of 128 bytes; BLAS takes that as a leading dimension, without a copy.

Numerics: from products rounded to the dtype of `hidden` to results in fp32, with the target's logit an fp32 dot. The
compiler must not fuse products and sums: whether it does depends on what else the kernel computes, and a log-prob must
not depend on whether statistics or a gradient were asked for. Deterministic.

Legend: N rows, D hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels import launch
from fastdpo_kernels._device import LOWEST, absorb, empty_state, exp, finish, finish_stats, slope, to_logits
from fastdpo_kernels.head import STATS, HeadForward, HeadOptions, Wants


def forward(
    hidden: Tensor,  # (N, D), any stride
    weight: Tensor,  # (V, D), any stride
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    options: HeadOptions,
    wants: Wants,
) -> HeadForward:
    rows = hidden.shape[0]
    result = HeadForward(
        logps=_per_row(hidden),
        stats={name: _per_row(hidden) for name in options.stats},
        hidden_jacobian=hidden.new_empty(hidden.shape) if wants is Wants.HIDDEN_GRADIENT else None,
        saved=tuple(_per_row(hidden) for _ in range(3)) if wants is Wants.ALL_GRADIENTS else (),
    )
    weight, bias, targets = _for_products(weight), None if bias is None else bias.contiguous(), targets.contiguous()
    workspace = _workspace(hidden, weight, options)
    for first in range(0, rows, len(workspace)):
        chunk = slice(first, min(first + len(workspace), rows))
        products = workspace[: chunk.stop - first, : len(weight)]
        torch.mm(hidden[chunk], weight.T, out=products)
        _softmax_rows(products, first, hidden, weight, bias, targets, options, result)
        if result.hidden_jacobian is not None:
            torch.mm(products, weight, out=result.hidden_jacobian[chunk])
    if wants is Wants.ALL_GRADIENTS and rows <= len(workspace):
        result.kept = workspace
    return result


def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    saved: tuple[Tensor, ...],  # peak, total, complement: (N,) each
    kept: Tensor | None,
    grad_logps: Tensor,  # (N,)
    options: HeadOptions,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """-> gradients of hidden, weight and bias, each where `needs` asks for it."""
    weight, bias, targets = _for_products(weight), None if bias is None else bias.contiguous(), targets.contiguous()
    grad_logps = grad_logps.contiguous()
    workspace = _workspace(hidden, weight, options) if kept is None else kept
    grad_hidden, grad_weight, grad_bias = _new_gradients(hidden, weight, needs, len(workspace))
    for first in range(0, hidden.shape[0], len(workspace)):
        chunk = slice(first, min(first + len(workspace), hidden.shape[0]))
        products, upstream = workspace[: chunk.stop - first, : len(weight)], grad_logps[chunk, None]
        if kept is None:
            torch.mm(hidden[chunk], weight.T, out=products)
        _gradient_rows(products, first, bias, targets, saved, options)
        if grad_hidden is not None:
            torch.mm(products, weight, out=grad_hidden[chunk])
            grad_hidden[chunk] *= upstream
        if grad_weight is not None:
            scaled = torch.mul(hidden[chunk], upstream, out=hidden.new_empty(hidden[chunk].shape))
            _add_product(grad_weight, products.T, scaled, empty=first == 0)
        if grad_bias is not None:
            _add_column_sums(grad_bias, products, upstream)
    return grad_hidden, grad_weight, grad_bias


def _per_row(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


def _for_products(weight: Tensor) -> Tensor:
    """Strides that BLAS takes, or one copy of the whole: torch.mm would make it again for every chunk."""
    (rows, columns), (down, across) = weight.shape, weight.stride()
    taken = (across == 1 and down >= columns) or (down == 1 and across >= rows)
    return weight if taken else weight.contiguous()


def _workspace(hidden: Tensor, weight: Tensor, options: HeadOptions) -> Tensor:
    """(C, V and a little more)"""
    vocabulary, hidden_size = weight.shape
    device = launch.device_of(hidden.device)
    rows = launch.streamed_rows(
        hidden.shape[0], vocabulary, hidden_size, hidden.element_size(), device, options.workspace_bytes
    )
    return hidden.new_empty(rows, launch.row_stride(vocabulary))


def _new_gradients(
    hidden: Tensor, weight: Tensor, needs: tuple[bool, ...], rows_per_chunk: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of weight and bias in the dtype that they are summed in."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    sums = weight.dtype if rows <= rows_per_chunk else torch.float32
    make = weight.new_empty if rows else weight.new_zeros
    return (
        hidden.new_empty(hidden.shape) if needs[0] else None,
        make(weight.shape, dtype=sums) if needs[1] else None,
        weight.new_zeros(vocabulary, dtype=torch.float32) if needs[2] else None,
    )


def _add_product(total: Tensor, left: Tensor, right: Tensor, empty: bool) -> None:
    """total += left @ right, or = where `total` is `empty`; no copy of the size of `total` on a CUDA device."""
    beta = 0 if empty else 1
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=beta)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    else:  # torch has out_dtype on CUDA devices only
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=beta)


# ---- the rows


@triton.jit
def _target_product(hidden, weight, hidden_stride, weight_stride, D, BLOCK_D: tl.constexpr):
    """h . W[y] in fp32."""
    products = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        along = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden + along.to(tl.int64) * hidden_stride, mask=along < D, other=0.0)
        w = tl.load(weight + along.to(tl.int64) * weight_stride, mask=along < D, other=0.0)
        products += h.to(tl.float32) * w.to(tl.float32)
    return tl.sum(products, 0)


@triton.jit
def _block(products, bias, start, V, product_stride, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """-> W h + b of a block of columns, (LANES, VECTOR).

    A lane's VECTOR columns are one load of 16 bytes. It may read up to product_stride, past V: whether it does is then
    the same for all of them.
    """
    columns = start + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    x = tl.load(products + columns, mask=columns < product_stride, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)
    return x


@triton.jit
def _is_column(column, start, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Where in a block a column is: subtracted from rather than compared with, which is one instruction an element."""
    along = column - start - tl.arange(0, LANES) * VECTOR
    return along[:, None] == tl.arange(0, VECTOR)[None, :]


@triton.jit
def _is_before(column, start, LANES: tl.constexpr, VECTOR: tl.constexpr):
    along = column - start - tl.arange(0, LANES) * VECTOR
    return along[:, None] > tl.arange(0, VECTOR)[None, :]


@triton.jit
def _peak_before(
    products, bias, column, V, product_stride, logit_scale, softcap, inverse_temperature,
    HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The largest logit of the columns before one."""
    peak = tl.full((LANES,), LOWEST, tl.float32)
    for start in range(0, column, LANES * VECTOR):
        x = _block(products, bias, start, V, product_stride, LANES, VECTOR)
        z = to_logits(x, None, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP)
        peak = tl.maximum(peak, tl.max(tl.where(_is_before(column, start, LANES, VECTOR), z, LOWEST), 1))
    return tl.max(peak, 0)


@triton.jit
def _join_lanes(peak, total, spread, squares, sum_):
    """States of all lanes -> the row's."""
    whole = tl.max(peak, 0)
    shrink = exp(peak - whole)
    return (
        whole,
        tl.sum(shrink * total, 0),
        tl.sum(shrink * (spread + (peak - whole) * total), 0),
        tl.sum(shrink * shrink * squares, 0),
        tl.sum(sum_, 0),
    )


@triton.jit
def _write_gradient_block(
    products, bias, start, target, peak, total, complement, V, product_stride,
    logit_scale, softcap, inverse_temperature,
    HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Turns a block of a row's products in place into d logp / d (W h + b)."""
    x = _block(products, bias, start, V, product_stride, LANES, VECTOR)
    z = to_logits(x, None, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP)
    gradient = tl.where(_is_column(target, start, LANES, VECTOR), complement, exp(z - peak) * (-1.0 / total))
    gradient *= slope(x, None, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP)
    columns = start + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    tl.store(products + columns, gradient.to(products.dtype.element_ty), mask=columns < product_stride)


@triton.jit(do_not_specialize=["first_row"])
def _softmax_rows_kernel(
    products, hidden, weight, bias, targets, first_row, logps, peaks, totals, complements,
    entropy, mean_logit, is_top1, log_sum_sq_probs,
    V, D, product_stride, hidden_row_stride, hidden_stride, weight_row_stride, weight_stride,
    logit_scale, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr, WITH_STATS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns a row. Each lane keeps the softmax state of its own columns, so that nothing is exchanged between
    threads before the row's end.
    """
    products += tl.program_id(0).to(tl.int64) * product_stride
    row = tl.program_id(0).to(tl.int64) + first_row
    target = tl.load(targets + row)
    exists = (target >= 0) & (target < V)
    target = tl.where(exists, target, 0).to(tl.int32)

    peak, total, spread, squares, sum_ = empty_state(LANES)
    for start in range(0, V, LANES * VECTOR):
        x = _block(products, bias, start, V, product_stride, LANES, VECTOR)
        z = to_logits(x, None, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP)
        counted = _is_before(V, start, LANES, VECTOR) & ~_is_column(target, start, LANES, VECTOR)
        peak, total, spread, squares, sum_ = absorb(peak, total, spread, squares, sum_, z, counted, WITH_STATS)
    peak, total, spread, squares, sum_ = _join_lanes(peak, total, spread, squares, sum_)

    hidden += row * hidden_row_stride
    weight += target.to(tl.int64) * weight_row_stride
    product = _target_product(hidden, weight, hidden_stride, weight_stride, D, BLOCK_D)
    if bias is not None:
        product += tl.load(bias + target).to(tl.float32)
    target_logit = to_logits(product, None, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP)
    target_logit = tl.where(exists, target_logit, float("nan"))  # and with it all that the row gives
    logp, whole_peak, whole, complement = finish(peak, total, target_logit)
    tl.store(logps + row, logp)
    if peaks is not None:
        tl.store(peaks + row, whole_peak)
        tl.store(totals + row, whole)
        tl.store(complements + row, complement)
    if WITH_STATS:
        before = tl.full((), LOWEST, tl.float32)
        if is_top1 is not None and target_logit == peak:  # rare, and only then does `before` matter
            before = _peak_before(
                products, bias, target, V, product_stride, logit_scale, softcap, inverse_temperature,
                HAS_SOFTCAP, LANES, VECTOR,
            )  # fmt: skip
        values = finish_stats(peak, total, spread, squares, sum_, before, target_logit, V)
        if entropy is not None:
            tl.store(entropy + row, values[0])
        if mean_logit is not None:
            tl.store(mean_logit + row, values[1])
        if is_top1 is not None:
            tl.store(is_top1 + row, values[2])
        if log_sum_sq_probs is not None:
            tl.store(log_sum_sq_probs + row, values[3])
    if WITH_GRADIENT:
        last = (V - 1) // (LANES * VECTOR) * (LANES * VECTOR)
        for start in range(0, V, LANES * VECTOR):
            _write_gradient_block(
                products, bias, last - start, target, whole_peak, whole, complement, V, product_stride,
                logit_scale, softcap, inverse_temperature, HAS_SOFTCAP, LANES, VECTOR,
            )  # fmt: skip


def _softmax_rows(
    products: Tensor,  # (C, V)
    first: int,  # the first of its rows among all
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: HeadOptions,
    result: HeadForward,
) -> None:
    (rows, vocabulary), hidden_size = products.shape, hidden.shape[1]
    peaks, totals, complements = result.saved or (None, None, None)
    crowded = bool(options.stats) and (options.softcap is not None or bias is not None)
    blocks = _blocks_of(products, crowded)
    flags = {
        "WITH_STATS": bool(options.stats),
        "WITH_GRADIENT": result.hidden_jacobian is not None,
        "BLOCK_D": launch.target_block(hidden_size, blocks["num_warps"]),
    }
    _softmax_rows_kernel[(rows,)](
        products, hidden, weight, bias, targets, first, result.logps, peaks, totals, complements,
        **{name: result.stats.get(name) for name in STATS}, V=vocabulary, D=hidden_size,
        product_stride=products.stride(0), hidden_row_stride=hidden.stride(0), hidden_stride=hidden.stride(1),
        weight_row_stride=weight.stride(0), weight_stride=weight.stride(1),
        **flags, **options.of_kernels, **blocks,
    )  # fmt: skip


# ---- the backward of a head that trains


@triton.jit(do_not_specialize=["first_row"])
def _gradient_rows_kernel(
    products, bias, targets, first_row, peaks, totals, complements, V, product_stride,
    logit_scale, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A program owns a block of a row."""
    products += tl.program_id(0).to(tl.int64) * product_stride
    row = tl.program_id(0).to(tl.int64) + first_row
    _write_gradient_block(
        products, bias, tl.program_id(1) * (LANES * VECTOR), tl.load(targets + row).to(tl.int32),
        tl.load(peaks + row), tl.load(totals + row), tl.load(complements + row), V, product_stride,
        logit_scale, softcap, inverse_temperature, HAS_SOFTCAP, LANES, VECTOR,
    )  # fmt: skip


def _gradient_rows(
    products: Tensor,  # (C, V)
    first: int,  # the first of its rows among all
    bias: Tensor | None,
    targets: Tensor,
    saved: tuple[Tensor, ...],
    options: HeadOptions,
) -> None:
    (rows, vocabulary), blocks = products.shape, _blocks_of(products)
    peaks, totals, complements = saved
    _gradient_rows_kernel[(rows, triton.cdiv(vocabulary, blocks["LANES"] * blocks["VECTOR"]))](
        products, bias, targets, first, peaks, totals, complements, vocabulary, products.stride(0),
        **options.of_kernels, **blocks,
    )  # fmt: skip


@triton.jit(do_not_specialize=["C"])
def _column_sums_kernel(
    sums, products, upstream, C, V, product_stride, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """A program owns BLOCK_V columns of sums (V,): adds g_n d logp_n / d b, rows from the first to the last."""
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    for start in range(0, C, BLOCK_C):
        inside = start + rows < C
        at = (start + rows).to(tl.int64)[:, None] * product_stride + columns[None, :]
        gradient = tl.load(products + at, mask=inside[:, None] & (columns < product_stride)[None, :], other=0.0)
        total += gradient.to(tl.float32) * tl.load(upstream + start + rows, mask=inside, other=0.0)[:, None]
    before = tl.load(sums + columns, mask=columns < V, other=0.0)
    tl.store(sums + columns, before + tl.sum(total, 0), mask=columns < V)


def _add_column_sums(sums: Tensor, products: Tensor, upstream: Tensor) -> None:
    rows, vocabulary = products.shape
    config = launch.column_config()
    tiles = {
        "BLOCK_C": config.block_rows,
        "BLOCK_V": config.block_vocabulary,
        "num_warps": config.num_warps,
        "num_stages": 1,
        "enable_fp_fusion": False,
    }
    _column_sums_kernel[(triton.cdiv(vocabulary, config.block_vocabulary),)](
        sums, products, upstream, rows, vocabulary, products.stride(0), **tiles
    )


def _blocks_of(products: Tensor, crowded: bool = False) -> dict[str, Any]:
    """Constants and options of a kernel along the rows."""
    itemsize = products.element_size()
    config, vector = launch.row_config(products.shape[1], itemsize, crowded), 16 // itemsize
    blocks = {
        "LANES": config.block // vector,
        "VECTOR": vector,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": False,
    }
    if launch.device_of(products.device).kind == "cuda":  # AMD's compiler has no such option
        blocks["maxnreg"] = config.registers
    return blocks
