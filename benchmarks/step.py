"""fastdpo against TRL 1.16 on the same rows: pairs a second, FLOPs a pair, peak resident memory.

Runs alternate, each in a fresh process. Numbers count only when the loss curves agree: a mismatch is an error. FLOPs
come from runs of their own, because counting slows them. TRL takes part three ways: as it comes, tuned, and both again
with its CPU head told to skip the rows it need not score (`_RESPONSE_ROWS`), which it does on a GPU but not here.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from argparse import Namespace
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import flops, workload
from benchmarks.run import LEARNING_RATE, LORA_RANK, RunResult, RunSpec

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
LN2 = math.log(2)
FIRST_LOSS_TOLERANCE = 1e-5
CURVE_TOLERANCE = 1e-3  # relative, losses and gradient norms
LEAST_MOVEMENT = 2e-3  # three times what CURVE_TOLERANCE forgives at ln 2
# Pairs a micro-batch of TRL tuned, of an optimizer batch of 8. Seconds of one epoch (16 pairs, one run each, 1 thread
# on a shared 2-core Xeon, 2026-11-22): 1: 30.0, 2: 30.2, 4: 34.0, 8: 72.6; 2 with the reference online: 28.0.
# `--tune` measures them again and takes the fastest.
TUNED_MICRO_BATCH = 2

# name -> (aim, whether larger is better); {n} is the number of epochs
AIMS = {
    "speed of fastdpo / TRL default": (2.5, True),
    "speed of fastdpo / TRL tuned": (1.6, True),
    "FLOPs of fastdpo / TRL default, 1 epoch": (0.32, False),
    "FLOPs of fastdpo / TRL default, 3 epochs": (0.23, False),
    "peak memory of fastdpo / TRL default": (0.6, False),
}


class CurvesDiffer(RuntimeError):
    """Two trainers that should compute the same numbers did not, so no time of theirs can be compared."""


def configurations(pairs: int, epochs: int, batch: int, threads: int, tuned: dict[str, Any]) -> dict[str, RunSpec]:
    """The runs that are timed. TRL default's epochs all do the same work, so only one is run."""
    base = RunSpec(trainer="fastdpo", pairs=pairs, epochs=epochs, batch=batch, threads=threads)
    default = replace(base, trainer="trl", stop_after=1)
    best = replace(base, trainer="trl", settings=tuned, longest_first=True)
    return {
        "fastdpo": base,
        "TRL default": default,
        "TRL tuned": best,
        "TRL default, response rows only": replace(default, response_rows_only=True),
        "TRL tuned, response rows only": replace(best, response_rows_only=True),
    }


def tuned_settings(batch: int, micro_batch: int, precompute: bool = True) -> dict[str, Any]:
    return {
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": precompute,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": batch // micro_batch,
    }


def main(options: Namespace) -> int:
    """Runs everything, writes the JSON, prints the table; 1 where the trainers disagree."""
    from benchmarks.table import render

    try:
        result = measure(options)
    except CurvesDiffer as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = json.dumps(result, indent=1) + "\n"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(render(json.loads(text)))  # what the file says, nothing else
    print(f"written to {options.output}")
    return 0


def measure(options: Namespace) -> dict[str, Any]:
    origin = provenance(options)  # before the runs: the commit and the load they started from
    pairs, epochs, batch, threads = options.pairs, options.epochs, options.batch, options.threads
    tuned = tuned_settings(batch, min(TUNED_MICRO_BATCH, batch))
    tuning: list[dict[str, Any]] = []
    if options.tune:
        tuning = search_tuned(RunSpec("trl", pairs, epochs, batch, longest_first=True, stop_after=1, threads=threads))
        tuned = min(tuning, key=lambda row: row["seconds"])["settings"]
    specs = configurations(pairs, epochs, batch, threads, tuned)
    runs: dict[str, list[RunResult]] = {name: [] for name in specs}
    counts: dict[str, RunResult] = {}

    for name in ("fastdpo", "TRL default", "TRL tuned"):
        stop = None if name == "fastdpo" else 1
        counts[name] = in_own_process(name, replace(specs[name], count_flops=True, stop_after=stop), ", counting FLOPs")
    sorted_curve = in_own_process("fastdpo, longest first", replace(specs["fastdpo"], longest_first=True))
    for repeat in range(options.repeat):
        for name, spec in specs.items():
            runs[name].append(in_own_process(name, spec, f" {repeat + 1}/{options.repeat}"))
            check_curves(name, runs[name][-1], sorted_curve if spec.longest_first else runs["fastdpo"][0])

    rows = {name: summary(specs[name], runs[name], flops_at(specs[name], counts, name)) for name in specs}
    return {
        "benchmark": "step",
        "device": options.device,
        **origin,
        "workload": describe_workload(options),
        "configurations": rows,
        "tuning": tuning,
        "formula_flops_per_pair": formula_per_pair(pairs, epochs),
        "ratios": ratios(rows, epochs),
    }


