"""prefix_attention against a dense attention under the mask written out, and the setting of it on a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_attention import dense_attention, projections, segments_of, visible
from tiny_models import RAGGED, random_pairs, tiny_model
from torch import nn

from fastdpo.attention import (
    NAME,
    CannotPack,
    attention_configs,
    checkpoint_contexts,
    packed_attention,
    packed_calls,
    prefix_attention,
)

HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}


SCORES: dict[str, dict[str, Any]] = {
    "plain": {},
    "eager": {"asked_attention": "eager"},
    "softcap": {"softcap": 2.0},
    "sinks": {"s_aux": [0.3, -1.0, 4.0, 0.0]},
    "softcap_and_sinks": {"softcap": 2.0, "s_aux": [0.3, -1.0, 4.0, 0.0]},
}


@pytest.mark.parametrize("options", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("window", [None, 1, 4, 15, 100])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_outputs_and_gradients_are_those_of_dense_attention_under_the_explicit_mask(
    heads: tuple[int, int], window: int | None, options: dict[str, Any]
) -> None:
    mask, segments = visible(RAGGED, window), segments_of(RAGGED)
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.float64, 1e-13)):
        inputs = projections(mask.shape[0], heads, dtype)
        given = dict(options)
        if "s_aux" in given:
            given["s_aux"] = torch.tensor(given["s_aux"], dtype=dtype, requires_grad=True)
        leaves = [*inputs, *([given["s_aux"]] if "s_aux" in given else [])]
        expected = dense_attention(*inputs, mask, 0.3, given.get("softcap"), given.get("s_aux"))
        largest = float(expected.detach().abs().max())
        actual, weights = prefix_attention(
            nn.Module(), *inputs, None, scaling=0.3, segments=segments, sliding_window=window, **given
        )
        assert weights is None and actual.shape == expected.shape and actual.is_contiguous()
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
        for got, wanted in zip(
            torch.autograd.grad(actual, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def test_without_a_scaling_scores_are_divided_by_the_square_root_of_the_head_size() -> None:
    pairs = random_pairs((3, 2, 4))
    inputs = projections(9, (4, 2), torch.float64)
    expected = dense_attention(*inputs, visible(pairs, None), 16**-0.5, None)
    for softcap in (None, 1e6):  # a cap so high does nothing
        actual, _ = prefix_attention(nn.Module(), *inputs, None, segments=segments_of(pairs), softcap=softcap)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_one_batch_serves_layers_with_different_windows() -> None:
    segments = segments_of(RAGGED)
    inputs = projections(visible(RAGGED, None).shape[0], (4, 2), torch.float64)
    for window in (4, None, 2, 4):
        actual, _ = prefix_attention(nn.Module(), *inputs, None, 0.3, segments=segments, sliding_window=window)
        torch.testing.assert_close(actual, dense_attention(*inputs, visible(RAGGED, window), 0.3, None))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"segments": None}, "does not hand keyword arguments on"),
        ({"attention_mask": torch.ones(1, 1, 9, 9, dtype=torch.bool)}, "mask of its own"),
    ],
    ids=["no_segments", "mask"],
)
def test_what_would_give_a_wrong_answer_raises_cannot_pack(given: dict[str, Any], message: str) -> None:
    inputs = projections(9, (4, 2), torch.float32)
    arguments = {"attention_mask": None, "segments": segments_of(random_pairs((3, 2, 4))), **given}
    with pytest.raises(CannotPack, match=message):
        prefix_attention(nn.Module(), *inputs, **arguments)


def test_calls_and_windows_are_counted_by_every_counter_around_them() -> None:
    inputs, segments = projections(9, (4, 2), torch.float32), segments_of(random_pairs((3, 2, 4)))
    with packed_calls() as outer:
        prefix_attention(nn.Module(), *inputs, None, segments=segments)
        with packed_calls() as inner:
            prefix_attention(nn.Module(), *inputs, None, segments=segments, sliding_window=3)
    prefix_attention(nn.Module(), *inputs, None, segments=segments)
    assert (outer.count, outer.windows, inner.count, inner.windows) == (2, [3], 1, [3])


def test_the_attention_of_before_is_back_after_the_context_and_after_an_exception_in_it() -> None:
    model = tiny_model("llama")
    configs = attention_configs(model)
    model.set_attn_implementation("eager")
    with packed_attention(configs):
        assert {config._attn_implementation for config in configs} == {NAME}
    assert {config._attn_implementation for config in configs} == {"eager"}
    with pytest.raises(KeyError), packed_attention(configs):
        raise KeyError
    assert {config._attn_implementation for config in configs} == {"eager"}


def test_a_checkpointed_blocks_second_run_sees_the_attention_of_the_first() -> None:
    configs = attention_configs(tiny_model("llama"))
    own = configs[0]._attn_implementation
    contexts = checkpoint_contexts(configs)
    with packed_attention(configs):
        _, packed_again = contexts()
    _, plain_again = contexts()
    with packed_again:
        assert configs[0]._attn_implementation == NAME
        with plain_again:
            assert configs[0]._attn_implementation == own
    assert configs[0]._attn_implementation == own
