"""CUDA kernels on the host: their bodies as its compiler sees them, and what nvcc makes of them."""

import ctypes
import os
import subprocess
from pathlib import Path

from .ptx import translate
from .test_cuda import run_nvcc

CSRC = Path(__file__).parent / "csrc"


def build(folder, source, *more, flags=()):
    library = folder / "grid.so"
    flags = [*flags, *os.environ.get("CODED_TORCH_GRID_FLAGS", "").split()]  # .ci/sanitizers
    sources = map(str, (CSRC / source, *more))
    command = ["c++", *flags, "-fPIC", "-shared", *sources, "-o", str(library)]
    subprocess.run(command, check=True, timeout=300)
    return ctypes.CDLL(str(library))


def build_host(folder, source):
    """The body of a kernel, compiled for the host."""
    return build(folder, source, flags=["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"])


def build_ptx(folder, source, kernels):
    """The kernels that nvcc compiled, translated for the host."""
    path, translated = folder / "kernels.ptx", folder / "kernels.cpp"
    virtual = "-gencode=arch=compute_90,code=compute_90"
    run_nvcc(virtual, "-ptx", "-o", str(path), source=kernels)
    translated.write_text(translate(path.read_text()))
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-DCODED_TORCH_PTX", f"-I{CSRC}"]
    return build(folder, source, translated, flags=flags)
