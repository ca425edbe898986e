"""Packing and padding token by token, grouping into micro-batches, and what must not depend on either."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import RAGGED, gradient_error, gradients, random_pairs, tiny_model
from torch import Tensor

from fastdpo.batch import PreferenceBatch, microbatches, pack, pad, pairs_of
from fastdpo.data import TokenPair
from fastdpo.model import Policy

PAIRS = [TokenPair([10, 11, 12], [20, 21], [30, 31, 32]), TokenPair([13], [22], [33, 34])]
shared = partial(pack, least_shared=1)
LAYOUTS: list[Any] = [pack, pad, pytest.param(shared, id="shared")]
# One system prompt; a prompt with two pairs and one chosen response; responses that begin alike; a response that begins
# another; a pair twice; no prompt.
ALIKE = [
    TokenPair([9, 8, 7, 11, 12], [20, 21, 22], [20, 21, 30]),
    TokenPair([9, 8, 7, 11, 12], [20, 21, 22], [40]),
    TokenPair([9, 8, 7, 13], [20], [20, 50, 51]),
    TokenPair([9, 8, 7, 13], [20], [20, 50, 51]),
    TokenPair([], [9, 8, 60], [9, 61]),
]


def scored_weights(pairs: Sequence[TokenPair]) -> dict[bytes, tuple[Tensor, Tensor]]:
    """A fixed random weight for every scored token of every pair."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda count: torch.randn(count, generator=generator)  # noqa: E731
    counts = [(len(p.chosen) - (not p.prompt), len(p.rejected) - (not p.prompt)) for p in pairs]
    return {key(pair): (draw(chosen), draw(rejected)) for pair, (chosen, rejected) in zip(pairs, counts, strict=True)}


def key(pair: TokenPair) -> bytes:
    return repr((pair.prompt, pair.chosen, pair.rejected)).encode()


def summed_gradients(
    policy: Policy, pairs: Sequence[TokenPair], groups: Sequence[Sequence[int]], layout: Callable[..., PreferenceBatch]
) -> dict[str, Tensor]:
    """Gradients of a sum over all scored tokens, accumulated over the groups."""
    weights = scored_weights(pairs)
    policy.zero_grad()
    for group in groups:
        members = [pairs[i] for i in group]
        logps, _ = policy(layout(members))
        (logps * torch.cat([part for pair in members for part in weights[key(pair)]])).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def split(values: Tensor, batch: PreferenceBatch) -> list[Tensor]:
    """By sequence: chosen_0, rejected_0, chosen_1, ..."""
    return list(values.split(batch.cu_seqlens.diff().tolist()))


# Contents


def test_packed_pairs_stand_end_to_end_with_the_prompt_once_and_restarting_positions() -> None:
    batch = pack(PAIRS)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 31, 32, 13, 22, 33, 34]]
    assert batch.position_ids is not None and batch.segments is not None and batch.attention_mask is None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 1, 2]]
    assert batch.segments.query_lengths == (5, 3, 2, 2) and batch.segments.key_lengths == (5, 6, 2, 3)
    assert batch.segments.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 8, 10, 11]
    assert batch.segments.cu_queries.tolist() == [0, 5, 8, 10, 12]
    assert batch.segments.cu_keys.tolist() == [0, 5, 11, 13, 16]
    assert batch.logit_rows.tolist() == [2, 3, 2, 5, 6, 8, 8, 10]


def test_shared_tokens_stand_once_and_every_sequence_has_all_of_its_own_as_keys() -> None:
    batch = shared(ALIKE)
    assert batch.input_ids.tolist() == [[9, 8, 7, 11, 12, 20, 21, 22, 30, 22, 40, 13, 20, 50, 51, 20, 51, 60, 61]]
    assert batch.position_ids is not None and batch.segments is not None and batch.segments.crowded
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 5, 3, 4, 5, 6, 4, 6, 2, 1]]
    assert batch.segments.query_lengths == (8, 1, 1, 1, 2, 2, 1, 1, 1, 1)
    sequences = [[*pair.prompt, *response] for pair in ALIKE for response in (pair.chosen, pair.rejected)]
    gathered = batch.input_ids[0, batch.segments.key_index].split(batch.segments.key_lengths)
    assert [keys.tolist() for keys in gathered] == sequences
    assert not shared(ALIKE[:1]).segments.crowded and pack(ALIKE).segments.crowded is False  # type: ignore[union-attr]


