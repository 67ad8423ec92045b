"""CUDA kernels as NVRTC compiles them, of the package that pip installs: without nvcc or a card."""

import ctypes
import re
import struct
from importlib.util import find_spec
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
# The headers that a device needs, each behind those that it includes.
HEADERS = (
    "math/pack.h", "math/half.h", "math/spline_layout.h", "math/spline_sweep.h",
    "ops/spline_args.h", "ops/cuda/rows.h", "ops/cuda/dense_block.h", "ops/cuda/spline_block.h",
)  # fmt: skip


def source():
    """All kernels as one text that includes nothing."""
    kernels = (CSRC / "ops/cuda/spline.cu").read_text()
    kernels = kernels[kernels.index("template <") : kernels.index("static void")]
    text = "\n".join((CSRC / name).read_text() for name in HEADERS)
    text += f"\nnamespace coded_torch {{\n{kernels}"
    for dtype in ("double", "float", "bfloat16", "float16"):
        for transpose in ("false", "true"):
            for states in ("kShared", "kWorkspace"):
                kernel = f"spline_kernel<{dtype}, {transpose}, States::{states}>"
                text += f"template __global__ void {kernel}(SplineArgs, SplineGrid, void*);\n"
        for width in (1,) if dtype == "double" else (1, 4):
            kernel = f"dense_kernel<{dtype}, {width}>"
            text += f"template __global__ void {kernel}(SplineArgs, DenseGrid, bool);\n"
    return re.sub(r"^#include.*|^#pragma once", "", text, flags=re.M) + "}\n"


def compile(architecture):
    """Return the machine code, or the PTX of compute_90 and its like."""
    (library,) = (
        path
        for root in find_spec("nvidia").submodule_search_locations
        for path in Path(root).glob("*/lib/libnvrtc.so.*")
    )
    nvrtc, program, size = ctypes.CDLL(str(library)), ctypes.c_void_p(), ctypes.c_size_t()

    def call(name, *arguments):
        status = getattr(nvrtc, f"nvrtc{name}")(*arguments)
        if status and name == "CompileProgram":
            raise RuntimeError(get("ProgramLog").decode())
        assert status == 0, name

    def get(what):
        call(f"Get{what}Size", program, ctypes.byref(size))
        image = ctypes.create_string_buffer(size.value)
        call(f"Get{what}", program, image)
        return image.raw

    call("CreateProgram", ctypes.byref(program), source().encode(), b"", 0, None, None)
    options = [f"-arch={architecture}".encode(), b"-std=c++17", b"-default-device"]
    call("CompileProgram", program, len(options), (ctypes.c_char_p * len(options))(*options))
    return get("CUBIN" if architecture.startswith("sm") else "PTX")


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
