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
    except Exception as error:  # whatever a renderer makes of a file cut off or of another shape, the run goes on
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
    """A line a stage, then every aim that was missed and every command that did not end well; a line of its own for a
    rerun that found less than the record that it was to replace.
    """
    rows, missed, failed = [], [], []
    for name in stages:
        files = [file for end in ("", ".rerun") if (file := folder / f"gpu-{name}{end}.json").exists()]
        if not files:
            rows.append([f"gpu-{name}", "not run", "", "", "", ""])
        for file in files:
            try:
                row, its_missed, its_failed = _summed_up(json.loads(file.read_text()), folder)
            except Exception as error:  # as in _numbers_of: one record must not cost the page of the others
                row, its_missed, its_failed = ["unknown", "", "", "", ""], [], [_unreadable(file, error)]
            rows.append([file.stem, *row])
            missed += [f"- {file.stem}: {line}" for line in its_missed]
            failed += [f"- {file.stem}: {line}" for line in its_failed]
    pieces = ["# make gpu", table(["stage", "ended", "s", "aims met", "missed", ""], rows)]
    pieces += ["Missed:\n\n" + "\n".join(missed)] * bool(missed) + ["Failed:\n\n" + "\n".join(failed)] * bool(failed)
    return "\n\n".join(pieces) + "\n"


def _summed_up(record: dict[str, Any], folder: Path) -> tuple[list[str], list[str], list[str]]:
    """-> how it ended, seconds, aims met and missed, where and when; the missed aims; the commands that failed."""
    parts = record["parts"]
    bad = [part for part in parts if part["ok"] is False]
    not_run = [part["ended"] for part in parts if part["ok"] is None]
    ended = f"{len(bad)} of {len(parts)} commands failed" if bad else ", ".join(dict.fromkeys(not_run)) or "well"
    files = [folder / part["file"] for part in parts if part.get("file")]
    found = [pair for file in files if file.exists() for pair in verdicts(_numbers_of(file))]
    counts = Counter(verdict for verdict, _ in found)
    aims = [str(counts[word] or "") for word in ("met", "missed")]
    where = f"{record['machine'].get('gpu', '')}, {record['date']}, {record['commit'][:12]}"
    missed = [line.strip("| ") for verdict, line in found if verdict == "missed"]
    failed = [f"`{part['command']}`: {part['ended']}" for part in bad]
    return [ended, f"{record.get('seconds', 0):.0f}", *aims, where], missed, failed


def verdicts(text: str) -> list[tuple[str, str]]:
    """Each aim of rendered numbers: met or missed, and its line. A cell says so, alone or after its number, and of a
    step's parts a sentence. The words may stand anywhere in a log or in a test's message, so those are not asked.
    """
    found = []
    for line in text.splitlines():
        cells = line.strip("| ").split(" | ") if line.startswith("|") else []
        said = [match[1] for cell in cells if (match := re.fullmatch(r"(?:2 x .*, )?(met|missed)", cell))]
        said += re.findall(r"The aim is [^:]*: (met|missed)\.$", line)
        found += [(verdict, line) for verdict in said]
    return found
