"""The operators themselves: every layout, dtype, kernel and transformation."""

import functools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from coded_torch._plan import spline_plan
from torch.autograd import gradcheck, gradgradcheck

from coded_torch import ops

from .splines import DTYPES, TOLERANCES, Sample, make_knots, make_points, make_samples, memory_for

CAPABILITIES = torch.ops.coded_torch.cpu_capabilities().split()
SIZES = (1, 2, 3, 4, 5, 17, 128, 129)


def make_plan(n, dtype=torch.float64, smoothing=1e-4, plans=1, seed=0):
    """(coefficients, schedule) of as many plans, and their dense matrices [P, N, n]."""
    rng = np.random.default_rng([n, seed])
    knots = np.stack([make_knots("random3", n, rng) for _ in range(plans)])
    points = np.stack([make_points(k, rng, count=12)[:12] for k in knots])
    penalties = np.full_like(knots, n * smoothing)
    coefficients, schedule = map(torch.from_numpy, spline_plan(knots, penalties, points))
    eye = torch.eye(n, dtype=torch.float64)[:, None]  # [n, 1, n]
    matrices = [
        ops.spline_apply(eye, coefficients[p : p + 1], schedule[p : p + 1])[:, 0]
        for p in range(plans)
    ]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return coefficients.to(acc), schedule, torch.stack(matrices)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_layout_dtype_and_kernel(capability, n, dtype, transpose):
    coefficients, schedule, (matrix,) = make_plan(n, dtype)
    matrix = matrix.T if transpose else matrix
    for sample in make_samples(matrix.shape[1], dtype):
        got = torch.ops.coded_torch.spline_apply_with(
            sample.values, coefficients, schedule, transpose, capability
        )
        want = torch.einsum("oi,igm->ogm", matrix, sample.values.double())
        assert got.shape == want.shape, sample
        assert got.dtype == dtype
        assert got.is_contiguous()
        if want.numel():
            largest = torch.einsum("oi,igm->ogm", matrix.abs(), sample.values.double().abs())
            error = (got.double() - want).abs().max()
            assert error <= TOLERANCES[dtype] * largest.max(), (sample, error)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_matrix_in_the_plan_changes_nothing_on_the_cpu(dtype, transpose):
    coefficients, schedule, (matrix,) = make_plan(9, dtype)
    dense = ops.with_matrix(coefficients, schedule)
    entries = dense[0, coefficients.shape[1] :]
    assert len(entries) == 12 * 9
    tolerance = TOLERANCES[torch.float32] if dtype != torch.float64 else TOLERANCES[dtype]
    assert (entries.view(9, 12).T.double() - matrix).abs().max() <= tolerance
    values = torch.randn(12 if transpose else 9, 2, 5).to(dtype).requires_grad_()
    got, want = (
        ops.spline_apply(values, c, schedule, transpose=transpose) for c in (dense, coefficients)
    )
    assert torch.equal(got, want)
    (gradient,) = torch.autograd.grad(got.sum(), values)
    assert torch.equal(gradient, torch.autograd.grad(want.sum(), values)[0])
    plans = torch.stack([dense, dense]), torch.stack([schedule, schedule])
    batched = torch.vmap(lambda *plan: ops.spline_apply(values, *plan, transpose=transpose))(
        *plans
    )  # a plan for each group, each with its matrix
    assert torch.equal(batched[1], want)
    with pytest.raises(RuntimeError, match="do not fit together"):
        ops.spline_apply(values, dense[:, :-1].contiguous(), schedule, transpose=transpose)


