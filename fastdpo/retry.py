"""The answer to a GPU that runs out of memory: the step is done again in micro-batches of half the size, with the same
numbers, and so are later steps.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence

import torch

from fastdpo.batch import PreferenceBatch
from fastdpo.loader import Collate

logger = logging.getLogger(__name__)

Batches = Sequence[PreferenceBatch]  # the micro-batches of an optimizer batch, on the CPU


class Retry:
    """Runs steps; once memory ran out, their micro-batches keep within a token budget."""

    def __init__(self, collate: Collate, pinned: bool) -> None:
        """`collate` made the batches; `pinned`: smaller ones are to be pinned as the loader's are."""
        self.collate, self.pinned = collate, pinned
        self.budget: int | None = None

    def __call__(self, step: Callable[[Batches], None], batches: Batches, undo: Callable[[], None]) -> None:
        """`step(batches)` until it is through, each failed attempt undone; one pair that does not fit alone raises."""
        batches = self._within_budget(batches)
        while not self._fits(step, batches):
            undo()
            gc.collect()
            torch.cuda.empty_cache()
            batches = self._within_budget(batches)

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
                error.add_note(
                    f"fastdpo: a pair of {longest} tokens alone does not fit: set gradient_checkpointing=True or lower "
                    "max_length; `fastdpo plan` says what takes the memory"
                )
                raise
        largest = max(batch.input_ids.numel() for batch in batches if batch.num_pairs > 1)
        if self.budget is None:
            logger.warning(
                "out of GPU memory at %d tokens a micro-batch: this step is done again, and the others are done, with "
                "at most %d; max_tokens_per_microbatch=%d starts so",
                *(largest, largest // 2, largest // 2),
            )
        self.budget = largest // 2
        return False

    def _within_budget(self, batches: Batches) -> Batches:
        budget = self.budget
        if budget is None or all(batch.num_pairs == 1 or batch.input_ids.numel() <= budget for batch in batches):
            return batches
        smaller = self.collate.regroup(batches, budget)
        return [batch.pin_memory() for batch in smaller] if self.pinned else smaller


def out_of_memory(error: RuntimeError) -> bool:
    """Of the GPU: as torch's allocator says it, or cuBLAS and CUDA themselves."""
    words = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in words)
