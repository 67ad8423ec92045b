r"""Replication: every input goes to several workers as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .._torch import on_host
from ..linear import LinearMap
from ..linear.maps import SelectMap
from .base import FixedCode

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ReplicationCode"]


class ReplicationCode(FixedCode):
    r"""Replication, the baseline without mixing: worker n computes input ``n mod K``.

    Answered inputs come back bit for bit as their first received worker, in the order of workers,
    computed them. Inputs without an answer get the mean of the group's answered ones, every input
    counted once. ``ReplicationCode(K, K)`` is uncoded inference. It takes the arguments of
    :class:`~coded_torch.codes.Code`.

    Example:
        >>> import torch
        >>> from coded_torch.codes import ReplicationCode
        >>> code = ReplicationCode(num_data=3, num_workers=6)
        >>> code.encode(torch.tensor([1.0, 2.0, 6.0]))
        tensor([1., 2., 6., 1., 2., 6.])
        >>> code.decode(torch.tensor([6.0, 2.0]), received=[2, 4])
        tensor([4., 2., 6.])
        >>> code.source([2, 4])
        tensor([-1,  1,  0])
    """

    mixes = False

    @on_host()
    def source(self, received: Sequence[int] | Tensor) -> Tensor:
        """Return the place of each input's first result, ``[K]``; ``received`` in any order."""
        workers = self._received(received)
        source = torch.full((self.num_data,), -1)
        for place in sorted(range(len(workers)), key=workers.__getitem__, reverse=True):
            source[workers[place] % self.num_data] = place
        return source

    def _make_encoder(self) -> LinearMap:
        source = torch.arange(self.num_workers) % self.num_data
        return SelectMap(self.num_data, source, source[:0], torch.zeros(0, 0))

    def _make_decoder(self, received: tuple[int, ...]) -> LinearMap:
        inputs, first = np.unique(np.array(received) % self.num_data, return_index=True)
        source = torch.full((self.num_data,), -1)
        source[inputs] = torch.from_numpy(first)
        mean = torch.full((1, inputs.size), 1 / inputs.size, dtype=torch.float64)
        return SelectMap(len(received), source, torch.from_numpy(first), mean)

    def _decoder_matrices(self, received: NDArray[np.int64]) -> NDArray[np.float64]:
        own = received[:, None, :] % self.num_data == np.arange(self.num_data)[:, None]
        first = own & (own.cumsum(axis=2) == 1)  # [sets, K, |F|]
        used = first.any(axis=1, keepdims=True)
        mean = used / used.sum(axis=2, keepdims=True)
        matrices: NDArray[np.float64] = np.where(first.any(axis=2, keepdims=True), first, mean)
        return matrices
