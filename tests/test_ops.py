"""The spline operator: every layout, dtype, kernel and transformation."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from coded_torch._plan import first_results, spline_plan, split_rows, with_copies
from torch.autograd import gradcheck, gradgradcheck

from coded_torch import ops

from .splines import DTYPES, TOLERANCES, make_knots, make_points, make_samples

SIZES = (1, 2, 3, 4, 5, 17, 128, 129)
both_ways = pytest.mark.parametrize("transpose", [False, True])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_kernel = pytest.mark.usefixtures("capability")
of_the_compiler = pytest.mark.filterwarnings("ignore")  # about its own dependencies


def make_plan(n, dtype=torch.float64, smoothing=1e-4, plans=1, seed=0):
    """(coefficients, schedule) of as many plans, and their dense matrices [P, N, n]."""
    rng = np.random.default_rng([n, seed])
    knots = np.stack([make_knots("random3", n, rng) for _ in range(plans)])
    points = np.stack([make_points(k, rng, count=12)[:12] for k in knots])
    penalties = np.full_like(knots, n * smoothing)
    coefficients, schedule = map(torch.from_numpy, spline_plan(knots, penalties, points))
    eye = torch.eye(n, dtype=torch.float64)[:, None].expand(n, plans, n)
    matrices = ops.spline_apply(eye, coefficients, schedule).transpose(0, 1)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return coefficients.to(acc), schedule, matrices


def make_indices(rows, out_rows, groups, generator):
    """Rows of a batch in any order, some missing, one twice; rows of the result, none twice."""
    gather = torch.randint(0, 2 * rows, (rows, groups), generator=generator)
    gather[0, 0] = -1
    gather[-1, -1] = gather[0, -1]
    num_rows = out_rows * groups + 2
    scatter = torch.randperm(num_rows, generator=generator)[: out_rows * groups]
    scatter[::5] = -1
    return gather, scatter.view(out_rows, groups), num_rows


def gathered(values, gather):
    return torch.where((gather < 0)[..., None], 0, values[gather.clamp(min=0)])


def scattered(result, scatter, num_rows):
    out = result.new_zeros(num_rows + 1, result.shape[2])  # the last row takes dropped ones
    out[torch.where(scatter < 0, num_rows, scatter)] = result
    return out[:-1]


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@both_ways
@every_dtype
@pytest.mark.parametrize("n", SIZES)
@every_kernel
def test_every_layout_dtype_and_kernel(n, dtype, transpose):
    coefficients, schedule, (matrix,) = make_plan(n, dtype)
    matrix = matrix.T if transpose else matrix
    for name, values in make_samples(matrix.shape[1], dtype).items():
        got = ops.spline_apply(values, coefficients, schedule, transpose=transpose)
        want = torch.einsum("oi,igm->ogm", matrix, values.double())
        assert (got.shape, got.dtype, got.is_contiguous()) == (want.shape, dtype, True), name
        if want.numel():
            largest = torch.einsum("oi,igm->ogm", matrix.abs(), values.double().abs())
            error = (got.double() - want).abs().max()
            assert error <= TOLERANCES[dtype] * largest.max(), (name, error)


@both_ways
@every_dtype
def test_a_matrix_in_the_plan_changes_nothing_on_the_cpu(dtype, transpose):
    coefficients, schedule, (matrix,) = make_plan(9, dtype)
    dense = ops.with_matrix(coefficients, schedule)
    entries = dense[0, coefficients.shape[1] :]
    assert len(entries) == 12 * 9
    tolerance = TOLERANCES[torch.float32 if dtype != torch.float64 else dtype]
    assert (entries.view(9, 12).T.double() - matrix).abs().max() <= tolerance
    values = randn(12 if transpose else 9, 2, 5, dtype=dtype).requires_grad_()
    results = [
        ops.spline_apply(values, c, schedule, transpose=transpose) for c in (dense, coefficients)
    ]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(out.sum(), values)[0] for out in results))
    with pytest.raises(RuntimeError, match="do not fit together"):
        ops.spline_apply(values, dense[:, :-1].contiguous(), schedule, transpose=transpose)


def test_the_default_kernel_is_the_best():
    coefficients, schedule, _ = make_plan(17, torch.float32)
    values = torch.randn(17, 2, 100)
    operators, default = torch.ops.coded_torch, ops.spline_apply(values, coefficients, schedule)
    capabilities = operators.cpu_capabilities().split()  # one only, if clang compiled them
    best, least = capabilities[0], capabilities[-1]
    try:
        operators._use_cpu_capability(least)
        other = ops.spline_apply(values, coefficients, schedule)
    finally:
        operators._use_cpu_capability(best)
    assert torch.equal(ops.spline_apply(values, coefficients, schedule), default)
    # The wider instruction sets may fuse multiplications with additions, as the compiler chooses.
    assert torch.allclose(other, default, atol=1e-5)
    with pytest.raises(RuntimeError, match=f"must be one of .*{least}, got mmx"):
        operators._use_cpu_capability("mmx")


@every_dtype
def test_a_column_depends_on_nothing_but_itself(dtype):
    """Its tile, its tail and streaming stores do not change its bits."""
    coefficients, schedule, _ = make_plan(5, dtype)
    values = randn(5, 1, 400_000, dtype=dtype)  # enough for results to bypass the cache
    whole = ops.spline_apply(values, coefficients, schedule)
    for begin, end in ((0, 1), (63, 64), (1, 130), (399_900, 400_000)):
        part = ops.spline_apply(values[..., begin:end], coefficients, schedule)
        assert torch.equal(part, whole[..., begin:end])


@both_ways
@every_dtype
@pytest.mark.parametrize("plans", [1, 3])
@every_kernel
def test_indexed_rows_are_read_and_written_where_they_lie(plans, dtype, transpose):
    coefficients, schedule, _ = make_plan(9, dtype, plans=plans)
    rows, out_rows, groups = (12, 9, 3) if transpose else (9, 12, 3)
    generator = torch.Generator().manual_seed(0)
    gather, scatter, num_rows = make_indices(rows, out_rows, groups, generator)
    every_row = torch.arange(out_rows * groups).flip(0).view(out_rows, groups)

    def apply(values, gather=None, scatter=None, num_rows=None):
        indices = {"gather": gather, "scatter": scatter, "num_rows": num_rows}
        return ops.spline_apply(values, coefficients, schedule, transpose=transpose, **indices)

    for columns in (1, 70, 192):
        batch = torch.randn(2 * rows, columns + 3, generator=generator).to(dtype)
        for values in (
            batch[:, :columns].contiguous(),
            batch[:, :columns],
            batch[:, :1].expand(-1, columns),
            batch.repeat_interleave(2, 1)[:, : 2 * columns : 2],
        ):
            want = apply(gathered(values, gather))
            assert torch.equal(apply(values, gather), want)
            for given, index in ((values, gather), (gathered(values, gather), None)):
                got = apply(given, index, scatter, num_rows)
                assert torch.equal(got, scattered(want, scatter, num_rows))
                assert torch.equal(apply(given, index, every_row)[every_row], want)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_results_ask_for_huge_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("the system does not grant huge pages on request")
    coefficients, schedule, _ = make_plan(5, torch.float32)
    out = ops.spline_apply(torch.randn(5, 1, 2**21), coefficients, schedule)  # [12, 1, 2 MB]
    first, last = out.data_ptr(), out.data_ptr() + out.nbytes
    asked = shared = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(bound, 16) for bound in bounds.groups())
            shared = max(0, min(end, last) - max(begin, first))
        elif line.startswith("VmFlags:") and "hg" in line.split():
            asked += shared
    # Whether the system grants them depends on how divided its free memory is.
    assert asked >= 0.9 * out.nbytes


@both_ways
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("indexed", ["", "gather", "scatter", "gather scatter"])
def test_opcheck_gradients_and_vmap(n, transpose, indexed):
    coefficients, schedule, _ = make_plan(n)
    rows, out_rows = (12, n) if transpose else (n, 12)
    gather, scatter, num_rows = make_indices(rows, out_rows, 2, torch.Generator().manual_seed(1))
    indices = {"gather": gather} if "gather" in indexed else {}
    indices |= {"scatter": scatter, "num_rows": num_rows} if "scatter" in indexed else {}
    shape = (2 * rows, 3) if "gather" in indexed else (rows, 2, 3)
    values = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    operator = torch.ops.coded_torch.spline_apply.default
    torch.library.opcheck(operator, (values, coefficients, schedule, transpose), indices)

    def apply(v):
        return ops.spline_apply(v, coefficients, schedule, transpose=transpose, **indices)

    assert gradcheck(apply, (values,))
    assert gradgradcheck(lambda v: apply(v).square(), (values,))
    for dim in (0, 1, len(shape)):
        batch = torch.stack([values, 2 * values, values.square()], dim).detach()
        got = torch.vmap(apply, dim)(batch)
        for b in range(3):
            assert torch.equal(got[b], apply(batch.select(dim, b)))


@of_the_compiler
def test_compiles_into_one_frame():
    coefficients, schedule, _ = make_plan(6, torch.float32)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def run(values):
        return ops.spline_apply(values, coefficients, schedule).relu()

    for groups, columns in ((2, 3), (4, 5), (3, 9)):
        values = torch.randn(6, groups, columns, requires_grad=True)
        got = run(values)
        assert torch.equal(got, ops.spline_apply(values, coefficients, schedule).relu())
        got.sum().backward()
        assert values.grad is not None
    assert counter.frame_count == 1


PLAN = make_plan(4)[:2]
GOOD, FLAT = randn(4, 2, 3), randn(6, 3)
GATHER, SCATTER = torch.zeros(4, 2, dtype=torch.int64), torch.arange(24).view(12, 2)


@pytest.mark.parametrize(
    ("values", "change", "message"),
    [
        (GOOD[0], {}, r"values must be \[rows, groups, columns\], got \[2, 3\]"),
        (GOOD.int(), {}, "values must be float64, float32, bfloat16 or float16"),
        (GOOD.float(), {}, "coefficients must be Float"),
        (GOOD, {"schedule": PLAN[1].long()}, "schedule must be int32"),
        (GOOD, {"coefficients": PLAN[0][:, :-1].contiguous()}, "do not fit together"),
        (GOOD[:3], {}, "do not fit together"),
        (GOOD, dict(zip(("coefficients", "schedule"), (t.expand(3, -1) for t in PLAN),
                        strict=True)), "must be contiguous"),
        (GOOD, {"gather": GATHER}, r"values must be \[rows, columns\] with gather, got \[4, 2, 3"),
        (FLAT, {"gather": GATHER[0]}, r"gather must be int64 \[rows, groups\], got Long \[2\]"),
        (FLAT, {"gather": GATHER.int()}, "gather must be int64 .* got Int"),
        (FLAT, {"gather": GATHER[:3]}, r"gather \[3, 2\], coefficients .* do not fit together"),
        (FLAT, {"gather": GATHER + 6}, r"gather must lie in -1\.\.5, got 6"),
        (FLAT, {"gather": GATHER - 2}, r"gather must lie in -1\.\.5, got -2"),
        (GOOD, {"scatter": SCATTER, "num_rows": -1}, "num_rows must be at least 0, and given"),
        (GOOD, {"num_rows": 24}, "num_rows must be at least 0, and given with scatter only"),
        (GOOD, {"scatter": SCATTER[:4], "num_rows": 24}, r"scatter must be \[12, 2\], got \[4, 2"),
        (GOOD, {"scatter": SCATTER, "num_rows": 23}, r"scatter must lie in -1\.\.22, got 23"),
        (GOOD, {"scatter": SCATTER // 2, "num_rows": 24}, "name no row twice, got 0 again"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(values, change, message):
    arguments = {"coefficients": PLAN[0], "schedule": PLAN[1]} | change
    with pytest.raises(RuntimeError, match=message):
        ops.spline_apply(values, **arguments)


@both_ways
def test_schedules_that_lead_out_of_bounds(transpose):
    coefficients, schedule, _ = make_plan(4, plans=2)
    values = randn(12 if transpose else 4, 2, 3)

    def refused(entries, at, message):
        bad = schedule.clone()
        bad[1, at] = torch.tensor(entries, dtype=torch.int32)
        with pytest.raises(RuntimeError, match=message):
            ops.spline_apply(values, coefficients, bad, transpose=transpose)

    for column in range(schedule.shape[1]):  # slots of 4 knots, 5, then the order of 12 points
        for entry in (-1, 13, 5_000_000):
            refused(entry, column, r"schedule must hold slots .* got others in row")
    refused([12, 0, 12], slice(1, 4), r"slots rising from 0 to 12 .* in row 1")


def test_plans_have_shapes_and_no_gradient():
    with pytest.raises(ValueError, match="knots and penalties must be"):
        spline_plan(np.zeros(3), np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match="coefficients must not require a gradient"):
        ops.spline_apply(GOOD, PLAN[0].clone().requires_grad_(), PLAN[1])


@pytest.mark.parametrize(
    ("name", "is_there"),
    [
        ("spline_apply", True), ("matern52_out", False), ("fit_metrics", False),
        ("squared_distances", False), ("choose_regression", False), ("regress", False),
        ("path_variances", False), ("estimate", False), ("coefficients", False),
        ("error_bounds", False), ("error_thresholds", False), ("error_radii", False),
        ("typical_rows", False),
    ],
)  # fmt: skip
def test_only_splines_run_on_cuda(name, is_there):
    """Features come to the host before distances and covariances are made of them."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"coded_torch::{name}", "CPU")
    assert has(f"coded_torch::{name}", "CUDA") == is_there


def test_planners_of_rows_refuse_what_would_be_read_out_of_bounds():
    rows, errors, one = np.arange(6).reshape(3, 2), np.ones(6), np.zeros(1, dtype=bool)
    for call, args, error, message in (
        (first_results, (rows, (0, 3), 6), IndexError, r"received must lie in 0\.\.2, got 3"),
        (first_results, (rows[0], (0,), 6), ValueError, r"rows must be \[N, G\]"),
        (split_rows, (rows[0], rows[1, 1:], one), IndexError, r"rows must be in 0\.\.B-1"),
        (split_rows, (rows[0], rows[0], one), ValueError, r"rows and far must be \[b\]"),
        (with_copies, (rows[0], errors, 2, 3, 1), ValueError, r"order and errors must be \[B\]"),
    ):
        with pytest.raises(error, match=message):
            call(*args)
