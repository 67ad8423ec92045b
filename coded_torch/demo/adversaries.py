"""Machines that lie to LeNet-5, one attack after the other, and what comes of it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..codes import KernelCode
from ..workers.attacks import ATTACKS
from .situations import answered

__all__ = ["Outcome", "lie"]


class Outcome(NamedTuple):
    """What one attack did, over all batches.

    Attributes:
        attack: its name.
        asked: how many lies arrived in time, each a machine's result of a batch.
        named: how many of these machines were named.
        falsely: how many honest machines were.
        fooled: the accuracy where nobody looks for liars.
        right: where they are looked for.
    """

    attack: str
    asked: int
    named: int
    falsely: int
    fooled: float
    right: float

    @staticmethod
    def header(n: int, k: int, s: int, num_adversaries: int, count: int) -> str:
        return (
            f"LeNet-5 reads {count:,} MNIST test digits. Of {n} workers, which compute {k} inputs "
            f"a group, and\nsome of them twice, {s} are late and {num_adversaries} lie; which lie "
            "differs from batch to batch.\n\n"
            "attack       named        falsely   accuracy: fooled   looked at"
        )

    def __str__(self) -> str:
        named = f"{self.named} of {self.asked}"
        return (
            f"{self.attack:<12} {named:<12} {self.falsely:<9} "
            f"{self.fooled:>16.2%}   {self.right:>9.2%}"
        )


@torch.no_grad()
def lie(
    model: nn.Module,
    batches: Sequence[Tensor],
    labels: Sequence[Tensor],
    case: tuple[int, int, int],
    num_adversaries: int,
    seed: int = 0,
) -> Iterator[Outcome]:
    """Answer all batches under every attack, with and without looking for liars.

    Args:
        model: what is run.
        batches: of inputs.
        labels: of their true classes.
        case: N, K and S.
        num_adversaries: A; each batch has other liars.
        seed: of late machines, liars and lies.
    """
    n, k, s = case
    for attack in ATTACKS:
        asked = named = falsely = 0
        hits = {0: 0.0, num_adversaries: 0.0}
        for i, (batch, classes) in enumerate(zip(batches, labels, strict=True)):
            liars = random.Random(seed + i).sample(range(n), num_adversaries)
            for looked_for in hits:
                answers, report = answered(
                    model,
                    batch,
                    KernelCode(k, n),
                    s,
                    liars=liars,
                    attack=attack,
                    max_adversaries=looked_for,
                    seed=seed + i,
                )
                hits[looked_for] += float((answers.argmax(-1) == classes).float().mean())
                if looked_for:
                    found = set(report.adversaries)
                    asked += len({*report.received, *found} & {*liars})
                    named += len(found & {*liars})
                    falsely += len(found - {*liars})
        fooled, right = (total / len(batches) for total in hits.values())
        yield Outcome(attack, asked, named, falsely, fooled, right)
