"""Under FSDP2 processes hold shares of the weights, and train as one process does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsdp_program
import pytest
import torch
from conftest import tiny_llama
from ranks_program import RESUMED, SCENARIOS, summary, trainer_of
from test_ranks import (
    PROCESSES,
    TESTS,
    assert_same,
    assert_that_the_bad_step_moved_nothing,
    ends_alone,
    ends_of,
    launch,
)

import fastdpo
from fastdpo.sharding import asked_plugin

# What accelerate launch sets of a config with fsdp_version 2. On CPUs accelerate itself does not look at it.
LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
COMPARED = (
    *("lora_with_evaluation", "matched", "sampled", "running_mean", "hooked", "token_mean", "padded"),
    *("a_last_batch_of_one_pair", "stream", "weights_that_differ_at_first", "remembered", "precomputed", "resumed"),
    *("whole_blocks_after_forward", "resized_embeddings"),
    *("best", "asked_by_one", "fused", "tied", "norms_beside_adapters", "a_trained_adapter", "encoder_decoder"),
    *("read_by_one", "read_by_one_under_adapters"),
)
OF_TWO = ("sampled", "running_mean", "token_mean", "padded", "stream", "asked_by_one", "norms_beside_adapters")
OF_TWO += ("resized_embeddings", "fused", "weights_that_differ_at_first")
OF_TWO += ("read_by_one",)
OTHERS = ("a_row_that_is_not_finite", "half", "continued", "gathers", "shares", "refused")
ALL = SCENARIOS | fsdp_program.SCENARIOS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process, amid the second epoch."""
    out = tmp_path_factory.mktemp("one")
    torch.manual_seed(0)
    trainer_of(out, 1, **RESUMED, save_strategy="steps", save_steps=3).train()
    return out / "run/checkpoint-3"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Callable[[str, int], list[dict[str, Any]]]:
    more = {**LAUNCHED, "FASTDPO_TEST_CHECKPOINT": str(checkpoint)}

    def start(count: int, out: Path) -> None:
        names = [name for name in (*COMPARED, *OTHERS) if count == 2 or name not in OF_TWO]
        launch(count, str(TESTS / "fsdp_program.py"), str(out), *names, **more)

    return ends_of(tmp_path_factory, start)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    return ends_alone(tmp_path_factory, ALL)


@pytest.mark.parametrize(
    ("name", "count"), [(name, count) for count in PROCESSES for name in COMPARED if count == 2 or name not in OF_TWO]
)
def test_the_log_and_the_weights_are_those_of_one_process(name: str, count: int, found: Any, alone: Any) -> None:
    for ours in found(name, count):
        assert ours["gradients"] == ["DTensor"]
        assert_same(ours, alone(name))


@pytest.mark.parametrize("count", PROCESSES)
def test_a_step_that_is_not_finite_is_skipped_by_all(count: int, found: Any, alone: Any) -> None:
    assert_that_the_bad_step_moved_nothing(found("a_row_that_is_not_finite", count), alone("a_row_that_is_not_finite"))


@pytest.mark.parametrize("count", PROCESSES)
def test_bf16_differs_by_rounding_alone(count: int, found: Any, alone: Any) -> None:
    """One process rounds no weight of a norm; here a block is gathered in bf16."""
    expected = alone("half")
    for ours in found("half", count):
        for row, other in zip(ours["log"], expected["log"], strict=True):
            assert row == pytest.approx(other, rel=0.02, abs=5e-3)
        assert ours["log"][0]["loss"] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("count", PROCESSES)
def test_a_process_holds_its_share_of_weights_and_of_optimizer_states(count: int, found: Any) -> None:
    results = found("shares", count)
    weights, states = zip(*(result["held"] for result in results), strict=True)
    assert sum(weights) == results[0]["whole"] and sum(states) == 2 * sum(weights)
    assert max(weights) <= 1.2 * sum(weights) / count  # rows of small tensors do not go into equal parts


@pytest.mark.parametrize("count", PROCESSES)
def test_a_micro_batch_gathers_the_head_once_and_each_block_twice(count: int, found: Any) -> None:
    result = found("gathers", count)[0]
    assert result["batches"] > 1
    around, blocks = 1, 2
    assert result["gathers"] == result["batches"] * (around + 2 * blocks)


