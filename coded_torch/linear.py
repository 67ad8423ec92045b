r"""Linear maps along one dimension of a tensor, planned once, on the host, in float64.

This is the only file above ``ops`` that knows kernels of splines.
"""

from __future__ import annotations

import abc
import functools
import json
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from . import ops
from ._arguments import count, dense, nonnegative, real_array, shown
from ._extension import (
    CUDA_FAILURES,
    WARM_CALLS,
    _allows_tf32,
    curve_plan,
    exact_matmul,
    launches,
    seconds_on_device,
)
from ._torch import placed, to_device

if TYPE_CHECKING:
    from .input_space._ordering import Grouping

__all__ = ["LinearMap", "MatrixMap", "SplineMap"]

_HOST = torch.device("cpu")
# Instructions of a warp for 32 columns of float32, counted in the machine code that NVRTC 13 makes
# for sm_90: of the sweeps per knot and per point, and of the product per entry of the matrix.
_PER_KNOT = 145
_PER_POINT = 48
_PER_ENTRY = 1.48
_ROWS = 16  # matrices have their rows in multiples of this number (kDenseRows in dense_block.h)
# An instruction of a sweep takes this many times longer, since it depends on the one before. No
# GPU has measured it yet (csrc/README.md).
_WAITING = 1.5
# Knots and points at which a GPU shows whether its kernels or cuBLAS are faster. Values and
# results have so many bytes, more than a GPU's cache, and columns, for all multiprocessors.
_TIMED = ((32, 40), (128, 160), (512, 640))
_TIMED_BYTES = 64 << 20
_TIMED_COLUMNS = 1 << 15
_TIMED_CALLS = 2
_TIMED_RUNS = 5
_TIMED_SECONDS = 0.25  # of a dtype, after which no other size is timed
_ANY_NUMBER = 1 << 62
_MARGIN = 1.1  # how many times longer kernels take before cuBLAS takes over
# Columns from which rows are read by index: the columns of each group then fill tiles of their own,
# and for fewer columns copying the rows costs less than tiles half empty.
_FUSED_COLUMNS = 256
# Unlike `torch.cuda.is_available`, this does not begin to use CUDA.
_num_gpus = functools.cache(lambda: torch.cuda.device_count())
# Numbers of a matrix, 192 MB in both dtypes. Larger plans have none: without kernels, they run on
# the host.
_MOST = 1 << 24


def _knots_by_user() -> int | None:
    """Return the knots beyond which cuBLAS multiplies, if the user says so."""
    text = os.environ.get("CODED_TORCH_CUBLAS_KNOTS")
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"CODED_TORCH_CUBLAS_KNOTS must be an integer of at least 0, got {text!r}")
    return int(text)


_KNOTS = _knots_by_user()
# Seconds of kernels and of cuBLAS at each of the sizes, by the number of a device and the dtype.
_times: dict[tuple[int, torch.dtype], tuple[tuple[float, float], ...]] = {}
_timing = threading.Lock()


def times_on_card(device: int, dtype: torch.dtype) -> tuple[tuple[float, float], ...]:
    """Return the seconds of kernels and of cuBLAS at 32, 128 and 512 knots, as time allows.

    A GPU is timed once for each dtype, and the numbers are kept beside its kernels. Empty while
    another thread times it, and where a kernel is not used or memory is short.
    """
    found = _times.get((device, dtype))
    if found is None and _timing.acquire(blocking=False):
        try:
            # A thread of its own has none of the caller's modes, transforms and streams.
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(_time_card, device, dtype).result()
        except RuntimeError:  # of CUDA, such as no memory: kernels go on
            found = ()
        finally:
            _timing.release()
        _times[device, dtype] = found
    return found or ()


