r"""The code that looks at the batch: results are interpolated by the distances of their inputs."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._arguments import dense, instance, positive, shown
from ..input_space.distances import METRICS, Choice, Features, name_of
from ..input_space.points import Points, made_by
from ..input_space.selection import LENGTHS, Fitted
from ..linear.maps import unit_rows
from .base import Code, FixedCode
from .batch_plan import Arrived, BatchPlan, SelectionPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from ..input_space.gaussian_process import FittedRegression, KernelRegression
    from ..input_space.geometry import Geometry
    from ..input_space.ordering import Grouping
    from .base import Options

__all__ = ["KernelCode"]

# Errors grow more slowly than the variances that follow from distances: with their power 1.0 for a
# LeNet-5 on MNIST, 0.5 for a RepVGG and a vision transformer on Fashion-MNIST.
_GROWTH = 0.75
_TINY = 1e-300  # instead of 0, to divide by


class KernelCode(Code):
    r"""Coding by the distances between inputs: the recommended code.

    The paper lays a curve through the inputs in the order of their arrival and interpolates the
    results of each group along it. But the decoder may know every input that was sent, so results
    can be interpolated in *input space*, over all groups at once: the answers are the posterior
    means of a Gaussian process, given the results at the coded inputs,
    :class:`~coded_torch.input_space.gaussian_process.KernelRegression`. Inputs whose result arrived
    are answered
    by that result, bit for bit. Where the batch's own results are predicted badly from each other,
    predictions are shrunk towards the mean of the results:
    :meth:`~coded_torch.input_space.gaussian_process.FittedRegression.trust`.

    ``KernelCode(K, N)`` mixes nothing. The extra N - K workers of a group repeat the inputs that
    the others say least about, so a batch is answered exactly up to the inputs whose
    results were all lost. It is recommended as it is the most accurate in nearly every measurement,
    says which of its answers are exact, and carries inputs of any dtype.

    ``KernelCode(encoder=code)`` has the encoder of another code and decodes in input space: with
    the encoder E of a group and the inner products M of its inputs, those of its coded inputs are
    :math:`E M E^\top`. Workers whose row of E picks one input give that input's own result. So
    ``KernelCode(encoder=SplineCode(K, N))`` is the paper's encoder with the better decoder, and
    ``KernelCode(encoder=ReplicationCode(K, N))`` is replication that predicts what is lost.

    Args:
        num_data, num_workers: K and N, as for every :class:`~coded_torch.codes.Code`.
        encoder: the code whose encoder it has, and K and N; excludes these.
        metric: how far inputs are apart: a name in
        :data:`~coded_torch.input_space.distances.METRICS`;
            "auto", all of these; a sequence of names, "auto" and callables; or a callable, which is
            short for ("auto", callable). Where there are several, they compete, and for every
            output of the module the one that predicts the results which arrived best from each
            other, each left out in turn, answers it. A callable is given the floating-point inputs,
            ``[B, ...]`` each (those of other dtypes, where there are no floating-point ones), and
            returns the tensors that distances are measured on, likewise: typically the module's own
            first layer or embedding, pooled, at a few per cent of its cost. It runs where the batch
            is, without gradients, once a call, or once a chunk of a large batch, and only if an
            answer is lost. One that raises, or returns another batch size, is left out, and the
            plan's note says so.
        length: of the regression, positive, in median distances between neighbours on the path
            through the batch; a sequence of such, or "auto", which is 1, 2, 4 and 8 and then
            half a step, by the root of 2, to both sides: the best one is chosen likewise.

    Attributes:
        metrics, lengths: those that compete.

    Raises:
        TypeError: a count is not an integer, ``encoder`` is no
            :class:`~coded_torch.codes.FixedCode`, or another argument is of another kind.
        ValueError: an argument violates its requirement.

    Note:
        Planning a batch of B and decoding M distinct results cost :math:`O(B^3 + M^3)` on the host;
        batches of more than 4,096 distinct results are planned in chunks. Distances, and what
        follows from them, are in float32, which predicts as well as float64; in float64 where an
        input is, if there are 512 points at most. What is encoded and decoded are whole batches,
        through :meth:`fit`: there is no encoder without a batch to look at. Without distances, as
        for token ids, copies are equal and lost answers are the mean, unless a callable in
        ``metric`` makes features of them.

        The metric is chosen on 144 results at most, at length 2, and then the length on the same
        ones. Another metric than "shrunk", and another length than 2, is taken where results are
        predicted better from each other by more than two standard errors of the gain, so few
        results seldom mislead. The choice is a function of the batch and its results: the same ones
        give the same bits. (A wrapper on real machines lets compete what won lately, in 15 of 16
        calls that predict.) Copies are planned before there are results: by the metric that is
        given, if it is one, and else by "shrunk". Of mixtures, features that are not linear are
        those of the coded inputs.

        Gradients take as constant what the code has chosen by looking at inputs and results: order,
        distances, copies, weights and trust. Those of answers that are an input's own result are
        exact. Those of lost answers are not the derivatives of these answers in the inputs, which
        move the distances too; in the module's parameters they are, but for the trust.

        Inputs more than 8 times as far from the centre as is usual in the batch, and what is mixed
        with so much of one, predict nothing; without a result of their own they are answered by
        what the batch has in the mean.

    Example:
        >>> import torch
        >>> from coded_torch.codes import KernelCode
        >>> from coded_torch.nn import CodedWrapper
        >>> from coded_torch.stragglers import Uniform
        >>> x = torch.linspace(0, 3, 64, dtype=torch.float64)[:, None]
        >>> coded = CodedWrapper(torch.nn.Tanh(), KernelCode(8, 12), stragglers=Uniform(4, seed=0))
        >>> bool((coded(x) - x.tanh()).abs().max() < 0.1)
        True
    """

    uses_geometry = True

    def __init__(
        self,
        num_data: int | None = None,
        num_workers: int | None = None,
        *,
        encoder: FixedCode | None = None,
        metric: str | Features | Sequence[str | Features] = "auto",
        length: float | str | Sequence[float] = "auto",
        **options: Unpack[Options],
    ) -> None:
        instance(self, "encoder", encoder, FixedCode, optional=True)
        if encoder is not None:
            if num_data is not None or num_workers is not None:
                raise ValueError(
                    "KernelCode: encoder must be given without num_data and num_workers, which it "
                    f"has, got {shown(num_data)} and {shown(num_workers)}"
                )
            num_data, num_workers = encoder.num_data, encoder.num_workers
        super().__init__(num_data, num_workers, **options)  # type: ignore[arg-type]  # which refuses None
        self.encoder = encoder
        self.metric, self.metrics = metric, _metrics(metric)
        self.lengths = _lengths(length)
        single = isinstance(length, numbers.Real)
        self.length = self.lengths[0] if single else length
        self.mixes = encoder is not None and encoder.mixes
        self.max_chunk = type(self).max_chunk
        if self.mixes:  # results of mixtures are all distinct, N / K times as many
            self.max_chunk = max(1, self.max_chunk // self.num_workers) * self.num_data

    def measured(self, others: Sequence[Tensor]) -> tuple[Code, list[Tensor], str]:
        """What the first callable makes of the inputs, on which the named metrics compete."""
        names = [metric for metric in self.metrics if isinstance(metric, str)]
        notes = []
        for features in self.metrics:
            if not isinstance(features, str):
                made, note = made_by(features, others)
                if made is not None:
                    return self.replace(metric=names or "auto"), made, ""
                notes.append(note)
        return self, [], "; ".join(notes)

    def narrowed(self, choices: Sequence[Choice]) -> KernelCode:
        """The same code, where only what was chosen competes.

        Args:
            choices: that the code has made.
        """
        won, lengths = {choice.metric for choice in choices}, {choice.length for choice in choices}
        return self.replace(
            metric=[x for x in self.metrics if name_of(x) in won] or self.metrics,
            length=(len(self.lengths) > 1 and sorted(lengths)) or self.lengths,
        )

    def candidates(self) -> dict[str, Sequence[Any]]:
        return {
            "metric": (*METRICS, *((x,) for x in self.metrics if not isinstance(x, str))),
            "length": (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
        }

    def fit(
        self, grouping: Grouping, geometry: Geometry | None = None, num_stragglers: int = 0
    ) -> BatchPlan:
        """Code the inputs, or copy those that need it most, and measure what workers compute."""
        if geometry is None and self.mixes:
            raise ValueError("KernelCode: geometry must be given to fit mixtures, got None")
        batch = self._batch(grouping, geometry)
        if self.encoder is not None:
            own = unit_rows(self.encoder.encoder.matrix())
            point = grouping.rows[own]  # [N, G]; what stands at -1 is replaced below
            if batch is not None and self.mixes:
                mixed = (own < 0).nonzero().flatten()
                point[mixed] = batch.add_mixtures(self.encoder.encoder, mixed, grouping.rows.T)
            return self._plan(point, grouping, batch)
        errors = np.ones(grouping.batch_size)
        if batch is not None and num_stragglers:  # else copies are equal, whatever the errors
            errors = batch.leave_one_out_variances().numpy() ** _GROWTH
        copies = _copies(grouping, self.num_workers, num_stragglers, errors)  # [G, K]
        points = np.stack([np.repeat(np.arange(len(c)), c) for c in copies])  # [G, N]
        # Dealt anew for each group, or a lost worker would be the same copy's in all of them.
        point = grouping.rows.gather(0, torch.from_numpy(_dealt(points)).T)
        return self._plan(point, grouping, batch)

    def fit_rows(self, grouping: Grouping, geometry: Geometry | None = None) -> BatchPlan:
        batch = self._batch(grouping, geometry)
        return self._plan(torch.arange(grouping.batch_size)[:, None], grouping, batch)

    def _batch(self, grouping: Grouping, geometry: Geometry | None) -> Points | None:
        if geometry is None:
            return None
        return Points(self.metrics, self.lengths, grouping, geometry)

    def _plan(self, point: Tensor, grouping: Grouping, batch: Points | None) -> BatchPlan:
        if batch is None:
            return SelectionPlan(self, point, grouping.batch_size)
        return _KernelPlan(self, point, grouping, batch)


class _KernelPlan(SelectionPlan):
    """Answers lost inputs by regression on the distinct results of all groups.

    Workers compute ``point [N, G]`` of the :class:`Points`.
    """

    code: KernelCode

    def __init__(self, code: KernelCode, point: Tensor, grouping: Grouping, batch: Points) -> None:
        super().__init__(code, point, grouping.batch_size, batch.usable)
        self._grouping, self._batch = grouping, batch
        self._fits: tuple[_Fit, ...] = ()

    def encode(self, values: Tensor, *, out: Tensor | None = None) -> Tensor:
        if not self.code.mixes:
            return super().encode(values, out=out)
        assert self.code.encoder is not None
        self.code.check_values(values)
        return self.code.encoder.encoder.gathered(values, self._grouping, out=out)

    def _weights(self, arrived: Arrived, results: Tensor) -> Tensor:
        regression, trust = self._chosen(arrived, results)
        # Shrunk towards the mean of the results as far as these are not predicted by each other.
        mean = torch.tensor((1 - trust) / len(arrived.used))
        return torch.add(mean, regression.weights_at(arrived.lost), alpha=trust)

    def _predicted(self, arrived: Arrived, results: Tensor) -> Tensor | None:
        num_columns = results.shape[2:].numel()
        if results.device.type != "cpu" or not 0 < num_columns < len(arrived.lost):
            return None
        regression, trust = self._chosen(arrived, results)
        y = results.flatten(0, 1).index_select(0, arrived.used).view(-1, num_columns).double()
        mean = y.mean(0)
        sizes = y.sub_(mean).abs().amax(0).clamp_(min=_TINY)  # float32 has not float64's range
        predicted = regression.predictions_at(arrived.lost, y.div_(sizes))
        predicted = torch.addcmul(mean, predicted, sizes, value=trust).to(results.dtype)
        return predicted.view(len(predicted), *results.shape[2:])

    def _chosen(self, arrived: Arrived, results: Tensor) -> tuple[FittedRegression, float]:
        dense(self.code, "results", results)
        fitted = self._fit(arrived, arrived.sample(results)).fitted
        self.choices = (fitted.choice,)
        return fitted.regression, fitted.choice.trust

    def _left_out_square(self, arrived: Arrived, sample: Tensor) -> float:
        fit = self._fit(arrived, sample)
        assert fit.sample is not None
        return float(fit.fitted.regression.leave_one_out_residuals(fit.sample).square().sum())

    def _variances(self, arrived: Arrived, results: Tensor | None) -> Tensor | float:
        sample = None if results is None else arrived.sample(results)
        fit = self._fit(arrived, sample)
        regression = fit.fitted.regression
        if fit.fitted.choice.trust == 0:
            return super()._variances(arrived, results)
        scale = 1.0 if fit.sample is None else regression.output_variance(fit.sample)
        return regression.variances_at(arrived.lost) * scale

    def _regression_of(self, arrived: Arrived) -> tuple[KernelRegression, Tensor]:
        # Before results are known to be true, they must not choose by what they are judged.
        return self._batch.unchosen(arrived.points)

    def _fit(self, arrived: Arrived, sample: Tensor | None) -> _Fit:
        # Two are kept, of results and of what surrogates leave of them, for the errors to expect of
        # an output beside its answers; not a history.
        for fit in self._fits:
            if fit.arrived is arrived and _same(fit.sample, sample):
                return fit
        fit = _Fit(arrived, sample, self._batch.fit(arrived.points, sample))
        self._fits = (*self._fits[-1:], fit)
        self.note = "; ".join(self._batch.notes)
        return fit


class _Fit(NamedTuple):
    """The regression from what arrived, and the sample of the results, if any, that chose it."""

    arrived: Arrived
    sample: Tensor | None
    fitted: Fitted


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _metrics(metric: Any) -> tuple[str | Features, ...]:
    """Those that compete, each once."""
    if callable(metric):
        metric = ("auto", metric)
    elif isinstance(metric, str):
        metric = (metric,)
    elif not isinstance(metric, Sequence):
        raise TypeError(
            f"KernelCode: metric must be a name, a callable or a sequence of these, "
            f"got {shown(metric)}"
        )
    found: list[str | Features] = []
    for one in metric:
        if not (callable(one) or isinstance(one, str)):
            raise TypeError(f"KernelCode: metric must hold names and callables, got {shown(one)}")
        if isinstance(one, str) and one not in ("auto", *METRICS):
            raise ValueError(
                f"KernelCode: metric must be 'auto' or one of {', '.join(METRICS)}, "
                f"got {shown(one)}"
            )
        found += METRICS if one == "auto" else [one]
    if not found:
        raise ValueError("KernelCode: metric must hold at least one, got none")
    return tuple(dict.fromkeys(found))


def _lengths(length: Any) -> tuple[float, ...]:
    """Those that compete, each once."""
    if isinstance(length, str):
        if length != "auto":
            raise ValueError(f"KernelCode: length must be positive or 'auto', got {length!r}")
        return LENGTHS
    several = length if isinstance(length, Sequence) else (length,)
    if not several:
        raise ValueError("KernelCode: length must hold at least one, got none")
    return tuple(dict.fromkeys(positive("KernelCode", "length", one) for one in several))


def _copies(
    grouping: Grouping, num_workers: int, num_stragglers: int, errors: NDArray[np.float64]
) -> NDArray[np.int64]:
    """How many workers each input of each group gets, ``[G, K]``.

    Greedy, one at a time, where it lowers the expected squared error most: the probability that
    all copies are lost times ``errors [B]``, what is to be expected then. It is convex in the
    copies, so greedy is best.
    """
    # lost[c] is the probability that all of c workers are among the S lost ones of N.
    lost = np.ones(num_workers + 2)
    for i in range(num_workers):
        lost[i + 1] = lost[i] * max(num_stragglers - i, 0) / (num_workers - i)
    gain = lost[:-1] - lost[1:]
    of_group = errors[grouping.rows.T.numpy()]  # [G, K]
    real = (grouping.targets.T >= 0).numpy()  # not what fills up the last group
    copies = real.astype(np.int64)
    groups = np.arange(len(copies))
    while (active := copies.sum(axis=1) < num_workers).any():
        # Between equals, the one with fewer copies.
        score = np.where(real, gain[copies] * of_group - 1e-12 * copies, -np.inf)
        copies[groups, score.argmax(axis=1)] += active
    return copies


def _dealt(points: NDArray[Any]) -> NDArray[Any]:
    """``[G, N]``, each group's points dealt to other workers, so that a late one is late elsewhere.

    Points side by side, such as copies of one input, go to workers some steps apart, another number
    of steps in the next group: so that a worker shares inputs with many others, which shows liars,
    and two that are late together lose few inputs. Neighbouring workers get no neighbouring points.
    """
    groups, n = points.shape
    steps = [
        step
        for step in range(1, n // 2 + 1)
        if math.gcd(step, n) == 1 and all(n / 8 <= x <= n - n / 8 for x in (step, pow(step, -1, n)))
    ] or [1]
    golden = (math.sqrt(5) - 1) / 2
    group = np.arange(groups)
    step = np.array(steps)[group % len(steps)]
    shift = np.floor(group * golden % 1 * n).astype(np.int64)
    dealt = np.empty_like(points)
    workers = (step[:, None] * np.arange(n) + shift[:, None]) % n
    np.put_along_axis(dealt, workers, points, axis=1)
    return dealt
