"""Modules, codes and tasks that tests of pools use."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coded_torch._table import Units
from coded_torch.codes import FixedCode
from coded_torch.linear import MatrixMap
from coded_torch.workers import Began, Part, Reply, Request, Task, Workers

WAIT = 180.0  # bounds waits that end at once unless something is broken


class PolynomialCode(FixedCode):
    """A polynomial of degree K - 1 through the inputs, exact for affine modules."""

    @property
    def min_received(self) -> int:
        return self.num_data

    def _make_encoder(self) -> MatrixMap:
        def basis(points):
            return np.polynomial.chebyshev.chebvander(points, self.num_data - 1)

        angles = (np.arange(self.num_data) + 0.5) * np.pi / self.num_data
        worker_angles = (np.arange(self.num_workers) + 0.3) * np.pi / self.num_workers
        return MatrixMap(basis(np.cos(worker_angles)) @ np.linalg.inv(basis(np.cos(angles))))

    def _make_decoder(self, received):
        return MatrixMap(np.linalg.pinv(self.encoder.matrix().numpy()[list(received)]))


class CopyCode(FixedCode):
    """Column n is input n, and a missing result is zero: N = K."""

    def _make_encoder(self) -> MatrixMap:
        return MatrixMap(np.eye(self.num_data))

    def _make_decoder(self, received):
        return MatrixMap(np.eye(self.num_data)[:, list(received)])


class Modes(nn.Module):
    """Returns the modes that it runs in."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        product = torch.mm(x, x.new_zeros(x.shape[1], 1))  # autocast casts it
        flags = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return product, *(torch.full_like(x, flag) for flag in flags), torch.ones(len(x))


@contextlib.contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """Autocast on every device that a worker may have: each kind has its own."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        yield


class FailsAt(nn.Module):
    """Identity, but for inputs of a certain value something happens."""

    def __init__(self, value: float, happens: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.value, self.happens = value, happens

    def forward(self, x: Tensor) -> Any:
        hit = x == self.value
        return self.happens(x) if hit.any() else x.clone()


class Gated(nn.Module):
    """Notes in a folder which inputs it has got, and returns them when there is a file "open"."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def forward(self, x: Tensor) -> Tensor:
        folder = Path(self.folder)
        (folder / str(int(x.max()))).touch()
        end = time.monotonic() + 60.0
        while not (folder / "open").exists():
            assert time.monotonic() < end
            time.sleep(0.002)
        return x.clone()


def divide_by_zero(x: Tensor) -> Tensor:
    raise ZeroDivisionError(f"boom at {x.flatten().tolist()}")


def nan_at_two(x: Tensor) -> Tensor:
    return torch.where(x == 2.0, torch.nan, x)


def task_of(values: Tensor, *shared: Any, dim: int = 0) -> Task:
    """The task of units ``values [U, R, ...]`` and arguments that are not divided."""
    leaves, spec = pytree.tree_flatten(((values.flatten(0, 1), *shared), {}))
    dims = [dim] + [None] * (len(leaves) - 1)
    return Task(leaves, dims, spec, values.shape[0], values.shape[1], values.device, out_dims=dim)


def by_part(replies: list[Reply]) -> dict[int, Any]:
    """The values, by the number of the part."""
    assert len({reply.part.number for reply in replies}) == len(replies)
    return {reply.part.number: reply.value for reply in replies}


def run(pool: Workers, module: nn.Module, task: Task, deadline: float = math.inf):
    """Ask for each unit as its own part, and yield replies for at most ``deadline`` seconds."""
    with pool.open(module, task) as request:
        request.ask([Part(n, (n,)) for n in range(task.num_units)])
        yield from request.replies(deadline)


def numbered(*units: Any, first: int = 0) -> list[Part]:
    """Parts of these units, in the order in which they are asked for."""
    return [Part(first + i, Units(part)) for i, part in enumerate(units)]


def events_of(request: Request) -> list[Began | Reply]:
    """All that still happens."""
    return list(iter(lambda: request.wait(request.now() + WAIT), None))


def replies_of(request: Request) -> list[Reply]:
    return [event for event in events_of(request) if isinstance(event, Reply)]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.005)


class DoublesScale(nn.Module):
    """Doubles its second argument in place, and multiplies by it."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale.mul_(2)


class Affine(nn.Module):
    def forward(self, x: Tensor, factor: Tensor, offset: float) -> Tensor:
        return x * factor + offset


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class CumulativeSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0)
