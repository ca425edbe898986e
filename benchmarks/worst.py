"""The cases in which fastdpo should gain least: steps that were measured for them, in one table.

Each has a reason that a reader would suspect. A case is known by what ran: profile, pairs a step, whether all weights
train, whether the model packs.
"""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import PROCESSOR_TIME, short_name, table, why_without_number
from benchmarks.models import MODELS
from benchmarks.workload import PROFILES

CASES = {
    ("no-prompt", 8, False, True): "nothing to share, nothing to pad",
    ("short", 8, False, True): "very short rows",
    ("short", 8, True, True): "very short rows and full fine-tuning: an optimizer of all weights",
    ("hh-rlhf", 1, False, True): "one pair a step",
    ("hh-rlhf", 8, False, False): "a model that cannot pack",
}


def case(result: dict[str, Any]) -> str | None:
    """Which of them a result is; None: none."""
    work = result["workload"]
    full, packs = work["lora_rank"] is None, MODELS[result["model"]].packs
    return CASES.get((result["profile"], work["batch"], full, packs))


def render(results: list[dict[str, Any]]) -> str:
    """A row a case: speed of fastdpo, and how many times that of each other contender it is; "" without results."""
    measured = [result for name in CASES.values() for result in results if case(result) == name]
    if not measured:
        return ""
    names = [name for result in measured for name, row in result["configurations"].items() if "failed" not in row]
    others = [name for name in dict.fromkeys(names) if not name.startswith("fastdpo")]
    rows = [[_in_words(result), *_cells(result, others)] for result in measured]
    return table(["", "fastdpo, pairs/s", *(f"times {name}" for name in others)], rows) + f"\n\n{_least(measured)}\n"


def _in_words(result: dict[str, Any]) -> str:
    setting = f"{PROFILES[result['profile']].pairs}; {MODELS[result['model']].title}"
    return f"{case(result)} ({setting}; {short_name(result['machine'])})"


def _cells(result: dict[str, Any], others: list[str]) -> list[str]:
    faster = times_faster(result)
    rows = result["configurations"]
    cells = [f"{rows['fastdpo']['pairs_per_second']['1']:.3g}"]
    for name in others:
        without = why_without_number(rows[name]) if name in rows and name not in faster else ""
        cells.append(f"{faster[name]:.2f}" if name in faster else without)
    return cells


def times_faster(result: dict[str, Any]) -> dict[str, float]:
    """Contender that is not fastdpo -> speed of fastdpo over its own, over one epoch."""
    rows = {name: row for name, row in result["configurations"].items() if "failed" not in row}
    ours = rows["fastdpo"]["pairs_per_second"]["1"]
    return {name: ours / row["pairs_per_second"]["1"] for name, row in rows.items() if not name.startswith("fastdpo")}


def _least(results: list[dict[str, Any]]) -> str:
    """The sentence that a reader looks for, and whose seconds these are."""
    found = [(times, name, case(result)) for result in results for name, times in times_faster(result).items()]
    clock = f" {PROCESSOR_TIME}" if any(result["workload"].get("processor_time") for result in results) else ""
    if not found:
        return f"No other trainer ran beside it.{clock}"
    times, name, where = min(found)
    verb = "gains least" if times >= 1 else "loses most"
    return f"It {verb} here: {where}, {times:.2f} times the speed of {name}.{clock}"
