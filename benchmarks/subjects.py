"""What codes are tried on: networks, and batches of inputs for them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coded_torch.demo.lenet5 import digits, lenet5

from . import networks

__all__ = ["AT_ONCE", "SEED", "Batch", "Subject", "run", "subject"]

SEED = 0
NUM_TUNING_SHIPPED = 500  # of the 2,000 digits that ship, as in the demo
AT_ONCE = 256  # images through a network at once


class Batch(NamedTuple):
    """Inputs and their true classes."""

    images: Tensor
    labels: Tensor | None


class Subject(NamedTuple):
    """A network, and inputs for it.

    Whatever is tuned is tuned on ``tuning``, which no gradient has seen; ``held_out`` is reported.
    """

    model: nn.Module
    tuning: Batch
    held_out: Batch

    def batches(self, part: str, size: int, count: int) -> Iterator[Batch]:
        """Yield disjoint random batches, until all inputs are used; then again, drawn anew."""
        whole: Batch = getattr(self, part)
        generator = torch.Generator().manual_seed(SEED)
        rows: list[Tensor] = []
        for _ in range(count):
            if not rows:
                order = torch.randperm(len(whole.images), generator=generator)
                rows = list(order.split(size))[: len(order) // size]
            at = rows.pop(0)
            labels = None if whole.labels is None else whole.labels[at]
            yield Batch(whole.images[at], labels)


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> Tensor:
    """Return the model's outputs."""
    return torch.cat([model(part) for part in images.split(AT_ONCE)])


@functools.cache
def subject(name: str, quick: bool = False) -> Subject:
    """Return a network with its inputs; a quick one needs only data that ship in the package.

    Args:
        name: a name in ``networks.RECIPES``.
        quick: give LeNet-5 and the digits that ship, whatever the name.

    Raises:
        MissingDataError: a package is not installed.
    """
    if quick:
        images, labels = digits()
        cut = NUM_TUNING_SHIPPED
        parts = [(images[:cut], labels[:cut]), (images[cut:], labels[cut:])]
        model = lenet5()
    else:
        network = networks.load(name)
        parts, model = [network.tuning, network.held_out], network.model
    model = model.to(memory_format=torch.channels_last)  # convolutions are faster
    return Subject(model, *(Batch(*part) for part in parts))
