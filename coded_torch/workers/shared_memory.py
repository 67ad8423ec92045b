r"""Messages between two local processes, with their tensors in shared memory.

A pipe would copy every tensor twice, and :mod:`torch.multiprocessing` opens a file for each tensor.
Here the sender writes a message into memory that the receiver has mapped already, and sends a
header of 48 bytes. The received tensors are views of that memory. The sender writes there again
when the receiver holds no view any more. Both sides seal the size of the memory, as reading behind
its end would kill the receiver.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import importlib
import io
import math
import mmap
import os
import pickle
import socket
import struct
import sys
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Kind, number, bytes of the pickle, its block, bits of the blocks that were read, block is new.
_HEADER = struct.Struct("<qqqqQq")
_TRUNCATED = int(socket.MSG_CTRUNC)  # an enumeration would take microseconds for "&"
_ALIGNMENT = 64  # bytes of a cache line
# Blocks of a connection that received tensors may keep, each with a descriptor and a mapping, at
# most 64. Tensors of further messages are copied. Not tuned: callers hold results of a few calls.
_MOST_KEPT = 8
# Bytes up to which a received tensor is copied, as a view would keep a whole block. Copying 64 KiB
# takes about 5 us, as long as making a view.
_SMALL = 1 << 16
_LEAST = 1 << 16  # bytes of a block; a smaller one would save only pages


class Pickled:
    """The pickle of an object without its tensors, which lie behind the pickle in memory."""

    def __init__(self, value: Any) -> None:
        self._tensors: dict[int, tuple[Tensor, int]] = {}  # tensors by id, with their places
        self._behind = 0  # bytes of the tensors
        buffer = io.BytesIO()
        pickler = _pickler()(buffer, pickle.HIGHEST_PROTOCOL)
        pickler.persistent_id = self._place
        pickler.dump(value)
        self._stream = buffer.getvalue()
        if b"__main__" in self._stream and _pickler() is pickle.Pickler and is_interactive():
            what = "a class or function of an interactive session cannot be sent by name"
            how = "install cloudpickle, or define it in a file that can be imported"
            raise pickle.PicklingError(f"{what}; {how}")
        self.length = len(self._stream)  # bytes of the pickle
        self.size = _aligned(self.length) + self._behind  # bytes of the pickle and the tensors

    def write(self, memory: mmap.mmap) -> None:
        """Write pickle and tensors to the beginning of ``memory``, and release the tensors."""
        memory[: self.length] = self._stream
        start = _aligned(self.length)
        for tensor, offset in self._tensors.values():
            place = _tensor_at(memory, start + offset, tensor.dtype, tensor.shape)
            place.copy_(tensor.detach())
        self._tensors = {}

    def _place(self, obj: Any) -> tuple[str, tuple[int, ...], int] | None:
        """Return dtype, shape and place of a plain tensor, also a parameter's; else None."""
        plain = type(obj) is Tensor and obj.layout is torch.strided and not obj.is_quantized
        if not plain or obj.is_meta or not obj.numel():
            return None
        if id(obj) not in self._tensors:
            self._tensors[id(obj)] = obj, self._behind
            self._behind += _aligned(obj.nbytes)
        return str(obj.dtype).removeprefix("torch."), tuple(obj.shape), self._tensors[id(obj)][1]


def is_interactive() -> bool:
    """Return whether the main script is no file that others can import. Workers replace this."""
    return not os.path.isfile(getattr(sys.modules["__main__"], "__file__", ""))


@functools.cache
def _pickler() -> Any:
    """Return the class of picklers; cloudpickle's pickles the classes of a session by value."""
    with contextlib.suppress(ImportError):
        if is_interactive():
            return importlib.import_module("cloudpickle").CloudPickler
    return pickle.Pickler


def import_main() -> None:
    """Do nothing, where the main script runs. Workers replace this."""


