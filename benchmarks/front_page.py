"""The measured parts of the front page: a claim, and tables of steps, of kernels and of what gains least.

A step's numbers are of one epoch, the reference included. Where a GPU was measured, it makes the claim and the table of
kernels; until then a CPU does, and says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import memory_table, picture, worst
from benchmarks.device import CPU, CUDA
from benchmarks.kernel_table import front_table
from benchmarks.markdown import commit_in_words, machine_in_words, short_name, table, why_without_number
from benchmarks.models import MODELS
from benchmarks.provenance import load
from benchmarks.table import in_order
from benchmarks.table import kernels as kernel_results
from benchmarks.workload import PROFILES

ADDRESS = "benchmarks/results/"  # of the pictures, seen from the front page
NO_GPU = "No GPU has been measured yet."
Result = dict[str, Any]


def steps(folder: Path) -> list[Result]:
    return [load(file) for file in in_order("step", folder)]


def claim(folder: Path) -> str:
    """One sentence with its numbers, the closest rival first: the first planned step on a GPU, or else on a CPU."""
    usual = [result for result in steps(folder) if not worst.case(result)]
    usual.sort(key=lambda result: result["device"] != CUDA.name)
    compared = next((result for result in usual if worst.times_faster(result)), None)
    if compared is None:
        return "No step has been measured against another trainer yet.\n"
    faster, rows = worst.times_faster(compared), compared["configurations"]
    closest = min(faster, key=lambda name: faster[name])
    rivals = [name for name in dict.fromkeys([closest, "TRL tuned", "TRL default"]) if name in faster]
    first, *others = [f"{faster[name]:.1f} times as {_IN_FULL.get(name, name)}" for name in rivals]
    speeds = _listed([first.replace(" times as ", " times as fast as ", 1), *others])
    share = rows["fastdpo"]["peak_memory"] / rows[rivals[0]]["peak_memory"]
    text = (
        f"**{speeds}, in {share:.2f} of the memory of the first, with the same loss curve**: one epoch of "
        f"{_setting(compared)}, on {short_name(compared['machine'])}."
    )
    return text + ("\n" if compared["device"] == CUDA.name else f" {NO_GPU}\n")


_IN_FULL = {
    "TRL default": "TRL 1.16 as it comes",
    "TRL tuned, response rows only": "TRL 1.16 tuned and told to score response rows only",
}


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:])


def _setting(result: Result) -> str:
    """Model, what trains and pairs."""
    title, work = MODELS[result["model"]].title, result["workload"]
    batch = "" if work["batch"] == 8 else f", {work['batch']} a step"
    trains = f"LoRA r={work['lora_rank']}" if work["lora_rank"] else "all weights"
    return f"{title}, {trains}, {PROFILES[result['profile']].pairs}{batch}"


def speed(folder: Path) -> str:
    """A row a machine, model and profile; then what the machines are."""
    results = [result for result in steps(folder) if not worst.case(result)]
    if not results:
        return "Nothing has been measured yet.\n"
    results.sort(key=lambda result: result["device"] == CPU.name)  # GPUs first
    header = ["", "fastdpo", "TRL default", "TRL tuned", "others"]
    return f"{table(header, [_row(result) for result in results])}\n\n{provenance(results)}\n"


def _row(result: Result) -> list[str]:
    rows = result["configurations"]
    named = ("fastdpo", "TRL default", "TRL tuned")
    others = [f"{name}: {_cell(result, name)}" for name in rows if name not in named]
    where = f"{short_name(result['machine'])}, {result['workload']['dtype']}"
    setting = _setting(result)
    return [
        f"{setting[0].upper()}{setting[1:]}; {where}",
        *(_cell(result, name) for name in named),
        "<br>".join(others),
    ]


def _cell(result: Result, name: str) -> str:
    """Pairs a second, how many times as fast fastdpo is, peak memory; fastdpo's own with MFU."""
    row = result["configurations"].get(name)
    if row is None:
        return ""
    if "failed" in row:
        return why_without_number(row)
    pairs, memory = f"{row['pairs_per_second']['1']:.3g}", f"{row['peak_memory'] / 2**30:.1f} GiB"
    if name == "fastdpo":
        share = f", MFU {100 * row['mfu']['1']:.0f}%" if row.get("mfu") else ""
        return f"**{pairs}**, {memory}{share}"
    ours = result["configurations"]["fastdpo"]["pairs_per_second"]["1"]
    return f"{pairs} ({ours / row['pairs_per_second']['1']:.1f}x), {memory}"


def provenance(results: Iterable[Result]) -> str:
    """Each machine once, with all versions, dates and commits that its results have."""
    machines: dict[str, list[Result]] = {}
    for result in results:
        machines.setdefault(machine_in_words(result["machine"]), []).append(result)
    return " ".join(f"{machine}: {_origins(found)}." for machine, found in machines.items())


def _origins(results: list[Result]) -> str:
    versions: dict[str, dict[str, None]] = {}
    for result in results:
        for name, number in {"Python": result["python"], **result["versions"]}.items():
            if number != "not installed":
                versions.setdefault(name, {})[number] = None
    packages = ", ".join(f"{name} {' and '.join(numbers)}" for name, numbers in versions.items())
    dates = sorted({result["date"] for result in results})
    commits = dict.fromkeys(map(commit_in_words, results))
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{packages}; {when}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}"


def longest_pair(folder: Path) -> str:
    """The picture, measured if it was, and what it shows."""
    found = memory_table.pictures(folder)
    file = next((file for file in found if file.name == memory_table.file_name(CUDA.name, memory_table.MODEL)), None)
    file = file or next((file for file in found if file.name == memory_table.plan_file(memory_table.MODEL)), None)
    if file is None:
        return "Neither measured nor predicted yet (`python -m benchmarks memory`).\n"
    result = load(file)
    image = picture.markdown(ADDRESS + file.stem, found[file][0])
    if not result["measured"]:
        return (
            f"{image}\n\nPredicted by `fastdpo plan`, not measured: gradient checkpointing, activation offloading, NF4 "
            "weights with double quantisation. Unsloth's numbers are its documentation's, for one sequence and not a "
            "pair, at rank 32.\n"
        )
    return (
        f"{image}\n\nMeasured on a card made smaller: {provenance([result])} fastdpo with gradient checkpointing and "
        "activation offloading, NF4 weights with double quantisation; TRL's DPOTrainer with the same model. Unsloth's "
        "numbers are its documentation's, for one sequence and not a pair, at rank 32.\n"
    )


def kernels(folder: Path) -> str:
    """A GPU's, or until one is measured a CPU's: plain torch, and only of what a run there takes."""
    for device in (CUDA, CPU):
        if results := kernel_results(device, folder):
            rows = [row for result in results for row in result["rows"]]
            plain = ""
            if device is CPU:
                rows = [row for row in rows if row["op"] in ("linear_logps", "pair_loss")]
                plain = "Plain torch on a CPU, where no Triton kernel runs and blocks stay the model's own. "
            return f"{front_table(rows, device)}\n\n{plain}{provenance(results)}\n"
    return "Not measured yet.\n"


def gains_least(folder: Path) -> str:
    measured = [result for result in steps(folder) if worst.case(result)]
    return f"{worst.render(measured)}\n{provenance(measured)}\n" if measured else "Not measured yet.\n"


BLOCKS = {"claim": claim, "speed": speed, "longest pair": longest_pair, "kernels": kernels, "worst": gains_least}
