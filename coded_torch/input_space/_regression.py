"""Missing answers, estimated from the answers of similar inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._arguments import between_0_and_1, check, count, dense, instance, real, shown
from .._extension import first_results
from .._torch import exactly, outside, plain, to_device
from ._error_bounds import ErrorBounds
from ._gaussian_process import LENGTH, NUGGET
from ._gradients import GradientMetric
from ._regressor import MOST_ROWS, Regressor
from .metrics import METRICS, Choice, Distances, Features, Sources

_BLIND = "no floating-point input to measure distances on: missing answers are the mean"
# Rows whose variances are found together where copies are planned: estimating an input from more
# than its neighbours on the path changes its variance little. (MKL factorises 500 rows in less than
# half the time that it takes for 512.)
_NEIGHBOURS = 500


class Regression:
    """Estimates missing rows of a batch by regression on the rows that have results.

    The estimates are the posterior means of a Gaussian process in input space, shrunk towards
    their mean if results are estimated badly from each other. Without floating-point inputs,
    missing rows get the mean.

    Args:
        metric: how far inputs are apart: a name in
            :data:`~coded_torch.input_space.metrics.METRICS`; "auto", all of these; a callable,
            short for ("auto", callable); or a sequence of these. Every output has the metric that
            estimates its results best, where each result is left out in turn. A callable gets the
            floating-point inputs, ``[B, ...]`` each, or all inputs if none is floating-point. It
            returns tensors between whose rows distances are measured. It runs once per call, if a
            row is late.
        length: the length scale of the regression, positive, in units of the median step of a path
            through the batch. "auto" chooses among 1, 2, 4 and 8, and then compares the chosen
            length with this length times and divided by the root of 2.
        link: "softmax" if all outputs are probabilities over their last dimension: they are
            estimated on the scale of logits.
        coverage: the probability, between 0 and 1, with which the error of an estimated answer is
            at most its bound. Above 0.995 bounds may be infinite. Defaults to 0.95.

    Example:
        >>> import torch
        >>> from coded_torch import Regression
        >>> x = torch.linspace(0, 3, 16)[:, None]
        >>> plan = Regression().plan([x])
        >>> known = [0, 1, 2, 4, 5, 6, 8, 9, 10, 11, 13, 14, 15]
        >>> answers = plan.decode(x.sin()[known][:, None], known)
        >>> bool((answers - x.sin()).abs().max() < 0.01)
        True
    """

    def __init__(
        self,
        metric: str | Features | Sequence[str | Features] = "auto",
        length: float | str = "auto",
        link: str | None = None,
        coverage: float = 0.95,
    ) -> None:
        self.metric = metric
        self.metrics = _metrics(metric)
        self.length = length
        if not isinstance(length, str) or length != "auto":
            requirement = "positive and finite, or 'auto'"
            self.length = real(self, "length", length, requirement, lambda x: 0 < x < math.inf)
        check_link(self, link)
        self.link = link
        self.coverage = between_0_and_1(self, "coverage", coverage)

    def plan(
        self,
        inputs: Sequence[Tensor],
        batch_size: int | None = None,
        *,
        others: Sequence[Tensor] = (),
        block: int = MOST_ROWS,
    ) -> RowPlan:
        """Plan one batch, before any of its results is there.

        Args:
            inputs: the floating-point inputs that are divided, ``[B, ...]`` each.
            batch_size: B, which must be given if there is no input.
            others: inputs of other dtypes, for callable metrics if there is no floating-point one.
            block: the most rows that are estimated together. At 0, the mean estimates all.
        """
        inputs, size = check_batch("Regression", inputs, batch_size)
        parts = -(-size // (count("Regression", "block", block, least=0) or size))
        with outside():
            rows = torch.arange(size).tensor_split(parts)
            return RowPlan(self, inputs if block else [], size, others if block else None, rows)

    def __repr__(self) -> str:
        options = {k: getattr(self, k) for k in ("metric", "length", "link", "coverage")}
        shown = (f"{k}={v!r}" for k, v in options.items() if v not in ("auto", None, 0.95))
        return f"Regression({', '.join(shown)})"


class RowPlan:
    """A regression fitted to one batch, of which it estimates some rows, a part, together.

    Results are ``[F, 1, ...]`` of the ``received`` rows, increasing. ``choices`` are of the output
    that was decoded last, for every part.
    """

    def __init__(
        self,
        regression: Regression,
        inputs: Sequence[Tensor],
        batch_size: int,
        others: Sequence[Tensor] | None,
        parts: Sequence[Tensor],
    ) -> None:
        self.regression = regression
        self.batch_size = batch_size
        self.num_groups = 1
        self._rows = torch.arange(batch_size)[:, None]  # [units, G], that each unit computes
        self.choices: tuple[Choice, ...] = ()
        metrics = regression.metrics
        sources = Sources(inputs)
        self._notes = sources.notes
        if not inputs and others is not None:
            self._notes.append(_BLIND)
            numbers = [plain("Regression", "others", x) for x in others]
            for metric in metrics:  # the first callable that works measures
                if numbers and not isinstance(metric, str) and not sources.leaves:
                    sources.leaves = sources.make(metric, numbers)
            metrics = tuple(metric for metric in metrics if isinstance(metric, str)) or (*METRICS,)
            if sources.leaves:
                self._notes.clear()
        self._length = None
        if not isinstance(regression.length, str):
            self._length = regression.length
        self._parts = [Distances(sources, metrics, each) for each in parts]
        self._last: tuple[tuple[int, ...], tuple[Tensor, list[Regressor]]] | None = None

    @property
    def note(self) -> str:
        return "; ".join(dict.fromkeys(self._notes))

    def leave_out(self, far: Tensor) -> None:
        """Let some rows, bool ``[B]``, estimate no others, beside those that are far away."""
        for part in self._parts:
            part.far = part.far | far[part.rows]

    @property
    def order(self) -> Tensor:
        """A path through the batch, part by part, ``[B]``."""
        return torch.cat([part.rows.index_select(0, part.order) for part in self._parts])

    def source(self, received: Sequence[int]) -> Tensor:
        """Return the result that is each input's own, ``[B]``: a flat index ``[F, G]``, or -1."""
        return self._given(received)[0]

    def _given(self, received: Sequence[int]) -> tuple[Tensor, list[Regressor]]:
        """Return the source of each row, and a regressor for each part, of a received set."""
        key = tuple(received)
        if self._last is None or self._last[0] != key:  # asked again for every output
            with outside():
                source = torch.from_numpy(first_results(self._rows.numpy(), key, self.batch_size))
                regressors = [Regressor(part, self._length, source) for part in self._parts]
                self._last = key, (source, regressors)
        return self._last[1]

    def _flat(self, results: Tensor, received: Sequence[int]) -> Tensor:
        """Return results ``[F G, ...]``, or raise a ValueError if their shape is another."""
        if results.shape[:2] != (len(received), self.num_groups) or not len(received):
            raise ValueError(
                f"{type(getattr(self, 'code', self)).__name__}: results must have shape "
                f"{[len(received) or 1, self.num_groups]} and more, got {[*results.shape]}"
            )
        return results.flatten(0, 1)

    def decode(self, results: Tensor, received: Sequence[int], search: bool = True) -> Tensor:
        """Return the answers of the batch, ``[B, ...]``, from results ``[F, G, ...]``.

        Without a search, metric and length are those of the values whose errors were summed last.
        """
        rows = self._flat(results, received)
        (source, parts) = self._given(received)
        places = [source.clamp(min=0), *(part.missing for part in parts)]
        own, *missing = to_device(places, rows.device)
        answers = rows.index_select(0, own)
        self.choices = ()
        for part, at in zip(parts, missing, strict=True):
            if len(at):
                estimates, choice = part.estimate(rows, search)
                answers = answers.index_copy(0, at, estimates)
                if choice is not None:
                    self.choices += (choice,)
        return answers

    def error_bounds(
        self, answers: Tensor, surrogates: tuple[Tensor, ...] = ()
    ) -> ErrorBounds | None:
        """Return the error bounds of the answers ``[B, ...]`` that :meth:`decode` returned last.

        Surrogates ``[F G, ...]`` were subtracted from results, ``[B, ...]`` will be added.
        """
        parts = self._last[1][1] if self._last else ()
        with outside(), exactly():
            each = [part.bounds(answers, *surrogates) for part in parts if len(part.missing)]
            found = ErrorBounds(self.batch_size, each)
            far = [part.rows[part.far] for part in self._parts if part.far.numpy().any()]
            if far:  # these rows are unlike the results, none of which is far
                by = torch.zeros(self.batch_size, dtype=torch.float64)
                found = found.widened(by.index_fill_(0, torch.cat(far), math.inf))
            return found

    def left_out_squares(self, received: Sequence[int], *values: Tensor) -> list[float]:
        """Return the sums of squared errors of estimating values, ``[F G, C]``, from each other.

        The metric and length are the ones that estimate the first best.
        """
        with outside(), exactly():
            each = [part.left_out_squares(values) for part in self._given(received)[1]]
            return [sum(squares) for squares in zip(*each, strict=True)]

    def leave_one_out_variances(self) -> Tensor:
        """Return the variance of each input estimated from the inputs near it, ``[B]``."""
        variances = torch.ones(self.batch_size, dtype=torch.float64)
        with outside(), exactly():
            for part in (x for x in self._parts if x.measured):
                squared, step = part.by(part.first)
                variances.index_copy_(
                    0,
                    part.rows,
                    ops.path_variances(
                        squared, step * (self._length or LENGTH), part.order, _NEIGHBOURS, NUGGET
                    ),
                )
        return variances


