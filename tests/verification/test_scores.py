"""How odd results look, and how far apart they are."""

import math

import pytest
import torch

from coded_torch.verification import Results, Scores, Verdict


def smooth(x):
    return torch.stack([x.sum(1).sin(), x[:, 0] * x[:, 1], x[:, 2].exp()], 1)


def batch(size, seed=0):
    x = torch.rand(size, 3, generator=torch.Generator().manual_seed(seed))
    return x, smooth(x)


def results(scores, x, y, parts=4):
    """The results of a call in parts, and which part answers each row."""
    found = Results(len(x), scores, scores.fit([x]))
    answers, step = {}, len(x) // parts
    for part in range(parts):
        rows = range(part * step, (part + 1) * step)
        found.add(part, rows, [y[list(rows)]])
        answers |= dict.fromkeys(rows, part)
    return found, answers


def learn(scores, count, size=64):
    for seed in range(count):
        x, y = batch(size, seed)
        found, answers = results(scores, x, y)
        found.odd(answers)
        found.conclude(Verdict(answers=answers), [x], dict(enumerate(range(4))))


class TestScores:
    @pytest.mark.parametrize("wrong", [[0, 1, 2], [1]], ids=["row", "one output"])
    def test_a_wrong_row_looks_oddest(self, wrong):
        x, y = batch(240)
        y[17, wrong] = y[99, wrong] + 0.3
        found, answers = results(Scores(), x, y)
        scores = found.scores(answers)
        assert max(scores, key=scores.__getitem__) == 17

    def test_what_is_odd_is_as_rare_as_it_should_be(self):
        scores, many = Scores(), 0
        learn(scores, 60)
        for seed in range(100, 140):
            x, y = batch(64, seed)
            found, answers = results(scores, x, y)
            many += len(set(found.odd(answers)))
        assert many <= 0.01 * 40 * 64

    def test_wrong_rows_and_parts_are_odd(self):
        scores = Scores()
        learn(scores, 60)
        x, y = batch(64, 999)
        y[16:32] += torch.randn(16, 3, generator=torch.Generator().manual_seed(5))
        found, answers = results(scores, x, y)
        assert set(found.odd(answers)) & set(range(16, 32))

    def test_nothing_is_odd_before_enough_is_known(self):
        x, y = batch(64)
        y[3] = 100.0
        found, answers = results(Scores(), x, y)
        assert not found.odd(answers)

    def test_small_batches_are_scored_beside_earlier_rows(self):
        scores = Scores()
        x, y = batch(8, 1)
        assert not scores.fit([x])
        learn(scores, 1)
        y[5] = y[0] + 1.0
        found, answers = results(scores, x, y)
        of_rows = found.scores(answers)
        assert max(of_rows, key=of_rows.__getitem__) == 5

    def test_large_batches_are_divided(self):
        x, y = batch(1000)
        found, answers = results(Scores(), x, y)
        assert found.scores(answers).keys() == set(range(1000))

    def test_rows_of_doubted_and_excluded_workers_are_not_kept(self):
        scores = Scores()
        x, y = batch(64)
        found, answers = results(scores, x, y)
        found.conclude(Verdict(answers=answers, doubted={1}), [x], dict(enumerate(range(4))))
        scores.settle()
        assert set(scores._recent[2].tolist()) == {0, 2, 3}
        scores.forget(2)
        assert set(scores._recent[2].tolist()) == {0, 3}

    def test_results_that_are_not_finite_or_missing_are_not_scored(self):
        x, y = batch(64)
        y[3, 0] = math.inf
        found, answers = results(Scores(), x, y)
        assert not found.scores(answers)
        del answers[5]
        assert not found.scores(answers)


class TestDifferences:
    def of(self, a, b, **options):
        found = Results(8, Scores(), **options)
        base = torch.linspace(-2, 2, 8)[:, None].to(a.dtype)
        found.add(0, range(8), [base])
        found.add(1, (2, 5), [a])
        found.add(2, (5, 7), [b])
        return found, found.differences(1, 2)

    def test_are_of_common_rows_in_spreads(self):
        _, by = self.of(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.5], [0.0]]))
        assert by.keys() == {5}
        assert 0.2 < by[5] < 0.6

    def test_a_huge_wrong_result_does_not_widen_the_spread(self):
        _, by = self.of(torch.tensor([[0.0], [1.0]]), torch.tensor([[1e30], [0.0]]))
        assert by[5] > 1e29

    def test_equal_bits_do_not_differ(self):
        _, by = self.of(torch.tensor([[0.0], [math.nan]]), torch.tensor([[math.nan], [0.0]]))
        assert by[5] == 0

    def test_nan_differs_without_bound(self):
        _, by = self.of(torch.tensor([[0.0], [1.0]]), torch.tensor([[math.nan], [0.0]]))
        assert by[5] == math.inf

    def test_integers_differ_without_bound(self):
        a, b = torch.tensor([[0], [1]]), torch.tensor([[2], [0]])
        assert self.of(a, b)[1][5] == math.inf
        assert self.of(a, torch.tensor([[1], [0]]))[1][5] == 0

    def test_half_precision_is_tolerated(self):
        x = torch.zeros(2, 1)
        assert self.of(x.half(), x.half())[0].tolerance == 0.03
        assert self.of(x, x)[0].tolerance == 1e-3
        assert self.of(x, x, loose=True)[0].tolerance == 0.03
