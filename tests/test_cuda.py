"""The CUDA operator: compiled and linked everywhere, its body run on the host, and on a GPU."""

import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME, include_paths

from coded_torch import ops
from coded_torch.linear import SplineMap

from .ptx import translate
from .splines import DTYPES, TOLERANCES
from .test_ops import gathered, make_indices, make_plan, scattered
from .test_setup import load_setup

CSRC = Path(__file__).resolve().parents[1] / "csrc"
NVCC = shutil.which("nvcc") or (CUDA_HOME and str(Path(CUDA_HOME, "bin", "nvcc")))
MAX_BLOCKS = 2**31 - 1
GRID = Path(__file__).parent / "csrc" / "spline_grid.cpp"


def structure(name, path, **fields):
    """A C struct as ctypes takes it, read from its header."""
    numbers = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "States": ctypes.c_int}
    known = dict.fromkeys(
        ("const void*", "void*", "const int64_t*", "const int32_t*"), ctypes.c_void_p
    )
    (body,) = re.findall(rf"^struct {name} {{$(.*?)^}};$", (CSRC / path).read_text(), re.S | re.M)
    members = re.findall(r"^  (\w[\w ]*\*?) (\w+);", body, re.M)
    types = numbers | known | fields
    return type(name, (ctypes.Structure,), {"_fields_": [(n, types[kind]) for kind, n in members]})


RowIndex = structure("RowIndex", "ops/spline_args.h")
SplineArgs = structure("SplineArgs", "ops/spline_args.h", RowIndex=RowIndex)
SplineGrid = structure("SplineGrid", "ops/cuda/spline_block.h")
Device = structure("Device", "ops/cuda/spline_block.h")
REGISTERS, SHARED, WORKSPACE = range(3)  # enum States
# Half of a multiprocessor's shared memory, less what the runtime keeps of it.
H100 = Device(index=0, multiprocessors=132, shared_bytes=233_472 // 2 - 1024)


def run_nvcc(*options, source="spline.cu"):
    """What nvcc says; the test is skipped where there is none."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    includes = (f"-isystem={path}" for path in include_paths())
    path = str(CSRC / "ops" / "cuda" / source)
    command = [NVCC, *load_setup().NVCC, *options, *includes, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr


def linked_without_spills(library, source="spline.cu"):
    """Make a library; what nvcc says, and how many kernels it holds, none of which spills."""
    generations = (f"-gencode=arch=compute_{g},code=sm_{g}" for g in (75, 80, 90))
    log = run_nvcc(
        *generations, "-Xptxas=-v", "-Xcompiler=-fPIC", "--shared",
        "-o", str(library), source=source,
    )  # fmt: skip
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log
    )
    assert set(spills) == {("0", "0", "0")}
    return log, len(spills)


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """What nvcc makes of the kernels."""
    path = tmp_path_factory.mktemp("ptx") / "spline.ptx"
    run_nvcc("-gencode=arch=compute_90,code=compute_90", "-ptx", "-o", str(path))
    return path.read_text()


def build_grid(folder, sources, *flags):
    library = folder / "grid.so"
    flags = [*flags, *os.environ.get("CODED_TORCH_GRID_FLAGS", "").split()]  # .ci/sanitizers
    command = ["c++", *flags, "-fPIC", "-shared", *map(str, sources), "-o", str(library)]
    subprocess.run(command, check=True, timeout=300)
    loaded = ctypes.CDLL(str(library))
    assert loaded.coded_torch_sizeof_args() == ctypes.sizeof(SplineArgs)
    assert loaded.coded_torch_sizeof_grid() == ctypes.sizeof(SplineGrid)
    loaded.coded_torch_run_grid.restype = SplineGrid
    loaded.coded_torch_run_grid.argtypes = [
        ctypes.POINTER(SplineArgs), ctypes.c_int, ctypes.c_bool, Device, ctypes.c_int64,
        ctypes.c_char_p,
    ]  # fmt: skip
    loaded.coded_torch_plan_grid.restype = SplineGrid
    loaded.coded_torch_plan_grid.argtypes = [
        ctypes.POINTER(SplineArgs), ctypes.c_int, ctypes.c_int64, Device,
    ]  # fmt: skip
    loaded.coded_torch_half_to_float.restype = ctypes.c_float
    loaded.coded_torch_half_to_float.argtypes = [ctypes.c_uint16]
    for name in ("coded_torch_float_to_half", "coded_torch_float_to_bfloat16"):
        getattr(loaded, name).restype = ctypes.c_uint16
        getattr(loaded, name).argtypes = [ctypes.c_float]
    return loaded


@pytest.fixture(scope="module")
def host_library(tmp_path_factory):
    """The kernel's body, compiled for the host."""
    warnings = ["-Wall", "-Wextra", "-Werror"]
    # Of rows ahead of the last, which are never used.
    warnings += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    return build_grid(tmp_path_factory.mktemp("grid"), [GRID], "-std=c++17", "-O2", *warnings)


@pytest.fixture(scope="module")
def ptx_library(tmp_path_factory, ptx):
    """The kernels that nvcc compiled, translated for the host: its code, its vector accesses."""
    folder = tmp_path_factory.mktemp("ptx-grid")
    translated = folder / "kernels.cpp"
    translated.write_text(translate(ptx))
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-DCODED_TORCH_PTX", f"-I{GRID.parent}"]
    return build_grid(folder, [GRID, translated], *flags)


@pytest.fixture(params=["host", "ptx"])
def grid_library(request):
    return request.getfixturevalue(f"{request.param}_library")


def run_grid(
    library, values, coefficients, schedule, transpose,
    device=H100, gather=None, scatter=None, num_rows=0,
):  # fmt: skip
    rows, groups = (values if gather is None else gather).shape[:2]
    out_rows, columns = schedule.shape[1] - 1 - rows, values.shape[-1]
    shape = (out_rows, groups, columns) if scatter is None else (num_rows, columns)
    out = torch.full(shape, torch.nan, dtype=values.dtype)
    many = len(coefficients) > 1

    def group_stride(tensor):
        return tensor.stride(1) if tensor.dim() == 3 else 0

    def row_index(index, tensor):
        return RowIndex(None if index is None else index.data_ptr(), groups, len(tensor))

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
        "schedule": schedule.data_ptr(),
        "schedule_stride": schedule.stride(0) if many else 0,
        "num_knots": out_rows if transpose else rows,
        "num_groups": groups,
        "num_columns": columns,
    }
    assert list(arguments) == [name for name, _ in SplineArgs._fields_]
    args = SplineArgs(**arguments)
    failure = ctypes.create_string_buffer(80)
    grid = library.coded_torch_run_grid(
        ctypes.byref(args), DTYPES.index(values.dtype), transpose, device,
        0 if scatter is None else scatter.numel(), failure,
    )  # fmt: skip
    assert failure.value == b""
    return out, grid


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 17, 128])
# One column; a wide pack; one more; one more than a block of narrow and of wide packs.
@pytest.mark.parametrize("columns", [1, 8, 9, 129, 1032])
def test_the_kernel_body_over_a_whole_grid(grid_library, n, dtype, transpose, columns):
    coefficients, schedule, (matrix,) = make_plan(n, dtype)
    matrix = matrix.T if transpose else matrix
    values = torch.randn(3, matrix.shape[1], columns, dtype=torch.float64).to(dtype)
    values = values.transpose(0, 1)  # group major
    got, _ = run_grid(grid_library, values, coefficients, schedule, transpose)
    want = torch.einsum("oi,igm->ogm", matrix, values.double())
    largest = torch.einsum("oi,igm->ogm", matrix.abs(), values.double().abs()).max()
    assert (got.double() - want).abs().max() <= TOLERANCES[dtype] * largest


