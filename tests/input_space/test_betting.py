"""Intervals by bets: against brute force, and coverage at all numbers of rows together."""

import math

import pytest
import torch

from coded_torch.input_space._betting import betting, bounded


def drawn(y, count, seed=0):
    """Return numbers ``[N]`` in many random orders, ``[N, count]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([y[torch.randperm(len(y), generator=generator)] for _ in range(count)], 1)


def holds(x, total, mean, log_target):
    """Return whether nobody has won against a mean, bet by bet."""
    for values in (x, [1 - value for value in x]):
        m = mean if values is x else 1 - mean
        capital, before, squares = 0.0, 0.0, 0.25
        for t, value in enumerate(values, 1):
            expected = (total * m - before) / (total - t + 1)
            bet = math.sqrt(2 * log_target / (squares / t * t * math.log(t + 1)))
            capital += math.log1p(min(bet, 0.5 / expected) * (value - expected))
            if capital >= log_target:
                return False
            before += value
            squares += (value - (before + 0.5) / (t + 1)) ** 2
    return True


def test_the_ends_are_where_a_gambler_has_just_won():
    x = torch.rand(30, 1, generator=torch.Generator().manual_seed(0)).double()
    low, high = betting(x, 50, 0.9).flatten().tolist()
    numbers = x.flatten().tolist()
    for mean, is_held in ((low + 1e-6, True), (high - 1e-6, True), (low - 1e-3, False)):
        assert holds(numbers, 50, mean, math.log(20)) == is_held
    assert not holds(numbers, 50, high + 1e-3, math.log(20))


@pytest.mark.parametrize("kind", ["rare", "uniform", "constant", "skewed"])
def test_intervals_hold_at_all_numbers_of_rows_together(kind):
    y = torch.rand(300, generator=torch.Generator().manual_seed(1)).double()
    y = {"rare": (y < 0.02).double(), "uniform": y, "constant": 0 * y + 0.3, "skewed": y**8}[kind]
    x, held = drawn(y, 200), torch.ones(200, dtype=torch.bool)
    widths = []
    for n in (2, 5, 20, 60, 150, 290, 299):
        low, high = betting(x[:n], 300, 0.9)
        held &= (low <= y.mean() + 1e-9) & (high >= y.mean() - 1e-9)
        widths.append(float((high - low).mean()))
    assert held.double().mean() >= 0.9 - 3 * (0.09 / 200) ** 0.5
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.01


def test_the_interval_of_bets_is_taken_where_it_is_narrower():
    x = drawn(torch.rand(300, generator=torch.Generator().manual_seed(1)).double(), 1)[:100]
    bounds = torch.tensor([[0.0], [1.0]]).double()
    low, high = betting(x, 300, 0.95)
    mean = x.mean(0)
    is_share = torch.tensor([False])
    for half, expected in ((9.0, (high - low) / 2), (0.01, torch.tensor([0.01]))):
        found = torch.stack([mean, torch.full_like(mean, half)])
        given = found, x, is_share, bounds, 300
        _, got = bounded(*given, level=0.95, at_looks=0.95)
        torch.testing.assert_close(got, expected.double(), rtol=0, atol=0.002)
    unknown = torch.tensor([[-math.inf], [math.inf]]).double()
    assert torch.equal(bounded(found, x, is_share, unknown, 300, level=0.95, at_looks=0.9), found)