def search_tuned(base: RunSpec) -> list[dict[str, Any]]:
    """Seconds of TRL's first epoch over splits of the optimizer batch, with the reference ahead or online."""
    splits = [size for size in (base.batch, base.batch // 2, base.batch // 4, 1) if size and base.batch % size == 0]
    found = []
    for precompute, micro_batch in [(True, size) for size in dict.fromkeys(splits)] + [(False, TUNED_MICRO_BATCH)]:
        settings = tuned_settings(base.batch, min(micro_batch, base.batch), precompute)
        result = in_own_process(f"TRL with {settings}", replace(base, settings=settings))
        found.append({"settings": settings, "seconds": result.seconds[1], "peak_rss": result.peak_rss})
    return found


def in_own_process(name: str, spec: RunSpec, note: str = "") -> RunResult:
    """One run in a fresh interpreter. This process imports no torch: a child starts with its parent's peak memory."""
    print(f"{name}{note} ...", end=" ", file=sys.stderr, flush=True)
    environment = os.environ | {
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
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the run of {name} ended with {done.returncode}: {done.stderr[-3000:]}")
        result = RunResult(**json.loads(result_file.read_text()))
    print(f"{result.seconds[-1]:.1f} s, {result.peak_rss / 2**20:.0f} MiB", file=sys.stderr, flush=True)
    return result


def check_curves(name: str, run: RunResult, reference: RunResult) -> None:
    """Equal losses and gradient norms step by step, from ln 2, of a curve that moved (else it proves nothing)."""
    if abs(run.losses[0] - LN2) > FIRST_LOSS_TOLERANCE:
        raise CurvesDiffer(f"{name}: the first loss is {run.losses[0]!r}, expected ln 2 = {LN2:.7f}")
    for label, ours, theirs in (
        ("loss", run.losses, reference.losses),
        ("grad_norm", run.grad_norms, reference.grad_norms),
    ):
        for step, (mine, other) in enumerate(zip(ours, theirs, strict=False), start=1):  # one may have stopped earlier
            if not abs(mine - other) <= CURVE_TOLERANCE * abs(other):  # also false for NaN
                raise CurvesDiffer(f"{name}: {label} of step {step} is {mine!r}, fastdpo's is {other!r}")
    if max(abs(loss - LN2) for loss in reference.losses) < LEAST_MOVEMENT:
        raise CurvesDiffer(
            f"no loss of fastdpo left ln 2 by {LEAST_MOVEMENT}, so equal curves show nothing: take more steps"
        )


def at_epoch(totals: list[float], epoch: int) -> float:
    """The running total after `epoch`; beyond what was run, every further epoch costs what the last one did."""
    if epoch < len(totals):
        return totals[epoch]
    return totals[-1] + (epoch - len(totals) + 1) * (totals[-1] - totals[-2])


def flops_at(spec: RunSpec, counts: dict[str, RunResult], name: str) -> list[float]:
    """Counted FLOPs after 0, 1, .. epochs; for response rows only, less the head's products with other rows."""
    counted: list[float] = list(counts[name.split(",")[0]].flops)
    totals = [counted[0]] + [at_epoch(counted, epoch) for epoch in range(1, spec.epochs + 1)]
    if not spec.response_rows_only:
        return totals
    lengths = workload.pair_lengths(spec.pairs)
    if spec.longest_first:
        lengths = [lengths[i] for i in workload.longest_first(lengths)]
    micro_batch = spec.settings.get("per_device_train_batch_size", spec.batch)
    idle = flops.padded_positions(lengths, micro_batch) - sum(pair.chosen + pair.rejected for pair in lengths)
    config = workload.model_config()
    reference, policy = flops.head_flops(config, idle, 1), flops.head_flops(config, idle, 3)
    if spec.settings.get("precompute_ref_log_probs"):
        return [total - reference - policy * epoch for epoch, total in enumerate(totals)]
    return [total - (reference + policy) * epoch for epoch, total in enumerate(totals)]


def summary(spec: RunSpec, runs: list[RunResult], flop_totals: list[float]) -> dict[str, Any]:
    """Medians over the repeats, beside the runs they come from."""
    epochs = sorted({1, spec.epochs})
    seconds = {epoch: median(at_epoch(run.seconds, epoch) for run in runs) for epoch in epochs}
    peak = median(run.peak_rss for run in runs)
    return {
        "spec": asdict(spec),
        "seconds": seconds,
        "pairs_per_second": {epoch: spec.pairs * epoch / seconds[epoch] for epoch in epochs},
        "flops_per_pair": {epoch: flop_totals[epoch] / (spec.pairs * epoch) for epoch in epochs},
        "peak_rss": peak,
        "added_rss": peak - median(run.baseline_rss for run in runs),
        "runs": [asdict(run) for run in runs],
    }


def ratios(rows: dict[str, dict[str, Any]], epochs: int) -> list[dict[str, Any]]:
    """fastdpo against every TRL configuration; an aim is attached where there is one."""
    ours, found = rows["fastdpo"], []
    for epoch in sorted({1, epochs}):
        span = f"{epoch} epoch" + ("s" if epoch > 1 else "")
        for name in list(rows)[1:]:
            theirs = rows[name]
            speed = ours["pairs_per_second"][epoch] / theirs["pairs_per_second"][epoch]
            work = ours["flops_per_pair"][epoch] / theirs["flops_per_pair"][epoch]
            found.append(_ratio(f"speed of fastdpo / {name}, {span}", speed))
            found.append(_ratio(f"FLOPs of fastdpo / {name}, {span}", work))
    for name in list(rows)[1:]:
        found.append(_ratio(f"peak memory of fastdpo / {name}", ours["peak_rss"] / rows[name]["peak_rss"]))
        found.append(_ratio(f"memory added by training, fastdpo / {name}", ours["added_rss"] / rows[name]["added_rss"]))
    return found


def _ratio(name: str, value: float) -> dict[str, Any]:
    aim = AIMS.get(name) or (AIMS.get(name.rsplit(",", 1)[0]) if name.startswith("speed") else None)
    if aim is None:
        return {"name": name, "value": value}
    bound, larger = aim
    return {
        "name": name,
        "value": value,
        "aim": f"{'>=' if larger else '<='} {bound}",
        "met": value >= bound if larger else value <= bound,
    }


def formula_per_pair(pairs: int, epochs: int) -> dict[int, float]:
    """What the packed step should cost: the reference runs in the first epoch only."""
    lengths, config = workload.pair_lengths(pairs), workload.model_config()
    first = flops.formula_flops(lengths, config, LORA_RANK, reference=True)
    later = flops.formula_flops(lengths, config, LORA_RANK, reference=False)
    return {epoch: (first + (epoch - 1) * later) / (pairs * epoch) for epoch in sorted({1, epochs})}


def describe_workload(options: Namespace) -> dict[str, Any]:
    lengths, config = workload.pair_lengths(options.pairs), workload.model_config()
    totals = [pair.prompt + side for pair in lengths for side in (pair.chosen, pair.rejected)]
    return {
        "pairs": options.pairs,
        "epochs": options.epochs,
        "batch": options.batch,
        "repeat": options.repeat,
        "dtype": "float32",
        "learning_rate": LEARNING_RATE,
        "lora_rank": LORA_RANK,
        "parameters": workload.parameter_counts(config),
        "vocabulary": config.vocab_size,
        "median_tokens": median(totals),
        "longest": max(totals),
        "prompt_to_response": 2 * sum(p.prompt for p in lengths) / sum(p.chosen + p.rejected for p in lengths),
    }


def provenance(options: Namespace) -> dict[str, Any]:
    """Machine, versions and commit: a number without them does not exist."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "HEAD") or "none",
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "fastdpo", "kernels", "benchmarks/*.py")),
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": options.threads},
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "load_before": os.getloadavg()[0],  # other work on the machine is in every wall time
    }


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
