r"""What a code can learn from unlabelled data, before it is used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .codes.base import BatchPlan, Code, FixedCode
from .codes.calibrated import CalibratedCode
from .nn import CodedWrapper
from .workers import LocalWorkers

if TYPE_CHECKING:
    from .geometry import Geometry
    from .grouping import Grouping

__all__ = ["calibrate"]


def calibrate(wrapper: CodedWrapper, batches: Iterable[Any]) -> CalibratedCode:
    r"""Learn the best linear decoder for a wrapped module from unlabelled data.

    The module runs on the inputs as they are and on what each of the N workers gets, in groups as
    the wrapper forms them, without stragglers; the second moments of the outputs say how every
    answer is best combined from any set of results. See
    :class:`~coded_torch.codes.CalibratedCode`.

    Args:
        wrapper: the wrapped module, with a fixed code. It is not changed: put the new code in its
            place, or into a new wrapper with the same ordering.
        batches: batches like those that will be answered, also in size, which decides how alike
            the inputs of a group are. Each is what the wrapper is called with: an input, or a tuple
            of positional arguments.

    Returns:
        The calibrated code, with the encoder of the wrapper's code.

    Raises:
        TypeError: the code of the wrapper is not a :class:`~coded_torch.codes.FixedCode`.
        NotEnoughResults: the module's outputs are not finite for some coded input.
        TypeError, ValueError: as calling the wrapper.

    Note:
        :math:`(N + K) / K` times the module's work, in this process and without gradients. All
        decoded outputs count, each by its squared error; with ``link="softmax"``, on the scale of
        logits. Outputs are compared within a batch: what all of its inputs share is no variance.

    Example:
        >>> import torch
        >>> from coded_torch.calibration import calibrate
        >>> from coded_torch.codes import SplineCode
        >>> from coded_torch.nn import CodedWrapper
        >>> from coded_torch.stragglers import Uniform
        >>> class Sine(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.sin()
        >>> def batch(seed):
        ...     return 6 * torch.rand(400, 1, generator=torch.Generator().manual_seed(seed))
        >>> def error(code):
        ...     coded = CodedWrapper(Sine(), code, stragglers=Uniform(1, seed=0))
        ...     return (coded(batch(0)) - batch(0).sin()).square().mean().sqrt()
        >>> spline = SplineCode(4, 5)
        >>> code = calibrate(CodedWrapper(Sine(), spline), [batch(1), batch(2)])
        >>> bool(error(code) < 0.5 * error(spline))
        True
    """
    code = wrapper.code
    if isinstance(code, CalibratedCode):
        code = code.code
    if not isinstance(code, FixedCode):
        raise TypeError(
            f"calibrate: the code of wrapper must be of type FixedCode, got {type(code).__name__}"
        )
    recorder = _Recorder(code)
    recording = CodedWrapper(
        wrapper.module,
        recorder,
        workers=LocalWorkers(max_batch_size=getattr(wrapper.workers, "max_batch_size", None)),
        ordering=wrapper.ordering,
        shuffle=False,
        link=wrapper.link,
        in_dims=wrapper.in_dims,
        out_dims=wrapper.out_dims,
    )
    with torch.no_grad():
        for batch in batches:
            recording(*(batch if isinstance(batch, tuple) else (batch,)))
    return CalibratedCode(code, recorder.sum / max(recorder.num_groups, 1), recorder.num_groups)


class _Recorder(Code):
    """Workers for the N coded inputs and K more for the inputs, and the moments of all outputs.

    Attributes:
        sum: ``[N + K, N + K]``, the sum over groups and outputs.
        num_groups: how many groups it has seen.
    """

    def __init__(self, code: FixedCode) -> None:
        super().__init__(code.num_data, code.num_workers + code.num_data)
        self.code = code
        self.sum = torch.zeros(self.num_workers, self.num_workers, dtype=torch.float64)
        self.num_groups = 0

    @property
    def min_received(self) -> int:
        return self.num_workers

    def fit(
        self, grouping: Grouping, geometry: Geometry | None = None, num_stragglers: int = 0
    ) -> BatchPlan:
        self.num_groups += grouping.num_groups
        return _Recording(self, grouping)


class _Recording(BatchPlan):
    def __init__(self, code: _Recorder, grouping: Grouping) -> None:
        self.code: _Recorder = code
        self.num_groups = grouping.num_groups
        self._grouping = grouping

    def encode(self, values: Tensor) -> Tensor:
        inputs = self._grouping.gather(values)  # [K, G, ...]
        return torch.cat([self.code.code.encode(inputs), inputs])

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        answers = results[self.code.code.num_workers :]  # [K, G, ...]
        centred = results.double() - answers.double().mean((0, 1))
        columns = centred.flatten(1)
        self.code.sum += (columns @ columns.T).cpu()
        return self._grouping.scatter(answers)
