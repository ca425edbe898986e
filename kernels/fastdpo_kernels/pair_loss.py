"""Preference losses of all pairs of a batch, from their token log-probs.

    s = sum of a sequence's token log-probs      a = s - s_ref, the log-ratio of policy to reference
    loss_i = sum_k w_k f_k(a_chosen, a_rejected)

Sequences come in the order chosen_0, rejected_0, chosen_1, rejected_1, ... so that a pair is two neighbours. A term's
formula f is handed its mathematics, so the same declaration serves tensors here and symbols elsewhere.

Legend: N scored tokens, P pairs, S = 2P sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

torch_math = SimpleNamespace(log_sigmoid=F.logsigmoid, sigmoid=torch.sigmoid, relu=torch.relu, exp=torch.exp)


@dataclass(frozen=True)
class LossTerm:
    """One summand of the loss: weight * formula(math, chosen, rejected, **hyper)."""

    formula: Callable[..., Any]
    hyper: Mapping[str, float] = field(default_factory=dict)
    weight: float = 1.0
    length_normalised: bool = False  # the formula sees each log-ratio divided by its own number of scored tokens


@dataclass(frozen=True)
class PairLoss:
    """What one call computes; `losses` carries the gradient."""

    losses: Tensor  # (P,)
    logps: Tensor  # (P, 2) fp64, summed over a sequence's tokens: chosen, rejected; detached
    log_ratios: Tensor  # (P, 2) logps - reference; detached


def sequence_sums(token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N, ...) token values and (S + 1,) offsets -> (S, ...) fp64 sums; a sequence without tokens sums to 0.

    fp64 because policy and reference sums of hundreds nearly cancel: added up one after the other in fp32, the
    log-ratio of a 4000-token response is off by 1e-2 nats. No host sync, deterministic.
    """
    lengths = cu_seqlens.diff().long()
    return torch.segment_reduce(token_logps.double(), "sum", lengths=lengths, unsafe=True, initial=0)


def pair_loss(
    token_logps: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (2P + 1,) int32, first token of each sequence, N last
    ref_logps: Tensor,  # (P, 2) fp64, the reference's summed log-probs, no gradient
    terms: tuple[LossTerm, ...],
) -> PairLoss:
    """Losses of P pairs, differentiable in token_logps: sums in fp64, formulas in the dtype of token_logps."""
    logps = sequence_sums(token_logps, cu_seqlens).view(-1, 2)
    log_ratios = (logps - ref_logps).to(token_logps.dtype)
    lengths = cu_seqlens.diff().view(-1, 2).clamp_min(1)
    losses = torch.zeros_like(log_ratios[:, 0])
    for term in terms:
        chosen, rejected = (log_ratios / lengths if term.length_normalised else log_ratios).unbind(1)
        losses = losses + term.weight * term.formula(torch_math, chosen, rejected, **term.hyper)
    return PairLoss(losses, logps.detach(), log_ratios.detach())
