"""The translation of PTX: what compiled kernels are run by without a GPU."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from .ptx import translate

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
extern "C" const char* meet(char* out, uint32_t until, uint32_t threads, uint32_t shared_bytes) {
  const auto address = reinterpret_cast<uint64_t>(out);
  return attempt([&] { run_grid("meeting", 1, threads, shared_bytes, address, until); });
}
"""


@pytest.fixture(scope="module")
def meet(tmp_path_factory):
    """Run a block of threads; return its failure, and what they wrote."""
    folder = tmp_path_factory.mktemp("translated")
    source, library = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text(translate(MEETING) + MAIN)
    include = f"-I{Path(__file__).parent / 'csrc'}"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", include]
    subprocess.run(["c++", *flags, source, "-o", library], check=True, timeout=100)
    run = ctypes.CDLL(str(library)).meet
    run.restype = ctypes.c_char_p
    run.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32]

    def meet(until, threads=4, shared_bytes=16, offset=0):
        memory = np.zeros(8, np.uint32)
        failure = run(memory.ctypes.data + offset, until, threads, shared_bytes)
        return failure, memory[:4].tolist()

    return meet


@pytest.mark.parametrize(
    ("arguments", "failure"),
    [
        ((0,), b"two threads use a word of shared memory with no barrier between"),
        ((2,), b"a thread ends while others wait at a barrier"),
        ((3,), b"threads wait at different barriers"),
        ((4, 4, 15), b"out of the shared memory"),
        ((4, 5, 1024), b"more threads than the launch bounds allow"),
        ((4, 4, 16, 2), b"an access is not aligned"),
    ],
)
def test_what_a_device_would_trap_or_not_order(meet, arguments, failure):
    assert meet(*arguments)[0] == failure
    assert meet(4) == (b"done", [1, 0, 3, 2])  # the next block is not affected


def test_what_is_not_known_does_not_compile(tmp_path):
    source = tmp_path / "kernel.cpp"
    source.write_text(translate(MEETING.replace("xor.b32", "bfind.b32")))
    include = f"-I{Path(__file__).parent / 'csrc'}"
    command = ["c++", "-std=c++20", "-fsyntax-only", include, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "op_bfind" in done.stderr
