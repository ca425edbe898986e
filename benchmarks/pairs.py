"""Pairs to compare preference losses on, and who computes them: fastdpo's methods, and TRL's formulas as TRL has them.

The task is the part of a DPO step between the LM head and the mean over pairs: token log-probs and the reference's sums
in, one loss a pair and the rewards of both sides out, and the gradient of every token's log-prob. TRL's log-probs are
padded rows, chosen ones first, so its formulas get those; making them is not timed.

Legend: N tokens, P pairs, T tokens of the longest response.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.contenders import Unavailable
from benchmarks.roofline import FORWARD
from fastdpo.losses import LOSSES
from fastdpo_kernels.pair_loss import PairwiseLoss, pair_loss

BETA = 0.1
OPTIONS = SimpleNamespace(beta=BETA, label_smoothing=0.0)
# One loss, and three as for MPO (arXiv:2411.10442): names and weights of TRL's loss_type and loss_weights.
WEIGHTED = {"sigmoid": {"sigmoid": 1.0}, "sigmoid + bco_pair + sft": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}}

Computed = tuple[Tensor, ...]  # losses (P,) and rewards, as (P, 2) or as (P,) of each side


@dataclass
class Pairs:
    token_logps: Tensor  # (N,) fp32, chosen_0, rejected_0, chosen_1, ...
    cu_seqlens: Tensor  # (2P + 1,) int32
    ref_logps: Tensor  # (P, 2) fp64 sums

    @property
    def count(self) -> int:
        return len(self.ref_logps)

    @cached_property
    def upstream(self) -> Tensor:
        """What the mean over pairs sends back."""
        return torch.full((self.count,), 1 / self.count, device=self.token_logps.device)

    @cached_property
    def rows(self) -> Tensor:
        """(2P, T) all chosen responses, then all rejected ones, padded with zeros."""
        return self._padded(self.token_logps)

    @cached_property
    def scored(self) -> Tensor:
        """(2P, T) bool, which of `rows` are tokens."""
        return self._padded(torch.ones_like(self.token_logps)) > 0

    def _padded(self, values: Tensor) -> Tensor:
        sequences = values.split(self.cu_seqlens.diff().tolist())
        return pad_sequence([*sequences[0::2], *sequences[1::2]], batch_first=True)

    def packed(self, padded: Tensor) -> Tensor:
        """(2P, T) -> (N,) in the order of `token_logps`."""
        lengths = self.cu_seqlens.diff().tolist()
        order = [row for pair in range(self.count) for row in (pair, self.count + pair)]
        return torch.cat([padded[row, :length] for row, length in zip(order, lengths, strict=True)])


def make_pairs(count: int, place: str, seed: int = 0) -> Pairs:
    """Responses of 150 to 350 tokens; sums some nats from the reference's, on either side."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(150, 351, (2 * count,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    token_logps = -torch.rand(int(lengths.sum()), generator=generator).square() * 5
    sums = torch.segment_reduce(token_logps.double(), "sum", lengths=lengths)
    ref_logps = (sums + 8 * torch.randn(2 * count, generator=generator, dtype=torch.float64)).view(-1, 2)
    return Pairs(token_logps.to(place), cu_seqlens.to(place), ref_logps.to(place))


def pairwise(weights: dict[str, float]) -> PairwiseLoss:
    terms = [term for name, weight in weights.items() for term in LOSSES[name].terms(weight, OPTIONS, None)]
    return PairwiseLoss(tuple(terms), BETA)


def _as_it_is(gradient: Tensor) -> Tensor:
    return gradient


@dataclass(frozen=True)
class PairWay:
    """One implementation on some pairs."""

    compute: Callable[[Tensor], Computed]  # what `leaf` holds -> losses and rewards
    leaf: Tensor  # token log-probs in its layout, without gradient
    path: str
    version: str = ""
    packed: Callable[[Tensor], Tensor] = _as_it_is  # a gradient of its layout in the packed one


def fastdpo(pairs: Pairs, weights: dict[str, float], method: str) -> PairWay:
    if method == "triton" and pairs.token_logps.device.type != "cuda":
        raise Unavailable("method='triton' needs a GPU")
    loss, tokens_per_pair = pairwise(weights), pairs.cu_seqlens.diff()[0::2].sum().item() / pairs.count

    def compute(token_logps: Tensor) -> Computed:
        computed = pair_loss(
            token_logps, pairs.cu_seqlens, pairs.ref_logps, loss, tokens_per_pair=tokens_per_pair, method=method
        )
        return computed.losses, computed.rewards

    paths = {
        "triton": "one Triton kernel; in the backward a second, which scales the gradient",
        "torch": "eager, sums and formulas in fp64",
    }
    return PairWay(compute, pairs.token_logps, paths[method])