def _time_card(device: int, dtype: torch.dtype) -> tuple[tuple[float, float], ...]:
    """Do as :func:`times_on_card`, and keep the times of a card for later processes."""
    kernels = torch.ops.coded_torch
    card = torch.cuda.get_device_properties(device)
    key = f"times of {dtype} on {card.name}, {card.multi_processor_count} multiprocessors, "
    key += f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    if kept := kernels._keep(key, ""):
        return tuple((kernel, cublas) for kernel, cublas in json.loads(kept))
    kernels._relax()
    times: list[tuple[float, float]] = []
    begin = time.monotonic()
    stream = torch.cuda.Stream(device)
    with torch.inference_mode(), torch.cuda.device(device), torch.cuda.stream(stream):
        for num_knots, num_points in _TIMED:
            if times and time.monotonic() - begin > _TIMED_SECONDS:
                break
            knots = np.linspace(-1, 1, num_knots)
            map = SplineMap(knots, np.linspace(-1, 1, num_points), smoothing=1e-6)
            columns = _TIMED_BYTES // (dtype.itemsize * (num_knots + num_points))
            shape = (num_knots, 1, max(columns, _TIMED_COLUMNS))
            # Not random numbers, as the caller's would be others afterwards.
            numbers = torch.arange(math.prod(shape), device=f"cuda:{device}", dtype=torch.float32)
            values = numbers.sin_().to(dtype).view(shape)
            del numbers
            map._by_kernel(values, False)  # tried, and compiled, before the clock runs
            before = sum(launches(device).values())
            if not times:
                begin = time.monotonic()
            both = (partial(f, values, False) for f in (map._by_kernel, map._by_matrix))
            kernel, cublas = seconds_on_device([*both], _TIMED_CALLS, _TIMED_RUNS)
            made = WARM_CALLS + _TIMED_CALLS * _TIMED_RUNS
            if sum(launches(device).values()) - before < made:
                return ()  # a fallback was timed
            times.append((kernel, cublas))
    kept = json.loads(kernels._keep(key, json.dumps(times)))
    return tuple((kernel, cublas) for kernel, cublas in kept)


@functools.lru_cache
def slower_kernels(times: tuple[tuple[float, float], ...]) -> tuple[tuple[int, int], ...]:
    """Return the first and last knots of each range in which cuBLAS is faster by the margin.

    Between the sizes timed, the logarithm of the ratio is interpolated. Beyond, it is constant.
    """
    sizes = [knots for knots, _ in _TIMED[: len(times)]]
    knots = np.arange(1, sizes[-1] + 1)
    ratios = np.log([kernel / cublas for kernel, cublas in times])
    is_slower = np.interp(np.log(knots), np.log(sizes), ratios) > np.log(_MARGIN)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_slower, [False]]))).tolist()
    return tuple(
        (first + 1, _ANY_NUMBER if last == sizes[-1] else last)
        for first, last in zip(edges[::2], edges[1::2], strict=True)
    )


