"""The CUDA kernels of splines over whole grids: as the host's compiler sees them, and as NVRTC."""

import ctypes
import itertools
import mmap
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
import torch

from coded_torch import ops
from coded_torch.codes.curves import chebyshev_first, chebyshev_second
from coded_torch.linear import SplineMap

from .grids import CSRC, KERNELS, SOURCES, build_host, build_ptx, compile_kernel, compile_ptx
from .splines import DTYPES, TOLERANCES
from .test_ops import gathered, make_indices, make_plan, scattered

MAX_BLOCKS = 2**31 - 1


def structure(name, path, **fields):
    """A C struct as ctypes takes it, read from its header."""
    numbers = {"int": ctypes.c_int, "int64_t": ctypes.c_int64}
    known = dict.fromkeys(
        ("const void*", "void*", "const int64_t*", "const int32_t*"), ctypes.c_void_p
    )
    text = (SOURCES / path).read_text()
    (body,) = re.findall(rf"^struct {name} {{$(.*?)^}};$", text, re.S | re.M)
    members = re.findall(r"^  (\w[\w ]*\*?) (\w+);", body, re.M)
    types = numbers | known | fields
    return type(name, (ctypes.Structure,), {"_fields_": [(n, types[kind]) for kind, n in members]})


RowIndex = structure("RowIndex", "ops/spline_args.h")
SplineArgs = structure("SplineArgs", "ops/spline_args.h", RowIndex=RowIndex)
Grid = structure("Grid", "ops/cuda/rows.h")
Launched = structure("Launched", CSRC / "spline_grid.cpp", Grid=Grid)
Device = structure("Device", "ops/cuda/grid.h")
SWEEP, WORKSPACE_SWEEP, NARROW, WIDE = range(4)  # enum Kind
# Half of a multiprocessor's shared memory, less what the driver keeps of it.
H100 = Device(multiprocessors=132, shared_bytes=233_472 // 2 - 1024, reserved_bytes=1024)


@pytest.fixture(scope="module")
def ptx():
    return compile_ptx()


def typed(loaded):
    assert loaded.coded_torch_sizeof_args() == ctypes.sizeof(SplineArgs)
    assert loaded.coded_torch_sizeof_launched() == ctypes.sizeof(Launched)
    loaded.coded_torch_run_grid.restype = Launched
    loaded.coded_torch_run_grid.argtypes = [
        ctypes.POINTER(SplineArgs), ctypes.c_int, ctypes.c_bool, Device, ctypes.c_char_p,
    ]  # fmt: skip
    loaded.coded_torch_plan_grid.restype = Launched
    loaded.coded_torch_plan_grid.argtypes = [
        ctypes.POINTER(SplineArgs), ctypes.c_int, ctypes.c_bool, Device,
    ]  # fmt: skip
    loaded.coded_torch_half_to_float.restype = ctypes.c_float
    loaded.coded_torch_half_to_float.argtypes = [ctypes.c_uint16]
    for name in ("coded_torch_float_to_half", "coded_torch_float_to_bfloat16"):
        getattr(loaded, name).restype = ctypes.c_uint16
        getattr(loaded, name).argtypes = [ctypes.c_float]
    return loaded


@pytest.fixture(scope="module")
def libraries(tmp_path_factory, request):
    """Both, which are compiled beside each other."""
    # Rows ahead of the last are never used.
    unused = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    folders, source = [tmp_path_factory.mktemp("grid") for _ in range(2)], "spline_grid.cpp"
    with ThreadPoolExecutor(1) as threads:
        host = threads.submit(build_host, folders[0], source, *unused)
        ptx = build_ptx(folders[1], source, request.getfixturevalue("ptx"))
        return {"host": typed(host.result()), "ptx": typed(ptx)}


@pytest.fixture
def host_library(libraries):
    return libraries["host"]


# A library that is given instead, which runs a thread of the host for each of CUDA's.
THREADS = os.environ.get("CODED_TORCH_GRID_THREADS")  # test_spline_threads.py


@pytest.fixture(params=["host", "ptx"] if THREADS is None else ["threads"])
def grid_library(request):
    if request.param == "threads":
        return typed(ctypes.CDLL(THREADS))
    return request.getfixturevalue("libraries")[request.param]


def run_grid(
    library, values, coefficients, schedule, transpose,
    device=H100, gather=None, scatter=None, num_rows=0,
):  # fmt: skip
    rows, groups = (values if gather is None else gather).shape[:2]
    out_rows, columns = schedule.shape[1] - 1 - rows, values.shape[-1]
    shape = (out_rows, groups, columns) if scatter is None else (num_rows, columns)
    # Rows that nothing is scattered to are zeroed before.
    out = torch.full(shape, torch.nan if scatter is None else 0, dtype=values.dtype)
    many = len(coefficients) > 1

    def group_stride(tensor):
        return tensor.stride(1) if tensor.dim() == 3 else 0

    def row_index(index, tensor):
        return RowIndex(None if index is None else index.data_ptr(), groups, len(tensor))

    num_knots, num_points = (out_rows, rows) if transpose else (rows, out_rows)
    sweeps = 12 * num_knots + 4 * num_points
    has_matrix = coefficients.shape[1] > sweeps and not many
    arguments = {
        "in": values.data_ptr(),
        "in_row_stride": values.stride(0),
        "in_group_stride": group_stride(values),
        "gather": row_index(gather, values),
        "out": out.data_ptr(),
        "out_row_stride": out.stride(0),
        "out_group_stride": group_stride(out),
        "scatter": row_index(scatter, out),
        "coefficients": coefficients.data_ptr(),
        "coefficients_stride": coefficients.stride(0) if many else 0,
        "matrix": coefficients[:, sweeps:].data_ptr() if has_matrix else None,
        "schedule": schedule.data_ptr(),
        "schedule_stride": schedule.stride(0) if many else 0,
        "num_knots": num_knots,
        "num_points": num_points,
        "num_groups": groups,
        "num_columns": columns,
    }
    assert list(arguments) == [name for name, _ in SplineArgs._fields_]
    args = SplineArgs(**arguments)
    failure = ctypes.create_string_buffer(80)
    grid = library.coded_torch_run_grid(
        ctypes.byref(args), DTYPES.index(values.dtype), transpose, device, failure
    )
    if failure.value:
        raise RuntimeError(failure.value.decode())
    return out, grid


def with_matrices(coefficients, schedule):
    """The coefficients without and with the dense matrix: swept, and multiplied by it."""
    return coefficients, ops.with_matrix(coefficients, schedule)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# One column; a pack; one more; one more than a block and than a tile of narrow packs.
@pytest.mark.parametrize(
    ("n", "columns"),
    [*itertools.product([1, 2, 3, 4, 5, 9, 17, 128], [1, 8, 9, 129]), (2, 1032), (17, 1032)],
)
def test_the_kernel_body_over_a_whole_grid(grid_library, n, dtype, transpose, columns):
    coefficients, schedule, (planned,) = make_plan(n, dtype)
    matrix = planned.T if transpose else planned
    values = torch.randn(3, matrix.shape[1], columns, dtype=torch.float64).to(dtype)
    values = values.transpose(0, 1)  # group major
    want = torch.einsum("oi,igm->ogm", matrix, values.double())
    largest = torch.einsum("oi,igm->ogm", matrix.abs(), values.double().abs()).max()
    for some in with_matrices(coefficients, schedule):
        got, _ = run_grid(grid_library, values, some, schedule, transpose)
        assert (got.double() - want).abs().max() <= TOLERANCES[dtype] * largest


def plan_of(num_knots, num_points, dtype):
    """(coefficients with the matrix, schedule, matrix) of Chebyshev points."""
    spline = SplineMap(chebyshev_first(num_knots), chebyshev_second(num_points), smoothing=1e-6)
    (coefficients, schedule), matrix = (
        spline._operands(torch.empty(0, dtype=dtype)),
        spline.matrix(),
    )
    return ops.with_matrix(coefficients, schedule), schedule, matrix


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Several warps; several chunks of the matrix's rows; one warp's worth after a full chunk.
@pytest.mark.parametrize(("num_knots", "num_points"), [(20, 100), (40, 130), (17, 272)])
def test_a_dense_result_depends_on_nothing_but_its_column(
    grid_library, num_knots, num_points, dtype, transpose
):
    coefficients, schedule, matrix = plan_of(num_knots, num_points, dtype)
    matrix = matrix.T if transpose else matrix
    values = torch.randn(matrix.shape[1], 1, 260, dtype=torch.float64).to(dtype)
    little = Device(multiprocessors=1, shared_bytes=44_000)  # blocks have several tiles
    seen = {}
    for device in (H100, little):
        got, launched = run_grid(grid_library, values, coefficients, schedule, transpose, device)
        seen[launched.kind] = got
        assert launched.grid.shared_bytes <= device.shared_bytes
    assert set(seen) == ({NARROW} if dtype == torch.float64 else {NARROW, WIDE})
    odd, _ = run_grid(grid_library, values[..., 1:4], coefficients, schedule, transpose)
    assert torch.equal(odd, got[..., 1:4])
    assert all(torch.equal(one, got) for one in seen.values())
    want = torch.einsum("oi,igm->ogm", matrix, values.double())
    tolerance = TOLERANCES[dtype] * (matrix.abs() @ values[:, 0].double().abs()).max()
    assert (got.double() - want).abs().max() <= tolerance


@pytest.mark.parametrize("transpose", [False, True])
def test_a_row_that_is_only_selected_keeps_its_bits(grid_library, transpose):
    knots = np.linspace(-1, 1, 17)
    spline = SplineMap(knots, knots[::-1].copy())  # interpolates, in reverse
    coefficients, schedule = spline._operands(torch.empty(0))
    coefficients = ops.with_matrix(coefficients, schedule)
    values = torch.randn(17, 1, 9)
    got, launched = run_grid(grid_library, values, coefficients, schedule, transpose)
    assert launched.kind == NARROW
    assert torch.equal(got, values.flip(0))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 9, 136])
