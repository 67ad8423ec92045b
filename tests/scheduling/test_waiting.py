"""When a call by rows asks again, ends, and estimates: on a virtual clock."""

import dataclasses
import math
import pickle

import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper, Waiting
from coded_torch._table import Table
from coded_torch.codes import DeadlineExceeded, NotEnoughResults, ReplicationCode
from coded_torch.scheduling._latency_history import History
from coded_torch.testing.virtual import VirtualWorkers

X = torch.arange(8.0)[:, None]
OK, LATE, DIES = ("ok", 1.0), ("ok", 500.0), ("die", 0.5)


class Play:
    """A call, perhaps after ten calls of which every part took a second.

    Args:
        scripts: the acts of workers in this call. Workers beyond the number of parts are idle in
            the calls before.
    """

    def __init__(self, *scripts, waiting=None, parts=4, known=True, module=None, x=X, **options):
        acts = [[OK] * 10 * (known and place < parts) + [*x] for place, x in enumerate(scripts)]
        self.pool = pool = VirtualWorkers(acts, **options)
        self.coded = CodedWrapper(nn.Identity(), workers=pool, parts=parts, waiting=Waiting())
        for _ in range(10 * known):
            self.coded.run(x)
        self.error, before = None, pool.clock
        pool.begun.clear()
        if module is not None:
            self.coded.module = module  # of which nothing is known
        try:
            self.answers, self.report = self.coded.run(x, waiting=waiting or Waiting())
        except (NotEnoughResults, ValueError) as error:
            self.error, self.report, self.answers = error, error.report, error.answers
        self.seconds = pytest.approx(pool.clock - before)
        self.first = [part.units for _, _, part in pool.begun[:parts]]
        self.again = [  # when, at which worker, and for which rows
            (pytest.approx(time - before), worker, part.units)
            for time, worker, part in pool.begun[parts:]
        ]


def test_replies_are_gathered_only_until_missing_rows_may_be_estimated():
    """From then on, each reply may end the call."""
    history, waiting = History(), Waiting(deadline=1.0)
    history.add([(1, 0.1)] * 32, None)
    table = Table(first=[(0,), (1,)], needed=2, reserve=0.25)
    assert (waiting.decide(history, table), table.late) == (0.75, pytest.approx(0.15))
    table.hear([], 0.75)
    assert (waiting.decide(history, table), table.late) == (1.0, math.inf)


def test_while_nothing_is_late_all_is_asked_once():
    play = Play([OK], [OK], [OK], [("ok", 1.4)])
    assert (play.again, play.seconds) == ([], 1.4)
    report = play.report
    assert (report.ended, report.work_ratio, report.hedging_threshold) == ("complete", 1.0, 1.5)


def test_before_latencies_are_known_a_part_is_late_at_half_of_the_deadline():
    play = Play([OK], [OK], [OK], [LATE], waiting=Waiting(deadline=4.0), known=False)
    assert play.again == [(2.0, 0, play.first[3][:1]), (2.0, 1, play.first[3][1:])]
    assert (play.seconds, play.report.ended) == (3.0, "complete")
    assert play.report.hedging_threshold is None


@pytest.mark.parametrize(
    ("acts", "at"),
    [
        ([OK, OK, OK], 8.0),
        ([OK, OK, ("ok", 7.0)], 8.0),
        ([OK, ("ok", 3.0), ("ok", 7.0)], 24.0),
        ([("ok", 0.1)] * 3, 2.0),  # not sooner, as workers may still load code
        ([OK, OK, ("die", 0.5)], 8.0),  # its rows are computed at once
    ],
)
def test_a_new_module_without_a_deadline_is_late_by_the_replies_of_others(acts, at):
    play = Play(*[[act] for act in acts], [LATE], known=False)
    late = [time for time, _, units in play.again if {*units} <= {*play.first[3]}]
    assert late == [at, at]
    assert play.report.ended == "complete"


def test_a_part_of_a_new_module_is_not_late_before_half_have_replied():
    play = Play([OK], [("ok", 60.0)], [("ok", 60.0)], [("ok", 60.0)], known=False)
    assert (play.again, play.seconds) == ([], 60.0)


def test_calls_of_one_part_are_late_by_the_replies_of_calls_before():
    pool = VirtualWorkers([[OK, OK, LATE], [OK]])
    coded = CodedWrapper(nn.Identity(), workers=pool, parts=1)
    coded.run(X[:1])  # its worker loads the module, so its time does not count
    for seconds in (1.0, 9.0):
        before = pool.clock
        coded.run(X[:1])
        assert pool.clock - before == pytest.approx(seconds)


def test_a_late_part_is_split_over_idle_workers():
    play = Play([OK], [OK], [OK], [LATE])
    first, second = play.first[3][:1], play.first[3][1:]
    assert play.again == [(1.5, 0, first), (1.5, 1, second)]
    hedges = [(h.of, h.units, h.won) for h in play.report.hedges]
    assert hedges == [(3, first, True), (3, second, True)]
    assert play.report.hedges[0].at == pytest.approx(1.5)
    assert play.seconds == 2.5


