"""What a policy decides, event by event."""

import copy
import dataclasses
import math
import pickle
import random

import pytest

from coded_torch import Waiting
from coded_torch.scheduling.latency_history import History, PredictionTimes

from .decisions import Ask, Begin, Drop, Ended, Prepare, Settled, drive

FOUR = [(0, 1), (2, 3), (4, 5), (6, 7)]
SOON = Waiting(predict_after=3.0)


def begin(*parts, at=0.0):
    return [Begin(part, at) for part in parts]


def settle(*parts, at=1.0, ok=True):
    return [Settled(part, at, at, ok) for part in parts]


def known(seconds=1.0, rows=2, calls=10):
    """A history of equal calls."""
    history = History()
    for _ in range(calls):
        history.add([(rows, seconds)] * 4, (rows, seconds))
    return history


def test_while_nothing_is_late_all_is_asked_once():
    decisions, _, ended = drive(Waiting(), begin(0, 1, 2, 3) + settle(0, 1, 2, 3), history=known())
    assert decisions == [Ask(tuple(FOUR))]
    assert ended == Ended("complete", (), 1.5, math.inf)


def test_before_latencies_are_known_a_part_is_late_at_half_of_the_deadline():
    events = [*begin(0, 1, 2, 3), *settle(0, 1, 2), None, *begin(4, at=2.0), *settle(4, at=2.5)]
    decisions, waits, ended = drive(Waiting(deadline=4.0), events, history=History())
    assert decisions[:2] == [Ask(tuple(FOUR)), Ask(((6, 7),))]
    assert 2.0 in waits
    assert (ended.reason, ended.hedging_threshold) == ("complete", math.inf)  # unknown


def test_a_late_part_is_split_over_idle_workers():
    events = [*begin(0, 1, 2, 3, at=0.5), *settle(0, 1, 2), None, *settle(3, at=2.1)]
    decisions, waits, ended = drive(SOON, events, history=known(), idle=lambda: 5)
    assert decisions == [Ask(tuple(FOUR)), Ask(((6,), (7,))), Prepare()]
    assert waits[0] == 3.0  # nothing runs yet
    assert waits[-2] == 2.0  # from the begin, not from the call
    assert [(h.part, h.of, h.units, h.at, h.won) for h in ended.hedges] == [
        (4, 3, (6,), 2.0, False),
        (5, 3, (7,), 2.0, False),
    ]


def test_predictions_are_prepared_when_half_of_the_time_is_over():
    events = [*begin(0, 1, 2, 3), *settle(0, 1, 2), None, *begin(4, at=1.6), None]
    decisions, waits, _ = drive(Waiting(deadline=4.0), events, history=known())
    assert decisions == [Ask(tuple(FOUR)), Ask(((6, 7),)), Prepare()]
    assert waits[-2:] == [2.0, 3.1]  # half of the deadline; the threshold of the part asked again
    events = [*events[:-1], *settle(4, at=1.9)]
    decisions, _, _ = drive(Waiting(deadline=4.0), events, history=known())
    assert decisions == [Ask(tuple(FOUR)), Ask(((6, 7),))]  # everything came before


@pytest.mark.parametrize(
    ("least", "ended"), [(1, "predict_after"), (3, "predict_after"), (4, "complete")]
)
def test_what_the_code_cannot_decode_is_waited_for(least, ended):
    columns = [(0,), (1,), (2,), (3,)]
    events = [*begin(0, 1, 2, 3), *settle(0, 1, 2), None]
    if least == 4:
        events += [*settle(3, at=9.0)]
    waiting = Waiting(hedge_budget=0)
    _, _, end = drive(
        waiting, events, columns, needed=4, least=least, spare=[], history=known(rows=1)
    )
    assert end.reason == ended
    if least == 4:  # an explicit deadline ends the call even so
        options = {"needed": 4, "least": least, "spare": []}
        _, _, end = drive(Waiting(hedge_budget=0, deadline=2.0), events[:-1], columns, **options)
        assert end.reason == "deadline"


def test_time_to_predict_is_kept_before_the_deadline():
    events = [*begin(0, 1, 2, 3), *settle(0, 1), None]
    _, waits, ended = drive(
        Waiting(deadline=4.0, hedge_budget=0), events, history=known(), reserve=0.5
    )
    assert waits[-1] == 3.5
    assert (ended.reason, ended.deadline) == ("deadline", 4.0)
    few = [*begin(0, 1, 2, 3), *settle(0), None, None]  # to predict from: it is not needed
    for exact, script in ((False, few), (True, [*events, None])):
        waiting = Waiting(deadline=4.0, hedge_budget=0, predict=not exact)
        assert drive(waiting, script, history=known(), reserve=0.5)[1][-2:] == [3.5, 4.0]


