"""The only loader of compiled code."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from . import _cuda_fallback

__all__ = ["HAS_CUDA_KERNELS", "build_info", "curve_plan", "short_path", "spline_plan"]

_PACKAGE = Path(__file__).resolve().parent
_REMEDY = "build it with `pip install .` in the source folder (needs a C++17 compiler)"

try:
    from ._plan import curve_plan, short_path, spline_plan
except ImportError as error:
    raise ImportError(f"coded_torch: the compiled planner is missing; {_REMEDY}") from error


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


def _load_cuda() -> str:
    """Load the CUDA operators, or register torch's own; return why, or an empty string."""
    reason = "this torch is not built for CUDA"
    if torch.version.cuda:  # no other torch can load them
        reason = _load("_ops_cuda")
        if reason == "it was not built":
            note = _PACKAGE / "_cuda_missing.txt"  # setup.py says why
            reason = (note.read_text() if note.exists() else "") or reason
        elif reason:
            warnings.warn(
                f"coded_torch: CUDA tensors are computed by torch's own operators, as {reason}; "
                f"{_REMEDY}",
                RuntimeWarning,
                stacklevel=2,
            )
    if reason:
        _cuda_fallback.register()
    return reason


_CUDA_MISSING = _load_cuda()
HAS_CUDA_KERNELS = not _CUDA_MISSING


def build_info() -> dict[str, str]:
    """Return the instruction sets of the CPU kernels, best first, and the operators of CUDA."""
    cuda = f"torch's own operators ({_CUDA_MISSING})" if _CUDA_MISSING else "compiled"
    return {"cpu kernels": torch.ops.coded_torch.cpu_capabilities(), "cuda kernels": cuda}
