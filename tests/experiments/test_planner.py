"""Redundancy chosen by simulation: what is recommended where it is known what should be."""

import io
import math
import sys
from collections import Counter

import numpy as np
import pytest
from torch import nn

import coded_torch
from coded_torch import workers
from coded_torch.cli.main import main
from coded_torch.experiments.planner import CONDITIONS, RIGHT, measured, plan, read_latencies
from coded_torch.experiments.simulation import Outcome

REQUESTS = 1000


def planned(given, deadline, **options):
    conditions = CONDITIONS[given] if isinstance(given, str) else given
    return plan(conditions, deadline, num_requests=REQUESTS, median=0.01, **options)


KINDS = ["no redundancy", "hedged", "everything twice", "estimated", "coded"]


@pytest.fixture(scope="module")
def calm():
    return planned("calm", 0.2)


def test_nothing_is_worth_anything_where_nothing_goes_wrong(calm):
    assert list(calm.best) == KINDS
    alone = calm.best["no redundancy"]
    assert alone.meets
    assert (alone.work, alone.estimated) == (1, 0)
    text = str(calm)
    assert "least work by no redundancy, wait for all" in text
    assert "waiting=Waiting(deadline=0.2, hedge_budget=0.0, estimate=False))." in text
    assert text.endswith("Neither estimates nor codes are worth it here.")
    assert max(map(len, text.splitlines()[:-3])) <= 80


def test_a_deadline_that_only_estimates_meet(monkeypatch):
    """3 % of the parts take 5 to 50 times as long; six workers for four parts."""
    monkeypatch.setattr("coded_torch.experiments.planner.PARTS", (4,))
    found = planned("straggling", 0.035)
    assert not found.best["no redundancy"].meets
    option = found.best["estimated"]
    assert option.meets
    assert 0 < option.estimated * (1 - RIGHT) <= 1 - 0.99  # the default accuracy
    text = str(found._replace(options=[option]))
    use = f"CodedWrapper(model, parts={option.parts}, workers=pool, waiting=Waiting(deadline="
    assert f"Use {use}0.0" in text
    assert not planned("straggling", 0.035, accuracy=1.0).best["estimated"].meets


def test_every_recommendation_keeps_the_deadline(calm):
    for option in calm.options:
        use = option.use.replace("workers=pool", "workers=LocalWorkers()")
        coded = eval(use, {"model": nn.Identity(), **vars(coded_torch), **vars(workers)})
        assert coded.waiting.deadline <= 0.2


def test_requests_with_fewer_results_than_their_policy_asks_for_are_late(monkeypatch):
    missing = np.repeat([0.0, 0.25, 0.75, 1.0], 300)  # of the rows of each request

    def simulate(*args, **options):
        return Outcome(np.ones(1200), missing, 1.0, 1.0, Counter())

    monkeypatch.setattr("coded_torch.experiments.planner.simulate", simulate)
    exact, codes = (0.75, 0.0), (0.25, 0.25)  # late and estimated; a code decodes a single result
    expected = dict(zip(KINDS, [exact, exact, codes, (0.5, 0.0625), codes], strict=True))
    best = planned("calm", 0.2).best
    assert {kind: (x.late, x.estimated) for kind, x in best.items()} == expected


def test_verification_costs_its_share_of_work_and_leaves_codes_out(calm, monkeypatch):
    monkeypatch.setattr("coded_torch.experiments.planner.PARTS", (4,))
    found = planned("calm", 0.2, verify=0.1)
    assert list(found.best) == ["no redundancy", "hedged", "estimated"]
    extra = found.best["no redundancy"].work - calm.best["no redundancy"].work
    assert 0.1 <= extra <= 0.15  # and the odd ones; new workers are checked more often
    assert all(", verify=0.1, workers=pool" in option.use for option in found.options)
    with pytest.raises(ValueError, match="num_workers with verify must be at least 2, got 1"):
        planned("calm", 0.2, verify=0.1, num_workers=1)


def test_measured_latencies_are_simulated_as_they_are(tmp_path, monkeypatch):
    """A body around 10 ms, and one in thirty 50 ms longer."""
    monkeypatch.setattr("coded_torch.experiments.planner.PARTS", (4,))
    generator = np.random.default_rng(0)
    seconds = 0.01 * generator.lognormal(0, 0.1, 3000)
    seconds[::30] += 0.05
    path = tmp_path / "latencies.csv"
    path.write_text("seconds,rows\n" + "".join(f"{x},16\n" for x in seconds))
    read = read_latencies(path)
    assert np.allclose(read, seconds)
    assert measured(read, 0.01).spread == pytest.approx(0.1, rel=0.2)
    found = planned(read, 0.2)
    uncoded = found.best["no redundancy"]
    # A tenth of the requests meet a delay in one of four parts.
    late = float((uncoded.latencies > 0.05).mean())
    assert late == pytest.approx(1 - (29 / 30) ** 4, abs=0.05)
    assert np.median(uncoded.latencies) == pytest.approx(0.011, rel=0.15)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_progress_is_shown_on_a_terminal_only(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    line = "plan --num-workers 1 --num-requests 1000"
    assert main(line.split()) == 0
    shown = sys.stderr.getvalue()
    assert ("policies: 100%" in shown and "7/7" in shown) if stream is Terminal else shown == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--deadline 0", "plan: deadline must be positive and finite, got 0.0"),
        ("--accuracy 2", "plan: accuracy must be a probability in [0, 1], got 2.0"),
        ("--num-workers 0", "plan: num_workers must be at least 1, got 0"),
        ("--load 1", "plan: load must be between 0 and 1, got 1.0"),
        ("--verify 2", "plan: verify must be a probability in [0, 1], got 2.0"),
        ("--median 0", "plan: median must be positive and finite, got 0.0"),
        ("--num-requests 10", "plan: num_requests must be at least 1000, got 10"),
        ("--seed -1", "plan: seed must be at least 0, got -1"),
        ("--latencies none.csv", "No such file or directory: 'none.csv'"),
        ("--latencies few.csv", "there must be at least 100 latencies, got 3"),
        ("--latencies words.csv", "finite seconds, one number per line"),
        ("--latencies wrong.csv", "latencies must be positive, finite seconds"),
    ],
)
def test_bad_values_get_one_line(arguments, message, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.csv").write_text("1\n2\n3\n")
    (tmp_path / "words.csv").write_text("seconds\nsoon\n")
    (tmp_path / "wrong.csv").write_text("1\n" * 200 + f"{math.inf}\n")
    assert message in refused(["plan", *arguments.split()])
