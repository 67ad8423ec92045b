"""Build the pretended accelerator, and a driver of CUDA for it that runs the package's kernels."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

from ..grids import compile_ptx
from ..ptx import translate

HERE = Path(__file__).parent
CXX = ["c++", "-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror"]
# What runs kernels: as their own tests compile them, and with the host's fma as an instruction.
KERNELS = ["-march=native", "-ffp-contract=off", f"-I{HERE.parent / 'csrc'}"]


def build(folder: Path) -> None:
    """Make libaccelerator.so, which torch takes for its CUDA part, and libcuda.so.1 beside it."""
    with ThreadPoolExecutor(2) as pool:
        kernels = pool.submit(_kernels, folder)
        device = [pool.submit(_compile, folder, HERE / f"{n}.cpp") for n in ("operators", "device")]
        driver = pool.submit(_compile, folder, HERE / "driver.cpp", *KERNELS)
    library = folder / "libaccelerator.so"
    _link(library, "libtorch_cuda.so", *(d.result() for d in device))
    _link(folder / "libcuda.so.1", "libcuda.so.1", driver.result(), kernels.result(), library)


def _kernels(folder: Path) -> Path:
    """The kernels' PTX as code for the host."""
    translated = folder / "kernels.cpp"
    translated.write_text(translate(compile_ptx()))
    return _compile(folder, translated, *KERNELS, "-w")


def _compile(folder: Path, source: Path, *flags: str) -> Path:
    compiled = folder / f"{source.stem}.o"
    includes = [f"-isystem{path}" for path in include_paths()]
    _run([*CXX, *flags, *includes, "-c", str(source), "-o", str(compiled)])
    return compiled


def _link(library: Path, name: str, *objects: Path) -> None:
    """Link a library that the loader knows by a name."""
    folder = Path(torch.__file__).parent / "lib"
    torch_libraries = [f"-L{folder}", f"-Wl,-rpath,{folder}", "-ltorch_cpu", "-lc10"]
    command = ["c++", "-shared", "-Wl,-z,defs", f"-Wl,-soname,{name}", *map(str, objects)]
    _run([*command, "-o", str(library), *torch_libraries])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
