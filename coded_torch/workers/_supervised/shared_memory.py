r"""Messages between two processes of one machine, with their tensors in shared memory.

Pickling a tensor copies it twice and writes it through a pipe; :mod:`torch.multiprocessing` moves
its storage to a file of its own and sends the descriptor, for every tensor and message. Here a side
writes all of a message into memory that the other has mapped already, and sends 64 bytes. What the
other reads are views of that memory; when they are gone, the memory is used again.

What lies in shared memory already, inputs that were encoded there, is not written again: the
message says where it is. Its reader copies it, so that what a module writes to its inputs reaches
nobody else.
"""

from __future__ import annotations

import errno
import functools
import io
import itertools
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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["MOST_BLOCKS", "Block", "Connection", "Inputs", "Message", "Pickled", "TensorPickler"]
__all__ += ["aligned", "rounded"]

# Kind, number, bytes of the pickle; its block, and blocks that have been read; the place of inputs,
# and places that have been read; which of block and inputs come with a descriptor.
_HEADER = struct.Struct("<qqqqQqQq")
_NEW_BLOCK, _NEW_INPUTS = 1, 2
_TRUNCATED = int(socket.MSG_CTRUNC)  # of an enumeration, "&" takes microseconds
MOST_BLOCKS = 64  # bits of the fields of what has been read
_ALIGNMENT = 64
_LEAST = 1 << 16
_numbers = itertools.count()  # of the blocks that this process has


class Block:
    """Anonymous shared memory that holds a pickle, and behind it the bytes of its tensors.

    Args:
        size: bytes to reserve.
        descriptor: of memory that another process has reserved; None: new memory.
    """

    def __init__(self, size: int = 0, descriptor: int | None = None) -> None:
        new = descriptor is None
        self.descriptor = _anonymous_file() if descriptor is None else descriptor
        self.number = next(_numbers)
        self._finalizer = weakref.finalize(self, os.close, self.descriptor)
        if new:
            os.ftruncate(self.descriptor, size)

    @functools.cached_property
    def memory(self) -> mmap.mmap:
        """The memory itself."""
        return mmap.mmap(self.descriptor, 0)

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
    inputs: memoryview | None = None

    def value(self) -> Any:
        """The object; its tensors are views of the memory, kept as long as they are, or copies."""
        return _Unpickler(self.memory, self.length, self.inputs).load()


