"""The wrapper: any module, any pytree, any batch, and every answer although workers are lost."""

import math
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from coded_torch import CodedWrapper, Regression, Report, Waiting
from coded_torch.codes import RegressionCode, ReplicationCode
from coded_torch.stragglers import ShiftedExponential, Uniform
from coded_torch.testing.workers import PolynomialCode
from coded_torch.workers import LocalWorkers

from ..workers.test_local import Fixed
from .modules import EXACT, Call, linear, rand
from .pools import Separate

Pair = namedtuple("Pair", "first second")


def test_the_report():
    coded = CodedWrapper(
        linear(),
        PolynomialCode(2, 5),
        workers=LocalWorkers(Fixed(0.5, 0.1, math.inf, 0.3, 0.2)),
        waiting=Waiting.first(2),
    )
    assert coded.last_run is None
    coded(rand(5, 3))
    run = coded.last_run
    assert isinstance(run, Report)
    assert run.received == (1, 3, 4)
    assert run.missing_workers == (0, 2)
    assert list(run.latencies.items()) == [(1, 0.1), (4, 0.2), (3, 0.3)]
    assert run.rejected == {}
    assert run.asked == (0, 1, 2, 3, 4)
    assert (run.work_ratio, run.ended) == (5 * 3 / 5, "enough_results")
    assert run.estimated.all()
    assert not run.failed
    assert run.num_groups == 3
    assert min(run.encode_seconds, run.compute_seconds, run.decode_seconds) > 0
    coded(rand(0, 3))
    assert coded.last_run.num_groups == 0
    assert coded.last_run.received == ()


def test_the_last_run_is_the_report_of_any_call_that_ended_last():
    coded = CodedWrapper(linear(), workers=LocalWorkers(), parts=2)
    _, report = coded.run(rand(4, 3))
    assert coded.last_run is report
    with pytest.raises(ValueError, match="must hold a tensor or strings to divide"):
        coded.run()
    assert coded.last_run is not report
    assert coded.last_run.failed


def test_what_is_assigned_is_checked_as_what_is_given_and_no_random_state_is_touched():
    coded = CodedWrapper(linear(), ReplicationCode(3, 5), waiting=Waiting.first(4))
    state = torch.get_rng_state()
    coded(rand(1, 3))
    assert len(coded.last_run.received) == 1
    with pytest.raises(ValueError, match="num_stragglers must be at most 2, as PolynomialCode"):
        coded.code = PolynomialCode(3, 5)
    assert coded.code.min_received == 1
    coded.waiting, coded.workers = None, LocalWorkers(Uniform(1))
    coded.code = PolynomialCode(3, 5)
    coded(rand(1, 3))
    assert len(coded.last_run.received) == 4
    assert torch.equal(torch.get_rng_state(), state)  # of delays and orders without a seed
    for name, value in (("workers", None), ("code", 3), ("parts", 2), ("surrogate", linear())):
        before = getattr(coded, name)
        with pytest.raises((TypeError, ValueError), match=f"^CodedWrapper: {name} must be"):
            setattr(coded, name, value)
        assert getattr(coded, name) is before


def test_latencies_belong_to_one_module_on_one_pool():
    def pool(seconds):
        return LocalWorkers(Fixed(*[seconds] * 4))

    coded = CodedWrapper(linear(), parts=4, workers=pool(1.0))
    for change in (
        lambda: setattr(coded, "workers", pool(2.0)),
        lambda: setattr(coded, "module", linear()),
    ):
        for _ in range(9):
            coded(rand(8, 3))
        assert coded.last_run.hedging_threshold is not None
        change()
        coded(rand(8, 3))
        assert coded.last_run.hedging_threshold is None


def classifier(output: Any, **options: Any) -> CodedWrapper:
    return CodedWrapper(Call(output), RegressionCode(3, 6, link="softmax"), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_stay_such(dtype):
    x = (4 * rand(12, 50)).to(dtype)
    coded = classifier(lambda x: x.softmax(-1), workers=LocalWorkers(Uniform(2, seed=0)))
    out = coded(x)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double().sum(-1), torch.ones(12).double(), rtol=0, atol=8 * torch.finfo(dtype).eps
    )
    # The error of logarithms is in no unit of the answers.
    assert coded.last_run.error_bounds is None or not coded.last_run.estimated.any()
    coded.code = coded.code.replace(link=None)
    coded(x)
    assert coded.last_run.error_bounds is not None


def test_concurrent_calls_keep_their_reports_whole():
    delays = ShiftedExponential(0.0, 1.0)
    coded = CodedWrapper(
        linear(), PolynomialCode(2, 6), workers=LocalWorkers(delays), waiting=Waiting.first(3)
    )
    reports = []

    def call(i: int) -> bool:
        x = rand(1 + i % 5, 3, seed=i)
        right = torch.allclose(coded(x), coded.module(x), **EXACT)
        reports.append(coded.last_run)
        return right

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(call, range(80)))
    for run in reports:
        assert len(run.received) == 3
        assert set(run.latencies) == set(run.received)
        assert list(run.latencies.values()) == sorted(run.latencies.values())


