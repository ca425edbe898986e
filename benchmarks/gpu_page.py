"""The pages of `make gpu`, from what its stages wrote down: one of a stage, one over all."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import explore, kernel_table, tune
from benchmarks.device import DEVICES
from benchmarks.markdown import machine_in_words, table, versions_in_words
from benchmarks.outcomes import NOT_REACHED
from benchmarks.table import RENDER
from benchmarks.table import render as render_step

UNREADABLE = (json.JSONDecodeError, KeyError)  # no whole JSON, or not what its benchmark writes
MOST = 25  # failed tests that a page has room for


def page(record: dict[str, Any], folder: Path) -> str:
    """How each command ended, the numbers with their aims, and what failed and why."""
    rows = [[f"`{part['command']}`", _ended(part), f"{part.get('seconds', 0):.0f}"] for part in record["parts"]]
    pieces = [
        f"# gpu-{record['stage']}: {record['measures']}",
        f"{machine_in_words(record['machine'])}. {versions_in_words(record)}. {record.get('seconds', 0):.0f} s.",
        table(["command", "ended", "s"], rows),
        *(text for part in record["parts"] for text in _found(part, folder)),
    ]
    return "\n\n".join(pieces) + "\n"


def _ended(part: dict[str, Any]) -> str:
    return f"**{part['ended']}**" if part["ok"] is False else part["ended"]


def _found(part: dict[str, Any], folder: Path) -> list[str]:
    pieces = [tests_in_words(part["tests"])] if part.get("tests") else []
    if part.get("file") and (folder / part["file"]).exists():
        pieces.append(_numbers_of(folder / part["file"]))
    if part.get("output") and not part.get("tests"):
        pieces.append("```\n" + "\n".join(part["output"].strip().splitlines()[-15:]) + "\n```")
    return pieces


def _numbers_of(file: Path) -> str:
    try:
        return numbers(json.loads(file.read_text())).rstrip()
    except UNREADABLE as error:
        return f"**{_unreadable(file, error)}**"


def _unreadable(file: Path, error: Exception) -> str:
    return f"{file.name} cannot be read ({type(error).__name__}: {error}): run its command again"


def tests_in_words(rows: Sequence[dict[str, Any]]) -> str:
    """How many passed, why others were skipped, which failed, and the figures that they noted."""
    counts = Counter(row["outcome"] for row in rows)
    skipped = Counter(row["reason"] for row in rows if row["outcome"] == "skipped")
    failed = [row for row in rows if row["outcome"] not in ("passed", "skipped", NOT_REACHED)]
    lines = [f"{rows[0]['test'].split('::')[0]}: {', '.join(f'{n} {outcome}' for outcome, n in counts.items())}."]
    lines += [f"- skipped {count}: {reason}" for reason, count in skipped.most_common()]
    lines += [f"- {row['outcome']}: `{row['test'].split('::', 1)[-1]}`: {row['reason']}" for row in failed[:MOST]]
    lines += [f"- and {len(failed) - MOST} more"] * (len(failed) > MOST)
    for row in rows:
        figures = ", ".join(f"{name} {value}" for name, value in row["figures"].items())
        lines += [f"- `{row['test'].split('::', 1)[-1]}`: {figures}"] if figures else []
    return "\n".join(lines)


def numbers(result: dict[str, Any]) -> str:
    """A result file's tables; of many kernels only where fastdpo stands."""
    if result["benchmark"] == "kernels":
        return "\n\n".join(filter(None, [_kernels(result), kernel_table.aims(result, DEVICES[result["device"]])]))
    by_kind = {**RENDER, "step": render_step, "tune": tune.render, "explore": explore.render}
    return by_kind[result["benchmark"]](result)


def _kernels(result: dict[str, Any]) -> str:
    """A row a task: fastdpo's fastest and the fastest of the others."""
    tasks: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        tasks.setdefault((row["op"], "x".join(map(str, row["shape"])), row["wants"]), []).append(row)
    lines = []
    for task, rows in tasks.items():
        measured = sorted((row for row in rows if row["median"] is not None), key=lambda row: row["median"])
        ours = [row for row in measured if row["contender"].startswith("fastdpo")]
        others = [row for row in measured if row not in ours]
        lines.append([", ".join(task), *_time(ours[:1]), *_time(others[:1])])
    reasons: dict[str, dict[str, None]] = {}
    for row in result["rows"]:
        if row["median"] is None:
            reasons.setdefault(row["reason"] or "not run", {})[row["contender"]] = None
    header = ["", "fastdpo", "ms", "% of the roofline", "fastest other", "ms", "% of the roofline"]
    return "\n".join([table(header, lines), "", *(f"- {', '.join(who)}: {why}." for why, who in reasons.items())])


def _time(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["none", "", ""]
    share = rows[0]["of_roofline"]
    return [rows[0]["contender"], f"{1e3 * rows[0]['median']:.3g}", f"{100 * share:.0f}" if share else ""]


def over_all(stages: Sequence[str], folder: Path) -> str:
    """A line a stage, then every aim that was missed and every command that did not end well."""
    rows, missed, failed = [], [], []
    for name in stages:
        if not (file := folder / f"gpu-{name}.json").exists():
            rows.append([f"gpu-{name}", "not run", "", "", "", ""])
            continue
        try:
            record = json.loads(file.read_text())
            text = page(record, folder)
        except UNREADABLE as error:
            rows.append([f"gpu-{name}", "unknown", "", "", "", ""])
            failed.append(f"- gpu-{name}: {_unreadable(file, error)}")
            continue
        verdicts = Counter(re.findall(r"\b(met|missed)\b", text))
        bad = [part for part in record["parts"] if part["ok"] is False]
        not_run = [part["ended"] for part in record["parts"] if part["ok"] is None]
        ended = (
            f"{len(bad)} of {len(record['parts'])} commands failed"
            if bad
            else ", ".join(dict.fromkeys(not_run)) or "well"
        )
        where = f"{record['machine'].get('gpu', '')}, {record['date']}, {record['commit'][:12]}"
        aims = [str(verdicts[word] or "") for word in ("met", "missed")]
        rows.append([f"gpu-{name}", ended, f"{record.get('seconds', 0):.0f}", *aims, where])
        missed += [f"- gpu-{name}: {line.strip('| ')}" for line in text.splitlines() if re.search(r"\bmissed\b", line)]
        failed += [f"- gpu-{name}: `{part['command']}`: {part['ended']}" for part in bad]
    pieces = ["# make gpu", table(["stage", "ended", "s", "aims met", "missed", ""], rows)]
    pieces += ["Missed:\n\n" + "\n".join(missed)] * bool(missed) + ["Failed:\n\n" + "\n".join(failed)] * bool(failed)
    return "\n\n".join(pieces) + "\n"