def cublas_ranges(device: int, dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    """Return the ranges of knots for which cuBLAS multiplies values of a dtype on a device."""
    if _KNOTS is not None:
        return ((_KNOTS + 1, _ANY_NUMBER),)
    # With TF32, products by the matrix are in float64.
    if CUDA_FAILURES or (_allows_tf32() and dtype != torch.float64):
        return ()
    if (device, dtype) not in _times and torch.cuda.is_current_stream_capturing():
        return ()
    times = times_on_card(device, dtype)
    if not times:
        return ()
    return slower_kernels(times)


vars(cublas_ranges)["_dynamo_marked_constant"] = True  # as _allows_tf32 in _extension.py


class LinearMap(abc.ABC):
    r"""A linear map :math:`\mathbb{R}^n \to \mathbb{R}^N`, applied to every column of a tensor.

    ``map.adjoint`` is the transpose, and both agree with ``map.matrix() @ v`` to rounding. Both are
    differentiable any number of times, and keep the device and the dtype of their values; half
    precision is accumulated in float32.

    A CUDA graph may capture a map that was applied before, on the same device to the same dtype.
    Keep the map, and the grouping if any, for as long as the graph is replayed.

    Subclasses implement ``_apply`` and pass the tensors it needs to ``__init__``, on the host in
    float64, and in float32 as ``rounded`` unless torch is to round them.
    """

    _takes_any_dtype = False

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *operands: Tensor,
        rounded: tuple[Tensor, ...] | None = None,
    ) -> None:
        self.num_inputs = num_inputs
        self.num_outputs = num_outputs
        rounded = rounded or tuple(t.float() if t.dtype.is_floating_point else t for t in operands)
        if any(map(Tensor.is_inference, (*operands, *rounded))):  # such a map could not train
            with torch.inference_mode(False):
                operands, rounded = (tuple(t.clone() for t in x) for x in (operands, rounded))
        # Both dtypes at once: a map that changed on first use would be compiled twice.
        self._placed: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}
        self._placed[_HOST, torch.float64, 0] = operands
        self._placed[_HOST, torch.float32, 0] = rounded

    def __call__(self, values: Tensor, dim: int = 0) -> Tensor:
        """Apply the map along ``dim``: ``[..., num_inputs, ...] -> [..., num_outputs, ...]``.

        Raises a TypeError unless ``values`` is a dense, strided tensor of float64, float32,
        bfloat16 or float16, and a ValueError if it has another size.
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

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the dense matrix of the map, ``[num_outputs, num_inputs]``, made in float64."""
        return self(torch.eye(self.num_inputs, dtype=torch.float64, device="cpu")).to(dtype)

    @functools.cached_property
    def passed(self) -> Tensor:
        """The input that each output is, bit for bit, ``[num_outputs]``, or -1 for a mixture."""
        matrix = self.matrix()
        picked = matrix.argmax(1)
        unit = (matrix != 0).sum(1).eq(1) & matrix.gather(1, picked[:, None]).squeeze(1).eq(1)
        return torch.where(unit, picked, -1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_inputs} -> {self.num_outputs})"

    @abc.abstractmethod
    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        """Apply the map or its transpose to ``values [n, G, m]``; return ``[N, G, m]``."""

    def _operands(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the operands on the device of values, in the dtype that they are multiplied in."""
        device = values.device
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32

        def make() -> tuple[Tensor, ...]:
            if torch.compiler.is_compiling():
                return tuple(t.to(device) for t in self._placed[_HOST, dtype, 0])
            # The copies outlive any transform, and a map used in inference must still train.
            with torch.inference_mode(False), torch._C._DisableFuncTorch():
                return tuple(to_device(self._placed[_HOST, dtype, 0], device))

        return placed(self, self._placed, device, make, dtype)

    def __getstate__(self) -> dict[str, Any]:
        # The process that receives the map makes copies on its own devices.
        on_host = {key: operands for key, operands in self._placed.items() if key[0] == _HOST}
        return {**self.__dict__, "_placed": on_host}

    def check(self, values: Tensor, dim: int, size: int) -> int:
        """Return ``dim``, at least 0, along which ``values`` have a size, or raise an error."""
        dense(self, "values", values, floating=not self._takes_any_dtype)
        if type(dim) is not int or not -values.dim() <= dim < values.dim():
            dim = count(self, "dim of values", dim, -values.dim(), values.dim() - 1)
        dim %= values.dim()
        if values.shape[dim] != size:
            requirement = f"{type(self).__name__}: values must have size {size} along dim {dim}"
            raise ValueError(f"{requirement}, got shape {tuple(values.shape)}")
        return dim

    def _along(self, values: Tensor, dim: int, transpose: bool) -> Tensor:
        """Apply the map, or its transpose, along a dimension."""
        size = self.num_outputs if transpose else self.num_inputs
        dim = self.check(values, dim, size)
        before = values.shape[:dim]
        after = values.shape[dim + 1 :]
        if dim == 0:  # the same in fewer calls, since decoders are small
            result = self._apply(values.reshape(size, 1, after.numel()), transpose)
            return result.view(result.shape[0], *after)
        # [..., n, ...] -> [n, G, m]: views where strides allow, the kernels take any row stride.
        grouped = values.reshape(before.numel(), size, after.numel()).transpose(0, 1)
        result = self._apply(grouped, transpose)
        return result.transpose(0, 1).reshape(*before, result.shape[0], *after)


class MatrixMap(LinearMap):
    r"""The map of a dense matrix, applied as one matrix product, :math:`O(n N)` per column.

    Args:
        matrix: ``[num_outputs, num_inputs]``, finite; kept in float64.
    """

    def __init__(self, matrix: ArrayLike | Tensor) -> None:
        array = real_array(self, "matrix", matrix)
        if array.ndim != 2 or not np.isfinite(array).all():
            raise ValueError(
                f"{type(self).__name__}: matrix must be finite, with two dimensions, got "
                f"{shown(matrix)}"
            )
        super().__init__(array.shape[1], array.shape[0], torch.from_numpy(array))

    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        (matrix,) = self._operands(values)
        return product(matrix.T if transpose else matrix, values)


def product(matrix: Tensor, values: Tensor) -> Tensor:
    """Return ``[N, n] x [n, ...] -> [N, ...]``, computed in the dtype of the matrix."""
    # Contiguous, because BLAS rounds a strided view of the same numbers differently.
    columns = values.reshape(len(values), -1).to(matrix.dtype).contiguous()
    return exact_matmul(matrix, columns).to(values.dtype).reshape(len(matrix), *values.shape[1:])


class SelectMap(LinearMap):
    """A map most of whose outputs are one of the inputs, bit for bit; the others are combinations.

    The last bits of combinations may depend on the number of threads, as in all matrix products.

    Args:
        num_inputs: n, the number of inputs.
        source: ``[N]``, int64, the input that each output is, or -1 for a combination.
        used: ``[M]``, int64, the inputs of combinations. Without any, values may have any dtype.
        weights: ``[L, M]``, of the L outputs whose source is -1, in order; or ``[1, M]``, of all.
    """

    def __init__(self, num_inputs: int, source: Tensor, used: Tensor, weights: Tensor) -> None:
        combined = (source < 0).nonzero().flatten()
        self._takes_any_dtype = not (len(combined) or len(used))
        super().__init__(
            num_inputs, len(source), source.clamp(min=0), combined, used, weights.double()
        )

    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        source, combined, used, matrix = self._operands(values)
        if transpose:
            return product(self.matrix(matrix.dtype).to(values.device).T, values)
        out = values.index_select(0, source)
        if len(combined):
            parts = product(matrix, values.index_select(0, used))
            out = out.index_copy(0, combined, parts.expand(len(combined), *parts.shape[1:]))
        return out


class SplineMap(LinearMap):
    r"""The map from values at the knots to a natural cubic smoothing spline's values at the points.

    The spline minimises, in the mean convention of the paper,

    .. math:: \frac{1}{n} \sum_i w_i (y_i - g(t_i))^2 + \lambda \int g''(t)^2 \, dt ,

    and continues as its tangent beyond the first and the last knot. Smoothing 0 interpolates, and
    straight lines are always reproduced. SciPy's ``make_smoothing_spline`` has a plain sum:
    ``lam = n * smoothing``.

    Args:
        knots, points: ``[n]``, strictly increasing, and ``[N]``, in any order; finite.
        smoothing: :math:`\lambda`, finite, at least 0.
        weights: ``[n]``, :math:`w`, finite, positive; all 1 by default.

    Planning costs :math:`O(n + N \log n)` on the host, applying :math:`O(n + N)` per column. Where
    there is a CUDA device, planning costs :math:`O(n N)`, as does applying where a dense matrix is
    faster. The result of a column depends on nothing but the column, bit for bit; on CUDA only
    under :func:`torch.use_deterministic_algorithms`, or while the package's kernels are in use.

    Reference:
        Wecker and Ansley, J. Am. Stat. Assoc. 78, 1983.

    Example:
        >>> import torch
        >>> from coded_torch.linear import SplineMap
        >>> curve = SplineMap(knots=[0.0, 1.0, 3.0], points=[0.5, 2.0, 4.0])
        >>> curve(torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64))
        tensor([0.5000, 2.0000, 4.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        knots: ArrayLike | Tensor,
        points: ArrayLike | Tensor,
        *,
        smoothing: float = 0.0,
        weights: ArrayLike | Tensor | None = None,
    ) -> None:
        owner = "smoothing spline"
        smoothing = nonnegative(owner, "smoothing", smoothing)
        t = real_array(owner, "knots", knots)
        z = real_array(owner, "points", points)
        w = None
        if weights is not None:
            w = real_array(owner, "weights", weights)
        exact, rounded, schedule = map(torch.from_numpy, curve_plan(t, z, smoothing, w))
        self._sweeps = exact.shape[1]
        entries = len(t) * -(-len(z) // _ROWS) * _ROWS
        # The number of columns does not count, since a column's result must not depend on it.
        sweeps = _WAITING * (_PER_KNOT * len(t) + _PER_POINT * len(z))
        self._prefers_matrix = _PER_ENTRY * entries <= sweeps
        # Made here: compiled code would make the matrix anew in every call, and through the host.
        if _num_gpus() and len(t) * len(z) <= _MOST:
            exact = ops.with_matrix(exact, schedule)
            rounded = torch.cat([rounded, exact[:, self._sweeps :].float()], 1)
        super().__init__(len(t), len(z), exact, schedule, rounded=(rounded, schedule))

    def _operands(self, values: Tensor) -> tuple[Tensor, ...]:
        coefficients, schedule = super()._operands(values)
        if values.is_cuda and not (CUDA_FAILURES or self._prefers_matrix):
            coefficients = coefficients[:, : self._sweeps]
        return coefficients, schedule

    def _by_torch(self, values: Tensor) -> bool:
        """Return whether cuBLAS multiplies by the matrix."""
        if not values.is_cuda or torch.are_deterministic_algorithms_enabled():
            return False
        if self._placed[_HOST, torch.float32, 0][0].shape[1] <= self._sweeps:  # it has no matrix
            return False
        ranges = cublas_ranges(values.device.index, values.dtype)
        return any(first <= self.num_inputs <= last for first, last in ranges)

    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        if self._by_torch(values):
            return self._by_matrix(values, transpose)
        return self._by_kernel(values, transpose)

    def _by_kernel(self, values: Tensor, transpose: bool) -> Tensor:
        return ops.spline_apply(values, *self._operands(values), transpose=transpose)

    def _by_matrix(self, values: Tensor, transpose: bool) -> Tensor:
        coefficients, _ = super()._operands(values)
        entries = coefficients[0, self._sweeps :][: self.num_inputs * self.num_outputs]
        matrix = entries.view(self.num_inputs, self.num_outputs)
        return product(matrix if transpose else matrix.T, values)

    def gathered(self, batch: Tensor, grouping: Grouping) -> Tensor:
        """Return ``map(grouping.gather(batch))``, reading the rows where they lie."""
        self.check(batch, 0, grouping.batch_size)
        num_columns = batch.shape[1:].numel()
        if num_columns < _FUSED_COLUMNS or self._by_torch(batch):
            return super().gathered(batch, grouping)
        rows = batch.reshape(len(batch), num_columns)
        gather = grouping.to(batch.device).rows
        result = ops.spline_apply(rows, *self._operands(batch), gather=gather)
        return result.view(self.num_outputs, grouping.num_groups, *batch.shape[1:])

    def scattered(self, groups: Tensor, grouping: Grouping) -> Tensor:
        """Return ``grouping.scatter(map(groups))``, writing the rows where they belong."""
        for dim, size in enumerate((self.num_inputs, grouping.num_groups)):
            self.check(groups, dim, size)
        num_columns = groups.shape[2:].numel()
        if num_columns < _FUSED_COLUMNS or self._by_torch(groups):
            return super().scattered(groups, grouping)
        targets = grouping.to(groups.device).targets
        # If no group is filled up, every entry names a row.
        num_rows = None
        if targets.numel() != grouping.batch_size:
            num_rows = grouping.batch_size
        values = groups.reshape(*groups.shape[:2], num_columns)
        operands = self._operands(groups)
        result = ops.spline_apply(values, *operands, scatter=targets, num_rows=num_rows)
        return result.view(grouping.batch_size, *groups.shape[2:])
