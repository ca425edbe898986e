"""Pieces of the generated pages that all results share."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.device import DEVICES
from benchmarks.models import MODELS
from benchmarks.workload import PROFILES

PROCESSOR_TIME = "Seconds are the processor's, of one thread, as other programs used the machine, too."


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def why_without_number(row: dict[str, Any]) -> str:
    """A contender's row without one: who was not tried did not fail."""
    return next((why for why in ("not installed", "not run") if row["failed"].startswith(why)), "failed")


def short_name(machine: dict[str, Any]) -> str:
    """Its GPU, or what was used of its processor."""
    cpu = re.sub(r"\(R\)|\(TM\)| Processor| CPU", "", machine["cpu"])
    return machine.get("gpu") or f"{_counted(machine['threads'], 'core')} of an {cpu}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def machine_in_words(machine: dict[str, Any]) -> str:
    counts = f"{_counted(machine['cores'], 'core')}, {_counted(machine['threads'], 'thread')}"
    processor = f"{machine['cpu']}, {counts}"
    if "gpu" not in machine:
        return processor
    memory = f"{machine['gpu_memory'] / 2**30:.0f} GiB"
    return f"{machine['gpu']}, {memory}, driver {machine['driver']}, CUDA {machine['cuda']}; {processor}"


def versions_in_words(result: dict[str, Any]) -> str:
    """Python, packages, date and commit."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"Python {result['python']}, {versions}. {result['date']}, commit {commit_in_words(result)}"


def commit_in_words(result: dict[str, Any]) -> str:
    changes = {True: " with uncommitted changes", False: "", None: " (uncommitted changes unknown)"}
    return result["commit"][:12] + changes[result["uncommitted_changes"]]


def setting_in_words(result: dict[str, Any]) -> str:
    """Of a result about fastdpo alone: the end of its heading, and what ran where."""
    work, device = result["workload"], DEVICES[result["device"]]
    return (
        f"{device.title}: {MODELS[result['model']].title}, {PROFILES[result['profile']].pairs}\n\n"
        f"{machine_in_words(result['machine'])}. {versions_in_words(result)}. {work['pairs']} pairs, "
        f"{work['batch']} an optimizer step, LoRA, {device.dtype}."
    )
