"""NVRTC compiles all CUDA kernels for every generation of cards, without a header of CUDA's."""

import pytest

from .nvrtc import compile, facts

# Turing, Ampere, Hopper, Blackwell in servers and desktops; the others take a minute.
ARCHITECTURES = [
    "sm_90",
    *(pytest.param(f"sm_{n}", marks=pytest.mark.slow) for n in (75, 80, 100, 120)),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_kernels_compile_and_keep_to_their_registers(architecture):
    kernels = facts(compile(architecture))
    # Sweeps of four dtypes, forward and transposed, states in shared memory and in a workspace;
    # products of four dtypes, narrow, and wide for all but float64.
    assert sum("spline_kernel" in name for name in kernels) == 16
    assert sum("dense_kernel" in name for name in kernels) == 7
    for name, (registers, local_bytes) in kernels.items():
        assert registers <= 128, name  # 512 threads to a multiprocessor
        # NVRTC 13.5 spills some numbers of wide products on Blackwell; 13.0, 8 bytes on Hopper.
        assert local_bytes <= (24 if "Li4E" in name else 0), name
