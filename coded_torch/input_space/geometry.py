"""The features of inputs on which distances are measured."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import matern52 as matern52
from ..ops import squared_distances as squared_distances
from ..ops import typical_rows as typical_rows

# More features are added up in buckets, with random signs: Gram matrices of 150,528 take a seventh
# of the time on batches of 240 pictures (measured once; no benchmark keeps it). It is prime, as
# columns of a picture would share buckets.
_MOST_FEATURES = 8192
_BUCKETS = 2039


def evenly(size: int, most: int) -> Tensor:
    """Return at most so many of ``0 .. size - 1``, evenly spaced."""
    return torch.arange(size) if size <= most else torch.arange(most) * size // most


def added_up(x: Tensor) -> Tensor:
    """Return the features ``[B, d]``, at most 8,192, in float32 or float64."""
    rows = x.flatten(1) if x.dim() > 1 else x[:, None]
    dtype = torch.promote_types(x.dtype, torch.float32)
    if rows.shape[1] <= _MOST_FEATURES:
        return rows.to(dtype)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, rows.shape[1:], generator=generator, device="cpu")
    signs = signs.to(rows.device, dtype) * 2 - 1
    sums = rows.new_zeros(len(rows), _BUCKETS, dtype=dtype)
    for part, sign in zip(rows.split(_BUCKETS, 1), signs.split(_BUCKETS), strict=True):
        sums[:, : len(sign)].addcmul_(part.to(dtype), sign)  # one pass over the inputs, no copy
    return sums
