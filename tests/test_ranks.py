"""Several processes train as one does on the same optimizer batches, and stay equal to each other bit for bit."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import draw_no_picture, tiny_llama
from ranks_program import OUT_OF_MEMORY, RESUMED, SCENARIOS, summary, trainer_of

import fastdpo
from fastdpo.batch import deal
from fastdpo.messages import show_messages

TESTS = Path(__file__).parent
PROCESSES = (2, 3)
# not what one process does
OF_THEIR_OWN = ("noisy", "a_pair_that_never_fits", "gradients_that_only_some_have", "rows_that_differ")
OF_THEIR_OWN += ("evaluated_by_one", "a_row_that_is_not_finite")
COMPARED = [name for name in SCENARIOS if name not in OF_THEIR_OWN]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[dict[str, Any]]]:
    """-> what each process of so many ended a scenario with; they are started once for all scenarios."""
    program = str(TESTS / "ranks_program.py")
    return ends_of(tmp_path_factory, lambda count, out: launch(count, program, str(out), *SCENARIOS))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """-> what one process ends a scenario with."""
    return ends_alone(tmp_path_factory, SCENARIOS)


def ends_of(
    folders: pytest.TempPathFactory, start: Callable[[int, Path], object]
) -> Callable[[str, int], list[dict[str, Any]]]:
    started: dict[int, Path] = {}

    def of(name: str, count: int) -> list[dict[str, Any]]:
        if count not in started:
            started[count] = folders.mktemp(f"of{count}")
            start(count, started[count])
        return [torch.load(started[count] / f"{name}-{rank}.pt", weights_only=True) for rank in range(count)]

    return of


def ends_alone(folders: pytest.TempPathFactory, scenarios: Mapping[str, Callable]) -> Callable[[str], dict[str, Any]]:
    @cache
    def of(name: str) -> dict[str, Any]:
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            draw_no_picture(patch)
            return scenarios[name](folders.mktemp("alone"), 1)

    return of


def launch(count: int, *command: str, **changes: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    done = subprocess.run([*torchrun, *command], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout + done.stderr


def assert_same(ours: dict[str, Any], expected: dict[str, Any], within: float = 1e-5) -> None:
    assert len(ours["log"]) == len(expected["log"])
    for row, other in zip(ours["log"], expected["log"], strict=True):
        assert row == pytest.approx(other, rel=within, abs=within / 10)
    for name, value in expected["weights"].items():
        assert (ours["weights"][name] - value).norm() <= within * value.norm(), name


def assert_that_the_bad_step_moved_nothing(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Of `a_row_that_is_not_finite`, in processes and in one."""
    first = results[0]
    for result in results:
        assert "step 2: the loss is not finite" in result["error"] and "loss of row 15 of" in result["error"]
        assert [row.get("train_skipped_steps") for row in result["log"]] == [None, 2]
        for weights in ("weights", "ended"):
            for name, value in expected[weights].items():
                ours, known = result[weights][name], value.isfinite()
                assert (ours[known] - value[known]).norm() <= 1e-5 * value[known].norm(), name
                assert torch.equal(ours.nan_to_num(), first[weights][name].nan_to_num())
        rows = [json.loads(line) for line in result["rows"].splitlines()]
        assert sorted(row["row"] for row in rows) == list(range(12, 24))
        assert {row["process"] for row in rows} == set(range(len(results)))


@pytest.mark.parametrize("count", PROCESSES)
@pytest.mark.parametrize("name", COMPARED)
def test_the_log_and_the_weights_are_those_of_one_process(name: str, count: int, found: Any, alone: Any) -> None:
    for ours in found(name, count):
        assert_same(ours, alone(name))


@pytest.mark.parametrize("count", PROCESSES)
@pytest.mark.parametrize("name", [*COMPARED, "noisy"])
def test_all_processes_end_with_the_same_bits(name: str, count: int, found: Any) -> None:
    first, *others = found(name, count)
    for other in others:
        assert other["log"] == first["log"]
        for key, value in first["weights"].items():
            assert torch.equal(other["weights"][key], value), key


