r"""Choosing the numbers of a code by its error on unlabelled data."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .._arguments import instance, shown
from .._torch import on_host
from ..codes.base import Code
from ..nn import CodedWrapper
from ..stragglers import Uniform
from .trial import Trial, calls_of, within

__all__ = ["SETS", "chosen", "tune"]

#: The number of received sets of a batch. Rare sets decide the squared error; more than 5 were not
#: measured.
SETS = 5


@on_host()
def tune(wrapper: CodedWrapper, batches: Iterable[Any], **values: Sequence[Any]) -> Code:
    r"""Choose the numbers of a wrapper's code that answer best on batches without labels.

    The code has the least squared error, against the module's own answers, among all combinations
    of its :meth:`~coded_torch.codes.Code.candidates`. Each batch has five received sets, drawn from
    the law of the wrapper's workers; without a law, S of N workers are lost uniformly.

    Args:
        wrapper: a wrapped module with the code. It is not changed: assign the new code to
            ``wrapper.code``.
        batches: a few batches like the later ones, also in size. Each is an input, or a tuple of
            positional arguments.
        values: by the name of a number, the values to choose it from. Defaults to the candidates.

    Returns:
        The code with the best numbers; the first of equals.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there are no batches, there is nothing to choose a number from, the code has
            no such number, or none of the codes can decode the received sets.

    Note:
        The module runs in this process without gradients: once on every batch, and N / K times as
        much for every distinct encoder that mixes.

    Example:
        >>> import torch
        >>> from coded_torch import CodedWrapper, codes, stragglers, tune, workers
        >>> x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
        >>> pool = workers.LocalWorkers(stragglers.Uniform(4, seed=0))
        >>> coded = CodedWrapper(torch.nn.Tanh(), codes.SplineCode(10, 20), workers=pool)
        >>> coded.code = tune(coded, [x], encoder_smoothing=[0.0], decoder_smoothing=[1e-6, 1.0])
        >>> coded.code
        SplineCode(num_data=10, num_workers=20, encoder_smoothing=0.0, decoder_smoothing=1e-06)
    """
    instance("tune", "wrapper", wrapper, CodedWrapper)
    code = _code(wrapper)
    calls = calls_of("tune", wrapper.module, batches)
    if not calls:
        raise ValueError("tune: batches must hold at least one, got none")
    draws = received_sets(wrapper)

    def trials() -> Iterator[tuple[Trial, list[tuple[int, ...]]]]:
        for args in calls:
            sets = [*itertools.islice(draws, SETS)]
            dims = {"in_dims": wrapper.in_dims, "out_dims": wrapper.out_dims}
            most = getattr(wrapper.workers, "max_batch_size", None)
            yield Trial(wrapper.module, args, sets, max_batch_size=most, **dims), sets

    return chosen(code, trials(), wrapper.num_stragglers, values)


def chosen(
    code: Code,
    trials: Iterable[tuple[Trial, Sequence[Sequence[int]]]],
    num_stragglers: int,
    values: Mapping[str, Sequence[Any]] | None = None,
) -> Code:
    """Return the code with the numbers of the least squared error on trials with received sets."""
    variants = _variants(code, values or {})
    if len(variants) == 1:
        return variants[0]
    errors = np.zeros(len(variants))
    for trial, sets in trials:
        for i, variant in enumerate(variants):
            for received in sets:
                if len(within(received, variant)) < variant.min_received:
                    errors[i] = math.inf
                    continue
                answers = trial.decode(variant, received, num_stragglers)
                for a, e in zip(answers, trial.exact, strict=True):
                    errors[i] += float((a.double() - e.double()).square().sum())
    if not np.isfinite(errors).any():
        raise ValueError(
            f"tune: {code} must be able to decode what is received, got too few results"
        )
    return variants[int(np.nan_to_num(errors, nan=np.inf).argmin())]


def _variants(code: Code, values: Mapping[str, Sequence[Any]]) -> list[Code]:
    """Return the code with every combination of numbers."""
    options = dict(code.candidates())
    for name, some in values.items():
        if name not in options:
            known = ", ".join(options) or "none"
            raise ValueError(f"tune: the numbers of {code} must be among {known}, got {name!r}")
        if isinstance(some, str | bytes) or not isinstance(some, Sequence):
            raise TypeError(f"tune: {name} must be a sequence of values, got {shown(some)}")
        options[name] = list(some)
        if not options[name]:
            raise ValueError(f"tune: {name} must hold at least one value, got none")
    combinations = itertools.product(*options.values())
    return [code.replace(**dict(zip(options, some, strict=True))) for some in combinations]


def received_sets(wrapper: CodedWrapper) -> Iterator[tuple[int, ...]]:
    """Yield sets of workers whose results may be decoded, drawn from the workers' law."""
    code, lost = _code(wrapper), wrapper.num_stragglers
    n = code.num_workers
    # A copy keeps the draws of the wrapper's own calls.
    law = copy.deepcopy(wrapper.workers.stragglers) or Uniform(lost, seed=0)
    deadline = (wrapper.waiting and wrapper.waiting.deadline) or math.inf
    shuffler = random.Random(0)
    while True:
        latencies = law.sample(n).tolist()
        first = sorted(range(n), key=latencies.__getitem__)[: n - lost]
        place = shuffler.sample(range(n), n) if code.shuffle else range(n)
        in_time = (worker for worker in first if latencies[worker] <= deadline)
        yield tuple(sorted(place[n] for n in in_time if latencies[n] < math.inf))


def _code(wrapper: CodedWrapper) -> Code:
    if wrapper.code is None:
        raise ValueError("tune: wrapper must have a code, got one without")
    return wrapper.code
