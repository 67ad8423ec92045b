"""Builds the compiled parts: the planner, the CPU operators and, where possible, the CUDA ones."""

import os
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
CXX = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wno-psabi", f"-ffile-prefix-map={ROOT}/="]
# One machine code per generation and PTX for those to come; explicit, so that the result does not
# depend on the GPU of the machine that builds.
ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]
NVCC = ["-std=c++17", "-O3", "-DUSE_CUDA", STABLE_ABI, *ARCHITECTURES]


def wants_cuda() -> bool:
    """CODED_TORCH_CUDA=1|0 decides; else nvcc and a CUDA build of torch, never a visible GPU."""
    choice = os.environ.get("CODED_TORCH_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"setup.py: CODED_TORCH_CUDA must be 0 or 1, got {choice!r}")
    if choice == "1" and CUDA_HOME is None:
        raise SystemExit("setup.py: CODED_TORCH_CUDA=1 needs nvcc: set CUDA_HOME")
    return choice == "1" or (choice == "" and CUDA_HOME is not None and bool(torch.version.cuda))


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
        extra_compile_args={"cxx": [*CXX, STABLE_ABI], "nvcc": NVCC},
        depends=HEADERS,
    )


extensions = [
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
            "csrc/ops/cpu/tiles_baseline.cpp",
            "csrc/ops/cpu/tiles_avx2.cpp",
            "csrc/ops/cpu/tiles_avx512.cpp",
        ],
        ["torch", "torch_cpu", "c10"],
        cuda=False,
    ),
]
if wants_cuda():
    # torch's own CUDA symbols are resolved when the library is loaded into a CUDA build of torch,
    # so that this links against the CPU build too.
    libraries = ["torch", "torch_cpu", "c10", "cudart"]
    extensions.append(
        operators("coded_torch._ops_cuda", ["csrc/ops/cuda/spline.cu"], libraries, cuda=True)
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