@settings(max_examples=40, deadline=None)
@given(data=st.data(), batch=st.integers(0, 10), num_data=st.integers(1, 4))
def test_pytrees_and_dims(data, batch, num_data):
    """Nested arguments and outputs, each with its batch at a dimension of its own, or none."""
    pair_dims = data.draw(st.sampled_from([0, Pair(0, 0), Pair(1, 0), Pair(0, -1), Pair(1, 2)]))
    x_dim = data.draw(st.sampled_from([0, 1, -1]))
    first_dim, second_dim = pair_dims if isinstance(pair_dims, Pair) else (pair_dims, pair_dims)
    weight = rand(4, 3, seed=5)

    def affine(pair, other, *, extra):
        left = pair.first.movedim(first_dim, 0) + other["shift"]
        both = left + other["x"][0].movedim(x_dim, 0) @ weight
        second = pair.second.movedim(second_dim, 0).flatten(1)
        return Pair({"sum": both.T, "left": left}, [(second, extra), "constant", 7, None])

    first, second = rand(batch, 3).movedim(0, first_dim), rand(batch, 2, 3).movedim(0, second_dim)
    args = Pair(first, second), {"x": [rand(batch, 4).movedim(0, x_dim)], "shift": rand(3)}
    coded = CodedWrapper(
        Call(affine),
        PolynomialCode(num_data, num_data + 2),
        workers=LocalWorkers(Uniform(1, seed=0)),
        in_dims=(pair_dims, {"x": x_dim, "shift": "shared"}),
        out_dims=Pair({"sum": 1, "left": 0}, 0),
    )
    got, wanted = coded(*args, extra=rand(batch)), affine(*args, extra=rand(batch))
    assert got[1][1:] == ["constant", 7, None]
    torch.testing.assert_close(pytree.tree_leaves(got)[:4], pytree.tree_leaves(wanted)[:4], **EXACT)


CODE = PolynomialCode(3, 5)
RESULTS = r"waiting.num_stragglers must be at most 2, .* needs 3 results"
REPEATS, ROWS = ReplicationCode(2, 4), {"workers": LocalWorkers(), "parts": 2}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ValueError, "workers or a code must be given, got neither"),
        ({"workers": LocalWorkers()}, ValueError, "parts must be given with LocalWorkers, which"),
        ({"workers": LocalWorkers(), "parts": 0}, ValueError, "parts must be at least 1, got 0"),
        (
            ROWS | {"waiting": Waiting.first()},
            ValueError,
            r"waiting must be Waiting\(...\) wi",
        ),
        ({"code": REPEATS, "parts": 2}, ValueError, "parts must be None with a code, .* got 2$"),
        ({"code": REPEATS, "estimator": Regression()}, ValueError, "estimator must be None with a"),
        (ROWS | {"estimator": "mean"}, TypeError, "estimator must"),
        ({"code": CODE, "waiting": Waiting.first(3)}, ValueError, RESULTS),
        ({"code": CODE, "waiting": Waiting(estimate=False)}, ValueError, "waiting.estimate must"),
        ({"code": CODE, "surrogate": nn.Identity()}, ValueError, "surrogate must be left out with"),
        *[
            ({"code": REPEATS, "surrogate": surrogate}, TypeError, "surrogate must be a callable")
            for surrogate in (3, "net", [nn.Identity(), None], {"a": nn.Identity()})
        ],
        ({"code": CODE, "waiting": 1.0}, TypeError, "waiting must be of type Waiting or None, got"),
        ({"code": CODE, "workers": "cpu"}, TypeError, "workers must be of type Workers, got str"),
        ({"code": 3}, TypeError, "code must be of type Code or None, got int"),
        ({"code": CODE, "module": abs}, TypeError, "module must be of type Module, got builtin"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(options, error, match):
    with pytest.raises(error, match=f"^CodedWrapper: {match}"):
        CodedWrapper(**{"module": linear()} | options)


def test_a_call_may_have_a_policy_of_its_own_and_returns_its_report():
    x = torch.arange(1.0, 9.0).view(8, 1)
    coded = CodedWrapper(nn.Identity(), ReplicationCode(4, 6), workers=Separate())
    answers, report = coded.run(x, waiting=Waiting.first(2))
    assert (report.asked, report.work_ratio, int(report.estimated.sum())) == (
        tuple(range(6)),
        1.5,
        2,
    )
    assert torch.equal(answers[~report.estimated], x[~report.estimated])
    assert coded.last_run is report
    _, report = coded.run(x, waiting=Waiting())
    assert (report.work_ratio, report.ended) == (1.5, "complete")
    with pytest.raises(ValueError, match=r"waiting.num_stragglers must be at most"):
        coded.run(x, waiting=Waiting.first(6))


def test_rows_of_a_report_need_known_names_and_answers():
    report = CodedWrapper(nn.Identity(), workers=LocalWorkers(), parts=2).run(rand(4, 2))[1]
    assert report.rows("estimated")["estimated"].tolist() == [False] * 4
    with pytest.raises(ValueError, match=r"names must be of estimated, .*, got 'error_bounds'"):
        report.rows("error_bounds")
    with pytest.raises(ValueError, match="must be of a call with answers"):
        Report().rows()
