"""Token log-probabilities of a language-model head without its logits.

    z_n = softcap * tanh(logit_scale * (W h_n + b) / softcap) / temperature
    logp_n = z_n[y_n] - log sum_v exp z_n[v]

The (N, V) logits never exist: rows go through in chunks of at most `workspace_bytes` (2.1 GB in bf16 at N=8192,
V=128256).

With a frozen head, d logp_n / d h_n = W[y_n] - sum_v p_nv W_v needs nothing from the loss, so the forward computes it
while it has a chunk's logits in hand and the backward is one scale by row: two head products, where recomputing takes
three. A head that trains recomputes its chunks in the backward, accumulating d W in fp32.

Legend: N scored tokens, D hidden size, V vocabulary, C rows of a chunk.

Numerics: products in the dtype of `hidden` (the autocast dtype under autocast); log-sum-exp, statistics and results in
fp32 (fp64 for fp64 input). The target's logit is an fp32 dot of h_n with W[y_n], and that value also stands in the
target's column before the log-sum-exp: with rounded logits a token of probability near 1 would otherwise get a positive
log-prob. Deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

STATS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
METHODS = ("auto", "torch")
# On a CPU 64 MiB are 256 rows at V=32k in fp32, enough for both products of a chunk to be compute-bound. A GPU wants
# a thousand rows at V=128k (unmeasured).
DEFAULT_WORKSPACE_BYTES = {"cpu": 64 * 2**20}
DEFAULT_WORKSPACE_BYTES_ELSEWHERE = 2**30


@dataclass(frozen=True)
class HeadOptions:
    """How logits become log-probs: everything of the head that is not a tensor."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    stats: tuple[str, ...] = ()
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES["cpu"]

    @property
    def keeps_logits(self) -> bool:
        """Statistics that need the logits beside their exponentials."""
        return "entropy" in self.stats or "mean_logit" in self.stats


@dataclass
class _Forward:
    """What one pass over the chunks leaves behind."""

    logps: Tensor  # (N,)
    hidden_jacobian: Tensor | None  # (N, D) d logp_n / d h_n
    stats: dict[str, Tensor]  # each (N,)


def linear_logps(
    hidden: Tensor,  # (N, D), any stride
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,) int64 in [0, V)
    bias: Tensor | None = None,  # (V,)
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    stats: Sequence[str] = (),
    method: str = "auto",
    workspace_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities (N,) of `targets` and, for each name in `stats`, a (N,) tensor of the same dtype without
    gradient.

    `entropy` of the token distribution in nats, `mean_logit` over the vocabulary, `is_top1` (1.0 where the target is
    the first most likely token), `log_sum_sq_probs` = log sum_v p_v^2 (WPO, arXiv:2406.11827). Differentiable in
    hidden, weight and bias, each where it requires a gradient. Results are fp32 (fp64 for fp64 input).

    Raises ValueError for shapes that do not fit, an unknown statistic or method.
    """
    options = _check(hidden, weight, targets, bias, stats, method)
    device = hidden.device.type
    workspace_bytes = workspace_bytes or DEFAULT_WORKSPACE_BYTES.get(device, DEFAULT_WORKSPACE_BYTES_ELSEWHERE)
    options = HeadOptions(logit_scale, softcap, temperature, options, workspace_bytes)
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        bias = None if bias is None else bias.to(compute)
        logps, *values = _LinearLogps.apply(hidden.to(compute), weight.to(compute), bias, targets, options)
    return logps, dict(zip(options.stats, values, strict=True))


def method_report() -> list[tuple[str, str]]:
    """Which way `linear_logps` goes on this machine, and why: rows of (kernel, path)."""
    return [("linear_logps", "torch: chunked products in plain torch, the only method of this version")]


def linear_logps_reference(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The specification: materialises the logits, autograd does its backward. Tests and benchmarks compare with
    this.
    """
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = (logits / temperature).log_softmax(-1)
    probs = log_probs.exp()
    return log_probs.gather(1, targets[:, None])[:, 0], {
        "entropy": -(probs * log_probs).sum(-1),
        "mean_logit": (logits / temperature).mean(-1),
        "is_top1": (logits.argmax(-1) == targets).to(log_probs.dtype),
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1),
    }


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, stats: Sequence[str], method: str
) -> tuple[str, ...]:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (N, D) and (V, D)")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {tuple(targets.shape)} {targets.dtype}, expected ({hidden.shape[0]},) torch.int64"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)}, expected ({weight.shape[0]},): one entry per vocabulary row")
    if unknown := set(stats) - set(STATS):
        raise ValueError(f"stats has {sorted(unknown)}, expected names from {STATS}")
    if method not in METHODS:
        raise ValueError(f"method={method!r}, expected one of {METHODS}")
    return tuple(stats)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions
    ) -> tuple[Tensor, ...]:
        head_trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        result = _forward(hidden, weight, bias, targets, options, ctx.needs_input_grad[0] and not head_trains)
        ctx.options = options
        if head_trains:
            ctx.save_for_backward(hidden, weight, bias, targets)
        else:
            ctx.save_for_backward(result.hidden_jacobian)
        values = tuple(result.stats[name] for name in options.stats)
        ctx.mark_non_differentiable(*values)
        return result.logps, *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 1:
            (jacobian,) = ctx.saved_tensors
            return jacobian * grad_logps[:, None].to(jacobian.dtype), None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        return *_backward_trained(hidden, weight, bias, targets, grad_logps, ctx.options, needs), None, None


