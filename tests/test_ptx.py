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
# Every thread writes its number, meets the others if the parameter says so, reads a neighbour's.
MEETING = """\
.extern .shared .align 16 .b8 shared[];

.visible .entry meeting(
	.param .u64 meeting_param_0,
	.param .u32 meeting_param_1
)
.maxntid 4, 1, 1
{
	.reg .pred 	%p<4>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<5>;

	ld.param.u64 	%rd1, [meeting_param_0];
	ld.param.u32 	%r1, [meeting_param_1];
	mov.u32 	%r2, %tid.x;
	shl.b32 	%r3, %r2, 2;
	mov.u32 	%r4, shared;
	add.s32 	%r5, %r4, %r3;
	st.shared.u32 	[%r5], %r2;
	setp.eq.s32 	%p1, %r1, 0;
	@%p1 bra 	$L__BB0_2;
	setp.gt.s32 	%p2, %r1, %r2;
	@%p2 bra 	$L__BB0_1;
	setp.eq.s32 	%p3, %r1, 2;
	@%p3 bra 	$L__BB0_3;
	bar.sync 	0;
	bra.uni 	$L__BB0_2;
$L__BB0_1:
	bar.sync 	0;
$L__BB0_2:
	xor.b32 	%r6, %r3, 4;
	add.s32 	%r7, %r4, %r6;
	ld.shared.u32 	%r8, [%r7];
	mul.wide.u32 	%rd2, %r2, 4;
	add.s64 	%rd3, %rd1, %rd2;
	st.global.u32 	[%rd3], %r8;
$L__BB0_3:
	ret;
}
"""
MAIN = """
extern "C" void kernel(Bytes<24> numbers, uint64_t number);
extern "C" void meeting(uint64_t out, uint32_t meeting);
template <class Run>
static const char* attempt(const Run& run) {
  static std::string failure;
  try {
    run();
    return "done";
  } catch (const std::exception& error) {
    return (failure = error.what()).c_str();
  }
}
extern "C" const char* run(char* in, int64_t number, uint32_t threads, uint32_t shared_bytes) {
  Bytes<24> numbers{};
  std::memcpy(numbers.data + 16, &in, sizeof in);
  return attempt([&] { run_grid(&kernel, 1, threads, shared_bytes, numbers, number); });
}
extern "C" const char* meet(char* out, uint32_t until, uint32_t threads) {
  const auto address = reinterpret_cast<uint64_t>(out);
  return attempt([&] { run_grid(&meeting, 1, threads, 16, address, until); });
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("translated")
    source, library = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text(translate(PTX) + translate(MEETING).replace("constexpr", "//") + MAIN)
    include = f"-I{Path(__file__).parent / 'csrc'}"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", include]
    subprocess.run(["c++", *flags, source, "-o", library], check=True, timeout=100)
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype = loaded.meet.restype = ctypes.c_char_p
    loaded.run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint32]
    loaded.meet.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32]
    return loaded


@pytest.fixture
def run(library):
    return library.run


def aligned(count, offset=0):
    """Zeros at so many bytes beyond a multiple of 16."""
    memory = np.zeros(4 * count + 32, np.uint8)
    begin = -memory.ctypes.data % 16 + offset
    return memory[begin : begin + 4 * count].view(np.float32)


@pytest.mark.parametrize("number", [-5, 5])
def test_instructions(run, number):
    memory = aligned(12)
    memory[:3] = 1 + 2.0**-12, 1 + 2.0**-12, 1.0009765625
    assert run(memory.ctypes.data, number, 1, 16) == b"done"
    assert memory[4] == 2.0**-11 + 2.0**-24  # rounded once: the product alone would lose the latter
    words = memory[8:].view(np.uint32)
    half = int(np.float16(memory[2]).view(np.uint16))
    assert words[0] == half * 0x10001
    assert words[1] == ((number >> 2) + 2**31) % 2**32
    assert words[2] == (7 if number < 0 else 9)
    assert words[3] == 10


def test_accesses_that_a_device_would_trap(run):
    odd = aligned(12, offset=4)
    assert run(odd.ctypes.data, 1, 1, 16) == b"an access is not aligned"
    memory = aligned(12)
    assert run(memory.ctypes.data, 1, 4, 15) == b"out of the shared memory"
    assert run(memory.ctypes.data, 1, 129, 1024) == b"more threads than the launch bounds allow"


def test_threads_meet_at_barriers(library):
    memory = aligned(4).view(np.uint32)
    assert library.meet(memory.ctypes.data, 4, 4) == b"done"
    assert memory.tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize(
    ("until", "failure"),
    [
        (0, b"two threads use a word of shared memory with no barrier between"),
        (2, b"a thread ends while others wait at a barrier"),
        (3, b"threads wait at different barriers"),
    ],
)
def test_threads_that_do_not_meet(library, until, failure):
    memory = aligned(4)
    assert library.meet(memory.ctypes.data, until, 4) == failure
    assert library.meet(memory.ctypes.data, 4, 4) == b"done"  # the next block is not affected


def test_what_is_not_known_does_not_compile(tmp_path):
    source = tmp_path / "kernel.cpp"
    source.write_text(translate(PTX.replace("selp.b32", "bfind.b32")))
    include = f"-I{Path(__file__).parent / 'csrc'}"
    command = ["c++", "-std=c++20", "-fsyntax-only", include, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "op_bfind" in done.stderr
