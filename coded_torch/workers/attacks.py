r"""Attacks: wrong results that are well formed and finite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._transforms import as_called, on_host
from .base import Reply
from .pytrees import broadcast_dims, flatten
from .task import Task

__all__ = ["ATTACKS", "Attack", "Attacker"]

#: Maps rows of a result, ``[rows, ...]``, and a generator of the worker to wrong rows.
Attack = Callable[[Tensor, torch.Generator], Tensor]
_Lie = Callable[["Attacker", Reply, Tensor], Tensor]


@dataclasses.dataclass
class Attacker:
    """The attack on one request: it changes the rows in replies of some workers.

    Attributes:
        attack: a key of :data:`ATTACKS`, or a callable.
        workers: the places of the workers that answer wrongly.
        strength: of "noise", "offset" and "scale".
        seed: of all draws, with the numbers of the request and the worker.
        module, task, request: the request.
        earlier: the task of the request before, for "replay", or None.
        rate: the share of their parts that are wrong.
        first: the number from which on parts are right; infinite if none is.
    """

    attack: str | Attack
    workers: Collection[int]
    strength: float
    seed: int
    module: nn.Module
    task: Task
    request: int
    earlier: Task | None
    rate: float = 1.0
    first: float = math.inf

    def __call__(self, reply: Reply) -> Reply:
        """Return the reply as it arrives."""
        if reply.worker not in self.workers or reply.error is not None:
            return reply
        if reply.part.number >= self.first or self._spares(reply.part.number):
            return reply
        with torch.no_grad(), on_host():
            if self.attack in ("replay", "shift"):
                return dataclasses.replace(reply, value=self._of_other_inputs(reply))
            leaves, spec = flatten(reply.value)
            dims = broadcast_dims("out_dims", self.task.out_dims, spec)
            lies = [
                self._lie(reply, leaf.movedim(dim, 0)).to(leaf.dtype).movedim(0, dim)
                if dim is not None and isinstance(leaf, Tensor) and leaf.is_floating_point()
                else leaf
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
        return dataclasses.replace(reply, value=pytree.tree_unflatten(lies, spec))

    def _lie(self, reply: Reply, rows: Tensor) -> Tensor:
        if callable(self.attack):
            return self.attack(rows, self.own(reply))
        lie = ATTACKS[self.attack]
        assert lie is not None
        return lie(self, reply, rows)

    def own(self, reply: Reply) -> torch.Generator:
        """Return a generator of the worker."""
        return self._generator(1 + reply.worker)

    def common(self) -> torch.Generator:
        """Return a generator that is the same for all workers of the attack."""
        return self._generator(0)

    def _spares(self, part: int) -> bool:
        return (
            self.rate < 1 and float(torch.rand((), generator=self._generator(part, 2))) >= self.rate
        )

    def _generator(self, stream: int, kind: int = 1) -> torch.Generator:
        entropy = np.random.SeedSequence((self.seed % 2**64, self.request, kind, stream))
        return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

    def rows_of_one_input(self, reply: Reply) -> Tensor:
        """Return which rows of a part belong to one drawn input: bool ``[rows]``."""
        task, generator = self.task, self.common()
        unit = int(torch.randint(task.num_units, (), generator=generator))
        row = int(torch.randint(task.unit_rows, (), generator=generator))
        same = torch.ones(len(reply.part.units) * task.unit_rows, dtype=torch.bool)
        for leaf, dim in zip(task.leaves, task.dims, strict=True):
            if dim is not None:
                rows = leaf[list(reply.part.units)].flatten(0, 1)  # [rows, ...]
                same &= (rows == leaf[unit, row]).flatten(1).all(1).cpu()
        return same

    def _of_other_inputs(self, reply: Reply) -> Any:
        """Return the module's output for shifted inputs, or for inputs of the request before."""
        task, units = self.task, list(reply.part.units)
        if self.attack == "shift":
            args, kwargs = pytree.tree_map_only(Tensor, _shifted, task.payload(units))
        else:
            if self.earlier is not None and _form(self.earlier) == _form(task):
                task = self.earlier
            step = int(torch.randint(1, max(2, task.num_units), (), generator=self.own(reply)))
            args, kwargs = task.payload(sorted((unit + step) % task.num_units for unit in units))
        with as_called():
            return self.module(*args, **kwargs)


def _form(task: Task) -> Any:
    divided = zip(task.leaves, task.dims, strict=True)
    shapes = [leaf.shape[2:] for leaf, dim in divided if dim is not None]
    return task.spec, task.unit_rows, task.num_units, shapes


