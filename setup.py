"""Builds the compiled parts: the planner, the CPU operators and, where possible, the CUDA ones."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import Extension, setup


def find_toolkit() -> str | None:
    """Return the CUDA toolkit's folder; None if there is no nvcc that runs.

    An nvcc on PATH may be a script that calls one elsewhere, so nvcc itself is asked.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    nvcc = nvcc or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        return None
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "probe.cu")
        source.touch()
        try:
            said = subprocess.run([nvcc, "--dryrun", str(source)], capture_output=True, text=True)
        except OSError:  # an nvcc for another processor
            return None
    top = re.search(r"^#\$ TOP=(.+)$", said.stderr, re.M)
    found = Path(top[1]).resolve() if top else Path(nvcc).parents[1]
    return str(found if Path(found, "bin", "nvcc").exists() else Path(nvcc).parents[1])


TOOLKIT = None if os.environ.get("CODED_TORCH_CUDA") == "0" else find_toolkit()
if TOOLKIT:
    os.environ["CUDA_HOME"] = TOOLKIT  # torch reads it when its module is imported

import torch  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths  # noqa: E402

ROOT = Path(__file__).resolve().parent
HEADERS = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.[hi]*")]
# The oldest torch that the operators run on: the stable ABI promises all later ones.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Nothing reads errno of a root, so roots may be taken a vector at a time.
# -Wpsabi is about wide vectors that cross a function boundary, and none does.
# The prefix map keeps the builder's paths out of error messages.
PRIVATE = ["-fvisibility=hidden", f"-ffile-prefix-map={ROOT}/="]
CXX = ["-std=c++17", "-O3", "-Wno-psabi", "-fno-math-errno", *PRIVATE]
# Quoted for nvcc, which splits at spaces and commas: a folder may have both.
NVCC = ["-std=c++17", "-O3", "-DUSE_CUDA", STABLE_ABI, *(f"-Xcompiler='{x}'" for x in PRIVATE)]
# Volta, Turing, Ampere (and Ada), Hopper, Blackwell (servers, desktops), whatever GPU builds.
GENERATIONS = ("70", "75", "80", "90", "100", "120")