def test_a_late_part_of_few_rows_is_hedged_once_by_one_worker_beside_an_idle_one():
    acts = [OK], [OK], [OK], [LATE], [LATE]
    play = Play(*acts, waiting=Waiting(spares=2))
    assert play.again == [(1.5, 0, play.first[3])]
    assert len(Play(*acts, waiting=Waiting(spares=1)).again) > 1


def test_without_an_idle_worker_a_late_part_queues_whole():
    play = Play(*[[("ok", 2.5)]] * 3, [LATE])
    assert play.again[0][0] == 2.5
    assert play.first[3] in [units for _, _, units in play.again]


def test_without_a_budget_nothing_is_late():
    play = Play([OK], [OK], [OK], [("ok", 99.0)], waiting=Waiting(hedge_budget=0))
    assert (play.again, play.seconds) == ([], 99.0)


def test_hedges_spend_a_budget_that_calls_fill():
    play = Play(*[[LATE]] * 4, [OK], waiting=Waiting(hedge_budget=0.01))
    for _ in range(30):
        play.pool.free(3)
        play.coded.run(X, waiting=Waiting(hedge_budget=0.01))
    assert sum(len(x[2].units) for x in play.pool.begun) <= 31 * 8 + 8 * (1 + 20 / 4 + 0.5)


@pytest.mark.parametrize(("idle", "times"), [(0, 2), (1, 3), (4, 3)])
def test_a_row_is_hedged_three_times_if_another_worker_stays_free(idle, times):
    rows = torch.arange(4.0)[:, None]
    pool = VirtualWorkers([*[[OK] * 10 + [OK, LATE]] * 3, [OK] * 10 + [LATE], *[[LATE]] * idle])
    coded = CodedWrapper(nn.Identity(), workers=pool, parts=4)
    for _ in range(10):
        coded.run(rows)
    _, report = coded.run(rows)
    units = [hedge.units for hedge in report.hedges]
    assert units == units[:1] * times
    again = [part.spares for _, _, part in pool.begun if part.why == "hedge"]
    assert again == [False] + [True] * (times - 1)


def test_a_failed_part_is_asked_again_at_once_and_needs_no_budget():
    play = Play([OK], [OK], [OK], [("nan", 0.5)], [OK], waiting=Waiting(hedge_budget=0))
    assert play.again[0] == (0.5, 4, play.first[3][:1])  # cut, as no other part has failed


def test_a_part_that_ends_its_worker_is_cut_while_all_others_run():
    how = {"x": torch.arange(12.0)[:, None], "parts": 6, "known": False}
    play = Play(*[[OK]] * 5, [DIES], [OK], [OK], **how)
    assert play.again == [(0.5, 6, play.first[5][:1]), (0.5, 7, play.first[5][1:])]


def test_a_row_that_ends_its_worker_costs_few():
    how = {"x": torch.arange(64.0)[:, None], "parts": 6, "known": False}
    play = Play(*[[OK]] * 6, kills=lambda x: bool((x == 5).any()), **how)
    assert (play.report.missing_rows, play.report.module_failed_rows) == ((5,), (5,))
    deaths = sum(5 in units for _, _, units in play.again)
    assert 1 <= deaths <= 5  # beside the first


class Raises(nn.Module):
    def __init__(self, *rows):
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, x):
        if torch.isin(x, self.rows).any():
            raise ValueError(f"{len(x)} rows of a wrong kind")
        return x.clone()


@pytest.mark.parametrize("bad", [(0,), (0, 3, 6), (*range(8),)])
@pytest.mark.parametrize("num_workers", [1, 4])
def test_no_innocent_row_is_blamed(bad, num_workers):
    play = Play(*[[OK]] * num_workers, known=False, module=Raises(*map(float, bad)))
    assert play.report.ended == "error"
    assert play.report.module_failed_rows == play.report.missing_rows == bad
    assert isinstance(play.error, ValueError)


def test_a_module_that_fails_on_all_rows_is_found_by_single_rows():
    rows = torch.arange(256.0)[:, None]
    pool = VirtualWorkers([[OK]] * 4)
    with pytest.raises(ValueError, match="of a wrong kind") as caught:
        CodedWrapper(Raises(*range(256)), workers=pool).run(rows)
    assert caught.value.report.module_failed_rows == (*range(256),)
    assert len(pool.begun) < 75


def test_a_row_is_refused_that_one_worker_raises_on_again_and_again_though_another_worked():
    """The other has left, so that nobody else can try it."""
    play = Play([OK], [OK], parts=2, known=False, module=Raises(0.0), drains=[(0.5, 1)])
    assert (play.report.ended, play.report.module_failed_rows) == ("error", (0,))
    assert isinstance(play.error, ValueError)


def test_at_the_deadline_rows_are_refused_if_nothing_but_exceptions_came():
    how = {"module": Raises(*range(8)), "waiting": Waiting(deadline=2.0, hedge_budget=0)}
    play = Play([("ok", 0.3)], known=False, **how)
    begun = [part.units for time, _, part in play.pool.begun if time <= 1.7]
    alone = tuple(sorted({units[0] for units in begun if len(units) == 1}))
    assert (play.report.ended, play.report.module_failed_rows) == ("deadline", alone)
    assert len(alone) == 2
    assert isinstance(play.error, ValueError)


