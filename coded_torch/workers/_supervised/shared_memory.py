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
import itertools
import mmap
import os
import socket
import struct
import sys
import tempfile
import weakref
from collections import deque
from typing import Any, NamedTuple

from torch import Tensor

from .pickles import Pickled, unpickled

__all__ = ["MOST_BLOCKS", "Block", "Connection", "Inputs", "Message", "rounded"]

# Kind, number, bytes of the pickle; its block, and blocks that have been read; the place of inputs,
# and places that have been read; which of block and inputs come with a descriptor.
_HEADER = struct.Struct("<qqqqQqQq")
_NEW_BLOCK, _NEW_INPUTS = 1, 2
_TRUNCATED = int(socket.MSG_CTRUNC)  # of an enumeration, "&" takes microseconds
MOST_BLOCKS = 64  # bits of the fields of what has been read
# Blocks of a connection that results may keep, with a descriptor and a mapping each: the results of
# a few calls, which is what callers hold. Further results are copied.
_MOST_KEPT = 8
# Bytes of a tensor that is copied where it is read, as a view would keep a whole block. The copy
# takes some 5 us, about as long as making a view.
_SMALL = 1 << 16
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
        self._close = weakref.finalize(self, os.close, self.descriptor)
        self._ours = new
        if new:
            os.ftruncate(self.descriptor, size)

    @functools.cached_property
    def memory(self) -> mmap.mmap:
        """The memory itself, which has a descriptor of its own."""
        memory = mmap.mmap(self.descriptor, 0)
        if not self._ours:  # else it is sent to others
            self._close()
        return memory

    def __len__(self) -> int:
        return len(self.memory)

    @classmethod
    def of(cls, pickled: Pickled) -> tuple[Block, int]:
        """A block just large enough for an object, and the length of its pickle."""
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
    copy: int = 0

    def value(self) -> Any:
        """The object; its tensors are copies, or views of the memory, which they keep."""
        return unpickled(self.memory, self.length, self.inputs, self.copy)


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
        self._kept: set[int] = set()  # of these, those that are being read
        self._done: deque[int] = deque()  # and those that are read
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
        copy = _SMALL if len(self._kept) < _MOST_KEPT else sys.maxsize
        self._kept.add(index)
        weakref.finalize(memory, _let_go, index, self._kept, self._done).atexit = False
        return Message(kind, number, memory, length, inputs, copy)

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


def _let_go(place: int, kept: set[int], done: deque[int]) -> None:
    """Not a method, so that results do not hold the connection."""
    kept.discard(place)
    done.append(place)


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


def _anonymous_file() -> int:
    """A descriptor of memory without a name: it ends with the last process that holds it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("coded_torch")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
