"""How long a call waits, what it does with too little, and what it reports."""

import contextlib
import gc
import math
import pickle
import re
import threading
import time
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper, Waiting, ops
from coded_torch.codes import DeadlineExceeded, NotEnoughResults, ReplicationCode, SplineCode
from coded_torch.nn._division import dealt
from coded_torch.nn._report import Report
from coded_torch.scheduling._latency_history import EstimationTimes
from coded_torch.stragglers import Trace, Uniform
from coded_torch.surrogates import Memory
from coded_torch.testing.helpers import (
    CopyCode,
    FailsAt,
    PolynomialCode,
    divide_by_zero,
    nan_at_two,
)
from coded_torch.testing.virtual import VirtualWorkers
from coded_torch.workers import DeviceWorkers, FaultyWorkers, LocalWorkers

from ..workers.test_local import Fixed
from .modules import Call
from .pools import Separate


@pytest.mark.parametrize("estimate", [True, False])
def test_outputs_without_a_batch_dimension_are_an_error(estimate):
    """Of single rows they look right, as their size is 1 there."""
    lstm = nn.LSTM(4, 3, batch_first=True)  # the states are [1, B, 3]
    with DeviceWorkers(["cpu"] * 3) as pool, torch.no_grad():
        coded = CodedWrapper(lstm, workers=pool, waiting=Waiting(estimate=estimate))
        with pytest.raises(ValueError, match=r"output\[1\]\[0\] must have one row per row"):
            coded(torch.randn(6, 5, 4))
        coded.out_dims = (0, 1)
        x = torch.randn(6, 5, 4)
        torch.testing.assert_close(coded(x)[1][0], lstm(x)[1][0])


class Blocks(nn.Module):
    """Holds one worker of two until it is opened, and raises on 13."""

    def __init__(self):
        super().__init__()
        self.open, self.lock = threading.Event(), threading.Lock()

    def forward(self, x):
        if (x < 0).any() and self.lock.acquire(blocking=False):
            self.open.wait(60)
        if (x < 0).any():
            time.sleep(0.1)
        if (x == 13).any():
            raise ValueError("13 is not to be had")
        return x


def test_what_a_broken_worker_returns_is_asked_of_others_that_are_busy():
    waits = Call(lambda x: time.sleep(0.005) or x)
    attack = {"adversaries": (1,), "attack": lambda rows, _: rows * math.nan}
    with FaultyWorkers(DeviceWorkers(["cpu"] * 2), **attack) as pool, torch.no_grad():
        coded = CodedWrapper(waits, workers=pool, waiting=Waiting(estimate=False))
        rows = [torch.full((1, 2), float(n)) for n in range(24)]
        found = [answers for answers, _ in coded.map(rows, in_flight=6)]
    assert torch.equal(torch.cat(found), torch.cat(rows))


def test_a_failed_part_does_not_wait_for_a_worker_that_hangs():
    module = Blocks()
    with DeviceWorkers(["cpu"] * 2) as pool, torch.no_grad():
        coded = CodedWrapper(module, workers=pool, waiting=Waiting(estimate=False))
        with pytest.raises(DeadlineExceeded):
            coded.run(torch.full((2, 1), -1.0), waiting=Waiting(deadline=0.05, hedge_budget=0))
        begin = time.monotonic()
        with pytest.raises(ValueError, match="13 is not to be had"):
            coded(torch.tensor([[13.0]]))
        assert 0.4 < time.monotonic() - begin < 10  # half a second, and not until the end
        module.open.set()


def test_estimates_that_do_not_fit_before_the_deadline_are_made_of_less():
    late = Trace([[0.0, 0.0, 0.0, 1.0]])
    x = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    with FaultyWorkers(DeviceWorkers(["cpu"] * 4), delays=late) as pool, torch.no_grad():
        coded = CodedWrapper(nn.Tanh(), workers=pool)
        answers, report = coded.run(x, waiting=Waiting(deadline=0.3, hedge_budget=0))
    missing = {*report.missing_rows}  # of one part; on a busy machine, perhaps of more
    assert any(missing.issuperset(part) for part in dealt(4000, 4))
    assert len(report.notes) == 1
    assert "to keep the deadline" in report.notes[0]
    exact = ~report.estimated
    assert torch.equal(answers[exact], x[exact].tanh())