def test_indexed_rows_on_a_grid(grid_library, dtype, transpose, columns):
    coefficients, schedule, _ = make_plan(9, dtype)
    rows, out_rows = (12, 9) if transpose else (9, 12)
    gather, scatter, num_rows = make_indices(rows, out_rows, 3, torch.Generator().manual_seed(0))
    values = torch.randn(2 * rows, columns).to(dtype)
    for some in with_matrices(coefficients, schedule):
        gather[1, 1] = 2 * rows  # out of bounds counts as missing
        got, _ = run_grid(
            grid_library, values, some, schedule, transpose,
            gather=gather, scatter=scatter, num_rows=num_rows,
        )  # fmt: skip
        gather[1, 1] = -1
        want = run_grid(grid_library, gathered(values, gather), some, schedule, transpose)[0]
        assert torch.equal(got, scattered(want, scatter, num_rows))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_workspace_does_not_grow_with_the_batch(grid_library, dtype, transpose):
    coefficients, schedule, _ = make_plan(9, dtype, plans=2)
    device = Device(multiprocessors=1, shared_bytes=0)
    values = torch.randn(12 if transpose else 9, 2, 1537).to(dtype)
    got, launched = run_grid(grid_library, values, coefficients, schedule, transpose, device)
    grid = launched.grid
    assert launched.kind == WORKSPACE_SWEEP
    want, _ = run_grid(grid_library, values, coefficients, schedule, transpose)
    assert torch.equal(got, want)
    assert values[0].numel() > 3 * grid.blocks * grid.threads  # each thread has several
    thrice = values.repeat(1, 1, 3)
    larger = run_grid(grid_library, thrice, coefficients, schedule, transpose, device)[1]
    assert larger.grid.workspace_bytes == grid.workspace_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="reserves memory that it does not use")
