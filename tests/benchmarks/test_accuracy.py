"""The comparison against stragglers: received sets, what is picked, and the gain over Berrut."""

import numpy as np
import pytest
import torch

from benchmarks import accuracy
from benchmarks.subjects import subject
from coded_torch.evaluation.scores import Scores


def test_fidelity_is_the_gain_over_berrut_averaged_over_stragglers(generator):
    exact = torch.eye(4, dtype=torch.float64).repeat(5, 1)
    labels = exact.argmax(1)
    scores = {
        ("softmax", "uniform", s, code, aim): Scores()
        for s in (1, 2)
        for code in ("spline", "Berrut")
        for aim in accuracy.AIMS
    }
    for _ in range(6):
        error = 0.01 * torch.randn(exact.shape, generator=generator, dtype=torch.float64)
        for (_, _, s, code, _), of_code in scores.items():
            answers = exact + error * (1 if code == "Berrut" else {1: 0.9, 2: 0.7}[s])
            if code == "Berrut":
                answers[:s] = answers[:s].roll(1, dims=1)  # wrong classes
            of_code.add(answers, exact, labels)
    found = accuracy.fidelity(scores, (1, 2))
    points, half = found["relative accuracy higher by points"]["averaged"]
    assert points == pytest.approx(100 * 1.5 / 20)
    assert half == pytest.approx(0, abs=1e-9)
    for measure, column, power in (("rmse", 3, 0.5), ("rmse_mean", 4, 1)):
        errors = {
            (s, code): of_code.columns[column].mean() ** power
            for (_, _, s, code, aim), of_code in scores.items()
            if aim == "squared error"
        }
        gains = [100 * (1 - errors[s, "spline"] / errors[s, "Berrut"]) for s in (1, 2)]
        value, half = found[f"{measure} lower by %"]["averaged"]
        assert value == pytest.approx(np.mean(gains), rel=1e-3)
        assert half > 0


def test_received_sets_are_nested_and_of_the_right_size(generator):
    sets = accuracy.received_sets(12, (2, 5, 9), generator)
    for law in accuracy.LAWS:
        two, five, nine = (set(sets[law, s]) for s in (2, 5, 9))
        assert nine < five < two
        assert [len(x) for x in (two, five, nine)] == [10, 7, 3]
    lost = np.setdiff1d(np.arange(12), sets["contiguous", 5])
    shifted = [sorted((lost + i) % 12) for i in range(12)]
    assert list(range(5)) in shifted


def test_what_is_picked_is_best_on_tuning_batches():
    of, curve = subject("lenet5", quick=True), (12, 4, (2, 6))
    every = accuracy.families(12, 4)
    picks = accuracy.pick(of, 60, curve, (1, 1))
    assert set(picks) == {
        (output, s, aim) for output in accuracy.OUTPUTS for s in (2, 6) for aim in accuracy.AIMS
    }
    open_questions = [x for some in every.values() if len(some) > 1 for x in some]
    scores = accuracy.tuning_scores(of, 60, curve, 1, open_questions)
    for (output, s, aim), picked in picks.items():
        column, sign = (3, 1) if aim == "squared error" else (2, -1)
        for name in ("spline", "spline, ordered", "Lagrange (adapted), ordered"):
            ordering, kind = every[name][0].ordering, type(every[name][0].code)
            losses = {
                repr(scheme.code): sign * found.columns[column].mean()
                for (at, lost, scheme), found in scores.items()
                if (at, lost) == (output, s)
                and (type(scheme.code), scheme.ordering) == (kind, ordering)
            }
            assert len(losses) > 4
            assert losses[repr(picked[name].code)] == min(losses.values())
