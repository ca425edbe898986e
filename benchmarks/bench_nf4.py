"""Dequantising a 4-bit weight: seconds, and the share of a copy's bandwidth that they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks import weights
from benchmarks.device import DEVICES, Device, KernelBench
from benchmarks.measure import Call, Meter
from benchmarks.record import Results, Row
from benchmarks.turn import check, take_turn, total_bytes

OP = "nf4"
WANTS = "nested scales"


@dataclass(frozen=True)
class Turn:
    shape: tuple[int, int]
    contender: str
    lap: int

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{self.contender}-lap{self.lap + 1}"


def turns(bench: KernelBench) -> list[Turn]:
    """All contenders one after the other, then all of them again."""
    return [
        Turn(shape, contender, lap)
        for shape in bench.weights
        for lap in range(bench.laps)
        for contender in weights.CONTENDERS
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("turn", turns(DEVICES[metafunc.config.option.kernel_device].kernels), ids=str)


@pytest.fixture(scope="module")
def calls() -> dict[tuple[tuple[int, int], str], Call]:
    return {}


def test_nf4(
    benchmark: Any, results: Results, calls: dict, meter: Meter, device: Device, deadline: float, turn: Turn
) -> None:
    row = results.row(OP, turn.shape, device.kernels.dtype, WANTS, turn.contender)
    key = turn.shape, turn.contender

    def first() -> Call:
        if key not in calls:
            calls[key] = _checked(row, turn, meter, device)
        return calls[key]

    try:
        take_turn(benchmark, row, meter, device.kernels, deadline, first)
    finally:
        results.save()


def _checked(row: Row, turn: Turn, meter: Meter, device: Device) -> Call:
    weight = weights.make_weight(turn.shape, device.kernels.dtype, device.place)
    row.work = weight.work
    way = weights.CONTENDERS[turn.contender](weight)
    row.path, row.version = way.path, way.version

    def call() -> tuple[Any, ...]:
        return (way.compute(),)

    meter.poison()
    values = call()
    check(row, weights.errors(weight, values[0]), {"elements": 0.0})
    row.result_bytes, row.peak_bytes = total_bytes(values), meter.peak(call)
    row.launches = meter.launches(call)
    return call
