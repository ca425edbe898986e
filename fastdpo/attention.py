"""Packed prefix attention: what a transformers attention layer calls while fastdpo runs a packed batch.

A packed row has two segments a pair, prompt + chosen and rejected; the second one's queries see the prompt's keys too,
gathered once for the row. Inside a segment the mask is causal with the last query on the last key, so row i of the
rejected response sees the prompt and i + 1 of its own tokens. Rotary embeddings are applied before, from the batch's
position ids.

The function is registered with transformers under a name of its own and set on a model's configs only inside
`packed_attention`, which restores them on exit and on exceptions: generation and callbacks see the model as it was
given. Checkpointed blocks run again in the backward, outside of that context; `checkpoint_contexts` gives them the same
one.

Backend: scaled_dot_product_attention segment by segment, plain matrix products where a logit softcap asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from fastdpo.batch import Segments

NAME = "fastdpo_prefix"


@dataclass
class Calls:
    """How often `prefix_attention` ran, and the sliding windows that it was handed."""

    count: int = 0
    windows: list[int] = field(default_factory=list)


_counters: list[Calls] = []


class CannotPack(Exception):
    """The model's attention does not take packed segments; its batches are padded instead."""


def prefix_attention(
    module: nn.Module,
    query: Tensor,  # (1, Hq, T, d)
    key: Tensor,  # (1, Hkv, T, d)
    value: Tensor,  # (1, Hkv, T, dv)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """-> (1, T, Hq, dv), None. Raises CannotPack where a segment's answer would be wrong."""
    for counter in _counters:
        counter.count += 1
        counter.windows += [] if sliding_window is None else [sliding_window]
    if segments is None:
        raise CannotPack(f"{type(module).__name__} does not hand keyword arguments on to its attention")
    if s_aux is not None or attention_mask is not None:
        raise CannotPack(
            f"{type(module).__name__} adds {'sinks' if s_aux is not None else 'a mask of its own'} to its attention"
        )
    key, value = key[:, :, segments.key_index], value[:, :, segments.key_index]
    outputs = []
    queries = query.split(segments.query_lengths, dim=2)
    keys, values = key.split(segments.key_lengths, dim=2), value.split(segments.key_lengths, dim=2)
    for q, k, v in zip(queries, keys, values, strict=True):
        window = sliding_window if sliding_window is not None and sliding_window < k.shape[2] else 0
        if softcap is not None:
            outputs.append(_softcapped(q, k, v, _mask(segments, q, k, window), scaling, softcap, dropout))
        elif q.shape[2] == k.shape[2] and not window:
            outputs.append(_sdpa(q, k, v, scaling, dropout, is_causal=True))
        else:
            outputs.append(_sdpa(q, k, v, scaling, dropout, attn_mask=_mask(segments, q, k, window)))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, prefix_attention)


def attention_configs(model: nn.Module) -> list[Any]:
    """The distinct configs that a model's modules look up their attention in."""
    configs = {
        id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation_internal")
    }
    return list(configs.values())


@contextmanager
def attention_set_to(configs: Sequence[Any], names: Sequence[str]) -> Iterator[None]:
    """Within it, the models of these configs attend by the implementations of these names."""
    previous = [config._attn_implementation_internal for config in configs]
    try:
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation_internal = name
        yield
    finally:
        for config, name in zip(configs, previous, strict=True):
            config._attn_implementation_internal = name


def packed_attention(configs: Sequence[Any]) -> AbstractContextManager[None]:
    """Within it, the models of these configs attend by `prefix_attention`."""
    return attention_set_to(configs, [NAME] * len(configs))


def checkpoint_contexts(configs: Sequence[Any]) -> Callable[[], tuple[AbstractContextManager[None], ...]]:
    """`context_fn` for torch's checkpoint: a block's second run happens under the attention that its first run saw."""

    def contexts() -> tuple[AbstractContextManager[None], ...]:
        current = [config._attn_implementation_internal for config in configs]
        return nullcontext(), attention_set_to(configs, current)

    return contexts


@contextmanager
def packed_calls() -> Iterator[Calls]:
    """Counts the calls of `prefix_attention` made within it."""
    _counters.append(Calls())
    try:
        yield _counters[-1]
    finally:
        _counters.pop()


def backend_report() -> list[tuple[str, str]]:
    """Which way packed attention goes on this machine, and why: rows of (what, path)."""
    return [
        ("packed attention", "torch scaled_dot_product_attention, segment by segment: the only backend of this version")
    ]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, dropout: float, **mask: Any) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, enable_gqa=grouped, **mask)


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float, dropout: float
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    probs = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.dropout(probs, dropout, train=True) @ v


def _mask(segments: Segments, q: Tensor, k: Tensor, window: int) -> Tensor:
    """(Lq, Lk) bool, True where attended; made once a batch and length, then shared by the layers."""
    what = (q.device, q.shape[2], k.shape[2], window)
    if what not in segments.masks:
        last = k.shape[2] - q.shape[2]  # the key that the first query stands on
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(last)
        segments.masks[what] = mask.triu(last - window + 1) if window else mask
    return segments.masks[what]
