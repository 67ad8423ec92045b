"""Kernels are used once they have been right. tests/test_accelerator.py runs this."""

import contextlib
import ctypes
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from coded_torch import _extension, linear, ops
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
    mode = ctypes.c_int(0)  # of captures, the default
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    assert mode.value == 0
    assert not list(cache.glob("*"))  # no mark, which would blame the kernel
    driver.driver_fault(b"")
    ops.spline_apply(*operands)
    assert is_used(*operands)
    assert not _extension.CUDA_FAILURES


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
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
    # Who finds the other's trial running tries it in a later call.
    said = {process.communicate()[0] for process in both}
    assert {"True\n"} <= said <= {"True\n", "None\n"}
    assert seen == {the_file(cache).stat().st_ino}


def forked(function, *arguments):
    """Run a trial in a forked process; return its result, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            os._exit(RESULTS.index(function(*arguments)))
        except BaseException:
            traceback.print_exc()
            os._exit(len(RESULTS))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code < 0 else RESULTS[code]


RESULTS = [False, True, None]


def try_it():
    return _extension._try_kernel(0, UNTOUCHED)


def steps_of_a_trial(act):
    """Try the kernel, and call `act` with the number of each line of _extension.py that runs."""
    numbers = itertools.count()

    def trace(frame, event, _):
        if frame.f_code.co_filename == _extension.__file__ and event == "line":
            act(next(numbers))
        return trace

    threading.settrace(trace)  # of the trial's thread
    try:
        return try_it()
    finally:
        threading.settrace(None)


def killed_at(step):
    return steps_of_a_trial(lambda number: number == step and os.kill(os.getpid(), signal.SIGKILL))


POINTS = 10


@pytest.mark.filterwarnings("ignore:.*fork")
def test_after_one_killed_trial_it_is_tried_again_and_after_two_no_more(cache):
    numbers = []
    assert steps_of_a_trial(numbers.append)
    marked = 0
    for point in range(POINTS):
        step = len(numbers) * point // POINTS
        assert forked(killed_at, step) == -signal.SIGKILL
        assert forked(try_it)
        assert {lock.read_text() for lock in cache.glob("*.lock")} <= {""}
        for _ in range(2):
            assert forked(killed_at, step) == -signal.SIGKILL
        if is_marked := any(lock.read_text() for lock in cache.glob("*.lock")):
            assert_it_is_off(cache)
        marked += is_marked
        assert forked(try_it)
        shutil.rmtree(cache)
    assert POINTS // 2 <= marked < POINTS


def assert_it_is_off(cache):
    _extension.CUDA_FAILURES.clear()
    (lock,) = cache.glob("*.lock")
    with pytest.warns(RuntimeWarning, match=rf"ended 2 processes, .*; remove {lock} to try again"):
        assert not try_it()
    assert lock.read_text()[0] == "2"
    lock.unlink()


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("differs", ["boot", "driver", "torch", "package"])
def test_a_kernel_that_is_off_is_tried_again_where_the_machine_differs(
    differs, cache, tmp_path, monkeypatch
):
    boot = tmp_path / "boot"
    boot.write_text("one\n")
    monkeypatch.setattr(_extension, "_MACHINE", (boot,))
    driver.driver_fault(b"killed")
    for _ in range(2):
        assert forked(try_it) == -signal.SIGKILL
    driver.driver_fault(b"another driver" if differs == "driver" else b"")
    if differs == "boot":
        boot.write_text("another\n")
    elif differs == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    elif differs == "package":
        monkeypatch.setattr(_extension, "version", lambda package: "99.0")
    assert try_it()


@pytest.mark.filterwarnings("ignore:.*fork")
def test_while_another_process_tries_a_kernel_a_call_falls_back_and_nothing_is_counted(
    cache, monkeypatch
):
    operands = problem(torch.float32, "cuda:1")
    compares, ends = os.pipe(), os.pipe()
    compare = _extension._compare

    def slow(*arguments):
        os.write(compares[1], b".")
        os.read(ends[0], 1)
        return compare(*arguments)

    child = os.fork()
    if child == 0:
        signal.alarm(60)
        _extension._compare = slow
        ops.spline_apply(*operands)
        os._exit(0 if not _extension.CUDA_FAILURES else 1)
    assert os.read(compares[0], 1) == b"."
    before = time.monotonic()
    assert not is_used(*operands)
    assert time.monotonic() - before < 20  # it did not wait for the lock
    os.write(ends[1], b".")
    assert os.waitpid(child, 0)[1] == 0
    assert not _extension.CUDA_FAILURES
    assert is_used(*operands) or is_used(*operands)
    for end in (*compares, *ends):
        os.close(end)


def on_a_full_disk():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return try_it()


@pytest.mark.filterwarnings("ignore:.*fork")
def test_on_a_full_disk_a_kernel_is_tried_without_a_mark(cache):
    assert forked(on_a_full_disk)
    assert not list(cache.glob("*.kernel"))
    assert {lock.read_text() for lock in cache.glob("*.lock")} == {""}
    driver.driver_fault(b"killed")
    assert forked(try_it) == -signal.SIGKILL
    driver.driver_fault(b"")
    assert forked(on_a_full_disk)
    assert try_it()


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_cache_that_cannot_be_written_costs_a_compilation(monkeypatch):
    nobody = 65534

    def as_nobody():
        if os.geteuid() == 0:  # whom no mode of a folder stops
            os.chown(folder, nobody, nobody)
            os.setuid(nobody)
        os.chmod(folder, 0o500)
        return try_it()

    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = Path(parent) / "coded_torch"
        folder.mkdir()
        monkeypatch.setenv("XDG_CACHE_HOME", parent)
        assert forked(as_nobody)
        assert not any(folder.iterdir())


def test_a_kernel_that_does_not_end_is_a_failed_trial(cache, monkeypatch):
    class Endless(torch.cuda.Stream):
        def record_event(self):
            return SimpleNamespace(query=lambda: False)

    monkeypatch.setattr(torch.cuda, "Stream", Endless)
    monkeypatch.setattr(_extension, "_MOST_SECONDS", 0.1)
    fails(UNTOUCHED, "it did not end within 0 s")
    assert [lock.read_text()[0] for lock in cache.glob("*.lock")] == ["1", "1"]


def test_where_warnings_are_errors_a_trial_passes_and_a_fallback_is_logged(caplog):
    operands = problem(torch.float16, "cuda:1", knots=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert try_it()
        driver.driver_fault(b"wrong")
        assert not _extension._try_kernel(1, UNTOUCHED)
        ops.spline_apply(*operands)
    (record,) = caplog.records
    assert (
        "torch's operators compute instead of CUDA kernels, because sweep_float32" in record.message
    )


@pytest.fixture
def small_timing(monkeypatch):
    """Sizes at which the host runs kernels in milliseconds, and no device that was timed before."""
    monkeypatch.setattr(linear, "_KNOTS", None)
    monkeypatch.setattr(linear, "_TIMED", ((4, 5), (8, 10), (16, 20)))
    monkeypatch.setattr(linear, "_TIMED_BYTES", 1 << 12)
    monkeypatch.setattr(linear, "_TIMED_COLUMNS", 8)
    monkeypatch.setattr(linear, "_times", {})


@pytest.mark.usefixtures("small_timing")
def test_a_card_is_timed_once_and_decides(cache):
    map = SplineMap(np.linspace(0, 1, 17), np.linspace(0, 1, 20))
    values = torch.randn(17, 20, device="cuda:0")
    state = torch.get_rng_state()
    map(values)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's numbers stay the same
    ((key, times),) = linear._times.items()
    assert key == (0, torch.float32)
    assert all(kernel > 0 and cublas > 0 for kernel, cublas in times)
    # The emulator takes far longer than torch's product.
    before = driver.driver_launches()
    want = map(values)
    assert driver.driver_launches() == before
    linear._times.clear()
    assert torch.equal(map(values), want)
    assert linear._times == {key: times}  # read, not timed again
    assert driver.driver_launches() == before
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(map(values), want)
    finally:
        torch.use_deterministic_algorithms(False)
    assert driver.driver_launches() > before


MANY = 1 << 62


@pytest.mark.parametrize(
    ("ratios", "knots"),
    [
        ((0.5, 0.9, 1.09), []),
        ((0.5, 1.0, 1.5), [(178, MANY)]),
        ((1.2, 1.2, 1.2), [(1, MANY)]),
        ((0.5, 2.0, 0.5), [(71, 232)]),
        ((2.0, 0.5, 2.0), [(1, 58), (282, MANY)]),
    ],
)
def test_between_the_sizes_timed_the_border_is_interpolated(ratios, knots):
    times = tuple((ratio * 1e-3, 1e-3) for ratio in ratios)
    assert linear.slower_kernels(times) == tuple(knots)


@pytest.mark.usefixtures("small_timing")
def test_where_a_fallback_would_be_timed_kernels_decide(cache, monkeypatch):
    monkeypatch.setattr(linear, "launches", lambda device: {"product_float32": 0})
    assert linear.cublas_ranges(1, torch.float32) == ()
    assert linear._times == {(1, torch.float32): ()}
    assert not [path for path in cache.glob("*.kernel") if b"times of" in path.read_bytes()]


def test_the_user_says_where_cublas_takes_over(monkeypatch):
    monkeypatch.setenv("CODED_TORCH_CUBLAS_KNOTS", "50")
    monkeypatch.setattr(linear, "_KNOTS", linear._knots_by_user())
    assert linear.cublas_ranges(0, torch.float16) == ((51, MANY),)
    monkeypatch.setenv("CODED_TORCH_CUBLAS_KNOTS", "many")
    with pytest.raises(ValueError, match="must be an integer of at least 0, got 'many'"):
        linear._knots_by_user()