def test_a_part_is_asked_again_whose_result_turns_out_unlike_most():
    play = Play([(lambda y: y.repeat(1, 2), 0.5), OK], *[[OK]] * 3, known=False)
    assert (play.report.ended, play.report.missing_rows) == ("complete", ())


def test_a_row_that_raised_is_not_refused_if_a_late_result_has_it():
    """The module fails on it at two other workers."""
    once = [lambda y: y, lambda y: 1 / 0]
    play = Play([("ok", 1.8)], *[[OK, (once[1], 0.1), OK]] * 3)
    assert (play.report.ended, play.report.module_failed_rows) == ("complete", ())


@pytest.mark.parametrize(
    ("waiting", "reason"),
    [
        (Waiting(estimate_after=3.0, hedge_budget=0), "estimate_after"),
        (Waiting(deadline=3.0, hedge_budget=0), "deadline"),
    ],
)
def test_the_rest_is_estimated_if_half_is_there(waiting, reason):
    play = Play([OK], [OK], [LATE], [LATE], waiting=waiting)
    assert play.report.ended == reason
    assert play.report.deadline == 3.0
    assert 2.5 < play.pool.clock - 10 <= 3.0
    late = sorted(play.first[2] + play.first[3])
    assert play.report.estimated.nonzero().flatten().tolist() == late
    few = Play([OK], [("ok", 7.0)], [LATE], [LATE], waiting=waiting)
    if reason == "deadline":
        assert isinstance(few.error, DeadlineExceeded)
        assert few.seconds == 3.0
    else:
        assert few.seconds == 7.0
        assert few.report.estimated.sum() == 4


@pytest.mark.parametrize(
    "waiting",
    [
        Waiting(hedge_budget=0),
        Waiting(hedge_budget=0, on_error="estimate"),
        Waiting(hedge_budget=0, estimate_after=math.inf),
        Waiting(hedge_budget=0, estimate_after=3.0, estimate=False),
    ],
)
def test_what_is_never_estimated_waits_for_all_that_can_come(waiting):
    play = Play([OK], [OK], *[[("ok", 99.0)]] * 2, waiting=waiting)
    assert (play.report.ended, play.seconds) == ("complete", 99.0)


@pytest.mark.parametrize(
    ("waiting", "estimates", "tries"),
    [
        (Waiting(), False, 21),
        (Waiting(deadline=100.0), True, 4),
        (Waiting(estimate_after=30.0), True, 4),
        (Waiting(on_error="estimate"), True, 4),
        (Waiting(deadline=100.0, estimate_after=3.0, estimate=False), False, 21),
    ],
)
def test_rows_are_estimated_only_if_the_caller_asked_for_it(waiting, estimates, tries):
    bad = nn.Threshold(0.5, math.nan)  # of row 0
    play = Play(*[[OK]] * 4, waiting=waiting, module=bad)
    assert (play.error is None) == estimates
    assert play.report.missing_rows == (0,)
    assert play.pool.clock < 60  # nothing more can come, so no deadline is waited for
    assert sum(0 in units for _, _, units in play.again) == tries
    assert torch.equal(play.answers[1:], X[1:])


def test_asking_all_at_once_ends_with_the_first():
    def ended(waiting, *scripts):
        pool = VirtualWorkers([[act] for act in scripts])
        _, report = CodedWrapper(nn.Identity(), ReplicationCode(4, 6), workers=pool).run(
            X, waiting=waiting
        )
        assert len(pool.begun) == 6
        return report.ended, pool.clock, len(report.received)

    times = [("ok", float(n)) for n in range(1, 7)]
    assert ended(Waiting.first(2), *times) == ("enough_results", 4.0, 4)
    assert ended(Waiting.first(0), *times) == ("complete", 6.0, 6)
    assert ended(Waiting.first(2, deadline=3.5), *times) == ("deadline", 3.5, 3)
    assert ended(Waiting.first(1), ("die", 9.0), *[DIES] * 2, *times[:3])[::2] == ("failed", 3)


def test_options_are_values():
    waiting = Waiting(0.05, hedge_budget=0)
    assert waiting == Waiting(deadline=0.05, hedge_budget=0.0)
    assert repr(waiting) == "Waiting(deadline=0.05, hedge_budget=0.0)"
    assert Waiting.first(2) == Waiting.first(2)
    assert Waiting.first() != Waiting()
    assert repr(Waiting.first(2, deadline=1)) == "Waiting.first(deadline=1.0, num_stragglers=2)"
    for option in (waiting, Waiting.first(3, deadline=1.0)):
        assert pickle.loads(pickle.dumps(option)) == option
        with pytest.raises(dataclasses.FrozenInstanceError):
            option.deadline = 2.0
    assert (Waiting().num_stragglers, Waiting.first(3).num_stragglers) == (None, 3)
