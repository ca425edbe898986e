"""fastdpo against TRL 1.16 on the same rows: pairs and tokens a second, FLOPs a pair, share of the peak, peak memory.

Runs alternate, each in a fresh process. A contender's numbers count only when its loss curve is fastdpo's: otherwise,
and when it dies, is not installed or finds no time left, its row says so and the others go on. Where FLOPs are counted,
they come from runs of their own, because counting slows them; elsewhere from the formulas that the counts hold. What
depends on the device stands in device.py.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import flops, workload
from benchmarks.apart import NO_TIME, Clock, RunFailed, in_own_process, run_environment
from benchmarks.device import DEVICES, ROOT, Device, Tolerances
from benchmarks.models import MODELS, Model
from benchmarks.provenance import provenance, save
from benchmarks.run import RunResult, RunSpec
from benchmarks.table import LATER, render, span_in_words
from benchmarks.trl_settings import fastest, installed, search_tuned, tuned_spec
from benchmarks.workload import PROFILES

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
GPU_PACKAGES = ("triton", "liger-kernel", "unsloth", "flash-attn")
LEANEST = {"gradient_checkpointing": True, "max_tokens_per_microbatch": 2048}
LN2 = math.log(2)


class CurvesDiffer(RuntimeError):
    """Two trainers that should compute the same numbers did not, so no time of theirs can be compared."""

    def __init__(self, message: str, runs: dict[str, list[RunResult]] | None = None) -> None:
        super().__init__(message)
        self.runs = runs or {}  # of all, where none of them counts

    @property
    def line(self) -> str:
        return str(self).splitlines()[0]


def configurations(
    base: RunSpec, device: Device, tuned: RunSpec, unsloth: Path | None = None
) -> tuple[dict[str, RunSpec], dict[str, str]]:
    """-> the runs that are timed, in the order of their turns, and why contenders of this device have none.

    TRL default's epochs all do the same work: some devices run one only.
    """
    default = replace(base, trainer="trl", stop_after=device.trl_default_epochs)
    leanest = {**LEANEST, **device.leanest} if MODELS[base.model].in_4_bits else LEANEST
    other = {**tuned.settings, "precompute_ref_log_probs": not tuned.settings["precompute_ref_log_probs"]}
    specs = {
        "fastdpo": base,
        "fastdpo leanest": replace(base, settings=leanest),
        "TRL default": default,
        "TRL tuned": tuned,
        "TRL default, response rows only": replace(default, response_rows_only=True),
        "TRL tuned, response rows only": replace(tuned, response_rows_only=True),
        "TRL tuned, other reference": replace(tuned, settings=other),
        "TRL tuned, Liger": replace(tuned, settings={**tuned.settings, "use_liger_kernel": True}),
        "Unsloth": replace(default, trainer="unsloth", site=str(unsloth.resolve()) if unsloth else ""),
    }
    without: dict[str, str] = {}
    if not installed("liger_kernel"):
        without["TRL tuned, Liger"] = "not installed"
    elif tuned.settings.get("use_liger_kernel"):
        without["TRL tuned, Liger"] = "not run: TRL tuned is it already"
    if not installed("unsloth", unsloth):
        without["Unsloth"] = "not installed"
    elif base.full:
        without["Unsloth"] = "not run: its recipe here is LoRA's"
    named = {name: specs[name] for name in device.contenders}
    return named, {name: why for name, why in without.items() if name in named}


def main(options: Namespace) -> int:
    """Runs everything, writes the JSON, prints the table; 1 where a curve differs or fastdpo fails."""
    device = DEVICES[options.device]
    if (machine := device.found()) is None:
        return 0
    try:
        result = measure(options, device, machine)
    except (CurvesDiffer, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, CurvesDiffer) and error.runs:
            kept = options.output.with_suffix(".runs")  # no file of results: nobody knows whose curve is right
            save(kept, {name: [asdict(run) for run in runs] for name, runs in error.runs.items()})
            print(f"curves, seconds and memory of all runs are in {kept}", file=sys.stderr)
        return 1
    save(options.output, result)
    print(render(json.loads(options.output.read_text())))  # what the file says, nothing else
    print(f"written to {options.output}")
    differ = [name for name, row in result["configurations"].items() if row.get("curve_differs")]
    for name in differ:
        print(f"error: {result['configurations'][name]['failed']}", file=sys.stderr)
    return 1 if differ else 0


def measure(options: Namespace, device: Device, machine: dict[str, Any]) -> dict[str, Any]:
    packages = PACKAGES + (GPU_PACKAGES if "gpu" in machine else ())
    # before the runs: the commit and the load they started from
    origin = provenance(machine, options.threads, packages, options.commit)
    clock = Clock(options.seconds, device.time_limit)
    task = options.model, options.profile, options.pairs, options.epochs, options.batch
    how = {"full": options.full, "processor_time": options.processor_time, "threads": options.threads}
    base = RunSpec("fastdpo", device.name, *task, **how)
    tuned = tuned_spec(base, device, machine)
    # beside other work a product's wall time says little of what the processor reaches, so there is no MFU
    peak = None if options.processor_time else peak_rate(device, machine, options.threads)
    strongest = replace(tuned, response_rows_only=not device.head_skips_rows)
    tuning = search_tuned(strongest, device, clock) if options.tune else []
    if best := fastest(tuning):
        tuned = replace(tuned, settings=best["settings"], attention=best["attention"])
    specs, failed = configurations(base, device, tuned, options.unsloth)
    sorted_curve = in_own_process("fastdpo, longest first", replace(base, longest_first=True), clock)
    counts, uncounted = count_flops(specs, clock) if device.counts else ({}, {})
    runs, differ = timed_runs(specs, options.repeat, sorted_curve, failed, clock)

    spans = reported_spans(options.epochs, device.later_epochs)
    rows: dict[str, dict[str, Any]] = {}
    for name, spec in specs.items():
        if name in failed:
            rows[name] = {"spec": asdict(spec), "failed": failed[name], "curve_differs": name in differ}
            rows[name]["runs"] = [asdict(run) for run in runs[name]]
        else:
            rows[name] = summary(
                spec, runs[name], flops_at(spec, counts.get(name)), spans, peak["flops"] if peak else None
            )
    return {
        "benchmark": "step",
        "device": device.name,
        "model": options.model,
        "profile": options.profile,
        **origin,
        **({"peak": peak} if peak else {}),
        "workload": describe_workload(base, options.repeat),
        "tolerances": asdict(device.tolerances),
        "configurations": rows,
        "uncounted": uncounted,
        "tuning": tuning,
        "formula_flops_per_pair": by_formula(base, spans, flops.packed_flops),
        "needed_flops_per_pair": by_formula(base, spans, flops.needed_flops),
        "ratios": ratios(rows, spans),
    }


def count_flops(specs: dict[str, RunSpec], clock: Clock) -> tuple[dict[str, RunResult], dict[str, str]]:
    """-> runs that counted, and why the others could not. TRL's epochs all do the same work, so one is enough."""
    counts: dict[str, RunResult] = {}
    uncounted: dict[str, str] = {}
    for name in ("fastdpo", "TRL default", "TRL tuned"):
        stop = None if name == "fastdpo" else 1
        try:
            spec = replace(specs[name], count_flops=True, stop_after=stop)
            counts[name] = in_own_process(name, spec, clock, ", counting FLOPs")
        except RunFailed as error:
            uncounted[name] = error.line
    return counts, uncounted