def test_rows_that_raise_together_but_not_apart_are_noted():
    limited = Call(lambda x: x / (1 // (len(x) < 4)))
    with DeviceWorkers(["cpu"] * 2) as pool, torch.no_grad():
        coded = CodedWrapper(limited, workers=pool, parts=2)
        _, report = coded.run(torch.ones(8, 6))
        _, usual = coded.run(torch.ones(6, 6))
    assert re.match(r"rows \d, \d, \d, \d raised together, and not in smaller", report.notes[0])
    assert len(report.notes) == 1
    assert not usual.notes


def rows(module: nn.Module, on_error: str = "raise", **options) -> CodedWrapper:
    return CodedWrapper(module, parts=4, waiting=Waiting(on_error=on_error), **options)


X = torch.arange(1.0, 9.0).view(8, 1)
MEAN = torch.ones(2)


class FailsFirst(nn.Module):
    """Raises the first time it sees a row of some value."""

    def __init__(self, value: float, times: int = 1) -> None:
        super().__init__()
        self.value, self.times = value, times

    def forward(self, x):
        if (x == self.value).any() and self.times > 0:
            self.times -= 1
            raise RuntimeError("once")
        return x.clone()


def test_complex_results_that_are_not_finite_are_rejected_and_missing_ones_are_nan():
    whole = Call(lambda x: torch.complex(x, x))
    coded = rows(Call(lambda x: torch.complex(x, nan_at_two(x))), workers=Separate())
    with pytest.raises(NotEnoughResults, match=r"^row 1: .* not finite in output") as info:
        coded(X)
    answers = info.value.answers
    assert answers.isnan().flatten().tolist() == [False, True, *[False] * 6]
    assert torch.equal(answers[2:], whole(X)[2:])


def test_what_is_rejected_again_and_again_is_an_error_or_estimated():
    coded = rows(FailsAt(2.0, nan_at_two), workers=Separate())
    why = r"^row 1: .* not finite in output; .* 8 of 8"
    with pytest.raises(NotEnoughResults, match=why) as info:
        coded(X)
    assert info.value.rows == (1,)
    coded.waiting = Waiting(on_error="estimate")
    answers = coded(X)
    run = coded.last_run
    assert run.estimated.tolist() == [False, True, *[False] * 6]
    assert torch.equal(answers[~run.estimated], X[~run.estimated])
    assert 0.0 < answers[1] < 8.0
    assert (run.ended, run.missing_rows, run.module_failed_rows) == ("failed", (1,), ())
    assert "not finite" in run.errors[1].reason
    assert (run.error_bounds > 0).equal(run.estimated)


def test_surrogates_and_outputs_that_no_call_can_use_are_warned_of_once():
    """The output is whole numbers, which are never estimated."""
    coded = rows(nn.Hardtanh(), workers=Separate(), surrogate=nn.Hardtanh())
    with pytest.warns(UserWarning, match=r"^CodedWrapper: surrogate is never used by Waiting\(\)"):
        coded(X)
    answers = coded(X)
    for asked in (Waiting(deadline=1.0), Waiting(estimate_after=3.0), Waiting(on_error="estimate")):
        assert torch.equal(coded.run(X, waiting=asked)[0], answers)
    coded = rows(Call(lambda x: (x, x.long())), workers=Separate())
    coded(X)  # every row is computed
    coded.waiting = Waiting(on_error="estimate")
    with pytest.warns(UserWarning, match=r"output\[1\] is torch.int64 and cannot be estimated"):
        coded(X)
    coded(X)


LATE = LocalWorkers(Fixed(0.1, 1.0, 1.0, math.inf))


class Busy(Separate):
    """Never answers: its workers are at something else."""

    def open(self, module, task):
        request = super().open(module, task)
        request.ask = lambda parts: None
        request.status = lambda: "6 of 6 processes are at earlier tasks (hang timeout 30 s)"
        return request


@pytest.mark.parametrize(
    ("workers", "reason"),
    [
        (
            Busy(),
            r"^6 of 6 .* earlier tasks \(hang timeout 30 s\); nothing arrived within the deadline",
        ),
        (LATE, r"^no more arrived within the deadline of 0.5 s; .* got 1; missing: \[1, 2, 3\]$"),
        (LocalWorkers(Uniform(3)), "at least 2 of 4 results are needed, got 1"),
    ],
)
def test_the_message_says_why_too_little_arrived(workers, reason):
    waiting = Waiting.first(deadline=0.5)
    code = PolynomialCode(2, 4, shuffle=False)
    coded = CodedWrapper(nn.Identity(), code, workers=workers, waiting=waiting)
    with pytest.raises(NotEnoughResults, match=reason) as info:
        coded(torch.ones(4, 1))
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)


@pytest.mark.parametrize(
    ("inputs", "error", "asked", "phase"),
    [
        (torch.ones(2, 1, dtype=torch.int64), TypeError, (), "encode"),
        (torch.full((2, 1), 2.0), ZeroDivisionError, (0, 1), "compute"),
        (torch.ones(2, 1), None, (0, 1), "decode"),
        (torch.ones(0, 1), None, (), "compute"),  # nobody was asked, so nobody is missing
    ],
)
def test_every_call_is_reported_as_far_as_it_has_come(inputs, error, asked, phase):
    coded = CodedWrapper(FailsAt(2.0, divide_by_zero), CopyCode(2, 2))
    with pytest.raises(error) if error else contextlib.nullcontext():
        coded(inputs)
    run = coded.last_run
    assert (run.asked, run.missing_workers) == (asked, asked if error else ())
    assert run.failed == (error is not None)
    assert getattr(run, f"{phase}_seconds") > 0


def test_columns_are_asked_for_evenly_and_spare_ones_stand_in():
    asked = []

    class Watched(Separate):
        stragglers = Uniform(2)  # S, for which columns are kept back

        def open(self, module, task):
            request = super().open(module, task)
            ask = request.ask
            request.ask = lambda parts: asked.append([p.units[0] for p in parts]) or ask(parts)
            return request

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    code = PolynomialCode(2, 6, shuffle=False, ordering="arrival")
    bad = float(code.encode(x.view(2, 2, 3).transpose(0, 1))[3, 0, 0])
    for times, also in ((0, []), (1, [[2]])):
        asked.clear()
        module = FailsFirst(bad, times)
        coded = CodedWrapper(module, code, workers=Watched(), waiting=Waiting())
        torch.testing.assert_close(coded(x), x)
        assert asked == [[0, 1, 3, 4], *also]


@pytest.mark.parametrize("own", [lambda rows: rows, lambda rows: MEAN.expand(len(rows), 2)])
def test_a_surrogate_that_answers_alone_keeps_what_it_returned(own):
    """Its tensor may be the caller's input, or a mean that is expanded to all rows."""
    x = torch.arange(8.0).view(4, 2)
    pool = LocalWorkers(Trace([[0.1, 0.5, 0.6, 0.7]]))
    waiting = Waiting(deadline=0.2, hedge_budget=0)
    coded = CodedWrapper(nn.Identity(), parts=4, workers=pool, waiting=waiting, surrogate=own)
    answers, report = coded.run(x)
    assert report.estimated.sum() == 3
    assert torch.equal(answers[~report.estimated], x[~report.estimated])
    answers.zero_()
    assert torch.equal(x, torch.arange(8.0).view(4, 2))
    assert torch.equal(MEAN, torch.ones(2))


@pytest.mark.parametrize("act", ["nan", "die"])
def test_columns_that_stand_in_for_failed_ones_fail_in_their_place(act):
    """Else each of the spare columns would be tried three times."""
    pool = VirtualWorkers([[(act, 1.0)]] * 4)
    pool.stragglers = Uniform(8)
    coded = CodedWrapper(Call(torch.neg), ReplicationCode(4, 12), workers=pool, waiting=Waiting())
    with pytest.raises(NotEnoughResults):
        coded(torch.ones(8, 3))
    assert len(pool.begun) == 12


class Hedged(nn.Module):
    """Computes row 0 once it is hedged, and the hedge when it is opened. Copies share the rest."""

    calls: ClassVar = []
    results: ClassVar = []
    hedged, open = threading.Event(), threading.Event()

    def forward(self, x):
        if x[0, 0] == 0:
            self.calls.append(x)
            if len(self.calls) > 1:
                self.hedged.set()
            (self.open if len(self.calls) > 1 else self.hedged).wait(60)
        y = -x
        self.results.append(weakref.ref(y))
        return y


def test_a_hedge_that_goes_on_keeps_no_result():
    with DeviceWorkers(["cpu"] * 3) as pool, torch.no_grad():
        options = {"parts": 2, "waiting": Waiting(deadline=2.0, hedge_budget=8.0)}
        coded = CodedWrapper(Hedged(), workers=pool, **options)
        CodedWrapper(coded.module, workers=LocalWorkers(), parts=2)(torch.ones(2, 1))  # is proved
        coded(torch.arange(2.0).view(2, 1))  # hedged at half of the deadline
        gc.collect()
        alive = [result() is not None for result in Hedged.results]
        Hedged.open.set()
        assert len(Hedged.calls) == 2
        assert alive
        assert not any(alive)


def test_a_report_is_five_lines_to_read():
    pool = LocalWorkers(Trace([[0.1, 0.2, math.inf]]))
    coded = CodedWrapper(nn.Tanh(), workers=pool, parts=3)
    waiting = Waiting(deadline=1.0, hedge_budget=0)
    _, report = coded.run(torch.randn(60, 3), waiting=waiting)
    report.notes = ("a remark", "another one")
    rows, workers, took, ended, notes = str(report).splitlines()
    assert rows == "rows     40 of 60 computed, 0 of them by hedges; 20 estimated, 0 corrected"
    assert workers == "workers  3 began a part; without a result: 2"
    assert re.fullmatch(
        r"time     [\d.]+ ms: prepare .*, compute .*, estimate .*; work ratio 1", took
    )
    assert ended == "ended    deadline; hedges: 0"
    assert notes == "notes    a remark; another one"
    assert str(Report()).startswith("rows     no answers")
    report.verified = torch.arange(60) < 7
    assert str(report).splitlines()[0] == f"{rows}, 7 verified"


def test_a_report_of_a_code_counts_decoded_rows():
    coded = CodedWrapper(nn.Tanh(), SplineCode(3, 5), workers=LocalWorkers())
    _, report = coded.run(torch.randn(6, 3))  # the ends of the two curves are inputs themselves
    rows, _, took, *_ = str(report).splitlines()
    assert rows == "rows     2 of 6 computed, 0 of them by hedges; 4 decoded, 0 corrected"
    assert re.search(r"encode .*, compute .*, decode ", took)


@pytest.mark.parametrize(("late", "fitted"), [(math.inf, [5]), (7.0, [5, 10])])
def test_the_regression_is_fitted_while_the_call_waits(monkeypatch, late, fitted):
    """Once hedges are asked for; and anew if more results have arrived by the deadline."""
    hangs, f = ("ok", math.inf), nn.Linear(3, 2)
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    fits, choose, found, seconds = [], ops.choose_regression, [], []

    def fit(*args):
        fits.append((round(pool.clock), len(pool.begun) > 4))
        time.sleep(0.05)
        return choose(*args)

    monkeypatch.setattr(ops, "choose_regression", fit)
    monkeypatch.setattr(EstimationTimes, "add", lambda _, *args: seconds.append(args[0]))
    CodedWrapper(f, workers=LocalWorkers(), parts=2)(x)  # proves the rows of outputs
    monkeypatch.setattr(VirtualWorkers, "simulated", False)  # so that times are remembered
    for budget in (0.5, 0.0):  # without a budget no part is hedged, and nothing is prepared
        pool = VirtualWorkers([[("ok", 1.0), hangs]] * 2 + [[("ok", late), hangs], [hangs]])
        coded = CodedWrapper(f, workers=pool, waiting=Waiting(deadline=10.0, hedge_budget=budget))
        with torch.no_grad():
            found.append(coded.run(x))
        assert found[-1][1].estimated.sum() == (20 if late == math.inf else 10)
        assert fits == ([(at, True) for at in fitted] if budget else [(10, False)])
        fits.clear()
    repeated = found[0][1].decode_seconds - seconds[0]
    assert repeated >= 0.05 if len(fitted) > 1 else seconds[0] >= 0.05
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1].error_bounds, found[1][1].error_bounds)


