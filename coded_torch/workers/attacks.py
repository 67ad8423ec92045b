r"""Attacks: wrong results that are well formed and finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._torch import as_called, on_host
from .base import Reply
from .task import Task, broadcast_dims, flatten

if TYPE_CHECKING:
    from .faults import FaultyWorkers

__all__ = ["ATTACKS", "Attack", "Attacker"]

#: Bits of a float32. The lowest twelve are left out, as honest results differ in them.
EXPONENT, MANTISSA = (23, 31), (12, 23)
#: Maps rows of a result, ``[rows, ...]``, and a generator of the worker to wrong rows.
Attack = Callable[[Tensor, torch.Generator], Tensor]
#: Maps places of rows, ``[n]``, to rows that do not belong there, ``[n, ...]``.
Others = Callable[[Tensor], Tensor]


@dataclasses.dataclass
class Attacker:
    """The attack on one request: it changes the rows in replies of some workers.

    Attributes:
        pool: the pool, which says how to attack.
        module, task, request: the request, and its number.
        earlier: the task of the request before, for "replay", or None.
    """

    pool: FaultyWorkers
    module: nn.Module
    task: Task
    request: int
    earlier: Task | None

    def __call__(self, reply: Reply) -> Reply:
        """Return the reply as it arrives."""
        if reply.worker not in self.pool.adversaries or reply.error is not None:
            return reply
        with torch.no_grad(), on_host():
            if self.pool.attack in ("replay", "shift"):
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
        attack, own = self.pool.attack, self._generator(1 + reply.worker)
        if callable(attack):
            return attack(rows, own)
        if attack == "copies":
            one = self._rows_of_one_input(reply).to(rows.device)
            return torch.where(one.view(-1, *[1] * (rows.dim() - 1)), -rows, rows)
        generator = self._generator(0) if attack == "offset" else own
        return _LIES[str(attack)](rows, generator, self.pool.strength)

    def _generator(self, stream: int) -> torch.Generator:
        """Return a generator: stream 0 is the same for all workers of the attack."""
        entropy = np.random.SeedSequence((self.pool.seed % 2**64, self.request, 1, stream))
        return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

    def _rows_of_one_input(self, reply: Reply) -> Tensor:
        """Return which rows of a part belong to one drawn input: bool ``[rows]``."""
        task, generator = self.task, self._generator(0)
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
        if self.pool.attack == "shift":
            args, kwargs = pytree.tree_map_only(Tensor, _shifted, task.payload(units))
        else:
            if self.earlier is not None and _form(self.earlier) == _form(task):
                task = self.earlier
            own = self._generator(1 + reply.worker)
            step = int(torch.randint(1, max(2, task.num_units), (), generator=own))
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


def _noise(rows: Tensor, noise: Tensor, strength: float) -> Tensor:
    return rows + strength * _spread(rows) * noise.to(rows.device)


def _permute(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Move the rows in a circle, in a random order, so that no row stays."""
    order = torch.randperm(len(rows), generator=generator).to(rows.device)
    permuted = torch.empty_like(rows)
    permuted[order] = rows[order.roll(1)]
    return permuted


def swap(rows: Tensor) -> Tensor:
    """Swap the two largest outputs of each row."""
    if rows.dim() < 2 or rows.shape[-1] < 2:
        return rows
    top = rows.topk(2, dim=-1).indices
    return rows.scatter(-1, top, rows.gather(-1, top.flip(-1)))


def one_row(rows: Tensor, others: Others, generator: torch.Generator) -> Tensor:
    """Replace one row by another one."""
    rows, at = rows.clone(), _place(len(rows), generator)
    rows[at] = others(at)
    return rows


def block(rows: Tensor, others: Others, generator: torch.Generator) -> Tensor:
    """Replace a quarter of the outputs of all rows by the outputs of other rows."""
    flat = rows.reshape(len(rows), -1).clone()
    width = max(1, flat.shape[1] // 4)
    at = int(_place(flat.shape[1] - width + 1, generator))
    other = others(torch.arange(len(rows))).reshape(flat.shape)
    flat[:, at : at + width] = other[:, at : at + width]
    return flat.view(rows.shape)


def one_output(rows: Tensor, others: Others, generator: torch.Generator) -> Tensor:
    """Replace one number by the number of another row."""
    flat = rows.reshape(len(rows), -1).clone()
    column, at = _place(flat.shape[1], generator), _place(len(flat), generator)
    flat[at, column] = others(at).reshape(1, -1)[0, column]
    return flat.view(rows.shape)


def one_bit(rows: Tensor, low: int, high: int, generator: torch.Generator) -> Tensor:
    """Flip a drawn bit of one number, as float32. If it is then not finite, it becomes 0."""
    flat = rows.reshape(len(rows), -1).float().clone()
    column, at = _place(flat.shape[1], generator), _place(len(flat), generator)
    bit = int((1 << (low + _place(high - low, generator))).to(torch.int32))  # the last one: < 0
    flipped = (flat[at, column].view(torch.int32) ^ bit).view(torch.float32)
    fits = flipped.abs() < torch.finfo(rows.dtype).max  # NaN fails, too
    flat[at, column] = torch.where(fits, flipped, 0.0)
    return flat.view(rows.shape)


def _place(below: int, generator: torch.Generator) -> Tensor:
    return torch.randint(below, (1,), generator=generator)


#: The wrong rows of each attack on rows alone, from rows, a generator and the strength.
_LIES: dict[str, Callable[[Tensor, torch.Generator, float], Tensor]] = {
    "noise": lambda x, draws, s: _noise(x, torch.randn(x.shape, generator=draws), s),
    "sign_flip": lambda x, draws, s: -x,
    "scale": lambda x, draws, s: x * (1 + s / 2),
    "constant": lambda x, draws, s: x.mean(0, keepdim=True).repeat_interleave(len(x), 0),
    "permute": lambda x, draws, s: _permute(x, draws),
    "swap": lambda x, draws, s: swap(x),
    "one_row": lambda x, draws, s: one_row(x, lambda at: x[at - 1], draws),
    "one_output": lambda x, draws, s: one_output(x, lambda at: x[at - 1], draws),
    "block": lambda x, draws, s: block(x, lambda at: x[at - 1], draws),
    "bit_flip": lambda x, draws, s: torch.cat([one_bit(y, 0, 32, draws) for y in x.split(1)]),
    "exponent": lambda x, draws, s: one_bit(x, *EXPONENT, draws),
    "mantissa": lambda x, draws, s: one_bit(x, *MANTISSA, draws),
    "offset": lambda x, draws, s: _noise(x, torch.randn(x.shape[1:], generator=draws), s),
}
#: The names of the attacks.
ATTACKS = (*_LIES, "copies", "replay", "shift")
