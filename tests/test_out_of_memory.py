"""A step that runs out of GPU memory is done again in smaller micro-batches, and nothing else of the run changes."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import fastdpo
from fastdpo.batch import OptimizerBatch
from fastdpo.loader import train_loader
from fastdpo.optimizer import allocate_states
from fastdpo.reference import ReferenceMemory

ROOM = 100_000  # more than a batch has tokens: everything is one micro-batch until memory runs out


class Operations(TorchDispatchMode):
    """Counts torch's operations, forward and backward, and fails one of them as a full GPU would."""

    def __init__(self, failing: int | None = None) -> None:
        super().__init__()
        self.count, self.failing = 0, failing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":  # what processes send each other allocates nothing
            return func(*args, **(kwargs or {}))
        self.count += 1
        if self.count == self.failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(*args, **(kwargs or {}))


def trainer_of(rows: list, tokenizer: Any, options: dict[str, Any]) -> fastdpo.DPOTrainer:
    options = {"max_tokens_per_microbatch": ROOM, **options, "max_steps": 3}
    return fastdpo.DPOTrainer(
        tiny_llama(), args=fastdpo.DPOConfig(**options), train_dataset=rows, processing_class=tokenizer
    )


def train(trainer: fastdpo.DPOTrainer, around: Callable[[int], Operations]) -> list[int]:
    """Trains with the gradients of each step computed inside of `around(step)`; -> operations of each attempt."""
    backward, counts = trainer._backward, []

    def watched(batches: OptimizerBatch) -> None:
        with around(len(counts)) as operations:
            counts.append(0)
            try:
                backward(batches)
            finally:
                counts[-1] = operations.count

    trainer._backward = watched  # type: ignore[method-assign]
    trainer.train()
    return counts


def numbers(trainer: fastdpo.DPOTrainer) -> list[dict[str, float]]:
    timing = ("train_runtime", *(f"train_{unit}_per_second" for unit in ("samples", "steps", "tokens")))
    return [{k: v for k, v in row.items() if k not in timing} for row in trainer.state.log_history]


def assert_same_run(ours: fastdpo.DPOTrainer, expected: fastdpo.DPOTrainer) -> None:
    for row, other in zip(numbers(ours), numbers(expected), strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)
    for (name, value), other in zip(ours.model.state_dict().items(), expected.model.state_dict().values(), strict=True):
        assert (value - other).norm() <= 1e-5 * other.norm(), name


@pytest.mark.parametrize("where", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("loss", ["sigmoid", "bco_pair", "aot"])
def test_memory_that_runs_out_anywhere_in_a_step_changes_no_number(
    where: float, loss: str, rows: list, tokenizer: Any, quick: dict, caplog: pytest.LogCaptureFixture
) -> None:
    quick |= {"loss_type": loss, "adam_epsilon": 1e-6}
    usual = trainer_of(rows, tokenizer, quick)
    counts = train(usual, lambda step: Operations())
    at = 1 + round(where * (counts[1] - 1))
    halved = trainer_of(rows, tokenizer, quick)
    with caplog.at_level(logging.WARNING, "fastdpo"):
        attempts = train(halved, lambda attempt: Operations(failing=at if attempt == 1 else None))
    assert attempts[1] == at and len(attempts) == 4
    assert sum("out of GPU memory" in record.message for record in caplog.records) == 1
    assert_same_run(halved, usual)


def test_memory_that_runs_out_in_the_first_step_and_again_is_halved_again(
    rows: list, tokenizer: Any, quick: dict, caplog: pytest.LogCaptureFixture
) -> None:
    usual = trainer_of(rows, tokenizer, quick)
    train(usual, lambda step: Operations())
    halved, sizes = trainer_of(rows, tokenizer, quick), []
    step = halved._backward
    halved._backward = lambda batches: sizes.append(batches.microbatches) or step(batches)  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, "fastdpo"):
        train(halved, lambda attempt: Operations(failing=50 if attempt < 2 else None))
    first, second, third = (max(batch.input_ids.numel() for batch in batches) for batches in sizes[:3])
    assert second <= first / 2 and third <= max(second / 2, 58)  # the longest pair
    later = [batch for batches in sizes[2:] for batch in batches]
    assert all(batch.num_pairs == 1 or batch.input_ids.numel() <= second / 2 for batch in later)
    assert sum("out of GPU memory" in record.message for record in caplog.records) == 1
    assert_same_run(halved, usual)


