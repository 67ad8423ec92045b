r"""A module that every machine of a pool loads and runs before it is needed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .base import Arguments, Part, Reply, Task, Workers

__all__ = ["load_everywhere"]


def load_everywhere(pool: Workers, module: nn.Module, example: Any, seconds: float) -> None:
    """Have every machine load a module, and call it if there is an example.

    Args:
        pool: whose machines.
        module: what they load.
        example: an input or a tuple of positional arguments; None: the module is not called.
        seconds: that this may take.

    Raises:
        RuntimeError: it took longer.
        WorkerError: a machine could not load or call the module.
    """
    size, loaded, numbers = pool.num_machines or 0, set[int](), itertools.count()
    with torch.no_grad(), pool.open(module, _task_of(example)) as request:
        while len(loaded) < size:
            # Idle machines take a part each. A busy one gets its part in a later round.
            round = [Part(next(numbers), (0,)) for _ in range(size - len(loaded))]
            request.ask(round)
            while round:
                event = request.wait(seconds)
                if event is None:
                    raise RuntimeError(
                        f"{type(pool).__name__}: only {len(loaded)} of {size} workers loaded the "
                        f"module in time; {request.status() or 'the others are still loading'}"
                    )
                if isinstance(event, Reply):
                    if event.error is not None:
                        raise event.error
                    round.remove(event.part)
                    loaded.add(event.machine)


def _task_of(example: Any) -> Task:
    args = example if isinstance(example, tuple) else (example,)
    leaves, spec = pytree.tree_flatten((args, {}))
    kind = _Loading if example is None else Task
    return kind(leaves, [None] * len(leaves), spec, 1, 1, torch.device("cpu"))


class _Loading(Task):
    """No call at all, as no module can be called without arguments that one knows."""

    def payload(self, units: Sequence[int]) -> Arguments | None:  # type: ignore[override]
        return None
