"""Modules for worker processes, which import them from here."""

import contextlib
import ctypes
import os
import random
import signal
import socket
import struct
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..nn.modules import Call


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


class Views(nn.Module):
    """A buffer, a view of it that begins elsewhere, and a view of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("work", torch.zeros(128, 8))
        self.register_buffer("left", self.work[1:, 4:].t())
        self.register_buffer("turn", torch.tensor([1j, 1.0]))
        self.register_buffer("back", self.turn.conj())

    def forward(self, x: Tensor) -> Tensor:
        self.work[1 : len(x) + 1].copy_(x)
        turned = (self.turn * self.back).real.sum()
        return self.left.t()[: len(x)] * turned


def pid(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the process that answers, beside the input."""
    return x, torch.full_like(x, os.getpid(), dtype=torch.float64)


def sleep(x: Tensor) -> Tensor:
    """Take the seconds that the input says."""
    time.sleep(float(x.max()))
    return x.clone()


def stick(x: Tensor) -> Tensor:
    """Wait in compiled code for as many seconds, so that no other thread can run."""
    ctypes.PyDLL(None).sleep(int(x.max()))
    return x.clone()


def grab(x: Tensor) -> Tensor:
    """Compute in compiled code for as many seconds, so that no other thread can run."""
    end = time.monotonic() + float(x.max())
    while (left := end - time.monotonic()) > 0:
        sum(range(int(max(left, 0.1) * 1e8)))  # about as many seconds at once
    return x.clone()


def leave(x: Tensor) -> Tensor:
    """End the process where the input is 1."""
    if bool((x == 1).any()):
        sys.exit(7)
    return x.clone()


def give_trap(x: Tensor) -> Any:
    """Return what can be pickled, and not be read."""
    return Trap()


def give_function(x: Tensor) -> Any:
    """Return what cannot be pickled."""
    return lambda: x


class TwoPartsError(Exception):
    """Has other arguments than it keeps."""

    def __init__(self, first: str, second: Any) -> None:
        super().__init__(f"{first} {second}")
        self.first, self.second = first, second


def fail(x: Tensor) -> Tensor:
    """Raise an exception that cannot be made from its arguments; of 1, not with its state."""
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
    """Is packed or loaded once a folder has a file "open", where it notes that it waits for it."""

    def __init__(self, folder: str, when: str = "loaded") -> None:
        super().__init__()
        self.folder, self.when = Path(folder), when

    def wait(self, when: str) -> None:
        if when == self.when:
            (self.folder / f"{when}-{os.getpid()}").touch()
            end = time.monotonic() + 60.0
            while not (self.folder / "open").exists():
                assert time.monotonic() < end
                time.sleep(0.002)

    def __getstate__(self) -> dict[str, Any]:
        self.wait("packed")
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.wait("loaded")

    def forward(self, x: Tensor) -> Tensor:
        return x


def double(x: Tensor) -> Tensor:
    """Return twice the input, plus 1."""
    return 2 * x + 1


def draw(x: Tensor) -> Tensor:
    """Return a number of each generator that modules use, for every row."""
    rows = [(torch.rand(()).item(), random.random(), np.random.rand()) for _ in x]
    return torch.tensor(rows, dtype=torch.float64)


def garble(x: Tensor) -> Tensor:
    """Write what nobody understands to the connections of the process."""
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


Pid, Sleepy, Stuck, Greedy = (partial(Call, f) for f in (pid, sleep, stick, grab))
Unreadable, Unpicklable, Raises = (partial(Call, f) for f in (give_trap, give_function, fail))


class Seeds(Call):
    """Random numbers of a script that seeds them when a worker imports it."""

    def __init__(self) -> None:
        super().__init__(draw)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)


Exits, Random, Garbles, Doubled = (partial(Call, f) for f in (leave, draw, garble, double))


class PacksLate(nn.Module):
    """Is packed once the gate is open; workers get it without the gate."""

    gate: Any = None

    def __getstate__(self):
        assert self.gate.wait(120)
        return {**vars(self), "gate": None}

    def forward(self, x):
        return 2 * x