def test_pairs_share_a_beginning_of_so_many_tokens_or_more_and_a_pair_any() -> None:
    ids = lambda least: pack(ALIKE[:3], least_shared=least).input_ids[0].tolist()  # noqa: E731
    first, second, third = [9, 8, 7, 11, 12, 20, 21, 22, 30], [22, 40], [13, 20, 50, 51]
    assert ids(3) == [*first, *second, *third]
    assert ids(4) == ids(7) == [*first, *second, 9, 8, 7, *third]  # the second pair begins like the first in 7
    assert ids(8) == [*first, 9, 8, 7, 11, 12, 20, 21, 22, 40, 9, 8, 7, *third]
    assert ids(None) == [token for pair in ALIKE[:3] for token in [*pair.prompt, *pair.chosen, *pair.rejected]]


def test_padded_pairs_stand_a_sequence_a_row_with_the_padding_masked() -> None:
    batch = pad(PAIRS, pad_token_id=7)
    assert batch.input_ids.tolist() == [
        [10, 11, 12, 20, 21, 7],
        [10, 11, 12, 30, 31, 32],
        [13, 22, 7, 7, 7, 7],
        [13, 33, 34, 7, 7, 7],
    ]
    assert batch.attention_mask is not None and batch.segments is None
    assert batch.attention_mask.sum(1).tolist() == [5, 6, 2, 3] and batch.attention_mask[:, 0].all()
    assert batch.logit_rows.tolist() == [2, 3, 8, 9, 10, 12, 18, 19]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_response_token_is_a_target_once_and_its_row_is_the_token_before_it(
    layout: Callable[..., PreferenceBatch],
) -> None:
    batch = layout(RAGGED, keys=[b"a", b"b"])
    responses = [r[0 if p.prompt else 1 :] for p in RAGGED for r in (p.chosen, p.rejected)]
    assert [part.tolist() for part in split(batch.targets, batch)] == [list(response) for response in responses]
    before = [[*p.prompt, *r][max(len(p.prompt), 1) - 1 : -1] for p in RAGGED for r in (p.chosen, p.rejected)]
    tokens_before = batch.input_ids.flatten()[batch.logit_rows]
    assert [part.tolist() for part in split(tokens_before, batch)] == before
    assert batch.num_pairs == len(RAGGED) and batch.keys == (b"a", b"b")
    assert batch.num_tokens == sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in RAGGED)


def test_moving_a_batch_moves_every_tensor_of_it_and_keeps_the_rest() -> None:
    batch = pack(PAIRS, [b"a", b"b"]).to("meta")
    assert batch.segments is not None
    for part in (batch, batch.segments):
        assert {value.device.type for value in vars(part).values() if isinstance(value, Tensor)} == {"meta"}
    assert batch.keys == (b"a", b"b") and batch.segments.query_lengths == (5, 3, 2, 2)


# Micro-batches


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_microbatches_hold_every_pair_once_within_budget_and_the_costliest_first(seed: int, padded: bool) -> None:
    draw = random.Random(seed)
    lengths = [draw.randrange(1, 60) for _ in range(draw.randrange(0, 30))]

    def cost(group: list[int]) -> int:
        tokens = [lengths[index] for index in group]
        return max(tokens) * len(tokens) if padded else sum(tokens)

    for max_tokens in (1, 50, 64, 10_000):
        groups = microbatches(lengths, 4, max_tokens, padded)
        assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
        assert all(groups) and groups == microbatches(list(lengths), 4, max_tokens, padded)
        assert all(cost(group) <= max_tokens or len(group) == 1 for group in groups)
        longest = [max(lengths[index] for index in group) for group in groups]
        assert (longest if padded else [cost(group) for group in groups]) == sorted(
            longest if padded else map(cost, groups), reverse=True
        )


