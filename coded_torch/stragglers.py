r"""Delay distributions: the seconds that each of N workers takes to answer one request.

Every one draws from a ``torch.Generator``, its own or a given one, never from the global random
state. A latency is infinite if the worker never answers. All but :class:`Trace` take a
``seed`` for their own generator, an integer of 64 bits. It defaults to None, a new seed.
"""

import abc
import contextlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ._arguments import (
    MOST_WORKERS,
    count,
    instance,
    nonnegative,
    positive,
    probability,
    real,
    real_array,
    shown,
)
from ._torch import outside

__all__ = ["Bernoulli", "Contiguous", "ShiftedExponential", "Stragglers", "Trace", "Uniform"]


class Stragglers(abc.ABC):
    """A distribution of the latencies of N workers. A subclass implements ``_draw``.

    A deep copy continues from the same state of its generator.

    Example:
        >>> from coded_torch import stragglers
        >>> class Staggered(stragglers.Stragglers):
        ...     def _draw(self, num_workers, generator):
        ...         return [0.1 * i for i in range(num_workers)]
        >>> Staggered().sample(3)
        tensor([0.0000, 0.1000, 0.2000], dtype=torch.float64)
    """

    num_stragglers: int | None = None  #: S if exactly S workers never answer, otherwise None

    def __init__(self, seed: int | None = None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(count(self, "seed", seed, -(2**63), 2**64 - 1))

    def sample(self, num_workers: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the latencies of one request, ``[N]``, float64, in seconds.

        ``generator`` is on the CPU, and defaults to the distribution's own.
        """
        instance(self, "generator", generator, torch.Generator, optional=True)
        least = max(1, self.num_stragglers or 0)
        num_workers = count(self, "num_workers", num_workers, least, MOST_WORKERS)
        with outside():
            given = self._draw(num_workers, self._generator if generator is None else generator)
            drawn = torch.tensor(math.nan)
            with contextlib.suppress(TypeError, ValueError):  # no numbers
                drawn = torch.as_tensor(given, dtype=torch.float64)
        if drawn.shape != (num_workers,) or not (drawn >= 0).all():  # NaN is not >= 0
            raise ValueError(
                f"{type(self).__name__}: _draw must return {num_workers} latencies of at least 0, "
                f"got {shown(given)}"
            )
        return drawn

    @abc.abstractmethod
    def _draw(self, num_workers: int, generator: torch.Generator) -> Tensor | Sequence[float]:
        """Return the latencies of one request, ``[num_workers]``."""

    def __repr__(self) -> str:
        public = (f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({', '.join(public)})"


class Uniform(Stragglers):
    """A distribution by which ``num_stragglers`` workers never answer. The others have latency 0.

    They are drawn uniformly. There must be at least as many workers.
    """

    def __init__(self, num_stragglers: int, *, seed: int | None = None) -> None:
        super().__init__(seed)
        self.num_stragglers: int = count(self, "num_stragglers", num_stragglers, 0, MOST_WORKERS)

    def _draw(self, num_workers: int, generator: torch.Generator) -> Tensor:
        lost = self._order(num_workers, generator)[: self.num_stragglers]
        return torch.zeros(num_workers, dtype=torch.float64).index_fill_(0, lost, math.inf)

    def _order(self, num_workers: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(num_workers, generator=generator)


class Contiguous(Uniform):
    r"""A distribution by which S neighbouring workers never answer, such as a rack that fails.

    The block starts at a uniform worker, and continues at worker 0 after the last worker.
    """

    def _order(self, num_workers: int, generator: torch.Generator) -> Tensor:
        start = torch.randint(num_workers, (), generator=generator)
        return (start + torch.arange(num_workers)) % num_workers


class Bernoulli(Stragglers):
    r"""A distribution by which each worker, independently, is late with probability p.

    Args:
        p: the probability, in [0, 1].
        latency: of late workers, in seconds, at least 0; 0 for the others. Defaults to infinity.
    """

    def __init__(self, p: float, *, latency: float = math.inf, seed: int | None = None) -> None:
        super().__init__(seed)
        self.p = probability(self, "p", p)
        self.latency = real(self, "latency", latency, "at least 0", lambda x: x >= 0)

    def _draw(self, num_workers: int, generator: torch.Generator) -> Tensor:
        late = torch.rand(num_workers, dtype=torch.float64, generator=generator) < self.p
        return torch.from_numpy(np.where(late, self.latency, 0.0))


class ShiftedExponential(Stragglers):
    r"""The distribution of a fixed time plus an exponential time, independent for each worker.

    .. math:: P(T > t) = \exp(-\mathrm{rate}\,(t - \mathrm{shift})), \qquad t \ge \mathrm{shift}

    Args:
        shift: the least latency, in seconds, at least 0 and finite.
        rate: the rate per second, positive and finite. The mean latency is ``shift + 1 / rate``.

    Reference:
        K. Lee et al., *Speeding up distributed machine learning using codes*, IEEE Trans. Inf.
        Theory 64 (2018).
    """

    def __init__(self, shift: float, rate: float, *, seed: int | None = None) -> None:
        super().__init__(seed)
        self.shift = nonnegative(self, "shift", shift)
        self.rate = positive(self, "rate", rate)

    def _draw(self, num_workers: int, generator: torch.Generator) -> Tensor:
        numbers = torch.rand(num_workers, dtype=torch.float64, generator=generator)  # below 1
        return self.shift - torch.log1p(-numbers) / self.rate


class Trace(Stragglers):
    r"""Measured latencies, a row for each request; after the last row, the first comes again.

    It has a state, ``position``, and draws nothing at random.

    Args:
        source: an array or a sequence of rows, ``[requests, N]``, in seconds, at least 0 or
            infinite. ``numpy.loadtxt`` reads one from a file.

    Example:
        >>> from coded_torch import stragglers
        >>> delays = stragglers.Trace([[0.1, 0.2], [0.3, float("inf")]])
        >>> [delays.sample(2)[0].item() for _ in range(3)]
        [0.1, 0.3, 0.1]
    """

    def __init__(self, source: ArrayLike | Tensor) -> None:
        super().__init__()
        latencies = real_array(self, "source", source)
        if latencies.ndim != 2 or not latencies.size or not (latencies >= 0).all():
            raise ValueError(
                f"{type(self).__name__}: source must be rows of at least one latency each, at "
                f"least 0, got {shown(source)}"
            )
        self.num_requests, self.num_workers = latencies.shape
        self._latencies = latencies
        self.position = 0

    def _draw(self, num_workers: int, generator: torch.Generator) -> Tensor:
        if num_workers != self.num_workers:
            raise ValueError(
                f"{type(self).__name__}: num_workers must be {self.num_workers}, as in the trace, "
                f"got {shown(num_workers)}"
            )
        latencies = torch.tensor(self._latencies[self.position])
        self.position = (self.position + 1) % self.num_requests
        return latencies