@pytest.mark.parametrize("transpose", [False, True])
def test_a_plan_for_each_group_on_a_grid(grid_library, transpose):
    coefficients, schedule, matrices = make_plan(9, plans=4)
    values = torch.randn(12 if transpose else 9, 4, 7, dtype=torch.float64)
    got, _ = run_grid(grid_library, values, coefficients, schedule, transpose)
    equation = "gio,igm->ogm" if transpose else "goi,igm->ogm"
    torch.testing.assert_close(got, torch.einsum(equation, matrices, values))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 9, 136])
def test_indexed_rows_on_a_grid(grid_library, dtype, transpose, columns):
    coefficients, schedule, _ = make_plan(9, dtype)
    rows, out_rows = (12, 9) if transpose else (9, 12)
    gather, scatter, num_rows = make_indices(rows, out_rows, 3, torch.Generator().manual_seed(0))
    gather[1, 1] = 2 * rows  # out of bounds counts as missing
    values = torch.randn(2 * rows, columns).to(dtype)
    got, _ = run_grid(
        grid_library, values, coefficients, schedule, transpose,
        gather=gather, scatter=scatter, num_rows=num_rows,
    )  # fmt: skip
    gather[1, 1] = -1
    want = run_grid(grid_library, gathered(values, gather), coefficients, schedule, transpose)[0]
    assert torch.equal(got, scattered(want, scatter, num_rows))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shared", [0, 20_000, H100.shared_bytes])
def test_where_the_states_are_kept_changes_nothing(grid_library, shared, transpose):
    coefficients, schedule, _ = make_plan(17, torch.float32)
    values = torch.randn(12 if transpose else 17, 2, 260)
    device = Device(multiprocessors=1, shared_bytes=shared)
    got, grid = run_grid(grid_library, values, coefficients, schedule, transpose, device)
    assert grid.states == (SHARED if shared else WORKSPACE)
    assert grid.shared_bytes <= shared
    want, _ = run_grid(grid_library, values, coefficients, schedule, transpose)
    assert torch.equal(got, want)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1537, 16384])  # narrow and wide packs
