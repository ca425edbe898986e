"""PreferenceBatch: the one shape in which pairs travel from the data to the loss.

Packed, the layout that a run uses wherever the model allows it: all pairs end to end in one row without padding, a pair
being prompt, chosen, rejected. The prompt stands there once and is computed once; rejected tokens attend to the prompt
and to themselves, and their positions restart at the prompt's end:

    tokens      p0 p1 p2 | c0 c1 | r0 r1 r2        queries of segment A: p, c    keys: p, c
    positions    0  1  2 |  3  4 |  3  4  5        queries of segment B: r       keys: p, r (gathered)

What else two sequences of a micro-batch begin alike with may be computed once, too: a system prompt, the prompt of
several pairs, the first words of both responses. A sequence then has as its queries what no sequence before it had, and
as its keys all of itself.

Padded, for models that cannot: one sequence a row, chosen and rejected interleaved, right-padded. Either way
`logit_rows` names the hidden rows that predict a response token, so prompt rows never reach the LM head, and `targets`
and `cu_seqlens` are the same.

Legend: P pairs, T tokens in a row, R rows (1 packed, 2P padded), N scored tokens, S = 2P segments, K gathered keys.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Pairs share a beginning of so many tokens at least. What more than two sequences share needs a sorted sum of
# gradients, some 100 us a layer on a GPU: fewer tokens, such as the one that all sequences begin with, may not be worth
# it (unmeasured). And attention under a mask spreads a NaN over its segment, and so to the pairs that share some of it.
LEAST_SHARED = 32


class Pair(Protocol):
    """Token ids of one preference pair."""

    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def chosen(self) -> Sequence[int]: ...
    @property
    def rejected(self) -> Sequence[int]: ...
    @property
    def chosen_from(self) -> int: ...  # how many tokens at the beginning of a response are not scored
    @property
    def rejected_from(self) -> int: ...


class _TensorFields:
    """Moves every tensor field of a frozen dataclass at once."""

    def _map(self, move: Any) -> Any:
        moved = {}
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                moved[item.name] = move(value)
            elif isinstance(value, _TensorFields):
                moved[item.name] = value._map(move)
            elif item.name == "media":
                moved[item.name] = {name: move(tensor) for name, tensor in value.items()}
            elif item.name == "masks":  # another device's are made there, and go with the batch that lies there
                moved[item.name] = {}
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class Segments(_TensorFields):
    """Which keys each run of queries of a packed row sees: causal, the last query aligned with the last key."""

    key_index: Tensor  # (K,) int64 into the row's tokens
    cu_queries: Tensor  # (S + 1,) int32
    cu_keys: Tensor  # (S + 1,) int32
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    prompt_lengths: tuple[int, ...]  # (P,)
    scored: Tensor  # int64, the rows among `logit_rows`, each once
    crowded: bool = False  # pairs share tokens: some are in more than two sequences
    masks: dict[tuple, Tensor] = field(default_factory=dict, compare=False, repr=False)  # by attention_backends


@dataclass(frozen=True)
class PreferenceBatch(_TensorFields):
    """P pairs, ready for the model."""

    input_ids: Tensor  # (R, T) int64
    position_ids: Tensor | None  # (R, T) int64, packed only: padded rows count from 0 by themselves
    attention_mask: Tensor | None  # (R, T) int64, padded only
    segments: Segments | None  # packed only
    logit_rows: Tensor  # (N,) int64 into the R * T hidden rows
    targets: Tensor  # (N,) int64, the token that each of them predicts
    cu_seqlens: Tensor  # (2P + 1,) int32: scored tokens of chosen_0, rejected_0, chosen_1, ...
    keys: tuple[bytes, ...] = ()  # P row keys, what the reference memory goes by
    num_tokens: int = 0  # tokens of all 2P sequences, prompts counted twice as the peers do
    num_chosen_tokens: int = 0  # scored tokens of the chosen responses
    decoder_input_ids: Tensor | None = None  # (2P, T') int64, encoder-decoders only, whose input_ids are P prompts
    media: dict[str, Tensor] = field(default_factory=dict)  # what a processor makes of images, by the model's keywords
    pairs: tuple[Any, ...] = ()  # that it was made of, where its tensors do not say: pairs with images

    @property
    def num_pairs(self) -> int:
        return (self.cu_seqlens.shape[0] - 1) // 2

    @property
    def budgeted_tokens(self) -> int:
        """What a micro-batch's budget counts: what pairs share with each other, for each of them."""
        if self.segments is None:
            return self.input_ids.numel()
        return sum(self.segments.key_lengths) - sum(self.segments.prompt_lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreferenceBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PreferenceBatch:
        return self._map(lambda tensor: tensor.pin_memory())


class Share(list[PreferenceBatch]):
    """The micro-batches of this process's share of an optimizer batch, as loaders give them."""

    whole: int = 0  # a digest of all rows that were dealt, the same in every process
    places: Sequence[tuple[bytes, int]] = ()  # a key a pair, and its row's number among those that were dealt


@dataclass(frozen=True)
class OptimizerBatch:
    """This process's share of an optimizer batch, and what all shares together count."""

    microbatches: Sequence[PreferenceBatch]  # equally many in every process: some may be `emptied`
    num_pairs: int
    num_chosen_tokens: int
    num_tokens: int
    shares: Sequence[int]  # pairs of each process

    def to(self, device: torch.device | str, non_blocking: bool = False) -> OptimizerBatch:
        return replace(self, microbatches=[batch.to(device, non_blocking) for batch in self.microbatches])


def pack(pairs: Sequence[Pair], keys: Sequence[bytes] = (), least_shared: int | None = None) -> PreferenceBatch:
    """Pairs end to end in one row, each prompt once. With `least_shared` also what both responses begin alike with, and
    what pairs begin alike with, where it is so many tokens; LEAST_SHARED is meant for it.
    """
    ids: list[int] = []
    positions: list[int] = []
    key_index: list[int] = []
    logit_rows: list[int] = []
    query_lengths: list[int] = []
    key_lengths: list[int] = []
    known, crowded = _Prefixes(), False
    for pair in pairs:
        other: list[int] = []  # the pair's other sequence, and its rows
        rows: list[int] = []
        for response, first in ((pair.chosen, pair.chosen_from), (pair.rejected, pair.rejected_from)):
            tokens = [*pair.prompt, *response]
            begun = rows[: len(pair.prompt)]
            if least_shared is not None:
                begun = rows[: _alike(other, tokens[:-1])]
                elsewhere = known.rows(tokens)
                if len(elsewhere) >= len(begun) + least_shared:
                    begun, crowded = elsewhere, True
            fresh = tokens[len(begun) :]
            other, rows = tokens, [*begun, *range(len(ids), len(ids) + len(fresh))]
            if least_shared is not None:
                known.add(tokens, rows)
            ids += fresh
            positions += range(len(begun), len(tokens))
            key_index += rows
            query_lengths.append(len(fresh))
            key_lengths.append(len(rows))
            logit_rows += rows[max(len(pair.prompt) + first, 1) - 1 : -1]  # both first tokens by the prompt's last one
    segments = Segments(
        torch.tensor(key_index, dtype=torch.int64),
        _offsets(query_lengths),
        _offsets(key_lengths),
        tuple(query_lengths),
        tuple(key_lengths),
        tuple(len(pair.prompt) for pair in pairs),
        torch.tensor(sorted(set(logit_rows)), dtype=torch.int64),
        crowded,
    )
    return PreferenceBatch(
        torch.tensor([ids], dtype=torch.int64),
        torch.tensor([positions], dtype=torch.int64),
        None,
        segments,
        torch.tensor(logit_rows, dtype=torch.int64),
        **_scored(pairs, keys),
    )


class _Prefixes:
    """Sequences in order: of all that are known, a new one begins like one of its two neighbours for longest."""

    def __init__(self) -> None:
        self._known: list[tuple[list[int], list[int]]] = []  # tokens and their rows

    def rows(self, tokens: list[int]) -> list[int]:
        """Of the longest beginning that a known sequence has; never of all, as a segment has queries."""
        place = bisect(self._known, (tokens,))
        neighbours = self._known[max(place - 1, 0) : place + 1]
        return max((rows[: _alike(known, tokens[:-1])] for known, rows in neighbours), key=len, default=[])

    def add(self, tokens: list[int], rows: list[int]) -> None:
        self._known.insert(bisect(self._known, (tokens,)), (tokens, rows))


def _alike(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin alike with."""
    return next(
        (place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )


def pad(pairs: Sequence[Pair], keys: Sequence[bytes] = (), pad_token_id: int = 0) -> PreferenceBatch:
    """One sequence a row, chosen and rejected interleaved, right-padded to the longest."""
    sequences = [[*pair.prompt, *response] for pair in pairs for response in (pair.chosen, pair.rejected)]
    unscored = [len(pair.prompt) + first for pair in pairs for first in (pair.chosen_from, pair.rejected_from)]
    input_ids = _right_padded(sequences, pad_token_id)
    attention_mask = _right_padded([[1] * len(tokens) for tokens in sequences], 0)
    width = input_ids.shape[1]
    logit_rows: list[int] = []
    for row, tokens in enumerate(sequences):
        first_scored = max(unscored[row], 1)
        logit_rows += range(row * width + first_scored - 1, row * width + len(tokens) - 1)
    rows = torch.tensor(logit_rows, dtype=torch.int64)
    return PreferenceBatch(input_ids, None, attention_mask, None, rows, **_scored(pairs, keys))


def encode_decode(
    pairs: Sequence[Pair], keys: Sequence[bytes] = (), pad_token_id: int = 0, start_token_id: int = 0
) -> PreferenceBatch:
    """Of an encoder-decoder: a prompt a row of the encoder, and its two responses as rows of the decoder, which begin
    with `start_token_id` in place of their last token. Every token of a response is scored.
    """
    prompts = [pair.prompt for pair in pairs]
    responses = [response for pair in pairs for response in (pair.chosen, pair.rejected)]
    input_ids = _right_padded(prompts, pad_token_id)
    decoder_input_ids = _right_padded([[start_token_id, *response[:-1]] for response in responses], pad_token_id)
    width = decoder_input_ids.shape[1]
    rows = [row * width + place for row, response in enumerate(responses) for place in range(len(response))]
    return PreferenceBatch(
        input_ids,
        None,
        _right_padded([[1] * len(prompt) for prompt in prompts], 0),
        None,
        torch.tensor(rows, dtype=torch.int64),
        **_scored(pairs, keys, unscored=0),
        decoder_input_ids=decoder_input_ids,
    )


def _right_padded(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    padded = torch.full((len(rows), max(map(len, rows), default=0)), padding, dtype=torch.int64)
    for place, tokens in enumerate(rows):
        padded[place, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    return padded


def microbatches(
    lengths: Sequence[int], max_pairs: int, max_tokens: int | None, padded: bool = False
) -> list[list[int]]:
    """Groups the pairs of an optimizer batch, given what each costs in tokens: -> indices of each group, the costliest
    group first, so that the worst case comes first.

    With a token budget: as few groups as first-fit finds, their tokens balanced; a pair beyond the budget goes alone.
    Without one, or `padded`, where a group costs its longest pair times its number of pairs: neighbours by length, at
    most `max_pairs` of them without a budget. Gradients do not depend on the grouping.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if max_tokens is not None and not padded:
        return _balanced(lengths, order, max_tokens)
    groups: list[list[int]] = []
    room = 0
    for index in order:
        if room == 0:
            groups.append([])
            room = max_pairs if max_tokens is None else max(1, max_tokens // max(1, lengths[index]))
        groups[-1].append(index)
        room -= 1
    return groups


def _balanced(lengths: Sequence[int], order: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing says how many groups; each pair then goes to the emptiest, if all still fit that way."""
    fitted: list[list[int]] = []
    loads: list[int] = []
    for index in order:
        place = next((g for g, load in enumerate(loads) if load + lengths[index] <= max_tokens), len(loads))
        if place == len(loads):
            fitted.append([])
            loads.append(0)
        fitted[place].append(index)
        loads[place] += lengths[index]
    even: list[list[int]] = [[] for _ in fitted]
    loads = [0] * len(fitted)
    for index in order:
        place = loads.index(min(loads))
        even[place].append(index)
        loads[place] += lengths[index]
    fits = all(len(group) == 1 or load <= max_tokens for group, load in zip(even, loads, strict=True))
    groups = even if fits else fitted
    return sorted(groups, key=lambda group: -sum(lengths[index] for index in group))


def deal(lengths: Sequence[int], hands: int) -> list[list[int]]:
    """Indices of an optimizer batch's pairs, equally many to each hand (up to one), their tokens balanced: the longest
    pairs first, of each round the longest to the hand that holds least.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    dealt: list[list[int]] = [[] for _ in range(hands)]
    loads = [0] * hands
    for start in range(0, len(order), hands):
        lightest = sorted(range(hands), key=loads.__getitem__)
        for hand, index in zip(lightest, order[start : start + hands], strict=False):
            dealt[hand].append(index)
            loads[hand] += lengths[index]
    return dealt


def emptied(batch: PreferenceBatch) -> PreferenceBatch:
    """No pairs: the model runs over the same tokens, none of which is scored. Where one process has no micro-batch left
    and others do, it takes part in what the model's forward and backward do together.
    """
    none = {"logit_rows": batch.logit_rows[:0], "targets": batch.targets[:0], "cu_seqlens": batch.cu_seqlens[:1]}
    return replace(batch, **none, keys=(), num_tokens=0, num_chosen_tokens=0)


class Tokens(NamedTuple):
    """A pair's token ids, as read back from a batch."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    chosen_from: int = 0
    rejected_from: int = 0


def pairs_of(batch: PreferenceBatch) -> list[Any]:
    """The pairs that a batch on the CPU was made of.

    Padded, an empty prompt before two responses that start alike comes back as a prompt of that one token: both make
    the same batch.
    """
    if batch.pairs:
        return list(batch.pairs)
    if batch.decoder_input_ids is not None:
        return _encoded_pairs(batch)
    if batch.segments is None:
        return _padded_pairs(batch)
    segments, pairs = batch.segments, []
    sequences = [rows.tolist() for rows in batch.input_ids[0, segments.key_index].split(segments.key_lengths)]
    scored = batch.cu_seqlens.diff().tolist()
    for prompt, chosen, rejected, *counts in zip(
        segments.prompt_lengths, sequences[::2], sequences[1::2], scored[::2], scored[1::2], strict=True
    ):
        pairs.append(_tokens(chosen[:prompt], chosen[prompt:], rejected[prompt:], counts))
    return pairs


def _tokens(prompt: list[int], chosen: list[int], rejected: list[int], scored: Sequence[int]) -> Tokens:
    """A pair whose responses have so many scored tokens; the first one after an empty prompt is never scored."""
    unscored = [len(response) - count for response, count in zip((chosen, rejected), scored, strict=True)]
    return Tokens(prompt, chosen, rejected, *(count if prompt or count > 1 else 0 for count in unscored))


def _encoded_pairs(batch: PreferenceBatch) -> list[Tokens]:
    assert batch.attention_mask is not None
    lengths = batch.attention_mask.sum(1).tolist()
    prompts = [row[:length] for row, length in zip(batch.input_ids.tolist(), lengths, strict=True)]
    responses = [part.tolist() for part in batch.targets.split(batch.cu_seqlens.diff().tolist())]
    return [Tokens(*parts) for parts in zip(prompts, responses[::2], responses[1::2], strict=True)]


def _padded_pairs(batch: PreferenceBatch) -> list[Tokens]:
    assert batch.attention_mask is not None
    lengths = batch.attention_mask.sum(1).tolist()
    rows = [row[:length] for row, length in zip(batch.input_ids.tolist(), lengths, strict=True)]
    scored = batch.cu_seqlens.diff().tolist()
    pairs = []
    for chosen, rejected, *counts in zip(rows[::2], rows[1::2], scored[::2], scored[1::2], strict=True):
        unscored = min(len(chosen) - counts[0], len(rejected) - counts[1])
        prompt = _alike(chosen[:unscored], rejected[:unscored])
        pairs.append(_tokens(chosen[:prompt], chosen[prompt:], rejected[prompt:], counts))
    return pairs


def _scored(pairs: Sequence[Pair], keys: Sequence[bytes], unscored: int = 1) -> dict[str, Any]:
    """The fields that do not depend on the layout. The first token after an empty prompt has nothing to predict it,
    but a decoder's first token (`unscored` = 0).
    """
    responses = [
        response[max(first, 0 if pair.prompt else unscored) :]
        for pair in pairs
        for response, first in ((pair.chosen, pair.chosen_from), (pair.rejected, pair.rejected_from))
    ]
    return {
        "targets": torch.tensor([token for response in responses for token in response], dtype=torch.int64),
        "cu_seqlens": _offsets([len(response) for response in responses]),
        "keys": tuple(keys),
        "num_tokens": sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs),
        "num_chosen_tokens": sum(map(len, responses[::2])),
    }


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
