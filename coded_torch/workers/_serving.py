r"""The other side of a process worker: what runs in the process."""

from __future__ import annotations

import contextlib
import gc
import pickle
import signal
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._channel import Channel, Contents, TensorPickler
from .base import WorkerError
from .faults import kill_own_process
from .live import Ambient

__all__ = ["FAILURE", "JOB", "MODULE", "READY", "RESULT", "Desk", "failed", "serve"]

READY, MODULE, JOB, RESULT, FAILURE = range(5)  # kinds of messages


def serve(sock: socket.socket, device: torch.device, threads: int) -> None:
    """A process: answer jobs until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks
    torch.set_num_threads(threads)
    gc.freeze()  # what is there stays, and need not be looked through again and again
    channel, desk = Channel(sock), Desk(device)
    with contextlib.suppress(ConnectionError):
        channel.send(READY, 0, Contents(None))
        while message := channel.receive():
            if message.kind == MODULE:
                desk.add(message.number, message.value)
                continue
            number, answer = message.number, desk.answer(message.value)
            del message  # its memory can be used again, which the answer says
            channel.send(answer[0], number, answer[1])


class Desk:
    """Where a machine answers: the modules that it has been sent, or why they cannot be used.

    Args:
        device: where it computes.
        pickler: how to pickle what it answers.
    """

    def __init__(self, device: torch.device, pickler: type[TensorPickler] | None = None) -> None:
        self.device = device
        self._pickler = pickler
        self._modules: dict[int, nn.Module | Contents] = {}
        self._head = b""
        self._open: tuple[int, Ambient]

    def __contains__(self, number: int) -> bool:
        return number in self._modules

    def add(self, number: int, read: Callable[[], nn.Module]) -> None:
        """Take a module in."""
        try:
            self._modules[number] = read().to(self.device)
        except Exception as error:
            self._modules[number] = Contents(_failure(error))

    def answer(self, read: Callable[[], Any]) -> tuple[int, Contents]:
        """The kind and the contents of the answer to a job: a head, a fault, and the arguments."""
        try:
            head, fault, (args, kwargs) = read()
            module, ambient = self._look_up(head)
            if isinstance(module, Contents):
                return FAILURE, module
            with ambient.restored(self.device):
                if self.device.type != "cpu":
                    args, kwargs = pytree.tree_map_only(
                        Tensor, lambda tensor: tensor.to(self.device), (args, kwargs)
                    )
                if fault is None:
                    value = module(*args, **kwargs)
                else:
                    value = fault.around(lambda: module(*args, **kwargs), kill_own_process)
                return RESULT, Contents(value, self._pickler)
        except Exception as cause:
            return FAILURE, Contents(_failure(cause))

    def _look_up(self, head: bytes) -> tuple[nn.Module | Contents, Ambient]:
        if head != self._head:
            number, alive, ambient = pickle.loads(head)
            for gone in self._modules.keys() - alive - {number}:
                del self._modules[gone]
            self._head, self._open = head, (number, ambient)
        number, ambient = self._open
        return self._modules[number], ambient


def failed(worker: int, where: str, contents: tuple[str, str, Exception | None]) -> WorkerError:
    """The error that the contents of a failure stand for."""
    what, trace, raised = contents
    error = WorkerError(worker, f"failed in {where}: {what}")
    error.__cause__ = raised or RuntimeError(what)
    error.__cause__.__cause__ = _RemoteTraceback(trace)
    return error


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
