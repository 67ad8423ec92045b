"""The only loader of compiled code."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["build_info", "curve_plan", "short_path", "spline_plan"]

_PACKAGE = Path(__file__).resolve().parent
_REMEDY = "build it with `pip install .` in the source folder (needs a C++17 compiler)"

try:
    from ._plan import curve_plan, short_path, spline_plan
except ImportError as error:
    raise ImportError(f"coded_torch: the compiled planner is missing; {_REMEDY}") from error


def _load(name: str) -> bool:
    """Load a library of operators; False where it was not built."""
    for path in sorted(_PACKAGE.glob(f"{name}.*")):
        try:
            torch.ops.load_library(path)
        except OSError as error:
            raise ImportError(
                f"coded_torch: {path.name} does not load into torch {torch.__version__}; "
                f"{_REMEDY}: {error}"
            ) from error
        return True
    return False


if not _load("_ops_cpu"):
    raise ImportError(f"coded_torch: the compiled operators are missing; {_REMEDY}")
# A CPU build of torch cannot load the CUDA operators, whether they were built or not.
_CUDA = bool(torch.version.cuda) and _load("_ops_cuda")


def build_info() -> dict[str, str]:
    """What was built and loaded: the kernels of the CPU, best first, and those of CUDA."""
    if _CUDA:
        cuda = "loaded"
    elif torch.version.cuda:
        cuda = "not built (needs nvcc and cudart; CODED_TORCH_CUDA=1 says what is missing)"
    else:
        cuda = "not loaded (this torch is a CPU build)"
    return {"cpu kernels": torch.ops.coded_torch.cpu_capabilities(), "cuda kernels": cuda}
