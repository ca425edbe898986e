"""What goes wrong around a run: disks, data workers, other processes and trackers."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from ranks_program import left_padded
from test_resume import assert_the_same_run, trainer, without_times
from transformers import TrainerCallback
from transformers.integrations import WandbCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import fastdpo
from fastdpo import checkpoint
from fastdpo.trackers import PATIENCE

TESTS = Path(__file__).parent


class At(TrainerCallback):
    """Does something after a step, before it is logged and saved."""

    def __init__(self, step: int, what: Callable[[], Any]) -> None:
        self.step, self.what = step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.what()


class Service(TrainerCallback):
    """A tracker whose service fails at events of `fails`, so many times."""

    fails: Counter[str] = Counter()
    error: type[BaseException] = ConnectionError

    def __init__(self) -> None:
        self.asked: list[str] = []

    def _ask(self, event: str) -> None:
        self.asked.append(event)
        if self.fails[event] > self.asked.count(event) - 1:
            raise self.error("no route to the service")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ask("begin")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ask("log")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ask("end")


class OwnService(Service):
    pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> type[Service]:
    """A tracker called wandb, as transformers has them."""
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", Service)
    monkeypatch.setattr(Service, "fails", Counter())
    return Service


def the_service_of(run: fastdpo.DPOTrainer) -> Service:
    return next(one for one in run.callback_handler.callbacks if isinstance(one, Service))


@pytest.mark.parametrize("event", ["begin", "log", "end"])
def test_a_tracker_that_raises_is_said_once_and_the_run_goes_on(event, service, rows, tokenizer, quick, caplog) -> None:
    plain = trainer(rows, tokenizer, quick)
    plain.train()
    service.fails[event] = 1
    run = trainer(rows, tokenizer, quick | {"report_to": "wandb"})
    run.train()
    assert_the_same_run(run, plain)
    assert caplog.text.count("Service failed in on_") == 1 and "ConnectionError: no route to the service" in caplog.text
    assert Counter(the_service_of(run).asked) == {"begin": 1, "log": 5, "end": 1}  # it was asked again
    logged = [json.loads(line) for line in Path(quick["output_dir"], "metrics.jsonl").read_text().splitlines()]
    assert without_times(logged) == without_times(run.state.log_history)


def test_a_tracker_that_raises_time_after_time_is_left_out(service, rows, tokenizer, quick, caplog) -> None:
    service.fails["log"] = 99
    run = trainer(rows, tokenizer, quick, callbacks=[Service()])  # given as a callback, it is a tracker still
    run.train()
    assert the_service_of(run).asked == ["begin", *["log"] * PATIENCE]
    assert "in a row, the last time in on_log" in caplog.text and run.state.global_step == 4
    run.remove_callback(Service)
    assert Service not in map(type, run.callback_handler.callbacks)


def test_a_wandb_that_breaks_loses_samples_and_rows_but_not_the_run(rows, tokenizer, quick, caplog) -> None:
    broken = WandbCallback.__new__(WandbCallback)  # of a package that is not installed here
    broken._wandb, broken._initialized = namedtuple("Wandb", "run")(run=True), True
    more = {"eval_dataset": rows[:2], "callbacks": [broken]}
    options = {"eval_strategy": "steps", "eval_steps": 2, "generate_during_eval": True, "max_length": 80}
    run = trainer(rows, tokenizer, quick | options, **more)
    run.train()
    assert run.state.global_step == 4 and "WandbCallback failed in" in caplog.text
    assert Path(quick["output_dir"], "samples.md").read_text().count("## eval") == 2


@pytest.mark.parametrize("kind, error", [(OwnService, ConnectionError), (Service, KeyboardInterrupt)])
def test_what_a_callback_of_the_users_own_raises_ends_the_run_and_so_does_ctrl_c(
    kind, error, service, rows, tokenizer, quick, monkeypatch
) -> None:
    service.fails["log"] = 1
    monkeypatch.setattr(service, "error", error)
    with pytest.raises(error, match="no route"):
        trainer(rows, tokenizer, quick, callbacks=[kind()]).train()


def test_rows_that_could_not_be_written_are_in_the_file_with_the_next_one(rows, tokenizer, quick, caplog) -> None:
    path = Path(quick["output_dir"], "metrics.jsonl")

    def break_off() -> None:
        path.unlink()
        path.mkdir()

    run = trainer(rows, tokenizer, quick, callbacks=[At(2, break_off), At(4, path.rmdir)])
    run.train()
    assert without_times([json.loads(line) for line in path.read_text().splitlines()]) == without_times(
        run.state.log_history
    )
    assert caplog.text.count("metrics.jsonl is not written") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """-> a disk of so many bytes, of its own."""
    mounted: list[Path] = []

    def make(size: int, *options: str) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this process may not mount a disk")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_the_checkpoints_before_and_no_draft_whichever_file_it_ends_in(
    small_disk, rows, tokenizer, quick
) -> None:
    disk = small_disk(2**21)
    options = quick | {"output_dir": str(disk), "save_strategy": "steps", "save_steps": 2}
    run = trainer(rows, tokenizer, options | {"max_steps": 2})
    run.train()
    before, size = files_of(disk), sum(map(len, files_of(disk / "checkpoint-2").values()))
    run.state.global_step, filler = 3, disk / "filler"
    for room in range(0, size * 9 // 10, size // 10):
        filler.write_bytes(bytes(checkpoint.free_bytes(disk) - room))
        with pytest.raises(Exception, match="No space left|inline_container") as caught:
            run._write_checkpoint()
        filler.unlink()
        note = caught.value.__notes__[0]
        assert "checkpoint-3 was not written; the checkpoints before it are as they were" in note
        assert "MiB free" in note and "resume_from_checkpoint=True" in note
        del caught  # which holds the file that was written, and so its room
        assert files_of(disk) == before and not list(disk.glob(".*"))
    trainer(rows, tokenizer, options).train(resume_from_checkpoint=True)
    assert not checkpoint.damage(disk / "checkpoint-4")


def test_a_model_that_does_not_fit_on_the_disk_at_the_end_says_where_its_last_checkpoint_is(
    small_disk, rows, tokenizer, quick
) -> None:
    disk = small_disk(2**21)

    class Filling(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (disk / "filler").write_bytes(bytes(checkpoint.free_bytes(disk)))

    options = quick | {"output_dir": str(disk), "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    with pytest.raises(Exception, match="No space left") as caught:
        fastdpo.train(tiny_llama(), rows, processing_class=tokenizer, callbacks=[Filling()], **options)
    (note,) = caught.value.__notes__
    assert note == "fastdpo: the disk is full: make room. resume_from_checkpoint=True goes on from checkpoint-4"


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(
    rows, tokenizer, quick, monkeypatch, caplog
) -> None:
    takes = 4 * sum(parameter.nbytes for parameter in tiny_llama().parameters())  # with what trains, and two moments
    usage, text = namedtuple("usage", "total free"), f"{takes / 2**20:.1f} MiB"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 * takes, takes - 1))
    options = quick | {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(ValueError, match=f"{text} free, and a checkpoint takes {text}: make room"):
        trainer(rows, tokenizer, options).train()
    trainer(rows, tokenizer, options | {"save_only_model": True}).train()  # a quarter
    assert "room for" not in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 * takes, takes + 2**10))
    trainer(rows, tokenizer, options | {"save_total_limit": 1}).train()
    assert f"room for 1 checkpoints of {text}, and this run comes to have 2" in caplog.text


def test_a_disk_that_does_not_say_what_is_free_and_a_run_with_nothing_left_to_save_are_not_refused(
    rows, tokenizer, quick, monkeypatch
) -> None:
    usage, options = namedtuple("usage", "total free"), quick | {"save_strategy": "steps", "save_steps": 4}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0))
    trainer(rows, tokenizer, options).train()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 0))
    trainer(rows, tokenizer, options).train(resume_from_checkpoint=True)


def test_what_a_killed_run_left_half_written_goes_when_the_next_one_begins_and_nothing_else(
    rows, tokenizer, quick
) -> None:
    out = Path(quick["output_dir"])
    for name in (".checkpoint-7.writing", ".nonfinite-step-3.writing", ".checkpoint-of-mine.old"):
        (out / name).mkdir(parents=True)
        (out / name / "model.safetensors").write_bytes(b"half")
    trainer(rows, tokenizer, quick | {"save_strategy": "steps", "save_steps": 4}).train()
    assert [path.name for path in out.glob(".*")] == [".checkpoint-of-mine.old"]


@pytest.mark.parametrize("only_model", [False, True])
def test_a_full_shared_memory_is_a_matter_of_workers_and_only_a_whole_checkpoint_is_to_go_on_from(
    only_model, rows, tokenizer, quick
) -> None:
    def full() -> None:
        raise RuntimeError("unable to write to file </torch_9_1>: No space left on device (28)")

    options = quick | {"save_strategy": "steps", "save_steps": 1, "save_only_model": only_model}
    with pytest.raises(RuntimeError) as caught:
        trainer(rows, tokenizer, options, callbacks=[At(2, full)]).train()
    (note,) = caught.value.__notes__
    assert "ask for fewer dataloader_num_workers" in note
    assert ("goes on from checkpoint-1" in note, "no checkpoint to go on from" in note) == (not only_model, only_model)


def test_a_directory_that_cannot_be_written_is_refused_before_a_model_loads(small_disk, quick, rows, tmp_path) -> None:
    taken, model = tmp_path / "file", str(tmp_path / "model")
    taken.write_text("")
    tiny_llama().config.save_pretrained(model)  # has no weights to load
    for directory in (small_disk(2**20, "ro"), taken, taken / "below"):
        with pytest.raises(ValueError, match="output_dir=.* cannot be written .*: give a directory that can"):
            fastdpo.train(model, rows, **quick | {"output_dir": str(directory)})


def kill_workers() -> None:
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]


def test_a_data_worker_that_is_killed_ends_the_run_which_goes_on_as_if_it_had_not_been(rows, tokenizer, quick) -> None:
    options = quick | {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    of_workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    with pytest.raises(RuntimeError, match=r"DataLoader worker .*(killed by signal|exited unexpectedly)") as caught:
        trainer(rows, tokenizer, options | of_workers, callbacks=[At(2, kill_workers)]).train()
    last = checkpoint.checkpoints(Path(quick["output_dir"]))[-1].name
    assert "/dev/shm: ask for fewer dataloader_num_workers" in caught.value.__notes__[-1]
    assert caught.value.__notes__[-1].endswith(f"resume_from_checkpoint=True goes on from {last}")
    resumed = trainer(rows, tokenizer, options)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer(rows, tokenizer, options | {"output_dir": quick["output_dir"] + "-whole"})
    whole.train()
    assert_the_same_run(resumed, whole)


def refuses_long_prompts(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    for row in rows:
        if max(map(len, row.values())) > 200:
            raise ValueError("this row is none of mine")
    return left_padded(rows)


def test_what_a_data_worker_raises_ends_the_run_with_its_own_words_and_where_to_go_on(rows, tokenizer, quick) -> None:
    rows = [*rows[:15], rows[15] | {"prompt": "more " * 300}, *rows[16:]]
    options = quick | {"save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": "sequential"}
    options |= {"dataloader_num_workers": 1, "max_length": None}
    with pytest.raises(ValueError, match="(?s)in DataLoader worker process 0.*none of mine") as caught:
        trainer(rows, tokenizer, options, data_collator=refuses_long_prompts).train()
    assert "with dataloader_num_workers=0 it comes where" in caught.value.__notes__[-1]
    assert caught.value.__notes__[-1].endswith("goes on from checkpoint-2")
    assert not checkpoint.damage(Path(quick["output_dir"], "checkpoint-2"))


OF_TWO_ONE_DIES = """
import os, signal, sys
from pathlib import Path
from ranks_program import trainer_of
from test_faults import At
run = trainer_of(Path(sys.argv[1]), 2, save_strategy="steps", save_steps=1)
if run.ranks.rank == 1:
    run.add_callback(At(2, lambda: os.kill(os.getpid(), signal.SIGKILL)))
run.train()
"""


def test_a_process_whose_companion_dies_ends_and_says_where_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    done = subprocess.run(
        [*command, sys.executable, "-c", OF_TWO_ONE_DIES, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=120,  # of which ddp_timeout would take all
    )
    assert done.returncode
    assert "another process of this run ended" in done.stderr, done.stderr[-6000:]
    assert "resume_from_checkpoint=True goes on from checkpoint-1" in done.stderr
    assert not checkpoint.damage(tmp_path / "run/checkpoint-1") and not (tmp_path / "run/checkpoint-2").exists()