def _shifted(leaf: Tensor) -> Tensor:
    return leaf.roll(max(1, leaf.shape[-1] // 8), -1) if leaf.dim() > 1 else leaf


def _spread(rows: Tensor) -> Tensor:
    return rows.float().std() if rows.numel() > 1 else rows.float().abs().sum()


def _noise(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    noise = torch.randn(rows.shape, generator=attacker.own(reply)).to(rows.device)
    return rows + attacker.strength * _spread(rows) * noise


def _permute(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    """Move the rows in a circle, in a random order, so that no row stays."""
    order = torch.randperm(len(rows), generator=attacker.own(reply)).to(rows.device)
    permuted = torch.empty_like(rows)
    permuted[order] = rows[order.roll(1)]
    return permuted


def _swap(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    if rows.dim() < 2 or rows.shape[-1] < 2:
        return rows
    top = rows.topk(2, dim=-1).indices
    return rows.scatter(-1, top, rows.gather(-1, top.flip(-1)))


def _one_row(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    """Replace one row by another one. A single row stays."""
    a, b = torch.randint(len(rows), (2,), generator=attacker.own(reply)).tolist()
    rows = rows.clone()
    rows[a] = rows[b if b != a else a - 1]
    return rows


def _bit_flip(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    """Flip one bit of one number in each row. A number that is then not finite becomes 0."""
    generator = attacker.own(reply)
    flat = rows.reshape(len(rows), -1).float()
    places = torch.randint(flat.shape[1], (len(flat), 1), generator=generator).to(flat.device)
    bits = torch.randint(32, (len(flat), 1), generator=generator).to(flat.device)
    words = flat.gather(1, places).view(torch.int32)
    flipped = (words ^ (1 << bits.long()).to(torch.int32)).view(torch.float32)
    limit = torch.finfo(rows.dtype).max
    flipped = torch.where(flipped.abs() < limit, flipped, 0.0)  # NaN fails, too
    return flat.scatter(1, places, flipped).view(rows.shape)


def _one_output(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    """Replace one number by that of another row."""
    flat = rows.reshape(len(rows), -1).clone()
    row, column = torch.randint(2**30, (2,), generator=attacker.own(reply)).tolist()
    row, column = row % len(flat), column % flat.shape[1]
    flat[row, column] = flat[row - 1, column]
    return flat.view(rows.shape)


def _block(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    """Replace a quarter of the outputs by those of another row, in all rows."""
    flat = rows.reshape(len(rows), -1).clone()
    width = max(1, flat.shape[1] // 4)
    at = int(torch.randint(flat.shape[1] - width + 1, (), generator=attacker.own(reply)))
    flat[:, at : at + width] = flat[:, at : at + width].roll(1, 0)
    return flat.view(rows.shape)


def _bit(low: int, high: int) -> _Lie:
    """Flip a drawn bit of one number, as float32. If it is then not finite, it becomes 0."""

    def flip(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
        generator, flat = attacker.own(reply), rows.flatten().float().clone()
        place = int(torch.randint(len(flat), (), generator=generator))
        bit = int(torch.randint(low, high, (), generator=generator))
        word = flat[place : place + 1].view(torch.int32) ^ (1 << bit)
        flipped = word.view(torch.float32)
        fits = flipped.abs() < torch.finfo(rows.dtype).max  # NaN fails, too
        flat[place] = torch.where(fits, flipped, 0.0)[0]
        return flat.view(rows.shape)

    return flip


def _offset(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    offset = torch.randn(rows.shape[1:], generator=attacker.common()).to(rows.device)
    return rows + attacker.strength * _spread(rows) * offset


def _copies(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    """Flip the sign of the results of one input."""
    one = attacker.rows_of_one_input(reply).to(rows.device)
    return torch.where(one.view(-1, *[1] * (rows.dim() - 1)), -rows, rows)


#: The attacks by name; None if the worker computes other inputs.
ATTACKS: dict[str, _Lie | None] = {
    "noise": _noise,
    "sign_flip": lambda attacker, reply, rows: -rows,
    "scale": lambda attacker, reply, rows: rows * (1 + attacker.strength / 2),
    "constant": lambda attacker, reply, rows: rows.mean(0, keepdim=True).repeat_interleave(
        len(rows), 0
    ),
    "replay": None,
    "permute": _permute,
    "swap": _swap,
    "one_row": _one_row,
    "one_output": _one_output,
    "block": _block,
    "bit_flip": _bit_flip,
    "exponent": _bit(23, 31),
    "mantissa": _bit(13, 23),
    "offset": _offset,
    "copies": _copies,
    "shift": None,
}
