"""What holds for the table of a call, whatever happens."""

import time

import pytest

from coded_torch import Waiting
from coded_torch._table import DISPUTED, GOOD, Began, Reply, Table, WorkerError
from coded_torch.experiments.planner import Verified
from coded_torch.experiments.simulation import Conditions, simulate

BAD = Conditions(spread=0.5, straggling=0.1, slow=0.2, dead=0.1, dead_after=1.0, bursts=20.0)


class Twice:
    """A policy that decides twice at each moment: the second decision must write nothing."""

    num_stragglers = None

    def __init__(self, policy):
        self.policy, self.at_once = policy, policy.at_once

    def decide(self, history, table):
        until = self.policy.decide(history, table)
        if not table.end:
            before = self.columns(table), table.reason
            self.policy.decide(history, table)
            assert (self.columns(table), table.reason) == before
        return until

    def columns(self, table):
        return [
            (part.units, part.why, part.outcome, part.due, part.replaced) for part in table.parts
        ]


@pytest.mark.parametrize(
    "policy",
    [
        Waiting(),
        Waiting(deadline=3.0),
        Waiting(estimate_after=3.0),
        Waiting.first(2),
        Verified(Waiting(), 6, 0.1),
    ],
    ids=["rows", "deadline", "estimates", "columns", "verified"],
)
def test_deciding_twice_at_one_moment_writes_nothing(policy):
    outcome = simulate(Twice(policy), BAD, num_workers=6, num_parts=4, num_requests=300)
    assert outcome.ended.total() == 300


def test_long_messages_are_compared_in_linear_time():
    causes = [ValueError(f"{'A' * 40_000} at {place}") for place in range(2)]
    one, other = (WorkerError(0, 0, "", "raised", cause) for cause in causes)
    since = time.process_time()
    assert one.alike == other.alike
    assert time.process_time() - since < 2  # 10 s, as long as each letter looked for a digit


def test_the_first_reply_of_a_part_counts_whatever_comes_after_it():
    table = Table(first=[[0]], needed=1)
    part = table.ask([0])
    table.hear([Began(part, 3, 1.0), Reply(part, 3, 2.0, 1.0, "first")])
    late = WorkerError(0, 4, "was lost")
    table.hear([Began(part, 4, 3.0), Reply(part, 4, 4.0, 1.0, error=late)])
    assert (part.worker, part.began, part.ended, part.result) == (3, 1.0, 2.0, "first")
    assert (part.outcome, part.error, table.answered, table.now) == ("good", None, {0: part}, 4.0)


def test_each_unit_counts_once_whoever_was_asked_for_it():
    table = Table(first=[[0, 2], [1, 3]], needed=4)
    first = [table.ask(units) for units in table.first]
    table.hear([Reply(first[0], 0, 1.0, 1.0, "first")])
    assert (table.num_answered, table.answered) == (2, dict.fromkeys([0, 2], first[0]))
    hedge = table.ask([1, 2], first[1], "hedge")
    table.hear([Reply(hedge, 1, 2.0, 1.0, "hedge")])
    assert (table.num_answered, table.answered[1]) == (3, hedge)
    table.mark(first[0], DISPUTED)
    assert table.answered == {1: hedge, 2: hedge}
    table.hear([Reply(first[1], 1, 3.0, 2.0, "late")])
    assert (table.num_answered, table.answered) == (3, {1: hedge, 2: hedge, 3: first[1]})


def test_a_part_that_is_marked_twice_answers_its_units_once():
    table = Table(first=[(0, 1), (2, 3)], needed=4)
    part, other = (table.ask(units) for units in table.first)
    table.hear([Began(part, 0, 0.0), Reply(part, 0, 1.0, 1.0)])
    table.mark(part, GOOD)
    assert table.num_answered == len(table.answered) == 2
    table.mark(part, DISPUTED)
    table.mark(other, GOOD)
    assert table.num_answered == 2
