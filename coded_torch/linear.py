r"""Linear maps along one dimension of a tensor: the seam between codes and kernels.

A code says *what* its encoder and decoders are; a :class:`LinearMap` knows *how* to apply them to
tensors of millions of columns. Maps are planned once, on the host, in float64, and are immutable.
"""

from __future__ import annotations

import abc
import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from ._extension import curve_plan

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from .grouping import Grouping

__all__ = ["LinearMap", "MatrixMap", "SelectMap", "SplineMap"]

_VALUE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


_HOST = torch.device("cpu")
# Bytes, as wide as the widest access.
_ALIGNMENT = 16
# With rows of indices the columns of each group fill tiles of their own, where groups side by side
# share them. For fewer columns than these, copying the rows costs less than tiles half empty.
_FUSED_COLUMNS = 256


def _place(
    operands: tuple[Tensor, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    if torch.is_inference_mode_enabled():  # as in LinearMap.__init__
        with torch.inference_mode(False):
            return _place(operands, dtype, device)
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return _in_one_copy(operands, device, pin=True)  # from the host, of this dtype already
    return tuple(t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in operands)


def _in_one_copy(
    operands: tuple[Tensor, ...], device: torch.device, pin: bool
) -> tuple[Tensor, ...]:
    """Host tensors on ``device``: from pinned memory in one copy, for which nobody waits."""
    sizes = [t.numel() * t.element_size() for t in operands]
    spans = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    staged = torch.empty(sum(spans), dtype=torch.uint8, pin_memory=pin)
    for span, size, t in zip(staged.split(spans), sizes, operands, strict=True):
        span[:size].copy_(t.contiguous().view(-1).view(torch.uint8))
    parts = staged.to(device, non_blocking=True).split(spans)
    return tuple(
        part[:size].view(t.dtype).view(t.shape)
        for part, size, t in zip(parts, sizes, operands, strict=True)
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which maps compute on values of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LinearMap(abc.ABC):
    r"""A linear map :math:`\mathbb{R}^n \to \mathbb{R}^N`, applied to every column of a tensor.

    Laws: ``map.adjoint`` is the transpose, ``sum(w * map(v)) == sum(map.adjoint(w) * v)``, and both
    agree with ``map.matrix() @ v`` to rounding. Both are differentiable any number of times, run on
    the device of their values, and return the dtype of their values; half precision is accumulated
    in float32.

    A CUDA graph may capture a map that was applied before, on the same device to the same dtype. It
    reads the map's memory at every replay: keep the map, and the grouping if any, for as long.

    Subclasses implement :meth:`_apply` and pass the tensors it needs to ``__init__``, on the host
    and in float64 (``rounded``: the same in float32, where they are at hand); :meth:`_operands`
    hands them out in the dtype and on the device of the values.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *operands: Tensor,
        rounded: tuple[Tensor, ...] | None = None,
    ) -> None:
        if torch.is_inference_mode_enabled():  # no inference tensors: the map must still train
            with torch.inference_mode(False):
                LinearMap.__init__(self, num_inputs, num_outputs, *(t.clone() for t in operands))
            return
        self.num_inputs = num_inputs
        self.num_outputs = num_outputs
        # Both dtypes at once: a map that changed on first use would be compiled twice.
        self._placed: dict[tuple[object, ...], tuple[Tensor, ...]] = {
            (torch.float64, _HOST): operands,
            (torch.float32, _HOST): rounded or _place(operands, torch.float32, _HOST),
        }

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

    def gathered(self, batch: Tensor, grouping: Grouping) -> Tensor:
        """Apply the map to the groups of a batch: ``map(grouping.gather(batch))``.

        Args:
            batch: ``[B, ...]``.
            grouping: of B rows in groups of ``num_inputs``.

        Returns:
            ``[num_outputs, G, ...]``.

        Raises:
            TypeError: as :meth:`__call__`.
            ValueError: the batch has another size than the grouping.
        """
        return self(grouping.gather(batch))

    def scattered(self, groups: Tensor, grouping: Grouping) -> Tensor:
        """Apply the map and put its results in a batch's order: ``grouping.scatter(map(groups))``.

        Args:
            groups: ``[num_inputs, G, ...]``.
            grouping: of B rows in G groups of ``num_outputs``.

        Returns:
            ``[B, ...]``.

        Raises:
            TypeError: as :meth:`__call__`.
            ValueError: the groups have other sizes than the map and the grouping.
        """
        return grouping.scatter(self(groups))

    def matrix(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Tensor:
        """The dense matrix of the map, ``[num_outputs, num_inputs]``, computed in float64."""
        identity = torch.eye(self.num_inputs, dtype=torch.float64)
        return self(identity).to(dtype=dtype, device=device)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_inputs={self.num_inputs}, num_outputs={self.num_outputs})"
        )

    @abc.abstractmethod
    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        """Apply the map or its transpose to ``values [n, G, m]``; returns ``[N, G, m]``."""

    def _operands(self, values: Tensor) -> tuple[Tensor, ...]:
        dtype, device = accumulation_dtype(values.dtype), values.device
        key: tuple[object, ...] = (dtype, device)
        if device.type == "cuda" and not torch.compiler.is_compiling():
            if torch.cuda.is_current_stream_capturing():
                return self._operands_of_warm_up(dtype, device)
            # Each stream has its own: its order is all that separates the copy from its uses, and
            # the last use from the memory's next.
            key = (dtype, device, torch.cuda.current_stream(device).cuda_stream)
        operands = self._placed.get(key)
        if operands is None:
            operands = self._placed[key] = _place(self._placed[dtype, _HOST], dtype, device)
        return operands

    def _operands_of_warm_up(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """What an earlier call placed: a copy made during capture would be part of the graph."""
        for key, operands in list(self._placed.items()):
            if key[:2] == (dtype, device):
                return operands
        raise RuntimeError(
            f"{type(self).__name__}: the map must have been applied to {dtype} values on {device} "
            "before it is captured in a CUDA graph, got none"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Copies on other devices are made again where the map arrives.
        on_host = {key: operands for key, operands in self._placed.items() if key[1] == _HOST}
        return {**self.__dict__, "_placed": on_host}

    def check(self, values: Tensor, dim: int = 0) -> None:
        """Raise what :meth:`__call__` raises for values that the map cannot be applied to."""
        self._dimension(values, dim, self.num_inputs)

    def _takes(self, dtype: torch.dtype) -> bool:
        return dtype in _VALUE_DTYPES

    def _dimension(self, values: Tensor, dim: int, size: int) -> int:
        name = type(self).__name__
        if not isinstance(values, Tensor):
            raise TypeError(f"{name}: values must be a tensor, got {type(values).__name__}")
        if not self._takes(values.dtype):
            raise TypeError(
                f"{name}: values must be float64, float32, bfloat16 or float16, got {values.dtype}"
            )
        dim = operator.index(dim)
        if not -values.dim() <= dim < values.dim():
            raise ValueError(
                f"{name}: dim must be a dimension of values, got dim {dim} "
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
        if dim == 0:  # as below, in as few calls as a decoder of a few microseconds can afford
            out = self._apply(values.reshape(size, 1, after.numel()), transpose)
            return out.view(out.shape[0], *after)
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
        array = real_array("MatrixMap: matrix", matrix)
        if array.ndim != 2:
            raise ValueError(f"MatrixMap: matrix must have two dimensions, got shape {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError("MatrixMap: matrix must be finite, got NaN or infinity")
        super().__init__(array.shape[1], array.shape[0], torch.from_numpy(array))

    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        (matrix,) = self._operands(values)
        return _product(matrix.T if transpose else matrix, values)


def _product(matrix: Tensor, values: Tensor) -> Tensor:
    """``[N, n] x [n, G, m] -> [N, G, m]`` in the dtype of the matrix."""
    # Autocast would round the matrix to half precision, which decoders cannot afford.
    with torch.autocast(values.device.type, enabled=False):
        # Contiguous, because BLAS rounds a strided view of the same numbers differently.
        columns = values.flatten(1).to(matrix.dtype).contiguous()
        out = (matrix @ columns).to(values.dtype)
    return out.reshape(matrix.shape[0], *values.shape[1:])


class SelectMap(LinearMap):
    """A map most of whose outputs are one of the inputs, bit for bit; the others are combinations.

    Args:
        num_inputs: n.
        source: ``[N]``, the input that each output is, or -1 where it is combined.
        used: ``[M]``, the inputs that combinations are made of. With none, the map only selects,
            and takes values of any dtype.
        weights: ``[L, M]``, of the L outputs with a source of -1, in order; or ``[1, M]``, of all
            of them.

    Note:
        One copy of the outputs, and :math:`O(L M)` per column. The last bits of combinations may
        depend on the number of threads, as those of matrix products do.

    Example:
        >>> import torch
        >>> from coded_torch.linear import SelectMap
        >>> map = SelectMap(2, torch.tensor([1, -1, 0]), torch.tensor([0, 1]), [[0.5, 0.5]])
        >>> map(torch.tensor([1.0, 2.0]))
        tensor([2.0000, 1.5000, 1.0000])
    """

    def __init__(
        self, num_inputs: int, source: Tensor, used: Tensor, weights: ArrayLike | Tensor
    ) -> None:
        combined = (source < 0).nonzero().flatten()
        matrix = torch.as_tensor(weights, dtype=torch.float64)
        if matrix.shape not in ((len(combined), len(used)), (1, len(used))):
            raise ValueError(
                f"SelectMap: weights must have shape ({len(combined)}, {len(used)}), a row for "
                f"each combined output, or one for all, got {tuple(matrix.shape)}"
            )
        self._only_selects = not (len(combined) or len(used))
        super().__init__(num_inputs, len(source), source.clamp(min=0), combined, used, matrix)

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
        out = zeros.index_add(0, source, chosen)
        if len(combined):
            parts = values.index_select(0, combined)
            if len(matrix) == 1:
                parts = parts.sum(0, keepdim=True, dtype=accumulation_dtype(values.dtype))
            out = out.index_add(0, used, _product(matrix.T, parts).to(values.dtype))
        return out

    def _takes(self, dtype: torch.dtype) -> bool:
        return self._only_selects or super()._takes(dtype)


class SplineMap(LinearMap):
    r"""From the values at the knots to a natural cubic smoothing spline's values at the points.

    The curve minimises, in the mean convention of the paper,

    .. math:: \frac{1}{n} \sum_i w_i (y_i - g(t_i))^2 + \lambda \int g''(t)^2 \, dt ,

    and continues as its tangent beyond the first and the last knot. ``smoothing = 0`` interpolates;
    straight lines are reproduced for every smoothing. (``scipy.interpolate.make_smoothing_spline``
    has a plain sum: ``lam = n * smoothing``.)

    Args:
        knots: ``[n]``, finite, strictly increasing, ``n >= 1``.
        points: ``[N]``, finite, in any order.
        smoothing: :math:`\lambda`, finite, at least 0.
        weights: ``[n]``, :math:`w`, finite, positive; all 1 by default.

    Raises:
        TypeError: an argument is not an array of real numbers.
        ValueError: an argument violates its requirement; the message names it and the value. So
            does a plan that float32 cannot hold: gaps, or distances of points from the knots, some
            1e38 times the mean gap or its inverse, smoothing of 1e150 times its cube.

    Note:
        Planning costs :math:`O(n + N \log n)` on the host, applying :math:`O(n + N)` per column in
        one pass over the values. The result of a column depends on nothing but the column, bit for
        bit. One knot gives a constant, two a straight line.

    References:
        Wecker and Ansley, *The signal extraction approach to nonlinear regression and spline
        smoothing*, J. Am. Stat. Assoc. 78, 1983. Green and Silverman, *Nonparametric Regression and
        Generalized Linear Models*, 1994.

    Example:
        >>> import torch
        >>> from coded_torch.linear import SplineMap
        >>> curve = SplineMap(knots=[0.0, 1.0, 3.0], points=[0.5, 2.0, 4.0])
        >>> curve(torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64))
        tensor([0.5000, 2.0000, 4.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        knots: ArrayLike,
        points: ArrayLike,
        *,
        smoothing: float = 0.0,
        weights: ArrayLike | None = None,
    ) -> None:
        smoothing = check_smoothing("smoothing spline: smoothing", smoothing)
        t, z = _numbers("knots", knots), _numbers("points", points)
        w = None if weights is None else _numbers("weights", weights)
        exact, rounded, schedule = map(torch.from_numpy, curve_plan(t, z, smoothing, w))
        super().__init__(len(t), len(z), exact, schedule, rounded=(rounded, schedule))

    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        coefficients, schedule = self._operands(values)
        return ops.spline_apply(values, coefficients, schedule, transpose=transpose)

    def gathered(self, batch: Tensor, grouping: Grouping) -> Tensor:
        """As :meth:`LinearMap.gathered`, reading the rows where they lie."""
        self._dimension(batch, 0, grouping.batch_size)
        num_columns = batch.shape[1:].numel()
        if num_columns < _FUSED_COLUMNS:
            return super().gathered(batch, grouping)
        coefficients, schedule = self._operands(batch)
        rows = batch.reshape(len(batch), num_columns)
        gather = grouping.to(batch.device).rows
        out = ops.spline_apply(rows, coefficients, schedule, gather=gather)  # [N, G, m]
        return out.view(*out.shape[:2], *batch.shape[1:])

    def scattered(self, groups: Tensor, grouping: Grouping) -> Tensor:
        """As :meth:`LinearMap.scattered`, writing the rows where they belong."""
        for dim, size in enumerate((self.num_inputs, grouping.num_groups)):
            self._dimension(groups, dim, size)
        num_columns = groups.shape[2:].numel()
        if num_columns < _FUSED_COLUMNS:
            return super().scattered(groups, grouping)
        coefficients, schedule = self._operands(groups)
        out = ops.spline_apply(
            groups.reshape(*groups.shape[:2], num_columns), coefficients, schedule,
            scatter=grouping.to(groups.device).targets, num_rows=grouping.batch_size,
        )  # fmt: skip
        return out.view(len(out), *groups.shape[2:])


def real_array(argument: str, numbers: ArrayLike) -> NDArray[np.float64]:
    """The numbers as a float64 array of their own; ``argument`` is the operation and its name."""
    if isinstance(numbers, Tensor):
        numbers = numbers.detach().cpu().numpy()
    try:
        array = np.array(numbers)
    except ValueError:  # ragged
        array = np.array(None)
    if array.size and array.dtype.kind not in "fiu":
        raise TypeError(f"{argument} must be real numbers, got {numbers!r}")
    return array.astype(np.float64)


def _numbers(argument: str, numbers: ArrayLike) -> NDArray[np.float64]:
    if type(numbers) is np.ndarray and numbers.dtype == np.float64:
        return numbers  # as it is: the planner only reads it
    return real_array(f"smoothing spline: {argument}", numbers)


def check_smoothing(argument: str, smoothing: float) -> float:
    """The smoothing as a float; ``argument`` is the operation and the name of what was given."""
    if type(smoothing) is float and 0 <= smoothing < np.inf:
        return smoothing
    array = real_array(argument, smoothing)
    if array.size != 1:
        raise TypeError(f"{argument} must be a real number, got {smoothing!r}")
    number = float(array.item())
    if not 0 <= number < np.inf:
        raise ValueError(f"{argument} must be finite and >= 0, got {number}")
    return number
