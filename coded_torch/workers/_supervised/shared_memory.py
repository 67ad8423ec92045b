r"""Messages between two processes of one machine, with their tensors in shared memory.

Pickling a tensor copies it twice and writes it through a pipe; :mod:`torch.multiprocessing` moves
its storage to a file of its own and sends the descriptor, for every tensor and message. Here a side
writes all of a message into memory that the other has mapped already, and sends 40 bytes. What the
other reads are views of that memory; when they are gone, the memory is used again.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import pickle
import socket
import struct
import sys
import tempfile
import types
import weakref
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Block", "Connection", "Message", "Pickled", "TensorPickler"]

_HEADER = struct.Struct("<qqqqQ")  # kind, number, bytes of the pickle, block, blocks to reuse
_MOST_BLOCKS = 64  # bits of the last field
_ALIGNMENT = 64
_LEAST = 1 << 16


class Block:
    """Anonymous shared memory that holds a pickle, and behind it the bytes of its tensors.

    Args:
        size: bytes to reserve.
        descriptor: of memory that another process has reserved; None: new memory.
        private: whether what is written here stays unseen by others.
    """

    def __init__(self, size: int = 0, descriptor: int | None = None, private: bool = False) -> None:
        new = descriptor is None
        self.descriptor = _anonymous_file() if descriptor is None else descriptor
        self._finalizer = weakref.finalize(self, os.close, self.descriptor)
        if new:
            os.ftruncate(self.descriptor, size)
        access = mmap.ACCESS_COPY if private else mmap.ACCESS_WRITE
        self.memory = mmap.mmap(self.descriptor, 0, access=access)

    def __len__(self) -> int:
        return len(self.memory)

    @classmethod
    def of(cls, value: Any) -> tuple[Block, int]:
        """A block just large enough for ``value``, and the length of its pickle."""
        pickled = Pickled(value)
        block = cls(pickled.size)
        pickled.write(block.memory)
        return block, len(pickled.stream)


class Message(NamedTuple):
    """What came through a channel: a kind, a number, and where the value is."""

    kind: int
    number: int
    memory: memoryview
    length: int

    def value(self) -> Any:
        """The object; its tensors are views of the memory, which is kept as long as they are."""
        return _Unpickler(self.memory, self.length).load()


class Connection:
    """One end of a connection. Each end is used by one thread at a time.

    Args:
        sock: a stream socket of the Unix domain.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._made = 0
        self._free: list[tuple[int, Block]] = []  # to write into
        self._lent: dict[int, Block] = {}  # written, and read by the other side
        self._known: dict[int, Block] = {}  # the other side's
        self._done: deque[int] = deque()  # of these, those that are read

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self.socket.fileno()

    def send(self, kind: int, number: int, pickled: Pickled) -> None:
        """Send an object.

        Raises:
            ConnectionError: nothing reads any more.
            OSError: there is no memory to be had.
        """
        descriptors: list[int] = []
        block: Block | None = None
        if self._free:
            index, block = self._free.pop()
        else:
            index = self._made
            self._made += 1
        if block is None or len(block) < pickled.size:
            block = Block(max(_LEAST, 1 << (pickled.size - 1).bit_length()))
            descriptors.append(block.descriptor)
        pickled.write(block.memory)
        if index < _MOST_BLOCKS:  # any further ones are used once
            self._lent[index] = block
        self._send(kind, number, len(pickled.stream), index, descriptors)

    def send_block(self, kind: int, number: int, block: Block, length: int) -> None:
        """Send a block as it is: the reader maps the same memory, for itself."""
        self._send(kind, number, length, -1, [block.descriptor])

    def receive(self) -> Message | None:
        """The next message; None: the other side has ended.

        Raises:
            OSError: the memory that the message is in cannot be had.
        """
        try:
            # A header is one write and one read: too short to be cut, even by a sudden death.
            data, descriptors, _, _ = socket.recv_fds(self.socket, _HEADER.size, 1)
        except ConnectionError:
            return None
        if len(data) < _HEADER.size:
            return None
        kind, number, length, index, reusable = _HEADER.unpack(data)
        while reusable:
            lowest = (reusable & -reusable).bit_length() - 1
            self._free.append((lowest, self._lent.pop(lowest)))
            reusable &= reusable - 1
        shared = 0 <= index < _MOST_BLOCKS
        if not descriptors and not (shared and index in self._known):
            # The kernel drops descriptors that are one too many for this process.
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        if not shared:
            block = Block(descriptor=descriptors[0], private=True)
            return Message(kind, number, memoryview(block.memory), length)
        if descriptors:
            self._known[index] = Block(descriptor=descriptors[0])
        memory = memoryview(self._known[index].memory)
        weakref.finalize(memory, self._done.append, index).atexit = False
        return Message(kind, number, memory, length)

    def close(self) -> None:
        """Let go of the connection and of all memory that is not being read."""
        self.socket.close()
        self._free, self._lent, self._known = [], {}, {}

    def _send(
        self, kind: int, number: int, length: int, index: int, descriptors: list[int]
    ) -> None:
        reusable = 0
        while self._done:
            reusable |= 1 << self._done.popleft()
        header = _HEADER.pack(kind, number, length, index, reusable)
        try:
            socket.send_fds(self.socket, [header], descriptors)
        except OSError as error:
            raise ConnectionError(f"nothing reads any more: {error}") from error


