r"""The torch operators: per operator, side by side, the call, its shape, its gradient, its vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _extension  # noqa: F401 - loads the operators

__all__ = ["spline_apply"]


def spline_apply(
    values: Tensor, coefficients: Tensor, schedule: Tensor, *, transpose: bool = False
) -> Tensor:
    r"""Apply planned smoothing splines, or their transpose, to every column.

    Args:
        values: ``[n, G, m]``, values at the knots for G groups of m columns, any strides; or
            ``[N, G, m]`` where ``transpose``. float64, float32, bfloat16 or float16.
        coefficients: ``[P, 12 n + 4 N]``, float64 for float64 values, else float32; one plan for
            all groups (P = 1) or one for each (P = G).
        schedule: ``[P, n + 1 + N]``, int32. Both come from ``_plan.spline_plan``.
        transpose: apply the transpose.

    Returns:
        ``[N, G, m]``, contiguous; or ``[n, G, m]`` where ``transpose``.

    Note:
        :math:`O(n + N)` per column. The call with the other ``transpose`` is the gradient with
        respect to the values, so every derivative exists, in reverse and forward mode. The
        plan has no gradient:
        :func:`coded_torch.functional.smoothing_spline` has, with respect to points and smoothing.
    """
    primal, tangent = forward_ad.unpack_dual(values)
    if tangent is not None:  # linear, so the tangent is mapped as the value is
        dual: Tensor = forward_ad.make_dual(
            spline_apply(primal, coefficients, schedule, transpose=transpose),
            spline_apply(tangent, coefficients, schedule, transpose=transpose),
        )
        return dual
    out: Tensor = torch.ops.coded_torch.spline_apply(values, coefficients, schedule, transpose)
    return out


def _fake(values: Tensor, coefficients: Tensor, schedule: Tensor, transpose: bool) -> Tensor:
    rows = schedule.shape[-1] - 1 - values.shape[0]
    return values.new_empty((rows, values.shape[1], values.shape[2]))


torch.library.register_fake("coded_torch::spline_apply", _fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, coefficients, schedule, ctx.transpose = inputs
    if coefficients.requires_grad:
        raise ValueError("spline_apply: coefficients must not require a gradient, they have none")
    ctx.save_for_backward(coefficients, schedule)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    coefficients, schedule = ctx.saved_tensors
    grad = spline_apply(grad, coefficients, schedule, transpose=not ctx.transpose)
    return grad, None, None, None


torch.library.register_autograd(
    "coded_torch::spline_apply", _backward, setup_context=_setup_context
)


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    values: Tensor,
    coefficients: Tensor,
    schedule: Tensor,
    transpose: bool,
) -> tuple[Tensor, int]:
    size = info.batch_size

    def batched(tensor: Tensor, in_dim: int | None, at: int) -> Tensor:
        if in_dim is None:
            return tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])
        return tensor.movedim(in_dim, at)

    v = batched(values, in_dims[0], 1)  # [n, B, G, m]
    groups = v.shape[2]
    if in_dims[1] is None and in_dims[2] is None and coefficients.shape[0] == 1:
        plans = [coefficients, schedule]
    else:  # [B, P, .] -> [B * G, .], a plan for each group of each element of the batch
        plans = [
            batched(t, d, 0).expand(size, groups, -1).reshape(size * groups, -1)
            for t, d in ((coefficients, in_dims[1]), (schedule, in_dims[2]))
        ]
    out = spline_apply(v.flatten(1, 2), *plans, transpose=transpose)
    return out.unflatten(1, (size, groups)), 1


torch.library.register_vmap("coded_torch::spline_apply", _vmap)
