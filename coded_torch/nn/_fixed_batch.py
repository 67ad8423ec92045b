"""A module whose batch size is fixed, for batches of any size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .._arguments import count, instance
from .._layout import CONSTANTS
from .._torch import broadcast_dims, leaf_name, unflatten
from ._division import Inputs


class FixedBatch(nn.Module):
    """Call a module that takes batches of one size, such as an exported program, for any batch.

    The batch is cut into pieces of that size. The last row is repeated to fill the last one, and
    the results of these copies are dropped. So parts of a call may have any number of rows.

    Args:
        module: the module.
        batch_size: the number of rows that it takes.
        out_dims: the batch dimension of its outputs, as in :func:`torch.func.vmap`. An output under
            None is returned as the first piece gave it.
        in_dims: the batch dimension of its positional arguments, as in
            :class:`~coded_torch.CodedWrapper`. Tensors in keyword arguments have their rows in
            dimension 0. Defaults to 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, or, in calls, an output has other
            rows than the piece, or neither rows nor the same value in all pieces.

    Note:
        A call computes up to ``batch_size - 1`` rows more than it has, and so does each part of a
        call by :class:`~coded_torch.CodedWrapper`.

    Example:
        >>> import torch
        >>> from coded_torch import CodedWrapper, workers
        >>> from coded_torch.nn import FixedBatch
        >>> program = torch.jit.trace(torch.nn.Linear(3, 1), torch.zeros(8, 3))
        >>> model = FixedBatch(program, 8, out_dims=0)
        >>> model(torch.zeros(11, 3)).shape
        torch.Size([11, 1])
    """

    def __init__(
        self, module: nn.Module, batch_size: int, *, out_dims: Any, in_dims: Any = 0
    ) -> None:
        super().__init__()
        instance("FixedBatch", "module", module, nn.Module)
        self.module = module
        self.batch_size = count("FixedBatch", "batch_size", batch_size)
        self.out_dims = out_dims
        self.in_dims = in_dims

    def extra_repr(self) -> str:
        return f"batch_size={self.batch_size}, out_dims={self.out_dims}, in_dims={self.in_dims}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's outputs for a batch of any size but 0."""
        inputs = Inputs(args, kwargs, self.in_dims)
        if inputs.batch_size == 0:
            raise ValueError("FixedBatch: inputs must have a row, got 0 rows")
        task = inputs.task(self.out_dims)
        pieces = list[list[Any]]()
        for start in range(0, inputs.batch_size, self.batch_size):
            rows = list(range(start, min(start + self.batch_size, inputs.batch_size)))
            copies = rows[-1:] * (self.batch_size - len(rows))
            piece_args, piece_kwargs = task.payload(rows + copies)
            output = self.module(*piece_args, **piece_kwargs)
            leaves, spec = tree_flatten(output)
            dims = broadcast_dims("out_dims", self.out_dims, spec)
            for i, (leaf, dim) in enumerate(zip(leaves, dims, strict=True)):
                leaves[i] = leaf if dim is None else self._cut(leaf, dim, len(rows), output, i)
            pieces.append(leaves)
        joined = list[Any]()
        for i, (column, dim) in enumerate(zip(zip(*pieces, strict=True), dims, strict=True)):
            first = column[0]
            if dim is not None and isinstance(first, Tensor):
                joined.append(first if len(column) == 1 else torch.cat(column, dim))
                continue
            if dim is not None and any(leaf != first for leaf in column):
                raise ValueError(
                    f"FixedBatch: {leaf_name('output', output, i)} must be the same for all rows, "
                    f"got {column}"
                )
            joined.append(first)
        return unflatten(joined, spec)

    def _cut(self, leaf: Any, dim: int, rows: int, output: Any, i: int) -> Any:
        """Return a leaf without the results of copies. ``output`` and ``i`` are for messages."""
        if isinstance(leaf, CONSTANTS):
            return leaf
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"FixedBatch: {leaf_name('output', output, i)} must be a tensor or a constant, or "
                f"None in out_dims, got a {type(leaf).__name__}"
            )
        if not -leaf.dim() <= dim < leaf.dim() or leaf.shape[dim] != self.batch_size:
            raise ValueError(
                f"FixedBatch: {leaf_name('output', output, i)} must have batch_size="
                f"{self.batch_size} rows at dim {dim}, got shape {tuple(leaf.shape)}; say in "
                "out_dims where its rows are"
            )
        return leaf.narrow(dim, 0, rows)
