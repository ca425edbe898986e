"""`python -m benchmarks trace`: where the time of fastdpo's steps goes on the device, and what made anyone wait.

torch's profiler watches a few steps of the training loop. Kernels count by the range they lie in (the LM head, the pair
loss, the optimizer), else by their names; on a CPU operations do.
"""

from __future__ import annotations

import math
import re
import time
from argparse import Namespace
from bisect import bisect_right
from collections import Counter
from contextlib import ExitStack
from typing import Any

from benchmarks.device import DEVICES, Device
from benchmarks.markdown import setting_in_words, table
from benchmarks.observe import described, forget_reference, replaced, spec_of, train_watched

WARM, STEPS = 3, 4  # steps before the profiler starts, and under it
WINDOW = "fastdpo steps"
RANGES = ("head", "pair loss", "optimizer")
BY_NAME = (  # the first that is found in a kernel's or an operation's name
    ("copies", r"^Mem(cpy|set)|aten::copy_"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("matmul", r"gemm|cutlass|nvjet|xmma|wgmma|cublas|gemv|splitK|aten::(mm|addmm|bmm|baddbmm)$"),
)
REST = "elementwise, norms, sums and indexing"
GROUPS: tuple[str, ...] = ("matmul", "attention", *RANGES, REST, "copies")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")


def main(options: Namespace) -> dict[str, Any] | None:
    """-> the result, None where there is no such device."""
    result = described(options, "trace")
    if result is None:
        return None
    device, found = DEVICES[options.device], []

    def watch(trainer: Any) -> Any:
        return _watcher(trainer, device, found)

    epochs = math.ceil((WARM + STEPS) * options.batch / options.pairs)
    train_watched(spec_of(options, epochs), watch)
    return {**result, "steps": STEPS, **found[0]}


def _watcher(trainer: Any, device: Device, found: list[dict[str, Any]]) -> Any:
    import torch
    from transformers import TrainerCallback

    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.place == "cuda" else []

    class Watcher(TrainerCallback):
        stack = ExitStack()
        started = 0.0

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            forget_reference(trainer)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step != WARM:
                return
            device.wait()
            self.profile = self.stack.enter_context(torch.profiler.profile(activities=activities))
            self.window = torch.profiler.record_function(WINDOW)
            self.window.__enter__()
            _name_ranges(trainer, self.stack)
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step != WARM + STEPS:
                return
            wall = time.perf_counter() - self.started
            self.window.__exit__(None, None, None)
            device.wait()
            self.stack.close()
            events = list(self.profile.events() or [])
            found.append(summary(events, wall, on_gpu=device.place == "cuda"))
            control.should_training_stop = True

    return Watcher()


def _name_ranges(trainer: Any, stack: ExitStack) -> None:
    """Until the stack closes, the parts that RANGES names say so to the profiler."""
    import torch

    import fastdpo.model
    import fastdpo.step

    def within(name: str) -> Any:
        def wrap(call: Any) -> Any:
            def named(*arguments: Any, **options: Any) -> Any:
                with torch.profiler.record_function(name):
                    return call(*arguments, **options)

            return named

        return wrap

    owners = ((fastdpo.model, "linear_logps"), (fastdpo.step, "pair_loss"), (trainer.accelerator, "clip_grad_norm_"))
    for (owner, attribute), name in zip(owners, RANGES, strict=True):
        stack.enter_context(replaced(owner, attribute, within(name)))


def summary(events: list[Any], wall: float, on_gpu: bool) -> dict[str, Any]:
    """Seconds a step by group, counts a step, and what the clock was. Times of events are microseconds."""
    window = next(event for event in events if event.name == WINDOW and not _is_cuda(event))
    inside = [event for event in events if window.time_range.start <= event.time_range.start]
    host = [e for e in inside if not _is_cuda(e) and e.time_range.start < window.time_range.end]
    if on_gpu:
        device = [event for event in inside if _is_cuda(event)]
        kernels = [event for event in device if not _is_note(event)]
        seconds, span = _on_gpu(device, kernels)
        seconds["idle"] = span - _busy(kernels)
        clock = "Idle is the time between the first kernel and the last in which none ran."
    else:
        kernels = []
        seconds = _on_cpu(host)
        seconds["between operations"] = 1e6 * wall - sum(seconds.values())
        clock = "Time of operations is their own, without those they call; Python is between operations."
    names = Counter(event.name for event in host)
    counts: dict[str, float] = {"host waits for the device": sum(names[name] for name in SYNCS)}
    counts["values read by the host"] = sum(names[name] for name in READS)
    counts["copies to the host"] = sum("DtoH" in event.name for event in kernels)
    counts["kernels launched"] = sum(not event.name.startswith("Mem") for event in kernels)
    counts["operations of torch"] = sum(count for name, count in names.items() if name.startswith("aten::"))
    return {
        "seconds": {name: us / 1e6 / STEPS for name, us in seconds.items()},
        "counts": {name: count / STEPS for name, count in counts.items()},
        "clock": clock,
    }


def _is_cuda(event: Any) -> bool:
    return event.device_type.name == "CUDA"


def _on_gpu(events: list[Any], kernels: list[Any]) -> tuple[dict[str, float], float]:
    """-> microseconds of kernels by group, and from the first one's start to the last one's end."""
    ranges = sorted(
        (event.time_range.start, event.time_range.end, name)
        for event in events
        if _is_note(event) and (name := _range_of(event.name))
    )
    starts = [start for start, _, _ in ranges]
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in kernels:
        at = bisect_right(starts, event.time_range.start) - 1
        within = ranges[at][2] if at >= 0 and event.time_range.start < ranges[at][1] else None
        seconds[within or group_of(event.name)] += event.time_range.elapsed_us()
    ends = [event.time_range.end for event in kernels]
    return seconds, max(ends) - min(event.time_range.start for event in kernels)


def _on_cpu(events: list[Any]) -> dict[str, float]:
    """Microseconds of torch's operations by group, each one's own."""
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        if not event.is_user_annotation:
            seconds[_range_around(event) or group_of(event.name)] += event.self_cpu_time_total
    return seconds


def _is_note(event: Any) -> bool:
    """A range that somebody named: no work of its own."""
    return event.is_user_annotation or event.name == WINDOW or _range_of(event.name) is not None


def _range_of(name: str) -> str | None:
    return "optimizer" if name.startswith("Optimizer.step") else name if name in RANGES else None


def _range_around(event: Any) -> str | None:
    while event is not None:
        if name := _range_of(event.name):
            return name
        event = event.cpu_parent
    return None


def group_of(name: str) -> str:
    """By the name of a kernel or an operation."""
    return next((group for group, pattern in BY_NAME if re.search(pattern, name, re.IGNORECASE)), REST)


def _busy(kernels: list[Any]) -> float:
    """Microseconds in which at least one kernel ran."""
    busy, until = 0.0, -math.inf
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in kernels):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def render(result: dict[str, Any]) -> str:
    """Time by group, and what made host or device wait."""
    total = sum(result["seconds"].values())
    rows = [[name, f"{1e3 * s:.2f}", f"{100 * s / total:.1f}"] for name, s in result["seconds"].items()]
    counts = [[name, f"{count:g}"] for name, count in result["counts"].items()]
    return (
        f"### Where a step's time goes on {setting_in_words(result)}\n\n{table(['', 'ms a step', '%'], rows)}\n\n"
        f"{table(['', 'a step'], counts)}\n\n"
        f"- torch's profiler over {result['steps']} steps of a first epoch without a log line; it slows the host. "
        f"{result['clock']}\n"
    )
