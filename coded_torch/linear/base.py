r"""What every linear map is, and where its numbers are kept."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._arguments import count, dense, shown
from .._streams import placed, to_device

if TYPE_CHECKING:
    from ..input_space.ordering import Grouping

__all__ = ["LinearMap", "accumulation_dtype", "target"]

_HOST = torch.device("cpu")


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

    Subclasses implement ``_apply`` and pass the tensors it needs to ``__init__``, on the host
    and in float64 (``rounded``: the same in float32, where they are at hand); ``_operands``
    hands them out in the dtype and on the device of the values.
    """

    _takes_any_dtype = False

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
        self._placed: dict[tuple[Any, ...], tuple[Tensor, ...]] = {
            (_HOST, torch.float64, 0): operands,
            (_HOST, torch.float32, 0): rounded or _place(operands, torch.float32, _HOST),
        }

    def __call__(self, values: Tensor, dim: int = 0, *, out: Tensor | None = None) -> Tensor:
        """Apply the map along ``dim``.

        Args:
            values: ``[..., num_inputs, ...]``, float64, float32, bfloat16 or float16.
            dim: the dimension that the map replaces.
            out: where the result goes, of its shape and of the dtype and device of the values,
                apart from them. It is written once, in place, where its strides allow: where it is
                contiguous before and after ``dim``. Without gradients only.

        Returns:
            ``[..., num_outputs, ...]``, the same in every other dimension; ``out`` where given.

        Raises:
            TypeError: ``values`` is not a dense, strided tensor of such a dtype.
            ValueError: ``values`` has another size than ``num_inputs`` along ``dim``; ``out`` does
                not fit, or gradients are recorded.
        """
        return self._along(values, dim, transpose=False, out=out)

    def adjoint(self, values: Tensor, dim: int = 0, *, out: Tensor | None = None) -> Tensor:
        """Apply the transpose along ``dim``: ``[..., num_outputs, ...] -> [..., num_inputs, ...]``.

        Takes ``out``, and raises, as :meth:`__call__` does.
        """
        return self._along(values, dim, transpose=True, out=out)

    def gathered(self, batch: Tensor, grouping: Grouping, *, out: Tensor | None = None) -> Tensor:
        """Apply the map to the groups of a batch: ``map(grouping.gather(batch))``.

        Args:
            batch: ``[B, ...]``.
            grouping: of B rows in groups of ``num_inputs``.
            out: as for :meth:`__call__`.

        Returns:
            ``[num_outputs, G, ...]``.

        Raises:
            TypeError: as :meth:`__call__`.
            ValueError: as :meth:`__call__`; the batch has another size than the grouping.
        """
        return self(grouping.gather(batch), out=out)

    def scattered(self, groups: Tensor, grouping: Grouping, *, out: Tensor | None = None) -> Tensor:
        """Apply the map and put its results in a batch's order: ``grouping.scatter(map(groups))``.

        Args:
            groups: ``[num_inputs, G, ...]``.
            grouping: of B rows in G groups of ``num_outputs``.
            out: as for :meth:`__call__`.

        Returns:
            ``[B, ...]``.

        Raises:
            TypeError: as :meth:`__call__`.
            ValueError: as :meth:`__call__`; the groups have other sizes than map and grouping.
        """
        batch = grouping.scatter(self(groups))
        if out is None:
            return batch
        self._target(out, batch.shape, batch.shape, groups)
        return out.copy_(batch)

    def matrix(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Tensor:
        """The dense matrix of the map, ``[num_outputs, num_inputs]``, computed in float64."""
        identity = torch.eye(self.num_inputs, dtype=torch.float64, device="cpu")
        return self(identity).to(dtype=dtype, device=device)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_inputs={self.num_inputs}, num_outputs={self.num_outputs})"
        )

    @abc.abstractmethod
    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        """Apply the map or its transpose to ``values [n, G, m]``; returns ``[N, G, m]``."""

    def _write(self, out: Tensor, values: Tensor, transpose: bool) -> None:
        """As ``_apply`` into ``out [N, G, m]``; to be overridden where that saves a copy."""
        out.copy_(self._apply(values, transpose))

    def _operands(self, values: Tensor) -> tuple[Tensor, ...]:
        dtype, device = accumulation_dtype(values.dtype), values.device

        def make() -> tuple[Tensor, ...]:
            return _place(self._to_place(dtype, device), dtype, device)

        return placed(self, self._placed, device, make, dtype)

    def _to_place(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """The operands on the host that ``device`` gets; to be overridden where it needs others."""
        return self._placed[_HOST, dtype, 0]

    def __getstate__(self) -> dict[str, Any]:
        # Copies on other devices are made again where the map arrives.
        on_host = {key: operands for key, operands in self._placed.items() if key[0] == _HOST}
        return {**self.__dict__, "_placed": on_host}

    def check(self, values: Tensor, dim: int = 0) -> None:
        """Raise what :meth:`__call__` raises for values that the map cannot be applied to."""
        self._dimension(values, dim, self.num_inputs)

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

    def _target(
        self, out: Tensor, shape: Sequence[int], flat: Sequence[int], values: Tensor
    ) -> Tensor | None:
        return target(self, out, shape, flat, values)

    def _along(self, values: Tensor, dim: int, transpose: bool, out: Tensor | None) -> Tensor:
        size = self.num_outputs if transpose else self.num_inputs
        dim = self._dimension(values, dim, size)
        before, after = values.shape[:dim], values.shape[dim + 1 :]
        if out is None and dim == 0:  # as below, in as few calls as a decoder can afford
            result = self._apply(values.reshape(size, 1, after.numel()), transpose)
            return result.view(result.shape[0], *after)
        # [..., n, ...] -> [n, G, m]: views where strides allow, the kernels take any row stride.
        grouped = values.reshape(before.numel(), size, after.numel()).transpose(0, 1)
        if out is None:
            result = self._apply(grouped, transpose)
            return result.transpose(0, 1).reshape(*before, result.shape[0], *after)
        results = self.num_inputs if transpose else self.num_outputs
        shape, flat = (*before, results, *after), (before.numel(), results, after.numel())
        target = self._target(out, shape, flat, values)
        if target is None:
            return out.copy_(self._along(values, dim, transpose, None))
        self._write(target.transpose(0, 1), grouped, transpose)
        return out


def target(
    owner: object, out: Tensor, shape: Sequence[int], flat: Sequence[int], values: Tensor
) -> Tensor | None:
    """``out``, which must fit, as ``flat`` with contiguous columns; None: no view is that.

    Args:
        owner: whose argument ``out`` is, for the message.
        out: where a result is to be written.
        shape: of the result.
        flat: of the view.
        values: what the result is made of, of the same dtype and device.

    Raises:
        ValueError: ``out`` does not fit, or gradients are recorded.
    """
    name = type(owner).__name__
    fits = out.shape == torch.Size(shape) and out.dtype == values.dtype
    if not (fits and out.device == values.device):
        raise ValueError(
            f"{name}: out must be {values.dtype} of shape {tuple(shape)} on {values.device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    if torch.is_grad_enabled() and (values.requires_grad or out.requires_grad):
        raise ValueError(f"{name}: out must be None where gradients are recorded")
    try:
        view = out.view(*flat)
    except RuntimeError:
        return None
    return view if view.shape[-1] <= 1 or view.stride(-1) == 1 else None


def _place(
    operands: tuple[Tensor, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    if torch.is_inference_mode_enabled():  # as in LinearMap.__init__
        with torch.inference_mode(False):
            return _place(operands, dtype, device)
    if device.type == "cuda" and not torch.compiler.is_compiling():
        with torch._C._DisableFuncTorch():  # or a transform keeps what outlives it
            return tuple(to_device(operands, device))  # from the host, of this dtype already
    return tuple(t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in operands)
