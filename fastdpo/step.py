"""One optimizer batch: token log-probs of the policy, log-probs of the reference, losses and metrics. The method on one
screen.

Nothing here waits for the device: metrics leave as one vector of sums.

Legend: P pairs of a micro-batch, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdpo.batch import OptimizerBatch, PreferenceBatch
from fastdpo.ranks import Ranks
from fastdpo_kernels.pair_loss import PairLoss, PairwiseLoss, match_pairs, pair_loss, sequence_sums

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
ROUTER_METRICS: tuple[str, ...] = ("aux_loss",)  # of mixtures of experts whose routers are balanced
SUMS: tuple[str, ...] = (
    *("pairs", *PAIR_METRICS, "chosen_tokens", "rejected_tokens", *TOKEN_METRICS, *ROUTER_METRICS),
)


@dataclass(frozen=True)
class Ahead:
    """What the look-ahead over an optimizer batch leaves for one of the micro-batches."""

    ref_logps: Tensor | None  # (P, 2)
    matches: Tensor | None  # (P, 3), see `match_pairs`


@dataclass
class MeanReward:
    """The mean reward of all responses trained on so far, which bco_pair compares rewards with; 0 before the first."""

    value: Tensor  # 0-dim fp64
    pairs: Tensor  # 0-dim fp64: how many pairs it is the mean of

    def update(self, rewards: Tensor) -> None:
        """`rewards` is (P, 2)."""
        self.pairs = self.pairs + rewards.shape[0]
        self.value = self.value + (rewards.mean() - self.value) * (rewards.shape[0] / self.pairs)

    def undo(self, skipped: Tensor, before: MeanReward) -> None:
        """As it was `before` a step, where the 0-dim `skipped` says that this one counts for nothing."""
        self.value = torch.where(skipped, before.value, self.value)
        self.pairs = torch.where(skipped, before.pairs, self.pairs)


class Computed(NamedTuple):
    """Of one micro-batch."""

    loss: Tensor  # 0-dim: its part of the optimizer batch's mean, to differentiate
    pairs: PairLoss
    sums: Tensor  # (len(SUMS),) fp64, without gradient


def scores_chosen(loss: PairwiseLoss) -> bool:
    """Whether the cross-entropy of the chosen tokens is a part of the loss, and their log-probs are summed plainly
    (`ld_alpha` weighs them).
    """
    return loss.ld_alpha is None and any(term.per == "batch_token" for term in loss.terms)


@dataclass(frozen=True)
class PreferenceStep:
    """The method with everything that varies chosen: call it with an optimizer batch."""

    policy: nn.Module  # (batch, stats) -> token log-probs and statistics; perhaps wrapped by the engine
    reference: Callable[[PreferenceBatch], Tensor | None]
    loss: PairwiseLoss
    mean_reward: MeanReward | None = None
    training: bool = True  # the mean reward moves
    ranks: Ranks = Ranks()
    router_coef: float = 0.0

    def __call__(self, whole: OptimizerBatch) -> Iterator[Computed]:
        """-> for each micro-batch in turn. The routers' auxiliary loss is a micro-batch's own, weighted by its pairs.

        A loss that couples pairs couples those of the whole optimizer batch. Where that is several micro-batches, a
        pass without gradients goes ahead for their log-probs.
        """
        tokens_per_pair = max(whole.num_chosen_tokens, 1) / whole.num_pairs
        several = len(whole.microbatches) > 1 or self.ranks.count > 1
        ahead = self._look_ahead(whole) if several and self._couples_pairs else None
        for index, batch in enumerate(whole.microbatches):
            ref_logps = self.reference(batch) if ahead is None else ahead[index].ref_logps
            token_logps, stats = self.policy(batch, self._stats)
            if ahead is None and self._moves_mean:
                self._note_rewards(self._pair_sums(token_logps, batch), ref_logps)
            result = pair_loss(
                token_logps,
                batch.cu_seqlens,
                ref_logps,
                self.loss,
                log_sum_sq_probs=stats.get("log_sum_sq_probs"),
                matches=None if ahead is None else ahead[index].matches,
                mean_reward=None if self.mean_reward is None else self.mean_reward.value,
                tokens_per_pair=tokens_per_pair,
            )
            loss = result.losses.sum() / whole.num_pairs
            if self.router_coef:
                loss = loss + self.router_coef * stats["router_loss"] * (batch.num_pairs / whole.num_pairs)
            yield Computed(loss, result, self._sums(result, stats, batch))

    @property
    def scores_chosen(self) -> bool:
        return scores_chosen(self.loss)

    @property
    def _couples_pairs(self) -> bool:
        return self._matches_pairs or self._moves_mean

    @property
    def _matches_pairs(self) -> bool:
        return any(term.matched for term in self.loss.terms)

    @property
    def _moves_mean(self) -> bool:
        return self.training and self.mean_reward is not None

    @property
    def _stats(self) -> tuple[str, ...]:
        return (*TOKEN_STATS, "log_sum_sq_probs") if self.loss.weighting else TOKEN_STATS

    @torch.no_grad()
    def _look_ahead(self, whole: OptimizerBatch) -> list[Ahead]:
        refs = [self.reference(batch) for batch in whole.microbatches]
        mine = [torch.cat([self._pair_sums(self.policy(batch)[0], batch) for batch in whole.microbatches])]
        if refs[0] is not None:
            mine.append(torch.cat(refs))  # type: ignore[arg-type]
        everyone = torch.cat(self.ranks.gather(torch.cat(mine, 1), whole.shares))
        logps, ref_logps = everyone[:, :2], None if refs[0] is None else everyone[:, 2:]
        if self._moves_mean:
            self._note_rewards(logps, ref_logps)
        if not self._matches_pairs:
            return [Ahead(ref, None) for ref in refs]
        share = match_pairs(logps, ref_logps).split(list(whole.shares))[self.ranks.rank]
        return [Ahead(*both) for both in zip(refs, share.split([b.num_pairs for b in whole.microbatches]), strict=True)]

    def _pair_sums(self, token_logps: Tensor, batch: PreferenceBatch) -> Tensor:
        return sequence_sums(token_logps.detach(), batch.cu_seqlens, self.loss.ld_alpha).view(-1, 2)

    def _note_rewards(self, logps: Tensor, ref_logps: Tensor | None) -> None:
        assert self.mean_reward is not None
        self.mean_reward.update(self.loss.beta * (logps if ref_logps is None else logps - ref_logps))

    @torch.no_grad()
    def _sums(self, result: PairLoss, stats: dict[str, Tensor], batch: PreferenceBatch) -> Tensor:
        margins = result.rewards[:, 0] - result.rewards[:, 1]
        per_pair = torch.stack(
            [torch.ones_like(margins), result.losses.detach(), *result.rewards.unbind(1), margins > 0, margins], 1
        )
        tokens = torch.stack([torch.ones_like(stats["entropy"]), *(stats[name] for name in TOKEN_STATS)], 1)
        chosen, rejected = sequence_sums(tokens, batch.cu_seqlens).view(-1, 2, 4).double().sum(0)
        by_token = [chosen[0], rejected[0], chosen[1] + rejected[1], chosen[2], rejected[2], chosen[3]]
        by_pair, router = per_pair.double().sum(0), margins.new_zeros((), dtype=torch.float64)
        if self.router_coef:
            router = stats["router_loss"].detach().double() * batch.num_pairs
            by_pair[1] += self.router_coef * router
        return torch.cat([by_pair, result.logps.double().sum(0), torch.stack(by_token), router[None]])
