"""Markdown from results/*.json; two README.md hold it between markers, and a test holds them to it.

Numbers come from the files alone; what is said of a device beside them stands in device.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import kernel_table
from benchmarks.device import CUDA, DEVICES
from benchmarks.markdown import machine_in_words, table, versions_in_words

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
FRONT_PAGE = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- begin generated: python -m benchmarks table -->", "<!-- end generated -->"
LATER = "later"  # the span of all epochs after the first


def render(result: dict[str, Any]) -> str:
    """One result as a heading, the runs, the ratios with their aims, and what the numbers leave out."""
    parts = [_heading(result), _runs(result), _ratios(result), _notes(result)]
    if result["tuning"]:
        parts.insert(3, _tuning(result["tuning"]))
    return "\n\n".join(parts) + "\n"


def _heading(result: dict[str, Any]) -> str:
    work, machine = result["workload"], result["machine"]
    parts = work["parameters"]
    head = "untied" if parts["untied_head"] else "tied to the embedding"
    return (
        f"### A training step on {DEVICES[result['device']].title}\n\n"
        f"Llama of {_million(parts['total'])} parameters ({_million(parts['trunk'])} trunk, "
        f"{_million(parts['embedding'])} embedding over {work['vocabulary']} tokens, head {head}), "
        f"LoRA r={work['lora_rank']} on all linear modules, {work['dtype']}. {work['pairs']} pairs, "
        f"{work['batch']} an optimizer step, {work['median_tokens']:.0f} tokens a sequence (median; longest "
        f"{work['longest']}), prompts {work['prompt_to_response']:.2f} times as long as a response.\n\n"
        f"{machine_in_words(machine)}; load before the runs {result['load_before']:.1f}. {versions_in_words(result)}. "
        f"Medians of {work['repeat']}."
    )


def _runs(result: dict[str, Any]) -> str:
    spans = list(result["formula_flops_per_pair"])
    words = [span_in_words(span) for span in spans]
    header = ["", "s before training", *(f"pairs/s, {s}" for s in words), *(f"GFLOP/pair, {s}" for s in words)]
    rows = [[name, *_run(row, spans)] for name, row in result["configurations"].items()]
    formula = [_giga(value) for value in result["formula_flops_per_pair"].values()]
    rows.append(["fastdpo, by formula", "", *[""] * len(spans), *formula, "", ""])
    return table([*header, "peak MiB", "added MiB"], rows)


def _run(row: dict[str, Any], spans: list[str]) -> list[str]:
    if "failed" in row:
        return ["failed", *[""] * (2 * len(spans) + 2)]
    return [
        f"{row['seconds_before_training']:.1f}",
        *(f"{row['pairs_per_second'][span]:.3g}" for span in spans),
        *(_giga(row["flops_per_pair"][span]) if row["flops_per_pair"] else "" for span in spans),
        f"{row['peak_memory'] / 2**20:.0f}",
        f"{row['added_memory'] / 2**20:.0f}",
    ]


def _ratios(result: dict[str, Any]) -> str:
    rows = [
        [ratio["name"], f"{ratio['value']:.2f}", ratio.get("aim", ""), {True: "met", False: "missed"}[ratio["met"]]]
        if "met" in ratio
        else [ratio["name"], f"{ratio['value']:.2f}", "", ""]
        for ratio in result["ratios"]
    ]
    return table(["ratio", "measured", "aim", ""], rows)


def _tuning(tuning: list[dict[str, Any]]) -> str:
    rows = [
        [", ".join(f"{name}={value}" for name, value in row["settings"].items()), f"{row['seconds']:.1f}"]
        for row in sorted(tuning, key=lambda row: row["seconds"])
    ]
    header = ["settings", f"s, {span_in_words(str(tuning[0]['epochs']))}"]
    return "TRL's settings that were tried, rows sorted by length:\n\n" + table(header, rows)


def _notes(result: dict[str, Any]) -> str:
    device, rows = DEVICES[result["device"]], result["configurations"]
    tuned = ", ".join(f"`{name}={value}`" for name, value in rows["TRL tuned"]["spec"]["settings"].items())
    default = "TRL default is TRL 1.16 as it comes (gradient checkpointing on, reference online)."
    if epochs := rows["TRL default"]["spec"]["stop_after"]:
        default += (
            f" It runs {span_in_words(str(epochs))}; its later epochs do the same work and count as much as the first."
        )
    notes = [
        "Wall time runs from text rows in memory and a built model to a trained model: tokenization, adapters, a "
        "precomputed reference and training count, imports and building the model do not.",
        _gate(result["tolerances"]),
        default,
        f"TRL tuned: {tuned}, rows sorted by length. Precomputing the reference counts.",
        *device.notes,
        "fastdpo runs the reference in the first epoch only. FLOPs are counted by torch, in runs of their own; "
        "attention counts as full rectangles for both.",
        *(f"{name} failed: `{row['failed']}`" for name, row in rows.items() if "failed" in row),
        *(f"FLOPs of {name} could not be counted: `{why}`" for name, why in result["uncounted"].items()),
    ]
    return "\n".join(f"- {note}" for note in notes)


def _gate(tolerances: dict[str, Any]) -> str:
    absolute, relative = tolerances["loss_absolute"], tolerances["loss_relative"]
    loss = [f"{absolute:g}"] * bool(absolute) + [f"{100 * relative:g}%"] * bool(relative)
    return (
        f"First loss within {tolerances['first_loss']:g} of ln 2, every later loss within {' or '.join(loss)} and "
        f"gradient norm within {100 * tolerances['grad_norm_relative']:g}% of fastdpo's on the same rows in the same "
        f"order; without that no number is printed. {tolerances['why']}"
    )


def span_in_words(span: str) -> str:
    return "later epochs" if span == LATER else f"{span} epoch" + ("" if span == "1" else "s")


def _million(count: int) -> str:
    return f"{count / 1e6:.1f}M"


def _giga(count: float) -> str:
    return f"{count / 1e9:.1f}"


def generated(folder: Path = RESULTS) -> str:
    """A table for each file of results/, and what no file holds yet, as it stands between the markers."""
    parts = [render(_read(file)) for file in sorted(folder.glob("step-*.json"))]
    parts += [kernel_table.render(_read(file)) for file in sorted(folder.glob("kernels-*.json"))]
    missing = [device.unmeasured for device in DEVICES.values() if not (folder / f"step-{device.name}.json").exists()]
    kernels = [device for device in DEVICES.values() if not (folder / f"kernels-{device.name}.json").exists()]
    if missing or kernels:
        lines = [f"- {text}" for text in (*missing, *(device.kernels.unmeasured for device in kernels))]
        parts.append("\n".join(["### Not yet measured\n", *lines]) + "\n")
    parts += [kernel_table.predictions(device) for device in kernels if device.kernels.expected]
    return "\n".join(parts)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def summary(folder: Path = RESULTS) -> str:
    """The front page's tables: each file's runs in one line each, without their details, and a GPU's kernels."""
    parts = []
    for file in sorted(folder.glob("step-*.json")):
        result = _read(file)
        work, machine = result["workload"], result["machine"]
        spans = list(result["formula_flops_per_pair"])
        rows = [[name, *_run(row, spans)[1:-1]] for name, row in result["configurations"].items()]
        words = [span_in_words(span) for span in spans]
        header = ["", *(f"pairs/s, {s}" for s in words), *(f"GFLOP/pair, {s}" for s in words), "peak MiB"]
        parts.append(
            f"{_million(work['parameters']['total'])} Llama, LoRA r={work['lora_rank']}, {work['dtype']}, pairs as "
            f"long as HH-RLHF's, {machine_in_words(machine)}, {result['date']}:\n\n{table(header, rows)}\n"
        )
    if (kernels := folder / f"kernels-{CUDA.name}.json").exists():
        parts.append(kernel_table.summary(_read(kernels)))
    return "\n".join(parts)


def between_markers(readme: str) -> str:
    return readme.split(BEGIN + "\n", 1)[1].split(END, 1)[0]


def main(check: bool) -> int:
    """Writes the tables of both pages, or with `check` only says whether they are what results/ holds."""
    drifted = 0
    for page, text in ((README, generated()), (FRONT_PAGE, summary())):
        readme = page.read_text()
        if check and between_markers(readme) != text:
            drifted = 1
            print(f"error: {page} has other tables than {RESULTS}: run python -m benchmarks table", file=sys.stderr)
        elif not check:
            page.write_text(readme.replace(BEGIN + "\n" + between_markers(readme), BEGIN + "\n" + text))
            print(f"tables of {page} written from {RESULTS}")
    return drifted
