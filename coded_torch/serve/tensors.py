"""Tensors as the Open Inference Protocol sends them: raw bytes, or numbers in JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._arguments import count, instance
from .errors import invalid

__all__ = ["DATATYPES", "TensorSpec", "checked", "from_bytes", "from_json", "to_bytes", "to_json"]

#: Those of the protocol that torch computes with.
DATATYPES = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
    "FP64": torch.float64,
}
# Integers of so many bits are held exactly.
_DIGITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """An input or an output of a model that is served.

    Args:
        name: in requests and answers.
        datatype: of the protocol, such as "FP32": a key of :data:`DATATYPES`.
        shape: of one row, without the batch; -1: any size.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: there is no such datatype, or a size is less than -1.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        instance(self, "name", self.name, str)
        if self.datatype not in DATATYPES:
            raise ValueError(
                f"TensorSpec: datatype must be one of {', '.join(DATATYPES)}, got {self.datatype!r}"
            )
        instance(self, "shape", self.shape, Sequence)
        sizes = tuple(count(self, "shape", size, least=-1) for size in self.shape)
        object.__setattr__(self, "shape", sizes)

    @classmethod
    def of(cls, name: str, batch: Tensor) -> TensorSpec:
        """That of a batch ``[B, ...]``.

        Raises:
            TypeError: the protocol has no name for its dtype.
        """
        datatypes = {dtype: datatype for datatype, dtype in DATATYPES.items()}
        if batch.dtype not in datatypes:
            raise TypeError(f"TensorSpec: {name} must be of one of DATATYPES, got {batch.dtype}")
        return cls(name, datatypes[batch.dtype], tuple(batch.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """In torch."""
        return DATATYPES[self.datatype]

    def metadata(self) -> dict[str, Any]:
        """As the protocol describes it; the batch may be of any size."""
        return {"name": self.name, "datatype": self.datatype, "shape": [-1, *self.shape]}

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a row may be of a shape."""
        return len(shape) == len(self.shape) and all(
            ours in (-1, theirs) for ours, theirs in zip(self.shape, shape, strict=True)
        )


def from_bytes(name: str, datatype: str, shape: Sequence[int], data: memoryview) -> Tensor:
    """A tensor from its elements, little-endian and in row-major order.

    Raises:
        RequestError: there are more or fewer bytes than elements need.
    """
    dtype, numbers = DATATYPES[datatype], math.prod(shape)
    if len(data) != numbers * dtype.itemsize:
        raise invalid(
            f"input {name!r} must have {numbers * dtype.itemsize} bytes for shape {list(shape)} of "
            f"{datatype}, got {len(data)}"
        )
    stored = torch.uint8 if dtype is torch.bool else dtype
    tensor = torch.frombuffer(bytearray(data), dtype=stored).reshape(*shape)
    return tensor != 0 if dtype is torch.bool else tensor


def from_json(name: str, datatype: str, shape: Sequence[int], data: Any) -> Tensor:
    """A tensor from numbers, in one list or nested as its shape says.

    Raises:
        RequestError: they are of another shape or kind; a row that is to blame is named.
    """
    if not isinstance(data, list):
        raise invalid(f"the data of input {name!r} must be a list, got {type(data).__name__}")
    array = _array(data)
    numbers = math.prod(shape)
    if array is None or array.shape not in ((numbers,), tuple(shape)):
        raise invalid(
            f"the data of input {name!r} must be {numbers} numbers, in one list or nested as its "
            f"shape {list(shape)}, got {_misshapen(array, shape, data)}"
        )
    dtype = DATATYPES[datatype]
    kinds = "b" if dtype is torch.bool else "iuf" if dtype.is_floating_point else "iu"
    if array.dtype.kind not in kinds:
        raise invalid(f"the data of input {name!r} must be of {datatype}{_alien(array, kinds)}")
    if kinds == "iu":
        least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        if array.min() < least or array.max() > most:
            raise invalid(f"the data of input {name!r} must be within {least} and {most}")
    wide = array.astype({"b": bool, "iu": np.int64, "iuf": np.float64}[kinds])
    return torch.from_numpy(wide).to(dtype).reshape(*shape)


def _array(data: list[Any]) -> np.ndarray[Any, np.dtype[Any]] | None:
    """The numbers as an array; None if it has holes, or more dimensions than arrays have."""
    try:
        return np.array(data)
    except (ValueError, OverflowError):
        return None


def _misshapen(
    array: np.ndarray[Any, np.dtype[Any]] | None, shape: Sequence[int], data: list[Any]
) -> str:
    if array is not None:
        return f"shape {list(array.shape)}"
    for row, values in enumerate(data):
        part = _array(values) if isinstance(values, list) else np.array(values)
        if part is None or part.shape != tuple(shape[1:]):
            return f"{'holes' if part is None else f'shape {list(part.shape)}'} in row {row}"
    return "holes"


def _alien(array: np.ndarray[Any, np.dtype[Any]], kinds: str) -> str:
    """What else is among the numbers."""
    if array.dtype.kind == "O":  # such as null
        rows = array.reshape(len(array), -1)
        for row, values in enumerate(rows):
            for value in values:
                if not isinstance(value, int | float):
                    return f", got {type(value).__name__} in row {row}"
    return f", got {array.dtype.name if array.dtype.kind in 'biuf' else 'text'}"


def checked(spec: TensorSpec, tensor: Tensor) -> Tensor:
    """The tensor in the dtype that the model takes, every row of it finite.

    Raises:
        RequestError: the cast would lose digits, or a row is not finite.
    """
    if not _holds(spec.dtype, tensor.dtype):
        sent = next(name for name, dtype in DATATYPES.items() if dtype is tensor.dtype)
        raise invalid(
            f"input {spec.name!r} must be of {spec.datatype}, or of what {spec.datatype} holds "
            f"without loss, got {sent}"
        )
    tensor = tensor.to(spec.dtype)
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        row = int((~tensor.isfinite()).flatten(1).any(1).nonzero()[0])
        raise invalid(f"input {spec.name!r} must be finite, but row {row} is not")
    return tensor


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of one dtype is one of the other."""
    if wide.is_floating_point and not narrow.is_floating_point:
        return narrow is torch.bool or torch.iinfo(narrow).bits <= _DIGITS[wide]
    return torch.promote_types(wide, narrow) == wide


def to_bytes(tensor: Tensor) -> bytes:
    """The elements, little-endian and in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def to_json(tensor: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """The numbers in one row, as JSON has them; what is not finite becomes null."""
    tensor = tensor.detach().cpu().reshape(-1)
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return tensor.numpy()
