"""What every LinearMap promises."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch._dynamo.testing

from coded_torch._torch import to_device
from coded_torch.input_space._ordering import Grouping
from coded_torch.linear import MatrixMap, SelectMap, SplineMap
from coded_torch.testing.codes import DTYPES, assert_is_product, normal

from .splines import SMOOTHINGS, make_knots
from .waits import sync_debug_mode


def spline_map(num_inputs, num_outputs):
    return SplineMap(
        np.linspace(-1, 1, num_inputs), np.linspace(-1.2, 1, num_outputs), smoothing=1e-3
    )


def matrix_map(num_inputs, num_outputs):
    return MatrixMap(np.random.default_rng(0).standard_normal((num_outputs, num_inputs)))


def select_map(num_inputs, num_outputs):
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(-1, num_inputs, (num_outputs,), generator=generator)
    used = torch.randperm(num_inputs, generator=generator)[: max(1, num_inputs - 1)]
    shape = int((source < 0).sum()), len(used)
    return SelectMap(num_inputs, source, used, torch.randn(shape, generator=generator))


@pytest.mark.parametrize("make", [spline_map, matrix_map, select_map])
class TestLinearMaps:
    @pytest.mark.parametrize(("num_inputs", "num_outputs"), [(1, 3), (5, 5), (7, 4), (40, 90)])
    def test_is_its_matrix(self, make, num_inputs, num_outputs):
        map = make(num_inputs, num_outputs)
        matrix = map.matrix()
        assert matrix.shape == (map.num_outputs, map.num_inputs) == (num_outputs, num_inputs)
        assert matrix.dtype == torch.float64
        values = torch.randn(num_inputs, 6, dtype=torch.float64)
        torch.testing.assert_close(map(values), matrix @ values)
        results = torch.randn(num_outputs, 6, dtype=torch.float64)
        torch.testing.assert_close(map.adjoint(results), matrix.T @ results)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes_and_layouts(self, make, dtype):
        map, values = make(7, 9), normal(4, 6, 7, dtype=dtype)
        for strided in (values.movedim(2, 0), values.expand(3, 4, 6, -1).movedim(3, 0)[:, 1, ::2]):
            assert_is_product(map(strided), map.matrix(), strided)
        with pytest.raises(ValueError, match="must have size 7 along dim 1, got shape"):
            map(values, 1)

    def test_second_derivatives(self, make):
        map, values = make(5, 7), normal(5, 2).requires_grad_()
        assert torch.autograd.gradcheck(map, (values,))
        assert torch.autograd.gradgradcheck(map, (values,))

    @pytest.mark.filterwarnings("ignore:`torch.jit")  # which torch itself uses here
    def test_forward_mode(self, make):
        map = make(5, 7)
        values, tangent = torch.randn(2, 5, 3, dtype=torch.float64)
        got = torch.func.jvp(map, (values,), (tangent,))
        torch.testing.assert_close(got, (map(values), map(tangent)))

    def test_made_in_inference_mode_it_still_trains(self, make):
        with torch.inference_mode():
            map = make(5, 7)
            map(torch.randn(5, 3))
        values = torch.randn(5, 3, requires_grad=True)
        map(values).sum().backward()  # sends a gradient whose strides are all 0
        want = map.matrix(torch.float32).sum(0)[:, None].expand(5, 3)
        torch.testing.assert_close(values.grad, want)

    def test_vmap_copies_and_autocast_change_nothing(self, make):
        map = make(4, 6)
        values = torch.randn(3, 4, 5)
        want = map(values, 1)
        torch.testing.assert_close(torch.vmap(map)(values), want)
        for other in (pickle.loads(pickle.dumps(map)), copy.deepcopy(map)):
            assert torch.equal(other(values, 1), want)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(map(values, 1), want)
        assert "4 -> 6" in repr(map)

    def test_results_do_not_depend_on_the_number_of_threads(self, make):
        map, values = make(20, 100), torch.randn(20, 50_001)
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(map(values))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            if make is select_map:  # the matrix product of combinations is blocked otherwise
                torch.testing.assert_close(other, results[0])
            else:
                assert torch.equal(other, results[0])

    @pytest.mark.parametrize("shape", [(), (3, 100), (0,)])
    def test_groups_of_a_batch(self, make, shape):
        """Nine rows in any order make three groups of four, the last filled up."""
        to, back = make(4, 6), make(6, 4)
        grouping = Grouping(np.random.default_rng(0).permutation(9), 4)
        batch = torch.randn(9, *shape, dtype=torch.float64, requires_grad=True)
        coded = to.gathered(batch, grouping)
        assert torch.equal(coded, to(grouping.gather(batch)))
        answers, want = back.scattered(coded, grouping), grouping.scatter(back(coded))
        assert torch.equal(answers, want)
        weights = torch.randn(answers.shape, dtype=torch.float64)
        gradients = (
            torch.autograd.grad(out, batch, weights, retain_graph=True)[0]
            for out in (answers, want)
        )
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["chebyshev", "thinned"])
@pytest.mark.parametrize(("n", "tolerance"), [(128, 3e-5), (1024, 3e-5), (4096, 1e-4)])
def test_float32_is_enough_for_the_sweeps(n, tolerance, kind):
    """Against float64, which test_spline_map.py holds to exact arithmetic."""
    rng = np.random.default_rng(n)
    knots, points = make_knots(kind, n, rng), rng.uniform(-1, 1, n // 2)
    roundings = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    for smoothing in SMOOTHINGS:
        map = SplineMap(knots, points, smoothing=smoothing)
        for apply, rows in ((map, n), (map.adjoint, n // 2)):
            # Multiples of 1/8 that every dtype holds, so that only the map rounds.
            values = torch.from_numpy(rng.integers(-16, 17, (rows, 20)) / 8)
            want = apply(values)
            for dtype, rounding in roundings.items():
                error = (apply(values.to(dtype)).double() - want).abs()
                allowed = rounding * want.abs() + tolerance * want.abs().max()
                assert (error <= allowed).all(), (smoothing, dtype, apply, error.max())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_operands_travel_together(device):
    operands = (
        torch.randn(1, 7, dtype=torch.float64), torch.randn(3, 2).T, torch.zeros(0, 4),
        torch.arange(5, dtype=torch.int32), torch.arange(3), torch.tensor(2.0),
    )  # fmt: skip
    placed = to_device(operands, torch.device(device))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(placed, operands, strict=True))
    assert [t.dtype for t in placed] == [t.dtype for t in operands]
    if device == "cuda":  # in one copy
        assert len({t.untyped_storage().data_ptr() for t in placed}) == 1
        assert all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in placed if t.numel())


@pytest.mark.cuda
class TestOnCuda:
    @pytest.mark.filterwarnings("ignore:Synchronization debug mode")
    def test_a_new_map_waits_for_nothing(self):
        map, values = spline_map(20, 50), torch.randn(20, 100, device="cuda")
        want = spline_map(20, 50)(values.cpu())
        with sync_debug_mode("error"):
            got = map(values)
        torch.testing.assert_close(got.cpu(), want)

    def test_gradients_of_rows_that_repeat_are_the_same_bits(self):
        map, grouping = spline_map(100, 120), Grouping.arrival(1, 100)  # one row, 100 times
        nothing, zeros = torch.zeros(0, 0), torch.zeros(120, dtype=torch.int64)
        copies = SelectMap(1, zeros, torch.arange(0), nothing)
        upstream = torch.randn(120, 1, 256, device="cuda")

        def gradients():
            batch = torch.ones(1, 256, device="cuda", requires_grad=True)
            map.gathered(batch, grouping).backward(upstream)
            return torch.cat([batch.grad, copies.adjoint(upstream)[0]])

        want = gradients()
        assert want.abs().max() > 0
        for _ in range(5):
            assert torch.equal(gradients(), want)
