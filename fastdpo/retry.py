"""The answer to a GPU that runs out of memory: the batch is done again in micro-batches of half the size, and so are
later ones, of training as of evaluation. The numbers are the same up to the rounding of sums, unless dropout is on:
masks are drawn a micro-batch, and smaller ones draw others.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from fastdpo.batch import PreferenceBatch

logger = logging.getLogger(__name__)

Batches = Sequence[PreferenceBatch]  # the micro-batches of an optimizer batch, on the CPU


class Retry:
    """Runs the batches of loaders; once memory ran out, their micro-batches keep within a token budget."""

    def __init__(self, dropout: bool = False) -> None:
        self.dropout = dropout
        self.budget: int | None = None
        self._told: int | None = None  # the budget that the user knows of

    def __call__(
        self,
        step: Callable[[Batches], None],
        batches: Batches,
        loader: DataLoader,
        undo: Callable[[], None] = lambda: None,
    ) -> None:
        """`step(batches)` until it is through, each failed attempt undone; one pair that does not fit alone raises.

        `loader` gave the batches: smaller ones are collated and pinned as it does.
        """
        batches = self._within_budget(batches, loader)
        while not self._fits(step, batches):
            undo()
            collect_memory()
            batches = self._within_budget(batches, loader)

    def report(self) -> None:
        """Says which budget is in use, where it is another one than was said last."""
        if self.budget != self._told:
            logger.warning(
                "memory ran out again: by now micro-batches have at most %d tokens; max_tokens_per_microbatch=%d "
                "starts so",
                *(self.budget, self.budget),
            )
        self._told = self.budget

    def _fits(self, step: Callable[[Batches], None], batches: Batches) -> bool:
        """False, with half the budget, where memory ran out; by then the error has let go of what was computed."""
        try:
            step(batches)
            return True
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if all(batch.num_pairs == 1 for batch in batches):
                longest = max(batch.input_ids.numel() for batch in batches)
                change = "set gradient_checkpointing=True or lower" if torch.is_grad_enabled() else "lower"
                error.add_note(
                    f"fastdpo: a pair of {longest} tokens alone does not fit: {change} max_length; `fastdpo plan` says "
                    "what takes the memory"
                )
                raise
        largest = max(batch.input_ids.numel() for batch in batches if batch.num_pairs > 1)
        if self.budget is None:
            logger.warning(
                "out of GPU memory at %d tokens a micro-batch: this batch is done again, and the others are done, with "
                "at most %d; max_tokens_per_microbatch=%d starts so%s",
                *(largest, largest // 2, largest // 2),
                "; dropout is on, and smaller micro-batches draw other masks" if self.dropout else "",
            )
            self._told = largest // 2
        self.budget = largest // 2
        return False

    def _within_budget(self, batches: Batches, loader: DataLoader) -> Batches:
        budget = self.budget
        if budget is None or all(batch.num_pairs == 1 or batch.input_ids.numel() <= budget for batch in batches):
            return batches
        collate: Any = loader.collate_fn
        smaller = collate.regroup(batches, budget)
        return [batch.pin_memory() for batch in smaller] if loader.pin_memory else smaller


def collect_memory() -> None:
    """Gives back what a failed attempt leaves, once its error is let go of."""
    gc.collect()
    torch.cuda.empty_cache()


def out_of_memory(error: RuntimeError) -> bool:
    """Of the GPU: as torch's allocator says it, or cuBLAS and CUDA themselves."""
    words = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in words)
