"""Every kernel called again gives the same bits: a race between programs, or a result that nobody wrote, would show.

Small calls run in Triton's interpreter, too, and are what a sanitizer watches on a GPU. Those of real sizes have a
stream of their own there, while products on another one take multiprocessors and bandwidth from them at random.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from conftest import KERNEL_DEVICE

import fastdpo_kernels
from benchmarks.knobs import TASKS
from fastdpo_kernels.rope_triton import _rope_kernel

TIMES = 20


def test_every_kernel_is_among_what_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """That which sums a sequence was not, and so neither repeated nor watched by a sanitizer."""
    modules = [import_module(f"fastdpo_kernels.{found.name}") for found in iter_modules(fastdpo_kernels.__path__)]
    kind, launched = type(_rope_kernel), set()  # compiled on a GPU, else interpreted
    found = {name for module in modules for name, value in vars(module).items() if isinstance(value, kind)}
    monkeypatch.setattr(kind, "run", lambda kernel, *arguments, **options: launched.add(kernel.__name__))
    for task in TASKS.values():
        task.on(KERNEL_DEVICE, small=True)()
    assert launched == {name for name in found if name.endswith("_kernel")}


@pytest.mark.kernels
@pytest.mark.parametrize("name", TASKS)
def test_a_small_call_repeats_bit_for_bit(name: str) -> None:
    call = TASKS[name].on(KERNEL_DEVICE, small=True)
    first, again = call(), call()
    assert all(result.isfinite().all() for result in first) and first[0].double().norm() > 0
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", TASKS)
def test_a_real_call_repeats_bit_for_bit_under_load(name: str) -> None:
    if (have := torch.cuda.get_device_properties(0).total_memory / 1e9) < 40:
        pytest.skip(f"needs 40 GB of device memory, has {have:.0f}")
    call, factor = TASKS[name].on("cuda"), torch.randn(2048, 2048, device="cuda", dtype=torch.float16)
    side, load = torch.cuda.Stream(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    load.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        first = call()
    for time in range(TIMES):
        with torch.cuda.stream(load):
            for _ in range(1 + 7 * time % 5):
                factor @ factor
        with torch.cuda.stream(side):
            again = call()
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True)), time
            del again
