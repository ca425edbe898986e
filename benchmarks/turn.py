"""A contender's turn: checked first, then measured; whoever fails keeps a row that says why, and no number.

Contenders of one task take turns in laps, so that a GPU which gets slower as it gets warm does so for all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contenders import Unavailable, is_own
from benchmarks.device import KernelBench
from benchmarks.measure import Call, Meter, median_seconds
from benchmarks.record import Row

MOST_ROUNDS = 50
SLOW = 1.0  # seconds of a round, from which on one a lap is enough


class Wrong(Exception):
    """Results too far from the truth to be worth a time."""


def take_turn(
    benchmark: Any,
    row: Row,
    meter: Meter,
    bench: KernelBench,
    deadline: float,
    first: Callable[[], Call],
    iterations: int = 1,
) -> None:
    """One lap of one contender: `iterations` calls a round. `first` builds and checks what is timed, once.

    A single call starts with `meter.prepare`; calls in a row follow each other as they come.
    """
    benchmark.group = " ".join([row.op, "x".join(map(str, row.shape)), row.wants])
    if row.reason is None:
        row.reason = _no_turn(meter, deadline)
    if row.reason is None:
        try:
            call = first()
            setup = meter.prepare if iterations == 1 else None
            rounds = _rounds(call, meter, bench, iterations)  # warms up, too
            benchmark.pedantic(call, setup=setup, rounds=rounds, iterations=iterations)
            if benchmark.stats is not None:  # None with --benchmark-disable
                row.laps.append(list(benchmark.stats.stats.data))
        except Exception as error:
            row.reason, row.laps = in_words(error), []
            if is_own(row.contender) and not isinstance(error, Unavailable):
                meter.recover()
                raise
        if row.reason is not None:
            meter.recover()  # now that nothing holds the failed call's tensors
    if row.reason is not None:
        pytest.skip(row.reason)
    benchmark.extra_info.update(path=row.path, version=row.version, errors=row.errors, peak_bytes=row.peak_bytes)


def _no_turn(meter: Meter, deadline: float) -> str | None:
    if meter.dead:
        return f"not run: the GPU stopped answering before ({meter.dead})"
    return "not run: the time for all of them was used up" if time.monotonic() > deadline else None


def _rounds(call: Call, meter: Meter, bench: KernelBench, iterations: int) -> int:
    once = iterations * median_seconds(meter, call, rounds=1, warmup=0)
    least = bench.least_rounds if once < SLOW else 1
    return min(MOST_ROUNDS, max(least, math.ceil(bench.seconds / once)))


def in_words(error: Exception) -> str:
    if isinstance(error, Unavailable | Wrong):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:200]}"


def check(row: Row, found: dict[str, float], allowed: dict[str, float]) -> None:
    """Writes the errors down; raises Wrong where one is larger than allowed, or is not a number."""
    row.errors = found
    wrong = [
        f"{name} off by {error:.2g}, allowed {allowed[name]:g}"
        for name, error in found.items()
        if not error <= allowed[name]
    ]
    if wrong:
        raise Wrong("wrong: " + "; ".join(wrong))


def total_bytes(results: tuple[Tensor, ...]) -> int:
    return sum(result.numel() * result.element_size() for result in results)