class Inputs(NamedTuple):
    """A tensor in shared memory: the place of that, and its block."""

    tensor: Tensor
    place: int
    block: Block


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
        # By place, the same for inputs: those that the other side may read, and knows; its own.
        self._lent_inputs: dict[int, deque[Tensor]] = {}
        self._shown: dict[int, int] = {}  # the number of the block
        self._known_inputs: dict[int, Block] = {}
        self._done_inputs: deque[int] = deque()
        self._held: list[tuple[bytes, Block]] = []  # to be sent with the next message
        self._received: deque[Block] = deque()  # of headers that have not been read

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
        new = 0
        block: Block | None = None
        if self._free:
            index, block = self._free.pop()
        else:
            index = self._made
            self._made += 1
        if block is None or len(block) < pickled.size:
            block = Block(rounded(pickled.size))
            descriptors.append(block.descriptor)
            new = _NEW_BLOCK
        pickled.write(block.memory)
        if index < MOST_BLOCKS:  # any further ones are used once
            self._lent[index] = block
        place = -1
        if pickled.inputs is not None:
            tensor, place, inputs = pickled.inputs
            self._lent_inputs.setdefault(place, deque()).append(tensor)
            if self._shown.get(place) != inputs.number:
                self._shown[place] = inputs.number
                descriptors.append(inputs.descriptor)
                new |= _NEW_INPUTS
        read, read_inputs = _mask(self._done), _mask(self._done_inputs)
        where = len(pickled.stream), index, read, place, read_inputs, new
        self._write([_HEADER.pack(kind, number, *where)], descriptors)

    def send_block(self, kind: int, number: int, block: Block, length: int) -> None:
        """Send a block as it is; the reader maps the same memory, for itself.

        It goes with the next message, as together they wake the other side once, or by
        :meth:`flush`.
        """
        header = _HEADER.pack(kind, number, length, -1, 0, -1, 0, _NEW_BLOCK)
        self._held.append((header, block))

    def flush(self) -> None:
        """Send the blocks that wait for a message.

        Raises:
            ConnectionError: nothing reads any more.
        """
        self._write([], [])

    def receive(self) -> Message | None:
        """The next message; None: the other side has ended.

        Raises:
            OSError: the memory that the message is in cannot be had.
        """
        try:
            # A header is one write and one read: too short to be cut, even by a sudden death.
            data, descriptors, flags, _ = socket.recv_fds(self.socket, _HEADER.size, 3)
        except ConnectionError:
            return None
        if len(data) < _HEADER.size:
            return None
        kind, number, length, index, read, place, read_inputs, new = _HEADER.unpack(data)
        for done in _bits(read):
            self._free.append((done, self._lent.pop(done)))
        for done in _bits(read_inputs):
            self._lent_inputs[done].popleft()
        # Those of headers that were sent together come with the first.
        self._received += [Block(descriptor=descriptor) for descriptor in descriptors]
        if flags & _TRUNCATED or len(self._received) < new.bit_count():
            # The kernel drops descriptors that are one too many for this process.
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        block = self._received.popleft() if new & _NEW_BLOCK else None
        if new & _NEW_INPUTS:
            self._known_inputs[place] = self._received.popleft()
        inputs = None
        if place >= 0:
            inputs = memoryview(self._known_inputs[place].memory)
            weakref.finalize(inputs, self._done_inputs.append, place).atexit = False
        if not 0 <= index < MOST_BLOCKS:
            assert block is not None  # others may have got the same, such as a module
            own = mmap.mmap(block.descriptor, 0, access=mmap.ACCESS_COPY)
            return Message(kind, number, memoryview(own), length, inputs)
        if block is not None:
            self._known[index] = block
        memory = memoryview(self._known[index].memory)
        weakref.finalize(memory, self._done.append, index).atexit = False
        return Message(kind, number, memory, length, inputs)

    def close(self) -> None:
        """Let go of the connection and of all memory that is not being read."""
        self.socket.close()
        self._free, self._lent, self._known = [], {}, {}
        self._lent_inputs, self._known_inputs = {}, {}

    def _write(self, headers: list[bytes], descriptors: list[int]) -> None:
        held, self._held = self._held, []
        headers = [*(header for header, _ in held), *headers]
        descriptors = [*(block.descriptor for _, block in held), *descriptors]
        try:
            if descriptors:
                socket.send_fds(self.socket, headers, descriptors)
            else:
                self.socket.sendall(b"".join(headers))
        except OSError as error:
            raise ConnectionError(f"nothing reads any more: {error}") from error


class Pickled:
    """An object as its pickle, without the tensors, and the tensors with their places.

    Args:
        value: the object.
        pickler: how to pickle it.
        find: says which of its tensors lie in shared memory already; those of one piece of that
            stay there.

    Raises:
        Exception: whatever keeps ``value`` from being pickled.
    """

    def __init__(
        self,
        value: Any,
        pickler: type[TensorPickler] | None = None,
        find: Callable[[Tensor], Inputs | None] | None = None,
    ) -> None:
        buffer = io.BytesIO()
        writer = (pickler or _Pickler)(buffer, pickle.HIGHEST_PROTOCOL)
        writer.find = find
        writer.dump(value)
        self.stream = buffer.getbuffer()
        self.tensors, self.inputs = writer.tensors, writer.inputs
        self.start = aligned(len(self.stream))
        self.size = self.start + writer.size

    def write(self, memory: mmap.mmap | memoryview) -> None:
        """Write all of it to the beginning of ``memory``, and let go of the tensors."""
        memory[: len(self.stream)] = self.stream
        for tensor, offset in self.tensors:
            place = torch.frombuffer(
                memory, dtype=tensor.dtype, count=tensor.numel(), offset=self.start + offset
            )
            place.view(tensor.shape).copy_(tensor.detach())
        self.tensors = []


