r"""The maps of dense matrices, and the maps that mostly select."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._arguments import real_array
from .base import LinearMap, accumulation_dtype

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["MatrixMap", "SelectMap", "apply_each", "unit_rows"]


class MatrixMap(LinearMap):
    r"""The map of a dense matrix, applied as one matrix product, :math:`O(n N)` per column.

    Args:
        matrix: ``[num_outputs, num_inputs]``, finite; kept in float64.

    Raises:
        ValueError: ``matrix`` is not two-dimensional, or not finite.

    Example:
        >>> import torch
        >>> from coded_torch.linear import MatrixMap
        >>> mean = MatrixMap([[0.5, 0.5]])
        >>> mean(torch.tensor([1.0, 3.0]))
        tensor([2.])
    """

    def __init__(self, matrix: ArrayLike | Tensor) -> None:
        array = real_array(self, "matrix", matrix)
        if array.ndim != 2:
            raise ValueError(f"MatrixMap: matrix must have two dimensions, got shape {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError("MatrixMap: matrix must be finite, got NaN or infinity")
        super().__init__(array.shape[1], array.shape[0], torch.from_numpy(array))

    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        (matrix,) = self._operands(values)
        return _product(matrix.T if transpose else matrix, values)


def _product(matrix: Tensor, values: Tensor) -> Tensor:
    """Return ``[..., N, n] x [..., n, *] -> [..., N, *]``, computed in the dtype of the matrix."""
    last = matrix.dim() - 1
    # Autocast would round the matrix to half precision, which decoders cannot afford.
    with torch.autocast(values.device.type, enabled=False):
        # Contiguous, because BLAS rounds a strided view of the same numbers differently.
        columns = values.unsqueeze(-1).flatten(last).to(matrix.dtype).contiguous()
        out = (matrix @ columns).to(values.dtype)
    return out.reshape(*out.shape[:last], *values.shape[last:])


def apply_each(matrices: Tensor, values: Tensor) -> Tensor:
    """Apply one float64 matrix to each of several tensors: ``[P, n, ...] -> [P, N, ...]``."""
    matrices = matrices.to(values.device, accumulation_dtype(values.dtype))
    return _product(matrices, values)


class SelectMap(LinearMap):
    """A map most of whose outputs are one of the inputs, bit for bit; the others are combinations.

    It costs one copy of the outputs, and :math:`O(L M)` per column. The last bits of combinations
    may depend on the number of threads, as in all matrix products.

    Args:
        num_inputs: n, the number of inputs.
        source: ``[N]``, int64, the input that each output is, or -1 for a combination.
        used: ``[M]``, int64, the inputs that combinations are made of. If there are none, the map
            takes values of any dtype.
        weights: ``[L, M]``, of the L outputs with a source of -1, in order; or ``[1, M]``, of all
            of them.
    """

    def __init__(self, num_inputs: int, source: Tensor, used: Tensor, weights: Tensor) -> None:
        matrix = weights.double()
        combined = (source < 0).nonzero().flatten()
        self._takes_any_dtype = not (len(combined) or len(used))
        source = source.clamp(min=0)
        rounded = source, combined, used, weights.float()
        super().__init__(num_inputs, len(source), source, combined, used, matrix, rounded=rounded)

    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        source, combined, used, matrix = self._operands(values)
        if not transpose:
            out = values.index_select(0, source)
            if len(combined):
                parts = _product(matrix, values.index_select(0, used))
                out = out.index_copy(0, combined, parts.expand(len(combined), *parts.shape[1:]))
            return out
        chosen = values.index_fill(0, combined, 0) if len(combined) else values
        zeros = values.new_zeros(self.num_inputs, *values.shape[1:])
        out = ops.add_rows(zeros, source, chosen)
        if len(combined):
            parts = values.index_select(0, combined)
            if len(matrix) == 1:
                parts = parts.sum(0, keepdim=True, dtype=accumulation_dtype(values.dtype))
            out = out.index_add(0, used, _product(matrix.T, parts).to(values.dtype))
        return out


def unit_rows(matrix: Tensor) -> Tensor:
    """Return the column that each row of a matrix passes on bit for bit, or -1, ``[rows]``."""
    picked = matrix.argmax(1)
    unit = (matrix != 0).sum(1).eq(1) & matrix.gather(1, picked[:, None]).squeeze(1).eq(1)
    return torch.where(unit, picked, -1)
