"""Which metrics and lengths compete from call to call."""

import copy
import math
import pickle

import pytest
import torch

from coded_torch.codes import KernelCode, ReplicationCode
from coded_torch.input_space.distances import METRICS, Choice
from coded_torch.nn import CodedWrapper
from coded_torch.nn._narrowing import Narrowing
from coded_torch.workers import DeviceWorkers

from ..nn.modules import Call

RANK = Choice(next(x for x in METRICS if x not in ("shrunk", "spread")), 4.0, 0.5)


def stem(x):
    return x.square()


def test_what_has_won_competes():
    code = KernelCode(4, 6)
    narrow = code.narrowed([RANK, Choice("shrunk", math.sqrt(8), 0.5)])
    assert set(narrow.metrics) == {"shrunk", RANK.metric}
    assert narrow.lengths == (math.sqrt(8), 4.0)
    assert (narrow.num_data, narrow.num_workers) == (4, 6)
    few = KernelCode(4, 6, metric=["spread", stem], length=1.0)
    assert few.narrowed([Choice("stem", 1.0, 0.1)]).metrics == (stem,)
    assert few.narrowed([RANK]).metrics == few.metrics  # it was another code's
    assert few.narrowed([RANK]).lengths == (1.0,)


def test_all_compete_three_times_and_then_in_every_sixteenth_call():
    narrowing, code = Narrowing(), KernelCode(4, 6)
    whole = []
    for _ in range(40):
        used = narrowing.of(code)
        whole.append(used is code)
        narrowing.note(used, [RANK])
    assert [i for i, all_compete in enumerate(whole) if all_compete] == [0, 1, 2, 16, 32]
    assert narrowing.of(KernelCode(4, 8)).num_workers == 8  # another code begins anew
    other = ReplicationCode(4, 6)
    narrowing.note(narrowing.of(other), [])
    assert narrowing.of(other) is other


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_knows_nothing(copied):
    narrowing, code = Narrowing(), KernelCode(4, 6)
    for _ in range(3):
        narrowing.note(narrowing.of(code), [RANK])
    assert narrowing.of(code) is not code
    again = copied(narrowing)
    assert again.of(code) is code


def test_a_wrapper_compares_fewer_when_it_has_predicted_thrice(monkeypatch):
    seen = []
    fit_rows = KernelCode.fit_rows

    def spy(code, *args, **kwargs):
        seen.append(len(code.metrics))
        return fit_rows(code, *args, **kwargs)

    monkeypatch.setattr(KernelCode, "fit_rows", spy)
    x = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
    x[24:, 0] += 50.0
    module = Call(lambda x: torch.where(x[:, :1] > 25.0, torch.nan, x.tanh()))
    with DeviceWorkers(["cpu"] * 4) as pool, torch.no_grad():
        coded = CodedWrapper(module, KernelCode(4, 4), workers=pool)
        for _ in range(5):
            _, report = coded.run(x)
            assert report.predicted.sum() == 8
    assert seen[:3] == [len(METRICS)] * 3
    assert max(seen[3:]) <= 4