def test_indices_beyond_2_to_the_31(grid_library):
    """Rows 2^31 elements apart, in address space of which only a few pages exist."""
    coefficients, schedule, (matrix,) = make_plan(5, torch.bfloat16)
    stride, columns = 2**31, 9
    no_reserve = 0x4000  # MAP_NORESERVE, which mmap names from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    space = mmap.mmap(-1, 2 * 5 * stride, flags=flags)
    flat = torch.frombuffer(space, dtype=torch.bfloat16)
    values = flat.as_strided((5, 1, columns), (stride, columns, 1))
    values.copy_(torch.randn(5, 1, columns))
    want = torch.einsum("oi,igm->ogm", matrix, values.double())
    tolerance = TOLERANCES[torch.bfloat16] * want.abs().max()
    on_cpu = ops.spline_apply(values, coefficients, schedule)
    on_grid, _ = run_grid(grid_library, values, coefficients, schedule, transpose=False)
    assert (on_cpu.double() - want).abs().max() <= tolerance
    assert (on_grid.double() - want).abs().max() <= tolerance


@pytest.mark.parametrize("acc_bytes", [4, 8])
@pytest.mark.parametrize("num_columns", [8, 9000, 2**31, 2**37])
@pytest.mark.parametrize("num_knots", [1, 2, 3, 80, 1000, 100_000])
def test_launch_configurations_of_sweeps(host_library, acc_bytes, num_columns, num_knots):
    args = SplineArgs(num_knots=num_knots, num_groups=1, num_columns=num_columns)
    dtype = 0 if acc_bytes == 8 else 1
    launched = host_library.coded_torch_plan_grid(ctypes.byref(args), dtype, False, H100)
    grid = launched.grid
    per_thread = max(num_knots - 2, 0) * 2 * acc_bytes
    threads = grid.blocks * grid.threads
    assert grid.threads in (32, 64, 128)
    assert 1 <= grid.blocks <= MAX_BLOCKS
    # Few columns are divided over as many multiprocessors as there are warps of them.
    assert grid.blocks >= min(132, num_columns // 32)
    if launched.kind == SWEEP:
        assert threads - grid.threads < num_columns <= threads
        assert grid.shared_bytes == per_thread * grid.threads
        assert per_thread * 128 <= H100.shared_bytes
        assert grid.workspace_bytes == 0
    else:
        assert per_thread * 128 > H100.shared_bytes
        assert threads <= max(4 * 132 * 128, num_columns + 127)
        assert grid.workspace_bytes == per_thread * threads
        assert grid.shared_bytes == 0


@pytest.mark.parametrize("shared_bytes", [32 * 1024 - 1024, H100.shared_bytes])  # of a T4, an H100
@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("num_columns", [8, 120, 150_528, 2**37])
@pytest.mark.parametrize(
    ("num_knots", "num_points"), [(1, 1), (20, 100), (128, 160), (300, 20), (2000, 20), (20, 5000)]
)
def test_launch_configurations_of_products(
    host_library, shared_bytes, is_double, num_columns, num_knots, num_points
):
    device = Device(multiprocessors=132, shared_bytes=shared_bytes)
    args = SplineArgs(
        matrix=1, num_knots=num_knots, num_points=num_points, num_groups=1,
        num_columns=num_columns, in_row_stride=num_columns, out_row_stride=num_columns,
    )  # fmt: skip
    dtype = 0 if is_double else 1
    launched = host_library.coded_torch_plan_grid(ctypes.byref(args), dtype, False, device)
    grid, kind = launched.grid, launched.kind
    fits = num_knots * (144 if is_double else 80) <= shared_bytes
    assert (kind in (NARROW, WIDE)) == fits
    if fits:
        assert grid.threads in range(32, 257, 32)
        assert 0 < grid.shared_bytes <= shared_bytes
        assert 1 <= grid.blocks <= max(16 * 132, num_points)
        wide = not is_double and num_columns > 120
        assert kind == (WIDE if wide else NARROW)
        # Every row of the matrix is in a block, and all blocks have work.
        rows_a_block = grid.threads // 32 * 16
        chunks = -(-num_points // rows_a_block)
        assert grid.blocks % chunks == 0
        assert grid.blocks // chunks <= -(-num_columns // (128 if wide else 32))


class Card(NamedTuple):
    """What CUDA says of a device, or of a slice of one (MIG)."""

    multiprocessors: int
    shared_bytes: int  # of a multiprocessor
    reserved_bytes: int  # of these, for each block
    threads: int  # of a multiprocessor at most
    blocks: int

    def resident(self, grid):
        """Return how many blocks run at once, of kernels that have 128 registers a thread."""
        each = max(grid.shared_bytes + self.reserved_bytes, 1)
        threads = min(self.threads, 65_536 // 128)
        fit = min(threads // grid.threads, self.shared_bytes // each, self.blocks)
        return self.multiprocessors * fit


CARDS = {
    "sm_75": Card(40, 65_536, 0, 1024, 16),  # T4
    "sm_80": Card(108, 167_936, 1024, 2048, 32),  # A100
    "sm_80 1g": Card(14, 167_936, 1024, 2048, 32),
    "sm_80 3g": Card(42, 167_936, 1024, 2048, 32),
    "sm_86": Card(84, 102_400, 1024, 1536, 16),  # A40
    "sm_90": Card(132, 233_472, 1024, 2048, 32),  # H100
    "sm_90 1g": Card(16, 233_472, 1024, 2048, 32),
    "sm_90 4g": Card(64, 233_472, 1024, 2048, 32),
    "sm_100": Card(148, 233_472, 1024, 2048, 32),  # B200
    "sm_120": Card(188, 102_400, 1024, 1536, 24),  # RTX PRO 6000
    "sm_120 1g": Card(46, 102_400, 1024, 1536, 24),
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", range(4))
def test_launch_configurations_of_cards(host_library, card, transpose, dtype):
    """None is refused, all rows and columns have a thread, and workspaces are bounded."""
    shared_bytes = card.shared_bytes // 2 - card.reserved_bytes  # as launch.cpp has it
    device = Device(
        multiprocessors=card.multiprocessors,
        shared_bytes=shared_bytes,
        reserved_bytes=card.reserved_bytes,
    )
    kinds = set()
    sizes = [1, 2, 20, 24, 100, 190, 3000]
    for knots, points, columns, groups, matrix in itertools.product(
        sizes, sizes, [1, 31, 1000, 150_528, 2**33], [1, 3], [None, 16]
    ):
        args = SplineArgs(
            matrix=matrix, num_knots=knots, num_points=points, num_groups=groups,
            num_columns=columns, in_row_stride=columns, in_group_stride=columns,
            out_row_stride=columns, out_group_stride=columns,
        )  # fmt: skip
        launched = host_library.coded_torch_plan_grid(ctypes.byref(args), dtype, transpose, device)
        grid, kind = launched.grid, launched.kind
        kinds.add(kind)
        case = knots, points, columns, groups, matrix, kind
        assert grid.threads in range(32, (128 if kind in (SWEEP, WORKSPACE_SWEEP) else 256) + 1, 32)
        assert 0 <= grid.shared_bytes <= shared_bytes, case
        assert 1 <= grid.blocks <= MAX_BLOCKS or columns == 2**33, case  # launch.cpp refuses those
        if kind == SWEEP:
            assert grid.blocks * grid.threads >= columns * groups, case
        elif kind == WORKSPACE_SWEEP:
            assert grid.blocks <= card.resident(grid), case
            assert grid.workspace_bytes >= grid.blocks * grid.threads * (knots - 2) * 8, case
            assert grid.workspace_bytes <= card.multiprocessors * 512 * knots * 16, case
        else:
            assert grid.blocks <= max(card.resident(grid), grid.chunks), case
            rows_out = knots if transpose else points
            assert grid.chunks * grid.threads // 32 * 16 >= rows_out, case
            assert grid.tiles * 32 >= grid.packs, case
    assert kinds >= {SWEEP, WORKSPACE_SWEEP, NARROW}


def test_half_precision_conversions(host_library):
    """All of float16, and every float32 that lies at or beside a rounding boundary."""
    halves = np.arange(2**16, dtype=np.uint16)
    floats = halves.view(np.float16).astype(np.float32)
    got = np.array([host_library.coded_torch_half_to_float(int(h)) for h in halves], np.float32)
    np.testing.assert_array_equal(got, floats)
    finite = np.sort(floats[np.isfinite(floats)])
    middle = (finite[1:] + finite[:-1]) / 2
    edges = np.concatenate(
        [finite, middle, np.nextafter(middle, np.float32(np.inf)),
         np.nextafter(middle, np.float32(-np.inf)),
         np.float32([65519.9, 65520, 65521, 1e30, np.inf, -np.inf, np.nan, 1e-40, -0.0])]
    )[::3]  # fmt: skip
    for value in edges:
        half = np.uint16(host_library.coded_torch_float_to_half(float(value)))
        brain = np.int16(np.uint16(host_library.coded_torch_float_to_bfloat16(float(value))))
        single = torch.tensor(value)
        if np.isnan(value):
            assert np.isnan(half.view(np.float16))
            assert torch.tensor(brain).view(torch.bfloat16).isnan()
        else:
            assert half == single.half().view(torch.int16).numpy().view(np.uint16), value
            assert brain == single.bfloat16().view(torch.int16).item(), value


def test_a_barrier_that_is_removed_is_found(tmp_path):
    (product,) = (n for n in KERNELS if torch.ops.coded_torch._kernel_name(n) == "product_float32")
    ptx = compile_kernel(product, "compute_90").decode().rstrip("\0")
    without, count = re.subn(r"bar\.sync\s+0;", "", ptx)
    assert count == 1
    library = typed(build_ptx(tmp_path, "spline_grid.cpp", without))
    coefficients, schedule, _ = make_plan(9, torch.float32)
    coefficients = ops.with_matrix(coefficients, schedule)
    with pytest.raises(RuntimeError, match="a word of shared memory with no barrier between"):
        run_grid(library, torch.randn(9, 1, 9), coefficients, schedule, transpose=False)


def accesses_of(body):
    """By kind and memory, the sizes in bytes of a kernel's accesses."""
    found = {}
    pattern = r"\b(ld|st)\.(?!param)(\w+)((?:\.(?:cs|nc))?)(?:\.v(\d))?\.\w(\d+)"
    for kind, space, use, count, bits in re.findall(pattern, body):
        found.setdefault(f"{kind}.{space}{use}", set()).add(int(count or 1) * int(bits) // 8)
    return found


def test_kernels_move_16_bytes_at_once(ptx):
    entries = re.findall(r"\.entry (\w+)\(.*?\)[^{]*^{$(.*?)^}$", ptx, re.S | re.M)
    assert len(entries) == len(KERNELS)
    for name, body in entries:
        accesses = accesses_of(body)
        if "sweep" in name:
            assert accesses["ld.global.nc"] == {4, 16}  # the schedule, and coefficients
            # None is generic: the compiler knows where the states are.
            assert {kind.split(".")[1] for kind in accesses} <= {"global", "shared"}
        elif "wide" in name:
            bytes_of_pack = 16 if "float32" in name else 8
            assert 16 in accesses["ld.shared"]
            assert accesses["st.global.cs"] == {bytes_of_pack}
            assert "st.global" not in accesses
            assert max(accesses["ld.global"]) == bytes_of_pack