def _rows_per_chunk(weight: Tensor, options: HeadOptions) -> int:
    """Rows whose (C, V) tensors, as many as are alive at once, fit the workspace."""
    exact = torch.promote_types(weight.dtype, torch.float32).itemsize
    copies = 1 + options.keeps_logits + (options.softcap is not None)
    a_row = weight.shape[0] * (copies * exact + (weight.element_size() if weight.element_size() < exact else 0))
    return max(1, options.workspace_bytes // a_row)


def _chunk_logits(
    hidden: Tensor,  # (C, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    targets: Tensor,  # (C,)
    options: HeadOptions,
) -> tuple[Tensor, Tensor | None]:
    """-> logits z (C, V) in the accumulation dtype with the target's column exact, and d z / d (W h + b) where it is
    not constant.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    logits = torch.mm(hidden, weight.T).to(exact)
    target_logits = (hidden.to(exact) * weight.index_select(0, targets).to(exact)).sum(-1)
    logits.scatter_(1, targets[:, None], target_logits[:, None])
    if bias is not None:
        logits += bias
    if options.logit_scale != 1.0:
        logits *= options.logit_scale
    slope = None
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_()
        slope = (logits * logits).neg_().add_(1)
        logits *= options.softcap
    if options.temperature != 1.0:
        logits /= options.temperature
    return logits, slope


@dataclass
class _Softmax:
    """One chunk's logits on their way through the softmax; everything (C, V) is overwritten by the next stage."""

    shifted: Tensor  # (C, V) z - max, or the same memory as exps
    exps: Tensor  # (C, V) exp(z - max)
    highest: Tensor  # (C,) max
    top: Tensor  # (C,) int64, the first column that has it
    total: Tensor  # (C,) sum of exps
    target: Tensor  # (C,) z[y] - max

    @property
    def logps(self) -> Tensor:
        # differences of small numbers: near probability 1 more exact than z[y] - logsumexp(z)
        return self.target - self.total.log()


def _softmax(logits: Tensor, targets: Tensor, keep_shifted: bool) -> _Softmax:
    highest, top = logits.max(-1)
    shifted = logits.sub_(highest[:, None])
    target = shifted.gather(1, targets[:, None])[:, 0]
    exps = shifted.exp() if keep_shifted else shifted.exp_()
    return _Softmax(shifted, exps, highest, top, exps.sum(-1), target)


def _to_logit_gradient(softmax: _Softmax, slope: Tensor | None, targets: Tensor, options: HeadOptions) -> Tensor:
    """Turns exps (C, V) in place into d logp / d (W h + b) = (1[v = y] - p_v) dz/d(Wh + b)."""
    gradient = softmax.exps.div_(softmax.total[:, None]).neg_()
    gradient.scatter_add_(1, targets[:, None], torch.ones_like(softmax.total)[:, None])
    if slope is not None:
        gradient *= slope
    if (factor := options.logit_scale / options.temperature) != 1.0:
        gradient *= factor
    return gradient


def _chunk_stats(softmax: _Softmax, targets: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    log_total = softmax.total.log()
    values: dict[str, Tensor] = {}
    if "entropy" in names:
        values["entropy"] = log_total - _row_dots(softmax.exps, softmax.shifted) / softmax.total
    if "mean_logit" in names:
        values["mean_logit"] = softmax.highest + softmax.shifted.mean(-1)
    if "is_top1" in names:
        values["is_top1"] = (softmax.top == targets).to(log_total.dtype)
    if "log_sum_sq_probs" in names:
        values["log_sum_sq_probs"] = _row_dots(softmax.exps, softmax.exps).log() - 2 * log_total
    return values


def _row_dots(left: Tensor, right: Tensor) -> Tensor:
    """(C, V), (C, V) -> (C,); torch.linalg.vecdot would make their (C, V) product first."""
    return torch.bmm(left[:, None], right[:, :, None])[:, 0, 0]


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions, with_jacobian: bool
) -> _Forward:
    rows, exact = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    result = _Forward(
        logps=hidden.new_empty(rows, dtype=exact),
        hidden_jacobian=hidden.new_empty(hidden.shape) if with_jacobian else None,
        stats={name: hidden.new_empty(rows, dtype=exact) for name in options.stats},
    )
    step = _rows_per_chunk(weight, options)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        logits, slope = _chunk_logits(hidden[chunk], weight, bias, targets[chunk], options)
        softmax = _softmax(logits, targets[chunk], options.keeps_logits)
        result.logps[chunk] = softmax.logps
        for name, value in _chunk_stats(softmax, targets[chunk], options.stats).items():
            result.stats[name][chunk] = value
        if result.hidden_jacobian is not None:
            gradient = _to_logit_gradient(softmax, slope, targets[chunk], options).to(weight.dtype)
            result.hidden_jacobian[chunk] = gradient @ weight
            del gradient
        del logits, slope, softmax  # before the next chunk's are made
    return result


def _backward_trained(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    grad_logps: Tensor,  # (N,)
    options: HeadOptions,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Recomputes each chunk's logits; -> gradients of hidden, weight and bias, each where `needs` asks for it."""
    exact = grad_logps.dtype
    grad_hidden = hidden.new_empty(hidden.shape) if needs[0] else None
    grad_weight = weight.new_zeros(weight.shape, dtype=exact) if needs[1] else None
    grad_bias = weight.new_zeros(weight.shape[0], dtype=exact) if needs[2] else None
    step = _rows_per_chunk(weight, options)
    for start in range(0, hidden.shape[0], step):
        chunk = slice(start, start + step)
        logits, slope = _chunk_logits(hidden[chunk], weight, bias, targets[chunk], options)
        gradient = _to_logit_gradient(_softmax(logits, targets[chunk], False), slope, targets[chunk], options)
        upstream = grad_logps[chunk]
        if grad_bias is not None:
            grad_bias += upstream @ gradient
        gradient = gradient.to(weight.dtype)
        if grad_hidden is not None:
            grad_hidden[chunk] = (gradient @ weight) * upstream[:, None].to(hidden.dtype)
        if grad_weight is not None:  # the C x D hidden chunk takes the upstream factor, not the C x V gradient
            scaled = (hidden[chunk] * upstream[:, None]).to(weight.dtype)
            grad_weight += gradient.T @ scaled
        del logits, slope, gradient
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )
