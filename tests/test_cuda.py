"""The CUDA operator of splines: compiled everywhere, and run on a GPU."""

import itertools

import numpy as np
import pytest
import torch

from coded_torch import _extension, linear, ops
from coded_torch.codes.curves import chebyshev_first, chebyshev_second
from coded_torch.input_space._ordering import Grouping
from coded_torch.linear import SplineMap

from .grids import compile_kernels, facts
from .splines import DTYPES, TOLERANCES
from .test_ops import make_indices, make_plan
from .waits import Launches, host_waits

# Hopper; Turing, Ampere, Blackwell in servers and desktops, which take a minute.
ARCHITECTURES = [
    "sm_90",
    *(pytest.param(f"sm_{n}", marks=pytest.mark.slow) for n in (75, 80, 100, 120)),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_and_keep_to_their_registers(architecture):
    """By the NVRTC that pip installs, without nvcc, a card, a driver or a header of CUDA's."""
    for number, code in enumerate(compile_kernels(architecture)):
        ((name, (registers, local_bytes)),) = facts(code).items()
        assert name == torch.ops.coded_torch._kernel_name(number)
        assert registers <= 128, name  # 512 threads to a multiprocessor
        # Some numbers of wide products: 8 bytes for Hopper by NVRTC 12.6 to 13.0, up to 32 for
        # Blackwell by 13.5.
        assert local_bytes <= (32 if "wide" in name else 0), name


def test_info_says_whether_kernels_compile(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_extension, "CUDA_FAILURES", [])
    assert _extension.build_info()["cuda kernels"] == "are compiled at their first use"
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    says = _extension.build_info()["cuda kernels"]
    assert says == (
        "torch's own operators (libnvrtc.so.99 was not found; torch's builds for CUDA bring it)"
    )
    _extension.CUDA_FAILURES.append("of a reason")
    assert _extension.build_info()["cuda kernels"] == "torch's own operators (of a reason)"


@pytest.mark.cuda
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "columns"),
    # The states of 128 knots fill a workspace already: wide batches of 2000 take only longer.
    [*itertools.product([1, 2, 17, 128], [1, 9, 1032]), (2000, 1), (2000, 9)],
)
def test_agrees_with_the_cpu(n, dtype, transpose, columns):
    coefficients, schedule, (matrix,) = make_plan(n, dtype)
    rows = matrix.shape[0] if transpose else n
    values = torch.randn(rows, 3, columns).to(dtype)
    want = ops.spline_apply(values, coefficients, schedule, transpose=transpose)
    got = ops.spline_apply(
        values.cuda(), coefficients.cuda(), schedule.cuda(), transpose=transpose
    ).cpu()
    tolerance = 2 * TOLERANCES[dtype] * want.double().abs().max()
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=float(tolerance))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Multiplied by a matrix, in two chunks of its rows, and swept.
@pytest.mark.parametrize(("num_knots", "num_points"), [(20, 100), (17, 272), (200, 250)])
def test_a_map_on_a_gpu(num_knots, num_points, dtype, deterministic):
    map = SplineMap(chebyshev_first(num_knots), chebyshev_second(num_points), smoothing=1e-6)
    for apply, rows in ((map, num_knots), (map.adjoint, num_points)):
        values = torch.randn(rows, 1032, dtype=torch.float64).to(dtype)
        got, want = apply(values.cuda()), apply(values).double()
        tolerance = 2 * TOLERANCES[dtype] * want.abs().max()
        torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=float(tolerance))
        if not _extension.CUDA_FAILURES:  # whatever is beside it; cuBLAS promises no such thing
            assert torch.equal(apply(values[:, 3:13].cuda()), got[:, 3:13])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_torch_multiplies_where_it_is_faster(dtype, monkeypatch):
    monkeypatch.setattr(linear, "_KNOTS", 129)
    map = SplineMap(chebyshev_first(130), chebyshev_second(200), smoothing=1e-6)
    grouping = Grouping(torch.arange(260).flip(0), 130)
    batch = torch.randn(260, 300, dtype=torch.float64).to(dtype)
    with Launches() as launches:
        groups = map.gathered(batch.cuda(), grouping)
        back = map.adjoint(groups)
    assert "spline_apply" not in launches.names
    monkeypatch.setattr(linear, "_KNOTS", 130)
    with Launches() as launches:
        map.gathered(batch.cuda(), grouping)
    assert "spline_apply" in launches.names
    want = map.gathered(batch, grouping)
    tolerance = 2 * TOLERANCES[dtype]
    for got, at in ((groups, want), (back, map.adjoint(want))):
        error = (got.cpu().double() - at.double()).abs().max()
        assert error <= tolerance * at.double().abs().max()


