"""A run of many steps takes no more memory, time, files or threads at its end than at its beginning.

FASTDPO_STEPS says how many steps; `make soak` has 2000. Each run is a process of its own, forked from this one.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
import torch
from conftest import figure, praise_and_scolding
from test_resume import LORA, trainer
from transformers import TrainerCallback

STEPS = int(os.environ.get("FASTDPO_STEPS", 120))
EVERY = STEPS // 12  # steps between evaluations, saves and readings
WARM = 4  # readings of warm-up: caches fill, allocators grow, every row of the reference is known
EPOCH_ROWS = [
    {**row, "prompt": f"{turn} {row['prompt']}"} for turn in range(STEPS // 24) for row in praise_and_scolding()
]  # six epochs, of which two are warm-up
# What a step may take at the end, of what it takes after warm-up. Other programs on the machine's cores and caches vary
# what work takes by much more, for seconds at a time, which a quarter of the short form is no longer than. So the CPU
# time of each step is divided by that of a fixed piece of work beside it, and medians are compared; what is left is how
# the two kinds of work differ under load. What grows with the number of steps would double over the long form.
SLOWER = 1.25 if STEPS >= 1000 else 1.5


class Readings(TrainerCallback):
    """What the process holds after every EVERY steps, and what each step takes, of a fixed piece of work."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.held: list[dict[str, int]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and state.global_step % EVERY == 0:
            self.held.append(held())
        self.began = time.thread_time()
        some_work()
        self.started = time.thread_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append((time.thread_time() - self.started) / (self.started - self.began))


def some_work() -> None:
    """Of a step's kind: small operations, forward and backward, one by one."""
    weight = torch.ones(32, 32, requires_grad=True)
    for _ in range(20):
        (torch.ones(100, 32) @ weight).relu().log().sum().backward()


def held() -> dict[str, int]:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free is the system's again
    process = psutil.Process()
    return {
        "bytes": process.memory_info().rss,
        "objects": len(gc.get_objects()),  # tensors among them
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children()),
    }


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[], Any]]] = {
    "full, data workers": ({"dataloader_num_workers": 1}, {}, lambda: EPOCH_ROWS),
    "LoRA, samples": ({"generate_during_eval": True, "max_length": 64}, LORA, lambda: EPOCH_ROWS),
    "LoRA, a stream": (
        {"sync_ref_model": True, "ref_model_sync_steps": 3},
        LORA,
        lambda: datasets.IterableDataset.from_generator(lambda: iter(EPOCH_ROWS)),
    ),
}


def long_run(kind: str, tokenizer: Any, quick: dict[str, Any], path: Path) -> None:
    logging.getLogger().handlers.clear()  # pytest's keep every message
    options, more, rows = KINDS[kind]
    saving = {"save_strategy": "steps", "save_steps": EVERY, "save_total_limit": 2}
    evaluating = {"eval_strategy": "steps", "eval_steps": EVERY, "per_device_eval_batch_size": 2}
    options = {**quick, **saving, **evaluating, "max_steps": STEPS, "logging_steps": 5, **options}
    readings = Readings()
    trainer(rows(), tokenizer, options, eval_dataset=EPOCH_ROWS[:4], callbacks=[readings], **more).train()
    path.write_text(json.dumps([readings.steps, readings.held]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_run_holds_no_more_at_its_end_and_is_no_slower(kind, tokenizer, quick, tmp_path) -> None:
    path = tmp_path / "readings.json"
    child = multiprocessing.get_context("fork").Process(target=long_run, args=(kind, tokenizer, quick, path))
    child.start()
    child.join()
    assert child.exitcode == 0
    steps, every = json.loads(path.read_text())
    first, last = every[WARM], every[-1]
    growth = last["bytes"] / first["bytes"] - 1
    quarter, steady = STEPS // 6, steps[WARM * EVERY :]
    slower = statistics.median(steady[-quarter:]) / statistics.median(steady[:quarter])
    flat = ", ".join(f"{last[name]} {name}" for name in ("files", "threads"))
    figure(f"{STEPS} steps, {kind}: memory {growth:+.2%}, a step's time x {slower:.2f}, {flat}")
    for reading in every[WARM:]:
        assert {name: reading[name] for name in ("files", "threads", "children")} == {
            name: first[name] for name in ("files", "threads", "children")
        }
    assert growth < 0.02, [reading["bytes"] for reading in every]
    assert slower < SLOWER
    # A few hundred come and go with buffers and with what data workers have ahead, at other steps each time; one a log
    # line stays. So the long form sees one that is left a step, the short form five.
    objects = [reading["objects"] for reading in every[WARM:]]
    half = len(objects) // 2
    assert min(objects[half:]) - max(objects[:half]) < STEPS / 8, objects