def test_the_workspace_does_not_grow_with_the_batch(grid_library, dtype, columns, transpose):
    coefficients, schedule, _ = make_plan(9, dtype, plans=2)
    device = Device(multiprocessors=1, shared_bytes=0)
    values = torch.randn(12 if transpose else 9, 2, columns).to(dtype)
    got, grid = run_grid(grid_library, values, coefficients, schedule, transpose, device)
    want, _ = run_grid(grid_library, values, coefficients, schedule, transpose)
    assert torch.equal(got, want)
    assert grid.packs > 3 * grid.blocks * grid.threads  # each thread has several
    thrice = values.repeat(1, 1, 3)
    larger = run_grid(grid_library, thrice, coefficients, schedule, transpose, device)[1]
    assert larger.packs == 3 * grid.packs
    assert larger.workspace_bytes == grid.workspace_bytes


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


@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize("num_columns", [8, 2**31, 2**37])
@pytest.mark.parametrize("num_knots", [1, 2, 3, 80, 1000, 100_000])
def test_launch_configurations(host_library, width, num_columns, num_knots):
    args = SplineArgs(num_knots=num_knots, num_groups=1, num_columns=num_columns)
    grid = host_library.coded_torch_plan_grid(ctypes.byref(args), width, 4, H100)
    per_thread = max(num_knots - 2, 0) * 2 * width * 4
    threads = grid.blocks * grid.threads
    assert grid.packs == num_columns // width
    assert 32 <= grid.threads <= 128
    assert 1 <= grid.blocks <= MAX_BLOCKS
    if grid.states == SHARED:
        assert threads - grid.threads < grid.packs <= threads
        assert grid.shared_bytes == per_thread * grid.threads <= H100.shared_bytes
        assert grid.workspace_bytes == 0
    else:
        assert grid.states == WORKSPACE
        assert 32 * per_thread > H100.shared_bytes
        assert threads <= max(4 * 132 * 128, grid.packs + 127)
        assert grid.workspace_bytes == per_thread * threads
        assert grid.shared_bytes == 0


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


def test_wide_kernels_move_16_bytes_at_once(ptx):
    pattern = r"\.entry \w*spline_kernelI\w+Li(\d)E\w*StatesE(\d)E\w*\((.*?)\n}"
    kernels = re.findall(pattern, ptx, re.S)
    assert len(kernels) == 40
    for width, states, body in kernels:
        accesses = re.findall(r"\b(ld|st)\.(?!param)(\w+)((?:\.cs)?)(?:\.v(\d))?\.\w(\d+)", body)
        # None is generic: nvcc knows where the states are.
        spaces = {space for _, space, *_ in accesses}
        assert spaces == ({"global", "shared"} if int(states) == SHARED else {"global"})
        sizes = {"ld": set(), "st": set(), "st.cs": set()}
        for kind, _, last_use, count, bits in accesses:
            sizes[kind + last_use].add(int(count or 1) * int(bits))
        if width == "1":
            assert max(sizes["ld"] | sizes["st"]) == 64
            assert not sizes["st.cs"]
        else:  # coefficients are the same for all threads and loaded one by one
            assert 128 in sizes["ld"]
            assert sizes["st"] <= {128}
            assert sizes["st.cs"] == {128}


def test_compiles_links_and_does_not_spill(tmp_path):
    """Against the torch that is installed, CPU build or not: the stable ABI makes it possible."""
    library = tmp_path / "spline.so"
    log, count = linked_without_spills(library)
    assert str(CSRC).encode() not in library.read_bytes()  # no word of where it was built
    kernels = re.findall(r"Compiling entry function '\S*spline_kernel\S*' for '(sm_\d+)'", log)
    # Four dtypes, forward and transposed, states in shared memory and in a workspace, narrow and
    # wide, and wide with states in registers, on each architecture; two small others.
    assert {a: kernels.count(a) for a in kernels} == {"sm_75": 40, "sm_80": 40, "sm_90": 40}
    assert count == 3 * (40 + 2)
    registers = [int(r) for r in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == count
    assert max(registers) <= 128  # four blocks of 128 threads to a multiprocessor


@pytest.mark.cuda
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 17, 128, 2000])
@pytest.mark.parametrize("columns", [1, 9, 1032])
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


@pytest.mark.cuda
@pytest.mark.parametrize("transpose", [False, True])
def test_indexed_rows_agree_with_the_cpu(transpose):
    coefficients, schedule, _ = make_plan(9, torch.float32)
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
