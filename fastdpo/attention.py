"""Packed prefix attention: what a transformers attention layer calls while fastdpo runs a packed batch.

A packed row has two segments a pair, prompt + chosen and rejected; the second one's queries see the prompt's keys too,
gathered once for the row, as does any sequence those of what it begins alike with. Inside a segment the mask is causal
with the last query on the last key, so row i of the rejected response sees the prompt and i + 1 of its own tokens.
Rotary embeddings are applied before, from the batch's position ids.

The function is registered with transformers under a name of its own and set on a model's configs only inside
`packed_attention`, which restores them on exit and on exceptions: generation and callbacks see the model as it was
given. Checkpointed blocks run again in the backward, outside of that context; `checkpoint_contexts` gives them the same
one.

What computes it is chosen in attention_backends.py, call by call, from the call's own dtype: what `attn_implementation`
asks for travels with the segments as a keyword.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from fastdpo.attention_backends import BACKENDS, DESCRIPTIONS, Facts, Scores, choose, device_facts, facts_of
from fastdpo.batch import Segments

NAME = "fastdpo_prefix"


@dataclass
class Calls:
    """The calls of `prefix_attention`: what each one's backend was chosen by."""

    facts: list[Facts] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.facts)

    @property
    def windows(self) -> list[int]:
        """The sliding windows that layers handed over."""
        return [facts.window for facts in self.facts if facts.window is not None]


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
    asked_attention: str | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """-> (1, T, Hq, dv), None. Raises CannotPack where a segment's answer would be wrong, and Refused where what was
    asked for cannot compute it.

    `segments` cover every token of the row: one outside of them would get no answer, and gradients that are not
    numbers. `s_aux` are attention sinks, (Hq,).
    """
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux, dropout)
    facts = facts_of(query, value, scores, asked_attention)
    for counter in _counters:
        counter.facts.append(facts)
    if segments is None:
        raise CannotPack(f"{type(module).__name__} does not hand keyword arguments on to its attention")
    if attention_mask is not None:
        raise CannotPack(f"{type(module).__name__} adds a mask of its own to its attention")
    if sliding_window is not None and sliding_window >= max(segments.key_lengths):
        scores, facts = replace(scores, window=None), replace(facts, window=None)
    backend, _ = choose(facts)
    query, key, value = (tensor.to(facts.dtype) for tensor in (query, key, value))
    result = BACKENDS[backend](query, _gathered(key, segments), _gathered(value, segments), segments, scores)
    return result.transpose(1, 2).contiguous(), None


def _gathered(tensor: Tensor, segments: Segments) -> Tensor:
    """(1, Hkv, K, d): what belongs to a prompt stands there twice, and its gradient is the sum of two."""
    if tensor.is_cuda and not segments.crowded:  # two in any order: the same sum, which indexing would sort for
        return tensor.index_select(2, segments.key_index)
    return tensor[:, :, segments.key_index]  # index_add goes row by row on a CPU


AttentionInterface.register(NAME, prefix_attention)


def attention_configs(model: nn.Module) -> list[Any]:
    """The distinct configs that a model's modules look up their attention in."""
    configs = {
        id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation_internal")
    }
    return list(configs.values())


class attention_set_to(AbstractContextManager[None]):  # noqa: N801 (called like a function)
    """Within it, the models of these configs attend by the implementations of these names. It can be entered again, as
    a second backward pass through checkpointed blocks does.
    """

    def __init__(self, configs: Sequence[Any], names: Sequence[str]) -> None:
        self.configs, self.names = configs, names
        self.previous: list[list[str]] = []

    def __enter__(self) -> None:
        self.previous.append(_names(self.configs))
        _set_names(self.configs, self.names)

    def __exit__(self, *_: object) -> None:
        _set_names(self.configs, self.previous.pop())


def _names(configs: Sequence[Any]) -> list[str]:
    return [config._attn_implementation_internal for config in configs]


def _set_names(configs: Sequence[Any], names: Sequence[str]) -> None:
    for config, name in zip(configs, names, strict=True):
        config._attn_implementation_internal = name


def packed_attention(configs: Sequence[Any]) -> AbstractContextManager[None]:
    """Within it, the models of these configs attend by `prefix_attention`."""
    return attention_set_to(configs, [NAME] * len(configs))


def checkpoint_contexts(configs: Sequence[Any]) -> Callable[[], tuple[AbstractContextManager[None], ...]]:
    """`context_fn` for torch's checkpoint: a block's second run happens under the attention that its first run saw."""

    def contexts() -> tuple[AbstractContextManager[None], ...]:
        return nullcontext(), attention_set_to(configs, _names(configs))

    return contexts


@contextmanager
def packed_calls() -> Iterator[Calls]:
    """Counts the calls of `prefix_attention` made within it."""
    _counters.append(Calls())
    try:
        yield _counters[-1]
    finally:
        _counters.pop()


def asked_attention(model: PreTrainedModel) -> str | None:
    """The implementation that a model came with, None where that is transformers' own choice: eager where sdpa cannot
    compute the model, as under softcaps, whatever 5.17 says it supports.
    """
    config = model.config.get_text_config()
    name, softcap = config._attn_implementation, getattr(config, "attn_logit_softcapping", None)
    return None if name == "sdpa" or name == "eager" and (softcap or not model._supports_sdpa) else name


def backend_report(seen: Sequence[Facts] = ()) -> list[tuple[str, str]]:
    """Rows of (what, path and why): of the calls seen in a model, or of usual ones on this machine."""
    return list(dict.fromkeys(_row(facts) for facts in seen or _usual_facts()))


def _row(facts: Facts) -> tuple[str, str]:
    backend, why = choose(facts)
    special = [
        name for name, on in (("windows", facts.window), ("softcap", facts.softcap), ("sinks", facts.sinks)) if on
    ]
    under = f"with {' and '.join(special)}: " if special else ""
    return "packed attention", f"{under}{DESCRIPTIONS[backend]} ({why})"


def _usual_facts() -> list[Facts]:
    """bf16, fp32, and bf16 under a softcap, on the device that training would take."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    half, full = (device_facts(device, dtype) for dtype in (torch.bfloat16, torch.float32))
    return [half, full, replace(half, softcap=True)]