@pytest.mark.parametrize("where", ["clip_grad_norm_", "regrouped"])
def test_memory_that_runs_out_while_clipping_or_in_words_of_cublas_is_treated_alike(
    where: str, rows: list, tokenizer: Any, quick: dict
) -> None:
    usual, halved = trainer_of(rows, tokenizer, quick), trainer_of(rows, tokenizer, quick)
    usual.train()
    name = "clip_grad_norm_" if where == "clip_grad_norm_" else "backward"
    real, calls = getattr(halved.accelerator, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return real(*args, **kwargs)

    start = halved._start_engine
    halved._start_engine = lambda: (start(), setattr(halved.accelerator, name, failing))  # type: ignore[method-assign]
    halved.train()
    assert len(calls) > 3
    assert_same_run(halved, usual)


def test_gradients_that_were_unscaled_already_are_scaled_and_unscaled_anew(
    rows: list, tokenizer: Any, quick: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16's loss scaling, which a CPU can do as well: it refuses to unscale one step twice."""
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: real("cpu", init_scale=2.0**10))
    usual, halved = trainer_of(rows, tokenizer, quick), trainer_of(rows, tokenizer, quick)
    usual.train()
    start, calls = halved._start_engine, []

    def clipped_at_the_second_try() -> None:
        start()
        clip = halved.accelerator.clip_grad_norm_

        def failing(*args: Any) -> Any:
            calls.append(args)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return clip(*args)

        halved.accelerator.clip_grad_norm_ = failing

    halved._start_engine = clipped_at_the_second_try  # type: ignore[method-assign]
    halved.train()
    assert len(calls) == 4 and halved.scaler.get_scale() == usual.scaler.get_scale() == 2.0**10
    assert_same_run(halved, usual)


def test_another_error_is_not_taken_for_a_full_gpu(rows: list, tokenizer: Any, quick: dict) -> None:
    trainer = trainer_of(rows, tokenizer, quick)

    def failing(batches: OptimizerBatch) -> None:
        raise RuntimeError("the size of tensor a must match")

    trainer._backward = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="must match"):
        trainer.train()


def test_a_long_pair_that_never_fits_beside_short_ones_ends_the_run(rows: list, tokenizer: Any, quick: dict) -> None:
    long = [{"prompt": "tell me more " * 100, "chosen": " you are welcome" * 9, "rejected": " lazy" * 9}]
    trainer = trainer_of(long + rows[:5], tokenizer, quick | {"train_sampling_strategy": "sequential"})
    sizes, backward = [], trainer._backward

    def failing(batches: OptimizerBatch) -> None:
        sizes.append(max(batch.input_ids.numel() for batch in batches.microbatches))
        if sizes[-1] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        backward(batches)

    trainer._backward = failing  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError) as raised:
        trainer.train()
    assert len(sizes) < 8 and any("a pair of" in note for note in raised.value.__notes__)


@pytest.mark.parametrize("failing", range(1, 12))
def test_reference_memory_knows_no_row_whose_values_it_failed_to_store(failing: int) -> None:
    memory, keys = ReferenceMemory(), [bytes([n]) * 16 for n in range(3)]
    memory.store(keys[:1], torch.tensor([[1.0, 2.0]]))
    memory.values = memory.values[:1].clone()  # so that the next rows make it grow
    values = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    try:
        with Operations(failing):
            memory.store(keys[1:], values)
    except torch.OutOfMemoryError:
        assert list(memory.slots) == keys[:1]
        memory.store(keys[1:], values)
    assert memory.recall(keys).tolist() == [[1, 2], [3, 4], [5, 6]]


def test_one_pair_that_does_not_fit_ends_the_run_with_what_to_change(rows: list, tokenizer: Any, quick: dict) -> None:
    trainer = trainer_of(rows, tokenizer, quick | {"max_tokens_per_microbatch": 1})
    with pytest.raises(torch.OutOfMemoryError) as raised:
        train(trainer, lambda attempt: Operations(failing=5))
    assert any("gradient_checkpointing=True" in note for note in raised.value.__notes__)


