r"""Linear maps along one dimension of a tensor: the seam between codes and kernels.

A code says *what* its encoder and decoders are; a :class:`LinearMap` knows *how* to apply them to
tensors of millions of columns. Maps are planned once, on the host, in float64, and are immutable.
"""

from __future__ import annotations

import abc
import operator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["LinearMap", "MatrixMap"]

_VALUE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which maps compute on values of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LinearMap(abc.ABC):
    r"""A linear map :math:`\mathbb{R}^n \to \mathbb{R}^N`, applied to every column of a tensor.

    Laws: ``map.adjoint`` is the transpose, ``sum(w * map(v)) == sum(map.adjoint(w) * v)``, and both
    agree with ``map.matrix() @ v`` to rounding. Both are differentiable any number of times, run on
    the device of their values, and return the dtype of their values; half precision is accumulated
    in float32.

    Subclasses implement :meth:`_apply`.
    """

    num_inputs: int
    num_outputs: int

    def __call__(self, values: Tensor, dim: int = 0) -> Tensor:
        """Apply the map along ``dim``.

        Args:
            values: ``[..., num_inputs, ...]``, float64, float32, bfloat16 or float16.
            dim: the dimension that the map replaces.

        Returns:
            ``[..., num_outputs, ...]``, the same in every other dimension.

        Raises:
            TypeError: ``values`` is not a tensor of a supported dtype.
            ValueError: ``values`` has another size than ``num_inputs`` along ``dim``.
        """
        return self._along(values, dim, transpose=False)

    def adjoint(self, values: Tensor, dim: int = 0) -> Tensor:
        """Apply the transpose along ``dim``: ``[..., num_outputs, ...] -> [..., num_inputs, ...]``.

        Raises as :meth:`__call__` does.
        """
        return self._along(values, dim, transpose=True)

    def matrix(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Tensor:
        """The dense matrix of the map, ``[num_outputs, num_inputs]``, computed in float64."""
        identity = torch.eye(self.num_inputs, dtype=torch.float64)
        return self(identity).to(dtype=dtype, device=device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_inputs={self.num_inputs}, num_outputs={self.num_outputs})"

    @abc.abstractmethod
    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        """Apply the map or its transpose to ``values [n, G, m]``; returns ``[N, G, m]``."""

    def _along(self, values: Tensor, dim: int, transpose: bool) -> Tensor:
        name, size = type(self).__name__, self.num_outputs if transpose else self.num_inputs
        if not isinstance(values, Tensor):
            raise TypeError(f"{name}: values must be a tensor, got {type(values).__name__}")
        if values.dtype not in _VALUE_DTYPES:
            raise TypeError(
                f"{name}: values must be float64, float32, bfloat16 or float16, got {values.dtype}"
            )
        dim = operator.index(dim)
        if not -values.dim() <= dim < values.dim():
            raise ValueError(f"{name}: dim must be a dimension of values, got dim {dim} "
                             f"for shape {tuple(values.shape)}")
        dim %= values.dim()
        if values.shape[dim] != size:
            raise ValueError(
                f"{name}: values must have size {size} along dim {dim}, "
                f"got shape {tuple(values.shape)}"
            )
        before, after = values.shape[:dim], values.shape[dim + 1 :]
        # [..., n, ...] -> [n, G, m]: views where strides allow, the kernels take any row stride.
        grouped = values.reshape(before.numel(), size, after.numel()).transpose(0, 1)
        out = self._apply(grouped, transpose)
        return out.transpose(0, 1).reshape(*before, out.shape[0], *after)


class MatrixMap(LinearMap):
    r"""The map of a dense matrix, applied as one matrix product.

    Args:
        matrix: ``[num_outputs, num_inputs]``, finite; kept in float64.

    Raises:
        ValueError: ``matrix`` is not two-dimensional, or not finite.

    Note:
        :math:`O(n N)` per column.

    Example:
        >>> import torch
        >>> from coded_torch.linear import MatrixMap
        >>> mean = MatrixMap([[0.5, 0.5]])
        >>> mean(torch.tensor([1.0, 3.0]))
        tensor([2.])
    """

    def __init__(self, matrix: ArrayLike | Tensor) -> None:
        array = torch.as_tensor(np.array(matrix, dtype=np.float64))
        if array.dim() != 2:
            raise ValueError(
                f"MatrixMap: matrix must have two dimensions, got shape {tuple(array.shape)}"
            )
        if not bool(torch.isfinite(array).all()):
            raise ValueError("MatrixMap: matrix must be finite, got NaN or infinity")
        self.num_outputs, self.num_inputs = array.shape
        self._matrices = {(torch.float64, array.device): array}

    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        dtype = accumulation_dtype(values.dtype)
        key = (dtype, values.device)
        matrix = self._matrices.get(key)
        if matrix is None:
            cpu = self._matrices[torch.float64, torch.device("cpu")]
            matrix = self._matrices[key] = cpu.to(dtype=dtype, device=values.device)
        if transpose:
            matrix = matrix.T
        # Autocast would round the matrix to half precision, which decoders cannot afford.
        with torch.autocast(values.device.type, enabled=False):
            columns = values.reshape(values.shape[0], -1).to(dtype)
            out = (matrix @ columns).to(values.dtype)
        return out.reshape(matrix.shape[0], *values.shape[1:])
