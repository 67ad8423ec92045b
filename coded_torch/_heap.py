"""The garbage collector of a process that answers requests."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["frozen_heap"]


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Keep full collections from visiting the objects that exist already, in the whole process.

    A full collection stops all threads while it visits every object: some 100 ms with torch
    imported. If the host has frozen objects itself, all stay frozen: Python unfreezes all or none.
    """
    by_host = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not by_host:
            gc.unfreeze()
