"""CUDA kernels without a card: as NVRTC compiles them, and their bodies as the host does."""

import ctypes
import os
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from coded_torch import _extension

from .ptx import translate

CSRC = Path(__file__).parent / "csrc"
SOURCES = Path(__file__).resolve().parents[1] / "csrc"
# By number: sweeps, sweeps with a workspace, products and wide products, of four dtypes in two
# directions. Of float64 there are no wide products.
KERNELS = range(30)


def compile_kernel(number, architecture):
    """Machine code, or the PTX of an architecture such as compute_90."""
    nvrtc = _extension._nvrtc()
    code = torch.ops.coded_torch._compile_kernel(architecture, number, nvrtc)
    return code.numpy().tobytes()


def compile_kernels(architecture):
    """All kernels, two of which are compiled at a time."""
    with ThreadPoolExecutor(2) as threads:
        return [*threads.map(compile_kernel, KERNELS, [architecture] * len(KERNELS))]


def compile_ptx():
    """All kernels, one module behind the other."""
    return "".join(code.decode().rstrip("\0") for code in compile_kernels("compute_90"))


def facts(cubin):
    """Return the registers and the bytes of local memory of each kernel, from its ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(count)]

    def text(section, offset):
        start = sections[section][4] + offset
        return cubin[start : cubin.index(b"\0", start)].decode()

    by_name = {text(names, section[0]): section for section in sections}
    symbols, (*_, at, length, _, _, _, _) = by_name[".symtab"], by_name[".nv.info"]
    found, end = {}, at + length
    while at < end:  # of a value's size, its kind, and the bytes that follow
        form, kind, more = struct.unpack_from("<BBH", cubin, at)
        if form == 4 and kind in (0x11, 0x2F):  # of the frame; of registers
            symbol, value = struct.unpack_from("<II", cubin, at + 4)
            (name,) = struct.unpack_from("<I", cubin, symbols[4] + 24 * symbol)
            found.setdefault(text(symbols[6], name), {})[kind] = value
        at += 4 + (more if form == 4 else 0)
    # A function that kernels call, such as a division, has a frame alone.
    return {name: (v[0x2F], v[0x11]) for name, v in found.items() if 0x2F in v}


def build(folder, source, *more, flags):
    """Compile sources, and link them to a library, whose path is returned."""
    flags = [*flags, *os.environ.get("CODED_TORCH_GRID_FLAGS", "").split()]  # .ci/sanitizers

    def compiled(path):
        made = folder / f"{path.stem}.o"
        command = ["c++", *flags, "-fPIC", "-c", str(path), "-o", str(made)]
        subprocess.run(command, check=True, timeout=300)
        return str(made)

    with ThreadPoolExecutor(2) as threads:
        objects = [*threads.map(compiled, (CSRC / source, *more))]
    library = folder / "grid.so"
    command = ["c++", *flags, "-shared", *objects, "-o", str(library)]
    subprocess.run(command, check=True, timeout=300)
    return library


def build_host(folder, source, *flags):
    """The body of a kernel, compiled for the host."""
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", *flags]
    return ctypes.CDLL(str(build(folder, source, flags=flags)))


def build_ptx(folder, source, ptx):
    """The kernels that NVRTC compiled, translated for the host."""
    translated = folder / "kernels.cpp"
    translated.write_text(translate(ptx))
    # Optimised, 44,000 lines would compile for 15 s longer, and run for 8 s less.
    flags = ["-std=c++20", "-O0", "-ffp-contract=off", "-DCODED_TORCH_PTX", f"-I{CSRC}"]
    return ctypes.CDLL(str(build(folder, source, translated, flags=flags)))
