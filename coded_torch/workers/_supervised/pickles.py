r"""Objects as pickles with their tensors beside them, as they lie in shared memory."""

from __future__ import annotations

import io
import mmap
import os
import pickle
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .shared_memory import Inputs

__all__ = ["Pickled", "TensorPickler", "aligned", "cloud_pickler", "unpickled"]

_ALIGNMENT = 64


class Pickled:
    """An object as its pickle, without the tensors, and the tensors with their places.

    Args:
        value: the object.
        pickler: how to pickle it; None: by name, and what belongs to an interactive session by
            value.
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
        try:
            writer, buffer = self._written(value, pickler or _Pickler, find)
        except _InteractiveError as error:
            writer, buffer = self._written(value, _by_value(error), find)
        self.stream = buffer.getbuffer()
        self.tensors, self.inputs, self.packages = writer.tensors, writer.inputs, writer.packages
        self.start = aligned(len(self.stream))
        self.size = self.start + writer.size

    def _written(
        self,
        value: Any,
        pickler: type[TensorPickler],
        find: Callable[[Tensor], Inputs | None] | None,
    ) -> tuple[TensorPickler, io.BytesIO]:
        buffer = io.BytesIO()
        writer = pickler(buffer, pickle.HIGHEST_PROTOCOL)
        writer.find = find
        writer.dump(value)
        return writer, buffer

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
        self.packages: set[str] = set()  # that the reader has to import

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | types.FunctionType):
            if obj.__module__:  # None in some generated classes and functions
                self.packages.add(obj.__module__)
        elif isinstance(obj, types.ModuleType):
            self.packages.add(obj.__name__)
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


class _InteractiveError(pickle.PicklingError):
    """What has this name here cannot be found by it elsewhere."""


class _Pickler(TensorPickler, pickle.Pickler):
    def reduce_other(self, obj: Any) -> Any:
        # Classes and functions go by name: other processes have to find them.
        if (
            isinstance(obj, type | types.FunctionType)
            and obj.__module__ == "__main__"
            and not os.path.isfile(getattr(sys.modules["__main__"], "__file__", ""))
        ):
            raise _InteractiveError(f"{obj.__qualname__} belongs to an interactive session")
        return NotImplemented


def cloud_pickler(base: Any) -> type[TensorPickler]:
    """A pickler that sends classes by value where no other process can import them.

    Args:
        base: the ``CloudPickler`` of cloudpickle, or of Ray.
    """

    class CloudPickler(TensorPickler, base):  # type: ignore[misc]
        def reduce_other(self, obj: Any) -> Any:
            return base.reducer_override(self, obj)

    return CloudPickler


def _by_value(error: _InteractiveError) -> type[TensorPickler]:
    try:
        import cloudpickle
    except ImportError:
        raise pickle.PicklingError(
            f"{error}; install cloudpickle, or define it in a file that can be imported"
        ) from None
    return cloud_pickler(cloudpickle.CloudPickler)


def unpickled(
    memory: memoryview, length: int, inputs: memoryview | None = None, copy: int = 0
) -> Any:
    """Read an object.

    Args:
        memory: where it lies.
        length: of the pickle.
        inputs: memory that the message refers to.
        copy: the bytes of the largest tensor that is copied; larger ones are views of the memory,
            and keep it.
    """

    # Not methods: the unpickler remembers them, and a cycle would hold the memory until the next
    # garbage collection.
    def tensor_at(dtype: str, count: int, shape: tuple[int, ...], offset: int) -> Tensor:
        flat = torch.frombuffer(
            memory, dtype=getattr(torch, dtype), count=count, offset=aligned(length) + offset
        ).view(shape)
        return flat.clone() if flat.nbytes <= copy else flat

    def input_at(
        dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
    ) -> Tensor:
        count = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        assert inputs is not None
        flat = torch.frombuffer(inputs, dtype=getattr(torch, dtype), count=count, offset=offset)
        # What a module writes must stay unseen by others. To map the memory for this process
        # alone would do, but its page faults take up to three times as long as a copy.
        return flat.as_strided(shape, strides).clone()

    reader = _Unpickler(io.BytesIO(memory[:length]))
    reader.readers = {_tensor_at.__name__: tensor_at, _input_at.__name__: input_at}
    return reader.load()


class _Unpickler(pickle.Unpickler):
    readers: dict[str, Callable[..., Tensor]]

    def find_class(self, module: str, name: str) -> Any:
        if module == __name__ and name in self.readers:
            return self.readers[name]
        return super().find_class(module, name)


def _tensor_at(*_: Any) -> Tensor:
    """Stands in a pickle for what reads a tensor from the memory behind it."""
    raise pickle.UnpicklingError("a block must be read where its memory is")


def _input_at(*_: Any) -> Tensor:
    """The same for what lies in memory of the pool."""
    raise pickle.UnpicklingError("a message must be read where its inputs are")


def aligned(size: int) -> int:
    """Bytes that so many take, as what is behind them begins on a line of the cache."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