@pytest.mark.cuda
@pytest.mark.parametrize(("num_knots", "num_points"), [(20, 50), (150, 160)])
def test_a_compiled_map_multiplies_by_a_matrix_that_it_does_not_make(
    num_knots, num_points, monkeypatch
):
    monkeypatch.setattr(linear, "_KNOTS", 128)
    map = SplineMap(np.linspace(-1, 1, num_knots), np.linspace(-1, 1, num_points))
    graphs = []

    @torch.compile(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    def compiled(values):
        return map(values)

    values, other = torch.randn(2, num_knots, 40, device="cuda")
    for _ in range(2):  # the first call keeps the copies of the plan on the device
        torch.testing.assert_close(compiled(values), map(values))
    count = len(graphs)
    with host_waits() as waits:
        got = compiled(other)
    torch.testing.assert_close(got, map(other))
    assert (len(graphs), waits) == (count, {})
    called = [str(node.target) for node in graphs[-1].graph.nodes if node.op.startswith("call")]
    large = num_knots > 128
    assert ("coded_torch.spline_apply.default" in called) == (not large)
    assert any("matmul" in name for name in called) == large


@pytest.mark.cuda
def test_a_map_placed_by_a_derivative_outlives_it():
    map = SplineMap(np.linspace(-1, 1, 5), np.linspace(-1, 1, 7))
    values = torch.randn(5, 3, device="cuda")
    gradient = torch.func.grad(lambda v: map(v).sum())(values)
    ones = torch.ones(7, 3, device="cuda")
    torch.testing.assert_close(gradient, map.adjoint(ones))
    assert torch.equal(torch.vmap(map, 1, 1)(values), map(values))


@pytest.mark.cuda
@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_indexed_rows_agree_with_the_cpu(transpose, matrix):
    coefficients, schedule, _ = make_plan(9, torch.float32)
    coefficients = ops.with_matrix(coefficients, schedule) if matrix else coefficients
    rows, out_rows = (12, 9) if transpose else (9, 12)
    gather, scatter, num_rows = make_indices(rows, out_rows, 3, torch.Generator().manual_seed(0))
    values = torch.randn(2 * rows, 1000)
    operands = (values, coefficients, schedule, transpose, gather, scatter, num_rows)
    want = torch.ops.coded_torch.spline_apply(*operands)
    on_device = (t.cuda() if isinstance(t, torch.Tensor) else t for t in operands)
    got = torch.ops.coded_torch.spline_apply(*on_device)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-4)


@pytest.mark.cuda
def test_runs_on_the_current_stream_and_in_a_graph():
    map = SplineMap(np.linspace(-1, 1, 20), np.linspace(-1, 1, 50))
    values = torch.randn(20, 1000, device="cuda")
    want = map(values)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = map(values)
    values.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(got, 2 * want)


@pytest.mark.cuda
def test_a_graph_needs_a_call_before():
    map = SplineMap(np.linspace(-1, 1, 20), np.linspace(-1, 1, 50))
    values = torch.randn(20, 100, device="cuda")
    must = pytest.raises(RuntimeError, match=r"must have been applied to torch\.float32")
    with must, torch.cuda.graph(torch.cuda.CUDAGraph()):
        values.mul_(2)  # torch warns of an empty graph, before the stream is left
        map(values)
