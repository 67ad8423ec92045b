r"""Wrappers over the batches of Ray Data."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._arguments import check, instance, named
from .coded_wrapper import CodedWrapper
from .report import Report


class RayDataPredictor:
    r"""Adds the answers of a wrapper to each batch of Ray Data, for ``Dataset.map_batches``.

    Each actor of Ray Data makes its wrapper once, and keeps its workers between the batches. A
    batch gets columns for the answers; ``estimated``, bool, true if no worker computed the answer;
    and ``error_bound``, float64, NaN where there is none, see :attr:`Report.error_bounds`.

    Args:
        factory: makes the wrapper, in the actor.
        inputs: the columns that are the positional arguments of the module. Defaults to "data", the
            column of a dataset that was made of one array.
        output: the column for the answers, and the first word of those of a tuple. Keys of a dict
            and fields of a named tuple name their columns. Defaults to "answer".

    Example:
        .. code-block:: python

            def make():
                return CodedWrapper(load_model(), workers=workers.ProcessWorkers(6))

            data.map_batches(RayDataPredictor, fn_constructor_args=(make,), concurrency=1)
    """

    def __init__(
        self,
        factory: Callable[[], CodedWrapper],
        inputs: Sequence[str] = ("data",),
        output: str = "answer",
    ) -> None:
        self.coded = factory()
        instance(self, "the result of factory", self.coded, CodedWrapper)
        self.inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
        self.output = output

    def __call__(self, batch: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        """Return the batch, a dict of arrays ``[B, ...]``, with more columns."""
        missing = sorted(set(self.inputs) - batch.keys())
        check(self, not missing, f"inputs must be columns of the batch, {[*batch]}", missing)
        with torch.no_grad():
            answers, report = self.coded.run(*(torch.tensor(batch[name]) for name in self.inputs))
        outputs = named(self, answers, self.output)
        return {**batch, **columns_of(self, outputs, report, batch)}


def columns_of(
    owner: object,
    outputs: Mapping[str, Any],
    report: Report,
    known: Collection[str],
    name: str = "error_bound",
) -> dict[str, np.ndarray[Any, Any]]:
    """Return outputs by name as arrays, ``estimated`` and error bounds, none of which is known."""
    more = {}
    for output, column in outputs.items():
        instance(owner, f"the output {output!r}", column, Tensor)
        column = column.float() if column.dtype is torch.bfloat16 else column
        more[output] = column.cpu().numpy()
    estimated = np.asarray(report.estimated)
    bounds = (
        np.full(len(estimated), np.nan)
        if report.error_bounds is None
        else report.error_bounds.numpy()
    )
    notes = {"estimated": estimated, name: bounds}
    twice = sorted((more.keys() & {*known}) | (notes.keys() & {*known, *more}))
    must = f"the columns {', '.join([*more, *notes])}, which are added, must be new"
    check(owner, not twice, must, twice)
    return more | notes
