"""The only loader of compiled code, and operators of torch's own for CUDA without nvcc.

A spline is applied there as the dense matrix of its plan, or on the host if ``ops.with_matrix`` has
appended none. Results agree to rounding, but the bits of a column may depend on the number of
columns, by which cuBLAS chooses its kernels.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["HAS_CUDA_KERNELS", "build_info", "curve_plan", "short_path", "spline_plan"]

_PACKAGE = Path(__file__).resolve().parent
_REMEDY = "`pip install .` in the source folder builds it (needs a C++17 compiler); then leave it"

try:
    from ._plan import curve_plan, short_path, spline_plan
except ImportError as error:
    raise ImportError(f"coded_torch: the compiled planner is missing; {_REMEDY}") from error


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _allows_tf32() -> bool:  # the compiler cannot trace the setting
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


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
    gather, scatter, num_rows = (*where, None, None, None)[:3]  # defaults may be left out
    rows = (values if gather is None else gather).shape[0]
    others = schedule.shape[-1] - 1 - rows
    num_knots, num_points = (others, rows) if transpose else (rows, others)
    of_sweeps = 12 * num_knots + 4 * num_points
    if coefficients.shape[1] == of_sweeps or len(coefficients) > 1:  # no matrix, or several plans
        inputs = values, coefficients, schedule, transpose, *where
        on_host = [t.cpu() if isinstance(t, Tensor) else t for t in inputs]
        result: Tensor = torch.ops.coded_torch.spline_apply(*on_host)
        return result.to(values.device)
    entries = coefficients[0, of_sweeps : of_sweeps + num_knots * num_points]
    matrix = entries.view(num_knots, num_points)
    dtype = values.dtype
    if gather is not None:  # an index out of bounds stands for a row of zeros
        values = values if len(values) else values.new_zeros(1, values.shape[1])
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


def _load(name: str) -> str:
    """Load a library of operators; return why there is none, or an empty string."""
    for path in sorted(_PACKAGE.glob(f"{name}.*")):
        try:
            torch.ops.load_library(path)
        except OSError as error:
            return f"{path.name} does not load into torch {torch.__version__}: {error}"
        return ""
    return "it was not built"


if why := _load("_ops_cpu"):
    raise ImportError(f"coded_torch: the compiled operators are missing; {_REMEDY}: {why}")


# The reason why there are no operators for CUDA, or an empty string.
_CUDA_MISSING = "this torch is not built for CUDA"
if torch.version.cuda:  # no other torch can load them
    _CUDA_MISSING = _load("_ops_cuda")
    if _CUDA_MISSING == "it was not built":
        note = _PACKAGE / "_cuda_missing.txt"  # setup.py says why
        _CUDA_MISSING = (note.read_text() if note.exists() else "") or _CUDA_MISSING
    elif _CUDA_MISSING:
        warnings.warn(
            "coded_torch: CUDA tensors are computed by torch's own operators, as "
            f"{_CUDA_MISSING}; {_REMEDY}",
            RuntimeWarning,
            stacklevel=1,
        )
HAS_CUDA_KERNELS = not _CUDA_MISSING

if _CUDA_MISSING:
    _library = torch.library.Library("coded_torch", "IMPL")  # lasts as long as the process
    _library.impl("spline_apply", spline_apply, "CUDA")


def build_info() -> dict[str, str]:
    """Return the instruction sets of the CPU kernels, best first, and the operators of CUDA."""
    cuda = f"torch's own operators ({_CUDA_MISSING})" if _CUDA_MISSING else "compiled"
    return {"cpu kernels": torch.ops.coded_torch.cpu_capabilities(), "cuda kernels": cuda}
