"""`pair_loss` and `sequence_sums` in Triton: one program a pair, one launch for everything.

A program adds up its two sequences in fp64, hands the sums to the device function that `symbolic` wrote for this run's
losses, and spreads the derivatives over its tokens. The reference's sums come from the same device functions in the
same block size, so a policy that still is its reference has log-ratios of exactly 0.

Deterministic, and a pair's numbers do not depend on what stands beside it: no atomics, no order between programs.

Legend: N scored tokens, P pairs, S sequences.
"""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo_kernels import device_math, launch, symbolic
from fastdpo_kernels.pair_loss import LossTerm, PairwiseLoss, chosen_tokens_per_pair, match_pairs

# The device function of a weighted list of losses

_CALLABLE = {name: getattr(device_math, name) for name in ("number", "whole_power", *symbolic.DEVICE_FUNCTIONS)}
_device_functions: dict[tuple, tuple[Any, Sequence[LossTerm]]] = {}


def device_function(terms: Sequence[LossTerm]) -> Any:
    """The `@triton.jit` function of these terms, made once. A formula is known by its identity: lambdas are welcome,
    but what one reads from outside of its arguments is what it was the first time.
    """
    key = tuple(
        (id(t.formula), tuple(sorted(t.hyper.items())), t.weight, t.of, t.per, id(t.score), t.matched) for t in terms
    )
    if key not in _device_functions:
        _device_functions[key] = (_compiled(symbolic.source(terms)), terms)  # holding the terms keeps their ids taken
    return _device_functions[key][0]


def _compiled(source: str) -> Any:
    """triton.jit reads a function's source through linecache, so it is put there. The name tells sources apart."""
    filename = f"<pair loss {sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope = {"tl": tl, "__name__": __name__, **_CALLABLE}
    exec(compile(source, filename, "exec"), scope)
    return triton.jit(scope["formula"])


# Forward


@triton.jit
def _sum(values, begin, end, BLOCK: tl.constexpr) -> Any:
    """fp64 sum of values[begin:end]."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(values + at, mask=at < end, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _sums(values, begin, end, shared, LD_ALPHA: tl.constexpr, BLOCK: tl.constexpr):
    """-> sum with the tokens after the first `shared` weighted by LD_ALPHA, and plain sum."""
    if LD_ALPHA is None:
        total = _sum(values, begin, end, BLOCK)
        return total, total
    else:
        head = _sum(values, begin, begin + shared, BLOCK)
        tail = _sum(values, begin + shared, end, BLOCK)
        return head + LD_ALPHA * tail, head + tail


@triton.jit
def _fill(values, begin, end, value, BLOCK: tl.constexpr):
    """values[begin:end] = value"""
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(values + at, tl.zeros((BLOCK,), tl.float64) + value, mask=at < end)


@triton.jit
def _spread(gradient, begin, end, shared, d_sum, d_plain_sum, LD_ALPHA: tl.constexpr, BLOCK: tl.constexpr):
    """The derivatives by a sequence's two sums, to its tokens."""
    if LD_ALPHA is None:
        _fill(gradient, begin, end, d_sum + d_plain_sum, BLOCK)
    else:
        _fill(gradient, begin, begin + shared, d_sum + d_plain_sum, BLOCK)
        _fill(gradient, begin + shared, end, LD_ALPHA * d_sum + d_plain_sum, BLOCK)


@triton.jit
def _load(pointer, offset):
    """fp64 scalar; 0 where there is no such tensor."""
    if pointer is None:
        return tl.full((), 0.0, tl.float64)
    else:
        return tl.load(pointer + offset).to(tl.float64)


