r"""What a code can learn from unlabelled data, before it is used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._trial import watched
from .codes.base import FixedCode
from .codes.calibrated import CalibratedCode
from .nn import CodedWrapper

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
        ValueError: there is no input in the batches.
        NotEnoughResults: the module's outputs are not finite for some coded input.
        TypeError, ValueError: as calling the wrapper.

    Note:
        :math:`(N + K) / K` times the module's work, in this process and without gradients, in as
        large batches as the wrapper's workers take; neither its hooks nor its ``on_run`` hear of
        it. All decoded outputs count, each by its squared error; with ``link="softmax"``, on the
        scale of logits. Outputs are compared within a batch: what all of its inputs share is no
        variance.

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
    size = code.num_workers + code.num_data
    total, num_groups = torch.zeros(size, size, dtype=torch.float64), 0

    def see(results: Tensor, grouping: Grouping, geometry: Geometry | None) -> None:
        answers = results[code.num_workers :]  # [K, G, ...]
        centred = results.double() - answers.double().mean((0, 1))
        columns = centred.flatten(1)
        total.add_((columns @ columns.T).cpu())

    recording = watched(wrapper, see, encoder=code)
    with torch.no_grad():
        for batch in batches:
            recording(*(batch if isinstance(batch, tuple) else (batch,)))
            assert recording.last_run is not None
            num_groups += recording.last_run.num_groups
    if not num_groups:
        raise ValueError("calibrate: batches must hold at least one input, got none")
    return CalibratedCode(code, total / num_groups, num_groups)
