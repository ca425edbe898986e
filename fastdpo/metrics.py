"""Metrics: sums on the device, one read a log line, and what a run leaves in its output_dir.

Names and meanings are TRL's. Pair metrics are means over the pairs since the last line, token metrics over their scored
tokens.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdpo.ranks import Ranks
from fastdpo.step import PAIR_METRICS, ROUTER_METRICS, SUMS, TOKEN_METRICS, PreferenceStep

logger = logging.getLogger(__name__)

_COUNTS = {"entropy": "scored_tokens", "logits/chosen": "chosen_tokens", "logits/rejected": "rejected_tokens"}
_COUNTS["mean_token_accuracy"] = "chosen_tokens"


class MetricSums:
    """Adds up step.SUMS vectors without waiting for them; `routers`: their auxiliary loss is among what is read;
    `nll`: so is the cross-entropy of the chosen tokens.
    """

    def __init__(self, routers: bool, nll: bool = False) -> None:
        self.sums: Tensor | None = None
        self.routers, self.nll = routers, nll

    def add(self, sums: Tensor, skip_non_finite: bool = False) -> None:
        """`skip_non_finite` leaves out a vector with NaN or infinity in it (`logging_nan_inf_filter`)."""
        if skip_non_finite:
            sums = torch.where(sums.isfinite().all(), sums, torch.zeros_like(sums))
        self.sums = sums if self.sums is None else self.sums + sums

    def read(self, ranks: Ranks, *extra: Tensor) -> tuple[dict[str, float], list[float]]:
        """The one host sync of a log line: -> metrics of what all ranks added since the last read, and the `extra`
        scalars, which are the same on all.
        """
        assert self.sums is not None, "nothing was added"
        scalars = [value.detach().double().reshape(1) for value in extra]
        values = torch.cat([ranks.sum(self.sums.clone()), *scalars]).tolist()
        sums: dict[str, float] = dict(zip(SUMS, values, strict=False))
        sums["scored_tokens"] = sums["chosen_tokens"] + sums["rejected_tokens"]
        self.sums = None
        names = PAIR_METRICS + TOKEN_METRICS + (ROUTER_METRICS if self.routers else ())
        metrics = {name: _ratio(sums[name], sums[_COUNTS.get(name, "pairs")]) for name in names}
        if self.nll:
            metrics["nll_loss"] = _ratio(-sums["logps/chosen"], sums["chosen_tokens"])
        return metrics, values[len(SUMS) :]


def _line(row: dict[str, Any]) -> str:
    no_json = {key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps({key: None if key in no_json else value for key, value in row.items()}) + "\n"


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


@dataclass
class Running:
    """What a training run carries from step to step."""

    step: PreferenceStep
    trained: list[Tensor]
    tokens: int = 0
    pairs: int = 0
    learning_rate: float = 0.0
    grad_norm: Tensor | None = None
    window_loss: float = 0.0
    mean_loss: float = 0.0
    logged_steps: int = 0
    counted_steps: int = 0  # those that mean_loss is of
    skipped_steps: int = 0  # see nonfinite.py

    def __post_init__(self) -> None:
        self.sums = MetricSums(bool(self.step.router_coef), self.step.scores_chosen)

    def logged(self, loss: float, step: int, skip_nan: bool) -> None:
        """The mean over the run, from the means over its windows of steps; `skip_nan`: those that have one."""
        self.window_loss, steps, self.logged_steps = loss, step - self.logged_steps, step
        before = self.mean_loss if self.counted_steps else 0.0
        if not (skip_nan and math.isnan(loss)):
            self.counted_steps += steps
            self.mean_loss = before + (loss - before) * steps / max(self.counted_steps, 1)
        elif not self.counted_steps:
            self.mean_loss = math.nan


class RunFiles(TrainerCallback):
    """Writes each log row to output_dir/metrics.jsonl as it comes, and output_dir/curves.png when training ends. A file
    that cannot be written, as on a full disk, is a warning; metrics.jsonl is then written anew with the next row.
    """

    torn = False  # metrics.jsonl may end in the middle of a row

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:  # rows that a stopped run wrote after its last checkpoint come again
            self._write(args, state.log_history, "w")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.log_history:
            self._write(args, *((state.log_history, "w") if self.torn else (state.log_history[-1:], "a")))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        try:
            plot_curves(state.log_history, Path(str(args.output_dir)) / "curves.png")
        except Exception as error:  # whatever a picture lacks, the model is still to be saved
            logger.warning("curves.png is not drawn (%s: %s)", type(error).__name__, error)

    def _write(self, args: TrainingArguments, rows: list[dict[str, Any]], mode: str) -> None:
        path, torn = Path(str(args.output_dir)) / "metrics.jsonl", self.torn
        self.torn = True
        try:
            with path.open(mode) as file:
                file.writelines(map(_line, rows))
        except OSError as error:
            if not torn:
                logger.warning("%s is not written (%s): all its rows are with the next one that can be", path, error)
            return
        self.torn = False


CURVES = (("loss", "loss"), ("rewards/margins", "reward margin"), ("rewards/accuracies", "reward accuracy"))


def plot_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Loss, reward margin and reward accuracy over steps, training and evaluation, side by side in one PNG."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        for key, style in _series(history, name):
            rows = [(row["step"], row[key]) for row in history if key in row]
            label = (
                "training" if key == name else key.removesuffix("_" + name) if key != f"eval_{name}" else "evaluation"
            )
            axes.plot(*zip(*rows, strict=True), style, label=label, markersize=4)
        axes.set(title=title, xlabel="optimizer step")
        if name == "rewards/accuracies":
            axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=110)


def _series(history: list[dict[str, Any]], name: str) -> list[tuple[str, str]]:
    keys = {
        key: None
        for row in history
        for key in row
        if key == name or key.startswith("eval_") and key.endswith("_" + name)
    }
    return [(key, "-" if key == name else "o--") for key in sorted(keys)]
