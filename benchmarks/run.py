"""One training run in a process of its own, so that its peak of memory is nobody else's.

`python -m benchmarks.run SPEC.json RESULT.json`. The clock starts with text rows in memory and a built model, and
stops with a trained one: tokenization, LoRA, probes, a precomputed reference and training count; imports and building
the model do not. On a GPU a step with another model comes first.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import flops, workload
from benchmarks.device import DEVICES, Device
from benchmarks.models import MODELS
from benchmarks.workload import PROFILES, PairLengths

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import PreTrainedModel, TrainerCallback

LORA_RANK = 16


@dataclass(frozen=True)
class RunSpec:
    """Everything a run depends on; `settings` are fields of the trainer's own DPOConfig."""

    trainer: str  # of TRAINERS
    device: str  # of DEVICES
    model: str  # of MODELS
    profile: str  # of PROFILES
    pairs: int
    epochs: int
    batch: int  # pairs an optimizer step
    settings: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None  # transformers' attention implementation, where not its own choice
    stop_after: int | None = None  # leave after so many epochs, on the schedule of all of them
    longest_first: bool = False  # rows sorted by length instead of as they come
    response_rows_only: bool = False  # TRL only: its head told to skip prompt and padding positions where it does not
    count_flops: bool = False
    full: bool = False  # all weights train, in place of LoRA factors
    processor_time: bool = False  # its own, for a machine that does other work too, in place of the wall clock's
    threads: int = 2
    site: str = ""  # a folder of packages that goes before the installed ones

    @property
    def lengths(self) -> list[PairLengths]:
        """In the order of training."""
        lengths = workload.pair_lengths(PROFILES[self.profile], self.pairs)
        return [lengths[i] for i in workload.longest_first(lengths)] if self.longest_first else lengths

    @property
    def lora_rank(self) -> int | None:
        """None where all weights train."""
        return None if self.full else LORA_RANK

    @property
    def micro_batch(self) -> int:
        """TRL's, in pairs."""
        return self.settings.get("per_device_train_batch_size", self.batch)


@dataclass
class RunResult:
    """Seconds and FLOPs are running totals, when training starts and after each epoch. Memory is in bytes."""

    seconds: list[float]
    cpu_seconds: float  # of all threads; on a machine that does other work too, wall time exceeds it
    flops: list[int]
    baseline_memory: int  # with the model built
    peak_memory: int
    losses: list[float]
    grad_norms: list[float]


def run(spec: RunSpec) -> RunResult:
    trainer = TRAINERS[spec.trainer]()
    import torch

    device = DEVICES[spec.device]
    torch.set_num_threads(spec.threads)
    room = workload.room_for(spec.lengths)
    rows = workload.text_rows(spec.lengths)
    with tempfile.TemporaryDirectory() as folder:
        if device.warm_up:
            ahead = {name: value for name, value in spec.settings.items() if name != "precompute_ref_log_probs"}
            longest = [rows[i] for i in workload.longest_first(spec.lengths)[: spec.batch]]
            _train(trainer, replace(spec, epochs=1, settings=ahead, count_flops=False), longest, room, folder)
        return _train(trainer, spec, rows, room, folder)


def _train(trainer: Trainer, spec: RunSpec, rows: list[dict[str, str]], room: int, folder: str) -> RunResult:
    from datasets import Dataset

    device = DEVICES[spec.device]
    device.restart_peak()
    before = device.peak_memory() if device.warm_up else 0  # what a first training left
    model = trainer.model(spec, room, folder)
    dataset = Dataset.from_list(rows)
    flop_counter = flops.counter() if spec.count_flops else None
    device.wait()
    device.restart_peak()
    baseline = device.peak_memory()
    with tempfile.TemporaryDirectory() as output_dir, flop_counter or nullcontext():
        clock = _stopwatch(time.process_time if spec.processor_time else time.perf_counter)
        cpu_start = time.process_time()
        probe: Any = _probe(clock, device, flop_counter, spec.stop_after)
        settings = {**common_settings(spec, room), "output_dir": output_dir, **spec.settings}
        training = trainer.build(model, dataset, settings, probe, spec)
        training.train()
        device.wait()
        cpu_seconds = time.process_time() - cpu_start
        probe.seconds[-1] = clock()  # what a trainer does after its last epoch is part of it
    history = [row for row in training.state.log_history if "loss" in row]
    return RunResult(
        seconds=probe.seconds,
        cpu_seconds=cpu_seconds,
        flops=probe.flops,
        baseline_memory=baseline - before,
        peak_memory=device.peak_memory() - before,
        losses=[row["loss"] for row in history],
        grad_norms=[float(row["grad_norm"]) for row in history],
    )


def common_settings(spec: RunSpec, room: int) -> dict[str, Any]:
    """The same task for all: the device's precision, AdamW and schedule of transformers, rows in the order given."""
    return {
        "num_train_epochs": spec.epochs,
        "per_device_train_batch_size": spec.batch,
        "learning_rate": MODELS[spec.model].learning_rate,
        "max_length": room,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **DEVICES[spec.device].settings,
    }


