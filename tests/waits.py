"""What the host launches on a device, and where it waits, which lets neither work ahead."""

import contextlib
import warnings
from collections import Counter

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that run nothing on a device.
_RUN_NOTHING = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "_unsafe_view",
    "record_stream",
}
# How often operators that take several tensors launch: fill with zeros, add up, and join.
_LAUNCHES = {"_foreach_norm": 3}


@contextlib.contextmanager
def sync_debug_mode(mode):
    """Let torch warn of waits in a block, or refuse them. That it is a prototype it says once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def host_waits():
    """Count the waits of a block by the line of Python that waits, "file:line"."""
    lines = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sync_debug_mode("warn"):
            yield lines
    for warning in caught:
        if "called a synchronizing CUDA operation" in str(warning.message):
            lines["/".join(warning.filename.split("/")[-2:]) + f":{warning.lineno}"] += 1


class Launches(TorchDispatchMode):
    """The operators that run on a device, or copy from or to it, in the thread that calls."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        is_view = any(r.alias_info and not r.alias_info.is_write for r in operator._schema.returns)
        tensors = pytree.tree_leaves((args, kwargs, result))
        on_device = any(isinstance(x, torch.Tensor) and x.is_cuda for x in tensors)
        if on_device and not is_view and name not in _RUN_NOTHING:
            self.names += [name] * _LAUNCHES.get(name, 1)
        return result
