"""The operators themselves: every layout, dtype, kernel and transformation."""

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from coded_torch._plan import spline_plan
from torch.autograd import gradcheck, gradgradcheck

from coded_torch import ops

from .splines import DTYPES, TOLERANCES, Sample, make_knots, make_points, make_samples

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


def test_the_planner_checks_shapes():
    with pytest.raises(ValueError, match="knots and penalties must be"):
        spline_plan(np.zeros(3), np.zeros(3), np.zeros(3))


def test_samples_cover_what_they_say():
    samples = {s.name: s.values for s in make_samples(4, torch.float32)}
    assert not samples["group major"].is_contiguous()
    assert samples["strided columns"].stride(2) == 2
    assert samples["expanded"].stride()[1:] == (0, 0)
    assert all(isinstance(s, Sample) for s in make_samples(2, torch.float16))
