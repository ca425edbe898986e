"""Preference losses of all pairs of a batch, from their token log-probs, in one launch.

    s = sum of a sequence's token log-probs      a = s - s_ref, the log-ratio of policy to reference
    loss_i = sum_k w_k f_k(a_chosen, a_rejected)

Sequences come in the order chosen_0, rejected_0, chosen_1, rejected_1, ... so that a pair is two neighbours. A term's
formula f is handed its mathematics `m`, so that the same lines compute with tensors here and with symbols elsewhere.
Two methods compute the same numbers:

    torch     plain autograd through the formulas: the specification, and what runs on CPUs
    triton    one program a pair, with the derivatives that `symbolic` takes of the formulas

Token values are fp32, or fp64 for tests; everything between them and the results is fp64 in both methods. There are few
such numbers, so it costs nothing, and a loss of 1e-20 at a margin of 46 nats is right in every digit.

Legend: N scored tokens, P pairs, S = 2P sequences.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo_kernels import launch

METHODS = ("auto", "torch", "triton")
_OF, _PER, _MATCHED = ("log_ratios", "logps"), ("sequence", "token", "batch_token"), (None, "margins", "sides")

# Where m.capped_exp turns linear. Values reach e^32 * 1600 = 1e17 at log-ratios of 800, so that their squares, and the
# capped exponential of such a value, stay below fp32's 3e38.
EXP_CAP = 32.0
# m.log1mexp takes arguments above this one for it, as if a sequence of probability 1 missed it by an fp64 rounding.
LOG1MEXP_MAX = -(2.0**-53)


@dataclass(frozen=True)
class LossTerm:
    """One summand of the loss: weight * formula(m, chosen, rejected, **hyper).

    `of` says what the formula's two arguments are: log-ratios of policy to reference, or the policy's log-probs alone.
    Then `score(m, value)`, an f-divergence's, replaces each side, and `per` divides it: by 1; by its own number of
    scored tokens; or, for "batch_token", by the batch's mean number of chosen tokens a pair, so that the mean over
    pairs is one over all chosen tokens. A batch_token term is a plain language-modelling loss: ld_alpha leaves it
    alone.

    `matched` gives the arguments other partners. "margins": (this pair's policy margin, the reference margin of the
    same rank in the batch). "sides": (this pair's chosen log-ratio, the rejected one of the same rank).

    A formula with a parameter `mean_reward` receives that of the call.
    """

    formula: Callable[..., Any]
    hyper: Mapping[str, float] = field(default_factory=dict)
    weight: float = 1.0
    of: str = "log_ratios"
    per: str = "sequence"
    score: Callable[..., Any] | None = None
    matched: str | None = None

    def __post_init__(self) -> None:
        for name, choices in (("of", _OF), ("per", _PER), ("matched", _MATCHED)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} of a LossTerm, expected one of {choices}")
        if self.matched and (self.of, self.per, self.score) != ("log_ratios", "sequence", None):
            raise ValueError(
                f"matched={self.matched!r} with of={self.of!r}, per={self.per!r}, score={self.score!r}: ranks are of "
                "sums over sequences, so leave of, per and score at their defaults"
            )
        if self.per == "batch_token" and self.of != "logps":
            raise ValueError("per='batch_token' goes with of='logps': reference sums may be ld_alpha-weighted")


@dataclass(frozen=True)
class PairwiseLoss:
    """Everything about the loss that is fixed for a run."""

    terms: tuple[LossTerm, ...]
    beta: float  # rewards = beta * log-ratios
    ld_alpha: float | None = None  # LD-DPO: weight of tokens after the first min(n_chosen, n_rejected), on both sides
    weighting: bool = False  # WPO: each loss times exp(mean_t(logp_t - log sum_v p_v^2)) of both sides, no gradient

    def __post_init__(self) -> None:
        if self.weighting and any(term.matched for term in self.terms):
            raise ValueError(
                "weighting=True with a matched term (aot): a matched loss belongs to no single pair whose weight it "
                "could take. Drop one of them."
            )


@dataclass(frozen=True)
class PairLoss:
    """What one call computes; `losses` carries the gradient."""

    losses: Tensor  # (P,) in the dtype of token_logps
    logps: Tensor  # (P, 2) fp64, summed over a sequence's tokens: chosen, rejected; ld_alpha-weighted; detached
    log_ratios: Tensor  # (P, 2) fp64, logps - reference; detached
    rewards: Tensor  # (P, 2) in the dtype of token_logps, beta * log_ratios; detached


def pair_loss(
    token_logps: Tensor,  # (N,) fp32 or fp64
    cu_seqlens: Tensor,  # (2P + 1,) int32, first token of each sequence, N last
    ref_logps: Tensor | None,  # (P, 2) fp64, the reference's `sequence_sums`; None: zeros (reference-free)
    loss: PairwiseLoss,
    *,
    log_sum_sq_probs: Tensor | None = None,  # (N,), log sum_v p_v^2 of each token's distribution; for weighting
    matches: Tensor | None = None,  # (P, 3) fp64, `match_pairs` of the whole optimizer batch; None: of this call
    mean_reward: Tensor | None = None,  # 0-dim fp64; None: 0
    tokens_per_pair: float | Tensor | None = None,  # chosen tokens a pair of the optimizer batch; None: of this call
    method: str = "auto",
) -> PairLoss:
    """Losses of P pairs, differentiable in token_logps, with the sums and rewards that they came from.

    `method` is one of METHODS; "auto" takes triton on GPUs and torch elsewhere.

    A matched term ties pairs together. Its gradient is that of the mean over the batch (one upstream gradient for all
    pairs): with `matches` given, a pair's rejected log-ratio learns from the pair that it is matched to, through this
    pair's loss, which has the same value as ever.

    Raises ValueError for shapes and dtypes that do not fit, and for a formula that the method cannot run; on the CPU,
    and with FASTDPO_DEBUG=1 in the environment everywhere (that waits for the device), for offsets that do not fit.
    """
    _check(token_logps, cu_seqlens, ref_logps, loss, log_sum_sq_probs, matches, mean_reward)
    extras = (log_sum_sq_probs if loss.weighting else None, matches, mean_reward, tokens_per_pair)
    if _method(method, token_logps.device) == "torch":
        return _pair_loss_torch(token_logps, cu_seqlens, ref_logps, loss, *extras)
    from fastdpo_kernels import pair_loss_triton  # Triton exists on Linux only

    return PairLoss(*pair_loss_triton.pair_loss(token_logps, cu_seqlens, ref_logps, loss, *extras))


def method_report(device: torch.device | None = None) -> list[tuple[str, str]]:
    """Which way `pair_loss` goes on a device (the GPU where there is one): rows of (kernel, path)."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if _method("auto", device) == "triton":
        return [("pair_loss", "triton: one launch for all pairs")]
    return [("pair_loss", "torch: autograd through the formulas; Triton compiles for CUDA and ROCm devices only")]


def sequence_sums(
    token_logps: Tensor,  # (N, ...)
    cu_seqlens: Tensor,  # (S + 1,) int32
    ld_alpha: float | None = None,
) -> Tensor:  # (S, ...) fp64
    """Sums over each sequence's tokens; a sequence without tokens sums to 0.

    With ld_alpha the sequences are pairs, and a sequence's tokens beyond the length of its partner count with that
    weight. fp64 because policy and reference sums of hundreds nearly cancel: added up one after the other in fp32, the
    log-ratio of a 4000-token response is off by 1e-2 nats. No host sync, deterministic.

    On a GPU (N,) values without gradient are added up by `pair_loss`'s own device function: a policy that still is its
    reference gets log-ratios of exactly 0.
    """
    _check_offsets(cu_seqlens, len(token_logps), pairs=ld_alpha is not None)
    needs_gradient = token_logps.requires_grad and torch.is_grad_enabled()
    if token_logps.ndim == 1 and not needs_gradient and _method("auto", token_logps.device) == "triton":
        from fastdpo_kernels import pair_loss_triton  # Triton exists on Linux only

        return pair_loss_triton.sequence_sums(token_logps, cu_seqlens, ld_alpha)
    return _sequence_sums_torch(token_logps, cu_seqlens, ld_alpha)


def match_pairs(
    logps: Tensor,  # (P, 2) the policy's sums
    ref_logps: Tensor | None,  # (P, 2); None: zeros
) -> Tensor:  # (P, 3) fp64
    """What the matched losses (AOT) hold each pair against, over a whole optimizer batch.

    Column 0: the reference margin of this pair's rank among policy margins. 1: the rejected log-ratio of its chosen
    log-ratio's rank. 2: the chosen log-ratio of its rejected log-ratio's rank. Ties rank by position: deterministic.
    """
    logps = logps.detach().double()
    reference = torch.zeros_like(logps) if ref_logps is None else ref_logps.detach().double()
    chosen, rejected = (logps - reference).unbind(1)
    margins, ref_margins = logps[:, 0] - logps[:, 1], reference[:, 0] - reference[:, 1]
    columns = ((margins, ref_margins), (chosen, rejected), (rejected, chosen))
    return torch.stack([_sorted(partners)[0][_ranks(of)] for of, partners in columns], 1)


# Checks


def _check(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    loss: PairwiseLoss,
    log_sum_sq_probs: Tensor | None,
    matches: Tensor | None,
    mean_reward: Tensor | None,
) -> None:
    if token_logps.ndim != 1 or token_logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"token_logps is {_kind(token_logps)}, expected (N,) torch.float32 or torch.float64")
    _check_offsets(cu_seqlens, len(token_logps), pairs=True)
    if mean_reward is not None and (not isinstance(mean_reward, Tensor) or mean_reward.ndim):
        raise ValueError(f"mean_reward={mean_reward!r}, expected a tensor without dimensions, or None")
    pairs = (len(cu_seqlens) - 1) // 2
    for name, table, width in (("ref_logps", ref_logps, 2), ("matches", matches, 3)):
        if table is not None and (table.shape != (pairs, width) or table.dtype != torch.float64):
            raise ValueError(
                f"{name} is {_kind(table)}, expected ({pairs}, {width}) torch.float64: a row for each pair"
            )
    if loss.weighting and (log_sum_sq_probs is None or log_sum_sq_probs.shape != token_logps.shape):
        came = "None" if log_sum_sq_probs is None else _kind(log_sum_sq_probs)
        raise ValueError(
            f"log_sum_sq_probs is {came}, and weighting=True needs {tuple(token_logps.shape)}: one number a token, "
            "linear_logps' statistic of that name"
        )