@triton.jit
def _pair_loss_kernel(
    token_logps,  # (N,)
    cu_seqlens,  # (2P + 1,)
    ref_logps,  # (P, 2) or None
    log_sum_sq_probs,  # (N,) or None
    matches,  # (P, 3) or None
    mean_reward,  # 0-dim or None
    tokens_per_pair,  # 0-dim or None
    losses,  # (P,)
    logps,  # (P, 2)
    log_ratios,  # (P, 2)
    rewards,  # (P, 2)
    gradient,  # (N,) d loss of its pair / d token_logps, or None
    FORMULA: tl.constexpr,
    BETA: tl.constexpr,
    LD_ALPHA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    begin = tl.load(cu_seqlens + 2 * pair).to(tl.int64)
    middle = tl.load(cu_seqlens + 2 * pair + 1).to(tl.int64)
    end = tl.load(cu_seqlens + 2 * pair + 2).to(tl.int64)
    shared = tl.minimum(middle - begin, end - middle)
    chosen, chosen_plain = _sums(token_logps, begin, middle, shared, LD_ALPHA, BLOCK)
    rejected, rejected_plain = _sums(token_logps, middle, end, shared, LD_ALPHA, BLOCK)
    chosen_ratio = chosen - _load(ref_logps, 2 * pair)
    rejected_ratio = rejected - _load(ref_logps, 2 * pair + 1)
    chosen_tokens = tl.maximum(middle - begin, 1).to(tl.float64)
    rejected_tokens = tl.maximum(end - middle, 1).to(tl.float64)

    tl.store(logps + 2 * pair, chosen)
    tl.store(logps + 2 * pair + 1, rejected)
    tl.store(log_ratios + 2 * pair, chosen_ratio)
    tl.store(log_ratios + 2 * pair + 1, rejected_ratio)
    tl.store(rewards + 2 * pair, BETA * chosen_ratio)
    tl.store(rewards + 2 * pair + 1, BETA * rejected_ratio)
    if log_sum_sq_probs is None:
        weight = tl.full((), 1.0, tl.float64)
    else:
        of_chosen = (chosen_plain - _sum(log_sum_sq_probs, begin, middle, BLOCK)) / chosen_tokens
        of_rejected = (rejected_plain - _sum(log_sum_sq_probs, middle, end, BLOCK)) / rejected_tokens
        weight = tl.exp(of_chosen + of_rejected)

    loss, d_chosen, d_rejected, d_chosen_plain, d_rejected_plain = FORMULA(
        chosen_ratio,
        rejected_ratio,
        chosen,
        rejected,
        chosen_plain,
        rejected_plain,
        chosen_tokens,
        rejected_tokens,
        chosen - rejected,
        _load(tokens_per_pair, 0),
        _load(mean_reward, 0),
        _load(matches, 3 * pair),
        _load(matches, 3 * pair + 1),
        _load(matches, 3 * pair + 2),
    )
    tl.store(losses + pair, loss * weight)
    if gradient is not None:
        _spread(gradient, begin, middle, shared, d_chosen * weight, d_chosen_plain * weight, LD_ALPHA, BLOCK)
        _spread(gradient, middle, end, shared, d_rejected * weight, d_rejected_plain * weight, LD_ALPHA, BLOCK)


@triton.jit
def _sequence_sums_kernel(token_logps, cu_seqlens, sums, LD_ALPHA: tl.constexpr, BLOCK: tl.constexpr):
    sequence = tl.program_id(0).to(tl.int64)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if LD_ALPHA is None:
        shared = end - begin
    else:
        partner = sequence ^ 1
        length = tl.load(cu_seqlens + partner + 1) - tl.load(cu_seqlens + partner)
        shared = tl.minimum(end - begin, length.to(tl.int64))
    weighted, _ = _sums(token_logps, begin, end, shared, LD_ALPHA, BLOCK)
    tl.store(sums + sequence, weighted)


def sequence_sums(token_logps: Tensor, cu_seqlens: Tensor, ld_alpha: float | None) -> Tensor:
    """(N,), (S + 1,) -> (S,) fp64"""
    sums = torch.empty(len(cu_seqlens) - 1, dtype=torch.float64, device=token_logps.device)
    values = token_logps.detach().contiguous()
    _launch(_sequence_sums_kernel, len(sums), values, cu_seqlens.contiguous(), sums, LD_ALPHA=ld_alpha)
    return sums


def pair_loss(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    loss: PairwiseLoss,
    log_sum_sq_probs: Tensor | None,
    matches: Tensor | None,
    mean_reward: Tensor | None,
    tokens_per_pair: float | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> losses, logps, log_ratios, rewards, as PairLoss says."""
    if matches is None and any(term.matched for term in loss.terms):
        matches = match_pairs(sequence_sums(token_logps, cu_seqlens, loss.ld_alpha).view(-1, 2), ref_logps)
    if not any(term.per == "batch_token" for term in loss.terms):
        tokens_per_pair = None
    elif tokens_per_pair is None:
        tokens_per_pair = chosen_tokens_per_pair(cu_seqlens)
    elif isinstance(tokens_per_pair, (int, float)):  # as a kernel's argument it would be rounded to fp32
        tokens_per_pair = torch.full((), tokens_per_pair, dtype=torch.float64, device=token_logps.device)
    optional = (ref_logps, log_sum_sq_probs, matches, mean_reward, tokens_per_pair)
    inputs = tuple(None if tensor is None else tensor.detach().contiguous() for tensor in optional)
    with_gradient = token_logps.requires_grad and torch.is_grad_enabled()
    return _PairLoss.apply(token_logps.contiguous(), cu_seqlens.contiguous(), inputs, loss, with_gradient)


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        token_logps: Tensor,
        cu_seqlens: Tensor,
        inputs: tuple[Tensor | None, ...],
        loss: PairwiseLoss,
        with_gradient: bool,
    ) -> tuple[Tensor, ...]:
        gradient = torch.empty_like(token_logps) if with_gradient else None
        losses, *others = _forward(token_logps, cu_seqlens, inputs, loss, gradient)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*others)
        ctx.save_for_backward(gradient, cu_seqlens)
        return losses, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        gradient, cu_seqlens = ctx.saved_tensors
        return _backward(gradient, cu_seqlens, d_losses), None, None, None, None


def _forward(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    inputs: tuple[Tensor | None, ...],
    loss: PairwiseLoss,
    gradient: Tensor | None,
) -> tuple[Tensor, ...]:
    pairs, device, dtype = len(cu_seqlens) // 2, token_logps.device, token_logps.dtype
    losses = torch.empty(pairs, dtype=dtype, device=device)
    logps = torch.empty(pairs, 2, dtype=torch.float64, device=device)
    log_ratios = torch.empty(pairs, 2, dtype=torch.float64, device=device)
    rewards = torch.empty(pairs, 2, dtype=dtype, device=device)
    tensors = (token_logps, cu_seqlens, *inputs, losses, logps, log_ratios, rewards, gradient)
    formula = device_function(loss.terms)
    _launch(_pair_loss_kernel, pairs, *tensors, FORMULA=formula, BETA=loss.beta, LD_ALPHA=loss.ld_alpha)
    return losses, logps, log_ratios, rewards


# Backward


@triton.jit
def _scale_kernel(gradient, cu_seqlens, d_losses, d_losses_stride, out, BLOCK: tl.constexpr):
    """out[t] = d_losses[pair of t] * gradient[t]"""
    pair = tl.program_id(0).to(tl.int64)
    begin = tl.load(cu_seqlens + 2 * pair).to(tl.int64)
    end = tl.load(cu_seqlens + 2 * pair + 2).to(tl.int64)
    scale = tl.load(d_losses + pair * d_losses_stride)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(out + at, scale * tl.load(gradient + at, mask=at < end), mask=at < end)


def _backward(gradient: Tensor, cu_seqlens: Tensor, d_losses: Tensor) -> Tensor:
    out = torch.empty_like(gradient)
    stride = d_losses.stride(0)  # 0 where losses.mean() sends one number to all
    _launch(_scale_kernel, len(d_losses), gradient, cu_seqlens, d_losses, stride, out)
    return out


def _launch(kernel: Any, programs: int, values: Tensor, *arguments: Any, **constants: Any) -> None:
    config = launch.pair_loss_config()
    # Every operation rounds as it is written, in both kernels that sum a sequence.
    options: dict[str, Any] = {"num_warps": config.num_warps, "enable_fp_fusion": False}
    if launch.device_of(values.device).kind == "cuda":
        options["maxnreg"] = config.registers  # AMD's compiler has no such option
    with torch.cuda.device_of(values):  # Triton launches on the current device
        kernel[(programs,)](values, *arguments, **constants, BLOCK=config.block, **options)
