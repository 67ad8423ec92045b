r"""Objects as pickles with their tensors beside them, as they lie in shared memory."""

from __future__ import annotations

import io
import mmap
import os
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Pickled", "unpickled"]

_ALIGNMENT = 64  # bytes of a cache line


class Pickled:
    """The pickle of an object without its tensors, and the tensors with their places.

    Classes go by name, and classes of an interactive session by value.

    Raises:
        Exception: whatever keeps ``value`` from being pickled.
    """

    def __init__(self, value: Any) -> None:
        try:
            writer, buffer = self._written(value, _Pickler)
        except _InteractiveError as error:
            writer, buffer = self._written(value, _by_value(error))
        self.stream = buffer.getbuffer()
        self.tensors, self.packages = writer.tensors, writer.packages
        self.start = _aligned(len(self.stream))
        self.size = self.start + writer.size

    def _written(
        self, value: Any, pickler: type[_TensorPickler]
    ) -> tuple[_TensorPickler, io.BytesIO]:
        buffer = io.BytesIO()
        writer: Any = pickler(buffer, pickle.HIGHEST_PROTOCOL)
        writer.dump(value)
        return writer, buffer

    def write(self, memory: mmap.mmap | memoryview) -> None:
        """Write pickle and tensors to the beginning of ``memory``, and release the tensors."""
        memory[: len(self.stream)] = self.stream
        for tensor, offset in self.tensors:
            place = torch.frombuffer(
                memory, dtype=tensor.dtype, count=tensor.numel(), offset=self.start + offset
            )
            place.view(tensor.shape).copy_(tensor.detach())
        self.tensors = []


class _TensorPickler:
    """Mixed into a pickler: it pickles dtype, shape and place of plain tensors."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tensors: list[tuple[Tensor, int]] = []
        self.size = 0
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
        offset = self.size
        self.tensors.append((obj, offset))
        self.size += _aligned(count * obj.element_size())
        return _tensor_at, (dtype, count, tuple(obj.shape), offset)

    def reduce_other(self, obj: Any) -> Any:
        """Return how to pickle any other object."""
        return NotImplemented


class _InteractiveError(pickle.PicklingError):
    """A class or function that no other process can find by its name."""


class _Pickler(_TensorPickler, pickle.Pickler):
    def reduce_other(self, obj: Any) -> Any:
        # Classes and functions go by name: other processes have to find them.
        if (
            isinstance(obj, type | types.FunctionType)
            and obj.__module__ == "__main__"
            and not os.path.isfile(getattr(sys.modules["__main__"], "__file__", ""))
        ):
            raise _InteractiveError(f"{obj.__qualname__} belongs to an interactive session")
        return NotImplemented


def _by_value(error: _InteractiveError) -> type[_TensorPickler]:
    """Return a pickler that sends the classes of an interactive session by value."""
    try:
        from cloudpickle import CloudPickler as Base
    except ImportError:
        raise pickle.PicklingError(
            f"{error}; install cloudpickle, or define it in a file that can be imported"
        ) from None

    class CloudPickler(_TensorPickler, Base):  # type: ignore[misc]
        def reduce_other(self, obj: Any) -> Any:
            return Base.reducer_override(self, obj)

    return CloudPickler


def unpickled(memory: memoryview, length: int, copy: int = 0) -> Any:
    """Read an object.

    Args:
        memory: the memory that the object was written to.
        length: the length of the pickle.
        copy: the bytes up to which tensors are copied. Larger ones are views, which keep the
            memory.
    """

    # Not a method: the unpickler remembers it, and a cycle would hold the memory until the next
    # garbage collection.
    def tensor_at(dtype: str, count: int, shape: tuple[int, ...], offset: int) -> Tensor:
        flat = torch.frombuffer(
            memory, dtype=getattr(torch, dtype), count=count, offset=_aligned(length) + offset
        ).view(shape)
        return flat.clone() if flat.nbytes <= copy else flat

    reader = _Unpickler(io.BytesIO(memory[:length]))
    reader.tensor_at = tensor_at
    return reader.load()


class _Unpickler(pickle.Unpickler):
    tensor_at: Callable[..., Tensor]

    def find_class(self, module: str, name: str) -> Any:
        if module == __name__ and name == _tensor_at.__name__:
            return self.tensor_at
        return super().find_class(module, name)


def _tensor_at(*_: Any) -> Tensor:
    """Stand in a pickle for the function that reads a tensor from the memory behind it."""
    raise pickle.UnpicklingError("a block must be read where its memory is")


def _aligned(size: int) -> int:
    """Return the bytes that so many take, as the next tensor begins on a cache line."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
