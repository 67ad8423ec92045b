"""Builds the compiled parts: the planner, the CPU operators and, where possible, the CUDA ones."""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pybind11.setup_helpers import Pybind11Extension
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, include_paths, library_paths

ROOT = Path(__file__).resolve().parent
HEADERS = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.[hi]*")]
# The oldest torch that the operators run on: the stable ABI promises all later ones.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Vectors wider than the baseline's cross no function boundary, which is all that -Wpsabi is about.
# The prefix map keeps the builder's paths out of error messages.
PRIVATE = ["-fvisibility=hidden", f"-ffile-prefix-map={ROOT}/="]
CXX = ["-std=c++17", "-O3", "-Wno-psabi", *PRIVATE]
# One machine code per generation and PTX for those to come; explicit, so that the result does not
# depend on the GPU of the machine that builds.
ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]
NVCC = ["-std=c++17", "-O3", "-DUSE_CUDA", STABLE_ABI, *(f"-Xcompiler={flag}" for flag in PRIVATE)]


def wants_cuda(
    choice: str, cuda_home: str | None, torch_cuda: str | None, finds_cudart: Callable[[], bool]
) -> bool:
    """Whether to build the CUDA operators: a visible GPU is never asked for.

    Args:
        choice: CODED_TORCH_CUDA: "1" or "0" decides; with "" they are built where they can be.
        cuda_home: the folder whose bin holds nvcc, if any.
        torch_cuda: the version of CUDA that torch was built with, if any.
        finds_cudart: whether the linker will find cudart. nvcc alone does not say: it may be a
            script that calls the one of a toolkit elsewhere.
    """
    if choice not in ("", "0", "1"):
        raise SystemExit(f"setup.py: CODED_TORCH_CUDA must be 0 or 1, got {choice!r}")
    if choice == "0":
        return False
    if not torch_cuda:
        missing = "a CUDA build of torch"
    elif cuda_home is None:
        missing = "nvcc; set CUDA_HOME to the CUDA toolkit"
    elif not finds_cudart():
        missing = f"cudart, and {cuda_home} has none; set CUDA_HOME to the CUDA toolkit"
    else:
        return True
    if choice == "1":
        raise SystemExit(f"setup.py: CODED_TORCH_CUDA=1 needs {missing}")
    if torch_cuda:
        print(
            f"setup.py: builds for the CPU alone: CUDA needs {missing} "
            "(CODED_TORCH_CUDA=1 insists, CODED_TORCH_CUDA=0 expects it)",
            file=sys.stderr,
        )
    return False


def can_link(library: str, folders: Sequence[str]) -> bool:
    """Whether the linker finds a library, in folders or where it always looks."""
    linker = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as scratch:
        output = ["-shared", "-o", str(Path(scratch, "probe"))]
        command = [*linker, *output, *(f"-L{folder}" for folder in folders), f"-l{library}"]
        return subprocess.run(command, capture_output=True).returncode == 0


def operators(name: str, sources: list[str], libraries: list[str], cuda: bool) -> Extension:
    """A library of operators, loaded by torch.ops.load_library; no Python in it."""
    device = "cuda" if cuda else "cpu"
    return Extension(
        name,
        sources,
        include_dirs=include_paths(device),
        library_dirs=library_paths(device),
        libraries=libraries,
        language="c++",
        py_limited_api=True,
        extra_compile_args={"cxx": [*CXX, STABLE_ABI], "nvcc": [*NVCC, *ARCHITECTURES]},
        depends=HEADERS,
    )


def extensions() -> list[Extension]:
    """Everything that is compiled."""
    built = [
        Pybind11Extension(
            "coded_torch._plan",
            ["csrc/plan/bindings.cpp"],
            cxx_std=17,
            extra_compile_args=["-O3"],
            depends=HEADERS,
        ),
        operators(
            "coded_torch._ops_cpu",
            [
                "csrc/ops/library.cpp",
                "csrc/ops/cpu/spline.cpp",
                "csrc/ops/cpu/distances.cpp",
                "csrc/ops/cpu/matern.cpp",
                "csrc/ops/cpu/kernels_baseline.cpp",
                "csrc/ops/cpu/kernels_avx2.cpp",
                "csrc/ops/cpu/kernels_avx512.cpp",
            ],
            ["torch", "torch_cpu", "c10"],
            cuda=False,
        ),
    ]
    choice = os.environ.get("CODED_TORCH_CUDA", "")
    if wants_cuda(
        choice, CUDA_HOME, torch.version.cuda, lambda: can_link("cudart", library_paths("cuda"))
    ):
        # torch's own CUDA symbols are resolved when the library is loaded.
        libraries = ["torch", "torch_cpu", "c10", "cudart"]
        names = ("spline", "matern", "distances")
        sources = [f"csrc/ops/cuda/{name}.cu" for name in names]
        built.append(operators("coded_torch._ops_cuda", sources, libraries, cuda=True))
    return built


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
