"""Every kernel called again gives the same bits: a race between programs, or a result that nobody wrote, would show.

Small calls run in Triton's interpreter, too, and are what a sanitizer watches on a GPU. Those of real sizes have a
stream of their own there, while products on another one take multiprocessors and bandwidth from them at random.
"""

from __future__ import annotations

import pytest
import torch
from conftest import KERNEL_DEVICE

from benchmarks.knobs import TASKS

TIMES = 20


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