def test_a_budget_counts_what_pairs_share_for_each_of_them() -> None:
    """As micro-batches are made up: halving what is really there made of one that did not fit eight."""
    system = list(range(5, 65))
    pairs = [TokenPair([*system, *pair.prompt], pair.chosen, pair.rejected) for pair in RAGGED * 4]
    for batch in (pack(pairs), pack(pairs, least_shared=1)):
        assert batch.budgeted_tokens == sum(pair.length for pair in pairs)
    assert pack(pairs, least_shared=1).input_ids.numel() < sum(pair.length for pair in pairs) / 2
    assert pad(pairs).budgeted_tokens == pad(pairs).input_ids.numel()


def test_masks_of_a_batch_on_another_device_are_its_own() -> None:
    """The host's batches live as long as an optimizer step, and would keep the GPU's masks."""
    batch = pack(RAGGED)
    assert batch.segments is not None
    batch.segments.masks["a"] = torch.ones(1)
    assert batch.to("meta").segments.masks == {}


def test_without_a_budget_neighbours_by_length_go_together() -> None:
    assert microbatches([3, 9, 1, 7, 5], 2, None) == [[1, 3], [4, 0], [2]]


def test_a_token_budget_makes_few_groups_of_even_size() -> None:
    assert microbatches([10, 10, 10, 10, 10, 10], 2, 40) == [[0, 2, 4], [1, 3, 5]]
    assert microbatches([5, 90, 5], 2, 30) == [[1], [0, 2]]
    assert microbatches([6, 5, 5, 4, 4], 2, 12) == [[1, 3], [2, 4], [0]]


def test_even_groups_that_would_not_fit_stay_as_first_fit_left_them() -> None:
    lengths = [6, 6, 4, 4, 4]  # evenly 6 + 4 + 4 and 6 + 4, of which the first is too much
    assert microbatches(lengths, 2, 12) == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pairs_of_a_batch_make_that_batch_again(layout: Callable[..., PreferenceBatch]) -> None:
    pairs = [*RAGGED, *random_pairs((0, 4, 4), (1, 1, 2), (0, 2, 1), seed=1)]
    pairs += ALIKE if layout is shared else []
    batch = layout(pairs)
    again = layout(pairs_of(batch))
    for name, value in vars(batch).items():
        other = getattr(again, name)
        assert torch.equal(value, other) if isinstance(value, Tensor) else True, name
    assert again.num_tokens == batch.num_tokens and again.num_chosen_tokens == batch.num_chosen_tokens
    assert [tuple(map(list, pair[:3])) for pair in pairs_of(batch)] == [(p.prompt, p.chosen, p.rejected) for p in pairs]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_any_split_into_microbatches_gives_the_same_summed_gradients(
    family: str, layout: Callable[..., PreferenceBatch]
) -> None:
    policy = Policy(tiny_model(family)).eval()
    pairs = [*RAGGED, *random_pairs((9, 4, 4), (2, 2, 13), seed=1)]
    indices = list(range(len(pairs)))
    expected = summed_gradients(policy, pairs, [indices], layout)
    groupings = [microbatches([p.length for p in pairs], 3, None), microbatches([p.length for p in pairs], 8, 30)]
    for seed in range(2):
        draw = random.Random(seed)
        draw.shuffle(indices)
        cuts = [0, *sorted(draw.sample(range(1, len(pairs)), draw.randrange(1, len(pairs)))), len(pairs)]
        groupings.append([indices[a:b] for a, b in zip(cuts, cuts[1:], strict=False)])
    for groups in groupings:
        assert gradient_error(summed_gradients(policy, pairs, groups, layout), expected) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2", "mistral-window"])
