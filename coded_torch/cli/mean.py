"""Print intervals for means, by ``coded-torch job --mean``, and keep the rows to resume with."""

import contextlib
import hashlib
import io
from argparse import Namespace
from collections.abc import Mapping
from inspect import BoundArguments
from typing import Any

import torch

from ..codes import NotEnoughResults
from ..nn import CodedWrapper
from ..nn.mean import Looks
from ..workers import WorkerError
from . import say, usage
from .files import Rows, replace


def mean(args: Namespace, coded: CodedWrapper, rows: Rows, read: Any) -> None:
    """Print an interval after each look, and keep the numbers of the rows that are computed."""
    path, batches = args.output / "mean.pt", _Batches(rows.total, args.batch_size, read)
    with usage(f"{path} cannot be read", errors=Exception):
        known = torch.load(path, weights_only=True) if path.exists() else {}
        if known and known["digest"] != _digest_of_mean(known):
            raise ValueError("it is damaged; remove it to start again")
    start(coded, batches[0])
    with usage(prefix="mean: "), usage(errors=NotEnoughResults):
        looks = Looks(coded, batches, args.of, None, 0.95, False, known.get("seed"))
        if known:
            looks.numbers, looks.shares = [known["numbers"]], known["shares"]
            looks.sizes = [size for size in looks.sizes if size >= known["rows"]]
        for found in looks.until(args.half_width):
            known = {"numbers": torch.cat(looks.numbers), "shares": looks.shares}
            known |= vars(found) | {"seed": looks.seed}
            torch.save(known | {"digest": _digest_of_mean(known)}, file := io.BytesIO())
            replace(path, file.getbuffer())
            some = zip(found.value[:8].tolist(), found.half_width.tolist(), strict=False)
            shown = ", ".join(f"{value:.5g} ± {half:.2g}" for value, half in some)
            more = ", ..." if len(found.value) > 8 else ""
            say(f"{found.rows:,} of {rows.total:,} rows: {shown}{more}")


def _digest_of_mean(known: Mapping[str, Any]) -> str:
    """Return a digest of all that a mean goes on with."""
    numbers = (known[name].numpy().tobytes() for name in ("numbers", "shares"))
    rest = repr((known["rows"], known["seed"])).encode()
    return hashlib.sha256(b"".join([*numbers, rest])).hexdigest()


class _Batches:
    """The batches of a file, each of which is read when it is needed."""

    def __init__(self, rows: int, size: int, read: Any) -> None:
        self._starts, self._read = range(0, rows, size), read

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> Any:
        return next(self._read([self._starts[number]]))


def start(coded: CodedWrapper, first: BoundArguments) -> None:
    """Start workers on a batch. If the model fails on its rows, the call says so."""
    with usage(errors=TypeError, prefix="Workers: "), contextlib.suppress(WorkerError):
        coded.workers.start_on(coded.module, first)