# TRL 1.16's `_compute_loss`, one function a loss: log-ratios (P,) of both sides, chosen rows and which of them count.


def _sigmoid(chosen: Tensor, rejected: Tensor, rows: Tensor, scored: Tensor) -> Tensor:
    return -F.logsigmoid(BETA * (chosen - rejected))


def _bco_pair(chosen: Tensor, rejected: Tensor, rows: Tensor, scored: Tensor) -> Tensor:
    chosen_rewards, rejected_rewards = BETA * chosen, BETA * rejected
    return -F.logsigmoid(chosen_rewards) - F.logsigmoid(-rejected_rewards)


def _sft(chosen: Tensor, rejected: Tensor, rows: Tensor, scored: Tensor) -> Tensor:
    """Padding is 0, so that a sum does. TRL's own boolean index waits for the device; this is faster."""
    return (-rows.sum() / scored.sum()).expand(len(chosen))


TRL_FORMULAS = {"sigmoid": _sigmoid, "bco_pair": _bco_pair, "sft": _sft}


def trl(pairs: Pairs, weights: dict[str, float], compiled: bool = False) -> PairWay:
    """From its log-probs on: sums over rows, log-ratios, each loss times its weight, rewards; no metrics."""
    references = pairs.ref_logps.float().T.contiguous()
    chosen_scored = pairs.scored[: pairs.count]

    def compute(rows: Tensor) -> Computed:
        chosen, rejected = rows.sum(dim=1).chunk(2)
        ratios = chosen - references[0], rejected - references[1]
        parts = [
            TRL_FORMULAS[name](*ratios, rows[: pairs.count], chosen_scored) * weight for name, weight in weights.items()
        ]
        rewards = [BETA * ratio.detach() for ratio in ratios]
        return sum(parts[1:], parts[0]), *rewards

    path = "inductor, one full graph" if compiled else "eager"
    way = torch.compile(compute, fullgraph=True, dynamic=False) if compiled else compute
    return PairWay(way, pairs.rows, path, torch.__version__, pairs.packed)


CONTENDERS: dict[str, Callable[[Pairs, dict[str, float]], PairWay]] = {
    "fastdpo triton": partial(fastdpo, method="triton"),
    "fastdpo torch": partial(fastdpo, method="torch"),
    "TRL's formulas": trl,
    "TRL's formulas, torch.compile": partial(trl, compiled=True),
}


def timed_call(way: PairWay, pairs: Pairs, wants: str) -> Callable[[], tuple[Tensor, ...]]:
    """-> losses, rewards and, unless only the forward is wanted, the gradient of the token log-probs."""
    if wants == FORWARD:
        leaf = way.leaf

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return way.compute(leaf)

        return forward
    trained, upstream = way.leaf.detach().requires_grad_(), pairs.upstream

    def both() -> tuple[Tensor, ...]:
        losses, *rewards = way.compute(trained)
        return losses.detach(), *rewards, *torch.autograd.grad(losses, trained, upstream)

    return both


def errors(
    pairs: Pairs, weights: dict[str, float], way: PairWay, wants: str, found: tuple[Tensor, ...]
) -> dict[str, float]:
    """Against fp64 autograd through fastdpo's formulas: losses and rewards in nats, the gradient relatively."""
    token_logps = pairs.token_logps.double().requires_grad_()
    truth = pair_loss(token_logps, pairs.cu_seqlens, pairs.ref_logps, pairwise(weights), method="torch")
    losses, rest = found[0], list(found[1:])
    result = {"losses": (losses.double().mean() - truth.losses.mean()).abs().item()}
    if wants != FORWARD:
        (exact,) = torch.autograd.grad(truth.losses, token_logps, pairs.upstream.double())
        gradient = way.packed(rest.pop()).double()
        result["gradient"] = ((gradient - exact).norm() / exact.norm()).item()
    rewards = rest[0] if len(rest) == 1 else torch.stack(rest, 1)
    result["rewards"] = (rewards.double() - truth.rewards).abs().max().item()
    return result
