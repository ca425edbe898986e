"""Signals that end a run: it finishes its step, saves a checkpoint, and then ends as the signal asks.

SIGTERM is what schedulers send some seconds or minutes before they take a machine away, SIGINT is Ctrl-C. A second
SIGINT ends the run at once.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """The signal that came, 0 before."""

    def __init__(self) -> None:
        self.seen = self.process = 0

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within it signals are noted; in other threads than the main one, Python leaves them as they are."""
        self.seen, self.process = 0, os.getpid()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heeded = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]  # nohup
        before = {number: signal.signal(number, self._note) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:  # forked by a callback or a pool: it has no run to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.seen = number
        logger.warning("%s: the run saves and ends after this step", signal.Signals(number).name)


def end(number: int) -> None:
    """As the signal does: KeyboardInterrupt, or the exit status that shells give it."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