def timed_runs(
    specs: dict[str, RunSpec], repeats: int, sorted_curve: RunResult, failed: dict[str, str], clock: Clock
) -> tuple[dict[str, list[RunResult]], set[str]]:
    """-> runs, and who of them has another curve than fastdpo (`sorted_curve` where rows are sorted). Adds to `failed`
    why others have no numbers. Raises CurvesDiffer where fastdpo's curve is nobody else's.
    """
    runs: dict[str, list[RunResult]] = {name: [] for name in specs}
    differ: set[str] = set()
    for repeat in range(repeats):
        for name, spec in specs.items():
            if name in failed:
                continue
            try:
                run = in_own_process(name, spec, clock, f" {repeat + 1}/{repeats}")
                runs[name].append(run)
                reference = sorted_curve if spec.longest_first else runs["fastdpo"][0]
                check_curves(name, run, reference, DEVICES[spec.device].tolerances)
                if name != "fastdpo":
                    check_movement(reference, DEVICES[spec.device].tolerances)
            except (RunFailed, CurvesDiffer) as error:
                if error.line == NO_TIME and runs[name]:
                    continue  # its earlier repeats count
                if name == "fastdpo":
                    raise
                failed[name] = error.line
                differ |= {name} if isinstance(error, CurvesDiffer) else set()
    agree = [name for name, spec in specs.items() if spec.trainer != "fastdpo" and name not in failed]
    if differ and not agree:
        raise CurvesDiffer("; ".join(failed[name] for name in sorted(differ)), runs)
    return runs, differ