def test_the_default_kernel_is_the_best():
    coefficients, schedule, _ = make_plan(17, torch.float32)
    values = torch.randn(17, 2, 100)
    best = torch.ops.coded_torch.spline_apply_with(
        values, coefficients, schedule, False, CAPABILITIES[0]
    )
    assert torch.equal(ops.spline_apply(values, coefficients, schedule), best)
    with pytest.raises(RuntimeError, match="capability must be one of this machine's, got mmx"):
        torch.ops.coded_torch.spline_apply_with(values, coefficients, schedule, False, "mmx")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_column_depends_on_nothing_but_itself(dtype):
    """Whichever tile, tail, or streaming store it falls on: the same bits."""
    coefficients, schedule, _ = make_plan(5, dtype)
    values = torch.randn(5, 1, 400_000).to(dtype)  # enough for results to bypass the cache
    whole = ops.spline_apply(values, coefficients, schedule)
    for begin, end in ((0, 1), (63, 64), (1, 130), (399_900, 400_000)):
        part = ops.spline_apply(values[..., begin:end], coefficients, schedule)
        assert torch.equal(part, whole[..., begin:end])


def make_indices(rows, out_rows, groups, generator):
    """Rows of a batch in any order, some missing, one twice; results likewise, but none twice."""
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
    out = result.new_zeros(num_rows + 1, result.shape[2])  # the last row takes what is dropped
    out[torch.where(scatter < 0, num_rows, scatter)] = result
    return out[:-1]


@pytest.mark.parametrize("transpose", [False, True])
def test_without_num_rows_every_entry_names_a_row(transpose):
    coefficients, schedule, _ = make_plan(9)
    out_rows = 9 if transpose else 12
    values = torch.randn(21 - out_rows, 2, 3, dtype=torch.float64, requires_grad=True)
    scatter = torch.randperm(2 * out_rows).view(out_rows, 2)

    def both(**rows):
        out = ops.spline_apply(
            values, coefficients, schedule, transpose=transpose, scatter=scatter, **rows
        )
        return out, *torch.autograd.grad(out.square().sum(), values)

    for got, want in zip(both(), both(num_rows=2 * out_rows), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plans", [1, 3])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_indexed_rows_are_read_and_written_where_they_lie(capability, plans, dtype, transpose):
    coefficients, schedule, _ = make_plan(9, dtype, plans=plans)
    rows, out_rows, groups = (12, 9, 3) if transpose else (9, 12, 3)
    generator = torch.Generator().manual_seed(0)
    gather, scatter, num_rows = make_indices(rows, out_rows, groups, generator)

    def apply(values, *indices):
        return torch.ops.coded_torch.spline_apply_with(
            values, coefficients, schedule, transpose, capability, *indices
        )

    for columns in (1, 70, 192):
        batch = torch.randn(2 * rows, columns + 3, generator=generator).to(dtype)
        batches = {
            "contiguous": batch[:, :columns].contiguous(),
            "padded rows": batch[:, :columns],
            "expanded": batch[:, :1].expand(-1, columns),
            "strided columns": batch.repeat_interleave(2, 1)[:, : 2 * columns : 2],
        }
        for name, values in batches.items():
            want = apply(gathered(values, gather))
            assert torch.equal(apply(values, gather), want), name
            got = apply(values, gather, scatter, num_rows)
            assert torch.equal(got, scattered(want, scatter, num_rows)), name
            got = apply(gathered(values, gather), None, scatter, num_rows)
            assert torch.equal(got, scattered(want, scatter, num_rows)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_indexed_rows_past_the_cache(dtype):
    coefficients, schedule, _ = make_plan(5, dtype)
    values = torch.randn(10, 100_032).to(dtype)
    gather, scatter = torch.randperm(10).view(5, 2), torch.randperm(24).view(12, 2)
    want = ops.spline_apply(values[gather], coefficients, schedule)
    got = ops.spline_apply(
        values, coefficients, schedule, gather=gather, scatter=scatter, num_rows=24
    )
    assert torch.equal(got[scatter], want)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 70, 192, 100_032])  # the last is written past the cache
def test_results_in_memory_that_is_there(columns, dtype, transpose):
    coefficients, schedule, _ = make_plan(9, dtype)
    rows, out_rows = (12, 9) if transpose else (9, 12)
    generator = torch.Generator().manual_seed(0)
    gather, scatter, num_rows = make_indices(rows, out_rows, 3, generator)
    batch = torch.randn(2 * rows, columns, generator=generator).to(dtype)
    groups = gathered(batch, gather)
    for values, indices in (
        (groups, {}),
        (batch, {"gather": gather}),
        (groups, {"scatter": scatter, "num_rows": num_rows}),
        (batch, {"gather": gather, "scatter": scatter, "num_rows": num_rows}),
    ):
        apply = functools.partial(
            ops.spline_apply, values, coefficients, schedule, transpose=transpose, **indices
        )
        want = apply()
        for name, memory, out in memory_for(want):
            version = out._version
            assert apply(out=out) is out
            assert torch.equal(out, want), (name, *indices)
            assert out._version > version  # or autograd would not notice
            out.fill_(7)
            assert (memory == 7).all(), (name, *indices)


