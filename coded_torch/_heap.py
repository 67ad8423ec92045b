"""Python's collector, kept from what a process that answers has set up."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["frozen_heap"]


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Keep full collections from looking at what is there already, in all of the process.

    One stops all threads while it looks at every object: some 100 ms with torch imported. Where the
    host has frozen objects itself, they stay frozen, as all have to be unfrozen at once.
    """
    by_host = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not by_host:
            gc.unfreeze()