@pytest.mark.parametrize("count", PROCESSES)
@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_memory_that_runs_out_in_one_process_halves_the_micro_batches_of_all(name: str, count: int, found: Any) -> None:
    results = found(name, count)
    assert {result["attempts"] for result in results} == {3 + 2}
    assert len({result["budget"] for result in results}) == 1 and results[0]["budget"] < 10_000


@pytest.mark.parametrize("count", PROCESSES)
def test_a_pair_that_does_not_fit_alone_ends_all_processes(count: int, found: Any) -> None:
    *others, last = found("a_pair_that_never_fits", count)
    assert "OutOfMemoryError" in last["error"] and any("gradient_checkpointing" in note for note in last["notes"])
    assert all("another process ran out of memory" in other["error"] for other in others)


@pytest.mark.parametrize("count", PROCESSES)
def test_the_second_epoch_runs_no_reference_though_rows_go_to_other_processes(count: int, found: Any) -> None:
    """13 rows in batches of 12: the last batch leaves processes without a pair."""
    passes = [one for result in found("remembered", count) for one in result["passes"]]
    assert sum(pairs for _, pairs in passes) == 13 and all(epoch < 1 and pairs for epoch, pairs in passes)


@pytest.mark.parametrize("count", PROCESSES)
def test_a_run_goes_on_with_another_number_of_processes(count: int, found: Any, tmp_path: Path) -> None:
    expected = found("resumed", count)[0]
    again = trainer_of(tmp_path, 1, **RESUMED)
    again.train(resume_from_checkpoint=expected["checkpoint"])
    assert_same(summary(again), expected)


