"""CUDA tensors without compiled kernels: torch's own operators agree with the CPU's kernels."""

import pytest
import torch

from coded_torch import _extension as fallback
from coded_torch import ops

from .splines import TOLERANCES
from .test_ops import make_indices, make_plan
from .waits import Launches, host_waits

pytestmark = pytest.mark.cuda

MOST_LAUNCHES = 8


def on_device(*arguments):
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]


def agree(got, want, tolerance):
    assert got.is_cuda
    assert got.is_contiguous()
    assert got.dtype == want.dtype
    error = (got.cpu().double() - want.double()).abs()
    assert error.max() <= tolerance * want.double().abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transpose", [False, True])
def test_a_plan_with_its_matrix_makes_nothing_wait(dtype, transpose):
    coefficients, schedule, _ = make_plan(9, dtype)
    values = torch.randn(12 if transpose else 9, 3, 7).to(dtype)
    want = ops.spline_apply(values, coefficients, schedule, transpose=transpose)
    coefficients = ops.with_matrix(coefficients, schedule)
    inputs = on_device(values, coefficients, schedule, transpose)
    with host_waits() as waits, Launches() as launches:
        got = fallback.spline_apply(*inputs)
    assert not waits
    agree(got, want, 4 * TOLERANCES[dtype])
    assert len(launches.names) <= MOST_LAUNCHES, launches.names


@pytest.mark.parametrize("transpose", [False, True])
def test_indexed_rows(transpose):
    coefficients, schedule, _ = make_plan(9, torch.float32)
    coefficients = ops.with_matrix(coefficients, schedule)
    rows, out_rows = (12, 9) if transpose else (9, 12)
    gather, scatter, num_rows = make_indices(rows, out_rows, 3, torch.Generator().manual_seed(0))
    values = torch.randn(2 * rows, 100)
    values[0] = torch.nan  # no row of zeros may read it
    gather[gather == 0] = -1
    inputs = values, coefficients, schedule, transpose, gather, scatter, num_rows
    want = torch.ops.coded_torch.spline_apply(*inputs)
    inputs = on_device(*inputs)
    inputs[4][inputs[4] == -1] = 2 * rows  # out of bounds counts as missing
    agree(fallback.spline_apply(*inputs), want, 4 * TOLERANCES[torch.float32])
    with Launches() as launches:
        fallback.spline_apply(*inputs)
    assert len(launches.names) <= MOST_LAUNCHES, launches.names


def test_a_graph_cannot_hold_what_the_host_computes():
    coefficients, schedule, _ = make_plan(9, torch.float32)
    values, *plan = on_device(torch.randn(9, 3, 7), coefficients, schedule, False)
    must = pytest.raises(RuntimeError, match=r"a CUDA graph cannot hold it, .* before the capture")
    with must, torch.cuda.graph(torch.cuda.CUDAGraph()):
        values.mul_(2)  # torch warns of an empty graph
        fallback.spline_apply(values, *plan)


@pytest.mark.parametrize(("plans", "with_matrix"), [(1, False), (3, False), (3, True)])
def test_plans_without_a_matrix_and_several_are_applied_on_the_host(plans, with_matrix):
    coefficients, schedule, _ = make_plan(9, torch.float32, plans=plans)
    if with_matrix:
        each = zip(coefficients.split(1), schedule.split(1), strict=True)
        coefficients = torch.cat([ops.with_matrix(*one) for one in each])
    values = torch.randn(9, 3, 7)
    got = fallback.spline_apply(*on_device(values, coefficients, schedule, False))
    assert torch.equal(got.cpu(), ops.spline_apply(values, coefficients, schedule))


def test_rows_of_no_values_are_zeros():
    coefficients, schedule, _ = make_plan(9, torch.float32)
    coefficients, gather = ops.with_matrix(coefficients, schedule), torch.full((9, 2), -1)
    inputs = on_device(torch.zeros(0, 7), coefficients, schedule, False, gather)
    assert torch.equal(fallback.spline_apply(*inputs).cpu(), torch.zeros(12, 2, 7))


def test_a_gathered_row_out_of_bounds_has_no_gradient():
    coefficients, schedule, _ = make_plan(9, torch.float32)
    coefficients, gather = ops.with_matrix(coefficients, schedule), torch.arange(9)[:, None]
    values, (gather[2], gather[5]) = torch.randn(9, 7), (9, -1)
    plan = on_device(coefficients, schedule)
    values = values.cuda().requires_grad_()
    ops.spline_apply(values, *plan, gather=gather.cuda()).sum().backward()
    assert not values.grad[[2, 5]].any()
    assert values.grad[[0, 8]].any(1).all()


@pytest.fixture
def tf32():
    """The host allows products of rounded inputs; the setting must be there in the end."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    after, matmul.fp32_precision = matmul.fp32_precision, before
    assert after == "tf32"


@pytest.mark.usefixtures("tf32")
def test_a_row_that_is_only_selected_keeps_its_bits():
    rows = torch.randn(5, 1000, device="cuda")
    assert torch.equal(fallback.exact_matmul(torch.eye(5, device="cuda"), rows), rows)
