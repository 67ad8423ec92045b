"""Distances and products of rows: every kernel of the CPU, and CUDA's on the host and a GPU."""

import ctypes
import re

import pytest
import torch

from coded_torch.ops import inner_products, squared_distances

from .grids import ARCHITECTURES, grid_fixture, linked_without_spills
from .test_ops import every_kernel

DTYPES = (torch.float64, torch.float32)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
library = grid_fixture("distances_grid.cpp", "distances.cu")
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
    needed = rows.clone().requires_grad_()
    for call, message in (
        (lambda: inner_products(rows.half()), "inner_products: rows must be float64 or float32"),
        (lambda: squared_distances(needed, squares, 0.0), "squared_distances: rows must not requi"),
        (lambda: inner_products(needed), "inner_products: rows must not require a gradient"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_opcheck():
    operator = torch.ops.coded_torch.squared_distances.default
    rows, squares = problem(5, 8, torch.float32)
    torch.library.opcheck(operator, (rows, squares, 0.0))
    torch.library.opcheck(torch.ops.coded_torch.inner_products.default, (rows,))


# The multiprocessors of a card that a tile's slices are divided over, and of one that is too small.
LARGE, SMALL = 132, 1


@pytest.fixture
def grid(library):
    return library.coded_torch_run_distances


def run_grid(grid, rows, squares, multiprocessors=LARGE):
    n, columns = rows.shape
    out = torch.full((n, n), torch.nan, dtype=rows.dtype)
    failure = ctypes.create_string_buffer(80)
    sizes = ctypes.c_int64(n), ctypes.c_int64(columns)
    addresses = (None if t is None else t.data_ptr() for t in (rows, squares, out))
    tensors = map(ctypes.c_void_p, addresses)
    double = rows.dtype == torch.float64
    grid(*tensors, *sizes, ctypes.c_double(0), double, multiprocessors, failure)
    assert failure.value == b""
    return out


@every_dtype
@pytest.mark.parametrize(("n", "columns"), [*SIZES[1:], (66, 600)])
def test_the_kernel_body_over_a_whole_grid(grid, n, columns, dtype):
    rows, squares = problem(n, columns, dtype)
    check(run_grid(grid, rows, squares), rows)
    check_products(run_grid(grid, rows, None), rows)


@every_dtype
def test_a_pair_on_a_grid_depends_on_nothing_but_its_rows(grid, dtype):
    rows, squares = problem(70, 2039, dtype)  # slices of 256 columns
    whole = run_grid(grid, rows, squares)
    assert torch.equal(run_grid(grid, rows, squares, SMALL), whole)
    part = run_grid(grid, rows[3:9].contiguous(), squares[3:9].contiguous())
    assert torch.equal(part, whole[3:9, 3:9])


def test_compiles_links_and_does_not_spill(tmp_path):
    log, count = linked_without_spills(tmp_path / "distances.so", "distances.cu")
    assert count == len(ARCHITECTURES) * 8  # dtypes, distances and products, whole and of slices
    assert max(map(int, re.findall(r"Used (\d+) registers", log))) <= 128


@pytest.mark.cuda
@every_dtype
@pytest.mark.parametrize("columns", [33, 240])
def test_on_a_gpu(dtype, columns):
    rows, squares = problem(300, columns, dtype)
    check(squared_distances(rows.cuda(), squares.cuda(), 0.0).cpu(), rows)
    check_products(inner_products(rows.cuda()).cpu(), rows)
