"""The losses of results that are left out: every kernel of the CPU, against the formulas."""

import functools
import math

import pytest
import torch

from coded_torch.ops import left_out_losses, matern52

from .test_ops import every_kernel

NUGGET = 1e-4


def problem(n, columns):
    generator = torch.Generator().manual_seed(n + columns)
    at = torch.randn(n, 3, generator=generator)
    at[n // 2 + 1 :: 5] = at[0]  # inputs that repeat
    squared = torch.cdist(at.double(), at.double()).square().float()
    squared[-1, :-1] = squared[:-1, -1] = math.inf  # an input that says nothing of others
    results = at @ torch.randn(3, columns, generator=generator)
    return squared, results.sin().T.contiguous()


@functools.cache
def reference(n, columns, length):
    """By solving without each result, in float64."""
    squared, results = problem(n, columns)
    y = results.double().T
    whole = matern52(squared.double(), length) + NUGGET * torch.eye(n, dtype=torch.float64)
    errors, variances = torch.zeros_like(y), torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        rest = [j for j in range(n) if j != i]
        c, k = whole[rest][:, rest], whole[rest, i]
        ones = torch.ones(n - 1, dtype=torch.float64)
        solved = torch.linalg.solve(c, torch.stack([ones, k], 1)).T
        left = (1 - solved[1].sum()) / solved[0].sum()
        weights = solved[1] + left * solved[0]
        errors[i] = y[i] - weights @ y[rest]
        variances[i] = whole[i, i] - k @ solved[1] + left**2 * solved[0].sum()
    q = (errors.square().mean(1) / variances).mean()
    return (q.log() + errors.square().mean(1) / (q * variances) - 1 + variances.log()) / 2


@pytest.mark.parametrize("columns", [1, 3, 16, 37])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 15, 16, 17, 33, 70])
@every_kernel
def test_every_kernel(n, columns):
    squared, results = problem(n, columns)
    lengths = [0.3, 1.0, 2.5]
    got = left_out_losses(squared, lengths, results, NUGGET)
    assert got.dtype == torch.float64
    want = torch.stack([reference(n, columns, length) for length in lengths])
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)
    for row, length in zip(got, lengths, strict=True):
        assert torch.equal(left_out_losses(squared, [length], results, NUGGET)[0], row)


@every_kernel
def test_a_covariance_that_is_not_positive_has_infinite_losses():
    squared, results = problem(12, 2)
    for broken in (-squared, squared * math.nan):
        got = left_out_losses(broken, [1.0, 1e-3], results, NUGGET)
        assert (got == math.inf).all()
    equal = left_out_losses(torch.zeros(3, 3), [1.0], torch.ones(2, 3), 0.0)
    assert (equal == math.inf).all()
    assert left_out_losses(squared, [], results, NUGGET).shape == (0, 12)
    assert left_out_losses(squared[:0, :0], [1.0], results[:, :0], NUGGET).shape == (1, 0)


def test_bad_arguments():
    squared, results = problem(12, 2)
    for given, y, message in (
        (squared.double(), results, r"must be contiguous on the CPU, float32 \[n, n\]"),
        (squared[:, :5], results, r"got \[12, 5\], \[1\] and \[2, 12\]"),
        (squared, results[:, :11].contiguous(), r"got \[12, 12\], \[1\] and \[2, 11\]"),
        (squared, results.T, "must be contiguous"),
        (squared, results[:, ::2], "must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            left_out_losses(given, [1.0], y, NUGGET)


def test_schema():
    scales = torch.ones(2, dtype=torch.float64)
    operator = torch.ops.coded_torch.left_out_losses.default
    squared, results = problem(12, 2)
    given = squared, scales, results, NUGGET
    torch.library.opcheck(operator, given, test_utils=("test_schema",))
