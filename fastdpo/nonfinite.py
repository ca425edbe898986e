"""Numbers that go wrong: a step whose loss or gradient is not finite never reaches the weights.

One flag on the device says of each step whether its loss, summed over processes, and the norm of its gradient are
finite. torch's fused Adam and AdamW heed it there, and nothing waits; for other optimizers the host reads it
(`optimizer.update_unless`). A step that is skipped counts in the number of steps and in the schedule, as one that loss
scaling skips, and moves neither weights, nor states of the optimizer, nor running means.

The host tells of it at the log line, where it reads numbers anyway. Until a step's own numbers have come to it, which
it sees without waiting, it keeps the step's batches, so that rows can be named and saved. With on_nonfinite="raise" the
steps after the first such one are skipped, too: what is saved beside its rows are the weights that it met. The log line
then comes as soon as the host knows, and ends the run. "skip" counts, and saves the first.

In fp16 gradients overflow now and then, on which the scaler lowers its scale: no fault, unless the loss is not finite
or the scale has come down to 1.

Legend: P pairs.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor

from fastdpo.batch import OptimizerBatch, PreferenceBatch, pairs_of
from fastdpo.checkpoint import save_trained, whole_weights, written_whole
from fastdpo.metrics import Running
from fastdpo.optimizer import update_unless
from fastdpo.ranks import Ranks
from fastdpo.sharding import whole
from fastdpo_kernels.pair_loss import PairLoss

logger = logging.getLogger(__name__)

ROWS = "rows.jsonl"
LOGPS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
SHOWN = 8  # rows that a message names, and steps that a log line tells of


class Computed(NamedTuple):
    """What the gradients of an optimizer batch came with."""

    batches: OptimizerBatch  # on the CPU
    loss: Tensor  # 0-dim: the mean over its pairs, the same in all processes
    grad_norm: Tensor  # 0-dim, likewise
    pairs: Tensor  # (P, 5) fp64, of this process's share, see `numbers_of_pairs`


def numbers_of_pairs(result: PairLoss) -> Tensor:
    """-> (P, 5) fp64: the loss, log-probs of chosen and rejected, log-ratios of both."""
    return torch.cat([result.losses.detach().double()[:, None], result.logps, result.log_ratios], 1)


@dataclass
class Fault:
    """A step that was skipped: plain numbers, to be sent."""

    step: int
    loss: float
    grad_norm: float
    rows: list[dict[str, Any]]  # of this process's share; of later faults only what a message tells
    shared: bool = False  # rows were computed together as far as they begin alike


@dataclass
class _Pending:
    """A step of which the host does not know yet whether it went through."""

    step: int
    microbatches: Sequence[PreferenceBatch]  # on the CPU
    row_numbers: Callable[[], dict[bytes, list[int]]]
    numbers: Tensor  # (3 + 5P,) fp64 on the host, there once `copied`: whether it is a fault, loss, norm, pairs
    copied: torch.cuda.Event | None

    def fault(self) -> Fault | None:
        faulty, loss, norm = self.numbers[:3].tolist()
        shared = any(batch.segments is not None and batch.segments.crowded for batch in self.microbatches)
        return Fault(self.step, loss, norm, self._rows(), shared) if faulty else None

    def _rows(self) -> list[dict[str, Any]]:
        """Those of the step, with their numbers and tokens."""
        known, rows = self.row_numbers(), []
        values = iter(self.numbers[3:].view(-1, 5).tolist())
        for index, batch in enumerate(self.microbatches):
            for place, pair in enumerate(pairs_of(batch) if batch.num_pairs else ()):
                loss, chosen, rejected, *ratios = next(values)
                logps = chosen, rejected, chosen - ratios[0], rejected - ratios[1]
                numbers = known.get(batch.keys[place]) if batch.keys else None
                where = {"row": numbers.pop(0) if numbers else None, "microbatch": index}
                ids = {f"{part}_ids": list(getattr(pair, part)) for part in ("prompt", "chosen", "rejected")}
                rows.append(where | {"loss": loss} | dict(zip(LOGPS, logps, strict=True)) | ids)
        return rows


class Guard:
    """Keeps what is not finite from the weights, and what is known of such steps until they are told of."""

    def __init__(self, stops: bool, running: Running, device: torch.device) -> None:
        """`stops`: nothing reaches the weights any more after the first."""
        self.stops, self.running = stops, running
        self.stopped = torch.zeros((), dtype=torch.bool, device=device)
        self.computed: Computed | None = None  # what the next update is of
        self.found: list[Fault] = []
        self._pending: deque[_Pending] = deque()

    def update(
        self, optimizer: Any, scaler: torch.amp.GradScaler, step: int, row_numbers: Callable[[], dict[bytes, list[int]]]
    ) -> Tensor:
        """The optimizer's step with the gradients that were `computed`, unscaled by now; -> 0-dim bool, whether it was
        skipped. Reads nothing back, but for optimizers that know no flag.
        """
        assert self.computed is not None
        batches, loss, norm, pairs = self.computed
        self.computed = None
        bad = ~(loss.isfinite() & norm.isfinite())
        skipped = bad | self.stopped
        update_unless(skipped, optimizer)
        one = torch.ones((), device=loss.device)
        scale = scaler.scale(one)  # of a scaler that is off: 1 before and after
        scaler.update()
        overflow = (scaler.scale(one) < scale) & (scale > 1) & loss.isfinite()
        fault = bad & ~overflow
        if self.stops:
            self.stopped = self.stopped | fault
        numbers = torch.cat([torch.stack([fault.double(), loss.double(), norm.double()]), pairs.flatten()])
        self._pending.append(_Pending(step, batches.microbatches, row_numbers, *_to_host(numbers)))
        return skipped

    def poll(self, wait: bool = False) -> None:
        """Sees to the steps whose numbers have come to the host; `wait`: to all, which waits for the device."""
        while self._pending and (wait or _is_there(self._pending[0].copied)):
            pending = self._pending.popleft()
            if pending.copied is not None:
                pending.copied.synchronize()
            if (fault := pending.fault()) is None:
                continue
            if self.running.skipped_steps and not self.stops:  # only the first one's rows are saved
                told = fault.rows if len(self.found) < SHOWN else []
                fault.rows = [_numbers(row) for row in told if _not_finite(row)]
            self.running.skipped_steps += 1
            self.found.append(fault)

    @property
    def ends_run(self) -> bool:
        return self.stops and bool(self.found)

    def report(self, model: Any, tokenizer: Any, output_dir: Path, ranks: Ranks) -> None:
        """Tells of the faults that were found since the last call; all processes call it.

        Raises FloatingPointError where the run is to end.
        """
        found, self.found = self.found, []
        if not found:
            return
        merged = [_merged(theirs) for theirs in zip(*gather_object([found]), strict=True)]
        words = list(map(_in_words, merged[:SHOWN]))
        if self.stops or self.running.skipped_steps == len(found):  # the first of the run
            words[0] += _weights_in_words(model) + _saved(merged[0], model, tokenizer, output_dir, ranks)
        if self.stops:
            raise FloatingPointError(f"{words[0]} on_nonfinite='skip' skips such steps and goes on.")
        for text in words:
            logger.warning("%s The step was skipped.", text)
        if more := len(found) - len(words):
            logger.warning("%d more steps were skipped", more)


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """-> a copy on the CPU, and what says that it is there, None where it is at once."""
    copy = numbers.to("cpu", non_blocking=numbers.is_cuda)  # into pinned memory
    copied = torch.cuda.Event() if numbers.is_cuda else None
    if copied is not None:
        copied.record()
    return copy, copied


def _is_there(copied: torch.cuda.Event | None) -> bool:
    return copied is None or copied.query()


def _merged(theirs: Iterable[Fault]) -> Fault:
    """One step's faults in all processes as one, its rows by their numbers."""
    every = list(theirs)
    rows = [{"process": rank, **row} for rank, fault in enumerate(every) for row in fault.rows]
    rows.sort(key=lambda row: row["row"] or 0)
    return replace(every[0], rows=rows, shared=any(fault.shared for fault in every))


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """A row without its tokens."""
    return {name: row[name] for name in ("row", "loss", *LOGPS)}


