"""How a call is measured: a meter for each kind of device, all with the same methods.

A GPU's clock is its own: events before and after the call, with the L2 cache flushed and the queue filled before them,
so that the host is never waited for. A CPU's clock is the host's.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from benchmarks.device import DEVICES, KernelBench
from benchmarks.roofline import Ceilings

Call = Callable[[], Any]


class CpuMeter:
    place = "cpu"
    clock: Any = staticmethod(time.perf_counter)
    dead: str | None = None

    def prepare(self) -> None:
        """Before each timed call: nothing, as the inputs of the benchmarks do not fit the caches."""

    def poison(self) -> None:
        pass

    def peak(self, call: Call) -> int:
        """Bytes allocated at most during the call, its results included and what was there before not."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            call()
        alive = most = 0
        events: Any = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
        for event in events:
            if event.name() == "[memory]":
                alive += event.nbytes()
                most = max(most, alive)
        return most

    def launches(self, call: Call) -> list[tuple[str, int, float]]:
        """A CPU launches nothing."""
        return []

    def seconds_in_graph(self, call: Call) -> float | None:
        return None

    def recover(self) -> None:
        pass


class Moment:
    """A point in the GPU's queue; a difference of two is seconds between them, once both have passed."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Moment) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


class CudaMeter:
    place = "cuda"
    clock: Any = Moment

    def __init__(self) -> None:
        self.dead: str | None = None  # why the GPU answers no more; an illegal access ends the process's context
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._beyond_cache = torch.empty(max(2 * cache, 2**28), dtype=torch.int8, device="cuda")

    def prepare(self) -> None:
        """Writes more than the L2 cache holds; while that runs the host gets ahead of the device."""
        torch.cuda.synchronize()
        self._beyond_cache.zero_()

    def poison(self) -> None:
        """Memory that the next calls get holds NaN: a result that nobody wrote shows."""
        free, _ = torch.cuda.mem_get_info()
        torch.full((min(free // 2, 2**33) // 4,), float("nan"), device="cuda")

    def peak(self, call: Call) -> int:
        """Bytes allocated at most during the call, its results included and what was there before not."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before

    def launches(self, call: Call) -> list[tuple[str, int, float]]:
        """What ran on the GPU during the call: kernel, times launched, microseconds in all; longest first."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        times, spent = Counter[str](), Counter[str]()
        for event in profile.events() or []:
            on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
            if on_gpu and not getattr(event, "is_user_annotation", False):
                times[event.name] += 1
                spent[event.name] += event.time_range.elapsed_us()
        return [(name, times[name], float(spent[name])) for name, _ in spent.most_common()]

    def seconds_in_graph(self, call: Call, calls: int = 20, replays: int = 30) -> float:
        """Of one call among many in a CUDA graph: what the GPU needs when nothing is launched from Python."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        return median_seconds(self, graph.replay, replays, warmup=1) / calls

    def recover(self) -> None:
        """After a failed call: gives its memory back, and finds out whether the GPU still answers."""
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            self.dead = str(error).splitlines()[0]


Meter = CpuMeter | CudaMeter
METERS: dict[str, type[CpuMeter] | type[CudaMeter]] = {meter.place: meter for meter in (CpuMeter, CudaMeter)}


def ceilings(meter: Meter, bench: KernelBench) -> Ceilings:
    """Rates of one large square product in the benchmarks' dtype and of one large copy, bytes read and written."""
    side, dtype = bench.matmul_side, getattr(torch, bench.dtype)
    left, right = (torch.randn(side, side, device=meter.place).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    product = median_seconds(meter, lambda: torch.mm(left, right, out=out))
    source = torch.randn(bench.copy_bytes // 4, device=meter.place)
    target = torch.empty_like(source)
    copy = median_seconds(meter, lambda: target.copy_(source))
    return Ceilings(2 * side**3 / product, 2 * bench.copy_bytes / copy)


def median_seconds(meter: Meter, call: Call, rounds: int = 10, warmup: int = 3) -> float:
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(rounds):
        meter.prepare()
        start = meter.clock()
        call()
        seconds.append(meter.clock() - start)
    return median(seconds)


def main(device: str) -> None:
    """Prints the ceilings of a device as JSON: `python -m benchmarks.measure cpu`."""
    bench = DEVICES[device].kernels
    print(json.dumps(asdict(ceilings(METERS[DEVICES[device].place](), bench))))


if __name__ == "__main__":
    main(sys.argv[1])