def test_sharing_what_sequences_begin_alike_with_leaves_logps_and_gradients(family: str) -> None:
    policy = Policy(tiny_model(family)).eval()
    draw = random.Random(3)
    pairs = [*ALIKE, *RAGGED, *(TokenPair([9, 8, *pair.prompt], pair.rejected, pair.chosen) for pair in RAGGED)]
    expected = policy(pack(pairs))[0]
    torch.testing.assert_close(policy(shared(pairs))[0], expected, rtol=1e-5, atol=1e-5)
    order = draw.sample(range(len(pairs)), len(pairs))
    everyone = summed_gradients(policy, pairs, [range(len(pairs))], pack)
    assert gradient_error(summed_gradients(policy, pairs, [order], shared), everyone) < 1e-5
    assert shared(pairs).input_ids.numel() < pack(pairs).input_ids.numel() - 20


# Pairs and one another


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_permuting_pairs_permutes_their_logps_and_leaves_the_gradients(
    family: str, layout: Callable[..., PreferenceBatch]
) -> None:
    policy = Policy(tiny_model(family)).eval()
    order = [3, 0, 5, 2, 1, 4]
    batch, permuted = layout(RAGGED), layout([RAGGED[i] for i in order])
    logps, again = split(policy(batch)[0], batch), split(policy(permuted)[0], permuted)
    for place, index in enumerate(order):
        torch.testing.assert_close(again[2 * place], logps[2 * index], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again[2 * place + 1], logps[2 * index + 1], rtol=1e-5, atol=1e-5)
    whole = summed_gradients(policy, RAGGED, [range(len(RAGGED))], layout)
    assert gradient_error(summed_gradients(policy, RAGGED, [order], layout), whole) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral-window"])
@torch.no_grad()
def test_changed_tokens_reach_their_own_continuation_and_nothing_else_bitwise(
    family: str, layout: Callable[..., PreferenceBatch]
) -> None:
    policy = Policy(tiny_model(family)).eval()
    pairs = random_pairs((7, 5, 9), (1, 11, 2), (12, 4, 4))
    other = lambda tokens: [3 + (token + 1) % 90 for token in tokens]  # noqa: E731
    first = pairs[0]
    batch = layout(pairs)
    before = split(policy(batch)[0], batch)
    changes = {
        (0,): TokenPair(first.prompt, other(first.chosen), first.rejected),
        (1,): TokenPair(first.prompt, first.chosen, other(first.rejected)),
        (0, 1): TokenPair([*first.prompt[:-1], *other(first.prompt[-1:])], first.chosen, first.rejected),
    }
    for reached, pair in changes.items():
        after = split(policy(layout([pair, *pairs[1:]]))[0], batch)
        for sequence in range(6):
            if sequence in reached:
                assert (after[sequence] - before[sequence]).abs().max() > 1e-3
            else:
                assert torch.equal(after[sequence], before[sequence]), f"sequence {sequence} of {family}"


@torch.no_grad()
def test_a_changed_last_token_of_a_response_moves_only_its_own_logp() -> None:
    policy = Policy(tiny_model("llama")).eval()
    pair = random_pairs((7, 5, 9))[0]
    changed = TokenPair(pair.prompt, [*pair.chosen[:-1], 3 + (pair.chosen[-1] + 1) % 90], pair.rejected)
    difference = (policy(pack([changed]))[0] - policy(pack([pair]))[0]).abs()
    assert difference.nonzero().flatten().tolist() == [len(pair.chosen) - 1]


def test_gradients_of_one_sequence_leave_the_embeddings_of_other_pairs_alone() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    pairs = [TokenPair([3, 4, 5], [6, 7], [8, 9]), TokenPair([13, 14], [15, 16], [17, 18])]
    batch = pack(pairs)
    chosen, rejected, *_ = split(Policy(model).eval()(batch)[0], batch)
    touched = lambda logps: set(  # noqa: E731
        gradients(logps, model)["model.embed_tokens.weight"].abs().sum(1).nonzero().flatten().tolist()
    )
    assert touched(torch.cat([chosen])) == {3, 4, 5, 6}
    chosen, rejected, *_ = split(Policy(model).eval()(batch)[0], batch)
    assert touched(rejected) == {3, 4, 5, 8}
