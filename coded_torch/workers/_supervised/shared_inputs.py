r"""Shared memory that inputs are encoded into, once for all machines of a pool."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._buffers import Buffers
from .shared_memory import MOST_BLOCKS, Block, Inputs, rounded

__all__ = ["SharedInputs"]


class SharedInputs:
    """Memory that messages of all connections may refer to, see :class:`Buffers`.

    It is in use as long as the tensor that was handed out is held, or a machine holds what it has
    read there.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[int, Block]] = {}  # by address
        self._buffers = Buffers(self._make, MOST_BLOCKS)

    def take(self, num_bytes: int) -> Tensor | None:
        """As :meth:`Buffers.take`."""
        return self._buffers.take(num_bytes)

    def clear(self) -> None:
        """As :meth:`Buffers.clear`."""
        self._buffers.clear()
        self._blocks = {}

    def find(self, tensor: Tensor) -> Inputs | None:
        """Where a tensor lies, if it lies here."""
        found = self._blocks.get(tensor.untyped_storage().data_ptr())
        plain = not (tensor.is_conj() or tensor.is_neg())
        return Inputs(tensor, *found) if found and plain else None

    def _make(self, place: int, num_bytes: int) -> Tensor:
        block = Block(rounded(num_bytes))
        memory = torch.frombuffer(block.memory, dtype=torch.uint8)
        others = {at: found for at, found in self._blocks.items() if found[0] != place}
        self._blocks = {**others, memory.data_ptr(): (place, block)}
        return memory
