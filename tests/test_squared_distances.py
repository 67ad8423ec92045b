"""Distances and products of rows: every kernel of the CPU."""

import pytest
import torch

from coded_torch.ops import inner_products, squared_distances

from .test_ops import every_kernel

DTYPES = (torch.float64, torch.float32)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIZES = [(0, 5), (1, 0), (1, 1), (2, 7), (5, 8), (63, 16), (64, 33), (67, 240), (130, 3)]


def problem(n, columns, dtype):
    generator = torch.Generator().manual_seed(n + columns)
    rows = torch.randn(n, columns, generator=generator, dtype=torch.float64).to(dtype)
    if n > 4:
        rows[3] = rows[0]
        rows[4] = rows[1] + 1e-3 * rows[2]
    return rows, rows.square().sum(1)


def check(got, rows):
    exact = (rows.double()[:, None] - rows.double()).square().sum(2)
    eps = torch.finfo(rows.dtype).eps
    assert ((got.double() - exact).abs() <= (4 + rows.shape[1]) * eps * exact).all()
    assert torch.equal(got, got.T)
    assert not got.diagonal().any()


def check_products(got, rows):
    rows = rows.double()
    error = (got.double() - rows @ rows.T).abs()
    eps = torch.finfo(got.dtype).eps
    assert (error <= (4 + rows.shape[1]) * eps * (rows.abs() @ rows.abs().T)).all()
    assert torch.equal(got, got.T)


@every_dtype
@pytest.mark.parametrize(("n", "columns"), SIZES)
@every_kernel
def test_every_kernel(n, columns, dtype):
    rows, squares = problem(n, columns, dtype)
    got = squared_distances(rows, squares, 0.0)
    assert got.dtype == dtype
    check(got, rows)
    got = inner_products(rows)
    assert got.dtype == dtype
    check_products(got, rows)


@every_dtype
def test_a_pair_depends_on_nothing_but_its_rows(dtype):
    rows, squares = problem(130, 50, dtype)
    whole = squared_distances(rows, squares, 0.0)
    some = torch.randperm(130, generator=torch.Generator().manual_seed(0))[:70]
    part = squared_distances(rows[some], squares[some], 0.0)
    assert torch.equal(part, whole[some][:, some])


def test_what_rounding_may_cause_is_nothing():
    rows, squares = problem(67, 20, torch.float64)
    exact = squared_distances(rows, squares, 0.0)
    got = squared_distances(rows, squares, 0.1)
    small = exact <= (1 + squares[:, None] + squares) * 0.1
    assert 67 < small.sum() < 67**2
    assert torch.equal(got, exact.masked_fill(small, 0))


def test_bad_arguments():
    rows, squares = problem(5, 8, torch.float32)
    for given, lengths, message in (
        (rows.half(), squares, "rows must be float64 or float32, got Half"),
        (rows.T, squares, r"rows must be contiguous, \[rows, columns\], got \[8, 5\]"),
        (rows, squares[1:], r"squares must be contiguous, \[5\], of the dtype.*got Float \[4\]"),
        (rows, squares.double(), r"squares must be contiguous.*got Double \[5\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            squared_distances(given, lengths, 0.0)
    with pytest.raises(RuntimeError, match="inner_products: rows must be float64 or float32"):
        inner_products(rows.half())


def test_schemas():
    rows, squares = problem(5, 8, torch.float32)
    for name, arguments in (
        ("squared_distances", (rows, squares, 0.0)),
        ("inner_products", (rows,)),
    ):
        operator = getattr(torch.ops.coded_torch, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema",))
