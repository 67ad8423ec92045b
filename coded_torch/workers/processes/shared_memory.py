r"""Messages between two processes of one machine, with their tensors in shared memory.

Pickling a tensor copies it twice and writes it through a pipe; :mod:`torch.multiprocessing` moves
its storage to a file of its own and sends the descriptor, for every tensor and message. Here a
side writes all of a message into memory that the other has mapped already, and sends 48 bytes. The
tensors that the other reads are views of that memory. When they are gone, the memory is used again.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import socket
import struct
import sys
import tempfile
import weakref
from collections import deque
from typing import Any, NamedTuple

from .pickles import Pickled, unpickled

__all__ = ["Block", "Connection", "Message"]

# Kind, number, bytes of the pickle, its block, blocks that were read, whether the block is new.
_HEADER = struct.Struct("<qqqqQq")
_TRUNCATED = int(socket.MSG_CTRUNC)  # of an enumeration, "&" takes microseconds
_MOST_BLOCKS = 64  # bits of the field of blocks that were read
# Blocks of a connection that results may keep, with a descriptor and a mapping each: the results of
# a few calls, which callers hold. Further results are copied. Not tuned.
_MOST_KEPT = 8
# Bytes up to which a tensor is copied when it is read, as a view would keep a whole block. The copy
# of 64 KiB takes some 5 us, about as long as a view.
_SMALL = 1 << 16
_LEAST = 1 << 16  # bytes of a block; smaller ones would save nothing but pages


class Block:
    """Anonymous shared memory with a pickle, and behind it the bytes of its tensors.

    Args:
        size: bytes to reserve.
        descriptor: the descriptor of memory of another process. Defaults to None, new memory.
    """

    def __init__(self, size: int = 0, descriptor: int | None = None) -> None:
        new = descriptor is None
        self.descriptor = _anonymous_file() if descriptor is None else descriptor
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
        """Return a block that just holds an object, and the length of its pickle."""
        block = cls(pickled.size)
        pickled.write(block.memory)
        return block, len(pickled.stream)


class Message(NamedTuple):
    """A message: its kind, its number, and the place of its value."""

    kind: int
    number: int
    memory: memoryview
    length: int
    copy: int = 0

    def value(self) -> Any:
        """Return the object. Its tensors are copies, or views of the memory, which they keep."""
        return unpickled(self.memory, self.length, self.copy)


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
        self._kept: set[int] = set()  # indices of blocks that are being read
        self._done: deque[int] = deque()  # indices of blocks that were read

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self.socket.fileno()

    def send(self, kind: int, number: int, pickled: Pickled | None = None) -> None:
        """Send a message, with an object or without.

        Raises:
            ConnectionError: nothing reads any more.
            OSError: there is no memory to be had.
        """
        if pickled is None:
            return self._write(kind, number, 0, -1, _mask(self._done))
        block: Block | None = None
        if self._free:
            index, block = self._free.pop()
        else:
            index = self._made
            self._made += 1
        new = block is None or len(block) < pickled.size
        if block is None or new:
            block = Block(_rounded(pickled.size))
        pickled.write(block.memory)
        if index < _MOST_BLOCKS:  # any further ones are used once
            self._lent[index] = block
        where = len(pickled.stream), index, _mask(self._done)
        return self._write(kind, number, *where, block if new else None)

    def send_block(self, kind: int, number: int, block: Block, length: int) -> None:
        """Send a block as it is. The reader maps the same memory, copied where it writes."""
        self._write(kind, number, length, -1, 0, block)

    def receive(self) -> Message | None:
        """Return the next message, or None if the other side has ended.

        Raises:
            OSError: this process cannot get the memory that the message is in.
        """
        try:
            # A header is one write and one read: too short to be cut, even by a sudden death.
            data, descriptors, flags, _ = socket.recv_fds(self.socket, _HEADER.size, 1)
        except ConnectionError:
            return None
        if len(data) < _HEADER.size:
            return None
        kind, number, length, index, read, new = _HEADER.unpack(data)
        for done in _bits(read):
            self._free.append((done, self._lent.pop(done)))
        if flags & _TRUNCATED or len(descriptors) < new:
            # The kernel drops descriptors that are one too many for this process.
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        block = Block(descriptor=descriptors[0]) if new else None
        if not length:
            return Message(kind, number, memoryview(b""), 0)
        if not 0 <= index < _MOST_BLOCKS:
            assert block is not None  # others may have got the same, such as a module
            own = mmap.mmap(block.descriptor, 0, access=mmap.ACCESS_COPY)
            return Message(kind, number, memoryview(own), length)
        if block is not None:
            self._known[index] = block
        memory = memoryview(self._known[index].memory)
        copy = _SMALL if len(self._kept) < _MOST_KEPT else sys.maxsize
        self._kept.add(index)
        weakref.finalize(memory, _let_go, index, self._kept, self._done).atexit = False
        return Message(kind, number, memory, length, copy)

    def close(self) -> None:
        """Release the connection, and all memory that nobody reads."""
        self.socket.close()
        self._free, self._lent, self._known = [], {}, {}

    def _write(
        self,
        kind: int,
        number: int,
        length: int,
        index: int,
        read: int,
        block: Block | None = None,
    ) -> None:
        header = _HEADER.pack(kind, number, length, index, read, block is not None)
        try:
            if block is None:
                self.socket.sendall(header)
            else:
                socket.send_fds(self.socket, [header], [block.descriptor])
        except OSError as error:
            raise ConnectionError(f"nothing reads any more: {error}") from error


def _let_go(place: int, kept: set[int], done: deque[int]) -> None:
    """Not a method, so that results do not hold the connection."""
    kept.discard(place)
    done.append(place)


def _mask(places: deque[int]) -> int:
    """Take places out, each at most once, and return them as bits."""
    mask = 0
    while places and not mask >> places[0] & 1:
        mask |= 1 << places.popleft()
    return mask


def _bits(mask: int) -> list[int]:
    """Return the places in a mask."""
    return [place for place in range(mask.bit_length()) if mask >> place & 1]


def _rounded(size: int) -> int:
    """Return a size with some room, so that the block serves somewhat larger messages, too."""
    return max(_LEAST, 1 << (size - 1).bit_length())


def _anonymous_file() -> int:
    """Return a descriptor of memory without a name. It ends with the last process that has it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("coded_torch")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
