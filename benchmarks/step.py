"""fastdpo against TRL 1.16 on the same rows: pairs a second, FLOPs a pair, peak memory.

Runs alternate, each in a fresh process. Numbers count only when the loss curves agree: a mismatch is an error. FLOPs
come from runs of their own, because counting slows them. TRL takes part as it comes and tuned; on a CPU both again with
its head told to skip the rows it need not score, which it does on a GPU by itself. A configuration of TRL that dies is
written down as failed and the others go on; so is a count. What depends on the device stands in device.py.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import flops, workload
from benchmarks.device import DEVICES, ROOT, Device, Tolerances
from benchmarks.provenance import provenance
from benchmarks.run import LORA_RANK, RunResult, RunSpec
from benchmarks.table import LATER, render, span_in_words

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
LN2 = math.log(2)


class CurvesDiffer(RuntimeError):
    """Two trainers that should compute the same numbers did not, so no time of theirs can be compared."""


class RunFailed(RuntimeError):
    """A run left no result; `line` says why: the last one it wrote that names an error, as CUDA's go on after that."""

    def __init__(self, name: str, what: str, output: str = "") -> None:
        super().__init__(f"the run of {name} {what}" + (f": {output[-3000:]}" if output else ""))
        lines = output.strip().splitlines()
        self.line = ([line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)] or lines or [what])[-1]


def configurations(base: RunSpec, device: Device, tuned: dict[str, Any]) -> dict[str, RunSpec]:
    """The runs that are timed, from fastdpo's. TRL default's epochs all do the same work: some devices run one only."""
    default = replace(base, trainer="trl", stop_after=device.trl_default_epochs)
    best = replace(base, trainer="trl", settings=tuned, longest_first=True)
    specs = {"fastdpo": base, "TRL default": default, "TRL tuned": best}
    if not device.head_skips_rows:
        for name in ("TRL default", "TRL tuned"):
            specs[f"{name}, response rows only"] = replace(specs[name], response_rows_only=True)
    return specs


def tuned_settings(batch: int, micro_batch: int, precompute: bool = True) -> dict[str, Any]:
    return {
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": precompute,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": batch // micro_batch,
    }