def test_memory_that_does_not_fit():
    coefficients, schedule, _ = make_plan(9)
    values = torch.randn(9, 2, 12, dtype=torch.float64)
    space = torch.empty(24, 2, 12, dtype=torch.float64)
    shape = "out must have the shape of the result, the dtype and the device of the values, got "
    twice = "out must have contiguous columns and no element twice"
    whole = torch.randn(21, 2, 12, dtype=torch.float64)
    for given, out, message in (
        (values, space[:11], rf"{shape}Double \[11, 2, 12\]"),
        (values, space[:12].float(), f"{shape}Float"),
        (values, space[0], shape),
        (values, space[:1].expand(12, -1, -1), twice),
        (values, space[:, :1].expand(-1, 2, -1)[:12], twice),
        (values, torch.empty(12, 2, 24, dtype=torch.float64)[..., ::2], twice),
        (whole[:9], whole[8:20], "out must not lie among the values"),
        (whole[12:], whole[1:13], "out must not lie among the values"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.spline_apply(given, coefficients, schedule, out=out)
    got = ops.spline_apply(whole[:9], coefficients, schedule, out=whole[9:])  # side by side
    assert torch.equal(got, ops.spline_apply(whole[:9], coefficients, schedule))
    nothing = ops.spline_apply(values[..., :0], coefficients, schedule, out=space[:12, :, :0])
    assert nothing.shape == (12, 2, 0)


def test_memory_has_no_derivative():
    coefficients, schedule, _ = make_plan(5)
    values = torch.randn(5, 1, 2, dtype=torch.float64)
    out = torch.empty(12, 1, 2, dtype=torch.float64)

    def apply(v):
        return ops.spline_apply(v, coefficients, schedule, out=out)

    for call in (
        lambda: apply(values.clone().requires_grad_()),
        lambda: torch.func.jvp(apply, (values,), (values,)),
        lambda: torch.vmap(apply)(values[None]),
        lambda: torch.func.jacrev(apply)(values),
    ):
        with pytest.raises(RuntimeError, match="out must be None where a derivative or vmap is"):
            call()
    with torch.no_grad():
        apply(values.clone().requires_grad_())
    with torch.inference_mode():
        assert apply(values) is out


@pytest.mark.filterwarnings("ignore")  # of the compiler, about its own dependencies
def test_memory_that_is_there_compiles():
    coefficients, schedule, _ = make_plan(5)
    values = torch.randn(5, 1, 2, dtype=torch.float64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(v, out):
        ops.spline_apply(v, coefficients, schedule, out=out)
        return out + 1

    out = torch.empty(12, 1, 2, dtype=torch.float64)
    want = ops.spline_apply(values, coefficients, schedule)
    assert torch.equal(run(values, out), want + 1)
    assert torch.equal(out, want)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_results_ask_for_huge_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("the system does not grant huge pages on request")
    coefficients, schedule, _ = make_plan(5, torch.float32)
    values = torch.randn(5, 1, 2**21)
    out = ops.spline_apply(values, coefficients, schedule)  # [12, 1, 2 MB]
    huge, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(bound, 16) for bound in bounds.groups())
            inside = begin < out.data_ptr() + out.nbytes and out.data_ptr() < end
        elif inside and line.startswith("AnonHugePages:"):
            huge += int(line.split()[1]) << 10
    assert huge >= 0.9 * out.nbytes


def test_indices_of_nothing():
    coefficients, schedule, _ = make_plan(5)
    empty = torch.empty(5, 0, dtype=torch.int64)
    values = torch.randn(7, 3, dtype=torch.float64)
    got = ops.spline_apply(values, coefficients, schedule, gather=empty)
    assert got.shape == (12, 0, 3)
    got = ops.spline_apply(
        values, coefficients, schedule, gather=empty, scatter=empty.new_empty(12, 0), num_rows=4
    )
    assert torch.equal(got, torch.zeros(4, 3, dtype=torch.float64))
    got = ops.spline_apply(values[:0], coefficients, schedule, gather=torch.full((5, 2), -1))
    assert torch.equal(got, torch.zeros(12, 2, 3, dtype=torch.float64))


def test_no_column_costs_nothing_however_many_rows():
    coefficients, schedule, _ = make_plan(5)
    values, scatter = torch.ones(5, 2, 0, dtype=torch.float64), torch.arange(24).view(12, 2)
    got = ops.spline_apply(values, coefficients, schedule, scatter=scatter, num_rows=2**40)
    assert got.shape == (2**40, 0)
    with pytest.raises(RuntimeError, match=r"scatter must lie in -1\.\.22, got 23"):
        ops.spline_apply(values, coefficients, schedule, scatter=scatter, num_rows=23)


@pytest.mark.parametrize("transpose", [False, True])
def test_opcheck_and_gradients_of_indexed_rows(transpose):
    coefficients, schedule, _ = make_plan(5)
    rows, out_rows = (12, 5) if transpose else (5, 12)
    gather, scatter, num_rows = make_indices(rows, out_rows, 2, torch.Generator().manual_seed(1))
    operator = torch.ops.coded_torch.spline_apply.default
    flat = torch.randn(2 * rows, 3, dtype=torch.float64, requires_grad=True)
    grouped = torch.randn(rows, 2, 3, dtype=torch.float64, requires_grad=True)
    for values, indices in (
        (flat, {"gather": gather}),
        (grouped, {"scatter": scatter, "num_rows": num_rows}),
        (flat, {"gather": gather, "scatter": scatter, "num_rows": num_rows}),
    ):
        torch.library.opcheck(operator, (values, coefficients, schedule, transpose), indices)

        def apply(v, indices=indices):
            return ops.spline_apply(v, coefficients, schedule, transpose=transpose, **indices)

        assert gradcheck(apply, (values,))
        assert gradgradcheck(lambda v, apply=apply: apply(v).square(), (values,))
        batch = torch.stack([values, 2 * values, values.square()], 1).detach()
        got = torch.vmap(apply, 1, 1)(batch)
        for b in range(3):
            assert torch.equal(got[:, b], apply(batch[:, b]))


def test_vmap_over_plans_of_indexed_rows_says_no():
    coefficients, schedule, _ = make_plan(5)
    values, gather = torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, 2, dtype=torch.int64)
    run = torch.vmap(lambda c: ops.spline_apply(values, c, schedule, gather=gather), in_dims=0)
    with pytest.raises(NotImplementedError, match="vmap over plans or indices is not supported"):
        run(coefficients[None])


def test_a_plan_for_each_group():
    coefficients, schedule, matrices = make_plan(9, plans=4)
    values = torch.randn(9, 4, 7, dtype=torch.float64)
    got = ops.spline_apply(values, coefficients, schedule)
    torch.testing.assert_close(got, torch.einsum("goi,igm->ogm", matrices, values))


def test_states_that_do_not_fit_the_stack():
    coefficients, schedule, (matrix,) = make_plan(2000)
    values = torch.randn(2000, 1, 3, dtype=torch.float64)
    got = ops.spline_apply(values, coefficients, schedule)
    torch.testing.assert_close(got[:, 0], matrix @ values[:, 0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5, 17])
def test_opcheck_and_gradients(n, transpose):
    coefficients, schedule, (matrix,) = make_plan(n)
    rows = matrix.shape[0] if transpose else n
    values = torch.randn(rows, 2, 3, dtype=torch.float64, requires_grad=True)
    operator = torch.ops.coded_torch.spline_apply.default
    torch.library.opcheck(operator, (values, coefficients, schedule, transpose))

    def apply(v):
        return ops.spline_apply(v, coefficients, schedule, transpose=transpose)

    assert gradcheck(apply, (values,))
    assert gradgradcheck(lambda v: apply(v).square(), (values,))


def test_opcheck_of_the_kernel_chosen_by_hand():
    coefficients, schedule, _ = make_plan(5)
    values = torch.randn(5, 2, 3, dtype=torch.float64)
    got = torch.ops.coded_torch.spline_apply_with(values, coefficients, schedule, False, "baseline")
    torch.testing.assert_close(got, ops.spline_apply(values, coefficients, schedule))


@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (2, None, None), (None, 0, 0), (1, 0, 0), (3, 0, 0)]
)
@pytest.mark.parametrize("plans", [1, 2])
def test_vmap(in_dims, plans):
    size, n, groups, columns = 3, 6, 2, 4
    made = [make_plan(n, plans=plans, seed=s)[:2] for s in range(size)]
    coefficients, schedule = (torch.stack(t) for t in zip(*made, strict=True))
    if in_dims[1] is None:
        coefficients, schedule = coefficients[0], schedule[0]
    values = torch.randn(size, n, groups, columns, dtype=torch.float64)
    batched = values[0] if in_dims[0] is None else values.movedim(0, in_dims[0])
    got = torch.vmap(ops.spline_apply, in_dims=in_dims)(batched, coefficients, schedule)
    for b in range(size):
        v = values[0 if in_dims[0] is None else b]
        c, s = (coefficients, schedule) if in_dims[1] is None else (coefficients[b], schedule[b])
        assert torch.equal(got[b], ops.spline_apply(v, c, s))


