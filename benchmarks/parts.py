"""`python -m benchmarks parts`: is a step its parts, and nothing in between?

The backbone forward and backward, the reference's forward, the head and the optimizer are measured alone, on the
batches of one epoch, and so is an epoch of the training loop itself, its reference run as in the first one.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

from benchmarks.device import DEVICES, Device
from benchmarks.markdown import setting_in_words, table
from benchmarks.observe import described, forget_reference, spec_of, train_watched


def main(options: Namespace) -> dict[str, Any] | None:
    """-> the result, None where there is no such device."""
    result = described(options, "parts")
    if result is None:
        return None
    device, watchers = DEVICES[options.device], []

    def watch(trainer: Any) -> Any:
        watchers.append(_watcher(trainer, device, options.repeat))
        return watchers[0]

    train_watched(spec_of(options, epochs=1 + options.repeat), watch)
    epochs, steps = watchers[0].epochs, options.pairs // options.batch
    whole = median(epochs)
    spread = max(abs(seconds - whole) for seconds in epochs) / whole
    found = {"parts": watchers[0].parts, "step_seconds": whole / steps, "repeat": options.repeat, "spread": spread}
    return {**result, **found}


def _watcher(trainer: Any, device: Device, repeat: int) -> Any:
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        """Times the epochs after the first, then the parts while everything still stands."""

        epochs: list[float] = []
        parts: dict[str, float] = {}
        started: float | None = None
        count = 0

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            forget_reference(trainer)
            device.wait()
            self.started = time.perf_counter()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            device.wait()
            assert self.started is not None
            self.count += 1
            if self.count > 1:  # the first one warms up
                self.epochs.append(time.perf_counter() - self.started)
            if self.count == 1 + repeat:
                self.parts |= measure_parts(trainer, device, repeat)

    return Watcher()


def measure_parts(trainer: Any, device: Device, repeat: int) -> dict[str, float]:
    """Seconds a step of each part; call it while `trainer` trains."""
    import torch

    from fastdpo.head import output_head
    from fastdpo.model import base_model
    from fastdpo.step import TOKEN_STATS
    from fastdpo_kernels.linear_logps import linear_logps

    policy, args = trainer.policy, trainer.args
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    loader = trainer.callback_handler.train_dataloader
    steps = [[batch.to(args.device) for batch in batches] for batches in loader]
    batches = [batch for step in steps for batch in step]

    def autocast() -> Any:
        return torch.autocast(args.device.type, policy.autocast) if policy.autocast else nullcontext()

    with torch.no_grad(), autocast():
        rows = [policy.hidden_rows(batch) for batch in batches]

    def backbone() -> None:
        for batch, gradient in zip(batches, rows, strict=True):  # any gradient of that shape costs the same
            with autocast():
                hidden = policy.hidden_rows(batch)
            hidden.backward(gradient)

    def head() -> None:
        for batch, hidden in zip(batches, rows, strict=True):
            with autocast():
                form = output_head(base_model(policy.model))
                scale = {"logit_scale": form.logit_scale, "softcap": form.softcap, "stats": TOKEN_STATS}
                leaf = hidden.detach().requires_grad_()
                logps, _ = linear_logps(form.inputs(leaf), form.weight, batch.targets, form.bias, **scale)
            logps.sum().backward()

    def reference() -> None:
        for batch in batches:
            trainer.reference.compute(batch)

    def optimizer() -> None:
        for _ in steps:
            trainer.accelerator.clip_grad_norm_(trained, args.max_grad_norm)
            trainer.optimizer.step()
            trainer.lr_scheduler.step()

    parts = {"backbone, forward and backward": backbone, "reference, forward": reference, "head": head}
    parts["optimizer"] = optimizer  # last: its gradients are the backbone's
    return {name: _seconds(part, device, repeat) / len(steps) for name, part in parts.items()}


def _seconds(part: Callable[[], None], device: Device, repeat: int) -> float:
    part()  # warms up
    seconds = []
    for _ in range(repeat):
        device.wait()
        start = time.perf_counter()
        part()
        device.wait()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def render(result: dict[str, Any]) -> str:
    """The parts measured alone, their sum, and the whole step over it."""
    parts, whole, total = result["parts"], result["step_seconds"], sum(result["parts"].values())
    rows = [[name, f"{1e3 * s:.2f}", f"{100 * s / total:.1f}"] for name, s in parts.items()]
    rows.append(["sum of the parts", f"{1e3 * total:.2f}", "100.0"])
    rows.append(["the whole step", f"{1e3 * whole:.2f}", f"{100 * whole / total:.1f}"])
    aim = DEVICES[result["device"]].parts_aim
    verdict = (
        "" if aim is None else f" The aim is {100 * aim:g}% at most: {'met' if whole <= aim * total else 'missed'}."
    )
    numbers = table(["", "ms a step", "% of the sum"], rows)
    return (
        f"### A step and its parts on {setting_in_words(result)}\n\n{numbers}\n\n"
        "- Each part alone over the batches of an epoch, which lie on the device; the clock is read before and after "
        "all of them. The whole step is an epoch of the training loop over its steps, the reference run as in a first "
        f"epoch: collation, pair loss, metrics and callbacks are in it.{verdict}\n"
        f"- Medians of {result['repeat']}; no epoch was further than {100 * result['spread']:.1f}% from "
        "theirs.\n"
    )