def test_time_to_predict_is_what_it_took_lately_in_proportion_to_the_rows():
    times = PredictionTimes()
    usual = times.seconds(64)
    for factor in [99.0] + [1.0] * 13 + [2.0] * 3:  # the first loads code
        times.add(factor * usual, 64, 4096)
    assert times.seconds(64) == pytest.approx(2 * usual)  # of eight, one takes longer
    assert times.seconds(4096) > 10 * times.seconds(1024)
    assert times.reserve(4096, math.inf) == (4096, 0.0)
    late = 0.005
    assert times.reserve(64, 0.3) == (4096, 1.25 * times.seconds(64) + late)
    # A regression of all, several of some, and the mean, as time is short.
    for deadline, block in ((10.0, 4096), (1.0, 512), (0.15, 0)):
        seconds = 1.25 * times.seconds(4096, block) + late
        assert times.reserve(4096, deadline) == (block, seconds)
    times.add(0.08, 4096, 0)  # the mean of wide outputs takes long, too
    assert times.reserve(8192, 0.5) == (0, pytest.approx(1.25 * 0.16 + late))
    assert times.reserve(8192, 0.06) == (0, 0.03)


def test_a_regression_that_was_slow_by_chance_is_tried_again():
    times = PredictionTimes()
    usual = times.seconds(64)
    for factor in (1.0, 99.0, 99.0):  # the first loads code
        times.add(factor * usual, 64, 4096)
    assert times.seconds(64) == pytest.approx(99 * usual)
    for _ in range(64):
        times.add(0.001, 64, 0)
    assert times.seconds(64) == pytest.approx(usual)


