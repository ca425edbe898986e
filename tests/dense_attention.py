"""Attention over a packed row written out: every score, under a mask made from the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdpo.batch import Segments, pack
from fastdpo.data import TokenPair


def visible(pairs: Sequence[TokenPair], window: int | None) -> Tensor:
    """(T, T) bool, by definition: which token of a packed row sees which."""
    tokens: list[tuple[int, str, int]] = []  # pair, part, position
    for index, pair in enumerate(pairs):
        prompt = len(pair.prompt)
        tokens += [(index, "prompt", i) for i in range(prompt)]
        tokens += [(index, "chosen", prompt + i) for i in range(len(pair.chosen))]
        tokens += [(index, "rejected", prompt + i) for i in range(len(pair.rejected))]

    def sees(query: tuple[int, str, int], key: tuple[int, str, int]) -> bool:
        in_reach = 0 <= query[2] - key[2] < (window or len(tokens))
        return query[0] == key[0] and key[1] in ("prompt", query[1]) and in_reach

    return torch.tensor([[sees(query, key) for key in tokens] for query in tokens])


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """(1, T, Hq, dv): every score of the row, then the mask; a sink is in the sum that weights are divided by."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is None:
        return (scores.softmax(-1) @ value).transpose(1, 2)
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sinks.view(1, -1, 1, 1))
    return ((scores - total).exp() @ value).transpose(1, 2)


def projections(
    tokens: int, heads: tuple[int, int], dtype: torch.dtype, head_size: int = 16, value_size: int = 12
) -> list[Tensor]:
    """Query, key and value as a layer hands them over; values narrower than keys, as in latent attention."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads[0], head_size), (heads[1], head_size), (heads[1], value_size))
    draws = [torch.randn(1, tokens, count, width, generator=generator, dtype=torch.float64) for count, width in sizes]
    return [draw.to(dtype).transpose(1, 2).requires_grad_() for draw in draws]


def segments_of(pairs: Sequence[TokenPair]) -> Segments:
    segments = pack(pairs).segments
    assert segments is not None
    return segments
