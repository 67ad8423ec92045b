"""The comparison against stragglers: received sets, what is picked, and the gain over Berrut."""

import numpy as np
import pytest
import torch

from benchmarks import accuracy
from benchmarks.schemes import OUTPUTS, Scores
from benchmarks.subjects import subject


def test_fidelity_is_the_gain_over_berrut_averaged_over_stragglers(generator):
    exact = torch.eye(4, dtype=torch.float64).repeat(5, 1)
    labels = exact.argmax(1)
    names = [("softmax", code, aim) for code in ("spline", "Berrut") for aim in accuracy.AIMS]
    scores = {s: {name: Scores() for name in names} for s in (1, 2)}
    for _ in range(6):
        error = 0.01 * torch.randn(exact.shape, generator=generator, dtype=torch.float64)
        for s, (_, code, aim) in ((s, name) for s in scores for name in names):
            answers = exact + error * (1 if code == "Berrut" else {1: 0.9, 2: 0.7}[s])
            if code == "Berrut":
                answers[:s] = answers[:s].roll(1, dims=1)  # wrong classes
            scores[s]["softmax", code, aim].add(answers, exact, labels)
    found = accuracy.gains(list(scores.values()))
    points, half = found["relative accuracy higher by points"]["averaged"]
    assert points == pytest.approx(100 * 1.5 / 20)
    assert half == pytest.approx(0, abs=1e-9)
    for measure, column, power in (("rmse", 3, 0.5), ("rmse_mean", 4, 1)):
        errors = {
            (s, code): scores[s]["softmax", code, "squared error"].columns[column].mean() ** power
            for s in scores
            for code in ("spline", "Berrut")
        }
        gains = [100 * (1 - errors[s, "spline"] / errors[s, "Berrut"]) for s in (1, 2)]
        value, half = found[f"{measure} lower by %"]["averaged"]
        assert value == pytest.approx(np.mean(gains), rel=1e-3)
        assert half > 0


def test_received_sets_are_nested_and_of_the_right_size(generator):
    sets = accuracy.received_sets(12, (2, 5, 9), generator)
    for law in accuracy.LAWS:
        two, five, nine = (set(sets[law, s][0]) for s in (2, 5, 9))
        assert nine < five < two
        assert [len(x) for x in (two, five, nine)] == [10, 7, 3]
    lost = np.setdiff1d(np.arange(12), sets["contiguous", 5][0])
    shifted = [sorted((lost + i) % 12) for i in range(12)]
    assert list(range(5)) in shifted


def test_what_is_picked_is_best_on_tuning_batches():
    of, curve = subject("lenet5", quick=True), (12, 4, (2, 6))
    every = accuracy.families(12, 4)
    picks = accuracy.pick(of, 60, curve, (1, 1))
    scores = accuracy.tuning_scores(of, 60, curve, 1)
    for s in (2, 6):
        names = {name for _, name, _ in picks[s]}
        assert names > set(every)
        assert len(picks[s]) == len(names) * len(OUTPUTS) * len(accuracy.AIMS)
        for (output, name, aim), picked in picks[s].items():
            assert picked.output == output
            if len(every.get(name, ())) < 2:
                continue
            column, sign = (3, 1) if aim == "squared error" else (2, -1)
            losses = {
                repr(code): sign * scores[s][output, name, i].columns[column].mean()
                for i, code in enumerate(every[name])
                if (output, name, i) in scores[s]
            }
            assert len(losses) > 2
            assert losses[repr(picked.code)] == min(losses.values())
