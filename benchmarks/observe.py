"""fastdpo's own training loop, watched from a callback: what `parts` and `trace` have in common."""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import workload
from benchmarks.device import DEVICES
from benchmarks.provenance import provenance
from benchmarks.run import TRAINERS, RunSpec, common_settings, same_adapters

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate")


def spec_of(options: Namespace, epochs: int) -> RunSpec:
    task = options.model, options.profile, options.pairs, epochs, options.batch
    return RunSpec("fastdpo", options.device, *task, threads=options.threads)


def train_watched(spec: RunSpec, watch: Callable[[Any], Any]) -> None:
    """Trains without log lines; `watch` makes a callback from the trainer, which is there before training begins."""
    import torch
    from datasets import Dataset

    torch.set_num_threads(spec.threads)
    kind, room = TRAINERS["fastdpo"](), workload.room_for(spec.lengths)
    with tempfile.TemporaryDirectory() as folder:
        settings = {**common_settings(spec, room), "output_dir": folder, "logging_steps": 10**6, **spec.settings}
        model = kind.model(spec, room, folder)
        trainer = kind.build(model, Dataset.from_list(workload.text_rows(spec.lengths)), settings, None, spec)
        same_adapters(trainer.model)
        trainer.add_callback(watch(trainer))
        trainer.train()


def forget_reference(trainer: Any) -> None:
    """Every epoch runs the reference, as a first one does."""
    trainer.reference.memory = type(trainer.reference.memory)()


@contextmanager
def replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Within it, `owner.name` is `wrap` of what it was."""
    before = getattr(owner, name)
    setattr(owner, name, wrap(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def described(options: Namespace, benchmark: str) -> dict[str, Any] | None:
    """What a result file begins with; None, said so, where there is no such device."""
    if (machine := DEVICES[options.device].found()) is None:
        return None
    print(f"{benchmark} of {options.model}, {options.profile}, {options.pairs} pairs ...", file=sys.stderr, flush=True)
    named = {name: getattr(options, name) for name in ("device", "model", "profile")}
    origin = provenance(machine, options.threads, PACKAGES, options.commit)
    work = {"pairs": options.pairs, "batch": options.batch}
    return {"benchmark": benchmark, **named, **origin, "workload": work}
