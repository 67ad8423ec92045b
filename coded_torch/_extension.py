"""The only loader of compiled code, the trial of CUDA kernels, and torch's own operators instead.

A kernel is compiled for the GPU at its first use, by the NVRTC of torch. It has to show that it is
right there; then it is used. Until then, and where it is not, torch's own operators apply a spline:
as the dense matrix of its plan, or on the host if ``ops.with_matrix`` has appended none. Results
agree to rounding, but the bits of a column may depend on the number of columns, by which cuBLAS
chooses its kernels. ``CODED_TORCH_CUDA=0`` forbids the kernels.
"""

import contextlib
import ctypes
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = [
    "CUDA_FAILURES",
    "Look",
    "Samples",
    "build_info",
    "curve_plan",
    "lane",
    "short_path",
    "spline_plan",
]
__all__ += ["deal", "first_results", "split_rows", "with_copies"]

# Why CUDA tensors are computed by torch's own operators, if they are.
CUDA_FAILURES: list[str] = []
_MOST_SECONDS = 30.0  # for a kernel to compute the small problem of its trial
# Lines that differ after a boot, and with another driver.
_MACHINE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/driver/nvidia/version")
_PACKAGE = Path(__file__).resolve().parent
_REMEDY = "run `pip install .` in the source folder, and start Python in another folder"

try:
    from ._plan import (
        Look,
        Samples,
        curve_plan,
        deal,
        first_results,
        short_path,
        spline_plan,
        split_rows,
        with_copies,
    )
except ImportError as error:
    raise ImportError(f"coded_torch: the compiled planner is missing or old; {_REMEDY}") from error

#: What moves bytes between a pool and its processes; None where there are no such pools.
lane: Any = None
try:
    lane = import_module("coded_torch._lane")
except ImportError as error:
    if sys.platform == "linux":
        raise ImportError(f"coded_torch: the compiled lane is missing; {_REMEDY}") from error