def main(options: Namespace) -> int:
    """Runs everything, writes the JSON, prints the table; 1 where the trainers disagree or fastdpo fails."""
    device = DEVICES[options.device]
    machine = device.find()
    if machine is None:
        print(f"skipped: no {device.name.upper()} device that torch can use")
        return 0
    try:
        result = measure(options, device, machine)
    except (CurvesDiffer, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = json.dumps(result, indent=1) + "\n"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(render(json.loads(text)))  # what the file says, nothing else
    print(f"written to {options.output}")
    return 0


def measure(options: Namespace, device: Device, machine: dict[str, Any]) -> dict[str, Any]:
    origin = provenance(
        machine, options.threads, PACKAGES, options.commit
    )  # before the runs: the commit and the load they started from
    base = RunSpec("fastdpo", device.name, options.pairs, options.epochs, options.batch, threads=options.threads)
    tuning = search_tuned(base, device) if options.tune else []
    settings = tuned_settings(options.batch, min(device.tuned_micro_batch, options.batch))
    tuned = min(tuning, key=lambda row: row["seconds"])["settings"] if tuning else settings
    specs = configurations(base, device, tuned)
    sorted_curve = in_own_process("fastdpo, longest first", replace(base, longest_first=True))
    counts, uncounted = count_flops(specs)
    runs, failed = timed_runs(specs, options.repeat, sorted_curve)

    spans = reported_spans(options.epochs, device.later_epochs)
    rows = {}
    for name, spec in specs.items():
        if name in failed:
            rows[name] = {"spec": asdict(spec), "failed": failed[name], "runs": [asdict(run) for run in runs[name]]}
        else:
            rows[name] = summary(spec, runs[name], flops_at(spec, counts.get(name.split(",")[0])), spans)
    return {
        "benchmark": "step",
        "device": device.name,
        **origin,
        "workload": describe_workload(options, device),
        "tolerances": asdict(device.tolerances),
        "configurations": rows,
        "uncounted": uncounted,
        "tuning": tuning,
        "formula_flops_per_pair": formula_per_pair(options.pairs, device, spans),
        "ratios": ratios(rows, spans, device.aims),
    }


def count_flops(specs: dict[str, RunSpec]) -> tuple[dict[str, RunResult], dict[str, str]]:
    """-> runs that counted, and why the others could not. TRL's epochs all do the same work, so one is enough."""
    counts: dict[str, RunResult] = {}
    uncounted: dict[str, str] = {}
    for name in ("fastdpo", "TRL default", "TRL tuned"):
        stop = None if name == "fastdpo" else 1
        try:
            spec = replace(specs[name], count_flops=True, stop_after=stop)
            counts[name] = in_own_process(name, spec, ", counting FLOPs")
        except RunFailed as error:
            uncounted[name] = error.line
    return counts, uncounted


def timed_runs(
    specs: dict[str, RunSpec], repeats: int, sorted_curve: RunResult
) -> tuple[dict[str, list[RunResult]], dict[str, str]]:
    """-> runs whose curves agree with fastdpo's (`sorted_curve` where rows are sorted), and why TRL's others died."""
    runs: dict[str, list[RunResult]] = {name: [] for name in specs}
    failed: dict[str, str] = {}
    for repeat in range(repeats):
        for name, spec in specs.items():
            if name in failed:
                continue
            try:
                run = in_own_process(name, spec, f" {repeat + 1}/{repeats}")
            except RunFailed as error:
                if spec.trainer == "fastdpo":
                    raise
                failed[name] = error.line
                continue
            runs[name].append(run)
            reference = sorted_curve if spec.longest_first else runs["fastdpo"][0]
            check_curves(name, run, reference, DEVICES[spec.device].tolerances)
    return runs, failed


def search_tuned(base: RunSpec, device: Device) -> list[dict[str, Any]]:
    """Seconds of TRL over splits of the optimizer batch, with the reference ahead or online; without what failed."""
    base = replace(base, trainer="trl", longest_first=True, stop_after=device.trl_default_epochs)
    splits = [size for size in (base.batch, base.batch // 2, base.batch // 4, 1) if size and base.batch % size == 0]
    choices = [(True, size) for size in dict.fromkeys(splits)] + [(False, min(device.tuned_micro_batch, base.batch))]
    found = []
    for precompute, micro_batch in choices:
        settings = tuned_settings(base.batch, micro_batch, precompute)
        try:
            result = in_own_process(f"TRL with {settings}", replace(base, settings=settings))
        except RunFailed:
            continue
        epochs, seconds = len(result.seconds) - 1, result.seconds[-1]
        found.append({"settings": settings, "epochs": epochs, "seconds": seconds, "peak_memory": result.peak_memory})
    return found


def in_own_process(name: str, spec: RunSpec, note: str = "") -> RunResult:
    """One run in a fresh interpreter. This process imports no torch: a child starts with its parent's peak memory."""
    print(f"{name}{note} ...", end=" ", file=sys.stderr, flush=True)
    try:
        result = _run_apart(name, spec)
    except RunFailed as error:
        print(f"failed: {error.line}", file=sys.stderr, flush=True)
        raise
    print(f"{result.seconds[-1]:.1f} s, {result.peak_memory / 2**20:.0f} MiB", file=sys.stderr, flush=True)
    return result


def _run_apart(name: str, spec: RunSpec) -> RunResult:
    device = DEVICES[spec.device]
    environment = {
        **device.environment,
        **os.environ,
        "OMP_NUM_THREADS": str(spec.threads),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    with tempfile.TemporaryDirectory() as folder:
        spec_file, result_file = Path(folder, "spec.json"), Path(folder, "result.json")
        spec_file.write_text(json.dumps(asdict(spec)))
        command = [sys.executable, "-m", "benchmarks.run", str(spec_file), str(result_file)]
        options: Any = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        try:
            done = subprocess.run(command, timeout=device.time_limit, **options)
        except subprocess.TimeoutExpired:
            raise RunFailed(name, f"took longer than {device.time_limit:g} s") from None
        if done.returncode:
            raise RunFailed(name, f"ended with {done.returncode}", done.stderr)
        return RunResult(**json.loads(result_file.read_text()))


def check_curves(name: str, run: RunResult, reference: RunResult, allowed: Tolerances) -> None:
    """Equal losses and gradient norms step by step, from ln 2, of a curve that moved (else it proves nothing)."""
    if not abs(run.losses[0] - LN2) <= allowed.first_loss:  # also true for NaN
        raise CurvesDiffer(f"{name}: the first loss is {run.losses[0]!r}, expected ln 2 = {LN2:.7f}")
    for label, ours, theirs, absolute, relative in (
        ("loss", run.losses, reference.losses, allowed.loss_absolute, allowed.loss_relative),
        ("grad_norm", run.grad_norms, reference.grad_norms, 0.0, allowed.grad_norm_relative),
    ):
        for step, (mine, other) in enumerate(zip(ours, theirs, strict=False), start=1):  # one may have stopped earlier
            if not abs(mine - other) <= max(absolute, relative * abs(other)):
                raise CurvesDiffer(
                    f"{name}: {label} of step {step} is {mine!r}, fastdpo's is {other!r}\n"
                    f"{name}: {ours}\nfastdpo: {theirs}"
                )
    if max(abs(loss - LN2) for loss in reference.losses) < allowed.least_movement:
        raise CurvesDiffer(
            f"no loss of fastdpo left ln 2 by {allowed.least_movement}, so equal curves show nothing: take more steps"
        )


def at_epoch(totals: list[float], epoch: int) -> float:
    """The running total after `epoch`; beyond what was run, every further epoch costs what the last one did."""
    if epoch < len(totals):
        return totals[epoch]
    return totals[-1] + (epoch - len(totals) + 1) * (totals[-1] - totals[-2])


def reported_spans(epochs: int, later: bool) -> dict[str, tuple[int, int]]:
    """Name -> (epoch after which it begins, epoch with which it ends); from 0 on it holds what precedes training."""
    spans = {str(epoch): (0, epoch) for epoch in sorted({1, epochs})}
    return spans | ({LATER: (1, epochs)} if later and epochs > 1 else {})


def over(span: tuple[int, int], totals: list[float]) -> float:
    """What a running total grew by; nothing is taken off for what precedes training."""
    begin, end = span
    return at_epoch(totals, end) - (at_epoch(totals, begin) if begin else 0)


def flops_at(spec: RunSpec, count: RunResult | None) -> list[float]:
    """Counted FLOPs after 0, 1, .. epochs; for response rows only, less the head's products with other rows. Empty
    where they were not counted.
    """
    if count is None:
        return []
    counted: list[float] = list(count.flops)
    totals = [counted[0]] + [at_epoch(counted, epoch) for epoch in range(1, spec.epochs + 1)]
    if not spec.response_rows_only:
        return totals
    lengths = workload.pair_lengths(spec.pairs)
    if spec.longest_first:
        lengths = [lengths[i] for i in workload.longest_first(lengths)]
    micro_batch = spec.settings.get("per_device_train_batch_size", spec.batch)
    idle = flops.padded_positions(lengths, micro_batch) - sum(pair.chosen + pair.rejected for pair in lengths)
    config = workload.model_config(DEVICES[spec.device].shape)
    reference, policy = flops.head_flops(config, idle, 1), flops.head_flops(config, idle, 3)
    if spec.settings.get("precompute_ref_log_probs"):
        return [total - reference - policy * epoch for epoch, total in enumerate(totals)]
    return [total - (reference + policy) * epoch for epoch, total in enumerate(totals)]


def summary(
    spec: RunSpec, runs: list[RunResult], flop_totals: list[float], spans: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    """Medians over the repeats, beside the runs they come from."""
    pairs = {span: spec.pairs * (end - begin) for span, (begin, end) in spans.items()}
    seconds = {name: median(over(span, run.seconds) for run in runs) for name, span in spans.items()}
    work = {name: over(span, flop_totals) / pairs[name] for name, span in spans.items()} if flop_totals else {}
    peak = median(run.peak_memory for run in runs)
    return {
        "spec": asdict(spec),
        "seconds_before_training": median(run.seconds[0] for run in runs),
        "seconds": seconds,
        "pairs_per_second": {span: pairs[span] / seconds[span] for span in spans},
        "flops_per_pair": work,
        "peak_memory": peak,
        "added_memory": peak - median(run.baseline_memory for run in runs),
        "runs": [asdict(run) for run in runs],
    }


def ratios(
    rows: dict[str, dict[str, Any]], spans: dict[str, tuple[int, int]], aims: Mapping[str, tuple[float, bool]]
) -> list[dict[str, Any]]:
    """fastdpo against every TRL configuration that ran; an aim is attached where there is one."""
    ours = rows["fastdpo"]
    others = {name: row for name, row in rows.items() if name != "fastdpo" and "failed" not in row}
    values: dict[str, float] = {}
    for span in spans:
        for name, theirs in others.items():
            speed = ours["pairs_per_second"][span] / theirs["pairs_per_second"][span]
            values[f"speed of fastdpo / {name}, {span_in_words(span)}"] = speed
            if ours["flops_per_pair"] and theirs["flops_per_pair"]:
                work = ours["flops_per_pair"][span] / theirs["flops_per_pair"][span]
                values[f"FLOPs of fastdpo / {name}, {span_in_words(span)}"] = work
    for name, theirs in others.items():
        values[f"peak memory of fastdpo / {name}"] = ours["peak_memory"] / theirs["peak_memory"]
        values[f"memory added by training, fastdpo / {name}"] = ours["added_memory"] / theirs["added_memory"]
    return [_ratio(name, value, aims) for name, value in values.items()]


def _ratio(name: str, value: float, aims: Mapping[str, tuple[float, bool]]) -> dict[str, Any]:
    aim = aims.get(name) or (aims.get(name.rsplit(",", 1)[0]) if name.startswith("speed") else None)
    if aim is None:
        return {"name": name, "value": value}
    bound, larger = aim
    return {
        "name": name,
        "value": value,
        "aim": f"{'>=' if larger else '<='} {bound}",
        "met": value >= bound if larger else value <= bound,
    }


def formula_per_pair(pairs: int, device: Device, spans: dict[str, tuple[int, int]]) -> dict[str, float]:
    """What the packed step should cost: the reference runs in the first epoch only."""
    lengths, config = workload.pair_lengths(pairs), workload.model_config(device.shape)
    first = flops.formula_flops(lengths, config, LORA_RANK, reference=True)
    later = flops.formula_flops(lengths, config, LORA_RANK, reference=False)
    return {name: over(span, [0, first, first + later]) / (pairs * (span[1] - span[0])) for name, span in spans.items()}


def describe_workload(options: Namespace, device: Device) -> dict[str, Any]:
    lengths, config = workload.pair_lengths(options.pairs), workload.model_config(device.shape)
    totals = [pair.prompt + side for pair in lengths for side in (pair.chosen, pair.rejected)]
    return {
        "pairs": options.pairs,
        "epochs": options.epochs,
        "batch": options.batch,
        "repeat": options.repeat,
        "dtype": device.dtype,
        "learning_rate": device.learning_rate,
        "lora_rank": LORA_RANK,
        "parameters": workload.parameter_counts(config),
        "vocabulary": config.vocab_size,
        "median_tokens": median(totals),
        "longest": max(totals),
        "prompt_to_response": 2 * sum(p.prompt for p in lengths) / sum(p.chosen + p.rejected for p in lengths),
    }
