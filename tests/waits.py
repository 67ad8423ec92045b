"""Where the host waits for a device, which lets neither work ahead."""

import contextlib
import warnings
from collections import Counter

import torch


@contextlib.contextmanager
def host_waits():
    """Count the waits of a block by the line of Python that waits, "file:line"."""
    lines = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "called a synchronizing CUDA operation" in str(warning.message):
            lines["/".join(warning.filename.split("/")[-2:]) + f":{warning.lineno}"] += 1