def _allows_tf32() -> bool:  # the compiler cannot trace the setting
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# What torch.compiler.assume_constant_result does, without importing the compiler: that takes a
# second in every process. A test compares the two.
vars(_allows_tf32)["_dynamo_marked_constant"] = True


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply ``[..., n, k]`` by ``[..., k, m]`` without rounding their entries first.

    Autocast is off. If the process allows TF32, whose inputs keep 10 bits, float32 matrices are
    multiplied in float64; the setting itself is only read.
    """
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype == torch.float32 and _allows_tf32():
            return torch.matmul(a.double(), b.double()).float()
        return torch.matmul(a, b)


def spline_apply(
    values: Tensor, coefficients: Tensor, schedule: Tensor, transpose: bool, *where: Any
) -> Tensor:
    """Do as :func:`ops.spline_apply` by the matrix of the plan or, if it has none, on the host."""
    gather, scatter, num_rows = (*where, None, None, None)[:3]  # defaults may be left out
    rows = (values if gather is None else gather).shape[0]
    others = schedule.shape[-1] - 1 - rows
    num_knots, num_points = (others, rows) if transpose else (rows, others)
    of_sweeps = 12 * num_knots + 4 * num_points
    if coefficients.shape[1] == of_sweeps or len(coefficients) > 1:  # no matrix, or several plans
        if values.is_cuda and torch.cuda.is_current_stream_capturing():
            reason = "its plan has no matrix, so that torch's operators compute it on the host"
            remedy = "apply it with these sizes, dtype and direction before the capture"
            raise RuntimeError(f"spline_apply: a CUDA graph cannot hold it, as {reason}; {remedy}")
        inputs = values, coefficients, schedule, transpose, *where
        on_host = tree_map_only(Tensor, Tensor.cpu, inputs)
        result: Tensor = torch.ops.coded_torch.spline_apply(*on_host)
        return result.to(values.device)
    entries = coefficients[0, of_sweeps : of_sweeps + num_knots * num_points]
    matrix = entries.view(num_knots, num_points)
    dtype = values.dtype
    if gather is not None:  # an index out of bounds stands for a row of zeros
        if not len(values):
            values = values.new_zeros(1, values.shape[1])
        known = gather.clamp(0, len(values) - 1)
        values = values[known].masked_fill_((known != gather).unsqueeze(-1), 0)
    groups, columns = values.shape[1:]
    columns_in = values.to(coefficients.dtype).reshape(rows, groups * columns)
    out = exact_matmul(matrix if transpose else matrix.T, columns_in)
    out = out.view(others, groups, columns).to(dtype)
    if scatter is None:
        return out
    if num_rows is None:
        num_rows = scatter.numel()
    # An extra row takes the dropped rows: it has index num_rows, and index -1.
    result = out.new_zeros(num_rows + 1, columns)
    result[scatter.clamp(-1, num_rows)] = out
    return result[:-1]


try:
    (_LIBRARY,) = _PACKAGE.glob("_ops.*")
    torch.ops.load_library(_LIBRARY)
except (OSError, ValueError) as error:
    missing = "coded_torch: the compiled operators are missing or old"
    raise ImportError(f"{missing}; {_REMEDY}: {error}") from error
_KERNELS = torch.ops.coded_torch


def _nvrtc() -> int:
    """Return the address of NVRTC: of torch's own, which its driver knows, or of the system's."""
    name = f"libnvrtc.so.{(torch.version.cuda or '13').partition('.')[0]}"
    spec = find_spec("nvidia")
    folders = (spec and spec.submodule_search_locations) or ()
    wheels = [path for folder in folders for path in Path(folder).glob(f"*/lib/{name}")]
    brings_it = Path(torch.__file__).with_name("lib") / "libcaffe2_nvrtc.so"
    for path in (*wheels, brings_it, Path(name)):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(str(path))
            if path.is_absolute():  # CUDA 13.0's does not look for its other half beside itself
                for other in path.parent.glob("libnvrtc-builtins.so.*"):
                    ctypes.CDLL(str(other))
            return library._handle
    raise OSError(f"{name} was not found; torch's builds for CUDA bring it")


def _try_kernel(device: int, number: int) -> bool | None:
    """Return whether a kernel is right on a device, or None while another process tries it.

    The operator asks at the kernel's first use.
    """
    try:
        # A thread of its own has none of the caller's modes, transforms and streams.
        with ThreadPoolExecutor(1) as thread:
            error = thread.submit(_trial, device, number).result()
    except Exception as failure:  # whatever NVRTC, the driver or torch raise: the user is warned
        why = (str(failure) or repr(failure)).splitlines()[0]
        return _fall_back(f"{_KERNELS._kernel_name(number)} on cuda:{device}: {why}")
    return None if error is None else True


def _fall_back(why: str) -> bool:
    """Note why CUDA kernels are not used, warn of the first reason, and return False."""
    if why not in CUDA_FAILURES:
        CUDA_FAILURES.append(why)
    if CUDA_FAILURES[0] is why:  # of all threads, one finds itself there
        text = f"coded_torch: torch's operators compute instead of CUDA kernels, because {why}"
        try:
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        except RuntimeWarning:  # warnings are errors here, but the call has a result
            logging.getLogger("coded_torch").warning(text)
    return False


def _trial(device: int, number: int) -> float | None:
    """Compile and load a kernel, and compare it with torch's own operators.

    Return the largest error relative to the largest result, or None while another process tries
    the kernel. A mark is left where CUDA has failed for good, or where the kernel does not end.
    """
    machine = [path.read_text().splitlines()[0] for path in _MACHINE if path.exists()]
    versions = f"torch {torch.__version__}, coded_torch {version('coded_torch')}"
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        nvrtc = _nvrtc()
        try:
            if not _KERNELS._load_kernel(device, number, nvrtc, ", ".join([*machine, versions])):
                return None
            return _compare(device, number)
        finally:
            _wait(stream)
            _KERNELS._end_trial()


def _wait(stream: torch.cuda.Stream) -> None:
    """Wait for a stream, whatever `torch.cuda.set_sync_debug_mode` says of waiting."""
    done = stream.record_event()
    end = time.monotonic() + _MOST_SECONDS
    while not done.query():
        if time.monotonic() > end:
            raise RuntimeError(f"it did not end within {_MOST_SECONDS:.0f} s")
        time.sleep(1e-4)


def _compare(device: int, number: int) -> float:
    """Return the error of a kernel on a small problem; raise a RuntimeError if it is too large."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    dtype = dtypes[number // 2 % 4]
    transpose = number % 2 == 1
    n = 11
    N = 18
    groups = 3
    columns = 44
    t = np.linspace(0, 1, n) ** 1.5
    z = np.linspace(1.1, -0.1, N)
    exact, _, schedule = map(torch.from_numpy, curve_plan(t, z, 1e-5, None))
    unit = torch.eye(n, dtype=torch.float64).unsqueeze(1)
    matrix = _KERNELS.spline_apply(unit, exact, schedule, False)[:, 0].T.reshape(1, -1)
    plan = torch.cat([exact, matrix, matrix[:, : -n * N % 4]], 1)
    plan = plan.to(torch.promote_types(dtype, torch.float32))
    rows, others = (N, n) if transpose else (n, N)
    gather = torch.arange(rows * groups).view(rows, groups).flip(0)
    scatter = torch.arange(others * groups).view(others, groups) + 2
    values = torch.arange(rows * groups * columns, dtype=torch.float64).sin()
    values = values.view(-1, columns)
    # Rows that no index names hold NaN. Below 0 and beyond the end an index stands for no row.
    values = torch.cat([values, values[:4] * torch.nan]).to(dtype)
    gather[1, 1], gather[2, 2] = -1, len(values) + 7
    scatter[2, 0] = -1
    scatter[3, 1] = others * groups + 9
    problem = values, plan, schedule, transpose, gather, scatter, others * groups + 5
    want = spline_apply(*problem).double()
    there = tree_map_only(
        Tensor, lambda x: x.pin_memory().to(f"cuda:{device}", non_blocking=True), problem
    )
    result = torch.empty(want.shape, dtype=dtype, pin_memory=True)
    result.copy_(_KERNELS._run_kernel(*there, number), non_blocking=True)
    _wait(torch.cuda.current_stream())
    error = float((result.double() - want).abs().max() / want.abs().max())
    # Sums of 18 terms were within 5 units of the format, half precision rounds them once.
    if not error <= torch.finfo(dtype).eps * (64 if dtype.itemsize > 2 else 1):
        raise RuntimeError(f"its results differ from torch's by {error:.0e} of the largest")
    return error


