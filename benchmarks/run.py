"""One training run in a process of its own, so that its peak of memory is nobody else's.

`python -m benchmarks.run SPEC.json RESULT.json`. The clock starts with text rows in memory and a built model, and
stops with a trained one: tokenization, LoRA, probes, a precomputed reference and training count; imports and building
the model do not.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import flops, workload
from benchmarks.device import DEVICES, Device

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import PreTrainedModel, TrainerCallback

LORA_RANK = 16


@dataclass(frozen=True)
class RunSpec:
    """Everything a run depends on; `settings` are fields of the trainer's own DPOConfig."""

    trainer: str  # "fastdpo" | "trl"
    device: str  # of DEVICES
    pairs: int
    epochs: int
    batch: int  # pairs an optimizer step
    settings: dict[str, Any] = field(default_factory=dict)
    stop_after: int | None = None  # leave after so many epochs, on the schedule of all of them
    longest_first: bool = False  # rows sorted by length instead of as they come
    response_rows_only: bool = False  # TRL only: its head told to skip prompt and padding positions where it does not
    count_flops: bool = False
    threads: int = 2


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
    import torch
    from datasets import Dataset

    device = DEVICES[spec.device]
    torch.set_num_threads(spec.threads)
    build_trainer = {"fastdpo": _fastdpo_trainer, "trl": _trl_trainer}[spec.trainer]()
    lengths = workload.pair_lengths(spec.pairs)
    rows = workload.text_rows(lengths)
    order = workload.longest_first(lengths) if spec.longest_first else range(spec.pairs)
    dataset = Dataset.from_list([rows[i] for i in order])
    model = workload.build_model(device.shape, device.dtype, device.place)
    flop_counter = flops.counter() if spec.count_flops else None
    device.wait()
    device.restart_peak()
    baseline = device.peak_memory()
    with tempfile.TemporaryDirectory() as output_dir, flop_counter or nullcontext():
        start, cpu_start = time.perf_counter(), time.process_time()
        probe: Any = _probe(start, device, flop_counter, spec.stop_after)
        trainer = build_trainer(model, dataset, _common_settings(spec, device, output_dir) | spec.settings, probe, spec)
        trainer.train()
        device.wait()
        cpu_seconds = time.process_time() - cpu_start
        probe.seconds[-1] = time.perf_counter() - start  # what a trainer does after its last epoch is part of it
    history = [row for row in trainer.state.log_history if "loss" in row]
    return RunResult(
        seconds=probe.seconds,
        cpu_seconds=cpu_seconds,
        flops=probe.flops,
        baseline_memory=baseline,
        peak_memory=device.peak_memory(),
        losses=[row["loss"] for row in history],
        grad_norms=[float(row["grad_norm"]) for row in history],
    )


def _common_settings(spec: RunSpec, device: Device, output_dir: str) -> dict[str, Any]:
    """The same task for both: the device's precision, AdamW and schedule of transformers, rows in the order given."""
    return {
        "output_dir": output_dir,
        "num_train_epochs": spec.epochs,
        "per_device_train_batch_size": spec.batch,
        "learning_rate": device.learning_rate,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **device.settings,
    }


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def _fastdpo_trainer() -> Any:
    from fastdpo import DPOConfig, DPOTrainer

    def build(model: PreTrainedModel, rows: Dataset, settings: dict[str, Any], probe: Any, spec: RunSpec) -> Any:
        return DPOTrainer(
            model=model,
            args=DPOConfig(**settings),
            train_dataset=rows,
            processing_class=workload.word_tokenizer(),
            peft_config=_lora(),
            callbacks=[probe],
        )

    return build


def _trl_trainer() -> Any:
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils

    def build(model: PreTrainedModel, rows: Dataset, settings: dict[str, Any], probe: Any, spec: RunSpec) -> Any:
        if spec.response_rows_only:
            # add_fused_lm_head asks this name only whether to select the scored positions; the kernels have their own.
            utils._use_triton = lambda device: True
        return DPOTrainer(
            model=model,
            args=DPOConfig(**settings),
            train_dataset=rows,
            processing_class=workload.word_tokenizer(),
            peft_config=_lora(),
            callbacks=[probe],
        )

    return build


def _probe(
    start: float, device: Device, flop_counter: FlopCounterMode | None, stop_after: int | None
) -> TrainerCallback:
    """A callback that gives both trainers the same LoRA factors and reads clock and counter around each epoch."""
    import torch
    from transformers import TrainerCallback

    class Probe(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.flops: list[int] = []

        def read(self) -> None:
            device.wait()
            self.seconds.append(time.perf_counter() - start)
            if flop_counter is not None:
                self.flops.append(flop_counter.get_total_flops())

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            generator = torch.Generator().manual_seed(0)
            for name, parameter in model.named_parameters():
                if "lora_A" in name:  # lora_B starts at 0, so policy and reference still agree
                    drawn = torch.randn(parameter.shape, generator=generator)  # on the CPU, wherever the model is
                    parameter.data.copy_(drawn * parameter.shape[1] ** -0.5)
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