def peak_rate(device: Device, machine: dict[str, Any], threads: int) -> dict[str, Any]:
    """FLOP/s that MFU is a share of: what a large product is known to reach on this GPU, else what it reaches now."""
    gpu, rate, _ = device.kernels.expected or (None, 0.0, 0.0)
    if gpu is not None and machine.get("gpu") == gpu:
        return {"flops": rate, "how": f"what large {device.dtype} products reach on an {gpu}"}
    command = [sys.executable, "-m", "benchmarks.measure", device.name]
    done = subprocess.run(command, cwd=ROOT, env=run_environment(device, threads), capture_output=True, text=True)
    if done.returncode:
        raise RunFailed("a large matrix product", f"ended with {done.returncode}", done.stderr)
    return {
        "flops": json.loads(done.stdout)["flops"],
        "how": f"a large {device.dtype} product, measured before the runs",
    }


def check_curves(name: str, run: RunResult, reference: RunResult, allowed: Tolerances) -> None:
    """Equal losses and gradient norms step by step, from ln 2."""
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


def check_movement(reference: RunResult, allowed: Tolerances) -> None:
    """A curve equal to one that stands still proves nothing."""
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
    """FLOPs after 0, 1, .. epochs: as counted, else by formula; empty for whom there is none."""
    if count is not None:
        return [count.flops[0]] + [at_epoch(list(count.flops), epoch) for epoch in range(1, spec.epochs + 1)]
    model, lengths = MODELS[spec.model], spec.lengths
    if spec.trainer == "fastdpo":
        lean = bool(spec.settings.get("gradient_checkpointing"))
        first, later = (flops.packed_flops(lengths, model, spec.lora_rank, on, lean) for on in (True, False))
        return [0.0] + [first + later * epoch for epoch in range(spec.epochs)]
    if spec.trainer != "trl":
        return []
    all_rows = not (spec.response_rows_only or DEVICES[spec.device].head_skips_rows)
    ahead = bool(spec.settings.get("precompute_ref_log_probs"))
    before = flops.padded_reference_flops(lengths, model, spec.lora_rank, spec.micro_batch, all_rows) if ahead else 0.0
    checkpointing = spec.settings.get("gradient_checkpointing", True)
    each = flops.padded_flops(lengths, model, spec.lora_rank, spec.micro_batch, not ahead, checkpointing, all_rows)
    return [before + each * epoch for epoch in range(spec.epochs + 1)]


def summary(
    spec: RunSpec,
    runs: list[RunResult],
    flop_totals: list[float],
    spans: dict[str, tuple[int, int]],
    peak_flops: float | None,
) -> dict[str, Any]:
    """Medians over the repeats, beside the runs they come from."""
    pairs = {span: spec.pairs * (end - begin) for span, (begin, end) in spans.items()}
    seconds = {name: median(over(span, run.seconds) for run in runs) for name, span in spans.items()}
    work = {name: over(span, flop_totals) / pairs[name] for name, span in spans.items()} if flop_totals else {}
    peak = median(run.peak_memory for run in runs)
    tokens = workload.sequence_tokens(spec.lengths) / spec.pairs
    needed = by_formula(spec, spans, flops.needed_flops)
    return {
        "spec": asdict(spec),
        "seconds_before_training": median(run.seconds[0] for run in runs),
        "seconds": seconds,
        "pairs_per_second": {span: pairs[span] / seconds[span] for span in spans},
        "tokens_per_second": {span: tokens * pairs[span] / seconds[span] for span in spans},
        "flops_per_pair": work,
        "mfu": {span: needed[span] * pairs[span] / seconds[span] / peak_flops for span in spans} if peak_flops else {},
        "peak_memory": peak,
        "added_memory": peak - median(run.baseline_memory for run in runs),
        "runs": [asdict(run) for run in runs],
    }


