"""Kernels are used once they have been right. tests/test_accelerator.py runs this."""

import contextlib
import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from coded_torch import _extension, ops
from coded_torch.cli.main import _try_kernels
from coded_torch.linear import SplineMap
from tests.accelerator.plugin import driver, library

from ..test_ops import make_plan

pytestmark = pytest.mark.cuda
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
UNTOUCHED = 5  # a number that no test uses through the operator


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, no fault and no failure."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _extension.CUDA_FAILURES.clear()
    yield tmp_path / "coded_torch"
    driver.driver_fault(b"")


def is_used(*operands, **options):
    before = driver.driver_launches()
    ops.spline_apply(*operands, **options)
    return driver.driver_launches() > before


def problem(dtype, device, matrix=False, knots=9):
    coefficients, schedule, _ = make_plan(knots, dtype)
    if matrix:
        coefficients = ops.with_matrix(coefficients, schedule)
    return [t.to(device) for t in (torch.randn(knots, 3, 20).to(dtype), coefficients, schedule)]


def the_file(cache):
    (path,) = cache.glob("*.kernel")
    return path


# The first test, as a device that was found stays.
def test_without_a_driver_of_cuda():
    operands = problem(torch.float64, "cuda:1")
    driver.driver_fault(b"no device")
    with pytest.warns(RuntimeWarning, match="because cuInit: no CUDA-capable device") as caught:
        first = ops.spline_apply(*operands)
    assert len(caught) == len(_extension.CUDA_FAILURES) == 1
    assert torch.equal(ops.spline_apply(*operands), first)
    assert len(_extension.CUDA_FAILURES) == 1


def test_without_a_current_stream():
    """Such as of a torch that takes another vendor's devices for CUDA's."""
    operands = problem(torch.float64, "cuda:1")
    has_streams = ctypes.c_bool.in_dll(library, "accelerator_has_streams")
    has_streams.value = False
    try:
        with pytest.warns(RuntimeWarning, match="torch gives no current stream"):
            ops.spline_apply(*operands)
    finally:
        has_streams.value = True


def fails(number, match):
    """Try a kernel that fails; return the reason."""
    with pytest.warns(RuntimeWarning, match=match):
        assert not _extension._try_kernel(0, number)
    assert not _extension._try_kernel(1, number)  # the second failure is not warned of
    assert len(_extension.CUDA_FAILURES) == 2
    return _extension.CUDA_FAILURES[0]


# By machine code, and two by PTX.
@pytest.mark.parametrize(("number", "device"), [*((n, 0) for n in range(30)), (5, 1), (22, 1)])
def test_every_kernel_passes_and_the_next_process_compiles_nothing(number, device, cache):
    assert _extension._try_kernel(device, number)
    path = the_file(cache)
    architecture = [b"gpu-architecture=sm_90 ", b"gpu-architecture=compute_"][device]
    assert architecture in path.read_bytes()
    before = path.stat()
    assert _extension._try_kernel(device, number)
    assert the_file(cache).stat().st_ino == before.st_ino


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (b"wrong", "its results differ from torch's by "),
        (b"launch", "cuLaunchKernel: too many resources requested for launch"),
        (b"no binary", "cuModuleLoadData: no kernel image is available for this device"),
    ],
)
def test_a_kernel_that_fails_is_not_used(fault, reason, cache):
    driver.driver_fault(fault)
    assert reason in fails(UNTOUCHED, f"sweep_float32_transposed on cuda:0: {reason}")
    # The next process tries again.
    assert {lock.read_text() for lock in cache.glob("*.lock")} == {""}
    driver.driver_fault(b"")
    assert _extension._try_kernel(0, UNTOUCHED)


def test_without_nvrtc(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    fails(UNTOUCHED, "libnvrtc.so.99 was not found")


@pytest.mark.parametrize("matrix", [False, True])
def test_the_operator_falls_back_for_good(matrix):
    operands = problem(torch.float16, "cuda:1", matrix)
    want = _extension.spline_apply(*operands, False)
    driver.driver_fault(b"wrong")
    with pytest.warns(RuntimeWarning, match="torch's operators compute instead") as caught:
        assert torch.equal(ops.spline_apply(*operands), want)
    assert len(caught) == 1
    driver.driver_fault(b"")
    assert torch.equal(ops.spline_apply(*operands), want)
    assert not is_used(*operands)
    # Plans that reach the device from now on have a matrix, so that the host does not compute.
    map = SplineMap(np.linspace(0, 1, 300), np.linspace(0, 1, 300))
    assert map._operands(operands[0])[0].shape[1] > 300 * 300


def test_while_a_graph_is_captured_an_untried_kernel_is_not_used():
    operands = problem(torch.float64, "cuda:0", matrix=True)
    driver.driver_fault(b"capturing")
    want = ops.spline_apply(*operands)
    assert not is_used(*operands)
    driver.driver_fault(b"")
    torch.testing.assert_close(ops.spline_apply(*operands), want)
    driver.driver_fault(b"capturing")
    assert is_used(*operands)
    assert not _extension.CUDA_FAILURES


def test_threads_that_come_while_a_kernel_is_tried_do_not_wait_for_it():
    operands = problem(torch.float32, "cuda:0")
    torch.cuda.synchronize()
    results, together = [], threading.Barrier(4)

    def call():
        together.wait()
        results.append(ops.spline_apply(*operands))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    for result in results:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=0)
    assert is_used(*operands)