def _check_offsets(cu_seqlens: Tensor, tokens: int, pairs: bool) -> None:
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens is {_kind(cu_seqlens)}, expected (sequences + 1,) torch.int32")
    if pairs and len(cu_seqlens) % 2 == 0:
        raise ValueError(
            f"cu_seqlens bounds {len(cu_seqlens) - 1} sequences, expected pairs: chosen_0, rejected_0, chosen_1, ..."
        )
    if cu_seqlens.device.type == "cpu" or os.environ.get("FASTDPO_DEBUG") == "1":
        _check_bounds(cu_seqlens, tokens)


def _check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (cu_seqlens.diff() < 0).any():
        raise ValueError(
            f"cu_seqlens goes from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])} for {tokens} tokens, expected offsets "
            "that start at 0, never fall, and end at the number of tokens"
        )


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _method(method: str, device: torch.device) -> str:
    """-> "torch" or "triton"; raises where triton was asked for and cannot run."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}, expected one of {METHODS}")
    facts = launch.device_of(device)
    if method == "auto":
        return "triton" if facts.compiles and launch.triton_installed() else "torch"
    if method == "triton" and not (facts.compiles or facts.kind == "interpreter"):
        raise ValueError(f"method='triton' needs a CUDA or ROCm device, not {device}: use method='torch'")
    return method


# The torch method


def _lifted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A formula also passes hyper-parameters, Python numbers, where torch's functions want tensors."""

    def lifted(*values: Any) -> Tensor:
        return function(*(x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in values))

    return lifted