@pytest.mark.parametrize(("reserve", "fitted"), [(2.0, [5, 8]), (4.0, [7])])
def test_no_regression_is_fitted_early_that_would_end_the_call_late(monkeypatch, reserve, fitted):
    choose, fits, hangs = ops.choose_regression, [], ("ok", math.inf)

    def fit(*args):
        fits.append(round(pool.clock))
        return choose(*args)

    monkeypatch.setattr(ops, "choose_regression", fit)
    monkeypatch.setattr(EstimationTimes, "reserve", lambda *_: (False, reserve))
    pool = VirtualWorkers([[("ok", 1.0), hangs], [("ok", 7.0), hangs], [hangs]])
    coded = CodedWrapper(nn.Linear(3, 2), workers=pool, waiting=Waiting(deadline=10.0))
    with torch.no_grad():
        coded.run(torch.randn(30, 3))
    assert fits == fitted


class TwoOutputs(nn.Module):
    """A smooth output, and one that no other row tells of."""

    def forward(self, x):
        return (2 * x[:, :1]).sin() + (2 * x[:, 1:]).cos(), (400 * x[:, :1]).sin()


def test_fits_that_were_prepared_leave_residuals_the_metric_of_their_own_output():
    hangs, found = ("ok", math.inf), []
    for budget in (0.5, 0.0):  # without a budget nothing is prepared
        f, memory, draws = TwoOutputs(), Memory(), torch.Generator().manual_seed(3)
        for last in ("ok", 1.0), hangs:
            x = torch.randn(280 if last != hangs else 40, 2, dtype=torch.float64, generator=draws)
            pool = VirtualWorkers([[("ok", 1.0), hangs]] * 3 + [[last]])
            waiting = Waiting(deadline=10.0, hedge_budget=budget)
            coded = CodedWrapper(f, workers=pool, waiting=waiting, surrogate=memory)
            with torch.no_grad():
                answers, report = coded.run(x)
            memory.rebuild()
        assert report.surrogate_weights[0][0] > 0.5
        found.append((answers, report.distances))
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][0][0], found[1][0][0])


def test_fits_that_were_prepared_serve_all_of_several_outputs(monkeypatch):
    hangs, fits, choose = ("ok", math.inf), [], ops.choose_regression
    monkeypatch.setattr(ops, "choose_regression", lambda *args: fits.append(0) or choose(*args))
    module = Call(lambda x: tuple((x * n).sin() for n in range(1, 5)))
    pool = VirtualWorkers([[("ok", 1.0), hangs]] * 3 + [[hangs]])
    coded = CodedWrapper(module, workers=pool, waiting=Waiting(deadline=10.0))
    with torch.no_grad():
        coded(torch.randn(40, 3))
    assert len(fits) == 4
