r"""Messages between two local processes, with their tensors in shared memory.

A pipe would copy every tensor twice, and :mod:`torch.multiprocessing` opens a file for each tensor.
Here the sender writes a long message into memory that the receiver has mapped already, and sends a
header of 48 bytes. A short message follows its header. Large received tensors are views of the
memory. The sender writes there again when the receiver holds no view any more, and never if the
receiver has forked while it held one, as the child may keep it. Both sides seal the size of the
memory, as reading behind its end would kill the receiver.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import importlib
import io
import itertools
import math
import mmap
import os
import pickle
import socket
import struct
import sys
import weakref
from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .torchscript import with_scripts

# Kind, number, bytes of the pickle, its block or -1, that block is new, and how many numbers of
# blocks follow, which nobody reads any more; ~number if a fork may.
_HEADER = struct.Struct("<6q")
_ROOM = socket.CMSG_SPACE(array("i").itemsize)  # bytes for one descriptor
_TRUNCATED = int(socket.MSG_CTRUNC)  # an enumeration would take microseconds for "&"
_ALIGNMENT = 64  # bytes of a cache line
# Blocks of a connection that received tensors may keep, each with a descriptor and a mapping.
# Further messages are copied. Not tuned: callers hold results of a few calls.
_MOST_KEPT = 8
# Bytes of a message that follow its header: copying them takes about as long as to look after a
# block. Bytes of a packet, with its header and numbers of blocks.
_SHORT, _PACKET = 1 << 16, (1 << 16) + (1 << 12)
_LEAST = 1 << 16  # bytes of a block; a smaller one would save only pages
# Blocks that wait for a message, or that a receiver maps, and their bytes, at most: enough for the
# parts of eight calls in flight. Not tuned.
_MOST_BLOCKS, _MOST_BYTES = 48, 1 << 27
_numbers = itertools.count()
_connections = weakref.WeakValueDictionary[int, "Connection"]()


class Block:
    """Shared memory that keeps its size."""

    def __init__(self, size: int) -> None:
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING  # it exists while any process has it
        self.number, self.descriptor = next(_numbers), os.memfd_create("coded_torch", flags)
        weakref.finalize(self, os.close, self.descriptor).atexit = False
        os.ftruncate(self.descriptor, size)
        _seal(self.descriptor)
        self.memory = mmap.mmap(self.descriptor, 0)

    def __len__(self) -> int:
        return len(self.memory)


class Blocks(dict[int, Block]):
    """Blocks that nobody reads, by number. Any thread may take and add them."""

    def take(self, size: int) -> Block:
        # Rounded up, so that there is room for a somewhat larger message, too.
        size = max(_LEAST, 1 << (size - 1).bit_length())
        for block in reversed([*self.values()]):  # the last one may still be in a cache
            if len(block) == size and self.pop(block.number, None) is not None:
                return block
        return Block(size)


def _keep(blocks: dict[int, Any], number: int, block: Any) -> None:
    """Add a block, and remove the oldest ones that are too many. Both sides of a message do so."""
    blocks[number] = block
    for oldest in [*blocks][:-1]:
        if len(blocks) <= _MOST_BLOCKS and sum(map(len, [*blocks.values()])) <= _MOST_BYTES:
            break
        blocks.pop(oldest, None)


class Pickled:
    """The pickle of an object without its tensors, which lie behind the pickle in memory.

    With ``blocks``, it is ready to be sent: it lies in one of them, unless it is short. Without, it
    is a module: whole storages are written, so that tensors that share one still do.
    """

    block: Block | None = None

    def __init__(self, value: Any, blocks: Blocks | None = None) -> None:
        self._has_storages = blocks is None
        # By id: each tensor with its persistent id, and each written tensor with its place.
        self._places: dict[int, tuple[Tensor, tuple[Any, ...]]] = {}
        self._tensors: dict[int, tuple[Tensor, int]] = {}
        self._behind = 0  # bytes of the tensors
        buffer = io.BytesIO()
        kind = with_scripts(_pickler()) if self._has_storages else _pickler()
        pickler = kind(buffer, pickle.HIGHEST_PROTOCOL)
        pickler.persistent_id = self._place
        pickler.dump(value)
        self._stream = buffer.getvalue()
        if b"__main__" in self._stream and _pickler() is pickle.Pickler and is_interactive():
            what = "a class or function of an interactive session cannot be sent by name"
            how = "install cloudpickle, or define it in a file that can be imported"
            raise pickle.PicklingError(f"{what}; {how}")
        self.length = len(self._stream)  # bytes of the pickle
        self._start = _aligned(self.length)  # the place of the tensors
        self.size = self._start + self._behind  # bytes of the pickle and the tensors
        if blocks is not None:
            self.block = blocks.take(self.size) if self.size > _SHORT else None
            self.memory = self.block.memory if self.block else bytearray(self.size)
            self.write(self.memory)

    def write(self, memory: Any) -> None:
        """Write pickle and tensors to the beginning of ``memory``, and release the tensors."""
        memory[: self.length] = self._stream
        for tensor, offset in self._tensors.values():
            begin, size = self._start + offset, tensor.nbytes
            plain = tensor.is_cpu and tensor.is_contiguous() and size <= _SHORT
            plain = plain and not (tensor.dtype.is_complex and tensor.is_conj())
            if plain and not tensor.is_neg():  # operators take far longer
                memory[begin : begin + size] = ctypes.string_at(tensor.data_ptr(), size)
            else:
                place = _tensor_at(memory, begin, tensor.dtype, tensor.shape)
                place.copy_(tensor.detach())
        self._places = {}
        self._tensors = {}

    def _place(self, obj: Any) -> tuple[Any, ...] | None:
        """Return dtype, shape and place of a plain tensor, also a parameter's; else None.

        A view of a storage has its strides and its number, too.
        """
        if type(obj) is not Tensor:
            return None
        if obj.layout is not torch.strided or obj.is_quantized or obj.is_meta or not obj.numel():
            return None
        if id(obj) not in self._places:
            form = str(obj.dtype).removeprefix("torch."), tuple(obj.shape)
            if self._has_storages and not (obj.is_conj() or obj.is_neg()):
                storage = obj.untyped_storage()
                numbers = torch.empty(0, dtype=torch.uint8, device=obj.device).set_(storage)
                begin = self._written(storage._cdata, numbers)
                begin += int(obj.storage_offset()) * obj.element_size()
                place: tuple[Any, ...] = (*form, begin, obj.stride(), len(self._places))
            else:
                place = (*form, self._written(id(obj), obj))
            self._places[id(obj)] = obj, place
        return self._places[id(obj)][1]

    def _written(self, key: int, tensor: Tensor) -> int:
        """Return the place of a tensor, which is written once."""
        if key not in self._tensors:
            self._tensors[key] = tensor, self._behind
            self._behind += _aligned(tensor.nbytes)
        return self._tensors[key][1]


def is_interactive() -> bool:
    """Return whether the main script is not a file that others can import. Workers replace this."""
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
        self._read: dict[tuple[Any, ...], Tensor] = {}

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

    def persistent_load(self, place: tuple[Any, ...]) -> Tensor:
        if place not in self._read:
            dtype, shape, offset, *view = place
            kind = getattr(torch, dtype)
            tensor = _tensor_at(self._memory, self._start + offset, kind, shape, *view[:1])
            self._read[place] = tensor.clone() if tensor.nbytes <= self._copy else tensor
        return self._read[place]


class Package(Block):
    """An object in shared memory of its own, for any number of receivers."""

    def __init__(self, pickled: Pickled) -> None:
        super().__init__(pickled.size)
        self.memory.madvise(mmap.MADV_DONTFORK)  # a child that had it would forbid the seal
        self.length = pickled.length
        with self.memory:  # closes it
            pickled.write(self.memory)
        _seal(self.descriptor, fcntl.F_SEAL_WRITE)  # no receiver can change it for the others


class Connection:
    """One end of a connection, a Unix socket of packets. One thread at a time uses it."""

    def __init__(self, sock: socket.socket, blocks: Blocks) -> None:
        self.socket, self.blocks = sock, blocks
        self._sent: dict[int, Block] = {}  # those that the other side maps, by number
        self._lent: dict[int, Block] = {}  # those that the other side reads
        self._known: dict[int, mmap.mmap] = {}  # blocks of the other side
        # What holds the memory of its messages, by block. No finalizer tells that nothing does any
        # more, because an interrupt that comes there is lost.
        self._read: dict[int, Callable[[], Any]] = {}
        self._forked = set[int]()  # the blocks of which a forked process may hold views
        _connections[id(self)] = self

    def send(self, kind: int, number: int, content: Pickled | Package | None = None) -> None:
        """Send a message, with an object or without.

        The receiver maps the memory of a package, and copies the pages that it changes. Raises a
        ConnectionError if the other side has ended, an OSError if memory is short.
        """
        length, block, new = 0, -1, -1
        body: Any = b""
        if content is not None:
            length = content.length
            if isinstance(content, Package):
                new = content.descriptor
            elif content.block is None:
                body = content.memory
            else:
                block = content.block.number
                if block not in self._sent:
                    _keep(self._sent, block, content.block)
                    new = content.block.descriptor
                self._lent[block] = content.block
        free = [each for each, holder in self._read.items() if holder() is None]
        read = array("q", [~each if each in self._forked else each for each in free])
        for each in free:
            del self._read[each]
            self._forked.discard(each)
        packet = _HEADER.pack(kind, number, length, block, new >= 0, len(read)) + read + body
        try:
            if new < 0:
                self.socket.send(packet)
            else:
                socket.send_fds(self.socket, [packet], [new])
        except ConnectionError as error:
            raise ConnectionError(f"the other side has ended: {error}") from error

    def tell(self, kind: int, number: int = 0) -> None:
        """Send two numbers, from any thread, unless the other side has left many unread."""
        with contextlib.suppress(OSError):
            self.socket.send(_HEADER.pack(kind, number, 0, -1, 0, 0), socket.MSG_DONTWAIT)

    def receive(self) -> tuple[Any, ...] | None:
        """Return kind, number and what reads the object; None at the end, an OSError as `send`."""
        try:
            data, extra, flags, _ = self.socket.recvmsg(_PACKET, _ROOM)
        except ConnectionError:  # if the other side has left any unread, before its last messages
            data, extra, flags, _ = self.socket.recvmsg(_PACKET, _ROOM)
        if not data:
            return None
        descriptors = array("i", extra[0][2] if extra else b"")
        kind, number, length, block, new, read = _HEADER.unpack_from(data)
        begin = _HEADER.size + 8 * read
        for each in array("q", data[_HEADER.size : begin]) if read else ():
            if each < 0:
                del self._lent[~each]  # nobody writes there again
            else:
                _keep(self.blocks, each, self._lent.pop(each))
        if flags & _TRUNCATED or len(descriptors) < new:
            # The kernel drops a descriptor that is one too many for this process.
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        memory, copy = memoryview(bytearray(data[begin:])), 0
        if new:
            access = mmap.ACCESS_WRITE if block >= 0 else mmap.ACCESS_COPY
            with open(descriptors[0], "rb"):  # closes it
                _seal(descriptors[0])
                mapped = mmap.mmap(descriptors[0], 0, access=access)
            if block >= 0:
                _keep(self._known, block, mapped)
            memory = memoryview(mapped)
        if block >= 0:
            memory = memoryview(self._known[block])
            self._read[block] = weakref.ref(memory)
            if sum(holder() is not None for holder in self._read.values()) > _MOST_KEPT:
                memory = memoryview(bytearray(memory))
            copy = _SHORT  # a view would keep the whole memory
        if not 0 <= length <= len(memory):
            raise ValueError(f"a message of {length} bytes came in {len(memory)}")
        return kind, number, _Unpickler(memory, length, copy).load

    def keep_views(self) -> None:
        """Have the other side never write again what is read now: this process is to fork."""
        self._forked |= {each for each, holder in [*self._read.items()] if holder() is not None}

    def close(self) -> None:
        """Release the connection, and all memory that nobody reads."""
        self.socket.close()
        self._sent, self._lent, self._known = {}, {}, {}


def _keep_views() -> None:
    for reference in _connections.valuerefs():
        connection = reference()
        if connection is not None:
            connection.keep_views()


os.register_at_fork(before=_keep_views)


def _tensor_at(
    memory: Any, offset: int, dtype: torch.dtype, shape: tuple[int, ...], strides: Any = None
) -> Tensor:
    """Return a view of memory, which is contiguous unless there are strides."""
    if strides is None:
        count = math.prod(shape)
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
    count = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
    return flat.as_strided(shape, strides)


def _aligned(size: int) -> int:  # to whole cache lines
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _seal(descriptor: int, more: int = 0) -> None:
    """Let memory keep its size. Raises an OSError if it refuses."""
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | more)
