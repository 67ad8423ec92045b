r"""Choosing the numbers of a code by its error on unlabelled data."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._arguments import instance, shown
from .._transforms import on_host
from ..codes.base import Code
from ..codes.kernel import KernelCode
from ..codes.plans import evenly, order_by
from ..input_space.geometry import Geometry
from ..input_space.leave_one_out import LeaveOneOut
from ..input_space.ordering import Grouping, order_of
from ..input_space.points import Points
from ..input_space.selection import among
from ..nn import CodedWrapper
from ..stragglers import Uniform
from .trial import Trial, calls_of

__all__ = ["tune"]

_SETS = 5  # received sets a batch: rare ones decide the squared error


@on_host()
def tune(wrapper: CodedWrapper, batches: Iterable[Any], **values: Sequence[Any]) -> Code:
    r"""Choose the numbers of a wrapper's code that answer best on batches without labels.

    What is tried are all combinations of the values that the code proposes,
    :meth:`~coded_torch.codes.Code.candidates`: the smoothings of a ``SplineCode``, the order of a
    ``BerrutCode``, the decoder's degree of a ``LagrangeCode``. The best has the least squared error
    against the module's own answers, over five received sets a batch that are drawn from the law
    of the wrapper's workers, the same for all; where they have no law, S of N are lost uniformly.

    A :class:`~coded_torch.codes.KernelCode`'s metric and length, one for all outputs, are those by
    which the module's answers are predicted best from each other, each left out in turn; after
    that, a call pays nothing for choosing.

    Args:
        wrapper: a wrapped module with the code. It is not changed: assign the new code to
            ``wrapper.code``.
        batches: batches like those that will be answered, also in size, as inputs of a batch are
            nearer to each other the more there are. Each is what the wrapper is called with: an
            input, or a tuple of positional arguments. A few are enough.
        values: by the name of a number, what to choose it from, at least one; instead of what the
            code proposes.

    Returns:
        The code with the best numbers, of the same type as the wrapper's; of equals, the first. The
        code itself, where it has nothing to choose.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: there are no batches, there is nothing to choose a number from, the code has
            no such number, or none of the codes can decode what is received.

    Note:
        Without gradients, the module runs once on every batch, and for all but a ``KernelCode`` N /
        K times as much for every distinct encoder, not for every decoder. Stragglers are drawn from
        the wrapper's law; neither its hooks nor its ``on_run`` are called.

    Example:
        >>> import torch
        >>> from coded_torch.codes import SplineCode
        >>> from coded_torch.nn import CodedWrapper
        >>> from coded_torch.stragglers import Uniform
        >>> from coded_torch.evaluation.tune import tune
        >>> x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
        >>> coded = CodedWrapper(torch.nn.Tanh(), SplineCode(10, 20), stragglers=Uniform(4, seed=0))
        >>> coded.code = tune(coded, [x], encoder_smoothing=[0.0], decoder_smoothing=[1e-6, 1.0])
        >>> coded.code
        SplineCode(num_data=10, num_workers=20, encoder_smoothing=0.0, decoder_smoothing=1e-06)
    """
    instance("tune", "wrapper", wrapper, CodedWrapper)
    calls = calls_of("tune", wrapper.module, batches)
    if not calls:
        raise ValueError("tune: batches must hold at least one, got none")
    variants = _variants(wrapper.code, values)
    if len(variants) == 1:
        return variants[0]
    if isinstance(wrapper.code, KernelCode):
        each = [_left_out(wrapper, args, variants) for args in calls]
    else:
        draws = received_sets(wrapper)
        each = [_decoded(wrapper, args, variants, [*islice(draws, _SETS)]) for args in calls]
    errors = np.sum(each, axis=0)
    if not np.isfinite(errors).any():
        raise ValueError(
            f"tune: {wrapper.code} must be able to decode what is received, got too few results"
        )
    return variants[int(np.nan_to_num(errors, nan=np.inf).argmin())]


def _variants(code: Code, values: dict[str, Sequence[Any]]) -> list[Code]:
    """The code with every combination of numbers."""
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
    """Endlessly, sets of workers whose results may be decoded, drawn from the workers' law."""
    n, lost = wrapper.code.num_workers, _num_stragglers(wrapper)
    # A copy: the wrapper's calls go on to lose what they would have lost.
    law = copy.deepcopy(wrapper.workers.stragglers) or Uniform(lost, seed=0)
    deadline = (wrapper.waiting and wrapper.waiting.deadline) or math.inf
    shuffler = random.Random(0)
    while True:
        latencies = law.sample(n).tolist()
        first = sorted(range(n), key=latencies.__getitem__)[: n - lost]
        place = shuffler.sample(range(n), n) if wrapper.shuffle else range(n)
        in_time = (worker for worker in first if latencies[worker] <= deadline)
        yield tuple(sorted(place[n] for n in in_time if latencies[n] < math.inf))


