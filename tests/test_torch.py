"""The package's own work is done on the host, whatever default device its caller has."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from coded_torch import Waiting, codes, compare
from coded_torch._torch import fingerprint
from coded_torch.experiments.tune import tune
from coded_torch.input_space.geometry import Geometry
from coded_torch.linear import SplineMap
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Trace, Uniform
from coded_torch.surrogates import Memory
from coded_torch.workers import DeviceWorkers, LocalWorkers

CODES = {
    "spline": lambda: codes.SplineCode(4, 8),
    "berrut": lambda: codes.BerrutCode(4, 8),
    "lagrange": lambda: codes.LagrangeCode(2, 8),
    "replication": lambda: codes.ReplicationCode(4, 8),
    "kernel": lambda: codes.RegressionCode(4, 8),
    "features": lambda: codes.RegressionCode(4, 8, metric=torch.abs),
}
ELSEWHERE = torch.device("meta")  # where a tensor has no numbers, so that every mistake shows


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unchanged(make):
    """Whether what is made is the same under a default device."""
    want = make()
    with ELSEWHERE:
        return torch.equal(make(), want)


# Made anew for each call, as laws go on from one to the next.
WAYS = {
    name: lambda make=make: {"code": make().replace(shuffle=False)} for name, make in CODES.items()
}
WAYS["rows"] = lambda: {"parts": 4, "waiting": Waiting(predict_after=3.0)}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_answers_under_a_default_device(way):
    x = randn(32, 3)
    pool = LocalWorkers(Uniform(2, seed=0))
    assert unchanged(lambda: CodedWrapper(nn.Tanh(), **way(), workers=copy.deepcopy(pool))(x))


def test_the_callers_own_code_sees_its_default_device():
    seen, x = set(), randn(24, 3)

    def see(name, result=None):
        seen.add((name, torch.get_default_device()))
        return result

    class Module(nn.Module):
        def forward(self, x):
            return see("module", x.sin())

    coded = CodedWrapper(
        Module(),
        codes.RegressionCode(4, 8, metric=lambda x: see("metric", x)),
        workers=LocalWorkers(Uniform(6, seed=0)),
        surrogate=lambda x: see("surrogate", x),
    )
    torch.set_default_device(ELSEWHERE)
    try:
        coded(x)
        with DeviceWorkers(["cpu"]) as pool:  # a default device becomes the replica's own
            CodedWrapper(Module(), codes.SplineCode(4, 8), workers=pool)(x)
    finally:
        torch.set_default_device(None)
    names = ("module", "metric", "surrogate")
    assert seen == {*((name, ELSEWHERE) for name in names), ("module", torch.device("cpu"))}


def test_a_memory_and_wide_inputs_under_a_default_device():
    memory, x, wide = Memory(), randn(300, 3), randn(8, 8193)
    with ELSEWHERE:
        coded = CodedWrapper(
            nn.Tanh(), CODES["kernel"](), workers=LocalWorkers(Uniform(3, seed=0)), surrogate=memory
        )
        coded(x)
        memory.rebuild()
        assert (coded(x) - x.tanh()).abs().max() < 0.5
        assert coded(wide).device == wide.device


def test_maps_and_plans_under_a_default_device():
    x = randn(12, 5)
    assert unchanged(lambda: SplineMap([0.0, 1.0, 3.0], np.linspace(0, 3, 7))(x[:3]))
    assert unchanged(lambda: Geometry(x).squared_distances(0.01)[0])
    assert unchanged(lambda: Trace([[0.1, 0.2]]).sample(2))
    for make in CODES.values():
        code = make()
        if isinstance(code, codes.FixedCode):
            received = list(range(1, 8))
            assert unchanged(lambda: make().encoder.matrix())  # noqa: B023
            assert unchanged(lambda: make().source(received))  # noqa: B023


def test_tuning_and_comparing_under_a_default_device():
    batches = [randn(8, 3, seed=seed) for seed in range(2)]

    def results():
        coded = CodedWrapper(nn.Tanh(), CODES["kernel"](), workers=LocalWorkers(Uniform(2, seed=0)))
        chosen = tune(coded, batches[:1], metric=["shrunk"], length=[1.0, 2.0])
        row = compare(nn.Tanh(), batches, [(4, 4, 1)]).rows[-1]
        return torch.tensor([chosen.length, row.mse[0]], device="cpu")

    assert unchanged(results)


@pytest.mark.cuda
@pytest.mark.parametrize("make", CODES.values(), ids=CODES)
def test_answers_under_cuda_as_the_default_device(make):
    x = randn(30, 3)

    def answers(x):
        coded = CodedWrapper(
            nn.Tanh(),
            make().replace(shuffle=random.Random(0)),
            workers=LocalWorkers(Uniform(2, seed=0)),
        )
        return [coded(x) for _ in range(2)][1].cpu()

    want = answers(x)
    with torch.device("cuda"):
        torch.testing.assert_close(answers(x.cuda()), want, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(answers(x), want, rtol=1e-3, atol=1e-3)


def test_sparse_weights_that_are_replaced_are_noticed():
    module = nn.Linear(2, 1)
    module.register_buffer("matrix", torch.eye(2).to_sparse())
    kept, before = fingerprint(module)
    assert fingerprint(module)[1] == before
    assert len(kept) == 3
    module.matrix = torch.eye(2).to_sparse()
    assert fingerprint(module)[1] != before
