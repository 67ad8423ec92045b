r"""Linear maps, of dense matrices and of selections, and the memory of their numbers."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._arguments import count, dense, real_array, shown
from .._torch import placed, to_device

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..input_space.ordering import Grouping

__all__ = ["LinearMap", "MatrixMap", "SelectMap", "accumulation_dtype", "apply_each", "unit_rows"]

_HOST = torch.device("cpu")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which maps compute: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LinearMap(abc.ABC):
    r"""A linear map :math:`\mathbb{R}^n \to \mathbb{R}^N`, applied to every column of a tensor.

    ``map.adjoint`` is the transpose, ``sum(w * map(v)) == sum(map.adjoint(w) * v)``, and both agree
    with ``map.matrix() @ v`` to rounding. Both are differentiable any number of times, and keep the
    device and the dtype of their values; half precision is accumulated in float32.

    A CUDA graph may capture a map that was applied before, on the same device to the same dtype.
    Keep the map, and the grouping if any, for as long as the graph is replayed.

    Subclasses implement ``_apply`` and pass the tensors it needs to ``__init__``, on the host in
    float64 (and in float32 as ``rounded``, if they exist). ``_operands`` returns them in the dtype
    and on the device of the values.
    """

    _takes_any_dtype = False

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *operands: Tensor,
        rounded: tuple[Tensor, ...] | None = None,
    ) -> None:
        if torch.is_inference_mode_enabled():  # a map of inference tensors could not train
            with torch.inference_mode(False):
                LinearMap.__init__(self, num_inputs, num_outputs, *(t.clone() for t in operands))
            return
        self.num_inputs = num_inputs
        self.num_outputs = num_outputs
        # Both dtypes at once: a map that changed on first use would be compiled twice.
        self._placed: dict[tuple[Any, ...], tuple[Tensor, ...]] = {
            (_HOST, torch.float64, 0): operands,
            (_HOST, torch.float32, 0): rounded or _place(operands, torch.float32, _HOST),
        }

    def __call__(self, values: Tensor, dim: int = 0) -> Tensor:
        """Apply the map along ``dim``: ``[..., num_inputs, ...] -> [..., num_outputs, ...]``.

        Raises:
            TypeError: ``values`` is not a dense, strided tensor of float64, float32, bfloat16 or
                float16.
            ValueError: ``values`` has another size than ``num_inputs`` along ``dim``.
        """
        return self._along(values, dim, transpose=False)

    def adjoint(self, values: Tensor, dim: int = 0) -> Tensor:
        """Apply the transpose along ``dim``, from ``num_outputs`` to ``num_inputs``."""
        return self._along(values, dim, transpose=True)

    def gathered(self, batch: Tensor, grouping: Grouping) -> Tensor:
        """Return ``map(grouping.gather(batch))``: ``[B, ...] -> [num_outputs, G, ...]``."""
        return self(grouping.gather(batch))

    def scattered(self, groups: Tensor, grouping: Grouping) -> Tensor:
        """Return ``grouping.scatter(map(groups))``: ``[num_inputs, G, ...] -> [B, ...]``."""
        return grouping.scatter(self(groups))

    def matrix(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Tensor:
        """Return the dense matrix of the map, ``[num_outputs, num_inputs]``, made in float64."""
        identity = torch.eye(self.num_inputs, dtype=torch.float64, device="cpu")
        return self(identity).to(dtype=dtype, device=device)

    def check(self, values: Tensor, dim: int = 0) -> None:
        """Raise the error of :meth:`__call__` for values that the map cannot be applied to."""
        self._dimension(values, dim, self.num_inputs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_inputs} -> {self.num_outputs})"

    @abc.abstractmethod
    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        """Apply the map or its transpose to ``values [n, G, m]``; return ``[N, G, m]``."""

    def _operands(self, values: Tensor) -> tuple[Tensor, ...]:
        dtype, device = accumulation_dtype(values.dtype), values.device

        def make() -> tuple[Tensor, ...]:
            return _place(self._to_place(dtype, device), dtype, device)

        return placed(self, self._placed, device, make, dtype)

    def _to_place(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """Return the operands on the host for ``device``; overridden if it needs others."""
        return self._placed[_HOST, dtype, 0]

    def __getstate__(self) -> dict[str, Any]:
        # The process that receives the map makes copies on its own devices.
        on_host = {key: operands for key, operands in self._placed.items() if key[0] == _HOST}
        return {**self.__dict__, "_placed": on_host}

    def _dimension(self, values: Tensor, dim: int, size: int) -> int:
        name = type(self).__name__
        dense(self, "values", values, floating=not self._takes_any_dtype)
        if type(dim) is not int:
            dim = count(self, "dim", dim, least=None)
        if not -values.dim() <= dim < values.dim():
            raise ValueError(
                f"{name}: dim must be a dimension of values, got dim {shown(dim)} "
                f"for shape {tuple(values.shape)}"
            )
        dim %= values.dim()
        if values.shape[dim] != size:
            raise ValueError(
                f"{name}: values must have size {size} along dim {dim}, "
                f"got shape {tuple(values.shape)}"
            )
        return dim

    def _along(self, values: Tensor, dim: int, transpose: bool) -> Tensor:
        size = self.num_outputs if transpose else self.num_inputs
        dim = self._dimension(values, dim, size)
        before, after = values.shape[:dim], values.shape[dim + 1 :]
        if dim == 0:  # the same in fewer calls, since decoders are small
            result = self._apply(values.reshape(size, 1, after.numel()), transpose)
            return result.view(result.shape[0], *after)
        # [..., n, ...] -> [n, G, m]: views where strides allow, the kernels take any row stride.
        grouped = values.reshape(before.numel(), size, after.numel()).transpose(0, 1)
        result = self._apply(grouped, transpose)
        return result.transpose(0, 1).reshape(*before, result.shape[0], *after)


def _place(
    operands: tuple[Tensor, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    if torch.is_inference_mode_enabled():  # a map made there must still train
        with torch.inference_mode(False):
            return _place(operands, dtype, device)
    if device.type == "cuda" and not torch.compiler.is_compiling():
        with torch._C._DisableFuncTorch():  # the copies outlive any transform
            return tuple(to_device(operands, device))
    return tuple(t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in operands)


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
