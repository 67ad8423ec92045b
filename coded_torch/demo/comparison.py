"""Codes compared on one network: the same inputs, the same late workers, the same outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import metrics
from ..codes import (
    BerrutCode,
    Code,
    FixedCode,
    KernelCode,
    LagrangeCode,
    ReplicationCode,
    SplineCode,
)
from ..nn import CodedWrapper
from ..stragglers import Uniform

__all__ = ["Outcome", "Row", "Setting", "compare", "draw_batches", "tune_degrees"]

_TUNING_BATCHES = 25
_DEGREES = 25
_AT_ONCE = 5  # batches of K that a code that looks at the inputs may see together


@dataclasses.dataclass(frozen=True)
class Setting:
    """N workers, K inputs coded together, S late workers of the N, drawn uniformly."""

    num_workers: int
    num_data: int
    num_stragglers: int

    @property
    def num_lost_uncoded(self) -> int:
        """How many of K workers, one an input, are late at the same rate."""
        return round(self.num_data * self.num_stragglers / self.num_workers)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one code did.

    Attributes:
        relative_accuracy: right answers, relative to the right answers of the bare network.
        interval: half the width of the 95 % interval of ``relative_accuracy``, over batches.
        rmse: the root of the mean squared Euclidean distance between decoded and exact outputs.
        answered: the share of inputs that went, alone or mixed, to a worker in time; None for a
            code that decides batch by batch what goes where.
        received: per call, the workers in time.
    """

    relative_accuracy: float
    interval: float
    rmse: float
    answered: float | None
    received: tuple[tuple[int, ...], ...]


class Row(NamedTuple):
    """A code, a note on it, and how it did; None where it does not apply, and the note says why."""

    code: str
    note: str
    outcome: Outcome | None


