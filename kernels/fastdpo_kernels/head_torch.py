"""linear_logps in plain torch: chunks of rows whose (C, V) tensors fit the workspace. For CPUs and everything else.

Legend: N rows, D hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo_kernels.head import HeadForward, HeadOptions, Wants


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions, wants: Wants
) -> HeadForward:
    rows, exact = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    result = HeadForward(
        logps=hidden.new_empty(rows, dtype=exact),
        stats={name: hidden.new_empty(rows, dtype=exact) for name in options.stats},
        hidden_jacobian=hidden.new_empty(hidden.shape) if wants is Wants.HIDDEN_GRADIENT else None,
    )
    step = _rows_per_chunk(weight, options)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        logits, slope = _chunk_logits(hidden[chunk], weight, bias, targets[chunk], options)
        if "mean_logit" in options.stats:  # of the logits themselves: shifted by their maximum they have lost digits
            result.stats["mean_logit"][chunk] = logits.mean(-1)
        softmax = _softmax(logits, targets[chunk], "entropy" in options.stats)
        result.logps[chunk] = softmax.logps
        for name, value in _chunk_stats(softmax, targets[chunk], options.stats).items():
            result.stats[name][chunk] = value
        if result.hidden_jacobian is not None:
            gradient = _to_logit_gradient(softmax, slope, targets[chunk], options).to(weight.dtype)
            torch.mm(gradient, weight, out=result.hidden_jacobian[chunk])
            del gradient
        elif wants is Wants.ALL_GRADIENTS and step >= rows:
            result.kept = _to_logit_gradient(softmax, slope, targets, options)
        del logits, slope, softmax  # before the next chunk's are made
    return result


def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    saved: tuple[Tensor, ...],  # nothing: chunks are computed again from the start
    kept: Tensor | None,  # (N, V) d logp / d (W h + b), where all rows are one chunk
    grad_logps: Tensor,  # (N,)
    options: HeadOptions,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """-> gradients of hidden, weight and bias, each where `needs` asks for it."""
    exact = grad_logps.dtype
    grad_hidden = hidden.new_empty(hidden.shape) if needs[0] else None
    grad_weight = weight.new_zeros(weight.shape, dtype=exact) if needs[1] else None
    grad_bias = weight.new_zeros(weight.shape[0], dtype=exact) if needs[2] else None
    step = _rows_per_chunk(weight, options)
    for start in range(0, hidden.shape[0], step):
        chunk = slice(start, start + step)
        gradient = _logit_gradient(hidden[chunk], weight, bias, targets[chunk], options) if kept is None else kept
        upstream = grad_logps[chunk]
        if grad_bias is not None:
            grad_bias += upstream @ gradient
        gradient = gradient.to(weight.dtype)
        if grad_hidden is not None:
            torch.mul(torch.mm(gradient, weight), upstream[:, None], out=grad_hidden[chunk])  # rounded once
        if grad_weight is not None:  # the C x D hidden chunk takes the upstream factor, not the C x V gradient
            scaled = (hidden[chunk] * upstream[:, None]).to(weight.dtype)
            grad_weight += gradient.T @ scaled
        del gradient  # before the next chunk's is made
    return grad_hidden, grad_weight, grad_bias


def _rows_per_chunk(weight: Tensor, options: HeadOptions) -> int:
    """Rows whose (C, V) tensors, as many as are alive at once, fit the workspace.

    As many with statistics as without: a product of other rows may round otherwise, and a policy, which has statistics,
    must start from the bits of its reference, which has none.
    """
    exact = torch.promote_types(weight.dtype, torch.float32).itemsize
    copies = 2 + (options.softcap is not None)
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


def _logit_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions
) -> Tensor:
    logits, slope = _chunk_logits(hidden, weight, bias, targets, options)
    return _to_logit_gradient(_softmax(logits, targets, keep_shifted=False), slope, targets, options)


def _to_logit_gradient(softmax: _Softmax, slope: Tensor | None, targets: Tensor, options: HeadOptions) -> Tensor:
    """Turns exps (C, V) in place into d logp / d (W h + b) = (1[v = y] - p_v) dz/d(Wh + b)."""
    gradient = softmax.exps.div_(softmax.total[:, None]).neg_()
    gradient.scatter_add_(1, targets[:, None], torch.ones_like(softmax.total)[:, None])
    if slope is not None:
        gradient *= slope
    if options.slope_factor != 1.0:
        gradient *= options.slope_factor
    return gradient


def _chunk_stats(softmax: _Softmax, targets: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    log_total = softmax.total.log()
    values: dict[str, Tensor] = {}
    if "entropy" in names:
        values["entropy"] = log_total - _row_dots(softmax.exps, softmax.shifted) / softmax.total
    if "is_top1" in names:
        values["is_top1"] = (softmax.top == targets).to(log_total.dtype)
    if "log_sum_sq_probs" in names:
        values["log_sum_sq_probs"] = _row_dots(softmax.exps, softmax.exps).log() - 2 * log_total
    return values


def _row_dots(left: Tensor, right: Tensor) -> Tensor:
    """(C, V), (C, V) -> (C,); torch.linalg.vecdot would make their (C, V) product first."""
    return torch.bmm(left[:, None], right[:, :, None])[:, 0, 0]
