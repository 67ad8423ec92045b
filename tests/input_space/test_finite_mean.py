"""Intervals for the mean of a finite data set: formulas against brute force, and coverage."""

import math

import pytest
import torch

from coded_torch.input_space._finite_mean import Kernel, LowRankRegression, intervals
from coded_torch.ops import matern52

from ..nn.modules import rand


def data_set(total=300, seed=0):
    """Coordinates ``[N, 3]``, and numbers ``[N, 2]`` that they explain, one of them with noise."""
    z = rand(total, 3, seed=seed).float()
    smooth = (z[:, 0].sin() + 0.5 * z[:, 1].square()).double()
    return z, torch.stack([smooth, smooth + 0.3 * rand(total, seed=seed + 1)], 1)


def regressed(z, y, *lengths):
    return LowRankRegression([Kernel(z, length) for length in lengths], y)


def of_draw(z, y, order, n, seen=None, level=0.95):
    """Return the intervals from the first n rows of an order, ours and those of sampling."""
    others = order[n : None if seen is None else n + seen]
    regression = regressed(z[order[:n]], y[order[:n]], 1.0, 2.0)
    k = regression.kernel.sums(z[others]) / len(others)
    parts = regression.errors, k @ regression.weights, regression.second_order(k), len(others)
    found = intervals(y[order[:n]], torch.tensor(False), *parts, len(y), level=level)
    return *found[0], *found[1]


def dense(regression, z):
    """Return the kernel of rows with n computed ones, and A, of an exact regression."""

    def kernel(x):
        squared = torch.cdist(x.double(), z.double()).square()
        return matern52(squared, regression.kernel._length) + 30.0

    noise = regression._noise * torch.eye(len(z), dtype=torch.float64)
    return kernel, torch.linalg.inv(kernel(z) + noise)


def test_leave_one_out_errors_and_the_second_order_part_equal_brute_force():
    z, y = data_set(40)
    n = 12
    regression = regressed(z[:n], y[:n], 1.5)
    kernel, a = dense(regression, z[:n])
    # The jitter is some thousandth of the least noise.
    torch.testing.assert_close(regression.times(torch.eye(n).double()), a, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(regression.diagonal, a.diagonal(), rtol=1e-3, atol=1e-4)

    def prediction(kept, rows):
        own = kernel(z[:n])[kept][:, kept] + regression._noise * torch.eye(len(kept)).double()
        return kernel(rows)[:, kept] @ torch.linalg.solve(own, y[:n][kept])

    def error(i, *without):
        """The error of row i if it is left out, and some others, too."""
        kept = [j for j in range(n) if j not in (i, *without)]
        return y[i] - prediction(kept, z[i : i + 1])[0]

    left_out = torch.stack([error(i) for i in range(n)])
    torch.testing.assert_close(regression.errors, left_out, rtol=1e-3, atol=1e-5)
    # Leaving out row j, too, moves the error of row i and, by j alone, the mean of other rows.
    moved = torch.zeros(n, n, 2).double()
    every = [*range(n)]
    for i in range(n):
        for j in range(n):
            if i != j:
                without = [k for k in every if k != j]
                mean = prediction(every, z[n:]).mean(0) - prediction(without, z[n:]).mean(0)
                moved[i, j] = error(i, j) - error(i) - mean
    b = ((moved * moved.transpose(0, 1)).sum((0, 1)) / n**2).clamp(min=0)
    found = regression.second_order(kernel(z[n:]).mean(0))
    torch.testing.assert_close(found, b, rtol=1e-3, atol=1e-8)


def test_few_kernels_are_those_of_all_rows_if_they_suffice(monkeypatch):
    """Each row is there three times, so a third of the kernels is as good as all."""
    z, y = data_set(40)
    z, y = z.repeat_interleave(3, 0), y.repeat_interleave(3, 0)
    exact = regressed(z, y, 1.5)
    monkeypatch.setattr("coded_torch.input_space._finite_mean.CENTRES", 40)
    few = regressed(z, y, 1.5)
    others = data_set(50, seed=5)[0]
    torch.testing.assert_close(few.diagonal, exact.diagonal, rtol=1e-4, atol=1e-4)
    sums = [each.kernel.sums(others) for each in (few, exact)]
    torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-4)
    assert few._noise == exact._noise


@pytest.mark.parametrize(("n", "seen"), [(40, None), (120, None), (60, 120)])
def test_intervals_hold_and_are_narrow(n, seen):
    z, y = data_set()
    generator, held, widths = torch.Generator().manual_seed(0), [], []
    for _ in range(80):
        order = torch.randperm(len(y), generator=generator)
        value, half, plain_value, plain = of_draw(z, y, order, n, seen)
        ours = (value - y.mean(0)).abs() <= half
        held.append(torch.stack([ours, (plain_value - y.mean(0)).abs() <= plain]))
        widths.append(half / plain)
        assert (half <= plain * (1 + 1e-12)).all()
    covered = torch.stack(held).double().mean((0, 2))
    assert (covered >= 0.89).all()  # .95 less 3.5 standard errors of 80 draws
    assert torch.stack(widths).mean(0)[0] < (0.5 if seen is None else 0.8)


def test_a_useless_regression_leaves_plain_sampling():
    z, y = rand(200, 3).float(), rand(200, 1, seed=9)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    _, half, _, plain = of_draw(z, y, order, 60)
    assert (half <= plain * (1 + 1e-12)).all()
    constant = of_draw(z, torch.full((200, 1), 2.5, dtype=torch.float64), order, 60)
    assert float(constant[0]) == pytest.approx(2.5)
    assert float(constant[1]) == math.inf  # other rows may be anything


def test_the_level_widens_the_interval_as_students_t():
    z, y = data_set()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    one, other = (of_draw(z, y, order, 60, level=level) for level in (0.95, 0.99))
    torch.testing.assert_close(one[0], other[0])
    assert ((other[1] / one[1] > 1.31) & (other[1] / one[1] < 1.6)).all()  # normal: 1.314