def _sigmoid(x: Tensor) -> Tensor:
    """Through its logarithm: torch.sigmoid's derivative s * (1 - s) rounds to 0 beyond x = 37."""
    return F.logsigmoid(x).exp()


def _softplus(x: Tensor) -> Tensor:
    """F.softplus is x itself beyond 20, off by e^-20."""
    return -F.logsigmoid(-x)


def _capped_exp(x: Tensor) -> Tensor:
    return x.clamp(max=EXP_CAP).exp() * (1 + torch.relu(x - EXP_CAP))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, each half by the form that keeps its digits (Maechler, 2012)."""
    x = x.clamp(max=LOG1MEXP_MAX)
    near = x > -math.log(2)
    of_near = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    return torch.where(near, of_near, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


_TORCH_FUNCTIONS = {
    "exp": torch.exp,
    "log": torch.log,
    "log1p": torch.log1p,
    "expm1": torch.expm1,
    "sqrt": torch.sqrt,
    "tanh": torch.tanh,
    "abs": torch.abs,
    "sigmoid": _sigmoid,
    "log_sigmoid": F.logsigmoid,
    "softplus": _softplus,
    "relu": torch.relu,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "log1mexp": _log1mexp,
    "capped_exp": _capped_exp,
}
torch_math = SimpleNamespace(**{name: _lifted(function) for name, function in _TORCH_FUNCTIONS.items()})


def takes_mean_reward(formula: Callable[..., Any]) -> bool:
    return "mean_reward" in signature(formula).parameters


def _sequence_sums_torch(token_values: Tensor, cu_seqlens: Tensor, ld_alpha: float | None) -> Tensor:
    lengths = cu_seqlens.diff().long()
    if ld_alpha is None:
        return torch.segment_reduce(token_values.double(), "sum", lengths=lengths, unsafe=True, initial=0)
    shared = lengths.view(-1, 2).amin(1, keepdim=True).expand(-1, 2).reshape(-1)
    halves = torch.stack([shared, lengths - shared], 1).view(-1)
    sums = torch.segment_reduce(token_values.double(), "sum", lengths=halves, unsafe=True, initial=0)
    return sums[0::2] + ld_alpha * sums[1::2]


def _pair_loss_torch(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    loss: PairwiseLoss,
    log_sum_sq_probs: Tensor | None,
    matches: Tensor | None,
    mean_reward: Tensor | None,
    tokens_per_pair: float | Tensor | None,
) -> PairLoss:
    logps = _sequence_sums_torch(token_logps, cu_seqlens, loss.ld_alpha).view(-1, 2)
    plain = _sequence_sums_torch(token_logps, cu_seqlens, None).view(-1, 2)
    reference = torch.zeros_like(logps) if ref_logps is None else ref_logps.detach()
    lengths = cu_seqlens.diff().view(-1, 2).clamp_min(1)
    if tokens_per_pair is None:
        tokens_per_pair = chosen_tokens_per_pair(cu_seqlens)
    divisors = {"sequence": 1, "token": lengths, "batch_token": tokens_per_pair}
    losses = torch.zeros_like(logps[:, 0])
    for term in loss.terms:
        hyper: dict[str, Any] = dict(term.hyper)
        if takes_mean_reward(term.formula):
            hyper["mean_reward"] = 0.0 if mean_reward is None else mean_reward
        if term.matched:
            value = _matched_loss(term, hyper, logps, reference, matches)
        else:
            of_policy = plain if term.per == "batch_token" else logps
            sides = of_policy if term.of == "logps" else logps - reference
            sides = sides if term.score is None else term.score(torch_math, sides)
            value = term.formula(torch_math, *(sides / divisors[term.per]).unbind(1), **hyper)
        losses = losses + term.weight * value
    if log_sum_sq_probs is not None:
        excess = (token_logps.double() - log_sum_sq_probs.double()).detach()
        losses = losses * (_sequence_sums_torch(excess, cu_seqlens, None).view(-1, 2) / lengths).sum(1).exp()
    log_ratios, dtype = (logps - reference).detach(), token_logps.dtype
    return PairLoss(losses.to(dtype), logps.detach(), log_ratios, (loss.beta * log_ratios).to(dtype))


def chosen_tokens_per_pair(cu_seqlens: Tensor) -> Tensor:
    """0-dim fp64; 1 where there is no chosen token, so that a sum of 0 is divided by something."""
    lengths = cu_seqlens.diff()[0::2]
    return lengths.sum().clamp_min(1).double() / max(1, len(lengths))


def _matched_loss(
    term: LossTerm, hyper: Mapping[str, Any], logps: Tensor, reference: Tensor, matches: Tensor | None
) -> Tensor:
    """Without `matches`: sorted inside autograd, each loss then given back to the pair of its first argument."""

    def formula(first: Tensor, second: Tensor) -> Tensor:
        return term.formula(torch_math, first, second, **hyper)

    chosen, rejected = (logps - reference).unbind(1)
    margins, ref_margins = logps[:, 0] - logps[:, 1], reference[:, 0] - reference[:, 1]
    if matches is None:
        first, second = (margins, ref_margins) if term.matched == "margins" else (chosen, rejected)
        return formula(_sorted(first)[0], _sorted(second)[0])[_ranks(first)]
    if term.matched == "margins":
        return formula(margins, matches[:, 0])
    of_rejected = formula(matches[:, 2], rejected)
    return formula(chosen, matches[:, 1]) + (of_rejected - of_rejected.detach())


def _sorted(values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sort(values, stable=True)


def _ranks(values: Tensor) -> Tensor:
    return _sorted(values)[1].argsort()