@pytest.mark.parametrize("count", PROCESSES)
def test_processes_compute_the_reference_ahead_together(count: int, found: Any, alone: Any) -> None:
    expected = alone("precomputed")
    assert len(expected["keys"]) == 13
    for result in found("precomputed", count):
        assert result["keys"] == expected["keys"] and result["freed"]
        torch.testing.assert_close(result["values"], expected["values"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("count", PROCESSES)
def test_a_row_of_one_process_that_is_not_finite_skips_the_step_of_all_or_ends_them(
    count: int, found: Any, alone: Any
) -> None:
    assert_that_the_bad_step_moved_nothing(found("a_row_that_is_not_finite", count), alone("a_row_that_is_not_finite"))


@pytest.mark.parametrize("count", PROCESSES)
def test_all_processes_predict_every_row_in_order(count: int, found: Any, alone: Any) -> None:
    for result in found("predicted", count):
        torch.testing.assert_close(result["predictions"], alone("predicted")["predictions"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", PROCESSES)
def test_the_best_checkpoint_is_written_once_and_loaded_by_all(count: int, found: Any, alone: Any) -> None:
    expected = alone("best")
    assert expected["best"] == 1 and expected["saved"] == f"checkpoint-{expected['best']}"
    for result in found("best", count):
        assert (result["best"], result["saved"], result["there"]) == (expected["best"], expected["saved"], True)


@pytest.mark.parametrize("count", PROCESSES)
def test_no_process_goes_on_before_a_model_is_written(count: int, found: Any) -> None:
    assert all(result["there"] for result in found("slow_to_save", count))


@pytest.mark.parametrize("count", PROCESSES)
def test_what_a_callback_asks_for_in_one_process_all_do(count: int, found: Any) -> None:
    assert {result["steps"] for result in found("stopped_by_one", count)} == {2}


@pytest.mark.parametrize("count", PROCESSES)
def test_what_a_callback_asks_for_between_steps_in_one_process_all_do(count: int, found: Any) -> None:
    for result in found("asked_by_one", count):
        assert result["steps"] == 2 and sum("eval_loss" in row for row in result["log"]) == 2


@pytest.mark.parametrize("count", PROCESSES)
def test_all_end_after_a_step_where_one_process_asks_for_the_end_before_the_first(count: int, found: Any) -> None:
    assert {result["steps"] for result in found("stopped_before_the_first_step_by_one", count)} == {1}


@pytest.mark.parametrize("count", PROCESSES)
def test_an_evaluation_in_one_process_alone_is_named(count: int, found: Any) -> None:
    expected = f"'batch' in process 0.*'evaluation' in process {count - 1}"
    assert all(re.search(expected, result["error"]) for result in found("evaluated_by_one", count))


@pytest.mark.parametrize("count", PROCESSES)
def test_processes_that_read_different_rows_are_told_so(count: int, found: Any) -> None:
    assert all("the processes read different rows" in result["error"] for result in found("rows_that_differ", count))


@pytest.mark.parametrize("count", PROCESSES)
def test_an_evaluation_without_memory_in_one_process_is_done_again_by_all(count: int, found: Any) -> None:
    budgets = {result["budget"] for result in found("evaluated_out_of_memory", count)}
    assert len(budgets) == 1 and None not in budgets


@pytest.mark.parametrize("count", PROCESSES)
def test_each_process_draws_dropout_masks_of_its_own(count: int, found: Any) -> None:
    states = [result["drawn"].numpy().tobytes() for result in found("noisy", count)]
    assert len(set(states)) == count


@pytest.mark.parametrize("count", PROCESSES)
def test_gradients_are_summed_where_any_process_has_one(count: int, found: Any) -> None:
    everyone = sum(range(count))
    expected = [everyone + count * (index + 1.0) for index in range(6)]
    expected[2] = 3.0
    for result in found("gradients_that_only_some_have", count):
        assert result["sums"] == [None if index == 1 else (n, n) for index, n in enumerate(expected)]


@pytest.mark.parametrize("hands", [1, 2, 3, 8])
@pytest.mark.parametrize("pairs", [1, 7, 16, 64])
def test_pairs_are_dealt_evenly_by_number_and_by_tokens(pairs: int, hands: int) -> None:
    lengths = torch.randint(1, 1000, (pairs,), generator=torch.Generator().manual_seed(pairs)).tolist()
    dealt = deal(lengths, hands)
    assert sorted(index for hand in dealt for index in hand) == list(range(pairs))
    assert {len(hand) for hand in dealt} <= {pairs // hands, -(-pairs // hands)}
    loads = [sum(lengths[index] for index in hand) for hand in dealt]
    assert max(loads) - min(loads) <= max(lengths)  # one pair at most


def test_the_command_line_trains_in_two_processes(rows: list, tmp_path: Path, tokenizer: Any) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["-m", "fastdpo.cli", "train", "--model", str(tmp_path / "model"), "--use_cpu", "True"]
    command += ["--train_dataset", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    said = launch(2, *command, "--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1")
    assert said.count("processes: 2") == 1 and said.count("longest pair") == 1  # the first one speaks
    logged = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [1, 2, 2]
    assert (tmp_path / "out/model.safetensors").exists()


def test_processes_that_would_each_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch, quick: dict) -> None:
    """torchrun on a machine without GPUs, and use_cpu not set: transformers then connects nothing."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched.*use_cpu=True"):
        fastdpo.DPOConfig(**quick).validate()


@pytest.mark.parametrize(("replica", "level"), [("warning", "ERROR"), ("info", "INFO"), ("error", "ERROR")])
def test_a_process_beside_the_first_speaks_of_errors_unless_asked_for_more(
    replica: str, level: str, quick: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = fastdpo.DPOConfig(**quick, log_level_replica=replica)
    monkeypatch.setattr(fastdpo.DPOConfig, "should_log", False)
    show_messages(config)
    assert logging.getLevelName(logging.getLogger("fastdpo").level) == level


def test_more_processes_than_gpus_are_refused(quick: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    config = fastdpo.DPOConfig(**quick)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(fastdpo.DPOConfig, "device", torch.device("cuda"))
    with pytest.raises(ValueError, match="4 processes were launched on 2 GPUs"):
        config._check_devices()