def _not_finite(row: dict[str, Any]) -> bool:
    return not all(math.isfinite(row[name]) for name in ("loss", *LOGPS))


def _suspects(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with such log-probs, or if there are none such losses: losses that couple pairs spread one row's to all."""
    of_logps = [row for row in rows if not all(math.isfinite(row[name]) for name in LOGPS)]
    return of_logps or [row for row in rows if not math.isfinite(row["loss"])]


def _named(rows: list[dict[str, Any]]) -> str:
    numbers = sorted({row["row"] for row in rows if row["row"] is not None})
    if not numbers:
        return f"{len(rows)} of the step's rows"
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return f"row{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:SHOWN]))}{more} of trainer.train_dataset"


def _in_words(fault: Fault) -> str:
    what, suspects = "gradient" if math.isfinite(fault.loss) else "loss", _suspects(fault.rows)
    where = f"nor are log-probs or loss of {_named(suspects)}"
    if not suspects:
        rows = f" ({_named(fault.rows)})" if fault.rows else ""
        where = f"though log-probs and losses of its rows are{rows}, so the backward pass made it"
    numbers = f"loss {fault.loss:g}, gradient norm {fault.grad_norm:g}"
    one_of_them = " Rows that begin alike share tokens, so one of them may be the cause." if fault.shared else ""
    return f"step {fault.step}: the {what} is not finite ({numbers}), {where}.{one_of_them}"


def _weights_in_words(model: Any) -> str:
    parameters = [(name, p.detach()) for name, p in model.named_parameters() if p.is_floating_point()]
    broken = [name for name, parameter in parameters if not whole(parameter.isfinite().all())]
    weights = f"{broken[0]} holds numbers that are not finite" if broken else "All weights of the model are finite"
    more = f", and so do {len(broken) - 1} more" if len(broken) > 1 else ""
    return f" {weights}{more}; the step moved none."


def _saved(fault: Fault, model: Any, tokenizer: Any, output_dir: Path, ranks: Ranks) -> str:
    """Writes what there is to look at; -> where it is, in words. No process goes on before it is there."""
    directory, failed = output_dir / f"nonfinite-step-{fault.step}", ""
    weights = whole_weights(model, keep=ranks.is_main)
    if ranks.is_main:
        try:
            with written_whole(directory) as draft:
                lines = (json.dumps(row | _texts(row, tokenizer)) + "\n" for row in fault.rows)
                (draft / ROWS).write_text("".join(lines), encoding="utf-8")
                save_trained(model, draft, weights)
        except (OSError, SafetensorError, RuntimeError) as error:  # all three come of a full disk
            failed = f" They could not be written to {directory}: {error}."
    ranks.wait()
    return failed or f" Its rows and the weights that train are in {directory}."


def _texts(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    return {part: tokenizer.decode(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")}
