"""rms_norm, rope and glu: seconds, and the share of a copy's bandwidth that they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks import blocks
from benchmarks.device import DEVICES, Device, KernelBench
from benchmarks.measure import Call, Meter
from benchmarks.record import Results, Row
from benchmarks.roofline import FORWARD
from benchmarks.turn import check, take_turn, total_bytes


@dataclass(frozen=True)
class Turn:
    op: str
    shape: tuple[int, ...]
    wants: str
    contender: str
    lap: int

    def __str__(self) -> str:
        return f"{self.op}-{'x'.join(map(str, self.shape))}-{self.wants}-{self.contender}-lap{self.lap + 1}"


def turns(bench: KernelBench) -> list[Turn]:
    """All contenders one after the other, then all of them again."""
    return [
        Turn(op, shape, wants, contender, lap)
        for op, shape in blocks.shapes(bench.token_shape)
        for wants in (FORWARD, blocks.WITH_GRADIENT)
        for lap in range(bench.laps)
        for contender in blocks.CONTENDERS
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("turn", turns(DEVICES[metafunc.config.option.kernel_device].kernels), ids=str)


class Field:
    """The calls of one task at a time, so that its tensors are gone before the next one's."""

    def __init__(self) -> None:
        self._task: tuple[Any, ...] = ()
        self.calls: dict[str, Call] = {}

    def of(self, turn: Turn) -> dict[str, Call]:
        task = turn.op, turn.shape, turn.wants
        if task != self._task:
            self._task = task
            self.calls.clear()
        return self.calls


@pytest.fixture(scope="module")
def field() -> Field:
    return Field()


def test_blocks(
    benchmark: Any, results: Results, field: Field, meter: Meter, device: Device, deadline: float, turn: Turn
) -> None:
    row = results.row(turn.op, turn.shape, device.kernels.dtype, turn.wants, turn.contender)

    def first() -> Call:
        calls = field.of(turn)
        if turn.contender not in calls:
            calls[turn.contender] = _checked(row, turn, meter, device)
        return calls[turn.contender]

    try:
        take_turn(benchmark, row, meter, device.kernels, deadline, first)
    finally:
        results.save()


def _checked(row: Row, turn: Turn, meter: Meter, device: Device) -> Call:
    task = blocks.make_task(turn.op, turn.shape, device.kernels.dtype, device.place)
    row.work = task.work(turn.wants)
    way = blocks.CONTENDERS[turn.contender](task)
    row.path, row.version = way.path, way.version
    meter.poison()
    values = blocks.timed_call(way, task, turn.wants)()
    check(row, blocks.errors(task, turn.wants, values), {"results": device.kernels.allowed_gradient_error})
    row.result_bytes = total_bytes(values)
    del values
    call = blocks.timed_call(way, task, turn.wants)
    row.peak_bytes = meter.peak(call)
    row.launches = meter.launches(call)
    return call
