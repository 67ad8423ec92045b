r"""The other side of a process worker: what runs in the process."""

from __future__ import annotations

import contextlib
import gc
import pickle
import signal
import socket
import traceback

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._channel import Channel, Contents, Message
from .base import Ambient
from .faults import kill_own_process

__all__ = ["FAILURE", "JOB", "MODULE", "READY", "RESULT", "serve"]

READY, MODULE, JOB, RESULT, FAILURE = range(5)  # kinds of messages


def serve(sock: socket.socket, device: torch.device, threads: int) -> None:
    """A process: answer jobs until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks
    torch.set_num_threads(threads)
    gc.freeze()  # what is there stays, and need not be looked through again and again
    channel, desk = Channel(sock), _Desk(device)
    with contextlib.suppress(ConnectionError):
        channel.send(READY, 0, Contents(None))
        while message := channel.receive():
            if message.kind == MODULE:
                desk.add(message)
                continue
            number, answer = message.number, desk.answer(message)
            del message  # its memory can be used again, which the answer says
            channel.send(answer[0], number, answer[1])


class _Desk:
    """Where a process answers: the modules that it has been sent, or why they cannot be used."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._modules: dict[int, nn.Module | Exception] = {}
        self._head = b""
        self._open: tuple[int, Ambient]

    def add(self, message: Message) -> None:
        """Take a module in."""
        try:
            self._modules[message.number] = message.value().to(self.device)
        except Exception as error:
            self._modules[message.number] = error

    def answer(self, message: Message) -> tuple[int, Contents]:
        """The kind and the contents of the answer to a job."""
        try:
            head, fault, (args, kwargs) = message.value()
            module, ambient = self._look_up(head)
            with ambient.restored(self.device):
                if self.device.type != "cpu":
                    args, kwargs = pytree.tree_map_only(
                        Tensor, lambda tensor: tensor.to(self.device), (args, kwargs)
                    )
                if fault is None:
                    value = module(*args, **kwargs)
                else:
                    value = fault.around(lambda: module(*args, **kwargs), kill_own_process)
                return RESULT, Contents(value)
        except Exception as cause:
            return FAILURE, Contents(_failure(cause))

    def _look_up(self, head: bytes) -> tuple[nn.Module, Ambient]:
        if head != self._head:
            number, alive, ambient = pickle.loads(head)
            for gone in self._modules.keys() - alive - {number}:
                del self._modules[gone]
            self._head, self._open = head, (number, ambient)
        module = self._modules[self._open[0]]
        if isinstance(module, Exception):
            raise module
        return module, self._open[1]


def _failure(cause: Exception) -> tuple[str, str, Exception | None]:
    """An exception in words, its traceback, and itself where it can travel."""
    what = "".join(traceback.format_exception_only(cause)).strip()
    trace = "".join(traceback.format_exception(cause))
    try:
        pickle.loads(pickle.dumps(cause))
    except Exception:  # its class cannot be found there, or cannot be made from its arguments
        return what, trace, None
    return what, trace, cause
