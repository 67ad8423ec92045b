"""Rows that hang or end workers, and the clients that send them."""

import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._table import Part
from ._protocol import RequestError

# Bounds, which are not tuned.
_MOST_PARTS = 1024
_MOST_CLIENTS = 4096  # that are known
_SECONDS = 300.0  # for which a part is remembered
_ENOUGH = 2  # workers that have to end at a row
_TRUSTED = 32  # rows of a client that were computed, so that one that hangs may be the worker's
# For which a worker that ended at a part counts as taken, about as long as one that hangs.
_ENDED_SECONDS = 10.0


class _Suspect(NamedTuple):
    """A part that got no result before the end of its call."""

    part: Part
    row: bytes  #: the digest of its row; empty if it has several
    client: str  #: the sender of its rows without an answer; empty if several clients sent them
    since: float

    @property
    def is_held(self) -> bool:
        """Whether a worker is at it, though its call has ended."""
        return self.part.request is not None


class Suspects:
    """Remembers parts that got no result before the end of their call, and clients with answers.

    - A row is refused (503) while a worker is at it, alone in a part, after its call has ended. A
      result of the row, however late, clears it. Once two workers have ended at the row, by
      themselves or by the hang timeout, it is refused (500) for five minutes.
    - A client is known once a row of it was computed. It is not known while a worker is at one of
      its parts after the call, or has just ended at one. Once 32 of its rows were computed, it
      stays known while this is so for the parts of one call only: a worker that the system has
      stopped stays at any row.

    Any thread may call.
    """

    def __init__(self) -> None:
        self._key = os.urandom(16)
        self._lock = threading.Lock()
        self._parts = list[_Suspect]()
        # The computed rows of clients; the last to be answered is last.
        self._answered = OrderedDict[str, int]()

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def rows(self) -> set[bytes]:
        """The digests of rows that, alone in a part, got no result."""
        return {suspect.row for suspect in self._parts}

    @property
    def num_held(self) -> int:
        """The number of workers that are at such parts."""
        return len([suspect for suspect in self._parts if suspect.is_held])

    @property
    def held(self) -> list[int]:
        """The places of the workers that are at such parts; those of known clients are last."""
        held = [suspect for suspect in self._parts if suspect.is_held]
        return [x.part.worker for x in sorted(held, key=lambda x: self.knows(x.client))]

    @property
    def num_stuck(self) -> int:
        """The number of workers that are at such parts, or have just ended at them."""
        return len(self._stuck)

    @property
    def _stuck(self) -> list[_Suspect]:
        since = time.monotonic() - _ENDED_SECONDS
        return [
            suspect
            for suspect in self._parts
            if suspect.is_held or (suspect.since > since and suspect.part.kind == "died")
        ]

    def knows(self, client: str) -> bool:
        """Return whether a client is known."""
        rows = self._answered.get(client, 0)
        calls = {suspect.since for suspect in self._stuck if suspect.client == client}
        return rows > 0 and len(calls) <= int(rows >= _TRUSTED)

    def note(
        self,
        inputs: Sequence[Any],
        clients: Sequence[str],
        unfinished: Sequence[Part],
        computed: Collection[int],
    ) -> None:
        """Note the parts of a batch without a result, the sender of each row, and computed rows."""
        now = time.monotonic()
        found = list[_Suspect]()
        for part in unfinished:
            part.of = None  # whose results are not kept
            digest = b""
            if len(part.units) == 1:
                digest = self.digest(inputs, part.units[0])
            senders = {clients[unit] for unit in part.units if unit not in computed}
            client = ""
            if len(senders) == 1:
                (client,) = senders
            found.append(_Suspect(part, digest, client, now))
        cleared = {self.digest(inputs, row) for row in computed} if self._parts else set()
        with self._lock:
            kept = [suspect for suspect in self._parts if suspect.row not in cleared]
            self._parts = (kept + found)[-_MOST_PARTS:]
            for row in computed:
                self._answered[clients[row]] = self._answered.get(clients[row], 0) + 1
                self._answered.move_to_end(clients[row])
            while len(self._answered) > _MOST_CLIENTS:
                self._answered.popitem(last=False)

    def refusal(self, digests: Sequence[bytes]) -> RequestError | None:
        """Return the error of a request if one of its rows hangs or ends workers, else None."""
        latest = time.monotonic() - _SECONDS
        with self._lock:
            self._parts = [
                suspect
                for suspect in self._parts
                if suspect.since >= latest and (suspect.is_held or suspect.part.kind == "died")
            ]
            parts = self._parts
        for row, digest in enumerate(digests):
            same = [suspect for suspect in parts if suspect.row == digest]
            if any(suspect.is_held for suspect in same):
                why = f"a worker is still at row {row}, which an earlier request had"
                return RequestError(503, "unavailable", why)
            if len(same) >= _ENOUGH:
                why = f"row {row} hung or ended {len(same)} workers, so it is not computed now"
                return RequestError(500, "failed", why)
        return None

    def digest(self, inputs: Sequence[Any], row: int) -> bytes:
        """Return what stands for a row."""
        digest = hashlib.blake2b(key=self._key, digest_size=16)
        for piece in _pieces(inputs, row):
            digest.update(piece)
        return digest.digest()


def _pieces(inputs: Sequence[Any], row: int) -> Iterator[bytes | memoryview]:
    for batch in inputs:
        if not isinstance(batch, Tensor):
            text = batch[row].encode()
            yield b"%d " % len(text) + text
            continue
        yield str(batch.shape[1:]).encode()
        yield batch[row].contiguous().reshape(-1).view(torch.uint8).numpy().data
