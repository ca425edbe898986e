"""One micro-batch: token log-probs of the policy, log-probs of the reference, loss and metrics. The method on one
screen.

Nothing here waits for the device: metrics leave as one vector of sums.

Legend: P pairs, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdpo.batch import PreferenceBatch
from fastdpo_kernels.pair_loss import LossTerm, PairLoss, pair_loss, sequence_sums

TOKEN_STATS = ("entropy", "mean_logit", "is_top1")
# What the vector of sums holds, in order: metrics that are means over pairs, counts, means over scored tokens.
PAIR_METRICS: tuple[str, ...] = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
TOKEN_METRICS: tuple[str, ...] = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
SUMS: tuple[str, ...] = ("pairs", *PAIR_METRICS, "chosen_tokens", "rejected_tokens", *TOKEN_METRICS)


@dataclass(frozen=True)
class PreferenceStep:
    """The method with everything that varies chosen: call it with a batch."""

    policy: nn.Module  # (batch, stats) -> token log-probs and statistics; perhaps wrapped by the engine
    reference: Callable[[PreferenceBatch], Tensor]
    terms: tuple[LossTerm, ...]
    beta: float

    def __call__(self, batch: PreferenceBatch) -> tuple[PairLoss, Tensor]:
        """-> losses and log-ratios of the batch's pairs, and (len(SUMS),) fp64 metric sums without gradient."""
        ref_logps = self.reference(batch)
        token_logps, stats = self.policy(batch, TOKEN_STATS)
        result = pair_loss(token_logps, batch.cu_seqlens, ref_logps, self.terms)
        return result, self._sums(result, stats, batch)

    @torch.no_grad()
    def _sums(self, result: PairLoss, stats: dict[str, Tensor], batch: PreferenceBatch) -> Tensor:
        rewards = self.beta * result.log_ratios
        margins = rewards[:, 0] - rewards[:, 1]
        per_pair = torch.stack(
            [torch.ones_like(margins), result.losses.detach(), *rewards.unbind(1), margins > 0, margins], 1
        )
        tokens = torch.stack([torch.ones_like(stats["entropy"]), *(stats[name] for name in TOKEN_STATS)], 1)
        chosen, rejected = sequence_sums(tokens, batch.cu_seqlens).view(-1, 2, 4).double().sum(0)
        by_token = [chosen[0], rejected[0], chosen[1] + rejected[1], chosen[2], rejected[2], chosen[3]]
        return torch.cat([per_pair.double().sum(0), result.logps.double().sum(0), torch.stack(by_token)])
