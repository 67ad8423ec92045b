r"""What runs in the processes and actors of a pool."""

from __future__ import annotations

import contextlib
import gc
import pickle
import random
import signal
import socket
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..faults import kill_own_process
from ..live import Ambient
from .pickles import Pickled, TensorPickler
from .shared_memory import Connection

__all__ = [
    "FAILURE",
    "JOB",
    "LOADED",
    "MODULE",
    "READY",
    "RESULT",
    "LoadedModules",
    "remote_cause",
    "serve",
    "set_up",
]

READY, MODULE, LOADED, JOB, RESULT, FAILURE = range(6)  # kinds of messages


def serve(sock: socket.socket, device: torch.device, threads: int, seed: int) -> None:
    """Do jobs until the other side of the connection has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the caller's process
    set_up(threads, seed)
    gc.freeze()  # what is there stays, and need not be looked through again and again
    connection, modules = Connection(sock), LoadedModules(device)
    with contextlib.suppress(ConnectionError):
        connection.send(READY, 0, Pickled(None))
        while message := connection.receive():
            if message.kind == MODULE:
                modules.add(message.number, message.value)
                connection.send(LOADED, message.number, Pickled(None))
                continue
            number, answer = message.number, modules.call(message.value)
            del message  # its memory can be used again, which the answer says
            connection.send(answer[0], number, answer[1])


def set_up(threads: int, seed: int) -> None:
    """Prepare a process of a pool: its threads, and random numbers that no other process draws."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class LoadedModules:
    """The modules that a machine has been sent, or why they cannot be used; calls them.

    Args:
        device: where they compute.
        pickler: how to pickle what they return.
    """

    def __init__(self, device: torch.device, pickler: type[TensorPickler] | None = None) -> None:
        self.device = device
        self._pickler = pickler
        self._modules: dict[int, nn.Module | Pickled] = {}
        self._head = b""
        self._open: tuple[int, Ambient]

    def __contains__(self, number: int) -> bool:
        return number in self._modules

    def add(self, number: int, read: Callable[[], nn.Module]) -> None:
        """Take a module in."""
        try:
            self._modules[number] = read().to(self.device)
        except Exception as error:
            self._modules[number] = Pickled(_failure(error))

    def call(self, read: Callable[[], Any]) -> tuple[int, Pickled]:
        """Do a job: a head, a fault, and the arguments. Returns the kind of the answer, and it."""
        try:
            head, fault, arguments = read()
            module, ambient = self._look_up(head)
            if isinstance(module, Pickled):
                return FAILURE, module
            if arguments is None:  # to load the module is all
                return RESULT, Pickled(None)
            args, kwargs = arguments
            with ambient.restored(self.device):
                if self.device.type != "cpu":
                    args, kwargs = pytree.tree_map_only(
                        Tensor, lambda tensor: tensor.to(self.device), (args, kwargs)
                    )
                if fault is None:
                    value = module(*args, **kwargs)
                else:
                    value = fault.around(lambda: module(*args, **kwargs), kill_own_process)
                return RESULT, Pickled(value, self._pickler)
        except Exception as cause:
            return FAILURE, Pickled(_failure(cause))

    def _look_up(self, head: bytes) -> tuple[nn.Module | Pickled, Ambient]:
        if head != self._head:
            number, alive, ambient = pickle.loads(head)
            for gone in self._modules.keys() - alive - {number}:
                del self._modules[gone]
            self._head, self._open = head, (number, ambient)
        number, ambient = self._open
        return self._modules[number], ambient


def remote_cause(contents: tuple[str, str, Exception | None]) -> Exception:
    """What the module raised elsewhere, with its traceback there as the cause."""
    what, trace, raised = contents
    cause = raised or RuntimeError(what)
    cause.__cause__ = _RemoteTraceback(trace)
    return cause


class _RemoteTraceback(Exception):  # noqa: N818 - prints as the traceback that it holds
    def __init__(self, trace: str) -> None:
        self.trace = trace
        super().__init__(trace)

    def __str__(self) -> str:
        return f"\n{self.trace}"


def _failure(cause: Exception) -> tuple[str, str, Exception | None]:
    """An exception in words, its traceback, and itself where it can travel."""
    what = "".join(traceback.format_exception_only(cause)).strip()
    trace = "".join(traceback.format_exception(cause))
    try:
        pickle.loads(pickle.dumps(cause))
    except Exception:  # its class cannot be found there, or cannot be made from its arguments
        return what, trace, None
    return what, trace, cause
