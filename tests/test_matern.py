"""The Matern covariance: every kernel of the CPU."""

import math

import pytest
import torch

from coded_torch.ops import matern52

from .test_ops import every_kernel

DTYPES = (torch.float64, torch.float32)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def reference(squared, length):
    s = math.sqrt(5) * squared.double().sqrt() / length
    return torch.where(s < math.inf, (1 + s + s.square() / 3) * torch.exp(-s), 0)


def problem(dtype, count=5003):
    """Squared distances of all sizes, length 2 among them, and 0 and infinity."""
    squared = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=dtype)
    squared = torch.exp(squared * 40 - 30)  # up to some 75 lengths
    squared[::7] = 0
    squared[3::101] = math.inf
    return squared


def check(got, squared, length):
    want = reference(squared, length)
    eps = torch.finfo(squared.dtype).eps
    s = math.sqrt(5) * squared.double().sqrt() / length
    # Three roundings of s here and there, which times its size are in the exponent, and those of
    # the rest; and what vanishes.
    error = (got.double() - want).abs() - want * eps * (4 + 3 * s.clamp(max=1e3))
    assert error.max() <= (1e-147 if squared.dtype == torch.float64 else 2e-16)
    assert (got[squared == 0] == 1).all()
    assert (got[squared == math.inf] == 0).all()


@every_dtype
@every_kernel
def test_every_kernel(dtype):
    squared = problem(dtype)
    check(matern52(squared, 2.0), squared, 2.0)
    for number in (math.nan, -1):  # what is no distance has no covariance
        nothing = torch.full((37,), number, dtype=dtype)
        assert matern52(nothing, 2.0, out=nothing).isnan().all()


@every_dtype
@pytest.mark.parametrize("count", [0, 1, 3, 7, 8, 9, 15, 16, 17, 33, 100_003])
def test_a_number_depends_on_nothing_but_itself(count, dtype):
    whole = problem(dtype, 100_006)
    want = matern52(whole, 0.5)
    for begin in (0, 1, 3):  # aligned or not
        part = whole[begin : begin + count]
        assert torch.equal(matern52(part, 0.5), want[begin : begin + count])
        copy = part.clone()
        assert matern52(copy, 0.5, out=copy) is copy
        assert torch.equal(copy, want[begin : begin + count])


@every_dtype
def test_layouts_and_lengths(dtype):
    squared = problem(dtype, 5000).view(50, 100)
    want = matern52(squared, 0.1)
    for strided in (squared.T, squared[:, ::2], squared[:1].expand(3, -1)):
        got = matern52(strided, 0.1)
        assert got.is_contiguous()
        check(got, strided, 0.1)
    assert torch.equal(matern52(squared.T, 0.1), want.T)
    far = torch.tensor([0.0, 1e-300, 1e300, math.inf], dtype=torch.float64)
    assert matern52(far, 1e-3)[2:].abs().max() == 0
    assert torch.equal(matern52(far.to(dtype), 1e-200)[:1], torch.ones(1, dtype=dtype))
    assert not matern52(problem(dtype), 1e-300).isnan().any()


def test_bad_arguments():
    square = torch.ones(4, 4)
    for given, out, message in (
        (square.half(), square.half(), "must be float64 or float32, got Half"),
        (square, torch.empty(4, 5), r"out must have the shape.*got Float \[4, 5\] for Float"),
        (square, torch.empty(4, 4).double(), r"got Double \[4, 4\] for Float \[4, 4\]"),
        (square, torch.empty(4, 8)[:, ::2], "must be contiguous"),
        (square[1:], square[:3], "or apart from it"),
    ):
        with pytest.raises(RuntimeError, match=message):
            matern52(given, 1.0, out=out)


def test_schema():
    given = problem(torch.float32, 100), 1.0, torch.empty(100)
    operator = torch.ops.coded_torch.matern52_out.default
    torch.library.opcheck(operator, given, test_utils=("test_schema",))
