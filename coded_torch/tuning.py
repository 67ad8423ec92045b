r"""Choosing the numbers of a code by its error on unlabelled data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._trial import watched
from .codes.kernel import KernelCode, path_step
from .nn import CodedWrapper
from .regression import KernelRegression

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
) -> KernelCode:
    r"""Choose shrinkage and length of a :class:`~coded_torch.codes.KernelCode`.

    They are those by which the module's outputs are predicted best from each other, each left out
    in turn. No labels are needed.

    Args:
        wrapper: a wrapped module with a ``KernelCode``. It is not changed: assign the new code to
            ``wrapper.code``.
        batches: batches like those that will be answered, also in size, as inputs of a batch are
            nearer to each other the more there are. Each is what the wrapper is called with: an
            input, or a tuple of positional arguments. A few are enough.
        shrinkages, lengths: what to choose from, at least one of each; of equals, the first.

    Returns:
        The code with the best numbers, of the same type as the wrapper's.

    Raises:
        TypeError: the code of the wrapper is not a ``KernelCode``.
        ValueError: there are no batches, or there is nothing to choose from.

    Note:
        The module runs once on every batch for each shrinkage, without gradients. Neither the
        wrapper's hooks nor its ``on_run`` hear of it.

    Example:
        >>> import torch
        >>> from coded_torch.codes import KernelCode
        >>> from coded_torch.nn import CodedWrapper
        >>> from coded_torch.stragglers import Uniform
        >>> from coded_torch.tuning import tune
        >>> x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
        >>> coded = CodedWrapper(torch.nn.Tanh(), KernelCode(10, 15), stragglers=Uniform(4, seed=0))
        >>> coded.code = tune(coded, [x], lengths=[0.1, 2.0])
        >>> coded.code.length, coded.code.num_workers
        (2.0, 15)
    """
    code = wrapper.code
    if not isinstance(code, KernelCode):
        raise TypeError(f"tune: the code of wrapper must be of type KernelCode, got {code}")
    calls = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    for argument, options in (
        ("batches", calls),
        ("shrinkages", shrinkages),
        ("lengths", lengths),
    ):
        if not len(options):
            raise ValueError(f"tune: {argument} must hold at least one, got none")
    for shrinkage, length in itertools.product(shrinkages, lengths):
        code.replace(shrinkage=shrinkage, length=length)  # or it raises

    errors: dict[tuple[float, float], float] = {}
    with torch.no_grad():
        for shrinkage in shrinkages:
            see = _LeaveOneOut(lengths)
            module = watched(wrapper, see, shrinkage=shrinkage)
            for args in calls:
                module(*args)
            errors |= {(shrinkage, n): e for n, e in zip(lengths, see.errors, strict=True)}
    shrinkage, length = min(errors, key=errors.__getitem__)
    return code.replace(shrinkage=shrinkage, length=length)


class _LeaveOneOut:
    """The errors of predicting each answer from the others.

    Attributes:
        errors: the sum of squares over all outputs so far, for each of ``lengths``.
    """

    def __init__(self, lengths: Sequence[float]) -> None:
        self.lengths = lengths
        self.errors = [0.0] * len(lengths)

    def __call__(self, results: Tensor, grouping: Grouping, geometry: Geometry | None) -> None:
        assert geometry is not None
        told = geometry.typical
        answers = grouping.scatter(results)
        outputs = answers.reshape(len(answers), answers[0].numel()).to("cpu", torch.float64)[told]
        squared = geometry.squared_distances()
        step = path_step(squared, grouping.order)
        for i, length in enumerate(self.lengths):
            fit = KernelRegression(squared[told][:, told], length * step)
            self.errors[i] += float(fit.leave_one_out_residuals(outputs).square().sum())