THREE = [*begin(0, 1, 2, 3), *settle(0, 1, 2)]
TWO = [*begin(0, 1, 2, 3), *settle(0, 1), None, *settle(2, at=1.6)]
SCRIPTS = {
    "without an idle worker a late part queues whole": (
        [*THREE, None],
        [Ask(((6, 7),)), Prepare()],
        {"idle": lambda: 0},
    ),
    "a part that is answered need not begin": (
        TWO,
        [Ask(((4, 5), (6, 7))), Prepare(), Drop((4,))],
        {},
    ),
    "a dropped part is asked again if its answer turns out bad": (
        [*TWO, *settle(2, at=1.7, ok=False)],
        [Ask(((4, 5), (6, 7))), Prepare(), Drop((4,)), Ask(((4, 5),))],
        {},
    ),
    "a part that waits to begin is not asked again": (
        [*begin(0, 1, 2), *settle(0, 1, 2), None],
        [],
        {},
    ),
    "a result that turns out bad is missing again": (
        [*settle(0, 1, 2), *settle(2, ok=False), *settle(3)],
        [Ask(((4, 5),))],
        {},
    ),
    "without a budget nothing is late": (
        begin(0, 1, 2, 3),
        [],
        {"waiting": Waiting(hedge_budget=0)},
    ),
    "no column is asked for that is not needed": (
        [*begin(0, 1, 2), *settle(0), None, *begin(3, 4, at=1.5), *settle(1, at=1.6)],
        [Ask(((1,), (3,))), Prepare()],
        {"first": [(0,), (2,), (4,)], "needed": 3, "spare": [1, 3, 5], "history": known(rows=1)},
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_decisions_after_the_first(name):
    events, wanted, options = SCRIPTS[name]
    decisions, _, _ = drive(**{"waiting": SOON, "events": events, "history": known()} | options)
    assert decisions[1:] == wanted


@pytest.mark.parametrize(("idle", "times"), [(2, 3), (1, 1), (0, 1)])
def test_a_late_part_is_asked_again_three_times_if_another_worker_stays_free(idle, times):
    waiting, how = Waiting(predict_after=math.inf), {"first": [(0,), (1,), (2,), (3,)], "needed": 4}
    events = [*begin(0, 1, 2, 3), *settle(0, 1, 2)]
    for part in range(4, 4 + times):
        events += [None, *begin(part, at=float(part))]
    how |= {"history": known(rows=1), "idle": lambda: idle}
    decisions, waits, _ = drive(waiting, [*events, None], **how)
    assert decisions.count(Ask(((3,),))) == times
    # A part that is late on two workers is looked at again, as a worker may become free.
    assert (waits[-1] == math.inf) == (times == 3)


@pytest.mark.parametrize("hedge_budget", [0.0, 0.25])
def test_failed_parts_are_asked_again_at_once_until_they_have_failed_three_times(hedge_budget):
    events = [*settle(0, 1, 2), *settle(3, ok=False), *settle(4, ok=False), *settle(5, ok=False)]
    decisions, _, ended = drive(Waiting(hedge_budget=hedge_budget), events)
    assert decisions == [Ask(tuple(FOUR)), Ask(((6, 7),)), Ask(((6, 7),))]
    assert ended.reason == "failed"


def raised(*parts, worker, at=1.0):
    return [Settled(part, at, at, False, "raised", worker) for part in parts]


def test_a_part_that_ends_its_worker_is_cut_while_all_others_run():
    six = [(2 * i, 2 * i + 1) for i in range(6)]
    events = [*begin(*range(6)), Settled(0, 0.1, 0.1, False, "died")]
    decisions, _, _ = drive(Waiting(predict=False), events, six, 12, History())
    assert decisions == [Ask(tuple(six)), Ask(((0,), (1,)))]
    events[4:6] = begin(4, 5, at=0.09)  # they may end their workers as soon
    decisions, _, _ = drive(Waiting(predict=False), events, six, 12, History())
    assert decisions == [Ask(tuple(six)), Ask(((0, 1),))]


@pytest.mark.parametrize(
    ("workers", "good", "asked", "reason"),
    [
        ((0, 1, 2, 3), False, 2, "error"),
        ((0, 1), False, 2, None),  # two bad rows are as likely
        ((0, 0, 0, 0), False, 2, None),  # the worker is broken
        ((0, 1, 2), True, 2, None),
    ],
)
def test_all_parts_are_blamed_only_if_more_than_two_raised_on_several_workers(
    workers, good, asked, reason
):
    first = FOUR[: len(workers)]
    events = [event for part, m in enumerate(workers) for event in raised(part, worker=m)]
    if good:  # a piece of the first part comes before the last part raises
        events.insert(2, Settled(3, 0.9, 0.9, True, worker=4))
    if reason:  # every row alone; rows are refused where their parts raised on another worker
        events += [event for part in range(4, 12) for event in raised(part, worker=part % 2)]
    decisions, _, ended = drive(Waiting(), events, first, needed=2 * len(first))
    assert decisions[0] == Ask(tuple(first))
    assert (ended and ended.reason) == reason
    halves = [unit for ask in decisions[1:] for unit in ask.parts]  # each part is asked again so
    assert halves[:8] == [(unit,) for part in first for unit in part]
    if ended is None:
        assert len(halves) == asked * len(first)


def answered(rows, num_workers=4):
    """The parts of a call of 256 rows, of which some raise, how many settled, and the end."""
    settled = 0

    def next_event(asked):
        nonlocal settled
        if settled == len(asked):
            return None
        bad = not rows.isdisjoint(asked[settled])
        settled += 1
        kind, worker = "raised" if bad else "", (settled - 1) % num_workers
        return Settled(settled - 1, float(settled), 1.0, not bad, kind, worker)

    decisions, _, ended = drive(
        Waiting(), next_event, [tuple(range(i, 256, 4)) for i in range(4)], 256
    )
    return [units for ask in decisions for units in ask.parts], settled, ended


def test_a_module_that_fails_on_all_rows_is_found_by_single_rows():
    asked, settled, ended = answered({*range(256)})
    assert (ended.reason, ended.refused) == ("error", (0, 1, 2, 3))
    assert settled < 70
    assert sum(len(units) == 1 for units in asked[:settled]) >= 16


@pytest.mark.parametrize("num_bad", [4, 16, 64, 128, 256])
@pytest.mark.parametrize("num_workers", [1, 4])
def test_no_innocent_row_is_blamed(num_bad, num_workers):
    rows = {*random.Random(0).sample(range(256), num_bad)}
    asked, _, ended = answered(rows, num_workers)
    assert ended.reason == "error"
    assert {row for part in ended.refused for row in asked[part]} == rows


def test_a_row_that_raised_is_not_refused_if_a_late_result_has_it():
    events = [*begin(0), *settle(1, 2, 3), None, *raised(4, worker=1, at=1.6)]
    events += [*raised(5, worker=2, at=1.7), *settle(0, at=1.8)]
    _, _, ended = drive(Waiting(), events, history=known())
    assert (ended.reason, ended.refused) == ("complete", ())


def test_at_the_deadline_rows_are_blamed_if_nothing_but_exceptions_came():
    events = [*raised(0, 1, 2, 3, 4, 5, worker=0), None]  # rows 0 and 1 alone
    ended = drive(Waiting(deadline=2.0, hedge_budget=0), events)[2]
    assert (ended.reason, ended.refused) == ("deadline", (4, 5))


@pytest.mark.parametrize(("worker", "reason", "refused"), [(1, "failed", ()), (0, "error", (8, 9))])
def test_what_only_one_worker_raises_on_is_refused_if_no_other_worker_works(
    worker, reason, refused
):
    events = raised(3, 4, 5, 6, 7, worker=0)
    events += [Settled(part, 2.0, 2.0, True, worker=worker) for part in range(3)]
    events += raised(*range(8, 8 + 2 * 18 if worker else 10), worker=0)
    _, _, ended = drive(Waiting(), events)
    assert (ended.reason, ended.refused) == (reason, refused)


def test_a_row_that_raises_until_the_deadline_is_refused():
    good = [Settled(part, 1.0, 1.0, True, worker=-1) for part in (0, 1)]
    events = [*good, *raised(3, 4, 5, 6, 7, worker=-1, at=1.5), None]
    ended = drive(Waiting(deadline=2.0, hedge_budget=0), events)[2]
    assert (ended.reason, ended.refused) == ("deadline", (6, 7))
    columns = {"first": [(0,), (1,), (2,)], "needed": 3, "spare": [3, 4, 5]}
    asked = drive(Waiting(), [*raised(1, 3, worker=0)], **columns)[0]
    assert asked == [Ask(((0,), (1,), (2,))), Ask(((3,),)), Ask(((4,),))]


def test_where_nothing_is_predicted_other_workers_get_more_tries():
    good = [Settled(part, 1.0, 1.0, True, worker=1) for part in range(3)]
    events = [*good, *raised(*range(3, 12), worker=0), Settled(12, 2.0, 2.0, True, worker=1)]
    assert drive(Waiting(predict=False), events)[2] is None
    events += [Settled(13, 3.0, 1.0, True, worker=1)]
    assert drive(Waiting(predict=False), events)[2].reason == "complete"


def test_failures_do_not_need_the_bucket():
    history = known()
    assert history.spend(6.0, most=6.0)
    events = [*begin(0, 1, 2, 3), *settle(0, 1), *settle(2, ok=False), None]
    decisions, waits, _ = drive(Waiting(None, 3.0, 0.01), events, history=history)
    assert decisions[1:] == [Ask(((4, 5),)), Prepare()]  # part 3 is late, and stays so
    assert waits[-1] == 3.0


@pytest.mark.parametrize(
    ("waiting", "reason"), [(SOON, "predict_after"), (Waiting(deadline=3.0), "deadline")]
)
def test_the_rest_is_predicted_if_half_is_there(waiting, reason):
    enough = drive(waiting, [*settle(0, 1), None], history=known())
    assert enough[2].reason == reason
    assert enough[2].deadline == 3.0
    if reason == "deadline":
        few = drive(waiting, [*settle(0), None], history=known())[2]
        assert few.reason == reason
        return
    later = drive(waiting, [*settle(0), None, *settle(1, at=7.0)], history=known())
    assert later[1][-1] == math.inf
    assert later[2].reason == reason


def test_a_deadline_counts_from_the_call():
    _, waits, ended = drive(Waiting(deadline=3.0), [*settle(0, 1), None], since=-0.5)
    assert waits[-1] == 2.5
    assert ended.deadline == 3.0


@pytest.mark.parametrize(
    "waiting",
    [
        Waiting(),
        Waiting(on_error="predict"),
        Waiting(predict_after=math.inf),
        Waiting(predict_after=3.0, predict=False),
    ],
)
def test_what_is_never_predicted_waits_for_all_that_can_come(waiting):
    _, waits, ended = drive(waiting, [*settle(0, 1), *settle(2, 3, at=99.0)], history=known())
    assert set(waits) == {math.inf}
    assert ended.reason == "complete"


@pytest.mark.parametrize(
    ("waiting", "by_rows", "with_a_code"),
    [
        (Waiting(), False, True),
        (Waiting(deadline=1.0), True, True),
        (Waiting(predict_after=3.0), True, True),
        (Waiting(on_error="predict"), True, True),
        (Waiting(deadline=1.0, predict_after=3.0, predict=False, on_error="predict"), False, False),
    ],
)
def test_rows_are_estimated_only_if_the_caller_asked_for_it(waiting, by_rows, with_a_code):
    assert (waiting.may_predict(True), waiting.may_predict(False)) == (by_rows, with_a_code)
    tries, rows = 3 if by_rows else 20, [(row,) for row in range(4)]
    events = [*begin(0, 1, 2, 3, at=0.1), *settle(0, 1, 2, at=0.2)]
    for part in range(3, 3 + tries):
        events += [*begin(part, at=0.2), *settle(part, at=0.2, ok=False)]
    decisions, _, ended = drive(waiting, events, rows, needed=4)
    assert decisions == [Ask(tuple(rows))] + [Ask(((3,),))] * (tries - 1)
    assert ended.reason == "failed"


def test_columns_stand_in_for_each_other():
    columns, options = [(0,), (2,), (4,), (6,)], {"needed": 4, "spare": [1, 3]}
    events = [*begin(0, 1, 2, 3), *settle(0), None]
    decisions, _, _ = drive(Waiting(), events, columns, history=known(rows=1), **options)
    assert decisions[1] == Ask(((1,), (3,), (6,)))  # unused ones, as long as there are some
    events += [*begin(4, 5, at=1.5), *settle(1, 4, 5, at=1.9)]
    _, _, ended = drive(Waiting(), events, columns, history=known(rows=1), **options)
    assert ended.reason == "complete"


def test_asking_all_at_once_ends_with_the_first():
    columns, waiting = [(n,) for n in range(6)], Waiting.first(2, deadline=3.0)
    decisions, _, ended = drive(waiting, settle(5, 1, 0, 3), columns, needed=4)
    assert decisions == [Ask(tuple(columns))]
    assert ended == Ended("first", (), math.inf, 3.0)
    assert drive(waiting, settle(*range(6)), columns, needed=6)[2].reason == "complete"
    events = [*settle(0, ok=False), *settle(1), None]  # failed ones are not asked again
    decisions, _, ended = drive(waiting, events, columns, needed=4)
    assert (decisions, ended.reason) == ([Ask(tuple(columns))], "deadline")
    assert drive(waiting, [*settle(*range(6), ok=False)], columns, needed=4)[2].reason == "failed"


def test_if_nothing_can_come_any_more_the_call_has_failed():
    assert drive(Waiting(), [*settle(0), None])[2].reason == "failed"
    assert drive(Waiting.first(), [*settle(0), None])[2].reason == "failed"


def test_a_call_is_remembered_when_it_has_ended():
    history = known(calls=7)  # 28 parts
    late = [Begin(0, 0.0, fresh=True), *begin(1, 2, 3), *settle(0, at=9.0), *settle(1, 2, 3)]
    drive(Waiting(), late, history=history)
    assert history.hedging_threshold(2) == math.inf  # 31: that of a new worker does not count
    drive(Waiting(), late[:-1], history=history)
    assert history.hedging_threshold(2) == math.inf  # nor does a call that was left
    drive(Waiting(), begin(0, 1, 2, 3) + settle(0, 1, 2, 3), history=history)
    assert history.hedging_threshold(2) == 1.5
    assert history.call(2) == 1.0


WIDE = [0.01 * (i + 1) for i in range(100)]  # a tail of 8 medians


@pytest.mark.parametrize(
    ("latencies", "budget", "threshold"),
    [
        ([1.0] * 20 + [0.9] * 20, 0.0, (1 / 0.9) ** 4.45),
        ([1.0] * 25 + [0.8] * 13, 0.0, (1 / 0.8) ** 4.45),
        ([1.0] * 25 + [0.8] * 13 + [math.inf] * 50, 0.0, math.inf),
        ([0.0] * 20 + [0.1] * 30, 0.0, 0.8),
        ([0.02] * 40 + [0.002] * 20, 0.0, 8 * 0.02),  # one worker of three is fast
        (WIDE, 0.2, 0.81),  # parts are late as soon as the budget allows
        (WIDE, 0.25, 1.5 * 0.51),
        (WIDE, 0.0, 8 * 0.51),
    ],
)
def test_the_hedging_threshold_is_the_tail_of_a_lognormal_body(latencies, budget, threshold):
    history = History()
    history.add([(4, seconds) for seconds in latencies], None)
    assert history.hedging_threshold(4, budget) == pytest.approx(threshold)


def test_what_is_old_is_forgotten():
    history = known(1.0, calls=128)
    for _ in range(200):
        history.add([(2, 3.0)] * 4, (2, 3.0))
    assert (history.part(2), history.hedging_threshold(2), history.call(2)) == (3.0, 4.5, 3.0)


def test_latencies_are_compared_by_what_their_rows_should_take():
    history = History()
    for _ in range(16):
        history.add([(16, 1.0)] * 3 + [(16, math.inf), (4, 0.325)], (16, 1.5))
    assert history.part(16) == pytest.approx(1.0)
    assert history.part(4) == pytest.approx(0.325)
    assert history.part(10) == pytest.approx(0.6625)
    assert history.part(2) == pytest.approx(0.325)  # no less than ever seen
    assert history.part(32) == pytest.approx(2.0)
    assert history.call(32) == pytest.approx(3.0)
    history = known(rows=16)  # of one size only, fewer rows are given as long
    assert (history.part(4), history.part(16), history.part(48)) == (1.0, 1.0, 3.0)


def test_few_large_parts_do_not_spoil_the_threshold_of_small_ones():
    history = History()
    for number in range(300):  # parts of 1 row, or 2 that take as long, and hardly ever 8
        rows = 8 if number % 100 == 40 else 1 + (number % 3 == 0)
        history.add([(rows, 1.0)], None)
        if number >= 32:
            assert history.hedging_threshold(1) == history.hedging_threshold(2) == 1.5, number


def test_sizes_that_are_new_soon_count_as_what_they_take():
    history = known(rows=1, calls=8)
    thresholds = []
    for _ in range(24):
        history.add([(2, 1.0)], None)
        thresholds.append(history.hedging_threshold(1))
    assert thresholds[8:] == [1.5] * 16


def test_latencies_of_zero_are_a_history_too():
    history = known(0.0)
    assert (history.hedging_threshold(2), history.call(2)) == (0.0, 0.0)
    waits = drive(Waiting(predict_after=math.inf), begin(0, 1), history=history)[1]
    assert waits == [math.inf, 0.0, 0.0]


def test_calls_that_were_cut_short_count_as_infinite():
    history = known(calls=8)
    for _ in range(8):
        drive(Waiting(deadline=1.0), [*settle(0, 1), None], history=history)
    assert history.call(2) == math.inf


def test_the_bucket_is_filled_by_calls():
    history = History()
    assert history.spend(1.5, most=2.0)
    assert not history.spend(0.75, most=2.0)
    history.earn(0.25)
    assert history.spend(0.75, most=2.0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_history_is_empty(copied):
    history = copied(known())
    assert history.hedging_threshold(2) == math.inf
    drive(Waiting(), settle(0, 1, 2, 3), history=history)


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


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"deadline": 0.0},
            ValueError,
            "deadline must be a positive and finite number of seconds, got 0.0",
        ),
        (
            {"deadline": math.inf},
            ValueError,
            "deadline must be a positive and finite number of seconds, got inf",
        ),
        ({"deadline": "200ms"}, TypeError, "number of seconds, got '200ms' of type str"),
        ({"hedge_budget": None}, TypeError, "hedge_budget must be .*, got None of type NoneType"),
        ({"predict_after": 0}, ValueError, "predict_after must be positive, got 0"),
        ({"predict_after": math.nan}, ValueError, "predict_after must be positive, got nan"),
        ({"predict": 0}, TypeError, "predict must be of type bool, got int"),
        ({"on_error": "skip"}, ValueError, "on_error must be 'raise' or 'predict', got 'skip'"),
        ({"hedge_budget": -1}, ValueError, "hedge_budget must be at least 0 and finite, got -1"),
        ({"num_stragglers": -1}, ValueError, "num_stragglers must be at least 0, got -1"),
        ({"num_stragglers": 1.5}, TypeError, "num_stragglers must be an integer, got 1.5"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        (Waiting.first if "num_stragglers" in options else Waiting)(**options)


@pytest.mark.parametrize(("of_four", "num"), [(0.25, 4), (1.0, 1)])
def test_a_hedge_is_split_unless_small_parts_are_known_to_take_as_long(of_four, num):
    history = known(rows=16)
    assert history.num_hedges(16, 4) == 4
    assert history.num_hedges(16, 0) == 1
    history.add([(4, of_four)] * 32, None)
    assert history.num_hedges(16, 4) == num
    assert history.num_hedges(8, 4) == 4  # parts of two rows were never seen