def test_vmap_of_the_gradient():
    coefficients, schedule, (matrix,) = make_plan(6)
    values = torch.randn(6, 1, 1, dtype=torch.float64, requires_grad=True)
    out = ops.spline_apply(values, coefficients, schedule)
    unit = torch.eye(len(out), dtype=torch.float64)[:, :, None, None]
    (jacobian,) = torch.autograd.grad(out, values, unit, is_grads_batched=True)
    torch.testing.assert_close(jacobian[..., 0, 0], matrix)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # which torch itself uses here
@pytest.mark.parametrize("indexed", [False, True])
def test_derivatives_by_torch_func(indexed):
    coefficients, schedule, _ = make_plan(5)
    gather, scatter, num_rows = make_indices(5, 12, 2, torch.Generator().manual_seed(1))
    indices = {"gather": gather, "scatter": scatter, "num_rows": num_rows} if indexed else {}
    values = torch.randn(*((10, 2) if indexed else (5, 2, 2)), dtype=torch.float64)

    def apply(v):
        return ops.spline_apply(v, coefficients, schedule, **indices)

    def loss(v):
        return apply(v).sin().sum()

    jacobian = torch.autograd.functional.jacobian(apply, values)
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)
    close(torch.func.jacrev(apply)(values), jacobian)
    close(torch.func.jacfwd(apply)(values), jacobian)
    close(torch.func.grad(loss)(values), torch.autograd.functional.jacobian(loss, values))
    hessian = torch.autograd.functional.hessian(loss, values)
    close(torch.func.hessian(loss)(values), hessian)
    close(torch.func.jacrev(torch.func.grad(loss))(values), hessian)
    close(torch.func.jacrev(torch.func.jacfwd(loss))(values), hessian)
    each = torch.stack([values, 2 * values])
    close(torch.vmap(torch.func.grad(loss))(each)[1], torch.func.grad(loss)(each[1]))


