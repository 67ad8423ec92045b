"""Checks of single tensors among inputs and results."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["decodable", "filled", "finite", "improbable", "levelled"]

_ROUNDING = 0.01  # that the sum of probabilities may be off; half precision needs as much


def decodable(leaf: Any, dim: int | None) -> bool:
    """Whether a leaf of the results is divided, and can be predicted."""
    return dim is not None and isinstance(leaf, Tensor) and leaf.is_floating_point()


def finite(leaf: Tensor) -> bool:
    """Whether all of a tensor is finite; of what is not floating-point, it is."""
    if not leaf.is_floating_point():
        return True
    leaf = leaf.detach() if leaf.requires_grad else leaf
    # What is not finite stays so in every sum; a sum may overflow where nothing else is wrong.
    return math.isfinite(leaf.sum().item()) or all(
        map(math.isfinite, torch.stack(torch.aminmax(leaf)).tolist())
    )


def improbable(rows: Tensor) -> str | None:
    """What rows ``[G, ..., C]`` hold, if not probabilities of C classes."""
    if rows.dim() < 2:
        return "one number a row"
    if rows.numel() == 0:
        return None
    rows = rows.detach()
    sums = rows.sum(-1, dtype=torch.promote_types(rows.dtype, torch.float32))
    least, low, high = torch.stack([rows.min().to(sums.dtype), *torch.aminmax(sums)]).tolist()
    if least >= -_ROUNDING and max(abs(low - 1), abs(high - 1)) <= _ROUNDING:
        return None
    return f"values of {least:.3g} and more, with sums of {low:.3g} to {high:.3g}"


def levelled(values: Tensor, odd: Tensor | None) -> Tensor:
    """Replace the rows of values that are ``odd`` by the mean of the others; None: no row is."""
    return values if odd is None else filled(values, odd, values[~odd.to(values.device)].mean(0))


def filled(values: Tensor, rows: Tensor, value: Tensor) -> Tensor:
    """Values ``[..., *value.shape]`` with one value in some rows, bool ``[...]``."""
    return torch.where(rows.to(values.device).view(*rows.shape, *[1] * value.dim()), value, values)
