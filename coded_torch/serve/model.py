"""The model of a server: its module on workers, loaded before the first request."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._arguments import sparing_logger
from .._torch import device_of
from ..nn import CodedWrapper, Report, Waiting
from ..open_inference.tensors import TensorSpec
from ..workers import WorkerError

__all__ = ["Batch", "compute", "load"]

logger = sparing_logger("coded_torch.serve")

# The fields of a report that are the added outputs of the protocol, in this order.
_ADDED = (
    ("predicted", torch.bool),
    ("radii", torch.float32),
    ("label_risks", torch.float32),
    ("source", torch.uint8),
    ("verified", torch.bool),
)
_LOADING = 120.0  # seconds that workers may take to load the model; a bound, not tuned


class Batch(NamedTuple):
    """The answers of a batch, or of one of its requests.

    Attributes:
        outputs: the model's own, ``[B, ...]`` each, then the added ones of the protocol. Empty if
            no row has an answer.
        report: the report of the call.
        unanswered: the rows without an answer.
        rows: of the call's batch.
    """

    outputs: list[Tensor]
    report: Report
    unanswered: set[int]
    rows: slice = slice(None)


def load(coded: CodedWrapper, examples: Sequence[Tensor] | None) -> None:
    """Start the workers. With examples, let each load the module and run it on one row.

    Raises:
        WorkerError: the module fails on the examples.
    """
    start, pool = time.monotonic(), coded.workers
    if examples is None:
        pool.start()
        return
    try:
        pool.start(coded.module, tuple(x[:1] for x in examples), timeout=_LOADING)
    except RuntimeError as error:
        if isinstance(error, WorkerError) and error.kind == "raised":
            raise
        logger.warning("not every worker has run the model: %s", error)
    else:
        size, seconds = pool.num_workers or "all", time.monotonic() - start
        logger.info("%s workers have run the model, after %.1f s", size, seconds)


def compute(
    coded: CodedWrapper, specs: Sequence[TensorSpec], inputs: list[Tensor], seconds: float
) -> Batch:
    """Compute a batch. If rows are missing, they are predicted at the end of the seconds.

    Raises:
        TypeError: the outputs do not have the specs.
        Exception: the module fails, and no row has an answer for another reason than time.
    """
    own = coded.waiting or (Waiting.first() if coded.code else Waiting())
    # Other rows are predicted even if the module fails on one, which is refused alone.
    waiting = dataclasses.replace(own, deadline=seconds, on_error="predict")
    if coded.workers.simulated:  # other pools move their inputs
        device = device_of(coded.module)
        inputs = [x.to(device or x.device) for x in inputs]
    try:
        with torch.no_grad():
            answers, report = coded.run(*inputs, waiting=waiting)
    except Exception as error:
        held = getattr(error, "report", None)
        if not isinstance(held, Report) or not held.missing_rows:
            raise
        answers, report = getattr(error, "answers", None), held
    unanswered = set() if own.on_error == "predict" else set(report.refused)
    if report.failed or report.ended == "failed":
        unanswered |= {*report.refused, *report.missing_rows}
    if answers is None:
        return Batch([], report, unanswered)
    rows, leaves = len(inputs[0]), pytree.tree_leaves(answers)
    got = [(leaf.dtype, list(leaf.shape)) for leaf in leaves if isinstance(leaf, Tensor)]
    fit = len(got) == len(leaves) == len(specs) and all(
        dtype is spec.dtype and shape[:1] == [rows] and spec.fits(shape[1:])
        for spec, (dtype, shape) in zip(specs, got, strict=True)
    )
    if not fit:
        must = [(spec.dtype, [rows, *spec.shape]) for spec in specs]
        raise TypeError(f"the model must return tensors {must}, got {got}")
    # Without a value, exact rows get 0, and predicted rows NaN.
    nothing = torch.zeros(rows)
    unknown = (
        nothing if report.predicted is None else nothing.masked_fill(report.predicted, math.nan)
    )
    added = []
    for name, dtype in _ADDED:
        values = getattr(report, name)
        if values is None:
            values = unknown if dtype.is_floating_point else nothing
        added.append(values.to(dtype))
    return Batch([*leaves, *added], report, unanswered)
