"""Build the pretended accelerator, and a copy of the package that finds CUDA kernels beside it."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

import coded_torch

from ..grids import KERNELS as SPLINE
from ..grids import run_nvcc
from ..ptx import translate

HERE = Path(__file__).parent
CXX = ["c++", "-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror"]
# What runs kernels: as their own tests compile them, and with the host's fma as an instruction.
KERNELS = ["-march=native", "-ffp-contract=off", f"-I{HERE.parent / 'csrc'}"]


def build(folder: Path) -> None:
    """Make `kernels` and `torch`: folders to start Python in, with and without CUDA kernels."""
    for name in ("kernels", "torch"):
        shutil.copytree(
            Path(coded_torch.__file__).parent,
            folder / name / "coded_torch",
            ignore=shutil.ignore_patterns("__pycache__", "_ops_cuda.*"),
        )
    with ThreadPoolExecutor(2) as pool:
        kernels = pool.submit(_kernels, folder)
        device = [pool.submit(_compile, folder, HERE / f"{n}.cpp") for n in ("operators", "device")]
        runtime = pool.submit(_compile, folder, HERE / "runtime.cpp", *KERNELS)
    library = folder / "libaccelerator.so"
    _link(library, *(d.result() for d in device))
    _link(
        folder / "kernels" / "coded_torch" / "_ops_cuda.so",
        runtime.result(), *kernels.result(), library,
    )  # fmt: skip


def _kernels(folder: Path) -> list[Path]:
    """The host's code as nvcc makes it, and the kernels' PTX as code for the host."""
    host = folder / f"{SPLINE.stem}-host.o"
    options = ["-gencode=arch=compute_90,code=compute_90", "-Xcompiler=-fPIC"]
    keep = ["--keep", f"--keep-dir={folder}"]
    run_nvcc(*options, *keep, "-c", "-o", str(host))
    translated = folder / f"{SPLINE.stem}.cpp"
    translated.write_text(translate(translated.with_suffix(".ptx").read_text()))
    # In this order their initialisers run: kernels are there before the host's code looks for them.
    return [_compile(folder, translated, *KERNELS, "-w"), host]


def _compile(folder: Path, source: Path, *flags: str) -> Path:
    compiled = folder / f"{source.stem}.o"
    includes = [f"-isystem{path}" for path in include_paths()]
    _run([*CXX, *flags, *includes, "-c", str(source), "-o", str(compiled)])
    return compiled


def _link(library: Path, *objects: Path) -> None:
    folder = Path(torch.__file__).parent / "lib"
    torch_libraries = [f"-L{folder}", f"-Wl,-rpath,{folder}", "-ltorch_cpu", "-lc10"]
    _run(
        ["c++", "-shared", "-Wl,-z,defs", *map(str, objects), "-o", str(library), *torch_libraries]
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
