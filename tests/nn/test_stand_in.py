"""The wrapper as a stand-in for the module."""

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


def network(**options: Any) -> CodedWrapper:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().eval()
    return CodedWrapper(module, PolynomialCode(2, 4), **options).eval()


def test_the_state_dict_is_that_of_the_module_both_ways():
    coded, bare = network(), copy.deepcopy(network().module)
    with torch.no_grad():
        for tensor in bare.state_dict().values():
            tensor.add_(1)
    assert list(coded.state_dict()) == list(bare.state_dict())
    assert coded.state_dict()._metadata == bare.state_dict()._metadata
    assert (
        str(coded.load_state_dict(bare.state_dict(), strict=True))
        == "<All keys matched successfully>"
    )
    for a, b in zip(coded.module.state_dict().values(), bare.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        coded.module[0].weight.zero_()
    bare.load_state_dict(coded.state_dict(), strict=True)
    assert not bare[0].weight.any()
    with pytest.raises(RuntimeError, match=r'Missing key.*"2\.bias"'):
        coded.load_state_dict({k: v for k, v in bare.state_dict().items() if k != "2.bias"})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"module\.x"'):
        coded.load_state_dict(bare.state_dict() | {"module.x": torch.zeros(1)})


def test_the_state_dict_as_a_part_of_a_bigger_module():
    def bigger(part: nn.Module) -> nn.Module:
        return nn.ModuleDict({"head": nn.Linear(2, 2).double(), "module": part})

    bare, coded = bigger(network().module), bigger(network())
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter.add_(1)
    assert list(coded.state_dict()) == list(bare.state_dict())
    coded.load_state_dict(bare.state_dict(), strict=True)
    for a, b in zip(coded.state_dict().values(), bare.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    bare.load_state_dict(coded.state_dict(), strict=True)
    twice = bigger(CodedWrapper(network(), PolynomialCode(2, 4)))
    state = bare.state_dict()
    del state["module.2.bias"]
    state |= {"module.9.x": torch.zeros(1), "module.0.bias": torch.zeros(7)}
    for model in (coded, twice, copy.deepcopy(twice), pickle.loads(pickle.dumps(twice))):
        with pytest.raises(RuntimeError) as info:
            model.load_state_dict(state)
        for complaint in (
            'Missing key(s) in state_dict: "module.2.bias".',
            'Unexpected key(s) in state_dict: "module.9.x".',
            "size mismatch for module.0.bias:",
        ):
            assert complaint in str(info.value)
    del state["module.0.bias"]
    assert coded.load_state_dict(state, strict=False) == (
        ["module.0.bias", "module.2.bias"],
        ["module.9.x"],
    )


def test_functional_call_takes_the_names_of_the_parameters():
    coded, x = network(), rand(4, 3)
    tensors = {k: v + 1 for k, v in [*coded.named_parameters(), *coded.named_buffers()]}
    wanted = copy.deepcopy(coded.module)
    wanted.load_state_dict({k.removeprefix("module."): v for k, v in tensors.items()})
    torch.testing.assert_close(torch.func.functional_call(coded, tensors, x), wanted(x), **EXACT)


def test_a_state_dict_survives_a_file():
    coded, file = network(), io.BytesIO()
    torch.save(coded.state_dict(), file)
    file.seek(0)
    network().module.load_state_dict(torch.load(file, weights_only=True), strict=True)


def test_modes_devices_and_dtypes_reach_the_module():
    coded = CodedWrapper(linear(), PolynomialCode(2, 4))
    assert coded.training
    assert not CodedWrapper(linear().eval(), PolynomialCode(2, 4)).training
    assert coded.train().module.training
    assert not coded.eval().module.training
    assert coded.half().module.weight.dtype == torch.float16
    assert coded.to(torch.float32).module.weight.dtype == torch.float32
    assert coded.to("meta").module.weight.device.type == "meta"
    assert [name for name, _ in coded.named_parameters()] == ["module.weight", "module.bias"]


def test_hooks_of_the_module_and_of_the_wrapper_run():
    coded, calls = CodedWrapper(linear(), PolynomialCode(2, 4)), []
    coded.module.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    coded.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    coded(rand(5, 3))
    assert calls == [12, 5]


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize(
    "options",
    [
        dict,
        lambda: {"stragglers": Uniform(1), "waiting": Waiting.first(1)},
        lambda: {"workers": DeviceWorkers(["cpu", "cpu"]), "waiting": Waiting(deadline=60.0)},
    ],
)
def test_copies_and_pickles(twin, options):
    coded, x = network(**options()), rand(5, 3)
    wanted = coded(x)
    other = twin(coded)
    with coded.workers, other.workers:
        torch.testing.assert_close(other(x), wanted, **EXACT)
        assert other.module[0].weight is not coded.module[0].weight
        assert other.waiting == coded.waiting
        assert other.last_run.received


def test_batch_statistics_in_training_get_one_warning():
    coded = network().train()
    with pytest.warns(UserWarning, match="1 is in training mode and takes its statistics"):
        coded(rand(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coded(rand(4, 3))
        quiet = network().train()
        quiet.module[1].eval()
        quiet(rand(4, 3))
        network()(rand(4, 3))
        CodedWrapper(linear(), PolynomialCode(2, 4)).train()(rand(4, 3))
