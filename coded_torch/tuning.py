r"""Choosing the numbers of a code by its error on unlabelled data."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .codes.base import BatchPlan, Code
from .codes.kernel import KernelCode, path_step
from .decoders.kernel import KernelRegression
from .nn import CodedWrapper
from .workers import LocalWorkers

if TYPE_CHECKING:
    from .geometry import Geometry
    from .grouping import Grouping

__all__ = ["tune"]


def tune(
    wrapper: CodedWrapper,
    batches: Iterable[Any],
    *,
    shrinkages: Sequence[float] = (0.0, 0.00125, 0.004, 0.0125, 0.04, math.inf),
    lengths: Sequence[float] = (1.5, 2.0, 3.0),
    placements: Sequence[float] = (0.0, 0.02, 0.05, 0.1, 0.5, 1.0),
) -> KernelCode:
    r"""Choose shrinkage, length and placement of a :class:`~coded_torch.codes.KernelCode`.

    Shrinkage and length are those by which the module's outputs are predicted best from each other,
    each left out in turn. The placement is the one at which the wrapper's answers, under its own
    straggler law, are closest to the module's. No labels are needed.

    It is worth its module calls where many are lost of many workers, N at least 2 K: there mixing
    inputs a little, a placement of 0.02 to 0.1, has had a seventh to a fifth less squared error for
    LeNet-5 on MNIST, but 5 to 50 % more for a RepVGG on Fashion-MNIST. The error that a plan
    expects cannot choose: it knows distances, not how the module takes to mixtures, and would have
    mixed for both. Otherwise the default placement, 0, was within 5 % of the best.

    Args:
        wrapper: a wrapped module with a ``KernelCode``. It is not changed: assign the new code to
            ``wrapper.code``.
        batches: batches like those that will be answered, also in size, as inputs of a batch are
            nearer to each other the more there are. Each is what the wrapper is called with: an
            input, or a tuple of positional arguments. A few are enough.
        shrinkages, lengths, placements: what to choose from, at least one of each; of equals, the
            first.

    Returns:
        The code with the best numbers.

    Raises:
        TypeError: the code of the wrapper is not a ``KernelCode``.
        ValueError: there are no batches.

    Note:
        The module runs once on every batch for each shrinkage, and on N / K times as many inputs
        for each placement, without gradients. Simulated stragglers draw from the wrapper's law.

    Example:
        >>> import torch
        >>> from coded_torch.codes import KernelCode
        >>> from coded_torch.nn import CodedWrapper
        >>> from coded_torch.stragglers import Uniform
        >>> from coded_torch.tuning import tune
        >>> x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
        >>> coded = CodedWrapper(torch.nn.Tanh(), KernelCode(10, 15), stragglers=Uniform(4, seed=0))
        >>> coded.code = tune(coded, [x], placements=[0.0, 1.0])
        >>> coded.code.placement, coded.code.num_workers
        (0.0, 15)
    """
    code = wrapper.code
    if not isinstance(code, KernelCode):
        raise TypeError(f"tune: the code of wrapper must be of type KernelCode, got {code}")
    calls = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not calls:
        raise ValueError("tune: batches must hold at least one batch, got none")

    def with_code(other: Code, **settings: Any) -> CodedWrapper:
        trial = copy.copy(wrapper)
        trial.__dict__.update(code=other, **settings)
        return trial

    def numbers(shrinkage: float, length: float, placement: float) -> KernelCode:
        return KernelCode(
            code.num_data,
            code.num_workers,
            placement=placement,
            exponent=code.exponent,
            shrinkage=shrinkage,
            length=length,
        )

    local = {"workers": LocalWorkers(), "num_stragglers": 0, "deadline": None}
    with torch.no_grad():
        errors: dict[tuple[float, float], float] = {}
        for shrinkage in shrinkages:
            predictor = _Predictor(code.num_data, shrinkage, lengths)
            exact = [with_code(predictor, **local)(*args) for args in calls]
            errors |= {(shrinkage, n): e for n, e in zip(lengths, predictor.errors, strict=True)}
        best = min(errors, key=errors.__getitem__)
        measured: dict[float, float] = {}
        for placement in placements:
            trial = with_code(numbers(*best, placement))
            measured[placement] = sum(
                _squared_error(trial(*args), want) for args, want in zip(calls, exact, strict=True)
            )
    return numbers(*best, min(measured, key=measured.__getitem__))


def _squared_error(answers: Any, exact: Any) -> float:
    pairs = zip(pytree.tree_leaves(answers), pytree.tree_leaves(exact), strict=True)
    return sum(
        float((got - want).double().square().sum())
        for got, want in pairs
        if isinstance(want, Tensor) and want.is_floating_point()
    )


class _Predictor(Code):
    """A worker for every input as it is, and the errors of predicting each answer from the others.

    Attributes:
        errors: the sum of squares over all batches so far, for each of ``lengths``.
    """

    uses_geometry = True

    def __init__(self, num_data: int, shrinkage: float, lengths: Sequence[float]) -> None:
        super().__init__(num_data, num_data)
        self.shrinkage = shrinkage
        self.lengths = lengths
        self.errors = [0.0] * len(lengths)

    @property
    def min_received(self) -> int:
        return self.num_workers

    def fit(
        self, grouping: Grouping, geometry: Geometry | None = None, num_stragglers: int = 0
    ) -> BatchPlan:
        assert geometry is not None
        return _Prediction(self, grouping, geometry)


class _Prediction(BatchPlan):
    def __init__(self, code: _Predictor, grouping: Grouping, geometry: Geometry) -> None:
        self.code: _Predictor = code
        self.num_groups = grouping.num_groups
        self._grouping = grouping
        self._squared = geometry.squared_distances()

    def encode(self, values: Tensor) -> Tensor:
        return self._grouping.gather(values)

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        answers = self._grouping.scatter(results)
        outputs = answers.reshape(len(answers), -1).to("cpu", torch.float64)
        step = path_step(self._squared, self._grouping.order)
        for i, length in enumerate(self.code.lengths):
            fit = KernelRegression(self._squared, length * step)
            self.code.errors[i] += float(fit.leave_one_out_residuals(outputs).square().sum())
        return answers
