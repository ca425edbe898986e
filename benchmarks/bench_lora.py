"""LoRA on 4-bit projections, forward and backward: q, k and v of a block, and its gated MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks import adapters
from benchmarks.device import DEVICES, Device, KernelBench
from benchmarks.measure import Call, Meter
from benchmarks.record import Results, Row
from benchmarks.turn import check, take_turn, total_bytes

OP = "lora"


@dataclass(frozen=True)
class Turn:
    shape: tuple[int, int, int]
    task: str
    contender: str
    lap: int

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{self.task}-{self.contender}-lap{self.lap + 1}"


def turns(bench: KernelBench) -> list[Turn]:
    """All contenders one after the other, then all of them again."""
    return [
        Turn(shape, task, contender, lap)
        for shape in bench.blocks
        for task in adapters.TASKS
        for lap in range(bench.laps)
        for contender in adapters.CONTENDERS
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("turn", turns(DEVICES[metafunc.config.option.kernel_device].kernels), ids=str)


@pytest.fixture(scope="module")
def blocks() -> dict[tuple[int, int, int], adapters.Block]:
    return {}


@pytest.fixture(scope="module")
def calls() -> dict[Turn, Call]:
    return {}


def test_lora(
    benchmark: Any,
    results: Results,
    blocks: dict,
    calls: dict,
    meter: Meter,
    device: Device,
    deadline: float,
    turn: Turn,
) -> None:
    row = results.row(OP, turn.shape, device.kernels.dtype, turn.task, turn.contender)
    key = turn.shape, turn.task, turn.contender

    def first() -> Call:
        if turn.shape not in blocks:
            blocks[turn.shape] = adapters.make_block(turn.shape, device.kernels.dtype, device.place)
        if key not in calls:
            calls[key] = _checked(row, blocks[turn.shape], turn, meter, device)
        return calls[key]

    try:
        take_turn(benchmark, row, meter, device.kernels, deadline, first)
    finally:
        results.save()


def _checked(row: Row, block: adapters.Block, turn: Turn, meter: Meter, device: Device) -> Call:
    row.work = block.work(turn.task)
    way = adapters.CONTENDERS[turn.contender](block)
    row.path, row.version = way.path, way.version
    call = adapters.timed_call(way, block, turn.task)
    meter.poison()
    values = call()
    allowed = device.kernels.allowed_gradient_error
    check(row, adapters.errors(block, turn.task, values), {"outputs": allowed, "gradients": allowed})
    row.result_bytes, row.peak_bytes = total_bytes(values), meter.peak(call)
    row.launches = meter.launches(call)
    return call
