"""The networks that schemes are tried on, their inputs, and a surrogate of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coded_torch.codes import RegressionCode
from coded_torch.demo.lenet5 import digits, lenet5

from . import networks, students, tasks

__all__ = ["AT_ONCE", "SEED", "AsGiven", "Batch", "Subject", "run", "student_of", "subject"]

SEED = 0  # the seed of batches and of lost workers
NUM_TUNING_SHIPPED = 500  # the tuning digits of the 2,000 that ship, as in the demo
NUM_TUNING_ROWS = 240  # the tuning rows of a table, or of a text
AT_ONCE = 256  # images through a network at once


class Batch(NamedTuple):
    """Inputs and their true classes."""

    images: Tensor
    labels: Tensor | None = None


class Subject(NamedTuple):
    """A network, and inputs for it.

    Codes are tuned on ``tuning``, which no gradient has seen; ``held_out`` is reported.
    """

    model: nn.Module
    tuning: Batch
    held_out: Batch

    def batches(self, part: str, size: int, count: int) -> Iterator[Batch]:
        """Yield disjoint random batches, as many as there are, at most ``count``."""
        whole: Batch = getattr(self, part)
        order = torch.randperm(len(whole.images), generator=torch.Generator().manual_seed(SEED))
        size = min(size, len(order))
        for rows in order.split(size)[: min(count, len(order) // size)]:
            yield Batch(whole.images[rows], None if whole.labels is None else whole.labels[rows])


class AsGiven(RegressionCode):
    """A code whose numbers are not tuned."""

    def candidates(self) -> dict[str, Any]:
        return {}


@torch.no_grad()
def run(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the model's outputs."""
    return torch.cat([model(part) for part in images.split(AT_ONCE)])


@functools.cache
def subject(name: str, quick: bool = False, seed: int = 0) -> Subject:
    """Return a network with its inputs.

    Args:
        name: a name in ``networks.RECIPES``, ``tasks.TABLES`` or ``tasks.SEQUENCES``.
        quick: whether LeNet-5 and the digits that ship stand for every network.
        seed: the seed of the network's training; of a table, its split.

    Raises:
        MissingDataError: a package is not installed.
    """
    if name in tasks.TABLES or name in tasks.SEQUENCES:
        task, cut = tasks.task(name, seed), NUM_TUNING_ROWS
        every = [x for x in (task.inputs, task.labels) if x is not None]
        parts = [[x[:cut] for x in every], [x[cut:] for x in every]]
        return Subject(task.model, *(Batch(*part) for part in parts))
    if quick:
        (images, labels), model, cut = digits(), lenet5(), NUM_TUNING_SHIPPED
        parts = [(images[:cut], labels[:cut]), (images[cut:], labels[cut:])]
    else:
        network = networks.load(name, seed)
        parts, model = [network.tuning, network.held_out], network.model
    model = model.to(memory_format=torch.channels_last)  # convolutions are faster
    return Subject(model, *(Batch(*part) for part in parts))


@functools.cache
def student_of(name: str, quick: bool = False, seed: int = 0) -> nn.Module:
    """Return the student of a subject, with the same arguments."""
    if name in tasks.TABLES or name in tasks.SEQUENCES:
        return students.of_task(tasks.task(name, seed))
    of = subject(name, quick, seed)
    return students.student(name, of.model, seed, of.tuning.images if quick else None)
