r"""The code that repeats inputs, and predicts what is missing by regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .kernel import KernelCode

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..input_space.distances import Features
    from .base import Options

__all__ = ["RegressionCode"]


class RegressionCode(KernelCode):
    """A code that repeats inputs, unevenly, and predicts missing answers by regression.

    Args:
        num_data: K, as for every :class:`~coded_torch.codes.Code`.
        num_workers: N, as for every :class:`~coded_torch.codes.Code`.
        metric: as for :class:`~coded_torch.Regression`.
        length: as for :class:`~coded_torch.Regression`.
        options: ``ordering``, ``shuffle`` and ``link``, as for every
            :class:`~coded_torch.codes.Code`.
    """

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
        metric: str | Features | Sequence[str | Features] = "auto",
        length: float | str | Sequence[float] = "auto",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(num_data, num_workers, metric=metric, length=length, **options)