class TensorPickler:
    """Mixed into a pickler: of plain tensors, it notes dtype, shape and place instead."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tensors: list[tuple[Tensor, int]] = []
        self.size = 0
        self.find: Callable[[Tensor], Inputs | None] | None = None
        self.inputs: Inputs | None = None

    def reducer_override(self, obj: Any) -> Any:
        # Parameters come here as the plain tensors inside of them, tied ones once.
        if type(obj) is not Tensor or obj.layout is not torch.strided or obj.is_quantized:
            return self.reduce_other(obj)
        count = obj.numel()
        if obj.device.type == "meta" or not count:
            return self.reduce_other(obj)
        dtype = str(obj.dtype).removeprefix("torch.")
        found = self.find and self.find(obj)
        if found and (self.inputs is None or self.inputs.block is found.block):
            self.inputs = found
            offset = obj.storage_offset() * obj.element_size()
            return _input_at, (dtype, tuple(obj.shape), obj.stride(), offset)
        offset = self.size
        self.tensors.append((obj, offset))
        self.size += aligned(count * obj.element_size())
        return _tensor_at, (dtype, count, tuple(obj.shape), offset)

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
    def __init__(self, memory: memoryview, length: int, inputs: memoryview | None) -> None:
        super().__init__(io.BytesIO(memory[:length]))
        start = aligned(length)

        # Not a method: the unpickler remembers it, and a cycle would hold the memory until the
        # next garbage collection.
        def tensor_at(dtype: str, count: int, shape: tuple[int, ...], offset: int) -> Tensor:
            flat = torch.frombuffer(
                memory, dtype=getattr(torch, dtype), count=count, offset=start + offset
            )
            return flat.view(shape)

        def input_at(
            dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
        ) -> Tensor:
            count = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            assert inputs is not None
            flat = torch.frombuffer(inputs, dtype=getattr(torch, dtype), count=count, offset=offset)
            # What a module writes must stay unseen by others. To map the memory for this process
            # alone would do, but its page faults take up to three times as long as a copy.
            return flat.as_strided(shape, strides).clone()

        self._readers = {_tensor_at.__name__: tensor_at, _input_at.__name__: input_at}

    def find_class(self, module: str, name: str) -> Any:
        if module == __name__ and name in self._readers:
            return self._readers[name]
        return super().find_class(module, name)


def _tensor_at(*_: Any) -> Tensor:
    """Stands in a pickle for what reads a tensor from the memory behind it."""
    raise pickle.UnpicklingError("a block must be read where its memory is")


def _input_at(*_: Any) -> Tensor:
    """The same for what lies in memory of the pool."""
    raise pickle.UnpicklingError("a message must be read where its inputs are")


def _mask(places: deque[int]) -> int:
    """Takes places out, each at most once, and returns them as bits."""
    mask = 0
    while places and not mask >> places[0] & 1:
        mask |= 1 << places.popleft()
    return mask


def _bits(mask: int) -> list[int]:
    """The places in a mask."""
    return [place for place in range(mask.bit_length()) if mask >> place & 1]


def rounded(size: int) -> int:
    """Room for somewhat more, so that it does for the next."""
    return max(_LEAST, 1 << (size - 1).bit_length())


def aligned(size: int) -> int:
    """Bytes that so many take, as what is behind them begins on a line of the cache."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _anonymous_file() -> int:
    """A descriptor of memory without a name: it ends with the last process that holds it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("coded_torch")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
