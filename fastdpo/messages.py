"""What a run says: plain lines on stderr from every module of fastdpo."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

WARNINGS: deque[tuple[float, str]] = deque(maxlen=200)  # of this process, the last ones: when, and what it said


class _Kept(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        WARNINGS.append((record.created, record.getMessage()))


_KEPT = _Kept(logging.WARNING)


def show_messages(config: Any = None) -> None:
    """Shows the package's messages unless the program has set up logging of its own; `config.log_level` is heeded."""
    config = config if hasattr(config, "should_log") else None  # what is none is refused by whoever reads it
    package = logging.getLogger("fastdpo")
    if package.level == logging.NOTSET:
        package.setLevel(logging.INFO)
    chosen = (getattr(config, "log_level", "passive"), getattr(config, "log_level_replica", "warning"))
    if chosen[0] != "passive" or config is not None and not config.should_log and chosen[1] != "warning":
        package.setLevel(config.get_process_log_level())  # type: ignore[union-attr]
    elif config is not None and not config.should_log and package.level < logging.ERROR:
        package.setLevel(logging.ERROR)  # of several processes the first one speaks
    if not set(package.handlers) - {_KEPT} and not logging.getLogger().handlers:
        package.addHandler(logging.StreamHandler())
    package.addHandler(_KEPT)  # once, however often it is added
