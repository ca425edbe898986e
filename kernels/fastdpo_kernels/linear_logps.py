"""Token log-probabilities of a language-model head without its logits.

    z_n = softcap * tanh(logit_scale * (W h_n + b) / softcap) / temperature
    logp_n = z_n[y_n] - log sum_v exp z_n[v]

The (N, V) logits (2.1 GB in bf16 at N=8192, V=128256) never exist. Three methods compute the same numbers:

    streamed  chunks of rows through one workspace: cuBLAS product, a Triton kernel along each row, cuBLAS product
    fused     one Triton kernel, product and log-sum-exp together: no workspace at all
    torch     chunks in plain torch: CPUs and everything else

With a frozen head, d logp_n / d h_n = W[y_n] - sum_v p_nv W_v needs nothing from the loss, so `streamed` and `torch`
compute it in the forward, while a chunk's logits are at hand, and the backward is one scale by row: two head products,
where recomputing takes three. A head that trains recomputes in the backward, accumulating dW in fp32.

Legend: N scored tokens, D hidden size, V vocabulary.

Numerics: products in the dtype of `hidden` (the autocast dtype under autocast); log-sum-exp, statistics and results in
fp32 (fp64 for fp64 input). The target's logit is an fp32 dot of h_n with W[y_n], and that value also stands in the
target's column before the log-sum-exp: with rounded logits a token of probability near 1 would otherwise get a positive
log-prob. Deterministic.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo_kernels import launch
from fastdpo_kernels.head import STATS, HeadOptions, Wants

METHODS = ("auto", "streamed", "fused", "torch")


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

    `method` is one of METHODS; "auto" takes what `fastdpo_kernels.launch` has for the shape, dtype and device.
    `workspace_bytes` bounds what is allocated beside results and gradients; unset, it follows the device's memory. A
    weight of another dtype than `hidden` is copied besides, in each forward and each recomputing backward.

    A target outside [0, V) raises on the CPU, and with FASTDPO_DEBUG=1 in the environment everywhere (that waits for
    the device); otherwise the kernels make its log-prob NaN, and plain torch on a GPU stops with its own assertion.

    Raises ValueError for shapes that do not fit, an unknown statistic or method, a method that this dtype or device
    does not have, and (see above) targets.
    """
    if not isinstance(stats, str):
        stats = tuple(stats)
    _check(hidden, weight, targets, bias, stats, method)
    _check_scales(softcap, temperature)
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    name, workspace_bytes = _choose(hidden, weight, compute, method, workspace_bytes)
    softcap = None if softcap is None else float(softcap)
    options = HeadOptions(float(logit_scale), softcap, float(temperature), tuple(stats), workspace_bytes)
    with torch.autocast(device, enabled=False), torch.cuda.device_of(hidden):  # Triton launches on the current device
        # weight and bias are cast inside: fp32 ones get the gradient as it was summed, no copy waits for the backward
        operands = hidden.to(compute), weight, bias, targets
        logps, *values = _LinearLogps.apply(*operands, options, name, torch.is_grad_enabled())
    return logps, dict(zip(options.stats, values, strict=True))


