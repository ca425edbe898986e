"""The answer to a GPU that runs out of memory: the batch is done again in micro-batches of half the size, by all
processes, and so are later ones, of training as of evaluation. The numbers are the same up to the rounding of sums,
unless dropout is on: masks are drawn a micro-batch, and smaller ones draw others.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from fastdpo.batch import OptimizerBatch, PreferenceBatch
from fastdpo.ranks import Ranks, RanOutElsewhere
from fastdpo_kernels.nf4 import free_scratch

logger = logging.getLogger(__name__)

COUNTS = ("num_pairs", "num_chosen_tokens", "num_tokens")
Batches = Sequence[PreferenceBatch]  # the micro-batches of an optimizer batch, on the CPU


class Retry:
    """Runs the batches of loaders; once memory ran out, their micro-batches keep within a token budget."""

    def __init__(self, ranks: Ranks, dropout: bool = False) -> None:
        self.ranks, self.dropout = ranks, dropout
        self.budget: int | None = None
        self.told: int | None = None  # the budget that the user knows of

    def __call__(
        self,
        step: Callable[[OptimizerBatch], None],
        batches: Batches,
        loader: DataLoader,
        undo: Callable[[], None] = lambda: None,
    ) -> None:
        """`step` with the optimizer batch until it is through, each failed attempt undone; one pair that does not fit
        alone raises. `step` has all ranks agree before it counts what it did.

        `loader` gave the batches: smaller ones are collated and pinned as it does.
        """
        batches = self._within_budget(batches, loader)
        while not self._fits(step, batches, self._optimizer_batch(batches, loader)):
            undo()
            collect_memory()
            batches = self._within_budget(batches, loader)

    def report(self) -> None:
        """Says which budget is in use, where it is another one than was said last."""
        if self.budget != self.told:
            logger.warning(
                "memory ran out again: by now micro-batches have at most %d tokens; max_tokens_per_microbatch=%d "
                "starts so",
                *(self.budget, self.budget),
            )
        self.told = self.budget

    def _optimizer_batch(self, batches: Batches, loader: DataLoader) -> OptimizerBatch:
        """This process's micro-batches, as many as the process with most has, and what all have together."""
        counts = [sum(getattr(batch, name) for batch in batches) for name in COUNTS]
        purpose = "batch" if torch.is_grad_enabled() else "evaluation"
        everyone = self.ranks.exchange(purpose, [getattr(batches, "whole", 0), len(batches), *counts])
        digests, most, *totals = zip(*everyone, strict=True)
        if len(set(digests)) > 1:
            raise ValueError(
                "the processes read different rows: give all of them the same dataset in the same order (a shuffle or "
                "a split needs a seed)"
            )
        collate: Any = loader.collate_fn
        empty = [collate.empty() for _ in range(max(most) - len(batches))]
        return OptimizerBatch([*batches, *empty], *map(sum, totals), shares=totals[0])

    def _fits(self, step: Callable[[OptimizerBatch], None], batches: Batches, whole: OptimizerBatch) -> bool:
        """False, with half the budget, where memory ran out; by then the error has let go of what was computed."""
        try:
            step(whole)
            return True
        except RanOutElsewhere as there:
            if not there.budget:
                raise
            budget = there.budget
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if self.ranks.fsdp is not None:  # other processes are amid a pass, and wait for this one
                budget = max(1, max(batch.budgeted_tokens for batch in whole.microbatches) // 2)
                error.add_note(
                    "fastdpo: under FSDP2 a batch is not done again in smaller parts: set max_tokens_per_microbatch="
                    f"{budget} and resume from the last checkpoint"
                )
                raise
            largest = max([batch.budgeted_tokens for batch in batches if batch.num_pairs > 1], default=0)
            budget = self.ranks.agree(largest // 2)
            if not largest:
                longest = max(batch.budgeted_tokens for batch in whole.microbatches)
                change = "set gradient_checkpointing=True or lower" if torch.is_grad_enabled() else "lower"
                error.add_note(
                    f"fastdpo: a pair of {longest} tokens alone does not fit: {change} max_length; `fastdpo plan` says "
                    "what takes the memory"
                )
                raise
            if not budget:
                raise RanOutElsewhere(0) from None
        if self.budget is None:
            logger.warning(
                "out of GPU memory at %d tokens a micro-batch: this batch is done again, and the others are done, with "
                "at most %d; max_tokens_per_microbatch=%d starts so%s",
                *(2 * budget, budget, budget),
                "; dropout is on, and smaller micro-batches draw other masks" if self.dropout else "",
            )
            self.told = budget
        self.budget = budget
        return False

    def _within_budget(self, batches: Batches, loader: DataLoader) -> Batches:
        budget = self.budget
        if budget is None or all(batch.num_pairs == 1 or batch.budgeted_tokens <= budget for batch in batches):
            return batches
        collate: Any = loader.collate_fn
        smaller = collate.regroup(batches, budget)
        if loader.pin_memory:
            smaller[:] = [batch.pin_memory() for batch in smaller]
        return smaller


def collect_memory() -> None:
    """Gives back what a failed attempt leaves, once its error is let go of."""
    gc.collect()
    free_scratch()
    torch.cuda.empty_cache()


def out_of_memory(error: RuntimeError) -> bool:
    """Of the GPU: as torch's allocator says it, or cuBLAS and CUDA themselves."""
    words = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in words)
