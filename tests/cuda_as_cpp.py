"""The text that NVRTC gets, as C++ for the host's compiler. tests/csrc/threads.h runs it."""

import ctypes
import re
import subprocess

import torch

from .grids import CSRC, KERNELS, build

_SANITIZE = ["-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-DCODED_TORCH_THREADS"]
# Punning of types is what CUDA allows; what the text's pragmas say is for NVRTC.
_TEXT = [f"-I{CSRC}", "-fno-strict-aliasing", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
_TEXT += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unused-function"]
_SHARED = "extern __shared__ __align__(16) char shared[];"
_ASSEMBLY = re.compile(
    r'asm(?: volatile)?\("(?P<name>[\w.]+) [^"]*"\s*:\s*(?:"=\w"\((?P<to>[^()]*)\))?\s*'
    r':\s*"\w"\((?P<operand>.*?)\)\);'
)


def texts(folder):
    """By name of the kernel, the options and the text that the package gives to NVRTC."""
    library = folder / "nvrtc.so"
    command = ["c++", "-shared", "-fPIC", str(CSRC / "nvrtc_text.cpp"), "-o", str(library)]
    subprocess.run(command, check=True, timeout=300)
    nvrtc = ctypes.CDLL(str(library))._handle
    operators, found = torch.ops.coded_torch, {}
    for number in KERNELS:
        code = operators._compile_kernel("sm_90", number, nvrtc).numpy().tobytes().decode()
        options, _, text = code.partition("\n\n")
        found[operators._kernel_name(number)] = options.splitlines(), text
    return found


def as_cpp(name, options, text, capability):
    """C++ of one kernel for an architecture such as 900."""
    assert text.count(_SHARED) == 1
    text = text.replace(_SHARED, "char* shared = shared_memory();")
    text = _ASSEMBLY.sub(_call, text)
    assert "asm" not in text
    defined = [option[2:].replace("=", " ", 1) for option in options if option.startswith("-D")]
    return "\n".join(
        [
            '#include "cuda_as_cpp.h"',
            *(f"#define {macro}" for macro in defined),
            f"#define __CUDA_ARCH__ {capability}",
            "namespace {",  # what the text defines is this kernel's alone
            '#line 1 "text"',
            text,
            f'const Kernel registered("{name}", [](void** p) {{',
            f"  {name}(*static_cast<SplineArgs*>(p[0]), *static_cast<Grid*>(p[1]),",
            "      *static_cast<void**>(p[2]));",
            "});",
            "}",
        ]
    )


def _call(match):
    arguments = ", ".join(filter(None, (match["to"], match["operand"])))
    return f"{match['name'].replace('.', '_')}({arguments});"


def build_threads(folder, capability, change=lambda text: text):
    """Build tests/csrc/spline_grid.cpp with all kernels for ThreadSanitizer; return its path."""
    sources = []
    for name, (options, text) in texts(folder).items():
        sources.append(folder / f"{name}.cpp")
        sources[-1].write_text(as_cpp(name, options, change(text), capability))
    return build(folder, "spline_grid.cpp", *sources, flags=[*_SANITIZE, *_TEXT])
