r"""What a code makes of one batch: coded inputs, answers, and what to expect of them."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._transforms import differentiated, outside, plain
from ..linear import SelectMap
from ..linear.base import target

if TYPE_CHECKING:
    from ..input_space import distances
    from ..input_space.gaussian_process import KernelRegression
    from ..input_space.ordering import Grouping
    from .base import Code, FixedCode

__all__ = ["Arrived", "BatchPlan", "GroupwisePlan", "SelectionPlan", "Sites"]
__all__ += ["few_columns", "of_mean"]

_COLUMNS = 64
_ROWS = 4096  # of results, to judge predictions by


class Sites(NamedTuple):
    """Where results lie in input space.

    Attributes:
        point: ``[F, G]``, what each result is of: equal numbers are copies; -1: of another part of
            the batch.
        at: ``[F, G]``, its place among the M distinct inputs of the regression; -1: it has none.
        regression: of these inputs, and maybe others; None where there are no distances.
    """

    point: Tensor
    at: Tensor
    regression: KernelRegression | None


class BatchPlan(abc.ABC):
    """A code fitted to one batch: how its inputs are mixed, and its answers found.

    Attributes:
        code: the code.
        batch_size: B
        num_groups: G
        order: ``[B]``, the order in which the batch was cut into groups, where a code plans all
            groups alike; else None.
        note: what the caller should know of the plan, one line; mostly empty.
        choices: how lost answers of the output decoded last were predicted, where the code has a
            choice; of every chunk of a large batch.
    """

    code: Code
    batch_size: int
    num_groups: int
    order: Tensor | None = None
    note: str = ""
    choices: tuple[distances.Choice, ...] = ()

    @abc.abstractmethod
    def encode(self, values: Tensor, *, out: Tensor | None = None) -> Tensor:
        """From the batch ``[B, ...]`` to every worker's coded inputs, ``[N, G, ...]``.

        Args:
            values: the batch, or what else has a row for each input.
            out: where they are written, as for :meth:`coded_torch.linear.LinearMap.__call__`:
                without gradients only.
        """

    @abc.abstractmethod
    def decode(
        self, results: Tensor, received: Sequence[int], *, out: Tensor | None = None
    ) -> Tensor:
        """From results ``[|F|, G, ...]`` to the answers of the batch, ``[B, ...]``.

        Args:
            results: in the order of ``received``.
            received: the workers whose results these are, strictly increasing, at least
                :attr:`~coded_torch.codes.Code.min_received`.
            out: where the answers are written, as for :meth:`encode`.
        """

    def exact(self, received: Sequence[int]) -> Tensor:
        """Which answers are a result of that very input, bit for bit: bool, ``[B]``, on the host.

        Args:
            received: as in :meth:`decode`, or fewer: then none is.
        """
        return self.source(received) >= 0

    def source(self, received: Sequence[int]) -> Tensor:
        """The result that is each input's own: ``[B]``, flat indices ``[|F|, G]``, -1: none is.

        Args:
            received: as in :meth:`exact`.
        """
        return torch.full((self.batch_size,), -1)

    def used(self, received: Sequence[int]) -> Tensor:
        """The distinct results that others are predicted from: flat indices ``[|F|, G]``."""
        return torch.arange(len(received) * self.num_groups)

    def left_out_square(self, results: Tensor, received: Sequence[int]) -> float:
        """The sum of squared held-out errors.

        All results or some, each predicted from the others as a lost answer would be; unless
        overridden, by their mean.
        For comparing results under one plan: outputs, and what is left of them beside an
        approximation.

        Args:
            results, received: as in :meth:`decode`.
        """
        with outside():
            return of_mean_square(few_columns(results))

    def expected_errors(
        self, received: Sequence[int], results: Tensor | None = None
    ) -> Tensor | None:
        """The root mean squared error to expect of each answer; 0 for those that are exact.

        Args:
            received: as in :meth:`decode`; it may be tried out before any result is there.
            results: as in :meth:`decode`; without, errors are in units of the outputs' standard
                deviation (of an output vector's, root of the sum of the variances); with, they are
                comparable to :func:`coded_torch.evaluation.scores.rmse`.

        Returns:
            ``[B]``, float64, on the host; None where the code cannot say.
        """
        return None

    def expected_rmse(self, received: Sequence[int], results: Tensor | None = None) -> float | None:
        """The root mean square of :meth:`expected_errors` over the batch, or None."""
        errors = self.expected_errors(received, results)
        return None if errors is None else math.sqrt(float(errors.square().mean()))

    def sites(self, received: Sequence[int]) -> list[Sites]:
        """Where the results of these units lie, for each part of the batch with distances of its
        own; none where the plan does not know.
        """
        return []


class GroupwisePlan(BatchPlan):
    """The plan of a fixed code: every group for itself, all alike."""

    def __init__(self, code: FixedCode, grouping: Grouping) -> None:
        self.code: FixedCode = code
        self.batch_size, self.num_groups = grouping.batch_size, grouping.num_groups
        self.order = grouping.order
        self._grouping = grouping

    def encode(self, values: Tensor, *, out: Tensor | None = None) -> Tensor:
        self.code.check_values(values)
        return self.code.encoder.gathered(values, self._grouping, out=out)

    def decode(
        self, results: Tensor, received: Sequence[int], *, out: Tensor | None = None
    ) -> Tensor:
        return self.code.decoder(received).scattered(results, self._grouping, out=out)

    def source(self, received: Sequence[int]) -> Tensor:
        with outside():
            of_group = self.code.source(received)[:, None]  # [K, 1]
            if not bool((of_group >= 0).any()):
                return super().source(received)
            flat = of_group * self.num_groups + torch.arange(self.num_groups)
            return self._grouping.scatter(torch.where(of_group >= 0, flat, -1))

    def left_out_square(self, results: Tensor, received: Sequence[int]) -> float:
        with outside():
            groups = plain("decode", "results", results)
            groups = groups[:, :: max(1, self.num_groups * len(received) // _ROWS)]
            sample = few_columns(groups).view(len(received), -1)  # [|F|, G C]
            return float((self.code.left_out(received) @ sample).square().sum())


class Arrived:
    """What arrived: which result answers which input, and which ones to predict the others from.

    Args:
        point: ``[N, G]``, the point that each worker computes for each group: an input of the
            batch, ``0 .. batch_size - 1``, or a mixture.
        received: the workers whose results arrived, increasing.
        batch_size: B
        usable: ``[P]``, bool: from the results of which points others may be predicted; all by
            default, and where none of those that arrived is usable.

    Attributes:
        source: ``[B]``, the flat index ``[|F|, G]`` of the result that is an input's own, or -1.
        answered: ``[B]``, bool.
        lost: ``[L]``, the inputs without one.
        used: ``[M]``, flat indices ``[|F|, G]`` of the distinct results to predict the others from.
        points: ``[M]``, the points that these are results of.
    """

    def __init__(
        self,
        point: Tensor,
        received: Sequence[int],
        batch_size: int,
        usable: Tensor | None = None,
    ) -> None:
        arrived = point[torch.tensor(received, dtype=torch.int64)].flatten()  # [F G]
        index = torch.arange(len(arrived))
        # The first result of each input, whichever worker repeats it.
        own = arrived < batch_size
        first = torch.full((batch_size,), len(arrived), dtype=torch.int64)
        first.scatter_reduce_(0, arrived[own], index[own], "amin")
        self.answered = first < len(arrived)
        self.source = torch.where(self.answered, first, -1)
        self.lost = (~self.answered).nonzero().flatten()
        self.used = torch.cat([first[self.answered], index[~own]])
        if usable is not None and bool((good := usable[arrived[self.used]]).any()):
            self.used = self.used[good]
        self.points = arrived[self.used]

    def sample(self, results: Tensor) -> Tensor:
        """Some columns of the distinct results, ``[M, C]``, see :func:`few_columns`."""
        return few_columns(results)[self.used]


class SelectionPlan(BatchPlan):
    """Workers compute inputs as they are; lost answers are the mean of those that arrived.

    Subclasses predict lost answers in a better way: they override ``_weights``, ``_predicted``,
    ``_variances`` and ``_left_out_square``.

    Args:
        code: the code.
        point: ``[N, G]``, the row of the batch that each worker computes for each group; in
            subclasses maybe a mixture, see :class:`Arrived`.
        batch_size: B
        usable: as in :class:`Arrived`.
    """

    def __init__(
        self, code: Code, point: Tensor, batch_size: int, usable: Tensor | None = None
    ) -> None:
        self.code = code
        self.batch_size, self.num_groups = batch_size, point.shape[1]
        self._point, self._usable = point, usable
        self._last: tuple[tuple[int, ...], Arrived] | None = None

    def encode(self, values: Tensor, *, out: Tensor | None = None) -> Tensor:
        if values.shape[:1] != (self.batch_size,):
            raise ValueError(
                f"{type(self.code).__name__}: values must have size {self.batch_size} along dim 0, "
                f"got shape {tuple(values.shape)}"
            )
        rows = self._point.to(values.device)
        shape = (*rows.shape, *values.shape[1:])
        if out is None:
            return values.index_select(0, rows.flatten()).view(shape)
        place = target(self.code, out, shape, (rows.numel(), *values.shape[1:]), values)
        if place is None:
            return out.copy_(self.encode(values))
        torch.index_select(values, 0, rows.flatten(), out=place)
        return out

    def decode(
        self, results: Tensor, received: Sequence[int], *, out: Tensor | None = None
    ) -> Tensor:
        rows, derived = results.flatten(0, 1), differentiated(results)
        with outside():
            arrived = self._arrived(received)
            source, used, lost = arrived.source, arrived.used, arrived.lost
            weights = torch.zeros(0, len(used), dtype=torch.float64)
            if len(lost):
                predicted = None if derived else self._predicted(arrived, results)
                if predicted is None:
                    weights = self._weights(arrived, results)
                else:  # as if they were results, too
                    source = source.index_copy(0, lost, torch.arange(len(lost)) + len(rows))
                    rows, used, weights = torch.cat([rows, predicted]), used[:0], weights[:, :0]
            map = SelectMap(len(rows), source, used, weights)
        return map(rows, out=out)

    def source(self, received: Sequence[int]) -> Tensor:
        with outside():
            return self._arrived(received).source

    def used(self, received: Sequence[int]) -> Tensor:
        with outside():
            return self._arrived(received).used

    def left_out_square(self, results: Tensor, received: Sequence[int]) -> float:
        with outside():
            arrived = self._arrived(received)
            return self._left_out_square(arrived, arrived.sample(results))

    def expected_errors(
        self, received: Sequence[int], results: Tensor | None = None
    ) -> Tensor | None:
        with outside():
            arrived = self._arrived(received)
            if not len(arrived.used):
                return None
            variances = torch.zeros(self.batch_size, dtype=torch.float64)
            if len(arrived.lost):
                variances[arrived.lost] = self._variances(arrived, results)
                variances *= 1 if results is None else results.shape[2:].numel()
            return variances.sqrt_()

    def sites(self, received: Sequence[int]) -> list[Sites]:
        with outside():
            arrived = self._arrived(received)
            point = self._point[torch.tensor(received, dtype=torch.int64)]  # [F, G]
            place = torch.full((1 + int(point.max()),), -1)
            regression, places = self._regression_of(arrived)
            place[arrived.points] = places
            return [Sites(point, place[point], regression)]

    def _regression_of(self, arrived: Arrived) -> tuple[KernelRegression | None, Tensor]:
        """That of what arrived, where there are distances, and the places of it in that."""
        return None, torch.arange(len(arrived.points))

    def _arrived(self, received: Sequence[int]) -> Arrived:
        # Kept for outputs of several leaves, and the errors to expect of them; not a history.
        key = tuple(received)
        last = self._last
        if last is None or last[0] != key:
            last = key, Arrived(self._point, key, self.batch_size, self._usable)
            self._last = last
        return last[1]

    def _weights(self, arrived: Arrived, results: Tensor) -> Tensor:
        """Those of the used results in the lost answers, ``[L, M]``, or ``[1, M]`` for all."""
        return torch.full((1, len(arrived.used)), 1 / len(arrived.used), dtype=torch.float64)

    def _predicted(self, arrived: Arrived, results: Tensor) -> Tensor | None:
        """The lost answers, ``[L, ...]``, without derivatives; None: better by their weights."""
        return None

    def _left_out_square(self, arrived: Arrived, sample: Tensor) -> float:
        """What is missed if each of the used results is predicted from the others."""
        return of_mean_square(sample)

    def _variances(self, arrived: Arrived, results: Tensor | None) -> Tensor | float:
        """Of the lost answers, ``[L]``, about what is expected; in units as expected errors are."""
        sample = None if results is None else arrived.sample(results)
        return of_mean(len(arrived.used), sample)


def few_columns(results: Tensor) -> Tensor:
    """Some columns of results ``[F, G, ...]``: ``[F G, C]``, float64 on the host.

    Evenly spaced: the outputs' variance and trust are as exact from some 64 outputs as from all,
    and cheaper.
    """
    rows = results.shape[0] * results.shape[1]
    columns = plain("decode", "results", results).reshape(rows, results.shape[2:].numel())
    return columns[:, :: max(1, columns.shape[1] // _COLUMNS)].to("cpu", torch.float64)


def of_mean_square(sample: Tensor) -> float:
    """The sum of squares of what is missed if each result is predicted as the others' mean."""
    if len(sample) < 2:
        return 0.0
    return float(sample.var(0).sum()) * len(sample) ** 2 / (len(sample) - 1)


def of_mean(count: int, sample: Tensor | None) -> float:
    """The variance of an answer about the mean of ``count`` others: 1 + 1/count of the outputs'.

    That of the outputs is 1 without a ``sample [M, C]``, and unknown, 0, of a single one.
    """
    variance = 1.0
    if sample is not None:
        variance = float(sample.var(0).mean()) if len(sample) > 1 else 0.0
    return variance * (1 + 1 / count)