def _num_stragglers(wrapper: CodedWrapper) -> int:
    return wrapper._num_stragglers(wrapper._waiting())


def _decoded(
    wrapper: CodedWrapper,
    args: tuple[Any, ...],
    variants: Sequence[Code],
    sets: Sequence[tuple[int, ...]],
) -> list[float]:
    """The squared error of every code; infinite where it cannot decode what is received."""
    trial = Trial(wrapper, args, sets)
    finish = torch.nn.Softmax(-1) if wrapper.link == "softmax" else torch.nn.Identity()
    exact = [finish(leaf).double() for leaf in trial.exact]

    def error(code: Code, received: Sequence[int]) -> float:
        if len(received) < code.min_received:
            return math.inf
        answers, _ = trial.decode(code, received, num_stragglers=_num_stragglers(wrapper))
        pairs = zip(answers, exact, strict=True)
        return sum(float((finish(a).double() - e).square().sum()) for a, e in pairs)

    return [sum(error(code, received) for received in sets) for code in variants]


def _left_out(wrapper: CodedWrapper, args: tuple[Any, ...], variants: Sequence[Any]) -> list[float]:
    """How badly each answer is predicted from the others, for every code."""
    trial, errors, code = Trial(wrapper, args), [0.0] * len(variants), wrapper.code
    assert isinstance(code, KernelCode)
    if not trial.inputs:
        return errors  # without distances all are alike
    outputs = [leaf[..., None].flatten(1) for leaf in trial.exact]
    results = torch.cat([leaf.to("cpu", torch.float64) for leaf in outputs], 1)  # [B, C]
    # As large batches are planned: in chunks, each with its own distances.
    ordering, order = wrapper.ordering, torch.arange(len(results))
    if not isinstance(ordering, str):
        ordering, order = "arrival", Grouping(order_of(ordering, trial.inputs, None), 1).order
    for rows in order.split(evenly(len(order), code.max_chunk)):
        inputs = [leaf[rows.to(leaf.device)] for leaf in trial.inputs]
        geometry = Geometry(inputs)
        grouping = Grouping(order_by(code, ordering, inputs, geometry), len(rows))
        batch = Points(code.metrics, code.lengths, grouping, geometry)
        typical = geometry.typical.nonzero().flatten()
        loss = _loss(batch, typical, results[rows[typical]])
        for i, variant in enumerate(variants):
            both = itertools.product(variant.metrics, variant.lengths)
            errors[i] += min(loss(metric, length) for metric, length in both)
    return errors


def _loss(batch: Points, rows: Tensor, results: Tensor) -> Callable[[Any, float], float]:
    """By metric and length, how badly the results of some rows are predicted from each other."""

    @functools.cache
    def loss(metric: Any, length: float) -> float:
        if batch.squared_distances(metric) is None:
            return math.inf
        squared, step = batch.distances(metric)
        of_rows = among(squared, rows, rows).double()
        return float(LeaveOneOut([of_rows], [length * step]).losses(results).sum())

    return loss
