"""`pytest benchmarks/ --benchmark-only`: the kernels against their peers, on a GPU where there is one.

    --kernel-device     cpu or cuda; small shapes on a CPU, those of real models on a GPU
    --kernel-json FILE  writes every row with machine and versions, as `python -m benchmarks kernels` does

Kernels are compiled here, never interpreted: TRITON_INTERPRET is refused.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks.arguments import positive
from benchmarks.device import DEVICES, Device
from benchmarks.measure import METERS, Meter, ceilings
from benchmarks.provenance import provenance
from benchmarks.record import Results

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "nvidia-cutlass-dsl")
PACKAGES += ("pytest-benchmark",)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernel benchmarks")
    group.addoption("--kernel-device", choices=list(DEVICES), help="default: cuda where there is one, else cpu")
    group.addoption("--kernel-json", type=Path, help="write the rows there")
    group.addoption("--kernel-commit", help="of this code, where it was copied without its repository")
    group.addoption(
        "--kernel-seconds", type=positive, default=math.inf, help="after them no further contender gets its turn"
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
        raise pytest.UsageError("TRITON_INTERPRET is set: interpreted kernels are not measured; unset it")
    found = torch.cuda.is_available()
    if config.option.kernel_device is None:
        config.option.kernel_device = "cuda" if found else "cpu"
    elif config.option.kernel_device == "cuda" and not found:
        raise pytest.UsageError("--kernel-device cuda: torch finds no CUDA device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    clock = METERS[DEVICES[config.option.kernel_device].place].clock
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))
    items.sort(key=lambda item: "bench_linear_logps" in item.nodeid)  # the long one last, should time run out


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> Device:
    return DEVICES[pytestconfig.option.kernel_device]


@pytest.fixture(scope="session")
def meter(device: Device) -> Meter:
    return METERS[device.place]()


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config, device: Device, meter: Meter) -> Results:
    options = pytestconfig.option
    machine = device.find()
    assert machine is not None
    origin = provenance(machine, torch.get_num_threads(), PACKAGES, options.kernel_commit)
    return Results({"device": device.name, **origin}, ceilings(meter, device.kernels), options.kernel_json)


@pytest.fixture(scope="session")
def deadline(pytestconfig: pytest.Config) -> float:
    """Of time.monotonic()."""
    return time.monotonic() + pytestconfig.option.kernel_seconds