def check_batch(
    owner: str, inputs: Sequence[Tensor], batch_size: int | None
) -> tuple[list[Tensor], int]:
    """Return the plain inputs and the size of the batch, or raise as :meth:`Regression.plan`."""
    if not isinstance(inputs, Sequence):
        raise TypeError(f"{owner}: inputs must be a sequence of tensors, got {shown(inputs)}")
    if not inputs and batch_size is None:
        raise ValueError(f"{owner}: batch_size must be given where there are no inputs, got None")
    size = None
    if batch_size is not None:
        size = count(owner, "batch_size", batch_size)
    for i, x in enumerate(inputs):
        dense(owner, f"inputs[{i}]", x)
        if size is None:
            size = x.shape[:1].numel()
        if not size or x.shape[:1] != (size,):
            raise ValueError(
                f"{owner}: batch_size must be that of inputs[{i}], of shape {[*x.shape]}, and at "
                f"least 1, got {size}"
            )
    return [plain(owner, f"inputs[{i}]", x) for i, x in enumerate(inputs)], size or 0


def check_link(owner: object, link: Any) -> None:
    """Raise an error unless ``link`` is None or "softmax"."""
    instance(owner, "link", link, str, optional=True)
    check(owner, link in (None, "softmax"), "link must be None or 'softmax'", link)


def to_scale(outputs: Tensor, link: str | None) -> Tensor:
    """Return outputs of the module as they are decoded: probabilities as their logarithms."""
    if link is None:
        return outputs
    # A probability that is 0 in floating point has no logarithm.
    return outputs.clamp(min=torch.finfo(outputs.dtype).tiny).log()


def _metrics(metric: Any) -> tuple[str | Features, ...]:
    """Return the metrics that compete, each once."""
    several = metric
    if isinstance(metric, GradientMetric):
        several = ("auto", *metric.competing)
    elif callable(metric):
        several = ("auto", metric)
    elif not isinstance(metric, (list, tuple)):
        several = (metric,)
    found: list[str | Features] = []
    for one in several:
        if not callable(one) and not (isinstance(one, str) and one in ("auto", *METRICS)):
            names = f"'auto', one of {', '.join(METRICS)}, a callable or a sequence of these"
            error = ValueError if isinstance(one, str) else TypeError
            raise error(f"Regression: metric must be {names}, got {shown(metric)}")
        found += METRICS if one == "auto" else [one]
    if not found:
        raise ValueError(f"Regression: metric must not be an empty sequence, got {shown(metric)}")
    return tuple(dict.fromkeys(found))