class _Unpickler(pickle.Unpickler):
    """Reads a :class:`Pickled`. Tensors of up to ``copy`` bytes are copied, others are views."""

    def __init__(self, memory: memoryview, length: int, copy: int = 0) -> None:
        super().__init__(io.BytesIO(memory[:length]))
        self._memory, self._start, self._copy = memory, _aligned(length), copy
        self._read: dict[int, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module != "__main__":
            return super().find_class(module, name)
        import_main()
        try:
            return super().find_class(module, name)
        except AttributeError:
            what = f"{name} is not defined when a worker imports the main script"
            how = "move it out of the `if`, to the top level of the script, or into a module"
            raise AttributeError(f"{what}; {how}") from None

    def persistent_load(self, place: tuple[str, tuple[int, ...], int]) -> Tensor:
        dtype, shape, offset = place
        if offset not in self._read:
            kind = getattr(torch, dtype)
            tensor = _tensor_at(self._memory, self._start + offset, kind, shape)
            self._read[offset] = tensor.clone() if tensor.nbytes <= self._copy else tensor
        return self._read[offset]


class Package:
    """An object in shared memory of its own, for any number of receivers."""

    def __init__(self, pickled: Pickled) -> None:
        self.descriptor, self.length = _anonymous_file(pickled.size), pickled.length
        weakref.finalize(self, os.close, self.descriptor)
        with mmap.mmap(self.descriptor, 0) as memory:
            pickled.write(memory)
        _seal(self.descriptor, fcntl.F_SEAL_WRITE)  # no receiver can change it for the others


class Message(NamedTuple):
    """A message, and the function that reads its object."""

    kind: int
    number: int
    value: Callable[[], Any]


class Connection:
    """One end of a connection, a Unix stream socket. One thread sends at a time, one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._blocks: dict[int, mmap.mmap] = {}  # blocks to write into
        self._lent: set[int] = set()  # indices of the blocks that the other side reads
        self._known: dict[int, mmap.mmap] = {}  # blocks of the other side
        self._kept: set[int] = set()  # indices of the other side's blocks that are being read
        self._done: deque[int] = deque()  # indices of its blocks that were read

    def send(self, kind: int, number: int, pickled: Pickled | None = None) -> None:
        """Send a message, with an object or without.

        Raises a ConnectionError if the other side has ended, an OSError if memory is short.
        """
        if pickled is None:
            self._write(kind, number, 0, -1)
            return
        index = next(i for i in range(64) if i not in self._lent)
        block, new = self._blocks.get(index), None
        try:
            if block is None or len(block) < pickled.size:
                # Rounded up, so that the block has room for a somewhat larger message too.
                new = _anonymous_file(max(_LEAST, 1 << (pickled.size - 1).bit_length()))
                block = mmap.mmap(new, 0)
            pickled.write(block)
            self._lent.add(index)  # after writing, as a message that fails takes no block
            self._blocks[index] = block
            self._write(kind, number, pickled.length, index, new)
        finally:
            if new is not None:
                os.close(new)  # the mapping has a descriptor of its own

    def send_package(self, kind: int, number: int, package: Package) -> None:
        """Send a package. The receiver maps its memory, and copies the pages that it changes."""
        self._write(kind, number, package.length, -1, package.descriptor)

    def beat(self, kind: int) -> None:
        """Send a kind alone, from any thread, unless the other side has left many unread."""
        with contextlib.suppress(OSError):
            self.socket.send(_HEADER.pack(kind, 0, 0, -1, 0, 0), socket.MSG_DONTWAIT)

    def receive(self) -> Message | None:
        """Return the next message; None if the other side has ended, an OSError as by `send`."""
        try:
            # A header is one write and one read: too short to be cut, even by a sudden death.
            data, descriptors, flags, _ = socket.recv_fds(self.socket, _HEADER.size, 1)
        except ConnectionError:
            return None
        if len(data) < _HEADER.size:
            return None
        kind, number, length, index, read, new = _HEADER.unpack(data)
        for done in range(read.bit_length()):
            if read >> done & 1:
                self._lent.remove(done)
        if flags & _TRUNCATED or len(descriptors) < new:
            # The kernel drops a descriptor that is one too many for this process.
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        memory, copy = memoryview(b""), 0
        if new:
            access = mmap.ACCESS_WRITE if index >= 0 else mmap.ACCESS_COPY
            with open(descriptors[0], "rb"):  # closes it
                _seal(descriptors[0])
                self._known[index] = mmap.mmap(descriptors[0], 0, access=access)
        if new and index < 0:  # a package
            memory = memoryview(self._known.pop(index))
        elif length:
            memory = memoryview(self._known[index])
            copy = _SMALL if len(self._kept) < _MOST_KEPT else sys.maxsize
            self._kept.add(index)
            weakref.finalize(memory, _let_go, index, self._kept, self._done).atexit = False
        if not 0 <= length <= len(memory):
            raise ValueError(f"a message of {length} bytes came in a block of {len(memory)}")
        return Message(kind, number, _Unpickler(memory, length, copy).load)

    def close(self) -> None:
        """Release the connection, and all memory that nobody reads."""
        self.socket.close()
        self._blocks, self._known = {}, {}

    def _write(
        self, kind: int, number: int, length: int, index: int, new: int | None = None
    ) -> None:
        read = 0
        while self._done:
            read |= 1 << self._done.popleft()
        header = _HEADER.pack(kind, number, length, index, read, new is not None)
        try:
            if new is None:
                self.socket.sendall(header)
            else:
                socket.send_fds(self.socket, [header], [new])
        except OSError as error:
            raise ConnectionError(f"the other side has ended: {error}") from error


def _let_go(index: int, kept: set[int], done: deque[int]) -> None:
    """Note that a block was read. This is no method, so that results do not hold a connection."""
    kept.discard(index)
    done.append(index)


def _tensor_at(memory: Any, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


def _aligned(size: int) -> int:  # to whole cache lines
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _anonymous_file(size: int) -> int:
    """Return the descriptor of shared memory, which exists while any process has it."""
    descriptor = os.memfd_create("coded_torch", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    _seal(descriptor)
    return descriptor


def _seal(descriptor: int, more: int = 0) -> None:
    """Let memory keep its size. Raises an OSError if it refuses."""
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | more)