def run_nvcc(toolkit: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    compiler = ["-ccbin", os.environ["CC"]] if "CC" in os.environ else []  # torch adds it, too
    command = [str(Path(toolkit, "bin", "nvcc")), *compiler, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def architectures(toolkit: str) -> list[str]:
    """Return nvcc's flags, by TORCH_CUDA_ARCH_LIST if it is set, else one per generation.

    Hopper and the newest generation come as PTX too, for generations between and to follow.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        flags: list[str] = cpp_extension._get_cuda_arch_flags()
        return flags
    listed = run_nvcc(toolkit, "--list-gpu-code").stdout
    known = [g for g in GENERATIONS if re.search(rf"\bsm_{g}\b", listed)] or ["80", "90"]
    ptx = {"90", known[-1]}
    return [
        f"-gencode=arch=compute_{g},code={f'[sm_{g},compute_{g}]' if g in ptx else f'sm_{g}'}"
        for g in known
    ]


def obstacle(toolkit: str) -> str | None:
    """Return the thing that the toolkit lacks to build for this torch, or None."""
    said = run_nvcc(toolkit, "--version").stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    torch_cuda = torch.version.cuda or ""
    if release and release[1] != torch_cuda.split(".")[0]:
        return (
            f"nvcc {torch_cuda.split('.')[0]}.x for torch's CUDA {torch_cuda}, got nvcc "
            f"{release[1]}.{release[2]}; set CUDA_HOME to a toolkit of that version, or install a "
            f"torch built for CUDA {release[1]}.x and use pip's --no-build-isolation"
        )
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "probe.cu")
        source.write_text("#include <cuda_runtime.h>\n__global__ void probe() {}\n")
        try:
            flags = [*NVCC, *architectures(toolkit)]
        except (ValueError, IndexError):  # an unknown name, or "native" without a GPU
            got = os.environ["TORCH_CUDA_ARCH_LIST"]
            return f"a TORCH_CUDA_ARCH_LIST that can be compiled here, got {got!r}"
        done = run_nvcc(toolkit, *flags, "-c", str(source), "-o", f"{source}.o")
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            error = next((line for line in lines if "error" in line), (lines or ["no message"])[0])
            return f"an nvcc that compiles, got: {error.strip().replace(scratch + '/', '')}"
    try:  # torch would end the whole build later
        compiler = cpp_extension.get_cxx_compiler()
        _, version = cpp_extension.get_compiler_abi_compatibility_and_version(compiler)
        cpp_extension._check_cuda_version(compiler, version)
    except RuntimeError as refused:
        return f"a compiler that torch accepts beside nvcc, got: {refused}"
    if not can_link("cudart_static", library_paths("cuda")):
        return f"libcudart_static, and {toolkit} has none"
    return None


def can_link(library: str, folders: Sequence[str]) -> bool:
    """Return whether the linker finds a library, in folders or where it always looks."""
    linker = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as scratch:
        output = ["-shared", "-o", str(Path(scratch, "probe"))]
        command = [*linker, *output, *(f"-L{folder}" for folder in folders), f"-l{library}"]
        return subprocess.run(command, capture_output=True).returncode == 0


def without_cuda(
    choice: str,
    torch_cuda: str | None,
    toolkit: str | None,
    obstacle: Callable[[str], str | None] = obstacle,
) -> str | None:
    """Return why the CUDA operators are not built, or None. No visible GPU is needed.

    Args:
        choice: CODED_TORCH_CUDA: "1" insists, "0" builds for the CPU alone, "" builds all it can.
        torch_cuda: torch's own version of CUDA, if any.
        toolkit: the folder of the CUDA toolkit, if any.
        obstacle: a function from a toolkit to the thing that it lacks.

    Raises:
        SystemExit: the choice is unknown, or insists in vain.
    """
    if choice not in ("", "0", "1"):
        raise SystemExit(f"setup.py: CODED_TORCH_CUDA must be 0 or 1, got {choice!r}")
    if choice == "0":
        return "CODED_TORCH_CUDA was 0"
    needs: str | None
    if not torch_cuda:
        needs = "a CUDA build of torch"
    elif toolkit is None:
        needs = "nvcc; set CUDA_HOME to the CUDA toolkit"
    else:
        needs = obstacle(toolkit)
    if needs is None:
        return None
    if choice == "1":
        raise SystemExit(f"setup.py: CODED_TORCH_CUDA=1 needs {needs}")
    if torch_cuda:
        print(f"setup.py: builds for the CPU alone: CUDA needs {needs}", file=sys.stderr)
    return f"the build lacked {needs}"


def operators(name: str, sources: list[str], libraries: list[str], nvcc: list[str]) -> Extension:
    """Return a library of operators, loaded by torch.ops.load_library; no Python in it."""
    device = "cuda" if nvcc else "cpu"
    return Extension(
        name,
        sources,
        include_dirs=include_paths(device),
        library_dirs=library_paths(device),
        libraries=libraries,
        language="c++",
        py_limited_api=True,
        extra_compile_args={"cxx": [*CXX, STABLE_ABI], "nvcc": [*NVCC, *nvcc]},
        depends=HEADERS,
    )


def extensions(cuda: bool) -> list[Extension]:
    """Return everything that is compiled."""
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
                "csrc/ops/cpu/estimate.cpp",
                "csrc/ops/cpu/matern.cpp",
                "csrc/ops/cpu/metrics.cpp",
                "csrc/ops/cpu/kernels_baseline.cpp",
                "csrc/ops/cpu/kernels_avx2.cpp",
                "csrc/ops/cpu/kernels_avx512.cpp",
            ],
            ["torch", "torch_cpu", "c10"],
            nvcc=[],
        ),
    ]
    if cuda:
        assert TOOLKIT is not None
        # torch's CUDA library by name, as linkers drop "torch", of which nothing is used directly.
        # The runtime is static: a library built for another CUDA than torch's still loads.
        libraries = ["torch_cuda", "torch_cpu", "c10", "cudart_static", "dl", "rt", "pthread"]
        sources, flags = ["csrc/ops/cuda/spline.cu"], architectures(TOOLKIT)
        built.append(operators("coded_torch._ops_cuda", sources, libraries, flags))
    return built


class Build(BuildExtension):  # type: ignore[misc]
    """Leaves a line beside the libraries that says why there are no CUDA operators."""

    missing: str | None = None

    def run(self) -> None:
        super().run()
        library = Path(self.get_ext_fullpath("coded_torch._ops_cuda"))
        library.parent.mkdir(parents=True, exist_ok=True)
        library.with_name("_cuda_missing.txt").write_text(self.missing or "")
        if self.missing:  # an earlier build in place may have left a library
            for stale in library.parent.glob("_ops_cuda.*"):
                stale.unlink()


if __name__ == "__main__":
    Build.missing = without_cuda(
        os.environ.get("CODED_TORCH_CUDA", ""), torch.version.cuda, TOOLKIT
    )
    setup(ext_modules=extensions(cuda=Build.missing is None), cmdclass={"build_ext": Build})
