r"""What machines that lie answer: well formed, finite and wrong."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._transforms import as_called, on_host
from .base import Reply, Task
from .pytrees import broadcast_dims, flatten

__all__ = ["ATTACKS", "Attacker", "Liars"]


#: What is answered instead of rows of a result, ``[rows, ...]``, with a generator of the machine's.
Attack = Callable[[Tensor, torch.Generator], Tensor]
_Lie = Callable[["Attacker", Reply, Tensor], Tensor]


class Liars:
    """The machines of a pool that lie, and what they have seen.

    Args:
        attack: one of :data:`ATTACKS`, or a callable.
        machines: that lie.
        strength: of the attacks that have one.
        seed: of what is drawn, together with the number of the request and the machine.
    """

    def __init__(
        self, attack: str | Attack, machines: Sequence[int], strength: float, seed: int
    ) -> None:
        self.attack, self.machines = attack, frozenset(machines)
        self.strength, self.seed = strength, seed
        self._lock = threading.Lock()
        self._last: Task | None = None  # for replays; of one request only, as tasks are large

    def attacker(self, module: nn.Module, task: Task, request: int) -> Attacker:
        """What the liars answer in one request."""
        earlier = None
        if self.attack == "replay":
            with self._lock:
                earlier, self._last = self._last, task
        return Attacker(self, module, task, request, earlier)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_lock": None, "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


class Attacker:
    """The lies of one request: a reply is changed in the tensors that have the part's rows."""

    def __init__(
        self, liars: Liars, module: nn.Module, task: Task, request: int, earlier: Task | None
    ) -> None:
        self._liars, self._module, self._task = liars, module, task
        self._request, self._earlier = request, earlier
        self.strength = liars.strength

    def __call__(self, reply: Reply) -> Reply:
        """The reply as it arrives."""
        if reply.machine not in self._liars.machines or reply.error is not None:
            return reply
        with torch.no_grad(), on_host():
            attack = self._liars.attack
            lie = ATTACKS[attack] if isinstance(attack, str) else _own(attack)
            if lie is None:
                return dataclasses.replace(reply, value=self._other(reply))
            leaves, spec = flatten(reply.value)
            dims = broadcast_dims("out_dims", self._task.out_dims, spec)
            lies = [
                lie(self, reply, leaf.movedim(dim, 0)).to(leaf.dtype).movedim(0, dim)
                if dim is not None and isinstance(leaf, Tensor) and leaf.is_floating_point()
                else leaf
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
        return dataclasses.replace(reply, value=pytree.tree_unflatten(lies, spec))

    def own(self, reply: Reply) -> torch.Generator:
        """A generator of the machine's own."""
        return self._generator(1 + reply.machine)

    def common(self) -> torch.Generator:
        """The same for all machines that lie in the request."""
        return self._generator(0)

    def _generator(self, stream: int) -> torch.Generator:
        entropy = np.random.SeedSequence((self._liars.seed % 2**64, self._request, 1, stream))
        return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

    def rows_of_one_input(self, reply: Reply) -> Tensor:
        """Which rows of a part are of one input, the same for all: bool ``[rows]``."""
        task, generator = self._task, self.common()
        unit = int(torch.randint(task.num_units, (), generator=generator))
        row = int(torch.randint(task.unit_rows, (), generator=generator))
        same = torch.ones(len(reply.part.units) * task.unit_rows, dtype=torch.bool)
        for leaf, dim in zip(task.leaves, task.dims, strict=True):
            if dim is not None:
                rows = leaf[list(reply.part.units)].flatten(0, 1)  # [rows, ...]
                same &= (rows == leaf[unit, row]).flatten(1).all(1).cpu()
        return same

    def _other(self, reply: Reply) -> Any:
        """What the module returns for other inputs: earlier ones, or shifted ones."""
        units = list(reply.part.units)
        if self._liars.attack == "shift":
            args, kwargs = self._task.payload(units)
            args, kwargs = pytree.tree_map_only(Tensor, _shifted, (args, kwargs))
            with as_called():
                return self._module(*args, **kwargs)
        task = self._task
        if self._earlier is not None and _alike(self._earlier, task):
            task = self._earlier
        step = int(torch.randint(1, max(2, task.num_units), (), generator=self.own(reply)))
        args, kwargs = task.payload(sorted((unit + step) % task.num_units for unit in units))
        with as_called():
            return self._module(*args, **kwargs)


def _alike(a: Task, b: Task) -> bool:
    """Whether results of one can be taken for results of the other."""

    def form(task: Task) -> Any:
        divided = zip(task.leaves, task.dims, strict=True)
        shapes = [leaf.shape[2:] for leaf, dim in divided if dim is not None]
        return task.spec, task.unit_rows, task.num_units, shapes

    return bool(form(a) == form(b))


def _shifted(leaf: Tensor) -> Tensor:
    """Rolled along its last dimension by an eighth of it."""
    return leaf.roll(max(1, leaf.shape[-1] // 8), -1) if leaf.dim() > 1 else leaf


def _own(attack: Attack) -> _Lie:
    return lambda attacker, reply, rows: attack(rows, attacker.own(reply))


def _spread(rows: Tensor) -> Tensor:
    return rows.float().std() if rows.numel() > 1 else rows.float().abs().sum()


def _noise(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    noise = torch.randn(rows.shape, generator=attacker.own(reply)).to(rows.device)
    return rows + attacker.strength * _spread(rows) * noise


def _sign_flip(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    return -rows


def _scale(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    return rows * (1 + attacker.strength / 2)


def _constant(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    return rows.mean(0, keepdim=True).expand_as(rows).contiguous()


def _permute(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    """In a circle, in an order that is drawn: no row stays."""
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
    """One row answers another; of one row alone, nothing is changed."""
    a, b = torch.randint(len(rows), (2,), generator=attacker.own(reply)).tolist()
    rows = rows.clone()
    rows[a] = rows[b if b != a else a - 1]
    return rows


def _bit_flip(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    """One bit of one number in each row; what is not finite by it becomes 0."""
    generator = attacker.own(reply)
    flat = rows.reshape(len(rows), -1).float()
    places = torch.randint(flat.shape[1], (len(flat), 1), generator=generator).to(flat.device)
    bits = torch.randint(32, (len(flat), 1), generator=generator).to(flat.device)
    words = flat.gather(1, places).view(torch.int32)
    flipped = (words ^ (1 << bits.long()).to(torch.int32)).view(torch.float32)
    limit = torch.finfo(rows.dtype).max
    flipped = torch.where(flipped.abs() < limit, flipped, 0.0)  # NaN fails, too
    return flat.scatter(1, places, flipped).view(rows.shape)


def _offset(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    offset = torch.randn(rows.shape[1:], generator=attacker.common()).to(rows.device)
    return rows + attacker.strength * _spread(rows) * offset


def _copies(attacker: Attacker, reply: Reply, rows: Tensor) -> Tensor:
    """The results of one input, which all that have it answer alike: with the sign flipped."""
    one = attacker.rows_of_one_input(reply).to(rows.device)
    return torch.where(one.view(-1, *[1] * (rows.dim() - 1)), -rows, rows)


#: What machines can do to their results, by name; None where they compute others.
ATTACKS: dict[str, _Lie | None] = {
    "noise": _noise,
    "sign_flip": _sign_flip,
    "scale": _scale,
    "constant": _constant,
    "replay": None,
    "permute": _permute,
    "swap": _swap,
    "one_row": _one_row,
    "bit_flip": _bit_flip,
    "offset": _offset,
    "copies": _copies,
    "shift": None,
}