@pytest.mark.filterwarnings("ignore")  # of the compiler, about its own dependencies
def test_forward_mode_compiles():
    coefficients, schedule, _ = make_plan(5)
    values = torch.randn(5, 1, 2, dtype=torch.float64)
    tangent_of = torch.func.jacfwd(lambda v: ops.spline_apply(v, coefficients, schedule))
    compiled = torch.compile(tangent_of, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values), tangent_of(values))


@pytest.mark.filterwarnings("ignore")  # of the compiler, about its own dependencies
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


def test_the_plan_has_no_gradient():
    coefficients, schedule, _ = make_plan(4)
    coefficients.requires_grad_()
    with pytest.raises(ValueError, match="coefficients must not require a gradient"):
        ops.spline_apply(torch.randn(4, 1, 1, dtype=torch.float64), coefficients, schedule)


def test_last_line_checks():
    coefficients, schedule, _ = make_plan(4)
    good = torch.randn(4, 2, 3, dtype=torch.float64)
    for values, c, s, message in (
        (
            good[0],
            coefficients,
            schedule,
            r"values must be \[rows, groups, columns\], got \[2, 3\]",
        ),
        (
            good.int(),
            coefficients,
            schedule,
            "values must be float64, float32, bfloat16 or float16",
        ),
        (good.float(), coefficients, schedule, "coefficients must be Float"),
        (good, coefficients, schedule.long(), "schedule must be int32"),
        (good, coefficients[:, :-1].contiguous(), schedule, "do not fit together"),
        (good[:3], coefficients, schedule, "do not fit together"),
        (good, coefficients.expand(3, -1), schedule.expand(3, -1), "must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.spline_apply(values, c, s)
    flat = torch.randn(6, 3, dtype=torch.float64)
    gather, scatter = torch.zeros(4, 2, dtype=torch.int64), torch.arange(24).view(12, 2)
    for values, indices, message in (
        (
            good,
            {"gather": gather},
            r"values must be \[rows, columns\] with gather, got \[4, 2, 3\]",
        ),
        (flat, {"gather": gather[0]}, r"gather must be int64 \[rows, groups\], got Long \[2\]"),
        (flat, {"gather": gather.int()}, "gather must be int64 .* got Int"),
        (flat, {"gather": gather[:3]}, r"gather \[3, 2\], coefficients .* do not fit together"),
        (flat, {"gather": gather + 6}, r"gather must lie in -1\.\.5, got 6"),
        (flat, {"gather": gather - 2}, r"gather must lie in -1\.\.5, got -2"),
        (good, {"scatter": scatter, "num_rows": -1}, "num_rows must be at least 0, and given"),
        (good, {"num_rows": 24}, "num_rows must be at least 0, and given with scatter only"),
        (
            good,
            {"scatter": scatter[:4], "num_rows": 24},
            r"scatter must be \[12, 2\], got \[4, 2\]",
        ),
        (good, {"scatter": scatter, "num_rows": 23}, r"scatter must lie in -1\.\.22, got 23"),
        (good, {"scatter": scatter // 2, "num_rows": 24}, "name no row twice, got 0 again"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.spline_apply(values, coefficients, schedule, **indices)


@pytest.mark.parametrize("transpose", [False, True])
def test_schedules_that_lead_out_of_bounds(transpose):
    coefficients, schedule, _ = make_plan(4, plans=2)
    values = torch.randn(12 if transpose else 4, 2, 3, dtype=torch.float64)
    for column in range(schedule.shape[1]):  # slots of 4 knots, 5, then the order of 12 points
        for entry in (-1, 13, 5_000_000):
            bad = schedule.clone()
            bad[1, column] = entry
            with pytest.raises(
                RuntimeError, match=r"schedule must hold slots .* got others in row"
            ):
                ops.spline_apply(values, coefficients, bad, transpose=transpose)
    falling = schedule.clone()
    falling[1, 1:4] = torch.tensor([12, 0, 12])
    with pytest.raises(RuntimeError, match=r"slots rising from 0 to 12 .* in row 1"):
        ops.spline_apply(values, coefficients, falling, transpose=transpose)


def test_the_planner_checks_shapes():
    with pytest.raises(ValueError, match="knots and penalties must be"):
        spline_plan(np.zeros(3), np.zeros(3), np.zeros(3))


def test_samples_cover_what_they_say():
    samples = {s.name: s.values for s in make_samples(4, torch.float32)}
    assert not samples["group major"].is_contiguous()
    assert samples["strided columns"].stride(2) == 2
    assert samples["expanded"].stride()[1:] == (0, 0)
    assert all(isinstance(s, Sample) for s in make_samples(2, torch.float16))