def test_an_error_before_a_trial_is_the_callers_own(cache):
    operands = problem(torch.bfloat16, "cuda:1", matrix=True)
    driver.driver_fault(b"trapped")
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        ops.spline_apply(*operands)
    assert not list(cache.glob("*"))  # no mark, which would blame the kernel
    driver.driver_fault(b"")
    ops.spline_apply(*operands)
    assert is_used(*operands)
    assert not _extension.CUDA_FAILURES


def test_the_callers_modes_are_nothing_to_a_trial():
    operands = problem(torch.bfloat16, "cuda:0")
    torch.cuda.set_sync_debug_mode("error")
    torch.set_default_device("cuda:1")
    try:
        ops.spline_apply(*operands)
        assert torch.cuda.get_sync_debug_mode() == 2
    finally:
        torch.set_default_device(None)
        torch.cuda.set_sync_debug_mode(0)
    assert is_used(*operands)


def half(code):
    return code[: len(code) // 2]


def flipped(code):
    return code[:-5000] + bytes([code[-5000] ^ 1]) + code[-4999:]


def of_another_version(code):
    return code.replace(b"\nNVRTC 1", b"\nNVRTC 2", 1)


@pytest.mark.parametrize("spoil", [half, flipped, of_another_version, lambda code: b""])
def test_a_file_that_is_not_whole_or_not_this_kernels_is_compiled_again(spoil, cache):
    assert _extension._try_kernel(0, UNTOUCHED)
    path = the_file(cache)
    whole = path.read_bytes()
    assert spoil(whole) != whole
    path.write_bytes(spoil(whole))
    assert _extension._try_kernel(0, UNTOUCHED)
    assert path.read_bytes() == whole


def test_nothing_is_read_where_others_write(cache):
    cache.mkdir()
    cache.chmod(0o777)
    assert _extension._try_kernel(0, UNTOUCHED)
    assert not any(cache.iterdir())


def test_a_file_in_the_place_of_the_cache_costs_a_compilation(cache):
    cache.write_text("")
    assert _extension._try_kernel(0, UNTOUCHED)
    assert not _extension.CUDA_FAILURES


def test_the_cache_is_bounded(cache):
    cache.mkdir(mode=0o700)
    old = cache / "old.kernel"
    with old.open("wb") as file:
        file.truncate(65 << 20)
    assert _extension._try_kernel(0, UNTOUCHED)
    assert not old.exists()
    assert the_file(cache)


TRY = "import tests.accelerator.plugin; from coded_torch import _extension; "
TRY += f"print('ready', flush=True); input(); print(_extension._try_kernel(0, {UNTOUCHED}))"
HOLD = "import fcntl, sys, time; lock = open(sys.argv[1]); fcntl.flock(lock, fcntl.LOCK_EX); "
HOLD += "print('held', flush=True); time.sleep(100)"


def python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)


def waits_for(process, lock):
    """Whether a process has opened a lock, which is not free, within 100 s."""
    for _ in range(1000):
        with contextlib.suppress(FileNotFoundError):  # of a file that it has closed meanwhile
            if str(lock) in map(os.readlink, Path(f"/proc/{process.pid}/fd").iterdir()):
                return True
        time.sleep(0.1)
    return False


def test_of_two_processes_one_compiles_after_one_that_was_killed(cache):
    assert _extension._try_kernel(0, UNTOUCHED)
    (lock,) = cache.glob("*.lock")
    holds = python(HOLD, lock)
    assert holds.stdout.readline() == "held\n"
    the_file(cache).unlink()
    both, seen = [python(TRY), python(TRY)], set()
    assert [process.stdout.readline() for process in both] == ["ready\n", "ready\n"]
    for process in both:  # at once, as a process waits for 30 s
        process.stdin.write("\n")
        process.stdin.flush()
    assert all(waits_for(process, lock) for process in both)
    holds.kill()
    holds.communicate()
    while any(process.poll() is None for process in both):
        seen.update(path.stat().st_ino for path in cache.glob("*.kernel"))
        time.sleep(0.01)
    assert [process.communicate()[0] for process in both] == ["True\n", "True\n"]
    assert seen == {the_file(cache).stat().st_ino}


def test_a_trial_that_never_ended_is_not_repeated(cache, monkeypatch):
    class Dead(torch.cuda.Stream):
        def synchronize(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", Dead)
        driver.driver_fault(b"launch")
        with pytest.warns(RuntimeWarning, match="an illegal memory access"):
            assert not _extension._try_kernel(0, UNTOUCHED)
    driver.driver_fault(b"")
    _extension.CUDA_FAILURES.clear()
    with pytest.warns(RuntimeWarning, match=r"never ended in another process; remove .*\.lock"):
        assert not _extension._try_kernel(0, UNTOUCHED)
    (lock,) = cache.glob("*.lock")
    lock.unlink()
    assert _extension._try_kernel(0, UNTOUCHED)


def test_info_tries_and_times_all_kernels(capsys, monkeypatch):
    monkeypatch.setattr("coded_torch.cli.main._CALLS", 1)
    _try_kernels(shrink=1000)
    lines = capsys.readouterr().out.splitlines()
    assert sum("right, 0 bytes of local memory" in line for line in lines) == 2 * 30
    times = [line.split()[-4:] for line in lines if " -> " in line]
    assert len(times) == 2 * 6
    assert all(float(number) >= 0 for row in times for number in row)
