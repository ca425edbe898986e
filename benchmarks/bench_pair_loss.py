"""pair_loss of 64 pairs against TRL's formulas: the call, what the GPU itself needs for it, and how much it launches.

What pytest-benchmark shows is a call from Python, 50 in a row. `seconds_in_graph` is the same without Python: 20 calls
in a CUDA graph, over 20.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks import pairs
from benchmarks.device import DEVICES, Device, KernelBench
from benchmarks.measure import Call, Meter
from benchmarks.record import Results, Row
from benchmarks.roofline import FORWARD
from benchmarks.turn import check, take_turn, total_bytes

OP = "pair_loss"
PAIRS = 64
WITH_GRADIENT = "forward and backward"
# fp32 sums of 600 nats, as TRL takes them, are off by 1e-4; a loss by a tenth of that.
ALLOWED = {"losses": 1e-3, "rewards": 1e-3, "gradient": 1e-3}


@dataclass(frozen=True)
class Turn:
    loss: str
    wants: str
    contender: str
    lap: int

    def __str__(self) -> str:
        return f"{self.loss}-{self.wants}-{self.contender}-lap{self.lap + 1}"


def turns(bench: KernelBench) -> list[Turn]:
    """All contenders one after the other, then all of them again."""
    return [
        Turn(loss, wants, contender, lap)
        for loss in pairs.WEIGHTED
        for wants in (FORWARD, WITH_GRADIENT)
        for lap in range(bench.laps)
        for contender in pairs.CONTENDERS
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("turn", turns(DEVICES[metafunc.config.option.kernel_device].kernels), ids=str)


@pytest.fixture(scope="module")
def some_pairs(device: Device) -> pairs.Pairs:
    return pairs.make_pairs(PAIRS, device.place)


@pytest.fixture(scope="module")
def calls() -> dict[tuple[str, str, str], Call]:
    return {}


def test_pair_loss(
    benchmark: Any,
    results: Results,
    some_pairs: pairs.Pairs,
    calls: dict,
    meter: Meter,
    device: Device,
    deadline: float,
    turn: Turn,
) -> None:
    row = results.row(OP, (PAIRS,), "float32", f"{turn.loss}, {turn.wants}", turn.contender)
    key = (turn.loss, turn.wants, turn.contender)

    def first() -> Call:
        if key not in calls:
            calls[key] = _checked(row, some_pairs, turn, meter)
        return calls[key]

    try:
        take_turn(benchmark, row, meter, device.kernels, deadline, first, iterations=50)
    finally:
        results.save()


def _checked(row: Row, some: pairs.Pairs, turn: Turn, meter: Meter) -> Call:
    weights = pairs.WEIGHTED[turn.loss]
    way = pairs.CONTENDERS[turn.contender](some, weights)
    row.path, row.version = way.path, way.version
    call = pairs.timed_call(way, some, turn.wants)
    meter.poison()
    values = call()
    check(row, pairs.errors(some, weights, way, turn.wants, values), ALLOWED)
    row.result_bytes, row.peak_bytes = total_bytes(values), meter.peak(call)
    try:
        row.seconds_in_graph = meter.seconds_in_graph(call)
    except RuntimeError as error:  # a contender that waits for the device cannot be captured
        row.graph_error = str(error).splitlines()[0]
    row.launches = meter.launches(call)
    return call
