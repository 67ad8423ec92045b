"""CUDA kernels on the host: their bodies as its compiler sees them, and what nvcc makes of them."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import CUDA_HOME, include_paths

from .ptx import translate
from .test_setup import load_setup

CSRC = Path(__file__).parent / "csrc"
SOURCES = Path(__file__).resolve().parents[1] / "csrc"
KERNELS = SOURCES / "ops" / "cuda" / "spline.cu"  # all that CUDA has
NVCC = shutil.which("nvcc") or (CUDA_HOME and str(Path(CUDA_HOME, "bin", "nvcc")))
# Of Colab's T4, the A100 and the H100.
ARCHITECTURES = ("sm_75", "sm_80", "sm_90")


def run_nvcc(*options):
    """What nvcc says; the test is skipped where there is none."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    includes = (f"-isystem={path}" for path in include_paths())
    command = [NVCC, *load_setup().NVCC, *options, *includes, str(KERNELS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr


def linked_without_spills(library):
    """Make a library; what nvcc says, and how many kernels it holds, none of which spills."""
    codes = (f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in ARCHITECTURES)
    log = run_nvcc(*codes, "-Xptxas=-v", "-Xcompiler=-fPIC", "--shared", "-o", str(library))
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log
    )
    assert set(spills) == {("0", "0", "0")}
    return log, len(spills)


def build(folder, source, *more, flags):
    library = folder / "grid.so"
    flags = [*flags, *os.environ.get("CODED_TORCH_GRID_FLAGS", "").split()]  # .ci/sanitizers
    sources = map(str, (CSRC / source, *more))
    command = ["c++", *flags, "-fPIC", "-shared", *sources, "-o", str(library)]
    subprocess.run(command, check=True, timeout=300)
    return ctypes.CDLL(str(library))


def build_host(folder, source, *flags):
    """The body of a kernel, compiled for the host."""
    return build(folder, source, flags=["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", *flags])


def compile_ptx(folder):
    """What nvcc makes of the kernels."""
    path = folder / "kernels.ptx"
    run_nvcc("-gencode=arch=compute_90,code=compute_90", "-ptx", "-o", str(path))
    return path.read_text()


def build_ptx(folder, source, ptx):
    """The kernels that nvcc compiled, translated for the host."""
    translated = folder / "kernels.cpp"
    translated.write_text(translate(ptx))
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-DCODED_TORCH_PTX", f"-I{CSRC}"]
    return build(folder, source, translated, flags=flags)