def compare(
    model: nn.Module,
    setting: Setting,
    images: Tensor,
    labels: Tensor,
    tuning_images: Tensor,
    *,
    num_batches: int,
    seed: int,
) -> list[Row]:
    """Run the wrapped network with every code on the same batches and the same late workers.

    The kernel code runs a second time on five batches at once, with five groups of K and the same
    workers late for all of them: it predicts from all results.

    Args:
        model: the network, in evaluation mode; ``model(images)`` is ``[n, classes]``.
        setting: N, K and S.
        images: ``[n, ...]``, what the codes are compared on, on the device of the model.
        labels: ``[n]``.
        tuning_images: ``[t, ...]``, others, to choose the degrees of the Lagrange decoders.
        num_batches: how many batches of K.
        seed: of the batches and the late workers.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = draw_batches(len(labels), setting.num_data, num_batches, generator)
    tuning = draw_batches(len(tuning_images), setting.num_data, _TUNING_BATCHES, generator)
    degrees = tune_degrees(model, setting, tuning_images[tuning], generator)
    batches, truth = images[rows], labels[rows]
    table = []
    for name, note, code, num_stragglers, at_once in _codes(setting, degrees):
        if code is None or code.num_workers - num_stragglers < code.min_received:
            table.append(Row(name, f"not applicable: {note}", None))
        else:
            outcome = _measure(model, code, num_stragglers, batches, truth, seed, at_once)
            table.append(Row(name, note, outcome))
    return table


def draw_batches(size: int, num_data: int, num_batches: int, generator: torch.Generator) -> Tensor:
    """Rows of ``size`` inputs, ``[num_batches, num_data]``: all of them, before one comes again."""
    rounds = math.ceil(num_batches * num_data / size)
    order = torch.cat([torch.randperm(size, generator=generator) for _ in range(rounds)])
    return order[: num_batches * num_data].view(num_batches, num_data)


@torch.inference_mode()
def tune_degrees(
    model: nn.Module, setting: Setting, batches: Tensor, generator: torch.Generator
) -> tuple[int, int]:
    """The degrees of a Lagrange code's decoder that do best on ``batches [b, K, ...]``.

    Two of them, since they are far apart: rare sets of late workers, on which a high degree blows
    up, decide the squared error, but turn few classes.

    Returns:
        The degree of the least RMSE, and that of the most classes as the bare network says.
    """
    n, k = setting.num_workers, setting.num_data
    law, encoder = Uniform(setting.num_stragglers), LagrangeCode(k, n, decoder_degree=0).encoder
    cases = []
    for images in batches:
        received = law.sample(n, generator).isfinite().nonzero().flatten()
        cases.append((model(encoder(images))[received.to(images.device)], received))
    exact = torch.stack([model(images) for images in batches])
    scores = []
    # Coded inputs are of degree K - 1, and their results not many times rougher.
    most = min(n - setting.num_stragglers - 1, 5 * k)
    for degree in sorted({round(i * most / _DEGREES) for i in range(_DEGREES + 1)}):
        code = LagrangeCode(k, n, decoder_degree=degree)
        decoded = torch.stack([code.decode(results, received) for results, received in cases])
        if decoded.isfinite().all():
            agreement = metrics.top1_agreement(decoded, exact)
            scores.append((degree, metrics.rmse(decoded, exact), agreement))
    return min(scores, key=lambda s: s[1])[0], max(scores, key=lambda s: s[2])[0]


def _codes(
    setting: Setting, degrees: tuple[int, int]
) -> Iterator[tuple[str, str, Code | None, int, int]]:
    """Name, note, code, number of late workers and of batches coded at once, of every row."""
    n, k, s = setting.num_workers, setting.num_data, setting.num_stragglers
    repeats = n >= k
    note = "" if repeats else "fewer workers than inputs"
    yield f"kernel on {_AT_ONCE} batches", note, KernelCode(k, n) if repeats else None, s, _AT_ONCE
    yield "kernel", note, KernelCode(k, n) if repeats else None, s, 1
    yield "spline", "", SplineCode(k, n), s, 1
    yield "Berrut", "", BerrutCode(k, n), s, 1
    for aim, degree in zip(("RMSE", "RelAcc"), degrees, strict=True):
        lagrange = LagrangeCode(k, n, decoder_degree=degree)
        yield f"Lagrange for {aim}", f"degree {degree}", lagrange, s, 1
    yield "replication", note, ReplicationCode(k, n) if repeats else None, s, 1
    lost = setting.num_lost_uncoded
    yield "uncoded", f"{lost} of {k} late", ReplicationCode(k, k), lost, 1


@torch.inference_mode()
def _measure(
    model: nn.Module,
    code: Code,
    num_stragglers: int,
    batches: Tensor,
    labels: Tensor,
    seed: int,
    at_once: int,
) -> Outcome:
    # Every code draws from its own generator with the same seed: the same workers are late.
    late = torch.Generator().manual_seed(seed)
    coded = CodedWrapper(
        model,
        code,
        stragglers=Uniform(num_stragglers),
        generator=late,
        ordering="similarity" if code.uses_geometry else "arrival",
        shuffle=False,
    )
    answers, received = [], []
    for images in batches.split(at_once):
        answers.append(coded(images.flatten(0, 1)))
        assert coded.last_run is not None
        received.append(coded.last_run.received)
    answered = None
    if isinstance(code, FixedCode):
        involved = code.encoder.matrix() != 0  # [N, K]
        shares = [involved[list(workers)].any(dim=0) for workers in received]
        answered = torch.stack(shares).double().mean().item()
    decoded = torch.cat(answers).unflatten(0, batches.shape[:2])  # [batches, K, classes]
    exact = model(batches.flatten(0, 1)).view_as(decoded)
    right = (decoded.argmax(-1) == labels).sum(-1).double()  # [batches]
    right_exact = (exact.argmax(-1) == labels).sum(-1).double()
    ratio = metrics.relative_accuracy(decoded, exact, labels)
    # The batches' deviations from the common ratio give the standard error of a ratio of sums.
    error = (right - ratio * right_exact).std() * len(batches) ** 0.5 / right_exact.sum()
    return Outcome(
        relative_accuracy=ratio,
        interval=1.96 * error.item(),
        rmse=metrics.rmse(decoded, exact),
        answered=answered,
        received=tuple(received),
    )
