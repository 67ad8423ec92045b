"""Rows that hang or end workers, which are refused before they reach further ones."""

import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..table import Part
from .protocol import RequestError

# Bounds, which are not tuned.
_MOST_ROWS = 1024
_SECONDS = 300.0  # for which a row is remembered
_ENOUGH = 2  # workers that have to end at a row
_SHARE = 3  # a client with a known address may have hung one worker of so many


class Suspects:
    """Remembers rows that, alone in a part, got no result before the end of their call.

    While a worker is at such a row, the row is refused (503). A worker that returns a result,
    however late, clears it. Once two workers have ended at it, by themselves or by the hang
    timeout, it is refused (500) for five minutes. A client whose rows hang a third of the workers
    gets 503, if its address is known. Any thread may call.
    """

    def __init__(self) -> None:
        self._key = os.urandom(16)
        self._lock = threading.Lock()
        # By the digest of a row, its parts, the client that sent it, and when.
        self._rows: OrderedDict[bytes, tuple[list[Part], str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._rows

    def note(
        self,
        inputs: Sequence[Any],
        clients: Sequence[str],
        unfinished: dict[int, list[Part]],
        computed: Iterable[int],
    ) -> None:
        """Note the rows of a batch without a result, with their parts, and forget computed ones."""
        now = time.monotonic()
        for part in (part for parts in unfinished.values() for part in parts):
            part.of = None  # whose results are not kept
        found = {self.digest(inputs, row): row for row in unfinished}
        known = self._rows and {self.digest(inputs, row) for row in computed}
        with self._lock:
            for digest in known or ():
                self._rows.pop(digest, None)
            for digest, row in found.items():
                parts = self._rows.pop(digest, ([], "", now))[0][-_ENOUGH:]
                self._rows[digest] = parts + unfinished[row], clients[row], now
            while len(self._rows) > _MOST_ROWS:
                self._rows.popitem(last=False)

    def check(self, digests: Sequence[bytes], client: str, workers: int) -> None:
        """Refuse a request one of whose rows, or whose client, hangs workers."""
        now = time.monotonic()
        with self._lock:
            held = 0
            for digest, (parts, sender, since) in [*self._rows.items()]:
                parts[:] = [part for part in parts if _is_held(part) or part.kind == "died"]
                if not parts or now > since + _SECONDS:
                    del self._rows[digest]
                elif sender and sender == client:
                    held += sum(map(_is_held, parts))
            for row, digest in enumerate(digests):
                parts = self._rows[digest][0] if digest in self._rows else []
                if any(map(_is_held, parts)):
                    why = f"a worker is still at row {row}, which an earlier request had"
                    raise RequestError(503, "unavailable", why)
                if len(parts) >= _ENOUGH:
                    why = f"row {row} hung or ended {len(parts)} workers, so it is not computed now"
                    raise RequestError(500, "failed", why)
        if held and held >= workers // _SHARE:
            why = f"{held} of {workers} workers are still at rows of your earlier requests"
            raise RequestError(503, "unavailable", why)

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


def _is_held(part: Part) -> bool:
    """Return whether a worker is at a part whose call has ended."""
    return part.request is not None
