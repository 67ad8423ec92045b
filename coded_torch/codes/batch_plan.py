"""Old names, until the wrapper uses the new ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..input_space import regression
from .plans import BatchPlan

__all__ = ["BatchPlan", "few_columns", "plan_batch", "plan_rows"]


def few_columns(results: Tensor) -> Tensor:
    flat = results.flatten(0, 1)
    return regression.few_columns(flat, torch.arange(len(flat)))


def plan_batch(
    code: Any, ordering: Any, inputs: Sequence[Tensor], num_stragglers: int, **more: Any
) -> BatchPlan:
    if not (isinstance(ordering, str) and ordering == "similarity"):
        code = copy.copy(code)
        code.ordering = ordering
    plan: BatchPlan = code.plan(inputs, num_stragglers, **more)
    return plan


def plan_rows(code: Any, ordering: Any, inputs: Sequence[Tensor], **more: Any) -> Any:
    if not hasattr(code, "regression"):
        size = more.get("batch_size") or len(inputs[0])
        plan = regression.Regression().plan([], batch_size=size)
        plan._note = ""
        return plan
    return code.regression.plan(inputs, chunk=code.max_chunk, **more)