def ratios(rows: dict[str, dict[str, Any]], spans: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """fastdpo against every contender that ran, then its leanest setting against TRL default."""
    ran = {name: row for name, row in rows.items() if "failed" not in row}
    ours, lean, default = rows["fastdpo"], ran.get("fastdpo leanest"), ran.get("TRL default")
    others = {name: row for name, row in ran.items() if not name.startswith("fastdpo")}
    values: dict[str, float] = {}
    for span in spans:
        words = span_in_words(span)
        if ours["mfu"]:
            values[f"MFU of fastdpo, {words}"] = ours["mfu"][span]
        for name, theirs in others.items():
            values[f"speed of fastdpo / {name}, {words}"] = _speed(ours, theirs, span)
            if ours["flops_per_pair"] and theirs["flops_per_pair"]:
                work = ours["flops_per_pair"][span] / theirs["flops_per_pair"][span]
                values[f"FLOPs of fastdpo / {name}, {words}"] = work
        if lean and default:
            values[f"speed of fastdpo leanest / TRL default, {words}"] = _speed(lean, default, span)
    for name, theirs in others.items():
        values[f"peak memory of fastdpo / {name}"] = ours["peak_memory"] / theirs["peak_memory"]
        values[f"memory added by training, fastdpo / {name}"] = ours["added_memory"] / theirs["added_memory"]
    if lean and default:
        added = lean["added_memory"] / default["added_memory"]
        values["memory added by training, fastdpo leanest / TRL default"] = added
    return [{"name": name, "value": value} for name, value in values.items()]


def _speed(ours: dict[str, Any], theirs: dict[str, Any], span: str) -> float:
    return ours["pairs_per_second"][span] / theirs["pairs_per_second"][span]


def by_formula(spec: RunSpec, spans: dict[str, tuple[int, int]], formula: Any) -> dict[str, float]:
    """FLOPs a pair of a step that runs the reference in the first epoch only."""
    lengths, model = workload.pair_lengths(PROFILES[spec.profile], spec.pairs), MODELS[spec.model]
    first, later = (formula(lengths, model, spec.lora_rank, on) for on in (True, False))
    totals = [0, first, first + later]
    return {name: over(span, totals) / (spec.pairs * (span[1] - span[0])) for name, span in spans.items()}


def rows_for(device: Device, model: Model, profile: workload.Profile, batch: int) -> int:
    """As many pairs as make an epoch of the device's usual work, in whole batches, two at least."""
    pairs = device.work / (model.parameters["total"] * profile.tokens_per_pair)
    return batch * max(2, round(min(pairs, device.most_pairs) / batch))


def describe_workload(spec: RunSpec, repeat: int) -> dict[str, Any]:
    model, lengths = MODELS[spec.model], spec.lengths
    totals = [pair.prompt + side for pair in lengths for side in (pair.chosen, pair.rejected)]
    return {
        "pairs": spec.pairs,
        "epochs": spec.epochs,
        "batch": spec.batch,
        "repeat": repeat,
        "processor_time": spec.processor_time,
        "dtype": DEVICES[spec.device].dtype,
        "learning_rate": model.learning_rate,
        "lora_rank": spec.lora_rank,
        "parameters": model.parameters,
        "vocabulary": model.vocab_size,
        "median_tokens": median(totals),
        "longest": max(totals),
        "max_length": workload.room_for(lengths),
        "prompt_to_response": 2 * sum(p.prompt for p in lengths) / sum(p.chosen + p.rejected for p in lengths),
    }
