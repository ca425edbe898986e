"""linear_logps against its peers: log-probs, and the gradients that a frozen and a training head need of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contenders import AIMED_AT, CONTENDERS, Unavailable, Way
from benchmarks.device import DEVICES, Device, KernelBench
from benchmarks.heads import Head, errors, make_head
from benchmarks.measure import Call, Meter
from benchmarks.record import Results, Row
from benchmarks.roofline import FORWARD, FROZEN_HEAD, TRAINED_HEAD, head_work
from benchmarks.turn import check, take_turn, total_bytes

OP = "linear_logps"


@dataclass(frozen=True)
class Turn:
    shape: tuple[int, int, int]
    wants: str
    contender: str
    lap: int

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{self.wants}-{self.contender}-lap{self.lap + 1}"


def turns(bench: KernelBench) -> list[Turn]:
    """Contenders of a group one after the other, then all of them again; the peers that aims are about come first,
    should time run out.
    """
    groups = [[name for name in CONTENDERS if (name in AIMED_AT) == first] for first in (True, False)]
    return [
        Turn(shape, wants, contender, lap)
        for group in groups
        for shape in bench.heads
        for wants in (FORWARD, FROZEN_HEAD, TRAINED_HEAD)
        for lap in range(bench.laps)
        for contender in group
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("turn", turns(DEVICES[metafunc.config.option.kernel_device].kernels), ids=str)


class Field:
    """The tensors of one shape at a time, and the calls that its contenders are timed by."""

    def __init__(self, device: Device, results: Results) -> None:
        self._device, self._results = device, results
        self._head: Head | None = None
        self.calls: dict[tuple[str, str], Call] = {}

    def head(self, shape: tuple[int, int, int]) -> Head:
        if self._head is None or self._head.shape != shape:
            self._head = None
            self.calls.clear()
            try:
                head = make_head(shape, self._device.kernels.dtype, self._device.place)
                truth = head.truth
            except torch.OutOfMemoryError:
                raise Unavailable(
                    "out of memory before any contender: this device is too small for the shape"
                ) from None
            self._head = head
            chances = truth.logps.exp()
            facts = {"least": chances.min().item(), "median": chances.median().item(), "most": chances.max().item()}
            self._results.heads.append({"shape": shape, "p_target": facts, "kept_tiles": truth.kept_tiles})
        return self._head


@pytest.fixture(scope="module")
def field(device: Device, results: Results) -> Field:
    return Field(device, results)


def test_linear_logps(
    benchmark: Any, results: Results, field: Field, meter: Meter, device: Device, deadline: float, turn: Turn
) -> None:
    bench = device.kernels
    row = results.row(OP, turn.shape, bench.dtype, turn.wants, turn.contender)

    def first() -> Call:
        head = field.head(turn.shape)
        key = (turn.wants, turn.contender)
        if key not in field.calls:
            row.work = head_work(turn.shape, turn.wants, head.hidden.element_size())
            field.calls[key] = _checked(row, head, turn, meter, device)
        return field.calls[key]

    try:
        take_turn(benchmark, row, meter, bench, deadline, first)
    finally:
        results.save()


def _checked(row: Row, head: Head, turn: Turn, meter: Meter, device: Device) -> Call:
    """The contender's call, after its results were found right and its memory and launches were written down."""
    way = CONTENDERS[turn.contender](head)
    row.path, row.version = way.path, way.version
    call = timed_call(way, head, turn.wants)
    meter.poison()
    values = call()
    values = (way.sign * values[0], *values[1:])
    bench = device.kernels
    allowed = dict.fromkeys(("hidden gradient", "weight gradient"), bench.allowed_gradient_error)
    check(row, errors(head, turn.wants, values), {"logps": bench.allowed_logp_error, **allowed})
    row.result_bytes = total_bytes(values)
    del values
    row.peak_bytes = meter.peak(call)
    row.launches = meter.launches(call)
    return call


def timed_call(way: Way, head: Head, wants: str) -> Call:
    """-> a call that returns what the contender returns and the gradients that are wanted."""
    hidden = head.hidden.detach().requires_grad_(wants != FORWARD)
    weight = head.weight.detach().requires_grad_(wants == TRAINED_HEAD)
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    upstreams = {dtype: (way.sign * head.upstream).to(dtype) for dtype in {torch.float32, head.hidden.dtype}}

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad(), way.around():
            return (way.compute(hidden, weight, head.targets),)

    def both() -> tuple[Tensor, ...]:
        with way.around():
            values = way.compute(hidden, weight, head.targets)
            return (values.detach(), *torch.autograd.grad(values, leaves, upstreams[values.dtype]))

    return both if leaves else forward
