"""Let a CPU build of torch have two CUDA devices, and fail tests that would race on real ones.

Give it to pytest by `-p`, so that it comes before torch, which looks for CUDA only once.
`CODED_TORCH_ACCELERATOR` names the folder of the libraries that build.py makes.
"""

import ctypes
import importlib.util
import os
import sys
import sysconfig
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

TORCH = Path(importlib.util.find_spec("torch").origin).parent
STANDARD = sysconfig.get_path("stdlib")
SYNC_DEBUG_MODES = ["default", "warn", "error"]
# What torch's builds for CUDA warn of once, whatever the mode.
unsaid = [
    "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing "
    "operations"
]

assert "torch" not in sys.modules
ctypes.CDLL(str(TORCH / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
FOLDER = Path(os.environ["CODED_TORCH_ACCELERATOR"])
DEVICES = int(os.environ.get("CODED_TORCH_ACCELERATOR_DEVICES", "2"))
library = ctypes.CDLL(str(FOLDER / "libaccelerator.so"), mode=ctypes.RTLD_GLOBAL)
driver = ctypes.CDLL(str(FOLDER / "libcuda.so.1"))
library.accelerator_take_reports.restype = ctypes.c_char_p

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

sites: dict[tuple[str, ...], ctypes.Array] = {}


@ctypes.CFUNCTYPE(ctypes.c_void_p)
def site() -> int:
    """The innermost lines of the package and the tests, as a C string that is kept."""
    lines, frame = [], sys._getframe(0)
    while frame is not None and len(lines) < 3:
        path = frame.f_code.co_filename
        if not path.startswith(("<", __file__, STANDARD)) and "/site-packages/" not in path:
            lines.append(f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno}")
        frame = frame.f_back
    key = tuple(lines)
    if key not in sites:
        text = " < ".join(lines) or "a thread of autograd's"
        sites[key] = ctypes.create_string_buffer(text.encode())
    return ctypes.addressof(sites[key])


library.accelerator_set_site(site)


class Stream(torch.Stream):
    """`torch.cuda.Stream`, which a CPU build of torch does not have."""

    def __new__(cls, device=None, **kwargs):
        return super().__new__(cls, **(kwargs or {"device": as_device(device)}))

    @property
    def cuda_stream(self):
        return self.stream_id


def as_device(device) -> torch.device:
    """The device of what `torch.cuda` takes for one: None and "cuda" mean the current one."""
    device = torch.device("cuda" if device is None else device)
    return torch.device(
        "cuda", torch.accelerator.current_device_index() if device.index is None else device.index
    )


def current_stream(device=None) -> Stream:
    stream = torch.accelerator.current_stream(as_device(device))
    return Stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )


class Graph(TorchDispatchMode):
    """A graph that runs the operators of its capture again, into the same results."""

    capturing = False

    def capture_begin(self, *_, **__):
        self.calls = []
        Graph.capturing = True
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)
        Graph.capturing = False
        torch.accelerator.synchronize()  # on a real device nothing has run yet, which could race

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result

    def replay(self):
        for operator, args, kwargs, result in self.calls:
            again = operator(*args, **kwargs)
            if isinstance(result, torch.Tensor) and again.data_ptr() != result.data_ptr():
                result.copy_(again)


def clone_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """By tensors, as a CPU build of torch has no storages elsewhere."""
    if storage.device.type == "cpu":
        return clone_on_host(storage)
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return whole.set_(storage, 0, (storage.nbytes(),), (1,)).clone().untyped_storage()


clone_on_host = torch.UntypedStorage.clone
torch.UntypedStorage.clone = clone_storage
torch.version.cuda = "13.0"
cuda = torch.cuda
cuda.is_available = cuda.is_initialized = cuda.is_bf16_supported = lambda *_, **__: True
cuda._lazy_init = cuda.init = cuda.empty_cache = cuda._sleep = lambda *_: None
cuda.is_current_stream_capturing = lambda: Graph.capturing
cuda.get_rng_state = lambda *_: torch.empty(0, dtype=torch.uint8)  # as the compiler keeps it
cuda.set_rng_state = lambda *_: None
cuda.device_count = lambda: DEVICES
cuda.current_device = torch.accelerator.current_device_index
cuda.set_device = lambda device: torch.accelerator.set_device_index(as_device(device))
cuda.device = lambda device: torch.accelerator.device_index(as_device(device).index)
cuda.synchronize = lambda device=None: torch.accelerator.synchronize(as_device(device))
cuda.Stream = Stream
cuda.current_stream = current_stream
cuda.stream = lambda stream: stream  # it is a context itself
cuda.Event = lambda **options: torch.Event("cuda", **options)
cuda.get_device_properties = lambda device=None: SimpleNamespace(
    name="a pretended accelerator",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
)
cuda.CUDAGraph = Graph
torch._C._host_emptyCache = lambda: None
cuda.get_device_name = lambda device=None: "a pretended accelerator"
cuda.get_device_capability = lambda device=None: (9, 0)
cuda.get_sync_debug_mode = lambda: library.accelerator_get_sync_debug()


def set_sync_debug_mode(mode) -> None:
    number = SYNC_DEBUG_MODES.index(mode) if isinstance(mode, str) else mode
    library.accelerator_set_sync_debug(number)
    while unsaid:
        warnings.warn(unsaid.pop(), UserWarning, stacklevel=2)


cuda.set_sync_debug_mode = set_sync_debug_mode


def take_reports() -> str:
    return library.accelerator_take_reports().decode()


@pytest.fixture(autouse=True)
def _no_races():
    yield
    if reports := take_reports():
        pytest.fail(f"a real device may do this in another order:\n{reports}", pytrace=False)


def pytest_sessionfinish(session):
    """Fail for what was freed after the last test, too."""
    if reports := take_reports():
        print(reports)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