def method_report(device: torch.device | None = None) -> list[tuple[str, str]]:
    """Which way `linear_logps` goes on a device (the GPU where there is one), and why: rows of (kernel, path)."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = launch.device_of(device)
    dtype = (
        torch.bfloat16 if facts.compiles and facts.arch != 75 else torch.float16 if facts.compiles else torch.float32
    )
    workspace = launch.default_workspace_bytes(facts)
    method, reason = launch.head_method(128256, dtype, facts, workspace, rows=8192)
    return [("linear_logps", f"{method}: {reason}; workspace of {workspace / 2**20:.0f} MiB")]


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
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (N, D) and (V, D), V and D above 0"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {tuple(targets.shape)} {targets.dtype}, expected ({hidden.shape[0]},) torch.int64"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)}, expected ({weight.shape[0]},): one entry per vocabulary row")
    if isinstance(stats, str):
        raise ValueError(f"stats={stats!r} is one string, expected a sequence of names: ({stats!r},)")
    if unknown := set(stats) - set(STATS):
        raise ValueError(f"stats has {sorted(unknown)}, expected names from {STATS}")
    if method not in METHODS:
        raise ValueError(f"method={method!r}, expected one of {METHODS}")
    if targets.device.type == "cpu" or os.environ.get("FASTDPO_DEBUG") == "1":
        _check_targets(targets, weight.shape[0])


def _check_scales(softcap: float | None, temperature: float) -> None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}, expected a number above 0, or None for logits without a cap")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}, expected a number above 0")


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    wrong = (targets < 0) | (targets >= vocabulary)
    if targets.numel() and wrong.any():
        where = int(wrong.int().argmax())
        raise ValueError(
            f"targets[{where}] is {int(targets[where])}, expected a row of weight in [0, {vocabulary}): leave out "
            "the rows that are not to be scored"
        )


def _choose(
    hidden: Tensor, weight: Tensor, compute: torch.dtype, method: str, workspace_bytes: int | None
) -> tuple[str, int]:
    """-> the method's name and the bytes that it may use; raises where a method that was asked for cannot run."""
    facts = launch.device_of(hidden.device)
    if workspace_bytes is None:
        workspace_bytes = launch.default_workspace_bytes(facts)
    if workspace_bytes < 1:
        raise ValueError(f"workspace_bytes={workspace_bytes}, expected a number of bytes above 0, or None")
    if method == "auto":
        method, _ = launch.head_method(weight.shape[0], compute, facts, workspace_bytes, hidden.shape[0])
    if method != "torch":
        _check_kernels_run(method, compute, facts, hidden.device)
    return method, workspace_bytes


def _check_kernels_run(method: str, dtype: torch.dtype, facts: launch.Device, device: torch.device) -> None:
    if not (facts.compiles or facts.kind == "interpreter") or not launch.triton_installed():
        raise ValueError(f"method={method!r} needs triton and a CUDA or ROCm device, not {device}: use method='torch'")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"method={method!r} takes bf16, fp16 and fp32, not {dtype}: use method='torch'")
    if method == "fused" and not facts.has_matrix_products:
        raise ValueError(
            "method='fused' needs matrix units that Triton reaches, and sm_75 has none: use method='streamed'"
        )


def _wants(needs_gradient: Sequence[bool]) -> Wants:
    hidden, weight, bias = needs_gradient[:3]
    if weight or bias:
        return Wants.ALL_GRADIENTS
    return Wants.HIDDEN_GRADIENT if hidden else Wants.VALUES


def _cast(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: HeadOptions,
        name: str,
        with_gradient: bool,
    ) -> tuple[Tensor, ...]:
        wants = _wants(ctx.needs_input_grad) if with_gradient else Wants.VALUES
        method = importlib.import_module(f"fastdpo_kernels.head_{name}")  # triton ones exist on Linux only
        result = method.forward(hidden, *_cast(hidden.dtype, weight, bias), targets, options, wants)
        ctx.method, ctx.options, ctx.kept = method, options, result.kept
        ctx.from_jacobian = result.hidden_jacobian is not None
        if ctx.from_jacobian:
            ctx.save_for_backward(result.hidden_jacobian)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, *result.saved)
        values = tuple(result.stats[name] for name in options.stats)
        ctx.mark_non_differentiable(*values)
        return result.logps, *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.from_jacobian:
            (jacobian,) = ctx.saved_tensors
            # multiplied in fp32 and rounded once: a small upstream gradient has few digits in fp16
            return torch.mul(jacobian, grad_logps[:, None], out=torch.empty_like(jacobian)), *[None] * 6
        hidden, weight, bias, targets, *saved = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # a second backward recomputes them
        needs = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            head = hidden, *_cast(hidden.dtype, weight, bias)
            gradients = ctx.method.backward(*head, targets, tuple(saved), kept, grad_logps, ctx.options, needs)
        return *gradients, *[None] * 4
