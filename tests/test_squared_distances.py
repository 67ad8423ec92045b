"""Squared distances: every kernel of the CPU, and that of CUDA on the host and on a GPU."""

import ctypes
import re

import pytest
import torch

from coded_torch.ops import squared_distances

from .grids import build_host, build_ptx
from .test_cuda import NVCC, run_nvcc
from .test_ops import CAPABILITIES
from .test_setup import load_setup

DTYPES = (torch.float64, torch.float32)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "columns"), SIZES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel(capability, n, columns, dtype):
    rows, squares = problem(n, columns, dtype)
    got = torch.ops.coded_torch.squared_distances_with(rows, squares, 0.0, capability)
    assert got.dtype == dtype
    check(got, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
    with pytest.raises(RuntimeError, match="rows must not require a gradient"):
        squared_distances(rows.requires_grad_(), squares, 0.0)


def test_opcheck():
    operator = torch.ops.coded_torch.squared_distances.default
    torch.library.opcheck(operator, (*problem(5, 8, torch.float32), 0.0))


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return build_host(tmp_path_factory.mktemp("distances"), "distances_grid.cpp")


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("distances-ptx")
    return build_ptx(folder, "distances_grid.cpp", "distances.cu")


@pytest.mark.parametrize("compiled", ["host", "ptx"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "columns"), SIZES)
def test_the_kernel_body_over_a_whole_grid(request, compiled, n, columns, dtype):
    run = request.getfixturevalue(compiled).coded_torch_run_distances
    rows, squares = problem(n, columns, dtype)
    out = torch.full((n, n), torch.nan, dtype=dtype)
    failure = ctypes.create_string_buffer(80)
    tensors = (ctypes.c_void_p(x.data_ptr()) for x in (rows, squares, out))
    sizes = ctypes.c_int64(n), ctypes.c_int64(columns)
    run(*tensors, *sizes, ctypes.c_double(0), dtype == torch.float64, failure)
    assert failure.value == b""
    check(out, rows)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_compiles_links_and_does_not_spill(tmp_path):
    log = run_nvcc(
        *load_setup().ARCHITECTURES, "-Xptxas=-v", "-Xcompiler=-fPIC", "--shared",
        "-o", str(tmp_path / "distances.so"), source="distances.cu",
    )  # fmt: skip
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log
    )
    assert len(spills) == 2 * 4  # architectures, dtypes wide and narrow
    assert set(spills) == {("0", "0", "0")}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [33, 240])
def test_on_a_gpu(dtype, columns):
    rows, squares = problem(300, columns, dtype)
    check(squared_distances(rows.cuda(), squares.cuda(), 0.0).cpu(), rows)
