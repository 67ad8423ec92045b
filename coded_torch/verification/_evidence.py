"""Evidence over many calls against workers whose results did not fit the others' of a code."""

import contextlib
import threading
from collections import defaultdict, deque
from collections.abc import Collection
from typing import Any

#: Calls of a worker that are remembered, all of which are needed before it is excluded. An honest
#: worker that is dropped from one of 50 calls is dropped in 8 of 20 with a probability of 3e-9. Of
#: workers that shift results smoothly, each is dropped in 9 to 13 of 20 calls on LeNet-5.
CALLS = 20
ENOUGH = 8


class Evidence:
    """The calls in which results of the workers of one pool were dropped. Thread-safe.

    A worker is excluded if its results were dropped in at least 8 of its last 20 calls.

    Args:
        pool: the pool, which excludes workers if it can.
    """

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self._calls = defaultdict[int, deque[bool]](lambda: deque(maxlen=CALLS))
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:  # a copy begins anew
        return type(self), (self.pool,)

    def add(self, received: Collection[int], dropped: Collection[int]) -> tuple[int, ...]:
        """Note a call's workers, and those whose results were dropped; return the excluded ones."""
        exclude = self.pool.exclude
        if exclude is None:  # its workers are no machines that calls meet again
            return ()
        excluded = list[int]()
        with self._lock:
            for worker in sorted(received):
                calls = self._calls[worker]
                calls.append(worker in dropped)
                if len(calls) == CALLS and sum(calls) >= ENOUGH:
                    del self._calls[worker]  # a restarted worker begins anew
                    with contextlib.suppress(ValueError):  # it may have left
                        exclude(worker)
                        excluded.append(worker)
        return tuple(excluded)
