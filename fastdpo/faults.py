"""Errors whose cause lies outside of a run: what to do about each, and where the run goes on, noted on them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdpo.checkpoint import onwards

logger = logging.getLogger(__name__)

# Words of an error -> what it means. They come as errors of many kinds: safetensors', RuntimeErrors, a worker's own.
GLOO = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "pair closure")
ADVICE = {
    ("killed by signal", "exited unexpectedly", "file </torch_"): (  # the last are files in /dev/shm, that has no room
        "a process that prepares batches ended. What a system kills is most often out of the machine's memory, or of "
        "/dev/shm: ask for fewer dataloader_num_workers, or for 0, which says more where a row is at fault"
    ),
    ("No space left",): "the disk is full: make room",
    ("in DataLoader worker process",): (
        "a process that prepares batches raised it, as its own traceback says; with dataloader_num_workers=0 it comes "
        "where it can be looked at"
    ),
    GLOO: "another process of this run ended, or did nothing for ddp_timeout seconds: its own error says why",
}


@contextmanager
def explained(output_dir: Path) -> Iterator[None]:
    """Within it such errors are noted upon."""
    try:
        yield
    except Exception as error:
        for words, advice in ADVICE.items():
            if any(word in str(error) for word in words):
                note = f"fastdpo: {advice}. {onwards(output_dir)}"
                error.add_note(note)
                if words is GLOO:  # torchrun ends this process too, perhaps before it has shown a traceback
                    logger.error("%s (%s)", note, error)
                break
        raise
