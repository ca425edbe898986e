"""What the kernel benchmarks write down: a row for each contender, with its numbers or the reason why it has none."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.provenance import save
from benchmarks.roofline import Ceilings, Work


@dataclass
class Row:
    """One contender at one task. Seconds and bytes."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    wants: str
    contender: str
    path: str = ""
    version: str = ""
    reason: str | None = None  # why there are no numbers
    errors: dict[str, float] = field(default_factory=dict)
    laps: list[list[float]] = field(default_factory=list)  # seconds of each round
    peak_bytes: int | None = None  # beyond the inputs, results included
    result_bytes: int | None = None
    launches: list[tuple[str, int, float]] = field(default_factory=list)  # kernel, times, microseconds in all
    seconds_in_graph: float | None = None
    graph_error: str | None = None  # why it cannot be captured
    work: Work | None = None

    def summary(self, ceilings: Ceilings) -> dict[str, Any]:
        """As it stands in the file."""
        rounds = [seconds for lap in self.laps for seconds in lap]
        row = {**asdict(self), "rounds": len(rounds)}
        row["laps"] = [median(lap) for lap in self.laps]
        row["median"] = median(rounds) if rounds else None
        row["iqr"] = _interquartile_range(rounds)
        least = self.work.seconds(ceilings) if self.work else None
        row["roofline_seconds"] = least
        row["of_roofline"] = least / row["median"] if least and row["median"] else None
        return row


def _interquartile_range(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


class Results:
    """All rows of a session. Without a file they are measured all the same, and forgotten."""

    def __init__(self, origin: dict[str, Any], ceilings: Ceilings, file: Path | None) -> None:
        self._origin, self.ceilings, self._file = origin, ceilings, file
        self._rows: dict[tuple[Any, ...], Row] = {}
        self.heads: list[dict[str, Any]] = []  # what the random data of each shape turned out to be

    def row(self, op: str, shape: tuple[int, ...], dtype: str, wants: str, contender: str) -> Row:
        """The row of these, new where there is none."""
        key = (op, shape, wants, contender)
        return self._rows.setdefault(key, Row(op, shape, dtype, wants, contender))

    def save(self) -> None:
        """After every row, so that a run which is cut short leaves what it had."""
        if self._file is None:
            return
        rows = [row.summary(self.ceilings) for row in self._rows.values()]
        result = {"benchmark": "kernels", **self._origin, "ceilings": asdict(self.ceilings), "heads": self.heads}
        save(self._file, {**result, "rows": rows})