def build_model(spec: RunSpec, room: int, folder: str = "") -> PreTrainedModel:
    device = DEVICES[spec.device]
    return workload.build_model(MODELS[spec.model], room, device.dtype, device.place, spec.attention)


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Trainer:
    """How a contender gets its model, and how it is built around it."""

    model: Callable[[RunSpec, int, str], Any]  # the spec, room and a folder to keep things in
    build: Callable[[Any, Dataset, dict[str, Any], Any, RunSpec], Any]  # model, rows, settings, callback, spec


def _fastdpo() -> Trainer:
    from fastdpo import DPOConfig, DPOTrainer

    def build(model: PreTrainedModel, rows: Dataset, settings: dict[str, Any], probe: Any, spec: RunSpec) -> Any:
        return DPOTrainer(
            model=model,
            args=DPOConfig(**settings),
            train_dataset=rows,
            processing_class=workload.word_tokenizer(),
            peft_config=None if spec.full else lora(),
            callbacks=[] if probe is None else [probe],
        )

    return Trainer(build_model, build)


def _trl() -> Trainer:
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils

    def build(model: PreTrainedModel, rows: Dataset, settings: dict[str, Any], probe: Any, spec: RunSpec) -> Any:
        if spec.response_rows_only:
            # add_fused_lm_head asks this name only whether to select the scored positions; the kernels have their own.
            utils._use_triton = lambda device: True
        trainer = DPOTrainer(
            model=model,
            ref_model=copy.deepcopy(model) if spec.full else None,  # TRL would read it from disk
            args=DPOConfig(**settings),
            train_dataset=rows,
            processing_class=workload.word_tokenizer(),
            peft_config=None if spec.full else lora(),
            callbacks=[] if probe is None else [probe],
        )
        if DEVICES[spec.device].dtype == "float32":  # TRL has adapters of 4-bit weights in bf16, whatever the rest is
            for parameter in trainer.model.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        return trainer

    return Trainer(build_model, build)


def _unsloth() -> Trainer:
    """Untested. It takes models from a folder only, so the same random weights are written to one first."""
    from unsloth import FastLanguageModel  # noqa: I001 (before TRL and transformers, which it changes when imported)
    from trl import DPOConfig, DPOTrainer

    def load(spec: RunSpec, room: int, folder: str) -> Any:
        place = Path(folder, "model")
        if not place.exists():
            build_model(spec, room).save_pretrained(place)
            workload.word_tokenizer().save_pretrained(place)
        options = {"max_seq_length": room, "use_exact_model_name": True}
        options["load_in_4bit"] = MODELS[spec.model].in_4_bits
        return FastLanguageModel.from_pretrained(model_name=str(place), **options)[0]

    def build(model: Any, rows: Dataset, settings: dict[str, Any], probe: Any, spec: RunSpec) -> Any:
        adapted = FastLanguageModel.get_peft_model(
            model,
            r=LORA_RANK,
            target_modules=list(MODELS[spec.model].linears),
            lora_alpha=2 * LORA_RANK,
            lora_dropout=0,
            bias="none",
            use_gradient_checkpointing="unsloth",
        )
        return DPOTrainer(
            model=adapted,
            args=DPOConfig(**settings),
            train_dataset=rows,
            processing_class=workload.word_tokenizer(),
            callbacks=[probe],
        )

    return Trainer(load, build)


TRAINERS: dict[str, Callable[[], Trainer]] = {"fastdpo": _fastdpo, "trl": _trl, "unsloth": _unsloth}


def same_adapters(model: Any) -> None:
    """The same LoRA factors for every trainer. lora_B starts at 0, so policy and reference still agree."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            drawn = torch.randn(parameter.shape, generator=generator)  # on the CPU, wherever the model is
            parameter.data.copy_(drawn * parameter.shape[1] ** -0.5)


def _stopwatch(clock: Callable[[], float]) -> Callable[[], float]:
    start = clock()
    return lambda: clock() - start


def _probe(
    clock: Callable[[], float], device: Device, flop_counter: FlopCounterMode | None, stop_after: int | None
) -> TrainerCallback:
    """A callback that gives both trainers the same LoRA factors and reads clock and counter around each epoch."""
    from transformers import TrainerCallback

    class Probe(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.flops: list[int] = []

        def read(self) -> None:
            device.wait()
            self.seconds.append(clock())
            if flop_counter is not None:
                self.flops.append(flop_counter.get_total_flops())

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            same_adapters(model)
            self.read()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.read()
            control.should_training_stop |= len(self.seconds) - 1 == stop_after

    return Probe()


def main(spec_file: str, result_file: str) -> None:
    logging.disable(logging.WARNING)
    spec = RunSpec(**json.loads(Path(spec_file).read_text()))
    Path(result_file).write_text(json.dumps(asdict(run(spec))))


if __name__ == "__main__":
    main(*sys.argv[1:])
