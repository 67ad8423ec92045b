"""Calls in a thread, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from ..workers.live import INTERRUPTION, Ambient, Interruption

__all__ = ["in_thread"]

_T = TypeVar("_T")


async def in_thread(call: Callable[[], _T]) -> _T:
    """Await a call that runs in a thread, with the context variables and torch modes of this one.

    If the awaiting task is cancelled, the request of the call is interrupted, so that the thread
    ends and parts that no worker has begun are dropped.
    """
    ambient, interruption = Ambient.capture(), Interruption()

    def run() -> _T:
        INTERRUPTION.set(interruption)  # in the context of the thread
        with ambient.restored(ambient.default_device):
            return call()

    try:
        return await asyncio.to_thread(run)
    except asyncio.CancelledError:
        interruption.set()
        raise
