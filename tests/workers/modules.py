"""Modules for worker processes, which import them from here."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import struct
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Scale(nn.Module):
    """Multiplies by a parameter and an attribute."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([factor]))
        self.register_buffer("offset", torch.zeros(1))
        self.attribute = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return (
            x * self.factor.detach() * self.attribute + self.offset + (0 if self.training else 0.5)
        )


class Tied(nn.Module):
    """Two layers of one weight, and a view of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        assert self.first.weight is self.second.weight
        with torch.no_grad():
            self.first.weight += 1  # in its own memory, not in that of other processes
        return x + (self.second.weight.sum() - self.first.weight.sum())


class Pid(nn.Module):
    """The process that answers, beside the input."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.full_like(x, os.getpid(), dtype=torch.float64)


class Sleepy(nn.Module):
    """Takes the seconds that the input says."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(float(x.max()))
        return x.clone()


class Stuck(nn.Module):
    """Waits in compiled code where the input is not 0, so that no other thread can run."""

    def forward(self, x: Tensor) -> Tensor:
        ctypes.PyDLL(None).sleep(int(x.max()))
        return x.clone()


class Greedy(nn.Module):
    """Computes in compiled code for some seconds, so that no other thread can run."""

    def forward(self, x: Tensor) -> Tensor:
        end = time.monotonic() + float(x.max())
        while (left := end - time.monotonic()) > 0:
            sum(range(int(max(left, 0.1) * 1e8)))  # about as many seconds at once
        return x.clone()


class Exits(nn.Module):
    """Ends its process where the input is 1."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x == 1).any()):
            sys.exit(7)
        return x.clone()


class Unreadable(nn.Module):
    """Returns what can be pickled, and not be read."""

    def forward(self, x: Tensor) -> Any:
        return Trap()


class Unpicklable(nn.Module):
    """Returns what cannot be pickled."""

    def forward(self, x: Tensor) -> Any:
        return lambda: x


class TwoPartsError(Exception):
    """Has other arguments than it keeps."""

    def __init__(self, first: str, second: Any) -> None:
        super().__init__(f"{first} {second}")
        self.first, self.second = first, second


class Raises(nn.Module):
    """Raises an exception that cannot be made from its arguments; of 1, not with its state."""

    def forward(self, x: Tensor) -> Tensor:
        raise TwoPartsError("first", (lambda: x) if bool((x == 1).any()) else "second")


class Remembers(nn.Module):
    """Returns the input of the call before, which it has kept, and the present one."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        # Sparse tensors can be sent, too.
        self.register_buffer("matrix", torch.tensor([[0.0, 1.0], [1.0, 0.0]]).to_sparse())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.matrix.is_sparse
        last, self.last = self.last, x
        return x if last is None else last, x


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return _spring, ()


def _spring() -> None:
    raise ValueError("the trap is sprung")


class Poison(nn.Module):
    """Ends the process that loads it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        os._exit(3)


class Heavy(nn.Module):
    """Takes a second to arrive, as one whose packages have to be imported."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        time.sleep(1.0)
        super().__setstate__(state)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Random(nn.Module):
    """A number of each generator that modules use, for every row."""

    def forward(self, x: Tensor) -> Tensor:
        rows = [(torch.rand(()).item(), random.random(), np.random.rand()) for _ in x]
        return torch.tensor(rows, dtype=torch.float64)


class Garbles(nn.Module):
    """Writes what nobody understands to the connections of its process."""

    def forward(self, x: Tensor) -> Tensor:
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                sock = socket.socket(fileno=os.dup(int(name)))
                sock.send(struct.pack("<qqqqQq", 5, 0, 10, 3, 0, 0))
        time.sleep(3600)
        return x


class FailsOn(nn.Module):
    """Raises, ends its process or hangs at inputs that hold a value; else twice the input."""

    def __init__(self, value: float, how: str) -> None:
        super().__init__()
        self.value, self.how = value, how

    def forward(self, x: Tensor) -> Tensor:
        if bool((x == self.value).any()):
            if self.how == "raise":
                raise ValueError(f"{self.value:g} is not to be had, in {len(x)} rows")
            if self.how == "segfault":
                signal.raise_signal(signal.SIGSEGV)
            time.sleep(3600)
        return 2.0 * x
