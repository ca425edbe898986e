"""Trackers (TensorBoard, Weights & Biases and the others that transformers knows) tell of a run, and never end it.

What one of them raises, at its set-up, at a log line or at the end, is a warning with its name and error, once, and the
run goes on: every row is in metrics.jsonl. It is asked again, as a service may come back, until it has failed PATIENCE
times in a row, since each time may be minutes of waiting. It is so for trackers of `report_to` and for those given as
callbacks. A callback of the user's own, one derived from a tracker too, ends the run with what it raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler

logger = logging.getLogger(__name__)

PATIENCE = 3
FAILED: WeakKeyDictionary[TrainerCallback, int] = WeakKeyDictionary()  # trackers that did: how often in a row
EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


class Callbacks(CallbackHandler):
    """transformers' handler, with trackers that are forgiven their errors. They stay of their class, by which scripts
    find and remove them.
    """

    def add_callback(self, callback: Any) -> None:
        super().add_callback(callback)
        tracker = self.callbacks[-1]
        if type(tracker) in INTEGRATION_TO_CALLBACK.values():
            for event in EVENTS:
                own = getattr(type(tracker), event) is not getattr(TrainerCallback, event)
                if own and event not in vars(tracker):  # another trainer may have had it
                    setattr(tracker, event, partial(attempt, tracker, event, getattr(tracker, event)))


def attempt(callback: Any, event: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """-> what the call returns; None where the callback is a tracker, and raised, or did so too often."""
    if type(callback) not in INTEGRATION_TO_CALLBACK.values():
        return call(*args, **kwargs)
    failures = FAILED.get(callback, 0)
    if failures == PATIENCE:
        return None
    try:
        result = call(*args, **kwargs)
    except Exception as error:
        words, name = f"{type(error).__name__}: {error}", type(callback).__name__
        if callback not in FAILED:
            logger.warning("%s failed in %s (%s): the run goes on, and metrics.jsonl has every row", name, event, words)
        FAILED[callback] = failures + 1
        if failures + 1 == PATIENCE:
            times = f"{PATIENCE} times in a row, the last time in {event} ({words})"
            logger.warning("%s failed %s: it is left out from here on", name, times)
        return None
    if failures:
        FAILED[callback] = 0
    return result