def test_nothing_of_a_failed_attempt_is_alive_in_the_next(rows: list, tokenizer: Any, quick: dict) -> None:
    """The error's traceback holds the frames, and they the activations, until it is let go."""
    trainer, alive = trainer_of(rows, tokenizer, quick), []
    backward = trainer._backward

    def failing(batches: OptimizerBatch) -> None:
        graphs = [item for item in gc.get_objects() if isinstance(item, torch.Tensor) and item.grad_fn is not None]
        alive.append(len(graphs))
        if len(alive) == 1:
            activations = [computed.loss for computed in trainer._running.step(batches)]
            assert activations[0].grad_fn is not None
            raise torch.OutOfMemoryError("CUDA out of memory.")
        backward(batches)

    trainer._backward = failing  # type: ignore[method-assign]
    trainer.train()
    assert len(alive) == 4 and alive[1] == alive[0]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_regrouping_keeps_every_pair_and_its_key(layout: str, rows: list, tokenizer: Any, quick: dict) -> None:
    trainer = trainer_of(rows, tokenizer, quick)
    loader = train_loader(trainer.train_dataset, trainer.layout, trainer.args, trainer.ranks)
    batches = next(iter(loader))
    again = loader.collate_fn.regroup(batches, 150)
    assert len(again) > len(batches)
    assert sorted(key for batch in again for key in batch.keys) == sorted(key for b in batches for key in b.keys)
    assert sum(batch.num_chosen_tokens for batch in again) == sum(batch.num_chosen_tokens for batch in batches)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_states_that_are_allocated_before_the_first_step_change_nothing(
    optim: str, rows: list, tokenizer: Any, quick: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_states = trainer_of(rows, tokenizer, quick | {"optim": optim})
    with_states.train()
    monkeypatch.setattr(sys.modules["fastdpo.train"], "allocate_states", lambda optimizer: None)
    without = trainer_of(rows, tokenizer, quick | {"optim": optim})
    without.train()
    for value, other in zip(with_states.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"fused": True}, {"capturable": False, "foreach": True}])
def test_allocated_states_are_those_that_the_first_update_makes(options: dict[str, Any]) -> None:
    parameters = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))]
    ours, made = (torch.optim.AdamW(parameters, lr=0.0, **options) for _ in "ab")
    allocate_states(ours)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    for parameter in parameters:
        state = made.state[parameter]
        assert ours.state[parameter].keys() == state.keys()
        for name, value in ours.state[parameter].items():
            assert value.dtype == state[name].dtype and value.device == state[name].device
            assert value.shape == state[name].shape and not value.any()


# ---- evaluation


class Evaluations:
    """Lets memory run out at an operation of some of the batches that are evaluated; notes tokens of micro-batches."""

    def __init__(self, trainer: fastdpo.DPOTrainer, failing: dict[int, int] | None = None) -> None:
        self.retry, self.failing, self.counts, self.sizes = trainer._retry, failing or {}, [], []
        trainer._retry = self  # type: ignore[assignment]

    def __call__(self, step: Callable[[Any], None], batches: Any, loader: Any, *undo: Any) -> None:
        def watched(whole: Any) -> None:
            self.sizes.append([batch.input_ids.numel() for batch in whole.microbatches])
            with Operations(self.failing.get(len(self.counts))) as operations:
                self.counts.append(0)
                try:
                    step(whole)
                finally:
                    self.counts[-1] = operations.count

        self.retry(watched, batches, loader, *undo)

    def report(self) -> None:
        self.retry.report()


def evaluated(trainer: fastdpo.DPOTrainer, rows: list) -> dict[str, float]:
    metrics = trainer.evaluate(rows)
    return {name: value for name, value in metrics.items() if "runtime" not in name and "per_second" not in name}