# Clock cycles for which a device is kept busy, some .5 ms, so that the host is ahead of it.
_AHEAD = 1_000_000
WARM_CALLS = 2  # of each function, before it is timed


def seconds_on_device(
    functions: Sequence[Callable[[], object]], calls: int, runs: int
) -> list[float]:
    """Return the seconds of a call of each function, on the current stream of the device.

    Functions take turns. Some calls between two events are one run, and the median of runs counts.
    The time of the host shows only where it takes longer than the device.
    """
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        for _ in range(WARM_CALLS):
            function()
    for _ in range(runs):
        for function, seconds in zip(functions, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_AHEAD)
            begin.record()
            for _ in range(calls):
                function()
            end.record()
            _wait(torch.cuda.current_stream())
            seconds.append(begin.elapsed_time(end) / 1e3 / calls)
    return [statistics.median(seconds) for seconds in times]


def launches(device: int) -> dict[str, int]:
    """Return how often each kernel was launched on a device, by its name."""
    return {_KERNELS._kernel_name(x): _KERNELS._launches(device, x) for x in range(30)}


_registered = torch.library.Library("coded_torch", "IMPL")  # lasts as long as the process
_registered.impl("_try_kernel", _try_kernel, "CompositeExplicitAutograd")
_registered.impl("_fall_back", _fall_back, "CompositeExplicitAutograd")
_registered.impl("_spline_by_torch", spline_apply, "CUDA")
if os.environ.get("CODED_TORCH_CUDA") == "0":
    _registered.impl("spline_apply", spline_apply, "CUDA")
    CUDA_FAILURES.append("CODED_TORCH_CUDA is 0")


def build_info() -> dict[str, str]:
    """Return the instruction sets of the CPU kernels, best first, and what computes on CUDA."""
    cuda = f"torch's own operators ({'; '.join(CUDA_FAILURES)})"
    if not torch.version.cuda:
        cuda = "none (this torch is not built for CUDA)"
    elif not CUDA_FAILURES:
        try:
            _KERNELS._compile_kernel("sm_90", 0, _nvrtc())
            cuda = "are compiled at their first use"
        except (OSError, RuntimeError) as error:
            cuda = f"torch's own operators ({str(error).splitlines()[0]})"
    return {"cpu kernels": _KERNELS.cpu_capabilities(), "cuda kernels": cuda}
