"""The model of a server: its module on workers, loaded before the first request."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._logging import sparing_logger
from .._weights import device_of
from ..codes import ReplicationCode
from ..nn import CodedWrapper, Report, Waiting
from .tensors import TensorSpec

__all__ = ["Batch", "Model"]

logger = sparing_logger("coded_torch.serve")

_LOADING = 120.0  # seconds that workers may take to load the model; a bound, not tuned


class Batch(NamedTuple):
    """A computed batch.

    Attributes:
        outputs: ``[B, ...]`` each, ``predicted``, ``expected_error`` and ``verified`` behind the
            model's own. Empty if no row has an answer.
        report: the report of the call.
        unanswered: the rows without an answer.
    """

    outputs: list[Tensor]
    report: Report
    unanswered: set[int]


class Model:
    """A wrapped module that computes batches by a deadline.

    Args:
        coded: the module on its workers.
        outputs: the specs of its outputs.
        examples: its inputs, some rows of each. None: it is not run before the first request.
    """

    def __init__(
        self,
        coded: CodedWrapper,
        outputs: Sequence[TensorSpec],
        examples: Sequence[Tensor] | None = None,
    ) -> None:
        self._coded, self._outputs, self._examples = coded, outputs, examples

    def load(self) -> None:
        """Let every worker load the module and run it once: each idle worker gets one part."""
        start, pool = time.monotonic(), self._coded.workers
        pool.start()
        if self._examples is None or pool.simulated:
            return
        size = pool.num_workers or 1
        each = self._coded.replace(
            code=ReplicationCode(1, size),
            parts=None,
            predictor=None,
            waiting=Waiting.first(0, deadline=_LOADING),
            surrogate=(),
            verify=None,
        )
        with torch.no_grad():
            _, report = each.run(*(x[:1] for x in self._examples))
        loaded, seconds = len(report.received), time.monotonic() - start
        level = logging.INFO if loaded == size else logging.WARNING
        said = "%d of %d workers have run the model, after %.1f s"
        logger.log(level, said, loaded, size, seconds)

    def compute(self, inputs: list[Tensor], seconds: float) -> Batch:
        """Compute a batch. Few rows predict little, so it waits until its deadline.

        Raises:
            Exception: the model fails, and no row has an answer for another reason than time.
        """
        own = self._coded.waiting or (Waiting.first() if self._coded.code else Waiting())
        # A row on which the model fails is no reason not to predict others; it is refused alone.
        waiting = dataclasses.replace(own, deadline=seconds, on_error="predict")
        if self._coded.workers.simulated:  # other pools move what they get
            device = device_of(self._coded.module)
            inputs = [x.to(device or x.device) for x in inputs]
        rows = len(inputs[0])
        try:
            with torch.no_grad():
                answers, report = self._coded.run(*inputs, waiting=waiting)
            predicted, errors = report.predicted, report.expected_errors
        except Exception as error:
            answers, held = getattr(error, "answers", None), getattr(error, "report", None)
            if not isinstance(held, Report) or not held.missing_rows:
                raise
            report, predicted, errors = held, torch.zeros(rows, dtype=torch.bool), None
        unanswered = set() if own.on_error == "predict" else set(report.refused)
        if report.failed or report.ended == "failed":
            unanswered |= {*report.refused, *report.missing_rows}
        if answers is None:
            return Batch([], report, unanswered)
        leaves = self._checked(pytree.tree_leaves(answers), rows)
        assert predicted is not None  # there are answers
        if errors is None:
            errors = torch.zeros(rows).masked_fill(predicted, torch.nan)
        verified = (
            torch.zeros(rows, dtype=torch.bool) if report.verified is None else report.verified
        )
        return Batch([*leaves, predicted, errors.float(), verified], report, unanswered)

    def _checked(self, leaves: list[Any], rows: int) -> list[Tensor]:
        if len(leaves) != len(self._outputs):
            must = f"the model must return {len(self._outputs)} tensors"
            raise TypeError(f"{must}, got {len(leaves)}")
        for spec, leaf in zip(self._outputs, leaves, strict=True):
            whole = isinstance(leaf, Tensor) and leaf.dtype is spec.dtype and len(leaf) == rows
            if not (whole and spec.fits(leaf.shape[1:])):
                got = f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, Tensor) else leaf
                must = f"{spec.datatype} {[rows, *spec.shape]}"
                raise TypeError(f"output {spec.name!r} of the model must be {must}, got {got}")
        return leaves