@pytest.mark.parametrize("where", [0.0, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("loss", ["sigmoid", "bco_pair", "aot"])
def test_memory_that_runs_out_in_an_evaluation_changes_no_metric(
    where: float, loss: str, rows: list, tokenizer: Any, quick: dict, caplog: pytest.LogCaptureFixture
) -> None:
    quick |= {"loss_type": loss, "per_device_eval_batch_size": 8}
    usual, halved = trainer_of(rows, tokenizer, quick), trainer_of(rows, tokenizer, quick)
    seen = Evaluations(usual)
    expected = evaluated(usual, rows)
    assert len(seen.counts) == 3
    at = 1 + round(where * (seen.counts[1] - 1))
    failing = Evaluations(halved, {1: at})
    with caplog.at_level(logging.WARNING, "fastdpo"):
        assert evaluated(halved, rows) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert failing.counts[1] == at and len(failing.counts) == 4 and halved.policy.training
    assert max(map(max, failing.sizes[2:])) <= max(failing.sizes[1]) / 2
    assert sum("out of GPU memory" in record.message for record in caplog.records) == 1


def test_what_training_learned_of_memory_holds_for_evaluation_and_is_said_once(
    rows: list, tokenizer: Any, quick: dict, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(rows, tokenizer, quick | {"logging_steps": 3})
    with caplog.at_level(logging.WARNING, "fastdpo"):
        train(trainer, lambda attempt: Operations(failing=50 if attempt < 2 else None))
        seen = Evaluations(trainer)
        trainer.evaluate(rows)
        trainer.evaluate(rows)
    budget = trainer._retry.retry.budget  # type: ignore[attr-defined]
    assert budget < 500 and max(size for sizes in seen.sizes for size in sizes) <= max(budget, 58)
    messages = [record.message for record in caplog.records]
    assert sum("out of GPU memory" in message for message in messages) == 1
    later = [message for message in messages if "memory ran out again" in message]
    assert len(later) == 1 and f"at most {budget} tokens; max_tokens_per_microbatch={budget} starts so" in later[0]


def test_a_pair_that_cannot_be_evaluated_alone_is_told_what_helps_without_gradients(
    rows: list, tokenizer: Any, quick: dict
) -> None:
    trainer = trainer_of(rows, tokenizer, quick | {"max_tokens_per_microbatch": 1})
    Evaluations(trainer, {0: 5})
    with pytest.raises(torch.OutOfMemoryError) as raised:
        trainer.evaluate(rows)
    (note,) = raised.value.__notes__
    assert "lower max_length" in note and "gradient_checkpointing" not in note and trainer.policy.training


# ---- callbacks and words


def test_no_substep_is_told_of_twice_when_a_step_is_done_again(rows: list, tokenizer: Any, quick: dict) -> None:
    """A callback that counts or stops would take the attempts that failed for more micro-batches."""

    class Counts(TrainerCallback):
        ends = 0

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ends += 1

    trainer, sizes = trainer_of(rows, tokenizer, quick | {"max_tokens_per_microbatch": 200}), []
    trainer.add_callback(counts := Counts())
    backward, fail = trainer.accelerator.backward, []

    def start() -> None:
        def failing(loss: Any) -> None:
            fail.append(loss)
            if len(fail) == 2:  # after the first substep
                raise torch.OutOfMemoryError("CUDA out of memory.")
            backward(loss)

        trainer.accelerator.backward = failing  # type: ignore[method-assign]

    trainer._start_engine = start  # type: ignore[method-assign]
    step = trainer._backward
    trainer._backward = lambda batches: sizes.append(len(batches.microbatches)) or step(batches)  # type: ignore[method-assign]
    trainer.train()
    assert len(sizes) == 4 and sizes[1] > sizes[0] == 2
    assert counts.ends == sum(sizes[1:]) - 3


def test_the_warning_names_dropout_as_what_smaller_micro_batches_change(
    rows: list, tokenizer: Any, quick: dict, caplog: pytest.LogCaptureFixture
) -> None:
    for dropout in (False, True):
        trainer = trainer_of(rows, tokenizer, quick | {"disable_dropout": not dropout})
        with caplog.at_level(logging.WARNING, "fastdpo"):
            train(trainer, lambda attempt: Operations(failing=50 if attempt == 0 else None))
        assert any("draw other masks" in record.message for record in caplog.records) == dropout


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "other"])
def test_an_update_that_does_not_fit_says_what_to_change_in_whatever_words_it_comes(
    words: str, rows: list, tokenizer: Any, quick: dict
) -> None:
    trainer = trainer_of(rows, tokenizer, quick)

    class Full(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            trainer.optimizer.step = failing

    def failing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(words)

    trainer.add_callback(Full())
    with pytest.raises(RuntimeError, match=words) as raised:
        trainer.train()
    notes = getattr(raised.value, "__notes__", [])
    assert [note for note in notes if "adamw_8bit" in note] == notes and bool(notes) == (words != "other")
