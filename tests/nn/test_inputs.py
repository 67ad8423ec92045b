"""What is divided, what is shared, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
import re
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coded_torch.codes import (
    BerrutCode,
    KernelCode,
    LagrangeCode,
    NotEnoughResults,
    ReplicationCode,
    SplineCode,
)
from coded_torch.nn import CodedWrapper, Report, Waiting
from coded_torch.stragglers import ShiftedExponential, Uniform
from coded_torch.workers import DeviceWorkers, FaultyWorkers, LocalWorkers, Reply

from ..workers.test_local import Fixed
from ..workers.workers_tests import CopyCode, FailsAt, PolynomialCode, task_of
from .modules import EXACT, Call, Liar, linear, rand


CODES = [PolynomialCode, KernelCode, SplineCode, BerrutCode, LagrangeCode, ReplicationCode]


@pytest.mark.parametrize("devices", [None, ["cpu"]])
@pytest.mark.parametrize("make", CODES)
def test_an_input_that_is_not_finite_is_named_not_the_workers(make, devices):
    x = rand(4, 3)
    x[2, 1] = -math.inf
    options = {} if devices is None else {"workers": DeviceWorkers(devices)}
    coded = CodedWrapper(Call(lambda a, **b: a + b["mask"]), make(2, 4), **options)
    with coded.workers:
        with pytest.raises(ValueError, match=r"args\[0\] must be finite .* got -inf at \[2, 1\]"):
            coded(x, mask=rand(4, 3))
        with pytest.raises(ValueError, match=r"kwargs\['mask'\] must be finite .* got nan at"):
            coded(rand(4, 3), mask=x * math.nan)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_inputs_may_be_as_great_as_their_sum_is_not(dtype):
    greatest = torch.finfo(dtype).max
    x = torch.tensor([[greatest], [greatest], [-greatest], [1.0]], dtype=dtype)
    coded = CodedWrapper(nn.Identity(), ReplicationCode(2, 4), ordering="arrival")
    assert torch.equal(coded(x), x)


def test_what_is_the_same_for_every_worker_need_not_be_finite():
    coded = CodedWrapper(
        Call(lambda x, mask: x.masked_fill(mask < 0, 0.0)), PolynomialCode(2, 4), in_dims=(0, None)
    )
    mask = torch.tensor([0.0, -math.inf, 0.0])
    torch.testing.assert_close(coded(rand(4, 3), mask), coded.module(rand(4, 3), mask), **EXACT)


def test_integer_inputs_are_named_with_the_remedy():
    coded = CodedWrapper(Call(lambda *args, **kwargs: args[0]["x"]), PolynomialCode(2, 4))
    ids = torch.arange(4)
    with pytest.raises(
        TypeError, match=r"args\[0\]\['ids'\] must be floating-point .*int64.*embed"
    ):
        coded({"x": rand(4, 1), "ids": ids})
    with pytest.raises(TypeError, match=r"kwargs\['mask'\] must be .* torch.bool.*None in in_dims"):
        coded({"x": rand(4, 1)}, mask=ids > 2)
    shared = CodedWrapper(coded.module, PolynomialCode(2, 4), in_dims=({"x": 0, "ids": None},))
    torch.testing.assert_close(shared({"x": rand(4, 1), "ids": ids}), rand(4, 1), **EXACT)


def test_bad_inputs():
    coded = CodedWrapper(Call(lambda *args: args[0]), PolynomialCode(2, 4))
    with pytest.raises(
        ValueError, match=r"one batch size, got 4 in args\[0\], 3 in args\[1\]\[0\]"
    ):
        coded(rand(4, 1), [rand(3, 1)])
    with pytest.raises(ValueError, match=r"a tensor to be coded, got none"):
        coded(3, None)
    with pytest.raises(ValueError, match=r"args\[0\] must have the batch dimension 0 .*shape \(\)"):
        coded(torch.tensor(1.0))
    for in_dims in ((0,), (0, 0, 0), [0, 0], {"a": 0}):
        wrong = CodedWrapper(coded.module, PolynomialCode(2, 4), in_dims=in_dims)
        with pytest.raises(ValueError, match="in_dims must be a pytree prefix"):
            wrong(rand(4, 1), rand(4, 1))
    for in_dims in ("rows", 1.0, True):
        wrong = CodedWrapper(coded.module, PolynomialCode(2, 4), in_dims=in_dims)
        with pytest.raises(TypeError, match="in_dims must hold integers and None, got"):
            wrong(rand(4, 1))
    everywhere = CodedWrapper(coded.module, PolynomialCode(2, 4), in_dims=None)
    with pytest.raises(ValueError, match="got none"):
        everywhere(rand(4, 1))
