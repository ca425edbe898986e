"""An LM head to compare contenders on: random, peaked as a trained model's is, with its fp64 truth.

    z_nv = frequency_v + noise_nv      and z_ny such that p(target) is spread evenly from 0.01 to 0.99

A token's frequency falls with its number, as a tokenizer's does (Zipf), and targets are drawn by it. So most of a row's
probability lies on few tokens, mostly the same ones: that is what cut-cross-entropy's filter lives on, and with plain
random weights it would find nothing to skip. `kept_tiles` says how much it keeps here (its paper implies 0.2).

Legend: N rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.roofline import FROZEN_HEAD, TRAINED_HEAD

WEIGHT_SPREAD = 0.02  # of the head's entries, as models are initialised
NOISE = 1.5  # standard deviation of a logit around its token's frequency
ZIPF = 1.1  # with this noise 200 tokens of 128k have a probability above 2^-12 in a row, and 0.2 of the tiles are kept
TOP_LOGIT = 10.0  # what the most frequent token's logit has on average; only rounding depends on it
SEQUENCE = 256  # rows of a sequence, which share one upstream gradient
FILTER = 2.0**-12  # cut-cross-entropy skips tiles of bf16 gradients below it
TILE = 128  # rows and columns of such a tile


@dataclass(frozen=True)
class Truth:
    """In fp64, from the rounded inputs: log-probs of all rows, gradients of some hidden rows and head rows."""

    logps: Tensor  # (N,)
    rows: Tensor  # (R,) the first and the last
    hidden_gradient: Tensor  # (R, D)
    columns: Tensor  # (C,) tokens, half of them targets
    weight_gradient: Tensor  # (C, D)
    kept_tiles: float  # share of the gradient's tiles that have an entry above FILTER, columns sorted by mean logit


@dataclass
class Head:
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,) int64
    upstream: Tensor  # (N,) fp32, what a pairwise loss sends back: one value a sequence, up and down in turn

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.hidden.shape[0], self.weight.shape[0], self.weight.shape[1]

    @cached_property
    def truth(self) -> Truth:
        return _truth(self)


def make_head(shape: tuple[int, int, int], dtype: str, place: str, seed: int = 0) -> Head:
    """The same for the same seed, place and machine."""
    rows, vocabulary, width = shape
    generator = torch.Generator(place).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=place)

    # One direction of the hidden space carries frequency: every row has 1 / WEIGHT_SPREAD of it.
    direction = torch.nn.functional.normalize(normal(width), dim=0)
    frequency = TOP_LOGIT - ZIPF * torch.log(torch.arange(vocabulary, device=place) / 10.0 + 1)
    weight = normal(vocabulary, width) * WEIGHT_SPREAD
    across = weight.addr_(weight @ direction, direction, alpha=-1)  # the part that the noise meets
    hidden = normal(rows, width) * (NOISE / WEIGHT_SPREAD / math.sqrt(width))
    hidden.addr_(1 / WEIGHT_SPREAD - hidden @ direction, direction)

    targets = torch.multinomial(frequency.exp(), rows, replacement=True, generator=generator)
    of_target = across[targets]
    logit = (hidden * of_target).sum(1) + frequency[targets]
    probability = torch.linspace(0.01, 0.99, rows, device=place)
    probability = probability[torch.randperm(rows, generator=generator, device=place)]
    # The push towards the target moves the other logits too, at random: by its own size over sqrt(D).
    push = probability.logit() + frequency.logsumexp(0) + NOISE**2 / 2 - logit
    push += push.square() / (2 * width)
    hidden += (push / of_target.square().sum(1))[:, None] * of_target
    weight.addr_(frequency * WEIGHT_SPREAD, direction)
    kept = getattr(torch, dtype)
    return Head(hidden.to(kept), weight.to(kept), targets, _upstream(rows, generator, place))


def _upstream(rows: int, generator: torch.Generator, place: str) -> Tensor:
    sequences = max(2, rows // SEQUENCE)
    sizes = torch.rand(sequences, generator=generator, device=place) * 0.08 + 0.02
    sizes[1::2] *= -1
    return (sizes / (sequences // 2)).repeat_interleave(-(-rows // sequences))[:rows].contiguous()


def _truth(head: Head) -> Truth:
    rows, vocabulary, _ = head.shape
    hidden = head.hidden.double()
    logps, log_sums, mean_logits = _log_probs(head, hidden)
    some = min(rows // 2, 2 * TILE)
    chosen = torch.cat([torch.arange(some), torch.arange(rows - some, rows)]).to(hidden.device)
    probabilities = torch.empty(2 * some, vocabulary, dtype=torch.float32, device=hidden.device)
    jacobian = head.weight[head.targets[chosen]].double()
    for block in _blocks(vocabulary):
        part = head.weight[block].double()
        of_block = (hidden[chosen] @ part.T - log_sums[chosen, None]).exp()
        jacobian -= of_block @ part
        probabilities[:, block] = of_block.float()
    columns = torch.cat([head.targets[:TILE], torch.arange(0, vocabulary, -(-vocabulary // TILE)).to(hidden.device)])
    columns = columns.unique()
    share = (hidden @ head.weight[columns].double().T - log_sums[:, None]).exp()
    share = ((head.targets[:, None] == columns).double() - share) * head.upstream.double()[:, None]
    return Truth(
        logps,
        chosen,
        jacobian * head.upstream.double()[chosen, None],
        columns,
        share.T @ hidden,
        _kept_tiles(probabilities[:TILE], head.targets[chosen[:TILE]], mean_logits),
    )


def _log_probs(head: Head, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> log-probs (N,), log-sum-exps (N,) and each token's mean logit (V,)."""
    log_sums = hidden.new_full((len(hidden),), -math.inf)
    of_targets, means = torch.zeros_like(log_sums), hidden.new_empty(head.shape[1])
    for block in _blocks(head.shape[1]):
        logits = hidden @ head.weight[block].double().T
        log_sums = torch.logaddexp(log_sums, logits.logsumexp(1))
        means[block] = logits.mean(0)
        place = head.targets - block.start
        inside = (place >= 0) & (place < logits.shape[1])
        found = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        of_targets = torch.where(inside, found, of_targets)
    return of_targets - log_sums, log_sums, means


def _blocks(vocabulary: int) -> list[slice]:
    return [slice(start, min(start + 8192, vocabulary)) for start in range(0, vocabulary, 8192)]


def _kept_tiles(probabilities: Tensor, targets: Tensor, mean_logits: Tensor) -> float:
    gradient = probabilities.clone()  # (TILE, V)
    gradient.scatter_add_(1, targets[:, None], torch.full_like(gradient[:, :1], -1.0))
    largest = gradient.abs().amax(0)[mean_logits.argsort()]
    whole = largest[: len(largest) // TILE * TILE].view(-1, TILE)
    return (whole.amax(1) > FILTER).double().mean().item()


def errors(head: Head, wants: str, results: tuple[Tensor, ...]) -> dict[str, float]:
    """How far log-probs and gradients are from the truth, by name."""
    truth, (logps, *gradients) = head.truth, results
    found = {"logps": (logps.double() - truth.logps).square().mean().sqrt().item()}
    if wants in (FROZEN_HEAD, TRAINED_HEAD):
        found["hidden gradient"] = _relative(gradients[0][truth.rows], truth.hidden_gradient)
    if wants == TRAINED_HEAD:
        found["weight gradient"] = _relative(gradients[1][truth.columns], truth.weight_gradient)
    return found


def _relative(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()
