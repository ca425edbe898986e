"""A run that goes on from a checkpoint is the run that never stopped, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import figure, tiny_llama
from peft import LoraConfig
from tiny_models import tiny_model
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from fastdpo import DPOConfig, DPOTrainer, checkpoint
from fastdpo.interrupts import Interrupts

LORA = {"peft_config": LoraConfig(r=4, target_modules="all-linear")}
TIMES = ("train_runtime", "per_second", "eval_runtime")


def trainer(rows: Any, tokenizer: Any, options: dict, make: Callable = tiny_llama, **more: Any) -> DPOTrainer:
    return DPOTrainer(make(), args=DPOConfig(**options), train_dataset=rows, processing_class=tokenizer, **more)


def without_times(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not any(word in key for word in TIMES)} for row in history]


def tensors(value: Any) -> list[torch.Tensor]:
    """All of a nested state, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors(part)]


def assert_the_same_run(one: DPOTrainer, other: DPOTrainer) -> None:
    assert without_times(one.state.log_history) == without_times(other.state.log_history)
    for ours, theirs in (
        (one.model.state_dict(), other.model.state_dict()),
        (one.optimizer.state_dict(), other.optimizer.state_dict()),
    ):
        ours, theirs = tensors(ours), tensors(theirs)
        assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, {}),
    "LoRA": ({}, LORA),
    "accumulation and workers": ({"gradient_accumulation_steps": 2, "dataloader_num_workers": 1}, LORA),
    "dropout": ({"disable_dropout": False}, {"peft_config": LoraConfig(r=4, lora_dropout=0.2)}),
    "running mean": ({"loss_type": ["bco_pair"], "train_sampling_strategy": "group_by_length"}, {}),
    "synced reference": ({"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}, LORA),
    "synced copy": ({"sync_ref_model": True, "ref_model_sync_steps": 3}, {}),
    "known reference": ({"precompute_ref_log_probs": True}, {}),
    "plateau": ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}, LORA),
    "no schedule, sgd": ({"optim": "sgd", "lr_scheduler_type": "constant"}, {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [3, 4], ids=["amid an epoch", "at its end"])
def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(kind, step, rows, tokenizer, quick, tmp_path) -> None:
    options, more = KINDS[kind]
    if options.get("eval_strategy"):
        more = {**more, "eval_dataset": rows[:4]}
        options = {**options, "metric_for_best_model": "loss"}
    options = {**quick, "max_steps": 7, "logging_steps": 2, "save_strategy": "steps", "save_steps": step, **options}
    if options.get("gradient_accumulation_steps"):
        options["per_device_train_batch_size"] = 3
    whole = trainer(rows, tokenizer, options, **more)
    whole.train()
    resumed = trainer(rows, tokenizer, {**options, "output_dir": str(tmp_path / "again")}, **more)
    torch.manual_seed(99)  # whatever the process did before
    resumed.train(resume_from_checkpoint=f"{quick['output_dir']}/checkpoint-{step}")
    assert_the_same_run(whole, resumed)
    assert [json.loads(line) for line in (tmp_path / "again/metrics.jsonl").read_text().splitlines()][:2] == [
        json.loads(line) for line in Path(quick["output_dir"], "metrics.jsonl").read_text().splitlines()
    ][:2]


def test_a_stream_and_an_epoch_of_unknown_length_go_on_where_they_were(rows, tokenizer, quick, tmp_path) -> None:
    options = {**quick, "max_steps": 7, "save_strategy": "steps", "save_steps": 3}
    runs = [
        trainer(datasets.IterableDataset.from_generator(lambda: iter(rows)), tokenizer, {**options, "output_dir": out})
        for out in (quick["output_dir"], str(tmp_path / "again"))
    ]
    runs[0].train()
    runs[1].train(f"{quick['output_dir']}/checkpoint-3")
    assert_the_same_run(*runs)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_four_bit_weights_and_an_8_bit_optimizer_go_on(optim, rows, tokenizer, quick, tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    options = {**quick, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "load_in_4bit": True, "optim": optim}
    runs = [
        trainer(rows, tokenizer, {**options, "output_dir": out}, make=lambda: str(tmp_path / "model"))
        for out in (quick["output_dir"], str(tmp_path / "again"))
    ]
    runs[0].train()
    runs[1].train(f"{quick['output_dir']}/checkpoint-2")
    assert_the_same_run(*runs)


def test_patience_is_not_begun_anew(rows, tokenizer, quick, tmp_path) -> None:
    options = {**quick, "max_steps": 8, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps"}
    options |= {"eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": True}  # it gets no better
    runs = []
    for out, resume_from in ((quick["output_dir"], None), (str(tmp_path / "b"), f"{quick['output_dir']}/checkpoint-3")):
        more = {"callbacks": [EarlyStoppingCallback(4)], "eval_dataset": rows[:6]}
        runs.append(trainer(rows, tokenizer, {**options, "output_dir": out}, **more))
        runs[-1].train(resume_from)
    assert runs[0].state.global_step == 5
    assert_the_same_run(*runs)


class Counts(TrainerCallback, ExportableState):
    """Has its attribute from the first step on alone."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps = getattr(self, "steps", 0) + 1

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"steps": self.steps}}


def test_a_callback_that_makes_its_attributes_as_it_runs_gets_them_back(rows, tokenizer, quick) -> None:
    options = quick | {"save_strategy": "steps", "save_steps": 1}
    trainer(rows, tokenizer, options | {"max_steps": 1}, callbacks=[Counts()]).train()
    counts = Counts()
    trainer(rows, tokenizer, options | {"max_steps": 2}, callbacks=[counts]).train(resume_from_checkpoint=True)
    assert counts.steps == 2


class SendAt(TrainerCallback):
    """A signal to this process, at a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)

    on_step_begin = on_substep_end


@pytest.mark.parametrize("number, ends", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_saves_after_the_step_and_ends_the_run(number, ends, rows, tokenizer, quick, request) -> None:
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL  # a shell's `&` ignores SIGINT
    request.addfinalizer(partial(signal.signal, number, signal.signal(number, usual)))
    before = signal.getsignal(number)
    stopped = trainer(rows, tokenizer, quick, callbacks=[SendAt(number, 1)])
    with pytest.raises(ends):
        stopped.train()
    assert signal.getsignal(number) == before
    assert stopped.state.global_step == 2 and not checkpoint.damage(Path(quick["output_dir"], "checkpoint-2"))
    resumed = trainer(rows, tokenizer, quick)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer(rows, tokenizer, {**quick, "output_dir": quick["output_dir"] + "-whole"})
    whole.train()
    assert_the_same_run(resumed, whole)


@pytest.fixture
def saved(rows, tokenizer, quick) -> Path:
    """The checkpoints 1 and 2 of a run of two steps."""
    trainer(rows, tokenizer, {**quick, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}).train()
    return Path(quick["output_dir"])


def test_a_damaged_checkpoint_is_named_and_passed_over(saved, rows, tokenizer, quick, caplog) -> None:
    weights = saved / "checkpoint-2/trained.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="trained.safetensors is not what was written"):
        trainer(rows, tokenizer, quick).train(str(saved / "checkpoint-2"))
    resumed = trainer(rows, tokenizer, quick)
    with caplog.at_level("INFO", "fastdpo"):
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-2 is left out" in caplog.text and "resuming from" in caplog.text
    assert resumed.state.global_step == 4
    weights.unlink()
    assert checkpoint.damage(saved / "checkpoint-2") == "trained.safetensors is missing"


def test_another_model_other_rows_or_another_order_are_refused(saved, rows, tokenizer, quick) -> None:
    where = str(saved / "checkpoint-2")
    with pytest.raises(ValueError, match="rows was 24, and is 20"):
        trainer(rows[:20], tokenizer, quick).train(where)
    with pytest.raises(ValueError, match="pairs a step was 6, and is 4"):
        trainer(rows, tokenizer, quick | {"per_device_train_batch_size": 4}).train(where)
    with pytest.raises(ValueError, match="seed was 42, and is 7"):
        trainer(rows, tokenizer, quick | {"seed": 7}).train(where)
    with pytest.raises(ValueError, match="beta was 0.1, and is 0.5"):
        trainer(rows, tokenizer, quick | {"beta": 0.5}).train(where)
    with pytest.raises(ValueError, match="optim was .*adamw.*, and is .*sgd"):
        trainer(rows, tokenizer, quick | {"optim": "sgd"}).train(where)
    with pytest.raises(ValueError, match="learning_rate was .*, and is 0.5"):
        trainer(rows, tokenizer, quick | {"learning_rate": 0.5}).train(where)
    with pytest.raises(ValueError, match="is of another model, or of other adapters"):
        trainer(rows, tokenizer, quick, **LORA).train(where)
    with pytest.raises(ValueError, match="no whole checkpoint: it is not there"):
        trainer(rows, tokenizer, quick).train("nowhere")


def test_the_checkpoints_model_in_place_of_the_first_one_is_refused(saved, rows, tokenizer, quick) -> None:
    """Its reference would be the policy as it was saved."""
    moved = tiny_llama()
    with torch.no_grad():
        moved.model.norm.weight[3] += 1e-6
    with pytest.raises(ValueError, match="give the model that training started from"):
        trainer(rows, tokenizer, quick, make=lambda: moved).train(str(saved / "checkpoint-2"))


def test_a_save_that_fails_leaves_what_was_there(saved, rows, tokenizer, quick, monkeypatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    before = {path: path.read_bytes() for path in (saved / "checkpoint-2").rglob("*") if path.is_file()}
    monkeypatch.setattr("fastdpo.checkpoint._to_disk", full)
    with pytest.raises(OSError, match="No space left") as caught:
        trainer(rows, tokenizer, {**quick, "save_strategy": "steps", "save_steps": 1}).train()
    assert "was not written; the checkpoints before it are as they were" in caught.value.__notes__[0]
    assert {path: path.read_bytes() for path in (saved / "checkpoint-2").rglob("*") if path.is_file()} == before
    assert not list(saved.glob(".*"))


def test_a_model_with_dropout_of_its_own_goes_on(rows, tokenizer, quick, tmp_path) -> None:
    """The reference is asked for log-probs before training has turned dropout off."""
    options = {**quick, "save_strategy": "steps", "save_steps": 2}
    make = lambda: tiny_model("gpt2", vocab_size=500, n_positions=512).train()  # noqa: E731
    more = {"make": make, "peft_config": LoraConfig(r=4, target_modules="all-linear")}
    whole = trainer(rows, tokenizer, options, **more)
    whole.train()
    resumed = trainer(rows, tokenizer, options | {"output_dir": str(tmp_path / "again")}, **more)
    resumed.train(f"{quick['output_dir']}/checkpoint-2")
    assert_the_same_run(whole, resumed)


def test_workers_that_persist_draw_nothing_from_the_random_state_of_dropout(rows, tokenizer, quick, tmp_path) -> None:
    options = {**quick, "max_steps": 6, "save_strategy": "steps", "save_steps": 5, "disable_dropout": False}
    options |= {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    more = {"peft_config": LoraConfig(r=4, lora_dropout=0.2)}
    runs = [trainer(rows, tokenizer, options, **more), trainer(rows, tokenizer, options, **more)]
    runs[0].train()
    runs[1].train(f"{quick['output_dir']}/checkpoint-5")
    assert_the_same_run(*runs)


def test_a_signal_amid_an_epoch_leaves_what_belongs_to_its_end_to_the_run_that_goes_on(rows, tokenizer, quick) -> None:
    options = {**quick, "max_steps": 8, "eval_strategy": "epoch", "logging_strategy": "epoch", "save_strategy": "best"}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}
    more = {"eval_dataset": rows[:4]}
    stopped = trainer(rows, tokenizer, options, callbacks=[SendAt(signal.SIGTERM, 5)], **more)
    with pytest.raises(SystemExit):
        stopped.train()
    assert [row["step"] for row in stopped.state.log_history] == [4, 4]
    resumed = trainer(rows, tokenizer, options, **more)
    resumed.train(f"{quick['output_dir']}/checkpoint-6")
    whole = trainer(rows, tokenizer, options | {"output_dir": quick["output_dir"] + "-whole"}, **more)
    whole.train()
    assert_the_same_run(resumed, whole)


def test_a_run_killed_while_the_old_checkpoint_is_away_finds_the_new_one(saved, rows, tokenizer, quick) -> None:
    (saved / "checkpoint-2").rename(saved / ".checkpoint-2.writing")
    shutil.copytree(saved / "checkpoint-1", saved / ".checkpoint-2.old")
    assert checkpoint.find(True, saved) == saved / "checkpoint-2"
    assert not checkpoint.damage(saved / "checkpoint-2")


def test_a_longer_run_goes_on_with_the_rate_that_its_own_schedule_has(saved, rows, tokenizer, quick) -> None:
    resumed = trainer(rows, tokenizer, quick | {"max_steps": 8})
    resumed.train(str(saved / "checkpoint-2"))
    assert resumed.state.log_history[2]["learning_rate"] == pytest.approx(1e-3 * 6 / 8)


def test_speeds_are_of_the_part_that_was_resumed(saved, rows, tokenizer, quick) -> None:
    resumed = trainer(rows, tokenizer, quick | {"max_steps": 3})
    resumed.train(str(saved / "checkpoint-2"))
    last = resumed.state.log_history[-1]
    assert last["train_steps_per_second"] * last["train_runtime"] == pytest.approx(1, rel=0.01)
    assert last["train_samples_per_second"] * last["train_runtime"] == pytest.approx(6, rel=0.01)


def test_the_best_checkpoint_stays_though_output_dir_is_called_otherwise(rows, tokenizer, quick, monkeypatch) -> None:
    folder = Path(quick["output_dir"])
    monkeypatch.chdir(folder.parent)
    options = {**quick, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "eval_strategy": "steps"}
    options |= {"eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": True, "max_steps": 2}
    trainer(rows, tokenizer, options | {"output_dir": folder.name}, eval_dataset=rows[:4]).train()
    best = options | {"max_steps": 3, "load_best_model_at_end": True}
    resumed = trainer(rows, tokenizer, best, eval_dataset=rows[:4])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.evaluate()["eval_loss"] == pytest.approx(resumed.state.best_metric, abs=1e-6)


def test_rows_whose_reference_was_just_computed_stay_known(rows, tokenizer, quick) -> None:
    options = {**quick, "precompute_ref_log_probs": True, "save_strategy": "steps", "save_steps": 2}
    trainer(rows, tokenizer, options).train()
    other = [{**row, "prompt": row["prompt"] + " Now:"} for row in rows[:4]]
    resumed = trainer(rows, tokenizer, options | {"eval_strategy": "steps", "eval_steps": 1}, eval_dataset=other)
    resumed.train(f"{quick['output_dir']}/checkpoint-2")
    assert "eval_loss" in resumed.state.log_history[-2]


def test_processes_that_a_callback_forks_end_as_they_are_told() -> None:
    with Interrupts().noted(), multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(abs, [-1, -2]) == [1, 2]  # and its end sends SIGTERM


KILLS = int(os.environ.get("FASTDPO_KILLS", 5))


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_been(rows, tokenizer, quick, tmp_path) -> None:
    """SIGKILL at random moments, in saves too, of which each step has one."""
    options = {**quick, "max_steps": 12, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    steady, shaken = ({**options, "output_dir": str(tmp_path / name)} for name in ("steady", "shaken"))

    def run(options: dict[str, Any], resume: bool) -> None:
        out = trainer(rows, tokenizer, options, **LORA)
        out.train(resume_from_checkpoint=resume)
        out.save_model()

    run(steady, False)
    draw, kills, folder = random.Random(0), 0, tmp_path / "shaken"
    while True:
        begun = any(not checkpoint.damage(path) for path in checkpoint.checkpoints(folder))
        child = multiprocessing.get_context("fork").Process(target=run, args=(shaken, begun))
        child.start()
        child.join(draw.uniform(0.2, 1.2) if kills < KILLS else 60)
        if not child.is_alive():
            assert child.exitcode == 0
            if kills >= KILLS:
                break
            shutil.rmtree(folder)  # it was quicker than we: again
            continue
        child.kill()
        child.join()
        kills += 1
    assert not [path for path in checkpoint.checkpoints(folder) if checkpoint.damage(path)]
    for name in ("adapter_model.safetensors", "checkpoint-12/trained.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "steady" / name).read_bytes()
    one, other = (
        without_times(
            [json.loads(line) for line in Path(options["output_dir"], "metrics.jsonl").read_text().splitlines()]
        )
        for options in (steady, shaken)
    )
    assert one == other
    figure(f"{kills} kills, and the bits and the log of a run without")
