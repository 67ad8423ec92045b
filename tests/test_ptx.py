"""The translation of PTX: what nvcc's kernels are run by without a GPU."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from .ptx import translate

# Of 12 numbers at `in`: a sum that wraps, shifts, a choice, halves, a loop, shared memory.
PTX = """\
.extern .shared .align 16 .b8 shared[];

.visible .entry kernel(
	.param .align 8 .b8 kernel_param_0[24],
	.param .u64 kernel_param_1
)
.maxntid 128, 1, 1
{
	.reg .pred 	%p<3>;
	.reg .b16 	%rs<3>;
	.reg .b32 	%r<9>;
	.reg .f32 	%f<6>;
	.reg .b64 	%rd<9>;

	ld.param.u64 	%rd1, [kernel_param_0+16];
	mov.b64 	%rd2, kernel_param_0;
	ld.param.u64 	%rd3, [kernel_param_1];
	ld.global.v4.f32 	{%f1, %f2, %f3, %f4}, [%rd1];
	fma.rn.f32 	%f5, %f1, %f2, 0fBF800000;
	// begin inline asm
	{  cvt.rn.f16.f32 %rs1, %f3;}
	// end inline asm
	mov.b32 	%r1, {%rs1, %rs1};
	shr.s64 	%rd4, %rd3, 2;
	cvt.u32.u64 	%r2, %rd4;
	add.s32 	%r3, %r2, -2147483648;
	setp.lt.s64 	%p1, %rd3, 0;
	selp.b32 	%r4, 7, 9, %p1;
	mov.u32 	%r5, shared;
	mov.u32 	%r6, %tid.x;
	shl.b32 	%r7, %r6, 2;
	add.s32 	%r7, %r5, %r7;
	st.shared.u32 	[%r7], %r4;

$L__BB0_1:
	.pragma "nounroll";
	add.s32 	%r6, %r6, 1;
	setp.lt.s32 	%p2, %r6, 10;
	@%p2 bra 	$L__BB0_1;

	@!%p1 bra 	$L__BB0_2;
	ld.shared.u32 	%r4, [%r7];
$L__BB0_2:
	st.global.f32 	[%rd1+16], %f5;
	st.global.cs.v4.u32 	[%rd1+32], {%r1, %r3, %r4, %r6};
	ret;
}
"""
MAIN = """
extern "C" void kernel(Bytes<24> numbers, uint64_t number);
extern "C" const char* run(char* in, int64_t number, uint32_t index, uint32_t shared_bytes) {
  Bytes<24> numbers{};
  std::memcpy(numbers.data + 16, &in, sizeof in);
  static char shared[64];
  thread = {index, 0, 1, shared, shared_bytes};
  try {
    kernel(numbers, number);
    return "done";
  } catch (const std::exception& error) {
    return error.what();
  }
}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("translated")
    source, library = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text(translate(PTX) + MAIN)
    include = f"-I{Path(__file__).parent / 'csrc'}"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", include]
    subprocess.run(["c++", *flags, source, "-o", library], check=True, timeout=100)
    function = ctypes.CDLL(str(library)).run
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint32]
    return function


def aligned(count, offset=0):
    """Zeros at so many bytes beyond a multiple of 16."""
    memory = np.zeros(4 * count + 32, np.uint8)
    begin = -memory.ctypes.data % 16 + offset
    return memory[begin : begin + 4 * count].view(np.float32)


@pytest.mark.parametrize("number", [-5, 5])
def test_instructions(run, number):
    memory = aligned(12)
    memory[:3] = 1 + 2.0**-12, 1 + 2.0**-12, 1.0009765625
    assert run(memory.ctypes.data, number, 3, 16) == b"done"
    assert memory[4] == 2.0**-11 + 2.0**-24  # rounded once: the product alone would lose the latter
    words = memory[8:].view(np.uint32)
    half = int(np.float16(memory[2]).view(np.uint16))
    assert words[0] == half * 0x10001
    assert words[1] == ((number >> 2) + 2**31) % 2**32
    assert words[2] == (7 if number < 0 else 9)
    assert words[3] == 10


def test_accesses_that_a_device_would_trap(run):
    odd = aligned(12, offset=4)
    assert run(odd.ctypes.data, 1, 0, 16) == b"an access is not aligned"
    memory = aligned(12)
    assert run(memory.ctypes.data, 1, 3, 15) == b"out of the shared memory"


def test_what_is_not_known_does_not_compile(tmp_path):
    source = tmp_path / "kernel.cpp"
    source.write_text(translate(PTX.replace("selp.b32", "bfind.b32")))
    include = f"-I{Path(__file__).parent / 'csrc'}"
    command = ["c++", "-std=c++20", "-fsyntax-only", include, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "op_bfind" in done.stderr
