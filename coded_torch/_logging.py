"""Loggers whose warnings stay readable: one per cause and minute."""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable

__all__ = ["Sparing", "sparing_logger"]

# Bounds, not tuned: seconds between two warnings of a cause, remembered causes, and the characters
# by which each is remembered.
_SECONDS, _MOST_CAUSES, _CHARACTERS = 60.0, 256, 200


class Sparing(logging.Filter):
    """Passes one warning per cause and minute, which says how many were held back before it.

    Two warnings of one logger have the same cause if their texts differ in numbers only: the
    worker, its process, the row, the shape. The clock is monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self.forget()
        # A fork may happen while another thread holds the lock.
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """Forget all causes, so that each passes again."""
        self._lock = threading.Lock()
        # When a cause passed last, and the number held back since; the least recent first.
        self._causes: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        text, now = record.getMessage(), self._clock()
        cause = record.name, re.sub(r"\d[\w.]*", "#", text)[:_CHARACTERS]
        with self._lock:
            since, held = self._causes.pop(cause, (-math.inf, 0))
            passes = now - since >= _SECONDS
            self._causes[cause] = (now, 0) if passes else (since, held + 1)
            if len(self._causes) > _MOST_CAUSES:
                del self._causes[next(iter(self._causes))]
        if passes and held:
            record.msg, record.args = f"{text} ({held} more like it since the last one)", ()
        return passes


SPARING = Sparing()


def sparing_logger(name: str) -> logging.Logger:
    """Return the logger of that name, with the filter."""
    logger = logging.getLogger(name)
    logger.addFilter(SPARING)
    return logger