@pytest.mark.parametrize("count", PROCESSES)
def test_the_first_process_alone_reads_weights_where_that_is_asked_for(count: int, found: Any) -> None:
    found_in_each = [result["read"] for result in found("read_by_one_under_adapters", count)]
    assert found_in_each == [[rank == 0] for rank in range(count)]


@pytest.mark.parametrize("count", PROCESSES)
def test_a_saved_model_is_whole(count: int, found: Any) -> None:
    result = found("tied", count)[-1]
    for name, value in result["weights"].items():
        assert torch.equal(result["saved"][name], value), name
    assert torch.equal(result["saved"]["lm_head.weight"], result["saved"]["model.embed_tokens.weight"])


def test_frozen_embeddings_that_grew_are_saved_with_the_adapter(found: Any, alone: Any) -> None:
    expected = alone("resized_embeddings")["saved"]
    assert len(expected) == 2
    for result in found("resized_embeddings", 2):
        assert result["saved"].keys() == expected.keys()
        assert all(torch.equal(result["saved"][name], value) for name, value in expected.items())


@pytest.mark.parametrize("count", PROCESSES)
def test_a_sharded_run_goes_on_in_one_process(count: int, found: Any, tmp_path: Path) -> None:
    expected = found("resumed", count)[0]
    again = trainer_of(tmp_path, 1, **RESUMED)
    again.train(resume_from_checkpoint=expected["checkpoint"])
    assert_same(summary(again), expected)


@pytest.mark.parametrize("count", PROCESSES)
def test_a_run_of_one_process_goes_on_sharded(count: int, found: Any, checkpoint: Path, tmp_path: Path) -> None:
    again = trainer_of(tmp_path, 1, **RESUMED)
    again.train(resume_from_checkpoint=str(checkpoint))
    for ours in found("continued", count):
        assert_same(ours, summary(again))


@pytest.mark.parametrize("count", PROCESSES)
@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ("fp16", "bf16=True"),
        ("torch_compile", "leave it out"),
        ("load_in_4bit", "MULTI_GPU"),
        ("optim", "adamw_torch_fused"),
        ("modules_to_save", "fastdpo merge"),
        ("images", "MULTI_GPU"),
        ("twice", "load it again"),
        ("error", "build the trainer again"),
        ("activation_checkpointing", "gradient_checkpointing=True"),
    ],
)
def test_what_cannot_be_sharded_is_refused(option: str, advice: str, count: int, found: Any) -> None:
    for result in found("refused", count):
        assert advice in result["said"][option]


@pytest.mark.parametrize("version", [None, "1"])
def test_the_first_version_is_refused(version: str | None, quick: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if version:
        monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(ValueError, match="FSDP version 1 was asked for.*set fsdp_version to 2"):
        fastdpo.DPOConfig(**quick)


def test_deepspeed_is_refused_and_what_to_take_is_named(quick: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="deepspeed.*FSDP2.*fsdp=True"):
        fastdpo.DPOConfig(**quick, deepspeed="zero3.json")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DEEPSPEED.*fsdp_version 2"):
        fastdpo.DPOConfig(**quick)


def test_one_process_says_that_it_shares_with_nobody(quick: dict, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "fastdpo.config"):
        fastdpo.DPOConfig(**quick, fsdp=True)
    assert "one process holds all of the model" in caplog.text


def test_settings_without_fsdp_are_refused(quick: dict) -> None:
    with pytest.raises(ValueError, match="fsdp_config was given without fsdp=True"):
        fastdpo.DPOConfig(**quick, fsdp_config={"reshard_after_forward": False})


@pytest.mark.parametrize("setting", ["reshard_after_forwards", "use_orig_params", "state_dict_type"])
def test_settings_that_do_nothing_are_refused(setting: str, quick: dict) -> None:
    with pytest.raises(ValueError, match=f"fsdp_config has '{setting}', which does nothing here"):
        fastdpo.DPOConfig(**quick, fsdp=True, fsdp_config={setting: True})


def test_a_block_that_the_model_does_not_have_is_named() -> None:
    from fastdpo.sharding import _blocks

    plugin: Any = asked_plugin({"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"})
    assert [type(block).__name__ for block in _blocks(tiny_llama(), plugin)] == 2 * ["LlamaDecoderLayer"]
    plugin.transformer_cls_names_to_wrap = ["T5Block"]
    with pytest.raises(ValueError, match="names \\['T5Block'\\], which the model does not have"):
        _blocks(tiny_llama(), plugin)
