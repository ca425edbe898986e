"""Markdown from results/*.json; README.md holds it between two markers and a test holds README.md to it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- begin generated: python -m benchmarks table -->", "<!-- end generated -->"


def render(result: dict[str, Any]) -> str:
    """One result as a heading, the runs, the ratios with their aims, and what the numbers leave out."""
    parts = [_heading(result), _runs(result), _ratios(result), _notes(result)]
    if result["tuning"]:
        parts.insert(3, _tuning(result["tuning"]))
    return "\n\n".join(parts) + "\n"


def _heading(result: dict[str, Any]) -> str:
    work, machine = result["workload"], result["machine"]
    parts = work["parameters"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    changes = " with uncommitted changes" if result["uncommitted_changes"] else ""
    head = "untied" if parts["untied_head"] else "tied to the embedding"
    return (
        f"### A training step on the {result['device'].upper()}\n\n"
        f"Llama of {_million(parts['total'])} parameters ({_million(parts['trunk'])} trunk, "
        f"{_million(parts['embedding'])} embedding over {work['vocabulary']} tokens, head {head}), "
        f"LoRA r={work['lora_rank']} on all linear modules, {work['dtype']}. {work['pairs']} pairs, "
        f"{work['batch']} an optimizer step, {work['median_tokens']:.0f} tokens a sequence (median; longest "
        f"{work['longest']}), prompts {work['prompt_to_response']:.2f} times as long as a response.\n\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; load before the runs "
        f"{result['load_before']:.1f}. Python {result['python']}, {versions}. {result['date']}, commit "
        f"{result['commit'][:12]}{changes}. Medians of {work['repeat']}."
    )


def _runs(result: dict[str, Any]) -> str:
    epochs = list(result["formula_flops_per_pair"])
    spans = [_span(epoch) for epoch in epochs]
    header = ["", *(f"pairs/s, {s}" for s in spans), *(f"GFLOP/pair, {s}" for s in spans), "peak MiB", "added MiB"]
    rows = [
        [
            name,
            *(f"{row['pairs_per_second'][epoch]:.3g}" for epoch in epochs),
            *(f"{row['flops_per_pair'][epoch] / 1e9:.1f}" for epoch in epochs),
            f"{row['peak_rss'] / 2**20:.0f}",
            f"{row['added_rss'] / 2**20:.0f}",
        ]
        for name, row in result["configurations"].items()
    ]
    formula = [f"{value / 1e9:.1f}" for value in result["formula_flops_per_pair"].values()]
    rows.append(["fastdpo, by formula", *[""] * len(epochs), *formula, "", ""])
    return _table(header, rows)


def _ratios(result: dict[str, Any]) -> str:
    rows = [
        [ratio["name"], f"{ratio['value']:.2f}", ratio.get("aim", ""), {True: "met", False: "missed"}[ratio["met"]]]
        if "met" in ratio
        else [ratio["name"], f"{ratio['value']:.2f}", "", ""]
        for ratio in result["ratios"]
    ]
    return _table(["ratio", "measured", "aim", ""], rows)


def _tuning(tuning: list[dict[str, Any]]) -> str:
    rows = [
        [", ".join(f"{name}={value}" for name, value in row["settings"].items()), f"{row['seconds']:.1f}"]
        for row in sorted(tuning, key=lambda row: row["seconds"])
    ]
    return "TRL's settings that were tried, rows sorted by length:\n\n" + _table(["settings", "s, 1 epoch"], rows)


def _notes(result: dict[str, Any]) -> str:
    tuned = ", ".join(f"`{k}={v}`" for k, v in result["configurations"]["TRL tuned"]["spec"]["settings"].items())
    return "\n".join(
        [
            "- Wall time runs from text rows in memory and a built model to a trained model: tokenization, adapters, a "
            "precomputed reference and training count, imports and building the model do not.",
            "- First loss ln 2 and every later loss and gradient norm within 1e-3 of fastdpo's on the same rows in the "
            "same order; without that no number is printed.",
            "- TRL default is TRL 1.16 as it comes (gradient checkpointing on, reference online) in fp32. It runs "
            "one epoch; its later epochs do the same work and count as much as the first.",
            f"- TRL tuned: {tuned}, rows sorted by length. Precomputing the reference counts.",
            "- TRL scores every position through the LM head where it has no Triton, padding and prompt included; on a "
            "GPU it skips them. `response rows only` is TRL told to skip them here too: times and memory measured, "
            "FLOPs by taking the head's products with the other rows off the count.",
            "- fastdpo runs the reference in the first epoch only. FLOPs are counted by torch, in runs of their own; "
            "attention counts as full rectangles for both.",
        ]
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _span(epoch: str) -> str:
    return f"{epoch} epoch" + ("" if epoch == "1" else "s")


def _million(count: int) -> str:
    return f"{count / 1e6:.1f}M"


def generated(folder: Path = RESULTS) -> str:
    """Everything results/ holds, as it stands between the markers."""
    files = sorted(folder.glob("*.json"))
    return "\n".join(render(json.loads(file.read_text())) for file in files) or "No results yet.\n"


def between_markers(readme: str) -> str:
    return readme.split(BEGIN + "\n", 1)[1].split(END, 1)[0]


def main(check: bool) -> int:
    """Writes the tables, or with `check` only says whether they are what results/ holds."""
    readme = README.read_text()
    if check:
        if between_markers(readme) == generated():
            return 0
        print(
            f"error: the tables of {README} are not those of {RESULTS}: run python -m benchmarks table", file=sys.stderr
        )
        return 1
    README.write_text(readme.replace(BEGIN + "\n" + between_markers(readme), BEGIN + "\n" + generated()))
    print(f"tables of {README} written from {RESULTS}")
    return 0
