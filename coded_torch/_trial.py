"""A wrapped module beside its wrapper: with other codes, and with what it answers looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .codes import BatchPlan, Code, FixedCode
from .nn import CodedWrapper
from .workers import LocalWorkers

if TYPE_CHECKING:
    from .geometry import Geometry
    from .grouping import Grouping

__all__ = ["beside", "watched"]

_KEPT = (
    *("workers", "num_stragglers", "deadline", "tolerance", "degraded"),
    *("ordering", "shuffle", "link", "in_dims", "out_dims"),
)
#: Given the results ``[N + K, G, ...]`` of one output, the grouping, and the geometry or None.
See = Callable[[Tensor, "Grouping", "Geometry | None"], None]


def beside(wrapper: CodedWrapper, code: Code, **options: Any) -> CodedWrapper:
    """Another wrapper of the same module, of which neither hooks nor ``on_run`` of the first hear.

    Args:
        wrapper: whose options are taken.
        code: the code.
        options: those that are other than the wrapper's.
    """
    kept = {name: getattr(wrapper, name) for name in _KEPT}
    return CodedWrapper(wrapper.module, code, **(kept | options))


def watched(
    wrapper: CodedWrapper,
    see: See,
    *,
    encoder: FixedCode | None = None,
    shrinkage: float | None = None,
) -> CodedWrapper:
    """The module in this process on every input as it is, and perhaps on some that are coded too.

    Args:
        wrapper: what it is beside; its code says K.
        see: called for every output that is decoded.
        encoder: of the coded inputs whose results come first; None: none, N is 0.
        shrinkage: of the geometry, if any.

    Returns:
        A wrapper that answers as the module does.
    """
    batch = getattr(wrapper.workers, "max_batch_size", None)
    return beside(
        wrapper,
        _Watched(wrapper.code.num_data, see, encoder, shrinkage),
        workers=LocalWorkers(max_batch_size=batch),
        num_stragglers=0,
        deadline=None,
        tolerance=None,
        degraded=None,
        shuffle=False,
    )


class _Watched(Code):
    """A worker for each of N coded inputs, and for each of K inputs."""

    def __init__(
        self, num_data: int, see: See, encoder: FixedCode | None, shrinkage: float | None
    ) -> None:
        self.num_coded = 0 if encoder is None else encoder.num_workers
        super().__init__(num_data, self.num_coded + num_data)
        self.see = see
        self.encoder = encoder
        if shrinkage is not None:
            self.uses_geometry, self.shrinkage = True, shrinkage

    @property
    def min_received(self) -> int:
        return self.num_workers

    def fit(
        self, grouping: Grouping, geometry: Geometry | None = None, num_stragglers: int = 0
    ) -> BatchPlan:
        return _WatchedPlan(self, grouping, geometry)


class _WatchedPlan(BatchPlan):
    def __init__(self, code: _Watched, grouping: Grouping, geometry: Geometry | None) -> None:
        self.code: _Watched = code
        self.batch_size, self.num_groups = grouping.batch_size, grouping.num_groups
        self._grouping = grouping
        self._geometry = geometry

    def encode(self, values: Tensor) -> Tensor:
        inputs = self._grouping.gather(values)  # [K, G, ...]
        encoder = self.code.encoder
        return inputs if encoder is None else torch.cat([encoder.encode(inputs), inputs])

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        self.code.see(results, self._grouping, self._geometry)
        return self._grouping.scatter(results[self.code.num_coded :])