class Pickled:
    """An object as its pickle, without the tensors, and the tensors with their places.

    Args:
        value: the object.
        pickler: how to pickle it.

    Raises:
        Exception: whatever keeps ``value`` from being pickled.
    """

    def __init__(self, value: Any, pickler: type[TensorPickler] | None = None) -> None:
        buffer = io.BytesIO()
        writer = (pickler or _Pickler)(buffer, pickle.HIGHEST_PROTOCOL)
        writer.dump(value)
        self.stream = buffer.getbuffer()
        self.tensors = writer.tensors
        self.start = _aligned(len(self.stream))
        self.size = self.start + writer.size

    def write(self, memory: mmap.mmap | memoryview) -> None:
        """Write all of it to the beginning of ``memory``."""
        memory[: len(self.stream)] = self.stream
        for tensor, offset in self.tensors:
            place = torch.frombuffer(
                memory, dtype=tensor.dtype, count=tensor.numel(), offset=self.start + offset
            )
            place.view(tensor.shape).copy_(tensor.detach())


class TensorPickler:
    """Mixed into a pickler: of plain tensors, it notes dtype, shape and place instead."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tensors: list[tuple[Tensor, int]] = []
        self.size = 0

    def reducer_override(self, obj: Any) -> Any:
        # Parameters come here as the plain tensors inside of them, tied ones once.
        if type(obj) is not Tensor or obj.layout is not torch.strided or obj.is_quantized:
            return self.reduce_other(obj)
        count = obj.numel()
        if obj.device.type == "meta" or not count:
            return self.reduce_other(obj)
        offset = self.size
        self.tensors.append((obj, offset))
        self.size += _aligned(count * obj.element_size())
        return _tensor_at, (str(obj.dtype).removeprefix("torch."), count, tuple(obj.shape), offset)

    def reduce_other(self, obj: Any) -> Any:
        """How to pickle anything else."""
        return NotImplemented

    def dump(self, obj: Any) -> None:
        """Pickle ``obj``."""
        super().dump(obj)  # type: ignore[misc]


class _Pickler(TensorPickler, pickle.Pickler):
    def reduce_other(self, obj: Any) -> Any:
        # Classes and functions go by name: other processes have to find them.
        if (
            isinstance(obj, type | types.FunctionType)
            and obj.__module__ == "__main__"
            and not os.path.isfile(getattr(sys.modules["__main__"], "__file__", ""))
        ):
            raise pickle.PicklingError(
                f"{obj.__qualname__} belongs to an interactive session; define it in a file that "
                "can be imported"
            )
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, memory: memoryview, length: int) -> None:
        super().__init__(io.BytesIO(memory[:length]))
        start = _aligned(length)

        # Not a method: the unpickler remembers it, and a cycle would hold the memory until the
        # next garbage collection.
        def tensor_at(dtype: str, count: int, shape: tuple[int, ...], offset: int) -> Tensor:
            flat = torch.frombuffer(
                memory, dtype=getattr(torch, dtype), count=count, offset=start + offset
            )
            return flat.view(shape)

        self._tensor_at = tensor_at

    def find_class(self, module: str, name: str) -> Any:
        if name == _tensor_at.__name__ and module == __name__:
            return self._tensor_at
        return super().find_class(module, name)


def _tensor_at(*_: Any) -> Tensor:
    """Stands in a pickle for what reads a tensor from the memory behind it."""
    raise pickle.UnpicklingError("a block must be read where its memory is")


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _anonymous_file() -> int:
    """A descriptor of memory without a name: it ends with the last process that holds it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("coded_torch")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
