"""TRL tuned: the settings of TRL's that fastdpo is compared with, chosen by count or searched by running them."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.apart import Clock, RunFailed, in_own_process
from benchmarks.device import Device
from benchmarks.models import MODELS
from benchmarks.run import RunSpec


def tuned_spec(base: RunSpec, device: Device, machine: dict[str, Any]) -> RunSpec:
    """TRL tuned where nothing is searched: checkpointing off, the device's way of running the reference, rows sorted
    by length, micro-batches of a size that was measured, or that memory has room for.
    """
    spec = replace(base, trainer="trl", longest_first=True)
    pairs = min(device.tuned_micro_batch or _pairs_with_room(spec, machine), base.batch)
    return replace(spec, settings=split_settings(base.batch, pairs, device.tuned_precompute))


def split_settings(batch: int, micro_batch: int, precompute: bool) -> dict[str, Any]:
    return {
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": precompute,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": batch // micro_batch,
    }


def _pairs_with_room(spec: RunSpec, machine: dict[str, Any]) -> int:
    """The largest halving of the batch whose longest micro-batch fits: by count, a layer of bf16 keeps 12 rows of the
    hidden size and 5 of the MLP's a token, and 60% of what weights leave is to hold them.
    """
    model, lengths = MODELS[spec.model], spec.lengths
    kept = 2 * model.num_hidden_layers * (12 * model.hidden_size + 5 * model.intermediate_size)
    room = 0.6 * (machine["gpu_memory"] - model.weight_bytes)
    longest = max(pair.prompt + max(pair.chosen, pair.rejected) for pair in lengths)
    return next((size for size in halvings(spec.batch) if 2 * size * longest * kept <= room), 1)


def halvings(batch: int) -> list[int]:
    """8, 4, 2, 1: numbers of pairs that split a batch of 8 evenly."""
    return [size for size in (batch >> shift for shift in range(batch.bit_length())) if size and batch % size == 0]


def search_tuned(tuned: RunSpec, device: Device, clock: Clock) -> list[dict[str, Any]]:
    """Seconds of TRL's first epoch with the settings that were tried, or why they failed: sizes of a micro-batch, then
    with the fastest the reference ahead or online, FlashAttention and Liger where installed, and checkpointing.

    A third of the time there is may go to it.
    """
    found: list[dict[str, Any]] = []

    def attempt(settings: dict[str, Any], attention: str | None = None) -> None:
        spec = replace(tuned, settings=settings, attention=attention, stop_after=1)
        name = f"TRL with {settings}" + (f", {attention}" if attention else "")
        row: dict[str, Any] = {"settings": settings, "attention": attention}
        try:
            result = in_own_process(name, spec, clock, share=1 / 3)
            row |= {"epochs": len(result.seconds) - 1, "seconds": result.seconds[-1], "before": result.seconds[0]}
            row["peak_memory"] = result.peak_memory
        except RunFailed as error:
            row["failed"] = error.line
        found.append(row)

    first = tuned.micro_batch
    near = [first, 2 * first, first // 2] if device.tuned_micro_batch is None else halvings(tuned.batch)
    for size in near:
        if size in halvings(tuned.batch):
            attempt(split_settings(tuned.batch, size, device.tuned_precompute))
    if best := fastest(found):
        other = not best["settings"]["precompute_ref_log_probs"]
        attempt({**best["settings"], "precompute_ref_log_probs": other})
    if installed("flash_attn") and (best := fastest(found)):
        attempt(best["settings"], "flash_attention_2")
    if device.head_skips_rows and installed("liger_kernel") and (best := fastest(found)):
        attempt({**best["settings"], "use_liger_kernel": True}, best["attention"])
    if device.head_skips_rows:
        attempt({**split_settings(tuned.batch, tuned.batch, False), "gradient_checkpointing": True})
    return found


def fastest(tuning: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the settings that ran."""
    return min((row for row in tuning if "seconds" in row), key=lambda row: row["seconds"], default=None)


def installed(package: str, site: Path | None = None) -> bool:
    """Whether it can be imported, without doing so: this process imports no torch."""
    return bool(site and (site / package).is_dir()) or importlib.util.find_spec(package) is not None
