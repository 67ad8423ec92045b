r"""The arguments of one call of a wrapper, leaf by leaf."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..workers.pytrees import broadcast_dims, leaf_name
from ._ballot import finite

__all__ = ["Inputs"]


class Inputs:
    """The arguments of one call: their leaves, where each has its batch, and its size."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], in_dims: Any) -> None:
        self.args, self.kwargs = args, kwargs
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        dims = broadcast_dims("in_dims", in_dims, pytree.tree_structure(args))
        self.num_positional = len(dims)
        dims += [0] * (len(self.leaves) - self.num_positional)
        self.dims = [
            dim if isinstance(leaf, Tensor) else None
            for leaf, dim in zip(self.leaves, dims, strict=True)
        ]
        coded = [(i, self.leaves[i], dim) for i, dim in enumerate(self.dims) if dim is not None]
        if not coded:
            raise ValueError("CodedWrapper: inputs must hold a tensor to be coded, got none")
        for i, leaf, dim in coded:
            if not leaf.is_floating_point():
                raise TypeError(
                    f"CodedWrapper: {self.name(i)} must be floating-point to be coded, got "
                    f"{leaf.dtype}; code what it is turned into instead (the embeddings of "
                    "tokens), or pass it by position with None in in_dims to give every worker "
                    "the same"
                )
            if not -leaf.dim() <= dim < leaf.dim():
                raise ValueError(
                    f"CodedWrapper: {self.name(i)} must have the batch dimension {dim} that "
                    f"in_dims says, got shape {tuple(leaf.shape)}"
                )
        sizes = {i: leaf.shape[dim] for i, leaf, dim in coded}
        if len(set(sizes.values())) > 1:
            got = ", ".join(f"{size} in {self.name(i)}" for i, size in sizes.items())
            raise ValueError(f"CodedWrapper: coded inputs must have one batch size, got {got}")
        self.batch_size: int = coded[0][1].shape[coded[0][2]]
        self.device: torch.device = coded[0][1].device

    def name(self, i: int) -> str:
        if i < self.num_positional:
            return leaf_name("args", self.args, i)
        return leaf_name("kwargs", self.kwargs, i - self.num_positional)

    def check_finite(self) -> None:
        """Raise a ValueError if an input that is coded is not finite: it spoils its whole group."""
        for i, (leaf, dim) in enumerate(zip(self.leaves, self.dims, strict=True)):
            if dim is not None and not finite(leaf):
                place = (~leaf.isfinite()).nonzero()[0].tolist()
                raise ValueError(
                    f"CodedWrapper: {self.name(i)} must be finite to be coded, "
                    f"got {leaf[tuple(place)].item()} at {place}"
                )

    def rows(self) -> list[Tensor]:
        """The coded inputs, ``[B, ...]`` each."""
        return [
            leaf.movedim(dim, 0)
            for leaf, dim in zip(self.leaves, self.dims, strict=True)
            if dim is not None
        ]
