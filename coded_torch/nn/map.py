"""Calls for many batches, several of them open at once."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..workers.live import INTERRUPTION, Ambient, Interruption

__all__ = ["map_batches"]


def map_batches(
    run: Callable[..., tuple[Any, Any]], batches: Iterable[Any], in_flight: int
) -> Iterator[tuple[Any, Any]]:
    """Yield the answers and the report of each batch, in order.

    At most ``in_flight`` batches, with their results, exist at once, besides the caller's own. If
    the generator ends early, by an exception or Ctrl-C, the open calls end.

    Args:
        run: takes the positional arguments of a call and returns the answers and the report.
        batches: inputs, or tuples of positional arguments.
        in_flight: the number of calls that are open at once.

    Raises:
        Exception: a call fails. Its attribute ``batch`` is the number of the batch.
    """
    ambient, left = Ambient.capture(), iter(batches)

    def call(interruption: Interruption, batch: Any) -> tuple[Any, Any]:
        INTERRUPTION.set(interruption)  # holds in the context of this call
        with ambient.restored(ambient.default_device):
            return run(*(batch if isinstance(batch, tuple) else (batch,)))

    calls: deque[tuple[Any, Interruption]] = deque()
    threads = ThreadPoolExecutor(in_flight, "coded_torch map")
    try:
        for number in itertools.count():
            for batch in itertools.islice(left, in_flight - len(calls)):
                interruption, context = Interruption(), contextvars.copy_context()
                future = threads.submit(context.run, call, interruption, batch)
                calls.append((future, interruption))
            if not calls:
                return
            try:
                found = calls[0][0].result()
            except BaseException as error:
                _note(error, number)
                raise
            calls.popleft()
            yield found
            del found
    except KeyboardInterrupt:  # nothing may be left that keeps the next call waiting
        for _, interruption in calls:
            interruption.abandon()
        raise
    finally:
        for future, interruption in calls:
            future.cancel()
            interruption.set()
        threads.shutdown(wait=False)


def _note(error: BaseException, number: int) -> None:
    """Say in an exception which batch it belongs to, and how many were answered before."""
    note = f"CodedWrapper.map: at batch {number}; the {number} batches before it were answered"
    with contextlib.suppress(Exception):  # a class may have slots, or refuse attributes
        error.batch = number  # type: ignore[attr-defined]
        # Python 3.10 has no add_note.
        error.__notes__ = [*getattr(error, "__notes__", ()), note]
